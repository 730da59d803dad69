"""The fixed network of a genotype: only what was chosen exists. Saving, loading, exporting its checkpoints.

python model_train.py eval-EXP/derain.pt derain.onnx     # ONNX; pip install -r requirements-export.txt
python model_train.py eval-EXP/derain.pt derain.pt2      # torch.export; runs without this project
python model_train.py best_psnr.pt small.pt              # half the size, in float16
"""

import io
import json
import os
import pickletools
import re
import shutil
import warnings
import zipfile
from contextlib import suppress
from functools import partial
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
    side_by_side,
    stem,
    transitions,
)

SHIPPED = Path(__file__).parent / "eval-EXP" / "derain.pt"
FORMAT = "manas-network-1"
MAX_CHANNELS = 4096  # a checkpoint that claims wider branches is refused before anything is allocated
MAX_DEPTH, MAX_TUPLE = 20, 1000  # of a checkpoint's nested values: this project's own reach 12 and 23
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
RUN, SUPERNET = "manas-run-1", "manas-supernet-1"
# What else this project writes, and what to do with it.
OTHER_FORMATS = {
    RUN: "it is a run's state, for --resume; give the best_psnr.pt beside it",
    SUPERNET: "it is a search's supernet; retrain its genotype with train_model_batch.py --arch",
}


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
        return side_by_side([partial(a, x) for a, x in zip(self.attention, xs, strict=True)], xs)


