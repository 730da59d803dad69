"""Synthetic rain like DID-MDN's: one clean background in three densities a scene, in that set's own layout.

    python -m support.rain photos/ datasets/synthetic                     one scene a photograph
    python -m support.rain photos/ more/ datasets/synthetic --style mixed --size 512 --test 100
    python -m support.rain photos/ datasets/leaning --style mixed --angle 75
    python -m support.rain rain800/training datasets/synthetic --clean_side left
    python -m support.rain photos/ datasets/moved --rain_of rain800/training --rain_side left

Rain brightens: O = B + a (1 - B), a screen blend of the clean image B with a grey layer a in [0, 1].

DID-MDN's layers look like noise smeared along one direction, then scaled. On its nine samples the
autocorrelation of a falls linearly to zero at 15 to 16 pixels along the streaks; across them it is that of a
cubic kernel 1.55 pixels wide. The densities of a scene share the direction, not the streaks, and differ in
mean and contrast of a. The numbers of the style "did-mdn" were fitted to those samples, to percentiles and
autocorrelation together, through the same JPEG coding; every scene draws its own around them. The other
styles follow Rain800 and photographs of real rain, by eye.

With `--rain_of` nothing is drawn: the rain of given pairs is moved to other backgrounds, see `Borrowed`. That
reaches what no style has: 15 % of Rain800's training pairs are darkened by more than 5 grey levels, by rain
blended in ways that raise contrast.
"""

import os
import shlex
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import skimage
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dataset import start_worker
from support import check, command
from support.errors import UserError
from support.images import CannotWrite, list_images, read_image, write_bytes, write_image
from support.layouts import DENSITIES, OTHER_SIDE, SIDES, TEST, TRAINING, find, flat, only_below

JPEG_QUALITY = 75  # DID-MDN's, by the quantisation tables of its files


class Style(NamedTuple):
    """What rain of one kind looks like on average. Means and contrasts are those of heavy, medium, light."""

    length: float  # of a streak, pixels
    width: float  # of a streak, pixels
    density: float  # streaks a pixel: well above 1/(length*width) they merge, well below each stands alone
    mean: tuple[float, float, float]  # of the layer a
    contrast: tuple[float, float, float]  # standard deviation of a over its mean, before clipping at 0
    spread: float = 0.2  # from scene to scene: how far the logarithms of all these vary, each in its measure
    angle: float = 30  # largest, degrees off vertical
    near: float = 0.0  # share of the variance in nearer drops, twice as long and wide
    veil: float = 0.0  # largest mean of the mist in heavy rain


STYLES = {
    "did-mdn": Style(15.5, 1.55, 1.35, (0.25, 0.132, 0.045), (0.46, 0.54, 0.87)),
    "sparse": Style(16, 1.5, 0.012, (0.07, 0.045, 0.025), (1.5, 1.7, 1.9), 0.35, angle=45, near=0.2),
    "long": Style(38, 1.7, 0.06, (0.14, 0.08, 0.04), (0.9, 1.0, 1.2), 0.3, angle=45, near=0.3),
    "wide": Style(18, 2.6, 0.08, (0.18, 0.11, 0.05), (0.9, 1.0, 1.2), 0.3, angle=45, near=0.2),
    "veiled": Style(22, 1.7, 0.2, (0.12, 0.08, 0.04), (0.7, 0.8, 1.0), 0.3, angle=45, near=0.3, veil=0.3),
}
MIXED = {"did-mdn": 0.5, "sparse": 0.15, "long": 0.15, "wide": 0.1, "veiled": 0.1}  # shares of "mixed"


class Rain(NamedTuple):
    """The rain of one scene, drawn from a style: what its densities share, and by level what they do not."""

    angle: float  # degrees off vertical; positive leans like a backslash
    length: float
    width: float
    density: float
    mean: dict[str, float]
    contrast: dict[str, float]
    near: float
    veil: dict[str, float]


