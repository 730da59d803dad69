"""`python dataset.py DIR [TEST_DIR]`: what is wrong with data is found, named and told by the status."""

import subprocess
import sys

import cv2
import numpy as np
import pytest

from dataset import find, read_scene
from support import check
from support.check import get_args_parser, main, match, rain_score
from support.errors import UserError
from support.images import read_image, write_image
from support.rain import STYLES, make_scene
from tests.made import HEIGHT, ROOT, WIDTH, photograph, rain_on, terminal, write_pairs, write_scenes

DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not here")


@pytest.fixture
def run(capsys):
    """Check folders in this process -> (exit status, the report)."""

    def checked(*args):
        status = main(get_args_parser().parse_args([str(arg) for arg in args]))
        return status, capsys.readouterr().out

    return checked


def training(folder, density="Heavy"):
    return folder / "DID-MDN-training" / f"Rain_{density}" / "train2018new"


def halves(file):
    image = read_image(file)
    return image[:, :WIDTH], image[:, WIDTH:]


# --- sets as they should be ---


def test_a_clean_set_passes(tmp_path, run):
    status, report = run(write_pairs(tmp_path / "pairs", 6), "--clean_side", "left")
    assert status == 0
    for words in ("side-by-side pairs, clean half left", "6 pairs", "all images 32x24", "nothing is wrong"):
        assert words in report
    assert "WRONG" not in report


def test_a_file_alone_has_its_name(tmp_path, run):
    (tmp_path / "cut.png").write_bytes(b"")
    status, report = run(tmp_path / "cut.png")
    assert status == 1 and f"unreadable (1): {tmp_path}/cut.png (is empty" in report


def test_pairs_in_two_folders_pass(tmp_path, run):
    for i in range(4):
        write_image(tmp_path / "input" / f"{i}.png", rain_on(photograph(i), i))
        write_image(tmp_path / "target" / f"{i}.png", photograph(i))
    status, report = run(tmp_path)
    assert status == 0
    assert "pairs in input/ and target/" in report


def test_did_mdn_root_is_checked_as_training_and_test(tmp_path, run, monkeypatch):
    write_scenes(tmp_path, 3)
    write_pairs(tmp_path / "DID-MDN-test", 4, clean_side="right")
    status, report = run(tmp_path)
    assert status == 0
    assert "3 scenes; files: Heavy 3, Medium 3, Light 3" in report
    assert "4,000 scenes in 3 densities" in report
    assert "4 pairs" in report
    assert "1,200 pairs" in report
    assert "no background of" in report
    monkeypatch.chdir(tmp_path / "DID-MDN-test")
    shown = terminal(monkeypatch)
    assert "1,200 pairs" in run(".")[1]
    assert "DID-MDN-test:   0%" in shown.getvalue()
    write_pairs(tmp_path / "DID-MDN-test", 1, clean_side="right", first=101)  # the training set's 1.png
    status, report = run(tmp_path)
    assert status == 1
    assert "0 = 1" in report


def test_photographs_below_a_folder_named_like_a_density_are_not_did_mdn(tmp_path, run):
    write_image(tmp_path / "Rain_Heavy" / "a.png", photograph(0))
    report = run(tmp_path / "Rain_Heavy")[1]
    assert "1 images" in report and "DID-MDN" not in report


def test_sizes_are_summed_up(tmp_path, run):
    write_pairs(tmp_path, 5)
    write_image(tmp_path / "wide.png", np.hstack([photograph(9, 24, 50), rain_on(photograph(9, 24, 50), 9)]))
    write_image(tmp_path / "low.png", np.hstack([photograph(8, 20, 32), rain_on(photograph(8, 20, 32), 8)]))
    status, report = run(tmp_path, "--clean_side", "left")
    assert status == 0
    assert "3 sizes, 32x20 to 50x24, most often 32x24 (5 of 7)" in report


