"""A run of either training script: its options, its clock, what it keeps, and how it goes on."""

import gc
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import nn

import dataset
from model_train import CheckpointError
from support import command, devices, experiment, options, runs
from support.errors import Interrupted, UserError
from support.experiment import Experiment
from support.logs import FileHandler
from tests.made import ROOT, scalars, session


def parser():
    made = command.Parser(prog="train.py")
    made.add_argument("--epochs", type=command.positive, default=3)
    made.add_argument("--steps_per_epoch", type=command.positive, default=2)
    made.add_argument("--batch_size", type=command.positive, default=2)
    made.add_argument("--learning_rate", type=float, default=0.1)
    made.add_argument("--learning_rate_min", type=float, default=0.01)
    options.add_arguments(made)
    return made


def new(*flags, kind="eval", demo=None):
    """An Experiment of those flags, on data that nobody reads."""
    flags = ["--data", "somewhere", "--device", "cpu", *flags]
    return Experiment(kind, parser().parse_args(flags), parser(), demo or {})


def resumed(*flags, kind="eval"):
    return Experiment(kind, parser().parse_args(["--device", "cpu", *flags]), parser(), {})


def begun(*flags):
    run = new("--save", "run", *flags)
    net = network()
    run.start(net=net)
    return run, net


def network():
    net = nn.Linear(1, 1)
    nn.init.zeros_(net.weight)
    return net


def scores(psnr=20.0, ssim=0.5, loss=1.0):
    return {"psnr": psnr, "ssim": ssim, "loss": loss}


def write(text, path):
    path.unlink(missing_ok=True)  # as `write_whole` puts another file there
    path.write_text(text)


def train(run, net, before_step=lambda step: None, scores_of=lambda epoch: scores()):
    """The loop of a script: each step adds 1 to the weight. Returns the steps of each epoch."""
    seen = {}
    for epoch in run.epochs():
        seen[epoch] = []
        for step in run.steps(epoch):
            before_step(step)
            with torch.no_grad():
                net.weight += 1
            run.count(loss=torch.tensor(float(step)))
            seen[epoch].append(step)
        run.finish_epoch(epoch, scores_of(epoch), partial(write, str(epoch)))
    return seen


@pytest.fixture
def clock(monkeypatch):
    """The run's clock, to be set by hand, in seconds."""
    now = SimpleNamespace(seconds=1000.0)
    stopped = SimpleNamespace(monotonic=lambda: now.seconds, strftime=experiment.time.strftime)
    monkeypatch.setattr(experiment, "time", stopped)
    return now


# --- the command line ---


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "cpu:x", "meta", "hpu"])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(UserError, match=f"--device {name}: not available"):
        devices.pick_device(name)


def test_why_a_device_is_not_available_is_said_whole(monkeypatch):
    why = "Unexpected error from cudaGetDeviceCount(). Error 804: forward compatibility was attempted"

    def refused(*size, device):
        raise RuntimeError(f"{why}\nand a trace")

    monkeypatch.setattr(torch, "zeros", refused)
    with pytest.raises(UserError, match=re.escape(f"--device cuda: not available here ({why})")):
        devices.pick_device("cuda")


@pytest.mark.skipif(torch.backends.mps.is_built(), reason="MPS is built in")
def test_of_a_device_that_was_not_built_in_the_line_is_short():
    with pytest.raises(UserError, match=r"--device mps: not available here \(Could not run ") as error:
        devices.pick_device("mps")
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "60 validation, of which 50 are scored (--val_scenes)"),
        (("--val_scenes", "0"), "60 validation"),
        (("--val_scenes", "60"), "60 validation"),
    ],
)
def test_the_log_says_how_many_validation_scenes_are_scored(flags, said, folder):
    run, _ = begun(*flags)
    scene = SimpleNamespace(rainy=["rainy"])
    run.scenes = {"weights": 600 * [scene], "architecture": 540 * [scene], "validation": 60 * [scene]}
    run.describe()
    run.writer.close()
    assert Path("run/log.txt").read_text().endswith(f" scenes: 1140 training, {said}\n")


def test_a_run_begun_when_all_scenes_were_scored_unless_told_otherwise_goes_on_so(folder):
    run, _ = begun()
    run.save()
    run.writer.close()
    state = torch.load("run/last.pt", weights_only=True)
    state["options"]["val_scenes"] = None
    torch.save(state, "run/last.pt")
    run.lock.close()
    assert resumed("--resume", "run", "--val_scenes", "0").args.val_scenes == 0
    assert resumed("--resume", "run").args.val_scenes == 0


def test_a_gpu_by_number_is_the_one_that_streams_are_made_on(monkeypatch):
    """And "cuda", which torch.cuda.set_device refuses, is the one that PyTorch has."""
    chosen, zeros = [], torch.zeros

    def set_device(device):
        chosen.append(torch.cuda._utils._get_device_index(device))

    monkeypatch.setattr(torch, "zeros", lambda *size, device=None: zeros(*size))
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.pick_device("cuda:1") == torch.device("cuda:1")
    assert devices.pick_device("cpu") == torch.device("cpu")
    assert devices.pick_device("cuda") == devices.pick_device() == torch.device("cuda")
    assert chosen == [1]


def test_demo_changes_only_the_options_that_were_not_given(folder):
    run = new("--demo", "--epochs", "3", demo={"epochs": 9, "steps_per_epoch": 5})
    assert (run.args.epochs, run.args.steps_per_epoch) == (3, 5)  # 3 is the default too, but it was asked for
    assert new(demo={"epochs": 9}).args.epochs == 3


def test_a_test_set_alone_and_what_is_hidden_beside_it_are_no_training_data(folder, monkeypatch):
    monkeypatch.setattr(experiment, "demo_set", lambda path: None)
    test_set = Path(experiment.DEFAULT_DATA, "DID-MDN-test")
    test_set.mkdir(parents=True)
    test_set.with_name(".DS_Store").touch()
    for demo in (True, False):
        run = Experiment("eval", parser().parse_args(["--device", "cpu"]), parser(), {})
        assert run.args.demo == demo
        test_set.with_name("DID-MDN-training").mkdir(exist_ok=True)


# --- the clock ---


