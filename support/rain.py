"""Synthetic rain like DID-MDN's: scenes of one clean background in three densities, in that data set's layout.

    python -m support.rain photos/ datasets/synthetic                       one scene a photograph
    python -m support.rain photos/ more/ datasets/synthetic --style mixed --scenes 4000 --test 100
    python -m support.rain rain800/training datasets/synthetic --clean_side left

Rain brightens: O = B + a (1 - B), a screen blend of the clean image B with a grey layer a in [0, 1]. DID-MDN's
layers turn out to be noise smeared along one direction, then scaled: on its samples the autocorrelation of a falls
linearly to zero at 15 to 16 pixels along the streaks, and across them it is that of a cubic kernel 1.55 pixels wide.
The densities of a scene share the direction, not the streaks, and differ in mean and contrast of a. The numbers in
`STYLES["did-mdn"]` are fitted to the nine samples through the same JPEG coding; each scene draws its own around them.
"""

import argparse
import shutil
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import skimage
from tqdm import tqdm

from support.errors import UserError
from support.images import list_images, read_image, write_image

LEVELS = ("Heavy", "Medium", "Light")
JPEG_QUALITY = 75  # of DID-MDN's files, by their quantisation tables
DEMO_VERSION = "demo set 1\n"


class Style(NamedTuple):
    """What rain of one kind looks like on average. Means and contrasts are those of heavy, medium, light."""

    length: float  # of a streak, pixels
    width: float  # of a streak, pixels
    density: float  # streaks a pixel: well above 1/(length*width) they merge, well below each stands alone
    mean: tuple[float, float, float]  # of the layer a
    contrast: tuple[float, float, float]  # standard deviation of a over its mean, before clipping at 0
    spread: float = 0.2  # from scene to scene: deviation of the logarithms of all these, times a factor each
    angle: float = 30  # largest, degrees off vertical
    near: float = 0.0  # share of the variance in nearer drops, twice as long and wide
    veil: float = 0.0  # largest mean of the mist in heavy rain


STYLES = {
    "did-mdn": Style(15.5, 1.55, 1.35, (0.25, 0.132, 0.045), (0.46, 0.54, 0.87)),
    "sparse": Style(16, 1.5, 0.012, (0.07, 0.045, 0.025), (1.5, 1.7, 1.9), spread=0.35, angle=45, near=0.2),
    "long": Style(38, 1.7, 0.06, (0.14, 0.08, 0.04), (0.9, 1.0, 1.2), spread=0.3, angle=45, near=0.3),
    "wide": Style(18, 2.6, 0.08, (0.18, 0.11, 0.05), (0.9, 1.0, 1.2), spread=0.3, angle=45, near=0.2),
    "veiled": Style(
        22, 1.7, 0.2, (0.12, 0.08, 0.04), (0.7, 0.8, 1.0), spread=0.3, angle=45, near=0.3, veil=0.3
    ),
}
MIXED = {
    "did-mdn": 0.5,
    "sparse": 0.15,
    "long": 0.15,
    "wide": 0.1,
    "veiled": 0.1,
}  # shares of the style "mixed"


class Rain(NamedTuple):
    """The rain of one scene, drawn from a style: what its three densities share, and the levels' own numbers."""

    angle: float  # degrees off vertical; positive leans like a backslash
    length: float
    width: float
    density: float
    mean: dict[str, float]  # by level
    contrast: dict[str, float]
    near: float
    veil: dict[str, float]