def test_single_images_that_look_like_pairs_are_noted(tmp_path, run):
    status, report = run(write_pairs(tmp_path, 4, clean_side="right"))
    assert status == 0
    assert "4 look like side-by-side pairs, clean half right: give --clean_side right" in report


def test_half_of_the_pictures_that_look_like_pairs_are_not_enough_to_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "rain_score", lambda rainy, clean: float(rainy.mean() - clean.mean()))
    for i in range(4):
        left = photograph(i, 96, 128)
        right = rain_on(left, i) if i < 2 else photograph(10 + i, 96, 128)
        write_image(tmp_path / f"{i}.png", np.hstack([left, right]))
    found = find(tmp_path)
    assert check.single_hint(found.scenes) == ""
    assert not [f.text for f in check.check(tmp_path, found).findings if "side-by-side" in f.text]
    (tmp_path / "3.png").unlink()
    found = find(tmp_path)
    assert "2 of 3 looked at seem to be side-by-side pairs" in check.single_hint(found.scenes)
    assert [f.text for f in check.check(tmp_path, found).findings if "side-by-side" in f.text]


def test_a_hint_is_given_where_most_pairs_are_bad_and_not_of_one(tmp_path):
    write_pairs(tmp_path, 4)
    said = []
    for i in range(3):
        write_image(tmp_path / f"{i}.png", np.hstack([photograph(i), rain_on(photograph(i + 10), 1)]))
        said.append(check.pair_hint(find(tmp_path, "left").scenes))
    assert said[:2] == ["", ""]
    assert said[2] == f"{check.OTHER_PICTURE}, in 3 of 4 images looked at; python dataset.py looks at all"


def test_flat_pictures_are_not_noted_as_pairs(tmp_path, run):
    for i in range(4):
        write_image(tmp_path / f"{i}.png", np.full((24, 64, 3), 40 * i, np.uint8))
    assert "side-by-side" not in run(tmp_path)[1]


def test_pictures_with_a_flat_half_are_not_taken_for_pairs(tmp_path):
    for i in range(4):
        flat = np.full((96, 128, 3), 90, np.uint8)
        write_image(tmp_path / f"{i}.png", np.hstack([photograph(i, 96, 128), flat]))
    assert check.single_hint(find(tmp_path).scenes) == ""


def test_halves_that_are_alike_without_rain_on_either_are_not_taken_for_pairs(tmp_path):
    """As of two shots in one."""
    for i in range(4):
        left = photograph(i, 96, 128) // 2 + 60
        grain = np.random.default_rng(i).integers(-1, 2, left.shape)
        write_image(tmp_path / f"{i}.png", np.hstack([left, (left + grain).astype(np.uint8)]))
    looks = [check.examine(scene, tmp_path) for scene in find(tmp_path).scenes]
    assert all(check.HINT_MATCH < look.match < 1 for look in looks)
    assert check.single_hint(find(tmp_path).scenes) == ""


def test_what_is_good_but_cannot_be_trained_on_is_noted(tmp_path, run):
    status, report = run(write_pairs(tmp_path, 2), "--clean_side", "left")
    assert (
        status == 0 and "different backgrounds: 2; training needs 3, one for each part of its split" in report
    )
    status, report = run(write_pairs(tmp_path, 3), "--clean_side", "left")
    assert status == 0 and "training" not in report
    status, report = run(write_pairs(tmp_path, 3))
    assert status == 0 and "without ground truth: to be restored, but not" in report


def test_pictures_without_rain_are_noted_and_wrong_where_they_are_most(tmp_path, run):
    write_pairs(tmp_path, 6)
    for i, (status, count) in enumerate([(0, 1), (0, 2), (0, 3), (1, 4)]):
        clean = read_image(tmp_path / f"{i}.png")[:, :32]
        write_image(tmp_path / f"{i}.png", np.hstack([clean, clean]))
        found, said = run(tmp_path, "--clean_side", "left")
        assert f"the rainy image equals the clean one ({count}): 0.png" in said
        assert found == status


