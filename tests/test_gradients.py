"""What one real loss says to alpha and beta: every candidate is heard; one that is forgotten is noticed."""

from pathlib import Path

import pytest
import torch

import dataset
from genotypes import PRIMITIVES
from losses import multi_to_one
from model_search import MixedModule, MixedOperation, SearchNetwork
from tests.made import write_scenes

REAL = Path(__file__).parents[2] / "shared" / "data" / "did-mdn-sample"
NONE = PRIMITIVES.index("none")


def one_batch(folder):
    scenes = dataset.find_training([folder], ["right"])
    return next(dataset.batches(scenes, patch_size=32, batch_size=2, seed=0, device="cpu"))


@pytest.fixture(params=["made", "real"])
def batch(request, tmp_path):
    if request.param == "real":
        if not REAL.exists():
            pytest.skip(f"{REAL} is not on this machine")
        return one_batch(REAL)
    return one_batch(write_scenes(tmp_path, 3))


def unheard(net, batch):
    """The entries of alpha and beta, as "alpha[0, 1]", that have no gradient from the batch's loss.

    Asked of the weights after the softmax too: through it a candidate that the forward pass forgets still has
    a gradient, that of the others. There `none` has to have none, since it adds nothing.
    """
    rows = {"alpha": [], "beta": []}

    def keep(module, args, kwargs):
        name, row = ("alpha", args[1]) if isinstance(module, MixedModule) else ("beta", kwargs["beta"])
        row.retain_grad()
        rows[name].append(row)

    hooks = [
        module.register_forward_pre_hook(keep, with_kwargs=True)
        for module in net.modules()
        if isinstance(module, (MixedModule, MixedOperation))
    ]
    multi_to_one(net(batch.rainy), batch.clean, batch.scene).backward()
    for hook in hooks:
        hook.remove()
    found = []
    for name, parameter in (("alpha", net.alpha), ("beta", net.beta)):
        mixture = torch.stack([row.grad for row in rows[name]])
        assert mixture.shape == parameter.shape
        if name == "beta":
            assert (mixture[:, NONE] == 0).all()
            mixture[:, NONE] = 1
        for gradient in (parameter.grad, mixture):
            bad = ~gradient.isfinite() | (gradient == 0)
            found += [f"{name}[{i}, {j}]" for i, j in bad.nonzero().tolist()]
    return found


def test_every_entry_of_alpha_and_beta_has_a_gradient(batch):
    torch.manual_seed(0)
    assert unheard(SearchNetwork((4, 4, 4, 4)), batch) == []


@pytest.mark.parametrize("forgotten", ["skip_connect", "dil_conv_3x3", "CBAM"])
def test_a_forgotten_operation_is_noticed(forgotten, tmp_path, monkeypatch):
    def forgetful(self, x, beta):
        weighted = zip(beta, self.operations.items(), strict=True)
        return sum(b * operation(x) for b, (name, operation) in weighted if name not in ("none", forgotten))

    monkeypatch.setattr(MixedOperation, "forward", forgetful)
    write_scenes(tmp_path, 3)
    column = PRIMITIVES.index(forgotten)
    torch.manual_seed(0)
    assert unheard(SearchNetwork((4, 4, 4, 4)), one_batch(tmp_path)) == [
        f"beta[{i}, {column}]" for i in range(27)
    ]


def test_a_forgotten_kind_of_module_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(
        MixedModule, "forward", lambda self, xs, a: [a[0] * y for y in self.kinds["parallel"](xs)]
    )
    write_scenes(tmp_path, 3)
    torch.manual_seed(0)
    assert unheard(SearchNetwork((4, 4, 4, 4)), one_batch(tmp_path)) == [f"alpha[{i}, 1]" for i in range(12)]
