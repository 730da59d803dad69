"""Stage 1: search an architecture.

    python train_search_batch.py                                   # DID-MDN in datasets/Rain1200
    python train_search_batch.py --demo                            # minutes on a laptop, no download
    python train_search_batch.py --data MY_PAIRS --clean_side left --name my_search
    python train_search_batch.py --resume search-EXP-20260101-120000
    torchrun --nproc_per_node=8 train_search_batch.py              # 8 GPUs, each with an eighth of a batch
    python train_search_batch.py --random 12                       # no search: random genotypes instead

The weights of the supernet are trained on half of the training scenes. From --arch_start on, each weight step
is preceded by a step on alpha and beta, on another 45 % of the scenes; the last 5 % choose checkpoints. At
the end the strongest choices are written to genotypes.py under --name. support/health.py says how to tell
from the log and TensorBoard whether a search is healthy.
"""

import re
import shlex
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

import dataset
import genotypes
from architect import Architect
from losses import MEASURES, architecture_regulariser, choice_sizes, complexity, multi_to_one
from model_search import SearchNetwork
from model_train import SUPERNET, CheckpointError, filled, from_supernet, read, write_whole
from support import command, devices, distributed, experiment, options, runs
from support.command import not_negative, patch, positive
from support.draw import draw_genotype
from support.errors import Interrupted, UserError
from support.experiment import Experiment, log
from support.graphs import Backward
from support.health import Health
from support.validation import means, measure

# The demo: the whole method in a minute or two on two cores, the warm-ups scaled with the schedule.
DEMO = {
    "epochs": 4,
    "steps_per_epoch": 20,
    "batch_size": 2,
    "channels": [8, 16, 32, 64],
    "internal_start": 2,
    "arch_start": 2,
    "val_scenes": 1,
}

DEFAULT_NAME = re.compile(r"search_\d{8}_\d{6}")

# The unrolled step's double backward takes the batch in this many parts: over the whole batch at once it
# would need 2.6 times the memory of a first-order step.
HESSIAN_PARTS = 4


def get_args_parser():
    parser = command.Parser(
        prog="train_search_batch.py", description="Search a derain architecture with a supernet (stage 1)."
    )
    search = parser.add_argument_group("search")
    search.add_argument("--name", help="name of the genotype in genotypes.py (default: search_<time>)")
    search.add_argument(
        "--random",
        type=positive,
        metavar="N",
        help="no search: write N random genotypes, <name>_00 and so on (default <name>: random_s<seed>)",
    )
    search.add_argument("--epochs", type=positive, default=200, help="(default: %(default)s)")
    search.add_argument("--steps_per_epoch", type=positive, default=1000, help="(default: %(default)s)")
    search.add_argument(
        "--batch_size", type=positive, default=16, help="scenes a step (default: %(default)s)"
    )
    search.add_argument("--patch_size", type=patch, default=64, help="pixels a side (default: %(default)s)")
    options.add_network_arguments(search)
    weights = parser.add_argument_group("weights (SGD, cosine)")
    weights.add_argument(
        "--learning_rate", type=not_negative, default=0.002, help="at the start (default: %(default)s)"
    )
    weights.add_argument(
        "--learning_rate_min", type=not_negative, default=1e-4, help="at the end (default: %(default)s)"
    )
    weights.add_argument("--momentum", type=not_negative, default=0.9, help="(default: %(default)s)")
    weights.add_argument("--weight_decay", type=not_negative, default=3e-4, help="(default: %(default)s)")
    weights.add_argument(
        "--grad_clip", type=not_negative, default=5.0, help="largest gradient norm; 0: no limit (default: 5)"
    )
    arch = parser.add_argument_group("alpha and beta (Adam)")
    arch.add_argument("--arch_learning_rate", type=not_negative, default=3e-4, help="(default: %(default)s)")
    arch.add_argument("--arch_weight_decay", type=not_negative, default=1e-3, help="(default: %(default)s)")
    arch.add_argument(
        "--arch_start",
        type=positive,
        default=11,
        help="first epoch of the architecture steps (default: %(default)s)",
    )
    arch.add_argument(
        "--unrolled", action="store_true", help="second-order steps (DARTS), about 8 times the cost"
    )
    arch.add_argument(
        "--arch_batch_statistics",
        action="store_true",
        help="in architecture steps BatchNorm uses the batch's statistics (default: its running ones)",
    )
    arch.add_argument(
        "--lambda_arch",
        type=not_negative,
        default=0.01,
        help="weight of the architecture regulariser (default: %(default)s)",
    )
    arch.add_argument(
        "--stop_on_collapse",
        action="store_true",
        help="end a search that collapses (defined in support/health.py); keep its last healthy genotype",
    )
    arch.add_argument(
        "--lambda_comp",
        type=not_negative,
        default=0.01,
        help="weight of the model complexity (default: %(default)s)",
    )
    arch.add_argument(
        "--complexity",
        choices=MEASURES,
        default="params",
        help="what it counts: parameters (default) or multiply-adds",
    )
    options.add_arguments(parser)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the mixed edges: worth it in a search of hours, since compiling takes minutes, "
        "and again for each further number of images in a batch (mixed data)",
    )
    return parser


