"""The network that ships in eval-EXP: that it is there, small, and does what its card says."""

from pathlib import Path

import numpy as np
import pytest

import dataset
import genotypes
import model_train
import test_view
from support.metrics import score
from support.rain import demo_set
from support.restore import restore

SAMPLE = Path(__file__).parents[2] / "shared" / "data" / "did-mdn-sample" / "DID-MDN-training"


@pytest.fixture(scope="module")
def net():
    return model_train.load(test_view.SHIPPED)


def gains(net, scenes):
    """{density: mean PSNR gain over the input in dB}."""
    found = {}
    for scene in scenes:
        rainy, clean = dataset.read_scene(scene)
        for density, image in zip(scene.densities or ["all"], rainy, strict=True):
            gain = score(restore(net, image), clean)["psnr_rgb"] - score(image, clean)["psnr_rgb"]
            found.setdefault(density, []).append(gain)
    return {density: np.mean(values) for density, values in found.items()}


def test_it_fits_a_git_repository_and_its_genotype_is_named(net):
    assert test_view.SHIPPED.stat().st_size < 20e6
    assert net.genotype in genotypes.named().values()


def test_it_helps_on_the_demo(net, tmp_path):
    demo_set(tmp_path / "demo")
    scenes = dataset.find(tmp_path / "demo" / "DID-MDN-test").scenes
    assert len(scenes) == 6
    assert gains(net, scenes)["all"] > 1


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="needs ../shared/data/did-mdn-sample")
def test_it_beats_the_input_on_each_density_of_the_did_mdn_sample(net):
    found = gains(net, dataset.find(SAMPLE).scenes)
    assert list(found) == ["Heavy", "Medium", "Light"]
    assert all(gain > 0 for gain in found.values()), found