def test_a_picture_too_large_for_the_memory_is_named_and_the_rest_is_checked(tmp_path, capsys, monkeypatch):
    def read(path, read=check.read_image):
        if path.name == "2.png":
            raise MemoryError
        return read(path)

    monkeypatch.setattr(check, "read_image", read)
    write_pairs(tmp_path, 6)
    args = check.get_args_parser().parse_args([str(tmp_path), "--clean_side", "left"])
    assert check.main(args) == 1
    report = capsys.readouterr().out
    assert "too large for the memory here (1): 2.png\n" in report and "1 thing is wrong" in report


def test_a_folder_that_cannot_be_asked_for_is_one_line(tmp_path, run):
    """As one that may not be looked into; before Python 3.14 Path.is_dir raises on both."""
    with pytest.raises(UserError, match="x: no such file or folder"):
        run(tmp_path / (300 * "x"))


def test_training_and_test_pairs_in_one_folder_are_noted(tmp_path, run):
    for part in ("train", "test"):
        for kind in ("rain", "norain"):
            picture = photograph(0) if kind == "norain" else rain_on(photograph(0), 1)
            write_image(tmp_path / part / f"{kind}-1.png", picture)
    status, report = run(tmp_path)
    assert status == 0
    assert (
        "not to be trained on: holds pairs in train and in test; give only the folder to train on" in report
    )


def test_a_folder_that_cannot_be_read_is_wrong_and_named(tmp_path, run, closed):
    for name in ("a.png", "b.png", "closed/c.png"):
        write_image(tmp_path / name, photograph(ord(name[0])))
    status, report = run(tmp_path)
    assert status == 1 and f"WRONG: {tmp_path}/closed: cannot be read: Permission denied\n" in report
    assert "2 images" in report


def test_copies_of_a_background_are_noted(tmp_path, run):
    write_pairs(tmp_path, 4)
    write_image(tmp_path / "again.png", np.hstack([photograph(2), rain_on(photograph(2), 77)]))
    status, report = run(tmp_path, "--clean_side", "left")
    assert status == 0
    assert "4 different backgrounds in 5 scenes: 2 = again" in report
    for i in range(9):
        write_image(tmp_path / f"again_{i}.png", np.hstack([photograph(2), rain_on(photograph(2), i)]))
    status, report = run(tmp_path, "--clean_side", "left")
    assert "14 scenes: 2 = again = again_0 = again_1 = again_2 and 6 more;" in report


# --- one fault in a set that is good otherwise ---


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 80 // 100])


def truncated(folder):
    write_pairs(folder, 6, suffix=".jpg")
    cut(folder / "2.jpg")
    return ["unreadable (1): 2.jpg (is truncated"]


def no_image(folder):
    write_pairs(folder, 6)
    (folder / "3.png").write_text("no image at all")
    (folder / "4.png").write_bytes(b"")
    return ["unreadable (2): 3.png (", "4.png (is empty"]


def odd_width(folder):
    write_pairs(folder, 6)
    write_image(folder / "1.png", photograph(1, HEIGHT, 63))
    return ["odd width", "(1): 1.png (63 pixels)"]


def too_small(folder):
    write_pairs(folder, 6)
    write_image(folder / "1.png", np.hstack([photograph(1, 10, 32)] * 2))
    return ["under 11 pixels", "1.png (32x10)"]


def other_content(folder):
    write_pairs(folder, 6)
    write_image(folder / "4.png", np.hstack([photograph(4), rain_on(photograph(5), 1)]))
    return ["the rainy and the clean image show different pictures", "(1): 4.png"]


def swapped(folder):
    write_pairs(folder, 6)
    write_image(folder / "5.png", np.hstack(halves(folder / "5.png")[::-1]))
    return ["looks swapped", "(1): 5.png"]


