"""Damaged files, folders and flags by the hundred: one line or a whole result, never a traceback or a hang.

A sample runs by default; all of it: python -m pytest -m slow tests/test_mutations.py -s
"""

import io
import json
import random
import signal
import zipfile
from collections import Counter
from contextlib import contextmanager

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import dataset
import genotypes
import model_train
import test_view
import train_model_batch
import train_search_batch
from genotypes import GenotypeError
from model_train import CheckpointError, DerainNetwork
from support import command, images
from support.errors import UserError
from tests.made import random_genotype

resource = pytest.importorskip("resource", reason="memory is measured as POSIX does")

SECONDS = 20  # for one case, on a loaded machine
BYTES = 2**30  # of memory that one case may add
SAMPLE = 20  # every so manieth case is in the sample


def amount(*counts, sample=SAMPLE):
    """Parameters of a test: the sample by default, all under -m slow."""
    return [
        pytest.param(*counts, sample, id="sample"),
        pytest.param(*counts, 1, id="all", marks=pytest.mark.slow),
    ]


@contextmanager
def bounded(case):
    """Fail a case that takes longer than SECONDS or more than BYTES."""

    def late(number, frame):
        raise TimeoutError(f"{case}: over {SECONDS} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES, f"{case}: memory"


def flip(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def flip_header(data, rng):
    data = bytearray(data)
    data[rng.randrange(min(len(data), 300))] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
    return bytes(data)


def flip_tail(data, rng):
    at = len(data) - rng.randrange(1, min(len(data), 300))
    return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]


def truncate(data, rng):
    return data[: rng.randrange(len(data))]


def swap(data, rng):
    a, b, c = sorted(rng.randrange(len(data)) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def cut_out(data, rng):
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    return data[:a] + data[b:]


def overwrite(data, rng):
    at, size = rng.randrange(len(data)), rng.choice([1, 4, 100])
    return data[:at] + bytes([rng.choice([0, 0xFF])]) * min(size, len(data) - at) + data[at + size :]


DAMAGE = (flip, flip_header, flip_tail, truncate, swap, cut_out, overwrite)

# --- checkpoints --------------------------------------------------------------------------------------------

ODD = (None, True, -1, 0, 3, 2**31, 10**300, 1.5, float("nan"), "", "x", [], {}, [[]], (1,), "parallel\n")


def odd_tensor(weight, rng):
    return rng.choice(
        [
            lambda: weight.double(),
            lambda: weight.half(),
            lambda: weight.to(torch.int32),
            lambda: weight.to(torch.complex64),
            lambda: weight > 0,
            lambda: weight.to_sparse(),
            lambda: weight.to("meta"),
            lambda: weight.reshape(-1),
            lambda: weight[None],
            lambda: weight.new_zeros(()).expand(weight.shape),
            lambda: weight.new_zeros(1).expand(2**20, 2**20),
            lambda: weight.new_full(weight.shape, float("inf")) if weight.is_floating_point() else weight - 1,
            lambda: -weight,
            lambda: torch.nn.Parameter(weight) if weight.is_floating_point() else weight,
            lambda: rng.choice(ODD),
        ]
    )()


def restructure(payload, rng):
    """The dictionary of a checkpoint with one thing changed."""
    part = rng.choice(
        ["entry", "drop", "genotype", "channels", "tensor", "tensor", "tensor", "names", "values"]
    )
    weights = dict(payload["weights"])
    name = rng.choice(list(weights))
    if part == "entry":
        return payload | {rng.choice(list(payload)): rng.choice(ODD)}
    if part == "drop":
        return {key: value for key, value in payload.items() if key != rng.choice(list(payload))}
    if part == "genotype":
        return payload | {"genotype": mutated_literal(payload["genotype"], rng)}
    if part == "channels":
        return payload | {"channels": mutated_literal(payload["channels"], rng)}
    if part == "tensor":
        weights[name] = odd_tensor(weights[name], rng)
    elif part == "names":
        weights[rng.choice(["module." + name, name + "_", "", name.upper(), rng.choice(list(weights))])] = (
            weights.pop(name)
        )
    else:
        weights[name] = weights[name] * rng.choice([0, -1, 1e10, float("nan")])
    return payload | {"weights": weights}


def mutated_literal(value, rng):
    """A literal of lists, dictionaries and words with one thing in it changed."""
    if isinstance(value, (list, tuple, dict)) and value and rng.random() < 0.8:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        copy = dict(value) if isinstance(value, dict) else list(value)
        change = rng.choice(["in", "in", "in", "in", "drop", "twice"])
        if change == "in":
            copy[key] = mutated_literal(value[key], rng)
        elif change == "drop":
            del copy[key]
        elif isinstance(value, dict):
            copy[f"{key} "] = value[key]
        else:
            copy.append(value[key])
        return copy
    return rng.choice([*ODD, *genotypes.PRIMITIVES, *genotypes.MODULES])


def saved(payload):
    file = io.BytesIO()
    torch.save(payload, file)
    return file.getvalue()


def repacked(data, rng):
    """The archive with one record damaged and all checksums right, for what comes after them to see."""
    source, target = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    names = source.namelist()
    chosen = rng.choice([name for name in names if name.endswith(".pkl")] * 3 + names)
    with zipfile.ZipFile(target, "w") as archive:
        for name in names:
            content = source.read(name)
            archive.writestr(
                name, rng.choice(DAMAGE)(content, rng) if name == chosen and content else content
            )
    return target.getvalue()


@pytest.mark.parametrize(("count", "every"), amount(500, sample=30))
@pytest.mark.filterwarnings("ignore")
def test_mutated_checkpoints(tmp_path, count, every):
    torch.manual_seed(0)
    net = DerainNetwork(random_genotype(0), (2, 2, 2, 2)).eval()
    payload = model_train.checkpoint(net)
    whole, x = saved(payload), torch.rand(1, 3, 8, 8)
    outcomes, path = Counter(), tmp_path / "net.pt"
    for case in range(0, count, every):
        rng = random.Random(case)
        kind = ("bytes", "pickle", "structure")[(case // every) % 3]
        if kind == "bytes":
            mutate = rng.choice(DAMAGE)
            path.write_bytes(mutate(whole, rng))
        else:
            path.write_bytes(repacked(whole, rng) if kind == "pickle" else saved(restructure(payload, rng)))
        with bounded(case):
            try:
                loaded = model_train.load(path)
            except CheckpointError as error:
                assert "\n" not in str(error) and len(str(error)) < 700, (case, error)
                outcomes[kind, "refused"] += 1
                continue
        # What loads is a whole network: of its own genotype and width, every value finite.
        assert (
            loaded.state_dict().keys() == DerainNetwork(loaded.genotype, loaded.channels).state_dict().keys()
        )
        assert all(torch.isfinite(value).all() for value in loaded.state_dict().values()), case
        with torch.inference_mode():
            equal = loaded.genotype == net.genotype and torch.equal(loaded(x), net(x))
        # Damage to the file itself, and no forgery with right checksums, must leave the network as it was.
        assert equal or kind != "bytes", (case, kind)
        outcomes[kind, "loaded, as before" if equal else "loaded, other values"] += 1
    print(f"\ncheckpoints: {dict(outcomes)}")
    assert sum(outcomes.values()) == len(range(0, count, every))
    assert outcomes["bytes", "refused"] and outcomes["structure", "refused"]


# --- images -------------------------------------------------------------------------------------------------

SHAPES = {"grey": (37, 41), "RGB": (37, 41, 3), "RGBA": (37, 41, 4)}
KINDS = {
    ".jpg": [("grey", np.uint8), ("RGB", np.uint8)],
    ".png": [(channels, depth) for channels in SHAPES for depth in (np.uint8, np.uint16)],
    ".bmp": [(channels, np.uint8) for channels in SHAPES],
    ".tif": [(channels, depth) for channels in SHAPES for depth in (np.uint8, np.uint16)],
    ".webp": [("RGB", np.uint8), ("RGBA", np.uint8)],
}
EXTRA = {  # what OpenCV does not write: format and options of Pillow
    ".jpg": [("JPEG", {"progressive": True})],
    ".png": [],
    ".bmp": [],
    ".tif": [
        ("TIFF", {}),
        ("TIFF", {"compression": "jpeg"}),
        ("TIFF", {"compression": "tiff_adobe_deflate"}),
        ("TIFF", {"compression": "tiff_lzw", "strip_size": 500}),
        ("TIFF", {"strip_size": 500}),
    ],
    ".webp": [("WEBP", {"lossless": True})],
}


def originals(suffix):
    """Whole files of a format, with what `images.load` makes of them."""
    files = []
    for channels, depth in KINDS[suffix]:
        pixels = np.random.default_rng(0).integers(0, np.iinfo(depth).max + 1, SHAPES[channels], dtype=depth)
        files.append(cv2.imencode(suffix, pixels)[1].tobytes())
    for format, options in EXTRA[suffix]:
        file = io.BytesIO()
        pixels = np.random.default_rng(0).integers(0, 256, SHAPES["RGB"], dtype=np.uint8)
        Image.fromarray(pixels).save(file, format, **options)
        files.append(file.getvalue())
    return files


@pytest.mark.parametrize(("count", "every"), amount(500, sample=4))
@pytest.mark.parametrize("suffix", KINDS)
def test_mutated_images(tmp_path, suffix, count, every):
    files, path = originals(suffix), tmp_path / f"picture{suffix}"
    wholes = []
    for data in files:
        path.write_bytes(data)
        wholes.append(images.read_image(path))
    outcomes = Counter()
    for case in range(0, count, every):
        rng = random.Random(case)
        which = rng.randrange(len(files))
        mutate = rng.choice(DAMAGE)
        data = mutate(files[which], rng)
        path.write_bytes(data)
        with bounded((suffix, case, mutate.__name__)):
            try:
                size = images.image_size(path)
                image = images.read_image(path)
            except UserError as error:
                assert "\n" not in str(error), (case, error)
                outcomes[mutate.__name__, "refused"] += 1
                continue
        assert image.dtype == np.uint8 and image.shape == (*size, 3) and image.size, case
        equal = np.array_equal(image, wholes[which])
        # A file that ends too early is refused, unless what is missing is padding after the picture.
        assert equal or mutate is not truncate, (suffix, case)
        outcomes[mutate.__name__, "as before" if equal else "other pixels"] += 1
    print(f"\n{suffix}: {dict(outcomes)}")
    assert sum(outcomes.values()) == len(range(0, count, every))
    assert outcomes["truncate", "refused"] or every > 1


# --- genotypes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "every"), amount(200, sample=4))
def test_mutated_genotypes(tmp_path, count, every):
    outcomes, path = Counter(), tmp_path / "genotype.json"
    for case in range(0, count, every):
        rng = random.Random(case)
        fields = json.loads(json.dumps(random_genotype(case)._asdict()))
        text = json.dumps(fields, indent=1).encode()
        kind = ("text", "structure")[(case // every) % 2]
        with bounded((kind, case)):
            try:
                if kind == "text":
                    path.write_bytes(
                        rng.choice([*DAMAGE, lambda *_: b"[" * 10**6, lambda *_: b"1" * 10**5])(text, rng)
                    )
                    genotype = genotypes.find(str(path))[1]
                else:
                    mutated = fields
                    for _ in range(rng.choice([1, 1, 3])):
                        mutated = mutated_literal(mutated, rng)
                    genotype = genotypes.check(mutated)
            except GenotypeError as error:
                assert "\n" not in str(error) and len(str(error)) < 400, (case, error)
                outcomes[kind, "refused"] += 1
                continue
        assert genotypes.check(json.loads(json.dumps(genotype._asdict()))) == genotype
        outcomes[kind, "whole"] += 1
    print(f"\ngenotypes: {dict(outcomes)}")
    assert outcomes["text", "refused"] and outcomes["structure", "refused"]


def test_a_genotype_of_anything_is_refused_in_a_short_line():
    for value in (10**5000, [[[[[[[[]]]]]]]] * 10**5, "x" * 10**6, {"modules": 1, "x\ny": 2}):
        with pytest.raises(GenotypeError) as error:
            genotypes.check(value)
        assert len(str(error.value)) < 200 and "\n" not in str(error.value)


# --- data layouts -------------------------------------------------------------------------------------------

FOLDERS = [
    "input",
    "target",
    "rain",
    "Norain",
    "GT",
    "Rain_Heavy",
    "Rain_Light",
    "train2018new",
    "a.png",
    "7",
    "ä",
]
NAMES = [
    "1",
    "01",
    "10",
    "7_1",
    "7_2",
    "7",
    "rain-7",
    "norain-7",
    "7_gt",
    "x",
    "X",
    "٣1",
    "²",
    "a\nb",
    "\udcff",
    "é" * 100,
]


def picture(rng):
    height, width = rng.choice([(24, 32), (24, 32), (24, 32), (24, 33), (8, 8)])
    return cv2.imencode(".png", np.full((height, width, 3), rng.randrange(256), np.uint8))[1].tobytes()


def grow(folder, rng, depth=0):
    """A random tree of pictures, other files, links and folders with telling names."""
    folder.mkdir(exist_ok=True)
    for name in rng.sample(NAMES, rng.randrange(5)):
        path = folder / f"{name}{rng.choice(['.png', '.png', '.JPG', '.txt', ''])}"
        what = rng.choice(["picture"] * 6 + ["cut", "empty", "loop", "nowhere", "hidden"])
        if what == "hidden":
            path.with_name(f".{path.name}").write_bytes(picture(rng))
        elif what in ("loop", "nowhere"):
            path.symlink_to(folder if what == "loop" else folder / "missing")
        else:
            data = picture(rng)
            path.write_bytes({"picture": data, "cut": data[: rng.randrange(len(data))], "empty": b""}[what])
    for name in rng.sample(FOLDERS, rng.randrange(4) if depth < 3 else 0):
        if not (folder / name).exists():
            grow(folder / name, rng, depth + 1)


@pytest.mark.parametrize(("count", "every"), amount(200, sample=4))
def test_mutated_layouts(tmp_path, count, every):
    outcomes = Counter()
    for case in range(0, count, every):
        rng = random.Random(case)
        root = tmp_path / str(case)
        grow(root, rng)
        side = rng.choice([None, None, "left", "right"])
        with bounded(case):
            try:
                found = dataset.find(root, side)
                halves = [half for s in found.scenes for half in (*s.rainy, *([s.clean] if s.clean else []))]
                used = {half.path for half in halves}
                # No picture is lost, and none is in a pair and without partner at once.
                folders = {
                    f
                    for f in root.iterdir()
                    if f.is_dir() and any(f in p.parents for p in {*used, *found.unpaired})
                }
                if found.layout in ("single images", "pairs told by their names"):
                    assert used | set(found.unpaired) == set(images.list_images(root, recursive=True))
                elif found.layout.startswith("pairs"):
                    assert used | set(found.unpaired) == {
                        p for f in folders for p in images.list_images(f, recursive=True)
                    }
                assert not used & set(found.unpaired), case
                outcomes["found"] += 1
                scenes = dataset.find_training([root], [side] if side else [])
            except (UserError, UnicodeEncodeError) as error:
                assert isinstance(error, UserError), (case, error)
                outcomes["refused"] += 1
                continue
            assert all(scene.clean for scene in scenes) and len(scenes) == len(found.scenes)
            for scene in scenes:
                try:
                    rainy, clean = dataset.read_scene(scene)
                except UserError:
                    continue
                assert all(image.shape == clean.shape for image in rainy), case
            outcomes["for training"] += 1
    print(f"\nlayouts: {dict(outcomes)}")
    assert outcomes["found"] and outcomes["refused"]


# --- flags --------------------------------------------------------------------------------------------------

VALUES = [
    "",
    " ",
    "0",
    "-1",
    "3",
    "1e400",
    "nan",
    "inf",
    "-inf",
    "1" * 5000,
    "4294967296",
    "0.5",
    "x",
    "--",
    "-",
    "é",
    "٣",
]
VALUES += [
    "a" * 300,
    "a/" * 3000,
    "/dev/null",
    "a\nb",
    "\udcff",
    "cpu:99",
    "meta",
    "cuda:x",
    "left",
    "None",
]
# Flags with a free text as their value, which only `main` can judge.
FREE = (
    "--data",
    "--save",
    "--resume",
    "--arch",
    "--weights",
    "--name",
    "--device",
    "--path",
    "--result_path",
    "--ckt_path",
)
SCRIPTS = (train_search_batch, train_model_batch, test_view)


@pytest.mark.parametrize(("count", "every"), amount(200, sample=4))
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_mutated_flags(folder, capsys, monkeypatch, script, count, every):
    """Refused in one line; if not by the parser, then by main, which is given no data."""
    model_train.save(DerainNetwork(random_genotype(0), (2, 2, 2, 2)), "net.pt")
    outcomes = Counter()

    def without_data(args):
        outcomes["parsed"] += 1
        if script is test_view:
            args.ckt_path, args.path, args.demo = args.ckt_path or "net.pt", args.path or "missing", False
        else:
            args.data, args.channels = args.data or ["missing"], [2, 2, 2, 2]
        return script.main(args)

    for case in range(0, count, every):
        rng = random.Random(case)
        parser = script.get_args_parser()
        flags = [flag for a in parser._actions if a.dest != "help" for flag in a.option_strings]
        given = []
        if (case // every) % 2:
            for flag in rng.sample([flag for flag in FREE if flag in flags], rng.choice([1, 2])):
                # Of "--flag=--", Python before 3.12.5 makes an empty list.
                given += [f"{flag}={rng.choice([value for value in VALUES if value != '--'])}"]
        else:
            for flag in rng.sample(flags, rng.choice([1, 1, 2, 4])):
                given += [rng.choice([flag, flag, flag, flag[:-1], flag.upper()])]
                given += rng.sample(VALUES, rng.choice([0, 1, 1, 1, 2, 4]))
        monkeypatch.setattr("sys.argv", [parser.prog, *given])
        with bounded((given, case)), pytest.raises(SystemExit) as stop:
            command.run(without_data, parser)
        error = capsys.readouterr().err
        assert stop.value.code == 2, given
        assert error.count("\n") == 1 and "error: " in error and len(error) < 20000, (given, error)
    outcomes["refused by the parser"] = len(range(0, count, every)) - outcomes["parsed"]
    print(f"\n{script.__name__}: {dict(outcomes)}")
    assert outcomes["refused by the parser"] and outcomes["parsed"]
