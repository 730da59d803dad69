"""From files to batches: the layouts, the parts, the draws, and what is said of files that are no good."""

import errno
import json
import math
import multiprocessing.reduction
import os
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import dataset
from dataset import Half, Scene, find, find_training, read_scene, split
from support import distributed
from support.errors import UserError
from support.images import list_images, read_image, write_image
from tests.made import DENSITIES, HEIGHT, WIDTH, photograph, rain_on, terminal, write_pairs, write_scenes

DATA = Path(__file__).parents[2] / "shared" / "data"
BLUE = {"clean": 200, "Heavy": 10, "Medium": 20, "Light": 30}


def coordinates(blue, height=HEIGHT, width=WIDTH):
    """A picture whose red is the row, green the column, and blue says what it is."""
    rows, columns = np.mgrid[:height, :width]
    return np.dstack([rows, columns, np.full_like(rows, blue)]).astype(np.uint8)


def write_coordinates(folder, height=HEIGHT, width=WIDTH):
    """One scene of three densities, in pictures that say where each pixel was."""
    for density in DENSITIES:
        halves = [coordinates(BLUE[density], height, width), coordinates(BLUE["clean"], height, width)]
        write_image(folder / f"Rain_{density}" / "scene.png", np.hstack(halves))
    return folder


def draws(scenes, count, patch_size=16, seed=0, **options):
    patches = dataset.ScenePatches(scenes, patch_size, seed, **options)
    return [patches[n] for n in range(count)]


def batches(scenes, count, workers=0, batch_size=2, **options):
    endless = dataset.batches(
        scenes, patch_size=16, batch_size=batch_size, seed=7, device="cpu", workers=workers, **options
    )
    return list(islice(endless, count))


def assert_equal_batches(some, others):
    assert len(some) == len(others)
    for a, b in zip(some, others, strict=True):
        assert a.names == b.names
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


# --- layouts ---


@pytest.mark.parametrize("inner", ["train2018new", ""])
def test_did_mdn_scenes_are_found_by_file_name(tmp_path, inner):
    for density in DENSITIES:
        for name in ("1", "2", "10"):
            picture = np.hstack([coordinates(BLUE[density]), coordinates(BLUE["clean"])])
            write_image(tmp_path / f"Rain_{density}" / inner / f"{name}.png", picture)
    found = find(tmp_path)
    assert [scene.name for scene in found.scenes] == ["1", "2", "10"]
    assert not found.unpaired
    for scene in found.scenes:
        assert scene.densities == DENSITIES
        rainy, clean = read_scene(scene)
        assert [image[0, 0, 2] for image in rainy] == [BLUE[density] for density in DENSITIES]
        assert np.array_equal(clean, coordinates(BLUE["clean"]))


