"""The same networks and processes, faster."""

import copy
import ctypes
import platform

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST_KEPT = 2**29  # bytes of a block: twice the largest activation of a half-width network in a tile
MOST_KEPT = 2**30


def keep_freed_memory():
    """Have the C library keep what this process frees, in place of handing it back to the system.

    An activation of tens of megabytes is otherwise mapped anew at each step, and the system clears it page by
    page: a fifth of the time of a forward pass at 512x512. All blocks of a tile are kept: were the largest
    handed back, they would come on top of the others, and memory would grow from tile to tile. Larger ones
    are, so that a picture that is not tiled takes little more than it needs. Processes forked later, as
    loaders' are, do the same. Only glibc is told, the C library of most Linux systems; before 2.35 it takes
    no threshold above 32 MiB.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        libc.mallopt(M_TRIM_THRESHOLD, MOST_KEPT)


def for_inference(net):
    """A copy of a network in evaluation mode with every BatchNorm folded into the convolution before it, and
    channels last in memory.

    Its outputs are the same but for rounding. It is to be run only: save, train and export `net` itself.
    """
    net = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, nn.Sequential):
            for i in range(len(module) - 1):
                if isinstance(module[i], nn.Conv2d) and isinstance(module[i + 1], nn.BatchNorm2d):
                    module[i] = fuse_conv_bn_eval(module[i], module[i + 1])
                    module[i + 1] = nn.Identity()
    return net.to(memory_format=torch.channels_last)
