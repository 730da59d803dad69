"""The building blocks: nine attention operations, and the multi-scale modules of both networks.

Feature maps are NxCxHxW; a list of them holds one map a branch, the finest scale first, each half the size of
the one before. Convolutions have no bias, but for CBAM's MLP. Source: Cai et al., TCSVT 2023 (MANAS),
sections on the multi-scale attentive cell; the squeeze-and-excitation and CBAM gates follow Hu et al. 2018
and Woo et al. 2018.
"""

from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import Conv2dNormActivation

from genotypes import NODE_EDGES, PRIMITIVES

MULTIPLE = 8  # the coarsest branch is at scale 1/8
NODES = len(NODE_EDGES)  # K: steps of an attention module, and channel groups


def conv_bn(inputs, outputs, kernel_size=1, stride=1, relu=True):
    """Convolution without bias, BatchNorm and, unless told otherwise, ReLU; keeps H and W at stride 1."""
    activation = nn.ReLU if relu else None
    return Conv2dNormActivation(
        inputs, outputs, kernel_size, stride, activation_layer=activation, inplace=False
    )


def pad_to_multiple(x):
    """Replicate the right and lower border of NxCxHxW until H and W are multiples of 8.

    Reflection would fail where the picture is smaller than the border.
    """
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % MULTIPLE, 0, -height % MULTIPLE), mode="replicate")


def total(terms):
    """The sum of a sequence of tensors. Python's `sum` alone would begin with 0 + the first tensor, which is
    one more pass over memory.
    """
    return sum(terms[1:], terms[0])


def side_by_side(calls, inputs):
    """Call functions without arguments; returns their results, a tensor each. inputs: the tensors they read.

    While a CUDA graph is recorded, each call has a stream of its own, so that kernels too small to fill the
    GPU run at the same time. So do those of the backward pass: autograd runs them on the same streams.
    Without a graph the GPU would wait for Python anyway, and the calls are made one after the other.
    """
    eager_on_gpu = inputs[0].is_cuda and not torch.compiler.is_compiling()
    if not (eager_on_gpu and torch.cuda.is_current_stream_capturing()):
        return [call() for call in calls]
    here = torch.cuda.current_stream()
    sides = [side_stream(here, number) for number in range(len(calls))]
    results = []
    for side, call in zip(sides, calls, strict=True):
        side.wait_stream(here)
        with torch.cuda.stream(side):
            results.append(call())
    for side, result in zip(sides, results, strict=True):
        here.wait_stream(side)
        for x in inputs:
            x.record_stream(side)  # else its memory might be reused too soon
        result.record_stream(here)
    return results


@cache
def side_stream(stream, number):
    """Side stream `number` of a stream: the same one each time, so that it reuses the memory it had."""
    return torch.cuda.Stream(stream.device)


def mean(x, dimensions):
    """The mean of x over some dimensions, which stay as 1."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:  # `mean` would copy all of it to float32
        sums = x.sum(dimensions, keepdim=True)
        return sums / (x.numel() // sums.numel())
    return x.mean(dimensions, keepdim=True)


def maximum(x, dimensions):
    """The maximum of x over some neighbouring dimensions, which stay as 1."""
    if not x.requires_grad:
        return x.amax(dimensions, keepdim=True)
    # The backward of amax searches x for its maximum. Compiled in bfloat16, it searches an x computed anew
    # without rounding, does not find it, and the gradient is 0 / 0. max remembers the place, or one of
    # several.
    first = dimensions[0]
    top = x.flatten(first, dimensions[-1]).max(first, keepdim=True).values
    return top.unflatten(first, [1] * len(dimensions))


# --- the nine operations of an attention edge: NxcxHxW -> NxcxHxW -------------------------------------------


class Zero(nn.Module):
    """`none`: no connection."""

    def forward(self, x):
        return torch.zeros_like(x)


class Pooled:
    """The poolings of an edge's input x, NxcxHxW, which all gates of the edge share: each is computed when it
    is first asked for, and kept.

    Not by functools.cached_property, whose lock in Python 3.11 torch.compile cannot trace.
    """

    def __init__(self, x):
        self.x = x
        self._average = self._both = self._maps = None

    @property
    def average(self):
        """Nxcx1x1: mean over the pixels."""
        if self._average is None:
            self._average = mean(self.x, (2, 3))
        return self._average

    @property
    def both(self):
        """Nxcx1x2: mean and maximum over the pixels, so that a shared MLP takes both in one go."""
        if self._both is None:
            self._both = torch.cat([self.average, maximum(self.x, (2, 3))], 3)
        return self._both

    @property
    def maps(self):
        """Nx2xHxW: maximum and mean over the channels."""
        if self._maps is None:
            self._maps = torch.cat([maximum(self.x, (1,)), mean(self.x, (1,))], 1)
        return self._maps


class Skip(nn.Identity):
    """`skip_connect`: x."""

    def gate(self, pooled):
        return 1.0


class Gate(nn.Module):
    """x * gate(Pooled(x)), NxcxHxW -> NxcxHxW. A subclass has the method `gate`, which returns weights in
    (0, 1), of a shape that broadcasts to x's.
    """

    def forward(self, x):
        return x * self.gate(Pooled(x))


class ConvGate(Gate):
    """x * sigmoid(body(x)): the body, NxcxHxW -> NxcxHxW, weighs each pixel of each channel."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def gate(self, pooled):
        return self.body(pooled.x).sigmoid()


