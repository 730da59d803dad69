"""Supernet and fixed network: sizes, any input, and that one derives from the other."""

import pytest
import torch

import model_train
from genotypes import BRANCHES, PRIMITIVES, Genotype
from model_search import SearchNetwork, strongest_edges
from model_train import CheckpointError, DerainNetwork
from tests.made import make_one_hot, random_genotype, warm_batch_norm, weight_count

SMALL = (4, 6, 8, 10)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("channels", "count"), [((32, 64, 128, 256), 13_296_167), ((16, 32, 64, 128), 3_344_817)]
)
def test_supernet_has_the_papers_size(channels, count):
    net = SearchNetwork(channels)
    assert weight_count(net.weights()) == count
    assert weight_count(net.parameters()) == count + 12 * 2 + 27 * 9


def test_fixed_network_has_the_papers_size():
    modules = tuple(("parallel", "fusion", "parallel", "fusion") for _ in range(3))
    attention = tuple(tuple(("sep_conv_3x3",) * 3 for _ in range(branches)) for branches in BRANCHES)
    assert weight_count(DerainNetwork(Genotype(modules, attention)).parameters()) == 7_050_656


def test_alpha_and_beta_start_small_and_random():
    net = SearchNetwork(SMALL)
    assert net.alpha.shape == (12, 2)
    assert net.beta.shape == (27, 9)
    for parameter in net.architecture():
        assert 0.5e-3 < parameter.std() < 1.5e-3


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (7, 13), (321, 481), (16, 8)])
def test_any_size_comes_back_at_its_own(size, residual):
    x = torch.rand(1, 3, *size)
    with torch.inference_mode():
        for net in (
            SearchNetwork((2, 2, 2, 2), residual),
            DerainNetwork(random_genotype(0), (2, 2, 2, 2), residual),
        ):
            y = net.eval()(x)
            assert y.shape == x.shape
            assert torch.isfinite(y).all()


def test_outputs_are_not_clamped():
    net = DerainNetwork(random_genotype(0), SMALL)
    torch.nn.init.constant_(net.head.to_rgb.weight, 100)
    assert net(torch.rand(1, 3, 16, 16)).max() > 1


def test_residual_adds_the_input():
    genotype = random_genotype(0)
    plain = warm_batch_norm(DerainNetwork(genotype, SMALL))
    residual = DerainNetwork(genotype, SMALL, residual=True).eval()
    residual.load_state_dict(plain.state_dict())
    x = torch.rand(1, 3, 9, 11)
    torch.testing.assert_close(residual(x), plain(x) + x)


@pytest.mark.parametrize("seed", range(4))
def test_one_hot_supernet_equals_the_fixed_network(seed):
    genotype = random_genotype(seed)
    net = warm_batch_norm(SearchNetwork(SMALL, residual=seed % 2 == 1))
    make_one_hot(net, genotype)
    assert net.genotype() == genotype
    fixed = model_train.from_supernet(net).eval()
    assert fixed.genotype == genotype
    x = torch.rand(2, 3, 21, 34)
    with torch.inference_mode():
        torch.testing.assert_close(fixed(x), net(x), rtol=0, atol=1e-5)


def test_weights_taken_from_a_supernet_are_copies_in_its_precision():
    net = SearchNetwork(SMALL).double()
    state = net.state_dict()
    for name, tensor in model_train.from_supernet(net).stem.state_dict(prefix="stem.").items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)


def test_fixed_network_holds_only_what_was_chosen():
    genotype = random_genotype(1)
    net = DerainNetwork(genotype, SMALL)
    names = [name for cell in genotype.attention for branch in cell for name in branch]
    edges = [edge for cell in net.cells for attention in cell.attention for edge in attention.edges]
    reference = SearchNetwork(SMALL)
    for edge, name, choices in zip(edges, names, reference.operation_choices(), strict=True):
        assert weight_count(edge.parameters()) == weight_count(choices[PRIMITIVES.index(name)].parameters())
    largest = weight_count(reference.weights())
    assert weight_count(net.parameters()) < largest


def test_every_choice_reaches_the_output():
    """A candidate that the forward pass forgets has no gradient; `none` gets its own through the softmax."""
    net = SearchNetwork(SMALL)
    net(torch.rand(2, 3, 32, 32)).square().mean().backward()
    for parameter in net.parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
    assert (net.alpha.grad != 0).all()
    assert (net.beta.grad != 0).all()


