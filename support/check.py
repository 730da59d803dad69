"""Is a data set fit to train or to score on? Found out before hours are spent on it, by

    python dataset.py datasets/Rain1200                                        DID-MDN, both its parts
    python dataset.py rain800/training rain800/test_syn --clean_side left      training and test

Each file of a scene is opened once. Each kind of fault gets one line, which names files, and makes the exit
status 1; notes do not. The thresholds were set on Rain800, DID-MDN's samples and sets made by `support.rain`
(4,965 pairs in all); the comment beside each says what it tells apart.
"""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from dataset import PARTS, THREADS, cut, same_pictures, spread, thumbnail
from losses import SSIM_WINDOW
from support.command import Parser
from support.distributed import bar
from support.errors import UserError
from support.images import header_size, look_around, read_image
from support.layouts import (
    DENSITIES,
    OTHER_SIDE,
    SIDE_HELP,
    SIDES,
    TEST,
    TRAINING,
    Half,
    Scene,
    find,
    own_name,
    some,
    two_sets,
    with_sides,
)

MATCH = 0.3  # all pairs are above 0.48; 99.9 % of clean images beside another's rain are below 0.24
SWAPPED = -0.1  # all pairs are above -0.05; swapped, 99.6 % of them are below -0.1
SAME_CLEAN = 4.0  # mean absolute difference, grey levels, between clean images of one scene; 0 in DID-MDN
NAMED = 5  # files a line
# How many pictures a hint looks at, and what most of those must exceed. Of Rain800's pairs 98 % do, mostly
# with a match above .9 and a rain score above .2; of BSDS500's photographs none does.
HINT_FROM = 8
HINT_MATCH, HINT_RAIN = 0.6, 0.15
CLEAN_DIFFERS = "the clean half differs from that of the other densities"
OTHER_PICTURE = "the rainy and the clean image show different pictures"
EQUAL = "the rainy image equals the clean one"
DID_MDN = {TRAINING: 4000, TEST: 1200}  # scenes of three densities; pairs


class Finding(NamedTuple):
    """One line of the report. wrong: it makes the exit status 1; a note does not."""

    text: str
    wrong: bool = True


class Look(NamedTuple):
    """What a scene shows when it is opened.

    faults: (kind, text) for what keeps it from being used; where there are any, the rest may be missing.
    size: (height, width) of an image. thumbnail: of the clean image, or of the only one. rain: `rain_score`
    of each rainy image. match: the least `match` of them.
    """

    scene: Scene
    faults: list[tuple[str, str]]
    size: tuple[int, int] | None = None
    thumbnail: np.ndarray | None = None
    rain: list[float] = []
    match: float = 0.0


class Checked(NamedTuple):
    """A folder and what was found in it."""

    folder: Path
    looks: list[Look]
    findings: list[Finding]


# --- one scene ----------------------------------------------------------------------------------------------


def examine(scene, root):
    """Scene -> Look. Nothing is raised: a file that cannot be used is one of its faults."""
    try:
        return _examine(scene, root)
    except MemoryError:
        return Look(scene, [("too large for the memory here", _named(scene.rainy[0].path, root, ""))])


def _examine(scene, root):
    faults = []

    def fault(kind, path, text=""):
        faults.append((kind, _named(path, root, text)))

    files = _decoded(scene, fault)
    if faults:
        return Look(scene, faults)
    if scene.clean is None:
        (image,) = files.values()
        return Look(scene, faults, image.shape[:2], thumbnail(image), *_halves(image))

    pairs = []
    for half in scene.rainy:
        # Side by side, each density brings its own copy of the clean image.
        own = Half(half.path, scene.clean.side) if scene.clean.side else scene.clean
        pairs.append((half, cut(files[half.path], half), cut(files[own.path], own)))
    size = pairs[0][2].shape[:2]
    for half, rainy, _ in pairs:
        if rainy.shape[:2] != size:
            fault("size differs from the clean image's", half.path, f"{_wh(rainy.shape)}, not {_wh(size)}")
    if faults:
        return Look(scene, faults)
    if min(size) < SSIM_WINDOW:
        fault(f"under {SSIM_WINDOW} pixels a side, too small to train on", scene.clean.path, _wh(size))
        return Look(scene, faults)
    copies = [clean for _, _, clean in pairs]
    agreed = min(copies, key=lambda image: sum(_apart(image, other) for other in copies))
    rain, matches = [], []
    for half, rainy, clean in pairs:
        # A rainy half that is the agreed image means swapped sides: its rain score, below, tells.
        if min(_apart(clean, agreed), _apart(rainy, agreed)) > SAME_CLEAN:
            fault(CLEAN_DIFFERS, half.path, f"by {_apart(clean, agreed):.0f} grey levels")
            clean = agreed
        matches.append(match(rainy, clean))
        rain.append(rain_score(rainy, clean))
        if matches[-1] < MATCH:
            fault(OTHER_PICTURE, half.path, f"match {matches[-1]:.2f}")
        if np.array_equal(rainy, clean):
            fault(EQUAL, half.path)
    return Look(scene, faults, size, thumbnail(agreed), rain, min(matches))


