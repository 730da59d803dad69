"""--compile: the same outputs and gradients; what is done without a compiler; where test_view.py compiles."""

import copy
import json
import re
import sys
import sysconfig
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import dataset
import model_train
import test_view
import train_search_batch
from architect import Architect
from genotypes import PRIMITIVES
from losses import multi_to_one
from model_search import MixedOperation, SearchNetwork
from model_train import DerainNetwork
from operations import (
    OPERATIONS,
    AttentionModule,
    Bottleneck,
    Fusion,
    Parallel,
    Transition,
    pad_to_multiple,
)
from support import experiment, validation
from support.benchmark import KINDS, every_operation, relative_error
from support.errors import Interrupted
from support.fast import Compiled, compile_edges, compile_network, for_inference, no_compiler
from support.images import write_image
from support.restore import forwards, restore
from tests.made import interrupt, photograph, write_pairs, write_scenes

CPU = torch.device("cpu")
CHANNELS = (2, 2, 2, 2)


def counted():
    """Compile anew from here on; see `graphs`."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class Padding(nn.Sequential):
    """Pads and crops, as the networks do."""

    def forward(self, x):
        return super().forward(pad_to_multiple(x))[..., : x.shape[-2], : x.shape[-1]]


# --- training -----------------------------------------------------------------------------------------------


def weight_step(net):
    """[outputs], [gradients] of a step on the weights; BatchNorm's statistics are outputs too."""
    torch.manual_seed(1)
    output = net.train()(torch.rand(3, 3, 16, 16).to(memory_format=torch.channels_last))
    multi_to_one(output, torch.rand(1, 3, 16, 16), torch.zeros(3, dtype=torch.long)).backward()
    statistics = [buffer for buffer in net.buffers() if buffer.is_floating_point()]
    return [output.detach(), *statistics], [p.grad for p in net.parameters() if p.grad is not None]


def arch_step(net, unrolled=False):
    torch.manual_seed(2)
    rainy, clean = torch.rand(3, 3, 16, 16), torch.rand(1, 3, 16, 16)
    rainy = rainy.to(memory_format=torch.channels_last)
    batch = dataset.Batch(rainy, clean, torch.zeros(3, dtype=torch.long), ["a"], [])
    sgd = torch.optim.SGD(net.weights(), 0.01, momentum=0.9)

    def loss(forward, batch):
        return multi_to_one(forward(batch.rainy), batch.clean, batch.scene)

    architect = Architect(net.eval(), None, loss, weight_optimizer=sgd)
    value, gradient = architect.unrolled(batch, batch) if unrolled else architect.first_order(batch)
    return [value], gradient


