"""Small data sets, genotypes and networks, and the scripts run on them."""

import io
import itertools
import logging
import os
import random
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import model_train
import test_view
from genotypes import BRANCHES, MODULES, PRIMITIVES, Genotype
from support import command, experiment
from support.images import write_image

ROOT = Path(__file__).parents[1]
HEIGHT, WIDTH = 24, 32
DENSITIES = ("Heavy", "Medium", "Light")


def photograph(seed, height=HEIGHT, width=WIDTH):
    """A picture that looks like no other seed's and survives scaling and JPEG: HxWx3 uint8 RGB."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def rain_on(clean, seed):
    noise = np.random.default_rng(seed).integers(0, 60, clean.shape[:2] + (1,))
    return np.minimum(clean.astype(int) + noise, 255).astype(np.uint8)


def terminal(monkeypatch):
    """What standard error gets from now on, an io.StringIO that says that it is a terminal."""
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def write_pairs(folder, count, clean_side="left", suffix=".png", first=0):
    """`count` side-by-side pairs, 0.png, 1.png, ... of backgrounds `first`, `first` + 1, ..."""
    for i in range(count):
        clean = photograph(first + i)
        halves = [clean, rain_on(clean, i)]
        write_image(folder / f"{i}{suffix}", np.hstack(halves if clean_side == "left" else halves[::-1]))
    return folder


def write_scenes(folder, count, suffix=".png", first=100):
    """`count` scenes in DID-MDN's layout, in `folder`/DID-MDN-training."""
    for i in range(count):
        clean = photograph(first + i)
        for d, density in enumerate(DENSITIES):
            file = folder / "DID-MDN-training" / f"Rain_{density}" / "train2018new" / f"{i}{suffix}"
            write_image(file, np.hstack([rain_on(clean, 3 * i + d), clean]))
    return folder


@contextmanager
def session():
    """What a training script changes in its process, its log and the signals that stop it, is put back; its
    events end there, else their thread would write on into a folder of that name in another test.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    opened, open_writer = [], experiment.open_writer
    try:
        with mock.patch.object(
            experiment, "open_writer", lambda *of: opened.append(open_writer(*of)) or opened[-1]
        ):
            yield
    finally:
        for writer in opened:
            with suppress(OSError):  # as where a test has taken the run's folder away
                writer.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        threading.excepthook = threading.__excepthook__
        log = logging.getLogger("manas")
        for handler in log.handlers:
            handler.close()
        log.handlers = []


def interrupt(monkeypatch, module, draw):
    """Have SIGTERM sent to this process when the first loader that `module` opens gives its batch `draw`."""
    batches, opened = module.batches, []

    def wrapped(*args, **options):
        opened.append(None)
        first = len(opened) == 1
        for number, batch in enumerate(batches(*args, **options), start=1):
            if first and number == draw:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    monkeypatch.setattr(module, "batches", wrapped)


def spoil(monkeypatch, module, draws, value=float("nan"), loader=1):
    """Have the batches `draws`, counted from 1, of loader number `loader` hold one pixel of that value."""
    batches, opened = module.batches, []

    def wrapped(*args, **options):
        opened.append(None)
        spoilt = draws if len(opened) == loader else ()
        for number, batch in enumerate(batches(*args, **options), start=1):
            if number in spoilt:
                batch.rainy[0, 0, 3, 3] = value
            yield batch

    monkeypatch.setattr(module, "batches", wrapped)


def scalars(folder):
    """{tag: [(step, value), ...]} of a run's TensorBoard events, in the order in which they were written.

    Files of one second, which a process that resumes at once leaves, are read in that of their names: 10, 9.
    """
    events = EventAccumulator(str(folder))
    events.Reload()
    found = {tag: sorted(events.Scalars(tag), key=lambda e: e.wall_time) for tag in events.Tags()["scalars"]}
    return {tag: [(e.step, e.value) for e in of_tag] for tag, of_tag in found.items()}


def assert_same(x, y, where="state"):
    """Two states, of any nesting, are equal to the bit."""
    if isinstance(x, dict):
        assert x.keys() == y.keys(), where
        for key in x:
            assert_same(x[key], y[key], f"{where}[{key!r}]")
    elif isinstance(x, (list, tuple)):
        assert len(x) == len(y), where
        for i, (a, b) in enumerate(zip(x, y, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    elif isinstance(x, torch.Tensor):
        assert torch.equal(x, y), where
    else:
        assert x == y, where


def state(run, file="last.pt"):
    """What a run has saved, by pickle itself: reading nothing but weights, as the scripts do, takes twice as
    long.
    """
    return torch.load(Path(run, file), weights_only=False)


def random_genotype(seed):
    """Any genotype of the space, `none` only where a node keeps another edge."""
    rng = random.Random(seed)
    modules = tuple(tuple(rng.choice(MODULES) for _ in range(4)) for _ in range(3))

    def edges():
        first, second, third = (rng.choice(PRIMITIVES[1:]) for _ in range(3))
        return (first, *rng.choice([(second, third), ("none", third), (second, "none")]))

    return Genotype(modules, tuple(tuple(edges() for _ in range(branches)) for branches in BRANCHES))


def weight_count(parameters):
    return sum(p.numel() for p in parameters)


def make_one_hot(net, genotype):
    """Set alpha and beta so that the softmax is one-hot on the genotype."""
    kinds = [kind for cell in genotype.modules for kind in cell]
    names = [name for cell in genotype.attention for branch in cell for name in branch]
    with torch.no_grad():
        net.alpha.fill_(-1000)
        net.beta.fill_(-1000)
        for row, kind in zip(net.alpha, kinds, strict=True):
            row[MODULES.index(kind)] = 0
        for row, name in zip(net.beta, names, strict=True):
            row[PRIMITIVES.index(name)] = 0


def warm_batch_norm(net):
    """Statistics and affine parameters as after training, so that evaluation mode says something."""
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
                torch.nn.init.normal_(module.bias, 0, 0.1)
    return net.eval()


def at_the_command_line(script, *arguments):
    """How a script ends in this process, which is that of `subprocess.run` but for the seconds of a start."""
    given = [script.__name__, *map(str, arguments)]
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    with (
        mock.patch.object(sys, "argv", given),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as stop,
    ):
        command.run(script.main, script.get_args_parser())
    for printed in (out, err):
        printed.seek(0)
    return subprocess.CompletedProcess(given, stop.value.code, out.read(), err.read())


def torchrun(*arguments, processes=2, standalone=True):
    """One node's torchrun; its exit status and what it printed."""
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    launch += ["--standalone"] * standalone
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launch, *arguments], env=environment, capture_output=True, text=True, timeout=500)


def write_network(path):
    """A network that does something to a picture."""
    torch.manual_seed(0)
    net = model_train.DerainNetwork(random_genotype(0), (2, 2, 2, 2), residual=True).eval()
    torch.nn.init.normal_(net.head.to_rgb.weight, 0, 0.05)
    model_train.save(net, path)
    return net


def interrupted(call, interrupt):
    """test_view's `restore`, with `interrupt()` before the call of a number, counted from 1."""
    restore, calls = test_view.restore, itertools.count(1)

    def wrapped(*args, **options):
        if next(calls) == call:
            interrupt()
        return restore(*args, **options)

    return wrapped


def view(flags):
    """test_view.py with the network in net.pt."""
    flags = f"--ckt_path net.pt --device cpu {flags}"
    return test_view.main(test_view.get_args_parser().parse_args(flags.split()))
