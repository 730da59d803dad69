"""Restoring one picture: tiles and seams, memory, bits, self-ensemble, precision."""

import logging
import re

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from support import restore as module
from support.errors import UserError
from support.restore import restore, scales


class Darken(nn.Module):
    """Pixelwise, so that tiles must equal the whole."""

    def forward(self, x):
        return 0.5 * x + 0.1 * x**2


class Shift(nn.Module):
    """Out of range, both ways."""

    def forward(self, x):
        return 3.3 * x - 1.13


class TooBig(Darken):
    """Runs out of memory above so many pixels, and remembers what it was given."""

    def __init__(self, pixels, error=torch.cuda.OutOfMemoryError):
        super().__init__()
        self.pixels, self.shapes, self.error = pixels, [], error

    def forward(self, x):
        self.shapes.append(tuple(x.shape[2:]))
        if x.shape[2] * x.shape[3] > self.pixels:
            raise self.error("simulated")
        return super().forward(x)


class SpoiltBorder(nn.Module):
    """The identity, but for the 8 pixels next to the border of what it is given."""

    def forward(self, x):
        spoilt = torch.ones_like(x)
        spoilt[..., 8:-8, 8:-8] = x[..., 8:-8, 8:-8]
        return spoilt


class MeanOfAll(nn.Module):
    """Global, as squeeze-and-excitation is: each tile gives a flat patch of its own."""

    def forward(self, x):
        return x.mean((1, 2, 3), keepdim=True).expand_as(x)


def blur(radius: int) -> nn.Module:
    conv = nn.Conv2d(3, 3, 2 * radius + 1, padding=radius, padding_mode="replicate", bias=False)
    nn.init.uniform_(conv.weight, 0, 1 / conv.weight[0].numel())
    return conv.eval()


def picture(height: int, width: int, dtype=np.uint8) -> np.ndarray:
    rng = np.random.default_rng(height * width)
    return rng.integers(0, np.iinfo(dtype).max + 1, (height, width, 3), dtype=dtype)


def apart(x: np.ndarray, y: np.ndarray) -> int:
    return int(np.abs(x.astype(int) - y.astype(int)).max())


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_bits_and_shape_are_kept_and_the_identity_changes_nothing(dtype):
    for size in ((1, 1), (7, 13), (40, 65)):
        image = picture(*size, dtype)
        given = image.copy()
        restored = restore(nn.Identity().eval(), image)
        assert restored.dtype == dtype and np.array_equal(restored, image)
        assert np.array_equal(image, given) and restored is not image


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_output_is_clamped_and_rounded(dtype):
    image, top = picture(20, 30, dtype), np.iinfo(dtype).max
    expected = np.rint(np.clip(3.3 * (image / top) - 1.13, 0, 1) * top)
    assert apart(restore(Shift().eval(), image), expected) <= (0 if dtype == np.uint8 else 1)


@pytest.mark.parametrize("size", [(200, 300), (203, 64), (64, 301), (65, 65), (130, 250)])
@pytest.mark.parametrize("overlap", [0, 16, 32])
def test_tiles_of_a_pixelwise_network_equal_the_whole(size, overlap):
    image = picture(*size)
    whole = restore(Darken().eval(), image, tile=0)
    assert apart(restore(Darken().eval(), image, tile=64, overlap=overlap), whole) <= 1
    deep = picture(*size, np.uint16)
    tiled = restore(Darken().eval(), deep, tile=64, overlap=overlap)
    assert apart(tiled, restore(Darken().eval(), deep, tile=0)) <= 1


def test_tiles_equal_the_whole_where_the_overlap_covers_the_receptive_field():
    torch.manual_seed(0)
    image = picture(180, 260)
    net = blur(radius=8)
    whole = restore(net, image, tile=0)
    assert apart(restore(net, image, tile=96, overlap=32), whole) <= 1  # a quarter of 32 is thrown away: 8
    assert apart(restore(net, image, tile=96, overlap=0), whole) > 1