def _decoded(scene, fault):
    """{path: image} of a scene's files; fault(kind, path, text) is called for unusable ones."""
    files = {}
    for path in dict.fromkeys(half.path for half in scene.halves):
        try:
            files[path] = read_image(path)
        except UserError as error:
            fault("unreadable", path, str(error).removeprefix(f"{path}: "))
        else:
            if scene.clean and scene.clean.side and files[path].shape[1] % 2:
                fault("odd width, so no two equal halves", path, f"{files[path].shape[1]} pixels")
    return files


def match(rainy, clean):
    """Correlation, -1 to 1, of what two HxWx3 uint8 RGB images show: their detail on a 32x32 grid.

    The grid averages the rain away; subtracting a blur leaves out what many pictures share, like a bright
    sky. 1 where an image is flat, since nothing can be told then.
    """
    details = []
    for image in (rainy, clean):
        grid = cv2.resize(_luma(image), (32, 32), interpolation=cv2.INTER_AREA)
        details.append(grid - cv2.GaussianBlur(grid, (0, 0), 2))
    if min(detail.std() for detail in details) < 0.5:
        return 1.0
    return float(np.corrcoef(details[0].ravel(), details[1].ravel())[0, 1])


def rain_score(rainy, clean):
    """How much more `rainy` looks like rain over `clean` than the other way round; HxWx3 uint8 RGB, both.

    Two measures of rain are added, both of which change sign when the images are swapped: streaks are steep
    across (the logarithm of the ratio of mean horizontal steps, with half a grey level added to both) and
    brighter than what is beside them (half the skewness of the difference's detail). Mean brightness is no
    sign: Rain800 darkens 18 % of its rainy images. Medians: 0.71 in Rain800, 0.42 in DID-MDN's samples.
    """
    rainy, clean = _luma(rainy), _luma(clean)
    steps = [np.abs(np.diff(image, axis=1)).mean() + 0.5 for image in (rainy, clean)]
    difference = rainy - clean
    detail = difference - cv2.GaussianBlur(difference, (0, 0), 3)
    deviation = np.sqrt(np.mean(detail**2))
    cube = detail * detail * detail  # detail**3 takes numpy a hundred times as long
    skewness = np.mean(cube) / deviation**3 if deviation > 0.1 else 0.0
    return float(np.log(steps[0] / steps[1]) + skewness / 2)


def _halves(image):
    """(rain scores, match) of a single image's right half over its left: it may be a pair side by side."""
    middle = image.shape[1] // 2
    if image.shape[1] % 2 or middle < SSIM_WINDOW:
        return [], 0.0
    left, right = image[:, :middle], image[:, middle:]
    return [rain_score(right, left)], match(right, left)


def _apart(x, y):
    """Mean absolute difference in grey levels."""
    return cv2.norm(x, y, cv2.NORM_L1) / x.size


def _luma(image):
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)


# --- one folder ---------------------------------------------------------------------------------------------


def check(folder, found):
    """Check a folder in which `layouts.find` found `found` -> Checked."""
    with ThreadPoolExecutor(THREADS) as pool:
        looks = pool.map(lambda scene: examine(scene, folder), found.scenes)
        looks = list(bar(looks, own_name(folder), len(found.scenes), "scene"))
    findings = [Finding(text, wrong=False) for text in (*counts(folder, found), *sizes(looks))]
    if found.unpaired:
        names = [_relative(path, folder) for path in found.unpaired]
        findings.append(Finding(f"no partner ({len(names):,}): {_list(names)}"))
    findings += [Finding(line) for line in look_around(folder)[1]]
    by_kind = {}
    for look in looks:
        for kind, text in look.faults:
            by_kind.setdefault(kind, []).append(text)
    if text := wrong_side(looks):  # nothing that follows from it is worth a line
        by_kind.pop(CLEAN_DIFFERS, None)
        looks = [look._replace(thumbnail=None) for look in looks]
        further = [Finding(f"{text}, and check again")]
    else:
        further = [*swapped(looks, folder), *side_by_side(looks), *duplicates(looks)]
        further += untrainable(folder, found, looks)
    images = sum(len(look.scene.rainy) for look in looks)
    for kind, texts in by_kind.items():
        wrong = kind != EQUAL or len(texts) > images / 2  # a few dry pictures may be meant
        findings.append(Finding(f"{kind} ({len(texts):,}): {_list(texts)}", wrong))
    findings += further
    return Checked(folder, looks, findings)


