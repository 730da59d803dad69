"""Any picture or video in and out: JPEG, PNG, BMP, TIFF and WebP; grey, colour, alpha; 8 and 16 bits.

OpenCV decodes and encodes. Before it does, Pillow reads the header and the file is checked to be whole: of a
truncated JPEG, some versions of OpenCV return an array with a grey bottom, without a word.
"""

import errno
import io
import logging
import operator
import os
import re
import shutil
import struct
import threading
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, PngImagePlugin

from support.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
MOST_METADATA = 2**28  # bytes, unpacked: colour profiles and the like
MAX_PIXELS = 2**28  # 16,384 x 16,384: above a 200-megapixel camera's, below what a forged header asks for

VIDEO_EXTENSIONS = tuple(".mp4 .avi .mov .mkv .m4v .mpg .mpeg .webm .wmv .mts .m2ts .ts .3gp".split())
# The length that OpenCV tells of these may be the sound's, and after a cut it is that of what is left.
_STREAMS = (".mpg", ".mpeg", ".mts", ".m2ts", ".ts")
_GUESSED = (*_STREAMS, ".wmv")
_CODECS = {".mp4": "mp4v", ".m4v": "mp4v", ".mov": "mp4v", ".mkv": "mp4v", ".avi": "MJPG"}

_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")  # as Pillow names them
_GREY = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L")  # modes, as Pillow names them
# Numbers of the tags in TIFF and EXIF.
_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _ORIENTATION, _SAMPLES, _PLANES = 256, 257, 258, 262, 274, 277, 284
_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # those that carry no segment are left out
_JPEG_END = re.compile(rb"\xff+[^\x00\x01\xff]")  # of coded pixels: a restart, or any other marker
_whole_jpegs = set()  # length and checksum of those seen to be whole, of late
_REMEMBERED = 100_000
_NOISE = np.random.default_rng(0).integers(0, 255, 64, dtype=np.uint8).tobytes()
_QUALITY = {
    ".jpg": cv2.IMWRITE_JPEG_QUALITY,
    ".jpeg": cv2.IMWRITE_JPEG_QUALITY,
    ".webp": cv2.IMWRITE_WEBP_QUALITY,
}
_NO_IMAGE = "is no JPEG, PNG, BMP, TIFF or WebP image of 8 or 16 bits, or is damaged"
_USUAL, _NO_LOSS = 95, 101  # quality; 101 is OpenCV's of a lossless WebP

_OF_THE_SYSTEM = ("@eaDir", "lost+found")  # folders: Synology's thumbnails, root's alone on any disk of ext4
_OF_THE_NAME = (errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL)

log = logging.getLogger(__name__)


class CannotWrite(UserError):
    """A file cannot be written, and others will not fare better: its folder is read-only, or full."""


class Picture(NamedTuple):
    """A picture with what it takes to write it back as it was."""

    rgb: np.ndarray  # HxWx3, uint8 or uint16, upright
    alpha: np.ndarray | None = None  # HxW of the same type, or None where the file has none
    grey: bool = False  # the file has one colour channel; it is repeated three times in rgb
    lossless: bool = False  # the file is a WebP that holds its pixels as they are


class _Header(NamedTuple):
    format: str
    mode: str  # Pillow's: RGB, RGBA, L, LA, CMYK, ...
    bits: int | None  # a channel; of TIFF only
    size: tuple[int, int]  # height, width, upright
    orientation: int  # 1 to 8; 1 is upright
    odd: bool  # a TIFF with white as zero, or a plane a colour: where they have 16 bits, OpenCV misreads them
    clear: int | None  # the level of a grey PNG, at its own depth, that is transparent
    frames: int  # pages of a TIFF, frames of an animation; what else a JPEG file may hold does not count


def load(path: str | Path) -> Picture:
    """Read a picture so that `save` can write it back: same channels, same bits, same alpha.

    The EXIF (or TIFF) orientation is applied. The content tells the format, whatever the file's name. Of
    several pages or frames the first is read, and the log says so.

    Raises:
        UserError: one line naming the file, if it is missing, empty, not an image, truncated, damaged, has
            more than `MAX_PIXELS` pixels, has other than 8 or 16 bits a channel, or is a TIFF that OpenCV
            or Pillow misreads.
    """
    data, header = _open(path)
    if header.frames > 1:
        _say_frames(path, header.frames)
    lossless = header.format == "WEBP" and _is_lossless_webp(data)
    return _picture(path, data, header)._replace(lossless=lossless)


