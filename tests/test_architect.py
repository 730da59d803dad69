"""The upper level of the search, held to exact differentiation."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.func import functional_call

import architect as architect_module
from architect import Architect
from dataset import Batch
from losses import architecture_regulariser, multi_to_one
from model_search import SearchNetwork

SCENES = torch.arange(2).repeat_interleave(2)
RATE, MOMENTUM, DECAY = 0.01, 0.8, 0.1  # at five times the rate some draws of the weights diverge


def make_batch(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    clean = torch.rand(2, 3, 16, 16, generator=generator, dtype=dtype)
    rain = 0.3 * torch.rand(4, 3, 16, 16, generator=generator, dtype=dtype)
    return Batch((clean[SCENES] + rain).clamp(max=1), clean, SCENES, ["a", "b"], [])


def loss(forward, batch):
    return multi_to_one(forward(batch.rainy), batch.clean, batch.scene)


@pytest.fixture
def search():
    """A small supernet in float64 after two steps of SGD, so with momentum and BatchNorm statistics."""
    torch.manual_seed(0)
    net = SearchNetwork((4, 4, 6, 6)).double()
    optimizer = torch.optim.SGD(net.weights(), RATE, momentum=MOMENTUM, weight_decay=DECAY)
    for seed in range(2):
        optimizer.zero_grad()
        loss(net, make_batch(seed, torch.float64)).backward(inputs=net.weights())
        optimizer.step()
    return net, optimizer


def architect_of(net, optimizer=None, batch_statistics=False, penalty=None):
    adam = torch.optim.Adam(net.architecture(), 3e-4, betas=(0.5, 0.999), weight_decay=1e-3)
    return Architect(net, adam, loss, penalty, optimizer, batch_statistics)


def relative_error(found, exact):
    found, exact = (torch.cat([g.flatten() for g in gradients]) for gradients in (found, exact))
    return ((found - exact).norm() / exact.norm()).item()


def exact_unrolled(net, optimizer, batch, training_batch):
    """The gradient through the virtual step by a double backward."""
    names = [name for name, p in net.named_parameters() if p is not net.alpha and p is not net.beta]
    weights = net.weights()

    def run(given, data):
        buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
        return loss(lambda x: functional_call(net, given | buffers, (x,)), data)

    own = dict(zip(names, weights, strict=True)) | {"alpha": net.alpha, "beta": net.beta}
    gradient = torch.autograd.grad(run(own, training_batch), weights, create_graph=True)
    virtual = {}
    for name, w, g in zip(names, weights, gradient, strict=True):
        step = MOMENTUM * optimizer.state[w]["momentum_buffer"] + g + DECAY * w.detach()
        virtual[name] = w.detach() - RATE * step
    value = run(virtual | {"alpha": net.alpha, "beta": net.beta}, batch)
    return torch.autograd.grad(value, net.architecture())


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_unrolled_gradient_equals_exact_differentiation(search, batch_statistics):
    """And whatever the network's mode, which in a search is that of training."""
    net, optimizer = search
    batch, training_batch = make_batch(10, torch.float64), make_batch(11, torch.float64)
    architect = architect_of(net, optimizer, batch_statistics)
    net.train(not batch_statistics)
    _, found = architect.unrolled(batch, training_batch)
    net.train(batch_statistics)
    exact = exact_unrolled(net, optimizer, batch, training_batch)
    assert relative_error(found, exact) < 1e-3
    # The second-order part is no rounding error of the first: without it the test would fail.
    _, first = architect.first_order(batch)
    assert relative_error(first, exact) > 1e-2


def test_hessian_vector_product_is_the_slope_of_the_gradient(search):
    """Against a finite difference in float64 so small that no ReLU changes sides."""
    net, optimizer = search
    net.eval()
    training_batch = make_batch(11, torch.float64)
    vector = [torch.randn_like(w) for w in net.weights()]
    found = architect_of(net, optimizer).hessian_vector_product(vector, training_batch)
    gradients = []
    epsilon = 1e-7 / sum(v.square().sum() for v in vector).sqrt()
    for sign in (1, -1):
        moved = copy.deepcopy(net)
        with torch.no_grad():
            for w, v in zip(moved.weights(), vector, strict=True):
                w += sign * epsilon * v
        gradients.append(torch.autograd.grad(loss(moved, training_batch), moved.architecture()))
    slope = [(after - before) / (2 * epsilon) for after, before in zip(*gradients, strict=True)]
    assert relative_error(found, slope) < 1e-3


