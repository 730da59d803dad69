"""A folder restored by several processes, or in several goes, gives what one process in one go gives."""

import csv
import errno
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import model_train
import test_view
from support.errors import UserError
from support.images import read_image, write_video
from support.journal import Journal
from tests.made import ROOT, interrupted, photograph, torchrun, view, write_network, write_pairs, write_scenes


@pytest.fixture(autouse=True)
def network(folder):
    return write_network("net.pt")


def content(folder):
    """{name: bytes} of what is in the folder, without the seconds, the command, and the journals."""
    files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in Path(folder).rglob("*.*")}
    files = {name: data for name, data in files.items() if not name.startswith(".done.")}
    if "results.csv" in files:
        rows = csv.DictReader(files["results.csv"].decode().splitlines())
        files["results.csv"] = [{**row, "seconds": None} for row in rows]
        files["results.json"] = {**json.loads(files["results.json"]), "command": None}
    return files


@pytest.fixture
def pictures(folder):
    """Scenes of three densities, the second of which breaks."""
    write_scenes(folder / "set", 4)
    file = folder / "set" / "DID-MDN-training" / "Rain_Medium" / "train2018new" / "1.png"
    file.write_bytes(file.read_bytes()[:200])
    return "--path set/DID-MDN-training"


def count_restored(monkeypatch):
    """A list that grows by one for each picture that is restored from now on."""
    restored = []
    restore = test_view.restore
    monkeypatch.setattr(
        test_view, "restore", lambda *args, **options: restored.append(1) or restore(*args, **options)
    )
    return restored


def test_three_processes_write_what_one_does(pictures):
    flags = f"{pictures} --ckt_path net.pt --device cpu --result_path"
    done = torchrun(str(ROOT / "test_view.py"), *f"{flags} out".split(), processes=3)
    (names,) = re.findall(r"1 could not be used:\n +(.*)", done.stderr)
    assert "1.png" in names
    three = content("out")

    # And two go on where some of it is gone.
    next(Path("out").rglob("2*.png")).unlink()
    before = {file: file.stat().st_mtime_ns for file in Path("out").rglob("*.png")}
    done = torchrun(str(ROOT / "test_view.py"), *f"{flags} out --skip_done".split())
    assert "done already: 8 of 12 pictures" in done.stdout
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert content("out")["results.csv"] == three["results.csv"]

    shutil.rmtree("out")
    assert view(f"{pictures} --result_path out") == 1
    assert len(three["results.csv"]) == 9
    assert content("out") == three


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupted_run_goes_on_where_it_stopped(pictures, monkeypatch, number):
    assert view(f"{pictures} --result_path whole") == 1
    with monkeypatch.context() as patch:
        patch.setattr(test_view, "restore", interrupted(5, lambda: signal.raise_signal(number)))
        assert view(f"{pictures} --result_path out") == 130
    assert len(content("out")["results.csv"]) == 4
    with open("out/.done.0.jsonl", "ab") as journal:
        journal.write(b'\n\xff\n3\n{"entry": 3}\n{"entry": [{"name": 3}, "", [], [], [], 3]}\n')
        journal.write(b"[" * 10**5)  # what a power cut may leave
        journal.write(b'\n{"key": "cut o')  # it was killed while it wrote
    before = {file: file.stat().st_mtime_ns for file in Path("out").rglob("*.png")}
    restored = count_restored(monkeypatch)
    assert view(f"{pictures} --result_path out --skip_done") == 1
    assert len(restored) == 5
    assert {file: file.stat().st_mtime_ns for file in before} == before
    # The broken one took no number, so those after it are called otherwise in the gallery.
    whole, out = content("whole"), content("out")
    for name in whole.keys() - {"index.html"}:
        assert name.startswith("gallery/") or out[name] == whole[name], name
    assert view(f"{pictures} --result_path out --skip_done") == 1
    assert len(restored) == 5


def test_what_has_changed_is_done_again(network, folder, monkeypatch, capsys):
    write_pairs(Path("pairs"), 4)
    flags = "--path pairs --clean_side left --result_path out"
    assert view(flags) == 0
    assert "earlier run" not in capsys.readouterr().out
    assert view(flags) == 0
    assert "out: holds results of an earlier run, too" in capsys.readouterr().out
    restored = count_restored(monkeypatch)

    def again(flags=f"{flags} --skip_done"):
        restored.clear()
        assert view(flags) == 0
        assert len(content("out")["results.csv"]) == 4 + Path("pairs", "9.png").exists()
        return len(restored)

    assert again() == 0
    Path("out", "2.png").unlink()
    assert again() == 1
    shutil.copy("pairs/1.png", "pairs/3.png")  # another picture of that name
    assert again() == 1
    shutil.copy("pairs/1.png", "pairs/9.png")  # a picture more, whose gallery files take no other's place
    assert again() == 1
    names = [row["name"] for row in content("out")["results.csv"]]
    assert names == ["0", "1", "2", "3", "9"]
    thumbnails = re.findall(r'data-small="([^"]+)"', Path("out", "index.html").read_text(encoding="utf-8"))
    assert len(set(thumbnails)) == len(thumbnails) == 15
    assert again(f"{flags} --skip_done --self_ensemble") == 5
    network.head.to_rgb.weight.data += 0.1
    model_train.save(network, "net.pt")
    assert again() == 5
    assert again(flags) == 5


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("--clean_side right", "--clean_side left"),
        ("--clean_side left", "--clean_side left --tile 64"),
        ("--clean_side left", "--clean_side left --amp"),
    ],
)
def test_what_was_restored_otherwise_is_done_again(folder, monkeypatch, before, now):
    write_pairs(Path("pairs"), 1)
    restored = count_restored(monkeypatch)
    for flags, count in ((before, 1), (before, 1), (now, 2)):
        assert view(f"--path pairs --result_path out --skip_done {flags}") == 0
        assert len(restored) == count


