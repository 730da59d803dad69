"""One script in several processes, the ranks, that torchrun started: what they share and agree on.

    torchrun --nproc_per_node=8 train_model_batch.py

Without torchrun there is one process, rank 0 of 1, and everything here gives back what it is given. Numbers
on the CPU travel by gloo, those on GPUs by NCCL. All ranks have to make the same calls in the same order.
"""

import os
import sys
import threading
from contextlib import nullcontext
from datetime import timedelta
from functools import lru_cache

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from support.errors import Interrupted

# The others wait for rank 0 while it reads a data set or writes a checkpoint, and at the end of a search.
TIMEOUT = timedelta(hours=2)
PARTING = 60  # seconds


def launched():
    """Whether torchrun started this process."""
    return dist.is_torchelastic_launched()


def rank():
    return int(os.environ["RANK"]) if launched() else 0


def size():
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def local_rank():
    """The number of this process on its machine, which is that of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if launched() else 0


def local_size():
    return int(os.environ["LOCAL_WORLD_SIZE"]) if launched() else 1


def is_main():
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def bar(items=None, what=None, total=None, unit="it", leave=False):
    """A tqdm over the items: on a terminal, of the main rank alone, a progress bar."""
    return tqdm(items, what, total, leave, unit=unit, disable=None if is_main() and sys.stderr else True)


def start():
    """Meet the other ranks; from now on the main one alone is heard on standard output."""
    if not launched() or dist.is_initialized():
        return
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    dist.init_process_group(backend, store=_store(), rank=rank(), world_size=size(), timeout=TIMEOUT)
    if not is_main():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def end():
    """Wait for the other ranks, and part."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


def leave(status):
    """Part from the other ranks, who may have left: Python's end can abort where gloo's threads still run.

    NCCL waits until all ranks part, those too that know nothing of what ends this one, such as a full disk:
    where that lasts, the process ends at once, with the exit status.
    """
    if not dist.is_initialized():
        return
    parting = threading.Thread(target=dist.destroy_process_group, daemon=True)
    parting.start()
    parting.join(PARTING)
    if parting.is_alive():
        try:
            sys.stdout.flush()
        finally:
            os._exit(status)


@lru_cache
def _store():
    """torchrun's table of keys and values, there before the ranks have met."""
    return next(dist.rendezvous("env://", timeout=TIMEOUT))[0]


def first_to_say(text):
    """Whether no other rank has said this yet: a mistake that all of them find is told once."""
    return not launched() or _store().add(f"said {text}", 1) == 1


def reporting(function, mistakes):
    """The function; under torchrun, the traceback of an exception that ends it goes into torchrun's report
    too, except for exceptions of the types `mistakes`, for which a line is enough.
    """
    if not launched():
        return function
    from torch.distributed.elastic.multiprocessing.errors import record  # which has something to say on macOS

    def attempt(*args):
        try:
            return function(*args), None
        except mistakes as mistake:
            return None, mistake

    def report(*args):
        result, mistake = record(attempt)(*args)
        if mistake:
            raise mistake
        return result

    return report


# --- agreeing -----------------------------------------------------------------------------------------------


def barrier():
    if size() > 1:
        dist.all_reduce(torch.zeros(1))


def from_main(make):
    """On every rank, what make() returns on rank 0; if it raises a ValueError there, as for a user's mistake,
    or Interrupted, every rank raises that.
    """
    if size() == 1:
        return make()
    made = [None]
    if is_main():
        try:
            made = [make()]
        except (ValueError, Interrupted) as error:
            made = [error]
    dist.broadcast_object_list(made)
    if isinstance(made[0], (ValueError, Interrupted)):
        raise made[0]
    return made[0]


def agree(value):
    """Rank 0's value."""
    return from_main(lambda: value)


def gather(value):
    """A list of all ranks' values, tensors in them on the CPU."""
    if size() == 1:
        return [value]
    values = [None] * size()
    dist.all_gather_object(values, value)
    return values


def join(found):
    """All ranks' lists as one. If all are empty, as lists of errors nearly always are, only one number is
    exchanged.
    """
    if size() == 1:
        return found
    count = torch.tensor([len(found)])
    dist.all_reduce(count)
    return [one for several in gather(found) for one in several] if count else []


# --- training -----------------------------------------------------------------------------------------------


def broadcast(tensors):
    """Overwrite the tensors, which need no gradient, by rank 0's: even if drawn from one seed, they may
    differ between kinds of processor.
    """
    if size() == 1:
        return
    for tensor in tensors:
        values = tensor.contiguous()
        dist.broadcast(values, 0)
        tensor.copy_(values)


def average(tensors):
    """The tensors' means over the ranks, the same bits on all of them."""
    if size() == 1:
        return tensors
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    dist.all_reduce(flat)
    pieces = (flat / size()).split([tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]


def parallel(net, weights):
    """The network, with a backward pass that averages the gradients of `weights`, some of its parameters.

    Buffers are left alone: see `experiment.Experiment.average_statistics`.
    """
    if size() == 1:
        return net
    kept = {id(weight) for weight in weights}
    ignored = [name for name, parameter in net.named_parameters() if id(parameter) not in kept]
    # DDP calls the network's own parameters by both names, in two places.
    names = [*ignored, *(f".{name}" for name in ignored)]
    names += [name for name, _ in net.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, names)
    return DistributedDataParallel(net)


def in_parts(net, parts):
    """Yield the parts of a batch, whose gradients add up; those of a net of `parallel` are averaged over the
    ranks once, with the last part.
    """
    for number, part in enumerate(parts, start=1):
        last = number == len(parts) or not isinstance(net, DistributedDataParallel)
        with nullcontext() if last else net.no_sync():
            yield part