class SpatialGate(ConvGate):
    """x * sigmoid(body([max, mean over channels])): the body, Nx2xHxW -> Nx1xHxW, weighs the pixels."""

    def gate(self, pooled):
        return self.body(pooled.maps).sigmoid()


class ChannelGate(Gate):
    """x * sigmoid(sum of MLP(pooled) over the poolings): one weight a channel. With the average alone it is
    squeeze-and-excitation (Hu et al. 2018), with both CBAM's channel attention (Woo et al. 2018).

    The MLP (reduction r, hidden width max(1, c // r)) is shared by the poolings: the average, and with
    `use_max` the maximum as well.
    """

    def __init__(self, channels, reduction, use_max=False, bias=False):
        super().__init__()
        hidden = max(1, channels // reduction)
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=bias), nn.ReLU(), nn.Conv2d(hidden, channels, 1, bias=bias)
        )
        self.use_max = use_max

    def gate(self, pooled):
        weights = total(self.mlp(pooled.both).split(1, 3)) if self.use_max else self.mlp(pooled.average)
        return weights.sigmoid()


class CBAM(nn.Sequential):
    """A channel gate, and a spatial gate on what it lets pass (Woo et al. 2018)."""

    def gate(self, pooled):
        channel, spatial = self
        weights = channel.gate(pooled)
        return weights * spatial.gate(Pooled(weights * pooled.x))


class DilatedDepthwise(nn.Conv2d):
    """Depthwise 3x3 convolution of dilation 2, on a CPU in float32 at least.

    There, in bfloat16 with channels last, PyTorch 2.13 and 2.15 give its weight a gradient that is garbage,
    infinite or NaN, whether autocast or the caller made it bfloat16.
    """

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=2, dilation=2, groups=channels, bias=False)

    def forward(self, x):
        exact = torch.promote_types(self.weight.dtype, torch.float32)
        is_exact = x.dtype == exact and not torch.is_autocast_enabled("cpu")
        if is_exact or x.device.type != "cpu":
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return self._conv_forward(x.to(exact), self.weight.to(exact), None).to(x.dtype)


class MapNorm(nn.BatchNorm2d):
    """BatchNorm of a single channel, on a CPU in the precision of its statistics.

    There, in bfloat16 with channels last, PyTorch 2.11 and 2.15 sum over a single channel coarsely. So the
    gradient keeps a mean that should be zero, and the gradients of the convolutions before it are wrong by up
    to 45 % of their norm.
    """

    def __init__(self, **options):
        super().__init__(1, **options)

    def forward(self, x):
        exact = self.running_mean.dtype if x.device.type == "cpu" else x.dtype
        if x.dtype == exact:  # converted nevertheless, what torch.export writes would run on a CPU alone
            return super().forward(x)
        return super().forward(x.to(exact)).to(x.dtype)


def depthwise(channels):
    """Convolution 3x3 of each channel by itself: NxcxHxW -> NxcxHxW."""
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)


def separable(inputs, outputs, depthwise=depthwise):
    """Depthwise 3x3, pointwise, BatchNorm without affine parameters: the unit of the convolutional gates."""
    norm = MapNorm(affine=False) if outputs == 1 else nn.BatchNorm2d(outputs, affine=False)
    return nn.Sequential(depthwise(inputs), nn.Conv2d(inputs, outputs, 1, bias=False), norm)


