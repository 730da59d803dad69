import os
import re
import shutil
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from support.errors import UserError
from support.images import CannotWrite, EndsEarly, Video, video_name, write_video


def frames(count, height, width):
    """Smooth frames that get brighter, so that lossy codecs keep them."""
    ramp = np.linspace(0, 100, height * width).reshape(height, width)
    return [np.dstack([ramp + 10 * i, ramp, 100 - ramp]).astype(np.uint8) for i in range(count)]


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mov", ".mkv"])
def test_a_video_comes_back(tmp_path, suffix):
    path = tmp_path / f"neue Straße{suffix}"
    written = frames(7, 48, 64)
    write_video(path, written, 12.5)
    video = Video(path)
    assert (video.fps, video.frames, video.size) == (12.5, 7, (48, 64))
    read = list(video)
    assert len(read) == 7
    for before, after in zip(written, read, strict=True):
        assert np.abs(before.astype(int) - after).mean() < 6


@pytest.mark.parametrize("rate", [66.667, 119.88, 238.523, 960.1])
def test_slow_motion_keeps_its_rate_as_nearly_as_the_container_can(tmp_path, rate, capfd):
    write_video(tmp_path / "v.mp4", frames(3, 16, 16), rate)
    assert Video(tmp_path / "v.mp4").fps == pytest.approx(rate, rel=2e-4)
    assert capfd.readouterr().err == ""


def test_a_variable_rate_is_its_mean_and_no_frame_is_missed(tmp_path):
    """30 frames a second for 2 s, and then 10 for 6 s; one that was cut off still ends early."""
    file = Path(__file__).with_name("variable_rate.webm")
    video = Video(file)
    assert (video.frames, video.size) == (120, (48, 64))
    assert video.fps == pytest.approx(15, abs=0.1)
    assert len(list(video)) == 120
    (tmp_path / "cut.webm").write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(EndsEarly, match="cut.webm: ends early"):
        list(Video(tmp_path / "cut.webm"))


def test_an_interlaced_video_is_read_or_said_not_to_be(tmp_path, caplog):
    """OpenCV 5 gives the same garbage for each frame; older ones read it."""
    path = tmp_path / "dvd.mpg"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MPG2"), 25, (64, 32))
    for frame in frames(5, 32, 64):
        writer.write(frame)
    writer.release()
    progressive, content = list(Video(path)), bytearray(path.read_bytes())
    # ISO 13818-2: progressive_sequence and progressive_frame, in the extensions of kinds 1 and 8.
    extensions = [match.end() for match in re.finditer(b"\0\0\1\xb5", content)]
    for place in extensions:
        kind = content[place] >> 4
        content[place + {1: 1, 8: 4}[kind]] &= ~{1: 0x08, 8: 0x80}[kind]
    assert len(extensions) == 6
    path.write_bytes(content)
    assert not caplog.messages
    if not np.array_equal(list(Video(path)), progressive):
        assert "dvd.mpg: its 5 frames are all the same; if it is interlaced" in caplog.text


def test_a_single_frame_and_a_still_beginning_are_no_sign_of_an_interlaced_video(tmp_path, caplog):
    first, last = frames(2, 32, 64)
    for written in ([first], [first, first, last]):
        write_video(tmp_path / "still.avi", written, 25)
        assert len(list(Video(tmp_path / "still.avi"))) == len(written)
    assert not caplog.messages


def test_odd_sizes_gain_a_row_and_a_column(tmp_path):
    write_video(tmp_path / "odd.avi", frames(3, 47, 65), 25)
    assert Video(tmp_path / "odd.avi").size == (48, 66)
    write_video(tmp_path / "white.avi", [np.full((47, 65, 3), 255, np.uint8)], 25)
    (frame,) = Video(tmp_path / "white.avi")
    assert frame.min() > 250  # the last ones again, not black ones


def test_interrupted_writing_leaves_nothing(tmp_path):
    def broken():
        yield from frames(2, 16, 16)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / "v.mp4", broken(), 25)
    assert list(tmp_path.iterdir()) == []


