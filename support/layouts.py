"""What lies in a folder of pictures: scenes, each a clean background with its rainy versions. In DID-MDN's
layout there is one for each density; in all others just one, so that rainy pictures that share a clean one,
as in Rain1400 or as heavy/7.png and light/7.png, are separate scenes.

The layouts that `find` recognises, by the names of folders and files alone:

    Rain_Heavy/train2018new/*.jpg  Rain_Medium/...  Rain_Light/...   rain|clean; one name is one scene
    input/*  target/*  (or rain norain, rainy gt, ...)               pairs of two files of one name
    rain-1.png norain-1.png, or 1_in.png 1_GT.png, ...               pairs told by the files' names
    park/park-R-*.png park/park-C-000.png                            all frames of a scene and its clean one
    *.jpg with --clean_side left or right                            clean|rain or rain|clean side by side
    *.jpg                                                            single images, no ground truth
"""

import os
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from support.errors import UserError
from support.images import list_images

DENSITIES = ("Heavy", "Medium", "Light")
TRAINING, TEST = "DID-MDN-training", "DID-MDN-test"  # DID-MDN's folders
RAINY_FOLDERS = {*"input inputs rain rainy rainy_image rain_image lq data degraded".split()}
CLEAN_FOLDERS = {*"target targets norain clean gt ground_truth groundtruth gtruth label".split()}
# Counted as such only where their files pair, since photographs are sorted into folders of these names, too.
PERHAPS_RAINY = {"in", "real_world"}
PERHAPS_CLEAN = {"hq", "clear", "real_world_gt"}
# Of a clean file among rainy ones: norain-1, 1_GT, 1gt.
CLEAN_NAME = re.compile(r"^norain[-_]|[-_](norain|gt)$|(?<=\d)gt$", re.IGNORECASE)
FRAME = re.compile(r"(.*)-([A-Z])-(\d{3})")  # GT-Rain's: rainy park-R-017, clean park-C-000
NUMBER = re.compile(r"_[a-z]*\d+$|(?<=\d)x\d$")  # of one of several rainy images; or a picture's own
TRAINING_NAME = re.compile(r"(?<![a-z])train(ing)?(?![a-z])", re.IGNORECASE)
TEST_NAME = re.compile(r"(?<![a-z])(test(ing)?|val(id|idation)?)(?![a-z])", re.IGNORECASE)
SIDES = ("left", "right")
SIDE_HELP = "clean half of side-by-side files: one for each folder, or one for all but DID-MDN's own"
OTHER_SIDE = {"left": "right", "right": "left"}


class Half(NamedTuple):
    """An image on disk: a whole file (side None), or the left or right half of one."""

    path: Path
    side: str | None = None


class Scene(NamedTuple):
    """name: of its results; unique in its folder, while scenes of one name in several folders count as one
    background. rainy: one Half a density; clean: a Half of the same size, or None for a single image;
    densities: a name for each rainy Half, or () where there is only one.
    """

    name: str
    rainy: tuple[Half, ...]
    clean: Half | None
    densities: tuple[str, ...] = ()

    @property
    def key(self):
        """The path of its first rainy image, which is no other scene's."""
        return str(self.rainy[0].path)

    @property
    def halves(self):
        """Its images, the clean one, if there is one, last."""
        return (*self.rainy, self.clean) if self.clean else self.rainy

    @property
    def files(self):
        """Its files as text, each once."""
        return list(dict.fromkeys(str(half.path) for half in self.halves))


class Found(NamedTuple):
    """What a folder holds: its layout in words, its scenes, and the files that have no partner."""

    layout: str
    scenes: list[Scene]
    unpaired: list[Path]