def _picture(path: str | Path, data: bytes, header: _Header) -> Picture:
    pixels = _decode(path, data, header)
    if pixels.shape[:2] != header.size:
        (height, width), (rows, columns) = header.size, pixels.shape[:2]
        raise UserError(
            f"{path}: is damaged: its header promises {width}x{height} pixels, but it holds {columns}x{rows}"
        )
    if pixels.dtype not in (np.uint8, np.uint16):
        raise UserError(f"{path}: has samples of {pixels.dtype}; convert it to 8 or 16 bits first")
    if pixels.ndim == 2:
        alpha = None
        if header.clear is not None:  # a PNG, whose 25th byte tells its bits
            alpha = _alpha_of_grey(pixels, header.clear, bits=data[24])
        return Picture(cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB), alpha, grey=True)
    if pixels.shape[2] == 3:
        return Picture(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
    return Picture(cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGB), pixels[..., 3].copy(), grey=header.mode == "LA")


def _alpha_of_grey(pixels: np.ndarray, clear: int, bits: int) -> np.ndarray:
    """0 where a PNG has its transparent level, of so many bits, which OpenCV drops."""
    most = np.iinfo(pixels.dtype).max
    level = (clear & 2**bits - 1) * most // (2**bits - 1)  # as OpenCV expands 1, 2 and 4 bits to 8
    return np.where(pixels == level, 0, most).astype(pixels.dtype)


@lru_cache(maxsize=1000)
def _say_frames(path, frames):
    """Once, though a training reads its files over and over."""
    log.warning("%s: holds %d pages or frames; only the first is read", path, frames)


def save(path: str | Path, picture: Picture) -> None:
    """Write `picture` with its own channels and bits, as far as the format of that name holds them.

    The colours of a grey picture, which a network may have let drift apart, are joined by BT.601 luma. Grey
    with alpha is written as RGBA, since OpenCV has no other; a lossless WebP stays one. The rest is as in
    `write_image`.
    """
    image = picture.rgb
    if picture.grey:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if picture.alpha is not None:
        colours = [image] * 3 if picture.grey else [image]
        image = np.dstack([*colours, picture.alpha])
    write_image(path, image, _NO_LOSS if picture.lossless else _USUAL)


