"""The vocabulary of the search space and every architecture found in it.

A genotype is a plain literal: per cell the kinds of its four multi-scale modules, and per cell and branch
the three edges of its attention module. `train_search_batch.py` appends what it finds to this file;
`train_model_batch.py --arch NAME` picks one by its name.
"""

import ast
import builtins
import json
import keyword
import os
import random
import reprlib
import shutil
import textwrap
import unicodedata
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

# The nine candidate operations of an attention edge, in the order of the columns of beta.
PRIMITIVES = (
    "none",
    "skip_connect",
    "sep_conv_3x3",
    "dil_conv_3x3",
    "sep_conv_3x3_spatial",
    "dil_conv_3x3_spatial",
    "SE",
    "SE_A_M",
    "CBAM",
)

# The two kinds of multi-scale module, in the order of the columns of alpha.
MODULES = ("parallel", "fusion")

CELLS = 3  # cell k = 1, 2, 3 has k + 1 branches
MODULES_PER_CELL = 4
BRANCHES = (2, 3, 4)
# Node U_1 has one edge (from F_1); node U_2 has two (from F_2 and from U_1).
EDGES = 3
NODE_EDGES = ((0,), (1, 2))

FILE = Path(__file__)  # to which the search appends


class GenotypeError(ValueError):
    """A genotype that is malformed, unknown, or already there: a mistake that one line explains."""


class NameTaken(GenotypeError):
    """The file of genotypes already has something of that name."""


class Genotype(NamedTuple):
    """An architecture of the search space.

    modules: 3 cells of 4 names out of `MODULES`, in the order in which they are applied.
    attention: 3 cells of 2, 3 and 4 branches (finest first) of 3 edges, each a name out of `PRIMITIVES`:
        F_1 -> U_1, F_2 -> U_2, U_1 -> U_2. "none" is an edge that was dropped.
    """

    modules: tuple[tuple[str, ...], ...]
    attention: tuple[tuple[tuple[str, ...], ...], ...]


def check(genotype):
    """Return the genotype as nested tuples, or raise GenotypeError saying which entry is wrong.

    `genotype` is a Genotype, or a dict with its two fields (as read from a genotype.json).
    """
    fields = genotype._asdict() if isinstance(genotype, Genotype) else genotype
    if not isinstance(fields, dict) or set(fields) != set(Genotype._fields):
        raise GenotypeError(
            f"a genotype has the entries {' and '.join(Genotype._fields)}, not {brief(fields)}"
        )

    modules = _nested(fields["modules"], "modules", MODULES, (CELLS, "cells"), (MODULES_PER_CELL, "modules"))
    cells = _sequence(fields["attention"], "attention", CELLS, "cells")
    attention = tuple(
        _nested(cell, f"attention[{c}]", PRIMITIVES, (branches, "branches"), (EDGES, "edges"))
        for c, (cell, branches) in enumerate(zip(cells, BRANCHES, strict=True))
    )
    return Genotype(modules, attention)


def _nested(value, where, allowed, *levels):
    """`value` as nested tuples of allowed words; levels, outermost first: (length, of what)."""
    if not levels:
        return _word(value, where, allowed)
    inner = enumerate(_sequence(value, where, *levels[0]))
    return tuple(_nested(entry, f"{where}[{i}]", allowed, *levels[1:]) for i, entry in inner)


def _sequence(value, where, length, what):
    if not isinstance(value, (tuple, list)):
        raise GenotypeError(f"{where} must be a sequence of {length} {what}, not {brief(value)}")
    if len(value) != length:
        raise GenotypeError(f"{where} has {len(value)} {what}; it must have {length}")
    return value


def _word(value, where, allowed):
    if value not in allowed:
        raise GenotypeError(f"{where} is {brief(value)}; allowed are {', '.join(allowed)}")
    return str(value)


def brief(value):
    """`value` in at most 60 characters of one line, whatever it is: it may come out of a damaged file."""
    try:
        text = " ".join(reprlib.repr(value).split())
    except ValueError:  # Python does not print whole numbers of over 4,300 digits
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= 60 else text[:57] + "..."