def draw_rain(rng: np.random.Generator, style: str = "did-mdn") -> Rain:
    """Draw the rain of one scene: `style` is a key of `STYLES` or "mixed". Raises ValueError on another."""
    if style == "mixed":
        style = str(rng.choice(list(MIXED), p=list(MIXED.values())))
    if style not in STYLES:
        raise ValueError(f"no style {style!r}; choose one of {', '.join([*STYLES, 'mixed'])}")
    mid = STYLES[style]

    def vary(deviation: float) -> float:  # bounded, so that no scene falls out of its style
        return float(np.exp(deviation * np.clip(rng.normal(), -2, 2)))

    def by_level(values: tuple, common: float, own: tuple) -> dict[str, float]:
        return {level: v * common * vary(d) for level, v, d in zip(LEVELS, values, own, strict=True)}

    # Nearer drops are longer, wider and fewer, and where it rains more it does so in all three densities.
    near, strength, contrast = vary(0.7 * mid.spread), vary(0.5 * mid.spread), vary(0.6 * mid.spread)
    veil = mid.veil * rng.random()
    return Rain(
        angle=rng.uniform(-mid.angle, mid.angle),
        length=mid.length * near * vary(mid.spread),
        width=mid.width * near**0.5 * vary(0.6 * mid.spread),
        density=mid.density / near * vary(2.5 * mid.spread),
        mean=by_level(mid.mean, strength, own=(0.08, 0.08, 0.18)),  # never so far that levels change places
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
    if level not in LEVELS:
        raise ValueError(f"no level {level!r}; choose one of {', '.join(LEVELS)}")
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
    """Smeared noise of mean 0 and deviation 1, HxW float32.

    Gamma noise of shape `density` goes from separate drops of all brightnesses (small) to a Gaussian field (large).
    """
    kernel = _kernel(length, thickness, angle)
    margin = len(kernel) // 2
    drops = rng.standard_gamma(density, (height + 2 * margin, width + 2 * margin), np.float32)
    field = cv2.filter2D(drops, -1, kernel)[margin : margin + height, margin : margin + width]
    return (field - density) / np.float32(np.sqrt(density * np.sum(kernel**2)))


def _kernel(length, thickness, angle) -> np.ndarray:
    """One streak, of sum 1: a line with soft ends, and across it the cubic kernel found in DID-MDN (a = -0.68)."""
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


def make_scene(
    clean: np.ndarray, seed: int | np.random.Generator, style: str = "did-mdn"
) -> dict[str, np.ndarray]:
    """The rainy versions of `clean` (HxWx3 uint8 RGB) by level, of the same shape and type.

    They share direction, length and width of the streaks; the streaks themselves are each level's own.
    """
    rng = np.random.default_rng(seed)
    rain = draw_rain(rng, style)
    return {level: blend(clean, rain_layer(*clean.shape[:2], level, rng, rain)) for level in LEVELS}


def write_scenes(
    clean: Iterable[Path],
    out: str | Path,
    seed: int = 0,
    style: str = "did-mdn",
    scenes: int | None = None,
    size: int | None = None,
    clean_side: str | None = None,
    test: int = 0,
    quality: int = JPEG_QUALITY,
) -> list[str]:
    """Write scenes over the photographs `clean` in DID-MDN's layout, rain left and clean right in each file:

        OUT/DID-MDN-training/Rain_{Heavy,Medium,Light}/train2018new/NAME.jpg, OUT/DID-MDN-test/LEVEL_NAME.jpg

    NAME is the photograph's stem (with its folder's name where two share one); the scene depends on it and on the
    seed alone. Photographs keep their size, less up to 15 columns (see `_prepare`).

    Args:
        scenes: training scenes: fewer are picked at random; more go over the photographs again as NAME_2, NAME_3.
        size: scale and crop the photographs to squares of this side, in pixels; 512 in DID-MDN.
        clean_side: "left" or "right": the photographs are side by side files, and this half is the clean one.
        test: so many photographs, picked at random, make the test part instead, in all densities.

    Returns:
        one line for each photograph that could not be read; the others are done.

    Raises:
        UserError: `out` already holds such a set, cannot be written, or there are too few photographs.
    """
    out = Path(out)
    for part in ("DID-MDN-training", "DID-MDN-test"):
        if (out / part).exists():
            raise UserError(f"{out}: already holds {part}; give another folder, or remove that one")
    named = _name(clean)
    if len(named) <= test:
        raise UserError(
            f"{len(named)} photographs, {test} of them for the test part: none is left for training"
        )
    order = [list(named)[i] for i in np.random.default_rng(seed).permutation(len(named))]
    jobs = [(name, name, True) for name in order[:test]]
    taken = {name.casefold() for name in order}
    for i in range(scenes or len(order) - test):
        turn, k = divmod(i, len(order) - test)
        name = order[test + k]
        jobs.append((name, _unique(f"{name}_{turn + 1}", taken) if turn else name, False))

    failures = {}
    for photograph, name, is_test in tqdm(jobs, unit="scene", disable=None):
        path = named[photograph]
        if path in failures:
            continue
        try:
            image = _prepare(read_image(path), path, size, clean_side)
        except UserError as error:
            failures[path] = str(error)
            tqdm.write(str(error), file=sys.stderr)
        else:
            _write_scene(image, out, name, seed, style, is_test, quality)
    return list(failures.values())


def _write_scene(image, out, name, seed, style="did-mdn", is_test=False, quality=JPEG_QUALITY) -> None:
    # Seeded by the name, not drawn from one stream: a scene is the same whatever else is in the folder.
    for level, rainy in make_scene(image, [seed, zlib.crc32(name.encode())], style).items():
        if is_test:
            path = out / "DID-MDN-test" / f"{level.lower()}_{name}.jpg"
        else:
            path = out / "DID-MDN-training" / f"Rain_{level}" / "train2018new" / f"{name}.jpg"
        write_image(path, np.hstack([rainy, image]), quality)


def _name(paths: Iterable[Path]) -> dict[str, Path]:
    named, taken = {}, set()
    for path in map(Path, paths):
        known = path.stem.casefold() in taken
        named[_unique(f"{path.parent.name}_{path.stem}" if known else path.stem, taken)] = path
    return named


def _unique(name: str, taken: set[str]) -> str:
    base, k = name, 2
    while name.casefold() in taken:  # to some file systems, A.jpg and a.jpg are one file
        name, k = f"{base}_{k}", k + 1
    taken.add(name.casefold())
    return name


def _prepare(image, path, size=None, clean_side=None) -> np.ndarray:
    if clean_side:
        half = image.shape[1] // 2
        image = image[:, :half] if clean_side == "left" else image[:, -half:]
    if min(image.shape[:2]) < 16:
        raise UserError(f"{path}: is {image.shape[1]}x{image.shape[0]} pixels; at least 16x16 are needed")
    if size:
        height, width = image.shape[:2]
        scale = size / min(height, width)
        shape = max(size, round(width * scale)), max(size, round(height * scale))
        image = cv2.resize(image, shape, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
        top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
        return image[top : top + size, left : left + size]
    # JPEG codes blocks of 16 columns: were one shared by both halves, rain would leak into the clean one.
    return image[:, : image.shape[1] // 16 * 16]


# The photographs in scikit-image's wheel: name, file, number of crops. Nine backgrounds, two of them to test on.
_DEMO_TRAINING = (
    ("astronaut", "astronaut.png", 2),
    ("motorcycle", "motorcycle_left.png", 3),
    ("rocket", "rocket.jpg", 2),
    ("camera", "camera.png", 2),
    ("brick", "brick.png", 1),
    ("grass", "grass.png", 1),
    ("gravel", "gravel.png", 1),
)
_DEMO_TEST = (("chelsea", "chelsea.png"), ("coffee", "coffee.png"))


def demo_set(folder: str | Path) -> Path:
    """Make a small set in DID-MDN's layout from the photographs that scikit-image carries; nothing is downloaded.

    Twelve training scenes of 384x256 pixels, and six test pairs over other photographs, LEVEL_PHOTO.jpg. Training
    scenes are named PHOTO_k: the crops k = 1, 2, .. of one photograph are one background to a split. Takes a
    second; a set that an earlier call finished is used again, and an unfinished one is made anew.

    Returns:
        `folder` as a Path.

    Raises:
        UserError: the folder holds a set of other making, or cannot be written.
    """
    folder = Path(folder)
    marker = folder / "demo-set.txt"
    parts = [folder / "DID-MDN-training", folder / "DID-MDN-test"]
    try:
        if marker.is_file():
            if marker.read_text() == DEMO_VERSION and all(part.is_dir() for part in parts):
                return folder
            for part in parts:
                shutil.rmtree(part, ignore_errors=True)
        elif any(part.exists() for part in parts):
            raise UserError(f"{folder}: holds a data set that is not the demo set; give another folder")
        folder.mkdir(parents=True, exist_ok=True)
        marker.write_text("unfinished\n")
        data = Path(skimage.__file__).parent / "data"
        for name, file, crops in _DEMO_TRAINING:
            photograph = read_image(data / file)
            for k in range(crops):
                _write_scene(_crop(photograph, k / max(1, crops - 1)), folder, f"{name}_{k + 1}", seed=0)
        for name, file in _DEMO_TEST:
            image = _prepare(read_image(data / file), file)
            _write_scene(image, folder, name, seed=0, is_test=True)
        marker.write_text(DEMO_VERSION)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return folder


def _crop(image: np.ndarray, position: float, height: int = 256, width: int = 384) -> np.ndarray:
    top, left = (round(position * (a - b)) for a, b in zip(image.shape[:2], (height, width), strict=True))
    return image[top : top + height, left : left + width]


def find_photographs(folders: Iterable[str | Path]) -> list[Path]:
    """The image files of some folders. Raises UserError naming the folder that is missing or has none."""
    found = []
    for folder in folders:
        images = list_images(folder)
        if not images:
            raise UserError(f"{folder}: holds no image files")
        found += images
    return found


def _at_least(least):
    def number(text):
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"is {value}; at least {least} is expected")
        return value

    return number


def get_args_parser():
    parser = argparse.ArgumentParser(
        "support.rain", description="Make rainy scenes in DID-MDN's manner and layout."
    )
    parser.add_argument("clean_dirs", nargs="+", help="folders of clean photographs")
    parser.add_argument("out_dir", help="folder to make DID-MDN-training (and DID-MDN-test) in")
    parser.add_argument("--seed", type=_at_least(0), default=0)
    parser.add_argument("--style", choices=[*STYLES, "mixed"], default="did-mdn")
    parser.add_argument("--scenes", type=_at_least(1), help="training scenes; default: one a photograph")
    parser.add_argument(
        "--size", type=_at_least(16), help="scale and crop to squares; default: keep the size"
    )
    parser.add_argument(
        "--clean_side", choices=["left", "right"], help="take this half of side by side files"
    )
    parser.add_argument("--test", type=_at_least(0), default=0, help="photographs kept for DID-MDN-test")
    parser.add_argument("--quality", type=_at_least(1), default=JPEG_QUALITY, help="of the JPEG files")
    return parser


def main(args) -> int:
    """Exit status: 0, or 1 where some photographs could not be read."""
    failures = write_scenes(
        find_photographs(args.clean_dirs),
        args.out_dir,
        seed=args.seed,
        style=args.style,
        scenes=args.scenes,
        size=args.size,
        clean_side=args.clean_side,
        test=args.test,
        quality=args.quality,
    )
    if failures:
        print(f"{len(failures)} photographs could not be read", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main(get_args_parser().parse_args()))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
