"""The faster forms are the same functions, and the allocator keeps what it is to keep."""

import ctypes
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from genotypes import PRIMITIVES
from model_train import DerainNetwork
from operations import OPERATIONS
from support.benchmark import every_operation
from support.fast import for_inference, keep_freed_memory


def with_statistics(net):
    """In evaluation mode, its BatchNorms with statistics and weights that are not those of a new network."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.3, 3)
            if module.affine:
                nn.init.uniform_(module.weight, -2, 2)
                nn.init.normal_(module.bias)
    return net.eval()


@pytest.mark.parametrize("name", PRIMITIVES)
def test_every_operation_in_the_form_for_inference_is_the_same_function(name):
    torch.manual_seed(0)
    operation, x = with_statistics(OPERATIONS[name](6)), torch.randn(2, 6, 9, 11)
    given = x.clone()
    # Wrapped, as a network's children are: an operation that is a BatchNorm's parent is one itself.
    fast = for_inference(nn.Sequential(operation))
    with torch.no_grad():
        torch.testing.assert_close(fast(x), operation(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(x, given), "what goes in is left as it is"


@pytest.mark.parametrize("residual", [False, True])
def test_the_network_in_the_form_for_inference_equals_the_plain_one_and_leaves_it_alone(residual):
    torch.manual_seed(0)
    net = with_statistics(DerainNetwork(every_operation(), (4, 4, 8, 8), residual)).double()
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    x = torch.rand(2, 3, 37, 50, dtype=torch.float64)
    fast = for_inference(net)
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(fast(x), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(fast.float()(x.float()).double(), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(net(x), expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    assert fast.genotype == net.genotype


def test_a_relu_that_comes_first_leaves_its_input_alone():
    """As in the operations of other search spaces, ReLU, convolution, BatchNorm."""
    torch.manual_seed(0)
    operation = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    net, x = with_statistics(nn.Sequential(operation)), torch.randn(1, 4, 9, 11)
    given = x.clone()
    fast = for_inference(net)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), net(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(x, given)
    assert fast[0][3].inplace


# Megabytes that a step faults in which fills 128 MB in blocks of 64, as activations do: by itself, and kept.
FAULTS = """
import mmap, resource, torch
from support.fast import keep_freed_memory

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(2**24) for _ in range(2)]
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * mmap.PAGESIZE / 2**20

by_itself = [step() for _ in range(20)]
keep_freed_memory()
kept = [step() for _ in range(20)]  # it takes some until blocks lie as the next one finds them
print(min(by_itself), min(kept))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told")
def test_memory_that_is_kept_is_not_faulted_in_again():
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    by_itself, kept = map(float, done.stdout.split())
    assert kept < 1 < 125 < by_itself


def test_another_c_library_is_left_alone(monkeypatch):
    def refuse(_):
        raise AssertionError("called")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    keep_freed_memory()