def test_the_product_summed_over_parts_of_the_batch_is_the_whole_one(search):
    net, optimizer = search
    net.eval()
    whole = make_batch(11, torch.float64)
    vector = [torch.randn_like(w) for w in net.weights()]
    architect = architect_of(net, optimizer)
    expected = architect.hessian_vector_product(vector, whole)
    sizes = []
    architect.hessian_parts = 2
    architect.loss = lambda forward, batch: sizes.append(len(batch.rainy)) or loss(forward, batch)
    assert relative_error(architect.hessian_vector_product(vector, whole), expected) < 1e-12
    assert sizes == [2, 2]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_unrolled_gradient_of_two_ranks_is_that_of_the_whole_batch(search, monkeypatch, accumulate):
    """Two threads take the ranks' places: each has its scenes, and averages with the other."""
    net, optimizer = search
    net.eval()
    scenes = torch.arange(4).repeat_interleave(2)
    batches = []
    for seed in (10, 12):
        first, second = make_batch(seed, torch.float64), make_batch(seed + 1, torch.float64)
        rainy, clean = torch.cat([first.rainy, second.rainy]), torch.cat([first.clean, second.clean])
        batches.append(Batch(rainy, clean, scenes, [*"abcd"], []))

    def unrolled(net, optimizer, batch, training_batch, parts):
        adam = torch.optim.Adam(net.architecture())
        made = Architect(net, adam, loss, weight_optimizer=optimizer, parts=parts)
        return made.unrolled(batch, training_batch)[1]

    expected = unrolled(net, optimizer, *batches, parts=1)
    both, there = {}, threading.Barrier(2, timeout=60)

    def average(tensors):
        both[threading.get_ident()] = tensors
        there.wait()
        means = [sum(pair) / 2 for pair in zip(*both.values(), strict=True)]
        there.wait()
        return means

    monkeypatch.setattr(architect_module, "average", average)
    shares = zip(*([part for _, part in batch.parts(2)] for batch in batches), strict=True)
    with ThreadPoolExecutor(2) as pool:
        ranks = [pool.submit(unrolled, *copy.deepcopy(search), *share, parts=accumulate) for share in shares]
        for rank in ranks:
            assert relative_error(rank.result(), expected) < 1e-10
    # The stance that the unrolled step takes and puts back is the process's: two threads end in either's.
    torch.compiler.set_stance("default")


def test_a_batch_whose_statistics_count_is_not_divided(search):
    net, optimizer = search
    whole, sizes = make_batch(11, torch.float64), []

    def counted(forward, batch):
        sizes.append(len(batch.rainy))
        return loss(forward, batch)

    for batch_statistics, expected in ((True, [4]), (False, [2, 2])):
        adam, sizes[:] = torch.optim.Adam(net.architecture()), []
        made = Architect(
            net,
            adam,
            counted,
            weight_optimizer=optimizer,
            batch_statistics=batch_statistics,
            hessian_parts=2,
        )
        made.hessian_vector_product(net.weights(), whole)
        assert sizes == expected
    assert Architect(net, adam, counted, parts=8, hessian_parts=4).hessian_parts == 8


def test_virtual_step_is_the_optimizers(search):
    net, optimizer = search
    training_batch = make_batch(11, torch.float64)
    virtual = architect_of(net, optimizer, batch_statistics=True).virtual_weights(training_batch)
    optimizer.zero_grad()
    loss(net, training_batch).backward(inputs=net.weights())
    optimizer.step()
    for found, stepped in zip(virtual, net.weights(), strict=True):
        torch.testing.assert_close(found.detach(), stepped.detach())