def counts(folder, found):
    """How many files there are, by density, and, in DID-MDN's layout, how many DID-MDN has."""
    files = [*(half.path for scene in found.scenes for half in scene.rainy), *found.unpaired]
    folders = [Path(os.path.relpath(path, folder)).parts for path in files]
    by_density = Counter(d for parts in folders for d in DENSITIES if f"Rain_{d}" in parts)
    if not by_density:
        single = any(scene.clean is None for scene in found.scenes)
        yield f"{len(found.scenes):,} {'images' if single else 'pairs'}"
    else:
        each = ", ".join(f"{d} {by_density[d]:,}" for d in DENSITIES if d in by_density)
        yield f"{len(found.scenes):,} scenes; files: {each}"
    expected = DID_MDN.get(TRAINING if by_density else own_name(folder))
    if expected and (len(found.scenes) != expected or len(by_density) not in (0, len(DENSITIES))):
        yield f"the whole of DID-MDN has {expected:,} {'scenes in 3 densities' if by_density else 'pairs'}"


def sizes(looks):
    """The smallest, largest and most common size of the images, width x height in pixels."""
    count = Counter(look.size for look in looks if look.size)
    if len(count) > 1:
        ordered = sorted(count, key=lambda size: (size[0] * size[1], size))
        common, times = count.most_common(1)[0]
        most = f"most often {_wh(common)} ({times:,} of {count.total():,})"
        yield f"{len(count)} sizes, {_wh(ordered[0])} to {_wh(ordered[-1])}, {most}"
    elif count:
        yield f"all images {_wh(*count)}"


def wrong_side(looks, flag="--clean_side"):
    """What to say where most rain is on the clean side, or ""; flag: the one that named that side."""
    scores = [score for _, score in _scores(looks)]
    below = sum(score < SWAPPED for score in scores)
    if below <= len(scores) / 2:
        return ""
    scene = next(look.scene for look in looks if look.scene.clean)
    remedy = "exchange the two folders' names"
    if scene.clean.side:
        remedy = f"give {flag} {OTHER_SIDE[scene.clean.side]}"
    elif scene.clean.path.parent == scene.rainy[0].path.parent:
        remedy = "exchange the names of rainy and clean files"
    measured = f"{below:,} of {len(scores):,} images, median rain score {np.median(scores):.2f}"
    return f"the rain is on the clean side ({measured}): {remedy}"


def swapped(looks, folder):
    names = [
        _named(path, folder, f"rain score {score:.2f}") for path, score in _scores(looks) if score < SWAPPED
    ]
    if names:
        yield Finding(f"looks swapped, rain on the clean side ({len(names):,}): {_list(names)}")


def side_by_side(looks):
    """A note where single images look like pairs: no more, since a flag tells which half is clean."""
    single = [look for look in looks if look.scene.clean is None]
    rain = [look.rain[0] for look in single if look.rain and MATCH <= look.match < 1]  # 1: one half is flat
    if len(rain) > len(single) / 2:
        text = f"{len(rain):,} look like side-by-side pairs, {_flag(rain)}"
        yield Finding(text, wrong=False)


def untrainable(folder, found, looks):
    """A note where nothing is wrong with the pictures and yet they cannot be trained on."""
    if any(scene.clean is None for scene in found.scenes):
        yield Finding("without ground truth: to be restored, but not to be trained on or scored", wrong=False)
    elif text := two_sets(folder, found.scenes):
        yield Finding(f"not to be trained on: {text}", wrong=False)
    elif (number := len(_groups(looks))) < len(PARTS):
        text = f"different backgrounds: {number}; training needs {len(PARTS)}, one for each part of its split"
        yield Finding(text, wrong=False)


def _flag(rain):
    side = "left" if np.median(rain) > 0 else "right"
    return f"clean half {side}: give --clean_side {side}"


def duplicates(looks):
    """A note where one background stands in several scenes."""
    groups = _groups(looks)
    copies = [some([look.scene.name for look in group], NAMED, " = ") for group in groups if len(group) > 1]
    if copies:
        text = f"{len(groups):,} different backgrounds in {sum(map(len, groups)):,} scenes: {_list(copies)}"
        yield Finding(f"{text}; when training splits them, copies stay in one part", wrong=False)


def overlap(training, test):
    """What is wrong where a background of `test` is in `training` too; both are Checked."""
    of_training = {id(look) for look in training.looks}
    shared = []
    for group in _groups([*training.looks, *test.looks]):
        ours = [look.scene.name for look in group if id(look) in of_training]
        if ours:
            shared += [f"{look.scene.name} = {ours[0]}" for look in group if id(look) not in of_training]
    if shared:
        where = f"background of {test.folder} is in {training.folder} too ({len(shared):,}, test = training)"
        yield Finding(f"{where}: {_list(shared)}")