def test_training_folder_inside_is_taken_and_the_test_set_beside_it_is_not_opened(tmp_path):
    write_scenes(tmp_path, 2)
    (tmp_path / "DID-MDN-test").mkdir()
    (tmp_path / "DID-MDN-test" / "0.jpg").write_text("not an image")
    scenes = find_training([tmp_path])
    assert [scene.name for scene in scenes] == ["0", "1"]
    assert all("DID-MDN-test" not in str(half.path) for scene in scenes for half in scene.rainy)
    with pytest.raises(UserError, match="DID-MDN-test: is DID-MDN's test set, not to be trained on"):
        find_training([tmp_path / "DID-MDN-test"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_clean_half_is_on_the_side_that_is_said(tmp_path, side):
    halves = [coordinates(BLUE["clean"]), coordinates(BLUE["Heavy"])]
    write_image(tmp_path / "1.png", np.hstack(halves if side == "left" else halves[::-1]))
    (scene,) = find(tmp_path, side).scenes
    (rainy,), clean = read_scene(scene)
    assert np.array_equal(clean, coordinates(BLUE["clean"]))
    assert np.array_equal(rainy, coordinates(BLUE["Heavy"]))


def test_did_mdn_test_folder_needs_no_side(tmp_path):
    write_pairs(tmp_path / "DID-MDN-test", 1, clean_side="right")
    (scene,) = find(tmp_path / "DID-MDN-test").scenes
    assert np.array_equal(read_scene(scene)[1], photograph(0))


def test_a_side_that_is_given_counts_for_did_mdns_test_folder_too(tmp_path):
    write_pairs(tmp_path / "DID-MDN-test", 1, clean_side="left")
    (scene,) = find(tmp_path / "DID-MDN-test", "left").scenes
    assert np.array_equal(read_scene(scene)[1], photograph(0))


def test_did_mdn_test_folder_is_known_from_within(tmp_path, monkeypatch):
    folder = write_pairs(tmp_path / "DID-MDN-test", 1, clean_side="right")
    monkeypatch.chdir(folder)
    (scene,) = find(".").scenes
    assert np.array_equal(read_scene(scene)[1], photograph(0))


def test_one_side_for_all_folders_leaves_did_mdn_as_published(tmp_path):
    """Turned round, its scenes would teach the network to add rain."""
    scenes, pairs = write_scenes(tmp_path / "scenes", 1), write_pairs(tmp_path / "pairs", 1)
    sides = [scene.clean.side for scene in find_training([scenes, pairs], ["left"])]
    assert sides == ["right", "left"]
    assert [scene.clean.side for scene in find_training([scenes], ["left"])] == ["left"]
    write_pairs(tmp_path / "root" / "DID-MDN-test", 1)
    found = dataset.with_sides([tmp_path / "root", pairs], ["left"])
    assert [side for _, side in found] == [None, "left"]
    flat = write_pairs(tmp_path / dataset.TRAINING, 1)  # of that name, but not in that layout
    assert [scene.clean.side for scene in find_training([flat, pairs], ["left"])] == ["left", "left"]
    assert [scene.clean.side for scene in find_training([scenes, pairs], ["left", "left"])] == [
        "left",
        "left",
    ]


@pytest.mark.parametrize(
    ("rainy_folder", "clean_folder", "rainy_name", "clean_name"),
    [
        ("input", "target", "1.png", "1.png"),
        ("rain", "norain", "rain-001.png", "norain-001.png"),
        ("rainy", "gt", "1.png", "1.bmp"),
        ("Rainy", "GT", "a_rain.png", "a_clean.png"),
        ("rainy_image", "ground_truth", "901_14.png", "901.png"),
        ("data", "gt", "7_rain.png", "7_clean.png"),
        ("rain", "norain", "heavy/rain-1.png", "heavy/norain-1.png"),
        ("lq", "clean", "im_s30.png", "im.png"),
        ("rain", "norain", "X2/norain-001x2.png", "norain-001.png"),
        ("rain", "gt", "000.png", "000gt.png"),
        ("rain", "gt", "heavy/7.png", "7.png"),
        ("rainy", ".", "rain-001.png", "norain-001.png"),
        (".", ".", "rain-1.png", "norain-1.png"),
        (".", ".", "001_in.png", "001_GT.png"),
        ("Rain12", "Rain12", "park.png", "park-gt.bmp"),
        ("rainy_images", "clean-images", "1.png", "1.png"),
        ("input_crops", "target_crops", "1.png", "1.png"),
        ("lq", "hq", "caf\u00e9.png", "cafe\u0301.png"),
        ("real_world", "real_world_gt", "1_2.png", "1.png"),
        ("in", "gt", "im_0001_s80_a04.png", "im_0001.png"),
        ("rain", "gt", "ulm_1_rain_alpha_0.02_beta_0.01_dropsize_0.01_pattern_3.png", "ulm_1.png"),
        ("rainy image", "ground truth", "901_14.png", "901.png"),
        ("Park", "Park", "Park-Webcam-R-017.png", "Park-Webcam-C-000.png"),
    ],
)
def test_paired_folders_are_matched_by_name(tmp_path, rainy_folder, clean_folder, rainy_name, clean_name):
    write_image(tmp_path / rainy_folder / rainy_name, coordinates(BLUE["Heavy"]))
    write_image(tmp_path / clean_folder / clean_name, coordinates(BLUE["clean"]))
    found = find(tmp_path)
    assert not found.unpaired
    assert find_training([tmp_path]) == found.scenes
    (scene,) = found.scenes
    (rainy,), clean = read_scene(scene)
    assert rainy[0, 0, 2] == BLUE["Heavy"]
    assert clean[0, 0, 2] == BLUE["clean"]


@pytest.mark.parametrize(
    ("rainy", "clean"),
    [("inputs", "targets"), ("rain_image", "label"), ("degraded", "groundtruth"), ("input", "gtruth")],
)
def test_folders_of_these_names_too_make_pairs(tmp_path, rainy, clean):
    for folder in (rainy, clean):
        write_image(tmp_path / folder / "1.png", photograph(0))
    (scene,) = find(tmp_path).scenes
    assert scene.clean.path == tmp_path / clean / "1.png"


def test_several_rainy_images_of_one_clean_are_pairs_of_one_background(tmp_path):
    for i in range(4):
        write_image(tmp_path / "gt" / f"{i}.png", photograph(i))
        for k in (1, 2, 3):
            write_image(tmp_path / "rain" / f"{i}_{k}.png", rain_on(photograph(i), k))
    scenes = find_training([tmp_path])
    assert [scene.name for scene in scenes] == [f"{i}_{k}" for i in range(4) for k in (1, 2, 3)]
    for scene in scenes:
        assert np.array_equal(read_scene(scene)[1], photograph(int(scene.name[0])))
    for part in split(scenes).values():
        assert len(part) % 3 == 0


def test_a_picture_whose_clean_one_is_missing_does_not_take_that_of_another(tmp_path):
    for name in ("rain/walk", "rain/walk_1", "rain/walk_2", "gt/walk", "gt/walk_1"):
        write_image(tmp_path / f"{name}.png", photograph(0))
    found = find(tmp_path)
    assert [scene.name for scene in found.scenes] == ["walk", "walk_1"]
    assert found.unpaired == [tmp_path / "rain" / "walk_2.png"]


def test_pictures_that_are_not_mostly_pairs_by_their_names_are_single_images(tmp_path):
    for name in ("rain-1", "norain-1", "2", "3_gt", "4"):
        write_image(tmp_path / f"{name}.png", photograph(0))
    found = find(tmp_path)
    assert found.layout == "single images"
    assert len(found.scenes) == 5
    (tmp_path / "2.png").unlink()
    found = find(tmp_path)
    assert [scene.name for scene in found.scenes] == ["rain-1"]
    assert found.unpaired == [tmp_path / "3_gt.png", tmp_path / "4.png"]


@pytest.mark.parametrize(
    "beside", ["rainstreak/rain", "PReNet/rain", "results/rainy/rain", "PReNet/input/rain"]
)
def test_what_lies_beside_pairs_told_by_their_names_is_in_none(tmp_path, beside):
    """Streaks and other methods' results have the names of rainy images: they would be scored as such."""
    for name in ("norain-1", "norain-2", "rainy/rain-1", "rainy/rain-2", f"{beside}-1", f"{beside}-2"):
        write_image(tmp_path / f"{name}.png", photograph(0))
    found = find(tmp_path)
    assert [scene.rainy[0].path.parent.name for scene in found.scenes] == ["rainy", "rainy"]
    assert found.unpaired == [tmp_path / f"{beside}-1.png", tmp_path / f"{beside}-2.png"]
    with pytest.raises(UserError, match="has no partner"):
        find_training([tmp_path])


def test_pairs_told_by_their_names_stay_in_their_folders(tmp_path):
    for name in ("norain-1", "rainy/rain-1", "test/norain-1", "test/rainy/rain-1"):
        write_image(tmp_path / f"{name}.png", photograph(0))
    found = find(tmp_path)
    assert not found.unpaired
    for scene in found.scenes:
        assert scene.clean.path.parent == scene.rainy[0].path.parents[1]


@pytest.mark.parametrize(
    ("layout", "rainy", "unpaired"),
    [
        ("rain/walk rain/walk-in norain/walk norain/walk-in", "walk walk-in", ""),
        ("rain/4 rain/4gt norain/4 norain/4gt", "4 4gt", ""),
        ("input/1 input/1_in target/1", "1", "1_in"),
        ("rain/heavy/walk rain/heavy/walk_2 norain/walk", "heavy/walk", "walk_2"),
        ("rain/parkA/1 rain/parkB/1 rain/2 norain/1 norain/2", "2", "1 1 1"),
        ("rain/A rain/a rain/b norain/A norain/b", "A b", "a"),
        ("rain/rain-1 rain/1 rain/2 norain/1 norain/2", "1 2", "rain-1"),
        ("rain/rain-1 rain/1 rain/2 norain/norain-1 norain/2", "2", "1 rain-1 norain-1"),
        ("img_in img_GT img_1_in img_1_GT", "img_1_in img_in", ""),
        ("rain/heavy/7 rain/light/7 norain/7 norain/7_1", "heavy/7 light/7", "7_1"),
        ("rain/heavy/a rain/heavy/a_2 norain/a norain/a_2", "heavy/a heavy/a_2", ""),
        ("in/a_s80_a04 in/a_1_s80_a04 gt/a gt/a_1", "a_1_s80_a04 a_s80_a04", ""),
        ("rain/c-L-001 rain/c-R-001 norain/c-L-001 norain/c-C-001", "c-L-001", "c-R-001 c-C-001"),
        ("rain/7_1 rain/7_3 norain/7 norain/7_1", "7_1", "7_3 7"),
        ("park-R-000 park-R-002 park-C-000 park-C-001", "park-R-000", "park-R-002 park-C-001"),
        ("input/1 target/1 in/1 target_crops/1 hq/1", "1", ""),
    ],
)
def test_a_less_exact_name_never_takes_the_partner_of_an_exact_one(tmp_path, layout, rainy, unpaired):
    for name in layout.split():
        write_image(tmp_path / f"{name}.png", photograph(0))
    found = find(tmp_path)
    assert sorted(scene.name for scene in found.scenes) == rainy.split()
    assert [file.stem for file in found.unpaired] == unpaired.split()


def test_all_frames_of_a_scene_in_gt_rain_have_its_clean_one(tmp_path):
    names = [f"{scene}/{scene}-R-{i:03}" for scene in ("Park", "Lake") for i in range(3)]
    one_to_one = [f"Ulm/Ulm-{kind}-00{i}" for i in range(3) for kind in "RC"]
    for name in (*names, "Park/Park-C-000", "Lake/Lake-C-000", *one_to_one):
        write_image(tmp_path / f"{name}.png", photograph(0))
    found = find(tmp_path)
    assert not found.unpaired and len(found.scenes) == 9
    for scene in found.scenes:
        name, _, number = scene.rainy[0].path.stem.split("-")
        assert scene.clean.path.stem == f"{name}-C-{number if name == 'Ulm' else '000'}"


def test_a_picture_of_another_name_among_frames_has_no_partner(tmp_path):
    for name in ("park-R-000", "park-R-001", "park-C-000", "preview"):
        write_image(tmp_path / "park" / f"{name}.png", photograph(0))
    found = find(tmp_path)
    assert len(found.scenes) == 2 and [file.stem for file in found.unpaired] == ["preview"]
    for i in range(3):
        write_image(tmp_path / "park" / f"holiday-{i}.png", photograph(0))
    assert find(tmp_path).layout == "single images"  # where most have other names


@pytest.mark.parametrize(
    "layout",
    [
        "GT-RAIN_train/park/p-R-000 GT-RAIN_train/park/p-C-000 GT-RAIN_test/q-R-000 GT-RAIN_test/q-C-000",
        "train/rain-1 train/norain-1 test/rainy/rain-1 test/norain-1",
        "input/train/1 input/test_a/2 target/train/1 target/test_a/2",
        "input/training/1 input/val/2 target/training/1 target/val/2",
        "train_1/rain-1 train_1/norain-1 test-1/rain-1 test-1/norain-1",
    ],
)
def test_test_pairs_are_not_trained_on(tmp_path, layout):
    """They are scored, as they are told to be."""
    for name in layout.split():
        write_image(tmp_path / f"{name}.png", photograph(0))
    assert len(find(tmp_path).scenes) == 2
    with pytest.raises(
        UserError, match=r"holds pairs in .*train.* and in .*(test|val).*; give only the folder to train on"
    ):
        find_training([tmp_path])


@pytest.mark.parametrize("other", ["latest", "trainer"])
def test_a_folder_whose_name_only_holds_such_a_word_is_no_part(tmp_path, other):
    for folder in ("train" if other == "latest" else "test", other):
        for name in ("rain-1", "norain-1"):
            write_image(tmp_path / folder / f"{name}.png", photograph(0))
    assert len(find_training([tmp_path])) == 2


@pytest.mark.parametrize(("training", "test"), [("Train", "test"), ("train", "Test")])
def test_test_pairs_are_told_in_capitals_too(tmp_path, training, test):
    for folder in (training, test):
        for name in ("rain-1", "norain-1"):
            write_image(tmp_path / folder / f"{name}.png", photograph(0))
    words = f"holds pairs in {training} and in {test}; give only the folder to train on"
    with pytest.raises(UserError, match=words):
        find_training([tmp_path])


def test_where_no_names_make_a_pair_two_of_them_are_shown(tmp_path):
    for name in ("input/rain-001", "target/norain-1"):
        write_image(tmp_path / f"{name}.png", photograph(0))
    words = r"no two names make a pair: input/rain-001.png and target/norain-1.png differ; name pairs alike$"
    with pytest.raises(UserError, match=words):
        find(tmp_path)


def test_a_side_for_a_folder_without_pictures_of_its_own(tmp_path):
    """Pairs told otherwise below are found, sets named; of side-by-side files the folders are."""
    for name in ("names/test/rain-1", "names/test/norain-1", "sets/a/input/1", "sets/a/target/1"):
        write_image(tmp_path / f"{name}.png", photograph(0))
    write_pairs(tmp_path / "sides" / "training", 1)
    write_pairs(tmp_path / "sides" / "test_syn", 1)
    assert find(tmp_path / "names", "left").layout == "pairs told by their names"
    with pytest.raises(UserError, match="holds several sets of pairs, a; give those folders one by one"):
        find(tmp_path / "sets", "left")
    words = "sides: holds no images itself, but its folders test_syn, training do; give those one by one"
    with pytest.raises(UserError, match=words):
        find(tmp_path / "sides", "left")


def test_thumbnails_of_a_network_disk_are_no_pictures(tmp_path):
    for name in ("1", "@eaDir/1.png/SYNOPHOTO_THUMB_M"):
        write_image(tmp_path / f"{name}.png", photograph(0))
    assert [scene.name for scene in find(tmp_path).scenes] == ["1"]


@pytest.mark.parametrize(
    "layout",
    [
        "2020/0 2020/1 2020/2 samples/rain-1 samples/norain-1",
        "rain/a clear/b fog/c",
        "in/a hq/b",
        "2020/rain/a 2020/clean/b 2020/c",
        "ford_gt ford-gt a b c",
        "real_world/a real_world_gt/b",
        "IMG-C-001 IMG-R-002 IMG-001",
        "c-L-001 c-R-001 c-C-001 c-L-002 c-R-002 c-C-002",
        "proj/data/1 proj/images/2",
    ],
)
def test_photographs_whose_names_say_something_by_chance_are_single_images(tmp_path, layout):
    for name in layout.split():
        write_image(tmp_path / f"{name}.png", photograph(0))
    found = find(tmp_path)
    assert found.layout == "single images" and not found.unpaired
    assert len(found.scenes) == len(layout.split())


def test_half_of_the_pictures_may_be_of_other_kinds_where_names_tell_pairs(tmp_path):
    for kind in ("rain", "norain", "rainregion", "rainstreak"):
        write_image(tmp_path / f"{kind}-1.png", photograph(0))
    found = find(tmp_path)
    assert [scene.name for scene in found.scenes] == ["rain-1"]
    assert [file.stem for file in found.unpaired] == ["rainregion-1", "rainstreak-1"]


def test_pairs_told_by_their_names_are_not_cut_in_half(tmp_path):
    """One --clean_side for several folders is for the side-by-side ones among them."""
    for name in ("rain-1", "norain-1"):
        write_image(tmp_path / "names" / f"{name}.png", photograph(0))
    write_image(tmp_path / "folders" / "rainy" / "rain-1.png", photograph(0))
    write_image(tmp_path / "folders" / "norain-1.png", photograph(0))
    write_pairs(tmp_path / "sides", 1)
    said = []
    paths = [tmp_path / name for name in ("names", "folders", "sides")]
    scenes = find_training(paths, ["left"], said.append)
    assert [scene.clean.side for scene in scenes] == [None, None, "left"]
    layouts = 2 * ["1 pairs told by their names"] + ["1 side-by-side pairs, clean half left"]
    assert said == [f"{path}: {layout}" for path, layout in zip(paths, layouts, strict=True)]


def test_a_folder_of_sets_is_refused_by_their_names(tmp_path):
    """Its clean images would be restored like rainy ones, and nothing scored."""
    pairs = "A/input/1 A/target/1 b/B/rain/heavy/1 b/B/norain/1 c/in/1_s80_a04 c/gt/1"
    for name in (*pairs.split(), "C/input/1", "1", "norain-1"):
        write_image(tmp_path / f"{name}.png", photograph(0))
    with pytest.raises(
        UserError, match=r"holds several sets of pairs, A, b/B, c; give those folders one by one$"
    ):
        find(tmp_path)
    (scene,) = find(tmp_path / "b" / "B").scenes
    assert scene.clean.path == tmp_path / "b/B/norain/1.png"


def test_single_images_have_no_ground_truth(tmp_path):
    for name in ("2.png", "10.jpg", "deep/1.bmp"):
        write_image(tmp_path / name, photograph(0))
    (tmp_path / "notes.txt").write_text("no image")
    scenes = find(tmp_path).scenes
    assert [scene.name for scene in scenes] == ["2", "10", "deep/1"]
    assert all(scene.clean is None and len(scene.rainy) == 1 for scene in scenes)
    assert np.array_equal(read_scene(scenes[0])[0][0], photograph(0))
    (alone,) = find(tmp_path / "10.jpg").scenes
    assert alone.rainy == scenes[1].rainy


def test_files_that_only_the_suffix_tells_apart_have_names_of_their_own(tmp_path):
    """A scene's name is the name of its result: two scenes of one name would overwrite each other."""
    write_pairs(tmp_path / "pairs", 1)
    write_pairs(tmp_path / "pairs", 1, suffix=".bmp")
    write_scenes(tmp_path / "scenes", 1)
    write_scenes(tmp_path / "scenes", 1, suffix=".bmp")
    write_image(tmp_path / "folders" / "gt" / "0.png", photograph(0))
    for suffix in ("png", "bmp"):
        write_image(tmp_path / "folders" / "rain" / f"0.{suffix}", photograph(0))
    for path, side in (("pairs", "left"), ("pairs", None), ("scenes", None), ("folders", None)):
        path = tmp_path / path
        root = path / "DID-MDN-training" if path.name == "scenes" else path
        assert len({scene.name for scene in find(root, side).scenes}) == 2, path
    for name in ("a.png", "a.bmp", "a.bmp.png"):
        write_image(tmp_path / "suffixes" / name, photograph(0))
    assert len({scene.name for scene in find(tmp_path / "suffixes").scenes}) == 3


@pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not here")
def test_real_layouts_are_recognised():
    rain800 = find_training([DATA / "rain800" / "training"], ["left"])
    assert len(rain800) == 671
    did_mdn = find(DATA / "did-mdn-sample" / "DID-MDN-training")
    assert [len(scene.rainy) for scene in did_mdn.scenes] == [3, 3, 3]
    assert find_training([DATA / "did-mdn-sample"]) == did_mdn.scenes
    for scene in did_mdn.scenes:
        rainy, clean = read_scene(scene)
        assert clean.shape == rainy[0].shape == (512, 512, 3)
        errors = [np.square(image.astype(float) - clean).mean() for image in rainy]
        assert errors == sorted(errors, reverse=True)  # heavy, medium, light
    bsds500 = find(DATA / "backgrounds" / "bsds500").scenes
    assert len(bsds500) == 362
    assert all(scene.clean is None for scene in bsds500)


# --- crops, flips, turns ---


@pytest.mark.parametrize("upright", [False, True])
def test_all_densities_are_cropped_flipped_and_turned_alike(tmp_path, upright):
    scenes = find_training([write_coordinates(tmp_path)])
    ways, corners = set(), set()
    for rainy, clean, scene, padded, _ in draws(scenes, 100, upright=upright):
        assert scene.name == "scene"
        assert not padded
        assert rainy.shape == (3, 3, 16, 16)
        assert clean.shape == (3, 16, 16)
        assert rainy.dtype == clean.dtype == torch.uint8
        assert [image[2].unique().tolist() for image in rainy] == [[BLUE[d]] for d in DENSITIES]
        assert clean[2].unique().tolist() == [BLUE["clean"]]
        for image in rainy:
            assert torch.equal(image[:2], clean[:2])
        # The pixels are those of one 16x16 window, each once, in one of eight orientations, or of the four
        # in which what was vertical still is.
        rows, columns = clean[0].int(), clean[1].int()
        top, left = rows.min().item(), columns.min().item()
        assert sorted(zip(rows.flatten().tolist(), columns.flatten().tolist(), strict=True)) == [
            (top + y, left + x) for y in range(16) for x in range(16)
        ]
        corners.add((top, left))
        ways.add(tuple((rows[i, j].item() - top, columns[i, j].item() - left) for i, j in ((0, 0), (0, 15))))
        assert not upright or (rows[:, :1] == rows).all()
    assert len(ways) == (4 if upright else 8)
    assert {top for top, _ in corners} == set(range(HEIGHT - 16 + 1))
    assert {left for _, left in corners} == set(range(WIDTH - 16 + 1))


@pytest.mark.parametrize("upright", [False, True])
def test_each_place_flip_and_turn_is_as_likely_as_any_other(upright):
    image = np.arange(3 * 4, dtype=np.uint8).reshape(3, 4, 1)  # six windows of 2x2
    windows = Counter()
    for draw in range(9600):
        rng = np.random.default_rng((0, draw))
        windows[dataset.augment(dataset.crop([image], 2, rng), rng, upright).tobytes()] += 1
    assert len(windows) == 6 * (4 if upright else 8)
    expected = 9600 / len(windows)
    assert all(abs(count - expected) < 5 * expected**0.5 for count in windows.values())


def test_scenes_smaller_than_the_patch_are_padded_by_mirroring_and_said(tmp_path):
    write_coordinates(tmp_path, height=12, width=40)
    scenes = find_training([tmp_path])
    for rainy, clean, _, padded, _ in draws(scenes, 8, patch_size=32):
        assert padded
        assert rainy.shape == (3, 3, 32, 32)
        assert all(torch.equal(image[:2], clean[:2]) for image in rainy)
        rows, columns = clean[0].int(), clean[1].int()
        across = rows if (rows[:, :1] == rows).all() else rows.T
        # 10 mirrored rows, the 12 of the picture, 10 mirrored again; or upside down.
        mirrored = [*range(9, -1, -1), *range(12), *range(11, 1, -1)]
        assert across[:, 0].tolist() in (mirrored, mirrored[::-1])
        assert set(rows.flatten().tolist()) == set(range(12))
        assert columns.max() - columns.min() == 31
    write_pairs(tmp_path / "pairs", 3)
    large = find_training([tmp_path / "pairs"], ["left"])
    (batch,) = batches([*scenes, *large], 1, batch_size=4)
    assert batch.padded == ["scene"]
    (batch,) = batches(large, 1)
    assert batch.padded == []


def test_pictures_much_smaller_than_the_patch_are_padded_too(tmp_path):
    scenes = find_training([write_coordinates(tmp_path, height=11, width=11)])
    ((rainy, clean, _, padded, _),) = draws(scenes, 1, patch_size=64)
    assert padded
    assert clean.shape == (3, 64, 64)
    assert set(clean[0].flatten().tolist()) == set(range(11))
    assert torch.equal(rainy[0, :2], clean[:2])


@pytest.mark.parametrize(("share", "fewest", "most"), [(0.0, 0, 0), (0.5, 35, 65), (1.0, 100, 100)])
def test_clean_inputs_is_the_share_of_draws_with_one_dry_picture(tmp_path, share, fewest, most):
    scenes = find_training([write_coordinates(tmp_path)])
    dry, places = 0, set()
    plain = draws(scenes, 100)
    for (rainy, clean, *_), (rainy_before, clean_before, *_) in zip(
        draws(scenes, 100, clean_inputs=share), plain, strict=True
    ):
        assert torch.equal(clean, clean_before)  # the crops are what they are without
        changed = [i for i in range(3) if not torch.equal(rainy[i], rainy_before[i])]
        assert len(changed) <= 1
        assert all(torch.equal(rainy[i], clean) for i in changed)
        places.update(changed)
        dry += len(changed)
    assert fewest <= dry <= most
    assert places == (set(range(3)) if share else set())


# --- batches ---


def test_scenes_and_pairs_mix_in_one_batch(tmp_path):
    write_scenes(tmp_path / "scenes", 3)
    write_pairs(tmp_path / "pairs", 3, clean_side="left")
    scenes = find_training([tmp_path / "scenes", tmp_path / "pairs"], ["right", "left"])
    assert sorted(len(scene.rainy) for scene in scenes) == [1, 1, 1, 3, 3, 3]
    counts = {scene.rainy[0].path.parts[-2]: len(scene.rainy) for scene in scenes}
    assert counts == {"train2018new": 3, "pairs": 1}
    (batch,) = batches(scenes, 1, batch_size=6)
    assert batch.rainy.shape == (12, 3, 16, 16)
    assert batch.clean.shape == (6, 3, 16, 16)
    assert sorted(torch.bincount(batch.scene).tolist()) == [1, 1, 1, 3, 3, 3]
    assert batch.scene.tolist() == sorted(batch.scene.tolist())
    for tensor in (batch.rainy, batch.clean):
        assert tensor.dtype == torch.float32
        assert 0 <= tensor.min() < 0.3 < 0.7 < tensor.max() <= 1
    again = batch.to("cpu")  # as a training loop may
    assert torch.equal(again.rainy, batch.rainy) and torch.equal(again.clean, batch.clean)
    assert batch.rainy.max() > 0.7
    # Rain was drawn as something added: every rainy image lies on the clean one of its own scene.
    difference = batch.rainy - batch.clean[batch.scene]
    assert difference.min() >= 0
    assert 0.02 < difference.mean() < 0.2


def test_pictures_become_a_batch_of_tensors_scaled_to_1():
    images = np.stack([coordinates(0), coordinates(255)])
    tensor = dataset.to_tensor(images)
    assert tensor.dtype == torch.float32 and tensor.shape == (2, 3, HEIGHT, WIDTH)
    for (image, row, column, channel), value in (((0, 5, 9, 0), 5), ((0, 5, 9, 1), 9), ((1, 5, 9, 2), 255)):
        assert tensor[image, channel, row, column] == pytest.approx(value / 255, rel=1e-6)


def test_batches_hold_the_pixels_of_the_files_scaled_to_1(tmp_path):
    scenes = find_training([write_coordinates(tmp_path)])
    (batch,) = batches(scenes, 1, batch_size=1)
    ((rainy, clean, *_),) = draws(scenes, 1, seed=7)
    assert torch.equal(batch.rainy, rainy.float() / 255)
    assert torch.equal(batch.clean, clean[None].float() / 255)


def test_draws_go_through_consecutive_shuffles(tmp_path):
    scenes = find_training([write_pairs(tmp_path, 7)], ["left"])
    names = [name for batch in batches(scenes, 21, batch_size=3) for name in batch.names]
    shuffles = [names[i : i + 7] for i in range(0, 63, 7)]
    assert all(sorted(shuffle) == sorted(scene.name for scene in scenes) for shuffle in shuffles)
    assert len(set(map(tuple, shuffles))) == 9


def test_scenes_of_one_number_of_images_are_spread_evenly_over_a_shuffle():
    """60 of three images and 40 of one: 6 and 4 in each batch of 10, but for the remainders."""
    kinds = (3,) * 60 + (1,) * 40
    firsts = set()
    for shuffle in range(20):
        order = dataset.shuffled(7, shuffle, kinds)
        assert sorted(order) == list(range(100))
        firsts.add(order[0])
        of_three = [sum(kinds[i] == 3 for i in order[n : n + 10]) for n in range(0, 100, 10)]
        assert set(of_three) <= {5, 6, 7}
    assert len(firsts) > 15
    alike = dataset.shuffled(7, 2, (3,) * 100)
    assert np.array_equal(alike, np.random.default_rng((7, 2, 100)).permutation(100))


def test_a_draw_is_a_function_of_seed_and_number_alone(tmp_path):
    scenes = find_training([write_pairs(tmp_path, 5)], ["left"])
    patches = dataset.ScenePatches(scenes, 16, seed=3, clean_inputs=0.5)
    in_order = [patches[n] for n in range(30)]
    np.random.seed(99)
    torch.manual_seed(99)
    anew = dataset.ScenePatches(scenes, 16, seed=3, clean_inputs=0.5)
    for n in reversed(range(30)):
        rainy, clean, scene, *_ = anew[n]
        assert scene == in_order[n][2]
        assert torch.equal(rainy, in_order[n][0])
        assert torch.equal(clean, in_order[n][1])
    other = dataset.ScenePatches(scenes, 16, seed=4)
    assert [other[n][2] for n in range(30)] != [item[2] for item in in_order]
    assert not any(torch.equal(other[n][1], in_order[n][1]) for n in range(30))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(tmp_path, workers):
    write_scenes(tmp_path, 3)
    scenes = find_training([tmp_path])
    options = {"clean_inputs": 0.3}
    assert_equal_batches(batches(scenes, 5, workers, **options), batches(scenes, 5, **options))


@pytest.mark.skipif(not hasattr(os, "getpgid"), reason="no process groups here")
def test_signals_to_the_runs_group_do_not_reach_its_workers(tmp_path):
    """Ctrl-C and `timeout` signal all of a group: the run must be able to end its step, and save."""
    scenes = find_training([write_pairs(tmp_path, 3)], ["left"])
    others = multiprocessing.active_children()
    endless = dataset.batches(scenes, 16, 1, seed=0, device="cpu", workers=2)
    for _ in range(4):  # so that both have begun
        next(endless)
    workers = [child for child in multiprocessing.active_children() if child not in others]
    assert len(workers) == 2
    assert all(os.getpgid(worker.pid) != os.getpgrp() for worker in workers)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="signals do not tell their sender here")
def test_workers_obey_the_run_alone(tmp_path):
    """Slurm and systemd signal every process of a job: the run must be able to end its step, and save."""
    scenes = find_training([write_pairs(tmp_path, 3)], ["left"])
    others = multiprocessing.active_children()
    endless = dataset.batches(scenes, 16, 1, seed=0, device="cpu", workers=2)
    for _ in range(4):  # so that both have begun
        next(endless)
    workers = [child for child in multiprocessing.active_children() if child not in others]
    for name in ("TERM", "INT"):
        subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
    for _ in range(20):
        next(endless)
    assert all(worker.is_alive() for worker in workers)
    workers[0].terminate()
    workers[0].join(10)
    assert workers[0].exitcode == 0
    endless.close()
    workers[1].join(10)
    assert not workers[1].is_alive()


def draw_until_killed(folder, pids):
    torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL = 0.2  # of the parent's life, in seconds; 5
    scenes = find_training([folder], ["left"])
    endless = dataset.batches(scenes, 16, 1, seed=0, device="cpu", workers=2)
    for _ in range(4):
        next(endless)
    pids.send([worker.pid for worker in multiprocessing.active_children()])
    while True:
        next(endless)


def test_workers_die_with_the_run(tmp_path):
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    run = fork.Process(target=draw_until_killed, args=(write_pairs(tmp_path, 3), sender))
    run.start()
    workers = receiver.recv()
    run.kill()
    run.join()
    assert len(workers) == 2
    end = time.monotonic() + 20
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < end
        time.sleep(0.1)


def alive(pid):
    """Not even a zombie counts."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def test_an_unforeseen_error_ends_the_run_and_its_workers(tmp_path):
    code = (
        "import sys, dataset\n"
        "scenes = dataset.find_training([sys.argv[1]], ['left'])\n"
        "endless = dataset.batches(scenes, 16, 1, seed=0, device='cpu', workers=2)\n"
        "1 / (len(next(endless).names) - 1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, write_pairs(tmp_path, 3)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"


def test_a_batch_that_a_worker_cannot_hand_over_ends_the_run(tmp_path, monkeypatch):
    """As where /dev/shm is full: the run would wait for it for ever."""
    scenes = find_training([write_pairs(tmp_path, 3)], ["left"])
    dumps, main = multiprocessing.reduction.ForkingPickler.dumps, os.getpid()

    def no_room(batch, *args):
        if os.getpid() != main:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return dumps(batch, *args)

    monkeypatch.setattr(multiprocessing.reduction.ForkingPickler, "dumps", staticmethod(no_room))
    with pytest.raises(RuntimeError, match=r"^DataLoader worker \(pid"):
        next(dataset.batches(scenes, 16, 1, seed=0, device="cpu", workers=1))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_begun_at_a_step_is_the_tail_of_the_whole(tmp_path, workers):
    scenes = find_training([write_pairs(tmp_path, 5)], ["left"])
    whole = batches(scenes, 9)
    assert_equal_batches(batches(scenes, 5, workers, first_step=4), whole[4:])


def test_validation_sees_whole_pictures_in_order(tmp_path):
    scenes = find_training([write_coordinates(tmp_path)])
    ((rainy, clean),) = dataset.full_images(scenes)
    assert rainy.shape == (3, HEIGHT, WIDTH, 3) and rainy.dtype == np.uint8
    assert np.array_equal(clean, coordinates(BLUE["clean"])[None])
    assert np.array_equal(rainy[..., 0], clean[..., 0].repeat(3, 0))


# --- the parts ---


@pytest.fixture
def pictures_by_name(monkeypatch):
    """Files need not be there: what is read is noise that depends on the file's name alone."""

    def read(half):
        rng = np.random.default_rng(zlib.crc32(half.path.name.encode()))
        return rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)

    monkeypatch.setattr(dataset, "read_half", read)


