"""From files on disk to tensors: scenes (multi-to-one), pairs and single images.

A scene is one clean background and its rainy versions: three densities in DID-MDN, one in a plain pair. The
layouts of folders that are understood: support/layouts.py.

    python dataset.py DIR [TEST_DIR]    checks a data set before hours are spent on it: see support/check.py
"""

import hashlib
import multiprocessing.queues
import os
import re
import signal
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from losses import SSIM_WINDOW
from support.distributed import bar
from support.errors import UserError
from support.images import image_size, read_image
from support.layouts import TEST, TRAINING, Half, Scene, find, own_name, two_sets, with_sides

PARTS = {"weights": 0.50, "architecture": 0.45, "validation": 0.05}
THREADS = min(8, os.cpu_count() or 1)  # OpenCV and Pillow decode outside Python's lock
GIVE_UP = 100  # scenes in a row that cannot be read: the disk is gone, not some files


# --- files to scenes ----------------------------------------------------------------------------------------


def find_training(paths, clean_sides=(), say=lambda line: None):
    """Scenes of one or several training folders, every one with its clean image.

    paths: folders; one that holds `DID-MDN-training` stands for it. clean_sides: none, one a folder, or one
    for all but DID-MDN's. say(line) is called with what each folder was found to be. Raises UserError, naming
    the file, for unpaired images, images that cannot be a pair, and DID-MDN's test set.
    """
    scenes = []
    for root, side in with_sides(paths, clean_sides):
        if own_name(root) == TEST:
            raise UserError(f"{root}: is DID-MDN's test set, not to be trained on; give {TRAINING}")
        if os.path.isdir(root / TRAINING):
            root = root / TRAINING
        found = find(root, side)
        say(f"{root}: {len(found.scenes):,} {found.layout}")
        if found.unpaired:
            first, *more = found.unpaired
            others = f" (nor have {len(more)} more files)" if more else ""
            raise UserError(
                f"{first}: has no partner{others} ({found.layout}); add the partner, or remove this file"
            )
        if any(scene.clean is None for scene in found.scenes):
            raise UserError(
                f"{root}: holds single images, not pairs; to mark pairs, use folders (such as input and "
                "target) or names (such as rain-1 and norain-1); for side-by-side files give --clean_side"
            )
        if text := two_sets(root, found.scenes):
            raise UserError(f"{root}: {text}")
        scenes += found.scenes
    distinct = dict.fromkeys(scenes)
    with ThreadPoolExecutor(THREADS) as pool:  # each file is read, which on a slow disk is all that it takes
        found = bar(pool.map(_misfit, distinct), "looking at the files", len(distinct), "scene")
        bad = [misfit for misfit in found if misfit]
    if bad:
        others = f" ({len(bad)} scenes are bad: python dataset.py DIR lists all)" if len(bad) > 1 else ""
        raise UserError(f"{bad[0]}; repair or remove this scene{others}")
    return scenes


def _misfit(scene):
    """What `check_sizes` refuses in the scene, or None."""
    try:
        check_sizes(scene)
    except UserError as error:
        return str(error)
    return None


# --- scenes to arrays ---------------------------------------------------------------------------------------


def check_sizes(scene):
    """Raise UserError, naming the file, unless all images of the scene have one size and can carry SSIM.

    Pixels are not decoded; a file that is cut short is found all the same.
    """
    size_of = lru_cache(image_size)  # a file side by side is that of two halves
    sizes = {half: half_size(half, size_of) for half in dict.fromkeys(scene.halves)}
    _check_equal(sizes)
    half, size = next(iter(sizes.items()))
    if min(size) < SSIM_WINDOW:
        raise UserError(f"{half.path}: {size[1]}x{size[0]} pixels; training images need at least 11x11")


def _check_equal(sizes):
    reference, expected = next(iter(sizes.items()))
    for half, size in sizes.items():
        if size != expected:
            raise UserError(
                f"{half.path}: {size[1]}x{size[0]} pixels, but {reference.path} of the same scene is "
                f"{expected[1]}x{expected[0]}; all images of a scene must have one size"
            )


