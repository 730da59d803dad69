"""Two processes of torchrun's compute what one does, decide alike, and stop and go on together."""

import os
import re
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import dataset
import genotypes
from model_search import SearchNetwork
from model_train import DerainNetwork
from support import buffers, devices, distributed
from support.errors import UserError
from tests import ranks
from tests.made import ROOT, assert_same, random_genotype, session, torchrun, write_pairs, write_scenes

DATA = "--data scenes pairs --clean_side right left"
SMALL = f"{DATA} --patch_size 16 --device cpu --workers 0"
FIVE = f"{SMALL} --batch_size 4 --epochs 1 --steps_per_epoch 5 --val_scenes 3 --internal_start 1"
TRAIN = f"{FIVE} --channels 4 4 4 4 --arch genotype.json --ema 0.9"
SEARCH = f"{FIVE} --channels 2 2 2 2 --arch_start 1 --learning_rate 0.05"
TWO = "--steps_per_epoch 2"  # of what is slow
JOBS = {
    "train_eval_recorded_apart": f"{TRAIN} --freeze_start 1",
    "train_eval_parts": f"{TRAIN} --freeze_start 1 --accumulate 2",
    "train": TRAIN,
    "train_stop": TRAIN,
    "train_nan": TRAIN,
    "train_bad": f"{TRAIN} --allow_bad".replace(DATA, "--data scenes --clean_side right"),
    "search_weights": f"{SEARCH} --name found_weights --arch_start 2",  # BatchNorm by each rank's batches
    "search_eval": f"{SEARCH} --name found_eval --max_minutes 1000",
    "search_eval_recorded_apart": f"{SEARCH} --name found_recorded {TWO}",
    "search_gap": f"{SEARCH} --name found_gap {TWO}",
    "search_eval_unrolled_parts": f"{SEARCH} --name found_unrolled --unrolled --accumulate 2 {TWO}",
    "search": f"{SEARCH} --name found_search --arch_batch_statistics {TWO}",
}
RESUMED = {"train_resumed": "--resume train_stop --device cpu"}
EQUAL_TO_ONE = [name for name in JOBS if "eval" in name]
SLOW = {"search_eval_unrolled_parts", "search"}


def each(names):
    """Parameters of a test, those that take long marked as such."""
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in names]


def chosen(request, names):
    """Those that this session runs."""
    return [name for name in names if name not in SLOW or "not slow" not in request.config.option.markexpr]


def prepare(folder):
    write_scenes(folder / "scenes", 6)
    write_pairs(folder / "pairs", 6)
    genotypes.write_json(random_genotype(0), folder / "genotype.json")
    shutil.copyfile(ROOT / "genotypes.py", folder / "vocabulary.py")