def in_grey(rgb: np.ndarray) -> np.ndarray:
    """An HxWx3 picture's colours joined as `save` joins a grey one's, and repeated."""
    return cv2.cvtColor(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def read_image(path: str | Path) -> np.ndarray:
    """Read a picture for training or scoring: HxWx3 uint8 RGB, upright.

    Grey is repeated, alpha is left out, 16 bits are rounded to 8. Raises UserError as `load` does.
    """
    return to_8_bits(load(path).rgb)


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of the upright picture, in pixels, without decoding it.

    Raises UserError as `load` does, for all that shows without decoding: a truncated JPEG, PNG or WebP does.
    """
    return _open(path)[1].size


def header_size(path: str | Path) -> tuple[int, int]:
    """As `image_size`, but by the file's first bytes alone: the rest may be damaged or missing."""
    return _first_bytes(path).size


def is_grey(path: str | Path) -> bool:
    """Whether an image file has one colour channel, by its first bytes. Raises UserError as `header_size`."""
    return _first_bytes(path).mode in _GREY


def _first_bytes(path: str | Path) -> _Header:
    try:
        with open(path, "rb") as file:
            return _read_header(path, file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def write_image(path: str | Path, image: np.ndarray, quality: int = _USUAL, subsampled: bool = True) -> None:
    """Write an image; an interrupted run leaves the whole file or none. Folders are made as needed.

    Args:
        path: its extension, one of `EXTENSIONS` in any case, is the format.
        image: HxWx3 RGB, HxWx4 RGBA or HxW grey, uint8 or uint16. What the format does not hold is given up
            and the log says so: 16 bits in JPEG, BMP and WebP, alpha in JPEG.
        quality: of JPEG and WebP, 1 to 100.
        subsampled: whether JPEG has colours at half the size (4:2:0), as most cameras' has.

    Raises:
        UserError: one line naming the path, if the extension is unknown, the file cannot be written, or the
            image is larger than the format allows.
        ValueError: `image` is none of the above.
    """
    path = Path(path)
    write_bytes(path, _encode(path, image, quality, subsampled))


def write_bytes(path: str | Path, data: bytes, durable: bool = False) -> None:
    """Write a file, and folders as needed, so that `path` is whole or untouched.

    durable: even if the power fails. That means waiting for the disk, too long for a folder of pictures.
    Raises CannotWrite, or UserError for a name that no file can have.
    """
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")  # not longer than names may get
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            if durable:
                with open(temporary, "r+b") as file:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from error


def check_folder(folder: str | Path) -> None:
    """Raise CannotWrite, naming the folder, if no file could be made in it; it need not be there yet."""
    folder = Path(folder)
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(folder)  # whose name may be too long
        # Not by tempfile, which on Windows tries name after name where files may not be made, such as C:.
        probe = there / f".{uuid.uuid4().hex}"
        make, remove = (Path.touch, Path.unlink) if there == folder else (Path.mkdir, Path.rmdir)
        make(probe)
        remove(probe)
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _cannot_write(path: Path, error: OSError) -> UserError:
    kind = UserError if error.errno in _OF_THE_NAME else CannotWrite
    return kind(f"{path}: cannot be written: {error.strerror or error}")


def list_images(folder: str | Path, recursive: bool = False) -> list[Path]:
    """The image files of a folder, told by extension, in natural order of relative path: 2.png before 10.png.

    Hidden files and folders are left out: they are other systems' side files, thumbnails, or an interrupted
    run's. Broken links are listed, so that reading them raises an error. May be empty. Raises UserError if
    `folder` is no folder or, unless `recursive`, cannot be read; `recursive` logs a warning for each folder
    that cannot be, `folder` included.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: {'is not a folder' if os.path.exists(folder) else 'no such folder'}")
    found = walk(folder) if recursive else (folder / name for name in _names_in(folder))
    images = [p for p in found if p.suffix.lower() in EXTENSIONS and p.name[0] != "." and _is_file(p)]
    return sorted(images, key=lambda p: _natural(p.relative_to(folder).as_posix()))


def _is_file(path: Path) -> bool:
    return os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path))


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror}") from None


def _warn(error: OSError) -> None:
    log.warning("%s; left out", cannot_read(error))


def cannot_read(error: OSError) -> str:
    return f"{error.filename}: cannot be read: {error.strerror}"


def walk(folder: str | Path, unreadable: Callable[[OSError], object] = _warn) -> Iterator[Path]:
    """The files in a folder and in all below it that are not hidden, linked ones included, each folder once.

    unreadable: called with the error of each folder that cannot be read; by default it logs a warning.
    """
    seen = set()
    for root, folders, files in os.walk(str(folder), onerror=unreadable, followlinks=True):
        place = os.path.realpath(root)
        if place in seen:  # a link leads back, or to what has another name
            folders.clear()
            continue
        seen.add(place)
        visible = [name for name in folders if name[0] != "." and name not in _OF_THE_SYSTEM]
        folders[:] = sorted(visible, key=lambda name: (os.path.islink(os.path.join(root, name)), name))
        yield from (Path(root, file) for file in files)


def look_around(folder: str | Path) -> tuple[list[str], list[str]]:
    """The suffixes of a folder's files that are no images by their names, such as .heic and .mp4, and a line
    for each folder in it that cannot be read; two empty lists for the path of a file.
    """
    seen, closed = set(), []
    inside = walk(folder, lambda error: closed.append(cannot_read(error))) if os.path.isdir(folder) else ()
    for file in inside:
        if file.name[0] != "." and os.path.isfile(file):
            seen.add(file.suffix.lower())
    return sorted(seen - {"", *EXTENSIONS}), closed


def _natural(name: str) -> tuple:
    pieces = re.split(r"([0-9]+)", name.casefold())
    return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)], name


def _open(path: str | Path) -> tuple[bytes, _Header]:
    """The bytes and the header of an image file that is there, is whole and has a bearable size."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise UserError(f"{path}: is empty (0 bytes)")
            header = _read_header(path, file)  # before the rest: it may not be an image at all
            file.seek(0)
            data = file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not _is_whole(data, header.format):
        raise UserError(f"{path}: is truncated or damaged: no whole {header.format} in {len(data):,} bytes")
    return data, header


def _read_header(path: str | Path, file: io.BufferedIOBase) -> _Header:
    with _pillow(path):
        header = _parse_header(Image.open(file, formats=_FORMATS))
    height, width = header.size
    if width * height > MAX_PIXELS:
        raise UserError(f"{path}: has {width}x{height} pixels, over {MAX_PIXELS:,}; scale it down first")
    return header


def _parse_header(image: Image.Image) -> _Header:
    tiff = image.format == "TIFF"
    tags = image.tag_v2 if tiff else _exif(image)
    # Newer Pillow turns a TIFF's size; older lets a damaged one be text.
    width, height = map(operator.index, (tags[_WIDTH], tags[_HEIGHT]) if tiff else image.size)
    if tiff and image.tile[-1][1][2:] != (width, height):  # else what has no strip or tile would be black
        raise ValueError(f"its strips end at {image.tile[-1][1][2:]}")
    # Not counted in what will be refused: older Pillow then makes room for its pixels.
    alone = image.format in ("JPEG", "MPO") or width * height > MAX_PIXELS
    orientation = tags.get(_ORIENTATION)
    if orientation not in range(1, 9):
        orientation = 1
    deep_grey = image.format == "PNG" and image.tile[0][3] == "LA;16B"  # whose mode is RGBA
    return _Header(
        format="JPEG" if image.format == "MPO" else image.format,  # more JPEGs follow; the first is read
        mode="LA" if deep_grey else image.mode,
        bits=tags.get(_BITS, (1,))[0] if tiff else None,
        size=(width, height) if orientation >= 5 else (height, width),
        orientation=orientation,
        odd=tiff and (tags.get(_PHOTOMETRIC) == 0 or (tags.get(_PLANES) == 2 and tags.get(_SAMPLES, 1) > 1)),
        clear=image.info.get("transparency") if image.mode in _GREY else None,
        frames=1 if alone else getattr(image, "n_frames", 1),
    )


def _exif(image: Image.Image) -> Image.Exif:
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif", b""))
    except Exception as error:  # as in _pillow; a picture with illegible EXIF data is still a picture
        log.debug("illegible EXIF data: %s", error)
    return exif


def _is_whole(data: bytes, format: str) -> bool:
    """False for what is cut short. Nothing marks the end of a BMP or TIFF: there the decoder finds out."""
    if format == "JPEG":
        return _is_whole_jpeg(data)
    if format == "PNG":
        return _is_whole_png(data)
    if format == "WEBP":
        return len(data) >= 8 + int.from_bytes(data[4:8], "little")
    return True


def _is_whole_jpeg(data: bytes) -> bool:
    position = 2
    while match := _JPEG_MARKER.search(data, position):
        if match.group() == b"\xff\xd9":
            return True
        # Segments are stepped over by their length: a thumbnail in one has an end-of-image marker of its own.
        position = match.end() + int.from_bytes(data[match.end() : match.end() + 2], "big")
    return False


def _is_whole_png(data: bytes) -> bool:
    for name, chunk in _png_chunks(data):
        critical = name[:1].isupper()  # libpng forgives a wrong checksum in the others
        if critical and chunk[-4:] != zlib.crc32(chunk[4:-4]).to_bytes(4, "big"):
            return False
        if name == b"IEND":
            return True
    return False


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The name of each chunk, and all of it: from its length to its checksum."""
    position = 8
    while position + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        yield name, data[position:end]
        position = end


def _without_animation(data: bytes) -> bytes:
    """A PNG's still picture: OpenCV 5 reads the first frame in its place, and crashes on damaged ones."""
    if b"acTL" not in data:
        return data
    still = (chunk for name, chunk in _png_chunks(data) if name not in (b"acTL", b"fcTL", b"fdAT"))
    return data[:8] + b"".join(still)


def _is_lossless_webp(data: bytes) -> bool:
    """By the first chunk of pixels (RFC 9649); an animation counts as lossy."""
    position = 12
    while position + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data, position)
        if name in (b"VP8 ", b"VP8L"):
            return name == b"VP8L"
        position += 8 + length + length % 2
    return False


def _decode(path: str | Path, data: bytes, header: _Header) -> np.ndarray:
    """Upright pixels in OpenCV's order: HxW grey, HxWx3 BGR or HxWx4 BGRA."""
    if header.format == "BMP" or (header.format == "TIFF" and header.bits <= 8):
        # OpenCV takes a spare byte of a BMP for alpha, and turns the white of 16 bits grey. In a TIFF it
        # leaves damaged strips black, without a word; and in one of 8 bits it multiplies the colours by the
        # alpha, drops the alpha of grey, and makes one up for CMYK.
        return _decode_with_pillow(path, data)
    if header.odd:
        raise UserError(
            f"{path}: is a {header.bits}-bit TIFF with white as zero or a plane for each colour, which "
            "cannot be read; convert it"
        )
    if header.format == "JPEG":
        _check_coded_pixels(path, data)
    if header.format == "PNG":
        data = _without_animation(data)
    try:
        with _quiet:
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise UserError(f"{path}: is truncated or damaged ({str(error).splitlines()[0]})") from error
    if pixels is None:
        raise UserError(f"{path}: is truncated or damaged, or a kind of {header.format} that OpenCV lacks")
    # OpenCV turns a TIFF in any case, but other formats never with IMREAD_UNCHANGED, which keeps their alpha.
    return pixels if header.format == "TIFF" else _upright(pixels, header.orientation)


def _check_coded_pixels(path: str | Path, data: bytes) -> None:
    """Raise UserError where a JPEG has its end marker, but lacks coded pixels before it.

    Decoders silently fill what is missing with grey. So noise is added at the end of each run of coded pixels
    (ITU-T T.81, B.1.1): where the run is whole, a decoder ignores it; else it takes the noise for pixels, and
    the picture changes. This takes as long as decoding, so a process does it once for each file.
    """
    digest = len(data), zlib.crc32(data)
    if digest not in _whole_jpegs:
        if not np.array_equal(_small(path, data), _small(path, _lengthened(data))):
            raise UserError(f"{path}: is truncated or damaged: it ends before its last pixels")
        if len(_whole_jpegs) >= _REMEMBERED:
            _whole_jpegs.clear()
        _whole_jpegs.add(digest)


def _lengthened(data: bytes) -> bytes:
    pieces, done, position, coded = [], 0, 2, False
    while match := (_JPEG_END if coded else _JPEG_MARKER).search(data, position):
        marker, position = match.group()[-1], match.end()
        if coded:
            pieces += [data[done : match.start()], _NOISE]
            done = match.start()
        if marker == 0xD9 or 0xC9 <= marker <= 0xCF and marker != 0xCC:
            break  # the end of the image; or arithmetic coding, which may rightly leave out its end
        if not 0xD0 <= marker <= 0xD7:
            position += int.from_bytes(data[position : position + 2], "big")
            coded = marker == 0xDA
    return b"".join(pieces) + data[done:]


def _small(path: str | Path, data: bytes) -> np.ndarray:
    """A JPEG at an eighth of its size, or whole if it is progressive: its last runs are of the finest detail.

    By Pillow, since OpenCV prints about noise.
    """
    with _pillow(path):
        image = Image.open(io.BytesIO(data), formats=("JPEG",))
        if "progressive" not in image.info:
            image.draft(image.mode, (1, 1))
        return np.asarray(image)


def _decode_with_pillow(path: str | Path, data: bytes) -> np.ndarray:
    with _pillow(path, "is truncated or damaged, or of a kind that Pillow lacks"):
        image = Image.open(io.BytesIO(data), formats=_FORMATS)  # which turns a TIFF by itself
        if image.mode in ("LA", "PA") and image.tag_v2.get(_PLANES) == 2:
            raise ValueError("Pillow leaves a plane of alpha at 0")
        mode = {"1": "L", "L": "L", "LA": "RGBA", "PA": "RGBA", "RGBA": "RGBA"}.get(image.mode, "RGB")
        pixels = np.asarray(image.convert(mode))
    if pixels.ndim == 2:
        return pixels
    return cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR if pixels.shape[2] == 3 else cv2.COLOR_RGBA2BGRA)