def test_all_tiles_have_one_size_and_lie_on_the_grid_of_8():
    net = TooBig(pixels=10**9).eval()
    restore(net, picture(203, 301), tile=64, overlap=16)
    assert set(net.shapes) == {(64, 64)}
    for length in (72, 128, 208, 1000):
        windows = module._windows(length, 64, 16)
        assert windows[0][0] == 0 and windows[-1][0] == length - 64
        assert all(start % 8 == 0 for start, _ in windows)
        total = np.zeros(length)
        for start, weights in windows:
            total[start : start + 64] += weights
        assert total == pytest.approx(np.ones(length), abs=1e-6)


def test_seams_are_ramps_and_not_steps():
    ramp = np.linspace(0, 255, 512)[None, :, None]
    image = np.broadcast_to(ramp, (64, 512, 3)).astype(np.uint8)
    net = MeanOfAll().eval()

    def steepest(overlap: int) -> int:
        row = restore(net, image, tile=128, overlap=overlap)[32, :, 0].astype(int)
        return int(np.abs(np.diff(row)).max())

    assert steepest(overlap=0) > 40  # from one tile's mean straight to the next one's
    assert steepest(overlap=64) <= 2


def test_a_quarter_of_the_overlap_is_thrown_away_at_cut_edges():
    net, image, inside = SpoiltBorder().eval(), picture(180, 260), np.s_[8:-8, 8:-8]
    assert np.array_equal(restore(net, image, tile=96, overlap=32)[inside], image[inside])
    assert apart(restore(net, image, tile=96, overlap=24)[inside], image[inside]) > 1


def test_a_tiles_side_may_be_any_integer():
    net, image = blur(radius=3), picture(100, 300)
    expected = restore(net, image, tile=128, overlap=64)
    for kind in (np.uint8, np.int16):
        assert np.array_equal(restore(net, image, tile=kind(128), overlap=kind(64)), expected)


def test_at_most_half_a_tile_overlaps():
    net = TooBig(pixels=10**9).eval()
    restore(net, picture(64, 256), tile=64, overlap=64)
    assert len(net.shapes) == 7


def test_a_small_picture_goes_through_whole_and_a_large_one_in_tiles(monkeypatch):
    monkeypatch.setattr(module, "WHOLE_PIXELS", 100 * 100)
    monkeypatch.setattr(module, "TILE_PIXELS", 110 * 110)
    monkeypatch.setattr(module, "SHORTEST_CUT", 48)
    for size, tile, seen in (
        ((100, 100), None, {(100, 100)}),
        ((101, 100), None, {(101, 100)}),  # one tile
        ((101, 120), None, {(104, 72)}),  # two, their overlap cut to 24
        ((300, 40), None, {(168, 40)}),
        ((400, 40), None, {(216, 40)}),
        ((203, 301), None, {(120, 96)}),  # 2 x 4, not 4 x 2 of (72, 168) nor 3 x 3
        ((203, 301), 0, {(203, 301)}),
        ((40, 40), 64, {(40, 40)}),
    ):
        net = TooBig(pixels=10**9).eval()
        restore(net, picture(*size), tile=tile)
        assert set(net.shapes) == seen


@pytest.mark.parametrize(
    ("size", "sides", "count"),
    [
        ((1080, 1920), (1080, 992), 2),
        ((3000, 4000), (1048, 1048), 12),
        ((300, 20000), (304, 3392), 6),
        ((8, 200000), (8, 100032), 2),
        ((1025, 1024), (1032, 1024), 1),
        ((16383, 16384), None, None),
    ],
)
@pytest.mark.parametrize("overlap", [0, 64, 4096])
def test_the_default_takes_few_tiles_that_fit(size, sides, count, overlap):
    tall, wide = module._sides(*size, None, overlap)
    assert tall * wide <= module.TILE_PIXELS and tall % 8 == wide % 8 == 0
    rows, columns = (
        module._windows(n + -n % 8, side, overlap) for n, side in zip(size, (tall, wide), strict=True)
    )
    least = size[0] * size[1] / module.TILE_PIXELS
    assert least <= len(rows) * len(columns)
    if overlap == 64:
        assert len(rows) * len(columns) <= 1.5 * least + 1
        if sides:
            assert (tall, wide) == sides and len(rows) * len(columns) == count


