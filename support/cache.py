"""What --cache does: pictures decoded once, their pixels in a file that every worker and process maps.

A crop then reads its own rows, and no others. For each training folder there is one such file:
`decoded.cache` in it, or one in the folder that --cache names. It holds the pictures, HxWx3 uint8 RGB as
`dataset.read_half` returns them; their index in JSON; and, in its last bytes, where the index begins and its
checksum.

A picture is valid while the file it came from has the size and time of change that are in the index, which
every read checks, and while its own checksum is right, which is checked when a run begins. Others are decoded
anew, into a new file that takes the place of the old one when it is whole. A file that cannot be decoded has
no pixels in the cache: reading it fails as it does without a cache.
"""

import hashlib
import json
import mmap
import os
import shutil
import struct
import uuid
import zlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import PIL
from tqdm import tqdm

from dataset import THREADS, cut, half_size, in_turn
from support.errors import UserError
from support.images import read_image
from support.layouts import Half

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = "decoded.cache"
# Where the index begins, its checksum, a number that no other cache file has, and what wrote it: another
# version of a decoder may give other pixels.
_TAIL = struct.Struct("<QI16s16s")
_VERSIONS = f"2, OpenCV {cv2.__version__}, Pillow {PIL.__version__}"
_WRITER = hashlib.md5(_VERSIONS.encode(), usedforsecurity=False).digest()  # else FIPS mode forbids it


class Kept(NamedTuple):
    """A picture in a cache file; height and width are 0 where its file cannot be decoded."""

    file: Path  # the cache file
    size: int  # of the file that it came from, in bytes
    changed: int  # nanoseconds, likewise
    offset: int
    height: int
    width: int
    checksum: int

    def bytes(self):
        return 3 * self.height * self.width

    def is_of(self, path):
        """Whether the file at `path` is still the one that this came from."""
        return _stamp(path) == (self.size, self.changed)


class Cache:
    """Pictures by their layouts.Half, out of one or several files that each process maps when it first reads.

    kept: {Half: Kept}. tails: {cache file: its last bytes}, which tell it from a file that took its place.
    """

    def __init__(self, kept, tails):
        self.kept = kept
        self.tails = tails
        self.maps = {}

    def __getstate__(self):
        return {**vars(self), "maps": {}}

    def get(self, halves):
        """[HxWx3 uint8 RGB, read-only] of the halves, or None where the cache does not have them all."""
        images = []
        for half in halves:
            kept = self.kept.get(half)
            if kept is None or not kept.bytes() or not kept.is_of(half.path):
                return None
            pixels = self._pixels(kept.file)
            if pixels is None:
                return None
            image = pixels[kept.offset : kept.offset + kept.bytes()]
            images.append(image.reshape(kept.height, kept.width, 3))
        return images

    def _pixels(self, path):
        if path not in self.maps:
            self.maps[path] = _map(path, self.tails[path])
        return self.maps[path]


def _map(path, tail):
    """A file's bytes as an array, or None where it is gone or another one has taken its place."""
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # of an empty file there is no map
        return None
    mapped.madvise(mmap.MADV_RANDOM)  # else the system reads up to megabytes around each crop
    return np.frombuffer(mapped, np.uint8) if mapped[-_TAIL.size :] == tail else None