@pytest.mark.parametrize("plant", [truncated, no_image, odd_width, too_small, other_content, swapped])
def test_a_fault_among_side_by_side_pairs_is_found_and_named(tmp_path, run, plant):
    words = plant(tmp_path)
    status, report = run(tmp_path, "--clean_side", "left")
    assert status == 1
    (line,) = [line for line in report.splitlines() if "WRONG" in line]
    assert all(word in line for word in words), line
    assert "1 thing is wrong" in report


def density_missing(folder):
    (training(folder, "Light") / "2.png").unlink()
    return ["no partner (2): ", "Rain_Heavy/train2018new/2.png", "Rain_Medium/train2018new/2.png"]


def other_clean_half(folder):
    file = training(folder, "Medium") / "1.png"
    write_image(file, np.hstack([halves(file)[0], photograph(55)]))
    return ["clean half differs", "(1): Rain_Medium/train2018new/1.png"]


def other_size(folder):
    write_image(training(folder, "Light") / "1.png", np.zeros((HEIGHT, 60, 3), np.uint8))
    return ["size differs", "(1): Rain_Light/train2018new/1.png (30x24, not 32x24)"]


def truncated_density(folder):
    cut(training(folder, "Light") / "0.png")
    return ["unreadable (1): Rain_Light/train2018new/0.png"]


def other_clean_half_in_the_first(folder):
    file = training(folder, "Heavy") / "1.png"
    write_image(file, np.hstack([halves(file)[0], photograph(55)]))
    return ["clean half differs", "(1): Rain_Heavy/train2018new/1.png"]


def one_density_swapped(folder):
    file = training(folder, "Heavy") / "1.png"
    write_image(file, np.hstack(halves(file)[::-1]))
    return ["looks swapped", "(1): Rain_Heavy/train2018new/1.png"]


PLANTS = [density_missing, other_clean_half, other_clean_half_in_the_first, one_density_swapped]


@pytest.mark.parametrize("plant", [*PLANTS, other_size, truncated_density])
def test_a_fault_among_densities_is_found_and_named(tmp_path, run, plant):
    write_scenes(tmp_path, 4)
    words = plant(tmp_path)
    status, report = run(tmp_path)
    assert status == 1
    (line,) = [line for line in report.splitlines() if "WRONG" in line]
    assert all(word in line for word in words), line


def test_sizes_that_differ_and_files_without_partner_in_two_folders(tmp_path, run):
    for i in range(5):
        write_image(tmp_path / "input" / f"{i}.png", rain_on(photograph(i), i))
        write_image(tmp_path / "target" / f"{i}.png", photograph(i))
    write_image(tmp_path / "input" / "1.png", photograph(1, HEIGHT, WIDTH + 2))
    (tmp_path / "target" / "3.png").unlink()
    status, report = run(tmp_path)
    assert status == 1
    assert "size differs from the clean image's (1): input/1.png (34x24, not 32x24)" in report
    assert "no partner (1): input/3.png" in report
    assert "2 things are wrong" in report


def test_at_most_five_files_are_named(tmp_path, run):
    write_pairs(tmp_path, 8)
    for i in range(7):
        (tmp_path / f"{i}.png").write_bytes(b"")
    status, report = run(tmp_path, "--clean_side", "left")
    assert status == 1
    assert "unreadable (7): 0.png" in report
    assert "and 2 more" in report
    assert "5.png" not in report


# --- swapped sides ---


@pytest.mark.parametrize(("given", "right"), [("left", "right"), ("right", "left")])
def test_the_wrong_side_is_one_line_that_says_what_to_give(tmp_path, run, given, right):
    status, report = run(write_pairs(tmp_path, 6, clean_side=right), "--clean_side", given)
    assert status == 1
    (line,) = [line for line in report.splitlines() if "WRONG" in line]
    assert f"give --clean_side {right}" in line
    assert "different backgrounds" not in report


def test_one_side_is_for_the_folders_but_did_mdns_own(tmp_path, run):
    write_scenes(tmp_path / "scenes", 6)
    pairs = write_pairs(tmp_path / "pairs", 4, clean_side="left", first=50)
    status, report = run(tmp_path / "scenes", pairs, "--clean_side", "left")
    assert status == 0 and "no background of" in report


