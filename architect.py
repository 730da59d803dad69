"""The upper level of the search: one step on the architecture parameters alpha and beta.

First order:   grad_a L_val(w, a).
Unrolled:      grad_a L_val(w - xi * d(w, a), a), with d the step that SGD would take on the training loss,
               with momentum and weight decay, without --grad_clip (Liu et al. 2019, DARTS, equations 6
               and 7). BatchNorm uses its running statistics unless --arch_batch_statistics is given:

    d = mu * v + grad_w L_train(w, a) + lambda * w,          w' = w - xi * d
    grad_a L_val(w', a) - xi * grad_a [ grad_w L_train(w, a) . grad_w' L_val(w', a) ]

DARTS replaces the last term, the product of a Hessian and a vector, by a difference of two gradients at w
moved by epsilon along the vector. ReLUs, maximum poolings and BatchNorm make that a poor estimate here: on a
small supernet in float32, with epsilon from 1e-2 to 1e-8 over the vector's norm, it was off by 0.6 to 256
percent with running statistics, and by 49 percent or more with batch statistics (DARTS' own 1e-2: by 13 and
382 percent). So the term is differentiated exactly, by a double backward: as short to write, about twice as
slow, and right.
"""

from contextlib import contextmanager

import torch
from torch.func import functional_call
from torch.nn.utils import get_total_norm

from support.distributed import average
from support.graphs import Recorded