def named_scenes(count):
    """Scenes in DID-MDN's layout; their files are not there."""
    folder = Path("DID-MDN-training")
    return [
        Scene(
            str(i),
            tuple(Half(folder / f"Rain_{d}" / f"{i}.jpg", "left") for d in DENSITIES),
            Half(folder / "Rain_Heavy" / f"{i}.jpg", "right"),
            DENSITIES,
        )
        for i in range(count)
    ]


def part_of(scenes, seed=0):
    return {scene.name: part for part, members in split(scenes, seed).items() for scene in members}


@pytest.mark.parametrize(
    ("count", "sizes"), [(4000, [2000, 1800, 200]), (200, [100, 90, 10]), (4, [1, 2, 1]), (3, [1, 1, 1])]
)
def test_the_parts_are_50_45_and_5_percent_but_at_least_one_each(count, sizes, pictures_by_name):
    scenes = named_scenes(count)
    parts = split(scenes)
    assert list(parts) == ["weights", "architecture", "validation"]
    assert [len(members) for members in parts.values()] == sizes
    assert sorted(scene.name for members in parts.values() for scene in members) == sorted(
        map(str, range(count))
    )


def test_a_data_set_is_read_where_there_is_no_standard_error(tmp_path, monkeypatch):
    """As in a service, or under pythonw."""
    monkeypatch.setattr(sys, "stderr", None)
    assert split(find_training([write_pairs(tmp_path / "set", 5)], ["left"]))


