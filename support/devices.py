"""Where a network computes, and how exactly."""

import os
import platform
import re
from pathlib import Path

import torch

from support import distributed
from support.errors import UserError

DEVICES = "cpu, cuda, cuda:1 or mps"
DEVICE_HELP = f"{DEVICES} (default: the best there is)"
# What PyTorch says where a GPU is full, other than by torch.OutOfMemoryError; the last two by its libraries.
GPU_IS_FULL = ("CUDA error: out of memory", "MPS backend out of memory")
GPU_IS_FULL += ("_STATUS_ALLOC_FAILED", "unable to find an engine to execute")


def pick_device(name=None):
    """The torch.device called `name`, or the best there is; UserError if it is not there.

    Under torchrun each process has the GPU of its own local rank.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if distributed.launched() and name.partition(":")[0] != "cpu":
        if name != "cuda":
            raise UserError(
                f"--device {name}: under torchrun give cuda (each process has its own GPU) or cpu"
            )
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta", which computes nothing, fails here
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # for streams and graphs that name no device
    except (RuntimeError, AssertionError, ImportError) as error:
        why = str(error).splitlines()[0]
        if why.startswith("Could not run"):  # not built in; a list of all that are follows
            why = why.partition(". ")[0]
        if why.startswith("Expected one of"):  # twenty kinds
            why = f"PyTorch has no such device; give {DEVICES}"
        raise UserError(f"--device {name}: not available here ({why})") from None
    return device


def be_deterministic():
    """Have PyTorch choose kernels that give the same bits each time; before CUDA is first used.

    By PyTorch's documentation there is one for all that the networks and losses use; PyTorch warns of an
    operation that has none. An error instead might come days into a run, when another loss joins in.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it for that
    os.environ.setdefault("NCCL_ALGO", "^NVLS")  # which PyTorch sets for it, where the ranks have not met yet
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs kernels; nothing reads that memory
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def autocast(device, amp):
    """With `amp`: bfloat16 for what computes best in it; the caller makes the outputs float32 again."""
    return torch.autocast(device.type, torch.bfloat16, enabled=amp)


def slow_half(device, kind=torch.bfloat16):
    """Why --amp would make a network slower on the device, with half precision of that kind; None where it is
    not known to.
    """
    if device.type == "cuda" and kind == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        return "this GPU is older than bfloat16, which is slower than float32 on it; leave --amp out"
    x86 = platform.machine() in ("x86_64", "AMD64")
    if device.type != "cpu" or not x86 or torch.backends.cpu.get_cpu_capability() == "AVX512":
        return None
    return "this processor has no AVX-512, so bfloat16 is several times slower than float32; leave --amp out"


def is_out_of_gpu_memory(error):
    """Whether PyTorch found no room on a GPU, in whatever words it says so."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in GPU_IS_FULL)


def device_name(device):
    """The name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):  # no Linux; a processor without a name
        return platform.processor() or platform.machine()
