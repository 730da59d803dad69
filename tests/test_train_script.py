"""Stage 2 from its command line to the checkpoint: what it trains, keeps, refuses, and how it continues."""

import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dataset
import genotypes
import model_train
import train_model_batch
from genotypes import BRANCHES, GenotypeError
from model_train import CheckpointError, DerainNetwork
from operations import AttentionModule
from support import experiment
from support.averaging import Averaged
from support.errors import Interrupted, UserError
from support.experiment import BEST, LOCK, STATES, Experiment
from support.images import read_image, write_image
from support.validation import means, measure
from tests.made import (
    ROOT,
    assert_same,
    interrupt,
    photograph,
    random_genotype,
    scalars,
    spoil,
    state,
    write_pairs,
    write_scenes,
)

CHANNELS = [4, 4, 4, 4]
TINY = "--channels 4 4 4 4 --patch_size 16 --batch_size 2 --epochs 2 --steps_per_epoch 2"
ONE_STEP = "--channels 4 4 4 4 --patch_size 16 --batch_size 2 --epochs 1 --steps_per_epoch 1"
PAIRS = "--data pairs --clean_side left --arch genotype.json"
MIXED = "--data scenes pairs --clean_side right left --arch genotype.json"


def train(flags, here="--workers 0 --device cpu"):
    return train_model_batch.main(train_model_batch.get_args_parser().parse_args(f"{flags} {here}".split()))


def weights(run):
    return state(run)["parts"]["net"]


@pytest.fixture
def data(folder):
    """A genotype, scenes of three densities and pairs."""
    write_scenes(folder / "scenes", 6)
    write_pairs(folder / "pairs", 6)
    genotypes.write_json(random_genotype(0), folder / "genotype.json")
    return folder


def trained_network(path="trained.pt", seed=1, channels=(4, 4, 4, 4), residual=True):
    torch.manual_seed(seed)
    net = DerainNetwork(random_genotype(seed), channels, residual)
    model_train.save(net, path)
    return net


# --- what it trains and keeps ---


def test_it_trains_in_another_thread_too_where_no_signal_can_be_caught(data):
    """As in a notebook's or a window's worker; --cache catches signals by itself."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train, f"{PAIRS} {ONE_STEP} --cache --save run").result() == 0
    assert Path("run/best_psnr.pt").exists()


def test_scenes_and_pairs_train_a_network_that_loads(data):
    train(f"{MIXED} {TINY} --internal_start 2 --save run")
    files = {file.name for file in Path("run").iterdir()}
    expected = {"log.txt", "options.json", "summary.json", "genotype.json", *STATES, LOCK}
    events = {name for name in files if name.startswith("events.out.tfevents.")}
    assert len(events) == 1
    assert files - events == expected | set(BEST.values())
    net = model_train.load("run/best_psnr.pt")
    assert net.genotype == random_genotype(0) == genotypes.read_json("run/genotype.json")
    assert list(net.channels) == CHANNELS
    summary = json.loads(Path("run", "summary.json").read_text())
    assert summary["steps"] == 4
    assert summary["parameters"] == sum(p.numel() for p in net.parameters())
    found = scalars("run")
    tags = {"loss", "gradient_norm", "clipped", "val_psnr", "val_ssim", "val_loss", "learning_rate"}
    assert set(found) == tags
    assert [step for step, _ in found["val_psnr"]] == [2, 4]
    assert max(found["val_psnr"], key=lambda point: point[1])[1] == pytest.approx(summary["best"]["psnr"])
    rates = [value for _, value in found["learning_rate"]]
    assert 1e-3 > rates[0] > rates[1] > 0
    assert "python test_view.py --ckt_path run/best_psnr.pt" in Path("run", "log.txt").read_text()


def test_all_but_the_validation_scenes_are_trained_on_whatever_the_seed(data, monkeypatch):
    opened = []
    batches, full_images = dataset.batches, dataset.full_images
    monkeypatch.setattr(dataset, "batches", lambda s, **options: opened.append(s) or batches(s, **options))
    monkeypatch.setattr(dataset, "full_images", lambda s, *a: opened.append(s) or full_images(s, *a))
    for seed in (0, 1):
        train(f"{MIXED} {ONE_STEP} --seed {seed} --save run{seed}")
    parts = dataset.split(dataset.find_training(["scenes", "pairs"], ["right", "left"]))
    assert opened == 2 * [parts["weights"] + parts["architecture"], parts["validation"]]


def test_split_seed_chooses_the_parts_and_val_scenes_are_spread(data, monkeypatch):
    write_pairs(data / "pairs", 40)
    opened = []
    batches, full_images = dataset.batches, dataset.full_images
    monkeypatch.setattr(dataset, "spread", lambda scenes, count: scenes[-count:])
    monkeypatch.setattr(dataset, "batches", lambda s, **options: opened.append(s) or batches(s, **options))
    monkeypatch.setattr(dataset, "full_images", lambda s, *a: opened.append(s) or full_images(s, *a))
    train(f"{PAIRS} {ONE_STEP} --split_seed 1 --val_scenes 1 --save run")
    parts = dataset.split(dataset.find_training(["pairs"], ["left"]), 1)
    assert len(parts["validation"]) == 2
    assert opened == [parts["weights"] + parts["architecture"], parts["validation"][-1:]]


def test_internal_loss_begins_with_its_epoch_and_needs_several_densities(data):
    """The first step's loss is from the same weights and batch: it differs by the internal term alone."""

    def first_loss(name, flags):
        train(f"{flags} {ONE_STEP} --save {name}")
        return scalars(name)["loss"][0][1]

    scenes = "--data scenes --arch genotype.json"
    assert first_loss("with", f"{scenes} --internal_start 1") > first_loss("without", scenes)
    assert first_loss("pairs_with", f"{PAIRS} --internal_start 1") == first_loss("pairs_without", PAIRS)
    warned = [log.parent.name for log in Path().glob("*/log.txt") if "no internal loss" in log.read_text()]
    assert warned == ["without"]