@pytest.mark.parametrize("main", (True, False))
def test_a_terminal_shows_how_far_the_files_of_a_new_run_are_read(tmp_path, monkeypatch, main):
    shown = terminal(monkeypatch)
    monkeypatch.setattr(distributed, "is_main", lambda: main)
    scenes = find_training([write_pairs(tmp_path / "set", 5)], ["left"])
    assert ("looking at the files:   0%|          | 0/5" in shown.getvalue()) == main
    split(scenes)
    assert ("comparing backgrounds:   0%|          | 0/5" in shown.getvalue()) == main


def test_the_split_depends_on_names_and_split_seed_alone(pictures_by_name):
    scenes = named_scenes(100)
    expected = part_of(scenes)
    np.random.seed(5)
    torch.manual_seed(5)
    assert part_of(scenes[::-1]) == expected
    assert part_of(scenes[50:] + scenes[:50]) == expected
    assert part_of(scenes, seed=1) != expected


def test_a_scene_keeps_its_part_under_another_folder(pictures_by_name):
    moved = [
        scene._replace(clean=scene.clean._replace(path=Path("elsewhere") / scene.clean.path))
        for scene in named_scenes(20)
    ]
    assert part_of(moved) == part_of(named_scenes(20))


def test_one_background_under_two_names_is_in_one_part(tmp_path):
    """Coded anew as JPEG, or scaled; for any split, and whatever the order of the files."""
    for i in range(8):
        clean = photograph(i, 96, 128)
        smaller = cv2.resize(clean, (96, 72), interpolation=cv2.INTER_AREA)
        write_image(tmp_path / "target" / f"{i}.png", clean)
        write_image(tmp_path / "target" / f"{i}again.jpg", clean, quality=60)
        write_image(tmp_path / "target" / f"a_small_{i}.png", smaller)
    for file in list_images(tmp_path / "target"):
        write_image(tmp_path / "input" / f"{file.stem}.png", rain_on(read_image(file), 0))
    scenes = find_training([tmp_path])
    assert len(set(dataset.background_keys(scenes))) == 8
    for seed in range(5):
        part = part_of(scenes, seed)
        assert len(part) == 24
        assert all(part[f"{i}"] == part[f"{i}again"] == part[f"a_small_{i}"] for i in range(8))
        assert part_of(scenes[::-1], seed) == part


