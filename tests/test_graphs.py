"""Steps as CUDA graphs, on a GPU: the numbers of a step kernel by kernel, whatever changes between them."""

import gc
import weakref
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import model_search
import model_train
import operations
import train_model_batch
import train_search_batch
from dataset import Batch
from losses import multi_to_one
from model_search import SearchNetwork
from model_train import DerainNetwork
from operations import side_by_side
from support import distributed
from support.benchmark import every_operation
from support.experiment import Experiment
from support.graphs import Backward, Recorded, laid_out_as
from tests.made import scalars, write_scenes

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
NETWORKS = {
    "supernet": lambda: SearchNetwork((4, 4, 8, 8)),
    "fixed": lambda: DerainNetwork(every_operation(), (4, 4, 8, 8)),
}
WIDER = {
    "supernet": lambda: SearchNetwork((16, 32, 64, 128)),
    "fixed": lambda: DerainNetwork(every_operation(), (16, 32, 64, 128)),
}
RUN = "--epochs 2 --steps_per_epoch 3 --batch_size 4 --patch_size 16 --val_scenes 1 --workers 0 --data data "
RUN += "--clean_side right --channels 4 4 4 4 --deterministic --internal_start 2 "
SCRIPTS = {
    "search": (train_search_batch, "--arch_start 1 --demo"),
    "training": (train_model_batch, "--arch half_width_mixed_rain --freeze_start 2"),
}


def batch_of(scenes, device="cpu", seed=0, size=16):
    random = torch.Generator().manual_seed(seed)
    rainy, clean = (torch.rand(n, 3, size, size, generator=random) for n in (3 * scenes, scenes))
    rainy = rainy.to(device, memory_format=torch.channels_last)
    scene = torch.arange(scenes).repeat_interleave(3)
    return Batch(rainy, clean.to(device), scene.to(device), [], [])


def loss(forward, batch):
    return multi_to_one(forward(batch.rainy), batch.clean, batch.scene)


def made(kind, device="cpu"):
    torch.manual_seed(0)
    return NETWORKS[kind]().to(device, torch.float64, memory_format=torch.channels_last)


def in_float64(batch):
    return batch._replace(rainy=batch.rainy.double(), clean=batch.clean.double())


def weights_of(net):
    return net.weights() if isinstance(net, SearchNetwork) else list(net.parameters())


def assert_same(found, expected):
    """To rounding: beside the largest of all, since a gradient may be zero but for it."""
    scale = max(e.abs().max() for e in expected)
    for f, e in zip(found, expected, strict=True):
        assert f.shape == e.shape
        assert (f - e).abs().max() <= 1e-9 * scale


@pytest.mark.parametrize("kind", NETWORKS)
def test_gradients_are_laid_out_as_the_weights_and_summed_over_the_parts(kind):
    """What is recorded, run as it is, against the backward pass in one and in two parts."""
    net, batch = made(kind).eval(), in_float64(batch_of(4))
    weights = weights_of(net)
    value, gradients = Backward(net, weights, loss).gradients(batch)
    assert all(g.stride() == w.stride() for g, w in zip(gradients, weights, strict=True))
    for parts in (1, 2):
        summed = Backward(net, weights, loss, parts)(batch)
        torch.testing.assert_close(summed, value)
        assert_same([w.grad for w in weights], gradients)


@pytest.mark.parametrize(
    "shape, copied", [((4, 3, 3, 3), True), ((4, 3, 1, 1), False), ((4, 1, 3, 3), False)]
)
def test_a_gradient_is_copied_only_where_memory_has_another_order(shape, copied):
    """Each copy is a kernel; a search has 691 weights, most of them 1x1 or depthwise."""
    weight = torch.zeros(shape).to(memory_format=torch.channels_last)
    gradient = torch.rand(shape)
    found = laid_out_as(weight, gradient)
    assert found.stride() == weight.stride() and torch.equal(found, gradient)
    assert (found.data_ptr() != gradient.data_ptr()) == copied


@cuda
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_replayed_step_is_the_step_and_changes_statistics_once(kind):
    """Batches of two shapes in turn, weights that move between them."""
    nets = [made(kind, "cuda") for _ in range(2)]
    backward = [
        Backward(net, weights_of(net), loss, recorded=recorded, changed=net.buffers())
        for net, recorded in zip(nets, (False, True), strict=True)
    ]
    for seed, scenes in enumerate((2, 3, 2, 2, 3)):
        batch = in_float64(batch_of(scenes, "cuda", seed))
        values = [step(batch) for step in backward]
        torch.testing.assert_close(values[1], values[0])
        plain, replayed = ([w.grad for w in weights_of(net)] for net in nets)
        assert_same(replayed, plain)
        for plain, replayed in zip(*(net.buffers() for net in nets), strict=True):
            torch.testing.assert_close(replayed, plain)
        for net in nets:
            with torch.no_grad():
                for weight in weights_of(net):
                    weight.sub_(weight.grad, alpha=0.1)
    assert len(backward[1].recorded.graphs) == 2


