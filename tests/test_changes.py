"""What the report on changes says is what `restore` does to the pictures."""

import numpy as np
import pytest
import torch

from model_train import DerainNetwork, load, save
from support import changes, check
from support.errors import UserError
from support.images import write_image
from support.metrics import worst_block
from support.restore import restore
from tests.made import photograph, rain_on, random_genotype, write_pairs, write_scenes


def change(flags, capsys):
    status = changes.main(changes.get_args_parser().parse_args(["--device", "cpu", *map(str, flags)]))
    return status, capsys.readouterr()


@pytest.fixture
def checkpoints(tmp_path):
    """One network drawn at random, and one that changes nothing."""
    torch.manual_seed(0)
    net = DerainNetwork(random_genotype(0), (4, 4, 4, 4), residual=True)
    save(net, tmp_path / "some.pt")
    torch.nn.init.zeros_(net.head.to_rgb.weight)
    save(net, tmp_path / "none.pt")
    return tmp_path / "some.pt", tmp_path / "none.pt"


def test_its_figures_are_of_the_restored_pictures(checkpoints, tmp_path, capsys):
    pictures = {f"{tmp_path}/p/{i}.png": photograph(i) for i in range(3)}
    for name, image in pictures.items():
        write_image(name, image)
    status, said = change([tmp_path / "p", "--worst", 3, "--ckt_path", *checkpoints], capsys)
    assert status == 0
    some, none = said.out.split(str(checkpoints[1]))
    net = load(checkpoints[0])
    outputs = {name: restore(net, image, torch.device("cpu")) for name, image in pictures.items()}
    psnr = [10 * np.log10(255**2 / np.mean((outputs[n] - pictures[n].astype(float)) ** 2)) for n in pictures]
    blocks = {name: worst_block(outputs[name], pictures[name]) for name in pictures}
    assert f"output to input: {np.mean(psnr):.1f} dB, at least {min(psnr):.1f}; " in some
    assert f"{sum(p > 38 for p in psnr)} of 3 above 38" in some
    assert f"{max(blocks.values()):.1f} grey levels, median {np.median([*blocks.values()]):.1f}" in some
    named = [line.split()[1] for line in some.splitlines() if line.endswith(".png")]
    assert named == sorted(blocks, key=blocks.get, reverse=True)
    assert "output to input: inf dB (3 that did not change left out), at least inf; 3 of 3 above 38" in none
    assert "0.0 grey levels" in none


def test_a_picture_that_did_not_change_leaves_a_finite_mean(capsys):
    changes.report({"same": (np.inf, 0.0), "a": (40.0, 2.0), "b": (30.0, 5.0)}, 1)
    said = capsys.readouterr().out
    assert "output to input: 35.0 dB (1 that did not change left out), at least 30.0; 2 of 3 above 38" in said
    assert said.endswith("  5.0 b\n")


def test_a_scale_is_that_of_the_restored_pictures(checkpoints, tmp_path, capsys):
    write_image(tmp_path / "p" / "0.png", photograph(0))
    said = change([tmp_path / "p", "--scale", 0.5, "--ckt_path", checkpoints[0]], capsys)[1].out
    output = restore(load(checkpoints[0]), photograph(0), scale=0.5)
    assert f"worst 16x16 block: {worst_block(output, photograph(0)):.1f} grey levels" in said


def test_either_half_of_pairs_and_every_nth(checkpoints, tmp_path, capsys):
    write_pairs(tmp_path / "pairs", 4)
    for half in ("rainy", "clean"):
        flags = [tmp_path / "pairs", "--clean_side", "left", "--half", half, "--every", 2]
        _, said = change([*flags, "--ckt_path", checkpoints[1]], capsys)
        assert "2 pictures" in said.out
    both = [write_pairs(tmp_path / "more", 4), *flags, "--ckt_path", checkpoints[1]]  # of the same names
    assert "4 pictures" in change(both, capsys)[1].out
    scene = changes.dataset.find(tmp_path / "pairs", "left").scenes[1]
    (clean,) = changes.pictures_of(scene, "clean").values()
    assert np.array_equal(clean, photograph(1))
    with pytest.raises(UserError, match="has no clean half"):
        changes.pictures_of(scene._replace(clean=None), "clean")


def test_the_half_that_is_asked_for_is_measured(checkpoints, tmp_path, capsys):
    for i in range(2):
        write_image(tmp_path / "set" / "input" / f"{i}.png", rain_on(photograph(i), i))
        write_image(tmp_path / "set" / "target" / f"{i}.png", photograph(i))
    for half, name in (("rainy", "input"), ("clean", "target")):
        flags = [tmp_path / "set", "--half", half, "--worst", 2, "--ckt_path", checkpoints[1]]
        named = [line.split()[1] for line in change(flags, capsys)[1].out.splitlines() if ".png" in line]
        assert named == [f"{tmp_path}/set/{name}/{i}.png" for i in range(2)]