def test_one_background_in_several_scenes_of_did_mdns_layout_is_in_one_part(tmp_path):
    write_scenes(tmp_path, 6)
    for folder in (tmp_path / "DID-MDN-training").glob("Rain_*/train2018new"):
        (folder / "again.png").write_bytes((folder / "3.png").read_bytes())
    scenes = find_training([tmp_path])
    for seed in range(5):
        part = part_of(scenes, seed)
        assert len(part) == 7
        assert part["3"] == part["again"]


def test_crops_of_one_picture_are_in_one_part(tmp_path):
    for i in range(4):
        for k in range(3):
            for folder in ("Input_Crops", "Target_Crops"):
                write_image(tmp_path / folder / f"{i}-{k}.png", photograph(3 * i + k))
    for part in split(find_training([tmp_path])).values():
        names = [scene.name for scene in part]
        assert {f"{name[0]}-{k}" for name in names for k in range(3)} == {*names}


def test_crops_that_are_numbered_through_are_pictures_of_their_own(tmp_path):
    for i in range(4):
        for folder in ("input_crops", "target_crops"):
            write_image(tmp_path / folder / f"crop_{i:04}.png", photograph(i))
    assert [len(part) for part in split(find_training([tmp_path])).values()] == [1, 2, 1]


def test_one_background_in_two_folders_is_in_one_part(tmp_path):
    """Scenes and pairs over the same photographs: what was searched with must not be validated on."""
    write_scenes(tmp_path / "scenes", 6, first=0)
    write_pairs(tmp_path / "pairs", 6, first=2)
    scenes = find_training([tmp_path / "scenes", tmp_path / "pairs"], ["right", "left"])
    for seed in range(5):
        parts = split(scenes, seed)
        pictures = {
            part: {dataset.read_half(scene.clean).tobytes() for scene in members}
            for part, members in parts.items()
        }
        assert sum(map(len, parts.values())) == 12
        assert len(set.union(*pictures.values())) == sum(map(len, pictures.values())) == 8


