"""How cost grows: what is measured is finite and of the step named, slopes fit, the picture is complete."""

import json
import math
import os
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

from support import benchmark, devices, distributed, growth
from support.errors import UserError
from tests.made import ROOT, at_the_command_line

SVG = "{http://www.w3.org/2000/svg}"
FACTS = {"machine": "a <fast> one", "cores": 4, "torch": "2.15", "threads": 1, "channels": [4, 4, 4, 4]}


def parse(*flags):
    tiny = "--device cpu --channels 4 4 4 4 --repeats 1".split()
    return growth.get_args_parser().parse_args([*tiny, *flags])


def curve(row, name, xs, **costs):
    """Points of a curve whose costs are constant * x ** power."""
    return [
        {"row": row, "curve": name, "x": x, **{field: a * x**power for field, (a, power) in costs.items()}}
        for x in xs
    ]


@pytest.fixture
def points():
    linear = {"seconds": (0.3, 1.0), "mb": (100.0, 1.0)}
    made = curve("pixels", "whole", (0.25, 1, 4), **linear)
    made += curve("pixels", "tiled", (2, 4, 8), seconds=(0.3, 1.0), mb=(900.0, 0.0))
    for row in ("batch", "patch", "width"):
        made += curve(row, "training", (16, 64), **linear)
        made += curve(row, "search", (16, 64), seconds=(2.0, 1.5), mb=(300.0, 1.0))
    made += curve("memory", "training x2", (8, 16), mb=(300.0, 1.0))
    for name in ("decoding", "--cache"):
        made += [{"row": "loader", "curve": name, "x": x, "scenes_per_second": 10.0 + x} for x in (0, 1)]
    made += curve("processes", "training", (1, 2), seconds=(2.0, -1.0))
    made += curve("processes", "test_view", (1, 2), seconds=(2.0, -0.5))
    return made


@pytest.fixture
def here(monkeypatch):
    """Points are measured in this process, as starting others takes longer than their steps."""

    def alone(args, make, repeats=None):
        return growth.measure(make, args.device, torch.get_num_threads(), repeats or args.repeats)

    monkeypatch.setattr(growth, "alone", alone)
    monkeypatch.setattr(growth, "keep_freed_memory", lambda: None)  # it cannot be taken back


# --- measuring ---


def run(capsys, tmp_path, *flags):
    """The points that --json writes; the table printed says the same."""
    growth.main(parse(*flags, "--json", str(tmp_path / "growth.json")))
    points = json.loads((tmp_path / "growth.json").read_text())["points"]
    table = capsys.readouterr().out
    assert all(growth.table_line(point) in table for point in points)
    for point in points:
        assert all(math.isfinite(value) and value > 0 for key, value in point.items() if key in growth.COSTS)
    return points


@pytest.mark.parametrize(
    ("row", "xs", "sizes"),  # sizes: (scenes, patch, channels of the finest branch) of the training steps
    [
        ("batch", [1, 2, 4, 8], [(1, 64, 4), (2, 64, 4), (4, 64, 4), (8, 64, 4)]),
        ("patch", [1024, 4096, 16384], [(2, 32, 4), (2, 64, 4), (2, 128, 4)]),
        ("width", [2, 4, 8, 16], [(2, 64, 2), (2, 64, 4), (2, 64, 8), (2, 64, 16)]),
        ("memory", [4, 8, 16, 32], [(4, 64, 4), (8, 64, 4), (16, 64, 4), (32, 64, 4)]),
    ],
)
def test_what_is_measured_is_of_the_size_that_is_said(row, xs, sizes, monkeypatch, capsys, tmp_path):
    asked = []

    def alone(args, make, repeats=None):
        name, options, _ = make.args
        asked.append((name, (options.batch_size, options.patch_size, options.channels[0])))
        return {"seconds": 1.0, "mb": 1.0}

    monkeypatch.setattr(growth, "alone", alone)
    points = run(capsys, tmp_path, "--rows", row)
    assert [point["x"] for point in points][: len(xs)] == xs
    assert [size for _, size in asked[: len(sizes)]] == sizes
    assert {(point["curve"].split()[0], name) for point, (name, _) in zip(points, asked, strict=True)} == {
        ("training", "training_step"),
        ("search", "weight_and_arch_step"),
    }
    if row == "memory":  # of each step at two widths, the released batch last
        assert [size for _, size in asked[3::4]] == [(32, 64, 4), (32, 64, 8), (16, 64, 4), (16, 64, 8)]
        assert not any("seconds" in point for point in points)