def test_a_bad_file_is_named_and_the_rest_is_reported(checkpoints, tmp_path, capsys):
    write_image(tmp_path / "p" / "good.png", photograph(0))
    (tmp_path / "p" / "bad.png").write_bytes(b"no picture")
    status, said = change([tmp_path / "p", "--ckt_path", checkpoints[1]], capsys)
    assert status == 1 and "1 pictures" in said.out and "bad.png" in said.err


def test_a_bad_file_of_a_scene_says_what_it_costs(checkpoints, tmp_path, capsys):
    bad = write_scenes(tmp_path, 2) / "DID-MDN-training" / "Rain_Light" / "train2018new" / "1.png"
    bad.write_bytes(b"no picture")
    status, said = change([tmp_path, "--ckt_path", checkpoints[1]], capsys)
    assert status == 1 and "3 pictures" in said.out
    assert f"{bad}: " in said.err and "; so all 3 pictures of its scene are left out" in said.err


def test_a_picture_too_large_for_the_memory_is_named_and_the_rest_is_reported(
    checkpoints, tmp_path, capsys, monkeypatch
):
    for i in range(3):
        write_image(tmp_path / "p" / f"{i}.png", photograph(i))
    errors = [RuntimeError("... DefaultCPUAllocator: can't allocate memory"), MemoryError(), None]

    def too_large(*args, **options):
        if error := errors.pop(0):
            raise error
        return restore(*args, **options)

    monkeypatch.setattr(changes, "restore", too_large)
    status, said = change([tmp_path / "p", "--ckt_path", checkpoints[1]], capsys)
    assert status == 1 and "1 pictures" in said.out
    assert [f"p/{i}.png: too large for the memory here" in said.err for i in range(3)] == [True, True, False]
    errors.append(RuntimeError("another"))
    with pytest.raises(RuntimeError, match="another"):
        change([tmp_path / "p" / "0.png", "--ckt_path", checkpoints[1]], capsys)


def test_a_folder_that_cannot_be_read_is_named(checkpoints, tmp_path, capsys, closed):
    for name in ("a.png", "closed/b.png"):
        write_image(tmp_path / "p" / name, photograph(0))
    status, said = change([tmp_path / "p", "--ckt_path", checkpoints[1]], capsys)
    assert status == 1 and "1 pictures" in said.out
    assert said.err.endswith(f"\n  {tmp_path}/p/closed: cannot be read: Permission denied\n")


def test_a_network_whose_output_is_not_finite_is_named_and_the_other_is_reported(
    checkpoints, tmp_path, capsys, monkeypatch
):
    write_image(tmp_path / "p" / "a.png", photograph(0))

    def loaded(path, device):
        net = load(path, device)
        if path == str(checkpoints[0]):
            torch.nn.init.constant_(net.head.to_rgb.weight, torch.nan)
        return net

    monkeypatch.setattr(changes, "load", loaded)
    status, said = change([tmp_path / "p", "--ckt_path", *checkpoints], capsys)
    assert status == 1 and f"{checkpoints[1]}: 1 pictures" in said.out and "some.pt: 1" not in said.out
    assert f"{checkpoints[0]}: its output for {tmp_path}/p/a.png is not finite" in said.err


def test_did_mdns_folder_stands_for_its_two_parts(checkpoints, tmp_path, capsys):
    """And rainy halves are looked at, not whole files."""
    write_scenes(tmp_path / "set", 2)
    write_pairs(tmp_path / "set" / "DID-MDN-test", 3, "right")
    said = [
        change([*(tmp_path / name for name in names.split()), "--ckt_path", *checkpoints], capsys)
        for names in ("set", "set/DID-MDN-training set/DID-MDN-test")
    ]
    assert said[0] == said[1] and "9 pictures" in said[0][1].out


def test_what_looks_like_pairs_is_named_and_what_has_no_partner(checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check, "rain_score", lambda rainy, clean: float(rainy.mean() - clean.mean()))
    for i in range(2):
        clean = photograph(i, 96, 128)
        write_image(tmp_path / "sides" / f"{i}.png", np.hstack([rain_on(clean, i), clean]))
    status, said = change([tmp_path / "sides", "--ckt_path", checkpoints[1]], capsys)
    assert status == 0
    assert said.out.splitlines()[0] == (
        f"{tmp_path}/sides: 2 of 2 looked at seem to be side-by-side pairs, clean half right: "
        "give --clean_side right"
    )
    for i in range(3):
        write_image(tmp_path / "pairs" / "rain" / f"{i}.png", photograph(i))
    write_image(tmp_path / "pairs" / "gt" / "1.png", photograph(1))
    status, said = change([tmp_path / "pairs", "--ckt_path", checkpoints[1]], capsys)
    assert status == 1 and "1 pictures" in said.out
    assert f"{tmp_path}/pairs/rain/0.png: has no partner\n" in said.err
    assert "2 could not be used" in said.err