def test_cosine_goes_from_the_highest_to_the_lowest_rate(clock, folder):
    run = new("--epochs", "4", "--steps_per_epoch", "5")
    rates = []
    for run.step in range(21):
        clock.seconds += 1e6  # without --max_minutes, time does not count
        rates.append(run.cosine(0.1, 0.02))
    assert rates[0] == 0.1
    assert rates[10] == pytest.approx(0.06)
    assert rates[20] == pytest.approx(0.02)
    assert rates == sorted(rates, reverse=True)
    assert rates[5] == pytest.approx(0.02 + 0.08 * (1 + math.cos(math.pi / 4)) / 2)


def test_max_minutes_fits_the_cosine_to_the_clock(clock, folder):
    run = new("--epochs", "100", "--steps_per_epoch", "100", "--max_minutes", "10")
    assert run.cosine(0.1) == 0.1
    clock.seconds += 5 * 60
    run.step = 10
    assert run.cosine(0.1) == pytest.approx(0.05)
    run.step = 9999  # the steps end before the time does
    assert run.cosine(0.1) < 1e-8
    run.step = 10
    clock.seconds += 6 * 60
    assert run.cosine(0.1, 0.01) == pytest.approx(0.01)
    assert run.progress() == 1


def test_max_minutes_stops_within_an_epoch_and_scores_it(clock, folder):
    run, net = begun("--epochs", "5", "--steps_per_epoch", "10", "--max_minutes", "1")

    def four_seconds(step):
        clock.seconds += 4

    assert train(run, net, four_seconds) == {1: list(range(10)), 2: list(range(10, 15))}
    assert [step for step, _ in scalars("run")["val_psnr"]] == [10, 15]


def test_max_minutes_counts_across_resumes(clock, folder):
    run, net = begun("--epochs", "5", "--steps_per_epoch", "10", "--max_minutes", "1")

    def stop_at_7(step):
        clock.seconds += 4
        if step == 6:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(run, net, stop_at_7)
    clock.seconds += 1e6  # nobody at work
    run = resumed("--resume", "run")
    assert run.seconds() == 28
    assert run.progress() == pytest.approx(28 / 60)
    clock.seconds += 20
    assert run.seconds() == 48 and run.progress() == pytest.approx(48 / 60)
    longer = resumed("--resume", "run", "--max_minutes", "2")
    assert longer.progress() == pytest.approx(28 / 120)


def test_a_budget_that_is_over_before_the_first_step_is_refused_and_can_be_given_again(clock, folder):
    run, net = begun("--max_minutes", "1")
    clock.seconds += 61  # as for decoding
    with pytest.raises(UserError, match="--max_minutes 1: the time was over before the first step; .*MORE$"):
        train(run, net)
    assert not Path("run", "summary.json").exists()
    run = resumed("--resume", "run", "--max_minutes", "2")
    run.start(net=net)
    assert train(run, net)[1] == [0, 1]


def test_what_a_budget_will_not_come_to_is_said_after_the_first_epoch(clock, folder, caplog):
    """Preparation is not taken for the rate."""
    run, net = begun("--epochs", "9", "--max_minutes", "1")
    run.args.arch_start, run.args.internal_start, run.args.freeze_start = 5, 3, 0
    rainy = (dataset.Half(Path("a.png")), dataset.Half(Path("b.png")))
    run.scenes = {"weights": [dataset.Scene("a", rainy, rainy[0])]}
    clock.seconds += 20

    def five_seconds(step):
        clock.seconds += 5

    assert list(train(run, net, five_seconds)) == [1, 2, 3, 4]
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "--arch_start 5 is after epoch 4, in which --max_minutes ends the run at this rate: "
        "NOTHING IS SEARCHED"
    ]


@pytest.mark.parametrize(("start", "unreached"), [(3, False), (4, True)])
def test_the_rate_is_known_after_some_steps_without_the_first_ones(clock, folder, start, unreached):
    """In 10 minutes are 5 steps of 24 s and 96 of 5 s: two epochs of 50, and the beginning of a third."""
    run, net = begun("--epochs", "99", "--steps_per_epoch", "50", "--max_minutes", "10")
    run.args.arch_start = start

    def seconds(step):
        clock.seconds += 24 if step < 5 else 5
        if step >= 30:
            assert ("NOTHING IS SEARCHED" in Path("run", "log.txt").read_text()) == unreached

    assert [*train(run, net, seconds)][-1] == 3


def test_a_run_without_any_score_says_null_for_each(folder):
    run, net = begun()
    run.begin_with(scores(*3 * [math.nan]), write_best=None)
    train(run, net, scores_of=lambda epoch: scores(*3 * [math.nan]))
    run.finish(validation_psnr={"chosen": math.nan})
    found = json.loads(Path("run", "summary.json").read_text(), parse_constant=pytest.fail)
    assert found["best"] == found["begun_with"] == {"psnr": None, "ssim": None, "loss": None}
    assert found["validation_psnr"] == {"chosen": None}


def test_the_last_rate_is_not_above_the_first(folder):
    assert new("--learning_rate", "1e-3").args.learning_rate_min == 1e-3
    assert new("--learning_rate", "0.1").args.learning_rate_min == 0.01
    with pytest.raises(UserError, match=r"--learning_rate_min 0\.2: .* --learning_rate, 0\.1, to this"):
        new("--learning_rate_min", "0.2")


# --- what is kept ---


def test_an_epoch_after_the_other_until_the_last(folder):
    assert train(*begun()) == {1: [0, 1], 2: [2, 3], 3: [4, 5]}


def test_the_best_of_each_score_is_kept(folder):
    run, net = begun("--epochs", "4")
    by_epoch = [scores(20, 0.5, 1.0), scores(19, 0.6, 0.9), scores(22, 0.55, 0.9), scores(21, 0.6, 1.1)]
    train(run, net, scores_of=lambda epoch: by_epoch[epoch - 1])
    kept = {name: Path("run", file).read_text() for name, file in experiment.BEST.items()}
    assert kept == {"psnr": "3", "ssim": "2", "loss": "2"}  # the first of equals
    assert Path("run", "best_ssim.pt").samefile(Path("run", "best_loss.pt"))  # written once
    assert run.best == {"psnr": 22, "ssim": 0.6, "loss": 0.9}
    run.finish(found="it")
    summary = json.loads(Path("run", "summary.json").read_text())
    assert summary["best"] == run.best
    assert summary["steps"] == 8
    assert summary["found"] == "it"


