import ast
import errno
import json
import multiprocessing
import os
from functools import partial
from pathlib import Path

import pytest

import genotypes
from genotypes import MODULES, PRIMITIVES, Genotype, GenotypeError
from tests.appends import append_one, append_until
from tests.made import random_genotype


def test_every_named_genotype_is_well_formed():
    assert genotypes.named()
    for genotype in genotypes.named().values():
        assert genotypes.check(genotype) == genotype


def test_vocabulary_is_the_papers():
    words = (
        "none skip_connect sep_conv_3x3 dil_conv_3x3 sep_conv_3x3_spatial dil_conv_3x3_spatial SE SE_A_M CBAM"
    )
    assert tuple(words.split()) == PRIMITIVES
    assert MODULES == ("parallel", "fusion")


def test_literal_is_the_genotype_in_python():
    genotype = random_genotype(0)
    text = genotypes.literal(genotype)
    assert eval(text, {"Genotype": Genotype}) == genotype
    assert max(len(line) for line in text.splitlines()) <= 110


def test_json_round_trip(tmp_path):
    genotype = random_genotype(1)
    genotypes.write_json(genotype, tmp_path / "genotype.json")
    assert genotypes.find(str(tmp_path / "genotype.json"))[1] == genotype
    assert genotypes.find(tmp_path / "genotype.json")[1] == genotype
    marked = tmp_path / "marked.json"  # as some editors save it
    marked.write_text((tmp_path / "genotype.json").read_text(), encoding="utf-8-sig")
    assert genotypes.read_json(marked) == genotype


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda g: g["modules"].pop(), ["modules has 2 cells", "must have 3"]),
        (lambda g: g["modules"][1].append("fusion"), ["modules[1] has 5 modules", "must have 4"]),
        (lambda g: g["modules"][2].__setitem__(3, "fuse"), ["modules[2][3]", "'fuse'", "parallel, fusion"]),
        (lambda g: g["attention"][0].pop(), ["attention[0] has 1 branches", "must have 2"]),
        (lambda g: g["attention"][2][1].pop(), ["attention[2][1] has 2 edges", "must have 3"]),
        (lambda g: g["attention"][1][2].__setitem__(0, "conv"), ["attention[1][2][0]", "'conv'", "CBAM"]),
        (lambda g: g["attention"][1].__setitem__(0, "SE"), ["attention[1][0]", "sequence of 3 edges"]),
        (lambda g: g["attention"][1][0].__setitem__(0, ["SE"]), ["attention[1][0][0]", "['SE']"]),
        (lambda g: g.pop("attention"), ["modules and attention"]),
    ],
)
def test_malformed_genotype_is_refused_by_entry(change, words, tmp_path):
    fields = json.loads(json.dumps(random_genotype(2)._asdict()))
    change(fields)
    with pytest.raises(GenotypeError) as error:
        genotypes.check(fields)
    assert all(word in str(error.value) for word in words), error.value
    path = tmp_path / "genotype.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(GenotypeError, match="genotype.json"):
        genotypes.find(str(path))


def test_a_file_without_a_genotype_is_said_where_the_newest_is_wanted(monkeypatch):
    monkeypatch.setattr(genotypes, "named", dict)
    with pytest.raises(GenotypeError, match="holds no genotype yet; search for one, or give --arch"):
        genotypes.find()


def test_unknown_name_and_file_are_refused(tmp_path):
    with pytest.raises(GenotypeError, match=r"no_such: no such genotype in genotypes\.py \(newest: "):
        genotypes.find("no_such")
    with pytest.raises(GenotypeError, match="missing.json"):
        genotypes.find(str(tmp_path / "missing.json"))
    (tmp_path / "text.json").write_text("not json")
    with pytest.raises(GenotypeError, match="text.json: not a genotype"):
        genotypes.find(str(tmp_path / "text.json"))


def test_a_genotype_of_an_operation_that_is_gone_is_named(monkeypatch):
    genotype = random_genotype(3)
    cell = (("gone", *genotype.attention[0][0][1:]), *genotype.attention[0][1:])
    monkeypatch.setattr(
        genotypes, "old", genotype._replace(attention=(cell, *genotype.attention[1:])), raising=False
    )
    with pytest.raises(GenotypeError, match=r"genotypes\.py: old: .*'gone'.* if an operation was removed"):
        genotypes.find()


def test_a_genotype_pasted_wrongly_is_to_be_repaired(monkeypatch):
    genotype = random_genotype(3)
    monkeypatch.setattr(genotypes, "pasted", genotype._replace(modules=genotype.modules[:2]), raising=False)
    with pytest.raises(GenotypeError, match=r"pasted: modules has 2 cells; it must have 3; repair it "):
        genotypes.find("pasted")