def draw_rain(rng: np.random.Generator, style: str = "did-mdn", angle: float | None = None) -> Rain:
    """Draw the rain of one scene: `style` is a key of `STYLES` or "mixed". Raises ValueError on another.

    `angle`: the largest, degrees off vertical, in place of the style's; all else is drawn as without it.
    """
    if style == "mixed":
        style = str(rng.choice(list(MIXED), p=list(MIXED.values())))
    if style not in STYLES:
        raise ValueError(f"no style {style!r}; choose one of {', '.join([*STYLES, 'mixed'])}")
    mid = STYLES[style]
    angle = mid.angle if angle is None else angle

    def vary(deviation: float) -> float:  # bounded, so that no scene falls out of its style
        return float(np.exp(deviation * np.clip(rng.normal(), -2, 2)))

    def by_level(values: tuple, common: float, own: tuple) -> dict[str, float]:
        return {level: v * common * vary(d) for level, v, d in zip(DENSITIES, values, own, strict=True)}

    # Nearer drops are longer, wider and fewer, and where it rains more it does so in all three densities.
    nearness, strength, contrast = vary(0.7 * mid.spread), vary(0.5 * mid.spread), vary(0.6 * mid.spread)
    veil = mid.veil * rng.random()
    return Rain(
        angle=rng.uniform(-angle, angle),
        length=mid.length * nearness * vary(mid.spread),
        width=mid.width * nearness**0.5 * vary(0.6 * mid.spread),
        density=mid.density / nearness * vary(2.5 * mid.spread),
        mean=by_level(mid.mean, strength, own=(0.08, 0.08, 0.18)),  # too little for levels to change places
        contrast=by_level(mid.contrast, contrast, own=(0.06, 0.06, 0.06)),
        near=mid.near,
        veil={"Heavy": veil, "Medium": 0.6 * veil, "Light": 0.3 * veil},
    )