def half_size(half, size_of=image_size):
    """(height, width) of a half, not decoded: by `image_size`, which notices a file that is cut short, or by
    the quicker `header_size`. Raises UserError as these do, and for an odd width.
    """
    height, width = size_of(half.path)
    return (height, width) if half.side is None else (height, _half_width(width, half.path))


def _half_width(width, path):
    if width % 2:
        raise UserError(
            f"{path}: side by side, but its width of {width} is odd; both halves must be equally wide"
        )
    return width // 2


def read_scene(scene, cache=None):
    """(rainy, clean): a list of HxWx3 uint8 RGB arrays, one a density, and one such array or None.

    Each file is decoded once, or not at all if a support.cache.Cache has them all; its arrays are read-only.
    Raises UserError for a file that cannot be read or sizes that differ.
    """
    halves = scene.halves
    images = cache.get(halves) if cache else None
    if images is None:
        files = {path: read_image(path) for path in dict.fromkeys(half.path for half in halves)}
        images = [cut(files[half.path], half) for half in halves]
    _check_equal({half: image.shape[:2] for half, image in zip(halves, images, strict=True)})
    return (images[:-1], images[-1]) if scene.clean else (images, None)


def cut(image, half):
    """The part of a decoded file, HxWx3, that `half` is. Raises UserError where its width is odd."""
    if half.side is None:
        return image
    middle = _half_width(image.shape[1], half.path)
    return image[:, :middle] if half.side == "left" else image[:, middle:]


# --- the parts ----------------------------------------------------------------------------------------------


def split(scenes, seed=0):
    """The scenes of each part: {"weights": 50 %, "architecture": 45 %, "validation": 5 %}, none shared.

    It goes by background, so that no background is in two parts: distinct backgrounds are ordered by a hash
    of their key and the seed, and cut in those proportions, each part getting at least one. It depends on
    nothing else: not on the run's own seed, nor on the order of the files. Raises UserError for under 3
    backgrounds.
    """
    keys = background_keys(scenes)

    def digest(key):
        return hashlib.sha256(f"{seed}:{key}".encode(errors="surrogateescape")).digest()

    order = sorted(set(keys), key=digest)
    if len(order) < len(PARTS):
        raise UserError(
            f"--data: {len(order)} different backgrounds found (scenes of the same name count as one); the "
            "split into three parts needs at least 3"
        )
    validation = max(1, round(PARTS["validation"] * len(order)))
    architecture = max(1, round(PARTS["architecture"] * len(order)))
    weights = len(order) - architecture - validation
    names = ["weights"] * weights + ["architecture"] * architecture + ["validation"] * validation
    part = dict(zip(order, names, strict=True))
    return {name: [s for s, key in zip(scenes, keys, strict=True) if part[key] == name] for name in PARTS}


