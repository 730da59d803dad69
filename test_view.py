"""Scores and pictures: PSNR and SSIM on a test set, and the restored images.

    python test_view.py                                            # DID-MDN-test in datasets/Rain1200
    python test_view.py --demo                                     # photographs at hand; no download
    python test_view.py --path rain800/test_syn --clean_side left  # another set of side-by-side pairs
    python test_view.py --path photo.jpg --result_path out         # a file or folder without ground truth
    python test_view.py --path large.jpg --scale auto              # rain that is wide in pixels
    python test_view.py --path film.mp4                            # a video, frame by frame
    torchrun --nproc_per_node=8 test_view.py --path many           # shared out over 8 GPUs
    python test_view.py --path many --skip_done                    # goes on where that was stopped

Scores are of the pictures as they are saved, in 8 bits. RGB and Y conventions differ by 1 dB or more: both
are given, beside those of the untouched input.
"""

import csv
import hashlib
import json
import os
import platform
import shlex
import sys
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import cv2
import numpy as np
import skimage
import torch
from tqdm import tqdm

import dataset
import model_train
from support import check, command, devices, distributed, images, layouts, runs
from support.errors import UserError
from support.fast import Compiled, for_inference, keep_freed_memory, no_compiler
from support.gallery import FOLDER, MONTAGE, PAGE, Gallery, montage
from support.journal import Journal
from support.metrics import METRICS, by_density, for_json, score
from support.options import DEFAULT_DATA, DEMO_DATA
from support.rain import demo_set
from support.restore import (
    AUTO,
    ENSEMBLES,
    MAYBE_OUT_OF_MEMORY,
    WHOLE_PIXELS,
    NotFinite,
    forwards,
    is_out_of_memory,
    restore,
)

DEFAULT_PATH = f"{DEFAULT_DATA}/{layouts.TEST}"
SHIPPED = model_train.SHIPPED
WIDE_RAIN = "above a megapixel, rain may be wider than any that the network was trained on, and remain"
COMPILED_FROM = 300_000_000  # pixels
MOST_COMPILED = 8  # sizes: what PyTorch allows
CSV, JSON, FULL = TABLES = ("results.csv", "results.json", "result_full.txt")
COLUMNS = (*"name density height width scale seconds".split(), *METRICS, *(f"input_{m}" for m in METRICS))


def get_args_parser():
    parser = command.Parser(
        prog="test_view.py", description="Restore pictures, and score them where there is ground truth."
    )
    add = parser.add_argument
    add(
        "--path",
        help=f"picture, folder or video (default: {DEFAULT_PATH}, else the demo)",
    )
    add(
        "--result_path",
        default="results",
        help="where the results go (default: %(default)s)",
    )
    add(
        "--ckt_path",
        help="checkpoint (default: the newest finished eval-EXP-* run's, else eval-EXP/derain.pt); on a "
        "laptop give eval-EXP/derain_light.pt",
    )
    add("--clean_side", choices=layouts.SIDES, help="files are side by side, and this half of them is clean")
    add("--demo", action="store_true", help="restore and score photographs at hand")
    add("--device", help=devices.DEVICE_HELP)
    add(
        "--tile",
        type=command.tile,
        help="side of the tiles in pixels, a multiple of 8 from 64 on; 0: never tile (default: tiles that "
        "fit, above a megapixel)",
    )
    add(
        "--scale",
        type=command.scale,
        default=1.0,
        help="restore a copy shrunk to this scale, such as 0.5, and apply the change, enlarged, to the "
        f"picture: for rain wider than in training, as in large photographs; {AUTO} (not for a video): the "
        "one of 1, 1/2, 1/4, ... that changes most (default: 1)",
    )
    add(
        "--self_ensemble",
        type=int,
        nargs="?",
        const=4,
        default=0,
        choices=ENSEMBLES,
        help="mean over 4 flips; 8: over quarter turns too, for a network trained on them; 4 or 8 times "
        "slower (default: 0; without a number: 4)",
    )
    add("--amp", action="store_true", help="half precision: float16 on CUDA, bfloat16 on a CPU")
    add(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="torch.compile the network, which takes minutes for each size of picture. auto (default): only "
        f"on a CPU, for sizes with at least {COMPILED_FROM // 10**6} megapixels to restore",
    )
    add(
        "--skip_done",
        action="store_true",
        help="go on where a run was stopped: leave out what this checkpoint has restored with these options",
    )
    add(
        "--montage",
        nargs="*",
        metavar="NAME",
        help="write montage.png: a labelled strip of these pictures, or of the best, median and worst",
    )
    return parser


