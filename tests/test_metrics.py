"""Reported PSNR and SSIM: against closed forms, fixed numbers and a computation of their own."""

import math

import cv2
import numpy as np
import pytest
from skimage.metrics import structural_similarity

from support import metrics
from support.metrics import luma, mean_scores, score


def picture(seed: int, height: int = 24, width: int = 31) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_psnr_of_a_constant_offset_has_a_closed_form():
    target = picture(0) // 2
    for k in (1, 7, 100):
        result = score(target + np.uint8(k), target)
        assert result["psnr_rgb"] == pytest.approx(20 * math.log10(255 / k), abs=1e-9)
        # k grey levels move Y by k (65.481 + 128.553 + 24.966) / 255 = k 219 / 255.
        assert result["psnr_y"] == pytest.approx(20 * math.log10(255 / (k * 219 / 255)), abs=1e-9)


def test_one_channel_off_weighs_a_third_in_rgb_and_its_luma_weight_in_y():
    target = picture(1) // 2
    output = target + np.uint8([0, 12, 0])
    result = score(output, target)
    assert result["psnr_rgb"] == pytest.approx(10 * math.log10(255**2 / (12**2 / 3)), abs=1e-9)
    assert result["psnr_y"] == pytest.approx(20 * math.log10(255 / (12 * 128.553 / 255)), abs=1e-9)


def test_luma_is_studio_range_and_unrounded():
    colours = np.uint8([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255], [1, 1, 1]]])
    assert luma(colours)[0] == pytest.approx([16, 235, 81.481, 144.553, 40.966, 16 + 219 / 255])


