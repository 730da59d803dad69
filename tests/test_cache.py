"""--cache: the same batches without decoding; what is stale, damaged or half written is never used."""

import contextlib
import hashlib
import importlib.util
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import PIL
import pytest
import torch
from PIL import Image

import dataset
import genotypes
import train_model_batch
import train_search_batch
from dataset import find_training, read_scene
from support import cache as caching
from support import distributed, options
from support.cache import open_cache
from support.errors import Interrupted, UserError
from support.images import read_image, write_image
from tests.made import (
    ROOT,
    assert_same,
    interrupt,
    photograph,
    rain_on,
    random_genotype,
    session,
    state,
    terminal,
    write_pairs,
    write_scenes,
)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="there is no --cache here")


def batches(scenes, count, workers=0, patch_size=16, **options):
    endless = dataset.batches(scenes, patch_size, 3, seed=7, device="cpu", workers=workers, **options)
    return list(islice(endless, count))


def assert_equal_batches(some, others):
    for a, b in zip(some, others, strict=True):
        assert_same(a._asdict(), b._asdict())


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that are decoded in this process."""
    names = []

    def recorded(path):
        names.append(Path(path).name)
        return read_image(path)

    monkeypatch.setattr(dataset, "read_image", recorded)
    monkeypatch.setattr(caching, "read_image", recorded)
    return names


def pairs(tmp_path, count=6, suffix=".png"):
    folder = write_pairs(tmp_path / "pairs", count, suffix=suffix)
    return folder, find_training([folder], ["left"])


def kept_file(folder):
    return folder / caching.NAME


def assert_as_files(scenes, cache):
    """Every picture is in the cache, as its file has it."""
    for scene in scenes:
        halves = [*scene.rainy, scene.clean]
        for half, image in zip(halves, cache.get(halves), strict=True):
            assert np.array_equal(image, dataset.read_half(half)), half


# --- the same batches ---


def every_kind(folder):
    """Scenes of every layout, small, turned, grey, 16 bits, alpha; a clean image of two rainy ones."""
    write_scenes(folder / "scenes", 3, suffix=".jpg")
    write_pairs(folder / "left", 3)
    write_pairs(folder / "right", 3, clean_side="right", first=20)
    for name, size in (("small", (12, 40)), ("smaller", (11, 13))):
        clean = photograph(30, *size)
        write_image(folder / "left" / f"{name}.png", np.hstack([clean, rain_on(clean, 1)]))
    clean = photograph(40, 40, 28)
    for number in range(2):
        write_image(folder / "two" / "rainy" / f"7_{number}.png", rain_on(clean, number))
    write_image(folder / "two" / "clean" / "7.png", clean)
    deep = photograph(41).astype(np.uint16) * 257 + 100
    for name in ("rainy", "clean"):
        exif = Image.Exif()
        exif[274] = 6  # a quarter turn
        Image.fromarray(photograph(42)).save(folder / "two" / name / "turned.jpg", exif=exif)
        write_image(folder / "two" / name / "deep.png", deep)
        write_image(folder / "two" / name / "alpha.png", np.dstack([photograph(43), photograph(44)[..., 0]]))
        write_image(folder / "two" / name / "grey.png", photograph(45)[..., 0])
    folders = [folder / name for name in ("scenes", "left", "right", "two")]
    sides = ["right", "left", "right", "right"]
    scenes = [
        scene
        for root, side in zip(folders, sides, strict=True)
        for scene in find_training([root], [side] if root.name != "two" else [])
    ]
    return folders, scenes


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_bit_for_bit(tmp_path, workers):
    folders, scenes = every_kind(tmp_path)
    options = {"patch_size": 24, "clean_inputs": 0.4}
    expected = batches(scenes, 24, **options)
    assert {len(batch.rainy) for batch in expected} > {3} and any(batch.padded for batch in expected)
    cache = open_cache(scenes, folders)
    assert_equal_batches(batches(scenes, 24, workers, cache=cache, **options), expected)
    assert_as_files(scenes, cache)


def test_nothing_is_decoded_when_batches_are_drawn_or_a_second_run_begins(tmp_path, decoded):
    folders, scenes = every_kind(tmp_path)
    cache = open_cache(scenes, folders)
    files = {file for scene in scenes for file in scene.files}
    assert sorted(decoded) == sorted(Path(file).name for file in files)  # each once
    decoded.clear()
    for each in (cache, open_cache(scenes, folders), open_cache(scenes[:5], folders)):
        batches(scenes[:5], 9, cache=each)
    assert not decoded


def test_validation_takes_the_same_pictures_from_the_cache(tmp_path, decoded):
    folder, scenes = pairs(tmp_path)

    def tensors(cache=None):
        return [[*map(dataset.to_tensor, images)] for images in dataset.full_images(scenes, cache=cache)]

    expected = tensors()
    cache = open_cache(scenes, [folder])
    decoded.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch's, of an array that must not be written
        found = tensors(cache)
    assert_same(found, expected)
    assert not decoded


def test_a_pictures_clean_copies_in_other_densities_take_no_room(tmp_path):
    """DID-MDN: 4,000 scenes of 4 pictures of 512x512 are 12.6 GB."""
    root = write_scenes(tmp_path, 3)
    scenes = find_training([root])
    cache = open_cache(scenes, [root])
    assert sum(kept.bytes() for kept in cache.kept.values()) == 3 * 4 * read_scene(scenes[0])[1].nbytes


SEARCH = "--epochs 1 --steps_per_epoch 1 --arch_start 1 --save {0} --name {0}"
TRAIN = "--epochs 2 --steps_per_epoch 1 --clean_inputs 0.3 --arch genotype.json --save {0}"


@pytest.mark.parametrize(
    "script, flags", [(train_search_batch, SEARCH), (train_model_batch, TRAIN)], ids=["search", "train"]
)
def test_a_run_is_the_same_with_and_without_and_resumed(folder, script, flags, decoded, monkeypatch):
    write_scenes(folder / "scenes", 3)
    write_pairs(folder / "pairs", 3)
    genotypes.write_json(random_genotype(0), folder / "genotype.json")
    shutil.copyfile(ROOT / "genotypes.py", folder / "genotypes.py")
    monkeypatch.setattr(genotypes, "FILE", folder / "genotypes.py")
    flags += " --data scenes pairs --clean_side right left --patch_size 16 --batch_size 1 --workers 0"
    flags += " --val_scenes 1 --device cpu --channels 2 2 2 2"

    def run(flags):
        with session():
            script.main(script.get_args_parser().parse_args(flags.split()))

    run(flags.format("plain"))
    decoded.clear()
    run(flags.format("cached") + " --cache")
    # Each once for the cache, and once the clean ones, for the split; then search looks at the gap.
    assert len(decoded) <= (9 + 3) + 6 + (6 if script is train_search_batch else 0)
    assert kept_file(Path("scenes")).exists() and kept_file(Path("pairs")).exists()
    assert_same(state("cached")["parts"], state("plain")["parts"])
    assert state("cached")["best"] == state("plain")["best"]
    if script is train_model_batch:
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            interrupt(patch, dataset, 1)
            run(flags.format("resumed") + " --cache")
        run("--resume resumed --cache elsewhere --workers 0 --device cpu")
        assert len(list(Path("elsewhere").iterdir())) == 2
        assert_same(state("resumed")["parts"], state("plain")["parts"])


def test_the_cache_may_differ_when_a_run_is_resumed():
    assert "cache" in options.FREE_OPTIONS
    for script in (train_search_batch, train_model_batch):
        parse = script.get_args_parser().parse_args
        assert [parse(f.split()).cache for f in ("", "--cache", "--cache X")] == [None, "", "X"]


def test_where_there_are_no_file_locks_the_cache_is_refused_in_a_line(tmp_path, monkeypatch):
    folder, scenes = pairs(tmp_path)
    monkeypatch.setattr(caching, "fcntl", None)
    with pytest.raises(UserError, match="--cache: needs a system with file locks"):
        open_cache(scenes, [folder])


# --- what has changed ---


def replace(file, picture):
    write_image(file, picture)
    os.utime(file, (file.stat().st_atime, file.stat().st_mtime + 5))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_changes_under_a_run_is_decoded_anew(tmp_path, workers):
    folder, scenes = pairs(tmp_path, suffix=".bmp")  # whose size stays
    cache = open_cache(scenes, [folder])
    before = batches(scenes, 6, cache=cache)
    replace(folder / "2.bmp", np.hstack([photograph(70), photograph(71)]))
    expected = batches(scenes, 6)
    assert_equal_batches(batches(scenes, 6, workers, cache=cache), expected)
    assert any(not torch.equal(a.clean, b.clean) for a, b in zip(before, expected, strict=True))


def test_a_new_run_decodes_what_has_changed_or_come_and_nothing_else(tmp_path, decoded):
    folder, scenes = pairs(tmp_path)
    open_cache(scenes, [folder])
    replace(folder / "2.png", np.hstack([photograph(70), photograph(71)]))
    shutil.copy(folder / "3.png", folder / "new.png")
    (folder / "0.png").unlink()
    decoded.clear()
    scenes = find_training([folder], ["left"])
    cache = open_cache(scenes, [folder])
    assert sorted(decoded) == ["2.png", "new.png"]
    assert_as_files(scenes, cache)
    decoded.clear()
    assert_as_files(scenes, open_cache(scenes, [folder]))
    assert len(decoded) == 12  # by the comparison


def test_the_time_alone_tells_and_so_does_the_size(tmp_path):
    folder, scenes = pairs(tmp_path)
    cache = open_cache(scenes, [folder])
    file = folder / "1.png"
    found = os.stat(file)
    halves = [*scenes[1].rainy, scenes[1].clean]
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    assert cache.get(halves) is None
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert cache.get(halves) is not None
    file.write_bytes(file.read_bytes() + b" ")
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert cache.get(halves) is None


def test_a_file_that_changes_while_it_is_decoded_is_decoded_anew(tmp_path, monkeypatch):
    folder, scenes = pairs(tmp_path)

    def changed_at_once(path):
        image = read_image(path)
        if path.name == "2.png":
            replace(path, np.hstack([photograph(70), photograph(71)]))
        return image

    with monkeypatch.context() as patch:
        patch.setattr(caching, "read_image", changed_at_once)
        cache = open_cache(scenes, [folder])
    assert cache.get([scenes[2].clean]) is None
    assert np.array_equal(read_scene(scenes[2], cache)[1], photograph(70))


def test_a_data_folder_that_is_moved_keeps_its_cache(tmp_path, decoded):
    folder, scenes = pairs(tmp_path)
    open_cache(scenes, [folder])
    moved = folder.rename(tmp_path / "moved")
    decoded.clear()
    scenes = find_training([moved], ["left"])
    cache = open_cache(scenes, [moved])
    assert not decoded
    assert_as_files(scenes, cache)


# --- bad files ---


def cut(file):
    file.write_bytes(file.read_bytes()[:-40])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("when", ["before", "after"])
def test_bad_files_are_reported_and_left_out_as_without_a_cache(tmp_path, workers, when):
    folder, scenes = pairs(tmp_path, suffix=".jpg")
    other = write_scenes(tmp_path / "scenes", 3)
    scenes += find_training([other])
    if when == "after":
        cache = open_cache(scenes, [folder, other])
    cut(folder / "2.jpg")
    (other / "DID-MDN-training" / "Rain_Light" / "train2018new" / "1.png").unlink()
    write_image(folder / "4.jpg", photograph(4, 24, 31))  # an odd width, side by side
    if when == "before":
        cache = open_cache(scenes, [folder, other])
    expected = batches(scenes, 12)
    found = batches(scenes, 12, workers, cache=cache)
    for a, b in zip(found, expected, strict=True):
        assert_same(a._replace(bad=[])._asdict(), b._replace(bad=[])._asdict())
    assert {bad for b in found for bad in b.bad} == {bad for b in expected for bad in b.bad}
    assert len({bad for b in found for bad in b.bad}) == 3
    bad, same = [], []
    list(dataset.full_images(scenes, bad, cache))
    list(dataset.full_images(scenes, same))
    assert bad == same


def test_sizes_that_differ_are_reported_as_without_a_cache(tmp_path):
    root = write_scenes(tmp_path, 3)
    scenes = find_training([root])
    write_image(Path(scenes[1].files[1]), np.hstack([photograph(1, 24, 30), photograph(1, 24, 30)]))
    with pytest.raises(UserError) as expected:
        read_scene(scenes[1])
    cache = open_cache(scenes, [root])
    with pytest.raises(UserError) as found:
        read_scene(scenes[1], cache)
    assert str(found.value) == str(expected.value)


def test_a_bad_file_does_not_have_the_cache_made_anew_each_time_until_it_is_mended(tmp_path, decoded):
    folder, scenes = pairs(tmp_path)
    whole = (folder / "2.png").read_bytes()
    cut(folder / "2.png")
    open_cache(scenes, [folder])
    file = kept_file(folder).stat().st_ino
    decoded.clear()
    cache = open_cache(scenes, [folder])
    assert not decoded and kept_file(folder).stat().st_ino == file
    (folder / "2.png").write_bytes(whole)
    assert np.array_equal(read_scene(scenes[2], cache)[1], photograph(2))
    assert_as_files(scenes, open_cache(scenes, [folder]))


def test_a_file_that_is_gone_does_not_have_the_cache_made_anew_each_time(tmp_path):
    """As of a resumed run, which keeps the scenes that it was begun with."""
    folder, scenes = pairs(tmp_path)
    (folder / "2.png").unlink()
    open_cache(scenes, [folder])
    file = kept_file(folder).stat().st_ino, kept_file(folder).stat().st_mtime_ns
    cache = open_cache(scenes, [folder])
    assert (kept_file(folder).stat().st_ino, kept_file(folder).stat().st_mtime_ns) == file
    assert cache.get([scenes[2].clean]) is None and cache.get([scenes[3].clean]) is not None


# --- a cache file that is damaged, half written, or another's ---


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("a cache\n" * 20),
    "cut by a byte": lambda file: os.truncate(file, file.stat().st_size - 1),
    "cut in the index": lambda file: os.truncate(file, file.stat().st_size - 100),
    "cut in the pixels": lambda file: os.truncate(file, 5000),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "bytes lost inside": lambda file: file.write_bytes(file.read_bytes()[:3000] + file.read_bytes()[3100:]),
    "a pixel": lambda file: flip(file, 5000),
    "the index": lambda file: flip(file, -200),
    "the tail": lambda file: flip(file, -44),
    "a beginning far away": lambda file: flip(file, -38),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_made_anew(tmp_path, damage, decoded, capsys):
    folder, scenes = pairs(tmp_path)
    open_cache(scenes, [folder])
    expected = kept_file(folder).read_bytes()[: 12 * photograph(0).nbytes]
    DAMAGES[damage](kept_file(folder))
    decoded.clear()
    capsys.readouterr()
    cache = open_cache(scenes, [folder])
    assert sorted(decoded) == (["1.png"] if damage == "a pixel" else [f"{i}.png" for i in range(6)])
    assert str(kept_file(folder)) in capsys.readouterr().out
    assert_as_files(scenes, cache)
    assert kept_file(folder).read_bytes()[: len(expected)] == expected
    decoded.clear()
    open_cache(scenes, [folder])
    assert not decoded


def test_what_another_version_of_a_decoder_wrote_is_made_anew(tmp_path, decoded, monkeypatch):
    folder, scenes = pairs(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(caching, "_WRITER", bytes(16))
        open_cache(scenes, [folder])
    decoded.clear()
    open_cache(scenes, [folder])
    assert len(decoded) == 6


def imported_anew():
    spec = importlib.util.spec_from_file_location("another", caching.__file__)
    another = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(another)
    return another


@pytest.mark.parametrize("decoder", [cv2, PIL])
def test_the_decoders_versions_are_in_the_cache(monkeypatch, decoder):
    monkeypatch.setattr(decoder, "__version__", "0.1")
    assert imported_anew()._WRITER != caching._WRITER


def test_it_is_imported_where_the_system_forbids_md5_for_security(monkeypatch):
    """As in FIPS mode. The scripts import it, whether or not --cache is given."""

    def md5(data, usedforsecurity=True, of=hashlib.md5):
        assert not usedforsecurity, "unsupported"
        return of(data)

    monkeypatch.setattr(hashlib, "md5", md5)
    assert imported_anew()._WRITER == caching._WRITER


def test_a_file_that_took_the_place_of_the_cache_is_not_taken_for_it(tmp_path, decoded):
    """A worker that maps it late, as where they are spawned, would find other pictures at its offsets."""
    folder, scenes = pairs(tmp_path)
    cache = open_cache(scenes, [folder])
    late = pickle.dumps(cache)
    early = pickle.loads(late)
    assert_as_files(scenes, early)
    replace(folder / "0.png", np.hstack([photograph(50, 30, 30), photograph(51, 30, 30)]))
    open_cache(find_training([folder], ["left"]), [folder])
    for each in (early, pickle.loads(late)):
        for scene in scenes:
            assert np.array_equal(read_scene(scene, each)[1], read_scene(scene)[1])
    assert early.get([scenes[3].clean]) is not None  # what it has mapped stays
    assert pickle.loads(late).get([scenes[3].clean]) is None
    kept_file(folder).unlink()
    assert pickle.loads(late).get([scenes[3].clean]) is None


def build(folder, pause=0.0, at_the_end=None):
    """Another process that makes the cache of a folder of pairs; at_the_end() comes before it is renamed."""

    def target():
        caching.read_image = lambda path: time.sleep(pause) or read_image(path)
        os.fsync = at_the_end or os.fsync
        with open(folder.with_suffix(f".{os.getpid()}"), "w") as said, contextlib.redirect_stdout(said):
            open_cache(find_training([folder], ["left"]), [folder])

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    return process


def die(_):
    os.kill(os.getpid(), signal.SIGKILL)


def end(process):
    process.join()
    return process.exitcode


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def unfinished(folder):
    return [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("there_was_one", [False, True])
def test_killed_in_mid_write_it_leaves_the_old_cache_or_none(tmp_path, there_was_one, decoded):
    folder, scenes = pairs(tmp_path)
    if there_was_one:
        open_cache(scenes, [folder])
        replace(folder / "5.png", np.hstack([photograph(70), photograph(71)]))
        before = kept_file(folder).read_bytes()
    killed = build(folder, at_the_end=die)
    assert end(killed) == -signal.SIGKILL
    (half,) = unfinished(folder)
    assert half.stat().st_size > 0
    if there_was_one:
        assert kept_file(folder).read_bytes() == before
    else:
        assert not kept_file(folder).exists()
    decoded.clear()
    cache = open_cache(scenes, [folder])
    assert sorted(decoded) == (["5.png"] if there_was_one else [f"{i}.png" for i in range(6)])
    assert_as_files(scenes, cache)
    assert not unfinished(folder)


def test_of_two_processes_one_writes_and_the_other_waits_for_it(tmp_path, decoded, capsys):
    folder, scenes = pairs(tmp_path)
    other = build(folder, pause=1.0)
    wait_for(lambda: unfinished(folder))
    cache = open_cache(scenes, [folder])
    assert end(other) == 0
    assert not decoded and not unfinished(folder)
    assert "waiting for another run, which is writing " in capsys.readouterr().out
    assert_as_files(scenes, cache)


def test_any_rank_may_be_the_one_that_decodes_and_shows_how_far_it_is(tmp_path, monkeypatch):
    shown = terminal(monkeypatch)
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    folder, scenes = pairs(tmp_path)
    open_cache(scenes, [folder])
    assert "decoding once:" in shown.getvalue()


def test_where_the_other_process_dies_the_one_that_waits_writes(tmp_path, decoded):
    folder, scenes = pairs(tmp_path)
    other = build(folder, at_the_end=lambda _: time.sleep(1) or die(_))
    wait_for(lambda: unfinished(folder))
    cache = open_cache(scenes, [folder])
    assert end(other) == -signal.SIGKILL
    assert len(decoded) == 6 and not unfinished(folder)
    assert_as_files(scenes, cache)


def test_many_processes_at_once_make_one_whole_cache(tmp_path, decoded):
    folder, scenes = pairs(tmp_path)
    others = [build(folder, pause=0.05) for _ in range(4)]
    assert [end(other) for other in others] == 4 * [0]
    said = [folder.with_suffix(f".{other.pid}").read_text() for other in others]
    assert sum("pictures are decoded into" in text for text in said) == 1
    assert_as_files(scenes, open_cache(scenes, [folder]))
    assert not unfinished(folder)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=lambda n: n.name
)
def test_a_signal_leaves_nothing_and_is_one_line(tmp_path, number):
    folder, _ = pairs(tmp_path)
    genotypes.write_json(random_genotype(0), tmp_path / "genotype.json")
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import train_model_batch
from support import cache, command
def read_image(path):
    open("begun", "w").close()
    time.sleep(0.5)
cache.read_image = read_image
command.run(train_model_batch.main, train_model_batch.get_args_parser())
"""
    flags = "--data pairs --clean_side left --arch genotype.json --channels 2 2 2 2 --device cpu --cache"
    run = subprocess.Popen(
        [sys.executable, "-c", code, *flags.split()],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    # Sooner, a signal may meet tqdm's bar half made, which prints lines.
    wait_for((tmp_path / "begun").exists)
    assert unfinished(folder)
    run.send_signal(number)
    error = run.communicate()[1]
    assert error.count("\n") == 1, error
    line = error.rstrip("\n")
    assert run.returncode == 130
    assert line == (
        "train_model_batch.py: stopped while decoding; cache files that were not finished are gone"
    )
    assert sorted(path.name for path in folder.iterdir()) == [f"{i}.png" for i in range(6)]
    assert not list(tmp_path.glob("eval-EXP*"))


# --- the disk ---


def test_a_disk_without_room_is_said_before_anything_is_decoded(tmp_path, decoded, monkeypatch):
    folder, scenes = pairs(tmp_path)
    other = write_scenes(tmp_path / "scenes", 3)
    scenes += find_training([other])
    needed = (6 * 2 + 3 * 4) * photograph(0).nbytes
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(UserError) as error:
        open_cache(scenes, [folder, other])
    assert f"--cache: {needed:,} bytes are needed in {folder}, but {needed - 1:,} are free" in str(
        error.value
    )
    assert not decoded and not unfinished(folder) and not kept_file(folder).exists()
    left = folder / ".decoded.cache.unfinished"
    left.write_bytes(bytes(1000))  # by a run that was killed, and to be written over
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1000))
    assert_as_files(scenes, open_cache(scenes, [folder, other]))
    replace(folder / "5.png", np.hstack([photograph(70), photograph(71)]))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    with pytest.raises(UserError, match=r"removing .*pairs/decoded\.cache \([\d,]+ bytes, out of date\)"):
        open_cache(scenes, [folder, other])