@command.stopped_by_sigterm()
def main(args):
    """Restore and score; returns the exit status: 0, 1 where some file could not be used, 130 for Ctrl-C and
    SIGTERM.
    """
    distributed.start()
    keep_freed_memory()
    if args.demo and args.path is not None:
        raise UserError("--demo: the demo has its own pictures; leave out --demo or --path")
    checkpoint = choose_checkpoint(args)
    device = devices.pick_device(args.device)
    if args.amp and (why := devices.slow_half(device, torch.get_autocast_dtype(device.type))):
        print(f"--amp: {why}", flush=True)
    net = for_inference(model_train.load(checkpoint, device))
    compiled = Compiled(net)
    sha256 = hashlib.sha256(checkpoint.read_bytes()).hexdigest()  # now: a run may replace the file
    options = {name: getattr(args, name) for name in ("tile", "scale", "self_ensemble", "amp")}
    restore_one = partial(restore, compiled, device=device, **options)
    choose_compiled_for = partial(choose_compiled, args, device, compiled)
    path, out = choose_path(args), Path(args.result_path)
    if out.suffix.lower() in {*images.EXTENSIONS, *images.VIDEO_EXTENSIONS} and not out.is_dir():
        raise UserError(f"--result_path {out}: must be a folder, where each result has its picture's name")
    images.check_folder(out)
    if path.suffix.lower() in images.VIDEO_EXTENSIONS and not path.is_dir():
        check_video(args, path)
        return restore_video(args, restore_one, path, out, choose_compiled_for)

    found, closed = find_pictures(args, path)
    source = path if path.is_dir() else path.parent
    check_apart(source.resolve(), out, within=path.is_dir())
    tasks = [task for scene in found.scenes for task in tasks_of(scene, source)]
    check_no_original(tasks, out)
    files = {task.name: task.scene.files for task in tasks}
    check_montage(args, files)
    gallery = Gallery(out)
    data = {"data": str(path.resolve()), "clean_side": args.clean_side}
    journal = Journal(out, data | {"sha256": sha256, "options": options, "metrics": list(METRICS)})
    results = [task.result for task in tasks]
    distributed.from_main(partial(check_nothing_lost, journal, [*TABLES, PAGE, MONTAGE, *results]))
    journal.lock()
    tasks = to_do(args, tasks, files, journal)
    choose_compiled_for(sizes_of(tasks))
    begin(journal, fresh=not args.skip_done)
    outcome = restore_pictures(restore_one, tasks, gallery, journal)
    command.finish_first()
    failures, stopped, status = together(*outcome)
    if not distributed.is_main():
        return 0  # what follows is done once
    done = {name: entry for name, entry in journal.done(files) if os.path.exists(out / entry.file)}
    if not status and len(done) < len(files):
        lost = f"{len(files) - len(done)} of {len(files)} results are gone, or of files that have changed"
        failures, status = [f"{out}: {lost}; --skip_done restores them"], 1
    gallery.entries = [done[name] for name in files if name in done]
    left_out = closed + [f"{file}: has no partner, so it is left out" for file in found.unpaired]
    if left_out:
        failures = left_out + failures
        status = status or 1
    if stopped:
        stopped += f" {len(gallery.entries)} of {len(files)} pictures are done"
    facts = {
        "checkpoint": str(checkpoint),
        "sha256": sha256,
        "data": str(path),
        "layout": found.layout,
        "pictures": len(files),
        "without_partner": len(found.unpaired),
        "options": options | {"compile": [f"{width}x{height}" for height, width in sorted(compiled.shapes)]},
        "device": devices.device_name(device),
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (torch, np, cv2, skimage)},
        "command": shlex.join(sys.argv),
        "genotype": net.genotype._asdict(),
    }
    status = conclude(gallery, facts, failures, stopped, status, args.montage)
    journal.unlock()
    return status


