"""The benchmark: its forms are one function, its rows are well formed, a difference is not let pass."""

import argparse
import json
import math
import platform
import runpy
from functools import partial
from itertools import count
from types import SimpleNamespace

import pytest
import torch

import genotypes
import operations
from genotypes import PRIMITIVES
from model_search import MixedOperation, SearchNetwork
from model_train import DerainNetwork
from operations import Gate, Zero
from support import benchmark

TINY = "--device cpu --channels 4 4 8 8 --batch_size 1 --patch_size 16 --repeats 1 --workers 0"


def parse(*flags):
    return benchmark.get_args_parser().parse_args([*TINY.split(), *flags])


def run(capsys, *flags):
    """The rows that --json prints."""
    benchmark.main(parse("--json", *flags))
    return {row["name"]: row for row in json.loads(capsys.readouterr().out)}


def tiny_steps(name, dtype):
    args, device = parse(), torch.device("cpu")
    search = name in benchmark.SEARCH_STEPS
    script = benchmark.train_search_batch if search else benchmark.train_model_batch
    options = benchmark.script_options(script, args, device)
    size = (19, 34) if name in benchmark.PICTURES else None
    return benchmark.steps(name, options, device, dtype, size)


@pytest.mark.parametrize(
    "name", ["weight_and_arch_step", "arch_step_unrolled", "training_step", "inference_256"]
)
def test_plain_and_offered_forms_are_one_function_in_float64(name):
    plain, offered = tiny_steps(name, torch.float64)
    assert benchmark.relative_error(plain(), offered()) < 1e-6


@pytest.mark.parametrize("name", ["inference_256", "arch_step"])
def test_the_forms_agree_in_float32_outputs(name):
    plain, offered = tiny_steps(name, torch.float32)
    assert benchmark.relative_error(plain()[:1], offered()[:1]) < 1e-4


def test_every_step_returns_the_gradients_it_makes():
    net = SearchNetwork((4, 4, 8, 8))
    outputs, gradients = tiny_steps("weight_and_arch_step", torch.float32)[1]()
    assert [output.shape for output in outputs] == 2 * [(3, 3, 16, 16)]
    parameters = [*net.architecture(), *net.weights()]
    assert [gradient.shape for gradient in gradients] == [parameter.shape for parameter in parameters]
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_the_plain_form_evaluates_every_candidate_and_the_network_given_is_left_as_it_was():
    net = SearchNetwork((4, 4, 8, 8)).eval()
    plain, calls = benchmark.plain_form(net), []
    for copy in (net, plain):
        for module in copy.modules():
            if isinstance(module, Zero):
                module.register_forward_hook(lambda *_: calls.append(1))
    x = torch.rand(1, 3, 16, 16)
    expected = net(x)
    assert not calls
    torch.testing.assert_close(plain(x), expected)
    assert len(calls) == sum(isinstance(module, MixedOperation) for module in net.modules()) == 27


def test_the_fixed_network_measured_has_every_operation_but_none():
    names = {name for cell in benchmark.every_operation().attention for edges in cell for name in edges}
    assert names == set(PRIMITIVES) - {"none"}


def test_every_operation_that_computes_something_is_measured_wherever_it_stands(monkeypatch):
    monkeypatch.setattr(genotypes, "PRIMITIVES", PRIMITIVES[::-1])
    kinds = runpy.run_path(benchmark.__file__)["KINDS"]
    assert set(PRIMITIVES) - {*kinds} == {"none", "skip_connect"}


def test_a_row_has_the_name_by_which_it_is_asked_for():
    rows = [benchmark.Row.named(name) for name in benchmark.ROWS]
    assert [row.name for row in rows] == list(benchmark.ROWS)
    assert benchmark.Row.named("whole_training_step") == ("training_step", "whole_", False, False)


def test_a_run_prints_one_well_formed_row_for_each_asked_for(capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "LOADER_SECONDS", 0.1)
    monkeypatch.setattr(benchmark, "PHOTOGRAPHS", ["rocket.jpg"])
    names = ["training_step", "inference_256", "loader_cached", "loader"]
    rows = run(capsys, "--rows", *names)
    assert list(rows) == names
    for row in rows.values():
        assert {"name", "device", "plain_ms", "ms", "ratio", "error", "images_per_second", "mb"} <= row.keys()
        assert row["device"] == "cpu" and row["ms"] > 0 and row["images_per_second"] > 0
    for name in names[:3]:
        assert rows[name]["ratio"] == pytest.approx(rows[name]["plain_ms"] / rows[name]["ms"])
        assert math.isfinite(rows[name]["error"])
    assert all(math.isfinite(rows[name]["float64"]) for name in names[:2])
    assert rows["loader_cached"]["error"] == 0.0  # the same batches, bit for bit
    assert rows["loader"]["plain_ms"] is None and rows["loader"]["scenes_per_second"] > 0