def find(path, clean_side=None):
    """What is under `path`, a folder in one of the layouts above or a single image file, as a Found.

    clean_side: which half of a side-by-side file is clean, "left" or "right"; ignored where names tell the
    pairs. None: DID-MDN's own folders are rain|clean, as published. Raises UserError for a path that is
    missing or empty, is paired ambiguously or not at all, holds several sets of pairs, or, with clean_side,
    holds images only in folders below it.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file or folder")
    if path.is_file():
        return flat(path.parent, [path], clean_side)
    if not path.is_dir() or not os.access(path, os.R_OK | os.X_OK):
        raise UserError(f"{path}: neither a picture nor a folder that can be read")
    if by_density := _density_folders(path):
        return _densities(path, by_density, clean_side or "right")
    if found := _in_folders(path):
        if not found.scenes:
            one, *others = (file.relative_to(path) for file in found.unpaired)  # the clean ones come last
            if other := next((file for file in others if file.parts[0] != one.parts[0]), None):
                raise UserError(
                    f"{path}: no two names make a pair: {one} and {other} differ; name pairs alike"
                )
        return found
    if own_name(path) == TEST:
        clean_side = clean_side or "right"
    files = list_images(path, recursive=clean_side is None)
    below = files or list_images(path, recursive=True)
    if (clean_side is None or not files) and (sets := _sets(path, below)):
        raise UserError(f"{path}: holds several sets of pairs, {some(sets)}; give those folders one by one")
    if any(CLEAN_NAME.search(file.stem) for file in below) and (found := _told_by_name(path)):
        return found
    if found := _frames(path, below):
        return found
    if below and not files:
        raise only_below(path, below)
    return flat(path, files, clean_side)


def with_sides(paths, clean_sides):
    """[(Path, its clean side)] of folders by what --clean_side says: nothing, a side for each, or one for all
    but DID-MDN's own, whose sides are known; a path or a side alone stands for a list of one. Raises
    UserError for any other number of sides, and for what is no side.
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    sides = [clean_sides] if isinstance(clean_sides, str) else clean_sides
    paths, sides = list(map(Path, paths)), list(sides) or [None]
    if wrong := [side for side in sides if side not in (None, *SIDES)]:
        raise UserError(f"--clean_side: {wrong[0]!r} is neither {' nor '.join(SIDES)}")
    if len(sides) == len(paths):
        return list(zip(paths, sides, strict=True))
    if len(sides) > 1:
        folders = "1 folder" if len(paths) == 1 else f"{len(paths)} folders"
        raise UserError(
            f"--clean_side: {len(sides)} given for {folders}; give one side, or one for each folder"
        )
    return [(path, None if _is_did_mdn(path) else sides[0]) for path in paths]


def _is_did_mdn(path):
    """Whether it is DID-MDN's training or test set, or holds one of them."""
    densities = _density_folders(path) or _density_folders(path / TRAINING)
    return own_name(path) == TEST or bool(densities) or os.path.isdir(path / TEST)


def own_name(folder):
    """A folder's name, that of "." as well."""
    return os.path.basename(os.path.abspath(folder))


def only_below(path, files):
    """The UserError that says where the images `files` are, none of which is in the folder `path` itself."""
    folders = sorted({str(file.parent.relative_to(path)) for file in files})
    return UserError(
        f"{path}: holds no images itself, but its folders {some(folders)} do; give those one by one"
    )


def some(names, most=3, joint=", "):
    """The first `most` of some names, and how many more there are."""
    return joint.join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


# --- DID-MDN: a folder for each density ---------------------------------------------------------------------


def _density_folders(path):
    """{density: folder of its images} of a folder in DID-MDN's training layout, else {}."""
    folders = {density: path / f"Rain_{density}" for density in DENSITIES}
    inner = {density: folder / "train2018new" for density, folder in folders.items()}
    is_dir = os.path.isdir  # of what may not be looked into False, where pathlib raises
    return {d: inner[d] if is_dir(inner[d]) else folders[d] for d in DENSITIES if is_dir(folders[d])}


def _densities(path, folders, side):
    files = {density: {f.name: f for f in list_images(folder)} for density, folder in folders.items()}
    names = {name: None for by_name in files.values() for name in by_name}
    whole = {name: None for name in names if all(name in by_name for by_name in files.values())}
    if not names:
        raise UserError(f"{path}: no images in {', '.join(f'Rain_{density}' for density in folders)}")
    unpaired = [by_name[n] for n in names if n not in whole for by_name in files.values() if n in by_name]
    first = next(iter(files))
    clean = [files[first][name] for name in whole]
    scenes = [
        Scene(
            name,
            tuple(Half(by_name[file.name], OTHER_SIDE[side]) for by_name in files.values()),
            Half(file, side),
            tuple(files),
        )
        for name, file in zip(_names(folders[first], clean), clean, strict=True)
    ]
    return Found(f"DID-MDN scenes, {len(files)} densities, clean half {side}", scenes, unpaired)


# --- pairs in two folders -----------------------------------------------------------------------------------


def _in_folders(path):
    """The pairs of a folder of rainy and one of clean images in `path`; None where there are not both."""
    for perhaps in (False, True):
        rainy, clean = _pair_folders(path, perhaps)
        if not (rainy and clean):
            continue
        if len(rainy) > 1 or len(clean) > 1:
            if perhaps:
                return None
            names = ", ".join(sorted(child.name for child in [*rainy, *clean]))
            raise UserError(
                f"{path}: cannot tell which two of these folders hold the pairs: {names}; keep only those two"
            )
        keys = [
            {file: _pair_key(file, folder) for file in list_images(folder, recursive=True)}
            for folder in (rainy[0], clean[0])
        ]
        if not perhaps and not any(keys):
            raise UserError(f"{path}: no images in {rainy[0].name} and {clean[0].name}")
        found = _paired(f"pairs in {rainy[0].name}/ and {clean[0].name}/", rainy[0], *keys)
        if found.scenes or not perhaps:
            return found
    return None


