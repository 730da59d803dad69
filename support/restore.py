"""From a picture to the restored picture with any network: tiles, scale, self-ensemble, precision."""

import logging
from collections import Counter
from collections.abc import Callable
from itertools import product
from numbers import Integral, Real

import cv2
import numpy as np
import torch
from torch import nn

from support.devices import is_out_of_gpu_memory
from support.errors import UserError

WHOLE_PIXELS = 2**20  # a picture of more goes through in tiles, whatever the device, so that results agree
TILE_PIXELS = WHOLE_PIXELS * 9 // 8  # 1920x1080 goes in two tiles, 4000x3000 in twelve
SHORTEST_CUT = 512  # least side of such a tile, where the picture is longer
OVERLAP = 64
SMALLEST_TILE = 64
ENSEMBLES = (0, 4, 8)
AUTO = "auto"  # scale
MAYBE_OUT_OF_MEMORY = (MemoryError, RuntimeError, cv2.error)  # see `is_out_of_memory`
LEAST_COPY = 2**16  # pixels of the smallest copy that it tries: under half of a training picture

log = logging.getLogger(__name__)


class NotFinite(UserError):
    """A network's output that is no picture."""


def restore(
    net: nn.Module,
    image: np.ndarray,
    device: str | torch.device = "cpu",
    tile: int | None = None,
    overlap: int = OVERLAP,
    self_ensemble: int = 0,
    amp: bool | torch.dtype = False,
    scale: float | str = 1.0,
    tell_scale: Callable[[float], object] | None = None,
) -> np.ndarray:
    """Restore one picture.

    A network takes away rain that is as wide, in pixels, as that of its training. A large photograph with
    wider rain can be restored at a smaller scale: what the network takes from a shrunk copy is enlarged, and
    taken from the photograph itself, which so keeps its details.

    Tiles are not exact for a network with global pooling: it then sees the statistics of one tile at a time.
    Out of GPU memory, the picture is begun again with tiles of half the size, and a warning says so.

    Args:
        net: Nx3xHxW in [0, 1] to Nx3xHxW, for any H and W; on `device`, in evaluation mode.
        image: HxWx3 RGB, uint8 or uint16.
        tile: side of the tiles in pixels, a multiple of 8; 0 never tiles; None takes a picture of up to
            `WHOLE_PIXELS` whole and a larger one in as few tiles as have at most `TILE_PIXELS`.
        overlap: of neighbouring tiles in pixels, a multiple of 8; at most half a tile is used. The quarter of
            it nearest to a tile's cut edge is thrown away; seams are blended linearly over the middle half.
        self_ensemble: 4: average over the 4 flips, in which rain still falls upright; 8: over all 8 flips and
            rotations (Timofte et al., CVPR 2016), for a network trained on quarter turns too; 0: neither.
        amp: automatic mixed precision: float16 on CUDA, bfloat16 on a CPU, or the type given.
        scale: of the copy that the network restores, above 0 and up to 1; or "auto": the one of 1, 1/2, 1/4
            and so on (`scales`) at which it changes most, which is a third more work; on a dry picture that
            is the most harmful one.
        tell_scale: called with the scale whose change was taken.

    Returns:
        the output, clamped to [0, 1] and rounded to the bits of `image`: same shape and type.

    Raises:
        UserError: a tile or overlap that is not allowed; NotFinite for a network whose output is not finite.
        ValueError: `image`, `scale` or `self_ensemble` is anything else, `net` is in training mode, or what
            it returns is not of the shape of its input.
        RuntimeError, mostly torch.OutOfMemoryError: not even tiles of `SMALLEST_TILE` fit.
    """
    _check(net, image, tile, overlap, self_ensemble, scale)
    tile, overlap = tile if tile is None else int(tile), int(overlap)  # a np.uint8 would overflow

    def run(patch: np.ndarray) -> np.ndarray:
        return _forward(net, patch, torch.device(device), self_ensemble, amp)

    height, width = image.shape[:2]
    tried = scales(height, width, scale)
    most = -1.0
    for each in tried:
        size = _scaled(height, width, each)
        small = image if each == 1 else cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
        output = _in_tiles_that_fit(run, small, tile, overlap)
        changed = cv2.absdiff(small, output).mean() if len(tried) > 1 else 0.0
        if changed > most:
            most, taken, copy, restored = changed, each, small, output
    if tell_scale:
        tell_scale(taken)
    return restored if copy is image else _with_change(image, copy, restored)