def sep_conv_3x3(channels):
    return ConvGate(nn.Sequential(separable(channels, channels), nn.ReLU(), separable(channels, channels)))


def dil_conv_3x3(channels):
    return ConvGate(separable(channels, channels, depthwise=DilatedDepthwise))


def sep_conv_3x3_spatial(channels):
    return SpatialGate(nn.Sequential(separable(2, 2), nn.ReLU(), separable(2, 1)))


def dil_conv_3x3_spatial(channels):
    return SpatialGate(
        nn.Sequential(
            nn.Conv2d(2, 1, 3, padding=2, dilation=2, bias=False),
            nn.Conv2d(1, 1, 1, bias=False),
            MapNorm(affine=False),
        )
    )


def cbam(channels):
    spatial = nn.Sequential(nn.Conv2d(2, 1, 7, padding=3, bias=False), MapNorm(momentum=0.01))
    return CBAM(ChannelGate(channels, 4, use_max=True, bias=True), SpatialGate(spatial))


OPERATIONS = {
    "none": lambda channels: Zero(),
    "skip_connect": lambda channels: Skip(),
    "sep_conv_3x3": sep_conv_3x3,
    "dil_conv_3x3": dil_conv_3x3,
    "sep_conv_3x3_spatial": sep_conv_3x3_spatial,
    "dil_conv_3x3_spatial": dil_conv_3x3_spatial,
    "SE": lambda channels: ChannelGate(channels, 4),
    "SE_A_M": lambda channels: ChannelGate(channels, 4, use_max=True),
    "CBAM": cbam,
}
assert tuple(OPERATIONS) == PRIMITIVES, (
    "operations.OPERATIONS and genotypes.PRIMITIVES must have the same names in the same order; in only one "
    f"are {sorted({*OPERATIONS} ^ {*PRIMITIVES}) or 'none, so the order differs'}"
)


# --- the attention module -----------------------------------------------------------------------------------


class AttentionModule(nn.Module):
    """Out = SE16( F + P([U_1..U_K, SE4(F_1 + .. + F_K)]) ), NxCxHxW -> NxCxHxW.

    F is split into K = 2 channel groups F_1..F_K; node U_i is the sum, over h in {F_i, U_1..U_(i-1)}, of the
    operation of its edge on h. `edges` are the K(K+1)/2 = 3 operations, in the order of `Genotype.attention`.
    """

    def __init__(self, channels, edges):
        super().__init__()
        self.edges = nn.ModuleList(edges)
        self.skip = ChannelGate(channels // NODES, 4)
        self.project = nn.Sequential(
            conv_bn(channels * (NODES + 1) // NODES, channels), conv_bn(channels, channels, relu=False)
        )
        self.excite = ChannelGate(channels, 16)

    def forward(self, x):
        return self.attend(x, x.chunk(NODES, 1), self.edges)

    def attend(self, x, groups, edges):
        """Out, NxCxHxW, of F = x; groups: F_1..F_K, each Nx(C/K)xHxW; edges: a function for each edge."""
        nodes = []
        for group, indices in zip(groups, NODE_EDGES, strict=True):
            inputs = [group, *nodes]
            terms = [
                edges[index](h)
                for index, h in zip(indices, inputs, strict=True)
                if not isinstance(edges[index], Zero)
            ]
            nodes.append(total(terms) if terms else torch.zeros_like(group))
        return self.excite(x + self.project(torch.cat([*nodes, self.skip(total(groups))], 1)))


# --- the multi-scale modules --------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """1x1 to `width`, 3x3, 1x1 to `outputs`, plus the input (projected where the channels differ), ReLU."""

    def __init__(self, inputs, width, outputs):
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(inputs, width), conv_bn(width, width, 3), conv_bn(width, outputs, relu=False)
        )
        self.shortcut = nn.Identity() if inputs == outputs else conv_bn(inputs, outputs, relu=False)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.body(x) + self.shortcut(x))


def stem(width):
    """Two bottlenecks at full resolution: Nx3xHxW -> Nx(4*width)xHxW."""
    return nn.Sequential(Bottleneck(3, width, 4 * width), Bottleneck(4 * width, width, 4 * width))


