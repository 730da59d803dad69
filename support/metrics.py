"""PSNR and SSIM as this project reports them: on 8-bit images as saved, in RGB and on the luma Y."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product

import cv2
import numpy as np
import skimage  # whose metrics, and SciPy with them, the first score loads

# What `score` measures: its heading in tables, and digits after the point.
METRICS = {
    "psnr_rgb": ("PSNR RGB", 2),
    "ssim_rgb": ("SSIM RGB", 4),
    "psnr_y": ("PSNR Y", 2),
    "ssim_y": ("SSIM Y", 4),
}
SSIM_WINDOW = 11  # pixels a side: of the Gaussian window, so of the smallest image that has an SSIM
SSIM_SIGMA = 1.5
SSIM_BLOCK = 48, 512  # rows and columns of SSIM at a time: their dozen maps fit into a core's cache
BLOCK = 16  # pixels a side, of `worst_block`


def score(output: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """PSNR (dB) and SSIM of an image against its ground truth.

    PSNR is over all pixels and channels together, with peak 255. SSIM (Wang et al., TIP 2004, doi
    10.1109/TIP.2003.819861) has an 11x11 Gaussian window of sigma 1.5, population covariance and range 255;
    of RGB it is the mean over the channels. Y is `luma`, measured by the same 255 although it spans less.

    Args:
        output, target: HxWx3 uint8 RGB, of the same shape.

    Returns:
        psnr_rgb, ssim_rgb, psnr_y, ssim_y. PSNR of equal images is infinite; SSIM of an image with a side
        under 11 pixels is NaN.

    Raises:
        ValueError: an array is anything else, or the shapes differ.
    """
    _check(output, target)
    scores = {}
    for name, x, y in (("rgb", output, target), ("y", luma(output), luma(target))):
        scores[f"psnr_{name}"] = psnr(x, y)
        scores[f"ssim_{name}"] = _ssim(x, y)
    return scores


def psnr(x: np.ndarray, y: np.ndarray) -> float:
    """PSNR in dB, peak 255, of two arrays of one shape; infinite where they are equal."""
    with np.errstate(divide="ignore"):
        return float(skimage.metrics.peak_signal_noise_ratio(y, x, data_range=255))


def worst_block(x: np.ndarray, y: np.ndarray) -> float:
    """The largest mean absolute difference of a block of two HxWx3 uint8 arrays, in grey levels."""
    difference = np.abs(x.astype(np.float32) - y).mean(2)
    return float(cv2.blur(difference, (BLOCK, BLOCK), borderType=cv2.BORDER_REFLECT_101).max())


def luma(rgb: np.ndarray) -> np.ndarray:
    """Y of BT.601 in studio range, 16 to 235, unrounded: HxWx3 uint8 RGB to HxW float64."""
    return 16 + rgb @ np.array([65.481, 128.553, 24.966]) / 255


def mean_scores(rows: Iterable[Mapping[str, float]]) -> dict:
    """Means of what `score` returned for several images.

    What has no place in a mean, the infinite PSNR of equal images and the NaN SSIM of tiny ones, is left out
    and counted, so that one such image neither hides the others nor passes unseen.

    Args:
        rows: mappings that hold the scores of `METRICS`; other keys are ignored.

    Returns:
        their means (NaN where no value is left), `images`, the number of rows, and `left_out`, which maps
        each score to the number of values left out of its mean.
    """
    rows = list(rows)
    means = {"images": len(rows), "left_out": {}}
    for metric in METRICS:
        values = [row[metric] for row in rows]
        finite = [value for value in values if np.isfinite(value)]
        means[metric] = float(np.mean(finite)) if finite else float("nan")
        means["left_out"][metric] = len(values) - len(finite)
    return means


def by_density(rows: Sequence[Mapping]) -> dict[str, tuple[Sequence[Mapping], dict, dict]]:
    """{density: (its rows, their `mean_scores`, those of the inputs)}: each if there are several, and "all".

    Args:
        rows: those of results.csv: `density`, the scores and, as `input_psnr_rgb` and so on, the input's.
    """
    densities = list(dict.fromkeys(row["density"] for row in rows))
    groups = {d: [row for row in rows if row["density"] == d] for d in densities if len(densities) > 1}
    return {
        density: (group, mean_scores(group), mean_scores(map(_of_input, group)))
        for density, group in {**groups, "all": rows}.items()
    }


def for_json(value):
    """A copy, dictionaries in it included. JSON has no infinity and no NaN: null in their place."""
    if isinstance(value, dict):
        return {key: for_json(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _of_input(row: Mapping) -> dict[str, float]:
    return {metric: row[f"input_{metric}"] for metric in METRICS}


def _ssim(x: np.ndarray, y: np.ndarray) -> float:
    """scikit-image's structural_similarity with those options, to 1e-10, in less than half its time.

    Block by block: a dozen float64 maps of a whole picture of 9 megapixels would take 2.3 GB.
    """
    border = SSIM_WINDOW - 1
    rows, columns = (side - border for side in x.shape[:2])
    if min(rows, columns) < 1:
        return float("nan")
    height, width = SSIM_BLOCK
    total = 0.0
    for top, left in product(range(0, rows, height), range(0, columns, width)):
        seen = np.s_[top : top + height + border, left : left + width + border]
        ssim = _ssim_map(x[seen], y[seen])
        total += ssim.mean() * ssim.shape[0] * ssim.shape[1]
    return float(total / (rows * columns))


def _ssim_map(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    border = SSIM_WINDOW // 2
    window = np.exp(-0.5 * (np.arange(-border, border + 1) / SSIM_SIGMA) ** 2)
    window /= window.sum()

    def blur(image: np.ndarray) -> np.ndarray:  # without the places where the window hangs over the border
        return cv2.sepFilter2D(image, -1, window, window)[border:-border, border:-border]

    x, y = x.astype(np.float64), y.astype(np.float64)
    mean_x, mean_y = blur(x), blur(y)
    means, squares = mean_x * mean_y, mean_x**2 + mean_y**2
    covariance, variances = blur(x * y) - means, blur(x**2 + y**2) - squares
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return (2 * means + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))


def _check(output: np.ndarray, target: np.ndarray) -> None:
    for name, image in (("output", output), ("target", target)):
        if not isinstance(image, np.ndarray):  # as None, which cv2.imread returns for no picture
            raise ValueError(f"{name} is a {type(image).__name__}; HxWx3 uint8 RGB is allowed")
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise ValueError(f"{name} is {image.dtype} of shape {image.shape}; HxWx3 uint8 RGB is allowed")
    if output.shape != target.shape:
        raise ValueError(f"output is {output.shape}, target {target.shape}; they must be of the same shape")
