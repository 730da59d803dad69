"""An architecture as a picture.

    python -m support.draw half_width_mixed_rain                      # half_width_mixed_rain.svg, here
    python -m support.draw search-EXP-20260101-120000/genotype.json architecture.svg

From left to right the cells, from top to bottom the branches; in each cell its four modules, then an
attention module a branch, with the operation of each edge.
"""

import xml.etree.ElementTree as ET
from pathlib import Path

import torch

import genotypes
from genotypes import CELLS, MODULES_PER_CELL, NODE_EDGES
from losses import count_parameters
from model_train import DerainNetwork
from support import command
from support.errors import UserError
from support.images import write_bytes

# An operation's label on its edge, its colour and that of the label: gates by convolution are blue, those on
# the two spatial maps green, those by channel warm.
LOOKS = {
    "none": ("none", "none", "#98a1ab"),
    "skip_connect": ("skip", "#cdd3da", "#24292f"),
    "sep_conv_3x3": ("sep 3×3", "#1f6fb4", "#ffffff"),
    "dil_conv_3x3": ("dil 3×3", "#9ccdf2", "#24292f"),
    "sep_conv_3x3_spatial": ("sep spatial", "#1b7f4f", "#ffffff"),
    "dil_conv_3x3_spatial": ("dil spatial", "#9bd6a5", "#24292f"),
    "SE": ("SE", "#ffc857", "#24292f"),
    "SE_A_M": ("SE_A_M", "#e8743b", "#ffffff"),
    "CBAM": ("CBAM", "#b5299b", "#ffffff"),
}
SCALES = ("1", "1/2", "1/4", "1/8")
INK, FAINT, LINE = "#24292f", "#6b7580", "#8a949e"
PARALLEL, FUSION = ("#dbe4ee", "#5d7590"), ("#fdf0d5", "#c98a1b")  # fill and stroke

# The grid, in pixels: columns from left to right, rows from top to bottom.
MARGIN = 24
TOP = 118  # of the first row
ROW = 164
STEM, TRANSITION, MODULE, HEAD = 74, 44, 50, 96
ATTENTION = (240, 150)  # an attention module's box
CELL = MODULES_PER_CELL * MODULE + 14 + ATTENTION[0] + 12
BLOCK = 44  # height of a module on one branch
WIDTH = MARGIN + STEM + CELLS * (TRANSITION + CELL) + 14 + HEAD + 62 + MARGIN
HEIGHT = TOP + ROW * len(SCALES) + MARGIN


def shown_as(operation):
    """Label, colour and colour of the label; an operation that was added to the search space is grey."""
    return LOOKS.get(operation, (operation, LINE, INK))


class Page:
    """Shapes on a white SVG page."""

    def __init__(self, width, height, title):
        self.root = ET.Element(
            "svg",
            xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {width} {height}",
            width=str(width),
            height=str(height),
        )
        self.root.set("font-family", "Helvetica, Arial, 'DejaVu Sans', sans-serif")
        ET.SubElement(self.root, "title").text = title
        self.box(0, 0, width, height, "#ffffff", radius=0)

    def svg(self):
        """The text of the file."""
        ET.indent(self.root)
        return ET.tostring(self.root, encoding="unicode") + "\n"

    def add(self, tag, **attributes):
        """An element; `stroke_width=2` is the attribute stroke-width."""
        texts = {k: v if isinstance(v, str) else f"{v:g}" for k, v in attributes.items()}
        return ET.SubElement(self.root, tag, {k.replace("_", "-"): text for k, text in texts.items()})

    def box(self, x, y, width, height, fill, stroke="none", radius=6, **style):
        self.add("rect", x=x, y=y, width=width, height=height, rx=radius, fill=fill, stroke=stroke, **style)

    def line(self, *points, stroke=LINE, width=2, **style):
        text = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.add("polyline", points=text, fill="none", stroke=stroke, stroke_width=width, **style)

    def arrow(self, *points, stroke=LINE, **style):
        """A line whose last segment, horizontal or upright, ends in a head."""
        (x0, y0), (x, y) = points[-2:]
        dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
        self.line(*points[:-1], (x - 5 * dx, y - 5 * dy), stroke=stroke, **style)
        tail = (x - 8 * dx, y - 8 * dy)
        corners = [(x, y), (tail[0] + 4 * dy, tail[1] + 4 * dx), (tail[0] - 4 * dy, tail[1] - 4 * dx)]
        self.add("polygon", points=" ".join(f"{a:g},{b:g}" for a, b in corners), fill=stroke)

    def text(self, x, y, text, size=13, fill=INK, anchor="middle", **style):
        """One line, centred on the height y."""
        style = {"text_anchor": anchor, "font_size": size, "fill": fill, **style}
        self.add("text", x=x, y=y + 0.35 * size, **style).text = text

    def pill(self, x, y, name):
        """An operation's label, centred."""
        label, fill, ink = shown_as(name)
        self.box(x - 42, y - 11, 84, 22, fill, radius=11)
        self.text(x, y, label, 14, ink)


