"""Searched against random genotypes: what is trained, what is trained only once, and what is reported."""

import json
import re
import shutil

import pytest
import torch

import dataset
import genotypes
import train_model_batch
import train_search_batch
from model_search import SearchNetwork
from model_train import CheckpointError, from_supernet
from support import chance
from support.errors import UserError
from tests.made import random_genotype, session, write_pairs, write_scenes

FLAGS = (
    "--data pairs --clean_side left --channels 2 2 2 2 --patch_size 16 --batch_size 2 --epochs 1 "
    "--steps_per_epoch 2 --val_scenes 1 --workers 0 --device cpu"
)


def compare(flags):
    with session():
        return chance.main(chance.get_args_parser().parse_args(flags.split()))


def test_every_genotype_is_trained_alike_and_once(folder, monkeypatch, capsys):
    write_pairs(folder / "pairs", 6)
    for seed, name in enumerate(("found", "random_0", "random_1", "random_2")):
        monkeypatch.setattr(genotypes, name, random_genotype(seed), raising=False)
    torch.manual_seed(0)
    train_search_batch.save_supernet(SearchNetwork((2, 2, 2, 2)), "supernet.pt")
    command = f"--searched found --random random_* --seeds 0 1 --runs runs --supernet supernet.pt -- {FLAGS}"
    compare(command)
    first = capsys.readouterr().out
    summaries = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/summary.json")}
    assert len(summaries) == 8
    compare(command)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/summary.json")} == summaries
    with pytest.raises(UserError, match="--steps_per_epoch 3: the run in .* was begun with 2"):
        compare(command.replace("--steps_per_epoch 2", "--steps_per_epoch 3"))
    with pytest.raises(UserError, match="--seed: is set here for each run, so leave it out after --"):
        compare(f"{command} --seed 3")
    again = capsys.readouterr().out
    assert again.strip() in first  # read from the summaries, the table is the same
    rows = re.findall(r"^ +\d+\. (\w+) +(searched|random) +[\d,]+ +([\d.]+) ([\d.]+) +([\d.]+)", again, re.M)
    assert {(name, group) for name, group, *_ in rows} == {
        ("found", "searched"),
        *((f"random_{i}", "random") for i in range(3)),
    }
    assert [float(mean) for *_, mean in rows] == sorted((float(mean) for *_, mean in rows), reverse=True)
    for *_, one, two, mean in rows:
        assert (float(one) + float(two)) / 2 == pytest.approx(float(mean), abs=2e-3)
    assert "rank correlation of PSNR with PSNR with shared weights" in again


def test_runs_that_are_not_alike_are_not_compared(folder, monkeypatch, capsys):
    write_pairs(folder / "pairs", 6)
    for seed, name in enumerate(("found", "random_0", "random_1")):
        monkeypatch.setattr(genotypes, name, random_genotype(seed), raising=False)
    command = f"--searched found --random random_0 --seeds 0 0 --runs runs -- {FLAGS}"
    assert compare(f"{command} --learning_rate 0.01") == 0
    summary = folder / "runs/random_0-s0/summary.json"
    with pytest.raises(UserError, match="random_1-s0: was trained with --learning_rate 0.001, .* with 0.01;"):
        compare(command.replace("random_0", "random_*"))
    shutil.rmtree(folder / "runs/random_1-s0")
    capsys.readouterr()

    kept = summary.read_text()
    summary.write_text(json.dumps(json.loads(kept) | {"best": {"psnr": None}}))
    assert compare(command) == 1
    said = capsys.readouterr()
    assert "random_0-s0: no epoch had a score that is a number; random_0 is left out" in said.err
    assert "found" in said.out and "random_0" not in said.out
    summary.write_text(kept[:9])
    with pytest.raises(UserError, match=r"random_0-s0.summary\.json: cannot be read .*; remove its folder"):
        compare(command)
    summary.write_text(kept)
    for path in (folder / "runs").glob("*/options.json"):  # as they were written once
        path.write_text(json.dumps(json.loads(path.read_text()) | {"val_scenes": None}))
    assert compare(command.replace("--val_scenes 1", "--val_scenes 0")) == 0
    monkeypatch.setattr(genotypes, "random_0", random_genotype(9))
    with pytest.raises(UserError, match="random_0-s0: holds a run of another genotype called random_0"):
        compare(command)