@pytest.fixture(scope="module")
def two(request, tmp_path_factory):
    """The folder in which two processes have run every job."""
    folder = tmp_path_factory.mktemp("two")
    prepare(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        jobs = [f"{name}={JOBS[name]} --save {name}" for name in chosen(request, JOBS)]
        jobs += [f"{name}={flags}" for name, flags in RESUMED.items()]
        done = torchrun("-m", "tests.ranks", *jobs)
    assert done.returncode == 0, "".join(line for line in done.stderr.splitlines(True) if "[rank" in line)
    (folder / "printed").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def one(request, tmp_path_factory):
    """The folder in which this process has run those jobs whose results must be the same."""
    folder = tmp_path_factory.mktemp("one")
    prepare(folder)
    with pytest.MonkeyPatch.context() as patch, session():
        patch.chdir(folder)
        patch.setattr(genotypes, "FILE", folder / "vocabulary.py")
        for name in chosen(request, EQUAL_TO_ONE):
            ranks.run(name, f"{JOBS[name].replace('--accumulate 2', '')} --save {name}")
    return folder


def left(folder, name):
    """What each rank left of a job."""
    return [torch.load(path, weights_only=False) for path in sorted(folder.glob(f"{name}.[0-9].pt"))]


@pytest.mark.parametrize("name", each([*JOBS, *RESUMED]))
def test_all_ranks_hold_the_same_bits(two, name):
    """Weights, alpha and beta, the optimizers' moments and BatchNorm's statistics; and the scores."""
    first, second = left(two, name)
    for what in ("parts", "best", "skipped", "bad", "step", "stopped"):
        assert_same(first[what], second[what], what)
    assert first["step"] == (3 if name == "train_stop" else 2 if TWO in JOBS.get(name, "") else 5)


@pytest.mark.parametrize("name", each(EQUAL_TO_ONE))
def test_two_processes_compute_what_one_does(two, one, name):
    (expected,), (found, _) = left(one, name), left(two, name)
    for part in ("net", "ema"):
        for key, value in expected["parts"].get(part, {}).items():
            torch.testing.assert_close(found["parts"][part][key], value, rtol=0, atol=1e-5, msg=key)
    for measure, value in expected["best"].items():
        assert found["best"][measure] == pytest.approx(value, abs=1e-3)
    torch.manual_seed(0)
    begun = SearchNetwork((2,) * 4) if "search" in name else DerainNetwork(random_genotype(0), (4,) * 4)
    net = expected["parts"]["net"]
    changes = {key: (net[key] - p).abs().max().item() for key, p in begun.named_parameters()}
    for key in ("alpha", "beta") if "search" in name else ["head.to_rgb.weight"]:
        assert changes[key] > 1e-4  # by far more than what is allowed above
    assert sum(change > 1e-4 for change in changes.values()) > len(changes) / 10


@pytest.mark.parametrize("name", ["train_eval_recorded_apart", "search_eval"])
def test_each_scene_of_a_batch_goes_to_one_rank(two, one, name):
    (whole,), shares = left(one, name), left(two, name)
    assert [a + b for a, b in zip(*(share["names"] for share in shares), strict=True)] == whole["names"]


def test_a_batch_is_the_ranks_shares_crops_and_flips_included(two):
    scenes = dataset.find_training([two / "scenes", two / "pairs"], ["right", "left"])

    def batch(**share):
        return next(dataset.batches(scenes, 16, 6, 0, "cpu", first_step=4, **share))

    shares = [batch(rank=rank, ranks=3) for rank in range(3)]
    assert torch.equal(torch.cat([share.rainy for share in shares]), batch().rainy)
    assert torch.equal(torch.cat([share.clean for share in shares]), batch().clean)


def test_sigterm_to_one_rank_stops_all_at_the_same_step_and_they_go_on(two):
    stopped = [rank["stopped"] for rank in left(two, "train_stop")]
    assert stopped[0].startswith("stopped by SIGTERM after step 3; ")
    whole, resumed = left(two, "train")[0], left(two, "train_resumed")[0]
    for what in ("parts", "best"):
        assert_same(resumed[what], whole[what], what)


def test_a_search_stopped_while_rank_0_measures_its_gap_ends_for_all(two):
    stopped = [rank["stopped"] for rank in left(two, "search_gap")]
    assert all(said.startswith("stopped by SIGTERM after the last step; go on with: ") for said in stopped)


def test_a_run_of_two_processes_goes_on_in_one(two, tmp_path, monkeypatch):
    folder = shutil.copytree(two, tmp_path / "copy")
    state = torch.load(folder / "train_stop" / "last.prev.pt", weights_only=True)
    assert state["step"] < 5
    (folder / "train_stop" / "last.pt").unlink()
    (folder / "train_stop" / "summary.json").unlink()
    monkeypatch.chdir(folder)
    with session():
        ranks.run("train_on", "--resume train_stop --accumulate 2 --workers 0 --device cpu")
    assert left(folder, "train_on")[0]["step"] == 5


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(two):
    assert [rank["skipped"] for rank in left(two, "train_nan")] == [1, 1]
    (line,) = re.findall("step 2 skipped: .*", (two / "train_nan" / "log.txt").read_text())
    assert len(set(re.findall(r"\S+\.png", line))) >= 4  # of the whole batch


def test_a_file_that_breaks_for_one_rank_is_left_out_by_all(two):
    bad = [rank["bad"] for rank in left(two, "train_bad")]
    assert bad[0] == bad[1]
    assert len(bad[0]) == 1
    assert (two / "train_bad" / "log.txt").read_text().count("left out from now on") == 1


def test_rank_0_alone_writes(two):
    for name in ("train", "search_eval"):
        files = [file.name for file in (two / name).iterdir()]
        assert sum(file.startswith("events.out.tfevents.") for file in files) == 1
        log = (two / name / "log.txt").read_text()
        assert log.count("epoch 1 step ") == log.count("run folder") == 1
        assert (two / "printed").read_text().count(f"run folder {name} ") == 1
    assert (two / "vocabulary.py").read_text().count("\nfound_eval = ") == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--batch_size 5 --demo", "--batch_size 5: cannot be divided evenly over 2 processes"),
        ("--batch_size 0", "--batch_size: '0' is not a whole number"),
    ],
)
def test_a_mistake_is_told_once(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    done = torchrun(str(ROOT / "train_search_batch.py"), *flags.split(), "--device", "cpu", "--save", "run")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("train_search_batch.py: ")]
    assert len(lines) == 1 and words in lines[0]
    assert set(re.findall(r"exitcode +: (\S+)", done.stderr)) <= {"2", "-15"}, done.stderr
    assert "support/experiment.py" not in done.stderr  # no traceback of ours in torchrun's report
    assert not Path("run").exists()