def test_a_disk_that_is_full_in_mid_write_is_one_line_and_leaves_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    folder, scenes = pairs(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(
            UserError, match=r"decoded\.cache: cannot be written: File too large; .*--cache DIR"
        ):
            open_cache(scenes, [folder])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in folder.iterdir()) == [f"{i}.png" for i in range(6)]


@pytest.fixture
def public():
    """A folder that other users can enter, and whose files they can read."""
    before = os.umask(0o022)
    try:
        with tempfile.TemporaryDirectory() as name:
            if not all(parent.stat().st_mode & 0o001 for parent in Path(name).resolve().parents):
                pytest.skip("no other user can enter TMPDIR")
            os.chmod(name, 0o755)
            yield Path(name)
    finally:
        os.umask(before)


def as_nobody(folder, sender):
    if os.geteuid() == 0:  # whom no folder stops
        os.setuid(65534)
    scenes = find_training([folder], ["left"])
    try:
        cache = open_cache(scenes, [folder])
        sender.send("whole" if cache.get([scenes[0].clean]) else "empty")
    except UserError as error:
        sender.send(str(error))


def test_a_read_only_folder_is_named_with_the_way_out_and_its_cache_is_used(public):
    folder = write_pairs(public / "pairs", 4)
    scenes = find_training([folder], ["left"])

    def answer():
        folder.chmod(0o555)
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=as_nobody, args=(folder, sender))
        process.start()
        sender.close()  # or recv() would wait for ever, should that process fail
        process.join()
        folder.chmod(0o755)
        return receiver.recv()

    said = answer()
    assert said.startswith(f"{kept_file(folder)}: cannot be written: Permission denied; give --cache DIR, ")
    open_cache(scenes, [folder])
    kept_file(folder).chmod(0o644)
    assert answer() == "whole"


