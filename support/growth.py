"""How cost grows: seconds and memory against pixels, batch, patch and width; loaders; processes.

    python -m support.growth --json growth.json --svg growth.svg    # all rows but `memory`
    python -m support.growth --rows memory                          # peak memory of steps, for the README
    python -m support.growth --rows pixels --from growth.json --json growth.json    # one row anew
    python -m support.growth --from growth.json --svg growth.svg    # measures nothing, draws

    pixels      a picture restored by the light network that ships: whole, and in the tiles of test_view.py
    batch       the training step, and the search's step on weights and architecture, against scenes a step,
    patch       pixels of a patch,
    width       and channels of the finest branch
    memory      the same steps at two widths, for the parts that --accumulate makes of the released batches
    loader      scenes a second against workers: decoding, and with --cache
    processes   (of torchrun, one thread each): a training step on a batch that they share; test_view.py

Each point is measured in a process of its own, which keeps freed memory as the scripts do. Its first step
gives the peak memory above what was there before (so with gradients and an optimizer's moments, without
weights), the median of the later ones the seconds. A curve's growth is its slope in log-log: 1 is linear.
"""

import contextlib
import io
import json
import math
import os
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import chain, product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import model_train
import test_view
import train_model_batch
import train_search_batch
from support import benchmark, command, devices, distributed, images
from support.draw import FAINT, LINE, Page
from support.errors import UserError
from support.fast import for_inference, keep_freed_memory
from support.restore import restore

LIGHT = test_view.SHIPPED.with_name("derain_light.pt")  # of half width, as the steps are on a CPU
WHOLE = (0.25, 1, 4)  # megapixels, of 1 kB a pixel
TILED = (2, 4, 8, 16)
BATCHES = (1, 2, 4, 8)  # scenes
PATCHES = (32, 64, 128)  # pixels a side
WIDTHS = (0.5, 1, 2, 4)  # times --channels
SCENES = 2  # a step, while patch or width grows
WIDE = (1, 2)  # times --channels, in `memory`
PARTS = (8, 4, 2, 1)  # of a released batch
WORKERS = (0, 1, 2, 4)
LOADED = 16  # scenes of a loader's batch
PROCESSES = (1, 2)
SHARED = 4  # scenes of a step that processes share
FOLDER = (16, (384, 512))  # pictures that they share: how many, and of what size
PATIENCE = 20  # seconds of a point's steps: after them no further step begins

STEPS = {
    "training": ("training_step", train_model_batch),
    "search": ("weight_and_arch_step", train_search_batch),
}
SIZES = {  # of the rows whose growth is fitted: what grows
    "pixels": "megapixels",
    "batch": "scenes a step",
    "patch": "pixels of a patch",
    "width": "channels, finest branch",
}
COSTS = {"seconds": "seconds", "mb": "peak memory, MB"}
# Where slopes other than 1 are expected: a convolution's multiply-adds go with in x out channels.
EXPECTED = {("width", "seconds"): 2}
TOLERATED = 0.1


def get_args_parser():
    parser = command.Parser(
        prog="python -m support.growth",
        description="How cost grows with pixels, batch, patch, width, workers and processes.",
    )
    add = parser.add_argument
    add(
        "--rows",
        nargs="+",
        choices=ROWS,
        metavar="ROW",
        help=f"what to measure: {', '.join(ROWS)} (default: all but memory)",
    )
    add("--from", dest="source", metavar="FILE", help="JSON to take the rows from that --rows does not name")
    add("--json", metavar="FILE", help="write the points to this file")
    add("--svg", metavar="FILE", help="draw the points into this file")
    add(
        "--repeats",
        type=command.positive,
        default=3,
        help="timed steps for each point (default: %(default)s)",
    )
    add(
        "--most_gb",
        type=command.above_zero,
        default=8,
        help="in the row memory, leave out what would take more gigabytes (default: %(default)s)",
    )
    add("--threads", type=command.positive, default=1, help="threads of the CPU (default: %(default)s)")
    add("--device", help=devices.DEVICE_HELP)
    add(
        "--channels",
        type=command.even,
        nargs=4,
        default=[16, 32, 64, 128],
        metavar="C",
        help="widths of the networks that steps train (default: half width, 16 32 64 128)",
    )
    return parser


