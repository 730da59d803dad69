"""A script's command line: numbers in their range, errors of one line, exit status."""

import argparse
import errno
import math
import os
import re
import select
import shlex
import shutil
import signal
import sys
import threading
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from genotypes import GenotypeError
from losses import SSIM_WINDOW
from model_train import MAX_CHANNELS, CheckpointError
from support import distributed
from support.errors import Interrupted, UserError
from support.restore import AUTO, MAYBE_OUT_OF_MEMORY, SMALLEST_TILE, is_out_of_memory

# What PyTorch's loader says of a process that ended by itself, or whose batch cannot be received.
LOST_WORKER = ("DataLoader worker (pid", "Too many open files")
FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
EMPTY = re.compile(r"--\w+=")
MISTAKES = UserError, GenotypeError, CheckpointError
LARGEST_PATCH = 2**14  # pixels a side: 2^28 in all, as many as a picture may have
THRIFTY = ("--accumulate", "--batch_size", "--amp", "--no_graphs", "--tile")  # flags that need less memory


def _number(kind, allowed, expected):
    """A `type` for argparse: a number of that kind that is allowed; expected: which ones are, in words."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not allowed(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return value

    return parse


positive = _number(int, lambda value: 1 <= value < 2**31, "a whole number from 1, less than 2**31")
natural = _number(int, lambda value: value >= 0, "a whole number from 0")
workers = _number(int, lambda value: 0 <= value <= 1024, "a whole number from 0 to 1024")
seed = _number(int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 4294967295")
side = _number(int, lambda value: value >= 16, "a whole number from 16")
patch = _number(
    int,
    lambda value: SSIM_WINDOW <= value <= LARGEST_PATCH,
    f"a whole number from {SSIM_WINDOW} to {LARGEST_PATCH}",
)
even = _number(
    int,
    lambda value: 2 <= value <= MAX_CHANNELS and value % 2 == 0,
    f"an even number from 2 to {MAX_CHANNELS}",
)
tile = _number(
    int,
    lambda value: value == 0 or (value >= SMALLEST_TILE and value % 8 == 0),
    f"0 or a multiple of 8 from {SMALLEST_TILE} on",
)
above_zero = _number(float, lambda value: 0 < value < math.inf, "a number above 0")
not_negative = _number(float, lambda value: 0 <= value < math.inf, "a number from 0")
share = _number(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
decay = _number(float, lambda value: 0 <= value < 1, "a number from 0, less than 1")
angle = _number(float, lambda value: 0 <= value <= 90, "a number of degrees from 0 to 90")
_scale = _number(float, lambda value: 0 < value <= 1, f"{AUTO} or a number above 0 and up to 1")


def scale(text):
    return text if text == AUTO else _scale(text)


def script(name):
    """What to call a script of this project: its path beside the running script, or else its name."""
    called = Path(sys.argv[0]).parent / name
    return shlex.quote(called.as_posix()) if called.is_file() else name


class Parser(argparse.ArgumentParser):
    """argparse's, but an error is one line, and what it returns has `given`, the set of flags that were on
    the command line: a resumed run, or a demo, must tell a default that was asked for from one that was not.
    """

    def parse_args(self, args=None):
        args = list(sys.argv[1:] if args is None else args)
        for before, value in pairwise([self.prog, *args]):
            if value == "" or EMPTY.fullmatch(value):  # such as "$CKPT" where that variable is not set
                empty = value.rstrip("=") or f"the argument after {before}"
                self.error(f"{empty} is empty; give a value, or leave it out")
        unset = []  # told by identity: action="extend" would make another list of it
        names = vars(super().parse_args(args))
        marked = vars(super().parse_args(args, argparse.Namespace(**dict.fromkeys(names, unset))))
        given = {name for name, value in marked.items() if value is not unset}
        return argparse.Namespace(**names, given=given)

    def error(self, message):
        message = f"{self.prog}: error: {_one_line(message)} (--help says more)\n"
        self.exit(2, message if distributed.first_to_say(message) else None)


def tell_unusable(lines):
    """Print what could not be used, a line each, if there is any."""
    if lines:
        print(f"{len(lines)} could not be used:", *lines, sep="\n  ", file=sys.stderr)


def run(main, parser):
    """Run a script's `main`, which returns the exit status; a user's mistake is one line and status 2. 141 is
    128 + SIGPIPE: what shells report of a command whose output nobody reads any more.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by >&-
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        status = distributed.reporting(main, (*MISTAKES, Interrupted))(parser.parse_args())
        distributed.end()
        sys.stdout.flush()
        sys.exit(status)
    except MISTAKES as error:
        status = _report(parser, f"error: {error}", 2)
        distributed.leave(status)
        sys.exit(status)
    except KeyboardInterrupt:  # before a run, or in a command that has nothing to save
        sys.exit(_report(parser, "interrupted", 130))
    except MAYBE_OUT_OF_MEMORY as error:
        if is_out_of_memory(error):
            sys.exit(_report(parser, f"error: {_out_of_memory(error, parser.format_usage())}", 2))
        if str(error).startswith(LOST_WORKER):
            sys.exit(_report(parser, f"error: {_lost_worker(error, parser.format_usage())}", 2))
        compiler = sys.modules.get("torch._dynamo.exc")  # there once something is to be compiled
        if compiler and isinstance(error, compiler.TorchDynamoException):
            _report(parser, "error: compiling failed, as the traceback says; leave --compile out", 1)
        raise
    except Interrupted as stop:
        status = _report(parser, str(stop), 130)
        distributed.leave(status)
        sys.exit(status)
    except BrokenPipeError:
        if not _unread(sys.stdout):
            raise
        silence(sys.stdout)
        sys.exit(141)
    except OSError as error:
        if error.errno == errno.EMFILE:
            sys.exit(_report(parser, f"error: {_too_many_files(error)}", 2))
        if error.errno not in FULL_DISK:
            raise
        sys.exit(_report(parser, f"error: {_full_disk(error)}", 2))


