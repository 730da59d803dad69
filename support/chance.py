"""Does the search beat chance? Retrain searched and random genotypes alike, and compare.

    python train_search_batch.py --data DIR --seed 0 --name found_s0
    python train_search_batch.py --random 12 --name random
    python -m support.chance --searched found_s0 --random 'random_*' --runs DIR -- TRAINING_FLAGS

Every genotype is retrained by train_model_batch.py with the same flags, once a seed of --seeds, and scored
by the best PSNR on the validation part; the test set is not opened. A run in --runs that has ended is not
trained again, and one that was stopped goes on. With --supernet each genotype is also scored with the shared
weights of a search's checkpoint, after BatchNorm's statistics were taken anew, and the rank correlation of
the two scores is given: a search can only find what its supernet can tell apart.
"""

import argparse
import fnmatch
import json
import math
import statistics
import sys
from itertools import islice
from pathlib import Path

from scipy import stats
from torch.optim.swa_utils import update_bn

import dataset
import genotypes
import train_model_batch
from model_train import from_supernet
from support import command, devices, options
from support.errors import UserError
from support.runs import STATES, SUMMARY, as_now, refuse_other_options
from support.validation import means, measure
from train_search_batch import load_supernet

# Options in which the runs may differ: each has its own, or it does not change what the run computes.
OF_EACH = {"arch", "seed"} | options.FREE_OPTIONS - {"max_minutes"}
RECALIBRATION = 16  # batches from which BatchNorm's statistics of a genotype with shared weights are taken


def get_args_parser():
    parser = command.Parser(
        prog="python -m support.chance", description="Searched genotypes against random ones."
    )
    parser.add_argument(
        "--searched",
        nargs="+",
        required=True,
        metavar="NAME",
        help="genotypes, or patterns such as 'found_*'",
    )
    parser.add_argument(
        "--random", nargs="+", required=True, metavar="NAME", help="genotypes, or patterns such as 'random_*'"
    )
    parser.add_argument(
        "--seeds",
        type=command.seed,
        nargs="+",
        default=[0],
        help="training seeds, one run each (default: 0)",
    )
    parser.add_argument("--runs", required=True, metavar="DIR", help="folder of the training runs")
    parser.add_argument(
        "--supernet", metavar="CKPT", help="a search's best_*.pt: score with its weights, too"
    )
    parser.add_argument(
        "flags", nargs="*", metavar="-- FLAGS", help="flags of train_model_batch.py for all runs"
    )
    return parser


def main(args):
    """Print the table; returns the exit status: 0, or 1 where some genotype has no score."""
    groups = {}
    for group, patterns in (("random", args.random), ("searched", args.searched)):
        for name in dict.fromkeys(name for pattern in patterns for name in matching(pattern)):
            if name in groups:
                raise UserError(f"--searched {name}: matches --random, too; narrow one of the two patterns")
            groups[name] = group
    flags = train_model_batch.get_args_parser().parse_args(args.flags)
    if ours := sorted(flags.given & {"arch", "seed", "save", "resume"}):
        raise UserError(f"--{ours[0]}: is set here for each run, so leave it out after --")
    supernet = load_supernet(args.supernet) if args.supernet else None  # before hours of training
    seeds = dict.fromkeys(args.seeds)  # seed by seed, so that a comparison cut short is a fair one
    runs = {(name, seed): Path(args.runs, f"{name}-s{seed}") for seed in seeds for name in groups}
    check_alike(runs)
    psnr, parameters, failures = {}, {}, {}
    for (name, seed), folder in runs.items():
        if name in failures:
            continue
        summary = retrain(name, seed, folder, args.flags)
        check_alike(runs)
        if summary["best"]["psnr"] is None:
            failures[name] = f"{folder}: no epoch had a score that is a number; {name} is left out"
            continue
        psnr.setdefault(name, []).append(summary["best"]["psnr"])
        parameters[name] = summary["parameters"]
    for name in failures:
        psnr.pop(name, None)
    groups = {name: group for name, group in groups.items() if name in psnr}
    shared = {}
    if supernet and groups:
        of_runs = options_of(next(iter(runs.values())))  # with the data that was found, or a demo's
        of_runs |= {name: getattr(flags, name) for name in options.MACHINE_OPTIONS}
        shared = shared_scores(supernet, list(groups), argparse.Namespace(**of_runs))
    if groups:
        print(report(groups, psnr, parameters, shared))
    for line in failures.values():
        print(line, file=sys.stderr)
    return 1 if failures else 0


def matching(pattern):
    """The named genotypes that a name or shell pattern means."""
    names = fnmatch.filter(genotypes.named(), pattern)
    if not names:
        raise UserError(f"{pattern}: no such genotype in genotypes.py")
    return names