STEPS = {
    "weights": (partial(SearchNetwork, CHANNELS), weight_step),
    "architecture": (partial(SearchNetwork, CHANNELS), arch_step),
    "unrolled": (partial(SearchNetwork, CHANNELS), partial(arch_step, unrolled=True)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_the_steps_of_a_search_are_the_same_compiled(name):
    counted()
    torch.manual_seed(0)
    make, step = STEPS[name]
    net = make().to(memory_format=torch.channels_last)
    compiled = copy.deepcopy(net)
    compile_edges(compiled)
    assert compiled.state_dict().keys() == net.state_dict().keys()
    expected, found = step(net), step(compiled)
    assert relative_error(expected, found, as_one=True) < 1e-4
    assert len(found[1]) == len(expected[1])
    assert graphs() >= 4


class OneEdge(nn.Module):
    """The smallest supernet."""

    def __init__(self):
        super().__init__()
        self.edge = MixedOperation(2)
        self.beta = nn.Parameter(torch.randn(len(PRIMITIVES)))

    def forward(self, x):
        return self.edge(x, self.beta.softmax(-1))

    def weights(self):
        return list(self.edge.parameters())

    def architecture(self):
        return [self.beta]


# Below, "aot_eager" traces graphs without making kernels of them, which takes minutes.


@pytest.mark.parametrize("unrolled", [False, True])
def test_an_architecture_step_through_a_traced_edge_is_the_same(unrolled, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    counted()
    torch.manual_seed(0)
    net = OneEdge()
    compiled = copy.deepcopy(net)
    compile_edges(compiled)
    x, y = torch.rand(2, 3, 2, 8, 8)
    batch = dataset.Batch(x, y, torch.arange(3), ["a", "b", "c"], [])

    def loss(forward, batch):
        return (forward(batch.rainy) - batch.clean).square().mean()

    found = []
    for each in (net, compiled):
        sgd = torch.optim.SGD(each.weights(), 0.1)
        architect = Architect(each.eval(), None, loss, weight_optimizer=sgd)
        value, gradient = architect.unrolled(batch, batch) if unrolled else architect.first_order(batch)
        found.append(([value], gradient))
    assert relative_error(*found) < 1e-4
    assert graphs() == (2 if unrolled else 1)


def test_those_of_equal_shape_are_traced_once_and_are_the_same(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    counted()
    torch.manual_seed(0)
    net = nn.ModuleList(MixedOperation(2) for _ in range(10)).to(memory_format=torch.channels_last)
    compiled = copy.deepcopy(net)
    compile_edges(compiled)
    assert compiled.state_dict().keys() == net.state_dict().keys()
    x = torch.randn(3, 2, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    beta = torch.randn(len(PRIMITIVES), requires_grad=True)
    found = []
    for edges in (net, compiled):
        output = sum(edge(x, beta) for edge in edges)
        given = [x, beta, *edges.parameters()]
        found.append(([output.detach()], torch.autograd.grad(output.square().sum(), given)))
    assert relative_error(*found) < 1e-4
    assert graphs() == 1


# What a CPU compiles: of a search, of a training; and what they are given beside a map of 8 channels.
COMPILED_KINDS = {
    "mixed": (compile_edges, [torch.linspace(0.1, 0.9, len(PRIMITIVES), requires_grad=True)]),
    "attention": (partial(compile_network, device=CPU), []),
}


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("kind", COMPILED_KINDS)
def test_a_compiled_module_is_the_same_or_in_half_precision_as_near_to_float32_as_one_that_is_not(kind, amp):
    counted()
    torch.manual_seed(0)
    compile, beta = COMPILED_KINDS[kind]
    net = KINDS[kind](8).to(memory_format=torch.channels_last)
    compiled = copy.deepcopy(net)
    compile(compiled)
    x = torch.randn(3, 8, 32, 32).relu().to(memory_format=torch.channels_last).requires_grad_()
    found = []
    for module, half in ((net, False), (net, amp), (compiled, amp)):
        with torch.autocast("cpu", enabled=half):
            output = module(x.bfloat16() if half else x, *beta)
        gradients = torch.autograd.grad(output.float().square().sum(), [x, *beta, *module.parameters()])
        found.append(([output.detach()], gradients))
    exact, eager, fused = found
    allowed = max(0.02, 2 * relative_error(exact, eager, as_one=True)) if amp else 1e-4
    assert relative_error(exact, fused, as_one=True) < allowed
    assert graphs() == 1


@pytest.mark.parametrize(
    # Of the attention; on a GPU also of the bottleneck, two blocks, two sums and the transition.
    ("device", "compilations"),
    [("cpu", 1), ("cuda", 7)],
)
def test_branches_of_equal_shape_are_compiled_once_for_batches_of_any_number_of_images(
    device, compilations, monkeypatch
):
    """Each kind of branch twice, those of one map and those of all maps; all on the CPU."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    counted()
    torch.manual_seed(0)
    edges = [OPERATIONS[name] for name in ("sep_conv_3x3", "SE", "CBAM")]
    kinds = {
        "one, bottleneck": lambda: Bottleneck(4, 2, 4),
        "one, attention": lambda: AttentionModule(4, [make(2) for make in edges]),
        "all, parallel": lambda: Parallel([4, 6]),
        "all, fusion": lambda: Fusion([4, 6]),
        "all, transition": lambda: Transition([4, 6], [4, 6, 8]),
    }
    net = nn.ModuleDict({f"{kind} {k}": make() for kind, make in kinds.items() for k in range(2)})
    net.to(memory_format=torch.channels_last)
    compiled = copy.deepcopy(net)
    compile_network(compiled, torch.device(device))
    assert compiled.state_dict().keys() == net.state_dict().keys()
    for count in (5, 7, 4):
        found = []
        for each in (net, compiled):
            random = torch.Generator().manual_seed(count)
            maps = [torch.randn(count, c, size, size, generator=random) for c, size in ((4, 16), (6, 8))]
            outputs = [module(maps[0]) for name, module in each.items() if "one" in name]
            outputs += [y for name, module in each.items() if "all" in name for y in module(maps)]
            gradient = torch.autograd.grad(sum(o.square().sum() for o in outputs), list(each.parameters()))
            found.append(([o.detach() for o in outputs], gradient))
        assert relative_error(*found, as_one=True) < 1e-5
    assert graphs() == compilations


@pytest.mark.parametrize("name", PRIMITIVES[2:])
def test_gradients_bear_that_what_they_need_is_computed_anew_with_other_rounding(name):
    """As compiled kernels do in bfloat16; see operations.maximum."""

    def rounded_otherwise(saved):
        noisy = saved.is_floating_point() and saved.numel() > 1
        return saved * (1 + 2**-9 * torch.randn_like(saved)) if noisy else saved

    torch.manual_seed(0)
    operation, x = OPERATIONS[name](8), torch.randn(3, 8, 16, 16, requires_grad=True)
    given = [x, *operation.parameters()]
    expected = torch.autograd.grad(operation(x).square().sum(), given)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, rounded_otherwise):
        output = operation(x)
    found = torch.autograd.grad(output.square().sum(), given)
    assert relative_error([expected], [found], as_one=True) < 0.05


TINY = "--save run --epochs 1 --steps_per_epoch 2 --batch_size 1 --patch_size 16 --workers 0 --device cpu"
TINY += " --data data --clean_side right --channels 2 2 2 2 --compile"


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_a_search_without_a_compiler_that_runs_says_so_and_goes_on(folder, monkeypatch, compiler):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(experiment, "compile_edges", None)
    write_scenes(folder / "data", 24)
    train_search_batch.main(train_search_batch.get_args_parser().parse_args(f"{TINY} --demo".split()))
    line = f"--compile: the C++ compiler {compiler} is missing or does not run; the run goes on without it"
    assert Path("run", "log.txt").read_text().count(line) == 1


@pytest.mark.parametrize(
    ("kind", "sync_bn", "said"),
    [
        ("search", False, "compiled in the first step, which takes minutes"),
        ("eval", False, "compiled in the first step, which takes minutes"),
        ("search", True, "--sync_bn would cut the network into pieces"),
        ("eval", True, "--sync_bn would cut the network into pieces"),
    ],
)
def test_on_a_gpu_what_gains_by_it_is_compiled(kind, sync_bn, said, monkeypatch, caplog):
    compiled, net = [], nn.Identity()
    caplog.set_level("INFO", "manas")
    monkeypatch.setattr(experiment, "no_compiler", lambda device: None)
    monkeypatch.setattr(experiment, "compile_edges", lambda net: compiled.append(("search", net)))
    monkeypatch.setattr(experiment, "compile_network", lambda net, device: compiled.append(("eval", net)))
    monkeypatch.setattr(experiment.distributed, "size", lambda: 2 if sync_bn else 1)
    args = SimpleNamespace(compile=True, sync_bn=sync_bn)
    run = SimpleNamespace(kind=kind, device=torch.device("cuda"), args=args)
    experiment.Experiment.compile(run, net)
    assert compiled == ([] if sync_bn else [(kind, net)])
    assert [said in line for line in caplog.messages] == [True]


def test_compile_may_change_when_a_search_is_resumed(folder, monkeypatch):
    write_scenes(folder / "data", 24)
    parser, compiled = train_search_batch.get_args_parser(), []
    monkeypatch.setattr(experiment, "compile_edges", compiled.append)
    for flags in (f"{TINY} --demo --epochs 5", "--resume run"):
        before = len(compiled)
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            interrupt(patch, dataset, draw=1)
            train_search_batch.main(parser.parse_args(flags.split()))
        assert len(compiled) - before == ("--compile" in flags)


@pytest.mark.parametrize(
    "how",
    [partial(compile_network, device=torch.device("cuda")), partial(nn.Module.compile, dynamic=False)],
)
def test_validation_is_not_compiled(how, folder, monkeypatch):
    """Neither what `compile_network` compiles, nor what is compiled as `compile_edges` does."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    counted()
    scene = dataset.find(write_scenes(folder, 1) / "DID-MDN-training").scenes[0]
    net = Padding(Bottleneck(3, 2, 3))
    how(net)
    validation.measure(net, [scene], CPU)
    assert graphs() == 0
    net(torch.zeros(1, 3, 8, 8))
    assert graphs() == 1


@pytest.mark.parametrize(
    "missing, line",
    [
        ("g++", "the C\\+\\+ compiler \\S+ is missing or does not run"),
        ("Python.h", "no Python.h in /nowhere"),
    ],
)
def test_what_compiling_lacks_is_named(missing, line, monkeypatch):
    assert no_compiler(torch.device("mps")) == "torch.compile is not used on mps"
    if missing == "g++":
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", "/nowhere")
    else:
        monkeypatch.setenv("CXX", sys.executable)
        monkeypatch.setattr(sysconfig, "get_path", lambda name: f"/nowhere/{name}")
    assert re.search(line, no_compiler(CPU))


# --- pictures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"tile": 64},
        {"self_ensemble": 4},
        {"self_ensemble": 8},
        {"tile": 64, "self_ensemble": 8},
        {"scale": 0.3},
        {"scale": "auto", "self_ensemble": 8},
    ],
)
@pytest.mark.parametrize("size", [(24, 32), (37, 50), (64, 200), (150, 130), (530, 500)])
def test_forwards_are_those_that_restore_makes(size, flags):
    class Spy(nn.Module):
        def forward(self, x):
            passed[tuple(pad_to_multiple(x).shape[-2:])] += 1
            return x

    passed = Counter()
    restore(Spy().eval(), photograph(0, *size), **flags)
    assert dict(forwards(*size, **flags)) == dict(passed)


def test_pictures_of_several_sizes_flipped_and_turned_are_the_same_compiled():
    counted()
    torch.manual_seed(0)
    net = Padding(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1)).eval()
    assert_compiled_is_the_same(net.to(memory_format=torch.channels_last), amp=False)


def test_a_network_in_float64_is_the_same_compiled():
    """So the benchmark compares; PyTorch 2.14 cannot make constants of its weights."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1)).double().eval()
    compiled = Compiled(net)
    compiled.shapes = {(16, 24)}
    x = torch.rand(1, 3, 16, 24, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), net(x))
    assert compiled.shapes, "compiling failed"


@pytest.mark.slow
@pytest.mark.parametrize("amp", [False, True])
def test_pictures_of_several_sizes_through_a_compiled_network_are_the_same(amp):
    counted()
    torch.manual_seed(0)
    assert_compiled_is_the_same(for_inference(DerainNetwork(every_operation(), CHANNELS).eval()), amp)


def assert_compiled_is_the_same(net, amp):
    compiled = Compiled(net)
    compiled.shapes = {(24, 32), (32, 24), (40, 48)}
    for height, width in ((24, 32), (37, 45), (17, 30), (48, 40)):
        x = torch.rand(1, 3, height, width)
        for turned in (x, x.rot90(1, (2, 3)), x.flip(3)):
            with torch.inference_mode(), torch.autocast("cpu", enabled=amp):
                torch.testing.assert_close(compiled(turned), net(turned), rtol=0, atol=1e-2 if amp else 1e-4)
    assert graphs() == 3
    x = torch.rand(1, 3, 24, 32)
    with torch.inference_mode(), torch.autocast("cpu", enabled=amp):
        before = compiled(x)
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.zero_()
        assert torch.equal(compiled(x), before), "the weights were no constants"


@pytest.fixture
def network(folder, monkeypatch):
    """A network in net.pt; three pictures of 32x24 and one of 40x16; a torch.compile that lists what goes
    through what it was given, or fails where it is told to.
    """
    torch.manual_seed(0)
    net = DerainNetwork(every_operation(), CHANNELS, residual=True).eval()
    model_train.save(net, "net.pt")
    for i in range(3):
        write_image(Path("rain", f"{i}.png"), photograph(i))
    write_image(Path("rain", "wide.png"), photograph(9, 16, 40))
    through = []

    def compile(net, **options):
        def forward(x):
            if through and through[0] == "fails":
                raise torch._dynamo.exc.TorchDynamoException(through[1])
            through.append(tuple(x.shape[-2:]))
            return net(x)

        return forward

    monkeypatch.setattr(torch, "compile", compile)
    return through


def view(flags):
    """(exit status, the shapes that results.json says were compiled or None)."""
    parser = test_view.get_args_parser()
    status = test_view.main(parser.parse_args(f"--ckt_path net.pt --device cpu {flags}".split()))
    results = Path("results", "results.json")
    return status, json.loads(results.read_text())["options"]["compile"] if results.exists() else None


@pytest.mark.parametrize(
    "flags, compiled, said",
    [
        ("", 3 * [(24, 32)], "compiled, which takes minutes at first: 32x24"),
        (
            "--self_ensemble 8",
            12 * [(24, 32), (32, 24)] + 4 * [(16, 40), (40, 16)],
            "compiled, which takes minutes at first: 40x16 32x24 24x32 16x40",
        ),
        ("--compile on", 3 * [(24, 32)] + [(16, 40)], "compiled, which takes minutes at first: 40x16 32x24"),
        (
            "--compile on --scale 0.5",
            3 * [(16, 16)] + [(8, 24)],
            "compiled, which takes minutes at first: 24x8 16x16",
        ),
        ("--compile off", [], None),
    ],
)
def test_the_number_of_pixels_of_a_size_decides(flags, compiled, said, network, monkeypatch, capsys):
    monkeypatch.setattr(test_view, "COMPILED_FROM", 3 * 24 * 32)
    assert view(f"--path rain {flags}")[0] == 0
    assert sorted(network) == sorted(compiled)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == said if said else not any("compiled" in line for line in lines)


def test_of_too_few_pixels_nothing_is_compiled_whatever_is_done_already(network, monkeypatch, capsys):
    monkeypatch.setattr(test_view, "COMPILED_FROM", 3 * 24 * 32)
    Path("rain", "2.png").rename("2.png")
    assert view("--path rain")[0] == 0
    Path("2.png").rename(Path("rain", "2.png"))
    assert view("--path rain --skip_done")[0] == 0  # one is left
    assert not network
    said = "not compiled: no size has the 0 megapixels from which it pays"
    assert capsys.readouterr().out.count(said) == 2


def test_compiling_has_to_pay_in_each_of_several_processes(monkeypatch):
    monkeypatch.setattr(test_view, "COMPILED_FROM", 24 * 32)
    args, sizes = test_view.get_args_parser().parse_args([]), 3 * [(24, 32)]
    assert test_view.worth_compiling(args, sizes) == {(24, 32)}
    monkeypatch.setattr(test_view.distributed, "size", lambda: 4)
    assert test_view.worth_compiling(args, sizes) == set()


@pytest.mark.parametrize(
    "error, why",
    [
        ("no kernel\nof line 7", "no kernel"),
        ("backend='inductor' raised:\nNo kernel\nof line 7", "backend='inductor' raised: No kernel"),
        ("", "TorchDynamoException"),
    ],
)
def test_where_compiling_fails_one_warning_says_so_and_the_picture_is_restored(error, why, network, caplog):
    write_pairs(Path("pairs"), 2)
    network.extend(["fails", error])
    assert view("--path pairs --clean_side left --compile on") == (0, [])
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"compiling failed, going on without: {why}"]
    expected = Path("results", "0.png").read_bytes()
    assert view("--path pairs --clean_side left --compile off") == (0, [])
    assert Path("results", "0.png").read_bytes() == expected


def test_results_say_what_was_compiled_and_what_was_asked_for_without_a_compiler(
    network, monkeypatch, capsys
):
    write_pairs(Path("pairs"), 2)
    assert view("--path pairs --clean_side left --compile on") == (0, ["32x24"])
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert view("--path pairs --clean_side left --compile on") == (0, [])
    assert (
        "not compiled: the C++ compiler no-such-compiler is missing or does not run\n"
        in capsys.readouterr().out
    )