@contextmanager
def _pillow(path: str | Path, otherwise: str = _NO_IMAGE):
    Image.MAX_IMAGE_PIXELS = None  # Pillow's own bound is below large cameras' pictures; ours takes its place
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = MOST_METADATA
    try:
        with _quiet:
            yield
    except MemoryError:
        raise
    except Exception as error:  # Pillow's parsers raise whatever a damaged file leads them to
        raise UserError(f"{path}: {otherwise}") from error


@contextmanager
def _no_words():
    """Keeps Pillow and OpenCV from printing about files: damage that matters raises an error."""
    logger = cv2 if hasattr(cv2, "setLogLevel") else cv2.utils.logging  # moved in OpenCV 5
    level = logger.getLogLevel()
    logger.setLogLevel(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLogLevel(level)


class _Shared:
    """A context of the whole process, which the first thread enters and the last one leaves."""

    def __init__(self, make):
        self.make, self.users, self.lock, self.process = make, 0, threading.Lock(), os.getpid()

    def __enter__(self):
        if self.process != os.getpid():  # a forked one has none of the threads, but may have their lock
            self.users, self.lock, self.process = 0, threading.Lock(), os.getpid()
        with self.lock:
            if not self.users:
                self.context = self.make()
                self.context.__enter__()
            self.users += 1

    def __exit__(self, *error):
        with self.lock:
            self.users -= 1
            if not self.users:
                self.context.__exit__(None, None, None)


_quiet = _Shared(_no_words)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo EXIF orientation 1 to 8 (Exif 2.3, 4.6.4): transpose, then mirror."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _encode(path: Path, image: np.ndarray, quality: int, subsampled: bool) -> bytes:
    suffix = path.suffix.lower()
    if suffix not in EXTENSIONS:
        raise UserError(
            f"{path}: cannot be written with {suffix or 'no'} extension; give one of {' '.join(EXTENSIONS)}"
        )
    image = np.asarray(image)
    channels = image.shape[2] if image.ndim == 3 else 1
    is_shaped = image.ndim in (2, 3) and channels in (1, 3, 4) and image.size
    if not is_shaped or image.dtype not in (np.uint8, np.uint16):
        given = f"{image.dtype} of shape {image.shape}"
        raise ValueError(f"image is {given}; HxW, HxWx3 or HxWx4 of uint8 or uint16 is allowed")
    if image.dtype == np.uint16 and suffix not in (".png", ".tif", ".tiff"):
        log.warning("%s: %s holds 8 bits a channel, so the picture's 16 bits are rounded", path, suffix)
        image = to_8_bits(image)
    if channels == 4 and suffix in (".jpg", ".jpeg"):
        log.warning("%s: %s holds no alpha, so the picture's is left out", path, suffix)
        image, channels = image[..., :3], 3
    if channels > 1:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR if channels == 3 else cv2.COLOR_RGBA2BGRA)
    flags = [_QUALITY[suffix], quality] if suffix in _QUALITY else []
    if suffix in (".jpg", ".jpeg") and not subsampled:
        flags += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    try:
        with _quiet:
            done, encoded = cv2.imencode(suffix, image, flags)
    except cv2.error:
        done = False
    if not done:
        height, width = image.shape[:2]
        raise UserError(f"{path}: OpenCV cannot make a {suffix} of {width}x{height} pixels; try .png or .tif")
    return encoded.tobytes()