class Architect:
    """Steps alpha and beta of a supernet on architecture batches; their loss is what DARTS calls L_val.

    net: the supernet, with `architecture()` and `weights()`.
    optimizer: Adam over `net.architecture()`.
    loss: loss(forward, batch) -> scalar, where forward(x) is the network's output; all batches are those of
        `dataset.Batch`.
    penalty: penalty() -> scalar on alpha and beta alone, added to L_val (regulariser, complexity).
    weight_optimizer: the SGD of the weights, in one group, for the unrolled step; None means first order.
    batch_statistics: BatchNorm normalises by the batch in this step; else by its running statistics, as the
        released code does. Neither changes the running statistics.
    parts: every gradient is summed over this many parts of a batch (`Batch.parts`), to need less memory.
        With batch_statistics BatchNorm then normalises by one part at a time.
    hessian_parts: the same for the double backward, which takes about 2.6 times a gradient's memory. At least
        `parts` are taken; with batch_statistics no more, since by those the images of a part interact.
    recorded: compute first-order gradients by CUDA graphs, which takes parts=1; constants: what the loss
        depends on besides the batch, as in `support.graphs.Recorded`.

    With several processes each has its share of a batch. Every gradient, those of the virtual step and of the
    Hessian product included, is averaged over them, which makes it that of the whole batch.
    """

    def __init__(
        self,
        net,
        optimizer,
        loss,
        penalty=None,
        weight_optimizer=None,
        batch_statistics=False,
        parts=1,
        hessian_parts=1,
        recorded=False,
        constants=lambda: None,
    ):
        self.net = net
        self.weights = net.weights()
        names = {id(p): name for name, p in net.named_parameters()}
        self.names = [names[id(w)] for w in self.weights]
        self.optimizer = optimizer
        self.loss = loss
        self.penalty = penalty
        self.weight_optimizer = weight_optimizer
        self.batch_statistics = batch_statistics
        self.parts = parts
        self.hessian_parts = parts if batch_statistics else max(parts, hessian_parts)
        self.recorded = Recorded(self.first_order, constants=constants) if recorded else None

    def step(self, batch, training_batch=None, accept=None):
        """One step of the optimizer; returns L_val before it, penalty included, as a tensor.

        The weights, their gradients and BatchNorm's statistics are left as they were; so are alpha and beta
        where accept(arch_loss=..., arch_gradient_norm=...) is given and returns False. training_batch is for
        the virtual step, so the unrolled step alone needs it.
        """
        if self.weight_optimizer is None:
            loss, gradient = (self.recorded or self.first_order)(batch)
            gradient = average(gradient)
        else:
            loss, gradient = self.unrolled(batch, training_batch)
        if accept is None or accept(arch_loss=loss, arch_gradient_norm=get_total_norm(gradient)):
            for parameter, g in zip(self.net.architecture(), gradient, strict=True):
                parameter.grad = g
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss

    def first_order(self, batch):
        """(L_val, [grad_alpha, grad_beta]) at the present weights, of this process's share of the batch."""
        weights = [w.detach() for w in self.weights]  # a compiled net would compute their gradients too
        with self.statistics():  # in here, so that a recorded step does not do it again
            return self.own_gradient(self.upper_loss, weights, batch, self.net.architecture())

    def unrolled(self, batch, training_batch):
        """(L_val, [grad_alpha, grad_beta]) after one virtual step of the weights on the training batch."""
        architecture = self.net.architecture()
        with self.statistics():
            virtual = self.virtual_weights(training_batch)
            loss, gradients = self.gradient(self.upper_loss, virtual, batch, [*architecture, *virtual])
            direct, vector = gradients[: len(architecture)], gradients[len(architecture) :]
            del virtual, gradients
            product = self.hessian_vector_product(vector, training_batch)
        rate = self.weight_optimizer.param_groups[0]["lr"]
        return loss, [d - rate * p for d, p in zip(direct, product, strict=True)]

    @contextmanager
    def statistics(self):
        """In here BatchNorm normalises by the statistics that `batch_statistics` says."""
        was_training = self.net.training
        self.net.train(self.batch_statistics)
        try:
            yield
        finally:
            self.net.train(was_training)

    def virtual_weights(self, training_batch):
        """w' = w - xi * (mu * v + grad_w L_train + lambda * w), as leaves that require a gradient."""
        (group,) = self.weight_optimizer.param_groups  # one: its rate, decay and momentum are those of all
        _, gradient = self.gradient(self.loss_at, self.weights, training_batch, self.weights)
        virtual = []
        for w, g in zip(self.weights, gradient, strict=True):
            momentum = self.weight_optimizer.state.get(w, {}).get("momentum_buffer")
            step = g.add(w.detach(), alpha=group["weight_decay"])
            if momentum is not None:
                step = step.add(momentum, alpha=group["momentum"])
            virtual.append(torch.add(w.detach(), step, alpha=-group["lr"]).requires_grad_())
        return virtual

    @torch.compiler.set_stance("force_eager")  # torch.compile has no double backward
    def hessian_vector_product(self, vector, training_batch):
        """grad_a [ grad_w L_train(w, a) . vector ] for alpha and beta, part by part of the batch."""
        products = []
        for share, part in training_batch.parts(self.hessian_parts):
            loss = self.loss_at(self.weights, part)
            gradient = torch.autograd.grad(loss, self.weights, create_graph=True)
            product = share * sum((g * v).sum() for g, v in zip(gradient, vector, strict=True))
            del loss, gradient
            products.append(torch.autograd.grad(product, self.net.architecture()))
        return average([sum(of_parts) for of_parts in zip(*products, strict=True)])

    def gradient(self, loss, weights, batch, inputs):
        """(loss(weights, batch), its gradient by the inputs, averaged over the processes)."""
        value, own = self.own_gradient(loss, weights, batch, inputs)
        return value, average(own)

    def own_gradient(self, loss, weights, batch, inputs):
        """(loss(weights, batch), its gradient by the inputs), summed over the parts of the batch."""
        value, summed = 0.0, None
        for share, part in batch.parts(self.parts):
            part_loss = share * loss(weights, part)
            gradient = torch.autograd.grad(part_loss, inputs)
            value = value + part_loss.detach()
            summed = gradient if summed is None else torch._foreach_add(summed, gradient)
        return value, summed

    def upper_loss(self, weights, batch):
        """L_val(w, a) of an architecture batch: its loss with the given weights, and the penalty."""
        loss = self.loss_at(weights, batch)
        return loss if self.penalty is None else loss + self.penalty()

    def loss_at(self, weights, batch):
        """The loss of a batch with the given weights in place of the network's own."""
        state = dict(zip(self.names, weights, strict=True))
        if self.net.training:  # then BatchNorm updates statistics in place: here, copies
            state |= {name: buffer.clone() for name, buffer in self.net.named_buffers()}
        return self.loss(lambda x: functional_call(self.net, state, (x,)), batch)