def test_runs_of_older_code_and_another_machine_are_read_as_they_would_be_begun_here(
    folder, monkeypatch, capsys
):
    write_pairs(folder / "pairs", 6)
    for seed, name in enumerate(("found", "random_0")):
        monkeypatch.setattr(genotypes, name, random_genotype(seed), raising=False)
    command = f"--searched found --random random_0 --runs runs -- {FLAGS}"
    assert compare(command) == 0
    files = list(folder.glob("runs/*/options.json"))
    for file in files:
        own = json.loads(file.read_text()) | {"device": "cuda:99"}
        del own["psnr_weight"]  # a flag that was added since
        file.write_text(json.dumps(own))
    train_search_batch.save_supernet(SearchNetwork((2, 2, 2, 2)), "supernet.pt")
    assert compare(f"--supernet supernet.pt {command} --psnr_weight 0") == 0
    assert re.search(r"mean +shared$", capsys.readouterr().out, re.M)
    with pytest.raises(UserError, match=r"--psnr_weight 0.5: the run in .* was begun with 0\.0"):
        compare(f"{command} --psnr_weight 0.5")
    files[0].write_text("[]")
    with pytest.raises(UserError, match=r"options\.json: cannot be read \(holds \[\]\); remove its folder"):
        compare(command)


def test_genotypes_are_trained_seed_by_seed(folder, monkeypatch):
    """So that a comparison cut short is a fair one."""
    for seed, name in enumerate(("found", "random_0")):
        monkeypatch.setattr(genotypes, name, random_genotype(seed), raising=False)
    asked = []

    def retrained(name, seed, folder, flags):
        asked.append((name, seed))
        return {"best": {"psnr": 20.0}, "parameters": 9}

    monkeypatch.setattr(chance, "retrain", retrained)
    command = "--searched found --random random_0 --seeds 0 1 --runs runs -- --data pairs"
    compare(command)
    assert asked == [(name, seed) for seed in (0, 1) for name in ("random_0", "found")]


def test_a_genotype_without_a_score_for_one_seed_is_left_out_with_all_its_seeds(folder, monkeypatch, capsys):
    for seed, name in enumerate(("found", "random_0")):
        monkeypatch.setattr(genotypes, name, random_genotype(seed), raising=False)
    asked = []

    def retrained(name, seed, folder, flags):
        asked.append((name, seed))
        lost = (name, seed) == ("random_0", 1)
        return {"best": {"psnr": None if lost else 20.0 + seed}, "parameters": 9}

    monkeypatch.setattr(chance, "retrain", retrained)
    command = "--searched found --random random_0 --seeds 0 1 2 --runs runs -- --data pairs"
    assert compare(command) == 1
    said = capsys.readouterr()
    assert "random_0-s1: no epoch had a score" in said.err
    assert "random_0" not in said.out and "20.000 21.000 22.000" in said.out
    assert ("random_0", 2) not in asked and ("found", 2) in asked


def test_shared_weights_are_scored_on_the_data_that_the_runs_found(folder, monkeypatch, capsys):
    """--data left out, it is DID-MDN's place. And a run of which only last.prev.pt is left goes on."""
    write_scenes(folder / "datasets" / "Rain1200", 24)
    for seed, name in enumerate(("found", "random_0", "random_1")):
        monkeypatch.setattr(genotypes, name, random_genotype(seed), raising=False)
    flags = FLAGS.replace("--data pairs --clean_side left ", "")
    command = f"--searched found --random random_* --runs runs --supernet supernet.pt -- {flags}"
    with pytest.raises(CheckpointError, match=r"supernet\.pt"):
        compare(command)
    assert not list(folder.glob("runs/*"))  # it was looked for before anything was trained
    train_search_batch.save_supernet(SearchNetwork((2, 2, 2, 2)), "supernet.pt")
    compare(command)
    assert re.search(r"mean +shared$", capsys.readouterr().out, re.M)
    run = folder / "runs" / "found-s0"
    (run / "summary.json").unlink()
    (run / "last.pt").rename(run / "last.prev.pt")  # as a stop at a bad moment leaves it
    compare(command)
    assert (run / "summary.json").exists()


def test_shared_scores_are_of_fresh_statistics_and_of_the_parts_that_the_runs_have(folder, monkeypatch):
    write_pairs(folder / "pairs", 40)
    parse, batches = train_model_batch.get_args_parser().parse_args, dataset.batches
    drawn, scored = [], []

    def measured(net, scenes, device):
        scored.append((net, scenes))
        return [(torch.ones(1), torch.ones(1), torch.ones(()))], None

    monkeypatch.setattr(dataset, "batches", lambda scenes, *a: drawn.append(scenes) or batches(scenes, *a))
    monkeypatch.setattr(chance, "measure", measured)
    options = parse(f"{FLAGS} --split_seed 1".split())
    chance.shared_scores(SearchNetwork((2, 2, 2, 2)), ["half_width_mixed_rain"], options)
    parts = dataset.split(dataset.find_training(["pairs"], ["left"]), 1)
    ((net, scenes),) = scored
    assert drawn == [parts["weights"]] and scenes == parts["validation"][:1]
    assert net.stem[0].body[0][1].num_batches_tracked == chance.RECALIBRATION