class Stream:
    """A CUDA stream's place in `log`, of what was asked of it, and the one that is current."""

    log, current = [], None

    def __init__(self, device):
        self.device = device

    def wait_stream(self, other):
        self.log.append((self, "waits for", other))

    def __enter__(self):
        self.before, Stream.current = Stream.current, self

    def __exit__(self, *_):
        Stream.current = self.before


class Tensor:
    is_cuda = True

    def record_stream(self, stream):
        Stream.log.append((self, "is used by", stream))


def test_while_a_graph_is_recorded_branches_have_streams_that_wait_and_are_waited_for(monkeypatch):
    """With streams that only write down what is asked of them, as there is no GPU in CI."""
    here, log, capturing = Stream("cuda:0"), [], True
    monkeypatch.setattr(Stream, "log", log)
    monkeypatch.setattr(Stream, "current", here)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream.current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    inputs, results = [Tensor(), Tensor()], [Tensor(), Tensor(), Tensor()]

    def call(result):
        log.append((result, "is computed on", Stream.current))
        return result

    def run():
        log.clear()
        assert side_by_side([partial(call, result) for result in results], inputs) == results
        return [stream for _, what, stream in log if what == "is computed on"]

    sides = run()
    assert len({here, *sides}) == 4 and {side.device for side in sides} == {"cuda:0"}
    place = {entry: i for i, entry in enumerate(log)}
    for side, result in zip(sides, results, strict=True):
        begins, ends = (side, "waits for", here), (here, "waits for", side)
        assert place[begins] < place[result, "is computed on", side] < place[ends]
        assert place[result, "is used by", here] >= 0
        assert all(place[x, "is used by", side] >= 0 for x in inputs)
        assert all(place[result, "is computed on", side] < place[here, "waits for", other] for other in sides)
    assert Stream.current is here and run() == sides  # which have memory to use again

    capturing = False
    assert run() == [here] * 3 and len(log) == 3


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_branches_of_all_modules_go_side_by_side(kind, monkeypatch):
    """Of each cell the four multi-scale modules and the attention; the head has one branch."""
    widths = []

    def counted(calls, inputs):
        widths.append(len(calls))
        return side_by_side(calls, inputs)

    for module in (operations, model_search, model_train):
        monkeypatch.setattr(module, "side_by_side", counted)
    made(kind)(torch.rand(1, 3, 16, 16, dtype=torch.float64))
    assert widths == [*5 * [2], *5 * [3], *5 * [4], 1]


@cuda
@pytest.mark.parametrize("kind", WIDER)
def test_branches_side_by_side_give_what_they_give_one_after_the_other(kind, monkeypatch):
    """Where kernels take long enough to meet: what a stream reads, another must not have overwritten yet."""
    capturing = torch.cuda.is_current_stream_capturing
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # whose rounding hides more than 1e-4
    found = []
    for apart in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda on=apart: on and capturing())
        torch.manual_seed(0)
        net = WIDER[kind]().to("cuda", memory_format=torch.channels_last)
        backward = Backward(net, weights_of(net), loss, recorded=True, changed=net.buffers())
        found.append([])
        for seed in range(6):
            backward(batch_of(8, "cuda", seed, size=64))
            found[-1].append(torch.cat([w.grad.flatten() for w in weights_of(net)]))
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-4 * one.norm()


@cuda
def test_what_the_caller_says_changes_is_recorded_anew():
    factor = 1.0
    double = Recorded(lambda batch: factor * batch.clean.sum(), constants=lambda: factor)
    batch = batch_of(2, "cuda")
    assert double(batch).item() == pytest.approx(batch.clean.sum().item())
    factor = 2.0
    assert double(batch).item() == pytest.approx(2 * batch.clean.sum().item())


def test_when_what_a_step_depends_on_changes_old_graphs_are_let_go_before_one_is_recorded(monkeypatch):
    """Else the sixth epoch of a run would need the memory of two steps. Those of another shape stay."""
    constants, seen = ["first"], []

    def record(self, batch):
        seen.append((len(self.graphs), self.pool))
        self.pool = "of a graph"
        return SimpleNamespace(replay=lambda: None), batch, (batch.clean.sum(), [batch.clean[0, 0, 0]])

    monkeypatch.setattr(Recorded, "record", record)
    weight = torch.zeros(16)
    backward = Backward(None, [weight], None, recorded=True, constants=lambda: constants[0])
    for scenes in (2, 3, 2):
        backward(batch_of(scenes))
    assert seen == [(0, None), (1, "of a graph")] and weight.grad is not None
    constants[0] = "second"
    monkeypatch.setattr(
        Recorded, "record", lambda self, batch: seen.append(weight.grad) or record(self, batch)
    )
    backward(batch_of(2))
    assert seen[2:] == [None, (0, None)]


