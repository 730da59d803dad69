"""Speed and memory of what the scripts run, as ratios to the plainest form of the same networks.

    python -m support.benchmark                                    # every row; minutes on two CPU cores
    python -m support.benchmark --rows weight_step training_step --device cuda
    python -m support.benchmark --rows training_step loader --data datasets/Rain1200 --workers 8
    python -m support.benchmark --amp                              # each row in half precision too
    python -m support.benchmark --rows weight_step --compile       # and with --compile, which takes minutes
    python -m support.benchmark --rows operations --amp            # are the operations' gradients right here?
    python -m support.benchmark --json > rows.json

The plain form is eager, contiguous and float32; each candidate of a mixed edge is evaluated by itself, `none`
as zeros. The offered form is what the scripts run: on CUDA first-order steps as graphs (`support.graphs`),
for pictures `support.fast.for_inference`. Both have the same weights. Before they are timed, their outputs
and gradients are compared twice, see `Row.allowed`; the exit status is 1 where they differ by more. Then they
take turns, so that a busy machine slows both alike, and the medians count.

The columns: milliseconds of a step, optimizer included, or of a picture; their ratio; rainy images a second,
counting one batch a step (`weight_and_arch_step` takes a second one, for alpha and beta, from its own
loader); peak memory above what the networks and optimizers hold between steps, which on CUDA is allocated
tensors (for a graph, while it is recorded), on Linux the resident set; with --compile the seconds of the
first step, which compiles; the errors. The loader is timed alone, `ms` being a batch, on files that the
system keeps in memory: `loader` decodes; `loader_cached` reads what --cache keeps, and decoding is its plain
form. `operations` runs each building block of `KINDS` by itself, forward and backward, one after the other;
its error is the largest of any output or gradient.

The scripts also keep freed memory (`support.fast.keep_freed_memory`), which a process cannot undo. What that
gains on a CPU is measured separately, in rows that begin with `kept_`: the offered form in two processes, one
of which keeps it. Rows that begin with `whole_` are the speed of a script: the plain form in a process that
does not keep it, against the offered form in one that does; they are compared like the others.
"""

import argparse
import contextlib
import copy
import ctypes
import json
import math
import multiprocessing
import re
import statistics
import sys
import tempfile
import time
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import skimage
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

import dataset
import train_model_batch
import train_search_batch
from architect import Architect
from genotypes import BRANCHES, CELLS, EDGES, MODULES, MODULES_PER_CELL, PRIMITIVES, Genotype
from losses import multi_to_one
from model_search import MixedOperation, SearchNetwork
from model_train import DerainNetwork
from operations import MULTI_SCALE, OPERATIONS, AttentionModule, Bottleneck, Head, Transition
from support import command, devices, layouts
from support.cache import open_cache
from support.command import positive
from support.errors import UserError
from support.fast import (
    Compiled,
    compile_edges,
    compile_network,
    for_inference,
    keep_freed_memory,
    no_compiler,
)
from support.graphs import Backward
from support.health import WEAK
from support.metrics import for_json
from support.rain import write_scenes
from support.restore import forwards

SEARCH_STEPS = {
    "weight_step": {"weights": True},
    "arch_step": {"architecture": True},
    "arch_step_unrolled": {"architecture": True, "unrolled": True},
    "weight_and_arch_step": {"weights": True, "architecture": True},
}
PICTURES = {"inference_256": (256, 256), "inference_512": (512, 512), "inference_1080p": (1080, 1920)}
LOADERS = ("loader", "loader_cached")
KEPT, WHOLE = "kept_", "whole_"
SCRIPT_STEPS = ("weight_and_arch_step", "training_step", "inference_512")
SCRIPT_ROWS = [kind + name for kind in (KEPT, WHOLE) for name in SCRIPT_STEPS]
ROWS = (*SEARCH_STEPS, "training_step", *PICTURES, "operations", *SCRIPT_ROWS, *LOADERS)
SCENE_IMAGES = 3  # rainy images a scene
LOADER_SECONDS = 4
PATIENCE = 30  # seconds of a row's turns, where --repeats does not say how many
# In scikit-image's wheel. At 512x512 and with rain, their files are as large as DID-MDN's.
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")


