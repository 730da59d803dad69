import itertools
import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import losses
from dataset import Batch
from genotypes import MODULES
from model_search import SearchNetwork
from model_train import DerainNetwork
from tests.made import make_one_hot, random_genotype, weight_count

SMALL = (4, 6, 8, 10)
SIDE = 16  # of the pictures that multiply-adds are counted for
SCENE = torch.tensor([0, 0, 0, 1, 2, 2])  # scenes of three densities, one image and two


@pytest.fixture
def batch():
    torch.manual_seed(0)
    clean = torch.rand(3, 3, 16, 20, dtype=torch.float64)
    outputs = (clean[SCENE] + 0.2 * torch.randn(6, 3, 16, 20, dtype=torch.float64)).requires_grad_()
    return outputs, clean


def skimage_ssim(x, y):
    return structural_similarity(
        x, y, channel_axis=0, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )


def test_ssim_is_scikit_images(batch):
    outputs, clean = batch
    expected = [
        skimage_ssim(o.detach().numpy(), clean[s].numpy()) for o, s in zip(outputs, SCENE, strict=True)
    ]
    np.testing.assert_allclose(losses.ssim(outputs, clean[SCENE]).detach(), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_within_autocast_ssim_is_what_it_is_without(dtype):
    """On a smooth picture a variance is a small difference of large numbers."""
    x = torch.linspace(0.3, 0.7, 64).expand(1, 3, 64, 64).to(dtype).requires_grad_()
    y = (x.detach().float() + 0.01).contiguous()
    plain = losses.ssim(x, y)
    (gradient,) = torch.autograd.grad(plain, x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = losses.ssim(x, y)
    assert plain > 0.99 and torch.equal(cast, plain)
    assert torch.equal(torch.autograd.grad(cast, x)[0], gradient)


def test_ssim_says_what_is_too_small():
    with pytest.raises(ValueError, match="at least 11x11 pixels, not 10x30"):
        losses.ssim(torch.rand(1, 3, 10, 30), torch.rand(1, 3, 10, 30))


def test_external_against_a_loop(batch):
    outputs, clean = batch
    per_scene = [0.0, 0.0, 0.0]
    for output, scene in zip(outputs.detach().numpy(), SCENE.tolist(), strict=True):
        target = clean[scene].numpy()
        per_scene[scene] += ((output - target) ** 2).mean() + 1 - skimage_ssim(output, target)
    assert losses.external(outputs, clean, SCENE).item() == pytest.approx(np.mean(per_scene), abs=1e-6)


def test_internal_against_a_loop_over_pairs(batch):
    outputs, _ = batch
    per_scene = [0.0, 0.0, 0.0]
    for d, e in itertools.combinations(range(6), 2):
        if SCENE[d] == SCENE[e]:
            per_scene[SCENE[d]] += (outputs[d] - outputs[e]).square().mean().item()
    assert losses.internal(outputs, SCENE, 3).item() == pytest.approx(np.mean(per_scene))
    gradient = torch.autograd.grad(losses.internal(outputs, SCENE, 3), outputs)[0]
    pairs = sum(
        (outputs[d] - outputs[e]).square().mean()
        for d, e in itertools.combinations(range(6), 2)
        if SCENE[d] == SCENE[e]
    )
    torch.testing.assert_close(gradient, torch.autograd.grad(pairs / 3, outputs)[0])


def test_internal_is_zero_for_single_images(batch):
    outputs, _ = batch
    assert losses.internal(outputs, torch.arange(6), 6).item() == 0


def test_total_variation_against_a_loop(batch):
    outputs = batch[0].detach().numpy()
    vertical = [(o[:, i + 1] - o[:, i]) ** 2 for o in outputs for i in range(15)]
    horizontal = [(o[:, :, j + 1] - o[:, :, j]) ** 2 for o in outputs for j in range(19)]
    expected = 2 * (np.mean(vertical) + np.mean(horizontal))
    found = losses.total_variation(torch.tensor(outputs), torch.arange(len(outputs)), len(outputs))
    assert found.item() == pytest.approx(expected)


def test_total_variation_by_scene_is_the_mean_over_scenes_of_the_mean_over_their_images(batch):
    outputs, _ = batch
    each = [losses.total_variation(image[None], torch.tensor([0]), 1) for image in outputs]
    expected = sum(torch.stack(each)[s == SCENE].mean() for s in range(3)) / 3
    torch.testing.assert_close(losses.total_variation(outputs, SCENE, 3), expected)


@pytest.mark.parametrize("use_internal", [False, True])
def test_the_loss_of_a_batch_is_the_sum_over_its_parts(batch, use_internal):
    outputs, clean = batch
    whole = losses.multi_to_one(outputs, clean, SCENE, use_internal)
    parts = Batch(outputs, clean, SCENE, ["a", "b", "c"], []).parts(2)
    assert [part.names for _, part in parts] == [["a", "b"], ["c"]]
    summed = sum(
        share * losses.multi_to_one(part.rainy, part.clean, part.scene, use_internal) for share, part in parts
    )
    torch.testing.assert_close(summed, whole)


def test_multi_to_one_is_the_weighted_sum(batch):
    outputs, clean = batch
    external = losses.external(outputs, clean, SCENE)
    external = external + 1e-4 * losses.total_variation(outputs, SCENE, 3)
    internal = losses.internal(outputs, SCENE, 3)
    torch.testing.assert_close(losses.multi_to_one(outputs, clean, SCENE, use_internal=False), external)
    torch.testing.assert_close(losses.multi_to_one(outputs, clean, SCENE), external + internal)
    mse = (outputs - clean[SCENE]).square().mean((1, 2, 3)).sum() / 3
    heavier = losses.multi_to_one(outputs, clean, SCENE, use_internal=False, mse_weight=20)
    torch.testing.assert_close(heavier, external + 19 * mse)


def test_psnr_term_is_minus_the_psnr_and_bounded_for_equal_images(batch):
    outputs, clean = batch
    weighted = losses.multi_to_one(outputs, clean, SCENE, psnr_weight=0.5)
    psnr = [
        peak_signal_noise_ratio(clean[s].numpy(), o.detach().numpy(), data_range=1)
        for o, s in zip(outputs, SCENE, strict=True)
    ]
    added = (weighted - losses.multi_to_one(outputs, clean, SCENE)).item()
    assert added == pytest.approx(-0.5 * sum(psnr) / 3, abs=0.05)  # 1e-4 on an MSE of 0.04: 0.01 dB
    equal = clean[SCENE].clone().requires_grad_()
    at_best = losses.external(equal, clean, SCENE, mse_weight=0, psnr_weight=0.5)
    assert at_best.item() == pytest.approx(-0.5 * 40 * 6 / 3)
    assert torch.isfinite(torch.autograd.grad(at_best, equal)[0]).all()


def test_regulariser_is_zero_at_one_hot_with_a_finite_gradient():
    alpha = torch.zeros(12, 2)
    alpha[:, 1] = 1000.0
    alpha.requires_grad_()
    value = losses.architecture_regulariser(alpha.softmax(-1))
    value.backward()
    assert value.item() == 0
    assert torch.isfinite(alpha.grad).all()


@pytest.mark.parametrize("choices", [2, 9])
def test_regulariser_at_uniform_has_its_closed_form(choices):
    a = 1 / choices
    expected = -a * math.log10(a) - (1 - a) * math.log10(1 - a)
    uniform = torch.full((5, choices), a, dtype=torch.float64)
    assert losses.architecture_regulariser(uniform).item() == pytest.approx(expected)
    assert losses.architecture_regulariser(uniform, uniform).item() == pytest.approx(2 * expected)


def sizes_of(net, measure=losses.count_parameters, size=SIDE):
    choices = net.module_choices(), net.operation_choices()
    inputs = net.choice_inputs(size)
    return [losses.choice_sizes(c, i, measure) for c, i in zip(choices, inputs, strict=True)]


def distributions_of(net):
    return [parameter.softmax(-1) for parameter in net.architecture()]


@pytest.mark.parametrize("seed", range(3))
def test_expected_parameters_at_one_hot_are_those_of_the_fixed_network(seed):
    genotype = random_genotype(seed)
    net = SearchNetwork(SMALL)
    make_one_hot(net, genotype)
    expected = sum((a * s).sum() for a, s in zip(distributions_of(net), sizes_of(net), strict=True))
    chosen = sum(s.sum() for s in sizes_of(net))  # every candidate
    shared = weight_count(net.weights()) - chosen
    assert expected + shared == weight_count(DerainNetwork(genotype, SMALL).parameters())


def macs_by_hooks(net, size):
    """Multiply-adds of a network's convolutions, by their definition, from the shapes that hooks see."""
    total = 0

    def count(conv, inputs, output):
        nonlocal total
        total += output.numel() * (conv.in_channels // conv.groups) * math.prod(conv.kernel_size)

    convolutions = (torch.nn.Conv1d, torch.nn.Conv2d)
    hooks = [m.register_forward_hook(count) for m in net.modules() if isinstance(m, convolutions)]
    with torch.no_grad():
        net.eval()(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize("size", [SIDE, 20])  # 20 runs as 24
def test_expected_multiply_adds_at_one_hot_are_those_of_the_fixed_network(size):
    """What two fixed networks differ by: the rest of them is the same."""
    net = SearchNetwork(SMALL)
    sizes, expected, counted = sizes_of(net, losses.count_macs, size), [], []
    for seed in range(3):
        genotype = random_genotype(seed)
        make_one_hot(net, genotype)
        expected.append(sum((a * s).sum() for a, s in zip(distributions_of(net), sizes, strict=True)).item())
        counted.append(macs_by_hooks(DerainNetwork(genotype, SMALL), size))
    assert len(set(counted)) == 3
    assert [e - expected[0] for e in expected] == [c - counted[0] for c in counted]


def test_counting_leaves_the_module_as_it_was():
    module = SearchNetwork(SMALL).module_choices()[0][0]
    losses.count_macs(module, SearchNetwork(SMALL).choice_inputs(SIDE)[0][0])
    assert {p.device.type for p in module.parameters()} == {"cpu"} and module.training


def test_complexity_against_a_loop():
    torch.manual_seed(0)
    net = SearchNetwork(SMALL)
    with torch.no_grad():
        net.alpha.normal_()
        net.beta.normal_()
    terms = []
    for distribution, choices in zip(
        distributions_of(net), (net.module_choices(), net.operation_choices()), strict=True
    ):
        for row, modules in zip(distribution, choices, strict=True):
            counts = [weight_count(module.parameters()) for module in modules]
            terms.append(sum(a.item() * c for a, c in zip(row, counts, strict=True)) / max(counts))
    assert len(terms) == 12 + 27
    assert losses.complexity(distributions_of(net), sizes_of(net)).item() == pytest.approx(np.mean(terms))


@pytest.mark.parametrize("measure", losses.MEASURES.values(), ids=losses.MEASURES)
def test_complexity_alone_leads_to_the_smallest_network(measure):
    torch.manual_seed(0)
    net = SearchNetwork(SMALL)
    optimizer = torch.optim.Adam(net.architecture(), 0.1)
    sizes = sizes_of(net, measure)
    for _ in range(200):
        optimizer.zero_grad()
        losses.complexity(distributions_of(net), sizes).backward()
        optimizer.step()
    genotype = net.genotype()
    kinds = [kind for cell in genotype.modules for kind in cell]
    assert kinds == [MODULES[row.argmin()] for row in sizes[0]]
    edges = {name for cell in genotype.attention for branch in cell for name in branch}
    assert edges <= {"none", "skip_connect"}