def test_a_folder_given_twice_is_read_once_and_counts_twice(tmp_path, monkeypatch):
    read, checked = [], []
    read_half, check_sizes = dataset.read_half, dataset.check_sizes
    monkeypatch.setattr(dataset, "read_half", lambda half: read.append(half) or read_half(half))
    monkeypatch.setattr(dataset, "check_sizes", lambda scene: checked.append(scene) or check_sizes(scene))
    write_pairs(tmp_path, 6)
    parts = split(find_training([tmp_path, tmp_path], ["left"]))
    assert len(read) == len(checked) == 6
    assert sum(map(len, parts.values())) == 12
    once = split(find_training([tmp_path], ["left"]))
    assert all({*parts[name]} == {*once[name]} for name in parts)


def test_pictures_alike_by_way_of_a_third_are_one_background():
    """A is like B and B like C, but A not like C: in any order they are one picture."""
    rng = np.random.default_rng(0)
    a, b, c, other = rng.normal(size=(4, 256))
    b, c = a + 0.055 * b, a + 0.055 * b + 0.055 * c
    a, b, c, other = (v / np.linalg.norm(v) for v in (a, b, c, other))
    assert a @ b > 0.998 < b @ c
    assert a @ c < 0.998
    for order in ([a, b, c, other], [a, c, b, other], [c, other, a, b], [other, b, a, c]):
        groups = dataset.same_pictures(order)
        together = {groups[i] for i, v in enumerate(order) if v is not other}
        assert len(together) == 1
        assert [groups[i] for i, v in enumerate(order) if v is other][0] not in together


def test_pictures_that_are_much_alike_are_two_backgrounds():
    """Different ones of Rain800 correlate up to 0.994."""
    rng = np.random.default_rng(0)
    first, change = (v / np.linalg.norm(v) for v in rng.normal(size=(2, 256)))
    second = first + 0.11 * change
    second /= np.linalg.norm(second)
    assert 0.993 < first @ second < 0.995
    assert dataset.same_pictures([first, second]) == [0, 1]


