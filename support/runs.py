"""What lies in the folders of training runs, for those who begin with it, continue or compare it."""

import glob
import json
import os
import re
from pathlib import Path

from genotypes import brief
from model_train import RUN, CheckpointError, read
from support.errors import UserError
from support.options import FREE_OPTIONS

LAST, PREVIOUS = STATES = ("last.pt", "last.prev.pt")  # the state to go on from, and the one before it
BEST = {"psnr": "best_psnr.pt", "ssim": "best_ssim.pt", "loss": "best_loss.pt"}
# Fields that every state has; the states of older runs lack others.
NEEDED = {"options": dict, "step": int, "seconds": (int, float), "totals": dict, "parts": dict}
SUMMARY = "summary.json"  # of a run that has finished
# Files that a killed run was writing: of `write_whole` and `genotypes.write_json`, and of `write_bytes`.
UNFINISHED = re.compile(r"\.(.+\.(pt|json)\.\d+(\.link)?|[0-9a-f]{32}\.(json|svg))")


def newest(kind, file, demo=None):
    """The newest `file` in the working folder's runs of a kind ("search", "eval") that finished, or None.

    demo: only demo runs (True), only others (False), or any (None).
    """
    found = [
        summary
        for summary in Path().glob(f"{kind}-EXP-*/{SUMMARY}")
        if (summary.parent / file).exists() and demo in (None, noted(summary.parent, "options.json", "demo"))
    ]
    return max(found, key=lambda path: path.stat().st_mtime).parent / file if found else None


def folder_to_resume(kind):
    """The folder of the run of a kind whose state to go on from is the newest, or None."""
    states = [path for file in STATES for path in Path().glob(f"{kind}-EXP-*/{file}")]
    return max(states, key=lambda path: path.stat().st_mtime).parent if states else None


def noted(folder, file, name):
    """A value in a run's options.json or summary.json; None where it is missing or the file is damaged."""
    try:
        return json.loads((folder / file).read_text(encoding="utf-8"))[name]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def as_now(options):
    """The options of a run as they would be given today: 0, which means all or never, was None once."""
    return options | {name: 0 for name in ("val_scenes", "freeze_start") if options.get(name, 0) is None}


def refuse_other_options(folder, options, given, begun):
    """UserError that names each of the flags `given` whose value differs from the one that a run was `begun`
    with, and would change what it computes; or what newer code has begun it with that this code does not
    know.
    """
    unknown = [f"--{name} {_text(value)}" for name, value in begun.items() if name not in options and value]
    if unknown:
        raise UserError(
            f"{folder}: the run was begun with {', '.join(unknown)}, which this version of the code does not "
            "have; go on with the one that began it"
        )
    differing = [
        f"--{name} {_text(value)}: the run in {folder} was begun with {_text(begun[name])}"
        for name, value in options.items()
        if name in given - FREE_OPTIONS and value != begun[name]
    ]
    if differing:
        flags = "flag" if len(differing) == 1 else "flags"
        raise UserError(f"{'; '.join(differing)}; leave the {flags} out, or begin a new run")


def refuse_others_files(folder):
    """UserError where a folder that is no run's holds files that a run would replace or write to."""
    for pattern in ("options.json", "log.txt", "genotype.json", "genotype_*.json", "genotype.svg"):
        for file in sorted(glob.glob(os.path.join(glob.escape(folder), pattern))):
            if os.path.isfile(file):
                raise UserError(f"--save {folder}: the run would replace {file}; choose another folder")


def read_state(folder, kind):
    """(path, state, None) of the last.pt of a run of a kind ("search", "eval"); if that is damaged or gone,
    (path, state, why) of last.prev.pt. CheckpointError where both are, UserError for another kind's.
    """
    last, previous = (folder / file for file in STATES)
    try:
        return last, _read_state(last, kind), None
    except CheckpointError as error:
        if not os.path.exists(previous):
            raise
        try:
            return previous, _read_state(previous, kind), str(error)
        except CheckpointError as older:
            raise CheckpointError(f"{error}; {older}") from None


def _read_state(path, kind):
    state = read(path)
    if state.get("format") != RUN or state.get("kind") != kind:
        kind = {"search": "search run", "eval": "training run"}[kind]
        raise UserError(f"{path}: not the checkpoint of a {kind} of this project")
    for name, type_ in NEEDED.items():
        if not isinstance(state.get(name), type_):
            raise CheckpointError(
                f"{path}: not the whole state of a run: its {name} is {brief(state.get(name))}"
            )
    if not isinstance(state["parts"].get("net"), dict):
        raise CheckpointError(f"{path}: not the whole state of a run: it has no network")
    if not isinstance(state.get("best", {}), dict):
        raise CheckpointError(f"{path}: not the whole state of a run: its best is {brief(state['best'])}")
    return state


def _text(value):
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return str(value)


# --- the files of a run that goes on ------------------------------------------------------------------------


def remove_unfinished(folder):
    """Remove what a killed run was writing."""
    for path in folder.glob(".*"):
        if UNFINISHED.fullmatch(path.name):
            path.unlink()


def set_damaged_aside(folder):
    """Rename a damaged last.pt, else the next save would keep it in place of the whole last.prev.pt."""
    last = folder / LAST
    if last.exists():
        os.replace(last, folder / "last.damaged.pt")


def written(folder):
    """{name: size in bytes} of the files that grow, once they are synced to the disk."""
    sizes = {}
    for path in _growing(folder):
        with open(path, "r+b") as file:
            os.fsync(file.fileno())
            sizes[path.name] = os.fstat(file.fileno()).st_size
    return sizes


def cut_back(folder, sizes):
    """Cut the files that grow to the `sizes` that were `written` with the state: what came after is done
    again. None, as in older states, leaves them whole.
    """
    if sizes is None:
        return
    for path in _growing(folder):
        if path.name in sizes:
            os.truncate(path, min(sizes[path.name], path.stat().st_size))
        else:
            path.unlink()


def _growing(folder):
    return [*folder.glob("log.txt"), *folder.glob("events.out.tfevents.*")]
