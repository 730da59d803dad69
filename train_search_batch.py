"""Stage 1: search an architecture.

    python train_search_batch.py                                   # DID-MDN in datasets/Rain1200
    python train_search_batch.py --demo                            # minutes on a laptop, no download
    python train_search_batch.py --data MY_PAIRS --clean_side left --name my_search
    python train_search_batch.py --resume search-EXP-20260101-1200

The weights of the supernet are trained on one half of the training scenes; from --arch_start on, every step
is preceded by one step on alpha and beta on the other half; checkpoints are chosen on a third part. At the
end the strongest choices are written to genotypes.py under --name.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import torch

import dataset
import genotypes
from architect import Architect
from losses import architecture_regulariser, choice_sizes, complexity, multi_to_one
from model_search import SearchNetwork
from model_train import write_whole
from support import experiment
from support.experiment import Experiment, even, log, not_negative, patch, positive, share

# The demo: the whole method in under 5 minutes on two cores, the warm-ups scaled with the schedule.
DEMO = {
    "epochs": 4,
    "steps_per_epoch": 20,
    "batch_size": 2,
    "channels": [8, 16, 32, 64],
    "internal_start": 2,
    "arch_start": 2,
    "val_scenes": 1,
}


def get_args_parser():
    parser = experiment.Parser(
        prog="train_search_batch.py",
        description="Search a derain architecture with a supernet (stage 1).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    search = parser.add_argument_group("search")
    search.add_argument("--name", help="of the genotype in genotypes.py (default: search_<time>)")
    search.add_argument("--epochs", type=positive, default=200)
    search.add_argument("--steps_per_epoch", type=positive, default=1000)
    search.add_argument("--batch_size", type=positive, default=16, help="scenes a step (default: 16)")
    search.add_argument("--patch_size", type=patch, default=64, help="pixels a side (default: 64)")
    search.add_argument("--channels", type=even, nargs=4, default=[32, 64, 128, 256], metavar="C")
    search.add_argument("--residual", action="store_true", help="learn the difference to the input")
    search.add_argument("--clean_inputs", type=share, default=0.0, help="share of draws with a dry input")
    search.add_argument("--internal_start", type=positive, default=6, help="first epoch of the internal loss")
    weights = parser.add_argument_group("weights (SGD, cosine)")
    weights.add_argument("--learning_rate", type=not_negative, default=0.002)
    weights.add_argument("--learning_rate_min", type=not_negative, default=1e-4)
    weights.add_argument("--momentum", type=not_negative, default=0.9)
    weights.add_argument("--weight_decay", type=not_negative, default=3e-4)
    weights.add_argument(
        "--grad_clip", type=not_negative, default=5.0, help="largest gradient norm; 0: no limit"
    )
    arch = parser.add_argument_group("alpha and beta (Adam)")
    arch.add_argument("--arch_learning_rate", type=not_negative, default=3e-4)
    arch.add_argument("--arch_weight_decay", type=not_negative, default=1e-3)
    arch.add_argument("--arch_start", type=positive, default=11, help="first epoch of the architecture steps")
    arch.add_argument(
        "--unrolled", action="store_true", help="second-order steps (DARTS), about 8 times the cost"
    )
    arch.add_argument(
        "--arch_batch_statistics",
        action="store_true",
        help="BatchNorm by the batch in architecture steps (default: by its running statistics)",
    )
    arch.add_argument(
        "--lambda_arch", type=not_negative, default=0.01, help="of the architecture regulariser"
    )
    arch.add_argument("--lambda_comp", type=not_negative, default=0.01, help="of the model complexity")
    experiment.add_arguments(parser)
    return parser


def main(args):
    run = Experiment("search", args, get_args_parser(), DEMO)
    args = run.args
    args.name = args.name or time.strftime("search_%Y%m%d_%H%M%S")
    if not (args.demo or run.done()):
        genotypes.check_new_name(args.name)
    print(f"genotype: {'in the run folder (demo)' if args.demo else args.name}")
    print(f"data: {' '.join(args.data)}", flush=True)
    parts = run.scenes or dataset.split(dataset.find_training(args.data, args.clean_side), args.split_seed)

    torch.manual_seed(args.seed)
    net = SearchNetwork(args.channels, args.residual)
    net.to(run.device, memory_format=torch.channels_last)
    optimizer, arch_optimizer = make_optimizers(net, args)
    run.start(net=net, optimizer=optimizer, arch_optimizer=arch_optimizer)
    run.describe(parts)
    validation = dataset.spread(parts["validation"], args.val_scenes)
    if args.arch_start > args.epochs:
        log.warning("--arch_start %d is after the last epoch: NOTHING IS SEARCHED", args.arch_start)

    def loss(forward, batch):
        internal = epoch >= args.internal_start
        return multi_to_one(forward(batch.rainy), batch.clean, batch.scene, internal)

    architect = Architect(
        net,
        arch_optimizer,
        loss,
        make_penalty(net, args),
        weight_optimizer=optimizer if args.unrolled else None,
        batch_statistics=args.arch_batch_statistics,
    )
    draw = partial(
        dataset.batches,
        patch_size=args.patch_size,
        batch_size=args.batch_size,
        seed=args.seed,
        device=run.device,
        workers=args.workers,
        clean_inputs=args.clean_inputs,
        bad=run.bad,
    )
    weight_batches = draw(parts["weights"], first_step=run.step)
    first_arch_step = (args.arch_start - 1) * args.steps_per_epoch
    arch_batches = draw(parts["architecture"], first_step=max(run.step, first_arch_step))

    for epoch in run.epochs():
        net.train()
        for _ in run.steps(epoch):
            optimizer.param_groups[0]["lr"] = run.cosine(args.learning_rate, args.learning_rate_min)
            batch = run.draw(weight_batches)
            if epoch >= args.arch_start:
                arch_batch = run.draw(arch_batches)
                architect.step(arch_batch, batch, allow=partial(run.allow, arch_batch))
            training_loss = loss(net, batch)
            optimizer.zero_grad()
            training_loss.backward(inputs=net.weights())
            clipping = experiment.clip(net.weights(), args.grad_clip)
            if run.allow(batch, loss=training_loss, **clipping):
                optimizer.step()

        scores, panel = run.validate(net, validation)
        run.panel(*panel)
        genotype = net.genotype()
        genotypes.write_json(genotype, run.folder / f"genotype_{epoch:03d}.json")
        alpha, beta = (parameter.detach().softmax(-1) for parameter in net.architecture())
        run.writer.add_text("genotype", f"```\n{genotypes.literal(genotype)}\n```", run.step)
        for name, count in winners(genotype).items():
            run.writer.add_scalar(f"winners/{name}", count, run.step)
        run.finish_epoch(
            epoch,
            scores,
            partial(save_supernet, net),
            learning_rate=optimizer.param_groups[0]["lr"],
            arch_learning_rate=args.arch_learning_rate if epoch >= args.arch_start else 0.0,
            entropy_alpha=entropy(alpha),
            entropy_beta=entropy(beta),
        )

    genotype = net.genotype()
    genotypes.write_json(genotype, run.folder / "genotype.json")
    log.info("derived architecture:\n%s = %s", args.name, genotypes.literal(genotype))
    arch = args.name
    if args.demo:
        arch = run.folder / "genotype.json"
    else:
        genotypes.append(args.name, genotype, provenance(run))
    run.finish(genotype=genotype._asdict())
    log.info("retrain it with: python train_model_batch.py --arch %s", arch)


def provenance(run):
    """Where a genotype comes from, in one line: data, steps, width, seed, commit."""
    args = run.args
    data = " + ".join("/".join(Path(d).absolute().parts[-2:]) for d in args.data)
    channels = " ".join(map(str, args.channels))
    schedule = f"{run.step} steps of {args.batch_size} scenes, channels {channels}"
    return f"{data}; {schedule}, seed {args.seed}, commit {experiment.commit()}"


def make_optimizers(net, args):
    """(of the weights, of alpha and beta)."""
    weights = torch.optim.SGD(
        net.weights(), args.learning_rate, momentum=args.momentum, weight_decay=args.weight_decay
    )
    architecture = torch.optim.Adam(
        net.architecture(), args.arch_learning_rate, betas=(0.5, 0.999), weight_decay=args.arch_weight_decay
    )
    return weights, architecture


def make_penalty(net, args):
    """The part of the search's loss that depends on alpha and beta alone: regulariser and complexity."""
    choices = net.module_choices(), net.operation_choices()
    sizes = [choice_sizes(c).to(net.alpha) for c in choices]

    def penalty():
        distributions = [parameter.softmax(-1) for parameter in net.architecture()]
        regulariser = architecture_regulariser(*distributions)
        return args.lambda_arch * regulariser + args.lambda_comp * complexity(distributions, sizes)

    return penalty


def winners(genotype):
    """How often each kind of module and each operation was chosen."""
    words = [kind for cell in genotype.modules for kind in cell]
    words += [name for cell in genotype.attention for branch in cell for name in branch]
    return {name: words.count(name) for name in (*genotypes.MODULES, *genotypes.PRIMITIVES)}


def entropy(distribution):
    """Mean entropy of the rows, as a share of the largest possible: 1 undecided, 0 decided."""
    rows = torch.special.entr(distribution).sum(-1)
    return (rows.mean() / torch.tensor(distribution.shape[-1]).log()).item()


def save_supernet(net, path):
    write_whole(
        {
            "format": "manas-supernet-1",
            "genotype": json.loads(json.dumps(net.genotype()._asdict())),
            "channels": list(net.channels),
            "residual": net.residual,
            "weights": net.state_dict(),
        },
        path,
    )


if __name__ == "__main__":
    experiment.command(main, get_args_parser())