@contextmanager
def stopped_by_sigterm():
    """In here SIGTERM, as Slurm or systemd sends it, raises KeyboardInterrupt like Ctrl-C, so that what was
    done can still be written. A second signal ends the process at once, unless torchrun started it:
    torchrun passes on what all its processes may have been sent already.
    """

    def stop(number, frame):
        _end_at_once_when_asked_again()
        raise KeyboardInterrupt

    before = heed_signals(stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def heed_signals(handler):
    """Have SIGINT and SIGTERM call a handler; returns {number: the handler before}. Python allows that in the
    main thread alone: in another, such as a notebook's or a window's worker, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}


def finish_first():
    """Within `stopped_by_sigterm`: what was done is being written from now on, so a signal, if it is the
    first one, is ignored.
    """

    def leave(number, frame):
        _end_at_once_when_asked_again()

    if signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN):
        heed_signals(leave)


def _end_at_once_when_asked_again():
    later = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    for number, handler in later.items():
        signal.signal(number, signal.SIG_IGN if distributed.launched() else handler)


def _unread(stream):
    """Whether a stream goes into a pipe that nobody reads any more: of `| head`, or of a `| tee` that Ctrl-C
    has ended as well.
    """
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def silence(stream):
    """Discard what is written to a stream that nobody reads: Python would complain of it again at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _out_of_memory(error, usage):
    """One line: what PyTorch or numpy says of memory, and which flags in `usage` make it need less."""
    what = str(error).partition(" GPU ")[0]
    what = what.rpartition("DefaultCPUAllocator: ")[2].partition(" Error code ")[0].partition("\n")[0]
    flags = [flag for flag in THRIFTY if flag in usage]
    return f"{(what or 'out of memory').rstrip('.')}. To use less memory, see {', '.join(flags) or '--help'}"


def _lost_worker(error, usage):
    """One line on a process of the loader that was killed, mostly for want of memory."""
    what = str(error).partition(". ")[0].rstrip(".")
    again = "; to go on from what was saved, use --resume" if "--resume" in usage else ""
    full = "memory or /dev/shm is full, too many files are open (ulimit -n), or TMPDIR is a long path"
    return f"{what}, as happens where {full}; fewer --workers need less{again}"


def _full_disk(error):
    if error.filename is None:
        return f"a file cannot be written: {error.strerror}"
    free = shutil.disk_usage(Path(error.filename).absolute().parent).free
    return f"{error.filename}: cannot be written: {error.strerror}; {free:,} bytes are free"


def _too_many_files(error):
    what = "a file" if error.filename is None else f"{error.filename}:"
    return f"{what} cannot be opened: {error.strerror}; allow more, as with ulimit -n 4096"


def _report(parser, text, status):
    if distributed.first_to_say(text):
        try:
            print(f"{parser.prog}: {_one_line(text)}", file=sys.stderr, flush=True)
        except BrokenPipeError:
            silence(sys.stderr)
    return status


def _one_line(text):
    """A text as one line: flags and file names in it may hold line ends, or bytes that are no text."""
    return " ".join(text.encode(errors="backslashreplace").decode().splitlines())


def announce_demo(missing, flag):
    """Say loudly that there is no data set and that a demo takes its place."""
    line = "*" * 100
    print(f"{line}\nTHIS IS A DEMO: there is no {missing}, and no {flag} was given. It runs on photographs")
    print(
        f"at hand, with synthetic rain: its figures mean nothing. The README says how to get DID-MDN.\n{line}"
    )
