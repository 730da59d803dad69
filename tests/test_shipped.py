"""The networks that ship in eval-EXP: that they are there, small, and do what their card says."""

import os
import shutil
import subprocess
import sys
import textwrap
from functools import cache
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest
import torch

import dataset
import genotypes
import model_train
import test_view
from support.fast import for_inference
from support.images import read_image, write_image
from support.metrics import score
from support.rain import demo_set
from support.restore import restore
from tests.made import photograph, rain_on, write_pairs

ROOT = test_view.SHIPPED.parents[1]
NAMES = ["derain.pt", "derain_light.pt"]
SAMPLE = Path(__file__).parents[2] / "shared" / "data" / "did-mdn-sample" / "DID-MDN-training"


@cache
def fast(name):
    """A shipped network as test_view.py runs it."""
    return for_inference(model_train.load(test_view.SHIPPED.with_name(name)))


def gains(name, scenes, part=...):
    """{density: mean PSNR gain over the input in dB}; part: rows and columns of each picture."""
    found = {}
    for scene in scenes:
        rainy, clean = dataset.read_scene(scene)
        for density, image in zip(scene.densities or ["all"], rainy, strict=True):
            restored, untouched = (
                score(x, clean[part])["psnr_rgb"] for x in (restore(fast(name), image[part]), image[part])
            )
            found.setdefault(density, []).append(restored - untouched)
    return {density: np.mean(values) for density, values in found.items()}


def lines_after(text):
    """The first code in the README after `text`, which begins a paragraph."""
    paragraphs = (ROOT / "README.md").read_text(encoding="utf-8").split(f"\n\n{text}")[1].split("\n\n")
    lines = takewhile(lambda paragraph: paragraph.startswith("    "), paragraphs[1:])
    return textwrap.dedent("\n\n".join(lines))


def test_the_lines_of_python_in_the_readme_restore_a_picture(tmp_path, monkeypatch):
    write_image(tmp_path / "photo.jpg", rain_on(photograph(0, 48, 64), 0))
    (tmp_path / "eval-EXP").symlink_to(test_view.SHIPPED.parent.resolve())
    monkeypatch.chdir(tmp_path)
    exec(lines_after("From Python").replace('"cuda"', '"cpu"'), {})
    expected = restore(model_train.load("eval-EXP/derain.pt"), read_image("photo.jpg"))
    assert np.array_equal(read_image("restored.png"), expected)


def test_the_loop_in_the_readme_computes_a_loss_on_all_scenes_but_those_that_validate(tmp_path, monkeypatch):
    write_pairs(tmp_path / "my_pairs", 40, clean_side="left")
    monkeypatch.chdir(tmp_path)
    lines = lines_after("and for a training loop")
    found = {}
    exec(f"{lines}\n    break", found)
    parts = dataset.split(dataset.find_training(["my_pairs"], ["left"]), 0)
    assert len(found["scenes"]) == 40 - len(parts["validation"])
    assert torch.isfinite(found["loss"]) and found["loss"].requires_grad


@pytest.mark.parametrize("name, megabytes", [*zip(NAMES, (20, 8), strict=True)])
def test_it_fits_a_git_repository_and_its_genotype_is_named(name, megabytes):
    path = test_view.SHIPPED.with_name(name)
    assert path.stat().st_size < megabytes * 1e6
    assert model_train.load(path).genotype in genotypes.named().values()


@pytest.mark.parametrize("name", NAMES)
def test_it_helps_on_the_demo(name, tmp_path):
    demo_set(tmp_path / "demo")
    scenes = dataset.find(tmp_path / "demo" / "DID-MDN-test").scenes
    assert len(scenes) == 6
    assert gains(name, scenes)["all"] > 7


