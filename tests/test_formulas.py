"""The networks a second time: plain functions of a checkpoint's tensors, written down from the method's
description and not from the code, which is held against them.
"""

import pytest
import torch
import torch.nn.functional as F

import model_train
from genotypes import MODULES, PRIMITIVES
from model_search import SearchNetwork
from model_train import DerainNetwork
from tests.made import random_genotype, warm_batch_norm

CHANNELS = (32, 36, 40, 48)  # with which a squeeze by 4 and one by 16 have several hidden channels, not alike


def numbers_in(name):
    """Of cells.1.attention.0.edges.2: 1, 0, 2."""
    return [int(part) for part in name.split(".") if part.isdigit()]


def maps(x):
    """Maximum and mean over the channels."""
    return torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)


class Formulas:
    """What a state dict's tensors compute, by their names; with training, BatchNorm's statistics change."""

    def __init__(self, state, training):
        self.state = {name: tensor.clone() for name, tensor in state.items()}
        self.training = training

    def supernet(self, x, residual):
        alpha, beta = (self.state[name].softmax(1) for name in ("alpha", "beta"))

        def module(name, xs):
            cell, number = numbers_in(name)
            weights = alpha[4 * cell + number]
            kinds = [self.module(f"{name}.kinds.{kind}", kind, xs) for kind in MODULES]
            return [sum(a * y for a, y in zip(weights, ys, strict=True)) for ys in zip(*kinds, strict=True)]

        def edge(name, x):
            cell, branch, number = numbers_in(name)
            weights = beta[3 * ((0, 2, 5)[cell] + branch) + number]
            terms = [self.operation(f"{name}.operations.{kind}", kind, x) for kind in PRIMITIVES]
            return sum(b * y for b, y in zip(weights, terms, strict=True))

        return self.network(x, residual, module, edge)

    def fixed(self, x, residual, genotype):
        def module(name, xs):
            cell, number = numbers_in(name)
            return self.module(name, genotype.modules[cell][number], xs)

        def edge(name, x):
            cell, branch, number = numbers_in(name)
            return self.operation(name, genotype.attention[cell][branch][number], x)

        return self.network(x, residual, module, edge)

    def network(self, x, residual, module, edge):
        height, width = x.shape[2:]
        down, right = (torch.arange(-(-side // 8) * 8).clamp(max=side - 1) for side in (height, width))
        padded = x[:, :, down][:, :, :, right]
        xs = [self.bottleneck("stem.1", self.bottleneck("stem.0", padded))]
        for k in range(3):
            coarsest = self.unit(f"transitions.{k}.new", xs[-1], stride=2)
            xs = [self.unit("transitions.0.keep.0", xs[0]), coarsest] if k == 0 else [*xs, coarsest]
            for number in range(4):
                xs = module(f"cells.{k}.multi_scale.{number}", xs)
            xs = [self.attention(f"cells.{k}.attention.{branch}", x, edge) for branch, x in enumerate(xs)]
        output = self.conv("head.to_rgb", self.fusion("head.fusion", xs)[0])
        return (output + padded if residual else output)[:, :, :height, :width]

    def conv(self, name, x, stride=1, dilation=1):
        """Keeps H and W at stride 1; depthwise where a kernel reads one of several channels."""
        weight = self.state[f"{name}.weight"]
        padding = dilation * (weight.shape[2] // 2)
        groups = x.shape[1] // weight.shape[1]
        return F.conv2d(x, weight, self.state.get(f"{name}.bias"), stride, padding, dilation, groups)

    def norm(self, name, x, momentum=0.1):
        mean, variance = (self.state[f"{name}.running_{what}"] for what in ("mean", "var"))
        if self.training:
            count = x.numel() // x.shape[1]
            now = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            mean.lerp_(now[0], momentum)
            variance.lerp_(now[1] * count / (count - 1), momentum)
            mean, variance = now
        y = (x - mean.view(-1, 1, 1)) / (variance.view(-1, 1, 1) + 1e-5).sqrt()
        if f"{name}.weight" not in self.state:
            return y
        return y * self.state[f"{name}.weight"].view(-1, 1, 1) + self.state[f"{name}.bias"].view(-1, 1, 1)

    def unit(self, name, x, stride=1, relu=True):
        y = self.norm(f"{name}.1", self.conv(f"{name}.0", x, stride))
        return y.relu() if relu else y

    def bottleneck(self, name, x):
        y = self.unit(f"{name}.body.1", self.unit(f"{name}.body.0", x))
        y = self.unit(f"{name}.body.2", y, relu=False)
        return (y + (self.unit(f"{name}.shortcut", x, relu=False) if x.shape != y.shape else x)).relu()

    # --- the two kinds of module, on a list of maps ---

    def module(self, name, kind, xs):
        return {"parallel": self.parallel, "fusion": self.fusion}[kind](name, xs)

    def parallel(self, name, xs):
        blocks = [f"{name}.blocks.{branch}.body" for branch in range(len(xs))]
        ys = [self.unit(f"{block}.0", x) for block, x in zip(blocks, xs, strict=True)]
        ys = [self.unit(f"{block}.1", y, relu=False) for block, y in zip(blocks, ys, strict=True)]
        return [(x + y).relu() for x, y in zip(xs, ys, strict=True)]

    def fusion(self, name, xs):
        """To every scale of which there are weights: all, or the finest in the head."""
        targets = [
            t for t in range(len(xs)) if any(key.startswith(f"{name}.paths.{t}.") for key in self.state)
        ]
        return [
            sum(
                self.path(f"{name}.paths.{target}.{source}", x, target - source)
                for source, x in enumerate(xs)
            ).relu()
            for target in targets
        ]

    def path(self, name, x, halvings):
        if halvings < 0:
            y = self.unit(f"{name}.0", x, relu=False)
            return y.repeat_interleave(2**-halvings, 2).repeat_interleave(2**-halvings, 3)
        for link in range(halvings):
            x = self.unit(f"{name}.{link}", x, stride=2, relu=link < halvings - 1)
        return x

    # --- attention ---

    def attention(self, name, x, edge):
        first, second = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
        u1 = edge(f"{name}.edges.0", first)
        u2 = edge(f"{name}.edges.1", second) + edge(f"{name}.edges.2", u1)
        y = torch.cat([u1, u2, self.squeeze(f"{name}.skip", first + second)], 1)
        y = self.unit(f"{name}.project.1", self.unit(f"{name}.project.0", y), relu=False)
        return self.squeeze(f"{name}.excite", x + y)

    def mlp(self, name, pooled):
        return self.conv(f"{name}.mlp.2", self.conv(f"{name}.mlp.0", pooled).relu())

    def squeeze(self, name, x):
        return x * self.mlp(name, x.mean((2, 3), keepdim=True)).sigmoid()

    def squeeze_both(self, name, x):
        average, greatest = (pool((2, 3), keepdim=True) for pool in (x.mean, x.amax))
        return x * (self.mlp(name, average) + self.mlp(name, greatest)).sigmoid()

    def separable(self, name, x, dilation=1):
        return self.norm(f"{name}.2", self.conv(f"{name}.1", self.conv(f"{name}.0", x, dilation=dilation)))

    def twice_separable(self, name, x):
        return self.separable(f"{name}.body.2", self.separable(f"{name}.body.0", x).relu())

    def operation(self, name, kind, x):
        match kind:
            case "none":
                return 0 * x
            case "skip_connect":
                return x
            case "sep_conv_3x3":
                return x * self.twice_separable(name, x).sigmoid()
            case "dil_conv_3x3":
                return x * self.separable(f"{name}.body", x, dilation=2).sigmoid()
            case "sep_conv_3x3_spatial":
                return x * self.twice_separable(name, maps(x)).sigmoid()
            case "dil_conv_3x3_spatial":
                return x * self.separable(f"{name}.body", maps(x), dilation=2).sigmoid()
            case "SE":
                return self.squeeze(name, x)
            case "SE_A_M":
                return self.squeeze_both(name, x)
            case "CBAM":
                x = self.squeeze_both(f"{name}.0", x)
                weights = self.norm(f"{name}.1.body.1", self.conv(f"{name}.1.body.0", maps(x)), momentum=0.01)
                return x * weights.sigmoid()


@torch.no_grad()
def assert_equal(net, expected, formulas, x):
    """Outputs, and with training the running statistics, too."""
    torch.testing.assert_close(net(x), expected, rtol=1e-9, atol=1e-9)
    for name, tensor in net.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(tensor, formulas.state[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("size", "residual"), [((21, 30), False), ((24, 32), True)])
def test_the_supernet_is_its_formulas(size, residual, training):
    net = warm_batch_norm(SearchNetwork(CHANNELS, residual).double()).train(training)
    torch.nn.init.normal_(net.alpha)
    torch.nn.init.normal_(net.beta)
    x = torch.rand(2, 3, *size, dtype=torch.float64)
    formulas = Formulas(net.state_dict(), training)
    assert_equal(net, formulas.supernet(x, residual), formulas, x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_the_fixed_network_is_its_formulas(seed, training):
    genotype = random_genotype(seed)
    net = warm_batch_norm(DerainNetwork(genotype, CHANNELS, residual=seed == 1).double()).train(training)
    x = torch.rand(2, 3, 24, 18, dtype=torch.float64)
    formulas = Formulas(net.state_dict(), training)
    assert_equal(net, formulas.fixed(x, seed == 1, genotype), formulas, x)


def test_the_shipped_network_is_its_formulas():
    net = model_train.load(model_train.SHIPPED).double()
    x = torch.rand(1, 3, 21, 30, dtype=torch.float64)
    formulas = Formulas(net.state_dict(), training=False)
    assert_equal(net, formulas.fixed(x, net.residual, net.genotype), formulas, x)