def to_8_bits(image: np.ndarray) -> np.ndarray:
    """uint16 rounded to uint8; uint8 as it is."""
    return cv2.convertScaleAbs(image, alpha=1 / 257) if image.dtype == np.uint16 else image


# --- video ---


class EndsEarly(UserError):
    """A video holds fewer frames than it promises, or no more fit on the disk; what came before is whole."""


class Video:
    """The frames of a video file: iterate over it once for HxWx3 uint8 RGB arrays.

    fps: frames a second, the mean where it varies; frames: how many the file promises, 0 where it does not
    say; size: (height, width); stretched: whether its pixels are not square, as a DVD's, which the frames do
    not say.
    Raises UserError for a file that is missing or no video, and, after its last frame, EndsEarly.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not os.path.isfile(path):
            raise UserError(f"{path}: no such file")
        _check_name(self.path)
        os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # quiet: we say what is wrong with a file
        self._open()
        self.fps = self.capture.get(cv2.CAP_PROP_FPS)
        self.frames = max(0, int(self.capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        height, width = (
            int(self.capture.get(p)) for p in (cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FRAME_WIDTH)
        )
        self.size = height, width
        across, down = (self.capture.get(p) for p in (cv2.CAP_PROP_SAR_NUM, cv2.CAP_PROP_SAR_DEN))
        self.stretched = across != down and across > 0 and down > 0
        if not self.capture.isOpened() or self.fps <= 0 or not height * width:
            raise UserError(f"{path}: cannot be read as a video")
        if height * width > MAX_PIXELS:
            raise UserError(
                f"{path}: has frames of {width}x{height} pixels; at most {MAX_PIXELS} pixels can be read"
            )
        self._check_frames()
        if self.path.suffix.lower() in (".mkv", ".webm", *_GUESSED):
            self._count()

    def _open(self):
        with _quiet:
            # Not 12:30.mp4, which FFmpeg takes for a protocol.
            self.capture = cv2.VideoCapture(os.path.abspath(self.path))

    def _check_frames(self):
        """UserError where there is none. A warning where all are the same: OpenCV 5 fails to convert
        interlaced ones, and gives whatever is in memory, without a word.
        """
        count = 0
        with _quiet:
            found, first = self.capture.read()
            frame = first
            while found and np.array_equal(first, frame):
                count += 1
                found, frame = self.capture.read()
        if not count:
            raise UserError(
                f"{self.path}: cannot be read as a video: OpenCV {cv2.__version__} finds no frame in it, or "
                "lacks its codec; convert it with ffmpeg -i FILM NEW.mp4"
            )
        if not found and count > 1:
            log.warning(
                "%s: its %d frames are all the same; if it is interlaced, OpenCV %s cannot read it: convert "
                "it with ffmpeg -i FILM -vf yadif NEW.mp4",
                self.path,
                count,
                cv2.__version__,
            )
        self.capture.release()
        self._open()

    def _count(self):
        """Count the frames: these files have a length and a rate, and OpenCV only multiplies the two."""
        times, length = [], self.frames / self.fps
        with _quiet:
            while self.capture.grab():
                times.append(self.capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
        count, steps = len(times), np.diff(times)
        # Where MPEG's streams were joined, or a frame tells no time, time jumps; none lasts a second there.
        longest = 1 if self.path.suffix.lower() in _STREAMS else np.inf
        steps = steps[(steps >= 0) & (steps < longest)]
        if steps.sum() > 0 and abs(count - self.frames) > 1:
            end = max(times) + steps.mean()  # of the last frame, if it is as long as the mean one
            if count > self.frames or end > 0.98 * length or _is_cut(self.path) is False:  # sound may go on
                self.frames, self.fps = count, float(1 / steps.mean())
        self.capture.release()
        self._open()

    def __iter__(self) -> Iterator[np.ndarray]:
        count = 0
        while True:
            with _quiet:
                found, frame = self.capture.read()
            if not found:
                break
            count += 1
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        self.capture.release()
        # Containers that give their length in seconds may promise a frame more than they hold.
        if count < self.frames - 1:
            if _is_cut(self.path) is False:  # what a phone trims away stays in the file
                log.warning(
                    "%s: %d of its %d frames are shown; others are left out", self.path, count, self.frames
                )
                return
            raise EndsEarly(
                f"{self.path}: ends early, after {count} of {self.frames} frames; the rest is lost"
            )


def _is_cut(path):
    """Whether a video's file ends before its container says (of MP4 and QuickTime, ISO 14496-12 4.2, and of
    Matroska, RFC 8794); None where it does not say.
    """
    suffix, size = path.suffix.lower(), path.stat().st_size
    if suffix in _GUESSED:  # what is there is all that it says
        return False
    with open(path, "rb") as file:
        if suffix in (".mp4", ".m4v", ".mov", ".3gp"):
            end = 0
            while end < size:
                file.seek(end)
                head = file.read(16)
                length = int.from_bytes(head[:4], "big")
                if length == 1:
                    length = int.from_bytes(head[8:], "big")
                if length == 0:  # to the end of the file, whatever that is
                    return None
                end += max(length, 8)
            return end > size
        if suffix in (".mkv", ".webm"):
            head = file.read(4096)
            start = head.find(b"\x18\x53\x80\x67")  # the segment, which holds all the rest
            if start >= 0 and (first := int.from_bytes(head[start + 4 : start + 5], "big")):
                width = 9 - first.bit_length()  # bytes of its size, by the first bit that is set
                length = int.from_bytes(head[start + 4 : start + 4 + width], "big") - (1 << 7 * width)
                unknown = length == (1 << 7 * width) - 1
                return None if unknown else start + 4 + width + length > size
    return None


def _check_name(path):
    """UserError for a name that OpenCV's videos crash on."""
    if not is_utf8(os.path.abspath(path)):
        raise UserError(f"{path}: its name is not UTF-8, which a video's has to be; rename it")