class Row(NamedTuple):
    """What is timed: a step, a picture, the operations or a loader. processes: "kept_" or "whole_" where two
    processes take turns, as said above, else "". half: with --amp. compiled: with --compile.
    """

    what: str
    processes: str = ""
    half: bool = False
    compiled: bool = False

    @classmethod
    def named(cls, name):
        """The row that --rows calls so."""
        processes = next((kind for kind in (KEPT, WHOLE) if name.startswith(kind)), "")
        return cls(name.removeprefix(processes), processes)

    @property
    def name(self):
        return f"{self.processes}{self.what}{'_amp' * self.half}{'_compile' * self.compiled}"

    def has_half(self):
        return self.what not in LOADERS and self.processes != KEPT

    def has_compiled(self):
        return self.has_half() and self.what != "operations"

    @property
    def allowed(self):
        """The largest relative errors allowed, by field.

        "float64", on a small batch, tensor by tensor, tells whether the forms are the same function. "error",
        in the precision and size that are timed, all gradients as one vector, tells whether a kernel goes
        wrong. In float32 it is not 0: rounding switches some ReLUs, the more as PyTorch's BatchNorm on a CPU
        sums naively in channels last.

        In half precision an untrained network amplifies rounding. On noise a picture is off by 0.14, in the
        plain form too, but by 0.0014 with a trained network; a step's gradients by 0.64, whatever the format.
        A gradient unrelated to the plain one, or made zero by clipping an infinite norm, is off by 1 or more.
        Single operations were off by 0.006 on a CPU, by 0.2 in bfloat16; a wrong sign is 2, noise 1.4. A
        cache's batches must be equal.
        """
        if self.what == "operations":
            error = 0.4 if self.half else 0.05
        elif self.what in PICTURES:
            error = 0.2 if self.half else 1e-4
        elif self.what in LOADERS:
            error = 0.0
        else:
            error = 0.9 if self.half else 0.2
        return {"float64": 1e-6, "error": error}


# Field of a row: title and format in the table.
COLUMNS = {
    "name": ("row", "<32s"),
    "device": ("device", "<6s"),
    "plain_ms": ("plain ms", ">9.1f"),
    "ms": ("ms", ">9.1f"),
    "ratio": ("ratio", ">5.2f"),
    "images_per_second": ("images/s", ">8.2f"),
    "plain_mb": ("plain MB", ">8.0f"),
    "mb": ("MB", ">8.0f"),
    "compile_s": ("compile s", ">9.0f"),
    "error": ("error", ">7.0e"),
    "float64": ("float64", ">7.0e"),
}


