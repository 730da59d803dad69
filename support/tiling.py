"""What tiling costs: how far a picture restored in tiles is from the same picture restored whole.

    python -m support.tiling PICTURE [PICTURE ...]
    python -m support.tiling PICTURE --tiles 1024 --overlaps 0 32 64 128

Gates that pool over the whole picture (SE, SE_A_M, CBAM) see one tile's statistics at a time, so tiles are
not exact. For each side of the tiles (last: as chosen by default) and overlap: RGB PSNR of tiled against
whole, mean (without equal pictures) and worst, the worst mean difference of a 16x16 block in grey levels, and
the time relative to that of the whole pictures.
"""

import argparse
import time

import numpy as np

from model_train import SHIPPED, load
from support import command, devices, images
from support.errors import UserError
from support.fast import keep_freed_memory
from support.metrics import psnr, worst_block
from support.restore import OVERLAP, SMALLEST_TILE, restore


def side(text):
    return None if text == "default" else command.tile(text)


def multiple_of_8(text):
    value = command.natural(text)
    if value % 8:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 8")
    return value


def get_args_parser():
    parser = command.Parser(
        prog="python -m support.tiling", description="What tiling costs, against whole pictures."
    )
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="files larger than the tiles")
    parser.add_argument(
        "--tiles",
        type=side,
        nargs="+",
        default=[256, 512, 768, 1024, None],
        help="sides to try, multiples of 8 from 64 on; 0: whole pictures; 'default': as test_view.py chooses "
        "(default: 256 512 768 1024 default)",
    )
    parser.add_argument(
        "--overlaps",
        type=multiple_of_8,
        nargs="+",
        default=[OVERLAP],
        help=f"to try, in pixels (default: {OVERLAP})",
    )
    parser.add_argument("--ckt_path", default=SHIPPED, help="checkpoint (default: what ships)")
    parser.add_argument("--device", help=devices.DEVICE_HELP)
    return parser


def main(args):
    """Print the table; returns 1 where some file could not be used."""
    keep_freed_memory()
    device = devices.pick_device(args.device)
    net = load(args.ckt_path, device)
    readable, unusable = {}, []
    for path in args.pictures:
        try:
            readable[path] = images.read_image(path)
        except UserError as error:
            unusable.append(str(error))
    if not readable:
        raise UserError(unusable[0])
    rainy = list(readable.values())
    restore(net, rainy[0][:SMALLEST_TILE, :SMALLEST_TILE], device)  # the first time takes longer
    wholes, whole_seconds = zip(*(timed(net, image, device, tile=0) for image in rainy), strict=True)
    for path, image, seconds in zip(readable, rainy, whole_seconds, strict=True):
        print(f"{path}: {image.shape[1]}x{image.shape[0]}, whole in {seconds:.1f} s")
    print(f"\n{'tile':>7} {'overlap':>7} {'PSNR, dB':>9} {'worst':>6} {'block':>6} {'time':>5}")
    for tile in args.tiles:
        for overlap in args.overlaps:
            tiled, seconds = zip(
                *(timed(net, image, device, tile=tile, overlap=overlap) for image in rainy), strict=True
            )
            pairs = list(zip(wholes, tiled, strict=True))
            likeness = [psnr(*pair) for pair in pairs]
            block = max(worst_block(*pair) for pair in pairs)
            ratio = sum(seconds) / sum(whole_seconds)
            size = "default" if tile is None else tile
            differ = [value for value in likeness if np.isfinite(value)]
            mean = np.mean(differ) if differ else np.inf
            figures = f"{mean:9.2f} {min(likeness):6.2f} {block:6.1f} {ratio:5.2f}"
            print(f"{size:>7} {overlap:7} {figures}", flush=True)
    command.tell_unusable(unusable)
    return 1 if unusable else 0


def timed(net, image, device, **how):
    begin = time.perf_counter()
    restored = restore(net, image, device, **how)
    return restored, time.perf_counter() - begin


if __name__ == "__main__":
    command.run(main, get_args_parser())
