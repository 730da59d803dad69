"""CUDA graphs: the kernels of a step, recorded once and from then on launched as one.

A step of these networks is thousands of short kernels, which Python takes longer to launch than the GPU takes
to run. While it is recorded the branches of a network go side by side (`operations.side_by_side`).
"""

import gc

import torch

from support import distributed
from support.devices import is_out_of_gpu_memory


class Recorded:
    """A function of a batch as CUDA graphs, one for each shape of batch. It returns what the function does,
    in tensors that the next call overwrites.

    function: function(batch) -> tensors, in any nesting. Of the batch it reads the tensors alone; all else it
        reads must stay where it is in memory, as weights do, or be told by `constants`. It must not wait for
        the GPU.
    changed: tensors that it changes in place, such as BatchNorm's statistics.
    constants: constants() -> hashable: what else the function depends on, such as which losses the epoch has.
        When it changes, what was recorded is dropped.
    """

    def __init__(self, function, changed=(), constants=lambda: None):
        self.function = function
        self.changed = list(changed)
        self.constants = constants
        self.graphs = {}
        self.pool = None

    def __call__(self, batch):
        constants = self.constants()
        key = batch.rainy.shape, batch.clean.shape, constants
        if key not in self.graphs:
            if any(recorded_with != constants for *_, recorded_with in self.graphs):
                self.graphs.clear()  # they keep the memory of a step, and recording takes that of another
                self.pool = None
            self.graphs[key] = self.record(batch)
        graph, own, outputs = self.graphs[key]
        for mine, given in zip(own.tensors, batch.tensors, strict=True):
            mine.copy_(given)
        graph.replay()
        return outputs

    def record(self, batch):
        """(graph, the batch that it reads, the outputs that it writes); recording changes nothing."""
        own = batch._replace(rainy=batch.rainy.clone(), clean=batch.clean.clone(), scene=batch.scene.clone())
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # graphs of an earlier run in this process, which hold the memory of its steps
        self.warm_up(own)
        # The loader's thread that pins memory must not spoil the recording, as by default it would.
        try:
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                outputs = self.function(own)
        except RuntimeError as error:  # ending a broken recording fails as well, which hides why
            if is_out_of_gpu_memory(error.__context__):
                raise error.__context__ from None
            raise
        self.pool = graph.pool()  # they share their memory, since they never run at once
        return graph, own, outputs

    def warm_up(self, batch):
        """Run it once on another stream, not recorded: libraries choose their kernels when first called."""
        before = [tensor.clone() for tensor in self.changed]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.function(batch)
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, value in zip(self.changed, before, strict=True):
            tensor.copy_(value)


class Backward:
    """backward(batch) -> its loss, a scalar tensor, with its gradients by `weights` in their `grad`.

    loss: loss(forward, batch) -> scalar, the mean over scenes, where forward(x) is the network's output.
    parts: into how many the batch is divided. recorded: run it as a CUDA graph, which takes parts=1;
    `changed` and `constants` are those of `Recorded`.

    With several processes each has its share of a batch, and the gradients are averaged over them: by
    `distributed.parallel` while they are computed, those of a graph afterwards.
    """

    def __init__(self, net, weights, loss, parts=1, recorded=False, changed=(), constants=lambda: None):
        self.weights = list(weights)
        self.forward = net if recorded else distributed.parallel(net, self.weights)
        self.loss = loss
        self.parts = parts
        self.recorded = Recorded(self.gradients, changed, constants) if recorded else None

    def __call__(self, batch):
        for weight in self.weights:
            weight.grad = None  # a recorded one would keep the memory of a graph that is let go
        if self.recorded:
            loss, gradients = self.recorded(batch)
            if distributed.size() > 1:
                averages = distributed.average(gradients)
                gradients = [laid_out_as(w, g) for w, g in zip(self.weights, averages, strict=True)]
            for weight, gradient in zip(self.weights, gradients, strict=True):
                weight.grad = gradient
            return loss
        loss = 0.0
        for share, part in distributed.in_parts(self.forward, batch.parts(self.parts)):
            part_loss = share * self.loss(self.forward, part)
            part_loss.backward(inputs=self.weights)
            loss = loss + part_loss.detach()
        return loss

    def gradients(self, batch):
        """(loss, gradients), these laid out as the weights are, which fused optimizers want."""
        loss = self.loss(self.forward, batch)
        gradients = torch.autograd.grad(loss, self.weights)
        return loss.detach(), [laid_out_as(w, g) for w, g in zip(self.weights, gradients, strict=True)]


def laid_out_as(weight, gradient):
    """The gradient with the strides of its weight: a copy only where its layout in memory really differs. The
    strides of dimensions of size 1, which most weights have here, mean nothing.
    """
    pairs = zip(weight.shape, weight.stride(), gradient.stride(), strict=True)
    if all(size == 1 or ours == given for size, ours, given in pairs):
        return gradient.as_strided(weight.shape, weight.stride())
    return torch.empty_like(weight).copy_(gradient)
