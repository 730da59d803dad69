"""A run killed at any moment and resumed is bit-equal to one that was not, for both stages."""

import errno
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import genotypes
import train_model_batch
import train_search_batch
from support import lock
from support.errors import UserError
from support.experiment import BEST, LOCK, STATES, Experiment
from support.lock import lock_folder
from tests.made import (
    ROOT,
    assert_same,
    random_genotype,
    scalars,
    session,
    state,
    write_pairs,
    write_scenes,
)

SCRIPTS = {"search": train_search_batch, "train": train_model_batch}
TINY = "--data scenes pairs --clean_side right left --patch_size 16 --batch_size 2 --epochs 2 --val_scenes 1"
TINY += " --internal_start 2 --device cpu --save run --save_every 0.000001"
FLAGS = {
    "search": f"{TINY} --steps_per_epoch 1 --channels 2 2 2 2 --arch_start 2 --name found",
    "train": f"{TINY} --steps_per_epoch 2 --channels 4 4 4 4 --arch genotype.json --ema 0.9",
}
CHANGES = {"os.rename", "os.link", "os.remove", "os.truncate", "os.mkdir"}

pytestmark = pytest.mark.skipif(os.name != "posix", reason="there is no SIGKILL here")


def run_script(stage, folder, flags, fatal, counted):
    """In a process of its own, which dies right before change number `fatal` of a file; 0: it does not."""
    os.chdir(folder)
    torch.set_num_threads(1)
    genotypes.FILE = folder / "genotypes.py"
    changes = 0

    def change():
        nonlocal changes
        changes += 1
        if changes == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event, args):
        if event in CHANGES or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)):
            change()

    def fsync(file, fsync=os.fsync):
        if changes + 1 == fatal:
            os.ftruncate(file, os.fstat(file).st_size // 2)  # it dies while the file is being written
        change()
        fsync(file)

    def next_batch(run, batches, of=Experiment.next_batch):
        for generator in (torch.seed, np.random.seed, random.seed):
            generator()  # anew: there is no state of theirs that a resumed run would have to have
        return of(run, batches)

    sys.addaudithook(audit)
    os.fsync = fsync
    Experiment.next_batch = next_batch
    script = SCRIPTS[stage]
    script.main(script.get_args_parser().parse_args(flags.split()))
    counted.send(changes)


@pytest.fixture(scope="module")
def processes():
    """Each in a second, since they are forks of one that has imported all they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_killed"])
    return context


def run(processes, stage, folder, flags, fatal=0):
    """How many changes it made, or None where it was killed."""
    counted, send = processes.Pipe(duplex=False)
    process = processes.Process(target=run_script, args=(stage, folder, f"{flags} --workers 0", fatal, send))
    process.start()
    process.join()
    assert process.exitcode == (-signal.SIGKILL if fatal and not counted.poll() else 0)
    return counted.recv() if counted.poll() else None


def flags_now(stage, folder):
    """Those that a user would give now."""
    begun = any((folder / "run" / file).exists() for file in STATES)
    return "--resume run --device cpu" if begun else FLAGS[stage]


def prepare(folder):
    write_scenes(folder / "scenes", 6)
    write_pairs(folder / "pairs", 6)
    genotypes.write_json(random_genotype(0), folder / "genotype.json")
    shutil.copyfile(ROOT / "genotypes.py", folder / "genotypes.py")
    return folder


@pytest.fixture(scope="module", params=list(SCRIPTS))
def whole(request, processes, tmp_path_factory):
    """(stage, folder of a run that was not killed, the changes of files that it made)."""
    folder = prepare(tmp_path_factory.mktemp(request.param))
    return request.param, folder, run(processes, request.param, folder, FLAGS[request.param])


def assert_as_whole(stage, folder, whole):
    found, expected = (state(place / "run") for place in (folder, whole))
    for name in ("parts", "best", "totals", "step", "skipped", "bad", "scenes"):
        assert_same(found[name], expected[name], name)
    for file in BEST.values():
        assert_same(*(state(place / "run", file) for place in (folder, whole)), file)
    for file in (whole / "run").glob("genotype*.json"):
        assert (folder / "run" / file.name).read_text() == file.read_text()
    assert sorted_scalars(folder) == sorted_scalars(whole)
    assert epochs_logged(folder) == epochs_logged(whole)
    summaries = [json.loads((place / "run" / "summary.json").read_text()) for place in (folder, whole)]
    assert summaries[0] | {"minutes": 0} == summaries[1] | {"minutes": 0}
    assert not list((folder / "run").glob(".*"))
    added = [(place / "genotypes.py").read_text().count("\nfound = ") for place in (folder, whole)]
    assert added == ([1, 1] if stage == "search" else [0, 0])


def sorted_scalars(folder):
    """Sessions that begin in one second may be read in any order."""
    return {tag: sorted(points) for tag, points in scalars(folder / "run").items()}


def epochs_logged(folder):
    """What the log says of each epoch, but for the time and the minutes."""
    return re.findall(
        r"epoch \d+ step .*  validation .*loss [\d.]+", (folder / "run" / "log.txt").read_text()
    )


def test_killed_at_random_moments_and_resumed_it_is_the_same(whole, processes, tmp_path, seed=5, kills=2):
    stage, expected, changes = whole
    folder = prepare(tmp_path)
    rng = random.Random(f"{seed} {stage}")
    for _ in range(kills):
        fatal = rng.randint(1, changes // 2)
        print(f"seed {seed}, {flags_now(stage, folder)}: killed before change {fatal} of a file")
        run(processes, stage, folder, flags_now(stage, folder), fatal)
        if (folder / "run" / "summary.json").exists():
            break
    else:
        assert run(processes, stage, folder, flags_now(stage, folder))
    assert_as_whole(stage, folder, expected)


def test_killed_after_its_genotype_was_appended_it_is_finished_once(whole, processes, tmp_path):
    stage, expected, _ = whole
    if stage == "train":
        pytest.skip("it appends none")
    folder = shutil.copytree(expected, tmp_path / "copy")
    (folder / "run" / "summary.json").unlink()
    assert run(processes, stage, folder, "--resume run --device cpu")
    assert_as_whole(stage, folder, expected)


@pytest.mark.slow
@pytest.mark.parametrize("changes_left", range(8))
def test_killed_in_its_last_moments_it_is_finished_once(whole, processes, tmp_path, changes_left):
    """Between its last state, the genotype, the summary and the end."""
    stage, expected, changes = whole
    folder = prepare(tmp_path)
    assert run(processes, stage, folder, FLAGS[stage], changes - changes_left) is None
    if not (folder / "run" / "summary.json").exists():
        assert run(processes, stage, folder, "--resume run --device cpu")
    assert_as_whole(stage, folder, expected)


@pytest.mark.slow
def test_killed_before_every_change_of_a_file_and_resumed_it_is_the_same(whole, processes, tmp_path):
    stage, expected, changes = whole
    for fatal in range(1, changes + 1):
        folder = prepare(tmp_path / str(fatal))
        run(processes, stage, folder, FLAGS[stage], fatal)
        if not (folder / "run" / "summary.json").exists():
            assert run(processes, stage, folder, flags_now(stage, folder)), fatal
        assert_as_whole(stage, folder, expected)
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again_it_is_the_same(whole, processes, tmp_path, seed):
    seed = random.SystemRandom().randrange(10**6)
    test_killed_at_random_moments_and_resumed_it_is_the_same(whole, processes, tmp_path, seed, kills=20)


@pytest.mark.slow
def test_the_command_killed_at_random_times_and_resumed_is_the_same(whole, tmp_path):
    """With its workers. Each session may take a second more than the one before."""
    stage, expected, _ = whole
    folder = prepare(tmp_path)
    shutil.copytree(ROOT / "support", folder / "support")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    seed = random.SystemRandom().randrange(10**6)
    rng, killed, longest = random.Random(seed), 0, 6.0
    while not (folder / "run" / "summary.json").exists():
        seconds = rng.uniform(4, longest)
        command = [sys.executable, SCRIPTS[stage].__name__ + ".py", *flags_now(stage, folder).split()]
        script = subprocess.Popen([*command, "--workers", "2"], cwd=folder, stdout=subprocess.DEVNULL)
        try:
            assert script.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            print(f"seed {seed}: killed after {seconds:.2f} s, at {flags_now(stage, folder)}")
            script.kill()
            script.wait()
            killed, longest = killed + 1, longest + 1
            time.sleep(1)  # so that the events of two sessions have different names
    assert killed
    assert_as_whole(stage, folder, expected)


def hold(folder, pipe):
    lock = lock_folder(folder, LOCK, "--save", sys)
    pipe.send(lock.name)
    pipe.recv()


@pytest.mark.parametrize("stage", SCRIPTS)
def test_a_folder_in_which_another_process_runs_is_refused(processes, stage, folder, monkeypatch):
    prepare(folder)
    monkeypatch.setattr(genotypes, "FILE", folder / "genotypes.py")
    (folder / "run").mkdir()
    here, there = processes.Pipe()
    other = processes.Process(target=hold, args=(folder / "run", there))
    other.start()
    assert here.recv()
    script = SCRIPTS[stage]
    for flags in (FLAGS[stage], "--resume run --device cpu"):
        with session(), pytest.raises(UserError, match="run: another process runs in this folder"):
            script.main(script.get_args_parser().parse_args(f"{flags} --workers 0".split()))
    assert [path.name for path in (folder / "run").iterdir()] == ["run.lock"]
    other.kill()  # which needs no cleaning up after it
    other.join()
    lock_folder(folder / "run", LOCK, "--save", sys).close()


@pytest.mark.skipif(os.name != "posix", reason="another lock")
def test_where_files_cannot_be_locked_a_run_goes_on_without(tmp_path, monkeypatch):
    """As on some network file systems."""

    def refusing(number):
        def lockf(*_):
            raise OSError(number, "no")

        monkeypatch.setattr(lock.fcntl, "lockf", lockf)

    for number in (errno.ENOLCK, errno.ENOTSUP):
        refusing(number)
        lock.lock_folder(tmp_path, "run.lock", "--save", sys).close()
    refusing(errno.EIO)
    with pytest.raises(OSError, match="no"):
        lock.lock_folder(tmp_path, "run.lock", "--save", sys)


def test_what_another_program_wrote_to_a_file_of_that_name_stays(tmp_path):
    (tmp_path / "run.lock").write_text("4711")
    lock_folder(tmp_path, "run.lock", "--save", sys).close()
    assert (tmp_path / "run.lock").read_text() == "4711"
