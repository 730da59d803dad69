"""Small data sets, and a session of a training script, for the tests of what reads and makes them."""

import logging
import os
import signal
import threading
from contextlib import contextmanager

import cv2
import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from support.images import write_image

HEIGHT, WIDTH = 24, 32
DENSITIES = ("Heavy", "Medium", "Light")


def photograph(seed, height=HEIGHT, width=WIDTH):
    """A picture that looks like no other seed's and survives scaling and JPEG: HxWx3 uint8 RGB."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def rain_on(clean, seed):
    noise = np.random.default_rng(seed).integers(0, 60, clean.shape[:2] + (1,))
    return np.minimum(clean.astype(int) + noise, 255).astype(np.uint8)


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
    """What a training script changes in its process, its log and the signals that stop it, is put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
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
                os.kill(os.getpid(), signal.SIGTERM)
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
    """{tag: [(step, value), ...]} of a run's TensorBoard events, as TensorBoard shows them."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


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
