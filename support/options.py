"""The flags that both training scripts share, and which of them may differ when a run is resumed."""

import os

from support import distributed, layouts
from support.command import above_zero, even, natural, positive, seed, share, workers
from support.devices import DEVICE_HELP

DEFAULT_DATA, DEMO_DATA = "datasets/Rain1200", "datasets/demo"
MOST_BAD = 0.01  # of the files; more than that is no matter of a few damaged ones
MACHINE_OPTIONS = {"workers", "device", "compile", "no_graphs"}  # not remembered: another machine has its own
# What may differ when a run is resumed: it changes where, when and how long the run computes, not what.
FREE_OPTIONS = MACHINE_OPTIONS | {
    "resume",
    "save",
    "name",
    "save_every",
    "max_minutes",
    "max_bad_steps",
    "allow_bad",
    "cache",
    "accumulate",  # so may the number of processes: how a batch is divided matters to BatchNorm alone
}


def add_network_arguments(group):
    """Into a script's own group: the network's size and form, and what it is shown, the same for both."""
    group.add_argument(
        "--channels",
        type=even,
        nargs=4,
        default=[32, 64, 128, 256],
        metavar="C",
        help="widths at scales 1 to 1/8 (default: 32 64 128 256)",
    )
    group.add_argument("--residual", action="store_true", help="learn the difference to the input")
    group.add_argument(
        "--clean_inputs",
        type=share,
        default=0.0,
        help="share of draws in which the clean image takes the place of a rainy one (default: 0)",
    )
    group.add_argument(
        "--upright",
        action="store_true",
        help="flip patches but give them no quarter turns, so that rain stays upright",
    )
    group.add_argument(
        "--internal_start",
        type=positive,
        default=6,
        help="first epoch of the internal loss (default: %(default)s)",
    )


def add_arguments(parser):
    """The flags that both training scripts share."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        action="extend",
        nargs="+",
        metavar="DIR",
        help=f"training folders; several are mixed (default: {DEFAULT_DATA}, else the demo)",
    )
    data.add_argument(
        "--clean_side",
        action="extend",
        nargs="+",
        default=[],
        choices=layouts.SIDES,
        help=layouts.SIDE_HELP,
    )
    data.add_argument("--demo", action="store_true", help="a small run on photographs at hand; no download")
    data.add_argument(
        "--split_seed", type=int, default=0, help="seed of the split into parts (default: %(default)s)"
    )
    data.add_argument(
        "--val_scenes",
        type=natural,
        default=50,
        help="validation scenes to score after each epoch, evenly spread; 0: all (default: %(default)s)",
    )
    cores = os.cpu_count() or 2
    data.add_argument(
        "--workers",
        type=workers,
        default=min(8, max(1, cores // 2 // distributed.local_size())),
        help="loader processes; 0: load in the main one (default: half the cores, at most 8). Under "
        "torchrun: per process (default: its share of these)",
    )
    data.add_argument(
        "--cache",
        nargs="?",
        const="",
        metavar="DIR",
        help="decode pictures once, into a file in each data folder or in DIR (12.6 GB for DID-MDN); the "
        "batches stay the same",
    )
    run = parser.add_argument_group("run")
    run.add_argument("--save", metavar="DIR", help="folder of the run (default: named by the time)")
    run.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="DIR",
        help="continue the run in DIR (default: --save, else the newest) with its own options",
    )
    run.add_argument(
        "--seed", type=seed, default=0, help="seed of weights, crops and flips (default: %(default)s)"
    )
    run.add_argument("--device", help=DEVICE_HELP)
    run.add_argument(
        "--amp",
        action="store_true",
        help="compute the network in bfloat16 (autocast); weights and losses stay float32",
    )
    run.add_argument(
        "--accumulate",
        type=positive,
        default=1,
        metavar="K",
        help="sum the gradients of K equal parts of a batch: takes less memory, but BatchNorm sees one part "
        "at a time (default: %(default)s)",
    )
    run.add_argument(
        "--sync_bn",
        action="store_true",
        help="under torchrun: BatchNorm over the shares of all GPUs together, not over each by itself",
    )
    run.add_argument(
        "--deterministic",
        action="store_true",
        help="use CUDA kernels that give the same bits each time, where they exist; slower",
    )
    run.add_argument(
        "--no_graphs",
        action="store_true",
        help="CUDA: launch each kernel by itself (default: steps are recorded and replayed as CUDA graphs)",
    )
    run.add_argument(
        "--max_minutes",
        type=above_zero,
        help="minutes for all steps, and so for the cosine schedule; the last scoring comes on top",
    )
    run.add_argument(
        "--save_every", type=above_zero, default=10, help="minutes between checkpoints (default: %(default)s)"
    )
    run.add_argument(
        "--max_bad_steps",
        type=positive,
        default=20,
        metavar="N",
        help="stop after N steps in a row whose loss or gradient is not finite (default: %(default)s)",
    )
    run.add_argument(
        "--allow_bad",
        action="store_true",
        help=f"go on when more than {MOST_BAD:.0%}% of the files turn out to be unreadable",  # argparse's %%
    )