def begin(journal, fresh):
    """Open the journal, and remove the tables of an earlier run: new ones come at the end."""
    if distributed.is_main() and journal.is_there() and (fresh or journal.has_others()):
        print(
            f"{journal.out}: holds results of an earlier run, too; the tables will cover this run alone",
            flush=True,
        )
    journal.begin(fresh)
    if distributed.is_main():
        for table in (*TABLES, PAGE, MONTAGE):
            with suppress(OSError):  # writing the new ones will say so
                os.unlink(journal.out / table)


def conclude(gallery, facts, failures, stopped, status, montage_of):
    """Write the tables, the gallery and, unless montage_of is None, the montage; print what there is, what
    could not be used and what stopped the run, or ""; returns the exit status.
    """
    left_out = [*failures, stopped] if stopped else [*failures]
    out, rows = gallery.out, [entry.row for entry in gallery.entries]
    means, scores = summarise(rows, facts) if rows and "psnr_rgb" in rows[0] else ({}, [])
    said = [*scores, f"restored pictures in {out}: {len(rows)}"]
    shown = {name: facts[name] for name in ("checkpoint", "data", "device")}
    shown |= {"self-ensemble": "no"} | in_words(facts["options"])
    # Files first: Ctrl-C ends a `| tee`, too, and then nothing can be printed.
    attempts = []
    if rows:
        tables = report(rows, {"means": means} | facts | {"left_out": left_out}, scores)
        attempts = [partial(images.write_bytes, out / name, content) for name, content in tables.items()]
        attempts.append(lambda: said.append(f"look at them: {gallery.write(shown, left_out)}"))
        if montage_of is not None:
            there = {row["name"] for row in rows}
            failures += [
                f"--montage {name}: that picture was not restored" for name in montage_of if name not in there
            ]
            wanted = [name for name in montage_of if name in there]
            if wanted or not montage_of:
                attempts.append(lambda: montage(gallery.examples(wanted), out / MONTAGE))
    for attempt in attempts:  # one may find room where another does not
        try:
            attempt()
        except UserError as error:
            failures.append(str(error))
            status = status or 1
    if montage_of is not None and (out / MONTAGE).is_file():
        said.append(f"the montage: {out / MONTAGE}")
    if said:
        print(*said, sep="\n")
    command.tell_unusable(failures)
    if stopped:
        print(stopped, file=sys.stderr)
    return status


def choose_checkpoint(args):
    """The checkpoint's path: --ckt_path, else the newest finished training's, else what ships; prints it."""
    checkpoint = Path(args.ckt_path or runs.newest("eval", "best_psnr.pt") or SHIPPED)
    print(f"checkpoint: {checkpoint}", flush=True)
    of_a_demo = not args.ckt_path and runs.noted(checkpoint.parent, "options.json", "demo")
    if of_a_demo and not takes_demo(args):
        print(f"that network is a demo's, hardly trained: --ckt_path {SHIPPED} is better", flush=True)
    folder = checkpoint.resolve().parent
    is_upright = folder == SHIPPED.parent.resolve() or runs.noted(folder, "options.json", "upright")
    if args.self_ensemble == 8 and is_upright:
        print(
            "--self_ensemble 8: the network saw no quarter turns in training (--upright); "
            "4 is better, and faster",
            flush=True,
        )
    return checkpoint


def takes_demo(args):
    """Whether it restores the demo's pictures: on demand, or where there is nothing else."""
    return args.demo or (args.path is None and not Path(DEFAULT_PATH).exists())


def choose_path(args):
    """The folder or file to restore: --path, else DID-MDN-test, else the demo's test pictures."""
    if args.path is not None:
        path = Path(args.path)
        if os.path.isdir(path / layouts.TEST):
            return path / layouts.TEST
        if os.path.isdir(path / layouts.TRAINING):
            raise UserError(
                f"--path {path}: holds training scenes alone; to restore them give {path / layouts.TRAINING}"
            )
        return path
    if not takes_demo(args):
        return Path(DEFAULT_PATH)
    if not args.demo:
        command.announce_demo(DEFAULT_PATH, "--path")
    return distributed.from_main(lambda: demo_set(DEMO_DATA)) / layouts.TEST


