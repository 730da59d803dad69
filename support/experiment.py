"""A run of either training script: its folder, log, TensorBoard, device, clock, data, checkpoints and resume,
and what it does about files and steps that are bad.
"""

import argparse
import json
import logging
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from itertools import zip_longest
from pathlib import Path
from textwrap import shorten

import torch
from torch import nn
from torchvision.utils import make_grid

import dataset
from model_train import RUN, CheckpointError, filled, hard_link, read, write_whole
from support import distributed, layouts, runs
from support.buffers import Buffers
from support.cache import open_cache
from support.check import pair_hint
from support.command import announce_demo, heed_signals, script, stopped_by_sigterm
from support.devices import be_deterministic, is_out_of_gpu_memory, pick_device, slow_half
from support.errors import Interrupted, UserError
from support.fast import compile_edges, compile_network, keep_freed_memory, no_compiler
from support.images import is_utf8, write_bytes
from support.lock import lock_folder
from support.logs import NoWriter, open_log, open_writer
from support.metrics import for_json
from support.options import DEFAULT_DATA, DEMO_DATA, FREE_OPTIONS, MACHINE_OPTIONS, MOST_BAD
from support.rain import demo_set
from support.runs import BEST, LAST, PREVIOUS, STATES, SUMMARY, as_now, read_state, refuse_other_options
from support.validation import means, measure

LOCK = "run.lock"
BEATEN = {"psnr": -math.inf, "ssim": -math.inf, "loss": math.inf}  # by any score
KEPT = ("best", "begun_with", "skipped", "in_a_row", "bad")  # in a state; older runs' states lack some
RATE_FROM = 10  # steps: in the first ones kernels are chosen, compiled or recorded
# Flags that name a first epoch, and what does not happen where the run ends before it.
STARTS = {
    "arch_start": "NOTHING IS SEARCHED",
    "internal_start": "no internal loss",
    "freeze_start": "BatchNorm's statistics are never frozen",
}
log = logging.getLogger("manas")


def commit():
    """The short hash of the checked-out commit, "+" where files differ from it, "unknown" outside git and in
    a repository that does not have this file.
    """
    git = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent)]  # no write to the user's .git
    other = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # as in a hook
    run = partial(
        subprocess.check_output,
        stderr=subprocess.DEVNULL,
        text=True,
        env={name: value for name, value in os.environ.items() if name not in other},
    )
    try:
        run([*git, "ls-files", "--error-unmatch", Path(__file__).name])
        differs = run([*git, "status", "--porcelain", "--untracked-files=no"])
        return run([*git, "describe", "--always", "--exclude=*"]).strip() + "+" * bool(differs)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# --- the run ------------------------------------------------------------------------------------------------


