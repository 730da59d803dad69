"""How a search's health is measured, and when it counts as collapsed."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from genotypes import EDGES, MODULES, PRIMITIVES, Genotype
from model_search import SearchNetwork
from support import health
from support.health import ALPHA_ROWS, BETA_ROWS, WINDOW, Health
from tests.made import random_genotype


def genotype_with(weak, name="skip_connect"):
    """A genotype with so many edges `name`, first to last, and CBAM on the others."""
    edges = iter([name] * weak + ["CBAM"] * (27 - weak))
    attention = tuple(tuple(tuple(next(edges) for _ in range(3)) for _ in range(b)) for b in (2, 3, 4))
    return Genotype((("parallel",) * 4,) * 3, attention)


HEALTHY = genotype_with(13)


def judged(entropies, genotypes=HEALTHY, margin=0.01, arch_start=3):
    """A Health that has seen an epoch an entry, from `arch_start` on."""
    found = Health(arch_start)
    for i, value in enumerate(entropies):
        genotype = genotypes if isinstance(genotypes, Genotype) else genotypes[i]
        found.judge(arch_start + i, genotype, value, margin)
    return found


def test_rows_are_named_in_the_order_of_alpha_and_beta():
    assert len(ALPHA_ROWS) == len(set(ALPHA_ROWS)) == 12
    assert len(BETA_ROWS) == len(set(BETA_ROWS)) == 27
    assert ALPHA_ROWS[4] == "cell 2 module 1"
    assert BETA_ROWS[2:4] == ["cell 1 scale 1 U1-U2", "cell 1 scale 1/2 F1-U1"]
    assert BETA_ROWS[6] == "cell 2 scale 1 F1-U1"
    assert BETA_ROWS[-1] == "cell 3 scale 1/8 U1-U2"


def test_entropy_and_margin_of_known_rows():
    rows = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.1, 0.6, 0.1, 0.2]])
    torch.testing.assert_close(health.entropy(rows)[:3], torch.tensor([1, 0, 0.5]))
    torch.testing.assert_close(health.margin(rows), torch.tensor([0, 1, 0, 0.4]))


def test_changes_are_counted_by_modules_and_edges():
    before = random_genotype(0)
    assert health.changes(before, before) == (0, 0)
    flipped = MODULES[1 - MODULES.index(before.modules[0][0])]
    modules = ((flipped, *before.modules[0][1:]), *before.modules[1:])
    assert health.changes(before, before._replace(modules=modules)) == (1, 0)
    assert health.changes(genotype_with(3), genotype_with(8)) == (0, 5)
    assert health.winners(genotype_with(8))["skip_connect"] == 8


# --- collapse ---


@pytest.mark.parametrize("name", ["skip_connect", "none"])
def test_more_than_half_of_the_edges_without_computation_is_a_collapse(name):
    moving = [0.9, 0.8]
    assert judged(moving, genotype_with(13, name)).collapse is None
    found = judged(moving, [HEALTHY, genotype_with(14, name)])
    assert found.collapse == "14 of 27 edges are skip_connect or none"
    assert found.healthy == [3]
    assert judged(moving, genotype_with(14, name)).healthy == []


def test_an_operation_added_to_the_weak_ones_is_named_with_them(monkeypatch):
    monkeypatch.setattr(health, "WEAK", (*health.WEAK, "CBAM"))
    assert judged([0.9, 0.8], genotype_with(0)).collapse == "27 of 27 edges are skip_connect or none or CBAM"


def test_an_entropy_that_stands_still_undecided_is_a_collapse_after_the_window():
    assert judged([0.9] * (WINDOW - 1)).collapse is None
    found = judged([0.9] * WINDOW)
    assert "stood still" in found.collapse
    assert found.healthy == []
    moving = [0.99, 0.97, 0.95]
    found = judged([*moving, *[0.9] * WINDOW])
    assert "stood still" in found.collapse
    assert found.healthy[-1] == 5  # the last that moved, and not the last of the ten that did not


def test_what_counts_as_standing_still_is_a_share_of_what_was_decided():
    slow = [1 - 1e-6 * (1 + 0.01 * i) for i in range(WINDOW)]  # nearly undecided, but on its way
    assert judged(slow).collapse is None
    trembling = [0.9 + 5e-4 * (i % 2) for i in range(WINDOW)]
    assert judged(trembling).collapse


def test_a_search_that_has_decided_may_stand_still():
    assert judged([0.3] * WINDOW, margin=0.5).collapse is None


def test_a_search_is_judged_by_the_means_over_betas_rows(tmp_path, monkeypatch):
    """Alpha here is decided, and one row of beta is not."""
    net = SearchNetwork((2, 2, 2, 2))
    with torch.no_grad():
        net.alpha.zero_()[:, 0] = 9
        net.beta.zero_()[1:, 0] = 3
    judged = []
    monkeypatch.setattr(Health, "judge", lambda found, *given: judged.append(given))
    framed = []
    monkeypatch.setattr(health, "heat_map", lambda *given: framed.append(given[-1]))
    writer = SimpleNamespace(add_image=lambda *_, **__: None, add_scalar=lambda *_: None)
    run = SimpleNamespace(folder=tmp_path, step=1, writer=writer)
    Health(3).examine(run, 2, net, HEALTHY)
    assert judged == [] and framed == [*health.words(HEALTHY)]
    Health(3).examine(run, 3, net, HEALTHY)
    beta = net.beta.detach().double().softmax(-1)
    expected = health.entropy(beta).mean().item(), health.margin(beta).mean().item()
    assert judged == [(3, HEALTHY, *map(pytest.approx, expected))]
    assert expected[1] > 0.1 and health.margin(beta).min() < 0.1


def test_a_collapse_is_named_once_and_again_when_it_changes(caplog):
    weak = [13, 14, 14, 20, 13, 13]
    with caplog.at_level(logging.INFO, "manas"):
        found = judged([0.9 - 0.1 * i for i in range(6)], [genotype_with(n) for n in weak])
    assert [record.getMessage() for record in caplog.records] == [
        "COLLAPSED in epoch 4: 14 of 27 edges are skip_connect or none",
        "COLLAPSED in epoch 6: 20 of 27 edges are skip_connect or none",
        "no longer collapsed in epoch 7",
    ]
    assert found.collapse is None and found.healthy == [3, 7, 8]


def test_a_resumed_search_judges_as_if_it_had_not_stopped():
    values = [0.95, *[0.9] * WINDOW]
    for stop in range(len(values)):
        found = Health(3)
        found.load_state_dict(judged(values[:stop]).state_dict())
        for i, value in enumerate(values[stop:], start=stop):
            found.judge(3 + i, HEALTHY, value, 0.01)
        assert found.state_dict() == judged(values).state_dict()


@pytest.mark.parametrize("kept, healthy", [(None, []), (3, [3]), ([3, 4], [3, 4])])
def test_a_state_that_kept_the_last_healthy_epoch_alone_is_gone_on_from(kept, healthy):
    found = Health(3)
    found.load_state_dict({"entropies": [], "collapse": None, "healthy": kept})
    found.judge(5, HEALTHY, 0.9, 0.01)
    assert found.healthy == [*healthy, 5]


# --- heat maps ---


def test_a_heat_map_has_a_cell_an_entry_and_frames_the_choice_of_the_genotype():
    torch.manual_seed(0)
    beta = torch.randn(27, len(PRIMITIVES), dtype=torch.double).softmax(-1)
    choices = torch.randint(len(PRIMITIVES), (27,)).tolist()
    names = [PRIMITIVES[choice] for choice in choices]
    picture = health.heat_map(beta, BETA_ROWS, PRIMITIVES, EDGES, names)
    assert picture.dtype == np.uint8 and picture.ndim == 3
    width, height = health.ENTRY
    red = (picture == (255, 0, 0)).all(-1)
    rows, columns = np.nonzero(red)
    left = picture.shape[1] - 8 - len(PRIMITIVES) * width
    for i, choice in enumerate(choices):
        bottom = picture.shape[0] - 8 - height * (26 - i) - 6 * (8 - i // 3)
        inside = red[bottom - height : bottom]
        framed = np.nonzero(inside.any(0))[0]
        assert framed.min() == left + choice * width and framed.max() == left + (choice + 1) * width - 1
    assert len(rows) == len(columns) > 0


def test_a_larger_share_is_brighter():
    picture = health.heat_map(torch.tensor([[0.1, 0.9]]), ["row"], MODULES, 4, MODULES[1:])
    width, _ = health.ENTRY
    corner = [picture[-8 - 4, -8 - width * (2 - j) + 4].astype(int).sum() for j in range(2)]
    assert corner[0] < corner[1]