def _stamp(path):
    """(bytes, nanoseconds of the last change) of a file; None where it is gone."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


# --- when a run begins --------------------------------------------------------------------------------------


def open_cache(scenes, folders, place=""):
    """The Cache of `scenes`, which were found in `folders`; what no cache file has yet is decoded now.

    place: the folder of the cache files; "": each is in the folder whose pictures it holds. Raises UserError
    where a file that is needed cannot be written, or has no room.
    """
    if fcntl is None:
        raise UserError("--cache: needs a system with file locks, such as Linux, macOS or WSL; leave it out")
    halves = {path if path.is_dir() else path.parent: [] for path in map(Path, folders)}
    for half in dict.fromkeys(half for scene in scenes for half in scene.halves):
        halves[next(root for root in halves if half.path.is_relative_to(root))].append(half)
    files = {root: _file(root, place) for root in halves}
    found = {root: _read(files[root], root, halves[root]) for root in halves}
    lacking = [root for root in halves if _lacks(found[root], halves[root])]
    _check_room({files[root]: _bytes(found[root], halves[root]) for root in lacking})
    for root in lacking:
        found[root] = _build(files[root], root, halves[root])
    whole = Cache({}, {})
    for cache in found.values():
        whole.kept |= cache.kept
        whole.tails |= cache.tails
    print(f"cache: {' '.join(map(str, whole.tails))}", flush=True)
    return whole


def _file(root, place):
    if not place:
        return root / NAME
    whole = root.absolute()
    return Path(place, f"{whole.name}-{hashlib.sha256(os.fsencode(whole)).hexdigest()[:8]}.cache")


def _lacks(cache, halves):
    """The halves that the cache does not know, but for those whose files are gone."""
    return [half for half in halves if half not in cache.kept and _stamp(half.path)]


def _bytes(cache, halves):
    """How many bytes the pixels of the halves take in all; nothing is decoded."""

    def size(half):
        if half in cache.kept:
            return cache.kept[half].bytes()
        try:
            height, width = half_size(half)
        except UserError:
            return 0
        return 3 * height * width

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(size, halves))


def _check_room(needed):
    """UserError where a disk has no room for the files on it; needed: {cache file: bytes}."""
    disks = defaultdict(list)
    for path in needed:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            disks[os.stat(path.parent).st_dev].append(path)
        except OSError as error:
            raise _cannot_write(path, error) from None
    for paths in disks.values():
        wanted, free = sum(needed[path] for path in paths), shutil.disk_usage(paths[0].parent).free
        free += sum((_stamp(_unfinished(path)) or (0, 0))[0] for path in paths)  # that will be written over
        if wanted > free:
            old = [f"{path} ({_stamp(path)[0]:,} bytes, out of date)" for path in paths if path.exists()]
            raise UserError(
                f"--cache: {wanted:,} bytes are needed in {paths[0].parent}, but {free:,} are free; "
                f"make room{', such as by removing ' if old else ''}{', '.join(old)}, or give --cache DIR on "
                "another disk"
            )


def _cannot_write(path, error):
    return UserError(
        f"{path}: cannot be written: {error.strerror}; give --cache DIR, a folder that can be written"
    )


# --- a cache file -------------------------------------------------------------------------------------------


def _read(path, root, halves):
    """The Cache of those of the halves that are in a cache file of the folder `root`, and valid."""
    wanted, kept = set(halves), {}
    try:
        with open(path, "rb") as file:
            tail, rows = _read_index(file)
            if tail is None:
                print(f"{path}: is damaged or another version's, and is made anew", flush=True)
                return Cache({}, {})
            for name, side, *numbers in _bar("checking the cache", "picture", rows):
                half, one = Half(root / name, side), Kept(path, *numbers)
                if half in wanted and one.is_of(half.path):
                    file.seek(one.offset)
                    if zlib.crc32(file.read(one.bytes())) == one.checksum:
                        kept[half] = one
    except FileNotFoundError:
        return Cache({}, {})
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}; give --cache DIR, another folder"
        ) from None
    return Cache(kept, {path: tail})


def _read_index(file):
    """(last bytes, rows of the index) of a cache file; (None, None) where it is not whole."""
    size = os.fstat(file.fileno()).st_size
    file.seek(max(0, size - _TAIL.size))
    tail = file.read()
    if len(tail) < _TAIL.size:
        return None, None
    begin, checksum, _, writer = _TAIL.unpack(tail)
    if writer != _WRITER or begin > size:
        return None, None
    file.seek(begin)
    index = file.read()[: -_TAIL.size]
    return (tail, json.loads(index)) if zlib.crc32(index) == checksum else (None, None)


def _build(path, root, halves):
    """Make a cache file anew, unless another process has by now; returns its Cache."""
    try:
        with _alone(_unfinished(path)) as file:
            cache = _read(path, root, halves)
            if _lacks(cache, halves):
                cache = _write(file, path, root, halves, cache)
                os.replace(_unfinished(path), path)
            return cache
    except OSError as error:
        raise _cannot_write(path, error) from None


def _unfinished(path):
    return path.with_name(f".{path.name}.unfinished")


@contextmanager
def _alone(path):
    """A new file at `path`, for the caller to rename; if it is not renamed, it is removed in the end.

    It is locked, so that no other process writes it; the lock ends with the process, however that ends. What
    a killed process has left there is written over.
    """
    while True:
        with open(path, "ab") as file:
            _lock(file)
            if not _is_at(file, path):  # whoever had it before has renamed or removed it
                continue
            try:
                file.truncate(0)
                yield file
            finally:
                if _is_at(file, path):
                    path.unlink()
            return


def _lock(file):
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another run, which is writing {file.name}", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)


def _is_at(file, path):
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _write(file, path, root, halves, old):
    """Fill a file that will be the cache file `path`; what `old` has is copied. Returns its Cache."""
    by_file = defaultdict(list)
    for half in halves:
        by_file[half.path].append(half)
    print(f"cache: {len(_lacks(old, halves))} of {len(halves)} pictures are decoded into {path}", flush=True)
    kept, rows, offset = {}, [], 0
    with ThreadPoolExecutor(THREADS) as pool:
        decoding = in_turn(pool, partial(_decode, old), by_file.values(), ahead=2 * THREADS)
        for _, decoded in _bar("decoding once", "file", decoding, len(by_file)):
            for half, stamp, image, checksum in decoded.result():
                file.write(image)
                kept[half] = Kept(path, *stamp, offset, *image.shape[:2], checksum)
                rows.append([half.path.relative_to(root).as_posix(), half.side, *kept[half][1:]])
                offset += image.nbytes
    index = json.dumps(rows).encode()
    tail = _TAIL.pack(offset, zlib.crc32(index), uuid.uuid4().bytes, _WRITER)
    file.write(index + tail)
    file.flush()
    os.fsync(file.fileno())
    return Cache(kept, {path: tail})


def _decode(old, halves):
    """[(Half, stamp, HxWx3 uint8, checksum)] of the halves of one file; 0x0x3 where it cannot be decoded."""
    stamp = _stamp(halves[0].path)  # before it is read: if it changes meanwhile, this no longer fits it
    if stamp is None:
        return []
    images = old.get(halves)
    if images is None:
        try:
            whole = read_image(halves[0].path)
            images = [np.ascontiguousarray(cut(whole, half)) for half in halves]
        except UserError:  # drawing the picture will raise it again
            images = [np.empty((0, 0, 3), np.uint8)] * len(halves)
    return [(half, stamp, image, zlib.crc32(image)) for half, image in zip(halves, images, strict=True)]


def _bar(what, unit, items=None, total=None):
    # Of every rank, unlike `distributed.bar`: any may be the one that writes, and the others wait for it.
    return tqdm(items, what, total, unit=unit, leave=False, disable=None)
