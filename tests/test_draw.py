"""An architecture as a picture: complete, well-formed, and from the command line."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import genotypes
from genotypes import GenotypeError
from model_train import DerainNetwork
from support import draw
from support.errors import UserError
from tests.made import ROOT, at_the_command_line, random_genotype

SVG = "{http://www.w3.org/2000/svg}"


def texts(picture):
    return [element.text for element in ET.fromstring(picture).iter(f"{SVG}text")]


@pytest.mark.parametrize("seed", range(3))
def test_every_edge_is_named_and_every_module_drawn(seed):
    genotype = random_genotype(seed)
    picture = draw.svg(genotype, "found", (4, 4, 4, 4))
    words = texts(picture)
    edges = [name for cell in genotype.attention for branch in cell for name in branch]
    for name, (label, _, _) in draw.LOOKS.items():
        legend = 1 if label != name else 2  # its label and its name
        drawn = 0 if name == "none" else edges.count(name) + legend
        assert words.count(label) == (drawn if name != "none" else 1), name
        assert name in words
    for node in ("F1", "F2", "U1", "U2", "SE4", "P"):
        assert words.count(node) == 9, node
    assert {"found", "cell 1", "cell 2", "cell 3", "head", "stem"} <= set(words)
    shapes = list(ET.fromstring(picture).iter())
    dotted = [shape for shape in shapes if shape.get("stroke-dasharray")]
    assert len(dotted) == edges.count("none") + 1
    blocks = sum(
        branches * cell.count("parallel")
        for branches, cell in zip(genotypes.BRANCHES, genotype.modules, strict=True)
    )
    assert len([s for s in shapes if s.get("fill") == draw.PARALLEL[0]]) == blocks + 1  # and the legend's
    fusions = sum(cell.count("fusion") for cell in genotype.modules)
    assert (
        len([s for s in shapes if s.get("fill") == draw.FUSION[0]]) == fusions + 2
    )  # the legend's, the head


def test_the_picture_of_another_genotype_is_another():
    assert draw.svg(random_genotype(0), "found") != draw.svg(random_genotype(1), "found")


def test_it_says_how_many_parameters_the_network_has_at_its_widths():
    genotype = random_genotype(0)
    count = sum(p.numel() for p in DerainNetwork(genotype, (4, 6, 8, 10)).parameters())
    assert f"{count:,} parameters with 4, 6, 8, 10 channels" in texts(
        draw.svg(genotype, "found", (4, 6, 8, 10))
    )


def test_nothing_leaves_the_page():
    root = ET.fromstring(draw.svg(random_genotype(0), "found"))
    width, height = (float(root.get(side)) for side in ("width", "height"))
    for shape in root.iter(f"{SVG}rect"):
        x, y, w, h = (float(shape.get(name)) for name in ("x", "y", "width", "height"))
        assert min(x, y) >= 0 and x + w <= width and y + h <= height
    for shape in root.iter(f"{SVG}polyline"):
        points = [tuple(map(float, point.split(","))) for point in shape.get("points").split()]
        assert all(0 <= x <= width and 0 <= y <= height for x, y in points)


def test_a_name_is_only_text():
    name = "<b> & \"quoted\" 'too' ü"
    assert texts(draw.svg(random_genotype(0), name))[0] == name


def test_the_readmes_picture_is_the_shipped_genotype():
    name = "half_width_mixed_rain"
    picture = (ROOT / "support" / f"{name}.svg").read_text(encoding="utf-8")
    assert picture == draw.svg(genotypes.named()[name], name, (16, 32, 64, 128))
    assert f"support/{name}.svg" in (ROOT / "README.md").read_text(encoding="utf-8")


# --- from the command line ---


def drawn(*flags):
    draw.main(draw.get_args_parser().parse_args(flags))


def test_any_named_genotype_and_any_runs_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    drawn("half_width_mixed_rain")
    assert capsys.readouterr().out == "half_width_mixed_rain.svg\n"
    assert "half_width_mixed_rain" in texts(Path("half_width_mixed_rain.svg").read_text(encoding="utf-8"))
    genotypes.write_json(random_genotype(1), "genotype.json")
    drawn("genotype.json", "pictures/mine.svg", "--channels", "4", "4", "4", "4")
    picture = Path("pictures/mine.svg").read_text(encoding="utf-8")
    assert picture == draw.svg(random_genotype(1), "genotype.json", [4, 4, 4, 4])


@pytest.mark.parametrize(
    ("flags", "error", "words"),
    [
        (["no_such"], GenotypeError, "^arch no_such: no such genotype"),
        (["half_width_mixed_rain", "mine.png"], UserError, "mine.png: .*svg"),
        (["half_width_mixed_rain", "file/mine.svg"], UserError, "file/mine.svg: cannot be written"),
    ],
)
def test_mistakes_are_named(flags, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(error, match=words):
        drawn(*flags)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_mistake_is_one_line_and_status_2():
    done = at_the_command_line(draw, "no_such")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("python -m support.draw: error: ") and "no_such" in line


def test_an_operation_added_to_the_search_space_is_drawn_by_its_name(monkeypatch):
    """A search draws its architecture after each epoch, and is not to end for want of a colour."""
    looks = {name: look for name, look in draw.LOOKS.items() if name != "SE"}
    monkeypatch.setattr(draw, "LOOKS", looks)  # put back into the dict itself, it would be the legend's last
    genotype = random_genotype(0)
    edges = [name for cell in genotype.attention for branch in cell for name in branch]
    assert texts(draw.svg(genotype, "found", (4, 4, 4, 4))).count("SE") == edges.count("SE") > 0
