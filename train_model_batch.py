"""Stage 2: retrain the fixed network of a genotype.

    python train_model_batch.py                                    # the newest genotype, DID-MDN
    python train_model_batch.py --demo                             # minutes on a laptop, no download
    python train_model_batch.py --arch NAME --max_minutes 120
    python train_model_batch.py --weights eval-EXP/derain.pt --data MY_PAIRS --clean_side left
    torchrun --nproc_per_node=8 train_model_batch.py               # 8 GPUs, each with an eighth of a batch

All training scenes but the validation part are trained on with the multi-to-one losses; checkpoints are
chosen on the validation part. The test set is not opened.
"""

import shlex
from functools import partial

import torch
from torch import nn

import dataset
import genotypes
import model_train
from losses import count_parameters, multi_to_one
from model_train import DerainNetwork, begin_as_identity
from support import command, devices, distributed, experiment, options, runs
from support.averaging import Averaged
from support.command import decay, natural, not_negative, patch, positive
from support.errors import UserError
from support.experiment import Experiment, log
from support.graphs import Backward

# The demo: a minute or two on two cores, the warm-ups scaled with the schedule.
DEMO = {
    "epochs": 4,
    "steps_per_epoch": 50,
    "batch_size": 4,
    "channels": [8, 16, 32, 64],
    "internal_start": 2,
    "val_scenes": 1,
    "residual": True,
    "freeze_start": 3,
}

# With --weights: a new network's learning rate, or BatchNorm by a few pictures, would ruin what it can do.
FINE_TUNING = {"learning_rate": 1e-4, "warmup_steps": 100, "freeze_start": 1}


def get_args_parser():
    parser = command.Parser(
        prog="train_model_batch.py", description="Retrain the fixed network of a genotype (stage 2)."
    )
    train = parser.add_argument_group("training")
    by_default = " ".join(f"--{name} {value:g}" for name, value in FINE_TUNING.items())
    train.add_argument(
        "--arch",
        help="a name in genotypes.py or a run's genotype.json (default: the newest name)",
    )
    train.add_argument(
        "--weights",
        metavar="CKPT",
        help=f"fine-tune a trained network, by default with {by_default}; --channels, if a multiple of its "
        "own, widens it",
    )
    train.add_argument("--epochs", type=positive, default=200, help="(default: %(default)s)")
    train.add_argument("--steps_per_epoch", type=positive, default=500, help="(default: %(default)s)")
    train.add_argument("--batch_size", type=positive, default=32, help="scenes a step (default: %(default)s)")
    train.add_argument("--patch_size", type=patch, default=64, help="pixels a side (default: %(default)s)")
    options.add_network_arguments(train)
    train.add_argument(
        "--ema",
        type=decay,
        default=0.0,
        help="decay of a moving average of the weights, such as 0.999 (default: 0, no average)",
    )
    train.add_argument(
        "--mse_weight", type=not_negative, default=1.0, help="weight of the external loss's MSE (default: 1)"
    )
    train.add_argument(
        "--psnr_weight",
        type=not_negative,
        default=0.0,
        help="weight of -PSNR in the external loss, such as 0.008 with --mse_weight 0 (default: 0)",
    )
    train.add_argument(
        "--freeze_start",
        type=natural,
        default=0,
        help="first epoch in which BatchNorm uses its running statistics and no longer changes them, as "
        "after the training; 0: never (default: %(default)s)",
    )
    adam = parser.add_argument_group("weights (Adam, cosine)")
    adam.add_argument(
        "--learning_rate", type=not_negative, default=1e-3, help="at the start (default: %(default)s)"
    )
    adam.add_argument(
        "--learning_rate_min", type=not_negative, default=0.0, help="at the end (default: %(default)s)"
    )
    adam.add_argument(
        "--warmup_steps", type=natural, default=0, help="steps of linear warm-up (default: none)"
    )
    adam.add_argument("--weight_decay", type=not_negative, default=0.0, help="(default: %(default)s)")
    adam.add_argument(
        "--grad_clip", type=not_negative, default=5.0, help="largest gradient norm; 0: no limit (default: 5)"
    )
    options.add_arguments(parser)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the network, on a CPU its attention modules alone (a gain with --amp); compiling "
        "takes minutes, so for a run of half an hour or more",
    )
    return parser


def main(args):
    if args.weights:
        vars(args).update({k: v for k, v in FINE_TUNING.items() if k not in args.given})
    with Experiment("eval", args, get_args_parser(), DEMO | FINE_TUNING if args.weights else DEMO) as run:
        return train(run)