def find_pictures(args, path):
    """The `layouts.Found` of a file or folder, and a line for each folder in it that cannot be read; prints
    what that is and what is left alone.
    """
    try:
        found = layouts.find(path, args.clean_side)
    except UserError as error:
        kinds = images.look_around(path)[0]
        if {*kinds} & {*images.VIDEO_EXTENSIONS} and not images.list_images(path, recursive=True):
            raise UserError(f"{error}; to restore a video in it, give that as --path") from None
        raise
    if path.is_file():  # the only one, so a bad one is a mistake, found before earlier tables are removed
        dataset.read_scene(found.scenes[0])
    alone = f"; {len(found.unpaired)} files have no partner" if found.unpaired else ""
    unscored = bool(found.scenes) and all(scene.clean is None for scene in found.scenes)
    truth = "; without ground truth, so nothing is scored" if unscored else ""
    print(f"data: {path}: {len(found.scenes)} {found.layout}{alone}{truth}", flush=True)
    if unscored and (hint := distributed.from_main(partial(check.single_hint, found.scenes))):
        print(hint, flush=True)
    if unscored and "scale" not in args.given and distributed.from_main(partial(has_large, found.scenes)):
        print(f"{WIDE_RAIN}; if it does, try --scale {AUTO}", flush=True)
    if unscored and (folders := layouts.truth_without_rain(path, found.scenes)):
        print(
            f"{', '.join(folders)}: named like ground truth, but no rainy folder is beside it; to have "
            "scores, put the rainy pictures into a folder named input beside it",
            flush=True,
        )
    if not unscored and (hint := distributed.from_main(partial(check.pair_hint, found.scenes))):
        print(f"{path}: {hint}", flush=True)
    others, closed = images.look_around(path)
    if others:
        video = "; to restore a video, give it as --path" if {*others} & {*images.VIDEO_EXTENSIONS} else ""
        print(f"left alone: files of other kinds ({', '.join(others)}){video}", flush=True)
    return found, closed


def has_large(scenes):
    """Whether one of a few pictures has more than a megapixel, by the files' headers."""
    for scene in dataset.spread(scenes, check.HINT_FROM):
        with suppress(UserError):  # restoring it will say so
            height, width = images.header_size(scene.rainy[0].path)
            if height * width > WHOLE_PIXELS:
                return True
    return False


class Task(NamedTuple):
    """A rainy picture to restore."""

    scene: layouts.Scene
    half: layouts.Half
    density: str  # "" where there are none
    name: str  # in the tables
    result: Path  # in the folder of the results
    number: int = 0  # in the gallery


def tasks_of(scene, source):
    """A task for each density of a scene below `source`. What is scored is saved as PNG, without loss, others
    in the format they came in.
    """
    tasks = []
    for half, density in zip(scene.rainy, scene.densities or ("",), strict=True):
        name = f"{density}/{scene.name}" if density else scene.name
        result = half.path.relative_to(source) if scene.clean is None else Path(f"{name}.png")
        tasks.append(Task(scene, half, density, name, result))
    return tasks


def to_do(args, tasks, files, journal):
    """The tasks that are to be done, numbered: all, or with --skip_done those that are not done yet.

    files: {name: the files of its scene}. UserError where --skip_done would replace a result of other data.
    """
    done, first = set(), 1
    if args.skip_done:
        done = {name for name, _ in journal.done(files)}
        first += journal.last_number()
    if done:
        print(f"done already: {len(done)} of {len(files)} pictures", flush=True)
    remaining = [task for task in tasks if task.name not in done]
    others = journal.of_other_data() if args.skip_done and remaining else {}
    for result in (task.result for task in remaining):
        if result in others and os.path.exists(journal.out / result):
            raise UserError(
                f"--skip_done: {journal.out / result} is a result of {others[result]}; give another "
                "--result_path"
            )
    return [task._replace(number=number) for number, task in enumerate(remaining, start=first)]


def check_montage(args, names):
    """UserError where --montage names a picture that is not among the names."""
    for name in args.montage or ():
        if name not in names:
            there = layouts.some(list(names))
            raise UserError(f"--montage {name}: no picture of that name; there are {there}")