def main(args):
    if args.random:
        distributed.start()
        distributed.from_main(partial(write_random, args))
        return 0
    if args.unrolled and args.arch_batch_statistics and args.sync_bn:
        raise UserError("--sync_bn: has no second derivative, which --unrolled needs; leave one of them out")
    with Experiment("search", args, get_args_parser(), DEMO) as run:
        return search(run)


def search(run):
    """Search, and write the genotype found; returns the exit status."""
    args = run.args
    settle_name(run)
    scenes = run.split()

    torch.manual_seed(args.seed)
    net = run.network(SearchNetwork)
    if args.sync_bn:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    net.to(run.device, memory_format=torch.channels_last)
    optimizer, arch_optimizer = make_optimizers(net, args)
    health = Health(args.arch_start)
    run.start(net=net, optimizer=optimizer, arch_optimizer=arch_optimizer, health=health)
    run.compile(net)
    run.describe()
    validation = dataset.spread(scenes["validation"], args.val_scenes)

    # Recorded as a CUDA graph: anything in it that changes, the batch aside, must be in `constants` below.
    def loss(forward, batch):
        with devices.autocast(run.device, args.amp):
            outputs = forward(batch.rainy)
        return multi_to_one(outputs.float(), batch.clean, batch.scene, run.uses_internal())

    weights = net.weights()
    architect = Architect(
        net,
        arch_optimizer,
        loss,
        make_penalty(net, args),
        weight_optimizer=optimizer if args.unrolled else None,
        batch_statistics=args.arch_batch_statistics,
        parts=args.accumulate,
        hessian_parts=HESSIAN_PARTS,
        recorded=run.uses_graphs(),
        constants=run.uses_internal,
    )
    backward = Backward(
        net,
        weights,
        loss,
        parts=args.accumulate,
        recorded=run.uses_graphs(),
        changed=net.buffers(),
        constants=run.uses_internal,
    )
    first_arch_step = (args.arch_start - 1) * args.steps_per_epoch
    weight_batches = run.batches(scenes["weights"])
    arch_batches = run.batches(scenes["architecture"], first_arch_step)

    for epoch in run.epochs():
        if args.stop_on_collapse and distributed.agree(health.collapse):
            break
        net.train()
        for _ in run.steps(epoch):
            for group in optimizer.param_groups:
                group["lr"] = run.cosine(args.learning_rate, args.learning_rate_min)
            batch = run.next_batch(weight_batches)
            if run.has_begun("arch_start"):
                arch_batch = run.next_batch(arch_batches)
                architect.step(arch_batch, batch, accept=partial(run.accept, arch_batch))
            training_loss = backward(batch)
            run.average_statistics()
            clipping = experiment.clip(weights, args.grad_clip)
            if run.accept(batch, loss=training_loss, **clipping):
                optimizer.step()

        scores = run.validate(net, validation)
        genotype = net.genotype()
        if distributed.is_main():
            genotypes.write_json(genotype, run.folder / f"genotype_{epoch:03d}.json")
            draw_genotype(genotype, run.folder / "genotype.svg", f"{args.name}, epoch {epoch}", args.channels)
        run.writer.add_text("genotype", f"```\n{genotypes.literal(genotype)}\n```", run.step)
        health.examine(run, epoch, net, genotype)
        run.finish_epoch(
            epoch,
            scores,
            partial(save_supernet, net),
            learning_rate=optimizer.param_groups[0]["lr"],
            arch_learning_rate=args.arch_learning_rate if epoch >= args.arch_start else 0.0,
        )

    searched = run.step > first_arch_step
    return distributed.from_main(partial(conclude, run, net, health, validation, searched))