def svg(genotype, name, channels=(32, 64, 128, 256)):
    """The picture of a genotype as the text of an SVG file, with its name and parameters at these widths."""
    with torch.device("meta"):  # to be counted, not to be run
        net = DerainNetwork(genotype, channels)
    page = Page(WIDTH, HEIGHT, name)
    page.text(MARGIN, 34, name, 24, anchor="start", font_weight="bold")
    note = f"{count_parameters(net):,} parameters with {', '.join(map(str, channels))} channels"
    page.text(MARGIN, 62, note, 15, FAINT, "start")

    ends = [_stem(page, MARGIN)]  # where each branch's line has come to, finest first
    x = MARGIN + STEM
    for cell, (kinds, attention) in enumerate(zip(genotype.modules, genotype.attention, strict=True)):
        x += TRANSITION
        ends = _cell(page, x, cell, kinds, attention, ends)
        x += CELL
    _head(page, x + 14, ends)
    _legend(page)
    return page.svg()


def row(branch):
    """The height of a branch's line."""
    return TOP + ROW * branch + ROW / 2


def _stem(page, x):
    """What comes in, and the stem; returns where it ends."""
    y, width = row(0), STEM - 22
    page.text(x + width / 2, y - BLOCK / 2 - 16, "rain", fill=FAINT)
    page.box(x, y - BLOCK / 2, width, BLOCK, "#eceff2", LINE)
    page.text(x + width / 2, y, "stem")
    return x + width


def _cell(page, x, cell, kinds, attention, ends):
    """A cell from x on, and the transition to it; returns where its branches end."""
    branches = len(attention)
    top, bottom = row(0) - ROW / 2 - 2, row(branches - 1) + ROW / 2 + 2
    page.box(x - 6, top, CELL, bottom - top, "#f7f9fb", "#d5dbe1", radius=10)
    page.text(x + CELL / 2 - 6, top - 14, f"cell {cell + 1}", 17, font_weight="bold")
    after = x + MODULES_PER_CELL * MODULE + 14  # where the attention modules begin
    for branch in range(branches):
        y = row(branch)
        if branch < len(ends):
            page.line((ends[branch], y), (after, y))
        else:  # the new branch halves the coarsest, as it was before
            turn = x - TRANSITION / 2 - 6
            page.line((turn, row(branch - 1)), (turn, y), (after, y))
            page.text(turn - 6, y - 20, "÷2", fill=FAINT, anchor="end")
        page.text(x + 2, y - BLOCK / 2 - 16, SCALES[branch], 13, FAINT, "start", font_weight="bold")
    for number, kind in enumerate(kinds):
        _module(page, x + number * MODULE + 3, kind, [row(b) for b in range(branches)])
    for branch, edges in enumerate(attention):
        _attention(page, after, row(branch), edges)
    return [after + ATTENTION[0]] * branches


def _module(page, x, kind, ys):
    """A multi-scale module: `parallel` a block a branch, `fusion` lines from every branch to every one."""
    width = MODULE - 10
    if kind == "parallel":
        for y in ys:
            page.box(x, y - BLOCK / 2, width, BLOCK, *PARALLEL)
            page.line((x + 8, y), (x + width - 8, y), stroke=PARALLEL[1])
        return
    fill, stroke = FUSION
    page.box(x, ys[0] - BLOCK / 2, width, ys[-1] - ys[0] + BLOCK, fill, stroke)
    for before in ys:
        for after in ys:
            page.line((x + 6, before), (x + width - 6, after), stroke=stroke, width=1.4)
    for y in ys:
        for end in (x + 6, x + width - 6):
            page.add("circle", cx=end, cy=y, r=3.5, fill=stroke)


def _attention(page, x, y, edges):
    """An attention module: groups F1 and F2, nodes U1 and U2, the three edges, and SE4 beside them."""
    width, height = ATTENTION
    page.box(x, y - height / 2, width, height, "#ffffff", LINE, radius=8)
    left, right, end = x + 22, x + 162, x + width - 18
    heights = (y - 52, y + 18)  # of F1 and U1, of F2 and U2
    skip = y + 57
    middle = (left + right) / 2
    # What every attention module has: SE4 of F1 + F2, and the projection of [U1, U2, SE4].
    for node in heights:
        page.line((right, node), (end - 10, node), stroke="#c3cad1")
    page.line((left, heights[0]), (left, skip), (end - 10, skip), stroke="#c3cad1")
    page.box(middle - 24, skip - 10, 48, 20, "#ffffff", "#c3cad1", radius=10)
    page.text(middle, skip, "SE4", 12, FAINT)
    page.box(end - 10, heights[0] - 12, 20, skip - heights[0] + 24, "#eceff2", "#c3cad1")
    page.text(end, (heights[0] + skip) / 2, "P", 14, FAINT)
    # Node U_i's edges come from F_i and, for the second, from U_1.
    starts = {0: (left, heights[0]), 1: (left, heights[1]), 2: (right, heights[0])}
    for node, indices in enumerate(NODE_EDGES):
        for index in indices:
            (a, b), (c, d) = starts[index], (right, heights[node])
            level = b == d
            tip = (c - 15, d) if level else (c, d - 15)
            if edges[index] == "none":
                page.line((a, b), tip, stroke=LINE, width=1.5, stroke_dasharray="2 5")
                continue
            colour = shown_as(edges[index])[1]
            page.arrow((a, b), tip, stroke=colour, width=3)
            page.pill(middle if level else right, (b + d) / 2, edges[index])
    for name, (a, b) in zip(("F1", "F2"), (starts[0], starts[1]), strict=True):
        page.box(a - 14, b - 12, 28, 24, "#ffffff", INK, radius=4)
        page.text(a, b, name, 12)
    for name, b in zip(("U1", "U2"), heights, strict=True):
        page.add("circle", cx=right, cy=b, r=14, fill="#ffffff", stroke=INK)
        page.text(right, b, name, 12)


