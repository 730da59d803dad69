"""Synthetic rain: its statistics and its files' layout are those of DID-MDN, and a seed repeats it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
from PIL import Image

import support.rain
from support.errors import UserError
from support.images import read_image, write_image
from support.layouts import DENSITIES
from support.rain import (
    STYLES,
    blend,
    borrow,
    borrow_scene,
    demo_set,
    draw_rain,
    find_photographs,
    get_args_parser,
    lay,
    main,
    make_scene,
    rain_layer,
    write_scenes,
)
from tests.made import ROOT, at_the_command_line

SHARED = ROOT.parent / "shared" / "data"
SAMPLE = SHARED / "did-mdn-sample" / "DID-MDN-training"


@pytest.fixture(scope="module")
def photograph():
    return skimage.data.coffee()


@pytest.fixture
def photographs(tmp_path):
    """A folder of three clean photographs, 100x64 pixels, with names that are not plain ASCII."""
    folder = tmp_path / "clean"
    for name, image in (("a b", skimage.data.coffee()), ("été", skimage.data.chelsea())):
        write_image(folder / f"{name}.png", image[100:164, 100:200])
    write_image(folder / "third.jpg", skimage.data.astronaut()[:64, :100])
    return folder


def run(*args):
    command = [sys.executable, "-m", "support.rain", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def layers(level, count=20, style="did-mdn"):
    return [rain_layer(160, 240, level, np.random.default_rng(seed), style) for seed in range(count)]


def layer_of(rainy, clean):
    """The layer a behind a rainy image, and where the clean one is dark enough to tell."""
    a = (rainy / 255.0 - clean / 255.0) / np.maximum(1 - clean / 255.0, 0.1)
    return a.mean(-1), clean.max(-1) < 190


def autocorrelation(a, known):
    """Of a over its known pixels; [8, -3] is that with a moved by 8 rows down and 3 columns left."""

    def products(x):
        size = [2 * n for n in x.shape]
        return np.fft.irfft2(np.abs(np.fft.rfft2(x, size)) ** 2, size)

    centred = np.where(known, a - a[known].mean(), 0)
    return products(centred) / np.maximum(products(known.astype(float)), 1) / a[known].var()


# --- the rain -----------------------------------------------------------------------------------------------


def test_blend_is_a_screen_blend():
    clean = np.array([[[0, 100, 255], [200, 51, 7]]], np.uint8)
    layer = np.array([[0.5, 0.1]], np.float32)
    # By hand, B + a (255 - B): 127.5 -> 128 (to even), 177.5 -> 178 (to even), 255; 205.5 -> 206, 71.4, 31.8
    assert blend(clean, layer).tolist() == [[[128, 178, 255], [206, 71, 32]]]
    assert np.array_equal(blend(clean, np.zeros((1, 2), np.float32)), clean)


@pytest.mark.parametrize("style", [*STYLES, "mixed"])
def test_layer_is_grey_bounded_and_repeatable(style):
    for level in DENSITIES:
        layer = rain_layer(50, 70, level, np.random.default_rng(1), style)
        assert layer.shape == (50, 70) and layer.dtype == np.float32
        assert layer.min() >= 0 and layer.max() <= 1 and layer.std() > 0.005
        assert np.array_equal(layer, rain_layer(50, 70, level, np.random.default_rng(1), style))


@pytest.mark.parametrize(
    ("level", "mean", "tenth", "ninetieth"),
    [
        ("Heavy", (0.21, 0.27), (0.07, 0.13), (0.36, 0.46)),
        ("Medium", (0.12, 0.15), (0.01, 0.06), (0.20, 0.27)),
        ("Light", (0.03, 0.06), (0.00, 0.02), (0.07, 0.13)),
    ],
)
def test_layer_statistics_are_those_of_did_mdn(level, mean, tenth, ninetieth):
    many = np.stack(layers(level))
    assert mean[0] < many.mean() < mean[1]
    assert tenth[0] <= np.median(np.percentile(many, 10, axis=(1, 2))) < tenth[1]
    assert ninetieth[0] < np.median(np.percentile(many, 90, axis=(1, 2))) < ninetieth[1]
    # Scenes differ, and no less than the samples of DID-MDN do.
    assert many.mean((1, 2)).std() > 0.07 * many.mean()


def test_psnr_ranges_over_a_photograph(photograph):
    psnr = {level: [] for level in DENSITIES}
    for seed in range(15):
        for level, rainy in make_scene(photograph, seed).items():
            psnr[level].append(cv2.PSNR(photograph, rainy))
    medians = [np.median(psnr[level]) for level in DENSITIES]
    for median, (low, high) in zip(medians, [(13, 18), (18, 23), (26, 32)], strict=True):
        assert low < median < high


@pytest.mark.parametrize("style", STYLES)
def test_levels_are_ordered_in_every_scene(style):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        rain = draw_rain(rng, style)
        heavy, medium, light = (rain_layer(240, 320, level, rng, rain).mean() for level in DENSITIES)
        assert heavy > medium > light > 0


def test_half_of_mixed_scenes_are_did_mdns_and_one_in_ten_is_veiled():
    drawn = [draw_rain(np.random.default_rng(seed), "mixed") for seed in range(400)]
    assert 0.42 < np.mean([rain.near == 0 for rain in drawn]) < 0.58
    assert 0.05 < np.mean([rain.veil["Heavy"] > 0 for rain in drawn]) < 0.15


def test_what_a_scene_draws_stays_within_its_style():
    mid = STYLES["long"]
    drawn = [draw_rain(np.random.default_rng(seed), "long") for seed in range(1000)]
    # Both factors are bounded by two deviations; the bounds are rounded as what is drawn is.
    least, most = (
        mid.density / float(np.exp(0.7 * mid.spread * -two)) * float(np.exp(2.5 * mid.spread * two))
        for two in (-2.0, 2.0)
    )
    assert all(least <= rain.density <= most for rain in drawn)


def plain_rain(near):
    """Of a mean and contrast with which nothing is cut off, and without a veil."""
    rain = draw_rain(np.random.default_rng(0), "long")
    level = dict.fromkeys(DENSITIES, 0.0)
    mean, contrast = level | {"Heavy": 0.5}, level | {"Heavy": 0.1}
    return rain._replace(mean=mean, contrast=contrast, veil=level, angle=40.0, density=1.0, near=near)


def test_nearer_drops_leave_mean_and_contrast_as_they_are():
    layer = rain_layer(400, 600, "Heavy", np.random.default_rng(1), plain_rain(near=0.3))
    assert layer.mean() == pytest.approx(0.5, abs=0.005)
    assert layer.std() == pytest.approx(0.05, rel=0.1)


def test_nearer_drops_are_twice_as_long_and_wide_and_a_sixth_as_many():
    rain, rng = plain_rain(near=0.0), np.random.default_rng(1)
    rain_layer(60, 80, "Heavy", rng, rain)  # the others, drawn first
    lean, size = rain.angle + rng.normal(0, 1.5), {"length": 2 * rain.length, "width": 2 * rain.width}
    nearer = rain_layer(60, 80, "Heavy", rng, rain._replace(**size, angle=lean, density=rain.density / 6))
    found = rain_layer(60, 80, "Heavy", np.random.default_rng(1), rain._replace(near=1.0))
    np.testing.assert_allclose(found, nearer, atol=1e-6)


def test_across_a_streak_is_the_cubic_kernel_found_in_did_mdn():
    kernel = support.rain._kernel(15.5, 1.55, 0)
    across = kernel[len(kernel) // 2, len(kernel) // 2 :] / kernel.max()
    assert across[:5] == pytest.approx([1, 0.38881, -0.09943, -0.00265, 0], abs=1e-5)


@pytest.mark.parametrize("style", STYLES)
def test_direction_is_bounded(style):
    angles = [draw_rain(np.random.default_rng(seed), style).angle for seed in range(200)]
    limit = STYLES[style].angle
    assert -limit <= min(angles) < -0.9 * limit and 0.9 * limit < max(angles) <= limit
    assert STYLES["did-mdn"].angle == 30


def test_largest_angle_is_given_and_changes_nothing_else(photograph):
    for seed in range(100):
        own = draw_rain(np.random.default_rng(seed), "mixed")
        given = draw_rain(np.random.default_rng(seed), "mixed", 75)
        assert own._replace(angle=given.angle) == given and abs(own.angle) <= 45
        assert given.angle / 75 in (pytest.approx(own.angle / 30), pytest.approx(own.angle / 45))
    seed = next(s for s in range(100) if abs(draw_rain(np.random.default_rng(s), angle=90).angle) > 80)
    own, given = (make_scene(photograph, seed, angle=angle)["Heavy"] for angle in (None, 90))
    for image, along in ((own, 0), (given, 1)):  # streaks are smooth along themselves
        layer, _ = layer_of(image, photograph)
        assert np.abs(np.diff(layer, axis=1 - along)).mean() > 1.5 * np.abs(np.diff(layer, axis=along)).mean()


def test_streaks_lie_along_the_angle():
    rain = draw_rain(np.random.default_rng(0))._replace(angle=20.0, length=15.5)
    layer = rain_layer(300, 300, "Heavy", np.random.default_rng(0), rain)
    moved = autocorrelation(layer, np.ones(layer.shape, bool))
    assert moved[8, 3] > 0.3 and abs(moved[8, -3]) < 0.1  # 3 = 8 tan 20 degrees
    assert abs(moved[0, 4]) < 0.1 and abs(moved[25, 9]) < 0.1  # fine and short


def test_densities_of_a_scene_have_their_own_streaks(photograph):
    scene = make_scene(photograph, 3)
    (heavy, known), (medium, _) = (layer_of(scene[level], photograph) for level in ("Heavy", "Medium"))
    assert abs(np.corrcoef(heavy[known], medium[known])[0, 1]) < 0.2


def test_scene_is_repeatable_and_seeds_differ(photograph):
    one, same, other = (make_scene(photograph, seed) for seed in (5, 5, 6))
    assert list(one) == list(DENSITIES)
    for level in DENSITIES:
        assert one[level].shape == photograph.shape and one[level].dtype == np.uint8
        assert (one[level] >= photograph).all()
        assert np.array_equal(one[level], same[level]) and not np.array_equal(one[level], other[level])


def test_unknown_style_and_level_are_refused():
    with pytest.raises(ValueError, match="did-mdn, sparse"):
        draw_rain(np.random.default_rng(0), "snow")
    with pytest.raises(ValueError, match="Heavy, Medium, Light"):
        rain_layer(8, 8, "heavy", np.random.default_rng(0))


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="needs ../shared/data/did-mdn-sample")
@pytest.mark.parametrize("level", DENSITIES)
def test_real_samples_could_have_been_drawn(level):
    """Mean, deviation, percentiles and autocorrelation of each real layer are well inside those drawn."""

    def describe(pair):
        a, known = layer_of(pair[:, :256], pair[:, 256:])
        along = autocorrelation(a, known)[[4, 8]].max(1)
        return np.array([a[known].mean(), a[known].std(), *np.percentile(a[known], [10, 50, 90, 99]), *along])

    for file in sorted((SAMPLE / f"Rain_{level}" / "train2018new").iterdir()):
        real = np.hstack(np.split(read_image(file)[:256], 4, axis=1)[::2])
        # The clean half has been through JPEG: moved by half a block, it is coded anew as the real one was.
        clean = np.roll(real[:, 256:], (4, 4), (0, 1))
        drawn = []
        for seed in range(10):
            pair = np.hstack([make_scene(clean, seed)[level], clean])
            code = cv2.imencode(".jpg", pair, [cv2.IMWRITE_JPEG_QUALITY, 75])[1]
            drawn.append(describe(cv2.imdecode(code, cv2.IMREAD_UNCHANGED)))
        deviations = (describe(real) - np.mean(drawn, 0)) / np.std(drawn, 0)
        assert np.abs(deviations).max() < 2, file


# --- rain of real pairs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lent():
    """(rainy, clean, its streaks) of rain that darkens and raises contrast, as 15 % of Rain800's does."""
    clean = skimage.data.astronaut()
    streaks = rain_layer(*clean.shape[:2], "Heavy", np.random.default_rng(0)) - 0.25
    return darkened(clean, streaks), clean, streaks