def test_as_many_images_of_another_number_of_scenes_are_recorded_anew(monkeypatch):
    """As mixed data has them: four images of two scenes, then of one."""
    recorded = []

    def record(self, batch):
        own = batch._replace(rainy=batch.rainy.clone(), clean=batch.clean.clone(), scene=batch.scene.clone())
        recorded.append(len(batch.clean))
        return SimpleNamespace(replay=lambda: None), own, own.clean

    monkeypatch.setattr(Recorded, "record", record)
    replayed = Recorded(None)
    for scene in ([0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 1]):
        scenes = max(scene) + 1
        batch = Batch(torch.rand(4, 3, 16, 16), torch.rand(scenes, 3, 16, 16), torch.tensor(scene), [], [])
        assert torch.equal(replayed(batch), batch.clean)
    assert recorded == [2, 1]


@cuda
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_with_graphs_logs_the_losses_of_one_without(name, folder, monkeypatch):
    """Across the end of an epoch: the internal loss joins, statistics freeze, validation comes between."""
    script, flags = SCRIPTS[name]
    write_scenes(folder / "data", 24)
    logged, recorded, record = [], [], Recorded.record
    monkeypatch.setattr(Recorded, "record", lambda self, batch: recorded.append(self) or record(self, batch))
    for graphs in ("", "--no_graphs"):
        run = f"run{graphs}"
        script.main(script.get_args_parser().parse_args(f"{RUN} {flags} {graphs} --save {run}".split()))
        logged.append(scalars(folder / run))
    assert len(recorded) == 2 * len(set(recorded))  # each before and after the internal loss, and no more
    for tag in ("loss", "val_loss", "gradient_norm"):
        values = [[value for _, value in run[tag]] for run in logged]
        assert values[0] == pytest.approx(values[1], rel=1e-3), tag


@pytest.mark.parametrize(
    ("name", "more", "kinds"), [("search", "", [2, 2]), ("training", "--epochs 3 --freeze_start 3", [3])]
)
def test_the_scripts_say_in_which_epochs_their_steps_change(name, more, kinds, folder, monkeypatch):
    """Without a GPU: in the second the internal loss joins, in a training's third statistics freeze."""
    script, flags = SCRIPTS[name]
    write_scenes(folder / "data", 6)
    told = {}

    def replayed(self, batch):
        told.setdefault(self, set()).add(self.constants())
        return self.function(batch)

    monkeypatch.setattr(Experiment, "uses_graphs", lambda run: True)
    monkeypatch.setattr(Recorded, "__call__", replayed)
    flags = f"{RUN} {flags} --steps_per_epoch 1 --channels 2 2 2 2 {more} --device cpu --save run"
    script.main(script.get_args_parser().parse_args(flags.split()))
    assert [len(constants) for constants in told.values()] == kinds


def test_memory_that_runs_out_while_a_step_is_recorded_is_what_is_said(monkeypatch):
    """And not that the recording, then broken off, cannot be ended, as CUDA says of side streams."""

    class BrokenOff:
        def __init__(self, graph, **options):
            pass

        def __enter__(self):
            pass

        def __exit__(self, *error):
            raise RuntimeError("capture cannot be ended")

    def too_large(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", BrokenOff)
    monkeypatch.setattr(Recorded, "warm_up", lambda self, batch: None)
    with pytest.raises(torch.OutOfMemoryError, match="^CUDA out of memory$"):
        Recorded(too_large)(batch_of(1))
    with pytest.raises(RuntimeError, match="cannot be ended"):
        Recorded(lambda batch: None)(batch_of(1))


def test_what_an_earlier_run_in_this_process_holds_is_let_go_before_a_step_is_recorded(monkeypatch):
    def earlier():
        weight = torch.zeros(16)
        return weakref.ref(Backward(None, [weight], None, recorded=True))

    seen = []
    monkeypatch.setattr(
        torch.cuda, "CUDAGraph", lambda: SimpleNamespace(pool=lambda: None, replay=lambda: None)
    )
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: nullcontext())
    gc.collect()
    gc.disable()
    try:
        held = earlier()
        assert held() is not None  # it has a method of its own, and so outlives its last name
        monkeypatch.setattr(Recorded, "warm_up", lambda self, batch: seen.append(held()))
        Recorded(lambda batch: None)(batch_of(1))
    finally:
        gc.enable()
    assert seen == [None]


def test_steps_are_recorded_on_cuda_in_one_part_where_no_rank_waits_for_another(monkeypatch):
    def uses_graphs(device, accumulate=1, no_graphs=False, sync_bn=False):
        args = SimpleNamespace(accumulate=accumulate, no_graphs=no_graphs, sync_bn=sync_bn)
        return Experiment.uses_graphs(SimpleNamespace(device=torch.device(device), args=args))

    assert uses_graphs("cuda") and uses_graphs("cuda:1")
    assert not uses_graphs("cpu") and not uses_graphs("mps")
    assert not uses_graphs("cuda", accumulate=2) and not uses_graphs("cuda", no_graphs=True)
    assert uses_graphs("cuda", sync_bn=True)
    monkeypatch.setattr(distributed, "size", lambda: 2)
    assert uses_graphs("cuda") and not uses_graphs("cuda", sync_bn=True)
