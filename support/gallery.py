"""Something to look at: `index.html` beside the results of test_view.py, and a strip of pictures for papers.

    gallery = Gallery("results")
    gallery.add(row, "results/1.png", rainy, restored, clean)  # picture by picture, none is kept in memory
    gallery.write({"checkpoint": "eval-EXP/derain.pt"}, left_out=["2.jpg: is truncated"])
    montage(gallery.examples(["1"]), "results/montage.png")

The page loads nothing but the files beside it, so it works from a disk, and still when the folder has moved.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import NamedTuple
from unicodedata import combining, normalize
from urllib.parse import quote

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from support.errors import UserError
from support.images import read_image, to_8_bits, write_bytes, write_image
from support.metrics import METRICS, by_density

PAGE = "index.html"
FOLDER = "gallery"
MONTAGE = "montage.png"
THUMBNAIL = 256  # pixels of the longer side
SHOWN = 4096  # likewise: browsers and phones choke on more
TEMPLATE = Path(__file__).with_suffix(".html")
MOST = 5000  # pictures on the page: a browser has to hold all of them
LABELS = {"rain": "rain", "restored": "restored", "truth": "ground truth"}


class Entry(NamedTuple):
    """A picture of the gallery. size: (height, width). Paths are relative to the results."""

    row: Mapping
    file: Path
    size: tuple[int, int]
    thumbnails: dict[str, Path]  # by kind, of `LABELS`
    shown: dict[str, Path]
    number: int


class Example(NamedTuple):
    """A row of a montage: HxWx3 uint8 RGB arrays. scores: a row of results.csv, or None for no numbers."""

    title: str
    rainy: np.ndarray
    restored: np.ndarray
    clean: np.ndarray | None = None
    scores: Mapping | None = None


class Gallery:
    """Collects pictures under `out`, the folder of the results, and writes the page that shows them."""

    def __init__(self, out: str | Path):
        self.out = Path(out)
        self.entries: list[Entry] = []

    def add(
        self,
        row: Mapping,
        file: str | Path,
        rainy: np.ndarray,
        restored: np.ndarray,
        clean: np.ndarray | None = None,
        number: int | None = None,
    ) -> Entry:
        """Write the thumbnails of a picture, and the large versions that are not there yet.

        Args:
            row: `name`, `density` ("" for none) and, where there is ground truth, the scores of
                `support.metrics.score` and those of the input, as `input_psnr_rgb` and so on.
            file: where the restored picture lies, under `out`.
            rainy, restored, clean: HxWx3 RGB, uint8 or uint16, of one size; clean is None where unknown.
            number: in the names of these files (default: one more than were added before).

        Raises:
            UserError: a file cannot be written.
        """
        pictures = {"rain": rainy, "restored": restored, "truth": clean}
        pictures = {kind: to_8_bits(image) for kind, image in pictures.items() if image is not None}
        file = Path(file).relative_to(self.out)
        number = number or len(self.entries) + 1  # not the name: that may be as long as names get
        thumbnails = {kind: Path(FOLDER, "small", f"{number:05}-{kind}.jpg") for kind in pictures}
        shown = {kind: Path(FOLDER, f"{number:05}-{kind}.jpg") for kind in pictures}
        # Any browser shows the lossless file of a scored picture, but maybe not TIFF, and alpha misleads.
        if clean is not None and file.suffix.lower() == ".png" and max(restored.shape) <= SHOWN:
            shown["restored"] = file
        for kind, image in pictures.items():
            write_image(self.out / thumbnails[kind], _at_most(THUMBNAIL, image), quality=70)
            if shown[kind] != file:
                write_image(self.out / shown[kind], _at_most(SHOWN, image), subsampled=False)
        self.entries.append(Entry(dict(row), file, restored.shape[:2], thumbnails, shown, number))
        return self.entries[-1]

    def write(self, facts: Mapping[str, object], left_out: Sequence[str] = ()) -> Path:
        """Write the page, with a summary of all pictures; returns its path. Of more than `MOST` it shows
        those with the least gain or, without scores, the first.

        Args:
            facts: what was run, in words: {"checkpoint": ..., "data": ...}.
            left_out: a line for each file that could not be used.

        Raises:
            UserError: it cannot be written.
        """
        rows = [entry.row for entry in self.entries]
        densities = list(dict.fromkeys(row["density"] for row in rows if row["density"]))
        pictures, shown = f"{len(rows):,}", self.entries
        if len(rows) > MOST:
            by_gain = sorted(range(len(rows)), key=lambda i: np.nan_to_num(gain(rows[i]), nan=np.inf))
            shown = [self.entries[i] for i in sorted(by_gain[:MOST])]
            which = f"{MOST:,} with the least gain" if any(map(_is_scored, rows)) else f"first {MOST:,}"
            pictures += f", of which the {which} are shown"
        title = "De-raining results"
        if "data" in facts:
            title += f": {Path(str(facts['data'])).resolve().name}"
        parts = {
            "title": escape(title),
            "facts": _facts({**facts, "pictures": pictures}),
            "scores": _summary([row for row in rows if _is_scored(row)]),
            "left_out": _left_out(left_out),
            "densities": "".join(f"<option>{escape(d)}</option>" for d in densities),
            "has_densities": "" if len(densities) > 1 else "hidden",
            "has_scores": "" if any(map(_is_scored, rows)) else "hidden",
            "ratio": f"{median([w / h for h, w in (e.size for e in shown)] or [1]):.3f}",
            "cards": "\n".join(map(_card, shown)),
        }
        template = TEMPLATE.read_text(encoding="utf-8")
        page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
        write_bytes(self.out / PAGE, page.encode(errors="replace"))
        return self.out / PAGE

    def examples(self, names: Sequence[str] = ()) -> list[Example]:
        """Pictures for a montage: those of these names, else the best, the median and the worst by gain.

        Rain and ground truth are as the gallery shows them, JPEG of quality 95 with colours at full size.
        Without scores, and without names, the first three are taken. Raises UserError for a name that is not
        there.
        """
        by_name = {entry.row["name"]: entry for entry in self.entries}
        for name in names:
            if name not in by_name:
                like = f"names are like {next(iter(by_name))}" if by_name else "nothing was restored"
                raise UserError(f"{name}: no picture of that name was restored; {like}")
        scored = [entry for entry in self.entries if not np.isnan(gain(entry.row))]
        ranked = sorted(scored, key=lambda entry: gain(entry.row))
        if names:
            chosen = {name: by_name[name] for name in names}
        elif len(ranked) >= 3:
            ends = {"best": ranked[-1], "median": ranked[len(ranked) // 2], "worst": ranked[0]}
            chosen = {f"{end}: {entry.row['name']}": entry for end, entry in ends.items()}
        else:
            chosen = dict(list(by_name.items())[:3])
        return [self._example(title, entry) for title, entry in chosen.items()]

    def _example(self, title, entry):
        pictures = {kind: read_image(self.out / path) for kind, path in entry.shown.items()}
        scores = entry.row if _is_scored(entry.row) else None
        return Example(title, pictures["rain"], pictures["restored"], pictures.get("truth"), scores)


def gain(row: Mapping, channels: str = "rgb") -> float:
    """PSNR of the output minus that of the input, in dB, for channels "rgb" or "y"; NaN without scores."""
    return row.get(f"psnr_{channels}", np.nan) - row.get(f"input_psnr_{channels}", np.nan)


# --- the strip of pictures ----------------------------------------------------------------------------------


def montage(examples: Iterable[Example], path: str | Path, width: int = 480) -> None:
    """Write one picture: a row an example, columns rain, restored and ground truth, labelled, on white.

    Scores, where given, are PSNR in dB and SSIM on RGB. The labels' font is plain Latin: accents are left
    out, and letters of other scripts become question marks.

    Args:
        path: its extension is the format.
        width: of a column, in pixels; heights follow each example's own proportions, up to four times that.

    Raises:
        UserError: the file cannot be written.
        ValueError: there is no example.
    """
    examples = list(examples)
    if not examples:
        raise ValueError("no example is given; a montage has at least one")
    kinds = [kind for kind in LABELS if kind != "truth" or any(e.clean is not None for e in examples)]
    font = ImageFont.load_default(max(10, width / 18))
    line, gap = round(1.6 * font.size), max(2, width // 48)
    sizes = [_fitting(e.rainy.shape, width) for e in examples]
    heights = [height for height, _ in sizes]
    below = [line if example.scores else 0 for example in examples]
    size = (
        gap + line + len(kinds) * (width + gap),
        line + sum(heights) + sum(below) + gap * len(examples),
    )
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    lefts = {kind: gap + line + k * (width + gap) for k, kind in enumerate(kinds)}
    for kind, left in lefts.items():
        draw.text((left + width / 2, line / 2), LABELS[kind], "black", font, anchor="mm")
    top = line
    for example, (height, own_width), under in zip(examples, sizes, below, strict=True):
        title = Image.new("L", (height, line))  # turned upwards, in the margin
        text = _shorten(_plain(example.title), font, height)
        ImageDraw.Draw(title).text((height / 2, line / 2), text, 255, font, anchor="mm")
        canvas.paste("black", (gap // 2, top), title.rotate(90, expand=True))
        pictures = (example.rainy, example.restored, example.clean)
        texts = _strip_scores(example.scores) if example.scores else [""] * 3
        for left, picture, text in zip(lefts.values(), pictures, texts, strict=False):
            if picture is not None:
                middle = left + (width - own_width) // 2
                canvas.paste(Image.fromarray(_scaled(picture, height, own_width)), (middle, top))
            draw.text((left + width / 2, top + height + under / 2), text, "black", font, anchor="mm")
        top += height + under + gap
    write_image(path, np.asarray(canvas))


def _fitting(shape, width):
    """(height, width) of such a picture in a column: as wide as that, and at most four times as high."""
    scale = min(width / shape[1], 4 * width / shape[0])
    return tuple(max(1, round(scale * side)) for side in shape[:2])


def _strip_scores(row):
    numbers = [f"{row[f'{of}psnr_rgb']:.2f} dB / {row[f'{of}ssim_rgb']:.4f}" for of in ("input_", "")]
    return [*(number.replace("nan", "-") for number in numbers), "PSNR / SSIM on RGB"]


def _plain(text):
    letters = [letter for letter in normalize("NFKD", text) if not combining(letter)]
    return "".join(letters).encode("ascii", "replace").decode()


def _shorten(text, font, room):
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "...") > room:
        text = text[:-1]
    return text + "..."


# --- the page -----------------------------------------------------------------------------------------------


def _card(entry):
    row = entry.row
    name = escape(row["name"])
    head = f"<strong>{name}</strong>"
    values = {"name": name, "density": escape(row["density"]), "file": _url(entry.file)}
    values |= {"height": entry.size[0], "width": entry.size[1]}
    if _is_scored(row):
        head += (
            f" <span>{_gain(gain(row))} <small>RGB</small> {_gain(gain(row, 'y'))} <small>Y</small></span>"
        )
        for channels in ("rgb", "y"):
            values[f"psnr-{channels}"] = _sortable(row[f"psnr_{channels}"])
            values[f"gain-{channels}"] = _sortable(gain(row, channels))
    attributes = " ".join(f'data-{key}="{value}"' for key, value in values.items())
    figures = "".join(_figure(entry, kind) for kind in entry.shown)
    return f'<li {attributes}><a href="{_url(entry.file)}"><h2>{head}</h2><div>{figures}</div></a></li>'


def _figure(entry, kind):
    scores = ""
    if _is_scored(entry.row) and kind != "truth":
        of = "input_" if kind == "rain" else ""
        pairs = (_pair(entry.row, of, channels) for channels in ("rgb", "y"))
        scores = f"<dl>{''.join(pairs)}</dl>"
    small, full = _url(entry.thumbnails[kind]), _url(entry.shown[kind])
    height, width = entry.size
    return (
        f'<figure data-kind="{kind}"><img data-small="{small}" data-full="{full}"'
        f' width="{width}" height="{height}" decoding="async" alt="">'
        f"<figcaption>{LABELS[kind]}{scores}</figcaption></figure>"
    )


def _pair(row, of, channels):
    psnr, ssim = row[f"{of}psnr_{channels}"], row[f"{of}ssim_{channels}"]
    return f"<dt>{channels.upper()}</dt><dd>{_number(psnr, 2)}<i> dB</i></dd><dd>{_number(ssim, 4)}</dd>"


def _facts(facts):
    return "".join(f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in facts.items())


def _summary(rows):
    if not rows:
        return ""
    heads = "".join(f"<th>{heading}</th>" for heading, _ in METRICS.values())
    lines = [
        f"<tr><th></th><th>pictures</th>{heads}<th>gain RGB</th><th>gain Y</th><th>worse than input</th></tr>"
    ]
    for density, (group, output, untouched) in by_density(rows).items():
        cells = [f"<th>{escape(density)}</th>", f"<td>{len(group):,}</td>"]
        for metric, (_, digits) in METRICS.items():
            before, after = _number(untouched[metric], digits), _number(output[metric], digits)
            cells.append(f"<td>{after} <small>from {before}</small></td>")
        cells += [f"<td>{_gain(_mean_gain(group, channels))}</td>" for channels in ("rgb", "y")]
        cells.append(f"<td>{sum(gain(row) < 0 for row in group):,}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    left_out = sum(output["left_out"].values()) + sum(untouched["left_out"].values())  # of the last: all
    note = "<p>Means over the pictures; PSNR in dB."
    if left_out:
        note += (
            f" {left_out} values are not in these means: the PSNR of equal pictures, the SSIM of tiny ones."
        )
    return f"<div class=wide><table>{''.join(lines)}</table></div>{note}</p>"


def _mean_gain(rows, channels):
    finite = [g for g in (gain(row, channels) for row in rows) if np.isfinite(g)]
    return np.mean(finite) if finite else np.nan


def _left_out(messages):
    if not messages:
        return ""
    items = "".join(f"<li>{escape(message)}</li>" for message in messages)
    return f"<details><summary>{len(messages):,} left out</summary><ul>{items}</ul></details>"


def _is_scored(row):
    return "psnr_rgb" in row


def _number(value, digits, sign=""):
    if np.isfinite(value):
        return f"{value:{sign}.{digits}f}".replace("-", "−")
    return "–" if np.isnan(value) else "∞" if value > 0 else "−∞"


def _gain(value):
    value = round(value, 2) + 0.0  # not -0.0
    kind = "up" if value > 0 else "down" if value < 0 else "none"
    return f"<b class={kind}>{_number(value, 2, '+')} dB</b>"


def _sortable(value):
    """As JavaScript's Number reads it; empty for NaN."""
    return "" if np.isnan(value) else str(value).replace("inf", "Infinity")


def _url(path):
    return escape(quote(os.fsencode(path.as_posix())))


# --- pictures -----------------------------------------------------------------------------------------------


def _at_most(side, image):
    height, width = image.shape[:2]
    scale = min(1, side / max(height, width))
    return _scaled(image, max(1, round(scale * height)), max(1, round(scale * width)))


def _scaled(image, height, width):
    if image.shape[:2] == (height, width):
        return np.ascontiguousarray(image)
    smaller = height * width < image.shape[0] * image.shape[1]
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_CUBIC)