def spread(scenes, count):
    """`count` of the scenes, evenly over the list: every mixed folder has its share. 0: all of them."""
    if not count or count >= len(scenes):
        return scenes
    return [scenes[i * len(scenes) // count] for i in range(count)]


def background_keys(scenes):
    """A text for each scene, the same for all scenes of one background, and, harmlessly, for scenes of one
    name in different folders.

    It is the scene's name. Where by their clean images several scenes have one background, as half of
    Rain800's do, it is the first of their names in alphabetical order.
    """
    clean = list(dict.fromkeys(scene.clean for scene in scenes))  # a folder may be given twice
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda half: thumbnail(read_half(half)), clean)
        thumbnails = list(bar(found, "comparing backgrounds", len(clean), "scene"))
    first = dict(zip(clean, same_pictures(thumbnails), strict=True))
    names = {}
    for scene in scenes:
        index = first[scene.clean]
        name = _without_crop(scene)
        names[index] = min(names.get(index, name), name)
    return [names[first[scene.clean]] for scene in scenes]


def _without_crop(scene):
    """The scene's name; in input_crops or the like without its second number, which is that of the crop."""
    is_crop = scene.rainy[0].path.parent.name.lower().endswith("crops")
    return re.sub(r"(?<=\d)[-_]\d+$", "", scene.name) if is_crop else scene.name


def read_half(half):
    """A half decoded, HxWx3 uint8 RGB. Raises UserError as `read_image` and `cut` do."""
    return cut(read_image(half.path), half)


def thumbnail(image):
    """256 values, mean 0 and norm 1, that hardly change when HxWx3 uint8 RGB is scaled or re-encoded."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)  # else rounding hides what is faint
    small = cv2.resize(grey, (16, 16), interpolation=cv2.INTER_AREA)
    vector = small.ravel() - small.mean()
    return vector / max(np.linalg.norm(vector), 0.1)  # a flat picture is like no other


def same_pictures(thumbnails, threshold=0.998):
    """For each thumbnail the index of the first one that shows the same picture. Where a is like b and b like
    c, all three are the same.

    In Rain800 copies of a photograph correlate above 0.9996 and different ones below 0.994.
    """
    if not thumbnails:
        return []
    stack = np.stack(thumbnails)
    first = np.arange(len(stack))
    for begin in range(0, len(stack), 256):  # by matrix products: one by one, 600,000 pictures take hours
        end = begin + 256
        close = stack[begin:end] @ stack[:end].T > threshold
        for i, row in enumerate(close, start=begin):
            alike = np.unique(first[:i][row[:i]])
            if len(alike) > 1:
                first[np.isin(first, alike)] = alike[0]
            if len(alike):
                first[i] = alike[0]
    return first.tolist()


def plain(scene):
    """A scene with a clean image as lists and text, which `from_plain` turns back into it."""
    return [scene.name, [[half.path.as_posix(), half.side] for half in scene.halves], list(scene.densities)]


def from_plain(fields):
    """The Scene of a list of `plain`."""
    name, halves, densities = fields
    *rainy, clean = (Half(Path(path), side) for path, side in halves)
    return Scene(name, tuple(rainy), clean, tuple(densities))


# --- the training batches -----------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Whole scenes: rainy Nx3xPxP and clean Sx3xPxP, uint8 from the loader, float32 in [0, 1] after `to`, and
    so in what `batches` gives.

    scene: N indices into clean. names: the S scenes' names. padded: names of scenes smaller than the patch.
    files: those of the scenes. bad: (key, why) of scenes that could not be read, each replaced by the next.
    """

    rainy: torch.Tensor
    clean: torch.Tensor
    scene: torch.Tensor
    names: list[str]
    padded: list[str]
    files: list[str] = []
    bad: list[tuple[str, str]] = []

    @property
    def tensors(self):
        """(rainy, clean, scene)."""
        return self.rainy, self.clean, self.scene

    def to(self, device):
        """The batch on a device, its images in [0, 1]; the rainy ones, as the networks are, channels last."""
        rainy, clean, scene = (tensor.to(device, non_blocking=True) for tensor in self.tensors)
        rainy = rainy.to(memory_format=torch.channels_last)
        if rainy.dtype == torch.uint8:
            # In place: on a CPU, two new tensors this large cost 40 times the arithmetic.
            rainy, clean = rainy.float().div_(255), clean.float().div_(255)
        return self._replace(rainy=rainy, clean=clean, scene=scene)

    def parts(self, count):
        """The batch as up to `count` smaller ones of whole scenes: a list of (share of the scenes, Batch)."""
        if count == 1:
            return [(1.0, self)]
        divided = []
        for scenes in torch.arange(len(self.clean)).chunk(count):
            first, last = scenes[0].item(), scenes[-1].item()
            mine = (self.scene >= first) & (self.scene <= last)
            part = Batch(
                self.rainy[mine],
                self.clean[first : last + 1],
                self.scene[mine] - first,
                self.names[first : last + 1],
                self.padded,
            )
            divided.append((len(scenes) / len(self.clean), part))
        return divided


class Patches(NamedTuple):
    """One draw: rainy Dx3xPxP and clean 3xPxP of a scene, uint8; padded: smaller than P; bad: as in Batch."""

    rainy: torch.Tensor
    clean: torch.Tensor
    scene: Scene
    padded: bool
    bad: list[tuple[str, str]]


class ScenePatches(Dataset):
    """Draw number n -> a random crop of one scene, all densities cut, flipped and rotated alike.

    Draws go through one shuffle of all scenes after another. In each, scenes with the same number of images
    are spread evenly, so that batches of mixed data sets have few shapes: each shape is a CUDA graph.
    Everything random is a function of (seed, draw number), so a run continues exactly from that number,
    whatever the workers. A scene smaller than the patch is padded by mirroring its border. With
    `clean_inputs` > 0 that share of the draws has one rainy image replaced by the clean one, which teaches
    the network to leave dry pictures alone. `upright`: no quarter turns, after which rain would fall
    sideways.

    Scenes whose keys are in `bad` are left out, and so is, from then on, a scene that cannot be read: the
    next one of the shuffle that can be read takes its place.
    """

    def __init__(self, scenes, patch_size, seed, clean_inputs=0.0, bad=(), cache=None, upright=False):
        self.scenes = scenes
        self.patch_size = patch_size
        self.seed = seed
        self.clean_inputs = clean_inputs
        self.upright = upright
        self.cache = cache
        self.kinds = tuple(len(scene.rainy) for scene in scenes)
        # Shared with the loader's workers: what one of them could not read, all of them leave out.
        self.bad = torch.tensor([scene.key in bad for scene in scenes]).share_memory_()

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, draw):
        try:
            scene, rainy, clean, bad = self.read(draw)
        except UserError as error:  # returned, since a loader's worker would wrap it in its own traceback
            return error
        rng = np.random.default_rng((self.seed, draw))
        padded = min(clean.shape[:2]) < self.patch_size
        images = augment(crop([*rainy, clean], self.patch_size, rng), rng, self.upright)
        if rng.random() < self.clean_inputs:
            images[rng.integers(len(rainy))] = images[-1]
        tensor = torch.from_numpy(images.copy()).permute(0, 3, 1, 2)
        return Patches(tensor[:-1], tensor[-1], scene, padded, bad)

    def read(self, draw):
        """(scene, rainy, clean, bad) of a draw; UserError where scene after scene cannot be read."""
        shuffle, place = divmod(draw, len(self))
        bad = []
        for index in np.roll(shuffled(self.seed, shuffle, self.kinds), -place):
            if self.bad[index]:
                continue
            scene = self.scenes[index]
            try:
                return scene, *read_scene(scene, self.cache), bad
            except UserError as error:
                bad.append((scene.key, str(error)))
                self.bad[index] = True
            if len(bad) == GIVE_UP:
                break
        if not bad:
            raise UserError("--data: no scene can be read any more")
        raise UserError(f"{bad[0][1]}; {len(bad)} scenes in a row cannot be read")