def test_a_video_that_ends_early_is_said_and_its_beginning_kept(tmp_path):
    source = tmp_path / "whole.avi"
    write_video(source, frames(40, 64, 64), 25)
    data = source.read_bytes()
    (tmp_path / "cut.avi").write_bytes(data[: int(len(data) * 0.6)])
    video = Video(tmp_path / "cut.avi")
    video.frames = max(video.frames, 40)  # as a container says that gives its length at the front
    with pytest.raises(UserError, match=r"cut.avi: ends early, after \d+ of 40 frames"):
        write_video(tmp_path / "out.avi", video, 25)
    kept = cv2.VideoCapture(str(tmp_path / "out.avi"))
    assert 1 <= kept.get(cv2.CAP_PROP_FRAME_COUNT) < 40


def test_a_container_may_promise_a_frame_more_than_it_holds(tmp_path):
    write_video(tmp_path / "v.avi", frames(7, 48, 64), 25)
    video = Video(tmp_path / "v.avi")
    video.frames = 8
    assert len(list(video)) == 7
    video = Video(tmp_path / "v.avi")
    video.frames = 9
    with pytest.raises(EndsEarly, match="after 7 of 9 frames"):
        list(video)


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mov", ".mkv"])
def test_a_video_that_the_disk_cut_short_does_not_pass_as_whole(tmp_path, suffix):
    """OpenCV's writer says nothing of a write that failed."""
    resource = pytest.importorskip("resource")  # POSIX's
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = np.random.default_rng(0).integers(0, 256, (20, 96, 128, 3), dtype=np.uint8)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(CannotWrite, match=rf"v{suffix}: cannot be written: of 20 frames the file holds"):
            write_video(tmp_path / f"v{suffix}", noise, 25)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_trimmed_video_is_whole(tmp_path, caplog):
    """Trimming, as on a phone, leaves the frames in the file and moves the start of its edit list."""
    path = tmp_path / "trimmed.mp4"
    write_video(path, frames(30, 48, 64), 10)
    data = bytearray(path.read_bytes())
    edits, track = data.index(b"elst"), data.index(b"mdhd")
    timescale = data[track + 16 : track + 20]  # ticks a second: the start moves by one second
    data[edits + 16 : edits + 20] = timescale
    path.write_bytes(data)
    assert len(list(Video(path))) == 20
    assert "trimmed.mp4: 20 of its 30 frames are shown" in caplog.text
    whole = Video(tmp_path / "trimmed.mp4")
    path.write_bytes(data[:-10])
    with pytest.raises(EndsEarly, match="after 20 of 30 frames"):
        list(whole)


def test_a_trimmed_video_whose_length_takes_64_bits_is_whole(tmp_path):
    """As one of over 4 GB."""
    path = tmp_path / "trimmed.mp4"
    write_video(path, frames(30, 48, 64), 10)
    data = bytearray(path.read_bytes())
    edits, track = data.index(b"elst"), data.index(b"mdhd")
    data[edits + 16 : edits + 20] = data[track + 16 : track + 20]
    at = data.index(b"\0\0\0\x08free")  # which is there to make room for such a length
    size, name = struct.unpack(">I4s", data[at + 8 : at + 16])
    data[at : at + 16] = struct.pack(">I4sQ", 1, name, size + 8)
    path.write_bytes(data)
    assert len(list(Video(path))) == 20
    video = Video(path)
    path.write_bytes(data[:-10])
    with pytest.raises(EndsEarly, match="after 20 of 30 frames"):
        list(video)


def test_a_video_whose_sound_goes_on_is_whole(tmp_path):
    path = tmp_path / "sound.mkv"
    write_video(path, frames(50, 48, 64), 10)
    data = bytearray(path.read_bytes())
    length = data.index(b"\x44\x89\x88") + 3  # of the segment, a float64
    data[length : length + 8] = struct.pack(">d", 1.1 * struct.unpack(">d", data[length : length + 8])[0])
    path.write_bytes(data)
    video = Video(path)
    assert (video.frames, len(list(video))) == (50, 50)