def literal(genotype):
    """The genotype as the Python expression that stands in this file: one line a cell or a branch."""
    genotype = check(genotype)

    def words(names):
        return "(" + ", ".join(f'"{name}"' for name in names) + ")"

    lines = ["Genotype(", "    modules=("]
    lines += [f"        {words(cell)}," for cell in genotype.modules]
    lines += ["    ),", "    attention=("]
    for cell in genotype.attention:
        lines += ["        (", *(f"            {words(edges)}," for edges in cell), "        ),"]
    lines += ["    ),", ")"]
    return "\n".join(lines)


def named():
    """Every genotype of this file by its name, oldest first."""
    return {name: value for name, value in globals().items() if isinstance(value, Genotype)}


def draw_random(count, seed):
    """`count` different random genotypes, none of which is in this file yet. The same `seed` gives the same
    ones until some of them are added to this file, or an operation to `PRIMITIVES`.

    They are distributed as if derived from an alpha and beta whose entries are random, independent and alike:
    each module's kind and each edge's operation is drawn with equal chances; where all edges of a node come
    out as `none`, one of them, at random, gets one of the other operations. So node U_1's edge is never
    `none`; of node U_2's two edges, with nine operations, both exist in 64 of 81 modules and one in 17.
    """
    rng = random.Random(seed)

    def edges():
        names = [rng.choice(PRIMITIVES) for _ in range(EDGES)]
        for indices in NODE_EDGES:
            if all(names[i] == "none" for i in indices):
                names[rng.choice(indices)] = rng.choice([name for name in PRIMITIVES if name != "none"])
        return tuple(names)

    known, drawn = set(), []
    for genotype in named().values():
        with suppress(GenotypeError):  # one with operations that no longer exist
            known.add(check(genotype))
    while len(drawn) < count:
        modules = tuple(tuple(rng.choice(MODULES) for _ in range(MODULES_PER_CELL)) for _ in range(CELLS))
        attention = tuple(tuple(edges() for _ in range(branches)) for branches in BRANCHES)
        genotype = Genotype(modules, attention)
        if genotype not in known:
            known.add(genotype)
            drawn.append(genotype)
    return drawn


def find(arch=None, flag="--arch"):
    """(name, Genotype) of `arch`: a name in this file, the path of a genotype.json, or None for the newest
    here.

    flag: what an error calls the argument. Raises GenotypeError for an unknown name, or a file that holds no
    genotype.
    """
    known = named()
    if arch is None:
        if not known:
            raise GenotypeError(f"{__file__}: holds no genotype yet; search for one, or give {flag}")
        arch = list(known)[-1]
    arch = os.fspath(arch)
    if arch in known:
        try:
            return arch, check(known[arch])
        except GenotypeError as error:
            raise GenotypeError(
                f"{__file__}: {arch}: {error}; repair it (or, if an operation was removed, add it again), "
                f"take it out, or give another {flag}"
            ) from None
    if not arch.endswith(".json"):
        newest = ", ".join(list(known)[-5:]) or "none yet"
        raise GenotypeError(
            f"{flag} {arch}: no such genotype in {FILE.name} (newest: {newest}); give another name, "
            "or a run's genotype.json"
        )
    return arch, read_json(arch)


def read_json(path):
    """The Genotype in a genotype.json; raises GenotypeError naming the file if there is none."""
    try:
        return check(json.loads(Path(path).read_text(encoding="utf-8-sig")))  # some editors begin with a BOM
    except OSError as error:
        raise GenotypeError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise GenotypeError(f"{path}: not a genotype: {error}") from None


def to_lists(genotype):
    """The genotype as a dictionary of lists, the edges of a branch as a tuple: plain enough for a checkpoint;
    `check` makes it a Genotype again.
    """
    return {field: [list(of_cell) for of_cell in cells] for field, cells in genotype._asdict().items()}


def write_json(genotype, path):
    """Write the genotype to a file that `read_json` reads."""
    _replace(Path(path), json.dumps(check(genotype)._asdict(), indent=1) + "\n")