def main(args):
    args.device = devices.pick_device(args.device)
    for file in filter(None, (args.json, args.svg)):
        images.check_folder(Path(file).parent)
    if args.json and args.rows and not args.source and os.path.exists(args.json):
        raise UserError(
            f"--json {args.json}: holds rows already; give --from {args.json} to keep them, or remove it"
        )
    rows = args.rows or ([] if args.source else [row for row in ROWS if row != "memory"])
    facts = {
        "machine": devices.device_name(args.device),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "threads": args.threads,
        "channels": args.channels,
    }
    by_row = {row: [] for row in ROWS}
    if args.source:
        measured = read(args.source)
        for point in measured["points"]:
            by_row[point["row"]].append(point)
        differing = [name for name, value in facts.items() if measured["facts"].get(name) != value]
        if rows and differing:
            raise UserError(
                f"--from {args.source}: was measured with other {differing[0]}; leave --from out, and have "
                "--json write a new file"
            )
        facts = measured["facts"]
    print(", ".join(f"{name}: {value}" for name, value in facts.items()), end="\n\n")
    print(f"{'row':9} {'curve':11} {'against':>11} {'seconds':>9} {'MB':>7} {'scenes/s':>8}")
    for row, measuring in ROWS.items():
        of_row = []
        for point in measuring(args) if row in rows else by_row[row]:
            of_row.append({"row": row} | point)
            print(table_line(of_row[-1]), flush=True)
        by_row[row] = of_row
        points = [*chain(*by_row.values())]
        if args.json:  # after each, since they take minutes
            text = json.dumps({"facts": facts, "points": points}, indent=1)
            images.write_bytes(args.json, f"{text}\n".encode())
    print("\n".join(conclusions(points)))
    if args.svg:
        images.write_bytes(args.svg, svg(facts, points).encode())


