"""Speed and memory of what the scripts do, as ratios against the plainest form of the same networks.

    python -m support.benchmark                                    # every row; minutes on two CPU cores
    python -m support.benchmark --rows weight_step training_step --device cuda
    python -m support.benchmark --rows training_step loader --data datasets/Rain1200 --workers 8
    python -m support.benchmark --json > rows.json

Plain is: eager, contiguous, float32, each candidate of a mixed edge evaluated by itself, `none` as zeros. Offered
is what the scripts run. Both start from the same weights; before anything is timed, one step of each is compared
in its outputs and its gradients. Then plain and offered take turns, so that a busy machine slows both alike, and
each gets the median of its turns. The time of a step includes the optimizer's, but not the batch's way to the
device. The loader is timed by itself, on pictures that the system has in memory.

The exit status is 1 where outputs or gradients differ by more than the tolerance.
"""

import argparse
import copy
import ctypes
import json
import math
import platform
import re
import statistics
import sys
import tempfile
import time
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import skimage
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

import dataset
import train_model_batch
import train_search_batch
from architect import Architect
from genotypes import BRANCHES, CELLS, EDGES, MODULES, MODULES_PER_CELL, PRIMITIVES, Genotype
from losses import architecture_regulariser, choice_sizes, complexity, multi_to_one
from model_search import MixedOperation, SearchNetwork
from model_train import DerainNetwork
from support import experiment
from support.experiment import natural, positive
from support.rain import write_scenes

DENSITIES = 3  # rainy images a scene
TOLERANCE = 1e-3  # see relative_error; float32 against float32 measures 1e-6 to 2e-4
SEARCH_ROWS = {
    "weight_step": {"weights": True},
    "arch_step": {"architecture": True},
    "arch_step_unrolled": {"architecture": True, "unrolled": True},
    "weight_and_arch_step": {"weights": True, "architecture": True},
}
PICTURES = {"inference_256": (256, 256), "inference_512": (512, 512), "inference_1080p": (1080, 1920)}
ROWS = (*SEARCH_ROWS, "training_step", *PICTURES, "loader")
LOADER_SECONDS = 4
# Photographs in scikit-image's wheel; with rain at 512x512 they make files as large as DID-MDN's.
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "retina.jpg")


def get_args_parser():
    parser = argparse.ArgumentParser(
        prog="python -m support.benchmark", description="Speed and memory against the plainest form."
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--device", help="cpu, cuda, cuda:1 or mps (default: the best there is)")
    parser.add_argument(
        "--channels", type=positive, nargs=4, metavar="C", help="(default: the scripts'; on a CPU half of it)"
    )
    parser.add_argument(
        "--batch_size", type=positive, help="scenes of 3 images (default: the scripts'; on a CPU 4)"
    )
    parser.add_argument("--patch_size", type=positive, default=64, help="pixels a side (default: 64)")
    parser.add_argument("--repeats", type=positive, help="turns of each form (default: 20; on a CPU 3)")
    parser.add_argument("--threads", type=positive, help="of the CPU (default: PyTorch's choice)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON, and nothing else")
    loader = parser.add_argument_group("loader")
    loader.add_argument(
        "--data", nargs="+", metavar="DIR", help="training folders (default: a set made in DID-MDN's sizes)"
    )
    loader.add_argument("--clean_side", nargs="+", default=[], choices=dataset.SIDES)
    loader.add_argument("--workers", type=natural, default=experiment.default_workers() if hasattr(experiment, "default_workers") else 2)
    return parser


# --- two forms of one network --------------------------------------------------------------------------------


def offered_form(net):
    """A copy of `net` in the form that the scripts run: channels last."""
    return copy.deepcopy(net).to(memory_format=torch.channels_last)


def plain_form(net):
    """A copy of `net` in its plainest form: contiguous, each candidate of an edge evaluated by itself."""
    net = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
    for module in net.modules():
        if isinstance(module, MixedOperation):
            module.forward = partial(plain_mixture, module.operations.values())
    return net


def plain_mixture(operations, x, beta):
    """sum over all operations o of beta_o * o(x), `none` included."""
    return sum(b * operation(x) for b, operation in zip(beta, operations, strict=True))


def relative_error(plain, offered):
    """The largest |offered - plain| / |plain| over pairs of tensors, in L2 norms; not a number where one is not.

    A tensor far smaller than the others counts against a thousandth of their mean size: gradients that are zero
    but for rounding (a weight before a BatchNorm that undoes its scale) have no relative error of their own.
    """
    plain, offered = ([tensor.double() for tensor in tensors] for tensors in (plain, offered))
    mean_square = sum(p.square().sum() for p in plain) / sum(p.numel() for p in plain)
    errors = [
        (o - p).norm() / torch.maximum(p.norm(), 1e-3 * (mean_square * p.numel()).sqrt())
        for p, o in zip(plain, offered, strict=True)
    ]
    return torch.stack(errors).max().item()  # torch's max, unlike Python's, keeps what is not a number


# --- the steps of the scripts --------------------------------------------------------------------------------


class Steps:
    """One form of a network and the step that is timed.

    Calling it takes the step and returns what came of it, to be compared: (outputs, gradients), lists of tensors.
    """