def _head(page, x, ends):
    """Fusion to the finest branch, then 1x1 to RGB."""
    fill, stroke = FUSION
    ys = [row(branch) for branch in range(len(ends))]
    page.box(x, ys[0] - BLOCK / 2, 40, ys[-1] - ys[0] + BLOCK, fill, stroke)
    for end, y in zip(ends, ys, strict=True):
        page.line((end, y), (x, y))
        page.line((x + 6, y), (x + 34, ys[0]), stroke=stroke, width=1.4)
        page.add("circle", cx=x + 6, cy=y, r=3.5, fill=stroke)
    page.add("circle", cx=x + 34, cy=ys[0], r=3.5, fill=stroke)
    page.text(x + 20, ys[0] - BLOCK / 2 - 16, "head", 13, FAINT)
    page.line((x + 40, ys[0]), (x + 60, ys[0]))
    page.box(x + 60, ys[0] - BLOCK / 2, 46, BLOCK, "#eceff2", LINE)
    page.text(x + 83, ys[0], "1×1")
    page.arrow((x + 106, ys[0]), (x + 130, ys[0]))
    page.text(x + 118, ys[0] - BLOCK / 2 - 16, "clean", 13, FAINT)


def _legend(page):
    """The modules and operations where cell 1 has no branches, the attention module where cell 2 has none."""
    x, y = MARGIN, row(2) - ROW / 2 + 30
    page.text(x, y, "modules", 15, anchor="start", font_weight="bold")
    _module(page, x, "parallel", [y + 42])
    page.text(x + 52, y + 34, "parallel: a residual", 14, anchor="start")
    page.text(x + 52, y + 52, "block on each scale", 14, anchor="start")
    _module(page, x, "fusion", [y + 98, y + 132])
    page.text(x + 52, y + 106, "fusion: every scale", 14, anchor="start")
    page.text(x + 52, y + 124, "into every scale", 14, anchor="start")
    x += 240
    page.text(x, y, "operations of attention edges", 15, anchor="start", font_weight="bold")
    for number, name in enumerate(LOOKS):
        height = y + 30 + 28 * number
        if name == "none":
            page.line((x, height), (x + 84, height), width=1.5, stroke_dasharray="2 5")
        else:
            page.pill(x + 42, height, name)
        page.text(x + 98, height, name, 14, anchor="start")
    x, y = MARGIN + STEM + TRANSITION + CELL + TRANSITION - 6, row(3) - ROW / 2 + 30
    page.text(x, y, "attention module", 15, anchor="start", font_weight="bold")
    lines = (
        "A branch F is split in two halves, F1 and F2. Node U1 is its edge's",
        "operation on F1; U2 the sum of its edges' on F2 and on U1.",
        "P projects U1, U2 and SE4(F1 + F2) to a branch, F is added,",
        "and an SE16 gate follows. SEr: squeeze and excitation by r.",
    )
    for number, line in enumerate(lines):
        page.text(x, y + 28 + 21 * number, line, 14, anchor="start")


def draw_genotype(genotype, path, name, channels):
    """Write the picture of a genotype; UserError where the file cannot be written."""
    name = "".join(c if c.isprintable() else "?" for c in name)  # one from a file may hold what XML may not
    write_bytes(path, svg(genotype, name, channels).encode())


def get_args_parser():
    parser = command.Parser(
        prog="python -m support.draw", description="Draw an architecture as an SVG picture."
    )
    parser.add_argument("arch", help="a name in genotypes.py or a run's genotype.json")
    parser.add_argument("out", nargs="?", help="the .svg file to write (default: NAME.svg)")
    parser.add_argument(
        "--channels",
        type=command.even,
        nargs=4,
        default=[32, 64, 128, 256],
        metavar="C",
        help="widths of the branches, for counting parameters (default: 32 64 128 256)",
    )
    return parser


def main(args):
    name, genotype = genotypes.find(args.arch, flag="arch")
    out = Path(args.out or f"{Path(name).stem}.svg")
    if out.suffix.lower() != ".svg":
        raise UserError(f"{out}: pictures of architectures are .svg files; give a name that ends in .svg")
    draw_genotype(genotype, out, name, args.channels)
    print(out)


if __name__ == "__main__":
    command.run(main, get_args_parser())