def test_out_of_memory_halves_the_tile_and_says_so(caplog):
    image = picture(250, 400)
    net = TooBig(pixels=110 * 110).eval()
    with caplog.at_level(logging.WARNING):
        restored = restore(net, image, tile=0, overlap=32)
    assert apart(restored, restore(Darken().eval(), image, tile=0)) <= 1
    assert [shape for i, shape in enumerate(net.shapes) if shape not in net.shapes[:i]] == [
        (250, 400),
        (200, 200),
        (104, 104),
    ]
    assert [record.getMessage().split(" tiles of ")[1] for record in caplog.records] == [
        "200 x 200 pixels",
        "104 x 104 pixels",
    ]


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'",
        "MPS backend out of memory (MPS allocated: 9 GB)",
        "GET was unable to find an engine to execute this computation",
    ],
)
def test_a_full_gpu_is_known_by_other_errors_of_pytorch_too(words):
    net = TooBig(pixels=110 * 110, error=lambda _: RuntimeError(words)).eval()
    image = picture(250, 400)
    assert apart(restore(net, image, tile=0, overlap=32), restore(Darken().eval(), image, tile=0)) <= 1
    assert module.is_out_of_memory(RuntimeError(words))
    bug = TooBig(pixels=110 * 110, error=RuntimeError).eval()
    with pytest.raises(RuntimeError, match="simulated"):
        restore(bug, image)
    assert len(bug.shapes) == 1 and not module.is_out_of_memory(RuntimeError("simulated"))


def test_out_of_memory_for_the_smallest_tile_is_an_error():
    net = TooBig(pixels=0).eval()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        restore(net, picture(100, 100))
    assert net.shapes[-1] == (64, 64)