def get_args_parser():
    parser = command.Parser(
        prog="python -m support.benchmark", description="Speed and memory against the plainest form."
    )
    names = ", ".join(ROWS)
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=ROWS, metavar="ROW", help=f"what to time: {names}"
    )
    parser.add_argument("--device", help=devices.DEVICE_HELP)
    parser.add_argument(
        "--channels",
        type=command.even,
        nargs=4,
        metavar="C",
        help="widths (default: the scripts'; on a CPU half of them)",
    )
    parser.add_argument(
        "--batch_size", type=positive, help="scenes a step (default: the scripts'; on a CPU 4)"
    )
    parser.add_argument("--patch_size", type=command.patch, help="pixels a side (default: the scripts')")
    parser.add_argument(
        "--repeats",
        type=positive,
        help=f"turns of each form (default: 20, on a CPU 3, fewer where they take over {PATIENCE} s; rows "
        f"{KEPT}... and {WHOLE}...: 5)",
    )
    parser.add_argument(
        "--amp", action="store_true", help="measure each row once more, with the scripts' --amp"
    )
    parser.add_argument(
        "--compile", action="store_true", help="measure each row once more, with the scripts' --compile"
    )
    parser.add_argument("--threads", type=positive, help="threads of the CPU (default: PyTorch's choice)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON and nothing else")
    loader = parser.add_argument_group("loader")
    loader.add_argument(
        "--data",
        nargs="+",
        metavar="DIR",
        help="training folders (default: scenes made here, of DID-MDN's size)",
    )
    loader.add_argument(
        "--clean_side", nargs="+", default=[], choices=layouts.SIDES, help="as in training, for --data"
    )
    loader.add_argument(
        "--cache",
        default="",
        metavar="DIR",
        help="where loader_cached has its file (default: in the training folder)",
    )
    workers = train_model_batch.get_args_parser().get_default("workers")
    loader.add_argument(
        "--workers", type=command.workers, default=workers, help="loader processes (default: the scripts')"
    )
    return parser