def check_video(args, path):
    """UserError where a video is given with flags for pictures."""
    if distributed.size() > 1:
        raise UserError(f"{path}: a video is restored by one process; leave torchrun out")
    for name in sorted({"clean_side", "montage", "skip_done"} & args.given):
        raise UserError(f"--{name}: is for pictures, and {path} is a video; leave it out")
    if args.scale == AUTO:
        raise UserError(
            f"--scale {AUTO}: the scale might change from frame to frame of {path}; give a number"
        )


def check_apart(source, out, within):
    """UserError where results, in the folder `out`, or the gallery's files would get among the pictures in
    `source`. within: its subfolders are restored, too.
    """
    results, gallery = out.resolve(), (out / FOLDER).resolve()
    if source in (results, gallery, *(results.parents if within else ())) or gallery in source.parents:
        raise UserError(f"--result_path {out}: lies among the pictures to restore; give another folder")


def check_no_original(tasks, out):
    """UserError where a result would take the place of a picture to restore or of a ground truth, as it may
    through a link.
    """
    rainy = {str(half.path) for task in tasks for half in task.scene.rainy}
    files = dict.fromkeys(file for task in tasks for file in task.scene.files)
    originals = {place: file for file in files if (place := _which(file))}
    for target in (out / task.result for task in tasks):
        if (original := originals.get(_which(target))) is not None:
            what = "an input picture" if original in rainy else "a ground truth"
            raise UserError(
                f"--result_path {out}: {target} is {original}, {what}, which a result would replace; give "
                "another folder"
            )


def check_nothing_lost(journal, names):
    """UserError where the folder of results has a file of one of the names that no earlier run put there."""
    if journal.is_there():
        return
    for file in (journal.out / name for name in names):
        if os.path.lexists(file) and not os.path.isdir(file):
            raise UserError(
                f"--result_path {journal.out}: {file} is no result of an earlier run, and a result would "
                "replace it; give another folder"
            )


def _which(path):
    """What identifies a file, by whatever path it is reached; None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def choose_compiled(args, device, net, sizes):
    """Settle for which shapes the network is compiled, by --compile and the (height, width) of all that is to
    be restored, and print it. Not by timing: results are not to depend on how busy a machine is.
    """
    net.shapes = set()
    if args.compile == "off":
        return
    if args.compile == "auto" and device.type != "cpu":
        why_not = f"it is not known to pay on {device.type}"
    else:
        why_not = no_compiler(device)
    if not why_not:
        net.shapes = distributed.from_main(partial(worth_compiling, args, sizes))
        why_not = f"no size has the {COMPILED_FROM // 10**6} megapixels from which it pays"
    shapes = " ".join(f"{width}x{height}" for height, width in sorted(net.shapes))
    if shapes:
        print(f"compiled, which takes minutes at first: {shapes}", flush=True)
    else:
        print(f"not compiled: {why_not}", flush=True)


def worth_compiling(args, sizes):
    """The set of shapes (height, width), at most `MOST_COMPILED`, for which compiling pays in a process."""
    pixels = Counter()
    for size, pictures in Counter(sizes).items():
        for (height, width), passes in forwards(*size, args.tile, args.self_ensemble, args.scale).items():
            pixels[height, width] += pictures * passes * height * width
    least = COMPILED_FROM * distributed.size() if args.compile == "auto" else 0
    return {shape for shape, number in pixels.most_common(MOST_COMPILED) if number >= least}


def sizes_of(tasks):
    """(height, width) of each picture to restore, by its file's header; none where that is bad."""
    for task in tasks:
        with suppress(UserError):  # restoring it will say so
            yield dataset.half_size(task.half, images.header_size)