def retrain(name, seed, folder, flags):
    """The summary of a genotype's training run, which is begun, continued or only read."""
    begun = any((folder / state).exists() for state in STATES)
    how = ["--resume", str(folder)] if begun else ["--save", str(folder)]
    args = train_model_batch.get_args_parser().parse_args([*flags, "--arch", name, "--seed", str(seed), *how])
    if not (folder / SUMMARY).exists():
        train_model_batch.main(args)
    else:
        refuse_other_options(folder, vars(args), args.given, options_of(folder))
    return read_json(folder / SUMMARY)


def check_alike(runs):
    """runs: {(name, seed): folder}. UserError unless all that were begun have the genotypes that go by these
    names now, and the same options.
    """
    first, expected = None, {}
    for (name, _), folder in runs.items():
        if not (folder / "genotype.json").exists():
            continue
        if genotypes.read_json(folder / "genotype.json") != genotypes.find(name)[1]:
            raise UserError(
                f"{folder}: holds a run of another genotype called {name}; remove it, or give other --runs"
            )
        own = options_of(folder)
        first, expected = first or folder, expected or own
        for option in sorted(own.keys() & expected.keys() - OF_EACH):
            if own[option] != expected[option]:
                raise UserError(
                    f"{folder}: was trained with --{option} {own[option]}, {first} with {expected[option]}; "
                    "remove one of the two, or give other --runs"
                )


def options_of(folder):
    """The options of the run in a folder; for flags added since, their defaults."""
    defaults = vars(train_model_batch.get_args_parser().parse_args([]))
    return defaults | as_now(read_json(folder / "options.json"))


def read_json(path):
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"holds {genotypes.brief(found)}")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove its folder to train anew") from None
    return found


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
        scores[name] = means(measure(net, validation, device)[0])["psnr"]
    return scores


# --- what is said -------------------------------------------------------------------------------------------


def report(groups, psnr, parameters, shared=None):
    """The table of all genotypes, best first, and of the groups: mean, spread, interval, rank correlation."""
    mean = {name: statistics.mean(values) for name, values in psnr.items()}
    order = sorted(mean, key=mean.get, reverse=True)
    lines = [f"{'':4} {'genotype':28} {'group':9} {'parameters':>10}  {'PSNR by seed, dB':24} {'mean':>7}"]
    lines[0] += f" {'shared':>7}" if shared else ""
    for place, name in enumerate(order, start=1):
        values = " ".join(f"{value:.3f}" for value in psnr[name])
        line = f"{place:3}. {name:28} {groups[name]:9} {parameters[name]:10,}  {values:24} {mean[name]:7.3f}"
        lines.append(line + (f" {shared[name]:7.3f}" if shared else ""))
    lines.append("")
    for group in dict.fromkeys(groups.values()):
        values = [mean[name] for name in order if groups[name] == group]
        sizes = [parameters[name] for name in order if groups[name] == group]
        lines.append(
            f"{group:9} {len(values):3} genotypes: mean {statistics.mean(values):.3f} dB, "
            f"{interval(values)}; "
            f"{min(values):.3f} to {max(values):.3f}; {statistics.mean(sizes):,.0f} parameters on average"
        )
    drawn = [name for name in order if groups[name] == "random"]
    correlations = {"parameters": parameters, "PSNR with shared weights": shared}
    for what, scores in correlations.items():
        differ = scores and all(len({of[n] for n in drawn}) > 1 for of in (scores, mean))
        if differ and len(drawn) > 2:
            rho, p = rank_correlation([scores[n] for n in drawn], [mean[n] for n in drawn])
            lines.append(f"random ones: rank correlation of PSNR with {what}: {rho:+.2f} (p = {p:.2f})")
    return "\n".join(lines)


def rank_correlation(xs, ys):
    """(Spearman's rho, its two-sided p). p is by permutation, over all orders of the xs or, where these are
    more, 9,999 random ones: Student's t, made for many values, can give p = 0 for so few genotypes.
    """
    xs, ys = (stats.zscore(stats.rankdata(values)) for values in (xs, ys))
    found = stats.permutation_test(
        (xs,),
        lambda xs, axis: (xs * ys).mean(axis),
        permutation_type="pairings",
        vectorized=True,
        random_state=0,
    )
    return found.statistic, found.pvalue


def interval(values):
    """Standard deviation, and the 95 % interval of the mean by Student's t, of two values or more."""
    if len(values) < 2:
        return "a single one"
    deviation = statistics.stdev(values)
    half = stats.t.ppf(0.975, len(values) - 1) * deviation / math.sqrt(len(values))
    return f"SD {deviation:.3f}, 95 % interval of the mean +-{half:.3f}"


if __name__ == "__main__":
    command.run(main, get_args_parser())