def test_times_are_those_of_the_form_whose_column_they_are_in(monkeypatch):
    assert benchmark.medians([(30, 10), (90, 20), (40, 60)]) == {"plain_ms": 40, "ms": 20, "ratio": 2}
    monkeypatch.setattr(benchmark, "milliseconds", lambda step, device: step)
    cpu = torch.device("cpu")
    assert benchmark.time_in_turns(8.0, 2.0, cpu, 3) == {"plain_ms": 8, "ms": 2, "ratio": 4}
    monkeypatch.setattr(benchmark, "peak_memory", lambda step, device: step)
    monkeypatch.setattr(benchmark, "compare", lambda *_: (8.0, 2.0, {}))
    options = argparse.Namespace(batch_size=5)
    found = benchmark.measure("training_step", options, cpu, 1)
    assert (found["plain_mb"], found["mb"], found["images_per_second"]) == (8, 2, 1000 * 15 / 2)
    assert benchmark.measure("inference_256", options, cpu, 1)["images_per_second"] == 500


def test_a_loaders_figures_are_its_batches_by_the_second(monkeypatch):
    """Three batches of 4 scenes of 3 images, of 2 s each, after the first ones."""
    clock = count(step=2)
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(benchmark, "LOADER_SECONDS", 5)
    drawn = []
    batches = (drawn.append(1) or SimpleNamespace(rainy=range(12)) for _ in count())
    found = benchmark.loader_speed(batches, workers=2, batch_size=4)
    assert found == {"ms": 2000, "images_per_second": 6, "scenes_per_second": 2}
    assert len(drawn) == 5 + 3


def test_the_cache_is_compared_with_decoding_and_a_wrong_one_is_told(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "PHOTOGRAPHS", ["rocket.jpg"])

    def speed(batches, workers, batch_size):
        ms = 1.0 if batches.gi_frame.f_locals["cache"] else 10.0
        return {"ms": ms, "images_per_second": 12 / ms, "scenes_per_second": 4 / ms}

    monkeypatch.setattr(benchmark, "loader_speed", speed)
    args = benchmark.get_args_parser().parse_args(
        "--rows loader_cached --json --device cpu --workers 0".split()
    )
    benchmark.main(args)
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["plain_ms"], row["ms"], row["ratio"], row["error"]) == (10, 1, 10, 0)
    monkeypatch.setattr(benchmark, "relative_error", lambda *_: 1e-7)
    with pytest.raises(SystemExit) as stop:
        benchmark.main(args)
    assert stop.value.code.endswith(": loader_cached")


def test_the_table_says_what_unrolling_costs_and_what_a_run_waits_for(capsys):
    rows = {
        "arch_step": {"plain_ms": 20.0, "ms": 10.0, "mb": 100.0},
        "arch_step_unrolled": {"plain_ms": 60.0, "ms": 45.0, "mb": 150.0},
        "weight_step": {"images_per_second": 30.0},
        "training_step": {"images_per_second": 90.0},
        "loader": {"scenes_per_second": 20.0},
    }
    benchmark.conclude(rows, workers=2)
    text = capsys.readouterr().out
    assert "unrolled : first order = 4.50 (plain 3.00), in memory 1.50" in text
    assert "weight_step uses 10.0 scenes a second: a run waits for the step" in text
    assert "training_step uses 30.0 scenes a second: a run waits for the loader" in text


def test_in_half_precision_a_picture_differs_but_by_no_more_than_is_allowed(capsys, monkeypatch):
    monkeypatch.setitem(benchmark.PICTURES, "inference_256", (64, 64))
    full, half = run(capsys, "--rows", "inference_256", "--amp").values()
    assert half["name"] == "inference_256_amp"
    assert full["error"] < 1e-4 < half["error"] < benchmark.Row("inference_256", half=True).allowed["error"]