def test_the_wrong_side_of_scenes_is_one_line(tmp_path, run):
    status, report = run(write_scenes(tmp_path, 4), "--clean_side", "left")
    assert status == 1
    (line,) = [line for line in report.splitlines() if "WRONG" in line]
    assert "give --clean_side right" in line


def test_two_folders_the_wrong_way_round(tmp_path, run):
    for i in range(4):
        write_image(tmp_path / "input" / f"{i}.png", photograph(i))
        write_image(tmp_path / "target" / f"{i}.png", rain_on(photograph(i), i))
    status, report = run(tmp_path)
    assert status == 1
    assert "exchange the two folders' names" in report


def test_files_of_one_folder_named_the_wrong_way_round(tmp_path, run):
    for i in range(4):
        write_image(tmp_path / f"rain-{i}.png", photograph(i))
        write_image(tmp_path / f"norain-{i}.png", rain_on(photograph(i), i))
    status, report = run(tmp_path)
    assert status == 1
    assert "exchange the names of rainy and clean files" in report


@pytest.mark.parametrize("style", STYLES)
def test_rain_score_tells_rain_of_every_style_and_turns_with_the_sides(style):
    clean = photograph(3, 120, 160)
    for density, rainy in make_scene(clean, 5, style).items():
        score = rain_score(rainy, clean)
        assert score > -check.SWAPPED, (style, density)
        assert rain_score(clean, rainy) == pytest.approx(-score, abs=1e-5)
        assert match(rainy, clean) > check.MATCH
    assert rain_score(clean, clean) == 0


def test_rain_score_is_its_formula():
    clean = photograph(3, 512, 512)
    rainy = rain_on(clean, 3)
    x, y = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float64) for image in (rainy, clean))
    detail = x - y - cv2.GaussianBlur(x - y, (0, 0), 3)
    skewness = (detail**3).mean() / (detail**2).mean() ** 1.5
    steps = [np.abs(np.diff(image, axis=1)).mean() + 0.5 for image in (x, y)]
    assert rain_score(rainy, clean) == pytest.approx(np.log(steps[0] / steps[1]) + skewness / 2, abs=1e-5)


def test_pictures_are_apart_by_the_mean_difference_of_their_values():
    clean = photograph(3, 120, 160)
    both = np.hstack((rain_on(clean, 3), clean))
    left, right = both[:, :160], both[:, 160:]  # as a file's halves, not contiguous
    assert check._apart(left, right) == np.abs(left.astype(int) - right).mean() > 1
    assert check._apart(left, left) == 0


def test_flat_pictures_match_for_want_of_anything_to_compare():
    flat = np.full((40, 40, 3), 128, np.uint8)
    assert match(flat, flat) == 1
    assert match(rain_on(flat, 0), flat) == 1


# --- training and test ---


def test_a_background_in_training_and_test_is_wrong_and_named(tmp_path, run):
    write_pairs(tmp_path / "training", 5)
    write_pairs(tmp_path / "test", 3, clean_side="right", first=4)  # its 0 is the training set's 4
    status, report = run(tmp_path / "training", tmp_path / "test", "--clean_side", "left", "right")
    assert status == 1
    assert "(1, test = training): 0 = 4" in report
    write_pairs(tmp_path / "other", 3, first=50)
    status, report = run(tmp_path / "training", tmp_path / "other", "--clean_side", "left")
    assert status == 0
    assert f"no background of {tmp_path / 'other'} is in {tmp_path / 'training'}" in report


def test_a_folder_against_itself_overlaps(tmp_path, run):
    write_pairs(tmp_path, 3)
    status, report = run(tmp_path, tmp_path, "--clean_side", "left")
    assert status == 1
    assert "(3, test = training): 0 = 0" in report