def test_the_best_so_far_outlives_a_resume(folder):
    run, net = begun("--epochs", "1")
    train(run, net, scores_of=lambda epoch: scores(30, 0.5, 1.0))
    run = resumed("--resume", "run")
    run.start(net=net)
    run.finish_epoch(2, scores(29, 0.6, 1.0), partial(write, "2"))
    kept = {name: Path("run", file).read_text() for name, file in experiment.BEST.items()}
    assert kept == {"psnr": "1", "ssim": "2", "loss": "1"}


def test_the_summary_has_the_minutes_of_the_run(clock, folder):
    run, net = begun("--epochs", "1")

    def ninety_seconds(step):
        clock.seconds += 90

    train(run, net, ninety_seconds)
    run.finish()
    assert json.loads(Path("run", "summary.json").read_text())["minutes"] == 3.0


def test_what_was_counted_outlives_a_resume(folder):
    """Else --max_bad_steps would begin anew with each, and the summary would leave steps out."""
    run, _ = begun()
    run.skipped, run.in_a_row, run.bad = 4, {"loss": 3}, {"a.png": "a.png: is empty"}
    run.save()
    run.lock.close()
    run = resumed("--resume", "run")
    assert (run.skipped, run.in_a_row, run.bad) == (4, {"loss": 3}, {"a.png": "a.png: is empty"})


def test_one_file_in_a_hundred_may_be_bad_and_no_more(folder):
    run, _ = begun()
    files = [dataset.Half(Path(f"{i}.png")) for i in range(100)]
    run.scenes = {"weights": [dataset.Scene(str(half.path), (half,), half) for half in files]}
    run.leave_out([("0.png", "0.png: is empty")])
    with pytest.raises(UserError, match="2 of 100 files cannot be read, more than 1%"):
        run.leave_out([("1.png", "1.png: is empty")])


def test_a_validation_scene_that_was_left_out_is_not_scored_though_it_is_mended(folder, monkeypatch):
    """The scores of all epochs from then on are of the same scenes."""
    run, net = begun()
    halves = [dataset.Half(Path(name)) for name in ("bad.png", "good.png")]
    bad, good = (dataset.Scene(half.path.stem, (half,), half) for half in halves)
    seen = []

    def measured(net, scenes, *rest, **options):
        seen.extend(scenes)
        return [(torch.ones(1), torch.ones(1), torch.ones(()))], None

    monkeypatch.setattr(experiment, "measure", measured)
    run.bad = {bad.key: "bad.png: is empty"}
    run.validate(net, [bad, good])
    assert seen == [good]


def test_last_is_plain_and_the_one_before_it_is_kept(folder):
    run, net = begun()
    states = {}

    def remember(epoch):
        states[epoch] = net.weight.item()
        return scores()

    train(run, net, scores_of=remember)
    for file, epoch in (("last.pt", 3), ("last.prev.pt", 2)):
        state = torch.load(Path("run", file), weights_only=True)
        assert state["step"] == 2 * epoch
        assert state["parts"]["net"]["weight"].item() == states[epoch]
        assert state["options"]["data"] == ["somewhere"]
    assert not [file for file in Path("run").iterdir() if file.name.startswith(".")]


def test_save_every_saves_within_an_epoch(clock, folder):
    run, net = begun("--steps_per_epoch", "6", "--save_every", "2", "--epochs", "1")
    saved = []

    def minute(step):
        clock.seconds += 61
        last = Path("run", "last.pt")
        saved.append(torch.load(last, weights_only=True)["step"] if last.exists() else None)

    train(run, net, minute)
    assert saved == [0, 0, 2, 2, 4, 4]


def test_a_folder_that_holds_a_run_is_not_overwritten(folder):
    train(*begun("--epochs", "1"))
    before = {file: file.read_bytes() for file in Path("run").iterdir()}
    with pytest.raises(UserError, match="--save run: holds a run.*--resume"):
        new("--save", "run")
    assert {file: file.read_bytes() for file in Path("run").iterdir()} == before
    for name in experiment.STATES:  # to save room; its best networks stay
        Path("run", name).unlink(missing_ok=True)
    with pytest.raises(UserError, match="--save run: holds a run"):
        new("--save", "run")
    Path("run", "summary.json").unlink(missing_ok=True)
    Path("run", "best_psnr.pt").touch()
    with pytest.raises(UserError, match="--save run: holds a run"):
        new("--save", "run")


def test_a_demo_s_network_is_trained_in_a_demo():
    assert new("--demo").flags_to_retrain() == ["--demo", "--data", "somewhere"]
    args = parser().parse_args(["--demo", "--data", options.DEMO_DATA])
    assert Experiment("search", args, parser(), {}).flags_to_retrain() == ["--demo"]


@pytest.mark.parametrize("name", ["run", "run [1]"])
@pytest.mark.parametrize(
    "file", ["options.json", "log.txt", "genotype.json", "genotype_003.json", "genotype.svg"]
)
def test_files_of_no_run_are_not_replaced(file, name, folder):
    Path(name).mkdir()
    Path(name, file).write_text("mine")
    said = f"--save {name}: the run would replace {name}/{file}; choose another folder"
    with pytest.raises(UserError, match=re.escape(said)):
        new("--save", name)
    assert [(path.name, path.read_text()) for path in Path(name).iterdir()] == [(file, "mine")]


def test_the_folder_of_a_run_that_was_killed_before_its_first_state_can_be_taken(folder):
    begun()
    assert Path("run", "options.json").exists() and not Path("run", "last.pt").exists()
    train(*begun("--epochs", "1"))
    assert Path("run", "last.pt").exists()


def test_a_run_that_another_process_finishes_while_this_one_reads_its_data_is_kept(folder):
    late = new("--save", "run")
    train(*begun("--epochs", "1"))
    experiment.log.handlers = []
    before = {file: file.read_bytes() for file in Path("run").iterdir()}
    with pytest.raises(UserError, match="--save run: holds a run"):
        late.start(net=nn.Linear(1, 1))
    assert {file: file.read_bytes() for file in Path("run").iterdir()} == before