def test_a_folder_for_the_caches_leaves_the_data_alone(tmp_path, monkeypatch, decoded):
    folder, scenes = pairs(tmp_path)
    other = write_pairs(tmp_path / "more" / "pairs", 2, first=50)
    scenes += find_training([other], ["left"])
    place = tmp_path / "new" / "folder"
    assert_as_files(scenes, open_cache(scenes, [folder, other], str(place)))
    assert len(list(place.iterdir())) == 2
    assert not kept_file(folder).exists() and not kept_file(other).exists()
    monkeypatch.chdir(tmp_path)
    decoded.clear()
    relative = find_training(["pairs"], ["left"])
    assert open_cache(relative, ["pairs"], "new/folder").get([relative[0].clean]) is not None
    assert not decoded
    with pytest.raises(UserError, match="cannot be read: Not a directory; give --cache DIR, another folder"):
        open_cache(scenes[:6], [folder], str(folder / "0.png"))


# --- what it costs ---


def bytes_read():
    """From the disk, by this process."""
    return int(re.search(r"\nread_bytes: (\d+)", Path("/proc/self/io").read_text())[1])


def test_pixels_are_mapped_not_held_and_not_sent_to_workers(tmp_path):
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("memory is looked up in /proc")
    for i in range(8):
        write_image(tmp_path / f"{i}.bmp", np.hstack([photograph(i, 1024, 1024)] * 2))
    scenes = find_training([tmp_path], ["left"])
    open_cache(scenes, [tmp_path])

    def own():
        return int(re.search(r"RssAnon:\s+(\d+) kB", status.read_text())[1]) * 1024

    before = own()
    cache = open_cache(scenes, [tmp_path])
    assert len(pickle.dumps(cache)) < 10_000
    whole = sum(kept.bytes() for kept in cache.kept.values())
    assert whole == 16 * 3 * 1024**2
    with open(kept_file(tmp_path), "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    read = bytes_read()
    batches(scenes, 5, cache=cache)
    assert bytes_read() - read < whole / 8  # a crop reads its own rows
    assert len(pickle.dumps(cache)) < 10_000  # now that it is mapped
    assert own() - before < whole / 4
    assert all(not image.flags.owndata for image in cache.get([scenes[0].clean]))
