"""PSNR and SSIM as this project reports them: on 8-bit images as saved, in RGB and on the luma Y."""

from collections.abc import Iterable, Mapping

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

METRICS = ("psnr_rgb", "ssim_rgb", "psnr_y", "ssim_y")
SSIM_WINDOW = 11  # pixels a side: of the Gaussian window, so of the smallest image that has an SSIM


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
    for name, x, y, channel_axis in (
        ("rgb", output, target, -1),
        ("y", luma(output), luma(target), None),
    ):
        with np.errstate(divide="ignore"):  # no error at all: infinite PSNR
            scores[f"psnr_{name}"] = float(peak_signal_noise_ratio(y, x, data_range=255))
        scores[f"ssim_{name}"] = _ssim(x, y, channel_axis)
    return scores


def luma(rgb: np.ndarray) -> np.ndarray:
    """Y of BT.601 in studio range, 16 to 235, unrounded: HxWx3 uint8 RGB to HxW float64."""
    return 16 + rgb @ np.array([65.481, 128.553, 24.966]) / 255


def mean_scores(rows: Iterable[Mapping[str, float]]) -> dict:
    """Means of what `score` returned for several images.

    What has no place in a mean, the infinite PSNR of equal images and the NaN SSIM of tiny ones, is left out
    and counted, so that one such image neither hides the others nor passes unseen.

    Args:
        rows: mappings that hold the four scores; other keys are ignored.

    Returns:
        the four means (NaN where no value is left), `images`, the number of rows, and `left_out`, which maps
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


def _ssim(x: np.ndarray, y: np.ndarray, channel_axis: int | None) -> float:
    if min(x.shape[:2]) < SSIM_WINDOW:
        return float("nan")
    return float(
        structural_similarity(
            x,
            y,
            data_range=255,
            channel_axis=channel_axis,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


def _check(output: np.ndarray, target: np.ndarray) -> None:
    for name, image in (("output", output), ("target", target)):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise ValueError(f"{name} is {image.dtype} of shape {image.shape}; HxWx3 uint8 RGB is allowed")
    if output.shape != target.shape:
        raise ValueError(f"output is {output.shape}, target {target.shape}; they must be of the same shape")
