"""The health of a search, epoch by epoch: how decided alpha and beta are, what the genotype is made of, what
changed in it, and whether the search has collapsed.

A search is called collapsed when

- more than half of the derived genotype's edges compute nothing (`WEAK`), or
- its entropy is frozen: in the last `WINDOW` epochs of architecture steps the mean entropy of beta's rows
  moved by no more than the share `STILL` of its distance from the largest possible, while the choices are
  undecided: the mean margin of beta's rows is under `UNDECIDED`. (A share of that distance, since entropy
  hardly sees the first steps away from equal chances; only if undecided, since a search that has decided may
  well stand still.)

Only epochs with architecture steps are judged: before them alpha and beta are as they were drawn.
"""

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import genotypes
from genotypes import BRANCHES, CELLS, EDGES, MODULES, MODULES_PER_CELL, PRIMITIVES
from support.experiment import log

WEAK = ("skip_connect", "none")  # operations that compute nothing
WINDOW = 10  # epochs
STILL = 0.01
UNDECIDED = 0.1

# The rows of alpha and beta in words, for tags and heat maps.
EDGE_NAMES = ("F1-U1", "F2-U2", "U1-U2")
ALPHA_ROWS = [f"cell {c + 1} module {m + 1}" for c in range(CELLS) for m in range(MODULES_PER_CELL)]
BETA_ROWS = [
    f"cell {cell} scale {scale} {edge}"
    for cell, branches in enumerate(BRANCHES, start=1)
    for scale in ("1", "1/2", "1/4", "1/8")[:branches]
    for edge in EDGE_NAMES
]


class Health:
    """What a search has to remember from epoch to epoch to judge itself.

    arch_start: first epoch of the architecture steps. collapse: what is wrong, in words, or None. healthy:
    the epochs that were, the last of whose genotypes --stop_on_collapse keeps; a frozen search was healthy
    until it froze, not until that was noticed.
    """

    def __init__(self, arch_start):
        self.arch_start = arch_start
        self.entropies = []  # of beta, in the last epochs of architecture steps
        self.collapse = None
        self.healthy = []

    def state_dict(self):
        return {"entropies": self.entropies, "collapse": self.collapse, "healthy": self.healthy}

    def load_state_dict(self, state):
        self.entropies, self.collapse, self.healthy = state["entropies"], state["collapse"], state["healthy"]
        if not isinstance(self.healthy, list):  # before 27 November 2026: the last one alone, or None
            self.healthy = [] if self.healthy is None else [self.healthy]

    def examine(self, run, epoch, net, genotype):
        """Write an epoch's health to TensorBoard and, in one line, to the log; judge it."""
        alpha, beta = (parameter.detach().cpu().double().softmax(-1) for parameter in net.architecture())
        chosen = winners(genotype)
        scalars = {f"winners/{name}": count for name, count in chosen.items()}
        kinds, edges = words(genotype)
        for letter, distribution, rows, columns, group, choices in (
            ("alpha", alpha, ALPHA_ROWS, MODULES, MODULES_PER_CELL, kinds),
            ("beta", beta, BETA_ROWS, PRIMITIVES, EDGES, edges),
        ):
            picture = heat_map(distribution, rows, columns, group, choices)
            run.writer.add_image(letter, picture, run.step, dataformats="HWC")
            margins = margin(distribution)
            for kind, values in (("entropy", entropy(distribution)), ("margin", margins)):
                scalars |= {f"{kind}_{letter}/{row}": v for row, v in zip(rows, values.tolist(), strict=True)}
                scalars[f"{kind}_{letter}"] = values.mean().item()
            scalars[f"margin_{letter}_min"] = margins.min().item()
        counted = " ".join(f"{name} {count}" for name, count in chosen.items())
        changed = ""
        before = run.folder / f"genotype_{epoch - 1:03d}.json"
        if before.exists():
            modules, edges = changes(genotypes.read_json(before), genotype)
            scalars |= {"changed/modules": modules, "changed/edges": edges}
            changed = f", changed {modules} modules {edges} edges"
        for name, value in scalars.items():
            run.writer.add_scalar(name, value, run.step)
        log.info(
            "health: entropy alpha %(entropy_alpha).4f beta %(entropy_beta).4f, "
            "margin alpha %(margin_alpha).4f (least %(margin_alpha_min).4f) "
            "beta %(margin_beta).4f (least %(margin_beta_min).4f)%(changed)s, winners %(winners)s",
            scalars | {"changed": changed, "winners": counted},
        )
        if epoch >= self.arch_start:
            self.judge(epoch, genotype, scalars["entropy_beta"], scalars["margin_beta"])

    def judge(self, epoch, genotype, entropy_beta, margin_beta):
        """Update `collapse` and `healthy` for an epoch with architecture steps; log what is new."""
        self.entropies = [*self.entropies, entropy_beta][-WINDOW:]
        before, self.collapse = self.collapse, None
        if is_frozen(self.entropies, margin_beta):
            self.collapse = f"beta's entropy has stood still for {WINDOW} epochs with its choices undecided"
            self.healthy = [healthy for healthy in self.healthy if healthy <= epoch - WINDOW]
        elif weak_edges(genotype) > len(BETA_ROWS) / 2:
            self.collapse = f"{weak_edges(genotype)} of {len(BETA_ROWS)} edges are {' or '.join(WEAK)}"
        else:
            self.healthy = [*self.healthy, epoch]
        if self.collapse and self.collapse != before:
            log.warning("COLLAPSED in epoch %d: %s", epoch, self.collapse)
        elif before and not self.collapse:
            log.info("no longer collapsed in epoch %d", epoch)