def test_nothing_is_said_of_an_overlap_where_the_side_is_wrong(tmp_path, run):
    write_pairs(tmp_path / "a", 3)
    write_pairs(tmp_path / "b", 3)
    status, report = run(tmp_path / "a", tmp_path / "b", "--clean_side", "left", "right")
    assert status == 1
    assert "no background" not in report


# --- the command ---


def test_a_users_mistake_is_raised_before_anything_is_read(tmp_path, run):
    write_pairs(tmp_path / "pairs", 2)
    with pytest.raises(UserError, match="nothing: no such file or folder"):
        run(tmp_path / "pairs", tmp_path / "nothing")
    with pytest.raises(UserError, match="--clean_side: 2 given for 1 folder"):
        run(tmp_path / "pairs", "--clean_side", "left", "left")


def test_the_script_ends_with_status_1_for_bad_data_and_2_for_none(tmp_path):
    write_pairs(tmp_path / "bad", 2)
    (tmp_path / "bad" / "0.png").write_bytes(b"")
    command = [sys.executable, "dataset.py", "--clean_side", "left", "--"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    bad, none = (subprocess.Popen([*command, tmp_path / n], cwd=ROOT, **pipes) for n in ("bad", "none"))
    out, errors = bad.communicate()
    assert (bad.returncode, "unreadable (1): 0.png" in out) == (1, True), errors
    out, errors = none.communicate()
    assert none.returncode == 2
    assert errors == f"dataset.py: error: {tmp_path / 'none'}: no such file or folder\n"


# --- real images ---


@needs_data
def test_did_mdn_samples_pass_and_the_wrong_side_is_told(run):
    status, report = run(DATA / "did-mdn-sample")
    assert status == 0
    assert "all images 512x512" in report
    status, report = run(DATA / "did-mdn-sample", "--clean_side", "left")
    assert status == 1
    assert "9 of 9 images" in report
    assert "give --clean_side right" in report


@needs_data
@pytest.mark.parametrize("side", ["left", "right"])
def test_rain800_is_told_from_its_mirror(tmp_path, run, side):
    for file in sorted((DATA / "rain800" / "training").glob("*.jpg"))[::12]:  # 56 of 671
        (tmp_path / file.name).symlink_to(file)
    status, report = run(tmp_path, "--clean_side", side)
    assert status == (0 if side == "left" else 1), report
    assert ("give --clean_side left" in report) == (side == "right")


@needs_data
def test_rain800_training_shares_one_background_with_its_test_set(tmp_path, run):
    names = {"training": ["1", "394", "460"], "test": ["6", "10"]}
    for folder, source in (("training", "training"), ("test", "test_syn")):
        (tmp_path / folder).mkdir()
        for name in names[folder]:
            (tmp_path / folder / f"{name}.jpg").symlink_to(DATA / "rain800" / source / f"{name}.jpg")
    status, report = run(tmp_path / "training", tmp_path / "test", "--clean_side", "left")
    assert status == 1
    assert "2 different backgrounds in 3 scenes: 1 = 394" in report
    assert "(1, test = training): 6 = 460" in report


@needs_data
def test_real_pairs_lie_above_the_thresholds_and_other_pictures_below():
    rainy, clean = zip(
        *(read_scene(s) for s in find(DATA / "rain800" / "training", "left").scenes[::40]), strict=True
    )
    for i, (image,) in enumerate(rainy):
        assert match(image, clean[i]) > check.MATCH
        assert rain_score(image, clean[i]) > check.SWAPPED
        assert match(image, clean[i - 1]) < check.MATCH


def test_a_narrow_pair_is_too_small_as_a_low_one_is(tmp_path, run):
    for i in range(3):
        for name in ("input", "target"):
            write_image(tmp_path / name / f"{i}.png", photograph(i, 40, 10 if i == 1 else 40))
    status, report = run(tmp_path)
    assert status == 1
    assert "under 11 pixels a side, too small to train on (1): target/1.png (10x40)" in report
