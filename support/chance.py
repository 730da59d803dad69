"""Does the search beat chance? Retrain searched and random genotypes alike, and compare.

    python train_search_batch.py --data DIR --seed 0 --name found_s0
    python train_search_batch.py --random 12 --name random
    python -m support.chance --searched found_s0 --random 'random_*' --runs DIR -- TRAINING_FLAGS

Every genotype is retrained by train_model_batch.py with the same flags, once a seed of --seeds, and scored
by the best PSNR on the validation part; the test set is not opened. A run that has ended in --runs is not
trained again, and one that was stopped goes on. --supernet also scores each genotype with the shared weights
of a search's checkpoint, BatchNorm's statistics taken anew, and gives the rank correlation of the two scores:
a search can only find what its supernet can tell apart.
"""

import argparse
import fnmatch
import json
import math
from itertools import islice
from pathlib import Path

from scipy import stats
from torch.optim.swa_utils import update_bn

import dataset
import genotypes
import train_model_batch
from model_train import from_supernet
from support import command, devices, experiment
from support.errors import UserError
from support.validation import validate
from train_search_batch import load_supernet

RECALIBRATION = 16  # batches from which BatchNorm's statistics of a genotype with shared weights are taken


def get_args_parser():
    parser = command.Parser(
        prog="python -m support.chance", description="Searched genotypes against random ones."
    )
    parser.add_argument(
        "--searched", nargs="+", required=True, metavar="NAME", help="or a pattern, 'found_*'"
    )
    parser.add_argument("--random", nargs="+", required=True, metavar="NAME", help="or a pattern, 'random_*'")
    parser.add_argument("--seeds", type=command.seed, nargs="+", default=[0], help="(default: 0)")
    parser.add_argument("--runs", required=True, metavar="DIR", help="folder of the training runs")
    parser.add_argument("--supernet", metavar="CKPT", help="best_*.pt of a search: score with its weights")
    parser.add_argument(
        "flags", nargs="*", metavar="-- FLAGS", help="of train_model_batch.py, the same for all"
    )
    return parser


def main(args):
    groups = {}
    for group, patterns in (("random", args.random), ("searched", args.searched)):
        for name in dict.fromkeys(name for pattern in patterns for name in matching(pattern)):
            if name in groups:
                raise UserError(f"--searched {name}: is among --random, too; narrow one of them")
            groups[name] = group
    supernet = load_supernet(args.supernet) if args.supernet else None  # before hours of training
    psnr, parameters = {}, {}
    for seed in args.seeds:  # seed by seed, so that a comparison cut short is a fair one
        for name in groups:
            summary = retrain(name, seed, args.runs, args.flags)
            psnr.setdefault(name, []).append(summary["best"]["psnr"])
            parameters[name] = summary["parameters"]
    shared = {}
    if supernet:
        begun = run_folder(next(iter(groups)), args.seeds[0], args.runs) / "options.json"
        options = json.loads(begun.read_text(encoding="utf-8"))  # with the data that was found, or a demo's
        shared = shared_scores(supernet, list(groups), argparse.Namespace(**options))
    print(report(groups, psnr, parameters, shared))


def matching(pattern):
    """The named genotypes that a name or shell pattern means."""
    names = fnmatch.filter(genotypes.named(), pattern)
    if not names:
        raise UserError(f"{pattern}: no such genotype in genotypes.py")
    return names


def retrain(name, seed, runs, flags):
    """The summary of a genotype's training run, which is begun, continued or only read."""
    folder = run_folder(name, seed, runs)
    begun = any((folder / state).exists() for state in experiment.STATES)
    how = ["--resume", str(folder)] if begun else ["--save", str(folder)]
    args = train_model_batch.get_args_parser().parse_args([*flags, "--arch", name, "--seed", str(seed), *how])
    if not (folder / "summary.json").exists():
        train_model_batch.main(args)
    else:
        begun = json.loads((folder / "options.json").read_text(encoding="utf-8"))
        experiment.refuse_other_options(folder, vars(args), args.given, begun)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    if summary["best"]["psnr"] is None:
        raise UserError(f"{folder}: no epoch had a score that is a number, so it cannot be compared")
    return summary


def run_folder(name, seed, runs):
    return Path(runs, f"{name}-s{seed}")


# --- scores with shared weights -----------------------------------------------------------------------------


def shared_scores(supernet, names, options):
    """{name: validation PSNR of the genotype with the supernet's weights}; options: of a training run."""
    device = devices.pick_device(options.device)
    parts = dataset.split(dataset.find_training(options.data, options.clean_side), options.split_seed)
    validation = dataset.spread(parts["validation"], options.val_scenes)
    scores = {}
    for name in names:
        net = from_supernet(supernet, genotypes.find(name)[1]).to(device)
        batches = dataset.batches(
            parts["weights"], options.patch_size, options.batch_size, options.seed, device, options.workers
        )
        update_bn((batch.rainy for batch in islice(batches, RECALIBRATION)), net)
        scores[name] = validate(net, validation, device)[0]["psnr"]
    return scores


# --- what is said -------------------------------------------------------------------------------------------


def report(groups, psnr, parameters, shared=None):
    """The table of all genotypes, best first, and of the groups: mean, spread, interval, rank correlation."""
    means = {name: sum(values) / len(values) for name, values in psnr.items()}
    order = sorted(means, key=means.get, reverse=True)
    lines = [f"{'':4} {'genotype':28} {'group':9} {'parameters':>10}  {'PSNR by seed, dB':24} {'mean':>7}"]
    lines[0] += f" {'shared':>7}" if shared else ""
    for place, name in enumerate(order, start=1):
        values = " ".join(f"{value:.3f}" for value in psnr[name])
        line = f"{place:3}. {name:28} {groups[name]:9} {parameters[name]:10,}  {values:24} {means[name]:7.3f}"
        lines.append(line + (f" {shared[name]:7.3f}" if shared else ""))
    lines.append("")
    for group in dict.fromkeys(groups.values()):
        values = [means[name] for name in order if groups[name] == group]
        sizes = [parameters[name] for name in order if groups[name] == group]
        lines.append(
            f"{group:9} {len(values):3} genotypes: mean {mean(values):.3f} dB, {spread(values)}; "
            f"{min(values):.3f} to {max(values):.3f}; {mean(sizes):,.0f} parameters on average"
        )
    drawn = [name for name in order if groups[name] == "random"]
    correlations = {"parameters": parameters, "PSNR with shared weights": shared}
    for what, scores in correlations.items():
        if scores and len(drawn) > 2:
            rho, p = stats.spearmanr([scores[n] for n in drawn], [means[n] for n in drawn])
            lines.append(f"random ones: rank correlation of PSNR with {what}: {rho:+.2f} (p = {p:.2f})")
    return "\n".join(lines)


def mean(values):
    return sum(values) / len(values)


def spread(values):
    """Standard deviation, and the 95 % interval of the mean by Student's t, of two values or more."""
    if len(values) < 2:
        return "a single one"
    deviation = math.sqrt(sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1))
    half = stats.t.ppf(0.975, len(values) - 1) * deviation / math.sqrt(len(values))
    return f"SD {deviation:.3f}, 95 % interval of the mean +-{half:.3f}"


if __name__ == "__main__":
    command.run(main, get_args_parser())