class Experiment:
    """One run of a training script.

    kind: "search" or, for a training, "eval" (the released code's name); the folder's name begins with it.
    demo: options that --demo changes. Until `start`, options are only decided and nothing is written, so that
    a mistake in them costs nothing. `args` are the options of the run: those given, or, resumed, those that
    it was begun with.

    Under torchrun every rank has one, and all of them decide alike; that of rank 0 writes.

    As a context it gives back at its end, however that comes, what the run has taken of the process: signals,
    log, events and lock.
    """

    def __init__(self, kind, args, parser, demo):
        keep_freed_memory()
        distributed.start()
        self.kind = kind
        self.step = 0
        self.seconds_before = 0.0  # of this session
        self.best = dict(BEATEN)
        self.begun_with = None  # the scores of a network that was trained before
        self.totals = {}  # sums of the epoch's losses so far
        self.skipped = 0  # steps that were not finite, in all
        self.in_a_row = {}  # and without a good one between them, by kind of step
        self.bad = {}  # scenes left out: why, by key
        self.scenes = {}  # those of each part
        self.hints = []  # what seems to be wrong with them
        self.cache = None  # of their pictures, with --cache
        self.saved = 0  # the step that last.pt is of
        self.state = self.state_file = None  # to go on from
        self.lock = None
        self.taken = ExitStack()  # what is to be given back
        self.signals = self.taken.enter_context(ExitStack())  # likewise
        self.damaged = None  # why the newest state cannot be gone on from
        self.stopping = None
        self.padded_mentioned = False
        self.rate_from = 0.0, 0  # progress and step from which on the rate of steps is taken
        self.unreached = set()  # flags of STARTS that were warned of
        self.parser = parser
        try:
            self._settle(args, demo)
        except BaseException:
            self.taken.close()
            raise

    def _settle(self, args, demo):
        """Settle the options, the folder and the device."""
        args = argparse.Namespace(**vars(args))
        self.given = vars(args).pop("given")
        if args.resume is None:
            self.args = self._begin(args, demo)
        else:
            self.args = self._continue(args)
        if self.args.deterministic:
            be_deterministic()
        self.device = pick_device(self.args.device)
        self.steps_in_all = self.args.epochs * self.args.steps_per_epoch
        self.clock = time.monotonic()
        if self.state and self.done() and (self.folder / SUMMARY).exists():
            more = "; to go on, give a larger --max_minutes" if self.step < self.steps_in_all else ""
            if self.kind == "eval":
                weights = shlex.quote(f"{self.folder}/{BEST['psnr']}")
                more += f"; to train further, begin a new run with --weights {weights}"
            raise UserError(f"--resume {self.folder}: this run has finished, after step {self.step}{more}")
        self._check_processes()
        distributed.barrier()  # rank 0 does not touch the folder while others still look at it

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        with suppress(OSError) if error else nullcontext():  # a full disk has been told of
            self.taken.close()

    def _begin(self, args, demo):
        """Settle the options, which are returned, and the folder of a new run."""
        self._choose_data(args, demo)
        if args.learning_rate_min > args.learning_rate:
            if "learning_rate_min" in self.given:
                raise UserError(
                    f"--learning_rate_min {args.learning_rate_min:g}: the rate falls from --learning_rate, "
                    f"{args.learning_rate:g}, to this; give no more than that"
                )
            args.learning_rate_min = args.learning_rate
        self.folder = Path(args.save or distributed.agree(time.strftime(f"{self.kind}-EXP-%Y%m%d-%H%M%S")))
        if not is_utf8(self.folder):
            raise UserError(
                f"--save {self.folder}: its name is not UTF-8, which TensorBoard wants; choose another folder"
            )
        self._refuse_a_run()
        if not os.path.exists(self.folder / LOCK):  # else the files in it are of a run that was soon killed
            runs.refuse_others_files(self.folder)
        return args

    def _refuse_a_run(self):
        if any(os.path.exists(self.folder / file) for file in (*STATES, *BEST.values(), SUMMARY)):
            raise UserError(
                f"--save {self.folder}: holds a run; go on with --resume, or choose another folder"
            )

    def _choose_data(self, args, demo):
        """Settle --data and --demo, and with it the options that a demo changes."""
        if args.data is None and not args.demo and not _has_training_data(Path(DEFAULT_DATA)):
            args.demo = True
            announce_demo(f"{DEFAULT_DATA}/{layouts.TRAINING}", "--data")
        if args.demo:
            for name, value in demo.items():
                if name not in self.given:
                    setattr(args, name, value)
        if args.data is None:
            args.data = [DEMO_DATA if args.demo else DEFAULT_DATA]
            if args.demo:
                distributed.from_main(partial(demo_set, DEMO_DATA))

    def _continue(self, args):
        """Find the folder and state of a run that was begun; its options are returned."""
        if args.resume and args.save and Path(args.resume) != Path(args.save):
            raise UserError(
                f"--save {args.save}: --resume {args.resume} goes on in its own folder; leave --save out"
            )
        self.folder = Path(
            args.resume or args.save or runs.folder_to_resume(self.kind) or f"{self.kind}-EXP-*"
        )
        if any(os.path.exists(self.folder / file) for file in (LOCK, *STATES)):  # no other gets a lock
            distributed.from_main(self._claim)
        self.state_file, self.state, self.damaged = read_state(self.folder, self.kind)
        defaults = {name: self.parser.get_default(name) for name in vars(args)}  # of flags added since
        begun = argparse.Namespace(**{**defaults, **as_now(self.state["options"])})
        refuse_other_options(self.folder, vars(args), self.given, vars(begun))
        anew = FREE_OPTIONS & (self.given | MACHINE_OPTIONS)
        vars(begun).update({name: value for name, value in vars(args).items() if name in anew})
        self._take_over(self.state, begun.data)
        return begun

    def _take_over(self, state, data):
        """Take from a state all but its `parts`, which `start` loads. data: the run's --data."""
        self.step = self.saved = state["step"]
        self.seconds_before = state["seconds"]
        self.totals = state["totals"]
        for name in KEPT:
            setattr(self, name, state.get(name, getattr(self, name)))
        if not state.get("scenes"):
            return
        if missing := [folder for folder in data if not Path(folder).exists()]:
            raise UserError(
                f"{missing[0]}: no such file or folder, but this run's --data; resume in the folder where "
                "the run was begun, or, if the data has moved, put a link (ln -s) in its place"
            )
        scenes = state["scenes"].items()
        self.scenes = {part: [dataset.from_plain(fields) for fields in plain] for part, plain in scenes}

    def _claim(self):
        if self.lock is None:
            self.lock = self.taken.enter_context(lock_folder(self.folder, LOCK, "--save", self))

    def network(self, make):
        """The network make(channels, residual), by the options. That of a resumed run has the weights in its
        state, which are checked to fit it before anything is allocated.
        """
        options = {name: getattr(self.args, name) for name in ("channels", "residual")}
        if self.state is None:
            return make(**options)
        try:
            return filled(make, options | {"weights": self.state["parts"]["net"]}, self.state_file)
        except CheckpointError as error:
            previous, remedy = self.folder / PREVIOUS, ""
            with suppress(CheckpointError, KeyError, TypeError):  # it fits no better where code changed
                filled(make, options | {"weights": read(previous)["parts"]["net"]}, previous)
                remedy = f"; or remove that file, to go on from {previous}"
            raise CheckpointError(f"{error}; begin a new run{remedy}") from None

    def _check_processes(self):
        processes, parts, scenes = distributed.size(), self.args.accumulate, self.args.batch_size
        if scenes % (processes * parts):
            raise UserError(
                f"--batch_size {scenes}: cannot be divided evenly over {processes} processes with "
                f"--accumulate {parts}; make it a multiple of {processes * parts}"
            )
        if self.args.sync_bn and self.device.type != "cuda":
            what = "leave it out" if self.args.resume is None else "resume it where there is CUDA"
            raise UserError(f"--sync_bn: works on CUDA alone, not on {self.device.type}; {what}")

    def start(self, **parts):
        """Open the folder, log and TensorBoard, and track `parts`, whose state_dict is saved and loaded.

        parts["net"] is the network whose BatchNorm must not keep the statistics of a bad step.
        """
        self.parts = parts
        options = {k: v for k, v in vars(self.args).items() if k not in ("resume", "save")}
        self.writer = NoWriter()
        log.handlers = [logging.NullHandler()]
        self.folder = distributed.from_main(partial(self._open_folder, options))
        if self.state:
            for name, part in parts.items():
                if name in self.state["parts"]:  # else the run was begun before there was such a part
                    self._load(name, part)
            self.state = None
            if self.damaged:
                log.warning("%s; going on from %s", self.damaged, self.folder / PREVIOUS)
            log.info("continuing %s after step %d", self.folder, self.step)
            self._forget_what_is_gone()
        else:
            log.info("run folder %s on %s", self.folder, self.device)
            for network in (part for part in parts.values() if isinstance(part, nn.Module)):
                distributed.broadcast(network.state_dict().values())
        flags = [text for name, value in options.items() for text in as_flag(name, value)]
        origin = f"{sys.executable}, commit {distributed.from_main(commit)}, torch {torch.__version__}"
        made = {"command:": shlex.join(sys.argv), "options:": shlex.join(flags), "by": origin}
        for what, text in made.items():
            log.info("%s %s", what, text)
            text = text.encode(errors="backslashreplace").decode()  # names of files need not be text
            self.writer.add_text(what.strip(":"), text, self.step)
        if self.args.amp and (why := slow_half(self.device)):
            log.warning("--amp: %s", why)
        self.buffers = Buffers(parts["net"])
        for number, handler in heed_signals(self._stop).items():
            self.signals.callback(signal.signal, number, handler)

    def _forget_what_is_gone(self):
        """A best network whose file was taken away is no longer to be beaten: the next one has its place."""
        kept = [name for name, value in self.best.items() if math.isfinite(value)]
        for name in distributed.agree([name for name in kept if not (self.folder / BEST[name]).exists()]):
            log.warning(
                "%s is gone; the next epoch's network takes its place, whatever it scores",
                self.folder / BEST[name],
            )
            self.best[name] = BEATEN[name]

    def _load(self, name, part):
        try:
            part.load_state_dict(self.state["parts"][name])
        except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
            if is_out_of_gpu_memory(error):
                raise
            raise UserError(
                f"{self.folder}: the saved {name} does not fit this code (was an operation added to the "
                f"search space?); begin a new run: {shorten(str(error), 200)}"
            ) from None

    def _open_folder(self, options):
        """Make the folder, clear it of unfinished files, and open log and TensorBoard in it; returns it."""
        self._make_folder()
        try:
            runs.remove_unfinished(self.folder)
            (self.folder / SUMMARY).unlink(missing_ok=True)  # it goes on, as with more --max_minutes
            if self.damaged:
                runs.set_damaged_aside(self.folder)
            if self.state:
                runs.cut_back(self.folder, self.state.get("written"))
            else:
                write_bytes(self.folder / "options.json", (json.dumps(options, indent=1) + "\n").encode())
            self.taken.callback(open_log(log, self.folder))
            # Events of an epoch's end stand at its last step: they are kept if the epoch has its scores.
            redone = self.step + (not self.unscored())
            self.writer = open_writer(self.folder, redone if self.state else None)
            self.taken.callback(self.writer.close)
        except OSError as error:
            raise UserError(f"--save {self.folder}: cannot be written: {error.strerror}") from None
        return self.folder

    def _make_folder(self):
        """Make the folder. Two runs without --save that begin in one second get different ones."""
        named, wanted = bool(self.args.save or self.state), self.folder
        for number in range(2, 1000):
            try:
                self.folder.mkdir(parents=True, exist_ok=named)
                self._claim()
                if not self.state:
                    self._refuse_a_run()  # that another process began, and finished, while this one read data
                return
            except OSError as error:
                if named or not isinstance(error, FileExistsError):
                    raise UserError(f"--save {self.folder}: cannot be made: {error.strerror}") from None
            self.folder = wanted.with_name(f"{wanted.name}-{number}")

    def _stop(self, number, frame):
        # torchrun passes on what Slurm may have sent to all processes as well.
        if self.stopping and distributed.launched():
            return
        if self.stopping:  # asked twice: at once
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.stopping = signal.Signals(number).name

    def split(self):
        """{part: its scenes} of --data, as `dataset.split` has them; with --cache decoded. Call it before
        `start`.

        A resumed run keeps the scenes that it was begun with, whatever files have come since.
        """
        args = self.args
        print(f"data: {' '.join(args.data)}", flush=True)
        if not self.scenes:
            self.scenes = distributed.from_main(
                lambda: dataset.split(
                    dataset.find_training(args.data, args.clean_side, print), args.split_seed
                )
            )
            self.hints = distributed.from_main(self._look_at_pairs)
        if args.cache is not None:
            self._decode_once()
        return self.scenes

    def _all_scenes(self):
        return [scene for part in self.scenes.values() for scene in part]

    def _look_at_pairs(self):
        """What seems to be wrong with most pairs of a folder, a line each."""
        scenes, hints = self._all_scenes(), []
        for folder in dict.fromkeys(self.args.data):
            own = [scene for scene in scenes if Path(folder) in scene.rainy[0].path.parents]
            if hint := pair_hint(own):
                hints.append(f"{folder}: {hint}")
        return hints

    def _decode_once(self):
        """Open the cache of all pictures, which are decoded now if it lacks them."""
        try:
            with stopped_by_sigterm():
                self.cache = open_cache(self._all_scenes(), self.args.data, self.args.cache)
        except KeyboardInterrupt:
            raise Interrupted("stopped while decoding; cache files that were not finished are gone") from None

    def describe(self):
        """Log over how many processes the run is spread, and how many scenes each part of the split has."""
        if distributed.size() > 1:
            own = self.args.batch_size // distributed.size()
            log.info("processes: %d, %d scenes a step each", distributed.size(), own)
        parts = {part: len(scenes) for part, scenes in self.scenes.items()}
        if self.kind == "eval":  # it trains on both
            parts = {"training": parts["weights"] + parts["architecture"], "validation": parts["validation"]}
        said = ", ".join(f"{number} {part}" for part, number in parts.items())
        if 0 < self.args.val_scenes < parts["validation"]:
            said += f", of which {self.args.val_scenes} are scored (--val_scenes)"
        log.info("scenes: %s", said)
        for hint in self.hints:
            log.warning("%s", hint)
        self._warn_of_starts(self.args.epochs)

    def _foretell(self):
        """With --max_minutes, warn of what the run will not reach at its rate so far."""
        steps = self.step - self.rate_from[1]
        if self.args.max_minutes and steps > 0:
            progress = self.progress()
            left = (1 - progress) * steps / max(progress - self.rate_from[0], 1e-9)
            self._warn_of_starts(math.ceil((self.step + left) / self.args.steps_per_epoch))

    def _warn_of_starts(self, last):
        """Say, once each, what the run will not reach if `last` is its last epoch."""
        several = any(len(scene.rainy) > 1 for scene in self._all_scenes())
        for name, what in STARTS.items():
            start = getattr(self.args, name, 0)
            if start > last and name not in self.unreached and (several or name != "internal_start"):
                self.unreached.add(name)
                when = "the last epoch"
                if last < self.args.epochs:
                    when = f"epoch {last}, in which --max_minutes ends the run at this rate"
                log.warning("--%s %d is after %s: %s", name, start, when, what)

    def batches(self, scenes, first_step=0):
        """`dataset.batches` of these scenes, from the present step on or, if that is later, `first_step`."""
        return dataset.batches(
            scenes,
            patch_size=self.args.patch_size,
            batch_size=self.args.batch_size,
            seed=self.args.seed,
            device=self.device,
            workers=self.args.workers,
            first_step=max(self.step, first_step),
            clean_inputs=self.args.clean_inputs,
            bad=self.bad,
            cache=self.cache,
            rank=distributed.rank(),
            ranks=distributed.size(),
            upright=self.args.upright,
        )

    def has_begun(self, name):
        """Whether the epoch that a flag of `STARTS` names has come."""
        return 0 < getattr(self.args, name) <= self.epoch()

    def uses_internal(self):
        """Whether the internal loss counts in the present epoch."""
        return self.has_begun("internal_start")

    def compile(self, net):
        """With --compile: have what gains by it compiled in place."""
        if not self.args.compile:
            return
        if self.args.sync_bn and distributed.size() > 1:
            why = "--sync_bn would cut the network into pieces at each BatchNorm"
        else:
            why = no_compiler(self.device)
        if why:
            log.warning("--compile: %s; the run goes on without it", why)
            return
        log.info("compiled in the first step, which takes minutes")
        if self.kind == "eval":
            compile_network(net, self.device)
        else:
            compile_edges(net)

    def uses_graphs(self):
        """Whether its steps are CUDA graphs: not those of several parts, nor those in which processes wait
        for each other, since each process records its own graph.
        """
        alone = self.args.accumulate == 1 and not (self.args.sync_bn and distributed.size() > 1)
        return self.device.type == "cuda" and alone and not self.args.no_graphs

    # --- time ---

    def seconds(self):
        """Seconds spent on the run, sessions before this one included."""
        return self.seconds_before + time.monotonic() - self.clock

    def progress(self):
        """How far the run is, 0 to 1: by steps, or by the clock where --max_minutes leaves less."""
        by_steps = self.step / self.steps_in_all
        budget = self.args.max_minutes
        by_clock = distributed.agree(self.seconds()) / (60 * budget) if budget else 0.0
        return min(1.0, max(by_steps, by_clock))

    def cosine(self, highest, lowest=0.0):
        """The learning rate now: from `highest` to `lowest` on half a cosine over the run."""
        return lowest + (highest - lowest) * (1 + math.cos(math.pi * self.progress())) / 2

    def epoch(self):
        """The epoch of the present step, from 1."""
        return self.step // self.args.steps_per_epoch + 1

    def unscored(self):
        """Whether steps were taken since the last scores."""
        return bool(self.totals)

    def done(self):
        """Whether the last epoch has its scores."""
        return not self.unscored() and self.progress() >= 1

    def epochs(self):
        """Yield the numbers of the epochs that remain, the first of which may lack only its scores."""
        if not (self.folder / LAST).exists():
            self.save()  # from now on a run that is killed can be resumed
        self.rate_from = self.progress(), self.step
        while not self.done():
            # Steps without scores belong to the epoch that they were taken in, its last step too.
            yield (self.step - self.unscored()) // self.args.steps_per_epoch + 1
        if self.step == 0:
            minutes = f"--max_minutes {self.args.max_minutes:g}"
            self.give_up(f"{minutes}: the time was over before the first step", more=" --max_minutes MORE")

    def steps(self, epoch):
        """The steps that remain of an epoch, with a progress bar; saves and stops between them."""
        end = epoch * self.args.steps_per_epoch
        bar = distributed.bar(None, f"epoch {epoch}", self.args.steps_per_epoch, "step")
        bar.update(self.step % self.args.steps_per_epoch)
        saved, taken = time.monotonic(), 0
        with bar:
            while self.step < end and self.progress() < 1:
                self.buffers.keep()
                yield self.step
                self.step += 1
                bar.update()
                self.stop_if_asked()
                taken += 1
                if taken == RATE_FROM:
                    self.rate_from = self.progress(), self.step
                elif taken == 3 * RATE_FROM:
                    self._foretell()
                if time.monotonic() - saved > 60 * self.args.save_every:
                    self.save()
                    saved = time.monotonic()

    def stop_if_asked(self):
        """Save and raise Interrupted after SIGINT or SIGTERM, to whichever rank."""
        if stopping := distributed.join([self.stopping] if self.stopping else []):
            self.save()
            raise Interrupted(f"stopped by {stopping[0]} after step {self.step}; {self.how_to_go_on()}")

    def give_up(self, reason, more=""):
        """Save, and raise UserError; more: what to add to the command line that goes on."""
        self.save()
        raise UserError(f"{reason}; saved after step {self.step}; {self.how_to_go_on()}{more}")

    def flags_to_retrain(self):
        """Flags, a list of words, by which a network of this search is trained on the same data, as wide."""
        names = ["demo", "data", "clean_side", *([] if self.args.demo else ["channels", "residual"])]
        usual = {name: self.parser.get_default(name) for name in names}
        usual["data"] = [DEMO_DATA if self.args.demo else DEFAULT_DATA]
        other = {name: value for name in names if (value := getattr(self.args, name)) != usual[name]}
        return [word for name, value in other.items() for word in as_flag(name, value)]

    def how_to_go_on(self):
        nodes = distributed.size() // distributed.local_size()
        words = [f"--nnodes={nodes}"] if nodes > 1 else []
        words = ["torchrun", *words, f"--nproc_per_node={distributed.local_size()}"]
        launcher = " ".join(words) if distributed.launched() else "python"
        flags = ["--resume", self.folder.as_posix()]
        for name in sorted(self.given.intersection(MACHINE_OPTIONS)):
            flags += as_flag(name, getattr(self.args, name))
        return f"go on with: {launcher} {script(self.parser.prog)} {shlex.join(flags)}"

    # --- what can go wrong ---

    def next_batch(self, batches):
        """The next of the batches. Names, once, the files that it had to do without."""
        try:
            batch = next(batches)
            bad = batch.bad
        except UserError as error:
            bad = [error]  # in the same list, so that the ranks agree in one exchange
        bad = distributed.join(bad)
        for error in bad:
            if isinstance(error, UserError):
                self.give_up(error)
        self.leave_out(bad)
        if batch.padded and not self.padded_mentioned:
            self.padded_mentioned = True
            log.warning(
                "scene %s is smaller than --patch_size: such scenes are padded by mirroring", batch.padded[0]
            )
        return batch

    def leave_out(self, bad):
        """Do without some scenes from now on; bad: a list of (key, why it cannot be read). Gives up if they
        are too many: these are not saved as bad, since the disk may be back when the run is resumed.
        """
        if not bad:
            return
        reasons = dict.fromkeys(why for key, why in bad if why not in self.bad.values())
        files = {file for scene in self._all_scenes() for file in scene.files}
        count = len({*self.bad.values(), *reasons})
        if count > MOST_BAD * len(files) and not self.args.allow_bad:
            self.give_up(
                f"{'; '.join([*reasons][:3])}: {count} of {len(files)} files cannot be read, more than "
                f"{MOST_BAD:.0%}; --allow_bad goes on without them"
            )
        for why in reasons:
            log.warning("left out from now on: %s", why)
        self.bad.update(bad)

    def accept(self, batch, **values):
        """Whether a step can be taken: whether all values, scalar tensors, are finite. They are its loss,
        which comes first and names the kind of step, and its gradient's norm.

        If they are, they are counted. If not, the batch's files are logged, BatchNorm's statistics are put
        back, and --max_bad_steps of that kind in a row end the run, without a save. Waits for the GPU, once.
        """
        kind = next(iter(values))
        values = dict(zip(values, distributed.average([*values.values()]), strict=True))
        if torch.stack([value.detach() for value in values.values()]).isfinite().all():
            self.in_a_row.pop(kind, None)
            self.count(**values)
            return True
        self.buffers.put_back()
        self.count(skipped=torch.ones(()))
        self.skipped += 1
        self.in_a_row[kind] = self.in_a_row.get(kind, 0) + 1
        found = ", ".join(f"{name} {value.item():g}" for name, value in values.items())
        files = distributed.join(batch.files)
        log.warning("step %d skipped: %s; its files: %s", self.step + 1, found, " ".join(files))
        if self.in_a_row[kind] >= self.args.max_bad_steps:
            raise UserError(
                f"--max_bad_steps: {self.in_a_row[kind]} steps in a row were not finite ({found}; log.txt "
                f"names their files); {self.folder / LAST} is from step {self.saved}; {self.how_to_go_on()}"
            )
        return False

    def average_statistics(self):
        """Average what a step changed in BatchNorm's statistics over the ranks, which so stay equal."""
        self.buffers.average_changes()

    def validate(self, net, scenes):
        """The scores, as `support.validation.means` gives them, of the scenes that can be read, which the
        ranks share. SIGINT and SIGTERM stop it between two of them. TensorBoard gets the first: rain |
        restored | clean.
        """
        bad = []
        scenes = [s for s in scenes if s.key not in self.bad][distributed.rank() :: distributed.size()]
        measured, panel = measure(
            net, scenes, self.device, bad, stop=lambda: self.stopping, amp=self.args.amp, cache=self.cache
        )
        self.stop_if_asked()
        bad = distributed.join(bad)
        in_turn = zip_longest(*distributed.gather(measured))
        try:
            scores = means([of_scene for several in in_turn for of_scene in several if of_scene], bad)
        except UserError as error:
            self.give_up(error)
        self.leave_out(bad)
        if panel:  # a rank may have had nothing to read
            strip = make_grid([*panel], nrow=len(panel))
            self.writer.add_image("rain | restored | clean", strip, self.step)
        return scores

    # --- what is written ---

    def count(self, **values):
        """Add a step's losses: scalar tensors, kept on their device, since reading them waits for the GPU."""
        for name, value in values.items():
            total, number = self.totals.get(name, (0.0, 0))
            self.totals[name] = (total + value.detach(), number + 1)

    def finish_epoch(self, epoch, scores, write_best, **scalars):
        """Log the epoch, keep the checkpoints that score best so far, and save the state to continue from.

        scores: validation's "psnr", "ssim" and "loss"; write_best(path) replaces the file; scalars: for
        TensorBoard, by tag.
        """
        skipped = self.totals.pop("skipped", (0, 0))[1]
        losses = {name: float(total) / number for name, (total, number) in self.totals.items()}
        self.totals = {}
        for name, value in {**losses, **{f"val_{k}": v for k, v in scores.items()}, **scalars}.items():
            self.writer.add_scalar(name, value, self.step)
        left = self.seconds() * (1 - self.progress()) / max(self.progress(), 1e-9)
        log.info(
            "epoch %d step %d/%d  %s  validation psnr %.3f ssim %.4f loss %.4f  %s spent, about %s left",
            epoch,
            self.step,
            self.steps_in_all,
            " ".join(f"{name} {value:.4f}" for name, value in losses.items()),
            scores["psnr"],
            scores["ssim"],
            scores["loss"],
            _duration(self.seconds()),
            _duration(left),
        )
        if skipped or self.bad:
            log.warning(
                "epoch %d: %d steps skipped; %d scenes left out so far", epoch, skipped, len(self.bad)
            )
        self._foretell()
        self._keep_best(scores, write_best)
        self.save()

    def begin_with(self, scores, write_best):
        """Log the scores of a network that was trained before; it is the best until an epoch beats it."""
        self.begun_with = scores
        found = " ".join(f"{name} {value:.4f}" for name, value in scores.items())
        log.info("before the first step  validation %s", found)
        self._keep_best(scores, write_best)

    def _keep_best(self, scores, write_best):
        files = []
        for name, file in BEST.items():
            better = scores[name] < self.best[name] if name == "loss" else scores[name] > self.best[name]
            if better:
                self.best[name] = scores[name]
                files.append(self.folder / file)
        if files:
            distributed.from_main(partial(_write_once, write_best, *files))

    def save(self):
        """Write last.pt: all that continuing needs, in plain tensors, numbers and text. Rank 0 does."""
        if not distributed.is_main():
            self.saved = self.step
            return
        last, previous = (self.folder / file for file in STATES)
        self.writer.flush()
        state = {
            "format": RUN,
            "kind": self.kind,
            "options": vars(self.args),
            "step": self.step,
            "seconds": self.seconds(),
            "totals": {name: (float(total), number) for name, (total, number) in self.totals.items()},
            **{name: getattr(self, name) for name in KEPT},
            "scenes": {part: [*map(dataset.plain, scenes)] for part, scenes in self.scenes.items()},
            "written": runs.written(self.folder),
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }
        try:
            write_whole(state, last, previous)
        except CheckpointError as error:
            kept = f"{LAST}, after step {self.saved}, is kept" if last.exists() else "nothing is saved yet"
            raise UserError(f"{error}; {kept}") from None
        self.saved = self.step

    def finish(self, **summary):
        """Mark the run as finished: summary.json with the steps, the minutes and the best scores. Signals do
        from then on what they did before `start`.
        """
        summary = {
            "steps": self.step,
            "minutes": round(self.seconds() / 60, 1),
            "best": self.best,
            "begun_with": self.begun_with,
            "skipped_steps": self.skipped,
            "left_out": self.bad,
            **summary,
        }
        if distributed.is_main():
            text = json.dumps(for_json(summary), indent=1) + "\n"
            write_bytes(self.folder / SUMMARY, text.encode(), durable=True)
        self.writer.close()
        best = ", ".join(f"{name} {value:.4f}" for name, value in self.best.items())
        log.info(
            "finished %d steps in %s; best on validation: %s", self.step, _duration(self.seconds()), best
        )
        if self.begun_with and self.best["psnr"] == self.begun_with["psnr"]:
            log.warning(
                "no epoch scored a better psnr than the weights that the run began with: %s holds those",
                BEST["psnr"],
            )
        if self.skipped or self.bad:
            log.warning("in all %d steps skipped and %d scenes left out", self.skipped, len(self.bad))
        self.signals.close()


def _write_once(write, first, *others):
    """write(path) for several paths: one file under all the names, where the file system has hard links."""
    write(first)
    for other in others:
        try:
            hard_link(first, other)
        except OSError:
            write(other)


def _has_training_data(folder):
    """Whether there is more in DID-MDN's folder than its test set."""
    if not folder.is_dir() or not os.access(folder, os.R_OK):
        return folder.exists()  # what is wrong with it is said where it is opened
    return any(name != layouts.TEST and name[0] != "." for name in os.listdir(folder))


def clip(parameters, largest):
    """Scale the gradient to a norm of at most `largest`; 0: leave it. Returns what to log, as scalar tensors:
    its norm before, and whether it was clipped.
    """
    largest = largest or math.inf
    norm = nn.utils.clip_grad_norm_(parameters, largest)
    return {"gradient_norm": norm, "clipped": (norm > largest).float()}


def as_flag(name, value):
    """An option as it is written on a command line: a list of words; [] of one that was not given."""
    if value is None or value is False or value == []:
        return []
    if value is True or value == "":
        return [f"--{name}"]
    return [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]


def _duration(seconds):
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
