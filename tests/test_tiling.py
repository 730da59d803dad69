"""What the report on tiling says is what `restore` does."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from model_train import DerainNetwork, load, save
from support import metrics, tiling
from support.errors import UserError
from support.images import write_image
from support.restore import restore
from tests.made import photograph, random_genotype


@pytest.fixture
def picture(tmp_path):
    torch.manual_seed(0)
    net = DerainNetwork(random_genotype(0), (4, 4, 4, 4), residual=True)
    save(net, tmp_path / "net.pt")
    write_image(tmp_path / "x.png", photograph(0, 96, 136))
    return tmp_path / "x.png"


def table(picture, flags, capsys):
    """{(tile, overlap): (mean PSNR, worst PSNR, worst block, time)} as printed."""
    command = [str(picture), "--device", "cpu", "--ckt_path", str(picture.with_name("net.pt"))]
    command += flags.split()
    tiling.main(tiling.get_args_parser().parse_args(command))
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()[:1].isdigit()]
    return {(int(row[0]), int(row[1])): tuple(map(float, row[2:])) for row in rows}


def test_each_row_is_of_its_own_tiles_and_overlap(picture, capsys):
    rows = table(picture, "--tiles 64 136 --overlaps 0 16", capsys)
    assert list(rows) == [(64, 0), (64, 16), (136, 0), (136, 16)]
    net = load(picture.with_name("net.pt"))
    rgb = photograph(0, 96, 136)
    whole = restore(net, rgb, torch.device("cpu"), tile=0)
    for overlap in (0, 16):
        tiled = restore(net, rgb, torch.device("cpu"), tile=64, overlap=overlap)
        psnr, worst, block, _ = rows[64, overlap]
        expected = peak_signal_noise_ratio(whole, tiled, data_range=255)
        assert psnr == worst == pytest.approx(expected, abs=0.006) and np.isfinite(expected)
        assert block == pytest.approx(metrics.worst_block(whole, tiled), abs=0.06) and block > 0
        assert rows[136, overlap][0] == np.inf and rows[136, overlap][2] == 0  # one tile holds the picture


def test_default_tiles_are_those_of_restore(tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    save(DerainNetwork(random_genotype(0), (2, 2, 2, 2)), tmp_path / "net.pt")
    write_image(tmp_path / "x.png", photograph(0))
    asked = []

    def timed(net, image, device, **how):
        asked.append(how["tile"])
        return image, 1.0

    monkeypatch.setattr(tiling, "timed", timed)
    flags = [str(tmp_path / "x.png"), "--device", "cpu", "--ckt_path", str(tmp_path / "net.pt")]
    tiling.main(tiling.get_args_parser().parse_args([*flags, "--tiles", "0", "default"]))
    assert asked == [0, 0, None]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-2:]] == ["0", "default"]


def test_the_time_is_that_of_tiles_over_that_of_the_whole(picture, capsys, monkeypatch):
    monkeypatch.setattr(
        tiling, "timed", lambda net, image, device, tile, overlap=0: (image, 3.0 if tile else 2.0)
    )
    assert [row[-1] for row in table(picture, "--tiles 64", capsys).values()] == [1.5]


def test_a_picture_of_16_bits_is_measured_in_8(picture, capsys):
    rows = table(picture, "--tiles 64", capsys)
    write_image(picture, photograph(0, 96, 136).astype(np.uint16) * 257)
    same = table(picture, "--tiles 64", capsys)
    assert [row[:3] for row in same.values()] == [row[:3] for row in rows.values()]


def test_the_worst_block_is_found_wherever_it_is():
    a = np.zeros((64, 80, 3), np.uint8)
    b = a.copy()
    b[40:56, 17:33] = 90
    assert metrics.worst_block(a, b) == pytest.approx(90, abs=0.1)
    b[40:56, 17:33, 1:] = 0  # in one channel of three
    assert metrics.worst_block(a, b) == pytest.approx(30, abs=0.1)


def test_sides_are_multiples_of_8(capsys):
    with pytest.raises(SystemExit):
        tiling.get_args_parser().parse_args(["x.png", "--tiles", "100"])
    assert "--tiles: '100' is not 0 or a multiple of 8 from 64 on" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tiling.get_args_parser().parse_args(["x.png", "--tiles", "56"])
    assert "--tiles: '56' is not 0 or a multiple of 8 from 64 on" in capsys.readouterr().err


def test_equal_pictures_are_left_out_of_the_mean_and_bad_ones_are_named(picture, capsys):
    alone = table(picture, "--tiles 64", capsys)[64, tiling.OVERLAP]
    small, bad = picture.with_name("small.png"), picture.with_name("bad.png")
    write_image(small, photograph(1, 48, 64))
    bad.write_bytes(b"no picture")
    command = [*map(str, (bad, picture, small)), "--device", "cpu", "--ckt_path"]
    command += [str(picture.with_name("net.pt")), "--tiles", "64"]
    assert tiling.main(tiling.get_args_parser().parse_args(command)) == 1
    said = capsys.readouterr()
    assert [float(value) for value in said.out.splitlines()[-1].split()[2:4]] == list(alone[:2])
    assert said.err.startswith("1 could not be used:\n  ") and "bad.png" in said.err
    with pytest.raises(UserError, match="bad.png"):
        tiling.main(tiling.get_args_parser().parse_args([str(bad), *command[3:]]))