class DerainNetwork(nn.Module):
    """The fixed network: Nx3xHxW in [0, 1] -> Nx3xHxW, not clamped; any H and W.

    In training mode a single picture of up to 8x8 raises ValueError: BatchNorm needs two values a channel.

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


def begin_as_identity(net):
    """Have a new network with the global residual return its input: the last convolution's weights are zero
    (Zhang et al. 2019, Fixup). One without the residual is left as it is.
    """
    if net.residual:
        nn.init.zeros_(net.head.to_rgb.weight)


def from_supernet(net, genotype=None):
    """The fixed network of a genotype (default: the supernet's), with copies of the supernet's weights."""
    genotype = genotype or net.genotype()
    fixed = DerainNetwork(genotype, net.channels, net.residual).to(net.alpha)
    fixed.load_state_dict(net.state_dict(), strict=False)  # the stem and all else that there is no choice of
    for cell, mixed, kinds, edges in zip(fixed.cells, net.cells, *genotype, strict=True):
        for module, choices, kind in zip(cell.multi_scale, mixed.multi_scale, kinds, strict=True):
            module.load_state_dict(choices.kinds[kind].state_dict())
        for attention, choices, names in zip(cell.attention, mixed.attention, edges, strict=True):
            for edge, choice, name in zip(attention.edges, choices.edges, names, strict=True):
                edge.load_state_dict(choice.operations[name].state_dict())
    return fixed.train(net.training)


def widen(net, channels, seed=0):
    """A network of a multiple of the channels that computes the same, to rounding: Net2Net, Chen et al. 2016.

    The copies of a channel lie side by side, so that groups of channels stay groups. A weight that reads the
    channel is split between the copies in random shares, so that training tells them apart. ValueError where
    `channels` are not one and the same multiple of the network's, or a gate does not grow by a whole factor.
    """
    factor = channels[0] // net.channels[0]
    if list(channels) != [factor * c for c in net.channels]:
        raise ValueError(f"{' '.join(map(str, channels))} is no multiple of the network's channels")
    wide = DerainNetwork(net.genotype, channels, net.residual).to(next(net.parameters()))
    rng = torch.Generator().manual_seed(seed)
    state, expected = {}, wide.state_dict()
    for name, tensor in net.state_dict().items():
        for dimension, size in enumerate(expected[name].shape[:2]):
            copies, rest = divmod(size, tensor.shape[dimension])
            if rest:
                raise ValueError(f"{name} would grow from {tensor.shape[dimension]} to {size} channels")
            tensor = tensor.repeat_interleave(copies, dimension)
            if dimension == 1 and copies > 1:
                shares = torch.rand(*tensor.shape[:2], 1, 1, generator=rng, dtype=tensor.dtype) + 0.5
                shares = shares.unflatten(1, (-1, copies))
                shares = (shares / shares.sum(2, keepdim=True)).flatten(1, 2)
                tensor = tensor * shares.to(tensor.device)
        state[name] = tensor
    wide.load_state_dict(state)
    return wide.train(net.training)


def checkpoint(net, half=False):
    """All that `load` needs to build the network again, as plain tensors, numbers and strings.

    half: convolutions whose weights float16 can hold are stored in it, all else as it is: half the size.
    """
    weights = {name: tensor.detach().cpu() for name, tensor in net.state_dict().items()}
    if half:
        largest = torch.finfo(torch.float16).max
        halved = {name: w.half() for name, w in weights.items() if w.ndim == 4 and w.abs().max() <= largest}
        weights |= halved
    return {
        "format": FORMAT,
        "genotype": genotypes.to_lists(net.genotype),
        "channels": list(net.channels),
        "residual": net.residual,
        "weights": weights,
    }


def save(net, path, half=False):
    """Write the network to `path`, to be read by `load`; half: as in `checkpoint`."""
    write_whole(checkpoint(net, half), path)


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
        temporary.unlink(missing_ok=True)


def _keep(path, previous):
    try:
        hard_link(path, previous)
    except OSError:  # then for an instant only the one before is there
        os.replace(path, previous)


def hard_link(path, other):
    """Make `other`, in place of what is there, a second name of the file at `path`. From then on neither may
    be changed in place, only replaced. Raises OSError where the file system has no hard links.
    """
    link = path.with_name(f".{path.name}.{os.getpid()}.link")
    os.link(path, link)
    try:
        os.replace(link, other)
    finally:
        link.unlink(missing_ok=True)  # it is still there if both were one file before


def load(path, device="cpu"):
    """The network saved at `path`, in evaluation mode on `device`, ready to run.

    Nothing in the file is executed (`weights_only=True`). Raises CheckpointError, one line naming the file,
    on anything that is not such a checkpoint.
    """
    return rebuilt(read(path), path).to(device).eval()


def read(path):
    """The dictionary in a file of torch.save, tensors on the CPU; CheckpointError if there is none."""
    if not os.path.exists(path):
        raise CheckpointError(f"{path}: no such checkpoint")
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: not a file; a checkpoint is one file, such as best_psnr.pt")
    try:
        _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about kinds of files that are refused anyway
            payload = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    # torch.load documents no closed list of errors: a damaged file raises UnpicklingError, RuntimeError,
    # EOFError, KeyError, OverflowError and more, and each of them means the same to the user.
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be read as a checkpoint ({type(error).__name__}): it is damaged, another "
            "kind of file, or holds more than plain tensors, numbers and text; give one that training wrote"
        ) from None
    if not isinstance(payload, dict):
        raise CheckpointError(f"{path}: holds a {type(payload).__name__}, not a checkpoint of this project")
    return payload


def _check_archive(path):
    """Raise BadZipFile unless the file is a zip as torch.save writes it: its records not compressed, together
    no larger than the file, and with the right checksums, which torch.load does not look at.
    """
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        size = sum(record.file_size for record in records)
        if size > os.path.getsize(path) or any(record.compress_type for record in records):
            raise zipfile.BadZipFile("unpacks to more than it is")
        if len({record.filename.lower() for record in records}) < len(records) or archive.testzip():
            raise zipfile.BadZipFile("records that are damaged or there twice")
        for record in records:
            if record.filename.endswith(".pkl"):
                _check_nesting(archive.read(record))


def _check_nesting(pickled):
    """Raise BadZipFile for values nested so deep, or tuples so large, that hashing hangs or kills Python."""
    stack, memo = [], {}  # of (depth, size) of each value; None is a mark
    for code, argument, _ in pickletools.genops(pickled):
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif code.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif code.name == "MARK":
            stack.append(None)
        else:
            taken = []
            for kind in reversed(code.stack_before):
                if kind is pickletools.stackslice:
                    taken += iter(stack.pop, None)
                elif kind is not pickletools.markobject:
                    taken.append(stack.pop())
            depth = 1 + max((depth for depth, _ in taken), default=0)
            size = 1 + sum(size for _, size in taken)
            if depth > MAX_DEPTH or (code.stack_after == [pickletools.pytuple] and size > MAX_TUPLE):
                raise zipfile.BadZipFile("nested too deep")
            stack += [(depth, size)] * len(code.stack_after)


def rebuilt(payload, path):
    """The DerainNetwork described by a dictionary of `checkpoint`; CheckpointError, naming `path`, if it is
    none.
    """
    found = payload.get("format")
    if found != FORMAT:
        raise CheckpointError(
            f"{path}: not a checkpoint of a derain network (format {genotypes.brief(found)}): "
            f"{_what_else(payload)}"
        )
    try:
        genotype = genotypes.check(payload.get("genotype"))
    except genotypes.GenotypeError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return filled(partial(DerainNetwork, genotype), payload, path)


def _what_else(payload):
    """What a dictionary of another format is, and what to do about it."""
    if _is_state_dict(payload):
        return (
            "it is a bare state_dict with no genotype; load it into its network, then save that with "
            "model_train.save"
        )
    found = payload.get("format")
    if isinstance(found, str) and found in OTHER_FORMATS:
        return OTHER_FORMATS[found]
    hint = f"give one of format {FORMAT}, such as best_psnr.pt"
    nested = [key for key, value in payload.items() if _is_state_dict(value)]
    if nested and found is None:
        keys, key = genotypes.brief([*payload]), genotypes.brief(nested[0])
        hint = f"it looks like another project's, with the keys {keys} and weights under {key}; {hint}"
    return hint


def _is_state_dict(value):
    return isinstance(value, dict) and value and all(isinstance(w, torch.Tensor) for w in value.values())


def filled(make, payload, path):
    """The network make(channels, residual) with the weights of a checkpoint. payload: its channels, residual
    and weights; CheckpointError, naming `path`, where one of them is malformed or the weights do not fit.
    """
    channels, residual, weights = (payload.get(name) for name in ("channels", "residual", "weights"))
    if not (
        isinstance(channels, list)
        and len(channels) == 4
        and all(type(c) is int and 2 <= c <= MAX_CHANNELS and c % NODES == 0 for c in channels)
    ):
        raise CheckpointError(
            f"{path}: channels {genotypes.brief(channels)} are not four even numbers up to {MAX_CHANNELS}"
        )
    if type(residual) is not bool:
        raise CheckpointError(f"{path}: residual is {genotypes.brief(residual)}, not True or False")
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(weight, torch.Tensor) for name, weight in weights.items()
    ):
        raise CheckpointError(f"{path}: holds no weights")

    with torch.device("meta"):  # shapes first: nothing is allocated for a file whose tensors do not fit
        net = make(channels, residual).float()  # whatever torch.get_default_dtype says
    weights = _fitting(net.state_dict(), weights, path)
    net = net.to_empty(device="cpu")
    net.load_state_dict(weights)
    return net


def _fitting(expected, weights, path):
    """The weights by the names and of the types in `expected`; CheckpointError lists what does not fit.

    Prefixes of wrappers (module., _orig_mod.) are taken off; float16, bfloat16 and float64 become float32;
    BatchNorm's counters, on which nothing depends, may be missing.
    """
    plain = {
        re.sub(r"(^|\.)((module|_orig_mod)\.)+", r"\1", name): weight for name, weight in weights.items()
    }
    if len(plain) < len(weights):
        raise CheckpointError(f"{path}: some weights are there twice, with and without a prefix")
    counters = {name: torch.zeros_like(e, device="cpu") for name, e in expected.items() if not e.ndim}
    problems = [f"{name} is missing" for name in expected.keys() - plain.keys() - counters.keys()]
    problems += [f"{name} is not part of that network" for name in plain.keys() - expected.keys()]
    # In bytes: a view can claim any shape, and only the shape is checked against `expected`.
    held, claimed = {}, 0
    for name in sorted(expected.keys() & plain.keys()):
        weight = plain[name]
        if weight.layout != torch.strided or weight.is_quantized or weight.device.type != "cpu":
            problems.append(f"{name} is no plain tensor")
        elif weight.shape != expected[name].shape:
            problems.append(
                f"{name} is {genotypes.brief(list(weight.shape))}, not {list(expected[name].shape)}"
            )
        elif weight.dtype not in FLOATS and (weight.dtype != torch.int64 or name not in counters):
            problems.append(f"{name} is of {weight.dtype}, not {expected[name].dtype}")
        else:
            storage = weight.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
            claimed += weight.nbytes
    if not problems and claimed > sum(held.values()):
        problems.append("the file holds fewer values than their shapes claim")
    if not problems:
        plain = counters | {name: weight.to(expected[name].dtype) for name, weight in plain.items()}
        for name, weight in plain.items():
            if not torch.isfinite(weight).all():
                problems.append(f"{name} has values that are not finite")
            elif name.endswith("running_var") and (weight < 0).any():
                problems.append(f"{name} has variances below 0")
    if problems:
        shown = "; ".join(sorted(problems)[:3]) + (
            f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        )
        raise CheckpointError(f"{path}: the weights do not fit the network it describes: {shown}")
    return plain


# --- export ---


def export(net, path):
    """Write a network, which is on the CPU and in evaluation mode, in the format of `path`'s suffix: .onnx or
    .pt2 (torch.export), to be run without this project; or .pt, a checkpoint of half the size for this one.

    Input, in ONNX named `rainy`: Nx3xHxW RGB float32 in [0, 1]; output, `restored`: the same shape, not
    clamped. N, H and W are free, since the file pads to multiples of 8 itself; a .pt2 wants pictures of more
    than 8x8. Raises CheckpointError, one line naming `path`, for another suffix, packages that are missing
    and a file that cannot be written, and ValueError in training mode (not for .pt).
    """
    from torch.fx.experimental import _config

    path = Path(path)
    if path.suffix not in (".onnx", ".pt2", ".pt"):
        raise CheckpointError(
            f"{path}: the file's name must end in .onnx, .pt2 (torch.export) or .pt (float16)"
        )
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: there is no folder {path.parent}")
    if path.suffix == ".pt":
        save(net, path, half=True)
        return
    if net.training:
        raise ValueError(
            "net is in training mode, where its output depends on the batch; call net.eval() first"
        )
    about = {
        "format": FORMAT,
        "genotype": json.dumps(net.genotype._asdict()),
        "usage": "rainy -> restored, Nx3xHxW RGB float32 in [0, 1], any N, H, W"
        + ("" if path.suffix == ".onnx" else " over 8x8")
        + "; clamp the output",
    }
    free = ({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        temporary.touch()  # what cannot be written is said before tracing, which takes seconds
        if path.suffix == ".onnx":
            import onnxscript  # noqa: F401  PyTorch needs it, and would say so after tracing, seconds later
        # Else the file would take only sizes that need padding, as the example's does.
        with _config.patch(backed_size_oblivious=True), torch.no_grad():
            program = torch.export.export(net, (torch.rand(2, 3, 41, 53),), dynamic_shapes=free)
        if path.suffix == ".onnx":
            axes = ({0: "batch", 2: "height", 3: "width"},)
            names = {"input_names": ["rainy"], "output_names": ["restored"], "dynamic_shapes": axes}
            program = torch.onnx.export(program, dynamo=True, verbose=False, **names)
            program.model.metadata_props.update(about)
            program.save(temporary)
        else:
            content = io.BytesIO()  # given a path, PyTorch aborts on a full disk, and on names not in UTF-8
            torch.export.save(program, content, extra_files={"about.json": json.dumps(about)})
            temporary.write_bytes(content.getbuffer())
        os.replace(temporary, path)
    except ImportError as error:
        raise CheckpointError(
            f"{path}: needs the package {error.name}; pip install -r requirements-export.txt"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):  # its name may be too long
            temporary.unlink()


def get_args_parser():
    from support.command import Parser

    parser = Parser(
        prog="model_train.py",
        description="Export a trained network, to run it without this project, or save it as a checkpoint of "
        "half the size. An exported network takes RGB pictures in [0, 1] of any number, height and width, "
        "and pads them itself; clamp its output.",
    )
    parser.add_argument("checkpoint", help="a trained network: eval-EXP/derain.pt, a run's best_psnr.pt")
    parser.add_argument(
        "out",
        help="file to write: .onnx; .pt2 for torch.export; .pt for this project, half the size (float16)",
    )
    return parser


def main(args):
    if Path(args.out).resolve() == Path(args.checkpoint).resolve():
        raise CheckpointError(f"{args.out}: is the checkpoint itself; name another file to write")
    export(load(args.checkpoint), args.out)
    print(f"exported {args.checkpoint} to {args.out}")


if __name__ == "__main__":
    import model_train  # `command` catches its CheckpointError, not __main__'s
    from support import command

    command.run(model_train.main, model_train.get_args_parser())