def plain_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004, equation 13, window by window: no library, no convolution."""
    offsets = np.arange(-5, 6)
    weights = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            cov = (weights * (a - mean_a) * (b - mean_b)).sum()
            numerator = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
            values.append(numerator / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return float(np.mean(values))


def test_ssim_equals_a_plain_computation():
    target = picture(2)
    output = np.clip(target * 0.8 + picture(3) * 0.1 + 9, 0, 255).astype(np.uint8)
    result = score(output, target)
    x, y = output.astype(float), target.astype(float)
    channels = [plain_ssim(x[..., c], y[..., c]) for c in range(3)]
    assert result["ssim_rgb"] == pytest.approx(np.mean(channels), abs=1e-7)
    weights = [65.481 / 255, 128.553 / 255, 24.966 / 255]
    assert result["ssim_y"] == pytest.approx(plain_ssim(16 + x @ weights, 16 + y @ weights), abs=1e-7)


@pytest.mark.parametrize(
    "height, width", [(11, 11), (12, 40), (58, 30), (59, 31), (97, 130), (266, 30), (600, 40), (60, 523)]
)
@pytest.mark.parametrize("kind", ["noise", "smooth", "flat", "white on black"])
def test_ssim_is_scikit_images(kind, height, width):
    """Of noise, of pictures where variances nearly cancel, and at the ends of the range."""
    target = picture(5, height, width)
    output = np.clip(target + np.random.default_rng(6).normal(0, 20, target.shape), 0, 255).astype(np.uint8)
    if kind == "smooth":
        target, output = cv2.GaussianBlur(target, (0, 0), 4), cv2.GaussianBlur(output, (0, 0), 3)
    if kind in ("flat", "white on black"):
        target, output = np.full_like(target, 255), np.full_like(output, 0 if kind != "flat" else 254)
    options = {"data_range": 255, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    result = score(output, target)
    expected = structural_similarity(output, target, channel_axis=-1, **options)
    assert result["ssim_rgb"] == pytest.approx(expected, abs=1e-10)
    expected = structural_similarity(luma(output), luma(target), **options)
    assert result["ssim_y"] == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("block", [(1, 1000), (7, 16), (256, 1), (1000, 39)])
def test_the_size_of_the_blocks_changes_nothing_but_rounding(block, monkeypatch):
    target = picture(5, 300, 50)
    output = np.clip(target + np.random.default_rng(6).normal(0, 20, target.shape), 0, 255).astype(np.uint8)
    expected = score(output, target)
    monkeypatch.setattr(metrics, "SSIM_BLOCK", block)
    assert score(output, target) == pytest.approx(expected, abs=1e-14)


def test_fixed_numbers():
    """Computed once by the formulas above, without scikit-image: a library that changes shows here."""
    rows, columns = np.mgrid[:40, :48]
    target = np.stack([4 * rows + columns, 3 * columns + rows, (rows * columns) % 251], -1).astype(np.uint8)
    output = target.copy()
    output[::3, ::5] //= 2
    assert score(output, target) == pytest.approx(
        {"psnr_rgb": 24.3032217, "ssim_rgb": 0.6387652, "psnr_y": 26.6495689, "ssim_y": 0.5967266}, abs=1e-6
    )


def test_identical_images():
    image = picture(4)
    result = score(image, image.copy())
    assert result["psnr_rgb"] == result["psnr_y"] == math.inf
    assert result["ssim_rgb"] == pytest.approx(1) and result["ssim_y"] == pytest.approx(1)


@pytest.mark.parametrize("height, width", [(1, 1), (10, 40), (40, 10)])
def test_images_under_11_pixels_a_side_have_psnr_but_no_ssim(height, width):
    result = score(picture(5, height, width), picture(6, height, width))
    assert math.isnan(result["ssim_rgb"]) and math.isnan(result["ssim_y"])
    assert math.isfinite(result["psnr_rgb"]) and math.isfinite(result["psnr_y"])
    assert math.isfinite(score(picture(5, 11, 11), picture(6, 11, 11))["ssim_rgb"])


@pytest.mark.parametrize(
    "output, found",
    [
        (np.zeros((12, 12, 3)), "float64"),
        (np.zeros((12, 12), np.uint8), r"\(12, 12\)"),
        (np.zeros((12, 12, 4), np.uint8), r"\(12, 12, 4\)"),
        (np.zeros((3, 12, 12), np.uint8), r"\(3, 12, 12\)"),
        (np.zeros((0, 12, 3), np.uint8), r"\(0, 12, 3\)"),
        (None, "NoneType"),
    ],
)
def test_anything_but_8_bit_rgb_is_refused_with_what_was_given(output, found):
    with pytest.raises(ValueError, match=rf"output is .*{found}.*; HxWx3 uint8 RGB is allowed"):
        score(output, np.zeros((12, 12, 3), np.uint8))


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(12, 13, 3\).*\(12, 12, 3\).*same shape"):
        score(np.zeros((12, 13, 3), np.uint8), np.zeros((12, 12, 3), np.uint8))


def test_means_leave_out_and_count_what_has_no_place_in_them():
    rows = [
        {"name": "a.png", "psnr_rgb": 20.0, "ssim_rgb": 0.5, "psnr_y": 22.0, "ssim_y": 0.7},
        {"name": "b.png", "psnr_rgb": 30.0, "ssim_rgb": math.nan, "psnr_y": 32.0, "ssim_y": math.nan},
        {"name": "c.png", "psnr_rgb": math.inf, "ssim_rgb": 1.0, "psnr_y": math.inf, "ssim_y": 1.0},
    ]
    means = mean_scores(iter(rows))
    assert means["images"] == 3
    assert means["psnr_rgb"] == 25 and means["psnr_y"] == 27
    assert means["ssim_rgb"] == pytest.approx(0.75) and means["ssim_y"] == pytest.approx(0.85)
    assert means["left_out"] == {"psnr_rgb": 1, "ssim_rgb": 1, "psnr_y": 1, "ssim_y": 1}


def test_a_mean_of_nothing_is_nan():
    means = mean_scores([])
    assert means["images"] == 0 and math.isnan(means["psnr_rgb"]) and means["left_out"]["psnr_rgb"] == 0