def test_a_best_network_that_was_taken_away_is_no_longer_to_be_beaten(folder):
    def falling(epoch):
        return scores(psnr=30.0 - epoch)

    with pytest.raises(ZeroDivisionError):
        train(*begun("--epochs", "3"), lambda step: 1 / (step - 2), falling)
    Path("run", "best_psnr.pt").unlink()
    run, net = resumed("--resume", "run"), network()
    run.start(net=net)
    assert run.best == {"psnr": -math.inf, "ssim": 0.5, "loss": 1.0}
    assert "run/best_psnr.pt is gone; the next epoch's" in Path("run/log.txt").read_text()
    train(run, net, scores_of=falling)
    assert run.best["psnr"] == 28 and Path("run", "best_psnr.pt").read_text() == "2"


def test_a_finished_run_that_goes_on_with_more_minutes_is_unfinished_until_it_ends(clock, folder):
    run = new("--save", "eval-EXP-1", "--max_minutes", "1")
    net = network()
    run.start(net=net)

    def half_a_minute(step):
        clock.seconds += 30

    train(run, net, half_a_minute)
    run.finish()
    Path("eval-EXP-1", "best_psnr.pt").touch()
    assert runs.newest("eval", "best_psnr.pt") == Path("eval-EXP-1", "best_psnr.pt")
    run = resumed("--resume", "eval-EXP-1", "--max_minutes", "100")
    run.start(net=network())
    assert runs.newest("eval", "best_psnr.pt") is None


def test_a_folder_that_cannot_be_made_is_named(folder):
    Path("run").write_text("a file")
    with pytest.raises(UserError, match="--save run: cannot be made"):
        begun()


def test_a_folder_whose_name_is_no_text_is_refused_before_it_is_made(folder):
    name = os.fsdecode(b"d\xe9j\xe0")
    with pytest.raises(UserError, match="--save d.j.: its name is not UTF-8"):
        new("--save", name)
    assert not os.path.exists(name)


def test_log_and_events_tell_what_happened(folder):
    run, net = begun("--epochs", "2")
    train(run, net, scores_of=lambda epoch: scores(psnr=20 + epoch))
    run.finish()
    found = scalars("run")
    assert found["loss"] == [(2, 0.5), (4, 2.5)]  # means over the epoch's steps
    assert found["val_psnr"] == [(2, 21), (4, 22)]
    log = Path("run", "log.txt").read_text()
    assert "epoch 1 step 2/4" in log
    assert "psnr 22.000" in log
    assert "about" in log and "left" in log
    options = json.loads(Path("run", "options.json").read_text())
    assert options["epochs"] == 2
    assert options["data"] == ["somewhere"]


@pytest.mark.parametrize("kind", ["search", "eval"])
def test_newest_takes_finished_runs_of_its_kind_only(folder, kind):
    def make(name, age, file="best_psnr.pt", finished=True, demo=False):
        run = Path(name)
        run.mkdir()
        (run / "options.json").write_text(json.dumps({"demo": demo}))
        (run / file).write_text("")
        if finished:
            (run / "summary.json").write_text("{}")
            os.utime(run / "summary.json", (1e9 - age, 1e9 - age))

    other = {"search": "eval", "eval": "search"}[kind]
    assert runs.newest(kind, "best_psnr.pt") is None
    make(f"{kind}-EXP-1", age=50)
    make(f"{kind}-EXP-2", age=40)
    make(f"{kind}-EXP-9-by-name", age=45)
    make(f"{kind}-EXP-3-demo", age=30, demo=True)
    make(f"{kind}-EXP-0-demo", age=35, demo=True)
    make(f"{kind}-EXP-4-unfinished", age=20, finished=False)
    make(f"{kind}-EXP-5-without-the-file", age=10, file="best_ssim.pt")
    make(f"{other}-EXP-6", age=5)
    make("my-run", age=1)
    assert runs.newest(kind, "best_psnr.pt") == Path(f"{kind}-EXP-3-demo", "best_psnr.pt")
    assert runs.newest(kind, "best_psnr.pt", demo=True) == Path(f"{kind}-EXP-3-demo", "best_psnr.pt")
    assert runs.newest(kind, "best_psnr.pt", demo=False) == Path(f"{kind}-EXP-2", "best_psnr.pt")


# --- stopping and going on ---


def stopped(step, number=signal.SIGTERM, **options):
    """A run that was asked to stop in that step. Returns what it said and the steps it did."""
    run, net = begun(*options.get("flags", ()))
    done = []

    def stop(now):
        done.append(now)
        if now == step:
            signal.raise_signal(number)

    with pytest.raises(Interrupted) as said:
        train(run, net, stop)
    return str(said.value), done


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(folder, number):
    said, done = stopped(2, number)
    assert done == [0, 1, 2]
    assert signal.Signals(number).name in said
    assert said.endswith("go on with: python train.py --resume run --device cpu")
    state = torch.load("run/last.pt", weights_only=True)
    assert state["step"] == 3
    assert not Path("run", "summary.json").exists()


def test_going_on_is_with_the_flags_that_are_not_remembered(folder):
    """Else a run begun on cuda:1 would be taken to cuda:0."""
    run = new("--save", "a run", "--workers", "0", "--no_graphs", "--seed", "3")
    said = run.how_to_go_on()
    assert said == "go on with: python train.py --resume 'a run' --device cpu --no_graphs --workers 0"


def test_a_name_that_is_not_utf_8_does_not_end_a_run(folder):
    record = logging.LogRecord("manas", logging.WARNING, "", 0, os.fsdecode(b"d\xe9j\xe0.png"), None, None)
    FileHandler("log.txt").emit(record)
    assert Path("log.txt").read_text(encoding="utf-8") == "d\\udce9j\\udce0.png\n"


@pytest.mark.parametrize("step", range(6))
def test_a_resumed_run_does_every_step_and_every_epochs_end_once(folder, step):
    """Whether it was stopped within an epoch, or in its last step, before its scores."""
    _, before = stopped(step)
    run = resumed("--resume", "run")
    net = network()
    run.start(net=net)
    seen = train(run, net)
    assert before + [step for steps in seen.values() for step in steps] == list(range(6))
    found = scalars("run")
    assert found["val_psnr"] == [(2, 20), (4, 20), (6, 20)]
    assert found["loss"] == [(2, 0.5), (4, 2.5), (6, 4.5)]
    assert Path("run", "best_psnr.pt").exists()
    assert net.weight.item() == 6