def rain_layer(
    height: int, width: int, level: str, rng: np.random.Generator, style: str | Rain = "did-mdn"
) -> np.ndarray:
    """The rain layer a: HxW float32 in [0, 1], of `level` "Heavy", "Medium" or "Light".

    `style` is a name, or the `Rain` of a scene whose densities are to go together.
    """
    if level not in DENSITIES:
        raise ValueError(f"no level {level!r}; choose one of {', '.join(DENSITIES)}")
    rain = style if isinstance(style, Rain) else draw_rain(rng, style)
    streaks = _streaks(height, width, rain.length, rain.width, rain.density, rain.angle, rng)
    if rain.near:
        angle = rain.angle + rng.normal(0, 1.5)
        nearer = _streaks(height, width, 2 * rain.length, 2 * rain.width, rain.density / 6, angle, rng)
        streaks = np.sqrt(1 - rain.near) * streaks + np.sqrt(rain.near) * nearer
    layer = np.clip(rain.mean[level] * (1 + rain.contrast[level] * streaks), 0, 1)
    if rain.veil[level]:
        mist = cv2.resize(rng.random((4, 4), np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
        layer = 1 - (1 - layer) * (1 - rain.veil[level] * np.clip(0.5 + mist, 0, 2))
    return np.clip(layer, 0, 1).astype(np.float32)


def _streaks(height, width, length, thickness, density, angle, rng) -> np.ndarray:
    """Smeared noise of mean 0 and deviation 1, HxW float32."""
    kernel = _kernel(length, thickness, angle)
    margin = len(kernel) // 2
    # Of small shape, gamma noise is separate drops of all brightnesses; of large shape, nearly Gaussian.
    drops = rng.standard_gamma(density, (height + 2 * margin, width + 2 * margin), np.float32)
    field = cv2.filter2D(drops, -1, kernel)[margin : margin + height, margin : margin + width]
    return (field - density) / np.float32(np.sqrt(density * np.sum(kernel**2)))


def _kernel(length, thickness, angle) -> np.ndarray:
    """One streak, of sum 1: a line with soft ends, and across it the cubic kernel found in DID-MDN."""
    margin = int(np.ceil(length / 2 + 2 * thickness)) + 1
    y, x = np.mgrid[-margin : margin + 1, -margin : margin + 1]
    sin, cos = np.sin(np.deg2rad(angle)), np.cos(np.deg2rad(angle))
    along, across = np.abs(x * sin + y * cos), np.abs(x * cos - y * sin) / thickness
    a = -0.68
    inner = (a + 2) * across**3 - (a + 3) * across**2 + 1
    outer = a * (across**3 - 5 * across**2 + 8 * across - 4)
    profile = np.where(across < 1, inner, np.where(across < 2, outer, 0))
    kernel = profile * np.clip((length / 2 - along) / 1.7 + 0.5, 0, 1)
    return (kernel / kernel.sum()).astype(np.float32)


def blend(clean: np.ndarray, layer: np.ndarray) -> np.ndarray:
    """O = B + a (1 - B): `clean` HxWx3 uint8 RGB and `layer` HxW in [0, 1] to HxWx3 uint8, rounded."""
    a = layer[..., None]
    return np.rint(clean + a * (255 - clean.astype(np.float32))).astype(np.uint8)


# --- rain of real pairs -------------------------------------------------------------------------------------


class Borrowed(NamedTuple):
    """The rain of one pair: O = B + offset(B) + spread(B) * streaks, for each colour channel by itself."""

    offset: np.ndarray  # at `TONES`: by how much the rain changes a value, in the median
    spread: np.ndarray  # at `TONES`: half of what lies between the 16th and the 84th percentile, at least 2
    streaks: np.ndarray  # HxW float32, grey


TONES = np.arange(8, 256, 16)  # middles of 16 equal ranges of values
TONES_NEEDED = 12  # ranges that a pair's background must fill
FILLED = 300  # values in a range, to count as filled


def borrow(rainy: np.ndarray, clean: np.ndarray) -> Borrowed | None:
    """Measure the rain of a pair, two HxWx3 uint8 RGB arrays; None if its background has too few tones."""
    change, ranges = rainy.astype(np.float32) - clean, clean // 16
    filled = [k for k in range(16) if np.count_nonzero(ranges == k) >= FILLED]
    if len(filled) < TONES_NEEDED:
        return None
    low, median, high = np.array([np.percentile(change[ranges == k], (16, 50, 84)) for k in filled]).T
    offset = np.interp(TONES, TONES[filled], median)
    spread = np.interp(TONES, TONES[filled], np.maximum((high - low) / 2, 2))
    streaks = change - at(clean, offset)
    streaks = streaks.sum(-1) / at(clean, spread).sum(-1)
    return Borrowed(offset, spread, streaks.astype(np.float32))


def lay(clean: np.ndarray, rain: Borrowed) -> np.ndarray:
    """`clean` HxWx3 uint8 RGB, of the size of the streaks, under borrowed rain: the same shape and type."""
    offset, spread = at(clean, rain.offset), at(clean, rain.spread)
    return np.rint(np.clip(clean + offset + spread * rain.streaks[..., None], 0, 255)).astype(np.uint8)


def at(clean: np.ndarray, values: np.ndarray) -> np.ndarray:
    """What `values` at `TONES` are at each entry of a uint8 array, linear between: of its shape, float64."""
    return np.interp(np.arange(256), TONES, values)[clean]


def borrow_scene(
    clean: np.ndarray, rng: np.random.Generator, rains: Iterable[Borrowed]
) -> dict[str, np.ndarray]:
    """`clean` (HxWx3 uint8 RGB) under the first three rains, by level: heavy is what changes it most."""
    rainy = []
    for rain in islice(rains, len(DENSITIES)):
        # From a place drawn at random on; where the background is larger the streaks begin again.
        sides = zip(clean.shape, rain.streaks.shape, strict=False)
        window = np.ix_(*((rng.integers(lent) + np.arange(side)) % lent for side, lent in sides))
        rainy.append(lay(clean, rain._replace(streaks=rain.streaks[window])))
    rainy.sort(key=lambda image: -np.abs(image.astype(np.float32) - clean).mean())
    return dict(zip(DENSITIES, rainy, strict=True))


def borrow_in_turn(
    pairs: Sequence[Path], clean_side: str, rng: np.random.Generator, failures: list[str]
) -> Iterator[Borrowed]:
    """Yield the rain of side by side pairs in random order, leaving out pairs with too few tones.

    A line is appended to `failures` for a file that cannot be read. Raises UserError when no pair is left.
    """
    for i in rng.permutation(len(pairs)):
        try:
            image = read_image(pairs[i])
        except UserError as error:
            failures.append(str(error))
            continue
        rain = borrow(_half(image, OTHER_SIDE[clean_side]), _half(image, clean_side))
        if rain is not None:
            yield rain
    raise UserError(
        f"--rain_of {pairs[0].parent}: too few of {len(pairs)} pairs have a clean half with "
        f"{TONES_NEEDED} of 16 ranges of values; {len(DENSITIES)} such pairs are needed"
    )


# --- scenes -------------------------------------------------------------------------------------------------


def make_scene(
    clean: np.ndarray, seed: int | np.random.Generator, style: str = "did-mdn", angle: float | None = None
) -> dict[str, np.ndarray]:
    """The rainy versions of `clean` (HxWx3 uint8 RGB) by level, of the same shape and type.

    They share direction, length and width of the streaks; the streaks themselves are each level's own.
    `style` and `angle` as `draw_rain` has them.
    """
    rng = np.random.default_rng(seed)
    rain = draw_rain(rng, style, angle)
    return {level: blend(clean, rain_layer(*clean.shape[:2], level, rng, rain)) for level in DENSITIES}


def write_scenes(
    photographs: Iterable[str | Path],
    out: str | Path,
    seed: int = 0,
    style: str = "did-mdn",
    scenes: int | None = None,
    test: int = 0,
    size: int | None = None,
    clean_side: str | None = None,
    rain_of: str | Path | None = None,
    rain_side: str | None = None,
    angle: float | None = None,
    workers: int = 0,
) -> list[str]:
    """Write scenes over clean photographs in DID-MDN's layout, in each file rain left and clean right:

        OUT/DID-MDN-training/Rain_{Heavy,Medium,Light}/train2018new/NAME.jpg, OUT/DID-MDN-test/LEVEL_NAME.jpg

    NAME is the photograph's stem, after its folder's name where another has that stem; the rain depends on
    NAME and the seed alone, and on the pairs of `rain_of`. A photograph makes one scene, since in this layout
    a split by background goes by name: for more rain over the same photographs, write another folder with
    another seed.

    Args:
        scenes: number of training scenes, over photographs picked at random; default: over all.
        test: number of photographs, picked at random, that go to the test part instead, in all densities.
        size: crop the middle square and scale it to this side, in pixels (512 in DID-MDN); default: keep the
            photographs' own size. Either way, widths are cut to multiples of 16.
        clean_side: "left" or "right": the photographs are side by side files and this is the clean half.
        rain_of: a folder of side by side pairs, whose rain is moved here in place of a `style`: each version
            of a scene gets that of another pair.
        rain_side: "left" or "right": the clean half of those pairs.
        angle: largest lean of the streaks, 0 to 90 degrees off vertical; default: the style's.
        workers: number of processes, which does not change the scenes; 0: all are made in this one.

    Returns:
        one line for each photograph or pair that could not be read, or written; the others are done.

    Raises:
        UserError: `out` already holds such a set or cannot be written, there are too few photographs or
            pairs, the pairs of `rain_of` are not side by side, or `angle` is given with it.
    """
    out = Path(out)
    for part in (TRAINING, TEST):
        if (out / part).exists():
            raise UserError(f"{out}: already holds {part}; give another folder, or remove that one")
    if (rain_of is None) != (rain_side is None):
        raise UserError(
            "--rain_of, --rain_side: give both or neither; the side is that of the pairs' clean half"
        )
    if rain_of is not None and angle is not None:
        raise UserError("--angle, --rain_of: rain moved from pairs keeps its angle; give one of the two")
    named = list(_name(photographs).items())
    wanted = test + (scenes or 1)
    if len(named) < wanted:
        raise UserError(
            f"{len(named)} photographs found, but {wanted} are needed, {test} of them for the test part"
        )
    picked = [named[i] for i in np.random.default_rng(seed).permutation(len(named))]
    picked = picked[: test + scenes if scenes else None]
    if rain_of is None:
        rain = partial(_drawn, style=style, angle=angle)
    else:
        pairs, _ = _side_by_side(rain_of, rain_side)
        rain = partial(_moved, pairs=pairs, clean_side=rain_side)
    making = _Making(picked, test, out, seed, partial(_prepare, size=size, clean_side=clean_side), rain)
    loader = DataLoader(
        making,
        sampler=range(len(picked)),
        batch_size=None,
        num_workers=min(workers, len(picked)),
        worker_init_fn=start_worker,
    )
    failures = []
    for lines, error in tqdm(loader, unit="scene", disable=None):
        for line in lines:
            if line not in failures:
                failures.append(line)
                tqdm.write(line, file=sys.stderr)
        if error:
            raise UserError(error)
    return failures


@dataclass(frozen=True)
class _Making(Dataset):
    """Asked by a DataLoader for item i, writes scene number i; returns (lines on what could not be read, the
    text of a UserError that ends it all, or None).
    """

    photographs: list[tuple[str, Path]]  # the first `test` of them to test on
    test: int
    out: Path
    seed: int
    prepare: Callable
    rain: Callable

    def __getitem__(self, i):
        name, path = self.photographs[i]
        try:
            image = self.prepare(read_image(path), path)
        except UserError as error:
            return [str(error)], None
        failures = []
        try:
            scene = self.rain(image, _own_rng(self.seed, name), failures)
        except UserError as error:
            return failures, str(error)
        try:
            _write_scene(scene, image, self.out, name, is_test=i < self.test)
        except CannotWrite as error:
            return failures, str(error)
        except UserError as error:  # its name is too long, or a side of it for JPEG
            failures.append(f"{path}: left out: {error}")
        return failures, None


def _drawn(clean, rng, failures, style, angle):
    return make_scene(clean, rng, style, angle)


def _moved(clean, rng, failures, pairs, clean_side):
    return borrow_scene(clean, rng, borrow_in_turn(pairs, clean_side, rng, failures))


def _own_rng(seed, name):
    # Seeded by the name, not drawn from one stream: a scene is the same whatever else is in the folder.
    return np.random.default_rng([seed, zlib.crc32(name.encode(errors="surrogateescape"))])


def _write_scene(scene, clean, out, name, is_test=False) -> None:
    written = []
    try:
        for level, rainy in scene.items():
            if is_test:
                path = out / TEST / f"{level.lower()}_{name}.jpg"
            else:
                path = out / TRAINING / f"Rain_{level}" / "train2018new" / f"{name}.jpg"
            write_image(path, np.hstack([rainy, clean]), JPEG_QUALITY)
            written.append(path)
    except UserError:
        for path in written:  # a scene is whole or not there
            with suppress(OSError):
                path.unlink()
        raise


def _name(paths: Iterable[str | Path]) -> dict[str, Path]:
    named, taken = {}, set()
    for path in map(Path, paths):
        name, k = path.stem, 1
        while name.casefold() in taken:  # to some file systems, A.jpg and a.jpg are one file
            name = f"{path.parent.name}_{path.stem}" + (f"_{k}" if k > 1 else "")
            k += 1
        taken.add(name.casefold())
        named[name] = path
    return named


def _half(image, side) -> np.ndarray:
    """Of an odd width the middle column is in neither."""
    width = image.shape[1] // 2
    return image[:, :width] if side == "left" else image[:, -width:]


def _prepare(image, path, size=None, clean_side=None) -> np.ndarray:
    if clean_side:
        image = _half(image, clean_side)
    if min(image.shape[:2]) < 16:
        raise UserError(f"{path}: is {image.shape[1]}x{image.shape[0]} pixels; at least 16x16 are needed")
    if size:
        side = min(image.shape[:2])
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        square = image[top : top + side, left : left + side]
        image = cv2.resize(
            square, (size, size), interpolation=cv2.INTER_AREA if size < side else cv2.INTER_CUBIC
        )
    # JPEG codes blocks of 16 columns: were one shared by both halves, rain would leak into the clean one. It
    # still does into the first column, as in DID-MDN's: by up to 9 levels of colour, which decoders smooth.
    return image[:, : image.shape[1] // 16 * 16]


# In scikit-image's wheel.
_DEMO_TRAINING = ("astronaut.png", "motorcycle_left.png", "rocket.jpg", "camera.png")
_DEMO_TRAINING += ("brick.png", "grass.png", "gravel.png")
_DEMO_TEST = ("chelsea.png", "coffee.png")
_DEMO_VERSION = "demo set 1\n"  # to be counted up with any change of what demo_set writes
_DEMO_UNFINISHED = f"unfinished {_DEMO_VERSION}"


def demo_set(folder: str | Path) -> Path:
    """Make a small set in DID-MDN's layout from photographs that scikit-image carries: no download, a second.

    14 training scenes of 320x240 pixels: PHOTO_1 and PHOTO_2 are crops of one photograph that share no pixel,
    so each can pass for a background of its own. 6 test pairs, LEVEL_PHOTO.jpg, over two other photographs. A
    set that an earlier call finished is used again, an unfinished one is made anew.

    Returns:
        `folder` as a Path.

    Raises:
        UserError: the folder holds a set of other making, or cannot be written.
    """
    folder = Path(folder)
    marker = folder / "demo-set.txt"
    parts = [folder / TRAINING, folder / TEST]
    data = Path(skimage.__file__).parent / "data"
    try:
        if marker.is_file():
            made = marker.read_text()
            if made == _DEMO_VERSION and all(part.is_dir() for part in parts):
                return folder
            # An unfinished set may be another process's at work: each file is replaced by an equal one.
            if made != _DEMO_UNFINISHED:
                for part in parts:
                    shutil.rmtree(part, ignore_errors=True)
        elif any(part.exists() for part in parts):
            raise UserError(f"{folder}: holds a data set other than the demo set; move it elsewhere")
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(marker, _DEMO_UNFINISHED.encode())
        for file in _DEMO_TRAINING:
            photograph = read_image(data / file)
            for k, crop in enumerate((photograph[:240, :320], photograph[-240:, -320:]), 1):
                name = f"{Path(file).stem.removesuffix('_left')}_{k}"
                _write_scene(make_scene(crop, _own_rng(0, name)), crop, folder, name)
        for file in _DEMO_TEST:
            name, image = Path(file).stem, _prepare(read_image(data / file), file)
            _write_scene(make_scene(image, _own_rng(0, name)), image, folder, name, is_test=True)
        write_bytes(marker, _DEMO_VERSION.encode())
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return folder


def find_photographs(folders: Iterable[str | Path]) -> list[Path]:
    """The image files of some folders, without those in folders below. Raises UserError naming the folder
    that is missing or has none.
    """
    found = []
    for folder in folders:
        images = list_images(folder)
        if not images:
            below = list_images(folder, recursive=True)
            raise only_below(folder, below) if below else UserError(f"{folder}: holds no image files")
        found += images
    return found


def _side_by_side(folder: str | Path, clean_side: str) -> tuple[list[Path], str]:
    """(the pairs' files, what seems wrong with their clean side, or ""). UserError where they are no pairs,
    or pairs of two files.
    """
    found = find(folder, clean_side)
    if any(scene.clean and not scene.clean.side for scene in found.scenes):
        raise UserError(
            f"--rain_of {folder}: holds {found.layout}; side by side pairs in one folder are needed"
        )
    pairs = find_photographs([folder])
    hint = check.pair_hint(found.scenes, "--rain_side")
    if hint.startswith(check.OTHER_PICTURE):
        raise UserError(f"--rain_of {folder}: not side by side pairs: {hint}")
    return pairs, hint


def _hints(args) -> Iterator[str]:
    """What seems to be wrong with the photographs and pairs that are given, a line each."""
    for folder in map(Path, args.clean_dirs):
        photographs = flat(folder, list_images(folder), args.clean_side).scenes
        if hint := check.pair_hint(photographs) if args.clean_side else check.single_hint(photographs):
            yield f"{folder}: {hint}"
        if below := len(list_images(folder, recursive=True)) - len(photographs):
            hint = "to use them, give those folders, too"
            yield f"{folder}: {below:,} pictures in folders below it are left out; {hint}"
    if args.rain_of and args.rain_side and args.angle is None:  # else it is an error
        _, hint = _side_by_side(args.rain_of, args.rain_side)
        if hint:
            yield f"{args.rain_of}: {hint}"


def get_args_parser():
    parser = command.Parser(
        prog="python -m support.rain", description="Make rainy scenes in DID-MDN's layout."
    )
    parser.add_argument("clean_dirs", nargs="+", help="folders of clean photographs")
    parser.add_argument("out_dir", help="folder to make DID-MDN-training and DID-MDN-test in")
    parser.add_argument(
        "--seed", type=command.seed, default=0, help="seed of all that is drawn (default: %(default)s)"
    )
    rain = parser.add_mutually_exclusive_group()
    rain.add_argument(
        "--style", choices=[*STYLES, "mixed"], default="did-mdn", help="kind of rain (default: %(default)s)"
    )
    rain.add_argument(
        "--rain_of",
        metavar="PAIRS",
        help="in place of a style: move the rain of the side by side pairs in this folder",
    )
    parser.add_argument("--rain_side", choices=SIDES, help="the clean half of the pairs of --rain_of")
    parser.add_argument(
        "--angle",
        type=command.angle,
        metavar="DEGREES",
        help="largest lean of the streaks, off vertical (default: the style's, 30 or 45)",
    )
    parser.add_argument("--scenes", type=command.positive, help="training scenes (default: one a photograph)")
    parser.add_argument(
        "--test",
        type=command.natural,
        default=0,
        help="photographs to keep for the test part (default: none)",
    )
    parser.add_argument(
        "--size",
        type=command.side,
        help="scale the middle square to this side in pixels, up or down (default: keep the size)",
    )
    parser.add_argument(
        "--clean_side", choices=SIDES, help="the photographs are this half of side by side files"
    )
    parser.add_argument(
        "--workers",
        type=command.workers,
        default=os.cpu_count() or 1,
        help="processes; 0: all in the main one (default: one a core)",
    )
    return parser


def main(args) -> int:
    """Returns the exit status: 0, or 1 if some photographs could not be used. Raises UserError."""
    options = {k: v for k, v in vars(args).items() if k not in ("clean_dirs", "out_dir", "given")}
    photographs = find_photographs(args.clean_dirs)
    if os.path.realpath(args.out_dir) in map(os.path.realpath, args.clean_dirs):
        raise UserError(f"{args.out_dir}: is the folder of the photographs; give another one for the scenes")
    for hint in _hints(args):
        print(hint, file=sys.stderr)
    failures = write_scenes(photographs, args.out_dir, **options)
    if any((Path(args.out_dir) / part).exists() for part in (TRAINING, TEST)):
        look = shlex.join(["python", "dataset.py", args.out_dir])
        print(f"scenes are in {args.out_dir}; to check them: {look}")
    return 1 if failures else 0


if __name__ == "__main__":
    command.run(main, get_args_parser())