def darkened(clean, streaks):
    tone = 255 * (clean / 255.0) ** 1.5
    return np.rint(np.clip(tone + 200 * streaks[..., None], 0, 255)).astype(np.uint8)


def test_a_pairs_own_rain_laid_again_is_the_pair(lent):
    rainy, clean, _ = lent
    again = lay(clean, borrow(rainy, clean))
    assert cv2.PSNR(again, rainy) > 35 > 20 > cv2.PSNR(clean, rainy)


def test_moved_rain_changes_another_background_as_its_own(lent, photograph):
    rainy, clean, streaks = lent
    rain, photograph = borrow(rainy, clean), photograph[:, : clean.shape[1]]
    height = len(photograph)
    moved = lay(photograph, rain._replace(streaks=rain.streaks[:height]))
    made = darkened(photograph, streaks[:height])
    assert moved.mean() < photograph.mean() - 20
    assert cv2.PSNR(moved, made) > 30 and cv2.PSNR(photograph, made) < 18


def test_a_scene_has_the_rain_of_three_pairs_and_its_background_whole(lent, photograph):
    rainy, clean, _ = lent
    lenders = [borrow(rainy, clean)]
    for level in ("Light", "Medium"):
        layer = rain_layer(*clean.shape[:2], level, np.random.default_rng(1))
        lenders.append(borrow(blend(clean, layer), clean))

    def scene_of(seed):
        return borrow_scene(photograph, np.random.default_rng(seed), lenders)

    scene = scene_of(3)  # wider than the lenders' 512 pixels
    assert tuple(scene) == DENSITIES and {image.shape for image in scene.values()} == {photograph.shape}
    changes = {level: image.astype(float) - photograph for level, image in scene.items()}
    sizes = [np.abs(change).mean() for change in changes.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert changes["Heavy"].mean() < -20 and changes["Light"].mean() > 0
    again, other = scene_of(3), scene_of(4)
    assert all(np.array_equal(scene[level], again[level]) for level in DENSITIES)
    assert not np.array_equal(scene["Heavy"], other["Heavy"])


def test_tones_that_the_rain_leaves_as_they_are_do_not_make_its_streaks_infinite(lent):
    _, clean, _ = lent
    rain = borrow(clean, clean)
    assert (rain.spread == 2).all() and not rain.streaks.any()


def test_a_pair_of_few_tones_lends_nothing(lent):
    rainy, clean, _ = lent
    assert borrow(rainy, clean // 2) is None


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_rain800s_darkening_rain_darkens_other_photographs_too(photograph):
    pair = read_image(SHARED / "rain800/training/538.jpg")
    half = pair.shape[1] // 2
    clean, rainy = pair[:, :half], pair[:, -half:]
    assert rainy.mean() < clean.mean() - 10
    rain = borrow(rainy, clean)
    height, width = np.minimum(rain.streaks.shape, photograph.shape[:2])
    moved = lay(photograph[:height, :width], rain._replace(streaks=rain.streaks[:height, :width]))
    assert moved.mean() < photograph[:height, :width].mean() - 10


def test_command_with_the_rain_of_pairs(photographs, tmp_path, lent, capsys):
    rainy, clean, _ = lent
    for k in range(3):
        write_image(tmp_path / "pairs" / f"{k}.png", np.hstack([clean[k:], rainy[k:]]))
    out, again = tmp_path / "out", tmp_path / "again"
    borrowed = ("--rain_of", tmp_path / "pairs", "--rain_side", "left")
    done = run(photographs, out, *borrowed)
    assert (done.returncode, done.stderr) == (0, "")
    pair = read_image(out / "DID-MDN-training/Rain_Medium/train2018new/third.jpg")
    assert pair.shape == (64, 192, 3) and pair[:, :96].mean() < pair[:, 96:].mean() - 10
    (tmp_path / "pairs" / "broken.png").write_bytes(b"not an image")
    capsys.readouterr()
    assert main(get_args_parser().parse_args([*map(str, (photographs, again, *borrowed))])) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "broken.png" in line
    assert files(again) == files(out)


def test_rain_is_not_moved_from_pairs_that_are_not_side_by_side(photographs, tmp_path):
    for k in range(3):
        clean = skimage.transform.resize(skimage.data.astronaut()[k:], (64, 96), preserve_range=True).astype(
            "u1"
        )
        rainy = darkened(clean, rain_layer(64, 96, "Heavy", np.random.default_rng(k)))
        write_image(tmp_path / "named" / f"rain-{k}.png", rainy)
        write_image(tmp_path / "named" / f"norain-{k}.png", clean)
        write_image(tmp_path / "folders" / "input" / f"{k}.png", rainy)
        write_image(tmp_path / "folders" / "target" / f"{k}.png", clean)
    for pairs, told in (
        ("named", "holds pairs told by their names; side by side pairs in one folder are needed"),
        ("folders", "holds pairs in input/ and target/; side by side pairs in one folder are needed"),
        ("folders/input", "not side by side pairs: the rainy and the clean image show different pictures"),
    ):
        flags = ("--rain_of", tmp_path / pairs, "--rain_side", "left")
        done = at_the_command_line(support.rain, photographs, tmp_path / "out", *flags)
        assert (
            done.returncode == 2 and f"--rain_of {tmp_path / pairs}: {told}" in done.stderr.splitlines()[-1]
        )
    assert not (tmp_path / "out").exists()


def test_pairs_whose_rain_is_moved_may_have_other_folders_beside_them(photographs, tmp_path, lent):
    rainy, clean, _ = lent
    for k in range(3):
        write_image(tmp_path / "pairs" / f"{k}.png", np.hstack([clean[k:], rainy[k:]]))
    for name in ("old/input/1", "old/target/1", "more/rain-0", "more/norain-0"):
        write_image(tmp_path / "pairs" / f"{name}.png", clean[:64, :64])
    flags = ("--rain_of", tmp_path / "pairs", "--rain_side", "left", "--scenes", 1)
    assert run(photographs, tmp_path / "out", *flags).returncode == 0


def test_mistakes_with_the_rain_of_pairs(photographs, tmp_path):
    for k in range(3):  # of few tones
        clean = skimage.data.astronaut()[k : 64 + k, :96] // 8
        write_image(tmp_path / "dark" / f"{k}.png", np.hstack([clean, clean + np.uint8(9)]))
    for flags, told in (
        (["--rain_of", photographs], "--rain_side"),
        (["--rain_of", photographs, "--style", "mixed", "--rain_side", "left"], "--style"),
        (["--rain_of", tmp_path / "none", "--rain_side", "left"], str(tmp_path / "none")),
        (["--rain_of", photographs, "--rain_side", "left"], "not side by side pairs"),
        (["--rain_of", tmp_path / "dark", "--rain_side", "left"], "too few of 3 pairs"),
        (["--rain_of", photographs, "--rain_side", "left", "--angle", 75], "--angle"),
        (["--angle", 91], "--angle"),
    ):
        done = at_the_command_line(support.rain, photographs, tmp_path / "out", *flags)
        assert done.returncode == 2 and told in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


# --- the files ----------------------------------------------------------------------------------------------


def test_layout_is_did_mdns(photographs, tmp_path):
    out = tmp_path / "out"
    assert write_scenes(find_photographs([photographs]), out, test=1) == []
    names = sorted(p.stem for p in (out / "DID-MDN-training" / "Rain_Heavy" / "train2018new").iterdir())
    (tested,) = {"a b", "été", "third"} - set(names)
    training = [f"DID-MDN-training/Rain_{level}/train2018new/{n}.jpg" for level in DENSITIES for n in names]
    test = [f"DID-MDN-test/{level}_{tested}.jpg" for level in ("heavy", "medium", "light")]
    assert files(out) == sorted(training + test)


def test_files_are_coded_with_did_mdns_quality(photographs, tmp_path):
    write_scenes(find_photographs([photographs]), tmp_path / "out", test=1)
    for file in (tmp_path / "out").rglob("*.jpg"):
        with Image.open(file) as image:
            assert [*image.quantization[0]][:2] == [8, 6], file  # libjpeg's, of quality 75


def test_pairs_are_rain_left_and_the_same_clean_image_right(photographs, tmp_path):
    write_scenes(find_photographs([photographs]), tmp_path / "out")
    pairs = [
        read_image(tmp_path / "out" / "DID-MDN-training" / f"Rain_{level}" / "train2018new" / "third.jpg")
        for level in DENSITIES
    ]
    clean = read_image(photographs / "third.jpg")[:, :96]  # whole JPEG blocks
    for pair in pairs:
        assert pair.shape == (64, 192, 3)
        assert cv2.PSNR(np.ascontiguousarray(pair[:, 96:]), clean) > 30
        # One column of colour is shared by the decoder's smooth upsampling, as in DID-MDN's own files.
        assert np.array_equal(pair[:, 97:], pairs[0][:, 97:])
    means = [pair[:, :96].mean() for pair in pairs]
    assert means[0] > means[1] > means[2] > clean.mean()


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no text are Linux's")
def test_names_that_are_no_text_have_rain_too(photographs, tmp_path):
    name = os.fsdecode(b"\xe9t\xe9")
    (photographs / "third.jpg").rename(photographs / f"{name}.jpg")
    assert write_scenes([photographs / f"{name}.jpg"], tmp_path / "out") == []
    assert len(list((tmp_path / "out").rglob(f"{name}.jpg"))) == 3


def test_a_scene_depends_on_its_name_and_the_seed_alone(photographs, tmp_path):
    write_scenes(find_photographs([photographs]), tmp_path / "all", seed=1)
    write_scenes([photographs / "third.jpg"], tmp_path / "one", seed=1)
    write_scenes([photographs / "third.jpg"], tmp_path / "other", seed=2)
    name = Path("DID-MDN-training", "Rain_Heavy", "train2018new", "third.jpg")
    assert (tmp_path / "all" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert (tmp_path / "other" / name).read_bytes() != (tmp_path / "one" / name).read_bytes()


@pytest.mark.parametrize("moved", [False, True])
def test_several_processes_write_the_same_and_report_the_same(moved, photographs, tmp_path, lent):
    options, broken = {"test": 1}, [photographs / "broken.jpg"]
    if moved:
        pairs = tmp_path / "pairs"
        for k in range(3):
            write_image(pairs / f"{k}.png", np.hstack([lent[1][k:], lent[0][k:]]))
        options = {"rain_of": pairs, "rain_side": "left"}
        broken.append(pairs / "broken.jpg")
    for file in broken:
        file.write_bytes(b"not an image")
    made, reported = [], []
    for workers in (0, 2):
        out = tmp_path / f"by {workers}"
        reported.append(write_scenes(find_photographs([photographs]), out, workers=workers, **options))
        made.append({name: (out / name).read_bytes() for name in files(out)})
    assert len(made[0]) == 9 and made[0] == made[1]
    assert len(reported[0]) == len(broken) and sorted(reported[0]) == sorted(reported[1])


def test_photographs_of_one_name_in_two_folders_are_both_kept(photographs, tmp_path):
    write_image(tmp_path / "more" / "THIRD.jpg", skimage.data.rocket()[:64, :64])
    assert write_scenes(find_photographs([photographs, tmp_path / "more"]), tmp_path / "out") == []
    names = {p.stem for p in (tmp_path / "out" / "DID-MDN-training/Rain_Light/train2018new").iterdir()}
    assert names == {"a b", "été", "third", "more_THIRD"}


def test_size_scenes_and_clean_side(photographs, tmp_path):
    write_scenes(find_photographs([photographs]), tmp_path / "square", scenes=2, size=48)
    pairs = list((tmp_path / "square").rglob("*.jpg"))
    assert len(pairs) == 6 and {read_image(p).shape for p in pairs} == {(48, 96, 3)}
    for pair in pairs:  # the middle, made smaller
        (photograph,) = photographs.glob(f"{pair.stem}.*")
        middle = cv2.resize(read_image(photograph)[:, 18:82], (48, 48), interpolation=cv2.INTER_AREA)
        assert cv2.PSNR(np.ascontiguousarray(read_image(pair)[:, 48:]), middle) > 30

    dark, bright = np.full((32, 64, 3), 20, np.uint8), np.full((32, 64, 3), 230, np.uint8)
    write_image(tmp_path / "pairs" / "p.png", np.hstack([dark, bright]))
    for side, value in (("left", 20), ("right", 230)):
        write_scenes([tmp_path / "pairs" / "p.png"], tmp_path / side, clean_side=side)
        pair = read_image(tmp_path / side / "DID-MDN-training/Rain_Light/train2018new/p.jpg")
        assert pair.shape == (32, 128, 3) and abs(pair[:, 66:].mean() - value) < 2


def test_scenes_do_not_come_among_the_photographs(photographs):
    folder = Path(photographs)
    again = f"{folder.parent}/../{folder.parent.name}/{folder.name}"
    with pytest.raises(UserError, match="is the folder of the photographs"):
        main(get_args_parser().parse_args([str(folder), again]))
    assert not (folder / "DID-MDN-training").exists()


@pytest.mark.parametrize("part", ["DID-MDN-training", "DID-MDN-test"])
def test_a_set_is_not_overwritten(photographs, tmp_path, part):
    (tmp_path / "out" / part).mkdir(parents=True)
    with pytest.raises(UserError, match=f"already holds {part}"):
        write_scenes(find_photographs([photographs]), tmp_path / "out")


def test_too_few_photographs_are_refused(photographs, tmp_path):
    with pytest.raises(UserError, match="4 are needed"):
        write_scenes(find_photographs([photographs]), tmp_path / "new", test=3)


# --- the command --------------------------------------------------------------------------------------------


def test_command(photographs, tmp_path):
    done = run(photographs, tmp_path / "out", "--style", "mixed", "--size", 32)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(files(tmp_path / "out")) == 9


def test_what_seems_wrong_with_photographs_and_pairs_is_said(tmp_path, capsys):
    """That they are pairs, that the rain is on the side called clean, or that folders below are left out."""
    demo = demo_set(tmp_path / "demo") / "DID-MDN-test"
    for flags, hint in (
        ((demo,), f"{demo}: 6 of 6 looked at seem to be side-by-side pairs, clean half right: give --clean"),
        ((demo, "--clean_side", "left"), "give --clean_side right"),
        ((demo, "--clean_side", "right", "--rain_of", demo, "--rain_side", "left"), "give --rain_side right"),
        ((tmp_path / "demo", "--clean_side", "right"), "demo: 48 pictures in folders below it are left out"),
    ):
        if flags[0] != demo:
            shutil.copy(demo / "heavy_coffee.jpg", flags[0])
        photographs, *more = map(str, flags)
        args = [photographs, str(tmp_path / "out"), *more, "--scenes", "1", "--workers", "0"]
        assert main(get_args_parser().parse_args(args)) == 0
        assert hint in capsys.readouterr().err
        shutil.rmtree(tmp_path / "out")
    with pytest.raises(
        UserError, match=r"holds no images itself, but its folders p do; give those one by one"
    ):
        (tmp_path / "above").mkdir()
        demo.rename(tmp_path / "above" / "p")
        find_photographs([tmp_path / "above"])


def test_mistakes_end_with_one_line_and_status_2(photographs, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in ("missing", "empty"):
        done = at_the_command_line(support.rain, photographs, tmp_path / folder, tmp_path / "out")
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert str(tmp_path / folder) in done.stderr
    for wrong in ([photographs], [photographs, tmp_path / "out", "--size", "8"]):
        done = at_the_command_line(support.rain, *wrong)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_unreadable_photograph_is_named_and_the_rest_goes_on(photographs, tmp_path, capsys):
    (photographs / "broken.jpg").write_bytes(b"not an image")
    write_image(photographs / "small.png", np.zeros((8, 40, 3), np.uint8))
    assert main(get_args_parser().parse_args([str(photographs), str(tmp_path / "out")])) == 1
    reported = capsys.readouterr().err.splitlines()
    assert len(reported) == 2 and any("broken.jpg" in line for line in reported)
    assert any("small.png" in line and "40x8" in line for line in reported)
    assert len(files(tmp_path / "out")) == 9


def test_a_photograph_whose_scene_cannot_be_written_is_named_and_the_rest_goes_on(
    photographs, tmp_path, capsys
):
    write_image(photographs / "wide.png", np.zeros((16, 33008, 3), np.uint8))
    assert main(get_args_parser().parse_args([str(photographs), str(tmp_path / "out")])) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{photographs}/wide.png: left out: ") and "66016x16" in line
    assert len(files(tmp_path / "out")) == 9


def test_of_a_scene_whose_name_gets_too_long_nothing_stays(tmp_path):
    clean = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(UserError, match="medium_.*: cannot be written: File name too long"):
        support.rain._write_scene(dict.fromkeys(DENSITIES, clean), clean, tmp_path, 245 * "x", is_test=True)
    assert not files(tmp_path)


def test_where_nothing_is_made_nothing_is_shown(tmp_path, capsys):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "broken.jpg").write_bytes(b"not an image")
    assert main(get_args_parser().parse_args([str(tmp_path / "p"), str(tmp_path / "out")])) == 1
    assert not capsys.readouterr().out


# --- the demo set -------------------------------------------------------------------------------------------


def test_demo_set(tmp_path):
    folder = demo_set(tmp_path / "demo")
    written = files(folder)
    training = {level: {Path(f).stem for f in written if f"Rain_{level}/" in f} for level in DENSITIES}
    test = {Path(f).stem for f in written if f.startswith("DID-MDN-test/")}
    assert len(training["Heavy"]) >= 10 and training["Heavy"] == training["Medium"] == training["Light"]
    assert len(test) >= 6 and "heavy_coffee" in test
    assert not {t.split("_")[0] for t in training["Heavy"]} & {t.split("_")[1] for t in test}
    assert {read_image(f).shape for f in (folder / "DID-MDN-training").rglob("*.jpg")} == {(240, 640, 3)}


def test_demo_set_is_made_once_and_again_if_unfinished(tmp_path):
    folder = demo_set(tmp_path)
    before = {f: (folder / f).stat().st_mtime_ns for f in files(folder)}
    demo_set(tmp_path)
    assert {f: (folder / f).stat().st_mtime_ns for f in files(folder)} == before
    (folder / "demo-set.txt").write_text("unfinished")
    (folder / "DID-MDN-test" / "heavy_coffee.jpg").unlink()
    demo_set(tmp_path)
    assert files(folder) == sorted(before)
    shutil.rmtree(folder / "DID-MDN-test")  # the note that the set is whole stays
    demo_set(tmp_path)
    assert files(folder) == sorted(before)


def test_two_demos_begun_at_once_both_find_the_whole_set(tmp_path, monkeypatch):
    """The second begins when the first has made a few scenes, whose files it leaves in place."""
    whole, write, written = files(demo_set(tmp_path / "alone")), support.rain._write_scene, []

    def interrupted(*args, **options):
        write(*args, **options)
        written.append(set(files(tmp_path / "shared")))
        if len(written) == 3:
            demo_set(tmp_path / "shared")
            assert written[2] <= written[3] and len(written) == 3 + 16

    monkeypatch.setattr(support.rain, "_write_scene", interrupted)
    assert files(demo_set(tmp_path / "shared")) == whole


def test_demo_set_leaves_other_data_alone(tmp_path):
    theirs = tmp_path / "DID-MDN-test" / "1.jpg"
    theirs.parent.mkdir()
    theirs.write_bytes(b"theirs")
    with pytest.raises(UserError, match="other than the demo set; move it elsewhere"):
        demo_set(tmp_path)
    assert files(tmp_path) == ["DID-MDN-test/1.jpg"]


def test_widths_are_cut_to_multiples_of_16(tmp_path):
    """Else rain and truth would share the blocks of a JPEG."""
    write_image(tmp_path / "wide" / "w.png", np.zeros((64, 104, 3), np.uint8))
    write_scenes([tmp_path / "wide" / "w.png"], tmp_path / "out")
    assert {read_image(pair).shape for pair in (tmp_path / "out").rglob("*.jpg")} == {(64, 192, 3)}


def test_a_narrow_photograph_is_named_as_a_low_one_is(photographs, tmp_path):
    write_image(photographs / "narrow.png", np.zeros((40, 8, 3), np.uint8))
    (line,) = write_scenes(find_photographs([photographs]), tmp_path / "out")
    assert "narrow.png: is 8x40 pixels" in line


def test_a_veil_adds_its_mist():
    rain = draw_rain(np.random.default_rng(0), "veiled")
    misty, dry = (
        rain_layer(60, 80, "Heavy", np.random.default_rng(1), rain._replace(veil=dict.fromkeys(rain.veil, v)))
        for v in (0.3, 0.0)
    )
    assert (misty >= dry).all() and misty.mean() > dry.mean() + 0.15


def test_training_scenes_are_counted_beside_the_test_part(photographs, tmp_path):
    assert write_scenes(find_photographs([photographs]), tmp_path / "out", scenes=1, test=1) == []
    assert [len(files(tmp_path / "out" / part)) for part in ("DID-MDN-training", "DID-MDN-test")] == [3, 3]


def test_of_an_odd_width_the_middle_column_is_in_neither_half():
    image = np.arange(5)[None, :, None] * np.ones((1, 1, 3), np.uint8)
    halves = [support.rain._half(image, side)[0, :, 0].tolist() for side in ("left", "right")]
    assert halves == [[0, 1], [3, 4]]