@pytest.mark.parametrize("last_saved", [2, 1])
def test_events_are_neither_lost_nor_doubled_when_a_run_is_killed(folder, last_saved):
    """Killed right after an epoch was saved; or between its events and its checkpoint."""
    run, net = begun()
    for step in run.steps(1):
        if step == last_saved:
            run.save()
        run.count(loss=torch.tensor(100.0))
    if last_saved == 1:
        run.save = run.writer.flush
    run.finish_epoch(1, scores(), partial(write, "1"))
    run = resumed("--resume", "run")
    assert run.step == last_saved
    run.start(net=net)
    train(run, net, scores_of=lambda epoch: scores(psnr=20 + epoch))
    found = scalars("run")
    assert found["val_psnr"] == [(2, 20 if last_saved == 2 else 21), (4, 22), (6, 23)]
    assert [step for step, _ in found["loss"]] == [2, 4, 6]


def test_a_state_waits_for_the_events_that_are_written_in_the_background(folder, monkeypatch):
    """Else a run that goes on from it would cut off what came later."""
    write = RecordWriter.write
    monkeypatch.setattr(RecordWriter, "write", lambda self, data: time.sleep(0.02) or write(self, data))
    run, net = begun("--epochs", "1")
    train(run, net)
    run.writer.flush()
    assert torch.load("run/last.pt", weights_only=True)["written"] == runs.written(Path("run"))


def test_resume_without_a_folder_takes_the_newest_of_its_kind(folder):
    ages = {"eval-EXP-new": 10, "eval-EXP-old": 20, "eval-EXP-a": 30, "search-EXP-newer": 0, "eval-EXP-z": 40}
    for name, age in ages.items():
        run = new("--save", name, kind=name.split("-")[0])
        run.start(net=nn.Linear(1, 1))
        run.save()
        os.utime(Path(name, "last.pt"), (1e9 - age, 1e9 - age))
    assert resumed("--resume").folder == Path("eval-EXP-new")
    assert resumed("--resume", "--save", "eval-EXP-old").folder == Path("eval-EXP-old")


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("--seed 1", "seed"),
        ("--seed 0", "seed"),  # the default, but asked for, and the run has another
        ("--epochs 3", "epochs"),
        ("--data elsewhere", "data"),
        ("--clean_side left", "clean_side"),
        ("--split_seed 2", "split_seed"),
        ("--learning_rate 0.2", "learning_rate"),
        ("--amp", "amp"),
        ("--deterministic", "deterministic"),
        ("--val_scenes 3", "val_scenes"),
    ],
)
def test_resume_with_other_options_that_matter_is_refused_by_name(folder, flags, name):
    stopped(0, flags=("--seed", "5", "--epochs", "2"))
    before = Path("run", "last.pt").read_bytes()
    with pytest.raises(UserError, match=rf"--{name} .*: the run in run was begun with .*leave the flag out"):
        resumed("--resume", "run", *flags.split())
    assert Path("run", "last.pt").read_bytes() == before


def test_resume_takes_equal_options_and_those_that_do_not_matter(folder):
    stopped(0, flags=("--seed", "5", "--epochs", "2", "--workers", "3"))
    flags = "--seed 5 --data somewhere --workers 1 --max_minutes 7 --save_every 3"
    flags += " --max_bad_steps 4 --allow_bad --cache caches --accumulate 2 --no_graphs"
    run = resumed("--resume", "run", *flags.split())
    assert (run.args.seed, run.args.epochs, run.args.data) == (5, 2, ["somewhere"])
    assert (run.args.workers, run.args.max_minutes, run.args.save_every) == (1, 7, 3)
    assert (run.args.max_bad_steps, run.args.allow_bad, run.args.cache) == (4, True, "caches")
    assert (run.args.accumulate, run.args.no_graphs) == (2, True)
    assert run.step == 1


def test_no_option_that_changes_a_runs_numbers_may_differ_when_it_is_resumed():
    where = {"resume", "save", "name", "workers", "device", "compile", "no_graphs", "cache", "accumulate"}
    how_long = {"max_minutes", "save_every", "max_bad_steps", "allow_bad"}
    assert where | how_long == options.FREE_OPTIONS


def test_a_run_begun_before_an_option_was_added_goes_on_with_its_default(folder):
    stopped(0)
    state = torch.load("run/last.pt", weights_only=True)
    del state["options"]["split_seed"]
    torch.save(state, "run/last.pt")
    assert resumed("--resume", "run").args.split_seed == 0
    with pytest.raises(UserError, match="--split_seed 3: the run in run was begun with 0"):
        resumed("--resume", "run", "--split_seed", "3")


def test_a_run_begun_with_an_option_of_newer_code_is_refused_unless_that_is_off(folder):
    stopped(0)
    state = torch.load("run/last.pt", weights_only=True)
    state["options"] |= {"off": False, "weight": 0.0, "many": [], "file": None}
    torch.save(state, "run/last.pt")
    assert resumed("--resume", "run").step == 1
    state["options"] |= {"hue_weight": 0.5, "tall": True}
    torch.save(state, "run/last.pt")
    with pytest.raises(UserError, match=r"^run: .* begun with --hue_weight 0\.5, --tall True, which"):
        resumed("--resume", "run")


def test_what_cannot_be_resumed_is_named(folder):
    with pytest.raises(CheckpointError, match=r"nowhere/last\.pt: no such checkpoint"):
        resumed("--resume", "nowhere")
    with pytest.raises(CheckpointError, match=r"eval-EXP-\*/last\.pt: no such checkpoint"):
        resumed("--resume")
    stopped(0)
    with pytest.raises(UserError, match=r"run/last\.pt: not the checkpoint of a search run"):
        resumed("--resume", "run", kind="search")
    torch.save({"weights": {}}, "run/last.pt")
    with pytest.raises(UserError, match=r"run/last\.pt: not the checkpoint"):
        resumed("--resume", "run")
    for file in ("last.pt", "last.prev.pt"):
        Path("run", file).write_bytes(Path("run", file).read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"run/last\.pt: cannot.*run/last\.prev\.pt: cannot") as error:
        resumed("--resume", "run")
    assert "\n" not in str(error.value)