def test_a_seed_fixes_every_weight_whatever_the_workers(data):
    train(f"{PAIRS} {ONE_STEP} --steps_per_epoch 2 --seed 3 --save one")
    torch.manual_seed(77)
    train(f"{PAIRS} {ONE_STEP} --steps_per_epoch 2 --seed 3 --save two", "--device cpu --workers 2")
    assert_same(weights("two"), weights("one"))
    train(f"{PAIRS} {ONE_STEP} --seed 4 --save other")
    assert not torch.equal(weights("other")["head.to_rgb.weight"], weights("one")["head.to_rgb.weight"])


def test_ema_keeps_and_scores_the_averaged_weights(data, monkeypatch):
    after_step = []

    class Spied(Averaged):
        def __init__(self, net, decay):
            super().__init__(net, decay)
            self.state = net.state_dict

        def update(self):
            after_step.append({name: value.clone() for name, value in self.state().items()})
            super().update()

    monkeypatch.setattr(train_model_batch, "Averaged", Spied)
    train(f"{PAIRS} {ONE_STEP} --steps_per_epoch 2 --ema 0.75 --save run")
    kept = state("run", "best_psnr.pt")["weights"]
    first, second = after_step
    assert not torch.equal(first["head.to_rgb.weight"], second["head.to_rgb.weight"])
    for name, value in kept.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.75 * first[name] + 0.25 * second[name])
    assert_same(weights("run"), second)
    measured, _ = measure(model_train.load("run/best_psnr.pt"), scenes_of("validation"), torch.device("cpu"))
    assert state("run")["best"] == pytest.approx(means(measured), abs=1e-4)


