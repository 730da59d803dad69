"""Checkpoints from strangers: what is close enough is taken, the rest is one line, and nothing in it runs.
And what is exported does what the network does.
"""

import copy
import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import model_train
import test_view
import train_model_batch
import train_search_batch
from genotypes import BRANCHES, Genotype
from model_search import SearchNetwork
from model_train import CheckpointError, DerainNetwork
from support import experiment
from support.benchmark import every_operation
from tests.made import ROOT, at_the_command_line, random_genotype, warm_batch_norm
from train_search_batch import save_supernet


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A network, which no test changes, and its checkpoint."""
    torch.manual_seed(0)
    net = warm_batch_norm(DerainNetwork(random_genotype(5), (2, 2, 2, 2), residual=True))
    path = tmp_path_factory.mktemp("once") / "net.pt"
    model_train.save(net, path)
    return net, path


@pytest.fixture
def saved(once, tmp_path):
    net, path = once
    return net, Path(shutil.copy(path, tmp_path))


def change(path, entries=None, weights=None):
    """Write the checkpoint again with other entries, or with `weights` of its weights."""
    payload = torch.load(path, weights_only=True)
    payload |= entries or {}
    if weights:
        payload["weights"] = weights(payload["weights"])
    torch.save(payload, path)


def rewrite(path, record=lambda name, data: data, compression=zipfile.ZIP_STORED):
    """Write the zip archive again, each record as `record` gives it."""
    with zipfile.ZipFile(path) as archive:
        records = {name: record(name, archive.read(name)) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def refused(path, words):
    with pytest.raises(CheckpointError, match=words) as error:
        model_train.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 600


def same(path, net, tolerance):
    x = torch.rand(1, 3, 13, 17)
    torch.testing.assert_close(model_train.load(path)(x), net(x), rtol=0, atol=tolerance)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module."])
def test_wrappers_leave_their_names_but_not_their_mark(saved, prefix):
    net, path = saved
    change(path, weights=lambda weights: {prefix + name: w for name, w in weights.items()})
    same(path, net, 0)


def test_a_wrapper_inside_the_network_is_stripped_and_two_of_one_name_are_refused(saved):
    net, path = saved
    change(path, weights=lambda w: {name.replace("stem.", "stem._orig_mod."): v for name, v in w.items()})
    same(path, net, 0)
    change(path, weights=lambda w: w | {"module." + name: v for name, v in w.items()})
    refused(path, "twice")


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_a_network_is_float32_whatever_the_default_is(saved, default):
    net, path = saved
    torch.set_default_dtype(default)
    try:
        loaded = model_train.load(path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in net.state_dict().items())
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 1e-2), (torch.bfloat16, 1e-1), (torch.float64, 0)]
)
def test_other_floats_become_float32(saved, dtype, tolerance):
    net, path = saved
    change(path, weights=lambda weights: {name: w.to(dtype) for name, w in weights.items()})
    loaded = model_train.load(path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    same(path, net, tolerance)


def test_the_counters_of_batch_norm_may_be_missing(saved):
    net, path = saved
    change(path, weights=lambda w: {n: v for n, v in w.items() if not n.endswith("num_batches_tracked")})
    same(path, net, 0)


def test_channels_last_weights_are_taken(saved):
    net, path = saved
    model_train.save(copy.deepcopy(net).to(memory_format=torch.channels_last), path)
    same(path, net, 1e-6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda w: w.to(torch.int32), "head.to_rgb.weight is of torch.int32, not torch.float32"),
        (lambda w: w.to(torch.complex64), "head.to_rgb.weight is of torch.complex64"),
        (lambda w: w > 0, "head.to_rgb.weight is of torch.bool"),
        (lambda w: w.to_sparse(), "head.to_rgb.weight is no plain tensor"),
        (lambda w: w.to("meta"), "head.to_rgb.weight is no plain tensor"),
        (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "net.pt: "),
        (lambda w: w[:2], r"head.to_rgb.weight is \[2, 2, 1, 1\], not \[3, 2, 1, 1\]"),
        (lambda w: torch.zeros(1).expand(2**10, 2**10, 2**10, 2**10), r"head.to_rgb.weight is \[1024, 1024"),
        (lambda w: torch.zeros(1).expand(w.shape), "the file holds fewer values than their shapes claim"),
        (lambda w: w.double() * 1e300, "head.to_rgb.weight has values that are not finite"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_weights_of_another_kind_are_refused_by_name(saved, make, words):
    _, path = saved
    change(
        path, weights=lambda weights: weights | {"head.to_rgb.weight": make(weights["head.to_rgb.weight"])}
    )
    refused(path, words)


def test_variances_below_zero_are_refused(saved):
    _, path = saved
    name = "stem.0.body.0.1.running_var"
    change(path, weights=lambda weights: weights | {name: -weights[name]})
    refused(path, f"{name} has variances below 0")


def huge(depth):
    value = "x"
    for _ in range(depth):
        value = [value] * 10
    return value


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"residual": 1}, "residual is 1, not True or False"),
        ({"residual": None}, "residual is None"),
        ({"channels": [True, 2, 2, 2]}, "channels"),
        ({"channels": [10**9] * 4}, "channels"),
        ({"channels": [4096] * 4}, "weights do not fit"),
        ({"format": torch.zeros(3, 3)}, "format tensor"),
        ({"format": huge(12)}, "format"),
        ({"genotype": huge(12)}, "a genotype has the entries"),
        ({"weights": {3: torch.zeros(1)}}, "holds no weights"),
    ],
)
def test_entries_of_another_kind_are_refused(saved, entries, words):
    _, path = saved
    change(path, entries)
    refused(path, words)


def test_a_flipped_bit_among_the_weights_is_refused(saved):
    net, path = saved
    data = bytearray(path.read_bytes())
    at = data.find(net.stem[0].body[0][0].weight.detach().numpy().tobytes())
    data[at] ^= 1
    path.write_bytes(data)
    refused(path, "cannot be read")


def test_zip_bombs_and_storages_that_claim_more_than_they_hold_are_refused(saved):
    net, path = saved
    whole = path.read_bytes()
    rewrite(path)
    same(path, net, 0)
    rewrite(path, lambda name, data: bytes(10**7) if name.endswith("/data/0") else data, zipfile.ZIP_DEFLATED)
    refused(path, "cannot be read")
    path.write_bytes(whole)
    one, many = b"K\x01", b"J\x00\x00\x00\x7f"
    rewrite(path, lambda name, data: data.replace(one, many) if name.endswith(".pkl") else data)
    refused(path, "cannot be read")


@pytest.mark.parametrize(
    "nested", [b"\x85" * 10**6, b"q\x00h\x00\x86" * 40, b"\x86".join([b"q\x00h\x00"] * 40)]
)
def test_keys_whose_hash_would_overflow_the_stack_or_take_for_ever_are_refused(saved, nested):
    """torch.load follows the first into a segmentation fault and the others until the sun burns out."""
    _, path = saved
    rewrite(path, lambda name, data: b"\x80\x02}()" + nested + b"K\x01u." if name.endswith(".pkl") else data)
    refused(path, "cannot be read")


@pytest.mark.parametrize("script", [train_search_batch, train_model_batch])
def test_no_network_is_trained_that_is_too_wide_to_be_loaded(script, capsys):
    parse = script.get_args_parser().parse_args
    widest = str(model_train.MAX_CHANNELS)
    assert parse(["--channels", "2", "2", "2", widest]).channels[3] == model_train.MAX_CHANNELS
    with pytest.raises(SystemExit):
        parse(["--channels", "2", "2", "2", "1000000000"])
    assert f"an even number from 2 to {widest}" in capsys.readouterr().err


class Bomb:
    def __reduce__(self):
        return (open, (str(Bomb.target), "w"))


def test_view_says_in_one_line_what_a_file_is_that_is_no_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = DerainNetwork(random_genotype(0), (2, 2, 2, 2))
    model_train.save(net, "whole.pt")
    whole = Path("whole.pt").read_bytes()
    Path("text.pt").write_text("hello")
    Path("empty.pt").touch()
    Path("folder.pt").mkdir()
    Path("cut.pt").write_bytes(whole[: len(whole) // 2])
    with zipfile.ZipFile("other.pt", "w") as archive:
        archive.writestr("readme.txt", "no network")
    Bomb.target = tmp_path / "ran"
    torch.save({"format": Bomb()}, "code.pt")
    torch.save({"format": Bomb()}, "legacy.pt", _use_new_zipfile_serialization=False)
    convolution = torch.nn.Conv2d(3, 3, 3).state_dict()
    torch.save(convolution, "state.pt")
    torch.save({"epoch": 3, "args": {}, "state_dict": convolution}, "nested.pt")
    save_supernet(SearchNetwork((2, 2, 2, 2)), "supernet.pt")
    torch.save({"format": experiment.RUN, "kind": "eval"}, "last.pt")
    expected = {
        "text": "cannot be read",
        "empty": "cannot be read",
        "folder": "not a file",
        "missing": "no such checkpoint",
        "cut": "cannot be read",
        "other": "cannot be read",
        "code": "cannot be read",
        "legacy": "cannot be read",
        "state": "bare state_dict",
        "nested": "project's, with the keys ['epoch', 'args', 'state_dict'] and weights under 'state_dict'",
        "supernet": "train_model_batch.py --arch",
        "last": "--resume; give the best_psnr.pt",
    }
    for name, words in expected.items():
        done = at_the_command_line(test_view, "--ckt_path", f"{name}.pt", "--demo")
        error = done.stderr
        assert done.returncode == 2, name
        assert error.count("\n") == 1 and f"error: {name}.pt: " in error and words in error, error
        assert ("another project" in error) == (name == "nested"), error
    assert not Bomb.target.exists()


# --- export ---

SIZES = [(1, 3, 9, 11), (2, 3, 16, 24), (3, 3, 37, 50)]


SIMPLE = Genotype(
    (("parallel", "parallel", "parallel", "fusion"),) * 3,
    tuple((("skip_connect", "none", "CBAM"),) * branches for branches in BRANCHES),
)
EVERYTHING = random_genotype(5)


@pytest.fixture(
    params=[SIMPLE, pytest.param(EVERYTHING, marks=pytest.mark.slow)], ids=["simple", "everything"]
)
def exported(request, tmp_path, caplog):
    """A network, and a function that has the command export it to a file of a name."""
    caplog.set_level(logging.CRITICAL, "torch.__trace")  # thousands of lines, which pytest would keep
    torch.manual_seed(0)
    net = warm_batch_norm(DerainNetwork(request.param, (2, 2, 2, 2), residual=True))
    model_train.save(net, tmp_path / "net.pt")

    def write(name):
        args = [str(tmp_path / "net.pt"), str(tmp_path / name)]
        model_train.main(model_train.get_args_parser().parse_args(args))
        assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["net.pt", name])
        return tmp_path / name

    return net, write


def assert_parity(net, run):
    for size in SIZES:
        x = torch.rand(size)
        with torch.inference_mode():
            torch.testing.assert_close(run(x), net(x), rtol=0, atol=1e-4)


def test_torch_export_at_any_size_equals_the_network(exported):
    net, write = exported
    about = {"about.json": ""}
    program = torch.export.load(write("net.pt2"), extra_files=about)
    assert_parity(net, program.module())
    about = json.loads(about["about.json"])
    assert json.loads(about["genotype"])["modules"][0][0] == net.genotype.modules[0][0]
    assert "over 8x8" in about["usage"]
    assert not [node for node in program.graph.nodes if "device" in node.kwargs]  # it runs on a GPU as well
    x = torch.rand(SIZES[0])
    torch.testing.assert_close(program.module().double()(x.double()).float(), net(x), rtol=0, atol=1e-4)


def test_onnx_at_any_size_equals_the_network(exported):
    reason = "needs the packages of requirements-export.txt"
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=reason)
    onnxruntime = pytest.importorskip("onnxruntime", reason=reason)
    net, write = exported
    session = onnxruntime.InferenceSession(write("net.onnx"))
    (rainy,), (restored,) = session.get_inputs(), session.get_outputs()
    assert rainy.shape == restored.shape == ["batch", 3, "height", "width"]
    assert session.get_modelmeta().custom_metadata_map["format"] == model_train.FORMAT
    assert_parity(net, lambda x: torch.from_numpy(session.run(["restored"], {"rainy": x.numpy()})[0]))


def test_a_pt2_whose_disk_is_full_or_whose_name_is_no_text_is_not_an_abort(saved, tmp_path, monkeypatch):
    net = model_train.load(saved[1])
    monkeypatch.setattr(torch.export, "export", lambda *args, **options: None)  # which takes long
    monkeypatch.setattr(torch.export, "save", lambda program, file, **options: file.write(b"program"))
    path = tmp_path / os.fsdecode(b"l\xe9.pt2")
    model_train.export(net, path)
    assert path.read_bytes() == b"program"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(Path, "write_bytes", lambda self, content: (_ for _ in ()).throw(full))
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
        model_train.export(net, path)
    assert path.read_bytes() == b"program" and not list(tmp_path.glob(".*"))


def test_a_package_that_onnx_lacks_is_named_before_anything_is_traced(saved, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr(torch.export, "export", lambda *args, **options: pytest.fail("traced first"))
    with pytest.raises(CheckpointError, match=r"net\.onnx: needs the package onnxscript; pip install -r "):
        model_train.export(model_train.load(saved[1]), tmp_path / "net.onnx")
    assert not list(tmp_path.glob("*.onnx"))


def test_a_checkpoint_of_half_the_size_is_the_same_network_to_float16(saved, tmp_path):
    _, path = saved
    net, small = model_train.load(path), tmp_path / "small.pt"
    model_train.export(net, small)
    again = model_train.load(small).state_dict()
    for name, tensor in net.state_dict().items():
        tolerance = 1e-3 if tensor.ndim == 4 else 0
        torch.testing.assert_close(again[name], tensor, rtol=tolerance, atol=1e-7)
    held = torch.load(small)["weights"]
    assert {weight.dtype for weight in held.values() if weight.ndim == 4} == {torch.float16}


def test_what_float16_cannot_hold_stays_as_it_is(saved, tmp_path):
    net = model_train.load(saved[1])
    torch.nn.init.constant_(net.head.to_rgb.weight, 1e5)
    model_train.export(net, tmp_path / "small.pt")
    again = model_train.load(tmp_path / "small.pt")
    assert torch.equal(again.head.to_rgb.weight, net.head.to_rgb.weight)


def test_networks_are_widened_by_one_factor_alone(saved):
    net = model_train.load(saved[1])
    odd = [2 * net.channels[0], *net.channels[1:]]
    with pytest.raises(ValueError, match="no multiple"):
        model_train.widen(net, odd)
    net = model_train.DerainNetwork(every_operation(), (20, 40, 80, 160))
    with pytest.raises(ValueError, match=r"cells\.0\.attention\.0\..*mlp.* from 2 to 5 channels"):
        model_train.widen(net, (40, 80, 160, 320))


def test_a_checkpoint_is_not_exported_over_itself_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model_train.save(DerainNetwork(random_genotype(0), (2, 2, 2, 2)), "net.pt")
    content = Path("net.pt").read_bytes()
    Path("link.pt").symlink_to("net.pt")
    for checkpoint in ("net.pt", str(tmp_path / "net.pt"), "link.pt"):
        with pytest.raises(CheckpointError, match="is the checkpoint itself"):
            model_train.main(model_train.get_args_parser().parse_args([checkpoint, "net.pt"]))
        assert Path("net.pt").read_bytes() == content


@pytest.mark.parametrize("training", [False, True])
def test_a_wider_network_computes_the_same_with_copies_that_part(training):
    torch.manual_seed(0)
    net = model_train.DerainNetwork(every_operation(), (2, 4, 6, 4), residual=True).double()
    warm_batch_norm(net)
    wide = model_train.widen(net.train(training), (6, 12, 18, 12))
    assert wide.training == training
    x = torch.rand(2, 3, 16, 24, dtype=torch.float64)
    torch.testing.assert_close(wide(x), net(x), rtol=1e-9, atol=1e-9)
    wide(x).square().mean().backward()
    gradient = wide.stem[0].shortcut[0].weight.grad
    assert not torch.allclose(gradient[0], gradient[1])


def test_what_cannot_be_exported_is_one_line(saved, tmp_path, monkeypatch):
    _, path = saved
    net = model_train.load(path)
    with pytest.raises(CheckpointError, match="net.txt: the file's name must end in"):
        model_train.export(net, tmp_path / "net.txt")
    with pytest.raises(CheckpointError, match="there is no folder"):
        model_train.export(net, tmp_path / "none" / "net.pt2")
    with pytest.raises(ValueError, match="training mode"):
        model_train.export(net.train(), tmp_path / "net.pt2")
    net.eval()
    monkeypatch.setattr(torch.export, "export", lambda *args, **options: 1 / 0)  # which takes long
    with pytest.raises(CheckpointError, match="x.pt2: cannot be written: File name too long"):
        model_train.export(net, tmp_path / f"{300 * 'x'}.pt2")
    command = [sys.executable, "model_train.py", "missing.pt", "net.onnx"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "model_train.py: error: missing.pt: no such checkpoint\n"