class ResidualBlock(nn.Module):
    """relu(x + 3x3-BN-ReLU-3x3-BN(x))."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(conv_bn(channels, channels, 3), conv_bn(channels, channels, 3, relu=False))
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(x + self.body(x))


class Parallel(nn.Module):
    """`parallel`: a residual block on each branch; a list of maps to a list of the same shapes."""

    def __init__(self, channels):
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(c) for c in channels)

    def forward(self, xs):
        return side_by_side([partial(self.branch, xs, k) for k in range(len(xs))], xs)

    def branch(self, xs, k):
        """Output k."""
        return self.blocks[k](xs[k])


class NearestUpsample(nn.Upsample):
    """Nearest upsampling, in the precision that the pixels have.

    Autocast on CUDA would upsample in float32, and every sum with such a map would become float32, too: a
    third more for a forward pass to read and write.
    """

    def forward(self, x):
        if not (x.is_cuda and torch.is_autocast_enabled("cuda")):
            return super().forward(x)
        with torch.autocast("cuda", enabled=False):
            return super().forward(x)


class Gather(nn.ModuleList):
    """Paths to one output scale, one from each input scale; ReLU of their sum. A list of maps -> NxCxHxW."""

    def forward(self, xs):
        terms = [path(x) for path, x in zip(self, xs, strict=True)]
        return total(terms).relu_()  # in place: nothing else uses the sum


class Fusion(nn.Module):
    """`fusion`: each output scale is ReLU of the sum of every input scale brought to it. A list of maps to a
    list of the same shapes, or of the first `outputs` of them.

    channels: of the input scales, two or more; outputs: how many scales, finest first, come out (default: all
    of them).
    """

    def __init__(self, channels, outputs=None):
        super().__init__()
        scales = range(len(channels))
        self.paths = nn.ModuleList(
            Gather(self._path(channels, source, target) for source in scales) for target in scales[:outputs]
        )

    @staticmethod
    def _path(channels, source, target):
        if source == target:
            return nn.Identity()
        if source > target:
            return nn.Sequential(
                conv_bn(channels[source], channels[target], relu=False),
                NearestUpsample(scale_factor=2 ** (source - target), mode="nearest"),
            )
        links = target - source
        return nn.Sequential(
            *(conv_bn(channels[source], channels[source], 3, stride=2) for _ in range(links - 1)),
            conv_bn(channels[source], channels[target], 3, stride=2, relu=False),
        )

    def forward(self, xs):
        return side_by_side([partial(self.branch, xs, k) for k in range(len(self.paths))], xs)

    def branch(self, xs, k):
        """Output k."""
        return self.paths[k](xs)


MULTI_SCALE = {"parallel": Parallel, "fusion": Fusion}


class Transition(nn.Module):
    """One branch more: a list of maps to a list with one more, half the size of the coarsest. The other maps
    pass through as they are, unless their channel count changes.

    inputs: channels of the branches that come in; outputs: of those that go out, one more.
    """

    def __init__(self, inputs, outputs):
        super().__init__()
        self.keep = nn.ModuleList(
            nn.Identity() if before == after else conv_bn(before, after, 3)
            for before, after in zip(inputs, outputs, strict=False)
        )
        self.new = conv_bn(inputs[-1], outputs[-1], 3, stride=2)

    def forward(self, xs):
        return [*(keep(x) for keep, x in zip(self.keep, xs, strict=True)), self.new(xs[-1])]


def transitions(channels):
    """The three transitions: 4*C0 -> (C0, C1) -> (C0, C1, C2) -> (C0, C1, C2, C3)."""
    before = [[4 * channels[0]], channels[:2], channels[:3]]
    return nn.ModuleList(Transition(inputs, channels[: k + 2]) for k, inputs in enumerate(before))


class Head(nn.Module):
    """Fusion to the finest branch, then 1x1 to RGB with no activation: list of four maps -> Nx3xHxW."""

    def __init__(self, channels):
        super().__init__()
        self.fusion = Fusion(channels, outputs=1)
        self.to_rgb = nn.Conv2d(channels[0], 3, 1, bias=False)

    def forward(self, xs):
        return self.to_rgb(self.fusion(xs)[0])


def check_channels(channels):
    """The four branch widths as a tuple; ValueError unless they are four positive even numbers."""
    channels = tuple(channels)
    if len(channels) != 4 or any(c < 2 or c % NODES for c in channels):
        raise ValueError(f"channels must be four positive even numbers, finest scale first, not {channels}")
    return tuple(map(int, channels))