def is_utf8(path: str | Path) -> bool:
    """Whether a path is text in UTF-8 on the disk, as OpenCV's videos and TensorBoard want it."""
    try:
        return os.fspath(path).encode() == os.fsencode(path)
    except UnicodeEncodeError:
        return False


def video_name(path: str | Path) -> Path:
    """The name by which `write_video` can write what came from `path`. Where it cannot keep the format, .mp4
    is added to the whole name, so that a.webm and a.mp4 do not become the same file.
    """
    path = Path(path)
    return path if path.suffix.lower() in _CODECS else path.with_name(f"{path.name}.mp4")


def write_video(path: str | Path, frames: Iterable[np.ndarray], fps: float) -> None:
    """Write HxWx3 uint8 RGB frames, without sound; `path` appears only when the last frame is written.

    The codecs want even sizes: an odd one gets its last row or column twice. If `frames` raises EndsEarly, or
    the disk has no room for more, what came before is kept under `path` and EndsEarly raised. Raises
    UserError, naming `path`, for a format or folder that cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in _CODECS:
        raise UserError(f"{path}: cannot be written as a video; choose one of {', '.join(_CODECS)}")
    _check_name(path)
    temporary = Path(os.path.abspath(path)).with_name(f".{uuid.uuid4().hex}{path.suffix}")
    writer, count = None, 0
    # MPEG-4 counts time in at most 65,535 parts of a second, OpenCV in thousandths of a frame or coarser.
    rate = fps if fps < 65 else round(fps, 2) if fps < 650 else round(fps)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            for frame in frames:
                height, width = frame.shape[:2]
                frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
                if shutil.disk_usage(path.parent).free < 2 * frame.nbytes:  # OpenCV reports no full disk
                    if not count:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    raise EndsEarly(f"{path}: ends early, after {count} frames: the disk is full")
                if writer is None:
                    code = cv2.VideoWriter_fourcc(*_CODECS[path.suffix.lower()])
                    with _quiet:
                        writer = cv2.VideoWriter(str(temporary), code, rate, frame.shape[1::-1])
                    if not writer.isOpened():
                        raise OSError("OpenCV has no encoder for it, or the folder cannot be written")
                writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
                count += 1
        except EndsEarly:
            _keep(writer, temporary, path, count)
            raise
        _keep(writer, temporary, path, count)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        if writer is not None:
            writer.release()  # or Windows does not let go of the file
        temporary.unlink(missing_ok=True)


def _keep(writer, temporary, path, count):
    if writer is not None:
        writer.release()
        # OpenCV tells of no write that failed, and a header may promise what the file does not hold.
        capture, written = cv2.VideoCapture(str(temporary)), 0
        while capture.grab():
            written += 1
        capture.release()  # else Windows does not rename it
        if written != count:
            raise OSError(f"of {count} frames the file holds {written}; the disk may be full")
        os.replace(temporary, path)