def restore_video(args, restore_one, path, out, choose_compiled_for):
    """Restore a video frame by frame into the folder `out`; returns the exit status.

    restore_one: rgb -> restored. choose_compiled_for: called with the (height, width) of all frames.
    """
    video = images.Video(path)
    target = images.video_name(out / path.name)
    if out.resolve() in (path.parent.resolve(), path.resolve().parent):
        raise UserError(f"--result_path {out}: holds the video to restore; give another folder")
    height, width = video.size
    print(f"data: {path}: a video of {video.frames} frames of {width}x{height}, {video.fps:g} a second")
    if "scale" not in args.given and height * width > WHOLE_PIXELS:
        print(f"{WIDE_RAIN}; if it does, try --scale 0.5", flush=True)
    print("the result has no sound", end="")
    if video.stretched:
        print(", and its pixels are square, which the film's are not: it looks narrower or wider", end="")
    print(", and an odd width or height grows by one pixel" if height % 2 or width % 2 else "", flush=True)
    journal = Journal(out, {})
    check_nothing_lost(journal, [target.name])
    choose_compiled_for([video.size] * video.frames)
    frames = tqdm(video, total=video.frames or None, unit="frame", disable=None)
    journal.lock()
    try:
        journal.begin(fresh=False)
        images.write_video(target, map(partial(naming, path, restore_one), frames), video.fps)
        journal.add_video(target.name)
    except images.EndsEarly as error:
        with suppress(UserError):  # on a full disk
            journal.add_video(target.name)
        print(f"{error}\n{target} holds what came before", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: {target} is not written", file=sys.stderr)
        return 130
    finally:
        journal.unlock()
    print(f"restored video: {target}")
    return 0


def restore_pictures(restore_one, tasks, gallery, journal):
    """Do this process's share of the tasks.

    Returns ([(place, line) of each scene not done], why it stopped early or "", the exit status).
    """
    scenes = [list(of_scene) for _, of_scene in groupby(tasks, key=lambda task: task.scene)]
    share = list(enumerate(scenes))[distributed.rank() :: distributed.size()]
    failures = []
    total = sum(len(of_scene) for _, of_scene in share)
    with distributed.bar(total=total, unit="image", leave=True) as bar:
        for place, of_scene in share:
            scene, missing = of_scene[0].scene, [task.name for task in of_scene]
            try:
                for entry in view(restore_one, of_scene, gallery, journal):
                    gallery.entries.clear()  # the journal has it
                    missing.remove(entry.row["name"])
                    bar.update()
            except UserError as error:
                if no_other_fares_better(error, gallery.out):  # what room is left is for the tables
                    return failures, f"{error}; stopped there,", 1
                failures.append((place, f"{error}{_all_of(missing)}"))
                bar.update(len(missing))
            except KeyboardInterrupt:
                return failures, "interrupted:", 130
            except MAYBE_OUT_OF_MEMORY as error:
                if not is_out_of_memory(error):
                    raise
                too_large = f"{scene.rainy[0].path}: too large for the memory here; see --tile"
                failures.append((place, f"{too_large}{_all_of(missing)}"))
                bar.update(len(missing))
    return failures, "", 1 if failures else 0


def _all_of(missing):
    """What else a scene's bad picture costs, for the line that names it."""
    return f"; so {', '.join(missing)} are not restored" if len(missing) > 1 else ""


def no_other_fares_better(error, out):
    """Whether no further result can be written either, as on a full disk."""
    if not isinstance(error, images.CannotWrite):
        return False
    if error.__cause__.errno in command.FULL_DISK:
        return True
    try:
        images.check_folder(out)
    except images.CannotWrite:
        return True
    return False


def together(failures, stopped, status):
    """What all processes came to: lines in the order of the scenes, the first reason, the worst status."""
    lines = [line for _, line in sorted(distributed.join(failures))]
    reasons = distributed.join([stopped] if stopped else [])
    return lines, reasons[0] if reasons else "", max(distributed.gather(status))


def view(restore_one, tasks, gallery, journal):
    """Restore, save, show and note the pictures of a scene's tasks; yields the gallery's entry of each, whose
    row has `COLUMNS`, the scores only where there is ground truth.
    """
    scene = tasks[0].scene
    if scene.clean is None:
        pictures, clean = [images.load(scene.rainy[0].path)], None
    else:
        rainy, clean = dataset.read_scene(scene)
        grey = [images.is_grey(half.path) for half in scene.rainy]
        pictures = [images.Picture(rgb, grey=one) for rgb, one in zip(rainy, grey, strict=True)]
    pictures = dict(zip(scene.rainy, pictures, strict=True))
    for _, half, density, name, result, number in tasks:
        picture, file = pictures[half], gallery.out / result
        if result.parts[0] in (FOLDER, MONTAGE):
            raise UserError(
                f"{half.path}: its result would have the name of the gallery's {result}; rename the picture"
            )
        scales = []
        start = time.perf_counter()
        restored = naming(half.path, partial(restore_one, tell_scale=scales.append), picture.rgb)
        seconds = time.perf_counter() - start
        if picture.grey:
            restored = images.in_grey(restored)
        height, width = restored.shape[:2]
        row = {"name": name, "density": density, "height": height, "width": width}
        row |= {"scale": f"{scales[0]:g}", "seconds": seconds}  # the scale as the flag takes it
        if clean is not None:
            row |= score(restored, clean)
            row |= {f"input_{metric}": value for metric, value in score(picture.rgb, clean).items()}
        try:
            images.save(file, picture._replace(rgb=restored))
            entry = gallery.add(row, file, picture.rgb, restored, clean, number)
            journal.add(entry, scene.files)
        except BaseException:  # a full disk, Ctrl-C, too little memory: nothing half done is left
            with suppress(OSError):
                file.unlink()
            raise
        yield entry


def naming(path, restore_one, rgb):
    """The picture restored; where the network's output is not finite, the error names its file, `path`."""
    try:
        return restore_one(rgb)
    except NotFinite as error:
        raise UserError(f"{path}: {error}") from None


def report(rows, facts, lines):
    """{file: its bytes} of `TABLES`; without `lines`, which are on the means, there is no `FULL`."""
    table = []
    writer = csv.writer(SimpleNamespace(write=table.append))  # ends lines in \r\n, so it quotes \r in names
    writer.writerow(COLUMNS)
    for row in rows:
        values = [row.get(column) for column in COLUMNS]
        writer.writerow(f"{value:.4f}" if isinstance(value, float) else value for value in values)
    texts = {CSV: "".join(line.removesuffix("\r\n") + "\n" for line in table)}
    texts[JSON] = json.dumps(for_json(facts), indent=1)
    if lines:
        full = [f"{row['name']}  " + "  ".join(f"{m} {row[m]:.4f}" for m in METRICS) for row in rows]
        texts[FULL] = "\n".join([*full, "", *lines, ""])
    return {name: text.encode(errors="surrogateescape") for name, text in texts.items()}


def summarise(rows, facts):
    """({density: {"output": `mean_scores`, "input": the rain's}}, "all" last; the lines of their table)."""
    means = {}
    lines = [f"{'':8} {'images':>6} " + "".join(f" {heading:>9}" for heading, _ in METRICS.values())]
    for density, (group, output, untouched) in by_density(rows).items():
        means[density] = {"output": output, "input": untouched}
        lines += [f"{density:8} {len(group):6} {_figures(output)}", f"{'  input':15} {_figures(untouched)}"]
        for whose, found in (("outputs", output), ("inputs", untouched)):
            left_out = [f"{count} of {metric}" for metric, count in found["left_out"].items() if count]
            if left_out:
                why = "equal images, or under 11 pixels"
                lines.append(f"  {whose} not in the means ({why}): {', '.join(left_out)}")
    how = "".join(f", {name} {value}" for name, value in in_words(facts["options"]).items())
    lines.insert(0, f"scores of {facts['checkpoint']}{how}, on the 8-bit pictures; PSNR in dB")
    missing, alone = facts["pictures"] - len(rows), facts["without_partner"]
    if missing or alone:
        lines.append(f"  not in the scores: {missing} pictures not done, {alone} files without a partner")
    return means, lines


def in_words(options):
    """{what: how} of the options that were given and change the scores."""
    words = {}
    if options["self_ensemble"]:
        words["self-ensemble"] = f"of {options['self_ensemble']}"
    if options["scale"] != 1:
        words["scale"] = f"{options['scale']}"
    if options["tile"] is not None:
        words["tiles"] = f"of {options['tile']}" if options["tile"] else "never"
    if options["amp"]:
        words["precision"] = "half"
    return words


def _figures(means):
    return "".join(f" {means[metric]:9.{digits}f}" for metric, (_, digits) in METRICS.items())


if __name__ == "__main__":
    command.run(main, get_args_parser())
