"""Restoring and scoring from the command line: every layout, what is written, what is said of bad files."""

import csv
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import dataset
import model_train
import support.restore
import test_view
from model_train import CheckpointError, DerainNetwork
from support import check, options
from support.errors import UserError
from support.fast import for_inference
from support.images import Video, load, read_image, write_image, write_video
from support.metrics import METRICS, mean_scores, score
from support.restore import restore
from tests.made import (
    DENSITIES,
    ROOT,
    interrupted,
    photograph,
    rain_on,
    random_genotype,
    view,
    write_network,
    write_pairs,
    write_scenes,
)


@pytest.fixture(autouse=True)
def network(folder):
    return write_network("net.pt")


def restored(net, image):
    """The network's output as it is saved: clamped and rounded to 8 bits."""
    with torch.inference_mode():
        output = net(dataset.to_tensor(image[None]))[0]
    return (output.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def table(folder="out"):
    with open(Path(folder, "results.csv"), newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def pictures(folder="out"):
    """The restored pictures: what is not the gallery's."""
    names = {file.relative_to(folder).as_posix() for file in Path(folder).rglob("*")}
    return {name for name in names if name.endswith((".png", ".jpg")) and not name.startswith("gallery/")}


def assert_scored(net, expected, folder="out"):
    """expected: {name: (rainy, clean)}. What is saved, results.csv and result_full.txt are all right."""
    rows = table(folder)
    assert list(rows) == list(expected)
    assert pictures(folder) == {f"{name}.png" for name in expected}
    text = Path(folder, "result_full.txt").read_text()
    outputs, inputs = [], []
    for name, (rainy, clean) in expected.items():
        output = read_image(Path(folder, f"{name}.png"))
        assert np.abs(output.astype(int) - restored(net, rainy)).max() <= 1  # float32 rounds differently
        assert not np.array_equal(output, rainy)
        outputs.append(score(output, clean))
        inputs.append(score(rainy, clean))
        for metric in METRICS:
            assert float(rows[name][metric]) == pytest.approx(outputs[-1][metric], abs=6e-5)
            assert float(rows[name][f"input_{metric}"]) == pytest.approx(inputs[-1][metric], abs=6e-5)
        assert (int(rows[name]["height"]), int(rows[name]["width"])) == clean.shape[:2]
        (line,) = [line for line in text.splitlines() if line.startswith(f"{name}  psnr_rgb")]
        assert line == f"{name}  " + "  ".join(f"{m} {outputs[-1][m]:.4f}" for m in METRICS)
    assert summary(text, "all") == (len(expected), *rounded(mean_scores(outputs)))
    assert summary(text, "all", untouched=True) == rounded(mean_scores(inputs))
    means = json.loads(Path(folder, "results.json").read_text())["means"]["all"]
    assert means["output"]["images"] == len(expected)
    for metric in METRICS:
        assert means["output"][metric] == pytest.approx(mean_scores(outputs)[metric])
        assert means["input"][metric] == pytest.approx(mean_scores(inputs)[metric])
    return outputs


def rounded(means):
    psnr_rgb, ssim_rgb, psnr_y, ssim_y = (means[metric] for metric in METRICS)
    return tuple(
        float(text) for text in (f"{psnr_rgb:.2f}", f"{ssim_rgb:.4f}", f"{psnr_y:.2f}", f"{ssim_y:.4f}")
    )


def summary(text, group, untouched=False):
    """The numbers in the line of a group of result_full.txt, or in the input's line below it."""
    lines = text.splitlines()
    (number,) = [i for i, line in enumerate(lines) if line.split()[:1] == [group]]
    if untouched:
        label, *values = lines[number + 1].split()
        assert label == "input"
        return tuple(map(float, values))
    count, *values = lines[number].split()[1:]
    return (int(count), *map(float, values))


# --- layouts ---


@pytest.mark.parametrize("side", ["left", "right"])
def test_side_by_side_pairs_are_scored(network, side, capsys):
    write_pairs(Path("pairs"), 3, side)
    assert view(f"--path pairs --clean_side {side} --result_path out") == 0
    clean = [photograph(i) for i in range(3)]
    assert_scored(network, {str(i): (rain_on(clean[i], i), clean[i]) for i in range(3)})
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == "checkpoint: net.pt"
    assert printed.splitlines()[1] == f"data: pairs: 3 side-by-side pairs, clean half {side}"
    report = Path("out", "result_full.txt").read_text().split("\n\n")[1]
    assert report.strip() in printed


def test_did_mdn_scenes_are_scored_by_density(network):
    write_scenes(Path("set"), 2)
    assert view("--path set/DID-MDN-training --result_path out") == 0
    expected = {
        f"{density}/{i}": (rain_on(photograph(100 + i), 3 * i + d), photograph(100 + i))
        for i in range(2)
        for d, density in enumerate(DENSITIES)
    }
    scores = dict(zip(expected, assert_scored(network, expected), strict=True))
    assert [row["density"] for row in table().values()] == 2 * list(DENSITIES)
    text = Path("out", "result_full.txt").read_text()
    for density in DENSITIES:
        of_it = [row for name, row in scores.items() if name.startswith(density)]
        assert summary(text, density) == (2, *rounded(mean_scores(of_it)))


def test_paired_folders_are_scored(network):
    expected = {}
    for i in range(2):
        clean = photograph(i, 19, 31)  # no multiple of 8
        write_image(Path("set", "target", f"{i}.png"), clean)
        for k in (1, 2):
            expected[f"{i}_{k}"] = rain_on(clean, k), clean
            write_image(Path("set", "input", f"{i}_{k}.png"), expected[f"{i}_{k}"][0])
    assert view("--path set --result_path out") == 0
    assert_scored(network, expected)


def test_a_metric_that_is_added_is_in_all_tables_and_what_lacks_it_is_not_done(monkeypatch):
    write_pairs(Path("pairs"), 1, "left")
    flags = "--path pairs --clean_side left --result_path out"
    assert view(flags) == 0
    monkeypatch.setitem(METRICS, "mae_rgb", ("MAE RGB", 3))
    monkeypatch.setattr(test_view, "COLUMNS", (*test_view.COLUMNS, "mae_rgb", "input_mae_rgb"))
    monkeypatch.setattr(test_view, "score", lambda *images: score(*images) | {"mae_rgb": 7.25})
    assert view(f"{flags} --skip_done") == 0
    text = Path("out", "result_full.txt").read_text()
    assert summary(text, "all")[-1] == summary(text, "all", untouched=True)[-1] == 7.25
    assert " MAE RGB\n" in text and "  mae_rgb 7.2500\n" in text
    assert float(table()["0"]["input_mae_rgb"]) == 7.25
    assert json.loads(Path("out", "results.json").read_text())["means"]["all"]["output"]["mae_rgb"] == 7.25
    page = Path("out", "index.html").read_text()
    assert "<th>MAE RGB</th>" in page and "<td>7.250 <small>from 7.250</small></td>" in page


@pytest.mark.parametrize("side", ["left", "right"])
def test_files_that_look_like_pairs_side_by_side_are_restored_whole_and_the_flag_is_named(
    network, side, capsys, monkeypatch
):
    monkeypatch.setattr(check, "rain_score", lambda rainy, clean: float(rainy.mean() - clean.mean()))
    for i in range(3):
        clean = photograph(i, 96, 128)
        halves = [clean, rain_on(clean, i)]
        write_image(f"pairs/{i}.png", np.hstack(halves if side == "left" else halves[::-1]))
    write_image("pairs/x.png", photograph(5, 96, 128))
    assert view("--path pairs --result_path out") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[1] == "data: pairs: 4 single images; without ground truth, so nothing is scored"
    assert printed[2] == (
        f"3 of 4 looked at seem to be side-by-side pairs, clean half {side}: give --clean_side {side}"
    )
    assert read_image("out/0.png").shape == (96, 256, 3)


def test_results_go_to_a_folder_and_not_to_a_file(network):
    write_image("a.png", photograph(0))
    with pytest.raises(UserError, match="--result_path b.png: must be a folder"):
        view("--path a.png --result_path b.png")


def test_rain_on_the_clean_side_is_said(folder, capsys):
    write_network("net.pt")
    write_pairs(folder / "pairs", 4)
    assert view("--path pairs --clean_side left --result_path out") == 0
    assert "the rain is on" not in capsys.readouterr().out
    assert view("--path pairs --clean_side right --result_path out") == 0
    assert "pairs: the rain is on the clean side (4 of 4 images" in capsys.readouterr().out


def test_a_folder_that_holds_training_scenes_alone_is_told_apart(folder):
    write_network("net.pt")
    write_scenes(folder / "set", 1)
    words = "--path set: holds training scenes alone; to restore them give set/DID-MDN-training"
    with pytest.raises(UserError, match=words):
        view("--path set --result_path out")


def test_a_folder_that_is_named_like_a_video_is_a_folder(network):
    write_image(Path("film.mp4", "1.png"), photograph(0))
    assert view("--path film.mp4 --result_path results") == 0
    assert Path("results", "1.png").exists()


def test_a_folder_without_ground_truth_is_restored_and_not_scored(network, capsys):
    """Its tables take the place of those of a scored set that was restored into the same folder."""
    write_pairs(Path("pairs"), 1)
    assert view("--path pairs --clean_side left --result_path out") == 0
    assert Path("out/result_full.txt").exists()
    Path("out/0.png").unlink()
    capsys.readouterr()
    write_image("photos/a.png", photograph(0, 21, 34))
    write_image("photos/deep/b.jpg", photograph(1, 40, 23))
    Path("photos/.git").mkdir()
    for name in ("c.HEIC", "deep/film.mp4", ".hidden.txt", ".git/config.foo"):
        Path("photos", name).touch()
    assert view("--path photos --result_path out") == 0
    said = capsys.readouterr().out
    assert "left alone: files of other kinds (.heic, .mp4); to restore a video, give it as --path\n" in said
    assert "PSNR" not in said
    assert pictures() == {"a.png", "deep/b.jpg"}
    output = read_image("out/a.png").astype(int)
    assert np.abs(output - restored(network, photograph(0, 21, 34))).max() <= 1
    assert read_image("out/deep/b.jpg").shape == (40, 23, 3)
    expected = {"a.png", "deep", "index.html", "gallery", "results.csv", "results.json"}
    expected |= {".done.0.jsonl", ".done.lock"}
    assert {file.name for file in Path("out").iterdir()} == expected
    rows = table()
    assert [(row["height"], row["width"]) for row in rows.values()] == [("21", "34"), ("40", "23")]
    assert all(row[metric] == row[f"input_{metric}"] == "" for row in rows.values() for metric in METRICS)
    facts = json.loads(Path("out/results.json").read_text())
    assert (facts["data"], facts["means"], facts["left_out"]) == ("photos", {}, [])


def test_results_keep_relative_names_also_where_only_the_suffix_differs(network):
    names = {"a.png", "a.jpg", "a.jpg.png", "deep er/a.jpg", "deep er/-é #.png"}
    for i, name in enumerate(sorted(names)):
        write_image(Path("photos", name), photograph(i))
    assert view("--path photos --result_path out") == 0
    assert pictures() == names


def test_a_name_that_is_the_gallery_s_own_is_refused(network, capsys):
    for name in ("gallery/small/00001-rain.jpg", "montage.png", "deep/gallery/a.png"):
        write_image(Path("photos", name), photograph(0))
    assert view("--path photos --result_path out --montage") == 1
    assert read_image("out/deep/gallery/a.png").shape == photograph(0).shape
    error = capsys.readouterr().err
    assert "2 could not be used" in error
    assert (
        "photos/montage.png: its result would have the name of the gallery's montage.png; rename the picture"
        in error
    )


def test_a_single_file_is_restored_in_its_own_kind(network):
    grey_with_alpha = np.dstack([photograph(0), np.full((24, 32), 99, np.uint8)])
    write_image("photo.png", grey_with_alpha)
    assert view("--path photo.png --result_path out") == 0
    assert pictures() == {"photo.png"}
    saved = cv2.imread("out/photo.png", cv2.IMREAD_UNCHANGED)
    assert saved.shape == (24, 32, 4)
    assert (saved[..., 3] == 99).all()
    assert np.abs(saved[..., 2::-1].astype(int) - restored(network, photograph(0))).max() <= 1


def test_a_side_by_side_file_alone_is_scored(network):
    write_pairs(Path("pairs"), 1)
    assert view("--path pairs/0.png --clean_side left --result_path out") == 0
    assert_scored(network, {"0": (rain_on(photograph(0), 0), photograph(0))})


def test_tiles_and_self_ensemble_are_used(network):
    write_image("photo.png", photograph(0, 100, 180))
    outputs = []
    for flags in ("", "--tile 64", "--self_ensemble"):
        assert view(f"--path photo.png --result_path out {flags}") == 0
        outputs.append(read_image("out/photo.png"))
    assert not np.array_equal(outputs[0], outputs[1])
    assert not np.array_equal(outputs[0], outputs[2])


def test_a_scale_is_used_and_named(network, capsys):
    write_pairs(Path("pairs"), 1)
    assert view("--path pairs --clean_side left --result_path out --scale 0.5") == 0
    rainy = dataset.read_scene(dataset.find("pairs", "left").scenes[0])[0][0]
    expected = restore(for_inference(network), rainy, scale=0.5)
    assert np.array_equal(read_image("out/0.png"), expected)
    assert not np.array_equal(expected, restore(for_inference(network), rainy))
    assert "scores of net.pt, scale 0.5, on the 8-bit pictures" in capsys.readouterr().out


def test_the_scale_of_each_picture_is_in_the_table(network, monkeypatch):
    """With a network that takes away what is a pixel wide, of noise whose grains are 1, 2 and 4 wide."""
    monkeypatch.setattr(support.restore, "_forward", lambda net, patch, *_: cv2.blur(patch, (3, 3)) / 255)
    monkeypatch.setattr(support.restore, "LEAST_COPY", 32 * 32)
    for size in (1, 2, 4):
        grains = np.random.default_rng(0).integers(0, 256, (128 // size, 128 // size, 3), np.uint8)
        write_image(f"photos/{size}.png", grains.repeat(size, 0).repeat(size, 1))
    for flag, expected in (
        ("", ["1", "1", "1"]),
        ("--scale 0.3", ["0.3", "0.3", "0.3"]),
        ("--scale auto", ["1", "0.5", "0.25"]),
    ):
        assert view(f"--path photos --result_path out {flag}") == 0
        assert [row["scale"] for row in table().values()] == expected


@pytest.mark.parametrize("number", ["0", "1.5", "-1", "nan", "half"])
def test_a_scale_that_is_none_is_a_mistake(number, capsys):
    with pytest.raises(SystemExit) as end:
        view(f"--path photo.png --scale={number}")
    assert end.value.code == 2
    assert f"'{number}' is not auto or a number above 0 and up to 1" in capsys.readouterr().err


def test_of_large_photographs_alone_it_is_said_that_wide_rain_stays(network, capsys, monkeypatch):
    monkeypatch.setattr(test_view, "WHOLE_PIXELS", 40 * 32)
    write_image("some/small.png", photograph(0, 32, 40))
    write_image("more/small.png", photograph(0, 32, 40))
    write_image("more/large.png", photograph(1, 32, 41))
    write_pairs(Path("pairs"), 1)
    for flags, said in (
        ("--path some", False),
        ("--path more", True),
        ("--path more --scale auto", False),
        ("--path more --scale 1", False),
        ("--path pairs --clean_side left", False),
    ):
        assert view(f"{flags} --result_path out") == 0
        assert ("and remain; if it does, try --scale auto" in capsys.readouterr().out) == said, flags


def test_equal_and_tiny_pictures_are_left_out_of_the_means_and_counted(network):
    torch.nn.init.zeros_(network.head.to_rgb.weight)  # with the residual: the input unchanged
    model_train.save(network, "net.pt")
    for i, (height, width) in enumerate([(24, 32), (24, 32), (9, 32)]):
        clean = photograph(i, height, width)
        write_image(Path("set", "target", f"{i}.png"), clean)
        write_image(Path("set", "input", f"{i}.png"), clean if i == 0 else rain_on(clean, i))
    assert view("--path set --result_path out") == 0
    rows = table()
    assert float(rows["0"]["psnr_rgb"]) == math.inf
    assert math.isnan(float(rows["2"]["ssim_rgb"]))
    text = Path("out", "result_full.txt").read_text()
    count, psnr, ssim, *_ = summary(text, "all")
    assert count == 3
    assert psnr == pytest.approx(np.mean([float(rows[n]["psnr_rgb"]) for n in "12"]), abs=0.01)
    assert ssim == pytest.approx(np.mean([float(rows[n]["ssim_rgb"]) for n in "01"]), abs=1e-4)
    said = [line for line in text.splitlines() if "not in the means" in line]
    assert [line.split()[0] for line in said] == ["outputs", "inputs"]
    assert all(f"1 of {metric}" in line for line in said for metric in METRICS)


def test_that_a_dry_input_is_not_in_the_mean_of_the_inputs_is_said(network):
    for i in range(2):
        write_image(Path("set", "target", f"{i}.png"), photograph(i))
        write_image(Path("set", "input", f"{i}.png"), photograph(i) if i else rain_on(photograph(i), i))
    assert view("--path set --result_path out") == 0
    (said,) = [line for line in Path("out/result_full.txt").read_text().splitlines() if "not in the" in line]
    assert said.split()[0] == "inputs" and "1 of psnr_rgb" in said and "ssim" not in said


# --- bad files ---


def test_a_bad_file_is_reported_and_the_rest_goes_on(network, capsys):
    write_pairs(Path("pairs"), 5, suffix=".jpg")
    Path("pairs/1.jpg").write_bytes(b"")
    Path("pairs/2.jpg").write_bytes(Path("pairs/2.jpg").read_bytes()[:300])
    write_image("pairs/3.jpg", photograph(0, 24, 63))
    assert view("--path pairs --clean_side left --result_path out") == 1
    assert list(table()) == ["0", "4"]
    assert pictures() == {"0.png", "4.png"}
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "3 could not be used:"
    assert [line.split(": ")[0].strip() for line in lines] == [f"pairs/{i}.jpg" for i in (1, 2, 3)]
    assert "63" in lines[2] and "odd" in lines[2]


def test_a_bad_file_given_alone_is_a_mistake_that_costs_no_earlier_result(network, monkeypatch):
    write_image("photo.bmp", photograph(0))
    assert view("--path photo.bmp --result_path out") == 0
    before = {file: file.stat().st_mtime_ns for file in Path("out").rglob("*")}
    Path("photo.bmp").write_bytes(Path("photo.bmp").read_bytes()[:-300])
    write_image("odd.png", photograph(0, 24, 63))
    monkeypatch.setattr(test_view, "restore", pytest.fail)
    for flags, words in (
        ("--path photo.bmp", "photo.bmp: is truncated"),
        ("--path odd.png --clean_side left", "odd.png: side by side, but its width of 63 is odd"),
    ):
        with pytest.raises(UserError, match=words):
            view(f"{flags} --result_path out")
        assert {file: file.stat().st_mtime_ns for file in Path("out").rglob("*")} == before


def test_a_picture_or_video_of_which_the_network_makes_none_is_named(network, capsys):
    for weight in network.parameters():
        if weight.ndim == 1:  # of BatchNorm
            torch.nn.init.constant_(weight, 1e30)
    model_train.save(network, "net.pt")
    write_image("photos/a.png", photograph(0, 24, 32))
    assert view("--path photos --result_path out") == 1
    said = "photos/a.png: the network's output is not finite; check its checkpoint"
    assert said in capsys.readouterr().err
    write_video("film.avi", [photograph(0, 32, 48)], 10)
    with pytest.raises(UserError, match="film.avi: the network's output is not finite; run it without --amp"):
        view("--path film.avi --result_path out --amp")


def test_a_bad_file_of_a_scene_names_the_pictures_that_it_costs(network, capsys):
    write_scenes(Path("scenes"), 2)
    Path("scenes/DID-MDN-training/Rain_Medium/train2018new/1.png").write_bytes(b"")
    flags = "--path scenes/DID-MDN-training --result_path out --montage Heavy/0 Light/1"
    assert view(flags) == 1
    assert list(table()) == ["Heavy/0", "Medium/0", "Light/0"]
    bad, montage = capsys.readouterr().err.splitlines()[1:]
    assert "Rain_Medium/train2018new/1.png: is empty" in bad
    assert bad.endswith("; so Heavy/1, Medium/1, Light/1 are not restored")
    assert (
        montage == "  --montage Light/1: that picture was not restored" and Path("out/montage.png").exists()
    )


def test_a_picture_without_a_partner_is_reported_and_the_rest_goes_on(network, capsys):
    for i in range(3):
        write_image(Path("set", "target", f"{i}.png"), photograph(i))
        write_image(Path("set", "input", f"{i}.png"), photograph(i, 24, 32 if i else 30))
    Path("set/target/2.png").unlink()
    assert view("--path set --result_path out") == 1
    assert list(table()) == ["1"]
    out, error = capsys.readouterr()
    assert "3 pairs" not in out
    assert "2 pairs in input/ and target/; 1 files have no partner" in out
    assert "not in the scores: 1 pictures not done, 1 files without a partner" in out
    assert "1 pictures not done, 1 files without" in Path("out", "result_full.txt").read_text()
    facts = json.loads(Path("out", "results.json").read_text())
    assert (facts["pictures"], facts["without_partner"]) == (2, 1)
    assert [line.split(": ")[0] for line in facts["left_out"]] == ["set/input/2.png", "set/target/0.png"]
    assert "input/2.png: has no partner" in error
    assert "0.png: 32x24 pixels, but" in error


def test_a_full_disk_stops_the_run_and_what_was_done_keeps_its_tables(network, capsys, monkeypatch):
    write_pairs(Path("pairs"), 4)
    write = Path.write_bytes

    def full(self, data):
        if len(pictures()) == 2 and self.suffix == ".png":
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert view("--path pairs --clean_side left --result_path out") == 1
    error = capsys.readouterr().err
    assert "out/2.png: cannot be written: No space left on device; stopped there, 2 of 4 pictures" in error
    assert "3.png" not in error
    assert list(table()) == ["0", "1"]
    assert not list(Path("out").rglob("*00003-*"))
    assert json.loads(Path("out", "results.json").read_text())["means"]["all"]["output"]["images"] == 2
    assert "2 pictures not done" in Path("out", "result_full.txt").read_text()
    assert Path("out", "index.html").is_file()


def test_of_a_picture_that_finds_no_room_half_way_nothing_stays(network, monkeypatch):
    """And the tables, which come after it, have that room."""
    write_pairs(Path("pairs"), 2)
    write = Path.write_bytes

    def full(self, data):
        if self.suffix == ".jpg" and len(pictures()) == 2:
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert view("--path pairs --clean_side left --result_path out") == 1
    assert pictures() == {"0.png"} and list(table()) == ["0"]


def test_ctrl_c_within_the_first_picture_leaves_none_that_the_same_command_would_refuse(network, monkeypatch):
    write_pairs(Path("pairs"), 2)
    for kind, method in ((test_view.Gallery, "add"), (test_view.Journal, "_write")):
        with monkeypatch.context() as patch:
            patch.setattr(kind, method, lambda *args: signal.raise_signal(signal.SIGINT))
            assert view("--path pairs --clean_side left --result_path out") == 130
        assert not pictures()
        assert view("--path pairs --clean_side left --result_path out --skip_done") == 0
        shutil.rmtree("out")


def test_a_table_that_cannot_be_written_is_one_line_after_the_scores(network, capsys):
    write_pairs(Path("pairs"), 1)
    Path("pairs/1.png").touch()
    Path("out/results.csv/taken").mkdir(parents=True)
    assert view("--path pairs --clean_side left --result_path out") == 1
    out, error = capsys.readouterr()
    assert "all           1" in out
    assert "pairs/1.png: is empty" in error
    assert "out/results.csv: cannot be written" in error
    assert {"results.json", "result_full.txt", "index.html"} <= set(os.listdir("out"))
    Path("other/montage.png/taken").mkdir(parents=True)
    assert view("--path pairs --clean_side left --result_path other --montage") == 1
    assert "the montage" not in capsys.readouterr().out


def test_ctrl_c_leaves_tables_of_what_was_done(network, capsys, monkeypatch):
    write_pairs(Path("pairs"), 4)
    monkeypatch.setattr(test_view, "restore", interrupted(3, lambda: signal.raise_signal(signal.SIGINT)))
    assert view("--path pairs --clean_side left --result_path out") == 130
    stopped = capsys.readouterr().err.splitlines()[-1]
    assert stopped == "interrupted: 2 of 4 pictures are done"
    assert json.loads(Path("out", "results.json").read_text())["left_out"] == [stopped]
    assert list(table()) == ["0", "1"]
    assert pictures() == {"0.png", "1.png"}


def test_ctrl_c_has_its_status_whatever_else_is_left_out(network, monkeypatch):
    write_image(Path("set", "input", "0.png"), photograph(0))
    for i in range(2):
        write_image(Path("set", "target", f"{i}.png"), photograph(i))
    monkeypatch.setattr(test_view, "restore", interrupted(1, lambda: signal.raise_signal(signal.SIGINT)))
    assert view("--path set --result_path out") == 130


def test_a_signal_while_the_tables_are_written_does_not_cost_them(network, monkeypatch):
    write_pairs(Path("pairs"), 2)
    together, asked = test_view.together, []

    def asking(*outcome):
        asked.append(signal.raise_signal(signal.SIGTERM))
        return together(*outcome)

    monkeypatch.setattr(test_view, "together", asking)
    assert view("--path pairs --clean_side left --result_path out") == 0
    assert asked and list(table()) == ["0", "1"]


def test_ctrl_c_that_ends_the_reader_of_the_output_too_leaves_the_tables(network, monkeypatch):
    """As under `| tee log.txt`, where nothing can be printed any more."""
    write_pairs(Path("pairs"), 2)
    read, write = os.pipe()
    lines = os.fdopen(write, "w", buffering=1)

    def ctrl_c():
        os.close(read)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(BrokenPipeError):
        patch.setattr(test_view, "restore", interrupted(2, ctrl_c))
        patch.setattr(sys, "stdout", lines)
        view("--path pairs --clean_side left --result_path out --montage")
    assert list(table()) == ["0"]
    assert {"results.json", "result_full.txt", "index.html", "montage.png"} <= set(os.listdir("out"))


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no text are Linux's")
def test_names_that_are_no_text_are_scored_too(network):
    name = os.fsdecode(b"caf\xe9")
    write_pairs(Path("pairs"), 1)
    Path("pairs/0.png").rename(Path("pairs", f"{name}.png"))
    assert view("--path pairs --clean_side left --result_path out") == 0
    assert Path("out", f"{name}.png").is_file()
    assert b"caf\xe9," in Path("out", "results.csv").read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="such names are not allowed there")
@pytest.mark.parametrize("name", ["a\rb", "a\nb", 'a "b", c', "a\r\nb"])
def test_any_name_is_one_row_of_the_table(network, name):
    write_image(Path("set", f"{name}.png"), photograph(0))
    assert view("--path set --result_path out") == 0
    assert list(table()) == [name]
    assert Path("out", "results.csv").read_bytes().startswith(b"name,density,height,")
    assert not Path("out", "results.csv").read_bytes().endswith(b"\r\n")


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right there")
def test_a_link_to_nothing_is_reported_as_any_bad_file(network, capsys):
    write_pairs(Path("pairs"), 2)
    Path("pairs/1.png").unlink()
    Path("pairs/1.png").symlink_to("gone.png")
    assert view("--path pairs --clean_side left --result_path out") == 1
    assert "pairs/1.png: cannot be read: No such file" in capsys.readouterr().err
    assert list(table()) == ["0"]


def test_scores_say_what_they_are_of_but_the_default(network, capsys):
    write_pairs(Path("pairs"), 1)
    assert view("--path pairs --clean_side left --result_path out --tile 64 --self_ensemble --montage") == 0
    out = capsys.readouterr().out
    assert "scores of net.pt, self-ensemble of 4, tiles of 64, on the 8-bit pictures" in out
    assert f"the montage: {Path('out', 'montage.png')}" in out
    assert "<dt>tiles</dt><dd>of 64</dd>" in Path("out", "index.html").read_text(encoding="utf-8")


def test_only_bad_files_write_no_results(network):
    Path("photos").mkdir()
    Path("photos/a.jpg").write_text("no image")
    assert view("--path photos --result_path out") == 1
    assert not Path("out").exists()
    write_image("good/b.png", photograph(0))
    for path, status in (("good", 0), ("photos", 1), ("good", 0)):
        assert view(f"--path {path} --result_path out") == status
        assert pictures() == {"b.png"}
        tables = {"results.csv", "results.json", "index.html"}  # not those of the run before
        assert tables & set(os.listdir("out")) == (tables if path == "good" else set())


def test_a_picture_too_large_for_the_memory_is_reported_and_the_rest_goes_on(network, capsys, monkeypatch):
    """Numpy and PyTorch each say so in their own way; what else goes wrong is no matter of size."""
    write_pairs(Path("pairs"), 4)
    restore = test_view.restore
    opencvs = cv2.error("Insufficient memory")
    opencvs.code = cv2.Error.StsNoMem
    errors = [opencvs, RuntimeError("... DefaultCPUAllocator: can't allocate memory: ..."), None, None]
    errors += [MemoryError(), *3 * [None]]

    def too_large(*args, **options):
        if error := errors.pop(0):
            raise error
        return restore(*args, **options)

    monkeypatch.setattr(test_view, "restore", too_large)
    assert view("--path pairs --clean_side left --result_path out") == 1
    assert list(table()) == ["2", "3"]
    error = capsys.readouterr().err
    assert "pairs/0.png: too large for the memory here; see --tile" in error and "pairs/1.png: too" in error
    assert view("--path pairs --clean_side left --result_path more") == 1
    assert list(table("more")) == ["1", "2", "3"]
    errors.append(RuntimeError("another"))
    with pytest.raises(RuntimeError, match="another"):
        view("--path pairs --clean_side left --result_path other")


def in_colour(net, rgb, tell_scale, **options):
    tell_scale(1)
    return rgb // np.uint8([1, 2, 3])


def test_a_grey_picture_is_grey_in_the_gallery_too(network, monkeypatch):
    cv2.imwrite("grey.png", photograph(0)[..., 0])
    monkeypatch.setattr(test_view, "restore", in_colour)
    assert view("--path grey.png --result_path out") == 0
    saved, shown = read_image("out/grey.png"), read_image("out/gallery/00001-restored.jpg")
    assert np.ptp(saved, 2).max() == 0
    assert np.abs(shown.astype(int) - saved).mean() < 3 and np.ptp(shown, 2).max() <= 2


@pytest.mark.parametrize("layout", ["input target", "side by side"])
def test_a_grey_picture_is_grey_where_it_is_scored_too(network, monkeypatch, layout):
    clean, rainy = photograph(0)[..., 0], photograph(1)[..., 0]
    if layout == "input target":
        flags = "--path set"
        for side, image in (("input", rainy), ("target", clean)):
            write_image(Path("set", side, "a.png"), image)
    else:
        flags = "--path set --clean_side right"
        write_image("set/a.png", np.hstack([rainy, clean]))
    monkeypatch.setattr(test_view, "restore", in_colour)
    assert view(f"{flags} --result_path out") == 0
    saved = load("out/a.png")
    assert saved.grey
    expected = score(saved.rgb, np.dstack([clean] * 3))
    assert float(table()["a"]["psnr_rgb"]) == pytest.approx(expected["psnr_rgb"], abs=6e-5)


# --- refused before anything is written ---


@pytest.mark.parametrize(
    ("flags", "error", "words"),
    [
        ("--path nowhere", UserError, "nowhere: no such file or folder"),
        ("--path empty", UserError, "empty: no images .* found$"),
        (
            "--path films",
            UserError,
            "films: no images .* found; to restore a video in it, give that as --path",
        ),
        ("--path pairs --ckt_path gone.pt", CheckpointError, "gone.pt: no such checkpoint"),
        ("--path pairs --ckt_path pairs", CheckpointError, "pairs: not a file"),
        ("--path pairs --ckt_path pairs/0.png", CheckpointError, "pairs/0.png: cannot be read"),
        ("--path pairs --device gpu", UserError, "--device gpu"),
        ("--path pairs --montage 7", UserError, "--montage 7: no picture of that name; there are 0$"),
    ],
)
def test_mistakes_are_refused_and_no_result_folder_is_made(flags, error, words):
    Path("empty").mkdir()
    Path("films").mkdir()
    Path("films", "one.mp4").touch()
    write_pairs(Path("pairs"), 1)
    with pytest.raises(error, match=words):
        view(f"{flags} --result_path out")
    assert not Path("out").exists()


@pytest.mark.parametrize("path", ["pairs", "film.avi"])
def test_a_result_folder_that_cannot_be_is_refused_before_any_work(path, monkeypatch):
    write_pairs(Path("pairs"), 1)
    write_video("film.avi", [photograph(0)], 10)
    Path("file").touch()
    monkeypatch.setattr(test_view, "restore", pytest.fail)
    for out in ("file", "file/below"):
        with pytest.raises(UserError, match=f"{out}: cannot be written: Not a directory"):
            view(f"--path {path} --result_path {out}")
    with pytest.raises(UserError, match="cannot be written: File name too long"):
        view(f"--path {path} --result_path {'x' * 300}")


@pytest.mark.parametrize("path", ["photos", "photos/a.png"])
def test_the_pictures_themselves_are_not_overwritten(path):
    write_image("photos/a.png", photograph(0))
    with pytest.raises(UserError, match="--result_path photos: lies among the pictures"):
        view(f"--path {path} --result_path ./photos/")
    assert np.array_equal(read_image("photos/a.png"), photograph(0))


def test_a_picture_is_not_overwritten_through_a_link_or_from_a_folder_above():
    write_image("real/a.png", photograph(0))
    Path("todo").mkdir()
    Path("todo/a.png").symlink_to("../real/a.png")
    write_image("photos/b.png", photograph(1))
    write_image("photos/photos/b.png", photograph(2))
    before = {file: file.read_bytes() for file in Path().rglob("*.png")}
    for path, out, names in (
        ("todo", "real", "real/a.png is todo/a.png, an input picture"),
        ("photos", ".", "photos/b.png is photos/b.png, an input picture"),
    ):
        with pytest.raises(UserError, match=rf"--result_path {re.escape(out)}: {names}"):
            view(f"--path {path} --result_path {out}")
    assert {file: file.read_bytes() for file in Path().rglob("*.png")} == before


def test_results_inside_the_pictures_folder_would_be_restored_again(network):
    write_image("photos/a.png", photograph(0))
    with pytest.raises(UserError, match="--result_path photos/out: lies among"):
        view("--path photos --result_path photos/out")
    assert not Path("photos/out").exists()
    write_image("out/gallery/a.png", photograph(0))
    write_image("out/gallery/small/a.png", photograph(0))
    for path in ("out/gallery", "out/gallery/small"):
        with pytest.raises(UserError, match="--result_path out: lies among"):
            view(f"--path {path} --result_path out")


def test_the_data_sets_root_stands_for_its_test_set(network):
    write_pairs(Path("Rain1200", "DID-MDN-test"), 2, "right")
    assert view("--path Rain1200 --result_path out") == 0
    assert list(table()) == ["0", "1"]


def test_a_missing_path_is_one_line_and_status_2_at_the_command_line(folder):
    done = subprocess.run(
        [sys.executable, str(ROOT / "test_view.py"), "--ckt_path", "net.pt", "--path", "nowhere"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["test_view.py: error: nowhere: no such file or folder"]
    assert [file.name for file in folder.iterdir()] == ["net.pt"]


# --- with no flags ---


def finished_run(name, seed, demo=False):
    Path(name).mkdir()
    Path(name, "options.json").write_text(json.dumps({"demo": demo}))
    Path(name, "summary.json").write_text("{}")
    torch.manual_seed(seed)
    model_train.save(DerainNetwork(random_genotype(seed), (2, 2, 2, 2)), Path(name, "best_psnr.pt"))


def test_the_newest_finished_network_is_the_default_and_said_first(network, capsys, monkeypatch):
    monkeypatch.setattr(test_view, "SHIPPED", Path("net.pt").absolute())
    write_image("photo.png", photograph(0))
    args = test_view.get_args_parser().parse_args("--path photo.png --result_path out --device cpu".split())
    assert test_view.main(args) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"checkpoint: {Path('net.pt').absolute()}"
    shipped = read_image("out/photo.png")
    finished_run("eval-EXP-1", seed=1)
    Path("eval-EXP-2").mkdir()
    model_train.save(network, "eval-EXP-2/best_psnr.pt")  # not finished
    assert test_view.main(args) == 0
    assert capsys.readouterr().out.splitlines()[0] == "checkpoint: eval-EXP-1/best_psnr.pt"
    assert not np.array_equal(read_image("out/photo.png"), shipped)


@pytest.mark.parametrize("upright, number, lines", [(True, 8, 1), (False, 8, 0), (True, 4, 0)])
def test_quarter_turns_of_a_network_that_was_not_trained_on_them_are_warned_of(
    upright, number, lines, capsys
):
    write_image("photo.png", photograph(0)[:16, :16])
    Path("run").mkdir()
    Path("net.pt").rename("run/net.pt")
    Path("run/options.json").write_text(json.dumps({"upright": upright}))
    view(f"--path photo.png --ckt_path run/net.pt --result_path out --self_ensemble {number}")
    assert capsys.readouterr().out.count("--self_ensemble 8: the network saw no quarter turns") == lines


def test_a_folder_of_truth_beside_none_of_rain_is_pointed_out(capsys):
    for folder in ("set/rainstreak", "set/gt"):
        write_image(f"{folder}/1.png", photograph(0)[:16, :16])
    assert view("--path set --result_path out") == 0
    assert "gt: named like ground truth, but no rainy folder is beside it;" in capsys.readouterr().out
    assert view("--path set/gt --result_path out2") == 0  # on purpose
    assert "named like" not in capsys.readouterr().out


def test_a_demos_network_is_not_taken_for_a_picture_without_a_word(network, capsys):
    write_image("photo.png", photograph(0))
    for demo, lines in ((False, 0), (True, 1)):
        finished_run(f"eval-EXP-{demo}", seed=1, demo=demo)
        os.utime(f"eval-EXP-{demo}/summary.json", (demo, demo))
        args = "--path photo.png --result_path out --device cpu"
        assert test_view.main(test_view.get_args_parser().parse_args(args.split())) == 0
        said = capsys.readouterr().out.splitlines()
        assert said[0] == f"checkpoint: eval-EXP-{demo}/best_psnr.pt"
        assert sum(f"hardly trained: --ckt_path {test_view.SHIPPED} is" in line for line in said) == lines
    write_pairs(Path("datasets/Rain1200/DID-MDN-test"), 1, clean_side="right")
    args = test_view.get_args_parser().parse_args("--result_path scored --device cpu".split())
    assert test_view.main(args) == 0  # nor is DID-MDN scored with it
    assert f"hardly trained: --ckt_path {test_view.SHIPPED} is" in capsys.readouterr().out
    with pytest.raises(UserError, match="--demo: the demo has its own pictures; leave out --demo or --path"):
        view("--path photo.png --demo")


def test_the_default_test_set_is_did_mdns_rain_left_clean_right(network):
    write_pairs(Path("datasets/Rain1200/DID-MDN-test"), 2, clean_side="right")
    assert view("--result_path out") == 0
    clean = [photograph(i) for i in range(2)]
    assert_scored(network, {str(i): (rain_on(clean[i], i), clean[i]) for i in range(2)})


def test_without_a_test_set_a_demo_is_scored_and_said(capsys, monkeypatch):
    def two_pairs(folder):
        write_pairs(Path(folder) / "DID-MDN-test", 2, clean_side="right")
        return Path(folder)

    monkeypatch.setattr(test_view, "demo_set", two_pairs)
    assert view("") == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == "checkpoint: net.pt"
    assert "THIS IS A DEMO: there is no datasets/Rain1200/DID-MDN-test, and no --path was given" in printed
    assert f"data: {options.DEMO_DATA}/DID-MDN-test: 2 side-by-side pairs, clean half right" in printed
    assert list(table("results")) == ["0", "1"]
    assert view("--demo --result_path again") == 0
    assert "THIS IS A DEMO" not in capsys.readouterr().out
    assert list(table("again")) == ["0", "1"]


# --- what is beside the scores ---


def test_results_json_says_where_the_scores_come_from(network):
    write_pairs(Path("pairs"), 1, "left")
    assert view("--path pairs --clean_side left --result_path out --self_ensemble") == 0
    facts = json.loads(Path("out", "results.json").read_text())
    assert facts["checkpoint"] == "net.pt"
    assert facts["sha256"] == hashlib.sha256(Path("net.pt").read_bytes()).hexdigest()
    assert facts["data"] == "pairs"
    assert facts["options"] == {"tile": None, "scale": 1, "self_ensemble": 4, "amp": False, "compile": []}
    assert facts["genotype"] == json.loads(json.dumps(network.genotype._asdict()))
    assert facts["versions"]["torch"] == torch.__version__
    assert {"python", "numpy", "cv2", "skimage"} < set(facts["versions"])
    assert "self-ensemble of 4" in Path("out", "result_full.txt").read_text()


def test_equal_pictures_are_null_in_json(network):
    torch.nn.init.zeros_(network.head.to_rgb.weight)  # with the residual: the input comes back
    model_train.save(network, "net.pt")
    clean = photograph(0)
    write_image("set/input/a.png", clean)
    write_image("set/target/a.png", clean)
    assert view("--path set --result_path out") == 0
    means = json.loads(Path("out", "results.json").read_text())["means"]["all"]["output"]
    assert means["psnr_rgb"] is None
    assert means["left_out"]["psnr_rgb"] == 1


def test_page_and_montage_show_the_pictures(network):
    write_pairs(Path("pairs"), 2, "left")
    assert view("--path pairs --clean_side left --result_path out --montage") == 0
    page = Path("out", "index.html").read_text(encoding="utf-8")
    assert "0.png" in page
    assert "1.png" in page
    assert read_image("out/montage.png").shape[1] > 3 * photograph(0).shape[1]
    with pytest.raises(UserError, match="nosuch"):
        view("--path pairs --clean_side left --result_path out --montage nosuch")


def test_a_montage_of_a_bad_picture_is_no_other_picture_left_out(network, capsys):
    write_pairs(Path("pairs"), 2)
    Path("pairs/1.png").write_bytes(b"")
    assert view("--path pairs --clean_side left --result_path out --montage 0 1") == 1
    assert "--montage 1: that picture was not restored" in capsys.readouterr().err
    assert [
        "pairs/1.png" in line for line in json.loads(Path("out/results.json").read_text())["left_out"]
    ] == [True]
    assert "1 left out" in Path("out/index.html").read_text()


def test_a_video_is_restored_frame_by_frame(network, capsys):
    frames = [photograph(i, 32, 47) for i in range(4)]
    write_video("film.avi", frames, 10)
    assert view("--path film.avi --result_path out") == 0
    source, result = Video("film.avi"), Video("out/film.avi")
    assert (result.fps, result.frames, result.size) == (10, 4, (32, 48))
    for before, after in zip(source, result, strict=True):
        assert np.abs(restored(network, before).astype(int) - after).mean() < 6  # the codec's loss
    assert "the result has no sound" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds the video"):
        view("--path film.avi --result_path .")
    Path("film.avi").rename("film.webm")
    with pytest.raises(UserError, match="holds the video"):
        view("--path film.webm --result_path .")
    with pytest.raises(UserError, match="--skip_done: is for pictures, and film.webm is a video"):
        view("--path film.webm --result_path out --skip_done")


def test_a_video_whose_pixels_become_square_is_said(network, capsys):
    write_video("film.mp4", [photograph(0, 32, 48)] * 3, 10)
    film = bytearray(Path("film.mp4").read_bytes())
    at = film.index(b"\0\0\1\x20") + 6  # MPEG-4's video object layer; in that byte its pixels' form
    assert (film[at] >> 3) & 15 == 1, "1:1"
    film[at] += 1 << 3
    Path("film.mp4").write_bytes(film)
    assert view("--path film.mp4 --result_path out") == 0
    assert "its pixels are square" in capsys.readouterr().out
    assert view("--path out/film.mp4 --result_path again") == 0
    assert "its pixels are square" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".mts", ".3gp", ".MPG"])
def test_a_video_is_told_by_any_of_the_usual_names(network, suffix):
    write_video("film.mp4", [photograph(0, 32, 48)] * 3, 10)
    Path("film.mp4").rename(f"film{suffix}")
    assert view(f"--path film{suffix} --result_path out") == 0
    assert Video(f"out/film{suffix}.mp4").frames == 3


def test_a_scale_for_a_video_is_a_number(network, capsys, monkeypatch):
    monkeypatch.setattr(test_view, "WHOLE_PIXELS", 40 * 32)
    write_video("film.avi", [photograph(i, 32, 48) for i in range(2)], 10)
    words = "--scale auto: the scale might change from frame to frame of film.avi; give a number"
    with pytest.raises(UserError, match=words):
        view("--path film.avi --result_path out --scale auto")
    assert not Path("out").exists()
    for flags, said in (("--scale 0.5", False), ("", True)):
        assert view(f"--path film.avi --result_path out {flags}") == 0
        assert ("; if it does, try --scale 0.5" in capsys.readouterr().out) == said


def test_a_video_that_ends_early_is_reported_with_status_1(network, capsys, monkeypatch):
    write_video("film.avi", [photograph(i, 32, 48) for i in range(4)], 10)
    monkeypatch.setattr(Video, "__init__", promising(Video.__init__, 9))
    assert view("--path film.avi --result_path out") == 1
    assert "film.avi: ends early, after 4 of 9 frames" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_of_an_interrupted_video_nothing_is_written(network, capsys, monkeypatch, number):
    write_video("film.avi", [photograph(i, 32, 48) for i in range(4)], 10)
    monkeypatch.setattr(test_view, "restore", interrupted(3, lambda: signal.raise_signal(number)))
    assert view("--path film.avi --result_path out") == 130
    assert "interrupted: out/film.avi is not written" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_video_replaces_its_own_result_and_no_other_film(network):
    write_video("film.avi", [photograph(i, 32, 48) for i in range(2)], 10)
    Path("mine").mkdir()
    shutil.copy("film.avi", "mine/film.avi")
    with pytest.raises(UserError, match="mine/film.avi is no result of an earlier run"):
        view("--path film.avi --result_path mine")
    assert os.listdir("mine") == ["film.avi"]
    assert [view("--path film.avi --result_path out") for _ in range(2)] == [0, 0]
    shutil.copy("film.avi", "film.webm")
    assert view("--path film.webm --result_path out") == 0
    write_pairs(Path("pairs"), 1)
    assert view("--path pairs --result_path out") == 0  # and pictures may come beside them
    assert {"film.avi", "film.webm.mp4", "0.png"} <= set(os.listdir("out"))


@pytest.mark.parametrize("name", ["index.html", "results.csv", "montage.png", "1.png"])
def test_a_file_that_is_no_result_is_not_replaced(network, name):
    write_pairs(Path("pairs"), 2)
    Path("mine").mkdir()
    Path("mine", name).write_text("a user's own")
    with pytest.raises(UserError, match=f"--result_path mine: mine/{name} is no result of an earlier run"):
        view("--path pairs --clean_side left --result_path mine")
    assert os.listdir("mine") == [name] and Path("mine", name).read_text() == "a user's own"
    Path("mine", name).rename("mine/notes.txt")
    assert [view("--path pairs --clean_side left --result_path mine") for _ in range(2)] == [0, 0]
    assert Path("mine", "notes.txt").read_text() == "a user's own"


def test_a_folder_of_results_that_cannot_be_made_stops_no_other(network, capsys):
    for name in ("a.png", "sub/b.png", "c.png"):
        write_image(Path("set", name), photograph(0))
    Path("out").mkdir()
    Path("out", "sub").touch()
    assert view("--path set --result_path out") == 1
    assert "1 could not be used:\n  out/sub/b.png: cannot be written" in capsys.readouterr().err
    assert {"a.png", "c.png"} <= set(os.listdir("out"))


def test_a_folder_that_cannot_be_read_is_reported_and_the_status_tells(network, capsys, closed):
    for name in ("a.png", "closed/b.png", "lost+found/c.png"):
        write_image(Path("set", name), photograph(0))
    assert view("--path set --result_path out") == 1
    said = "set/closed: cannot be read: Permission denied"
    assert f"1 could not be used:\n  {said}" in capsys.readouterr().err
    assert json.loads(Path("out", "results.json").read_text())["left_out"] == [said]


def test_a_video_is_for_one_process(network, monkeypatch):
    write_video("film.avi", [photograph(0, 32, 48)], 10)
    monkeypatch.setattr(test_view.distributed, "size", lambda: 2)
    with pytest.raises(UserError, match="film.avi: a video is restored by one process; leave torchrun out"):
        view("--path film.avi --result_path out")


def promising(init, frames):
    def wrapped(self, path):
        init(self, path)
        self.frames = frames

    return wrapped


def test_a_video_is_not_overwritten_through_a_link(network):
    write_image("a.png", photograph(1))
    assert view("--path a.png --result_path real") == 0  # now a folder of results
    write_video("real/film.avi", [photograph(0, 32, 48)], 10)
    before = Path("real/film.avi").read_bytes()
    Path("todo").mkdir()
    Path("todo/film.avi").symlink_to("../real/film.avi")
    with pytest.raises(UserError, match="holds the video to restore"):
        view("--path todo/film.avi --result_path real")
    assert Path("real/film.avi").read_bytes() == before


def test_it_restores_in_another_thread_too_and_leaves_signals_alone():
    """As in a worker of a program with a window, which has its own handlers."""
    own = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        write_image("a.png", photograph(1))
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(view, "--path a.png --result_path out").result() == 0
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    finally:
        signal.signal(signal.SIGTERM, own)
    assert pictures() == {"a.png"}


def test_a_ground_truth_is_not_overwritten_through_a_link(network):
    write_image("a.png", photograph(1))
    assert view("--path a.png --result_path real") == 0
    write_image("real/0.png", photograph(0))
    write_image("set/input/0.png", rain_on(photograph(0), 0))
    Path("set/target").mkdir()
    Path("set/target/0.png").symlink_to("../../real/0.png")
    with pytest.raises(UserError, match="--result_path real: real/0.png is set/target/0.png, a ground truth"):
        view("--path set --result_path real")
    assert np.array_equal(read_image("real/0.png"), photograph(0))


def test_of_several_processes_the_worst_outcome_counts(monkeypatch):
    others = [[(0, "a")], ["interrupted:"]]
    monkeypatch.setattr(test_view.distributed, "join", lambda found: found + others.pop(0))
    monkeypatch.setattr(test_view.distributed, "gather", lambda status: [status, 130])
    assert test_view.together([(1, "b")], "", 0) == (["a", "b"], "interrupted:", 130)


def test_a_table_alone_that_cannot_be_written_makes_the_status_1(network):
    write_pairs(Path("pairs"), 1)
    Path("out/results.csv/taken").mkdir(parents=True)
    assert view("--path pairs --clean_side left --result_path out") == 1
