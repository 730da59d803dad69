"""The fixed network of a genotype: only what was chosen exists. Saving and loading its checkpoints."""

import io
import os
import shutil
import warnings
from pathlib import Path

import torch
from torch import nn

import genotypes
from genotypes import BRANCHES
from operations import (
    MULTI_SCALE,
    NODES,
    OPERATIONS,
    AttentionModule,
    Head,
    check_channels,
    pad_to_multiple,
    stem,
    transitions,
)

FORMAT = "manas-network-1"
MAX_CHANNELS = 4096  # a checkpoint that claims wider branches is refused before anything is allocated


class CheckpointError(ValueError):
    """A file that is not a usable checkpoint: a mistake that one line explains."""


class Cell(nn.Module):
    """Four multi-scale modules in sequence, then one attention module a branch.

    channels: of the branches, finest first; kinds: four names of modules; edges: three operation names a
        branch.
    """

    def __init__(self, channels, kinds, edges):
        super().__init__()
        self.multi_scale = nn.ModuleList(MULTI_SCALE[kind](channels) for kind in kinds)
        self.attention = nn.ModuleList(
            AttentionModule(c, [OPERATIONS[name](c // NODES) for name in names])
            for c, names in zip(channels, edges, strict=True)
        )

    def forward(self, xs):
        for module in self.multi_scale:
            xs = module(xs)
        return [attention(x) for attention, x in zip(self.attention, xs, strict=True)]


class DerainNetwork(nn.Module):
    """The fixed network: Nx3xHxW in [0, 1] -> Nx3xHxW, not clamped; any H and W.

    genotype: a `genotypes.Genotype`, checked here (GenotypeError).
    channels: widths of the branches at scales 1, 1/2, 1/4, 1/8, four even numbers.
    residual: learn the difference to the input instead of the output (not in the paper).
    """

    def __init__(self, genotype, channels=(32, 64, 128, 256), residual=False):
        super().__init__()
        self.genotype = genotypes.check(genotype)
        self.channels = check_channels(channels)
        self.residual = bool(residual)
        self.stem = stem(self.channels[0])
        self.transitions = transitions(self.channels)
        self.cells = nn.ModuleList(
            Cell(self.channels[:branches], kinds, edges)
            for branches, kinds, edges in zip(
                BRANCHES, self.genotype.modules, self.genotype.attention, strict=True
            )
        )
        self.head = Head(self.channels)

    def forward(self, x):
        height, width = x.shape[-2:]
        padded = pad_to_multiple(x)
        xs = [self.stem(padded)]
        for transition, cell in zip(self.transitions, self.cells, strict=True):
            xs = cell(transition(xs))
        output = self.head(xs)
        if self.residual:
            output = output + padded
        return output[..., :height, :width]


def from_supernet(net, genotype=None):
    """The fixed network of a genotype (default: the supernet's), with copies of the supernet's weights."""
    genotype = genotype or net.genotype()
    fixed = DerainNetwork(genotype, net.channels, net.residual)
    chosen = fixed.state_dict()
    kinds = [kind for cell in genotype.modules for kind in cell]
    edges = [name for cell in genotype.attention for branch in cell for name in branch]
    modules = [
        choices[genotypes.MODULES.index(k)] for choices, k in zip(net.module_choices(), kinds, strict=True)
    ]
    operations = [
        choices[genotypes.PRIMITIVES.index(n)]
        for choices, n in zip(net.operation_choices(), edges, strict=True)
    ]
    shared = net.state_dict()
    for name in chosen:
        if name in shared:
            chosen[name] = shared[name]
    fixed.load_state_dict(chosen)
    fixed_modules = [module for cell in fixed.cells for module in cell.multi_scale]
    fixed_edges = [edge for cell in fixed.cells for attention in cell.attention for edge in attention.edges]
    for target, source in zip([*fixed_modules, *fixed_edges], [*modules, *operations], strict=True):
        target.load_state_dict(source.state_dict())
    return fixed.to(net.alpha.device)


def checkpoint(net):
    """All that `restore` needs to build the network again, as plain tensors, numbers and strings."""
    return {
        "format": FORMAT,
        "genotype": {name: [list(cell) for cell in value] for name, value in net.genotype._asdict().items()},
        "channels": list(net.channels),
        "residual": net.residual,
        "weights": {name: tensor.detach().cpu() for name, tensor in net.state_dict().items()},
    }


def save(net, path):
    """Write the network to `path`, to be read by `load`."""
    write_whole(checkpoint(net), path)


def write_whole(payload, path, previous=None):
    """torch.save to a temporary file, synced and then renamed: what is at `path` is whole at every instant.

    previous: where to keep the file that was at `path`. Raises CheckpointError, one line with the bytes that
    are needed and free, where the file cannot be written; what was at `path` is still there then.
    """
    path = Path(path)
    content = io.BytesIO()  # so that its size is known before the disk is touched
    torch.save(payload, content)
    try:
        _write_and_rename(content.getbuffer(), path, previous)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        raise CheckpointError(
            f"{path}: cannot be written: {error.strerror}; {content.tell():,} bytes are needed, {free:,} free"
        ) from None


def _write_and_rename(content, path, previous):
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            _keep(path, previous)
        os.replace(temporary, path)
    finally:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)


def _keep(path, previous):
    """Let `previous` be the file at `path` too: there is one at `path` at every instant."""
    link = path.with_name(f".{path.name}.{os.getpid()}.link")
    try:
        os.link(path, link)
    except OSError:  # a file system without hard links: for an instant there is the one before only
        os.replace(path, previous)
        return
    os.replace(link, previous)
    link.unlink(missing_ok=True)  # it stays where both were one file already


def load(path, device="cpu"):
    """The network saved at `path`, in evaluation mode on `device`, ready to run.

    Nothing in the file is executed (`weights_only=True`). Raises CheckpointError, one line naming the file,
    on anything that is not such a checkpoint.
    """
    return restore(read(path), path).to(device).eval()


def read(path):
    """The dictionary in a file of torch.save, tensors on the CPU; CheckpointError if there is none."""
    if not os.path.exists(path):
        raise CheckpointError(f"{path}: no such checkpoint")
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: not a file; a checkpoint is one file, such as best_psnr.pt")
    try:
        with warnings.catch_warnings(action="ignore"):  # about kinds of files that are refused anyway
            payload = torch.load(path, map_location="cpu", weights_only=True)
    # torch.load documents no closed list of errors: a damaged file raises UnpicklingError, RuntimeError,
    # EOFError, KeyError, OverflowError and more, and each of them means the same to the user.
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be read as a checkpoint ({type(error).__name__}): it is damaged, another "
            "kind of file, or holds more than plain tensors, numbers and text"
        ) from None
    if not isinstance(payload, dict):
        raise CheckpointError(f"{path}: holds a {type(payload).__name__}, not a checkpoint of this project")
    return payload


def restore(payload, path="checkpoint"):
    """The DerainNetwork described by a dictionary of `checkpoint`; CheckpointError, naming `path`, if it is
    none.
    """
    if payload.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: not a checkpoint of a derain network (format {payload.get('format')!r})"
        )
    try:
        genotype = genotypes.check(payload.get("genotype"))
    except genotypes.GenotypeError as error:
        raise CheckpointError(f"{path}: {error}") from None
    channels, weights = payload.get("channels"), payload.get("weights")
    if not (
        isinstance(channels, list)
        and len(channels) == 4
        and all(type(c) is int and 2 <= c <= MAX_CHANNELS and c % NODES == 0 for c in channels)
    ):
        raise CheckpointError(f"{path}: channels {channels!r} are not four even numbers up to {MAX_CHANNELS}")
    if not isinstance(weights, dict) or not all(isinstance(w, torch.Tensor) for w in weights.values()):
        raise CheckpointError(f"{path}: holds no weights")

    with torch.device("meta"):  # shapes first: nothing is allocated for a file whose tensors do not fit
        net = DerainNetwork(genotype, channels, payload.get("residual") is True)
    _check_weights(net.state_dict(), weights, path)
    net = net.to_empty(device="cpu")
    net.load_state_dict(weights)
    return net


def _check_weights(expected, weights, path):
    problems = [f"{name} is missing" for name in expected.keys() - weights.keys()]
    problems += [f"{name} is not part of it" for name in weights.keys() - expected.keys()]
    for name in expected.keys() & weights.keys():
        if weights[name].shape != expected[name].shape:
            problems.append(f"{name} is {list(weights[name].shape)}, not {list(expected[name].shape)}")
        elif not torch.isfinite(weights[name]).all():
            problems.append(f"{name} has values that are not finite")
    if problems:
        shown = "; ".join(sorted(problems)[:3]) + (
            f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        )
        raise CheckpointError(f"{path}: the weights do not fit the network it describes: {shown}")