def test_a_resumed_run_is_not_saved_elsewhere(folder):
    stopped(2)
    with pytest.raises(UserError, match="--save other: --resume run goes on in its own folder"):
        resumed("--resume", "run", "--save", "other")
    assert resumed("--resume", "run", "--save", "run").step == resumed("--resume", "--save", "run").step == 3


def test_every_option_that_differs_is_named(folder):
    stopped(0, flags=("--seed", "5", "--epochs", "2"))
    with pytest.raises(UserError) as error:
        resumed("--resume", "run", "--seed", "1", "--epochs", "2", "--data", "here", "--split_seed", "9")
    for words in ("--seed 1: ", "with 5", "--data here: ", "with somewhere", "--split_seed 9: ", "with 0"):
        assert words in str(error.value)
    assert "--epochs" not in str(error.value)
    assert "leave the flags out" in str(error.value)


def test_a_run_that_has_finished_says_so_when_it_is_resumed(folder):
    run, net = begun("--epochs", "1")
    train(run, net)
    run = resumed("--resume", "run")  # killed before it could finish
    run.start(net=net)
    assert train(run, net) == {}
    run.finish()
    with pytest.raises(
        UserError,
        match="finished, after step 2; to train further, begin a new run with --weights run/best_psnr.pt",
    ):
        resumed("--resume", "run")


