"""bfloat16 and memory formats: gradients are those of float32, contiguous; a run remembers its --amp."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

import train_model_batch
import train_search_batch
from architect import Architect
from dataset import Batch
from losses import multi_to_one
from model_search import SearchNetwork
from model_train import DerainNetwork
from operations import OPERATIONS, DilatedDepthwise
from support.benchmark import KINDS, error_in_kind, every_operation, gradients
from support.devices import autocast
from support.errors import UserError
from tests.made import write_scenes

CPU = torch.device("cpu")
CHANNELS = 8
# Relative: of all of a module's gradients together, and of the worst among them.
MODES = {
    "float32 channels last": (False, torch.channels_last, 1e-4, 1e-3),
    "bfloat16 contiguous": (True, torch.contiguous_format, 0.1, 0.25),
    "bfloat16 channels last": (True, torch.channels_last, 0.1, 0.25),
}


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_of_every_kind_in_every_mode_are_those_of_float32(kind, size):
    def together(tensors):
        return torch.cat([tensor.double().flatten() for tensor in tensors])

    images = 12 if kind in OPERATIONS else 3  # of 24 every seed tried switches a ReLU
    case = kind, CHANNELS, size, images
    seed = next(seed for seed in range(100) if not rounding_switches_relus(case, seed))
    expected = gradients(*case, torch.contiguous_format, False, CPU, seed)
    for mode, (amp, layout, allowed, worst) in MODES.items():
        found = gradients(*case, layout, amp, CPU, seed)
        for tensors, right in zip(map(together, found), map(together, expected), strict=True):
            assert (tensors - right).norm() <= allowed * right.norm(), mode
        assert error_in_kind(expected, found) <= worst, mode


def rounding_switches_relus(case, seed):
    """Whether the two layouts, which round in other orders, put some ReLU's input on two sides of zero, where
    its gradient jumps: such a case, which depends on the processor, would say nothing of the kernels.
    """
    signs = []

    def note(module, inputs, output):
        if isinstance(module, nn.ReLU):
            signs[-1].append(output.detach() > 0)

    hook = register_module_forward_hook(note)
    try:
        for layout in (torch.contiguous_format, torch.channels_last):
            signs.append([])
            gradients(*case, layout, False, CPU, seed)
    finally:
        hook.remove()
    return any((ours != theirs).any() for ours, theirs in zip(*signs, strict=True))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_dilated_depthwise_convolution_is_computed_in_float32_on_a_cpu(layout, monkeypatch):
    """On whatever processor: that its bfloat16 gradient is garbage shows on some only."""
    computed, convolve = [], DilatedDepthwise._conv_forward

    def watched(self, x, weight, bias):
        computed.append((x.dtype, weight.dtype, torch.is_autocast_enabled("cpu")))
        return convolve(self, x, weight, bias)

    monkeypatch.setattr(DilatedDepthwise, "_conv_forward", watched)
    x = torch.rand(2, CHANNELS, 16, 16).to(memory_format=layout)
    with autocast(CPU, True):
        DilatedDepthwise(CHANNELS)(x)
        DilatedDepthwise(CHANNELS)(x.bfloat16())
    DilatedDepthwise(CHANNELS).bfloat16()(x.bfloat16())
    assert computed == 3 * [(torch.float32, torch.float32, False)]


def test_a_whole_network_made_bfloat16_has_no_garbage_either():
    torch.manual_seed(0)
    gate = OPERATIONS["dil_conv_3x3"](CHANNELS)
    x = torch.randn(3, CHANNELS, 32, 32)
    expected = torch.autograd.grad(gate(x).sum(), gate.body[0].weight)[0]
    gate.to(torch.bfloat16, memory_format=torch.channels_last)
    output = gate(x.to(torch.bfloat16, memory_format=torch.channels_last))
    found = torch.autograd.grad(output.float().sum(), gate.body[0].weight)[0]
    assert output.dtype == torch.bfloat16
    assert (found - expected).norm() <= 0.1 * expected.norm()


@pytest.mark.parametrize("network", [SearchNetwork, lambda *args: DerainNetwork(every_operation(), *args)])
def test_on_cuda_every_map_within_a_network_is_bfloat16(network, monkeypatch):
    """Of tensors without data, which go the way of CUDA's where there is none."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    types, cuda = {}, torch.device("cuda")
    with FakeTensorMode(allow_non_fake_inputs=True), cuda:
        net, x = network((4, 4, 4, 4)), torch.empty(2, 3, 32, 32)
        for name, module in net.named_modules():
            if not isinstance(module, (nn.ModuleList, nn.ModuleDict)) and name:
                module.register_forward_hook(
                    lambda _, inputs, outputs, name=name: types.update(
                        {name: {tensor.dtype for tensor in tree_leaves(outputs)}}
                    )
                )
        with autocast(cuda, True):
            assert net(x).device.type == "cuda"
    assert any(name.endswith("paths.0.1.1") for name in types)  # those that upsample are among them
    assert {name: found for name, found in types.items() if found != {torch.bfloat16}} == {}


@pytest.mark.parametrize("unrolled", [False, True])
def test_architecture_steps_in_bfloat16_point_where_float32_does(unrolled):
    torch.manual_seed(0)
    net = SearchNetwork((2, 2, 2, 2)).to(memory_format=torch.channels_last)
    rainy, clean = torch.rand(3, 3, 16, 16), torch.rand(1, 3, 16, 16)
    batch = Batch(rainy, clean, torch.zeros(3, dtype=torch.long), ["a"], [])
    net(rainy)
    found = []
    for amp in (False, True):

        def loss(forward, batch, amp=amp):
            with autocast(CPU, amp):
                output = forward(batch.rainy)
            return multi_to_one(output.float(), batch.clean, batch.scene)

        same = copy.deepcopy(net).eval()
        sgd = torch.optim.SGD(same.weights(), 0.01, momentum=0.9)
        architect = Architect(same, None, loss, weight_optimizer=sgd)
        _, gradient = architect.unrolled(batch, batch) if unrolled else architect.first_order(batch)
        found.append(torch.cat([g.flatten() for g in gradient]))
    assert torch.cosine_similarity(*found, dim=0) > 0.97


TINY = "--save run --epochs 1 --steps_per_epoch 2 --batch_size 1 --patch_size 16 --workers 0 --device cpu"


@pytest.mark.parametrize(
    "script, more", [(train_model_batch, ""), (train_search_batch, "--arch_start 1 --demo")]
)
def test_a_run_with_amp_keeps_float32_and_is_not_resumed_without_its_word(script, more, folder):
    write_scenes(folder / "data", 24)
    data = "--data data --clean_side right --channels 2 2 2 2"
    parser = script.get_args_parser()
    script.main(parser.parse_args(f"{TINY} {data} {more} --amp".split()))
    state = torch.load(folder / "run" / "last.pt", weights_only=True)
    tensors = state["parts"]["net"].values()
    assert state["options"]["amp"] and all(t.isfinite().all() for t in tensors)
    assert {t.dtype for t in tensors} <= {torch.float32, torch.int64}
    state["options"]["amp"] = False
    torch.save(state, folder / "run" / "last.pt")
    with pytest.raises(UserError, match="--amp True: the run in run was begun with False"):
        script.main(parser.parse_args(["--resume", "run", "--amp"]))