def main(args):
    device = devices.pick_device(args.device)
    if args.compile and (why_not := no_compiler(device)):
        raise UserError(f"--compile: {why_not}")
    if args.data:  # before an hour of other rows
        dataset.find_training(args.data, args.clean_side)
    if args.threads:
        torch.set_num_threads(args.threads)
    search = script_options(train_search_batch, args, device)
    training = script_options(train_model_batch, args, device)
    where = {
        "machine": devices.device_name(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if not args.json:
        print(", ".join(f"{name}: {value}" for name, value in where.items()))
        width = " ".join(map(str, training.channels))
        print(f"channels {width}, patches of {search.patch_size}, scenes of {SCENE_IMAGES} images, ", end="")
        print(f"{search.batch_size} scenes a step in the search, {training.batch_size} in the training\n")
        print(" ".join(f"{title:{width_of(spec)}}" for title, spec in COLUMNS.values()), flush=True)

    rows = [Row.named(name) for name in dict.fromkeys(args.rows)]
    if args.amp:
        rows += [row._replace(half=True) for row in rows if row.has_half()]
    if args.compile:
        rows += [row._replace(compiled=True) for row in rows if row.has_compiled()]
    measured = {}
    for row in rows:
        if row.what in LOADERS:
            figures = time_loader(args, training, device, cached=row.what == "loader_cached")
        else:
            options = copy.copy(search if row.what in SEARCH_STEPS else training)
            options.amp, options.compile = row.half, row.compiled
            figures = measure_row(row, options, device, args.repeats)
        named = {"name": row.name, "device": device.type, **where}
        measured[row.name] = {**dict.fromkeys(COLUMNS), **figures, **named}
        if not args.json:
            print(table_line(measured[row.name]), flush=True)

    if args.json:
        print(json.dumps([*map(for_json, measured.values())], indent=1))
    else:
        conclude(measured, args.workers)
    wrong = [row.name for row in rows if differs(measured[row.name], row.allowed)]
    if wrong:
        sys.exit(f"outputs or gradients differ from the plain form's: {', '.join(wrong)}")


def measure_row(row, options, device, repeats):
    if row.what == "operations":
        return measure_operations(options, device, repeats)
    if row.processes:
        return measure_scripts(row.what, options, device, repeats, plain=row.processes == WHOLE)
    return measure(row.what, options, device, repeats)


def script_options(script, args, device):
    """A training script's default options, with the sizes that this run wants."""
    options = script.get_args_parser().parse_args([])
    small = device.type == "cpu"
    options.channels = args.channels or [c // 2 if small else c for c in options.channels]
    options.batch_size = args.batch_size or (4 if small else options.batch_size)
    options.patch_size = args.patch_size or options.patch_size
    options.amp = options.compile = False
    return options


# --- two forms of one network -------------------------------------------------------------------------------


def plain_form(net):
    """A copy of `net` in its plainest form: contiguous, each candidate of an edge evaluated by itself."""
    net = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
    for module in net.modules():
        if isinstance(module, MixedOperation):
            module.forward = partial(plain_mixture, module.operations.values())
    return net


def plain_mixture(operations, x, beta):
    """sum over all operations o of beta_o * o(x), `none` included: NxcxHxW -> NxcxHxW."""
    return sum(b * operation(x) for b, operation in zip(beta, operations, strict=True))


def offered_form(net):
    """A copy of `net` in the form that the scripts run: channels last."""
    return copy.deepcopy(net).to(memory_format=torch.channels_last)


# Makers, by channels: the operations that compute something, and the other building blocks.
KINDS = {
    **{name: OPERATIONS[name] for name in PRIMITIVES if name not in WEAK},
    "mixed": MixedOperation,
    "attention": lambda c: AttentionModule(
        c, [OPERATIONS[n](c // 2) for n in ("dil_conv_3x3", "CBAM", "SE")]
    ),
    "bottleneck": lambda c: Bottleneck(c, c // 2, 2 * c),
    "transition": lambda c: Transition([c], [c // 2, c]),
    "head": lambda c: Head([c, c]),
    **{name: lambda c, name=name: MULTI_SCALE[name]([c, c]) for name in MODULES},
}


# --- the steps of a row: functions without arguments that return (outputs, gradients), lists of tensors -----


def steps(name, options, device, dtype=torch.float32, picture_size=None):
    """(plain step, offered step) of a row, from the same random weights and input; picture_size: (H, W) in
    place of the row's own.
    """
    torch.manual_seed(0)
    picture_size = picture_size or PICTURES.get(name)
    if name in SEARCH_STEPS:
        net, step = SearchNetwork(options.channels), partial(search_step, **SEARCH_STEPS[name])
    else:
        net, step = DerainNetwork(every_operation(), options.channels), training_step
    net.to(device, dtype)
    batch, arch_batch = (random_batch(options, device, dtype) for _ in range(2))
    update_bn([batch.rainy], net)  # else signals fade from layer to layer where running statistics are used
    kind = torch.bfloat16  # of half precision
    if picture_size:
        net.eval()
        kind = None  # autocast's choice: float16 on CUDA, bfloat16 on a CPU
        batch, step = batch._replace(rainy=batch.rainy.new_ones(1, 3, *picture_size).uniform_()), inference

    def in_form(form, layout, half=False, compiled=False, recorded=False):
        first, second = (b._replace(rainy=b.rainy.to(memory_format=layout)) for b in (batch, arch_batch))
        formed = form(net)
        if compiled and picture_size:
            formed = Compiled(formed)
            formed.shapes = set(forwards(*picture_size, tile=0))
        elif compiled and name in SEARCH_STEPS:
            compile_edges(formed)
        elif compiled:
            compile_network(formed, device)
        if half:
            formed.forward = partial(in_half_precision, formed.forward, kind)
        return step(formed, first, second, options, recorded)

    offered = for_inference if picture_size else offered_form
    half = options.amp and dtype == torch.float32
    return [
        in_form(plain_form, torch.contiguous_format),
        in_form(offered, torch.channels_last, half, options.compile, recorded=device.type == "cuda"),
    ]


def in_half_precision(forward, kind, x):
    """What --amp does: the network in float16 or bfloat16, its outputs and the losses in float32."""
    with torch.autocast(x.device.type, kind):
        return forward(x).float()


def search_step(
    net, batch, arch_batch, options, recorded=False, weights=False, architecture=False, unrolled=False
):
    """The step of train_search_batch.py on the weights, on alpha and beta (unrolled or not), or on both.

    recorded: as CUDA graphs, which the script does where it can.
    """
    recorded = recorded and not unrolled
    optimizer, arch_optimizer = train_search_batch.make_optimizers(net, options)
    outputs, gradients = [], []
    for each in (optimizer, arch_optimizer):
        each.register_step_pre_hook(partial(keep_gradients, gradients))

    loss = partial(kept_loss, outputs, recorded)
    penalty = train_search_batch.make_penalty(net, options)
    architect = Architect(
        net,
        arch_optimizer,
        loss,
        penalty,
        optimizer if unrolled else None,
        hessian_parts=train_search_batch.HESSIAN_PARTS,
        recorded=recorded,
    )
    backward = Backward(net, net.weights(), loss, recorded=recorded, changed=net.buffers())
    net.train()

    def step():
        outputs.clear()
        gradients.clear()
        if architecture:
            architect.step(arch_batch, batch)
        if weights:
            backward(batch)
            nn.utils.clip_grad_norm_(net.weights(), options.grad_clip)
            optimizer.step()
        return outputs, gradients

    return step


def kept_loss(outputs, recorded, forward, batch):
    """The multi-to-one loss; the network's output is added to `outputs`, if recorded only when it is."""
    output = forward(batch.rainy)
    if not recorded or torch.cuda.is_current_stream_capturing():
        outputs.append(output.detach())
    return multi_to_one(output, batch.clean, batch.scene)


def training_step(net, batch, _, options, recorded=False):
    """The step of train_model_batch.py."""
    optimizer = train_model_batch.make_optimizer(net, options)
    outputs, gradients = [], []
    optimizer.register_step_pre_hook(partial(keep_gradients, gradients))
    loss = partial(kept_loss, outputs, recorded)
    backward = Backward(net, net.parameters(), loss, recorded=recorded, changed=net.buffers())
    net.train()

    def step():
        outputs.clear()
        gradients.clear()
        backward(batch)
        nn.utils.clip_grad_norm_(net.parameters(), options.grad_clip)
        optimizer.step()
        return outputs, gradients

    return step


def inference(net, batch, *_):
    """A picture through the network, which is in evaluation mode."""

    @torch.inference_mode()
    def step():
        output = net(batch.rainy)
        if isinstance(net, Compiled) and not net.shapes:
            raise UserError("--compile: compiling failed, as the warning says; leave it out")
        return ([output],)

    return step


def keep_gradients(kept, optimizer, *_):
    kept.extend(p.grad for group in optimizer.param_groups for p in group["params"])


def every_operation():
    """A genotype with both kinds of module, in turn, and every operation but `none` three or four times."""
    kinds, names = cycle(MODULES), cycle(name for name in PRIMITIVES if name != "none")
    return Genotype(
        tuple(tuple(islice(kinds, MODULES_PER_CELL)) for _ in range(CELLS)),
        tuple(tuple(tuple(islice(names, EDGES)) for _ in range(branches)) for branches in BRANCHES),
    )


def random_batch(options, device, dtype):
    """A dataset.Batch of noise."""
    side, scenes = options.patch_size, options.batch_size
    rainy, clean = (torch.rand(n, 3, side, side, dtype=dtype) for n in (SCENE_IMAGES * scenes, scenes))
    scene = torch.arange(scenes).repeat_interleave(SCENE_IMAGES)
    return dataset.Batch(rainy.to(device), clean.to(device), scene.to(device), [], [])


# --- measuring ----------------------------------------------------------------------------------------------


def measure(name, options, device, repeats):
    """The figures of a row: compare, warm up and time its two steps."""
    plain, offered, figures = compare(name, options, device)
    if device.type == "cuda":  # those compared were recorded without TF32
        plain, offered = steps(name, options, device)
        plain()
    mb = peak_memory(offered, device)  # of CUDA graphs as they are recorded: replayed, they allocate nothing
    plain_mb = peak_memory(plain, device)
    figures |= {"plain_mb": plain_mb, "mb": mb} | time_in_turns(plain, offered, device, repeats)
    images = 1 if name in PICTURES else SCENE_IMAGES * options.batch_size
    return figures | {"images_per_second": 1000 * images / figures["ms"]}


def compare(name, options, device):
    """(plain step, offered step, {"error", "float64", "compile_s"}) of a row; each step was taken once."""
    float64 = float64_error(name, options, device)
    plain, offered = steps(name, options, device)
    with without_tf32():
        expected = plain()
        begin = time.monotonic()
        found = offered()
        compile_s = time.monotonic() - begin if options.compile else None
        error = relative_error(expected, found, as_one=True)
    return plain, offered, {"error": error, "float64": float64, "compile_s": compile_s}


def time_in_turns(plain, offered, device, repeats):
    """{"plain_ms", "ms", "ratio"} of two steps that take turns."""
    turns, end = [], time.monotonic() + (math.inf if repeats else PATIENCE)
    repeats = repeats or (3 if device.type == "cpu" else 20)
    while len(turns) < repeats and (not turns or time.monotonic() < end):
        turns.append((milliseconds(plain, device), milliseconds(offered, device)))
    return medians(turns)


def medians(turns):
    plain_ms, ms = map(statistics.median, zip(*turns, strict=True))
    return {"plain_ms": plain_ms, "ms": ms, "ratio": plain_ms / ms}


def measure_operations(options, device, repeats):
    """The figures of `KINDS`: contiguous and float32, against channels last and, with --amp, bfloat16."""
    sizes = options.channels[0], options.patch_size, SCENE_IMAGES * options.batch_size

    def step(layout, half):
        return [gradients(kind, *sizes, layout, half, device) for kind in KINDS]

    plain = partial(step, torch.contiguous_format, False)
    offered = partial(step, torch.channels_last, options.amp)
    with without_tf32():
        error = max(map(error_in_kind, plain(), offered()))
    return {"error": error} | time_in_turns(plain, offered, device, repeats)


def gradients(kind, channels, size, images, layout, half, device, seed=0):
    """[outputs, gradients by inputs and parameters], lists of tensors, of a new module of `KINDS`. Each entry
    of an output has a random weight in the loss. All randomness comes from the seed, the same for any form.
    """
    torch.manual_seed(seed)
    module = KINDS[kind](channels).to(device, memory_format=layout)
    maps = [torch.randn(images, channels, size >> k, size >> k) for k in range(2)]
    maps = [x.to(device, memory_format=layout).requires_grad_() for x in maps]
    taken = {"transition": maps[:1], "head": maps} | dict.fromkeys(MODULES, maps)
    taken = taken.get(kind, maps[0])
    beta = [torch.linspace(0.1, 0.9, len(PRIMITIVES), device=device)] if kind == "mixed" else []
    with devices.autocast(device, half):
        outputs = module(taken, *beta)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    loss = sum((output.float() * torch.randn(output.shape).to(device)).sum() for output in outputs)
    leaves = taken if isinstance(taken, list) else [taken]
    found = torch.autograd.grad(loss, [*leaves, *module.parameters()])
    return [[output.detach() for output in outputs], found]


def error_in_kind(plain, offered):
    """The largest error of an output or gradient of `gradients`, relative to its norm, or to a twentieth of
    the norm of all where that is more: smaller ones are rounding. Infinite for what is not a number.
    """
    errors = []
    for group in zip(plain, offered, strict=True):
        ps, os = ([tensor.cpu().double() for tensor in tensors] for tensors in group)
        least = torch.stack([p.norm() for p in ps]).norm() / 20
        errors += [(o - p).norm() / torch.maximum(p.norm(), least) for p, o in zip(ps, os, strict=True)]
    return torch.stack(errors).nan_to_num(math.inf, math.inf).max().item()


def measure_scripts(name, options, device, repeats, plain):
    """The figures of a row of `SCRIPT_ROWS`: the offered step in a process that keeps freed memory, and the
    offered or plain one in a process that does not, taking turns.
    """
    errors = compare(name, options, device)[-1] if plain else {}  # first: what fails is one line here
    spawn = multiprocessing.get_context("spawn")
    processes, ends = [], []
    for keep in (False, True):
        here, there = spawn.Pipe()
        work = (there, name, options, device, keep, plain and not keep, torch.get_num_threads())
        processes.append(spawn.Process(target=serve, args=work, daemon=True))
        processes[-1].start()
        there.close()
        ends.append(here)

    def in_turn():
        for end in ends:
            end.send(True)
            yield end.recv()

    memory = list(in_turn())
    turns = [list(in_turn()) for _ in range(repeats or 5)]
    for end, process in zip(ends, processes, strict=True):
        end.send(False)
        process.join()
    return errors | medians(turns) | dict(zip(("plain_mb", "mb"), memory, strict=True))


def serve(end, name, options, device, keep, plain, threads):
    """When first asked, send the peak memory of a row's plain or offered step; from then on, its
    milliseconds, until what comes is False.
    """
    torch.set_num_threads(threads)
    devices.pick_device(str(device))  # graphs are made on the process's own GPU
    if keep:
        keep_freed_memory()
    form = 0 if plain else 1
    step = steps(name, options, device)[form]
    step()
    end.recv()
    if device.type == "cuda":  # as in `measure`: a graph that is replayed allocates nothing
        step = steps(name, options, device)[form]
    end.send(peak_memory(step, device))
    step()  # measuring that has given back what was kept
    while end.recv():
        end.send(milliseconds(step, device))


def without_tf32():
    """CUDA's convolutions round to TF32 by default, which would hide smaller mistakes."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def float64_error(name, options, device):
    """The largest relative error of any output or gradient of a row's steps, in float64 on a small input."""
    small = argparse.Namespace(**{**vars(options), "batch_size": 1, "patch_size": 16, "amp": False})
    size = (19, 34) if name in PICTURES else None
    device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    plain, offered = steps(name, small, device, torch.float64, size)
    return relative_error(plain(), offered())


def relative_error(plain, offered, as_one=False):
    """The largest |offered - plain| / |plain|, in L2 norms, of any output or gradient; NaN where one has it.

    plain, offered: what a step returns. as_one: of all outputs, and of all gradients, each as one vector.
    The error of a tensor under a millionth of the mean size is relative to that millionth: gradients that are
    zero but for rounding, such as of a weight whose scale a BatchNorm takes out, have no relative error of
    their own.
    """
    errors = []
    for group in zip(plain, offered, strict=True):
        ps, os = ([tensor.cpu().double().flatten() for tensor in tensors] for tensors in group)
        if as_one:
            ps, os = [torch.cat(ps)], [torch.cat(os)]
        mean = torch.cat(ps).square().mean().sqrt()
        for p, o in zip(ps, os, strict=True):
            errors.append((o - p).norm() / torch.maximum(p.norm(), 1e-6 * mean * len(p) ** 0.5))
    return torch.stack(errors).max().item()  # PyTorch's max, unlike Python's, keeps what is not a number


def milliseconds(step, device):
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(device)
        begin.record(stream)
        step()
        end.record(stream)
        end.synchronize()
        return begin.elapsed_time(end)
    begin = time.perf_counter()
    step()
    if device.type == "mps":
        torch.mps.synchronize()
    return 1000 * (time.perf_counter() - begin)


def peak_memory(step, device):
    """Megabytes at the peak of a step, above those before it; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    before = None
    if device.type == "cpu" and sys.platform == "linux":
        try:
            # What the allocator keeps of earlier steps would hide the growth.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the resident set's height, from now on
            before = resident("VmRSS")
        except (AttributeError, OSError):  # another C library; a system that forbids it
            pass
    step()
    return None if before is None else resident("VmHWM") - before


def resident(entry):
    """An entry of Linux's /proc/self/status, in megabytes."""
    return int(re.search(rf"{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6


def time_loader(args, options, device, cached):
    """The row of `dataset.batches` alone: milliseconds of a batch, scenes and rainy images a second.

    cached: decoding and the cache take turns, and their batches are compared; else decoding alone.
    """
    with tempfile.TemporaryDirectory() as made:
        if args.data is None:
            photographs = [Path(skimage.__file__).parent / "data" / name for name in PHOTOGRAPHS]
            write_scenes(photographs, made, size=512)
        folders = args.data or [made]
        scenes = dataset.find_training(folders, args.clean_side)
        load = partial(dataset.batches, scenes, options.patch_size, options.batch_size, seed=0, device=device)
        if not cached:
            return loader_speed(load(workers=args.workers), args.workers, options.batch_size)
        with contextlib.redirect_stdout(sys.stderr):  # its notices; here is the table
            cache = open_cache(scenes, folders, args.cache)
        error = max(
            relative_error([ours.tensors[:2]], [theirs.tensors[:2]])
            for _, ours, theirs in zip(range(3), load(), load(cache=cache), strict=False)
        )
        turns = [
            loader_speed(load(workers=args.workers, cache=which), args.workers, options.batch_size)
            for which in 2 * (None, cache)
        ]
    plain, ours = (
        {key: (a[key] + b[key]) / 2 for key in a} for a, b in zip(turns[:2], turns[2:], strict=True)
    )
    return ours | {"plain_ms": plain["ms"], "ratio": plain["ms"] / ours["ms"], "error": error}


def loader_speed(batches, workers, batch_size):
    for _ in range(1 + 2 * workers):  # the processes start, and have two batches each ready by then
        next(batches)
    images = count = seconds = 0
    begin = time.perf_counter()
    while seconds < LOADER_SECONDS:
        images += len(next(batches).rainy)
        count += 1
        seconds = time.perf_counter() - begin
    batches.close()
    return {
        "ms": 1000 * seconds / count,
        "images_per_second": images / seconds,
        "scenes_per_second": count * batch_size / seconds,
    }


# --- what is said -------------------------------------------------------------------------------------------


def differs(figures, allowed):
    """Whether a row's forms differ by more than is allowed, or in what is not a number."""
    return any(figures[kind] is not None and not figures[kind] <= allowed[kind] for kind in allowed)


def table_line(row):
    return " ".join(
        f"{'-':{width_of(spec)}}" if row[field] is None else f"{row[field]:{spec}}"
        for field, (_, spec) in COLUMNS.items()
    )


def width_of(spec):
    return re.match(r"[<>]\d+", spec)[0]


def conclude(rows, workers):
    """Print what the rows say together: the price of unrolling, and whether a run waits for its loader."""
    print()
    if {"arch_step", "arch_step_unrolled"} <= rows.keys():
        first, unrolled = rows["arch_step"], rows["arch_step_unrolled"]
        ratio, plain = unrolled["ms"] / first["ms"], unrolled["plain_ms"] / first["plain_ms"]
        print(f"unrolled : first order = {ratio:.2f} (plain {plain:.2f})", end="")
        print(f", in memory {unrolled['mb'] / first['mb']:.2f}" if first["mb"] else "")
    for loader in [name for name in LOADERS if name in rows]:
        loaded = rows[loader]["scenes_per_second"]
        how = f", {rows[loader]['ratio']:.1f} times those of decoding," if loader == "loader_cached" else ""
        print(f"the {loader} alone gives {loaded:.1f} scenes a second{how} with --workers {workers}")
        steps = ("weight_step", "weight_and_arch_step", "training_step")
        for name in [step for step in steps if step in rows]:
            eaten = rows[name]["images_per_second"] / SCENE_IMAGES
            slower = "loader" if loaded < eaten else "step"
            print(f"  {name} uses {eaten:.1f} scenes a second: a run waits for the {slower}")


if __name__ == "__main__":
    command.run(main, get_args_parser())