def settle_name(run):
    """Settle --name, and print it. Raises UserError where a search to be resumed has ended, and GenotypeError
    unless its name can be added to genotypes.py. A default name that is taken passes: `add_to_vocabulary`
    gives it a number.
    """
    args = run.args
    args.name = args.name or distributed.agree(time.strftime("search_%Y%m%d_%H%M%S"))
    collapse = runs.noted(run.folder, runs.SUMMARY, "collapse")
    if args.resume is not None and args.stop_on_collapse and collapse:
        raise UserError(f"--resume {run.folder}: this search has ended, since it collapsed: {collapse}")
    ended = args.resume is not None and (run.done() or args.stop_on_collapse)
    may_have_its_name = ended and (run.folder / "genotype.json").exists()  # if stopped just after that
    if not (args.demo or may_have_its_name):
        try:
            genotypes.check_new_name(args.name)
        except genotypes.NameTaken:
            if not DEFAULT_NAME.fullmatch(args.name):
                raise
    unused = "; --name is not used" if "name" in run.given else ""
    print(f"genotype: {f'in the run folder (demo{unused})' if args.demo else args.name}")


def conclude(run, net, health, validation, searched):
    """Write the genotype that alpha and beta now stand for, outside a demo also into genotypes.py, and the
    summary; returns the exit status. searched: whether an architecture step was taken.
    """
    args = run.args
    if not searched:
        run.finish()
        log.error(
            "NOTHING WAS SEARCHED in %d steps: architecture steps begin with epoch %d (--arch_start), after "
            "%d steps; no genotype is kept",
            run.step,
            args.arch_start,
            (args.arch_start - 1) * args.steps_per_epoch,
        )
        return 1
    genotype, origin = net.genotype(), provenance(run)
    if args.stop_on_collapse and health.collapse:
        if not health.healthy:
            run.finish(collapse=health.collapse)
            log.error(
                "stopped, since the search collapsed: %s; no epoch was healthy, so no genotype is kept",
                health.collapse,
            )
            return 1
        last = health.healthy[-1]
        log.warning(
            "stopped, since the search collapsed: %s; epoch %d's genotype is kept", health.collapse, last
        )
        genotype = genotypes.read_json(run.folder / f"genotype_{last:03d}.json")
        origin += f"; collapsed, genotype of epoch {last}"
    genotypes.write_json(genotype, run.folder / "genotype.json")
    name = args.name if args.demo else add_to_vocabulary(run, genotype, origin)
    draw_genotype(genotype, run.folder / "genotype.svg", name, args.channels)
    log.info("derived architecture:\n%s = %s", name, genotypes.literal(genotype))
    gap = discretisation_gap(run, net, genotype, validation)
    run.finish(genotype=genotype._asdict(), collapse=health.collapse, validation_psnr=gap)
    arch = (run.folder / "genotype.json").as_posix() if args.demo else name
    flags = shlex.join(["--arch", arch, *run.flags_to_retrain()])
    log.info("retrain it with: python %s %s", command.script("train_model_batch.py"), flags)
    return 0


def add_to_vocabulary(run, genotype, origin):
    """Append the genotype to genotypes.py; returns its name there: --name. A default name that is taken,
    by a search begun in the same second or by this one before it was resumed, gets a number.
    """
    stem = run.args.name
    numbered = [f"{stem}_{number}" for number in range(2, 100)] if DEFAULT_NAME.fullmatch(stem) else []
    again = shlex.join(["--resume", str(run.folder)])
    found = f"the genotype found is in {run.folder}/genotype.json"
    for name in (stem, *numbered):
        try:
            genotypes.append(name, genotype, origin)
            return name
        except genotypes.NameTaken as error:
            taken = error
        except genotypes.GenotypeError as error:  # such as: the file is being edited
            raise genotypes.GenotypeError(f"{error}, then go on with {again}; {found}") from None
    raise UserError(f"{taken}, with {again} --name OTHER; {found}")