def test_the_average_is_that_of_pytorch():
    """Weights and BatchNorm's statistics, bit for bit; its numbers of batches are the network's own."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    expected = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    found = Averaged(net, 0.9)
    for _ in range(3):
        net(torch.rand(2, 3, 8, 8))
        for weight in net.parameters():
            weight.data += torch.rand_like(weight)
        expected.update_parameters(net)
        found.update()
    assert found.state_dict().keys() == expected.state_dict().keys()  # older runs can be resumed
    for name, value in expected.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(found.state_dict()[name], value), name
    assert found.module[1].num_batches_tracked == net[1].num_batches_tracked == 3
    assert not torch.equal(found.module[0].weight, net[0].weight)


def test_the_weights_of_the_loss_are_those_of_the_flags(data, monkeypatch):
    given = []

    def recorded(*args, **weights):
        given.append(weights)
        return multi_to_one(*args, **weights)

    multi_to_one = train_model_batch.multi_to_one
    monkeypatch.setattr(train_model_batch, "multi_to_one", recorded)
    train(f"{MIXED} {ONE_STEP} --internal_start 2 --mse_weight 0 --psnr_weight 0.008 --save one")
    train(f"{MIXED} {ONE_STEP} --internal_start 1 --save two")
    assert given == [
        {"use_internal": False, "mse_weight": 0, "psnr_weight": 0.008},
        {"use_internal": True, "mse_weight": 1, "psnr_weight": 0},
    ]


def test_the_optimizer_is_the_papers_with_the_rate_and_decay_of_the_flags():
    net = DerainNetwork(random_genotype(0), CHANNELS)
    args = train_model_batch.get_args_parser().parse_args("--learning_rate 0.1 --weight_decay 0.2".split())
    optimizer = train_model_batch.make_optimizer(net, args)
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.Adam
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.1, (0.9, 0.999), 0.2)
    assert [*map(id, group["params"])] == [*map(id, net.parameters())]


def test_after_the_warmup_the_rate_is_the_cosines(data):
    train(f"{PAIRS} {TINY} --warmup_steps 1 --learning_rate_min 0.001 --save run")
    assert [value for _, value in scalars("run")["learning_rate"]] == pytest.approx([0.001, 0.001])


def test_each_group_of_an_optimizer_of_ones_own_has_the_schedules_rate(data, monkeypatch):
    def in_two_groups(net, args):
        *others, last = net.parameters()
        return torch.optim.SGD([{"params": others}, {"params": [last], "weight_decay": 0}], 1.0)

    monkeypatch.setattr(train_model_batch, "make_optimizer", in_two_groups)
    train(f"{PAIRS} {ONE_STEP} --warmup_steps 4 --learning_rate 0.004 --save run")
    groups = state("run")["parts"]["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([0.001, 0.001])


def test_warmup_begins_with_small_steps(data):
    train(f"{PAIRS} {TINY} --warmup_steps 4 --learning_rate_min 0.001 --save run")
    assert [value for _, value in scalars("run")["learning_rate"]] == pytest.approx([0.0005, 0.001])


def test_batch_norm_keeps_its_statistics_from_freeze_start_on(data):
    train(f"{PAIRS} {TINY} --freeze_start 2 --save run")
    first, second = (state("run", file)["parts"]["net"] for file in ("last.prev.pt", "last.pt"))
    for name, value in first.items():
        if "running_" in name or "num_batches" in name:
            assert torch.equal(second[name], value), name
    assert first["stem.0.body.0.1.num_batches_tracked"] == 2
    assert not torch.equal(second["head.to_rgb.weight"], first["head.to_rgb.weight"])


def test_max_minutes_ends_the_run_with_a_small_rate_and_a_summary(data, monkeypatch):
    now = SimpleNamespace(seconds=0)

    def monotonic():
        now.seconds += 1  # every look at the clock takes a second
        return now.seconds

    monkeypatch.setattr(experiment, "time", SimpleNamespace(monotonic=monotonic))
    flags = TINY.replace("--epochs 2", "--epochs 1000")
    train(f"{PAIRS} {flags} --max_minutes 0.5 --save run")
    summary = json.loads(Path("run", "summary.json").read_text())
    assert 1 <= summary["steps"] < 30
    assert Path("run", "best_psnr.pt").exists()
    assert scalars("run")["learning_rate"][-1][1] < 0.3e-3
    assert "s left" in Path("run", "log.txt").read_text()


def test_rain_on_the_clean_side_is_said_by_folder(data, capsys):
    wrong = PAIRS.replace("left", "right")
    for flags, said in ((PAIRS, ""), (wrong, "pairs: the rain is on the clean side (6 of 6 images")):
        train(f"{flags} {ONE_STEP} --save run-{len(said)}")
        assert said in (printed := capsys.readouterr().out)
        assert bool(said) == ("the rain is on" in printed)
        assert said in Path(f"run-{len(said)}", "log.txt").read_text()


def test_pairs_that_do_not_belong_together_are_said(data, capsys):
    """And those that are the same picture twice."""
    for folder, first, hint in (
        ("other", 1, "the rainy and the clean image show different pictures, in 6 of 6"),
        ("same", 0, "the rainy image equals the clean one, in 6 of 6"),
    ):
        for i in range(6):
            write_image(Path(folder, "target", f"{i}.png"), photograph(i, 64, 64))
            write_image(Path(folder, "input", f"{i}.png"), photograph((i + first) % 6, 64, 64))
        train(f"--data {folder} --arch genotype.json {ONE_STEP} --save run-{folder}")
        assert f"{folder}: {hint}" in capsys.readouterr().out


def test_a_log_says_by_what_command_and_code_a_run_was_made(data, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_model_batch.py", "--data", "my pairs"])
    train(f"{PAIRS} {ONE_STEP} --warmup_steps 100 --save run")
    log = Path("run", "log.txt").read_text()
    assert "command: train_model_batch.py --data 'my pairs'\n" in log
    git = ["git", "-C", ROOT, "ls-files", "--error-unmatch", "README.md"]
    known = shutil.which("git") and not subprocess.run(git, capture_output=True).returncode
    commit = "[0-9a-f+]+" if known else "unknown"  # as in an unzipped download, or another user's clone
    assert re.search(rf"by .*, commit {commit}, torch {re.escape(torch.__version__)}\n", log)
    assert "--warmup_steps 100: the run has only 1 steps, so its rate does not reach --learning_rate" in log
    (line,) = re.findall(r"options: (.*)", log)
    given = train_model_batch.get_args_parser().parse_args(shlex.split(line))
    options = json.loads(Path("run", "options.json").read_text())
    assert {name: getattr(given, name) for name in options} == options


# --- fine-tuning ---


def test_fine_tuning_begins_with_the_checkpoint(data):
    """With a learning rate of 0 the weights are those of the checkpoint, its sizes and genotype too."""
    net = trained_network(channels=(2, 4, 6, 4), residual=True)
    tiny = ONE_STEP.replace("--channels 4 4 4 4", "")
    train(f"--data pairs --clean_side left --weights trained.pt {tiny} --learning_rate 0 --save run")
    tuned, last = model_train.load("run/best_psnr.pt"), weights("run")
    assert tuned.genotype == net.genotype
    assert tuned.channels == net.channels
    assert tuned.residual
    for (name, value), (_, before) in zip(tuned.named_parameters(), net.named_parameters(), strict=True):
        assert torch.equal(value, before), name
        assert torch.equal(last[name], before), name
    options = json.loads(Path("run", "options.json").read_text())
    assert options["channels"] == [2, 4, 6, 4]


def test_fine_tuning_changes_the_checkpoint_and_can_be_resumed_without_it(data, monkeypatch):
    net = trained_network()
    flags = "--data pairs --clean_side left --weights trained.pt"
    train(f"{flags} {TINY} --save whole")
    assert not torch.equal(weights("whole")["head.to_rgb.weight"], net.head.to_rgb.weight)
    with monkeypatch.context() as patch:
        interrupt(patch, dataset, draw=3)
        with pytest.raises(Interrupted):
            train(f"{flags} {TINY} --save parts")
    Path("trained.pt").unlink()
    train("--resume parts")
    assert_same(weights("parts"), weights("whole"))


def test_fine_tuning_is_gentle_and_keeps_the_checkpoint_where_nothing_is_better(data):
    net = trained_network()
    flags = f"--data pairs --clean_side left --weights trained.pt {TINY}"
    train(f"{flags} --learning_rate 1 --warmup_steps 0 --save worse")
    assert_same(model_train.load("worse/best_psnr.pt").state_dict(), net.state_dict())
    log = Path("worse", "log.txt").read_text()
    before = json.loads(Path("worse", "summary.json").read_text())["begun_with"]
    assert f"before the first step  validation psnr {before['psnr']:.4f} ssim" in log
    assert log.count("no epoch scored a better psnr than the weights that the run began with") == 1
    assert state("worse")["begun_with"] == before

    train(f"{flags} --save run")
    said = Path("run", "log.txt").read_text()
    assert "score it with: python test_view.py --ckt_path run/best_psnr.pt --path TEST_SET\n" in said
    options = json.loads(Path("run", "options.json").read_text())
    assert {name: options[name] for name in train_model_batch.FINE_TUNING} == train_model_batch.FINE_TUNING
    tuned = weights("run")
    assert all(torch.equal(tuned[name], value) for name, value in net.named_buffers())
    train(f"{flags} --learning_rate 3e-4 --freeze_start 2 --save own")
    options = json.loads(Path("own", "options.json").read_text())
    assert (options["learning_rate"], options["freeze_start"], options["warmup_steps"]) == (3e-4, 2, 100)
    train(f"{flags} --demo --save demo")  # of which the demo's own first epoch would be too late
    assert json.loads(Path("demo", "options.json").read_text())["freeze_start"] == 1


def test_fine_tuning_that_is_stopped_in_its_first_validation_still_has_what_it_began_with(data, monkeypatch):
    net = trained_network()
    worse = f"--data pairs --clean_side left --weights trained.pt {TINY} --learning_rate 1 --warmup_steps 0"

    def stopping(*args, full_images=dataset.full_images):
        signal.raise_signal(signal.SIGTERM)
        yield from full_images(*args)

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "full_images", stopping)
        with pytest.raises(Interrupted, match="SIGTERM after step 0"):
            train(f"{worse} --save run")
    train("--resume run")
    assert_same(model_train.load("run/best_psnr.pt").state_dict(), net.state_dict())
    log = Path("run", "log.txt").read_text()
    assert log.count("before the first step") == log.count("no epoch scored a better psnr") == 1


def test_a_run_begun_when_freeze_start_had_no_number_goes_on(data, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, dataset, draw=3)
        with pytest.raises(Interrupted):
            train(f"{PAIRS} {TINY} --save run")
    begun = state("run")
    begun["options"]["freeze_start"] = None
    torch.save(begun, "run/last.pt")
    train("--resume run")
    assert json.loads(Path("run", "summary.json").read_text())["steps"] == 4


def test_another_genotype_than_that_of_the_weights_is_refused(data):
    trained_network(seed=1)
    with pytest.raises(UserError, match=r"--arch genotype\.json: not the genotype of --weights trained\.pt"):
        train(f"{PAIRS} --weights trained.pt {TINY} --save run")
    assert not Path("run").exists()


def test_other_widths_than_those_of_the_weights_are_refused(data):
    trained_network(channels=(2, 4, 6, 4))
    flags = f"--data pairs --clean_side left --weights trained.pt {ONE_STEP} --save run"
    with pytest.raises(UserError, match=r"--channels: --weights trained\.pt has 2 4 6 4; leave one of"):
        train(flags)
    assert not Path("run").exists()
    train(flags.replace("--channels 4 4 4 4", "--channels 2 4 6 4"))
    trained_network(residual=False)
    with pytest.raises(UserError, match=r"--residual: --weights trained\.pt was trained without it"):
        train(flags.replace("--channels 4 4 4 4", "--residual").replace("run", "other"))


def test_weights_are_widened_to_a_multiple_of_their_channels(data):
    """A step at no rate: what is saved computes what it did before."""
    net = trained_network(channels=(2, 4, 6, 4)).eval()
    flags = f"--data pairs --clean_side left --weights trained.pt {ONE_STEP} --learning_rate 0"
    flags += " --freeze_start 1 --seed 5"
    train(f"{flags.replace('--channels 4 4 4 4', '--channels 4 8 12 8')} --save run")
    wide = model_train.load("run/best_psnr.pt").eval()
    assert wide.channels == (4, 8, 12, 8)
    x = torch.rand(2, 3, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(wide(x), net(x))
    assert_same(wide.state_dict(), model_train.widen(net, (4, 8, 12, 8), seed=5).state_dict())


def test_of_a_training_on_a_cpu_the_attention_modules_are_compiled(data, monkeypatch):
    compiled = []
    monkeypatch.setattr(experiment, "no_compiler", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda forward: compiled.append(forward.__self__) or forward)
    train(f"{PAIRS} {ONE_STEP} --save run --compile")
    assert {type(module) for module in compiled} == {AttentionModule}
    assert len(compiled) == sum(BRANCHES)
    assert Path("run", "log.txt").read_text().count("compiled in the first step, which takes minutes\n") == 1


# --- stopped and resumed ---


def test_a_training_stopped_twice_is_bit_equal_to_one_that_was_not(data, monkeypatch):
    """Stopped in the last step of an epoch, before its scores, and within the next epoch."""
    flags = f"{MIXED} {TINY} --internal_start 2 --ema 0.9 --warmup_steps 3 --clean_inputs 0.3"
    train(f"{flags} --save whole")
    flags = f"{flags} --save parts"
    for step, draw in ((2, 2), (3, 1)):
        with monkeypatch.context() as patch:
            interrupt(patch, dataset, draw)
            said = (
                f"SIGTERM after step {step}; .*train_model_batch.py --resume parts --device cpu --workers 0$"
            )
            with pytest.raises(Interrupted, match=said):
                train(flags)
        assert not Path("parts", "summary.json").exists()
        flags = "--resume parts"
    train(flags)
    whole, parts = state("whole"), state("parts")
    for name in ("parts", "best", "totals", "step"):  # weights, optimizer and averaged weights are parts
        assert_same(parts[name], whole[name], name)
    assert whole["parts"].keys() == {"net", "optimizer", "ema"}
    assert whole["parts"]["optimizer"]["state"][0]["step"] == 4
    for file in BEST.values():
        assert_same(state("parts", file), state("whole", file), file)
    assert scalars("parts") == scalars("whole")


def test_a_signal_during_validation_does_not_wait_for_its_end(data, monkeypatch):
    """Slurm kills half a minute after SIGTERM; the scores are made when the run goes on."""
    write_pairs(data / "pairs", 40)
    seen = []

    def stopping(*args, full_images=dataset.full_images):
        for images in full_images(*args):
            seen.append(images)
            signal.raise_signal(signal.SIGTERM)
            yield images

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "full_images", stopping)
        with pytest.raises(Interrupted, match="SIGTERM after step 1"):
            train(f"{PAIRS} {ONE_STEP} --save run")
    assert len(seen) == 1 < len(files_of("validation"))
    train("--resume run")
    assert [step for step, _ in scalars("run")["val_psnr"]] == [1]


# --- numbers and files gone wrong ---

STEP_AN_EPOCH = ONE_STEP.replace("--epochs 1", "--epochs 3") + " --learning_rate_min 0.001"  # and one rate
EIGHT_STEPS = ONE_STEP.replace("--steps_per_epoch 1", "--steps_per_epoch 8")


def test_a_step_that_is_not_finite_leaves_no_trace(data, monkeypatch, value=float("inf")):
    """In the weights, Adam's moments, BatchNorm's statistics and the averaged weights: as after epoch 2."""
    spoil(monkeypatch, dataset, [3], value)
    train(f"{PAIRS} {STEP_AN_EPOCH} --ema 0.9 --save run")
    last, before = state("run"), state("run", "last.prev.pt")
    assert (last["step"], before["step"]) == (3, 2)
    assert_same(last["parts"], before["parts"])
    assert (last["skipped"], before["skipped"]) == (1, 0)
    assert json.loads(Path("run", "summary.json").read_text())["skipped_steps"] == 1
    log = Path("run", "log.txt").read_text()
    (line,) = [line for line in log.splitlines() if "step 3 skipped" in line]
    assert re.search("loss (nan|inf), gradient_norm nan", line)
    assert len(re.findall(r"pairs/\d\.png", line)) == 2
    assert "epoch 3: 1 steps skipped" in log
    assert "in all 1 steps skipped" in log
    found = scalars("run")
    assert [step for step, _ in found["loss"]] == [1, 2]
    assert [step for step, _ in found["val_psnr"]] == [1, 2, 3]


def test_a_training_that_kept_no_network_says_so_and_ends_with_status_1(data, monkeypatch):
    monkeypatch.setattr(Experiment, "validate", lambda *_: dict.fromkeys(["psnr", "ssim", "loss"], math.nan))
    assert train(f"{PAIRS} {ONE_STEP} --save run") == 1
    log = Path("run", "log.txt").read_text()
    assert "NOTHING IS KEPT" in log and "score it with" not in log


def test_too_many_bad_steps_in_a_row_stop_the_run_with_its_state_intact(data, monkeypatch):
    """And with the pictures repaired it goes on, to where it would have come without them."""
    flags = f"{PAIRS} {TINY} --max_bad_steps 2"
    with monkeypatch.context() as patch:
        spoil(patch, dataset, [1])
        train(f"{flags} --save whole")
    with monkeypatch.context() as patch:
        spoil(patch, dataset, [1, 3, 4])  # the first is not in a row with the others
        said = r"--max_bad_steps: 2 steps in a row .*last\.pt is from step 2; .*--resume"
        with pytest.raises(UserError, match=said):
            train(f"{flags} --save run")
    assert state("run")["step"] == 2
    train("--resume run")
    assert_same(state("run")["parts"], state("whole")["parts"])
    assert state("run")["skipped"] == state("whole")["skipped"] == 1


@pytest.mark.parametrize(("largest", "share"), [(1e-3, 1.0), (1e6, 0.0), (0.0, 0.0)])
def test_clipping_limits_the_gradient_and_says_how_large_it_was(largest, share):
    parameters = [torch.zeros(3, requires_grad=True), torch.zeros(4, requires_grad=True)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 2.0)
    found = experiment.clip(parameters, largest)
    norm = 2 * 7**0.5
    assert found["gradient_norm"].item() == pytest.approx(norm)
    assert found["clipped"].item() == share
    after = torch.cat([parameter.grad for parameter in parameters]).norm().item()
    assert after == pytest.approx(1e-3 if share else norm, rel=1e-3)


def test_the_gradient_is_logged_and_the_share_of_steps_that_were_clipped(data, monkeypatch):
    largest, clip = [], experiment.clip
    monkeypatch.setattr(
        experiment, "clip", lambda weights, limit: largest.append(limit) or clip(weights, limit)
    )
    train(f"{PAIRS} {ONE_STEP} --grad_clip 0.001 --save run")
    assert largest == [0.001]
    found = scalars("run")
    assert found["clipped"] == [(1, 1.0)]
    assert found["gradient_norm"][0][1] > 0.001
    assert "gradient_norm" in Path("run", "log.txt").read_text()


def break_file(monkeypatch, file, draw):
    """Cut the file short when batch `draw` has been drawn."""
    batches = dataset.batches

    def wrapped(*args, **options):
        for number, batch in enumerate(batches(*args, **options), start=1):
            yield batch
            if number == draw:
                file.write_bytes(file.read_bytes()[:100])

    monkeypatch.setattr(dataset, "batches", wrapped)


def scenes_of(part):
    return dataset.split(dataset.find_training(["pairs"], ["left"]))[part]


def files_of(part):
    return [Path(scene.key) for scene in scenes_of(part)]


def test_a_file_that_breaks_is_named_once_left_out_and_counted(data, monkeypatch):
    """Across a stop too: its scene is still left out then, and the run is as one that was not stopped."""
    file = files_of("weights")[0]
    content = file.read_bytes()
    with monkeypatch.context() as patch:
        break_file(patch, file, draw=1)
        train(f"{PAIRS} {EIGHT_STEPS} --allow_bad --save whole")
        file.write_bytes(content)
        interrupt(patch, dataset, draw=6)
        with pytest.raises(Interrupted):
            train(f"{PAIRS} {EIGHT_STEPS} --allow_bad --save parts")
    assert not read_whole(file)
    file.write_bytes(content)  # too late
    train("--resume parts")
    assert_same(state("parts")["parts"], state("whole")["parts"])
    for run in ("whole", "parts"):
        log = Path(run, "log.txt").read_text()
        assert log.count(f"left out from now on: {file}: ") == 1
        assert "in all 0 steps skipped and 1 scenes left out" in log
        assert list(json.loads(Path(run, "summary.json").read_text())["left_out"]) == [str(file)]


def read_whole(file):
    try:
        return read_image(file) is not None
    except UserError:
        return False


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("options"), "not the whole state of a run: its options is None"),
        (lambda state: state.update(step="x"), "not the whole state of a run: its step is 'x'"),
        (lambda state: state.update(best=None), "not the whole state of a run: its best is None"),
        (lambda state: state["parts"].pop("net"), "not the whole state of a run: it has no network"),
        (lambda state: state["parts"].update(net={"x": 1}), "holds no weights; begin a new run$"),
        (
            lambda state: state["options"].update(channels=[10**5] * 4),
            "channels .* are not four even numbers",
        ),
        (lambda state: state["options"].update(channels=[1200] * 4), "do not fit the network .*, not .600, "),
        (
            lambda state: next(iter(state["parts"]["net"].values())).fill_(torch.nan),
            "has values that are not finite",
        ),
    ],
)
def test_a_state_that_is_none_is_one_line_before_anything_is_made_of_it(data, change, said):
    train(f"{PAIRS} {ONE_STEP} --save run")
    for file in ("summary.json", "last.prev.pt"):
        Path("run", file).unlink()
    changed = state("run")
    change(changed)
    torch.save(changed, "run/last.pt")
    with pytest.raises((UserError, CheckpointError), match=rf"run/last\.pt: .*{said}") as error:
        train("--resume run")
    assert "\n" not in str(error.value)


def test_a_spoiled_part_of_a_state_is_named_and_the_state_before_is_pointed_to(data):
    train(f"{PAIRS} {ONE_STEP} --save run".replace("--epochs 1", "--epochs 2"))
    Path("run", "summary.json").unlink()
    whole = state("run")
    torch.save(whole | {"parts": whole["parts"] | {"optimizer": {}}}, "run/last.pt")
    with pytest.raises(UserError, match="^run: the saved optimizer does not fit this code "):
        train("--resume run")
    next(iter(whole["parts"]["net"].values())).fill_(torch.nan)
    torch.save(whole, "run/last.pt")
    said = r"not finite; begin a new run; or remove that file, to go on from run/last\.prev\.pt$"
    with pytest.raises(CheckpointError, match=said):
        train("--resume run")
    Path("run", "last.pt").unlink()
    train("--resume run")
    assert state("run")["step"] == 2


@pytest.mark.parametrize("gone", [[], ["last.pt"]])
def test_no_state_is_to_be_removed_for_one_that_fits_no_better(data, monkeypatch, gone):
    """Such as after an operation was changed, or added to a search's."""
    train(f"{PAIRS} {ONE_STEP} --save run".replace("--epochs 1", "--epochs 2"))
    for file in ("summary.json", *gone):
        Path("run", file).unlink()
    changed = {name: lambda c: nn.Conv2d(c, c, 1) for name in model_train.OPERATIONS}
    monkeypatch.setattr(model_train, "OPERATIONS", changed)
    with pytest.raises(CheckpointError, match=r"do not fit .*; and \d+ more; begin a new run$"):
        train("--resume run")
    for damaged in () if gone else ({}, {"parts": None}):
        torch.save(damaged, "run/last.prev.pt")
        with pytest.raises(CheckpointError, match=r"do not fit .*; and \d+ more; begin a new run$"):
            train("--resume run")