@pytest.mark.parametrize("count", [4, 8])
def test_self_ensemble_turns_and_flips_with_the_picture(count):
    """Of 8 flips and turns, or of the 4 in which what was upright still is."""
    torch.manual_seed(0)
    net, image = blur(radius=2), picture(30, 44)
    turns = range(0, 4, 8 // count)
    transforms = [lambda x, k=k: np.rot90(x, k) for k in turns]
    transforms += [lambda x, t=t: t(x)[:, ::-1] for t in transforms]
    plain, ensemble = restore(net, image), restore(net, image, self_ensemble=count)
    for transform in transforms:
        turned = np.ascontiguousarray(transform(image))
        assert apart(restore(net, turned, self_ensemble=count), transform(ensemble)) <= 1
    assert max(apart(restore(net, np.ascontiguousarray(t(image))), t(plain)) for t in transforms) > 1
    # It is the mean of them all, each turned back.
    results = [restore(net, np.ascontiguousarray(t(image))).astype(float) for t in transforms]
    back = [np.rot90(r, -k) for r, k in zip(results[: len(turns)], turns, strict=True)]
    back += [np.rot90(r[:, ::-1], -k) for r, k in zip(results[len(turns) :], turns, strict=True)]
    assert len(back) == count
    assert np.abs(np.mean(back, 0) - ensemble).max() <= 1


@pytest.mark.parametrize("scale", [1, 0.5, 0.3, 0.01, "auto"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_at_any_scale_the_identity_changes_nothing(scale, dtype, monkeypatch):
    monkeypatch.setattr(module, "LEAST_COPY", 400)  # so that "auto" tries two
    image, told = picture(37, 50, dtype), []
    output = restore(nn.Identity().eval(), image, scale=scale, tell_scale=told.append)
    assert output.dtype == dtype and np.array_equal(output, image)
    assert told == [1 if scale == "auto" else scale]


def test_what_a_smaller_copy_loses_is_taken_from_the_picture_with_its_details():
    image = picture(64, 90) // 4 + 96  # noise of 96 to 159, which a copy of 1/4 hardly has
    changes = [restore(Darken().eval(), image, scale=scale).astype(float) - image for scale in (1, 0.25)]
    assert changes[0].std() > 2 * changes[1].std()
    assert changes[0].mean() == pytest.approx(changes[1].mean(), abs=0.5)
    dark = restore(Shift().eval(), np.full((64, 64, 3), 10, np.uint8), scale=0.5)  # 3.3 x - 1.13 is below 0
    assert dark.max() == 0
    for dtype in (np.uint8, np.uint16):  # 3.3 x - 1.13 is above 1
        bright = np.full((64, 64, 3), 0.98 * np.iinfo(dtype).max, dtype)
        assert restore(Shift().eval(), bright, scale=0.5).min() == np.iinfo(dtype).max


def test_what_is_taken_is_taken_from_where_it_was():
    image = np.full((96, 128, 3), 100, np.uint8)
    image[32:64, 48:80] = 200  # the network darkens what is above 150

    class Dim(nn.Module):
        def forward(self, x):
            return x.where(x < 0.6, 0.4)

    change = restore(Dim().eval(), image, scale=0.5).astype(int) - image
    assert (change[36:60, 52:76] == -98).all()
    outside, inside = change[31, 60].mean(), change[32, 60].mean()
    assert outside + inside == pytest.approx(-98, abs=2) and -40 < outside < -10  # it is enlarged smoothly
    change[28:68, 44:84] = 0
    assert np.abs(change).max() == 0


def test_opencv_without_memory_is_told_from_its_other_errors():
    with pytest.raises(cv2.error) as other:
        cv2.resize(picture(8, 8), (0, 0))
    assert not module.is_out_of_memory(other.value)
    full = cv2.error("Insufficient memory")
    full.code = cv2.Error.StsNoMem
    assert module.is_out_of_memory(full)


def test_the_scale_is_chosen_by_what_changes_most(monkeypatch):
    monkeypatch.setattr(module, "LEAST_COPY", 32 * 32)
    smooth = nn.AvgPool2d(3, 1, 1, count_include_pad=False).eval()  # it takes away what is a pixel wide
    for size, chosen in ((1, 1), (2, 0.5), (4, 0.25)):
        image = np.kron(picture(128 // size, 128 // size), np.ones((size, size, 1), np.uint8))
        told = []
        outputs = {scale: restore(smooth, image, scale=scale) for scale in (1, 0.5, 0.25)}
        outputs["auto"] = restore(smooth, image, scale="auto", tell_scale=told.append)
        assert (
            [scale for scale in (1, 0.5, 0.25) if np.array_equal(outputs["auto"], outputs[scale])]
            == [chosen]
            == told
        )


@pytest.mark.parametrize(
    ("size", "expected"),
    [((300, 448), [1]), ((800, 1184), [1, 0.5]), ((2848, 4288), [1, 0.5, 0.25, 0.125]), ((1, 1), [1])],
)
def test_no_scale_is_tried_that_leaves_less_than_a_training_picture(size, expected):
    assert scales(*size, "auto") == expected
    assert scales(*size, 0.3) == [0.3]


@pytest.mark.parametrize("scale", [0, -1, 1.5, float("nan"), "0.5", None, [1], np.array([1, 0.5])])
def test_a_scale_that_is_none_is_refused(scale):
    with pytest.raises(ValueError, match="scale is .* allowed"):
        restore(Darken().eval(), picture(16, 16), scale=scale)


def test_amp_computes_in_half_precision():
    seen = []
    net = blur(radius=1)
    net.register_forward_hook(lambda _, __, y: seen.append(y.dtype))
    image = picture(32, 32)
    full, half = restore(net, image), restore(net, image, amp=True)
    assert seen == [torch.float32, torch.bfloat16]
    restore(net, image, amp=torch.float16)
    assert seen[2:] == [torch.float16]
    assert half.dtype == np.uint8 and apart(full, half) <= 4


def test_no_gradients_and_no_change_of_the_network():
    net = blur(radius=1)
    before = net.weight.clone()
    restore(net, picture(16, 16))
    assert net.weight.grad is None and torch.equal(net.weight, before)


def test_the_networks_mistakes_do_not_become_pictures():
    class NotANumber(nn.Module):
        def forward(self, x):
            return x / 0

    with pytest.raises(UserError, match="not finite"):
        restore(NotANumber().eval(), picture(16, 16))
    partly = nn.Sequential(nn.BatchNorm2d(3), Darken()).eval()
    partly[0].train()
    for net in (Darken(), partly, torch.fx.symbolic_trace(nn.Sequential(nn.BatchNorm2d(3)))):
        with pytest.raises(ValueError, match="training mode"):
            restore(net, picture(16, 16))


@pytest.mark.parametrize(
    ("output", "what"),
    [
        (lambda x: x[:, :1], "float32 of shape (1, 1, 16, 24); .* (1, 3, 16, 24)"),
        (lambda x: x.mean((2, 3), keepdim=True), "float32 of shape (1, 3, 1, 1)"),
        (lambda x: x.expand(2, -1, -1, -1), "float32 of shape (2, 3, 16, 24)"),
        (lambda x: (255 * x).byte(), "uint8 of shape (1, 3, 16, 24)"),
        (lambda x: x[0], "float32 of shape (3, 16, 24)"),
        (lambda x: (x, x), "tuple; floating point"),
    ],
)
def test_what_a_network_returns_has_the_shape_of_its_input(output, what):
    class Other(nn.Module):
        def forward(self, x):
            return output(x)

    with pytest.raises(ValueError, match=f"^net returned .*{what.replace('(', '[(]').replace(')', '[)]')}"):
        restore(Other().eval(), picture(16, 24))


def test_an_exported_network_restores_as_the_network_does(caplog):
    caplog.set_level(logging.CRITICAL, "torch.__trace")  # thousands of lines, which pytest would keep
    net, image = blur(radius=1), picture(16, 24)
    exported = torch.export.export(net, (torch.rand(1, 3, 16, 24),)).module()
    assert np.array_equal(restore(exported, image), restore(net, image))


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8, 3)), np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8)]
)
def test_anything_but_8_or_16_bit_rgb_is_refused(image):
    with pytest.raises(ValueError, match=r"image is .*; HxWx3 uint8 or uint16 is allowed"):
        restore(Darken().eval(), image)