def provenance(run):
    """Where a genotype comes from, in one line: data, steps, width, seed, commit."""
    args = run.args
    data = " + ".join("/".join(Path(d).absolute().parts[-2:]) for d in args.data)
    channels = " ".join(map(str, args.channels))
    schedule = f"{run.step} steps of {args.batch_size} scenes, channels {channels}"
    return f"{data}; {schedule}, seed {args.seed}, commit {experiment.commit()}"


def make_optimizers(net, args):
    """(the optimizer of the weights, that of alpha and beta)."""
    weights = torch.optim.SGD(
        net.weights(),
        args.learning_rate,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        fused=True,
    )
    architecture = torch.optim.Adam(
        net.architecture(), args.arch_learning_rate, betas=(0.5, 0.999), weight_decay=args.arch_weight_decay
    )
    return weights, architecture


def make_penalty(net, args):
    """The part of the search's loss that depends on alpha and beta alone: regulariser and complexity."""
    choices = net.module_choices(), net.operation_choices()
    inputs = net.choice_inputs(args.patch_size)
    count = MEASURES[args.complexity]
    sizes = [choice_sizes(c, i, count).to(net.alpha) for c, i in zip(choices, inputs, strict=True)]

    def penalty():
        distributions = [parameter.softmax(-1) for parameter in net.architecture()]
        regulariser = architecture_regulariser(*distributions)
        return args.lambda_arch * regulariser + args.lambda_comp * complexity(distributions, sizes)

    return penalty


def discretisation_gap(run, net, genotype, validation):
    """{"supernet", "chosen"}: validation PSNR in dB of the supernet, and of the genotype's fixed network with
    the supernet's weights and BatchNorm statistics. Raises Interrupted after SIGINT or SIGTERM.
    """
    scenes, bad, psnr = [scene for scene in validation if scene.key not in run.bad], [], {}
    for name, network in (("supernet", net), ("chosen", from_supernet(net, genotype))):
        measured, _ = measure(
            network, scenes, run.device, bad, stop=lambda: run.stopping, amp=run.args.amp, cache=run.cache
        )
        if run.stopping:  # the state is that of the last step, which this does not change
            raise Interrupted(f"stopped by {run.stopping} after the last step; {run.how_to_go_on()}")
        psnr[name] = means(measured, bad)["psnr"]
    log.info(
        "discretisation gap %.2f dB: validation psnr %.3f as a supernet, %.3f with the choices made",
        psnr["supernet"] - psnr["chosen"],
        psnr["supernet"],
        psnr["chosen"],
    )
    return psnr


def write_random(args):
    """Add --random genotypes to genotypes.py, to be retrained like any that was searched; opens no data."""
    surplus = args.given - {"random", "name", "seed"}
    if surplus:
        raise UserError(f"--random: goes with --name and --seed alone, so leave out --{sorted(surplus)[0]}")
    stem = args.name or f"random_s{args.seed}"
    digits = max(2, len(str(args.random - 1)))
    origin = f"drawn at random, not searched; seed {args.seed}, commit {experiment.commit()}"
    drawn = genotypes.draw_random(args.random, args.seed)
    entries = {f"{stem}_{i:0{digits}d}": (genotype, origin) for i, genotype in enumerate(drawn)}
    for name in entries:
        genotypes.check_new_name(name)
    genotypes.append_all(entries)
    print(f"random genotypes in {genotypes.FILE.name}: {' '.join(entries)}")
    script = command.script("train_model_batch.py")
    print(f"retrain one with: python {script} --arch {next(iter(entries))}")
    print(f"without --arch it takes the newest, which now is {list(entries)[-1]}")


def save_supernet(net, path):
    """Write the SearchNetwork to a checkpoint, which `load_supernet` reads."""
    write_whole(
        {
            "format": SUPERNET,
            "genotype": genotypes.to_lists(net.genotype()),
            "channels": list(net.channels),
            "residual": net.residual,
            "weights": net.state_dict(),
        },
        path,
    )


def load_supernet(path):
    """The SearchNetwork in a search's best_*.pt. Raises CheckpointError where the file is something else, or
    its operations are not those of today.
    """
    payload = read(path)
    if payload.get("format") != SUPERNET:
        raise CheckpointError(f"{path}: not a supernet; give a best_*.pt of a search")
    try:
        return filled(SearchNetwork, payload, path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; a supernet needs its search's operations in genotypes.py") from None


if __name__ == "__main__":
    command.run(main, get_args_parser())