def test_too_many_broken_files_stop_the_run_with_its_state_saved(data, monkeypatch):
    """Where they are repaired it goes on as if nothing had been, new files in the folder, which would change
    the split, included.
    """
    train(f"{PAIRS} {EIGHT_STEPS} --save whole")
    file = files_of("weights")[0]
    content = file.read_bytes()
    with monkeypatch.context() as patch:
        break_file(patch, file, draw=1)
        with pytest.raises(UserError) as error:
            train(f"{PAIRS} {EIGHT_STEPS} --save run")
    said = str(error.value)
    assert said.startswith(f"{file}: ")
    assert "1 of 6 files cannot be read, more than 1%; --allow_bad" in said
    assert f"saved after step {state('run')['step']}; go on with: python train_model_batch.py" in said
    with pytest.raises(UserError, match="--allow_bad"):
        train("--resume run")
    file.write_bytes(content)
    write_pairs(data / "pairs", 3, suffix=".bmp", first=50)
    train("--resume run")
    assert_same(state("run")["parts"], state("whole")["parts"])


def test_validation_does_without_a_file_that_breaks_but_not_without_all(data, monkeypatch):
    write_pairs(data / "pairs", 30)
    first, *others = files_of("validation")
    assert len(others) == 1
    with monkeypatch.context() as patch:
        break_file(patch, first, draw=1)
        train(f"{PAIRS} {TINY} --allow_bad --save run")
    assert Path("run", "log.txt").read_text().count(f"left out from now on: {first}: ") == 1
    assert [step for step, _ in scalars("run")["val_psnr"]] == [2, 4]
    write_pairs(data / "pairs", 30)
    break_file(monkeypatch, first, draw=1)
    break_file(monkeypatch, others[0], draw=1)
    with pytest.raises(UserError, match="; no validation picture can be read any more; saved after step 2"):
        train(f"{PAIRS} {TINY} --allow_bad --save other")