def is_frozen(entropies, margin_beta):
    """Whether `WINDOW` epochs' mean entropies of beta stand still, undecided (see above)."""
    moved = max(entropies) - min(entropies)
    still = moved <= STILL * (1 - min(entropies))
    return len(entropies) == WINDOW and still and margin_beta < UNDECIDED


def entropy(distribution):
    """Entropy of each row, as a share of the largest possible: 1 undecided, 0 decided."""
    return torch.special.entr(distribution).sum(-1) / np.log(distribution.shape[-1])


def margin(distribution):
    """The first choice's probability less the second's, of each row."""
    first, second = distribution.topk(2).values.unbind(-1)
    return first - second


def words(genotype):
    """(kinds of the 12 modules, operations of the 27 edges), in the order of alpha's and beta's rows."""
    kinds = [kind for cell in genotype.modules for kind in cell]
    return kinds, [name for cell in genotype.attention for branch in cell for name in branch]


def winners(genotype):
    """How often each kind of module and each operation was chosen."""
    kinds, edges = words(genotype)
    return {name: (kinds + edges).count(name) for name in (*MODULES, *PRIMITIVES)}


def weak_edges(genotype):
    """How many edges compute nothing."""
    return sum(name in WEAK for name in words(genotype)[1])


def changes(before, after):
    """(modules, edges) in which two genotypes differ."""
    pairs = zip(words(before), words(after), strict=True)
    return tuple(sum(x != y for x, y in zip(old, new, strict=True)) for old, new in pairs)


# --- heat maps ----------------------------------------------------------------------------------------------

ENTRY = (52, 20)  # width and height of an entry, in pixels
FONT = 12


def heat_map(distribution, rows, columns, group, choices):
    """HxWx3 uint8: one distribution in each row, in per cent, brighter the larger, its choice framed.

    rows, columns: their names; group: number of rows between two gaps; choices: of each row the name of the
    column that the genotype has, which is not always the largest: a node keeps its best edge. The colour goes
    by the square root, so that equal chances over nine operations are not black.
    """
    font = ImageFont.load_default(FONT)
    left = 12 + round(max(font.getlength(name) for name in rows))
    top = 12 + round(max(font.getlength(name) for name in columns))
    width, height = ENTRY
    gaps = [6 * (i // group) for i in range(len(rows))]
    size = (left + width * len(columns) + 8, top + height * len(rows) + gaps[-1] + 8)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for j, name in enumerate(columns):
        label = Image.new("L", (top, height), 0)
        ImageDraw.Draw(label).text((6, height / 2), name, 255, font, anchor="lm")
        canvas.paste("black", (left + width * j + (width - height) // 2, 0), label.rotate(90, expand=True))
    shades = np.sqrt(distribution.numpy())
    colours = cv2.applyColorMap((255 * shades).round().astype(np.uint8), cv2.COLORMAP_VIRIDIS)[..., ::-1]
    for i, (name, choice) in enumerate(zip(rows, choices, strict=True)):
        y = top + height * i + gaps[i]
        draw.text((left - 6, y + height / 2), name, "black", font, anchor="rm")
        for j in range(len(columns)):
            box = (left + width * j, y, left + width * (j + 1) - 1, y + height - 1)
            draw.rectangle(box, tuple(map(int, colours[i, j])))
            ink = "black" if shades[i, j] > 0.7 else "white"
            centre = (box[0] + width / 2, y + height / 2)
            draw.text(centre, f"{100 * distribution[i, j]:.1f}", ink, font, anchor="mm")
        chosen = left + width * columns.index(choice)
        draw.rectangle((chosen, y, chosen + width - 1, y + height - 1), outline="red", width=2)
    return np.asarray(canvas)
