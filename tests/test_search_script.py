"""Stage 1 from its command line to the genotype: what it learns from what, writes, refuses, continues."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dataset
import genotypes
import losses
import train_model_batch
import train_search_batch
from architect import Architect
from genotypes import MODULES, PRIMITIVES, GenotypeError
from model_search import SearchNetwork
from model_train import from_supernet
from support import experiment, health, validation
from support.draw import svg
from support.errors import Interrupted, UserError
from support.experiment import BEST, LOCK, STATES, Experiment
from support.health import ALPHA_ROWS, BETA_ROWS
from tests.made import (
    ROOT,
    assert_same,
    interrupt,
    random_genotype,
    scalars,
    session,
    spoil,
    state,
    write_pairs,
    write_scenes,
)

CHANNELS = [2, 2, 2, 2]
TINY = "--channels 2 2 2 2 --patch_size 16 --batch_size 2 --epochs 2 --steps_per_epoch 2 --val_scenes 1"
ONE_STEP = TINY.replace("--epochs 2 --steps_per_epoch 2", "--epochs 1 --steps_per_epoch 1")
MIXED = "--data scenes pairs --clean_side right left"
HERE = "--workers 0 --device cpu"


def search(flags, here=HERE):
    return train_search_batch.main(train_search_batch.get_args_parser().parse_args(f"{flags} {here}".split()))


def use_copy(monkeypatch, folder):
    """Let genotypes be appended to a copy, so that the repository's own file stays as it is."""
    copy = folder / "vocabulary" / "genotypes.py"
    copy.parent.mkdir()
    shutil.copyfile(ROOT / "genotypes.py", copy)
    monkeypatch.setattr(genotypes, "FILE", copy)
    return copy