@pytest.mark.parametrize("folders", [PAIRS, MIXED])
def test_resuming_without_a_data_folder_is_refused(data, monkeypatch, folders):
    """It would be taken for many broken files."""
    interrupt(monkeypatch, dataset, draw=1)
    with pytest.raises(Interrupted):
        train(f"{folders} {TINY} --save run")
    (data / "pairs").rename(data / "elsewhere")
    with pytest.raises(UserError, match="pairs: no such file or folder"):
        train("--resume run")


# --- which genotype, which data ---


def test_a_network_with_the_residual_begins_by_returning_its_input(data):
    x = torch.rand(1, 3, 13, 18)
    for flag, returned in (("--residual", True), ("", False)):
        train(f"{PAIRS} {ONE_STEP} --learning_rate 0 {flag} --save run{flag}")
        assert torch.equal(model_train.load(f"run{flag}/best_psnr.pt")(x), x) == returned
    train(f"{PAIRS} {TINY} --residual --save trained")
    assert not torch.equal(model_train.load("trained/best_psnr.pt")(x), x)


def test_the_newest_genotype_is_the_default_and_said_first(data, monkeypatch, capsys):
    monkeypatch.setattr(genotypes, "newest_there_is", random_genotype(4), raising=False)
    train(f"--data pairs --clean_side left {ONE_STEP} --save run")
    assert capsys.readouterr().out.splitlines()[:2] == ["genotype: newest_there_is", "data: pairs"]
    assert model_train.load("run/best_psnr.pt").genotype == random_genotype(4)
    assert json.loads(Path("run", "options.json").read_text())["arch"] == "newest_there_is"