def test_newest_is_the_last_in_the_file():
    assert genotypes.find()[0] == list(genotypes.named())[-1]


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "genotypes.py"
    path.write_text(Path(genotypes.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return path


def test_append_keeps_the_file_valid_and_what_was_there(vocabulary):
    before = vocabulary.read_text(encoding="utf-8")
    lock = vocabulary.with_suffix(".lock")
    lock.write_text("another program's")
    genotypes.append("found", random_genotype(3), "data;\nseed 3", vocabulary)
    assert lock.read_text() == "another program's"
    after = vocabulary.read_text(encoding="utf-8")
    assert after.startswith(before.rstrip("\n"))
    assert "# data; seed 3\nfound = Genotype(" in after
    namespace = {"__name__": "copy", "__file__": str(vocabulary)}
    exec(compile(after, "genotypes.py", "exec"), namespace)
    assert tuple(namespace["found"]) == tuple(random_genotype(3))


def test_what_a_search_found_is_there_for_a_training_in_the_same_process(vocabulary, monkeypatch):
    monkeypatch.setattr(genotypes, "FILE", vocabulary)
    monkeypatch.setattr(genotypes, "__file__", str(vocabulary))
    entries = {name: (random_genotype(seed), "drawn") for seed, name in enumerate(("found_0", "found_1"))}
    try:
        genotypes.append_all(entries)
        assert genotypes.find("found_0") == ("found_0", random_genotype(0))
        assert genotypes.find(None) == ("found_1", random_genotype(1))
    finally:
        for name in entries:
            vars(genotypes).pop(name, None)
    monkeypatch.undo()
    genotypes.append("elsewhere", random_genotype(2), "", vocabulary)
    assert "elsewhere" not in vars(genotypes)


def test_a_folder_whose_name_is_not_utf_8_does_not_cost_a_search_its_genotype(vocabulary):
    genotypes.append("found", random_genotype(3), os.fsdecode(b"data in d\xe9j\xe0"), vocabulary)
    assert "# data in d\\udce9j\\udce0\nfound = " in vocabulary.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name", ["PRIMITIVES", "check", "json", "tuple", "class", "2nd", "a-b", "", "\uff43heck"]
)
def test_names_that_would_break_the_file_are_refused(name, vocabulary):
    before = vocabulary.read_text(encoding="utf-8")
    with pytest.raises(GenotypeError, match="--name"):
        genotypes.append(name, random_genotype(3), "", vocabulary)
    assert vocabulary.read_text(encoding="utf-8") == before


def test_existing_name_is_refused(vocabulary):
    genotypes.append("found", random_genotype(3), "", vocabulary)
    with pytest.raises(GenotypeError, match="found: already taken"):
        genotypes.append("found", random_genotype(4), "", vocabulary)


@pytest.mark.parametrize("what", [".", "genotypes.lock"])
def test_a_file_that_cannot_be_written_is_told_before_a_search(vocabulary, monkeypatch, what):
    unwritable = vocabulary.parent / what
    unwritable.touch()  # the lock is another user's
    monkeypatch.setattr(os, "access", lambda path, mode: path != unwritable)
    with pytest.raises(GenotypeError, match=r"found: .*genotypes\.py cannot be written"):
        genotypes.check_new_name("found", vocabulary)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"found = Genotype(modules=(\n", "is not Python: .* never closed.*; repair it"),
        (b"# \xe9t\xe9\n", "cannot be read: .*codec.*; repair it"),
        (None, "cannot be read: .*No such file.*; repair it"),
    ],
)
def test_a_file_that_is_being_edited_is_told(vocabulary, data, said):
    if data is None:
        vocabulary.unlink()
    else:
        vocabulary.write_bytes(data)
    for add in (partial(genotypes.append, genotype=random_genotype(3), comment=""), genotypes.check_new_name):
        with pytest.raises(GenotypeError, match=rf"genotypes\.py: {said}$") as error:
            add("found", path=vocabulary)
        assert str(error.value).count("genotypes.py: ") == str(error.value).count("repair it") == 1
    assert (vocabulary.read_bytes() if vocabulary.exists() else None) == data


def test_a_file_that_an_editor_marked_as_utf_8_is_taken(vocabulary):
    vocabulary.write_bytes(b"\xef\xbb\xbf" + vocabulary.read_bytes())
    genotypes.append("found", random_genotype(3), "", vocabulary)
    assert "\nfound = Genotype(" in vocabulary.read_text(encoding="utf-8")


@pytest.mark.skipif(os.name != "posix", reason="Windows has other links and modes")
def test_a_link_stays_one_and_the_file_keeps_its_mode(vocabulary, tmp_path):
    link = tmp_path / "linked" / "genotypes.py"
    link.parent.mkdir()
    link.symlink_to(vocabulary)
    vocabulary.chmod(0o664)
    genotypes.append("found", random_genotype(3), "", link)
    assert link.is_symlink() and "\nfound = Genotype(" in vocabulary.read_text(encoding="utf-8")
    assert vocabulary.stat().st_mode & 0o777 == 0o664