@pytest.fixture
def vocabulary(folder, monkeypatch):
    return use_copy(monkeypatch, folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A search from its first step to its last, and what its loaders gave it."""
    folder = tmp_path_factory.mktemp("finished")
    write_scenes(folder / "scenes", 6)
    write_pairs(folder / "pairs", 6)
    opened, validated, internal = [], [], []
    batches, full_images = dataset.batches, dataset.full_images

    def compared(outputs, clean, scene, use_internal=True):
        internal.append(use_internal)
        return losses.multi_to_one(outputs, clean, scene, use_internal)

    def recorded(scenes, **options):
        opened.append((scenes, drawn := []))
        for batch in batches(scenes, **options):
            drawn.append(batch)
            yield batch

    def seen(scenes, *options):
        validated.append(scenes)
        return full_images(scenes, *options)

    with pytest.MonkeyPatch.context() as patch, session():
        patch.chdir(folder)
        copy = use_copy(patch, folder)
        patch.setattr(dataset, "batches", recorded)
        patch.setattr(dataset, "full_images", seen)
        patch.setattr(train_search_batch, "multi_to_one", compared)
        search(f"{MIXED} {TINY} --arch_start 2 --internal_start 2 --name found --save run")
    return SimpleNamespace(
        folder=folder,
        run=folder / "run",
        vocabulary=copy,
        opened=opened,
        validated=validated,
        internal=internal,
    )


# --- what it writes ---


def test_what_retrains_the_genotype_has_the_data_and_the_widths(finished):
    line = (finished.run / "log.txt").read_text().splitlines()[-1]
    flags = "--arch found --data scenes pairs --clean_side right left --channels 2 2 2 2"
    assert line.endswith(f"retrain it with: python train_model_batch.py {flags}")


def test_the_run_folder_holds_what_a_search_found(finished):
    files = {file.name for file in finished.run.iterdir()}
    expected = {"log.txt", "options.json", "summary.json", *STATES, LOCK, *BEST.values()}
    expected |= {"genotype_001.json", "genotype_002.json", "genotype.json", "genotype.svg"}
    events = {name for name in files if name.startswith("events.out.tfevents.")}
    assert len(events) == 1
    assert files - events == expected
    genotype = genotypes.read_json(finished.run / "genotype.json")
    assert genotype == genotypes.read_json(finished.run / "genotype_002.json")
    summary = json.loads((finished.run / "summary.json").read_text())
    assert summary["steps"] == 4
    assert genotypes.check(summary["genotype"]) == genotype
    assert summary["collapse"] is None
    log = (finished.run / "log.txt").read_text()
    assert genotypes.literal(genotype) in log
    assert "python train_model_batch.py --arch found" in log


def test_the_genotype_is_that_of_the_last_alpha_and_beta(finished):
    net = SearchNetwork(CHANNELS)
    net.load_state_dict(state(finished.run)["parts"]["net"])
    assert genotypes.read_json(finished.run / "genotype.json") == net.genotype()
    kept = state(finished.run, "best_psnr.pt")
    net.load_state_dict(kept["weights"])
    assert genotypes.check(kept["genotype"]) == net.genotype()
    assert kept["channels"] == CHANNELS


def test_the_genotype_is_appended_under_its_name_with_its_origin(finished):
    text = finished.vocabulary.read_text(encoding="utf-8")
    before = (ROOT / "genotypes.py").read_text(encoding="utf-8")
    assert "found = " not in before
    genotype = genotypes.read_json(finished.run / "genotype.json")
    literal = f"found = {genotypes.literal(genotype)}\n"
    assert text.endswith(literal)
    origin = text.removesuffix(literal).splitlines()[-1]
    assert origin.startswith("# ")
    for words in ("scenes", "pairs", "4 steps of 2 scenes", "channels 2 2 2 2", "seed 0", "commit "):
        assert words in origin


def test_tensorboard_shows_losses_scores_rates_choices_and_pictures(finished):
    found = scalars(finished.run)
    in_each_epoch = {
        *("loss", "gradient_norm", "clipped", "val_psnr", "val_ssim", "val_loss"),
        *("learning_rate", "arch_learning_rate"),
        *("entropy_alpha", "entropy_beta", "margin_alpha", "margin_beta"),
        *("margin_alpha_min", "margin_beta_min"),
        *(f"{kind}_alpha/{row}" for kind in ("entropy", "margin") for row in ALPHA_ROWS),
        *(f"{kind}_beta/{row}" for kind in ("entropy", "margin") for row in BETA_ROWS),
        *(f"winners/{name}" for name in (*MODULES, *PRIMITIVES)),
    }
    in_the_second = {"arch_loss", "arch_gradient_norm", "changed/modules", "changed/edges"}
    assert found.keys() == in_each_epoch | in_the_second
    for tag, values in found.items():
        assert [step for step, _ in values] == ([2, 4] if tag in in_each_epoch else [4]), tag
    assert [value for _, value in found["arch_learning_rate"]] == pytest.approx([0, 3e-4])
    rates = [value for _, value in found["learning_rate"]]
    quarters = [(1 + math.cos(math.pi * steps / 4)) / 2 for steps in (1, 3)]
    assert rates == pytest.approx([1e-4 + 0.0019 * quarter for quarter in quarters])
    for name in ("entropy_alpha", "entropy_beta"):
        assert all(0.99 < value <= 1 for _, value in found[name])  # undecided, so early
    genotype = genotypes.read_json(finished.run / "genotype.json")
    kinds = [kind for cell in genotype.modules for kind in cell]
    assert found["winners/fusion"][-1] == (4, kinds.count("fusion"))
    assert sum(found[f"winners/{name}"][-1][1] for name in PRIMITIVES) == 27
    events = EventAccumulator(str(finished.run))
    events.Reload()
    assert set(events.Tags()["images"]) == {"rain | restored | clean", "alpha", "beta"}
    assert [event.step for event in events.Images("beta")] == [2, 4]
    panel = events.Images("rain | restored | clean")[-1]
    assert panel.width > 3 * 32 and panel.height >= 24


def test_health_is_one_line_an_epoch_with_the_rows_means_and_what_changed(finished):
    lines = [text for text in (finished.run / "log.txt").read_text().splitlines() if " health: " in text]
    assert len(lines) == 2
    net = SearchNetwork(CHANNELS)
    net.load_state_dict(state(finished.run)["parts"]["net"])
    beta = net.beta.detach().double().softmax(-1)
    margins = beta.sort().values[:, -1] - beta.sort().values[:, -2]
    expected = f"beta {margins.mean():.4f} (least {margins.min():.4f})"
    assert expected in lines[1]
    found = scalars(finished.run)
    assert found["margin_beta/cell 3 scale 1/8 U1-U2"][-1] == (4, pytest.approx(margins[-1].item()))
    row = -(beta[0] * beta[0].log()).sum() / math.log(len(PRIMITIVES))
    assert found["entropy_beta/cell 1 scale 1 F1-U1"][-1] == (4, pytest.approx(row.item()))
    first, second = (genotypes.read_json(finished.run / f"genotype_00{i}.json") for i in (1, 2))
    pairs = [
        (x, y)
        for old, new in zip(first.modules, second.modules, strict=True)
        for x, y in zip(old, new, strict=True)
    ]
    assert found["changed/modules"] == [(4, sum(x != y for x, y in pairs))]
    assert "changed" not in lines[0]
    edges = int(found["changed/edges"][0][1])
    assert edges > 0
    assert f"changed {sum(x != y for x, y in pairs)} modules {edges} edges" in lines[1]
    names = (*MODULES, *PRIMITIVES)
    counts = " ".join(f"{name} {found[f'winners/{name}'][-1][1]:g}" for name in names)
    assert lines[1].endswith(f"winners {counts}")


def test_a_search_begun_before_its_health_was_kept_goes_on(finished, vocabulary):
    for folder in ("scenes", "pairs", "run"):
        shutil.copytree(finished.folder / folder, folder)
    old = state("run")
    del old["parts"]["health"]
    torch.save(old, "run/last.pt")
    Path("run", "summary.json").unlink()  # stopped after its last epoch
    assert search("--resume run") == 0
    assert "found = Genotype(" in vocabulary.read_text(encoding="utf-8")


def test_the_discretisation_gap_is_that_of_the_supernet_and_its_own_choices(finished):
    net = SearchNetwork(CHANNELS)
    net.load_state_dict(state(finished.run)["parts"]["net"])
    (scenes,) = {scene for seen in finished.validated for scene in seen}
    fixed = from_supernet(net)
    psnr = json.loads((finished.run / "summary.json").read_text())["validation_psnr"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(finished.folder)
        for name, network in (("supernet", net), ("chosen", fixed)):
            measured, _ = validation.measure(network, [scenes], torch.device("cpu"))
            assert psnr[name] == pytest.approx(validation.means(measured)["psnr"], abs=1e-4)
    assert psnr["supernet"] != psnr["chosen"]
    gap = psnr["supernet"] - psnr["chosen"]
    assert f"discretisation gap {gap:.2f} dB" in (finished.run / "log.txt").read_text()


def test_the_run_folder_has_a_picture_of_the_genotype(finished):
    genotype = genotypes.read_json(finished.run / "genotype.json")
    assert (finished.run / "genotype.svg").read_text(encoding="utf-8") == svg(genotype, "found", CHANNELS)


# --- what it learns from what ---


def test_weights_architecture_and_validation_have_scenes_of_their_own(finished):
    scenes = dataset.find_training([finished.folder / "scenes", finished.folder / "pairs"], ["right", "left"])
    parts = {part: [scene.name for scene in members] for part, members in dataset.split(scenes).items()}
    (weights, weight_batches), (architecture, arch_batches) = finished.opened
    assert [scene.name for scene in weights] == parts["weights"]
    assert [scene.name for scene in architecture] == parts["architecture"]
    assert [[s.name for s in seen] for seen in finished.validated] == 4 * [parts["validation"][:1]]
    files = [{half.path for s in part for half in s.rainy} for part in (weights, architecture)]
    assert not files[0] & files[1]
    assert len(weight_batches) == 4
    assert len(arch_batches) == 2  # from the second epoch on


def test_alpha_and_beta_stay_as_drawn_until_arch_start(finished):
    torch.manual_seed(0)
    drawn = SearchNetwork(CHANNELS).state_dict()
    first, second = (state(finished.run, file)["parts"]["net"] for file in ("last.prev.pt", "last.pt"))
    for name in ("alpha", "beta"):
        assert torch.equal(first[name], drawn[name])
        assert not torch.equal(second[name], first[name])
    assert not torch.equal(first["head.to_rgb.weight"], drawn["head.to_rgb.weight"])
    assert not torch.equal(second["head.to_rgb.weight"], first["head.to_rgb.weight"])


def test_the_internal_loss_counts_from_its_epoch_on_in_both_kinds_of_step(finished):
    assert finished.internal == 2 * [False] + 4 * [True]


def test_the_optimizers_are_the_papers_with_the_rates_and_decays_of_the_flags():
    net = SearchNetwork(CHANNELS)
    flags = "--learning_rate 0.1 --momentum 0.2 --weight_decay 0.3 --arch_learning_rate 0.4"
    args = train_search_batch.get_args_parser().parse_args(f"{flags} --arch_weight_decay 0.5".split())
    weights, architecture = train_search_batch.make_optimizers(net, args)
    assert (type(weights), type(architecture)) == (torch.optim.SGD, torch.optim.Adam)
    (of_weights,), (of_architecture,) = weights.param_groups, architecture.param_groups
    assert [of_weights[name] for name in ("lr", "momentum", "weight_decay")] == [0.1, 0.2, 0.3]
    expected = [0.4, (0.5, 0.999), 0.5]
    assert [of_architecture[name] for name in ("lr", "betas", "weight_decay")] == expected
    for group, parameters in ((of_weights, net.weights()), (of_architecture, net.architecture())):
        assert [*map(id, group["params"])] == [*map(id, parameters)]


def test_each_group_of_an_optimizer_of_ones_own_has_the_schedules_rate(vocabulary, monkeypatch):
    def in_two_groups(net, args):
        *others, last = net.weights()
        weights = torch.optim.SGD([{"params": others}, {"params": [last], "weight_decay": 0}], 1.0)
        return weights, torch.optim.Adam(net.architecture())

    monkeypatch.setattr(train_search_batch, "make_optimizers", in_two_groups)
    write_pairs(Path("pairs"), 3)
    search(f"--data pairs --clean_side left {ONE_STEP} --learning_rate 0.004 --name found --save run")
    groups = state("run")["parts"]["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == [0.004, 0.004]


def test_the_penalty_is_the_weighted_sum_of_its_terms():
    net = SearchNetwork(CHANNELS)

    def penalty(flags):
        args = train_search_batch.get_args_parser().parse_args(flags.split())
        return train_search_batch.make_penalty(net, args)().item()

    regulariser = losses.architecture_regulariser(*(p.softmax(-1) for p in net.architecture())).item()
    complexity = penalty("--lambda_arch 0 --lambda_comp 1")
    assert penalty("--lambda_arch 1 --lambda_comp 0") == pytest.approx(regulariser)
    assert penalty("--lambda_arch 2 --lambda_comp 3") == pytest.approx(2 * regulariser + 3 * complexity)


def test_architecture_steps_have_the_penalty_and_the_statistics_of_the_flags(vocabulary, monkeypatch):
    made = []

    class Spied(Architect):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(train_search_batch, "Architect", Spied)
    write_pairs(Path("pairs"), 3)
    flags = f"--data pairs --clean_side left {ONE_STEP} --lambda_comp 7"
    for run, more in (("1", ""), ("2", "--arch_batch_statistics")):
        search(f"{flags} {more} --name found --save {run}")
    args = train_search_batch.get_args_parser().parse_args(flags.split())
    expected = train_search_batch.make_penalty(made[0].net, args)()
    assert made[0].penalty() == expected > 1
    assert [architect.batch_statistics for architect in made] == [False, True]
    assert made[0].hessian_parts == train_search_batch.HESSIAN_PARTS > 1


def test_the_gradient_of_the_weights_alone_is_clipped_by_its_flag(vocabulary, monkeypatch):
    given = []

    def noted(parameters, largest, clip=experiment.clip):
        given.append((len(parameters), largest))
        return clip(parameters, largest)

    monkeypatch.setattr(experiment, "clip", noted)
    write_pairs(Path("pairs"), 3)
    search(f"--data pairs --clean_side left {ONE_STEP} --grad_clip 0.001 --name found --save run")
    assert given == [(len(SearchNetwork(CHANNELS).weights()), 0.001)]
    assert scalars("run")["clipped"] == [(1, 1.0)]


def test_scored_scenes_are_spread_over_the_validation_part(vocabulary, monkeypatch):
    write_pairs(Path("pairs"), 40)
    validated, full_images = [], dataset.full_images
    monkeypatch.setattr(dataset, "spread", lambda scenes, count: scenes[-count:])
    monkeypatch.setattr(dataset, "full_images", lambda s, *a: validated.append(s) or full_images(s, *a))
    search(f"--data pairs --clean_side left {ONE_STEP} --name found --save run")
    first, last = dataset.split(dataset.find_training(["pairs"], ["left"]))["validation"]
    assert validated == [[last]]


def test_unrolled_steps_look_ahead_on_the_batch_of_the_weights(vocabulary, monkeypatch):
    calls = []

    def spied(architect, batch, training_batch, unrolled=Architect.unrolled):
        calls.append((batch, training_batch))
        return unrolled(architect, batch, training_batch)

    monkeypatch.setattr(Architect, "unrolled", spied)
    write_pairs(Path("pairs"), 8)
    search(f"--data pairs --clean_side left {ONE_STEP} --arch_start 1 --unrolled --name found --save run")
    ((batch, training_batch),) = calls
    parts = dataset.split(dataset.find_training(["pairs"], ["left"]))
    assert set(batch.names) <= {scene.name for scene in parts["architecture"]}
    assert set(training_batch.names) <= {scene.name for scene in parts["weights"]}
    torch.manual_seed(0)
    drawn, found = SearchNetwork(CHANNELS).state_dict(), state("run")["parts"]["net"]
    for name in ("alpha", "beta", "head.to_rgb.weight"):
        assert torch.isfinite(found[name]).all()
        assert not torch.equal(found[name], drawn[name])


def test_a_search_that_never_searches_says_so_and_keeps_no_genotype(vocabulary, monkeypatch):
    write_pairs(Path("pairs"), 3)
    assert search(f"--data pairs --clean_side left {ONE_STEP} --arch_start 2 --name idle --save run") == 1
    assert "NOTHING IS SEARCHED" in Path("run", "log.txt").read_text()
    # The second one's time is up before its first architecture step.
    flags = f"{TINY} --arch_start 2 --max_minutes 99 --name short --save 2"
    monkeypatch.setattr(Experiment, "progress", lambda run: float(run.step))
    assert search(f"--data pairs --clean_side left {flags}") == 1
    assert state("2")["step"] == 1
    assert "--arch_start 2 is after epoch 1, in which --max_minutes ends" in Path("2", "log.txt").read_text()
    for run in ("run", "2"):
        assert "NOTHING WAS SEARCHED in " in Path(run, "log.txt").read_text()
        assert not Path(run, "genotype.json").exists()
    assert not {"idle", "short"} & genotypes.named().keys()


def test_a_validation_picture_that_breaks_does_not_cost_the_genotype(vocabulary, monkeypatch):
    write_pairs(Path("pairs"), 40)
    broken, *others = dataset.split(dataset.find_training(["pairs"], ["left"]))["validation"]
    assert others
    flags = f"--data pairs --clean_side left {ONE_STEP} --val_scenes 2 --arch_start 1 --allow_bad"
    with monkeypatch.context() as patch:
        interrupt(patch, dataset, 1)
        with pytest.raises(Interrupted):
            search(f"{flags} --name found --save run")
    Path(broken.key).write_text("broken")
    assert search("--resume run") == 0
    assert "found = Genotype(" in vocabulary.read_text(encoding="utf-8")
    net = SearchNetwork(CHANNELS)
    net.load_state_dict(state("run")["parts"]["net"])
    psnr = json.loads(Path("run", "summary.json").read_text())["validation_psnr"]
    measured, _ = validation.measure(net, others, torch.device("cpu"))
    assert psnr["supernet"] == pytest.approx(validation.means(measured)["psnr"], abs=1e-4)


# --- stopped and resumed ---


def test_a_search_stopped_twice_is_bit_equal_to_one_that_was_not(finished, vocabulary, monkeypatch):
    """Stopped in the last step of an epoch, before its scores, and between two architecture steps."""
    shutil.copytree(finished.folder / "scenes", "scenes")
    shutil.copytree(finished.folder / "pairs", "pairs")
    flags = f"{MIXED} {TINY} --arch_start 2 --internal_start 2 --name found_in_parts --save run"
    for step, draw in ((2, 2), (3, 1)):
        with monkeypatch.context() as patch:
            interrupt(patch, dataset, draw)
            said = (
                f"SIGTERM after step {step}; .*train_search_batch.py --resume run --device cpu --workers 0$"
            )
            with pytest.raises(Interrupted, match=said):
                search(flags)
        assert not Path("run", "genotype.json").exists()
        assert "found_in_parts" not in vocabulary.read_text(encoding="utf-8")
        flags = "--resume run"
    search(flags)

    whole, parts = state(finished.run), state("run")
    for name in ("parts", "best", "totals", "step"):  # weights, alpha, beta and both optimizers are parts
        assert_same(parts[name], whole[name], name)
    assert {"net", "optimizer", "arch_optimizer", "health"} == whole["parts"].keys()
    assert whole["parts"]["arch_optimizer"]["state"][0]["step"] == 2
    assert "momentum_buffer" in whole["parts"]["optimizer"]["state"][0]
    for file in BEST.values():
        assert_same(state("run", file), state(finished.run, file), file)
    for file in ("genotype_001.json", "genotype_002.json", "genotype.json"):
        assert Path("run", file).read_text() == (finished.run / file).read_text()
    assert scalars("run") == scalars(finished.run)
    assert "found_in_parts = Genotype(" in vocabulary.read_text(encoding="utf-8")


def test_a_search_stopped_while_its_gap_is_measured_ends_there_and_goes_on(vocabulary, monkeypatch):
    write_pairs(Path("pairs"), 6)
    measure = train_search_batch.measure

    def stopped(*args, **options):
        signal.raise_signal(signal.SIGINT)
        return measure(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train_search_batch, "measure", stopped)
        with pytest.raises(Interrupted, match="SIGINT after the last step; go on with: .* --resume run"):
            search(f"--data pairs --clean_side left {ONE_STEP} --arch_start 1 --name found --save run")
    assert not Path("run", "summary.json").exists()
    assert search("--resume run") == 0
    assert set(json.loads(Path("run", "summary.json").read_text())["validation_psnr"]) == {
        "supernet",
        "chosen",
    }
    assert vocabulary.read_text(encoding="utf-8").count("found = Genotype(") == 1


# --- collapsed ---


COLLAPSING = (
    "--data pairs --clean_side left --channels 2 2 2 2 --patch_size 16 --batch_size 2 --epochs 4 "
    "--steps_per_epoch 1 --val_scenes 1 --name found --save run --stop_on_collapse"
)


def test_a_collapsed_search_ends_with_its_last_healthy_genotype(vocabulary, monkeypatch):
    """Stopped in its second epoch, where skip_connect is then made to win, and again at its end."""
    write_pairs(Path("pairs"), 6)
    with monkeypatch.context() as patch:
        interrupt(patch, dataset, 2)
        with pytest.raises(Interrupted):
            search(f"{COLLAPSING} --arch_start 1")
    crafted = state("run")
    crafted["parts"]["net"]["beta"][:, PRIMITIVES.index("skip_connect")] = 9
    torch.save(crafted, "run/last.pt")
    with monkeypatch.context() as patch:
        patch.setattr(train_search_batch, "discretisation_gap", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            search("--resume run")
    assert search("--resume run") == 0
    with pytest.raises(
        UserError, match="--resume run: this search has ended, since it collapsed: 27 of 27 edges"
    ):
        search("--resume run")

    log = Path("run", "log.txt").read_text()
    said = "27 of 27 edges are skip_connect or none"
    assert log.count(f"COLLAPSED in epoch 2: {said}") == 1
    assert f"stopped, since the search collapsed: {said}; epoch 1's genotype is kept" in log
    assert state("run")["step"] == 2
    healthy = genotypes.read_json("run/genotype_001.json")
    assert genotypes.read_json("run/genotype.json") == healthy
    assert genotypes.read_json("run/genotype_002.json") != healthy
    summary = json.loads(Path("run", "summary.json").read_text())
    assert summary["collapse"] == said
    assert genotypes.check(summary["genotype"]) == healthy
    text = vocabulary.read_text(encoding="utf-8")
    assert text.endswith(f"found = {genotypes.literal(healthy)}\n")
    origin = " ".join(text.split())
    assert "2 steps of 2 scenes" in origin and "collapsed, genotype of epoch 1" in origin
    net = SearchNetwork(CHANNELS)
    net.load_state_dict(state("run")["parts"]["net"])
    scenes = dataset.split(dataset.find_training(["pairs"], ["left"]))["validation"]
    measured, _ = validation.measure(from_supernet(net, healthy), scenes, torch.device("cpu"))
    chosen = validation.means(measured)["psnr"]
    assert summary["validation_psnr"]["chosen"] == pytest.approx(chosen, abs=1e-4)


def test_a_search_that_was_never_healthy_leaves_no_genotype(vocabulary, monkeypatch):
    """Frozen, as alpha and beta have no learning rate; not judged before their steps begin in epoch 2."""
    monkeypatch.setattr(health, "WINDOW", 1)
    before = vocabulary.read_bytes()
    write_pairs(Path("pairs"), 6)
    assert search(f"{COLLAPSING} --arch_start 2 --arch_learning_rate 0") == 1
    lines = Path("run", "log.txt").read_text().splitlines()
    (named,) = [line for line in lines if "COLLAPSED" in line]
    assert "COLLAPSED in epoch 2: beta's entropy has stood still for 1 epochs" in named
    assert "no epoch was healthy, so no genotype is kept" in lines[-1]
    assert json.loads(Path("run", "summary.json").read_text())["collapse"] in named
    assert state("run")["step"] == 2
    assert not Path("run", "genotype.json").exists()
    assert vocabulary.read_bytes() == before


def test_a_search_not_told_to_stop_goes_on_and_says_so_once(vocabulary, monkeypatch):
    monkeypatch.setattr(health, "WINDOW", 1)
    write_pairs(Path("pairs"), 6)
    flags = COLLAPSING.replace("--stop_on_collapse", "").replace("--epochs 4", "--epochs 2")
    assert search(f"{flags} --arch_start 1 --arch_learning_rate 0") == 0
    (named,) = [line for line in Path("run", "log.txt").read_text().splitlines() if "COLLAPSED" in line]
    assert "COLLAPSED in epoch 1: " in named
    assert state("run")["step"] == 2
    assert "found = Genotype(" in vocabulary.read_text(encoding="utf-8")


def test_a_search_that_was_not_told_to_stop_when_it_collapsed_goes_on_with_more_minutes(
    vocabulary, monkeypatch
):
    monkeypatch.setattr(health, "WINDOW", 1)
    write_pairs(Path("pairs"), 6)
    flags = COLLAPSING.replace("--stop_on_collapse", "").replace("--epochs 4", "--epochs 2")
    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "progress", lambda run: float(run.step))  # its minutes are over
        assert search(f"{flags} --arch_start 1 --arch_learning_rate 0 --max_minutes 99") == 0
    assert json.loads(Path("run", "summary.json").read_text())["collapse"]
    assert state("run")["step"] == 1
    assert search("--resume run --name longer") == 0
    assert state("run")["step"] == 2


# --- repeated ---


@pytest.mark.parametrize("steps", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_the_same_seed_gives_the_same_search_to_the_bit_with_any_number_of_workers(vocabulary, steps):
    write_scenes(Path("scenes"), 6)
    flags = (
        "--data scenes --clean_side right --channels 2 2 2 2 --patch_size 16 --batch_size 2 --val_scenes 1"
    )
    flags += f" --epochs 1 --steps_per_epoch {steps} --arch_start 1 --arch_learning_rate 0.1"
    for workers in (0, 3):
        search(f"{flags} --name with_{workers} --save with_{workers}", f"--workers {workers} --device cpu")
    whole, parts = (state(f"with_{workers}")["parts"]["net"] for workers in (0, 3))
    assert_same(parts, whole)
    torch.manual_seed(0)
    assert (whole["beta"] != SearchNetwork(CHANNELS).state_dict()["beta"]).all()  # it did search
    assert Path("with_0", "genotype.json").read_text() == Path("with_3", "genotype.json").read_text()


def test_deterministic_has_pytorch_choose_such_kernels(vocabulary, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    write_pairs(Path("pairs"), 3)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*deterministic implementation.*")
            search(f"--data pairs --clean_side left {ONE_STEP} --arch_start 1 --name found --deterministic")
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.backends.cudnn.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert train_model_batch.get_args_parser().parse_args(["--deterministic"]).deterministic


def test_a_finished_search_that_goes_on_asks_for_another_name_before_it_does(vocabulary, monkeypatch):
    """A default one is numbered, at the end."""
    write_pairs(Path("pairs"), 3)
    flags = f"--data pairs --clean_side left {TINY} --arch_start 1 --max_minutes 99"
    for name, run in (("--name mine", "1"), ("", "2")):
        with monkeypatch.context() as patch:
            patch.setattr(Experiment, "progress", lambda run: run.step / 2)
            assert search(f"{flags} {name} --save {run}") == 0
        assert state(run)["step"] == 2
    with pytest.raises(GenotypeError, match="--name mine: already taken"):
        search("--resume 1")
    assert state("1")["step"] == 2
    assert search("--resume 1 --name other") == 0
    assert search("--resume 2") == 0
    default = state("2")["options"]["name"]
    for name in ("mine", "other", default, f"{default}_2"):
        assert f"\n{name} = Genotype(" in vocabulary.read_text(encoding="utf-8")


# --- random instead of searched ---


def random_names(vocabulary):
    text = vocabulary.read_text(encoding="utf-8")
    return re.findall(r"^((?:random|chance)\w+) = Genotype", text, re.MULTILINE)


def test_random_genotypes_are_written_with_their_origin_and_no_data_is_opened(vocabulary, folder, capsys):
    before = set(folder.iterdir())
    assert search_random("--random 3 --seed 5") == 0
    assert set(folder.iterdir()) == before
    names = [f"random_s5_0{i}" for i in range(3)]
    assert random_names(vocabulary) == names
    drawn = genotypes.draw_random(3, seed=5)
    text = vocabulary.read_text(encoding="utf-8")
    for name, genotype in zip(names, drawn, strict=True):
        assert f"\n{name} = {genotypes.literal(genotype)}\n" in text
    assert text.count("# drawn at random, not searched; seed 5, commit ") == 3
    said = capsys.readouterr().out
    assert "--arch random_s5_00" in said and "the newest, which now is random_s5_02" in said

    after = vocabulary.read_bytes()
    with pytest.raises(GenotypeError, match="random_s5_00: already taken"):
        search_random("--random 3 --seed 5")
    with pytest.raises(UserError, match="--random: .*leave out --data"):
        search_random("--random 3 --data nowhere")
    assert vocabulary.read_bytes() == after
    search_random("--random 101 --name chance")
    assert random_names(vocabulary)[3:] == [f"chance_{i:03d}" for i in range(101)]


def test_random_genotypes_wait_for_their_turn(vocabulary):
    with genotypes._locked(vocabulary):
        writer = threading.Thread(target=search_random, args=["--random 2"])
        writer.start()
        writer.join(1)
        assert writer.is_alive()
        assert random_names(vocabulary) == []
    writer.join()
    assert random_names(vocabulary) == ["random_s0_00", "random_s0_01"]


def search_random(flags):
    return search(flags, here="")


@pytest.mark.parametrize(
    ("loader", "same", "other"),
    [
        (1, ("net", "optimizer"), ("alpha", "beta")),  # the weights' batch
        (2, ("arch_optimizer",), ("head.to_rgb.weight", "stem.0.body.0.1.running_mean")),
    ],
)
def test_a_step_that_is_not_finite_leaves_no_trace(vocabulary, monkeypatch, loader, same, other):
    """A bad batch of the weights touches alpha and beta alone, which have a good one, and the other way."""
    write_pairs(Path("pairs"), 6)
    spoil(monkeypatch, dataset, [1], loader=loader)
    flags = f"{ONE_STEP} --learning_rate_min 0.002 --arch_start 1"
    search(f"--data pairs --clean_side left {flags} --name found --save run")
    last, before = (state("run", file)["parts"] for file in ("last.pt", "last.prev.pt"))  # steps 1 and 0
    for name in other:
        assert not torch.equal(last["net"].pop(name), before["net"].pop(name))
    if loader == 1:
        for name in same:
            assert_same(last[name], before[name])
    else:
        assert_same(last["arch_optimizer"], before["arch_optimizer"])
        for name in ("alpha", "beta"):
            assert torch.equal(last["net"][name], before["net"][name])
    log = Path("run", "log.txt").read_text()
    (line,) = [line for line in log.splitlines() if "step 1 skipped" in line]
    assert f"step 1 skipped: {'loss' if loader == 1 else 'arch_loss'} nan, " in line
    parts = dataset.split(dataset.find_training(["pairs"], ["left"]))
    own = {file for scene in parts["weights" if loader == 1 else "architecture"] for file in scene.files}
    assert {*line.split("its files: ")[1].split()} <= own
    assert state("run")["skipped"] == 1


def test_bad_architecture_steps_in_a_row_stop_the_search_though_the_weights_go_on(vocabulary, monkeypatch):
    write_pairs(Path("pairs"), 6)
    spoil(monkeypatch, dataset, [1, 2], loader=2)
    flags = f"--data pairs --clean_side left {TINY} --arch_start 1 --name found --save run"
    with pytest.raises(UserError, match=r"--max_bad_steps: 2 steps in a row were not finite \(arch_loss nan"):
        search(f"{flags} --max_bad_steps 2")
    for name, value in state("run")["parts"]["net"].items():
        assert torch.isfinite(value).all(), name


def test_a_search_whose_name_was_taken_meanwhile_goes_on_under_another(vocabulary, monkeypatch):
    write_pairs(Path("pairs"), 6)
    with monkeypatch.context() as patch:
        interrupt(patch, dataset, draw=1)
        with pytest.raises(Interrupted):
            search(f"--data pairs --clean_side left {ONE_STEP} --arch_start 1 --name found --save run")
    vocabulary.write_text(vocabulary.read_text(encoding="utf-8") + "\nfound = None\n", encoding="utf-8")
    with pytest.raises(GenotypeError, match="--name found: already taken"):
        search("--resume run")
    search("--resume run --name found_too")
    assert "\nfound_too = Genotype(" in vocabulary.read_text(encoding="utf-8")
    with pytest.raises(UserError, match="--resume run: this run has finished"):
        search("--resume run")


def test_searches_begun_in_the_same_second_all_keep_what_they_found(vocabulary):
    """Each was told that its name is free. A given name is not changed, but the run says how to go on."""

    def add(name, seed):
        run = SimpleNamespace(args=SimpleNamespace(name=name), folder=Path("run"))
        return train_search_batch.add_to_vocabulary(run, random_genotype(seed), "somewhere")

    name = "search_20260101_120000"
    assert [add(name, seed) for seed in (0, 1, 2)] == [name, f"{name}_2", f"{name}_3"]
    text = vocabulary.read_text(encoding="utf-8")
    assert add(name, 1) == f"{name}_2"  # killed right after it, and resumed
    again = "--resume run --name OTHER; the genotype found is in run/genotype.json"
    with pytest.raises(UserError, match=f"{name}_2: already taken .*, with {again}"):
        add(f"{name}_2", 3)
    with pytest.raises(GenotypeError, match="--name not-a-name: not a Python identifier"):
        add("not-a-name", 3)
    assert vocabulary.read_text(encoding="utf-8") == text


# --- refused before anything is written ---


def test_an_unrolled_step_through_statistics_of_all_gpus_is_refused():
    with pytest.raises(UserError, match="--sync_bn: has no second derivative"):
        search("--unrolled --arch_batch_statistics --sync_bn")


@pytest.mark.parametrize("name", ["PRIMITIVES", "find", "taken", "not-a-name"])
def test_a_name_that_cannot_be_added_is_refused_before_anything_is_written(vocabulary, name):
    text = vocabulary.read_text(encoding="utf-8") + "\ntaken = None\n"
    vocabulary.write_text(text, encoding="utf-8")
    write_pairs(Path("pairs"), 3)
    with pytest.raises(GenotypeError, match=f"--name {name}: "):
        search(f"--data pairs --clean_side left {TINY} --name {name} --save run")
    assert not Path("run").exists()
    assert vocabulary.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("--data nowhere", "nowhere: no such"),
        ("--data pairs", "--clean_side"),
        ("--data few --clean_side left", "3"),
    ],
)
def test_data_that_is_no_good_is_refused_before_anything_is_written(vocabulary, data, words):
    write_pairs(Path("pairs"), 3)
    write_pairs(Path("few"), 2)
    with pytest.raises(UserError, match=words):
        search(f"{data} {TINY} --name found --save run")
    assert not Path("run").exists()
    assert "found = " not in vocabulary.read_text(encoding="utf-8")


def test_a_bad_picture_is_one_line_and_status_2_at_the_command_line(tmp_path):
    write_pairs(tmp_path / "pairs", 4)
    (tmp_path / "pairs" / "2.png").write_bytes(b"")
    flags = "--data pairs --clean_side left --name found --save run"
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_search_batch.py"), *flags.split(), *TINY.split(), *HERE.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("train_search_batch.py: error: pairs/2.png: is empty")
    assert [file.name for file in tmp_path.iterdir()] == ["pairs"]


# --- with no flags, and what comes next ---


def test_without_data_it_is_a_demo_that_leaves_the_vocabulary_alone(vocabulary, capsys):
    before = vocabulary.read_bytes()
    tiny = "--channels 2 2 2 2 --patch_size 16 --batch_size 2 --epochs 1 --steps_per_epoch 1 --arch_start 1"
    search(f"{tiny} --name mine")
    printed = capsys.readouterr().out.splitlines()
    assert "THIS IS A DEMO" in printed[1]
    assert "datasets/Rain1200" in printed[1]
    chosen = [line for line in printed if not line.startswith(("*", "THIS", "at hand"))]
    assert chosen[0] == "genotype: in the run folder (demo; --name is not used)"
    assert chosen[1] == "data: datasets/demo"
    assert vocabulary.read_bytes() == before
    (run,) = Path().glob("search-EXP-*")
    options = json.loads((run / "options.json").read_text())
    assert options["demo"] is True
    assert (options["epochs"], options["steps_per_epoch"], options["internal_start"]) == (1, 1, 2)
    genotypes.read_json(run / "genotype.json")
    assert f"train_model_batch.py --arch {run}/genotype.json" in (run / "log.txt").read_text()


def test_the_next_command_takes_the_genotype_by_its_name_and_by_default(finished):
    """In a process of its own, as the names are read when it starts."""
    genotype = genotypes.read_json(finished.run / "genotype.json")
    code = "import train_model_batch as t, genotypes; t.main(t.get_args_parser().parse_args())"
    code += "; t.main(t.get_args_parser().parse_args(['--save', 'named', '--arch', 'found', *sys.argv[1:]]))"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; {code}",
            *f"--data pairs --clean_side left {ONE_STEP} {HERE}".split(),
        ],
        cwd=finished.folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(finished.vocabulary.parent), str(ROOT)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "genotype: found"
    (default,) = finished.folder.glob("eval-EXP-*")
    for run in (default, finished.folder / "named"):
        assert genotypes.read_json(run / "genotype.json") == genotype
        assert genotypes.check(state(run, "best_psnr.pt")["genotype"]) == genotype


@pytest.mark.parametrize("complexity", ["params", "macs"])
def test_complexity_flag_chooses_what_is_counted(complexity):
    parse = train_search_batch.get_args_parser().parse_args
    net = SearchNetwork((4, 4, 4, 4))
    alone = "--lambda_arch 0 --lambda_comp 1 --patch_size 20".split()
    penalty = train_search_batch.make_penalty(net, parse([*alone, "--complexity", complexity]))()
    measure = losses.MEASURES[complexity]
    choices, inputs = (net.module_choices(), net.operation_choices()), net.choice_inputs(20)
    sizes = [losses.choice_sizes(c, i, measure) for c, i in zip(choices, inputs, strict=True)]
    distributions = [p.softmax(-1) for p in net.architecture()]
    assert penalty.item() == pytest.approx(losses.complexity(distributions, sizes).item())
    other = train_search_batch.make_penalty(net, parse(alone))()
    assert (penalty.item() == pytest.approx(other.item(), rel=1e-6)) == (complexity == "params")


def test_another_seed_draws_other_weights(vocabulary):
    write_pairs(Path("pairs"), 3)
    search(f"--data pairs --clean_side left {ONE_STEP} --seed 1 --name found --save run")
    torch.manual_seed(1)
    drawn = SearchNetwork(CHANNELS).state_dict()
    assert torch.equal(state("run")["parts"]["net"]["alpha"], drawn["alpha"])