def test_a_demo_trains_what_the_newest_demo_search_found(folder, monkeypatch, capsys):
    monkeypatch.setattr(genotypes, "newest_there_is", random_genotype(4), raising=False)
    for name, demo, seed in (("search-EXP-1", True, 5), ("search-EXP-2", False, 6)):
        Path(name).mkdir()
        Path(name, "options.json").write_text(json.dumps({"demo": demo}))
        Path(name, "summary.json").write_text("{}")
        genotypes.write_json(random_genotype(seed), Path(name, "genotype.json"))
    train(f"--demo {ONE_STEP} --save run")
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["genotype: search-EXP-1/genotype.json", "data: datasets/demo"]
    assert model_train.load("run/best_psnr.pt").genotype == random_genotype(5)
    assert model_train.load("run/best_psnr.pt").residual  # of the demo's options
    hint = "score it with: python test_view.py --ckt_path run/best_psnr.pt --demo\n"
    assert hint in Path("run", "log.txt").read_text()
    capsys.readouterr()
    for test_set in ("missing", "there"):
        if test_set == "there":
            Path("datasets", "Rain1200", "DID-MDN-test").mkdir(parents=True)
        train(f"{ONE_STEP} --arch newest_there_is --save {test_set}")
        printed = capsys.readouterr().out
        assert "THIS IS A DEMO: there is no datasets/Rain1200/DID-MDN-training, and no --data" in printed
        assert "genotype: newest_there_is" in printed


