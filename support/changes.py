"""How much networks change pictures: whether they harm dry ones, and where an artefact may be.

    python -m support.changes DRY_PHOTOGRAPHS --every 12
    python -m support.changes RAINY_PHOTOGRAPHS --ckt_path before.pt after.pt --worst 5
    python -m support.changes rain800/training --clean_side left --half clean

For each checkpoint, over the pictures of all folders (of DID-MDN, both its parts): RGB PSNR of the output to
the input, its mean, least value and how many are above 38 dB, which on dry pictures tells the harm done. And
the largest mean change of a 16x16 block, in grey levels: its median over the pictures, and the worst pictures
by name, to look for artefacts in them.
"""

import numpy as np
from tqdm import tqdm

import dataset
from model_train import SHIPPED, load
from support import check, command, devices, images, layouts
from support.command import natural, positive
from support.errors import UserError
from support.fast import for_inference, keep_freed_memory
from support.metrics import BLOCK, psnr, worst_block
from support.restore import MAYBE_OUT_OF_MEMORY, NotFinite, is_out_of_memory, restore

UNHARMED = 38  # dB


def get_args_parser():
    parser = command.Parser(
        prog="python -m support.changes", description="How much networks change pictures."
    )
    parser.add_argument("folders", nargs="+", metavar="PATH", help="folders or files, in any known layout")
    parser.add_argument(
        "--ckt_path", nargs="+", default=[SHIPPED], metavar="CKPT", help="checkpoints (default: what ships)"
    )
    parser.add_argument("--clean_side", choices=layouts.SIDES, help="the clean half of side-by-side files")
    parser.add_argument(
        "--half",
        choices=("rainy", "clean"),
        default="rainy",
        help="which one of a pair (default: %(default)s)",
    )
    parser.add_argument("--every", type=positive, default=1, metavar="N", help="only each N-th scene")
    parser.add_argument(
        "--worst", type=natural, default=1, metavar="N", help="worst pictures to name (default: %(default)s)"
    )
    parser.add_argument(
        "--scale", type=command.scale, default=1.0, help="as in test_view.py (default: %(default)s)"
    )
    parser.add_argument("--device", help=devices.DEVICE_HELP)
    return parser


def main(args):
    """Print a table; returns 1 where some file could not be used."""
    keep_freed_memory()
    device = devices.pick_device(args.device)
    nets = {str(path): for_inference(load(path, device)) for path in args.ckt_path}
    scenes, unusable = [], []
    for path, side in layouts.with_sides(args.folders, [args.clean_side] if args.clean_side else []):
        for folder in check.parts(path):
            found = layouts.find(folder, side)
            scenes += found.scenes
            unusable += [f"{file}: has no partner" for file in found.unpaired]
            unusable += images.look_around(folder)[1]
            single = [scene for scene in found.scenes if scene.clean is None]
            if hint := check.single_hint(single):
                print(f"{folder}: {hint}")
    changes = {path: {} for path in nets}
    for scene in tqdm(scenes[:: args.every], unit="scene", disable=None):
        try:
            compare(scene, args, nets, device, changes, unusable)
        except UserError as error:
            count = len(scene.rainy)
            unusable.append(
                f"{error}{f'; so all {count} pictures of its scene are left out' if count > 1 else ''}"
            )
        except MAYBE_OUT_OF_MEMORY as error:
            if not is_out_of_memory(error):
                raise
            unusable.append(f"{scene.key}: too large for the memory here")

    for path, of_pictures in changes.items():
        if of_pictures:
            print(f"{path}: {len(of_pictures)} pictures")
            report(of_pictures, args.worst)
    command.tell_unusable(unusable)
    return 1 if unusable else 0


def compare(scene, args, nets, device, changes, unusable):
    """Add to {network: {picture: (PSNR, worst block)}} those of a scene; to `unusable` what is not finite."""
    for name, image in pictures_of(scene, args.half).items():
        for path, net in nets.items():
            try:
                output = restore(net, image, device, scale=args.scale)
            except NotFinite:
                unusable.append(f"{path}: its output for {name} is not finite")
                continue
            changes[path][name] = psnr(output, image), worst_block(output, image)


def pictures_of(scene, half):
    """{name: HxWx3 uint8} of a scene: its rainy images, or its clean one."""
    rainy, clean = dataset.read_scene(scene)
    if half == "clean":
        if clean is None:
            raise UserError(f"{scene.key}: has no clean half; leave --half out, or give --clean_side")
        return {str(scene.clean.path): clean}
    return dict(zip((str(half.path) for half in scene.rainy), rainy, strict=True))


def report(changes, count):
    """Print the figures of {name: (PSNR, worst block)}, and the `count` names with the worst blocks."""
    likeness, blocks = (np.array(values) for values in zip(*changes.values(), strict=True))
    changed = likeness[np.isfinite(likeness)]
    mean = changed.mean() if len(changed) else np.inf
    unchanged = len(likeness) - len(changed)
    same = f" ({unchanged} that did not change left out)" if unchanged else ""
    print(
        f"  output to input: {mean:.1f} dB{same}, at least {likeness.min():.1f}; "
        f"{(likeness > UNHARMED).sum()} of {len(likeness)} above {UNHARMED}"
    )
    print(f"  worst {BLOCK}x{BLOCK} block: {blocks.max():.1f} grey levels, median {np.median(blocks):.1f}")
    for name in sorted(changes, key=lambda name: -changes[name][1])[:count]:
        print(f"    {changes[name][1]:5.1f} {name}")


if __name__ == "__main__":
    command.run(main, get_args_parser())