def _check(
    net: nn.Module, image: np.ndarray, tile: int | None, overlap: int, self_ensemble: int, scale: float | str
) -> None:
    if not isinstance(image, np.ndarray):  # as None, which cv2.imread returns for no picture
        raise ValueError(f"image is a {type(image).__name__}, not an array of HxWx3 uint8 or uint16")
    if image.dtype not in (np.uint8, np.uint16) or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"image is {image.dtype} of shape {image.shape}; HxWx3 uint8 or uint16 is allowed")
    # torch.export's says that it is in training mode, and its own `train` cannot tell it otherwise.
    exported = isinstance(net, torch.fx.GraphModule) and "train" in vars(net)
    if not exported and any(module.training for module in net.modules()):
        raise ValueError(
            "net is in training mode, where its output depends on the batch; call net.eval() first"
        )
    if not (tile is None or _is_multiple_of_8(tile) and (tile == 0 or tile >= SMALLEST_TILE)):
        raise UserError(f"tile is {tile!r}; 0 (never) or a multiple of 8 from {SMALLEST_TILE} on is allowed")
    if self_ensemble not in ENSEMBLES:
        raise ValueError(f"self_ensemble is {self_ensemble}; one of {ENSEMBLES} is allowed")
    if not _is_multiple_of_8(overlap) or overlap < 0:
        raise UserError(f"overlap is {overlap!r}; 0 or a positive multiple of 8 is allowed")
    if not (0 < scale <= 1 if isinstance(scale, Real) else isinstance(scale, str) and scale == AUTO):
        raise ValueError(f"scale is {scale!r}; {AUTO!r} or a number above 0 and up to 1 is allowed")


def scales(height: int, width: int, scale: float | str) -> list[float]:
    """Those that `restore` tries for a picture of that size, the largest first."""
    if scale != AUTO:
        return [scale]
    halvings = max(0, int(np.log2(height * width / LEAST_COPY) / 2))
    return [0.5**n for n in range(halvings + 1)]


def _scaled(height: int, width: int, scale: float) -> tuple[int, int]:
    return max(1, round(scale * height)), max(1, round(scale * width))