def test_modules_of_a_mixture_read_the_same_input():
    net = SearchNetwork(SMALL).eval()
    mixed = net.cells[1].multi_scale[0]
    xs = [torch.rand(1, c, 16 // 2**i, 16 // 2**i) for i, c in enumerate(SMALL[:3])]
    parallel, fusion = (kind(xs) for kind in mixed.kinds.values())
    mixture = mixed(xs, torch.tensor([0.3, 0.7]))
    for y, p, f in zip(mixture, parallel, fusion, strict=True):
        torch.testing.assert_close(y, 0.3 * p + 0.7 * f)


def beta_of(*rows):
    """A row an edge, with the given {operation: weight} in each row."""
    beta = torch.full((3, len(PRIMITIVES)), 0.01)
    for row, weights in zip(beta, rows, strict=True):
        for name, weight in weights.items():
            row[PRIMITIVES.index(name)] = weight
    return beta


def test_edge_whose_best_is_none_is_dropped_but_a_node_keeps_its_best_edge():
    beta = beta_of({"none": 0.9, "SE": 0.05}, {"none": 0.6, "CBAM": 0.3}, {"none": 0.5, "SE_A_M": 0.2})
    assert strongest_edges(beta) == ("SE", "CBAM", "none")
    beta = beta_of({"SE": 0.9}, {"none": 0.6, "CBAM": 0.1}, {"none": 0.5, "SE_A_M": 0.2})
    assert strongest_edges(beta) == ("SE", "none", "SE_A_M")
    beta = beta_of({"SE": 0.9}, {"none": 0.6}, {"CBAM": 0.5})
    assert strongest_edges(beta) == ("SE", "none", "CBAM")
    beta = beta_of({"SE": 0.9}, {"none": 0.5, "CBAM": 0.4}, {"SE": 0.3})  # though 0.4 is more
    assert strongest_edges(beta) == ("SE", "none", "SE")
    beta = beta_of({"SE": 0.9}, {"SE": 0.3}, {"none": 0.5, "CBAM": 0.4})
    assert strongest_edges(beta) == ("SE", "SE", "none")


def test_a_search_space_without_none_has_a_genotype(monkeypatch):
    net = SearchNetwork(SMALL)
    monkeypatch.setattr("model_search.PRIMITIVES", PRIMITIVES[1:])
    net.beta = torch.nn.Parameter(net.beta.detach()[:, 1:])
    strongest = [PRIMITIVES[1:][i] for i in net.beta.argmax(-1)]
    assert [name for cell in net.genotype().attention for edges in cell for name in edges] == strongest


def test_the_edge_that_a_node_keeps_is_the_most_probable_one_and_not_that_of_the_largest_beta():
    net = SearchNetwork(SMALL)
    net.beta.detach().zero_()
    for row, operations in ((1, {"none": 5, "SE": 2}), (2, {"none": 1, "CBAM": 0.9})):
        for name, value in operations.items():
            net.beta.detach()[row, PRIMITIVES.index(name)] = value
    assert net.genotype().attention[0][0][1:] == ("none", "CBAM")


# --- checkpoints ---


@pytest.fixture
def saved(tmp_path):
    net = warm_batch_norm(DerainNetwork(random_genotype(5), SMALL, residual=True))
    model_train.save(net, tmp_path / "net.pt")
    return net, tmp_path / "net.pt"


def test_a_saved_network_comes_back_ready_to_run(saved):
    net, path = saved
    loaded = model_train.load(path)
    x = torch.rand(1, 3, 13, 17)
    assert not loaded.training
    assert loaded.genotype == net.genotype
    assert torch.equal(loaded(x), net(x))
    assert [f.name for f in path.parent.iterdir()] == ["net.pt"]


def change(path, **entries):
    payload = torch.load(path, weights_only=True)
    payload.update(entries)
    torch.save(payload, path)


def test_text_is_no_checkpoint(tmp_path):
    (tmp_path / "a.pt").write_text("hello")
    with pytest.raises(CheckpointError, match="a.pt.*cannot be read"):
        model_train.load(tmp_path / "a.pt")


def test_missing_file_and_folder_are_said(tmp_path):
    with pytest.raises(CheckpointError, match="b.pt: no such checkpoint"):
        model_train.load(tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="not a file"):
        model_train.load(tmp_path)


class Bomb:
    def __reduce__(self):
        return (open, (str(Bomb.target), "w"))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    Bomb.target = tmp_path / "ran"
    torch.save({"format": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(CheckpointError, match="bomb.pt"):
        model_train.load(tmp_path / "bomb.pt")
    assert not Bomb.target.exists()


def test_truncated_checkpoint_is_refused(saved):
    _, path = saved
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="net.pt: cannot be read"):
        model_train.load(path)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"format": "other"}, "not a checkpoint of a derain network"),
        ({"channels": [4, 6, 8]}, "channels"),
        ({"channels": [4, 6, 8, 10**9]}, "channels"),
        ({"channels": [4, 6, 8, 12]}, "do not fit"),
        ({"genotype": {"modules": []}}, "a genotype has the entries"),
        ({"weights": [1, 2]}, "no weights"),
        ({"weights": {}}, "is missing; .*and .* more"),
    ],
)
def test_checkpoints_of_something_else_are_refused(saved, entries, words):
    _, path = saved
    change(path, **entries)
    with pytest.raises(CheckpointError, match=f"net.pt: .*{words}"):
        model_train.load(path)


def test_weights_that_are_not_finite_are_refused(saved):
    net, path = saved
    weights = net.state_dict()
    weights["head.to_rgb.weight"] = weights["head.to_rgb.weight"] * float("nan")
    change(path, weights=weights)
    with pytest.raises(CheckpointError, match="head.to_rgb.weight has values that are not finite"):
        model_train.load(path)


def test_checkpoint_of_another_genotype_is_refused(saved):
    _, path = saved
    other = random_genotype(6)
    change(path, genotype={k: [list(c) for c in v] for k, v in other._asdict().items()})
    with pytest.raises(CheckpointError, match="do not fit"):
        model_train.load(path)
