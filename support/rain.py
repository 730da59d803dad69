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
MAX_ANGLE = 30  # degrees off vertical
DEMO_VERSION = "demo set 1"


class Style(NamedTuple):
    """What rain of one kind looks like on average. Means and contrasts are those of (heavy, medium, light)."""

    length: float  # of a streak, pixels
    width: float  # of a streak, pixels
    density: float  # streaks a pixel: well above 1/(length*width) they merge, well below each stands alone
    mean: tuple[float, float, float]  # of the layer a
    contrast: tuple[float, float, float]  # standard deviation of a over its mean
    spread: float = 0.2  # from scene to scene: deviation of the logarithm of length, width, density, ...
    near: float = 0.0  # share of the variance in nearer drops, twice as long and wide
    veil: float = 0.0  # largest brightness of the mist behind heavy rain


STYLES = {
    "did-mdn": Style(15.5, 1.55, 1.35, mean=(0.25, 0.132, 0.045), contrast=(0.46, 0.54, 0.87)),
    "sparse": Style(14, 1.6, 0.03, mean=(0.10, 0.06, 0.03), contrast=(1.1, 1.4, 1.8), spread=0.3, near=0.2),
    "long": Style(40, 1.7, 0.2, mean=(0.15, 0.08, 0.04), contrast=(0.7, 0.9, 1.1), spread=0.3, near=0.3),
    "wide": Style(18, 2.8, 0.1, mean=(0.20, 0.12, 0.05), contrast=(0.8, 0.9, 1.1), spread=0.3, near=0.2),
    "veiled": Style(
        22, 1.7, 0.3, mean=(0.12, 0.08, 0.04), contrast=(0.6, 0.7, 0.9), spread=0.3, near=0.3, veil=0.3
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

    def vary(scale: float = 1.0) -> float:  # bounded, so that no scene falls out of its style
        return float(np.exp(scale * mid.spread * np.clip(rng.normal(), -2, 2)))

    # Nearer drops are longer, wider and fewer, and where it rains more it does so in all three densities.
    near, strength, contrast = vary(0.7), vary(0.5), vary(0.6)
    return Rain(
        angle=rng.uniform(-MAX_ANGLE, MAX_ANGLE),
        length=mid.length * near * vary(),
        width=mid.width * near**0.5 * vary(0.6),
        density=mid.density / near * vary(2.5),
        mean={level: mean * strength * vary(0.4) for level, mean in zip(LEVELS, mid.mean, strict=True)},
        contrast={level: c * contrast * vary(0.3) for level, c in zip(LEVELS, mid.contrast, strict=True)},
        near=mid.near,
        veil=dict(zip(LEVELS, mid.veil * rng.random() * np.array([1.0, 0.6, 0.3]), strict=True)),
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
            f"{len(named)} photographs, of which {test} for the test part; none is left for training"
        )
    order = [list(named)[i] for i in np.random.default_rng(seed).permutation(len(named))]
    jobs = [(name, name, True) for name in order[:test]]
    for i in range(scenes or len(order) - test):
        turn, k = divmod(i, len(order) - test)
        name = order[test + k]
        jobs.append((name, name if turn == 0 else f"{name}_{turn + 1}", False))

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
            continue
        _write_scene(image, out, name, seed, style, is_test, quality)
    return list(failures.values())


def _write_scene(image, out, name, seed, style, is_test, quality=JPEG_QUALITY):
    # From the name, not from a stream of numbers: a scene stays what it is whatever else is in the folder.
    for level, rainy in make_scene(image, [seed, zlib.crc32(name.encode())], style).items():
        if is_test:
            path = out / "DID-MDN-test" / f"{level.lower()}_{name}.jpg"
        else:
            path = out / "DID-MDN-training" / f"Rain_{level}" / "train2018new" / f"{name}.jpg"
        write_image(path, np.hstack([rainy, image]), quality)


def _name(paths: Iterable[Path]) -> dict[str, Path]:
    named = {}
    for path in paths:
        name = path.stem if path.stem not in named else f"{path.parent.name}_{path.stem}"
        base, k = name, 2
        while name in named:
            name, k = f"{base}-{k}", k + 1
        named[name] = path
    return named


def _prepare(image, path, size, clean_side) -> np.ndarray:
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


# Photographs in scikit-image's wheel and how many crops of each. Seven backgrounds to train on, two others to test on.
DEMO_TRAINING = {"astronaut.png": 2, "motorcycle_left.png": 3, "rocket.jpg": 2, "camera.png": 2, "grass.png": 1,
                 "gravel.png": 1, "brick.png": 1}  # fmt: skip
DEMO_TEST = ("chelsea.png", "coffee.png")


def demo_set(folder: str | Path) -> Path:
    """Make a small set in DID-MDN's layout from the photographs that scikit-image carries; nothing is downloaded.

    Twelve training scenes of 384x256 pixels and six test pairs, LEVEL_PHOTO.jpg, over other photographs. Training
    scenes are named PHOTO_k: the crops k of a photograph are one background, and a split by background keeps them
    together. Takes a second; a set that an earlier call finished is used again. Returns `folder` as a Path.

    Raises:
        UserError: the folder holds another set, or cannot be written, or scikit-image lacks its photographs.
    """
    folder = Path(folder)
    marker = folder / "demo-set.txt"
    data = Path(skimage.__file__).parent / "data"
    if marker.is_file() and marker.read_text() == DEMO_VERSION:
        return folder
    ...
    return folder


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
