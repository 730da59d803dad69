"""A network's buffers, BatchNorm's statistics above all, as they were before a step that may not count."""

from collections import defaultdict

import torch

from support import distributed


class Buffers:
    """The buffers of a network, which a forward pass changes, to be put back when its step was bad."""

    def __init__(self, net):
        by_type = defaultdict(list)
        for buffer in net.buffers():
            by_type[buffer.dtype].append(buffer)
        self.pairs = [([b.clone() for b in buffers], buffers) for buffers in by_type.values()]

    def keep(self):
        for kept, buffers in self.pairs:
            torch._foreach_copy_(kept, buffers)  # a copy each would start a thousand kernels

    def put_back(self):
        for kept, buffers in self.pairs:
            torch._foreach_copy_(buffers, kept)

    def average_changes(self):
        """Set the buffers to what `keep` kept, equal on all ranks, plus the ranks' mean change since."""
        if distributed.size() == 1:
            return
        for kept, buffers in self.pairs:
            if kept[0].is_floating_point():
                changes = distributed.average(torch._foreach_sub(buffers, kept))
                torch._foreach_copy_(buffers, torch._foreach_add(kept, changes))