def _with_change(image: np.ndarray, copy: np.ndarray, restored: np.ndarray) -> np.ndarray:
    """The image plus the change, enlarged, from its smaller `copy` to that copy `restored`."""
    height, width = image.shape[:2]
    result = cv2.resize(restored - copy.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    result += image
    np.rint(result, out=result)
    return np.clip(result, 0, np.iinfo(image.dtype).max, out=result).astype(image.dtype)


def _in_tiles_that_fit(run: Callable, image: np.ndarray, tile: int | None, overlap: int) -> np.ndarray:
    """As `_restore_in_tiles`, but out of GPU memory again with tiles of half the size."""
    sides = _sides(*image.shape[:2], tile, overlap)
    while True:
        try:
            return _restore_in_tiles(run, image, sides, overlap)
        except RuntimeError as error:
            if not is_out_of_gpu_memory(error) or max(sides) <= SMALLEST_TILE:
                raise
        # Out here, the exception and the tensors that its traceback holds are gone.
        torch.cuda.empty_cache()
        sides = 2 * [max(_multiple_of_8(max(sides) // 2), SMALLEST_TILE)]
        log.warning("out of GPU memory: trying again with tiles of %d x %d pixels", *sides)


def is_out_of_memory(error: Exception) -> bool:
    """Whether numpy, OpenCV or PyTorch found no room; on a CPU PyTorch has no error of its own for that."""
    if isinstance(error, cv2.error):
        return error.code == cv2.Error.StsNoMem
    on_cpu = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
    return on_cpu or is_out_of_gpu_memory(error)


def forwards(
    height: int, width: int, tile: int | None = None, self_ensemble: int = 0, scale: float | str = 1.0
) -> Counter:
    """How often `restore` runs the network for a picture of that size, by (height, width) of what it is
    given, padded to multiples of 8 as the networks do.
    """
    shapes = Counter()
    for each in scales(height, width, scale):
        size = _scaled(height, width, each)
        sides = zip(size, _sides(*size, tile, OVERLAP), strict=True)
        windows = [_windows(_multiple_of_8(length), side, OVERLAP) for length, side in sides]
        shapes.update(product(*([len(weights) for _, weights in along] for along in windows)))
    if not self_ensemble:
        return shapes
    passes = Counter()
    for (height, width), number in shapes.items():
        passes[height, width] += 4 * number
        if self_ensemble == 8:
            passes[width, height] += 4 * number
    return passes


def _sides(height: int, width: int, tile: int | None, overlap: int) -> tuple[int, int]:
    """(height, width) of the tiles for a picture, multiples of 8 that are at most the picture's own."""
    whole = _multiple_of_8(height), _multiple_of_8(width)
    if tile:
        return min(tile, whole[0]), min(tile, whole[1])
    if tile == 0 or height * width <= WHOLE_PIXELS:
        return whole
    grids = [
        (rows * columns, max(tall, wide) / min(tall, wide), (tall, wide))
        for (rows, tall), (columns, wide) in product(*(_cuts(length, overlap) for length in whole))
        if tall * wide <= TILE_PIXELS
    ]
    return min(grids)[-1]  # the fewest tiles, and of those the ones nearest to squares


def _cuts(length: int, overlap: int) -> list[tuple[int, int]]:
    """[(number of windows, their least side)] that cover a length, a multiple of 8: one window of all of it,
    two, and so on down to sides of `SHORTEST_CUT`.
    """
    overlap = min(overlap, SHORTEST_CUT // 2)
    cuts = [(1, length)]
    while (side := _multiple_of_8(-(-(length + len(cuts) * overlap) // (len(cuts) + 1)))) >= SHORTEST_CUT:
        cuts.append((len(cuts) + 1, side))
    return cuts


def _restore_in_tiles(run: Callable, image: np.ndarray, sides: tuple[int, int], overlap: int) -> np.ndarray:
    height, width = image.shape[:2]
    if (height > sides[0] or width > sides[1]) and (height % 8 or width % 8):
        # Padded as the networks pad a whole picture, every tile can lie on the grid of their coarsest scale.
        image = np.pad(image, ((0, -height % 8), (0, -width % 8), (0, 0)), mode="edge")
    rows, columns = (_windows(n, side, overlap) for n, side in zip(image.shape, sides, strict=False))
    result = np.empty_like(image)
    # One row of tiles is summed at a time: the rest of the picture takes no more than its own bits.
    band = np.zeros((len(rows[0][1]), image.shape[1], 3), np.float32)
    ends = [top for top, _ in rows[1:]] + [image.shape[0]]
    for (top, row_weights), end in zip(rows, ends, strict=True):
        for left, column_weights in columns:
            inside = np.s_[left : left + len(column_weights)]
            weights = row_weights[:, None, None] * column_weights[:, None]
            band[:, inside] += weights * run(image[top : top + len(row_weights), inside])
        result[top:end] = np.rint(band[: end - top] * np.iinfo(image.dtype).max)
        left_over = len(band) - (end - top)
        band[:left_over] = band[end - top :]
        band[left_over:] = 0
    return np.ascontiguousarray(result[:height, :width])


def _windows(length: int, tile: int, overlap: int) -> list[tuple[int, np.ndarray]]:
    """Evenly spread windows over 0..length, each (start, weights); at every pixel the weights sum to 1."""
    if length <= tile:
        return [(0, np.ones(length, np.float32))]
    overlap = min(overlap, tile // 16 * 8)
    gaps = -(-(length - tile) // (tile - overlap))
    starts = [(length - tile) // 8 * i // gaps * 8 for i in range(gaps + 1)]
    # From a cut edge inwards: a quarter of the overlap nothing, then half of it rising, then all.
    ramp = np.clip((np.arange(tile) + 0.5) / max(overlap / 2, 1e-9) - 0.5, 0, 1)
    weights = np.ones((len(starts), tile))
    weights[1:] *= ramp
    weights[:-1] *= ramp[::-1]
    total = np.zeros(length)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + tile] += weight
    return [
        (start, (weight / total[start : start + tile]).astype(np.float32))
        for start, weight in zip(starts, weights, strict=True)
    ]


@torch.inference_mode()
def _forward(
    net: nn.Module, patch: np.ndarray, device: torch.device, self_ensemble: int, amp: bool | torch.dtype
):
    """HxWx3 uint8 or uint16 to HxWx3 float32 in [0, 1]."""
    x = torch.from_numpy(patch.astype(np.float32) / np.iinfo(patch.dtype).max)
    x = x.to(device).permute(2, 0, 1)[None]  # channels last in memory, as it comes
    with torch.autocast(device.type, amp if isinstance(amp, torch.dtype) else None, enabled=bool(amp)):
        y = _mean_of(self_ensemble, net, x) if self_ensemble else net(x)
    if not (isinstance(y, torch.Tensor) and y.is_floating_point() and y.shape == x.shape):
        what = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, torch.Tensor) else type(y).__name__
        raise ValueError(f"net returned {what}; floating point of shape {tuple(x.shape)} is wanted")
    y = y.float()
    if not torch.isfinite(y).all():
        what_to_do = f"{'run it without --amp, or ' if amp else ''}check its checkpoint"
        raise NotFinite(f"the network's output is not finite; {what_to_do}")
    return y.clamp(0, 1)[0].permute(1, 2, 0).cpu().numpy()


def _mean_of(count: int, net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The mean output over the 4 half turns and flips, or the 8 with quarter turns."""
    total = torch.zeros_like(x)
    for turns in range(0, 4, 8 // count):
        turned = x.rot90(turns, (2, 3))
        total += net(turned).float().rot90(-turns, (2, 3))
        total += net(turned.flip(3)).float().flip(3).rot90(-turns, (2, 3))
    return total / count


def _is_multiple_of_8(value: object) -> bool:
    return isinstance(value, Integral) and value % 8 == 0


def _multiple_of_8(size: int) -> int:
    return -(-size // 8) * 8