def test_searches_that_end_together_lose_nothing(vocabulary):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=append_one, args=(vocabulary, number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    tree = ast.parse(vocabulary.read_text(encoding="utf-8"))
    names = [node.targets[0].id for node in tree.body if isinstance(node, ast.Assign)]
    assert {f"found_{number}" for number in range(4)} <= set(names)


# --- random ones ---


def test_random_genotypes_are_valid_distinct_and_repeatable():
    drawn = genotypes.draw_random(200, seed=3)
    assert len(drawn) == len(set(drawn)) == 200
    assert all(genotypes.check(genotype) == genotype for genotype in drawn)
    assert genotypes.draw_random(200, seed=3) == drawn
    assert genotypes.draw_random(20, seed=3) == drawn[:20]
    assert not set(genotypes.draw_random(200, seed=4)) & set(drawn)


def test_random_genotypes_are_none_that_has_a_name(monkeypatch):
    first, second = genotypes.draw_random(2, seed=0)
    monkeypatch.setattr(genotypes, "known", first, raising=False)
    assert genotypes.draw_random(1, seed=0) == [second]
    monkeypatch.setattr(genotypes, "known", Genotype(**genotypes.to_lists(first)), raising=False)
    monkeypatch.setattr(genotypes, "of_old", first._replace(modules=()), raising=False)
    assert genotypes.draw_random(1, seed=0) == [second]


def test_random_genotypes_are_spread_as_the_search_would_derive_them():
    number = len(PRIMITIVES)
    drawn = genotypes.draw_random(4000, seed=0)
    kinds = [kind for genotype in drawn for cell in genotype.modules for kind in cell]
    assert kinds.count("fusion") / len(kinds) == pytest.approx(1 / 2, abs=0.01)
    modules = [edges for genotype in drawn for cell in genotype.attention for edges in cell]
    first = [edges[0] for edges in modules]
    for name in PRIMITIVES[1:]:
        assert first.count(name) / len(modules) == pytest.approx(1 / (number - 1), abs=0.01)
    assert "none" not in first
    both = sum("none" not in edges[1:] for edges in modules)
    assert both / len(modules) == pytest.approx((1 - 1 / number) ** 2, abs=0.01)
    assert not any(edges[1:] == ("none", "none") for edges in modules)
    none = 1 / number - 1 / number**2 / 2  # of the modules with two, half get an operation here
    for edge in (1, 2):
        share = sum(edges[edge] == "none" for edges in modules) / len(modules)
        assert share == pytest.approx(none, abs=0.01)
        for name in PRIMITIVES[1:]:
            share = sum(edges[edge] == name for edges in modules) / len(modules)
            assert share == pytest.approx((1 - none) / (number - 1), abs=0.01)


def test_where_one_name_is_taken_none_is_added(vocabulary):
    genotypes.append("found_1", random_genotype(3), "", vocabulary)
    before = vocabulary.read_text(encoding="utf-8")
    entries = {f"found_{i}": (random_genotype(i), "") for i in range(3)}
    with pytest.raises(GenotypeError, match="found_1: already taken"):
        genotypes.append_all(entries, vocabulary)
    assert vocabulary.read_text(encoding="utf-8") == before


def test_the_file_is_valid_python_at_every_instant(vocabulary):
    """Read as fast as can be while another process appends to it."""
    context = multiprocessing.get_context("spawn")
    enough = context.Event()
    process = context.Process(target=append_until, args=(enough, vocabulary))
    process.start()
    seen = set()
    while process.is_alive():
        tree = ast.parse(vocabulary.read_text(encoding="utf-8"))
        seen.add(sum(isinstance(node, ast.Assign) for node in tree.body))
        if len(seen) > 20:
            enough.set()
    assert process.exitcode == 0
    assert len(seen) > 20  # else it ended at its limit, and was not read while it appended


def test_what_a_killed_search_appended_already_is_not_appended_again(vocabulary):
    genotypes.append("found", random_genotype(3), "", vocabulary)
    once = vocabulary.read_text(encoding="utf-8")
    genotypes.append("found", random_genotype(3), "", vocabulary)
    assert vocabulary.read_text(encoding="utf-8") == once


def test_a_full_disk_is_told_with_the_files_name(vocabulary, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = vocabulary.read_text(encoding="utf-8")
    monkeypatch.setattr(genotypes.os, "fsync", full)
    with pytest.raises(OSError) as error:
        genotypes.append("found", random_genotype(3), "", vocabulary)
    assert error.value.filename == str(vocabulary)
    assert vocabulary.read_text(encoding="utf-8") == before
    assert not list(vocabulary.parent.glob(".*"))