def test_pictures_far_apart_in_a_long_list_are_one_background():
    """Of 700 pictures number 3 is there again as 300 and 650, and 500 is like both 299 and 301."""
    pictures = np.random.default_rng(0).normal(size=(700, 256))
    pictures[[300, 650]] = pictures[3]
    pictures /= np.linalg.norm(pictures, axis=1, keepdims=True)
    pictures[500] = pictures[299] + pictures[301]
    pictures[500] /= np.linalg.norm(pictures[500])
    expected = [*range(700)]
    expected[300] = expected[650] = 3
    expected[301] = expected[500] = 299
    assert dataset.same_pictures([*pictures], threshold=0.65) == expected


def test_faint_pictures_are_told_apart_and_known_again():
    image = photograph(0, 128, 192)
    for contrast in (1, 0.3, 0.15):
        faint, other = (
            np.rint(40 + contrast * (p - p.mean())).clip(0, 255).astype(np.uint8)
            for p in (image, photograph(1, 128, 192))
        )
        again = cv2.imdecode(cv2.imencode(".jpg", faint, [cv2.IMWRITE_JPEG_QUALITY, 90])[1], cv2.IMREAD_COLOR)
        assert dataset.same_pictures([*map(dataset.thumbnail, (faint, again, other))]) == [0, 0, 2], contrast


def test_flat_pictures_are_not_taken_for_one_another():
    for size in ((32, 32), (37, 51)):  # whose means round
        flat = [dataset.thumbnail(np.full((*size, 3), level, np.uint8)) for level in (9, 9, 201)]
        assert dataset.same_pictures(flat) == [0, 1, 2]
    flat = dataset.thumbnail(np.full((32, 32, 3), 9, np.uint8))
    assert dataset.same_pictures([flat, flat, dataset.thumbnail(photograph(0))]) == [0, 1, 2]


def test_under_three_backgrounds_are_refused(tmp_path):
    for i in range(2):
        write_image(tmp_path / "gt" / f"{i}.png", photograph(i))
        for k in (1, 2, 3):
            write_image(tmp_path / "rain" / f"{i}_{k}.png", rain_on(photograph(i), k))
    with pytest.raises(UserError, match="2 different backgrounds.*at least 3"):
        split(find_training([tmp_path]))
    with pytest.raises(UserError, match="0 different backgrounds.*at least 3"):
        split([])


# --- bad input ---


def nothing_there(folder):
    pass


def empty(folder):
    folder.mkdir()


def empty_densities(folder):
    for density in DENSITIES:
        (folder / f"Rain_{density}").mkdir(parents=True)
    (folder / "docs").mkdir()


def empty_pair_folders(folder):
    for name in ("input", "target"):
        (folder / name).mkdir(parents=True)


def density_missing(folder):
    write_scenes(folder, 3)
    (folder / "DID-MDN-training" / "Rain_Light" / "train2018new" / "1.png").unlink()


def density_of_other_name(folder):
    write_scenes(folder, 3)
    file = folder / "DID-MDN-training" / "Rain_Light" / "train2018new" / "1.png"
    file.rename(file.with_name("other.png"))


def density_of_other_size(folder):
    write_scenes(folder, 3)
    file = folder / "DID-MDN-training" / "Rain_Light" / "train2018new" / "1.png"
    write_image(file, np.zeros((HEIGHT, 2 * WIDTH - 4, 3), np.uint8))


def pair_folders(folder):
    for i in range(3):
        write_image(folder / "input" / f"{i}.png", photograph(i))
        write_image(folder / "target" / f"{i}.png", photograph(i))


def rainy_without_clean(folder):
    pair_folders(folder)
    (folder / "target" / "1.png").unlink()


def clean_without_rainy(folder):
    pair_folders(folder)
    (folder / "input" / "1.png").unlink()


def pair_of_two_sizes(folder):
    pair_folders(folder)
    write_image(folder / "input" / "1.png", photograph(1, HEIGHT, WIDTH + 2))


def two_clean_of_one_name(folder):
    pair_folders(folder)
    write_image(folder / "target" / "1.bmp", photograph(1))


def three_folders(folder):
    pair_folders(folder)
    (folder / "rainy").mkdir()


def pair_under_11_pixels(folder):
    pair_folders(folder)
    for name in ("input", "target"):
        write_image(folder / name / "1.png", photograph(1, 10, 40))


def single_images(folder):
    write_image(folder / "1.png", photograph(0))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (nothing_there, ["set", "no such file or folder"]),
        (empty, ["set", "no images"]),
        (empty_densities, ["set: no images in Rain_Heavy, Rain_Medium, Rain_Light"]),
        (empty_pair_folders, ["set", "no images", "input", "target"]),
        (density_missing, ["Rain_Heavy/train2018new/1.png", "no partner", "1 more"]),
        (density_of_other_name, ["train2018new/1.png", "no partner"]),
        (density_of_other_size, ["Rain_Light/train2018new/1.png", "30x24", "32x24", "one size"]),
        (rainy_without_clean, ["input/1.png", "no partner"]),
        (clean_without_rainy, ["target/1.png", "no partner"]),
        (pair_of_two_sizes, ["1.png", "34x24", "32x24", "one size"]),
        (two_clean_of_one_name, ["target/1.", "has the same name as another clean image, 1."]),
        (three_folders, ["set", "input", "rainy", "target"]),
        (pair_under_11_pixels, ["1.png", "40x10", "at least 11x11; repair or remove this scene"]),
        (single_images, ["set", "single images", "--clean_side"]),
    ],
)
def test_folders_that_cannot_be_trained_on_are_refused_by_name(tmp_path, make, words):
    make(tmp_path / "set")
    with pytest.raises(UserError) as error:
        find_training([tmp_path / "set"])
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_how_many_scenes_are_bad_is_said_at_once(tmp_path):
    pair_folders(tmp_path)
    for i in (0, 2):
        write_image(tmp_path / "input" / f"{i}.png", photograph(i, HEIGHT, WIDTH + 2))
    with pytest.raises(UserError, match=r"/0\.png: .*\(2 scenes are bad: python dataset.py DIR lists all\)$"):
        find_training([tmp_path])


def test_a_file_that_has_another_size_by_the_time_it_is_read_is_refused(tmp_path):
    pair_folders(tmp_path)
    scene = find_training([tmp_path])[1]
    write_image(tmp_path / "input" / "1.png", photograph(1, HEIGHT, WIDTH + 2))
    with pytest.raises(UserError, match="target/1.png: 32x24 pixels, but .*input/1.png .* is 34x24"):
        read_scene(scene)


def test_empty_side_by_side_folder_and_odd_width_are_refused(tmp_path):
    with pytest.raises(UserError, match="no images"):
        (tmp_path / "empty").mkdir()
        find_training([tmp_path / "empty"], ["left"])
    write_pairs(tmp_path / "pairs", 3)
    write_image(tmp_path / "pairs" / "1.png", photograph(1, 24, 63))
    with pytest.raises(UserError, match=r"pairs/1\.png: .*width of 63 is odd"):
        find_training([tmp_path / "pairs"], ["left"])
    (scene,) = find(tmp_path / "pairs" / "1.png", "left").scenes
    with pytest.raises(UserError, match=r"1\.png: .*63 is odd"):
        read_scene(scene)


def zero_bytes(file):
    file.write_bytes(b"")


def text(file):
    file.write_text("this is no JPEG, whatever its name says\n" * 50)


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 30 // 100])