def test_a_video_whose_length_is_that_of_its_sound_is_whole(tmp_path):
    """As that of Windows Media, whose header gives it in units of 100 ns, and of MPEG's streams."""
    path = tmp_path / "sound.wmv"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"WMV2"), 10, (64, 48))
    for frame in frames(50, 48, 64):
        writer.write(frame)
    writer.release()
    data = bytearray(path.read_bytes())
    length = data.index(bytes.fromhex("A1DCAB8C47A9CF118EE400C00C205365")) + 64
    data[length : length + 8] = struct.pack("<Q", struct.unpack("<Q", data[length : length + 8])[0] + 10**7)
    path.write_bytes(data)
    video = Video(path)
    assert (video.frames, video.fps, len(list(video))) == (50, 10, 50)


@pytest.mark.parametrize("suffix, rate", [(".ts", 10), (".mpg", 25)])
def test_joined_streams_keep_their_rate(tmp_path, suffix, rate):
    """As a camcorder's parts, one behind the other: the times begin again, and the length is that of one."""
    path = tmp_path / f"part{suffix}"
    code = cv2.VideoWriter_fourcc(*("mp4v" if suffix == ".ts" else "MPG1"))
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, code, rate, (64, 48))
    for frame in frames(50, 48, 64):
        writer.write(frame)
    writer.release()
    path.write_bytes(2 * path.read_bytes())
    video = Video(path)
    count = len(list(video))
    assert count > 90 and abs(video.frames - count) <= 1
    assert video.fps == pytest.approx(rate, rel=0.01)


@pytest.mark.skipif(
    sys.platform != "linux", reason="names with a colon, or that are no text, are not allowed"
)
def test_names_that_ffmpeg_takes_for_something_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video("12:30.mp4", frames(3, 16, 16), 25)
    assert len(list(Video("12:30.mp4"))) == 3
    name = os.fsdecode(b"caf\xe9.mp4")
    shutil.copy("12:30.mp4", name)
    with pytest.raises(UserError, match="its name is not UTF-8"):
        Video(name)
    with pytest.raises(UserError, match="its name is not UTF-8"):
        write_video(name, frames(3, 16, 16), 25)


def test_what_was_done_before_the_disk_was_full_is_kept(tmp_path, monkeypatch):
    free = iter([10**9] * 5 + [0] * 9)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=next(free)))
    with pytest.raises(EndsEarly, match=r"v.mp4: ends early, after 5 frames: the disk is full"):
        write_video(tmp_path / "v.mp4", frames(9, 32, 48), 25)
    assert len(list(Video(tmp_path / "v.mp4"))) == 5
    with pytest.raises(CannotWrite, match="none.mp4: cannot be written: No space left"):
        write_video(tmp_path / "none.mp4", frames(9, 32, 48), 25)
    assert [p.name for p in tmp_path.iterdir()] == ["v.mp4"]


@pytest.mark.parametrize("content", [b"", b"no video at all", bytes(range(256)) * 20])
def test_what_is_no_video_is_refused(tmp_path, content):
    (tmp_path / "bad.mp4").write_bytes(content)
    with pytest.raises(UserError, match="bad.mp4: cannot be read as a video"):
        Video(tmp_path / "bad.mp4")
    with pytest.raises(UserError, match="none.mp4: no such file"):
        Video(tmp_path / "none.mp4")


def test_a_film_of_which_no_frame_can_be_read_is_refused_at_once(tmp_path):
    """As of a codec that OpenCV lacks, such as AV1."""
    write_video(tmp_path / "x.avi", frames(3, 32, 48), 25)
    content = (tmp_path / "x.avi").read_bytes()
    (tmp_path / "x.avi").write_bytes(content[: content.index(b"movi") + 4])
    with pytest.raises(UserError, match="x.avi: cannot be read as a video: OpenCV .* lacks its codec"):
        Video(tmp_path / "x.avi")


def test_formats_that_cannot_be_written_become_mp4(tmp_path):
    assert video_name("a/b.webm").as_posix() == "a/b.webm.mp4"
    assert video_name("a/b.AVI").as_posix() == "a/b.AVI"
    with pytest.raises(UserError, match="x.webm: cannot be written as a video"):
        write_video(tmp_path / "x.webm", frames(1, 16, 16), 25)
