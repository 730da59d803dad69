import pytest
import torch
from torch import nn

import operations
from genotypes import PRIMITIVES
from model_search import MixedOperation
from operations import OPERATIONS, AttentionModule, Fusion, Parallel, Transition


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", PRIMITIVES)
def test_operations_keep_the_shape(name):
    x = torch.rand(2, 8, 5, 7)
    assert OPERATIONS[name](8)(x).shape == x.shape


def test_what_the_gates_of_an_edge_pool_is_computed_once(monkeypatch):
    """Mean and maximum over the pixels, and over the channels; CBAM's second pair is of a map of its own."""
    edge, x, pooled = MixedOperation(8).eval(), torch.rand(2, 8, 9, 9), []
    for name in ("mean", "maximum"):
        function = getattr(operations, name)
        monkeypatch.setattr(
            operations, name, lambda x, *rest, f=function, n=name: pooled.append((n, x, *rest)) or f(x, *rest)
        )
    with torch.inference_mode():
        edge(x, torch.ones(len(PRIMITIVES)))
    of_x = [(name, dimensions) for name, tensor, dimensions in pooled if tensor is x]
    assert sorted(of_x) == [("maximum", (1,)), ("maximum", (2, 3)), ("mean", (1,)), ("mean", (2, 3))]


@pytest.mark.parametrize("dimensions", [(1,), (2, 3)])
def test_a_mean_in_bfloat16_is_that_in_float32(dimensions):
    x = torch.rand(2, 8, 5, 7).bfloat16()
    expected = x.float().mean(dimensions, keepdim=True)
    torch.testing.assert_close(operations.mean(x, dimensions).float(), expected, rtol=0.01, atol=0)


def test_an_operation_that_is_no_gate_has_its_share_of_a_mixed_edge(monkeypatch):
    class Plain(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.gate = nn.Conv2d(channels, channels, 3, padding=1)

        def forward(self, x):
            return self.gate(x)

    monkeypatch.setitem(OPERATIONS, "SE", Plain)
    edge, x, beta = MixedOperation(8).eval(), torch.rand(2, 8, 9, 9), torch.rand(len(PRIMITIVES))
    expected = sum(b * operation(x) for b, operation in zip(beta, edge.operations.values(), strict=True))
    torch.testing.assert_close(edge(x, beta), expected)


@pytest.mark.parametrize("name", [n for n in PRIMITIVES[2:] if hasattr(type(OPERATIONS[n](2)), "gate")])
def test_gates_lie_between_zero_and_the_input(name):
    x = torch.rand(2, 8, 9, 9) + 0.1
    gate = OPERATIONS[name](8).eval()(x) / x
    assert (gate > 0).all()
    assert (gate < 1).all()


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("none", 0),
        ("skip_connect", 0),
        ("sep_conv_3x3", 2 * (9 * 16 + 16 * 16)),
        ("dil_conv_3x3", 9 * 16 + 16 * 16),
        ("sep_conv_3x3_spatial", (9 * 2 + 2 * 2) + (9 * 2 + 2 * 1)),
        ("dil_conv_3x3_spatial", 9 * 2 + 1),
        ("SE", 2 * 16 * 4),
        ("SE_A_M", 2 * 16 * 4),
        ("CBAM", 2 * 16 * 4 + 4 + 16 + 49 * 2 + 2),
    ],
)
def test_parameters_of_each_operation(name, count):
    assert sum(p.numel() for p in OPERATIONS[name](16).parameters()) == count


def test_channel_gate_is_squeeze_and_excitation():
    x = torch.rand(2, 8, 4, 6)
    gate = OPERATIONS["SE_A_M"](8)
    first, second = (layer.weight.flatten(1) for layer in gate.mlp if isinstance(layer, nn.Conv2d))

    def mlp(pooled):
        return torch.relu(pooled @ first.T) @ second.T

    weights = torch.sigmoid(mlp(x.mean((2, 3))) + mlp(x.amax((2, 3))))
    torch.testing.assert_close(gate(x), x * weights[:, :, None, None])


def test_reduction_never_leaves_no_hidden_channel():
    gate = operations.ChannelGate(2, 4)
    assert gate.mlp[0].out_channels == 1


def test_attention_module_is_its_formula():
    edges = [OPERATIONS[name](4) for name in ("sep_conv_3x3", "SE", "CBAM")]
    module = AttentionModule(8, edges).eval()
    x = torch.rand(2, 8, 6, 6)
    f1, f2 = x[:, :4], x[:, 4:]
    u1 = edges[0](f1)
    u2 = edges[1](f2) + edges[2](u1)
    inner = torch.cat([u1, u2, module.skip(f1 + f2)], 1)
    torch.testing.assert_close(module(x), module.excite(x + module.project(inner)))


def test_dropped_edges_add_nothing():
    torch.manual_seed(0)
    dropped = AttentionModule(8, [OPERATIONS[n](4) for n in ("SE", "none", "skip_connect")]).eval()
    x = torch.rand(1, 8, 6, 6)
    u1 = dropped.edges[0](x[:, :4])
    inner = torch.cat([u1, u1, dropped.skip(x[:, :4] + x[:, 4:])], 1)
    torch.testing.assert_close(dropped(x), dropped.excite(x + dropped.project(inner)))


def test_fusion_brings_every_scale_to_every_other():
    channels = (4, 6, 8)
    xs = [torch.rand(1, c, 16 // 2**i, 16 // 2**i) for i, c in enumerate(channels)]
    fusion = Fusion(channels).eval()
    ys = fusion(xs)
    assert [y.shape for y in ys] == [x.shape for x in xs]
    for target, y in enumerate(ys):
        expected = sum(fusion.paths[target][source](x) for source, x in enumerate(xs))
        torch.testing.assert_close(y, expected.relu())
    assert len(Fusion(channels, outputs=1)(xs)) == 1


def test_downward_chain_changes_channels_in_its_last_link():
    path = Fusion((4, 6, 8)).paths[2][0]
    shapes = [(c.in_channels, c.out_channels, c.stride) for c in path.modules() if isinstance(c, nn.Conv2d)]
    assert shapes == [(4, 4, (2, 2)), (4, 8, (2, 2))]


def test_modules_leave_the_list_they_were_handed():
    xs = [torch.rand(1, 4, 8, 8), torch.rand(1, 6, 4, 4)]
    handed, copies = list(xs), [x.clone() for x in xs]
    for module in (Parallel((4, 6)), Fusion((4, 6)), Transition((4, 6), (4, 6, 8))):
        module(handed)
        assert all(a is b for a, b in zip(handed, xs, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(xs, copies, strict=True))


def test_transition_halves_the_coarsest_branch_as_it_was():
    transition = Transition((16,), (4, 6)).eval()
    x = torch.rand(1, 16, 8, 8)
    kept, new = transition([x])
    assert kept.shape == (1, 4, 8, 8)
    assert new.shape == (1, 6, 4, 4)
    torch.testing.assert_close(new, transition.new(x))


@pytest.mark.parametrize("channels", [(4, 4, 4), (4, 4, 4, 3), (0, 4, 4, 4), (4, 4, 4, -2), (4, 4, 4, 4.5)])
def test_impossible_widths_are_refused(channels):
    with pytest.raises(ValueError, match="four positive even numbers"):
        operations.check_channels(channels)
