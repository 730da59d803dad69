"""The supernet: every candidate module and operation at once, mixed by the architecture parameters."""

from functools import partial

import torch
from torch import nn

from genotypes import (
    BRANCHES,
    CELLS,
    EDGES,
    MODULES,
    MODULES_PER_CELL,
    NODE_EDGES,
    PRIMITIVES,
    Genotype,
)
from operations import (
    MULTI_SCALE,
    MULTIPLE,
    NODES,
    OPERATIONS,
    AttentionModule,
    Head,
    Pooled,
    check_channels,
    pad_to_multiple,
    side_by_side,
    stem,
    total,
    transitions,
)


class MixedModule(nn.Module):
    """sum over kinds m of alpha_m * m(xs); every kind reads the same xs.

    xs: one map a branch; returns maps of the same shapes. alpha: 2 weights, one a kind.
    """

    def __init__(self, channels):
        super().__init__()
        self.kinds = nn.ModuleDict({name: MULTI_SCALE[name](channels) for name in MODULES})

    def forward(self, xs, alpha):
        return side_by_side([partial(self.branch, xs, alpha, k) for k in range(len(xs))], xs)

    def branch(self, xs, alpha, k):
        """Output k."""
        return total([a * kind.branch(xs, k) for a, kind in zip(alpha, self.kinds.values(), strict=True)])


class MixedOperation(nn.Module):
    """sum over operations o of beta_o * o(x), NxcxHxW -> NxcxHxW; beta: 9 weights, one for each of
    `PRIMITIVES`.

    `none` adds nothing. The paper's other operations each multiply x by a gate, so their gates are summed and
    x is multiplied once; they share its poolings. An operation without a method `gate` is evaluated by
    itself.
    """

    def __init__(self, channels):
        super().__init__()
        self.operations = nn.ModuleDict({name: OPERATIONS[name](channels) for name in PRIMITIVES})

    def forward(self, x, beta):
        pooled = Pooled(x)
        gates, others = [], []
        for b, (name, operation) in zip(beta, self.operations.items(), strict=True):
            if hasattr(type(operation), "gate"):  # a method, not a layer of that name
                gates.append(b * operation.gate(pooled))
            elif name != "none":
                others.append(b * operation(x))
        gate = total(sorted(gates, key=torch.numel))  # small ones first: their sums are cheap
        return total([x * gate, *others])