@pytest.mark.parametrize("name", NAMES)
def test_it_leaves_dry_photographs_alone(name, tmp_path):
    """All of the demo's but `grass`, whose stalks it takes for rain, as the card says."""
    scenes = dataset.find(demo_set(tmp_path / "demo") / "DID-MDN-training").scenes
    dry = {scene.name: dataset.read_scene(scene)[1] for scene in scenes if "grass" not in scene.name}
    assert len(dry) == 12
    psnrs = {file: score(restore(fast(name), image), image)["psnr_rgb"] for file, image in dry.items()}
    assert min(psnrs.values()) > 38, psnrs


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="needs ../shared/data/did-mdn-sample")
@pytest.mark.parametrize("name", NAMES)
def test_it_beats_the_input_on_each_density_of_the_did_mdn_sample(name):
    found = gains(name, dataset.find(SAMPLE).scenes, part=np.s_[64:448, 64:448])
    assert list(found) == ["Heavy", "Medium", "Light"]
    assert all(gain > 0 for gain in found.values()), found


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="needs ../shared/data/did-mdn-sample")
def test_half_precision_costs_no_quality():
    """On a CPU bfloat16, whose rounding moves a picture's PSNR by 0.02 dB at the most. A quarter of each, as
    some processors emulate it.
    """
    rainy, clean = dataset.read_scene(dataset.find(SAMPLE).scenes[0])
    middle = (slice(128, 384), slice(128, 384))

    def psnrs(amp):
        restored = [restore(fast("derain_light.pt"), image[middle], amp=amp) for image in rainy]
        return np.array([score(image, clean[middle])["psnr_rgb"] for image in restored])

    changes = psnrs(amp=True) - psnrs(amp=False)
    assert len(changes) == 3
    assert abs(changes.mean()) < 0.02, changes
    assert 0 < abs(changes).max() < 0.03, changes


@pytest.mark.slow
def test_the_cards_command_trains_from_photographs_and_goes_on(tmp_path):
    for name in ("support", "eval-EXP"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    named = (ROOT / "eval-EXP" / "photographs.txt").read_text().split()[-20:]
    for i, name in enumerate(named):  # flat, or in BSDS500's own folders; and one that is in a test set
        write_image(tmp_path / "bsds" / (name if i % 2 else name.replace("_", "/")), photograph(i, 64, 96))
    write_image(tmp_path / "bsds" / "train" / "1.jpg", photograph(0, 64, 96))
    write_pairs(tmp_path / "pairs", 20, suffix=".jpg", first=100)
    in_test_sets = ("460", "698")
    for name in in_test_sets:
        shutil.copy(tmp_path / "pairs" / "0.jpg", tmp_path / "pairs" / f"{name}.jpg")
    for number in (501, 600, 700):  # large enough to lend their rain
        clean = photograph(number, 64, 96)
        write_image(tmp_path / "pairs" / f"{number}.jpg", np.hstack([clean, rain_on(clean, number)]))
    command = ["sh", "eval-EXP/train.sh", "bsds", "pairs"]
    short = "--epochs 1 --steps_per_epoch 1 --val_scenes 1 --patch_size 16 --workers 0 --device cpu".split()

    half_made = tmp_path / "datasets" / "derain" / "making" / "DID-MDN-training"
    half_made.mkdir(parents=True)  # as left by a run that was stopped there
    (half_made / "left.jpg").write_bytes(b"half a picture")

    def run(*flags):
        return subprocess.run(
            [*command, *flags],
            cwd=tmp_path,
            env=os.environ | {"PYTHON": sys.executable},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    run(*short)
    runs = [path.parent.name for path in tmp_path.glob("*/summary.json")]
    runs.sort(key=lambda name: int(name.rpartition("-")[2]))
    assert runs == [f"eval-EXP-derain-{i}" for i in range(1, len(runs) + 1)]
    assert model_train.load(tmp_path / "eval-EXP-derain-23" / "derain_light.pt").channels == (16, 32, 64, 128)
    assert model_train.load(tmp_path / "eval-EXP-derain-19" / "derain.pt").channels == (32, 64, 128, 256)
    made = tmp_path / "datasets" / "derain"
    assert not [file for name in in_test_sets for file in made.rglob(f"{name}.*")]
    assert sorted(file.name for file in (made / "photographs").iterdir()) == sorted(named)
    assert not list((tmp_path / "datasets").rglob("left.jpg"))
    for flags in ((), short):
        (tmp_path / runs[-1] / "summary.json").unlink()
        assert run(*flags).count("is done") == len(runs) - 1
        assert (tmp_path / runs[-1] / "summary.json").exists()