def test_what_was_restored_without_a_truth_is_scored_when_there_is_one(folder, monkeypatch):
    for i in range(3):
        test_view.images.write_image(Path("set", f"{i}_in.png"), photograph(i))
    assert view("--path set --result_path out --skip_done") == 0
    for i in range(3):
        test_view.images.write_image(Path("set", f"{i}_GT.png"), photograph(i))
    restored = count_restored(monkeypatch)
    assert view("--path set --result_path out --skip_done") == 0
    rows = content("out")["results.csv"]
    assert len(restored) == len(rows) == 3 and all(row["psnr_rgb"] for row in rows)


def test_what_was_done_before_rows_had_a_scale_stays_done(folder, monkeypatch):
    write_pairs(Path("pairs"), 2)
    flags = "--path pairs --clean_side left --result_path out --skip_done"
    assert view(flags) == 0
    journal = Path("out", ".done.0.jsonl")
    journal.write_text(journal.read_text().replace('"scale": "1", ', "", 1))
    restored = count_restored(monkeypatch)
    assert view(flags) == 0
    assert not restored
    rows = content("out")["results.csv"]
    assert [row["scale"] for row in rows] == ["", "1"] and all(row["psnr_rgb"] for row in rows)


def test_a_picture_that_is_touched_while_others_are_restored_stays_in_the_tables(folder, monkeypatch):
    write_pairs(Path("pairs"), 3)
    restore = test_view.restore

    def touching(*args, **options):
        os.utime("pairs/0.png", (1, 1))
        return restore(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(test_view, "restore", touching)
        patch.setattr(
            Journal, "add", lambda *args, add=Journal.add: (add(*args), os.utime("pairs/0.png", (2, 2)))
        )
        assert view("--path pairs --clean_side left --result_path out") == 0
    assert len(content("out")["results.csv"]) == 3
    restored = count_restored(monkeypatch)
    assert view("--path pairs --clean_side left --result_path out --skip_done") == 0
    assert len(restored) == 1


def test_what_is_done_is_known_from_another_folder_and_when_results_have_moved(folder, monkeypatch):
    write_pairs(Path("pairs"), 2)
    flags = f"--clean_side left --skip_done --ckt_path {folder}/net.pt"
    assert view(f"{flags} --path pairs --result_path out") == 0
    Path("out").rename("moved")
    Path("sub").mkdir()
    monkeypatch.chdir("sub")
    restored = count_restored(monkeypatch)
    assert view(f"{flags} --path ../pairs --result_path ../moved") == 0
    assert not restored and len(content("../moved")["results.csv"]) == 2


def test_a_journal_that_is_gone_has_closed_its_lock_file(tmp_path):
    journal = Journal(tmp_path, {})
    journal.lock()
    handle = journal.handle
    del journal
    gc.collect()
    assert handle.closed


def test_two_runs_at_once_do_not_share_a_folder_of_results(folder):
    write_pairs(Path("pairs"), 1)
    Path("out").mkdir()
    lock = "from support.lock import lock_folder; from pathlib import Path; import sys\n"
    lock += "lock_folder(Path('out'), '.done.lock', '', sys); print('locked', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", lock]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    other = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    with other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match="out: another process runs in this folder"):
            view("--path pairs --clean_side left --result_path out")
        other.stdin.close()
    assert view("--path pairs --clean_side left --result_path out") == 0