def read(path):
    """What --json wrote: {facts, points}."""
    try:
        measured = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--from {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--from {path}: {error}; a file that --json wrote is expected") from None
    if not (
        _has(measured, "facts", "points")
        and _has(measured["facts"], "machine", "torch", "threads", "channels")
        and isinstance(measured["points"], list)
        and all(_is_point(point) for point in measured["points"])
    ):
        raise UserError(f"--from {path}: no file that --json wrote")
    return measured


def _is_point(point):
    return (
        _has(point, "row", "curve", "x")
        and point["row"] in (*ROWS,)
        and isinstance(point["curve"], str)
        and (point["x"] != 0 or point["row"] not in SIZES)
        and all(
            type(value) in (int, float) and 0 <= value < math.inf
            for value in (point["x"], *(point.get(field) or 0 for field in (*COSTS, "scenes_per_second")))
        )
    )


def _has(value, *names):
    return isinstance(value, dict) and value.keys() >= set(names)


# --- the rows: generators of points {curve, x, and what was measured} ---------------------------------------


def by_pixels(args):
    for curve, tile, sizes in (("whole", 0, WHOLE), ("tiled", None, TILED)):
        for size in map(picture_size, sizes):
            make = partial(restoring, size, tile, args.device)
            yield {"curve": curve, "x": math.prod(size) / 1e6} | alone(args, make)


def by_batch(args):
    for curve, scenes in product(STEPS, BATCHES):
        yield {"curve": curve, "x": scenes} | alone(args, a_step(args, curve, scenes))


def by_patch(args):
    for curve, side in product(STEPS, PATCHES):
        make = a_step(args, curve, SCENES, patch_size=side)
        yield {"curve": curve, "x": side**2} | alone(args, make)


def by_width(args):
    for curve, factor in product(STEPS, WIDTHS):
        make = a_step(args, curve, SCENES, widen=factor)
        yield {"curve": curve, "x": widened(args.channels, factor)[0]} | alone(args, make)


def by_parts(args):
    """Memory alone, so one step each; the smallest part tells whether a larger one is within --most_gb."""
    for curve, factor in product(STEPS, WIDE):
        released = STEPS[curve][1].get_args_parser().get_default("batch_size")
        name, a_scene = f"{curve} x{factor}", 0
        for scenes in (released // parts for parts in PARTS):
            if scenes * a_scene > 1000 * args.most_gb:
                print(
                    f"{name}, {scenes} scenes: left out, since it takes more than --most_gb {args.most_gb:g}",
                    file=sys.stderr,
                )
                continue
            mb = alone(args, a_step(args, curve, scenes, widen=factor), repeats=0)["mb"]
            a_scene = (mb or 0) / scenes  # None where the system does not tell
            yield {"curve": name, "x": scenes, "mb": mb}


def by_workers(args):
    sizes = Namespace(channels=args.channels, batch_size=LOADED, patch_size=None)
    options = benchmark.script_options(train_model_batch, sizes, args.device)
    for workers in WORKERS:
        loader = Namespace(data=None, clean_side=[], cache="", workers=workers)
        speed = benchmark.time_loader(loader, options, args.device, cached=True)
        for curve, ms in (("decoding", speed["plain_ms"]), ("--cache", speed["ms"])):
            yield {"curve": curve, "x": workers, "scenes_per_second": 1000 * LOADED / ms}


def by_processes(args):
    for processes in PROCESSES:
        seconds = launch(processes, train_together, args.channels, SHARED, args.repeats)
        yield {"curve": "training", "x": processes, "seconds": seconds}
    with tempfile.TemporaryDirectory() as made:
        count, size = FOLDER
        for number in range(count):
            images.write_image(Path(made) / "rainy" / f"{number}.png", noise(size))
        for processes in PROCESSES:
            seconds = launch(processes, view_together, made, args.repeats)
            yield {"curve": "test_view", "x": processes, "seconds": seconds}


ROWS = {
    "pixels": by_pixels,
    "batch": by_batch,
    "patch": by_patch,
    "width": by_width,
    "memory": by_parts,
    "loader": by_workers,
    "processes": by_processes,
}


# --- measuring ----------------------------------------------------------------------------------------------


def alone(args, make, repeats=None):
    """{seconds, mb} of the step that make() returns, measured in a new process."""
    repeats = args.repeats if repeats is None else repeats
    # Forked from a server that has imported everything, it begins at once, and with no memory of others.
    context = get_context("forkserver")
    context.set_forkserver_preload(["support.benchmark", "test_view"])
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(measure, make, args.device, args.threads, repeats).result()
        except BrokenProcessPool:
            raise UserError(
                "the process that measured a point was killed, perhaps for lack of memory; try smaller "
                "--channels or other --rows"
            ) from None


def measure(make, device, threads, repeats):
    torch.set_num_threads(threads)
    devices.pick_device(str(device))  # graphs are made on the process's own GPU
    keep_freed_memory()
    step, seconds = make(), []

    def timed():
        seconds.append(benchmark.milliseconds(step, device) / 1000)

    mb = benchmark.peak_memory(timed, device)
    while len(seconds) <= repeats and sum(seconds) < PATIENCE:
        timed()
    return {"seconds": statistics.median(seconds[1:] or seconds), "mb": mb}


def a_step(args, curve, scenes, patch_size=None, widen=1):
    """A function that makes a step of a training script, to be called in the process that measures it."""
    sizes = Namespace(channels=widened(args.channels, widen), batch_size=scenes, patch_size=patch_size)
    name, script = STEPS[curve]
    return partial(offered, name, benchmark.script_options(script, sizes, args.device), args.device)


def widened(channels, factor):
    """The channels times a factor, as even numbers."""
    return [2 * max(1, int(factor * c) // 2) for c in channels]


def offered(name, options, device):
    return benchmark.steps(name, options, device)[1]


def restoring(size, tile, device):
    """A step that restores one picture, as test_view.py does."""
    net = for_inference(model_train.load(LIGHT, device))
    restore(net, noise((64, 64)), device)  # what the first picture costs once
    return partial(restore, net, noise(size), device, tile)


def picture_size(megapixels):
    """(height, width) of a picture of about this size, 4:3, in multiples of 16."""
    return tuple(16 * round((1e6 * megapixels * ratio) ** 0.5 / 16) for ratio in (3 / 4, 4 / 3))


def noise(size):
    return np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)


def launch(processes, function, *options):
    """What function(*options) returns in rank 0 of several processes, started as torchrun does."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="growth",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    return elastic_launch(config, function)(*options)[0]


def train_together(channels, scenes, repeats):
    """Seconds of a training step of `scenes`, shared by all processes."""
    distributed.start()
    torch.set_num_threads(1)
    keep_freed_memory()
    device = torch.device("cpu")
    sizes = Namespace(channels=channels, batch_size=scenes // distributed.size(), patch_size=None)
    options = benchmark.script_options(train_model_batch, sizes, device)
    net = benchmark.offered_form(model_train.DerainNetwork(benchmark.every_operation(), channels))
    running = [buffer for buffer in net.buffers() if buffer.is_floating_point()]
    batch = benchmark.random_batch(options, device, torch.float32)
    batch = batch._replace(rainy=batch.rainy.to(memory_format=torch.channels_last))
    step = benchmark.training_step(net, batch, None, options)

    def step_and_share():
        step()
        distributed.average(running)

    return time_together(step_and_share, repeats)


def view_together(folder, repeats):
    """Seconds of test_view.py on the pictures in a folder."""
    distributed.start()
    torch.set_num_threads(1)
    flags = ["--path", f"{folder}/rainy", "--result_path", f"{folder}/results", "--device", "cpu"]
    args = test_view.get_args_parser().parse_args([*flags, "--ckt_path", str(LIGHT)])

    def view():
        with contextlib.redirect_stdout(io.StringIO()):
            if test_view.main(args):
                raise RuntimeError("test_view.py could not restore every picture")

    return time_together(view, repeats)


def time_together(step, repeats):
    """The median seconds of a step that all processes take; the first is not counted."""
    seconds = []
    for _ in range(1 + repeats):
        distributed.barrier()
        begin = time.perf_counter()
        step()
        distributed.barrier()
        seconds.append(time.perf_counter() - begin)
    distributed.end()
    return statistics.median(seconds[1:])


# --- what is said -------------------------------------------------------------------------------------------


def table_line(point):
    cells = [f"{point['row']:9} {point['curve']:11} {point['x']:11.5g}"]
    for field, spec in (("seconds", "9.3f"), ("mb", "7.0f"), ("scenes_per_second", "8.1f")):
        value = point.get(field)
        cells.append(f"{'-':>{spec.split('.')[0]}}" if value is None else f"{value:{spec}}")
    return " ".join(cells)


def curves(points, row, field):
    """{curve: [(x, y), ...]} of a row's points where the field was measured, and is not 0."""
    found = {}
    for point in points:
        if point["row"] == row and (point.get(field) or 0) > 0:
            found.setdefault(point["curve"], []).append((point["x"], point[field]))
    return found


def slope(curve):
    """The exponent of the power of x that fits a curve best: the slope in log-log."""
    return linear([(math.log(x), math.log(y)) for x, y in curve])


def linear(curve):
    """The slope of the straight line that fits a curve best."""
    return statistics.linear_regression(*zip(*curve, strict=True)).slope


def conclusions(points):
    lines = ["", "growth, as the power of what grows:"]
    for row, field in product(SIZES, COSTS):
        for name, curve in curves(points, row, field).items():
            if len(curve) > 1:
                power, expected = slope(curve), EXPECTED.get((row, field), 1)
                worse = f"   WORSE than {expected}" if power > expected + TOLERATED else ""
                lines.append(f"  {row:7} {name:9} {COSTS[field]:16} {power:5.2f}{worse}")
    tiled = curves(points, "pixels", "mb").get("tiled", [])
    if len(tiled) > 1:
        lines.append(f"memory in tiles: {linear(tiled):.1f} bytes a further pixel, of which its result is 3")
    for name, curve in curves(points, "processes", "seconds").items():
        for x, speed_up in speed_ups(curve)[1:]:
            lines.append(f"{x} processes: {name} {speed_up:.2f} times as fast as {curve[0][0]}")
    return lines


def speed_ups(curve):
    return [(x, curve[0][1] / seconds) for x, seconds in curve]


# --- the picture --------------------------------------------------------------------------------------------

# In pixels: a panel, and what is around its plot.
PANEL, GAP = (268, 224), 12
LEFT, ABOVE, RIGHT, BELOW = 44, 32, 74, 44
TOP = 72
COLOURS = {"whole": 0, "tiled": 1, "training": 0, "search": 1, "decoding": 0, "--cache": 1, "test_view": 1}
INKS = ("#1f6fb4", "#c2571a")
GRID = "#e3e7eb"


def svg(facts, points):
    """The points but those of `memory` as the text of an SVG file: a panel for each cost and what grows."""
    columns, rows = len(SIZES), len(COSTS) + 1
    width, height = GAP + columns * (PANEL[0] + GAP), TOP + rows * (PANEL[1] + GAP)
    page = Page(width, height, "How cost grows")
    page.text(GAP + 8, 28, "How cost grows", 22, anchor="start", font_weight="bold")
    note = f"{facts['machine']}, threads: {facts['threads']}, torch {facts['torch']}"
    page.text(GAP + 8, 54, note, 14, FAINT, "start")
    spots = [
        (GAP + column * (PANEL[0] + GAP), TOP + row * (PANEL[1] + GAP))
        for row, column in product(range(rows), range(columns))
    ]
    spot = iter(spots)
    for field, row in product(COSTS, SIZES):
        _panel(page, *next(spot), COSTS[field], SIZES[row], curves(points, row, field), row, field)
    loading = curves(points, "loader", "scenes_per_second")
    _panel(page, *next(spot), "scenes loaded a second", "workers", loading)
    faster = {name: speed_ups(curve) for name, curve in curves(points, "processes", "seconds").items()}
    _panel(page, *next(spot), "speed-up", "processes, one thread each", faster, "processes")
    _legend(page, *next(spot), facts)
    return page.svg()


def _panel(page, x, y, title, against, lines, row=None, field=None):
    """The curves of a panel, log-log, each with its name and slope at its end, and the slope expected dashed.

    row: None where what grows may be 0, and is drawn in even steps.
    """
    page.text(x + 8, y + 14, title, 15, anchor="start", font_weight="bold")
    left, right, top, bottom = x + LEFT, x + PANEL[0] - RIGHT, y + ABOVE, y + PANEL[1] - BELOW
    page.text((left + right) / 2, bottom + 34, against, 13, FAINT)
    xs = sorted({at for curve in lines.values() for at, _ in curve})
    ys = [cost for curve in lines.values() for _, cost in curve]
    if not ys:
        page.text((left + right) / 2, (top + bottom) / 2, "not measured", 13, FAINT)
        return
    ticks = _ticks(min(ys), max(ys))

    def across(at):
        share = _share(at, xs[0], xs[-1]) if row else xs.index(at) / max(len(xs) - 1, 1)
        return left + share * (right - left)

    def up(cost):
        return bottom - _share(cost, ticks[0], ticks[-1]) * (bottom - top)

    for tick in ticks:
        page.line((left, up(tick)), (right, up(tick)), stroke=GRID, width=1)
        page.text(left - 6, up(tick), f"{tick:,g}", 12, FAINT, "end")
    for at in xs:
        page.line((across(at), bottom), (across(at), bottom + 4), stroke=LINE, width=1)
        label = f"{math.isqrt(at)}²" if row == "patch" else f"{at:.2g}"
        page.text(across(at), bottom + 14, label, 12, FAINT)
    ends = []
    for name, curve in lines.items():
        ink = INKS[COLOURS.get(name, 0)]
        (x0, y0), (x1, y1) = curve[0], curve[-1]
        if row and x1 > x0:
            expected = EXPECTED.get((row, field), 1)
            reach = min(x1, x0 * (ticks[-1] / y0) ** (1 / expected))  # where it leaves the plot
            dashed = (across(x0), up(y0)), (across(reach), up(y0 * (reach / x0) ** expected))
            page.line(*dashed, stroke=LINE, width=1, stroke_dasharray="4 3")
        page.line(*((across(at), up(cost)) for at, cost in curve), stroke=ink, width=2)
        for at, cost in curve:
            page.add("circle", cx=across(at), cy=up(cost), r=3.5, fill=ink)
        last = f"{y1:,.0f}" if y1 >= 100 else f"{y1:.3g}"
        grown = f"{slope(curve):.2f}" if row in SIZES and x1 > x0 else last
        ends.append((up(y1), name, grown, ink))
    _label(page, right + 9, sorted(ends), bottom)


def _label(page, x, ends, bottom):
    """The curves' names and growth at their ends: (height, name, growth, colour), from the highest down."""
    heights = []
    for height, *_ in ends:
        heights.append(max(height, heights[-1] + 34) if heights else height)
    below = max(0, heights[-1] + 14 - bottom)
    for height, (_, name, grown, ink) in zip(heights, ends, strict=True):
        page.text(x, height - below - 2, name, 13, ink, "start", font_weight="bold")
        page.text(x, height - below + 13, grown, 12, ink, "start")


def _legend(page, x, y, facts):
    widths = " ".join(map(str, facts["channels"]))
    lines = (
        "Both axes are logarithmic, except that of workers. The number at the end of a",
        "curve of seconds or memory is its slope: the cost grows as that power.",
        "Dashed: slope 1, which is linear; 2 for seconds against channels. The other",
        f"numbers are the last values. Steps: channels {widths}, patches of 64²,",
        f"{SCENES} scenes of {benchmark.SCENE_IMAGES} images, where nothing else is said.",
        "python -m support.growth",
    )
    for number, line in enumerate(lines):
        page.text(x + 20, y + ABOVE + 21 * number, line, 14, anchor="start")


def _share(value, low, high):
    """Where a value lies between two others, 0 to 1, in logarithms."""
    return math.log(value / low) / math.log(high / low) if high > low else 0.5


def _ticks(low, high):
    """Round numbers, of which the first and last enclose low and high."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ladder = [digit * 10.0**exponent for exponent in exponents for digit in digits]
        first = max(tick for tick in ladder if tick <= low)
        last = min(tick for tick in ladder if tick >= high)
        ticks = [tick for tick in ladder if first <= tick <= last]
        if len(ticks) <= 6:
            break
    return ticks


if __name__ == "__main__":
    command.run(main, get_args_parser())
