"""The same networks and processes, faster."""

import copy
import ctypes
import importlib.util
import logging
import os
import platform
import subprocess
import sys
import sysconfig
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from model_search import MixedOperation
from operations import AttentionModule, Bottleneck, Gather, ResidualBlock, Transition, pad_to_multiple

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST_KEPT = 2**27  # bytes of a block: twice the largest activation of a half-width network at 512x512
MOST_KEPT = 2**30
# By kind of device, what `compile_network` compiles.
COMPILED = {"cpu": AttentionModule, "cuda": (Bottleneck, Transition, ResidualBlock, Gather, AttentionModule)}

log = logging.getLogger(__name__)


def keep_freed_memory():
    """Have the C library keep what this process frees, instead of handing it back to the system.

    An activation of tens of megabytes is otherwise mapped anew at each step, and the system clears it page by
    page: a fifth of the time of a forward pass at 512x512. Larger ones are still handed back, so that large
    pictures need no more memory than they did. Processes forked later, as loaders' are, do the same. Only
    glibc is told, the C library of most Linux systems; before 2.35 it takes no threshold above 32 MiB.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        libc.mallopt(M_TRIM_THRESHOLD, MOST_KEPT)


def for_inference(net):
    """A copy of a network in evaluation mode with every BatchNorm folded into the convolution before it,
    ReLUs in place, and channels last in memory.

    Its outputs are the same but for rounding. It is to be run only: save, train and export `net` itself.
    """
    net = copy.deepcopy(net)
    firsts = {module[0] for module in net.modules() if isinstance(module, nn.Sequential) and len(module)}
    for module in net.modules():
        if isinstance(module, nn.Sequential):
            for i in range(len(module) - 1):
                if isinstance(module[i], nn.Conv2d) and isinstance(module[i + 1], nn.BatchNorm2d):
                    module[i] = fuse_conv_bn_eval(module[i], module[i + 1])
                    module[i + 1] = nn.Identity().eval()
        if isinstance(module, nn.ReLU):
            module.inplace = module not in firsts  # a first one's input is its block's, which others read
    return net.to(memory_format=torch.channels_last)


def no_compiler(device):
    """Why torch.compile cannot work for the device here; None where it can."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    headers = Path(sysconfig.get_path("include"))
    if device.type not in ("cpu", "cuda"):
        return f"torch.compile is not used on {device.type}"
    if not _runs(compiler):
        return f"the C++ compiler {compiler} is missing or does not run"
    if not (headers / "Python.h").exists():
        return f"there is no Python.h in {headers}; install Python's development files"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def _runs(compiler):
    try:
        command = [compiler, "--version"]
        return not subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode
    except OSError:
        return False


def compile_edges(net):
    """Compile the mixed edges of a supernet in place, for training; its state_dict stays as it is.

    Edge by edge, since edges of equal shape then share one compilation. It serves one number of images in a
    batch; each further number takes as long again. The multi-scale modules are left as they are: on a CPU
    they were 1.6 to 2.8 times slower compiled, since their BatchNorm and ReLU are.
    """
    torch._dynamo.config.recompile_limit = 64  # of Module.__call__, which all edges share
    torch._dynamo.config.optimize_ddp = False  # else DDP's buckets would cut up what is compiled
    for module in net.modules():
        if isinstance(module, MixedOperation):
            module.compile(dynamic=False)


def compile_network(net, device):
    """Compile the branches of a fixed network in place, for training; on a CPU only its attention modules,
    since the others are slower compiled there. The state_dict stays as it is. Copy or pickle the network
    before, not after: a copy of the compiled one would compute with this one's weights.

    Branch by branch, so that in a CUDA graph they still go side by side. Branches of equal shape share one
    compilation, which serves all batches of more than one image; with BatchNorm frozen there is another.
    """
    torch._dynamo.config.recompile_limit = 64  # of a kind of branch: one compilation for each shape
    torch._dynamo.config.automatic_dynamic_shapes = False  # not a slower one for all shapes
    torch._dynamo.config.optimize_ddp = False
    for module in net.modules():
        if isinstance(module, COMPILED[device.type]):
            module.forward = partial(_of_any_number, torch.compile(module.forward))


def _of_any_number(compiled, x):
    """compiled(x), without being compiled anew for another N; x: NxCxHxW, or a list of such maps."""
    for each in x if isinstance(x, list) else [x]:
        torch._dynamo.maybe_mark_dynamic(each, 0)
    return compiled(x)


class Compiled(nn.Module):
    """A network `for_inference`, compiled for pictures of some `shapes`; others go through it uncompiled. To
    be run without gradients, else its weights are not frozen.

    shapes: a set of (height, width) in multiples of 8, as the network pads a picture; may be set at any time.
    The first picture of each takes minutes. Where compiling fails, a warning says why, and all pictures go
    through uncompiled.
    """

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.shapes = set()
        self.train(net.training)

    @cached_property
    def compiled(self):  # when it is needed: to import PyTorch's compiler takes seconds
        return torch.compile(self.net, dynamic=False)

    def forward(self, x):
        height, width = x.shape[-2:]
        padded = pad_to_multiple(x)
        if tuple(padded.shape[-2:]) in self.shapes:
            try:
                # Flipped or turned, a picture has other strides, for which all would be compiled anew.
                padded = padded.contiguous(memory_format=torch.channels_last)
                # Freezing: the weights are constants, laid out for the kernels that are chosen. As an option
                # of torch.compile it comes after they were made arguments, and does nothing. PyTorch 2.14
                # cannot lay out those in float64, which the benchmark compares in.
                with torch._inductor.config.patch(freezing=padded.dtype != torch.float64):
                    return self.compiled(padded)[..., :height, :width]
            except torch._dynamo.exc.TorchDynamoException as error:
                self.shapes = set()
                lines = str(error).strip().splitlines() or [type(error).__name__]
                why = " ".join(lines[: 2 if lines[0].endswith(":") else 1])  # "backend='inductor' raised:"
                log.warning("compiling failed, going on without: %s", why)
        return self.net(x)