@pytest.mark.parametrize(
    ("flags", "error", "words"),
    [
        ("--data pairs --clean_side left --arch no_such", GenotypeError, "--arch no_such: no such genotype"),
        ("--data pairs --clean_side left --arch missing.json", GenotypeError, "missing.json"),
        ("--data pairs --clean_side left --weights missing.pt", CheckpointError, "missing.pt: no such"),
        (
            "--data pairs --clean_side left --weights genotype.json",
            CheckpointError,
            "genotype.json: cannot be",
        ),
        ("--data nowhere --arch genotype.json", UserError, "nowhere: no such file or folder"),
        ("--data pairs --arch genotype.json", UserError, "pairs: .*--clean_side"),
        ("--data pairs --clean_side left --arch genotype.json --device gpu", UserError, "--device gpu"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(data, flags, error, words):
    before = sorted(data.iterdir())
    with pytest.raises(error, match=words):
        train(f"--save run {TINY} {flags}", "" if "--device" in flags else "--device cpu")
    assert sorted(data.iterdir()) == before


def test_a_mistake_is_one_line_and_status_2_at_the_command_line(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_model_batch.py"), "--arch", "no_such", "--data", "nowhere"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("train_model_batch.py: error: --arch no_such: no such genotype")
    assert not list(tmp_path.iterdir())