def test_compile_adds_a_row_that_says_what_its_first_step_took_where_the_scripts_compile(capsys, monkeypatch):
    nets, edges, branches = [], [], []
    monkeypatch.setattr(torch, "compile", lambda net, **options: lambda x: nets.append(x.shape) or net(x))
    monkeypatch.setattr(benchmark, "compile_edges", edges.append)
    monkeypatch.setattr(benchmark, "compile_network", lambda net, device: branches.append((net, device.type)))
    monkeypatch.setitem(benchmark.PICTURES, "inference_256", (30, 40))
    names = ["weight_step", "training_step", "inference_256"]
    rows = run(capsys, "--rows", *names, "--compile")
    assert list(rows) == [*names, *(f"{name}_compile" for name in names)]
    assert [row["compile_s"] is not None for row in rows.values()] == 3 * [False] + 3 * [True]
    assert {type(net) for net in edges} == {SearchNetwork}
    assert {(type(net), device) for net, device in branches} == {(DerainNetwork, "cpu")}
    assert (1, 3, 32, 40) in nets


def test_what_was_not_compiled_is_not_measured_as_if_it_were(monkeypatch):
    def fails(x):
        raise torch._dynamo.exc.TorchDynamoException("no kernel")

    flags = ["--rows", "inference_256", "--compile"]
    monkeypatch.setitem(benchmark.PICTURES, "inference_256", (30, 40))
    monkeypatch.setattr(torch, "compile", lambda net, **options: fails)
    with pytest.raises(benchmark.UserError, match="--compile: compiling failed"):
        benchmark.main(parse(*flags))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(benchmark.UserError, match="--compile: the C[+][+] compiler no-such-compiler is"):
        benchmark.main(parse(*flags))


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told")
def test_scripts_are_measured_against_a_process_that_does_not_keep_memory(capsys):
    names = ["kept_inference_512", "whole_inference_512"]
    flags = ["--channels", "16", "16", "16", "16", "--repeats", "2", "--amp"]
    rows = run(capsys, "--rows", *names, *flags)
    assert list(rows) == [*names, "whole_inference_512_amp"]
    for row in rows.values():
        assert row["ratio"] == pytest.approx(row["plain_ms"] / row["ms"])
        assert row["plain_mb"] > 60  # one activation of 64 channels at 512x512
        assert row["mb"] > (30 if row["name"].endswith("_amp") else 60)


@pytest.mark.parametrize("wrong", [lambda y: 1.01 * y, lambda y: y * math.nan])
def test_a_form_that_computes_something_else_gives_exit_status_1(capsys, monkeypatch, wrong):
    def broken(net):
        net = benchmark.copy.deepcopy(net)
        gate = next(module for module in net.modules() if isinstance(module, Gate))
        gate.register_forward_hook(lambda module, inputs, output: wrong(output))
        return net

    monkeypatch.setattr(benchmark, "offered_form", broken)
    # The processes of a `whole_` row are not this one, and not broken; what they say is not asked here.
    monkeypatch.setattr(benchmark.multiprocessing, "get_context", lambda kind: Nothing())
    for name in ("training_step", "whole_training_step"):
        with pytest.raises(SystemExit) as stop:
            benchmark.main(parse("--json", "--rows", name))
        assert name in stop.value.code  # Python prints a text and exits with status 1
        assert json.loads(capsys.readouterr().out)[0]["name"] == name


def test_a_process_of_its_own_records_its_graphs_on_the_gpu_that_is_asked_for(monkeypatch):
    chosen = []
    monkeypatch.setattr(benchmark.devices, "pick_device", chosen.append)
    monkeypatch.setattr(benchmark, "steps", lambda *args, **options: chosen * 2)
    with pytest.raises(TypeError, match="'str' object is not callable"):  # the step is what was chosen before
        benchmark.serve(None, "training_step", None, torch.device("cuda:1"), False, False, 1)
    assert chosen == ["cuda:1"]


def test_the_memory_of_a_recorded_step_is_that_of_its_recording_in_a_process_of_its_own_too(monkeypatch):
    """Replayed it allocates nothing, so the table said 0 MB."""
    asked, sent = iter([True, False]), []
    monkeypatch.setattr(benchmark.devices, "pick_device", lambda name: None)
    monkeypatch.setattr(benchmark, "steps", lambda *args: (None, partial(next, iter([100.0, 0.0, 0.0]))))
    monkeypatch.setattr(benchmark, "peak_memory", lambda step, device: step())
    end = SimpleNamespace(recv=partial(next, asked), send=sent.append)
    benchmark.serve(end, "training_step", None, torch.device("cuda"), False, False, 1)
    assert sent == [100.0]