class MixedAttention(AttentionModule):
    """The attention module with a mixed operation on each of its three edges; beta is 3x9."""

    def __init__(self, channels):
        super().__init__(channels, [MixedOperation(channels // NODES) for _ in range(EDGES)])

    def forward(self, x, beta):
        # A group is a slice of x. A contiguous copy of it is faster to read, for all operations of an edge;
        # and all edges then have inputs of one layout, so they are compiled only once.
        groups = [group.clone() for group in x.chunk(NODES, 1)]
        edges = [partial(edge, beta=b) for edge, b in zip(self.edges, beta, strict=True)]
        return self.attend(x, groups, edges)


class SearchCell(nn.Module):
    """Four mixed modules in sequence, then one mixed attention module a branch."""

    def __init__(self, channels):
        super().__init__()
        self.multi_scale = nn.ModuleList(MixedModule(channels) for _ in range(MODULES_PER_CELL))
        self.attention = nn.ModuleList(MixedAttention(c) for c in channels)

    def forward(self, xs, alpha, beta):
        """xs: one map a branch; alpha: 4x2; beta: branches x 3 x 9; both already through the softmax."""
        for module, a in zip(self.multi_scale, alpha, strict=True):
            xs = module(xs, a)
        mixed = zip(self.attention, xs, beta, strict=True)
        return side_by_side([partial(attention, x, b) for attention, x, b in mixed], xs)


class SearchNetwork(nn.Module):
    """The supernet: Nx3xHxW in [0, 1] -> Nx3xHxW, not clamped; any H and W.

    In training mode a single picture of up to 8x8 raises ValueError: BatchNorm needs two values a channel.

    channels: widths of the branches at scales 1, 1/2, 1/4, 1/8, four even numbers.
    residual: learn the difference to the input instead of the output (not in the paper).
    alpha (12x2) weighs the kinds of each module, beta (27x9) the operations of each edge, cell by cell,
    branch by branch, edge by edge; both are raw and go through a softmax in the forward pass.
    """

    def __init__(self, channels=(32, 64, 128, 256), residual=False):
        super().__init__()
        self.channels = check_channels(channels)
        self.residual = bool(residual)
        self.stem = stem(self.channels[0])
        self.transitions = transitions(self.channels)
        self.cells = nn.ModuleList(SearchCell(self.channels[:branches]) for branches in BRANCHES)
        self.head = Head(self.channels)
        self.alpha = nn.Parameter(1e-3 * torch.randn(CELLS * MODULES_PER_CELL, len(MODULES)))
        self.beta = nn.Parameter(1e-3 * torch.randn(sum(BRANCHES) * EDGES, len(PRIMITIVES)))

    def forward(self, x):
        height, width = x.shape[-2:]
        padded = pad_to_multiple(x)
        alpha, beta = self.chances()
        xs = [self.stem(padded)]
        for transition, cell, a, b in zip(self.transitions, self.cells, alpha, beta, strict=True):
            xs = cell(transition(xs), a, b)
        output = self.head(xs)
        if self.residual:
            output = output + padded
        return output[..., :height, :width]

    def chances(self):
        """alpha and beta after the softmax, each cell by cell: 4x2 kinds; branches x 3 x 9 operations."""
        alpha = self.alpha.softmax(-1).unflatten(0, (CELLS, MODULES_PER_CELL))
        beta = self.beta.softmax(-1).unflatten(0, (-1, EDGES)).split(BRANCHES)
        return alpha, beta

    def architecture(self):
        """The architecture parameters, [alpha, beta]."""
        return [self.alpha, self.beta]

    def weights(self):
        """Every parameter but alpha and beta."""
        return [p for p in self.parameters() if p is not self.alpha and p is not self.beta]

    def module_choices(self):
        """Per row of alpha the list of its candidate modules, in the order of its columns."""
        return [list(mixed.kinds.values()) for cell in self.cells for mixed in cell.multi_scale]

    def operation_choices(self):
        """Per row of beta the list of its candidate operations, in the order of its columns."""
        edges = [edge for cell in self.cells for attention in cell.attention for edge in attention.edges]
        return [list(edge.operations.values()) for edge in edges]

    def choice_inputs(self, size):
        """What the candidates take in for one size x size picture, as tensors without data: (for each row of
        alpha a list of maps, one a branch; for each row of beta a channel group, 1xcxHxW).
        """
        side = size + -size % MULTIPLE
        maps = [torch.empty(1, c, side >> k, side >> k, device="meta") for k, c in enumerate(self.channels)]
        modules = [maps[:branches] for branches in BRANCHES for _ in range(MODULES_PER_CELL)]
        groups = [x.chunk(NODES, 1)[0] for branches in BRANCHES for x in maps[:branches]]
        return modules, [group for group in groups for _ in range(EDGES)]

    def genotype(self):
        """The architecture that alpha and beta stand for now: the strongest kind of each module and operation
        of each edge. An edge whose strongest operation is `none` is dropped, but a node keeps its best edge.
        """
        alpha, beta = self.chances()
        modules = tuple(tuple(MODULES[i] for i in cell.argmax(-1)) for cell in alpha.cpu())
        attention = tuple(tuple(strongest_edges(branch) for branch in cell.cpu()) for cell in beta)
        return Genotype(modules, attention)


def strongest_edges(beta):
    """The operation names of one attention module's three edges from its 3x9 softmaxed beta."""
    names = [PRIMITIVES[i] for i in beta.argmax(-1)]
    others = beta.clone()
    others[:, [name == "none" for name in PRIMITIVES]] = -1  # a search space need not have it
    for edges in NODE_EDGES:
        if all(names[edge] == "none" for edge in edges):
            best = max(edges, key=lambda edge: others[edge].max())
            names[best] = PRIMITIVES[others[best].argmax()]
    return tuple(names)