def test_runs_of_more_minutes_are_not_alike_and_those_on_another_gpu_are(tmp_path):
    runs = {("half_width_mixed_rain", seed): tmp_path / str(seed) for seed in (0, 1)}
    for (name, seed), folder in runs.items():
        options = {"seed": seed, "device": f"cuda:{seed}", "workers": seed, "max_minutes": 30}
        folder.mkdir()
        genotypes.write_json(genotypes.find(name)[1], folder / "genotype.json")
        (folder / "options.json").write_text(json.dumps(options))
    chance.check_alike(runs)
    (folder / "options.json").write_text(json.dumps(options | {"max_minutes": 60}))
    with pytest.raises(UserError, match="was trained with --max_minutes 60, .* with 30; "):
        chance.check_alike(runs)


def test_report_gives_mean_spread_interval_and_rank_correlation():
    psnr = {"a": [20.0, 22.0], "b": [24.0, 24.0], "c": [26.0, 28.0], "s": [25.0, 25.0]}
    groups = {"a": "random", "b": "random", "c": "random", "s": "searched"}
    parameters = {"a": 300, "b": 200, "c": 100, "s": 1000}
    text = chance.report(groups, psnr, parameters, {"a": 1.0, "b": 2.0, "c": 3.0, "s": 9.0})
    # 21, 24, 27: SD 3; t of 2 degrees of freedom is 4.303, so 4.303 * 3 / sqrt(3)
    assert "random      3 genotypes: mean 24.000 dB, SD 3.000, 95 % interval of the mean +-7.452" in text
    assert "21.000 to 27.000; 200 parameters on average" in text
    assert "searched    1 genotypes: mean 25.000 dB, a single one" in text
    assert "correlation" not in chance.report(groups, dict.fromkeys(psnr, [20.0, 20.0]), parameters)
    assert "with parameters: -1.00 (p = 0.33)" in text and "with shared weights: +1.00 (p = 0.33)" in text


@pytest.mark.parametrize(
    ("ys", "rho", "p"),
    [
        ([1, 2, 3, 4], 1.0, 2 / 24),  # of 24 orders two are as far from chance
        ([1, 2, 3, 5, 4], 0.9, 10 / 120),
        ([3, 1, 4, 1.5, 9, 2.6, 5.3, 5.8, 9.7, 9.3, 2.3, 8.4], 0.5035, 0.0952),  # by t
    ],
)
def test_the_p_of_a_rank_correlation_is_the_share_of_orders_that_are_as_far_from_chance(ys, rho, p):
    found = chance.rank_correlation(list(range(len(ys))), ys)
    assert found == (pytest.approx(rho, abs=1e-4), pytest.approx(p, rel=0.1))
    assert chance.rank_correlation(list(range(len(ys))), ys) == found


def test_a_supernet_is_loaded_as_it_was_saved(tmp_path):
    net = SearchNetwork((2, 2, 2, 2), residual=1)
    train_search_batch.save_supernet(net, tmp_path / "net.pt")
    loaded = train_search_batch.load_supernet(tmp_path / "net.pt")
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(from_supernet(loaded.eval())(x), from_supernet(net.eval())(x))
    assert not from_supernet(net).training and from_supernet(net.train()).training
    torch.save({"format": train_search_batch.SUPERNET}, tmp_path / "empty.pt")
    with pytest.raises(CheckpointError, match=r"empty\.pt: channels None are not four even numbers"):
        train_search_batch.load_supernet(tmp_path / "empty.pt")
    torch.save({"format": "manas-network-1"}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other\.pt: not a supernet"):
        train_search_batch.load_supernet(tmp_path / "other.pt")


def test_a_supernet_of_other_operations_is_refused(tmp_path):
    net = SearchNetwork((2, 2, 2, 2))
    net.beta = torch.nn.Parameter(net.beta.detach()[:, 1:])
    net.genotype = lambda: random_genotype(0)
    train_search_batch.save_supernet(net, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=r"net\.pt: .*beta is .*; .* operations in genotypes\.py"):
        train_search_batch.load_supernet(tmp_path / "net.pt")


def test_an_unknown_name_is_an_error():
    with pytest.raises(UserError, match=r"nobody_\*: no such genotype"):
        chance.matching("nobody_*")


def test_a_genotype_is_searched_or_random_and_not_both(monkeypatch):
    for seed, name in enumerate(("found_0", "found_1", "random_0")):
        monkeypatch.setattr(genotypes, name, random_genotype(seed), raising=False)
    with pytest.raises(UserError, match="--searched found_0: matches --random, too"):
        compare("--searched found_* --random *_0 --runs runs -- --data nowhere")


@pytest.mark.parametrize("flag", ["arch", "save", "resume"])
def test_a_flag_that_is_each_runs_own_is_refused(monkeypatch, flag):
    for seed, name in enumerate(("found", "random_0")):
        monkeypatch.setattr(genotypes, name, random_genotype(seed), raising=False)
    monkeypatch.setattr(chance, "retrain", lambda *_: 1 / 0)
    with pytest.raises(UserError, match=f"--{flag}: is set here for each run, so leave it out after --"):
        compare(f"--searched found --random random_0 --runs runs -- --data nowhere --{flag} found")