def check_new_name(name, path=None):
    """Raise GenotypeError unless `name` can be added to the file of genotypes at `path` (default: `FILE`)."""
    path = Path(path or FILE).resolve()
    normal = unicodedata.normalize("NFKC", name) == name  # else Python would read it as another name
    if not (name.isidentifier() and normal) or keyword.iskeyword(name):
        raise GenotypeError(
            f"--name {name}: not a Python identifier (letters, digits and _, no digit first, no keyword)"
        )
    text = _read(path)
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise GenotypeError(f"{path}: is not Python: {error}; repair it") from None
    taken = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    taken |= {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    if name in taken or name in globals() or hasattr(builtins, name):
        raise NameTaken(f"--name {name}: already taken in {path.name}; choose another name")
    lock = _lock_of(path)
    writable = os.access(path.parent, os.W_OK) and os.access(path, os.W_OK)
    if not writable or (lock.exists() and not os.access(lock, os.W_OK)):
        raise GenotypeError(
            f"--name {name}: {path} cannot be written; run in a copy of the project that can be"
        )


def append(name, genotype, comment, path=None):
    """Add a named genotype at the end of the file at `path` (default: `FILE`), a comment above it.

    The file is valid Python at every instant, and a lock makes two searches that end together take turns.
    If this very genotype is there already, under this very name, nothing is added: a search was killed right
    after adding it. Raises GenotypeError as `check_new_name` does.
    """
    append_all({name: (genotype, comment)}, path)


def append_all(entries, path=None):
    """`append` several at once, {name: (genotype, comment)}: if one cannot be added, none is."""
    path = Path(path or FILE).resolve()
    with _locked(path):
        text = _read(path).rstrip("\n") + "\n"
        for name, (genotype, comment) in entries.items():
            if f"\n{name} = {literal(genotype)}\n" in text:
                continue
            check_new_name(name, path)
            comment = comment.encode(errors="backslashreplace").decode()  # a folder's name may not be UTF-8
            comment = "\n".join(f"# {line}" for line in textwrap.wrap(comment, 108))
            text += f"\n{comment}\n{name} = {literal(genotype)}\n"
        _replace(path, text)
    if path == Path(__file__).resolve():
        globals().update({name: genotype for name, (genotype, _) in entries.items()})  # for this process, too


def _read(path):
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise GenotypeError(f"{path}: cannot be read: {error}; repair it") from None


def _lock_of(path):
    return path.with_suffix(".lock")


@contextmanager
def _locked(path):
    with open(_lock_of(path), "a") as handle:
        if os.name == "posix":
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        else:
            import msvcrt

            msvcrt.locking(handle.fileno(), msvcrt.LK_LOCK, 1)
        yield


def _replace(path, text):
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # the error of a full disk names none
        raise
    finally:
        temporary.unlink(missing_ok=True)


# --- architectures found ------------------------------------------------------------------------------------

# BSDS500 and Rain800 backgrounds with synthetic rain, and Rain800's pairs; 381 steps of 3 scenes (36 minutes
# on a CPU), channels 16 32 64 128, seed 0, commit a8c4104
half_width_mixed_rain = Genotype(
    modules=(
        ("fusion", "parallel", "fusion", "fusion"),
        ("parallel", "parallel", "parallel", "parallel"),
        ("parallel", "parallel", "fusion", "fusion"),
    ),
    attention=(
        (
            ("sep_conv_3x3_spatial", "none", "dil_conv_3x3"),
            ("dil_conv_3x3", "CBAM", "none"),
        ),
        (
            ("SE_A_M", "skip_connect", "dil_conv_3x3"),
            ("dil_conv_3x3_spatial", "SE", "dil_conv_3x3"),
            ("CBAM", "CBAM", "SE_A_M"),
        ),
        (
            ("SE", "SE", "skip_connect"),
            ("dil_conv_3x3", "CBAM", "none"),
            ("sep_conv_3x3_spatial", "none", "CBAM"),
            ("dil_conv_3x3_spatial", "SE_A_M", "SE"),
        ),
    ),
)