@pytest.mark.parametrize("image", [None, "photo.jpg", [[[0, 0, 0]]]])  # cv2.imread returns None
def test_what_is_no_array_is_named(image):
    with pytest.raises(ValueError, match=f"image is a {type(image).__name__}, not an array of HxWx3"):
        restore(Darken().eval(), image)


@pytest.mark.parametrize(
    "flags",
    [
        *({"tile": tile} for tile in (100, 8, -8, float("nan"), "a", 64.0, [])),
        *({"overlap": overlap} for overlap in (12, -8, None, "a")),
    ],
)
def test_tiles_off_the_grid_are_refused_with_what_is_allowed(flags):
    (name, value), *_ = flags.items()
    with pytest.raises(UserError, match=rf"{name} is {re.escape(repr(value))}; .*multiple of 8.* allowed"):
        restore(Darken().eval(), picture(16, 16), **flags)


@pytest.mark.parametrize("self_ensemble", [3, None])
def test_another_self_ensemble_is_refused_with_what_is_allowed(self_ensemble):
    with pytest.raises(ValueError, match=rf"^self_ensemble is {self_ensemble}; one of .*4.* is allowed"):
        restore(Darken().eval(), picture(16, 16), self_ensemble=self_ensemble)


def test_a_smaller_copy_is_the_mean_of_its_pixels():
    class Seen(nn.Module):
        def forward(self, x):
            self.x = x
            return x

    net, image = Seen().eval(), picture(64, 96)
    restore(net, image, scale=0.25)
    expected = image.reshape(16, 4, 24, 4, 3).mean((1, 3))
    assert np.abs(255 * net.x[0].permute(1, 2, 0).numpy() - expected).max() < 1