def test_signals_do_what_they_did_before_once_a_run_has_finished(folder):
    """A script that trains one network after the other, support.chance, is stopped by Ctrl-C between two."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    run, net = begun("--epochs", "1")
    assert signal.getsignal(signal.SIGINT) != before[signal.SIGINT]
    train(run, net)
    run.finish()
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_that_is_gone_has_closed_its_lock_file(finished, folder):
    """Else Python tells of it, where such warnings are asked for."""
    run = new("--save", "run")
    run._make_folder()
    if finished:
        run.start(net=network())
        run.finish()
    lock = run.lock
    del run
    gc.collect()
    assert lock.closed


def test_the_commit_is_of_this_project_and_not_of_a_repository_around_it(tmp_path, monkeypatch):
    if experiment.commit() == "unknown":
        pytest.skip("not a git repository")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "other"]):
        subprocess.run([*git, *words], check=True)
    expected = experiment.commit()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))  # as in a hook
    assert experiment.commit() == expected
    copy = tmp_path / "manas" / "support"
    copy.mkdir(parents=True)
    monkeypatch.setattr(experiment, "__file__", str(copy / "experiment.py"))
    Path(experiment.__file__).touch()
    assert experiment.commit() == "unknown"


def test_a_run_that_is_refused_lets_go_of_its_folder(folder, monkeypatch):
    """However long its error is kept, as by a notebook."""
    run, _ = begun()
    run.save()
    run.__exit__(None, None, None)
    locks, lock_folder = [], experiment.lock_folder
    monkeypatch.setattr(experiment, "lock_folder", lambda *of: locks.append(lock_folder(*of)) or locks[-1])
    with pytest.raises(UserError, match="--seed 5") as kept:
        resumed("--resume", "run", "--seed", "5")
    assert kept.value.__traceback__ is not None and [lock.closed for lock in locks] == [True]


def test_the_events_of_a_run_that_a_test_leaves_open_end_with_the_test(tmp_path, monkeypatch):
    """Else their thread would write on into the folder of that name in the next one."""
    monkeypatch.chdir(tmp_path)
    threads = threading.active_count()
    with session():
        begun()
    assert threading.active_count() == threads


def test_errors_in_a_users_own_threads_go_to_the_users_hook(folder, monkeypatch):
    caught = []
    monkeypatch.setattr(threading, "excepthook", lambda args: caught.append(args.exc_type))
    with begun()[0]:
        thread = threading.Thread(target=(folder / "no" / "such").stat)
        thread.start()
        thread.join()
    assert caught == [FileNotFoundError]


def test_what_ended_a_run_is_told_and_not_what_closing_it_ran_into(folder):
    run, _ = begun()
    run.taken.callback((folder / "no" / "such").stat)
    with pytest.raises(UserError, match="^the reason$"), run:
        raise UserError("the reason")
    run, _ = begun("--save", "other")
    run.taken.callback((folder / "no" / "such").stat)
    with pytest.raises(FileNotFoundError), run:
        pass


@pytest.mark.parametrize("started", [True, False])
def test_a_run_that_fails_gives_back_what_it_took_of_the_process(started, folder):
    """As in a notebook, which keeps the error and the run in it, where Ctrl-C would end the whole session."""
    hook, threads = threading.excepthook, threading.active_count()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(UserError, match="^none$") as kept, new("--save", "run") as run:
        run._make_folder()
        if started:
            run.start(net=network())
            run.writer.add_scalar("loss", 1.0, 1)
            _, log_file = experiment.log.handlers
            assert log_file.stream is not None
            assert signal.getsignal(signal.SIGINT) != before[signal.SIGINT]
        raise UserError("none")
    assert kept.value.__traceback__ is not None and run.lock.closed
    assert {number: signal.getsignal(number) for number in before} == before
    assert threading.excepthook == hook and threading.active_count() == threads
    if started:
        assert [type(handler) for handler in experiment.log.handlers] == [logging.NullHandler]
        assert log_file.stream is None


@pytest.mark.parametrize("launched", [False, True])
def test_asked_twice_a_run_ends_at_once_but_torchrun_asks_twice_by_itself(launched, monkeypatch):
    done = []
    monkeypatch.setattr(experiment.distributed, "launched", lambda: launched)
    monkeypatch.setattr(signal, "signal", lambda *given: done.append(given))
    monkeypatch.setattr(os, "kill", lambda *given: done.append(given))
    run = SimpleNamespace(stopping=None)
    for number in (signal.SIGTERM, signal.SIGINT):
        Experiment._stop(run, number, None)
        assert run.stopping == ("SIGTERM" if number == signal.SIGTERM or launched else "SIGINT")
    assert done == ([] if launched else [(signal.SIGINT, signal.SIG_DFL), (os.getpid(), signal.SIGINT)])


def test_a_state_of_other_tensors_is_refused_by_name(folder):
    stopped(0)
    run = resumed("--resume", "run")
    with pytest.raises(
        UserError, match="run: the saved net does not fit this code .*; begin a new run: "
    ) as error:
        run.start(net=nn.Sequential(*(nn.Linear(2, 1) for _ in range(99))))
    assert "Missing key" in str(error.value) and len(str(error.value)) < 400


# --- killed, damaged, full ---


def missing(path):
    path.unlink()


def cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path):
    path.write_bytes(b"")


def one_bit(path):
    """In the weight, which no reader of the format looks at: only the checksum tells."""
    content = bytearray(path.read_bytes())
    weight = torch.load(path, weights_only=True)["parts"]["net"]["weight"].numpy().tobytes()
    content[content.index(weight) + 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [missing, cut_short, emptied, one_bit])
def test_with_the_newest_state_damaged_the_run_goes_on_from_the_one_before_it(folder, damage):
    run, net = begun("--save_every", "1e-9")
    for step in run.steps(1):
        with torch.no_grad():
            net.weight += 1
        run.count(loss=torch.tensor(float(step)))
    before = Path("run", "last.prev.pt").read_bytes()
    damage(Path("run", "last.pt"))
    run = resumed("--resume", "run")
    net = network()
    run.start(net=net)
    assert (run.step, net.weight.item()) == (1, 1)
    (line,) = [line for line in Path("run", "log.txt").read_text().splitlines() if "last.prev.pt" in line]
    assert "run/last.pt: " in line
    assert "going on from run/last.prev.pt" in line
    assert Path("run", "last.prev.pt").read_bytes() == before
    kept = []
    train(
        run, net, before_step=lambda step: kept.append(experiment.read_state(Path("run"), "eval")[1]["step"])
    )
    assert kept == [1, 2, 3, 4, 5]  # there was a whole state at every instant
    assert net.weight.item() == 6
    assert [step for step, _ in scalars("run")["loss"]] == [2, 4, 6]


def test_with_last_pt_gone_a_run_is_still_found_and_not_overwritten(folder):
    for name in ("run", "eval-EXP-1"):
        run = new("--save", name)
        net = network()
        run.start(net=net)
        train(run, net)
        Path(name, "last.pt").unlink()
    assert resumed("--resume").folder == Path("eval-EXP-1")
    with pytest.raises(UserError, match="--save run: holds a run"):
        new("--save", "run")


def test_there_is_a_whole_last_pt_between_any_two_renames(folder, monkeypatch):
    run, net = begun()
    run.save()
    steps = []

    def looked(source, target, replace=os.replace):
        steps.append(torch.load("run/last.pt", weights_only=True)["step"])
        replace(source, target)
        steps.append(torch.load("run/last.pt", weights_only=True)["step"])

    monkeypatch.setattr(os, "replace", looked)
    run.step = 1
    run.save()
    assert steps == [0, 0, 0, 1]


def test_what_takes_the_place_of_a_file_is_on_the_disk_before_it_does(folder, monkeypatch):
    """Else a power failure could leave both names empty; and the log is as long as the state says."""
    run, _ = begun()
    run.save()
    done, fsync, replace = [], os.fsync, os.replace

    def synced(file):
        done.append(("fsync", os.fstat(file).st_ino))
        fsync(file)

    def replaced(source, target):
        done.append(("replace", os.stat(source).st_ino, Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    run.save()
    (last,) = [inode for what, inode, *name in done if name == ["last.pt"]]
    growing = [("fsync", path.stat().st_ino) for path in runs._growing(Path("run"))]
    assert len(growing) == 2 and {*growing, ("fsync", last)} <= {*done[:3]}
    run.finish()
    summary = Path("run", "summary.json").stat().st_ino
    assert done[-2:] == [("fsync", summary), ("replace", summary, "summary.json")]


def test_where_there_are_no_hard_links_the_one_before_is_kept_too(folder, monkeypatch):
    def no_links(*paths):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    train(*begun())
    assert [torch.load(Path("run", file), weights_only=True)["step"] for file in experiment.STATES] == [6, 4]
    assert {Path("run", file).read_text() for file in experiment.BEST.values()} == {"1"}
    assert not [file for file in Path("run").iterdir() if file.name.startswith(".")]


def test_what_a_killed_run_wrote_after_its_state_is_written_once(folder):
    """Log, events, and files that it had begun to write."""
    run, net = begun()
    for _ in run.steps(1):
        run.count(loss=torch.tensor(1.0))
    run.save()
    saved = {file.name: file.read_bytes() for file in Path("run").iterdir()}
    run.save = run.writer.flush
    run.finish_epoch(1, scores(), partial(write, "1"))
    Path("run", "events.out.tfevents.2.other").write_bytes(b"of a session that was killed before it saved")
    unfinished = [".last.pt.77", ".last.pt.77.link", ".genotype_001.json.77"]
    unfinished += [f".{'0af9' * 8}.json", f".{'0af9' * 8}.svg"]
    for name in unfinished:
        Path("run", name).write_bytes(b"half of a file")
    Path("run", ".mine").touch()
    assert "epoch 1" in Path("run", "log.txt").read_text()
    run = resumed("--resume", "run")
    run.start(net=net)
    for name, content in saved.items():
        if name not in ("log.txt", *experiment.STATES):
            assert Path("run", name).read_bytes() == content, name
    assert Path("run", "log.txt").read_bytes().startswith(saved["log.txt"])
    assert "epoch 1" not in Path("run", "log.txt").read_text()
    assert [file.name for file in Path("run").glob(".*")] == [".mine"]
    train(run, net)
    log = Path("run", "log.txt").read_text()
    assert [log.count(f"epoch {epoch} step") for epoch in (1, 2, 3)] == [1, 1, 1]


def test_a_log_shorter_than_the_state_says_is_not_filled_up(folder):
    """After a power cut: zeros in it would hide what was there."""
    stopped(0)
    Path("run", "log.txt").write_text("short\n")
    resumed("--resume", "run").start(net=network())
    assert Path("run", "log.txt").read_bytes().startswith(b"short\n2")


def test_runs_that_begin_in_one_second_have_folders_of_their_own(folder, monkeypatch):
    monkeypatch.setattr(experiment.time, "strftime", lambda *form: "eval-EXP-now")
    runs = [new(), new(), new()]
    for run in runs:
        run.start(net=network())
    assert [run.folder.name for run in runs] == ["eval-EXP-now", "eval-EXP-now-2", "eval-EXP-now-3"]
    assert all((run.folder / "options.json").exists() for run in runs)


def test_a_folder_that_cannot_be_written_is_named(folder):
    Path("run", "log.txt").mkdir(parents=True)
    with pytest.raises(UserError, match="--save run: cannot be written: Is a directory"):
        begun()


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", "null", "[" * 100000])
def test_damaged_options_do_not_keep_the_newest_run_from_being_found(folder, content):
    for name in ("eval-EXP-1", "eval-EXP-2"):
        run = new("--save", name)
        run.start(net=network())
        run.finish()
        Path(name, "best_psnr.pt").touch()
        os.utime(Path(name, "summary.json"), (1e9 + int(name[-1]),) * 2)
    if content is None:
        Path("eval-EXP-2", "options.json").unlink()
    else:
        Path("eval-EXP-2", "options.json").write_text(content)
    assert runs.newest("eval", "best_psnr.pt") == Path("eval-EXP-2", "best_psnr.pt")
    assert runs.newest("eval", "best_psnr.pt", demo=False) == Path("eval-EXP-1", "best_psnr.pt")


@contextmanager
def files_up_to(size):
    """As a full disk: a file is written up to `size` bytes, then OSError is raised."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_while_saving_leaves_the_old_state_and_says_how_much_is_needed(folder):
    run, net = begun()
    net.register_buffer("large", torch.zeros(100_000))
    train(run, net)
    before = {file.name: file.read_bytes() for file in Path("run").iterdir()}
    with files_up_to(200_000), pytest.raises(UserError) as error:
        run.save()
    said = re.fullmatch(
        r"run/last\.pt: cannot be written: File too large; ([\d,]+) bytes are needed, ([\d,]+) free; "
        r"last\.pt, after step 6, is kept",
        str(error.value),
    )
    size = Path("run", "last.pt").stat().st_size
    assert abs(int(said[1].replace(",", "")) - size) < 1000
    assert int(said[2].replace(",", "")) > 0
    assert {file.name: file.read_bytes() for file in Path("run").iterdir()} == before