PARTING = """
import atexit
import torch.distributed as dist
import train_search_batch
from support import command

atexit.register(lambda: print("in the group at the end:", dist.is_initialized()))
command.run(train_search_batch.main, train_search_batch.get_args_parser())
"""


def test_the_ranks_part_before_a_mistake_ends_them(tmp_path, monkeypatch):
    """With the group's threads still there Python's end was seen to abort, with status -6 and a core."""
    monkeypatch.chdir(tmp_path)
    Path("parting.py").write_text(PARTING)
    done = torchrun("parting.py", "--batch_size", "5", "--demo", "--device", "cpu", "--save", "run")
    assert "in the group at the end: False" in done.stdout and "True" not in done.stdout


def test_a_rank_that_nccl_keeps_waiting_for_the_others_ends_all_the_same(monkeypatch):
    class Ended(Exception):
        pass

    def end(status):
        raise Ended(status)

    others_part = threading.Event()
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "PARTING", 0.1)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", others_part.wait)
    with pytest.raises(Ended, match="^2$"):
        distributed.leave(2)
    others_part.set()
    distributed.leave(2)  # parts, and goes on to the end


DYING = """
import dataset, train_model_batch
from support import command, distributed

batches = dataset.batches

def dying(*args, **options):
    for number, batch in enumerate(batches(*args, **options)):
        if number == 1 and distributed.rank() == 1:
            raise RuntimeError("this rank dies")
        yield batch

dataset.batches = dying
command.run(train_model_batch.main, train_model_batch.get_args_parser())
"""


def test_a_rank_that_dies_ends_the_job_with_its_error_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    Path("dying.py").write_text(DYING)
    done = torchrun("dying.py", *TRAIN.split(), "--save", "run")
    assert done.returncode != 0
    report = done.stderr[done.stderr.index("Root Cause") :]  # torchrun's, of the rank that was first to fail
    assert "rank      : 1" in report and "this rank dies" in report
    assert Path("run", "last.pt").exists() and not Path("run", "summary.json").exists()


def test_two_nodes_compute_what_one_node_of_two_processes_does(two, tmp_path, monkeypatch):
    """Two torchruns as the README starts them, each with a process, on a disk that they share."""
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    node = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=two"]
    command = [*node, "--local_addr=localhost", "-m", "tests.ranks", f"train={TRAIN} --save train"]
    with ThreadPoolExecutor() as nodes:
        for done in nodes.map(lambda _: torchrun(*command, processes=1, standalone=False), range(2)):
            assert done.returncode == 0, done.stderr
    assert len(left(tmp_path, "train")) == 2
    for found, expected in zip(left(tmp_path, "train"), left(two, "train"), strict=True):
        for what in ("parts", "best", "names"):
            assert_same(found[what], expected[what], what)


def test_one_process_is_left_as_it_is():
    net = torch.nn.Linear(2, 2)
    assert distributed.parallel(net, net.parameters()) is net
    assert distributed.average([net.weight])[0] is net.weight
    assert distributed.size() == 1 and distributed.is_main() and not distributed.launched()


def test_each_process_of_torchrun_has_the_gpu_of_its_number_on_its_machine(monkeypatch):
    monkeypatch.setattr(distributed.dist, "is_torchelastic_launched", lambda: True)
    for name, value in {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    chosen, zeros = [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None: zeros(*size))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.pick_device() == devices.pick_device("cuda") == torch.device("cuda:1")
    assert chosen == 2 * [torch.device("cuda:1")]
    assert devices.pick_device("cpu") == torch.device("cpu")
    for name in ("cuda:1", "mps"):
        with pytest.raises(UserError, match=f"--device {name}: under torchrun give cuda"):
            devices.pick_device(name)


def test_statistics_move_by_the_mean_of_what_the_ranks_saw(monkeypatch):
    """In the runs above BatchNorm's statistics do not change, or are compared between the ranks alone."""
    norm = nn.BatchNorm2d(2)
    kept = buffers.Buffers(norm)
    kept.keep()
    norm(torch.randn(3, 2, 4, 4) + 5)
    changes = [norm.running_mean.clone(), norm.running_var - 1]
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed, "average", lambda tensors: [tensor / 2 for tensor in tensors])  # 0 there
    kept.average_changes()
    torch.testing.assert_close(norm.running_mean, changes[0] / 2)
    torch.testing.assert_close(norm.running_var, 1 + changes[1] / 2)
    assert norm.num_batches_tracked == 1
