"""Scores on the validation part."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dataset
import support.restore
import support.validation
from losses import ssim
from support.images import read_image, write_image
from support.layouts import DENSITIES
from support.metrics import mean_scores, score
from support.restore import restore
from support.validation import means, measure
from tests.made import photograph, rain_on, terminal, write_pairs, write_scenes


class Restoring(nn.Module):
    """Something that is better than nothing and leaves [0, 1]."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(1.2 * x - 0.15)


def test_a_terminal_shows_how_far_the_scoring_is(tmp_path, monkeypatch):
    shown = terminal(monkeypatch)
    scenes = dataset.find(write_pairs(tmp_path / "set", 3), "left").scenes
    measure(Restoring().eval(), scenes, torch.device("cpu"))
    assert "validation:   0%|          | 0/3" in shown.getvalue()


def test_large_pictures_go_through_in_tiles_as_they_do_in_test_view(folder, monkeypatch):
    for name, limit in (("WHOLE_PIXELS", 9000), ("TILE_PIXELS", 9000), ("SHORTEST_CUT", 64)):
        monkeypatch.setattr(support.restore, name, limit)
    monkeypatch.setattr(support.validation, "WHOLE_PIXELS", 9000)
    write_pairs(Path("pairs"), 1, "right")
    write_image("large/0.png", np.hstack([photograph(1, 150, 130), photograph(0, 150, 130)]))
    scenes = [scene for name in ("pairs", "large") for scene in dataset.find(name, "right").scenes]
    seen = []

    class Watched(Restoring):
        def forward(self, x):
            seen.append(tuple(x.shape[2:]))
            return super().forward(x)

    net = Watched().eval()
    measured, _ = measure(net, scenes, torch.device("cpu"))
    assert max(height * width for height, width in seen) <= 9000 < 150 * 130
    rainy, clean = dataset.read_scene(scenes[1])
    expected = score(restore(net, rainy[0]), clean)
    psnr, similarity, loss = measured[1]
    assert psnr.item() == pytest.approx(expected["psnr_rgb"], abs=1e-4)
    assert similarity.item() == pytest.approx(expected["ssim_rgb"], abs=1e-4)
    assert loss.item() == pytest.approx(1 - similarity.item() + 10 ** (-psnr.item() / 10), abs=1e-4)


def test_the_densities_of_a_scene_go_through_together_unless_they_are_too_large(folder, monkeypatch):
    write_scenes(Path("set"), 1)  # of three densities
    scenes = dataset.find("set/DID-MDN-training").scenes
    seen = []

    class Watched(Restoring):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    net = Watched().eval()
    (together,), _ = measure(net, scenes, torch.device("cpu"))
    rainy, _ = dataset.read_scene(scenes[0])
    height, width = rainy[0].shape[:2]
    monkeypatch.setattr(support.validation, "WHOLE_PIXELS", 3 * height * width - 1)
    (apart,), _ = measure(net, scenes, torch.device("cpu"))
    assert seen == [3, 1, 1, 1]
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError("CUDA error: out of memory")])
def test_out_of_gpu_memory_a_scene_goes_picture_by_picture_and_those_in_tiles(folder, error):
    write_image("pairs/0.png", np.hstack([photograph(1, 150, 130), photograph(0, 150, 130)]))
    (scene,) = dataset.find("pairs", "right").scenes
    scene = scene._replace(rainy=scene.rainy * 2, densities=("Heavy", "Light"))

    class Large(Restoring):
        def forward(self, x):
            if x[:, 0].numel() > 100 * 100:
                raise error
            return super().forward(x)

    (found,), _ = measure(Large().eval(), [scene], torch.device("cpu"))
    rainy, clean = dataset.read_scene(scene)
    expected = score(restore(Restoring().eval(), rainy[0], tile=80), clean)
    assert found[0].tolist() == pytest.approx(2 * [expected["psnr_rgb"]], abs=1e-3)
    assert found[1].tolist() == pytest.approx(2 * [expected["ssim_rgb"]], abs=1e-4)


def test_what_is_not_finite_has_no_score_and_ends_no_run_whatever_the_size(folder, monkeypatch):
    """And half precision is that of the training, in tiles too."""
    kinds, autocast = [], torch.autocast

    def noted(device, dtype=None, enabled=True):
        kinds.append((dtype, enabled))
        return autocast(device, dtype, enabled)

    for module in (support.restore, support.validation):
        monkeypatch.setattr(module, "WHOLE_PIXELS", 9000)
    write_pairs(Path("pairs"), 1, "right")
    write_image("large/0.png", np.hstack([photograph(1, 150, 130), photograph(0, 150, 130)]))
    scenes = [scene for name in ("pairs", "large") for scene in dataset.find(name, "right").scenes]
    net = Restoring().eval()
    torch.nn.init.constant_(net.norm.bias, torch.nan)
    monkeypatch.setattr(torch, "autocast", noted)
    measured, _ = measure(net, scenes, torch.device("cpu"), amp=True)
    assert all(value.isnan().all() for of_scene in measured for value in of_scene)
    ssims = None, False
    assert set(kinds) == {(torch.bfloat16, True), ssims} and len(measured) == 2


def test_validation_agrees_with_the_scores_of_saved_pictures(folder):
    for i in range(2):
        clean = photograph(i, 37, 50)
        for density in DENSITIES:
            picture = np.hstack([rain_on(clean, i), clean])
            write_image(Path("set", f"Rain_{density}", f"{i}.png"), picture)
    write_pairs(Path("pairs"), 1, "right")
    scenes = [*dataset.find("set").scenes, *dataset.find("pairs", "right").scenes]
    net = Restoring().train()
    measured, (rainy, restored, clean) = measure(net, scenes, torch.device("cpu"))
    found = means(measured)
    assert net.training
    assert net.norm.num_batches_tracked == 0

    net.eval()
    rows, losses = [], []
    for scene in scenes:
        pictures, target = dataset.read_scene(scene)
        loss = 0
        for picture in pictures:
            output = net(dataset.to_tensor(picture[None])).detach()
            assert output.min() < 0 and output.max() > 1
            write_image("out.png", (output[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
            rows.append(score(read_image("out.png"), target))
            aim = dataset.to_tensor(target[None])
            loss += ((output - aim) ** 2).mean() + 1 - ssim(output, aim)[0]
            if len(rows) == 1:
                first = read_image("out.png")
        losses.append(loss.item())
    expected = mean_scores(rows)
    assert len(rows) == 7
    assert found["psnr"] == pytest.approx(expected["psnr_rgb"], abs=1e-3)
    assert found["ssim"] == pytest.approx(expected["ssim_rgb"], abs=1e-4)
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    pictures, target = dataset.read_scene(scenes[0])
    assert torch.equal(rainy, dataset.to_tensor(pictures[0][None])[0])
    assert torch.equal(clean, dataset.to_tensor(target[None])[0])
    assert np.array_equal((restored * 255).round().byte().permute(1, 2, 0).numpy(), first)


def test_the_psnr_of_a_picture_without_any_error_is_100_db(folder):
    write_image("pairs/0.png", np.hstack([photograph(0), photograph(0)]))
    scenes = dataset.find("pairs", "right").scenes
    measured, _ = measure(nn.Identity().eval(), scenes, torch.device("cpu"))
    assert means(measured) == pytest.approx({"psnr": 100, "ssim": 1, "loss": 0}, abs=1e-5)