def test_a_disk_that_is_full_from_the_start_leaves_nothing_to_go_on_from_and_says_so(folder):
    run, net = begun()
    net.register_buffer("large", torch.zeros(100_000))
    with files_up_to(200_000), pytest.raises(UserError, match="; nothing is saved yet$"):
        run.save()
    assert not Path("run", "last.pt").exists()


def test_events_are_written_without_tensorflow_where_that_is_installed(tmp_path):
    """Its import takes seconds and prints lines, and on a full disk it raises errors of its own."""
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('TensorFlow was imported')\n")
    code = """
from support.logs import open_writer
with open_writer("run", None) as writer:
    writer.add_scalar("loss", 0.5, 1)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert scalars(tmp_path / "run")["loss"] == [(1, 0.5)]


@pytest.mark.parametrize("full", ["log.txt", "events"])
def test_a_full_disk_while_logging_is_one_line_too(folder, full, monkeypatch, capfd):
    """Not logging's traceback, nor that of TensorBoard's thread."""

    def main(args):
        run, net = begun()
        del experiment.log.handlers[0]  # the terminal, here a file
        grown = max(file.stat().st_size for file in Path("run").iterdir() if file.suffix != ".pt")
        with files_up_to(max(grown, 3000)):
            for number in range(3000):
                if full == "events":
                    run.writer.add_scalar("loss", number, number)
                    run.writer.flush()
                else:
                    experiment.log.info("a line that makes the log longer than it may be")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as stop:
        command.run(main, parser())
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("train.py: error: ")
    assert "cannot be written: File too large; " in line
    assert line.endswith(" bytes are free")
    assert f"run/{full}" in line


def test_a_rank_that_does_not_write_knows_of_which_step_the_state_is(monkeypatch):
    """Else two ranks name two of them where --max_bad_steps ends a run."""
    monkeypatch.setattr(experiment.distributed, "is_main", lambda: False)
    run = SimpleNamespace(step=3, saved=0)
    Experiment.save(run)
    assert run.saved == 3


def test_whether_a_step_counts_is_decided_by_the_ranks_together(folder, monkeypatch):
    """By their mean, which is logged, too: a rank whose own loss is finite does not step alone."""
    run, _ = begun()
    batch = SimpleNamespace(files=["1.png"])
    for others, counts in ((3.0, True), (math.inf, False)):
        monkeypatch.setattr(
            experiment.distributed, "average", lambda values, other=others: [(v + other) / 2 for v in values]
        )
        assert run.accept(batch, loss=torch.tensor(1.0)) == counts
    assert run.totals["loss"] == (2, 1)


@pytest.mark.parametrize("resume, words", [(None, "leave it out"), ("run", "resume it where there is CUDA")])
def test_sync_bn_is_for_cuda_and_a_resumed_run_cannot_leave_it_out(resume, words):
    args = SimpleNamespace(sync_bn=True, resume=resume, accumulate=1, batch_size=1)
    with pytest.raises(UserError, match=f"--sync_bn: works on CUDA alone, not on cpu; {words}"):
        Experiment._check_processes(SimpleNamespace(args=args, device=torch.device("cpu")))


def test_a_best_loss_that_was_taken_away_is_beaten_by_any(folder):
    train(*begun("--epochs", "1"))
    Path("run", "best_loss.pt").unlink()
    run = resumed("--resume", "run")
    run.start(net=network())
    assert run.best == {"psnr": 20, "ssim": 0.5, "loss": math.inf}


def test_a_clean_file_of_many_scenes_is_one_bad_file(folder):
    run, _ = begun()
    clean = dataset.Half(Path("clean.png"))
    scenes = [dataset.Scene(str(i), (dataset.Half(Path(f"{i}.png")),), clean) for i in range(100)]
    run.scenes = {"weights": scenes}
    run.leave_out([(scene.key, "clean.png: is empty") for scene in scenes[:3]])
    assert len(run.bad) == 3


def test_where_it_ran_is_not_remembered(folder):
    run, _ = begun("--workers", "77", "--no_graphs")
    run.save()
    run.lock.close()
    now = resumed("--resume", "run").args
    assert now.workers != 77 and not now.no_graphs