def _scores(looks):
    """(file, rain score) of every rainy image that has its own clean one."""
    return [
        (half.path, score)
        for look in looks
        if look.scene.clean and look.match >= MATCH
        for half, score in zip(look.scene.rainy, look.rain, strict=True)
    ]


def _groups(looks):
    """The looks of each background, in a list of lists; looks without a thumbnail are left out."""
    looks = [look for look in looks if look.thumbnail is not None]
    groups = {}
    for look, first in zip(looks, same_pictures([look.thumbnail for look in looks]), strict=True):
        groups.setdefault(first, []).append(look)
    return list(groups.values())


def _has_backgrounds(checked):
    return any(look.thumbnail is not None for look in checked.looks)


def _list(texts):
    return some(texts, NAMED)


def _named(path, root, text):
    return f"{_relative(path, root)} ({text})" if text else _relative(path, root)


def _relative(path, root):
    return path.relative_to(root).as_posix() if root in path.parents else str(path)


def _wh(size):
    return f"{size[1]}x{size[0]}"


# --- a line for a user who did not ask ----------------------------------------------------------------------


def pair_hint(scenes, flag="--clean_side"):
    """What is wrong with most of a few pairs; "" where nothing is. flag: as in `wrong_side`."""
    looks = [examine(scene, Path()) for scene in spread(scenes, HINT_FROM)]
    images = sum(len(look.scene.rainy) for look in looks)
    faults = Counter(kind for look in looks for kind, _ in look.faults)
    for kind in (OTHER_PICTURE, EQUAL):
        if faults[kind] > images / 2:
            return f"{kind}, in {faults[kind]} of {images} images looked at; python dataset.py looks at all"
    return wrong_side(looks, flag)


def single_hint(scenes):
    """What to say where most of a few single images look like pairs; "" where they do not."""
    wide, rain = [], []
    for scene in spread(scenes, HINT_FROM):
        try:
            height, width = header_size(scene.rainy[0].path)
            if width > height:  # as two pictures side by side are, but for very narrow ones
                wide.append(scene)
                scores, alike = _halves(read_image(scene.rainy[0].path))
                if HINT_MATCH < alike < 1 and abs(scores[0]) > HINT_RAIN:  # 1: one half is flat
                    rain += scores
        except UserError:  # restoring it will say so
            continue
    if not rain or len(rain) <= len(wide) / 2:
        return ""
    return f"{len(rain)} of {len(wide)} looked at seem to be side-by-side pairs, {_flag(rain)}"


# --- the command --------------------------------------------------------------------------------------------


def get_args_parser():
    parser = Parser(
        prog="dataset.py",
        description="Check a data set. Exit status: 0 good, 1 something is wrong, 2 no such data set.",
    )
    parser.add_argument("folder", metavar="DIR", help="data set to check; DID-MDN's root means both its sets")
    parser.add_argument(
        "test_folder",
        metavar="TEST_DIR",
        nargs="?",
        help="its test set, checked as well: no background of DIR may be in it",
    )
    parser.add_argument(
        "--clean_side",
        action="extend",
        nargs="+",
        default=[],
        choices=SIDES,
        help=SIDE_HELP,
    )
    return parser


def main(args):
    """Print the report; returns the exit status, 0 or 1. Raises UserError for a folder that is not there."""
    given = [args.folder, *filter(None, [args.test_folder])]
    folders = [(part, side) for path, side in with_sides(given, args.clean_side) for part in parts(path)]
    found = [find(folder, side) for folder, side in folders]  # all, before any takes its time
    checked, wrong = [], 0
    for (folder, _), what in zip(folders, found, strict=True):
        checked.append(check(folder, what))
        wrong += report(f"{folder}: {what.layout}", checked[-1].findings)
    training, *tests = checked
    for test in tests:
        if _has_backgrounds(training) and _has_backgrounds(test):
            shared = list(overlap(training, test))
            text = f"no background of {test.folder} is in {training.folder}"
            wrong += report("training and test", shared or [Finding(text, wrong=False)])
    print(f"{wrong} things are wrong" if wrong > 1 else "1 thing is wrong" if wrong else "nothing is wrong")
    return 1 if wrong else 0


def parts(path):
    """The folders that `path` stands for: DID-MDN's two where it holds them, training first."""
    return [Path(path, name) for name in DID_MDN if os.path.isdir(Path(path, name))] or [Path(path)]


def report(title, findings):
    """Print findings; returns how many are wrong."""
    print(title)
    for finding in findings:
        print("  WRONG:" if finding.wrong else "  ", finding.text)
    return sum(finding.wrong for finding in findings)
