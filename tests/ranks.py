"""What torchrun starts for test_distributed.py: runs of the training scripts, one after the other.

    torchrun ... -m tests.ranks NAME="FLAGS" ...

NAME is that of the run's folder; its beginning is the script's, and words in it ask for what a test needs:
`eval` BatchNorm by its running statistics, and an Adam that does not blow up the rounding of gradients near
zero; `stop` SIGTERM for the last rank alone in the third step; `nan` a pixel that is not finite in its share
of the second batch; `bad` a file that breaks as the run begins; `gap` SIGTERM for rank 0 as it measures the
discretisation gap, which it alone does; `recorded` steps as graphs, of which the kernels are launched one by
one, as there is no GPU; `apart` other weights that the last rank begins with. Every rank leaves in
NAME.RANK.pt the state of its parts, what it counted, and the names of the scenes it was given.
"""

import logging
import signal
import sys
from functools import partial
from pathlib import Path

import torch

import dataset
import genotypes
import train_model_batch
import train_search_batch
from model_search import SearchNetwork
from support import distributed
from support.errors import Interrupted
from support.experiment import Experiment
from support.graphs import Recorded

SCRIPTS = {"train": train_model_batch, "search": train_search_batch}


def run(name, flags):
    words = name.split("_")
    script = SCRIPTS[words[0]]
    hooked = distributed.rank() == distributed.size() - 1
    runs, names, broken = [], [], {}
    start, batches, train, adam = Experiment.start, dataset.batches, SearchNetwork.train, torch.optim.Adam
    measure, uses_graphs, replayed = train_search_batch.measure, Experiment.uses_graphs, Recorded.__call__

    def recorded(scenes, **options):
        if hooked and "bad" in words:
            file = scenes[0].rainy[0].path
            broken[file] = file.read_bytes()
            file.write_bytes(b"no picture")
        for number, batch in enumerate(batches(scenes, **options), start=1):
            names.append(batch.names)
            if hooked and "stop" in words and number == 3:
                signal.raise_signal(signal.SIGTERM)
            if hooked and "nan" in words and number == 2:
                batch.rainy[0, 0, 3, 3] = torch.nan
            yield batch

    def stopped_there(*args, **options):
        signal.raise_signal(signal.SIGTERM)
        return measure(*args, **options)

    def kept(run, **parts):
        runs.append(run)
        if hooked and "apart" in words and distributed.size() > 1:
            for tensor in parts["net"].state_dict().values():
                tensor += 1
        start(run, **parts)

    Experiment.start, dataset.batches = kept, recorded
    if "eval" in words:
        SearchNetwork.train = lambda net, mode=True: train(net, False)
        torch.optim.Adam = partial(adam, eps=1e-3)
    if "gap" in words:
        train_search_batch.measure = stopped_there
    if "recorded" in words and distributed.size() > 1:
        Experiment.uses_graphs = lambda run: True
        Recorded.__call__ = lambda graphs, batch: graphs.function(batch)
    stopped = ""
    try:
        script.main(script.get_args_parser().parse_args(flags.split()))
    except Interrupted as error:
        stopped = str(error)
    finally:
        Experiment.start, dataset.batches, SearchNetwork.train, torch.optim.Adam = start, batches, train, adam
        train_search_batch.measure, Experiment.uses_graphs, Recorded.__call__ = measure, uses_graphs, replayed
        for handler in logging.getLogger("manas").handlers:
            handler.close()
        for file, content in broken.items():
            file.write_bytes(content)
        distributed.barrier()
    (run,) = runs
    kept = {
        "parts": {part: state.state_dict() for part, state in run.parts.items()},
        "best": run.best,
        "skipped": run.skipped,
        "bad": run.bad,
        "step": run.step,
        "stopped": stopped,
        "names": names,
    }
    torch.save(kept, f"{name}.{distributed.rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    genotypes.FILE = Path("vocabulary.py").absolute()
    distributed.start()
    for job in sys.argv[1:]:
        run(*job.split("=", 1))
    distributed.end()