def train(run):
    """Train, and keep the networks that did best on validation; returns the exit status."""
    args = run.args
    net = build(run)
    scenes = run.split()

    if args.sync_bn:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    net.to(run.device, memory_format=torch.channels_last)
    optimizer = make_optimizer(net, args)
    averaged = Averaged(net, args.ema) if args.ema else None
    run.start(net=net, optimizer=optimizer, **({"ema": averaged} if averaged else {}))
    run.compile(net)
    run.describe()
    if args.warmup_steps >= run.steps_in_all:
        log.warning(
            "--warmup_steps %d: the run has only %d steps, so its rate does not reach --learning_rate",
            args.warmup_steps,
            run.steps_in_all,
        )
    validation = dataset.spread(scenes["validation"], args.val_scenes)
    if distributed.is_main():
        genotypes.write_json(net.genotype, run.folder / "genotype.json")

    weights = list(net.parameters())
    kept = averaged.module if averaged else net  # what is scored and saved
    batches = run.batches(scenes["weights"] + scenes["architecture"])
    frozen = partial(run.has_begun, "freeze_start")

    # Recorded as a CUDA graph: anything in it that changes, the batch aside, must be in `constants` below.
    def loss(forward, batch):
        with devices.autocast(run.device, args.amp):
            outputs = forward(batch.rainy)
        return multi_to_one(
            outputs.float(),
            batch.clean,
            batch.scene,
            use_internal=run.uses_internal(),
            mse_weight=args.mse_weight,
            psnr_weight=args.psnr_weight,
        )

    backward = Backward(
        net,
        weights,
        loss,
        parts=args.accumulate,
        recorded=run.uses_graphs(),
        changed=net.buffers(),
        constants=lambda: (frozen(), run.uses_internal()),
    )
    if args.weights and run.step == 0 and run.begun_with is None:
        run.begin_with(run.validate(kept, validation), partial(model_train.save, kept))
    for epoch in run.epochs():
        net.train()
        if frozen():
            for module in net.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        for step in run.steps(epoch):
            warm = min(1.0, (step + 1) / args.warmup_steps) if args.warmup_steps else 1.0
            for group in optimizer.param_groups:
                group["lr"] = warm * run.cosine(args.learning_rate, args.learning_rate_min)
            batch = run.next_batch(batches)
            training_loss = backward(batch)
            run.average_statistics()
            clipping = experiment.clip(weights, args.grad_clip)
            if run.accept(batch, loss=training_loss, **clipping):
                optimizer.step()
                if averaged:
                    averaged.update()

        scores = run.validate(kept, validation)
        run.finish_epoch(
            epoch, scores, partial(model_train.save, kept), learning_rate=optimizer.param_groups[0]["lr"]
        )

    run.finish(parameters=count_parameters(net))
    if not (run.folder / "best_psnr.pt").exists():
        log.error("NOTHING IS KEPT: no epoch had a validation score that is a number")
        return 1
    best = shlex.quote((run.folder / "best_psnr.pt").as_posix())
    which = " --demo" if args.demo else "" if args.data == [options.DEFAULT_DATA] else " --path TEST_SET"
    script = command.script("test_view.py")
    log.info("score it with: python %s --ckt_path %s%s", script, best, which)
    return 0


def make_optimizer(net, args):
    return torch.optim.Adam(net.parameters(), args.learning_rate, weight_decay=args.weight_decay, fused=True)


def build(run):
    """The network to train: that of --weights, or a new one of --arch; prints which. Settles args.arch."""
    args = run.args
    if args.resume is not None:  # its weights come with the state, whatever became of --weights and --arch
        name, genotype = genotypes.find(str(run.folder / "genotype.json"))
        print(f"genotype: {name}")
        return run.network(partial(DerainNetwork, genotype))
    if args.weights:
        return fine_tuned(run)
    if args.arch is None and args.demo:
        demo_search = runs.newest("search", "genotype.json", demo=True)
        args.arch = str(demo_search) if demo_search else None
    args.arch, genotype = genotypes.find(args.arch)
    print(f"genotype: {args.arch}")
    torch.manual_seed(args.seed)
    net = run.network(partial(DerainNetwork, genotype))
    begin_as_identity(net)
    return net


def fine_tuned(run):
    """The network of --weights, widened where --channels says so; settles args.channels and args.residual."""
    args = run.args
    net = model_train.load(args.weights)
    if args.arch and genotypes.find(args.arch)[1] != net.genotype:
        raise UserError(
            f"--arch {args.arch}: not the genotype of --weights {args.weights}; leave one of them out"
        )
    if "channels" in run.given and args.channels != list(net.channels):
        try:
            net = model_train.widen(net, args.channels, args.seed)
        except ValueError as error:
            widths = " ".join(map(str, net.channels))
            raise UserError(
                f"--channels: --weights {args.weights} has {widths}; leave one of these flags out, or give a "
                f"multiple: {error}"
            ) from None
    if "residual" in run.given and not net.residual:
        raise UserError(f"--residual: --weights {args.weights} was trained without it; leave one out")
    args.channels, args.residual = list(net.channels), net.residual
    print(f"weights: {args.weights}, channels {' '.join(map(str, net.channels))}")
    return net


if __name__ == "__main__":
    command.run(main, get_args_parser())