def _pair_folders(path, perhaps):
    """[folders of rainy, folders of clean images] in one, by their names; perhaps: by unsure names, too."""
    kinds = RAINY_FOLDERS, CLEAN_FOLDERS
    names = {folder: _called(folder) for folder in _folders(path)}
    if perhaps:
        kinds = RAINY_FOLDERS | PERHAPS_RAINY, CLEAN_FOLDERS | PERHAPS_CLEAN
        endings = r"[-_](images?|imgs?|crops)$"  # rainy_images, input_crops
        names = {folder: re.sub(endings, "", name) for folder, name in names.items()}
    return [[folder for folder, name in names.items() if name in kind] for kind in kinds]


def _folders(path):
    """The folders in a folder; none where it may not be looked into."""
    return [child for child in path.iterdir() if os.path.isdir(child)] if os.access(path, os.R_OK) else []


def _called(folder):
    """A folder's name, spelled like those in RAINY_FOLDERS."""
    return folder.name.lower().replace(" ", "_")


def _sets(path, files):
    """Relative names of folders below `path` in which a rainy and a clean folder of `files` make pairs."""
    below = {folder for file in files for folder in file.relative_to(path).parents}
    kinds = RAINY_FOLDERS | PERHAPS_RAINY, CLEAN_FOLDERS
    rainy, clean = ({f.parent for f in below if _called(f) in kind} for kind in kinds)
    return sorted(str(folder) for folder in rainy & clean if _holds_pairs(path / folder))


def _holds_pairs(path):
    try:
        found = _in_folders(path)
    except UserError:  # it does, and something is wrong with them
        return True
    return bool(found and found.scenes)


def two_sets(path, scenes):
    """What to say where `scenes` lie both in a training set's folder below `path` and in a test's, or ""."""
    folders = {folder for scene in scenes for folder in scene.rainy[0].path.relative_to(path).parents}
    training, test = (
        sorted(str(folder) for folder in folders if name.search(folder.name))
        for name in (TRAINING_NAME, TEST_NAME)
    )
    if not (training and test):
        return ""
    return f"holds pairs in {some(training)} and in {some(test)}; give only the folder to train on"


def truth_without_rain(path, scenes):
    """Of scenes without truth: the folders below `path` that are named like clean images'; relative names."""
    parents = {scene.rainy[0].path.parent for scene in scenes} - {path} if os.path.isdir(path) else ()
    return sorted(str(folder.relative_to(path)) for folder in parents if _called(folder) in CLEAN_FOLDERS)


# --- pairs told by the files' own names ---------------------------------------------------------------------


def _told_by_name(path):
    """The pairs of a folder as told by the clean images' own names: norain-1.png belongs to rain-1.png, which
    is beside it or in a folder `rainy` there. None where more than half of the images are in no pair.
    """
    files = list_images(path, recursive=True)
    rainy, clean, keys = {}, {}, set()
    for file in files:
        key = _pair_key(file, path)
        if CLEAN_NAME.search(file.stem):
            if key not in keys:  # the first of a name; the others have no partner
                clean[file] = key
                keys.add(key)
        elif _called(file.parent) in RAINY_FOLDERS and file.parent != path:
            rainy[file] = re.sub(r"[^/]+/([^/]+)$", r"\1", key)
        else:
            rainy[file] = key
    found = _paired("pairs told by their names", path, rainy, clean)
    in_pairs = {half.path for scene in found.scenes for half in scene.halves}
    unpaired = [file for file in files if file not in in_pairs]
    return found._replace(unpaired=unpaired) if len(unpaired) <= len(files) / 2 else None


def _frames(path, files):
    """The pairs of a folder with GT-Rain's names: park-R-017.png with park-C-017.png, or with park-C-000.png
    where the scene has no other clean one. None where more than half of the names are others, or where other
    letters show that they stand for cameras.
    """
    frames = {file: frame for file in files if (frame := FRAME.fullmatch(file.stem))}
    if len(frames) < len(files) / 2 or any(frame[2] not in "RC" for frame in frames.values()):
        return None
    clean = {}  # of each scene, by number
    for file, frame in frames.items():
        if frame[2] == "C":
            clean.setdefault((file.parent, frame[1]), {})[frame[3]] = file
    partners = {}
    for file, frame in frames.items():
        if frame[2] == "R":
            of_scene = clean.get((file.parent, frame[1]), {})
            partners[file] = of_scene.get("000" if [*of_scene] == ["000"] else frame[3])
    of_scenes = [file for of_scene in clean.values() for file in of_scene.values()]
    found = _in_pairs("frames, pairs told by their names", path, partners, of_scenes)
    others = [file for file in files if file not in frames]
    return found._replace(unpaired=found.unpaired + others) if found.scenes else None


