"""The command line of every script: its flags, their errors, its exit status."""

import errno
import importlib
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import test_view
import train_model_batch
import train_search_batch
from genotypes import GenotypeError
from model_train import CheckpointError
from support import command, distributed, logs, options
from support.errors import Interrupted, UserError

SCRIPTS = {"search": train_search_batch, "train": train_model_batch, "view": test_view}
ROOT = Path(test_view.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("support/[!_]*.py")])
}
COMMANDS = [
    name for name, path in MODULES.items() if "def get_args_parser(" in path.read_text(encoding="utf-8")
]


def python(code, folder, *path):
    """What a new process of Python prints that works in a folder and finds modules there, or in `path`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    run = [sys.executable, "-B", "-c", code]
    return subprocess.run(run, cwd=folder, env=environment, stdout=subprocess.PIPE, check=True).stdout


def test_at_an_import_nothing_happens_and_pictures_know_nothing_of_networks(tmp_path):
    networks = "{'operations', 'model_search', 'model_train'}"
    code = f"import sys, dataset, support.metrics; print({networks} & {{*sys.modules}})"
    assert python(f"{code}; import {', '.join(MODULES)}", tmp_path, ROOT).split() == [b"set()"]
    assert list(tmp_path.iterdir()) == []


def test_the_method_can_be_copied_out_and_used_alone(tmp_path):
    for name in ("genotypes", "operations", "model_search", "model_train", "losses"):
        shutil.copy(MODULES[name], tmp_path)
    code = (
        "import losses, model_search, model_train, torch;"
        "net = model_train.from_supernet(model_search.SearchNetwork((2, 2, 2, 2)));"
        "model_train.save(net, 'net.pt');"
        "x = torch.rand(1, 3, 13, 11);"
        "print(losses.ssim(model_train.load('net.pt')(x), x).isfinite().all().item())"
    )
    assert python(code, tmp_path).split() == [b"True"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_prints_its_help(name):
    parser = importlib.import_module(name).get_args_parser()
    assert "--help" in parser.format_help()
    assert [action.dest for action in parser._actions if not action.help] == []
    for action in parser._actions:
        if said := re.search(r"\(default: ([\d. ]+)[;)]", action.help):  # written out, not by %(default)s
            assert list(map(float, said[1].split())) == [*np.ravel(action.default)], action.dest


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("search", "--epochs 0", ["--epochs", "'0'", "a whole number from 1"]),
        ("search", "--steps_per_epoch 1.5", ["--steps_per_epoch", "'1.5'"]),
        ("search", "--batch_size many", ["--batch_size", "'many'"]),
        ("search", "--learning_rate -1", ["--learning_rate"]),
        ("search", "--momentum nan", ["--momentum", "'nan'", "a number from 0"]),
        ("search", "--arch_learning_rate inf", ["--arch_learning_rate", "'inf'"]),
        ("search", "--channels 4 4 4", ["--channels", "4"]),
        ("search", "--channels 4 4 5 4", ["--channels", "'5'", "an even number"]),
        ("search", "--patch_size 10", ["--patch_size", "'10'", "from 11"]),
        ("search", "--seed -1", ["--seed", "'-1'", "from 0"]),
        ("search", "--clean_inputs 1.5", ["--clean_inputs", "'1.5'", "from 0 to 1"]),
        ("search", "--ema 0.9", ["--ema"]),
        ("train", "--ema 1", ["--ema", "'1'", "from 0, less than 1"]),
        ("train", "--max_minutes 0", ["--max_minutes", "'0'", "above 0"]),
        ("train", "--workers -1", ["--workers", "'-1'", "from 0 to 1024"]),
        ("search", "--workers 100000", ["--workers", "'100000'", "from 0 to 1024"]),
        ("train", "--clean_side top", ["--clean_side", "'top'", "left", "right"]),
        ("train", "--unrolled", ["--unrolled"]),
        ("train", "--data", ["--data"]),
        ("view", "--tile 60", ["--tile", "60", "multiple of 8 from 64"]),
        ("view", "--clean_side both", ["--clean_side", "'both'"]),
        ("view", "rain.jpg", ["rain.jpg"]),
        ("train", "--batch_size 99999999999999999999", ["--batch_size", "from 1"]),
        ("train", "--weights=", ["--weights", "is empty"]),  # of a variable that the shell does not have
        ("train", "--resume ''", ["argument after --resume is empty"]),
        ("train", "--cache=", ["--cache is empty"]),
        ("train", "--data pairs ''", ["argument after pairs is empty"]),
        ("train", "--save=", ["--save", "is empty"]),
        ("train", "--arch=", ["--arch", "is empty"]),
        ("search", "--data=", ["--data", "is empty"]),
        ("search", "--name=", ["--name", "is empty"]),
        ("view", "--path=", ["--path", "is empty"]),
        ("view", "--ckt_path=", ["--ckt_path", "is empty"]),
        ("view", "--result_path=", ["--result_path", "is empty"]),
    ],
)
def test_a_wrong_flag_is_one_line_and_status_2(script, flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].get_args_parser().parse_args(shlex.split(flags))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert all(word in error for word in [*words, "error", SCRIPTS[script].__name__]), error


def test_the_papers_schedules_are_the_defaults():
    search = train_search_batch.get_args_parser().parse_args([])
    assert (search.epochs, search.steps_per_epoch) == (200, 1000)
    assert (search.batch_size, search.patch_size) == (16, 64)
    assert (search.learning_rate, search.learning_rate_min, search.momentum) == (0.002, 1e-4, 0.9)
    assert (search.weight_decay, search.arch_learning_rate, search.arch_weight_decay) == (3e-4, 3e-4, 1e-3)
    assert (search.arch_start, search.internal_start, search.unrolled) == (11, 6, False)
    assert (search.lambda_arch, search.lambda_comp) == (0.01, 0.01)
    training = train_model_batch.get_args_parser().parse_args([])
    assert (training.epochs, training.steps_per_epoch, training.batch_size) == (200, 500, 32)
    assert (training.learning_rate, training.internal_start, training.patch_size) == (1e-3, 6, 64)
    assert (training.learning_rate_min, training.weight_decay) == (0, 0)
    for both in (search, training):
        assert both.channels == [32, 64, 128, 256]
        assert (both.grad_clip, both.split_seed, both.seed, both.val_scenes) == (5, 0, 0, 50)
        assert (both.max_bad_steps, both.save_every) == (20, 10)


@pytest.mark.parametrize(
    ("called", "said"),
    [
        ("train_model_batch.py", "test_view.py"),
        ("{}/train_model_batch.py", "{}/test_view.py"),
        ("{}/support/chance.py", "test_view.py"),  # as by python -m
        ("", "test_view.py"),  # as in an interpreter
    ],
)
def test_the_next_command_is_called_by_the_path_that_this_one_was(called, said, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT if called.startswith("train") else tmp_path)
    monkeypatch.setattr(sys, "argv", [called.format(ROOT)])
    assert command.script("test_view.py") == shlex.quote(said.format(ROOT))


def test_a_users_mistake_is_one_line_and_status_2_and_a_stop_130(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    parted = []
    monkeypatch.setattr(distributed, "leave", parted.append)
    mistakes = UserError("a: bad"), CheckpointError("b: bad"), GenotypeError("c: bad")
    for error, status in (*((mistake, 2) for mistake in mistakes), (Interrupted("bad"), 130)):

        def main(args, error=error):
            raise error

        with pytest.raises(SystemExit) as stop:
            command.run(main, command.Parser(prog="train.py"))
        assert stop.value.code == status
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("train.py: ")
        assert line.endswith("bad")
    assert parted == [2, 2, 2, 130]


def test_a_name_with_spaces_in_a_row_is_told_as_it_is_one_with_a_line_end_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])

    def main(args):
        raise UserError("a  b.png: bad\nc.png")

    with pytest.raises(SystemExit):
        command.run(main, command.Parser(prog="train.py"))
    assert capsys.readouterr().err == "train.py: error: a  b.png: bad c.png\n"


@pytest.mark.parametrize("script", ["search", "train"])
def test_folders_given_in_turn_are_all_taken(script):
    parser = SCRIPTS[script].get_args_parser()
    args = parser.parse_args("--data a --clean_side left --data b c --clean_side right left".split())
    assert args.data == ["a", "b", "c"]
    assert args.clean_side == ["left", "right", "left"]
    assert args.given == {"data", "clean_side"}
    assert parser.parse_args([]).clean_side == []
    assert parser.parse_args([]).given == set()


@pytest.mark.parametrize(
    "error, said",
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total\nof 8"),
            "CUDA out of memory. Tried to allocate 2.00 GiB",
        ),
        (
            torch.OutOfMemoryError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in"),
            "CUDA error: out of memory. To",
        ),
        (lambda: torch.empty(2**61, dtype=torch.uint8), "can't allocate memory: you tried to allocate"),
        (lambda: np.empty(2**61, np.uint8), "Unable to allocate 2.00 EiB for an array"),
        (MemoryError(), "out of memory"),
    ],
)
def test_no_memory_is_one_line_that_names_what_needs_less(capsys, monkeypatch, error, said):
    def main(args):
        if isinstance(error, Exception):
            raise error
        error()

    monkeypatch.setattr(sys, "argv", ["train.py"])
    parser = command.Parser(prog="train.py")
    parser.add_argument("--batch_size")
    with pytest.raises(SystemExit) as stop:
        command.run(main, parser)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"train.py: error: {said}")
    assert line.endswith(". To use less memory, see --batch_size")


def test_where_compiling_fails_the_traceback_comes_with_what_to_do(capsys, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no kernel for this processor")

    def main(args):
        torch.compile(lambda x: x + 1, backend=broken)(torch.zeros(1))

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(RuntimeError, match="no kernel for this processor"):
        command.run(main, command.Parser(prog="train.py"))
    line = "train.py: error: compiling failed, as the traceback says; leave --compile out\n"
    assert capsys.readouterr().err == line


def test_ctrl_c_while_a_command_begins_is_one_line(capsys, monkeypatch):
    def main(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as stop:
        command.run(main, command.Parser(prog="train.py"))
    assert stop.value.code == 130
    assert capsys.readouterr().err == "train.py: interrupted\n"


@pytest.mark.parametrize("by_torchrun", [True, False])
def test_sigterm_stops_as_ctrl_c_does_and_a_second_one_only_where_torchrun_does_not_repeat_it(
    monkeypatch, by_torchrun
):
    monkeypatch.setattr(command.distributed, "launched", lambda: by_torchrun)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    written = []

    @command.stopped_by_sigterm()
    def main():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)
            written.append("tables")

    with nullcontext() if by_torchrun else pytest.raises(KeyboardInterrupt):
        main()
    assert written == ["tables"] * by_torchrun
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_signal_ends_a_command_that_writes_what_was_done_before_the_first(monkeypatch):
    monkeypatch.setattr(command.distributed, "launched", lambda: False)

    @command.stopped_by_sigterm()
    def main():
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        command.finish_first()
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        main()


@pytest.mark.parametrize(("name", "said"), [((), "a file cannot"), (("a.png",), "a.png: cannot")])
def test_too_many_open_files_are_one_line_that_says_what_to_do(name, said, capsys, monkeypatch):
    def main(args):
        raise OSError(errno.EMFILE, "Too many open files", *name)

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as stop:
        command.run(main, command.Parser(prog="train.py"))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line == f"train.py: error: {said} be opened: Too many open files; allow more, as with ulimit -n 4096"
    )


@pytest.fixture
def unread():
    """A stream into a pipe that nobody reads; Python writes what it still holds when it is closed."""
    read, written = os.pipe()
    os.close(read)
    with open(written, "w") as stream:
        yield stream


def test_what_nobody_reads_any_more_is_no_error(unread, capsys, monkeypatch):
    """As of `| head`. capsys comes first: with -s stdout would be left as its closed stream."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(sys, "stdout", unread)
    with pytest.raises(SystemExit) as stop:
        command.run(lambda args: print("a line"), command.Parser(prog="train.py"))
    assert stop.value.code == 141
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_is_closed_is_no_error(name, monkeypatch):
    """As by `>&-`."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as stop:
        command.run(lambda args: print("a line", file=getattr(sys, name)), command.Parser(prog="train.py"))
    assert not stop.value.code


def test_another_broken_pipe_is_an_error(monkeypatch):
    def main(args):
        raise BrokenPipeError("to a process that has died")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with open(os.devnull, "w") as healthy, pytest.raises(BrokenPipeError, match="died"):
        monkeypatch.setattr(sys, "stdout", healthy)
        command.run(main, command.Parser(prog="train.py"))


def test_a_stop_whose_line_nobody_reads_is_a_stop_all_the_same(unread, monkeypatch):
    """As of `2>&1 | tee` and Ctrl-C, which ends both."""

    def main(args):
        raise Interrupted("go on with --resume")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(sys, "stderr", unread)
    with pytest.raises(SystemExit) as stop:
        command.run(main, command.Parser(prog="train.py"))
    assert stop.value.code == 130


def test_a_run_logs_on_when_nobody_reads_its_lines(unread, monkeypatch):
    monkeypatch.setattr(sys, "stdout", unread)
    handler = logs.TqdmHandler()
    for line in ("one", "two"):
        handler.emit(logging.LogRecord("manas", logging.INFO, "", 0, line, (), None))


def test_a_run_logs_on_when_the_disk_of_its_output_is_full(monkeypatch):
    handler, record = logs.TqdmHandler(), logging.LogRecord("manas", logging.INFO, "", 0, "line", (), None)
    for number in (errno.ENOSPC, errno.EIO):
        out = SimpleNamespace(write=lambda text: None, flush=partial(fails_with, number))
        monkeypatch.setattr(sys, "stdout", out)
        with nullcontext() if number == errno.ENOSPC else pytest.raises(OSError):
            handler.emit(record)


def fails_with(number):
    raise OSError(number, os.strerror(number))


class Killed(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_loader_process_that_is_killed_is_one_line(capsys, monkeypatch):
    """As the system does where memory runs out."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    parser = command.Parser(prog="train.py")
    parser.add_argument("--resume")
    with pytest.raises(SystemExit) as stop:
        command.run(lambda args: list(torch.utils.data.DataLoader(Killed(), num_workers=1)), parser)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"train\.py: error: DataLoader worker \(pid\W.*\d\)? .*, as happens where memory or "
        r"/dev/shm is full, too many files are open \(ulimit -n\), or TMPDIR is a long path; fewer "
        r"--workers need less; to go on from what was saved, use --resume",
        line,
    )


def test_a_run_whose_loader_cannot_open_more_files_is_one_line_too(capsys, monkeypatch):
    def main(args):
        raise RuntimeError("Too many open files. Communication with the workers is no longer possible.")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as stop:
        command.run(main, command.Parser(prog="train.py"))
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "Too many open files, as happens where" in line and "ulimit -n" in line


def test_the_processes_of_a_machine_share_its_cores_for_their_loaders(monkeypatch):
    monkeypatch.setattr(options.os, "cpu_count", lambda: 32)
    for processes, workers in ((1, 8), (4, 4), (64, 1)):
        monkeypatch.setattr(distributed, "local_size", lambda processes=processes: processes)
        assert train_search_batch.get_args_parser().get_default("workers") == workers