@pytest.mark.parametrize("plain", [False, True])
def test_the_process_that_keeps_memory_runs_the_offered_form(monkeypatch, plain):
    started, answers = [], iter([60.0, 30.0, 9.0, 3.0])

    class Other(Nothing):
        def Process(self, target, args, daemon):
            started.append(args[4:6])
            return self

        def recv(self):
            return next(answers)

    monkeypatch.setattr(benchmark, "compare", lambda *_: ({},))
    monkeypatch.setattr(benchmark.multiprocessing, "get_context", lambda kind: Other())
    found = benchmark.measure_scripts("training_step", None, None, 1, plain)
    assert started == [(False, plain), (True, False)]
    assert found == {"plain_ms": 9, "ms": 3, "ratio": 3, "plain_mb": 60, "mb": 30}


class Nothing:
    """A process that answers 1 to whatever it is asked, and its pipe."""

    def Pipe(self):
        return self, self

    def Process(self, **options):
        return self

    def recv(self):
        return 1.0

    def start(self, *args):
        pass

    close = send = join = start


def test_amp_adds_a_row_in_bfloat16_and_a_wrong_kernel_in_it_gives_exit_status_1(capsys, monkeypatch):
    flags = ["--amp", "--rows", "training_step", "--patch_size", "32", "--channels", "16", "16", "16", "16"]
    rows = run(capsys, *flags)
    assert list(rows) == ["training_step", "training_step_amp"]
    assert rows["training_step"]["error"] < 0.2 and 1e-3 < rows["training_step_amp"]["error"] < 0.9
    monkeypatch.setattr(operations.DilatedDepthwise, "forward", garbage_gradient)
    with pytest.raises(SystemExit) as stop:
        run(capsys, *flags)
    assert stop.value.code.endswith("training_step_amp")


def test_a_wrong_sign_in_one_gradient_of_one_operation_gives_exit_status_1(capsys, monkeypatch):
    """In bfloat16, where those of a whole step are off by more than one operation's are of all."""
    flags = ["--amp", "--rows", "operations", "--patch_size", "32", "--channels", "16", "16", "16", "16"]
    rows = run(capsys, *flags)
    assert list(rows) == ["operations", "operations_amp"]
    assert rows["operations"]["error"] < 0.05 < rows["operations_amp"]["error"] < 0.25
    assert all(row["ratio"] == pytest.approx(row["plain_ms"] / row["ms"]) for row in rows.values())

    def wrong(self, x):
        y = torch.nn.Conv2d.forward(self, x)
        if torch.is_autocast_enabled("cpu"):
            self.weight.register_hook(torch.neg)
        return y

    monkeypatch.setattr(operations.DilatedDepthwise, "forward", wrong)
    with pytest.raises(SystemExit) as stop:
        run(capsys, *flags)
    assert stop.value.code.endswith(": operations_amp")


def garbage_gradient(self, x):
    y = torch.nn.Conv2d.forward(self, x)
    if y.requires_grad and torch.is_autocast_enabled("cpu"):
        self.weight.register_hook(lambda gradient: gradient * math.inf)
    return y


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--device", "abacus"], "--device abacus"),
        (["--rows", "weight_step", "--data", "no_such"], "no_such"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_measured(flags, message, monkeypatch):
    monkeypatch.setattr(benchmark, "measure_row", lambda *args: 1 / 0)
    with pytest.raises(benchmark.UserError, match=message):
        benchmark.main(parse(*flags))


@pytest.mark.parametrize("flags", [["--channels", "4", "5", "8", "8"], ["--patch_size", "8"]])
def test_a_size_that_no_network_or_ssim_has_is_refused(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and flags[0] in error and len(error.splitlines()) == 1


def test_relative_error_counts_each_tensor_against_its_own_size():
    big, small = torch.ones(100), torch.full((4,), 1e-3)
    assert benchmark.relative_error([[big, small]], [[big, 1.1 * small]]) == pytest.approx(0.1, rel=1e-4)
    assert benchmark.relative_error([[big, small]], [[big, 1.1 * small]], as_one=True) < 1e-4
    rounding = torch.full((1,), 1e-12)
    assert benchmark.relative_error([[big, rounding]], [[big, -rounding]]) < 1e-5
    assert math.isnan(benchmark.relative_error([[big, small]], [[big, small * math.nan]]))