@pytest.mark.parametrize("damage", [zero_bytes, text, cut])
def test_unreadable_files_are_refused_by_name_before_training(tmp_path, damage):
    write_pairs(tmp_path / "pairs", 4, suffix=".jpg")
    write_scenes(tmp_path / "scenes", 4, suffix=".jpg")
    bad = (
        tmp_path / "pairs" / "2.jpg",
        tmp_path.joinpath("scenes", "DID-MDN-training", "Rain_Light", "train2018new", "2.jpg"),
    )
    for file, side in zip(bad, (["left"], []), strict=True):
        damage(file)
        root = tmp_path / ("pairs" if side else "scenes")
        with pytest.raises(UserError) as error:
            find_training([root], side)
        assert str(error.value).startswith(f"{file}: ")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_damaged_while_training_goes_on_is_named_and_replaced(tmp_path, workers):
    """Only the draws of its scene change, to one that does not depend on who found out, or when."""
    scenes = find_training([write_pairs(tmp_path, 6, suffix=".jpg")], ["left"])
    whole = batches(scenes, 12)
    cut(tmp_path / "2.jpg")
    found = batches(scenes, 12, workers)
    assert_equal_batches(found, batches(scenes, 12, bad={scenes[2].key}))
    for before, after in zip(whole, found, strict=True):
        assert len(after.names) == 2
        for i, name in enumerate(before.names):
            if name == "2":
                assert after.names[i] != "2"
            else:
                assert after.names[i] == name
                assert torch.equal(after.clean[i], before.clean[i])
    ((key, why),) = {bad for batch in found for bad in batch.bad}
    assert key == scenes[2].key
    assert why.startswith(f"{tmp_path / '2.jpg'}: is ")
    assert sum(len(batch.bad) for batch in found) <= max(1, workers)
    assert "\n" not in why


def test_a_file_that_could_not_be_read_once_is_left_out_for_good(tmp_path):
    """By all workers: which of them meets it next must not matter."""
    scenes = find_training([write_pairs(tmp_path, 3)], ["left"])
    endless = dataset.batches(scenes, 16, 1, seed=0, device="cpu", workers=2)
    content = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").unlink()
    first = [next(endless) for _ in range(9)]
    (tmp_path / "1.png").write_bytes(content)
    later = [next(endless) for _ in range(20)]
    assert any(batch.bad for batch in first)
    assert not any("1" in batch.names or batch.bad for batch in later)


@pytest.mark.parametrize("workers", [0, 1])
def test_where_nothing_can_be_read_any_more_there_is_no_endless_search(tmp_path, workers):
    scenes = find_training([write_pairs(tmp_path, 7)], ["left"])
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"\.png: .*; 7 scenes in a row cannot be read"):
        batches(scenes, 1, workers)
    with pytest.raises(UserError, match=f"; {dataset.GIVE_UP} scenes in a row cannot be read"):
        batches(dataset.GIVE_UP * scenes, 1, workers)
    with pytest.raises(UserError, match="--data: no scene can be read any more"):
        batches(scenes, 1, workers, bad={scene.key for scene in scenes})


@pytest.mark.parametrize("size", [0, -1, 1.5, None, "a", math.nan])
@pytest.mark.parametrize("name", ["patch_size", "batch_size"])
def test_a_size_that_is_none_and_no_scenes_are_refused(name, size):
    sizes = {"patch_size": 16, "batch_size": 2}
    scene = dataset.Scene("a", (dataset.Half(Path("a.png")),), dataset.Half(Path("b.png")))
    with pytest.raises(ValueError, match=f"{name} is {size!r}; a whole number from 1 is allowed"):
        next(dataset.batches([scene], **sizes | {name: size}, seed=0, device="cpu"))
    with pytest.raises(ValueError, match="scenes is empty"):
        next(dataset.batches([], **sizes, seed=0, device="cpu"))


def test_a_patch_may_be_a_single_pixel(tmp_path):
    scenes = find_training([write_pairs(tmp_path, 3)], ["left"])
    endless = dataset.batches(scenes, patch_size=1, batch_size=3, seed=0, device="cpu")
    for batch in islice(endless, 8):  # all flips and turns are among so many
        assert batch.rainy.shape == batch.clean.shape == (3, 3, 1, 1)
        for name, pixel in zip(batch.names, batch.clean[..., 0, 0], strict=True):
            clean = read_image(tmp_path / f"{name}.png")[:, :WIDTH].reshape(-1, 3)
            assert (clean == (255 * pixel).round().byte().numpy()).all(axis=1).any()


def test_validation_leaves_out_what_cannot_be_read(tmp_path):
    scenes = find_training([write_pairs(tmp_path, 3)], ["left"])
    cut(tmp_path / "1.png")
    bad = []
    assert len(list(dataset.full_images(scenes, bad))) == 2
    ((key, why),) = bad
    assert key == scenes[1].key == str(tmp_path / "1.png")
    assert why.startswith(key)
    with pytest.raises(UserError, match=r"1\.png"):
        list(dataset.full_images(scenes))


def test_scenes_of_every_layout_are_the_same_after_they_were_text(tmp_path):
    write_scenes(tmp_path / "scenes", 2)
    write_pairs(tmp_path / "pairs", 2)
    pair_folders(tmp_path / "two")
    folders = [tmp_path / name for name in ("scenes", "pairs", "two")]
    for folder, side in zip(folders, (None, "left", None), strict=True):
        for scene in find_training([folder], [side] if side else []):
            assert dataset.from_plain(json.loads(json.dumps(dataset.plain(scene)))) == scene


@pytest.mark.parametrize("sides", [["left", "left"], ["left"] * 4])
def test_as_many_sides_as_folders_or_one(tmp_path, sides):
    folders = [write_pairs(tmp_path / name, 1) for name in "abc"]
    with pytest.raises(UserError, match=f"--clean_side: {len(sides)} given for 3 folders"):
        find_training(folders, sides)
    assert len(find_training(folders, ["left"])) == 3
    assert len(find_training(folders, ["left", "right", "left"])) == 3


def test_spread_takes_its_scenes_from_every_mixed_folder():
    scenes = [*range(10), *range(100, 105)]
    assert dataset.spread(scenes, 3) == [0, 5, 100]
    assert dataset.spread(scenes, 0) == dataset.spread(scenes, 99) == scenes


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no text are Linux's")
def test_names_that_are_no_text_are_split_and_trained_on(tmp_path):
    write_pairs(tmp_path, 3)
    (tmp_path / "1.png").rename(tmp_path / os.fsdecode(b"\xe9t\xe9.png"))
    parts = dataset.split(dataset.find_training([tmp_path], ["left"]))
    names = [scene.name for part in parts.values() for scene in part]
    assert sorted(os.fsencode(name) for name in names) == [b"0", b"2", b"\xe9t\xe9"]


def test_a_path_and_a_side_alone_stand_for_lists_of_one(tmp_path):
    folder = write_pairs(tmp_path / "pairs", 2)
    expected = find_training([folder], ["left"])
    assert find_training(folder, "left") == find_training(str(folder), "left") == expected
    with pytest.raises(UserError, match="--clean_side: 'LEFT' is neither left nor right"):
        find_training(folder, ["LEFT"])


def test_the_test_set_is_known_from_within_and_not_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(write_pairs(tmp_path / "DID-MDN-test", 3, clean_side="right"))
    with pytest.raises(UserError, match="is DID-MDN's test set, not to be trained on"):
        find_training(["."])


def test_a_pair_under_11_pixels_wide_is_refused_as_a_low_one_is(tmp_path):
    for i in range(3):
        for name in ("input", "target"):
            write_image(tmp_path / name / f"{i}.png", photograph(i, 40, 10 if i == 1 else 40))
    with pytest.raises(UserError, match="1.png: 10x40 pixels; training images need at least 11x11"):
        find_training([tmp_path])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_is_neither_a_picture_nor_a_folder_is_refused(tmp_path):
    """Opened, it would be waited for."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: neither a picture nor a folder that can be read"):
        find(tmp_path / "pipe")