def test_an_unrolled_step_refuses_groups_of_weights_with_a_rate_or_decay_of_their_own(search):
    net, _ = search
    first, *others = net.weights()
    groups = torch.optim.SGD([{"params": [first], "weight_decay": 0.0}, {"params": others}], RATE)
    batch = make_batch(3, torch.float64)
    with pytest.raises(ValueError, match="expected 1"):
        architect_of(net, groups).unrolled(batch, batch)


def test_first_order_gradient_is_that_of_the_validation_loss(search):
    net, _ = search
    net.eval()
    batch = make_batch(10, torch.float64)
    value, found = architect_of(net).first_order(batch)
    expected = loss(net, batch)
    assert value.item() == pytest.approx(expected.item())
    assert relative_error(found, torch.autograd.grad(expected, net.architecture())) < 1e-12


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize("batch_statistics", [False, True])
def test_a_step_changes_alpha_and_beta_alone(search, unrolled, batch_statistics):
    net, optimizer = search
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}
    before = copy.deepcopy(net.state_dict())
    momenta = [optimizer.state[w]["momentum_buffer"].clone() for w in net.weights()]
    architect = architect_of(net, optimizer if unrolled else None, batch_statistics)
    value = architect.step(make_batch(10, torch.float64), make_batch(11, torch.float64))
    assert torch.isfinite(value)
    assert net.training
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]) != (name in ("alpha", "beta")), name
    for name, parameter in net.named_parameters():
        if gradients[name] is None:
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, gradients[name])
    for w, momentum in zip(net.weights(), momenta, strict=True):
        assert torch.equal(optimizer.state[w]["momentum_buffer"], momentum)


def test_batch_norm_normalises_as_asked(search):
    net, _ = search
    batch = make_batch(10, torch.float64)
    losses_seen = {}
    for batch_statistics in (False, True):
        losses_seen[batch_statistics] = architect_of(copy.deepcopy(net), None, batch_statistics).step(batch)
    assert losses_seen[False].item() == pytest.approx(loss(copy.deepcopy(net).eval(), batch).item())
    assert losses_seen[True].item() == pytest.approx(loss(copy.deepcopy(net).train(), batch).item())


def test_penalty_reaches_the_gradient(search):
    net, _ = search
    net.eval()
    batch = make_batch(10, torch.float64)

    def penalty():
        return 10 * architecture_regulariser(*(p.softmax(-1) for p in net.architecture()))

    plain = architect_of(net).first_order(batch)[1]
    both = architect_of(net, penalty=penalty).first_order(batch)[1]
    alone = torch.autograd.grad(penalty(), net.architecture())
    assert relative_error([b - p for b, p in zip(both, plain, strict=True)], alone) < 1e-6


def test_the_penalty_reaches_the_unrolled_gradient_once_however_many_the_parts():
    torch.manual_seed(0)
    net = SearchNetwork((4, 4, 6, 6)).double().eval()
    optimizer = torch.optim.SGD(net.weights(), 0.05, momentum=0.8)
    batches = [make_batch(seed, torch.float64) for seed in (10, 11)]

    def penalty():
        return 10 * architecture_regulariser(*(p.softmax(-1) for p in net.architecture()))

    def unrolled(penalty, parts=1):
        adam = torch.optim.Adam(net.architecture())
        made = Architect(net, adam, loss, penalty, optimizer, parts=parts)
        return made.unrolled(*batches)

    alone = torch.autograd.grad(penalty(), net.architecture())
    plain = unrolled(None)
    for parts in (1, 2):
        value, both = unrolled(penalty, parts)
        assert value.item() == pytest.approx((plain[0] + penalty()).item())
        differences = [b - p for b, p in zip(both, plain[1], strict=True)]
        assert relative_error(differences, alone) < 1e-6


def test_steps_lower_the_validation_loss(search):
    net, optimizer = search
    net.eval()
    batch = make_batch(10, torch.float64)
    adam = torch.optim.Adam(net.architecture(), 0.05)
    architect = Architect(net, adam, loss)
    values = [architect.step(batch).item() for _ in range(15)]
    assert values[-1] < values[0]