def test_widths_that_are_measured_are_even():
    assert growth.widened([18, 4, 2, 64], 0.5) == [8, 2, 2, 32]
    assert growth.widened([18, 4, 2, 64], 2) == [36, 8, 4, 128]


def test_a_points_first_step_is_not_in_its_seconds(monkeypatch):
    times = iter([90.0, 3.0, 1.0, 2.0])
    monkeypatch.setattr(growth, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(growth.benchmark, "milliseconds", lambda step, device: 1000 * next(times))
    monkeypatch.setattr(growth, "PATIENCE", 1000)
    threads = torch.get_num_threads()
    assert growth.measure(lambda: None, torch.device("cpu"), threads, repeats=3)["seconds"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", growth.STEPS)
def test_a_larger_step_of_either_script_takes_more_memory(name):
    args = parse()
    args.device = torch.device("cpu")
    small, large = (
        growth.measure(growth.a_step(args, name, 1, side), args.device, torch.get_num_threads(), repeats=1)
        for side in (16, 64)
    )
    assert 0 < small["mb"] < large["mb"]
    assert 0 < small["seconds"] < math.inf and 0 < large["seconds"] < math.inf


def test_pictures_are_restored_whole_and_in_tiles_by_the_light_network(here, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(growth, "WHOLE", (0.01, 0.02))
    monkeypatch.setattr(growth, "TILED", (0.01,))
    seen, restore = [], growth.restore

    def recorded(net, image, device, tile=None):
        seen.append((image.shape, tile))
        return restore(net, image, device, tile)

    monkeypatch.setattr(growth, "restore", recorded)
    points = run(capsys, tmp_path, "--rows", "pixels")
    assert [(point["curve"], point["x"]) for point in points] == [
        ("whole", 0.00896),
        ("whole", 0.02048),
        ("tiled", 0.00896),
    ]
    # A small one first; each then once for its memory and once for its time.
    assert seen == [
        *[((64, 64, 3), None), *2 * [((80, 112, 3), 0)]],
        *[((64, 64, 3), None), *2 * [((128, 160, 3), 0)]],
        *[((64, 64, 3), None), *2 * [((80, 112, 3), None)]],
    ]


def test_a_point_is_measured_in_a_process_of_its_own_whose_death_is_told():
    args = parse()
    args.device = torch.device("cpu")
    point = growth.alone(args, growth.a_step(args, "training", 1, patch_size=16))
    assert point["mb"] > 0 and 0 < point["seconds"] < math.inf
    with pytest.raises(UserError, match="killed, perhaps for lack of memory"):
        growth.alone(args, os.abort)


def test_memory_is_not_measured_where_it_would_take_more_than_is_allowed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(growth, "alone", lambda args, make, repeats: {"mb": 100.0 * make.args[1].batch_size})
    points = run(capsys, tmp_path, "--rows", "memory", "--most_gb", "0.8")
    assert [p["x"] for p in points if p["curve"] == "training x1"] == [4, 8]
    assert [p["x"] for p in points if p["curve"] == "search x2"] == [2, 4, 8]


@pytest.mark.slow
def test_two_processes_share_a_step():
    seconds = growth.launch(2, growth.train_together, [4, 4, 4, 4], 2, 1)
    assert math.isfinite(seconds) and seconds > 0


def test_processes_share_the_scenes_of_a_step_and_the_first_is_not_counted(monkeypatch):
    asked, times = [], iter([0.0, 50.0, 60.0, 63.0, 70.0, 71.0, 80.0, 82.0])
    for name in ("start", "barrier", "end"):
        monkeypatch.setattr(distributed, name, lambda: None)
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed, "average", lambda tensors: tensors)
    monkeypatch.setattr(growth, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(growth.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(
        benchmark, "training_step", lambda net, batch, *_: asked.append(len(batch.clean)) or (lambda: None)
    )
    assert growth.train_together([2, 2, 2, 2], 4, 3) == 2
    assert asked == [2]


@pytest.mark.slow
def test_loaders_and_processes_are_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(growth, "WORKERS", (0, 1))
    monkeypatch.setattr(growth, "LOADED", 2)
    monkeypatch.setattr(growth, "FOLDER", (2, (32, 32)))
    monkeypatch.setattr(benchmark, "LOADER_SECONDS", 0.1)
    points = run(capsys, tmp_path, "--rows", "loader", "processes")
    loaders = {(p["curve"], p["x"]): p["scenes_per_second"] for p in points if p["row"] == "loader"}
    assert loaders.keys() == {(name, workers) for name in ("decoding", "--cache") for workers in (0, 1)}
    assert all(loaders["--cache", workers] > loaders["decoding", workers] > 0 for workers in (0, 1))
    launched = [(p["curve"], p["x"]) for p in points if p["row"] == "processes"]
    assert launched == [("training", 1), ("training", 2), ("test_view", 1), ("test_view", 2)]


# --- what is said and drawn ---


def test_a_slope_is_the_power_of_what_grows():
    assert growth.slope([(x, 3 * x**1.5) for x in (1, 2, 5)]) == pytest.approx(1.5)
    assert growth.slope([(1, 1.0), (10, 10.0), (100, 1.0)]) == pytest.approx(0)


def test_what_took_no_time_that_could_be_measured_is_left_out():
    made = curve("batch", "training", (1, 2), seconds=(0.0, 1.0), mb=(100.0, 1.0))
    assert growth.curves(made, "batch", "seconds") == {}
    assert not [line for line in growth.conclusions(made) if "seconds" in line]


def test_what_grows_worse_than_linear_is_pointed_out(points):
    said = growth.conclusions(points)
    worse = {tuple(line.split()[:3]) for line in said if "WORSE" in line}
    assert worse == {
        ("batch", "search", "seconds"),
        ("patch", "search", "seconds"),
    }  # a width's squares are due
    assert "memory in tiles: 0.0 bytes a further pixel, of which its result is 3" in said
    assert "2 processes: training 2.00 times as fast as 1" in said
    assert "2 processes: test_view 1.41 times as fast as 1" in said


def test_the_picture_has_every_curve_with_its_name_and_slope_and_nothing_leaves_it(points):
    root = ET.fromstring(growth.svg(FACTS, points))
    texts = [element.text for element in root.iter(f"{SVG}text")]
    for name, panels in {
        "whole": 2,
        "tiled": 2,
        "training": 7,
        "search": 6,
        "decoding": 1,
        "test_view": 1,
    }.items():
        assert texts.count(name) == panels, name
    assert texts.count("1.50") == 3 and texts.count("0.00") == 1
    assert "a <fast> one, threads: 1, torch 2.15" in texts and "not measured" not in texts
    lines = [line for line in root.iter(f"{SVG}polyline") if line.get("stroke") in growth.INKS]
    drawn = {(p["row"], p["curve"]) for p in points if p["row"] in growth.SIZES}
    assert len(lines) == 2 * len(drawn) + 4
    assert len(list(root.iter(f"{SVG}circle"))) == 2 * (3 + 3 + 3 * 2 * 2) + 2 * 2 + 2 * 2
    width, height = (float(root.get(side)) for side in ("width", "height"))
    for line in root.iter(f"{SVG}polyline"):
        for x, y in (map(float, point.split(",")) for point in line.get("points").split()):
            assert 0 <= x <= width and 0 <= y <= height
    heights = [float(text.get("y")) for text in root.iter(f"{SVG}text")]
    assert min(heights) > 0 and max(heights) < height


def test_labels_of_curves_that_end_together_are_apart(points):
    same = [point | {"seconds": 1.0, "mb": 1.0} for point in points if point["row"] == "batch"]
    root = ET.fromstring(growth.svg(FACTS, same))
    heights = {
        name: [float(text.get("y")) for text in root.iter(f"{SVG}text") if text.text == name]
        for name in ("training", "search")
    }
    for a, b in zip(*heights.values(), strict=True):
        assert abs(a - b) >= 30


def test_what_was_not_measured_is_said_in_its_panel(points):
    root = ET.fromstring(growth.svg(FACTS, [point for point in points if point["row"] == "loader"]))
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert texts.count("not measured") == 9


@pytest.mark.parametrize("low, high", [(1.0, 1.0), (0.03, 0.05), (1, 2), (260, 4100), (0.1, 9000), (7, 7000)])
def test_an_axis_has_a_few_round_numbers_that_enclose_what_is_drawn(low, high):
    ticks = growth._ticks(low, high)
    assert ticks[0] <= low and high <= ticks[-1] and len(ticks) <= 7
    assert all(f"{tick:.0e}"[0] in "1235" for tick in ticks)


def test_the_readmes_picture_is_of_the_points_beside_it():
    measured = growth.read(ROOT / "support" / "growth.json")
    picture = (ROOT / "support" / "growth.svg").read_text(encoding="utf-8")
    assert picture == growth.svg(measured["facts"], measured["points"])
    assert {point["row"] for point in measured["points"]} == set(growth.ROWS)


# --- from the command line ---


def test_a_file_is_drawn_again_without_measuring(points, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(growth, "ROWS", dict.fromkeys(growth.ROWS))
    (tmp_path / "a.json").write_text(json.dumps({"facts": FACTS, "points": points}))
    growth.main(parse("--from", str(tmp_path / "a.json"), "--svg", str(tmp_path / "a.svg")))
    assert (tmp_path / "a.svg").read_text(encoding="utf-8") == growth.svg(FACTS, points)
    assert growth.table_line(points[0]) in capsys.readouterr().out


def test_one_row_is_measured_anew_and_the_others_are_kept(points, monkeypatch, tmp_path):
    new = {"row": "batch", "curve": "training", "x": 1, "seconds": 7.0, "mb": 70.0}
    monkeypatch.setitem(growth.ROWS, "batch", lambda args: [new])
    monkeypatch.setattr(devices, "device_name", lambda device: FACTS["machine"])
    monkeypatch.setattr(os, "cpu_count", lambda: FACTS["cores"])
    monkeypatch.setattr(torch, "__version__", FACTS["torch"])
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"facts": FACTS, "points": points}))
    growth.main(parse("--rows", "batch", "--from", str(file), "--json", str(file)))
    measured = growth.read(file)
    others = [point for point in points if point["row"] != "batch"]
    assert [point for point in measured["points"] if point["row"] != "batch"] == others
    assert [point for point in measured["points"] if point["row"] == "batch"] == [new]
    monkeypatch.setitem(growth.ROWS, "patch", lambda args: 1 / 0)  # as where it is interrupted
    new["seconds"] = 8.0
    with pytest.raises(ZeroDivisionError):
        growth.main(parse("--rows", "batch", "patch", "--from", str(file), "--json", str(file)))
    assert growth.read(file)["points"] == [p if p["row"] != "batch" else new for p in measured["points"]]
    # Else the file is refused for having rows, and --from advised again.
    with pytest.raises(UserError, match="other threads; leave --from out, and have --json write a new file"):
        growth.main(parse("--rows", "batch", "--from", str(file), "--threads", "2"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--rows pixel", "invalid choice: 'pixel'"),
        ("--repeats 0", "--repeats: '0' is not a whole number from 1"),
        ("--channels 4 4 4 5", "'5' is not an even number"),
        ("--device abacus", "--device abacus: not available here"),
        ("--from no_such.json", "--from no_such.json: "),
        ("--from text.json", "--from text.json: .*--json wrote"),
        ("--from list.json", "--from list.json: no file that --json wrote"),
        ("--from facts.json", "--from facts.json: no file that --json wrote"),
        ("--from points.json", "--from points.json: no file that --json wrote"),
        ("--from word.json", "--from word.json: no file that --json wrote"),
        ("--from zero.json", "--from zero.json: no file that --json wrote"),
        ("--from row.json", "--from row.json: no file that --json wrote"),
        (
            "--rows pixels --json made.json",
            "--json made.json: holds rows already; give --from made.json to keep them",
        ),
        ("--from made.json --svg made.json/a.svg", "made.json"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(flags, words, points, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("text.json").write_text("words")
    Path("list.json").write_text("[]")
    Path("facts.json").write_text(json.dumps({"facts": {"cores": 4}, "points": points}))
    Path("points.json").write_text(json.dumps({"facts": FACTS, "points": [{"row": "batch"}]}))
    for name, change in (("word", {"x": "abc"}), ("row", {"row": "other"}), ("zero", {"x": 0})):
        Path(f"{name}.json").write_text(json.dumps({"facts": FACTS, "points": [points[0] | change]}))
    Path("made.json").write_text(json.dumps({"facts": FACTS, "points": points}))
    done = at_the_command_line(growth, *flags.split())
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("python -m support.growth: error: ")
    assert re.search(words, line)