# --- which files are pairs ----------------------------------------------------------------------------------


def _paired(layout, root, rainy, clean):
    """The Found of rainy and clean files, {file: key}."""
    by_key = {}
    for file, key in clean.items():
        if key in by_key:
            raise UserError(
                f"{file}: has the same name as another clean image, {by_key[key].name}; rename one"
            )
        by_key[key] = file
    for file, key in clean.items():  # 1gt.png of 1.png
        by_key.setdefault(re.sub(r"(?<=\d)gt$", "", key), file)
    taken = set(rainy.values())  # beside a rainy 7.png, 7_2.png is a picture of its own
    numbered = {NUMBER.sub("", key) for key in clean.values() if NUMBER.search(key)}  # 7 of a clean 7_1
    names = {(key, file.stem) for file, key in rainy.items()}
    ambiguous = {key for key, count in Counter(key for key, _ in names).items() if count > 1}  # A.png, a.png

    def partner(file, key):
        exact = by_key.get(key)
        if key in ambiguous:
            return exact if exact and exact.stem == file.stem else None
        if exact:
            return exact
        for other, number in _less_exact(key):
            if other in taken or (number and other in numbered):
                return None
            if other in by_key:
                return by_key[other]
        return None

    return _in_pairs(layout, root, {file: partner(file, key) for file, key in rainy.items()}, clean)


def _in_pairs(layout, root, partners, clean):
    """The Found of {rainy file: its clean one, or None} and all clean files; names are relative to `root`."""
    scenes, unpaired = [], []
    for name, (file, partner) in zip(_names(root, partners), partners.items(), strict=True):
        if partner:
            scenes.append(Scene(name, (Half(file),), Half(partner)))
        else:
            unpaired.append(file)
    used = set(partners.values())
    return Found(layout, scenes, unpaired + [file for file in clean if file not in used])


def _pair_key(file, folder):
    """What two files of a pair share: the relative name without suffix, rain-/norain- or _rain/_clean/_gt."""
    key = unicodedata.normalize("NFC", file.relative_to(folder).with_suffix("").as_posix().lower())
    key = re.sub(r"(^|/)(no)?rain[-_]", r"\1", key)
    return re.sub(r"[-_](rain|rainy|norain|clean|gt)$", "", key)


def _less_exact(key):
    """Yield other keys that the clean image of a rainy one may have, and whether a number was taken off: 7
    for heavy/7, 7_in, 7_1, 7x2 and light/7_1, and for 7_s80_a04 and 7_rain_alpha_0.02_beta_0.01, names in
    which Outdoor-Rain and RainCityscapes describe the rain.
    """
    folder = r"^(x\d|heavy|medium|light|small|large)/"
    if (shorter := re.sub(folder, "", key)) != key:
        yield shorter, False
    number = False
    for ending in (r"_in$|_s\d+_a\d+$|_rain_alpha_.*$", NUMBER, folder):
        shorter = re.sub(ending, "", key)
        if shorter != key:
            number = number or ending is NUMBER
            yield shorter, number
            key = shorter


# --- single images, and pairs side by side ------------------------------------------------------------------


def flat(root, files, side):
    """The Found of image files below `root`: side by side, the half on `side` clean; None: single images."""
    if not files:
        raise UserError(f"{root}: no images (JPEG, PNG, BMP, TIFF or WebP) found")
    single = "single image" if len(files) == 1 else "single images"
    layout = f"side-by-side pairs, clean half {side}" if side else single
    scenes = [
        Scene(name, (Half(file, OTHER_SIDE.get(side)),), Half(file, side) if side else None)
        for name, file in zip(_names(root, files), files, strict=True)
    ]
    return Found(layout, scenes, [])


def _names(root, files):
    """Relative names without suffix, but for files that only the suffix tells apart."""
    full = [file.relative_to(root).as_posix() for file in files]
    short = [file.relative_to(root).with_suffix("").as_posix() for file in files]
    count = Counter(short)
    names = [s if count[s] == 1 else f for s, f in zip(short, full, strict=True)]
    return names if len(set(names)) == len(names) else full  # beside a.jpg and a.png an a.jpg.png