def test_two_data_sets_in_one_folder_keep_their_own_pictures_in_the_gallery(folder, monkeypatch):
    write_pairs(Path("a"), 2)
    write_pairs(Path("b"), 2, first=50)
    for i in range(2):
        Path("b", f"{i}.png").rename(Path("b", f"b{i}.png"))
    flags = "--clean_side left --result_path out --skip_done --path"
    assert [view(f"{flags} {name}") for name in "ab"] == [0, 0]
    with monkeypatch.context() as patch:
        again = count_restored(patch)
        assert view(f"{flags} a") == 0 and not again
    truths = re.findall(r"gallery/\d+-truth\.jpg", Path("out", "index.html").read_text(encoding="utf-8"))
    assert len(set(truths)) == 2
    for i, file in enumerate(dict.fromkeys(truths)):
        assert abs(read_image(Path("out", file)).astype(int) - photograph(i)).mean() < 8  # what JPEG loses
    shutil.rmtree("out/gallery")
    restored = count_restored(monkeypatch)
    assert view(f"{flags} a --montage 1") == 0
    assert len(restored) == 2 and Path("out", "montage.png").exists()


def test_what_was_done_of_other_data_is_not_replaced(folder):
    write_pairs(Path("a"), 2)
    write_pairs(Path("b"), 3)
    flags = "--clean_side left --result_path out --skip_done --path"
    assert view(f"{flags} a") == 0
    before = content("out")
    with pytest.raises(UserError, match=r"--skip_done: out/0\.png is a result of .*/a; give another --re"):
        view(f"{flags} b")
    assert content("out") == before
    shutil.rmtree("a")
    for i in range(2):
        Path("out", f"{i}.png").unlink()  # there is nothing to lose
    assert view(f"{flags} b") == 0
    Path("out", "1.png").write_bytes(b"damaged")  # now b's own
    assert view(f"{flags} b") == 0
    assert read_image("out/1.png").shape


def test_that_tables_will_not_have_what_was_done_otherwise_is_said(folder, capsys):
    write_pairs(Path("a"), 1)
    write_pairs(Path("b/other"), 1)
    words = "out: holds results of an earlier run, too; the tables will cover this run alone"
    flags = "--clean_side left --result_path out --skip_done --path"
    said = []
    for more in ("a", "a", "a --tile 64", "b/other/0.png"):
        if more.startswith("b"):
            Path("out/0.png").unlink()  # there is nothing to lose
        view(f"{flags} {more}")
        said.append(words in capsys.readouterr().out)
    assert said == [False, False, True, True]


def test_a_journal_that_cannot_be_used_is_one_line(folder):
    write_pairs(Path("pairs"), 1)
    Path("out", ".done.0.jsonl").mkdir(parents=True)
    flags = "--path pairs --clean_side left --result_path out"
    for more, what in (("", "removed"), (" --skip_done", "read")):
        with pytest.raises(UserError, match=f"jsonl: cannot be {what}: .*; give another --result_path"):
            view(flags + more)


def test_pictures_without_truth_go_on_too(network, folder, monkeypatch):
    for i in range(3):
        test_view.images.write_image(Path("photos", f"{i}.jpg"), photograph(i))
    assert view("--path photos --result_path out") == 0
    Path("out", "1.jpg").unlink()
    restored = count_restored(monkeypatch)
    assert view("--path photos --result_path out --skip_done") == 0
    assert len(restored) == 1
    assert sorted(file.name for file in Path("out").glob("*.jpg")) == ["0.jpg", "1.jpg", "2.jpg"]
    assert Path("out", "index.html").read_text(encoding="utf-8").count("<li ") == 3


def test_a_video_beside_pictures_leaves_them_done(folder, monkeypatch):
    write_pairs(Path("pairs"), 1)
    write_video("film.avi", [photograph(0, 32, 48)], 10)
    flags = "--path pairs --clean_side left --result_path out --skip_done"
    assert view(flags) == view("--path film.avi --result_path out") == 0
    restored = count_restored(monkeypatch)
    assert view(flags) == 0 and not restored


def test_a_result_folder_that_turns_read_only_stops_the_run(folder, capsys, monkeypatch):
    write_pairs(Path("pairs"), 4)
    restored = count_restored(monkeypatch)

    def refused_from_the_second_on(write):
        def wrapped(*args, **options):
            if len(restored) > 1:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return write(*args, **options)

        return wrapped

    for name in ("write_bytes", "touch"):
        monkeypatch.setattr(Path, name, refused_from_the_second_on(getattr(Path, name)))
    assert view("--path pairs --clean_side left --result_path out") == 1
    assert len(restored) == 2
    assert "stopped there, 1 of 4 pictures are done" in capsys.readouterr().err


@pytest.mark.parametrize(
    "remove", [lambda: shutil.rmtree("out"), lambda: [file.unlink() for file in Path("out").glob("*.png")]]
)
def test_results_that_are_removed_while_others_are_restored_are_missed(folder, remove, capsys, monkeypatch):
    write_pairs(Path("pairs"), 4)
    with monkeypatch.context() as patch:
        patch.setattr(test_view, "restore", interrupted(3, remove))
        assert view("--path pairs --clean_side left --result_path out") == 1
    assert "out: 2 of 4 results are gone" in capsys.readouterr().err
    assert view("--path pairs --clean_side left --result_path out --skip_done") == 0
    assert len(content("out")["results.csv"]) == 4