@lru_cache(maxsize=4)
def shuffled(seed, shuffle, kinds):
    """Permutation number `shuffle` of the indices of `kinds`, those of each kind spread evenly over it."""
    rng = np.random.default_rng((seed, shuffle, len(kinds)))
    order = rng.permutation(len(kinds))
    place = np.empty(len(kinds))
    for kind in sorted(set(kinds)):
        same = order[np.equal(kinds, kind)[order]]
        place[same] = (np.arange(len(same)) + rng.random()) / len(same)
    return order[np.argsort(place[order], kind="stable")]


def crop(images, size, rng):
    """A window of K HxWx3 images at a random place, the same in all: K x size x size x 3. Smaller ones are
    padded.
    """
    missing = [max(0, size - side) for side in images[0].shape[:2]]
    if any(missing):
        around = [(m // 2, m - m // 2) for m in missing]
        images = [np.pad(image, (*around, (0, 0)), mode="symmetric") for image in images]
    top, left = (rng.integers(side - size + 1) for side in images[0].shape[:2])
    return np.stack([image[top : top + size, left : left + size] for image in images])


def augment(images, rng, upright):
    """One of the 8 flips and quarter turns of KxPxPx3 images, the same for all; upright: of the 4 flips."""
    turns = rng.integers(4)
    images = np.rot90(images, turns // 2 * 2 if upright else turns, axes=(1, 2))
    return images[:, ::-1] if rng.integers(2) else images


class Draws(Sampler):
    """Lists of `batch_size` consecutive draw numbers from step `first` on, without end.

    Several ranks make one batch together: each gets an equal share of every list.
    """

    def __init__(self, batch_size, first, rank, ranks):
        self.batch_size = batch_size
        self.first = first
        self.rank = rank
        self.share = batch_size // ranks

    def __iter__(self):
        start = self.first * self.batch_size + self.rank * self.share
        while True:
            yield list(range(start, start + self.share))
            start += self.batch_size


def collate(items):
    """Scenes of any number of densities -> Batch; a UserError among them comes back in its place."""
    for item in items:
        if isinstance(item, UserError):
            return item
    rainy, clean, scenes, padded, bad = zip(*items, strict=True)
    counts = torch.tensor([len(images) for images in rainy])
    return Batch(
        torch.cat(rainy),
        torch.stack(clean),
        torch.arange(len(items)).repeat_interleave(counts),
        [scene.name for scene in scenes],
        [scene.name for scene, small in zip(scenes, padded, strict=True) if small],
        [file for scene in scenes for file in scene.files],
        [one for several in bad for one in several],
    )


def batches(
    scenes,
    patch_size,
    batch_size,
    seed,
    device,
    workers=0,
    first_step=0,
    clean_inputs=0.0,
    bad=(),
    cache=None,
    rank=0,
    ranks=1,
    upright=False,
):
    """An endless iterator over Batches of `batch_size` scenes on `device`, beginning with step `first_step`.

    clean_inputs, upright: as in `ScenePatches`. bad: keys of scenes to leave out. cache: a
    support.cache.Cache, or None; it changes nothing but the speed. rank, ranks: give part number `rank` of
    each batch, cut in `ranks` parts. Raises, with a batch, UserError when scene after scene cannot be read,
    and ValueError for no scenes and for a size that is no whole number from 1.
    """
    if not scenes:
        raise ValueError("scenes is empty; one or more are allowed")
    for name, size in (("patch_size", patch_size), ("batch_size", batch_size)):
        if not isinstance(size, Integral) or size < 1:
            raise ValueError(f"{name} is {size!r}; a whole number from 1 is allowed")
    loader = DataLoader(
        ScenePatches(scenes, patch_size, seed, clean_inputs, bad, cache, upright),
        batch_sampler=Draws(batch_size, first_step, rank, ranks),
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=start_worker,
        pin_memory=torch.device(device).type == "cuda",
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch.to(device)


def start_worker(number):
    """Set up a loader's worker. It ignores signals to the whole group (Ctrl-C, `timeout`) or job (Slurm,
    systemd): the run heeds them, and needs its workers to end its step. SIGTERM from the run itself ends a
    worker, as PyTorch counts on. So does a batch that finds no room in /dev/shm, or no file descriptor: the
    run would wait for it for ever.
    """
    cv2.setNumThreads(0)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda error, batch: os._exit(1))
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux: it tells who sent the signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_the_runs_sigterm, daemon=True).start()


def _await_the_runs_sigterm():
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != multiprocessing.parent_process().pid:
        pass
    os._exit(0)


def full_images(scenes, bad=None, cache=None):
    """Per scene, for validation: (DxHxWx3 rainy, 1xHxWx3 clean), uint8, whole pictures.

    bad: a list, to which (key of a scene, why it cannot be read) is added; None: UserError is raised. cache:
    as in `batches`. While one scene is used, the next is read.
    """
    with ThreadPoolExecutor(1) as pool:
        for scene, reading in in_turn(pool, partial(read_scene, cache=cache), scenes, ahead=1):
            try:
                rainy, clean = reading.result()
            except UserError as error:
                if bad is None:
                    raise
                bad.append((scene.key, str(error)))
                continue
            yield np.stack(rainy), np.stack([clean])


def in_turn(pool, function, items, ahead):
    """Yield (item, Future of function(item)) for each item in turn, while at most `ahead` further ones are
    worked on: if all were, results would pile up in memory.
    """
    waiting = deque()
    for item in items:
        waiting.append((item, pool.submit(function, item)))
        if len(waiting) > ahead:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def to_tensor(images, device="cpu"):
    """NxHxWx3 uint8 -> Nx3xHxW float32 in [0, 1], computed on the device."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().contiguous() / 255


if __name__ == "__main__":
    from support import check, command  # which import this file, as `dataset`

    command.run(check.main, check.get_args_parser())
