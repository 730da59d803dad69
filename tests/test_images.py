"""Pictures in and out: what comes in goes back, what is not whole is refused, nothing is left half done."""

import errno
import io
import logging
import os
import re
import struct
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile  # scikit-image's
from PIL import Image

from support import images
from support.errors import UserError
from support.images import (
    CannotWrite,
    Picture,
    check_folder,
    image_size,
    list_images,
    load,
    read_image,
    save,
    write_image,
)

DATA = Path(__file__).parents[2] / "shared" / "data"


def smooth(height: int = 48, width: int = 64, dtype=np.uint8) -> np.ndarray:
    """An RGB picture that lossy formats keep well and whose corners all differ."""
    rows, columns = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    rgb = np.stack([0.1 + 0.8 * rows, 0.9 - 0.7 * columns, 0.2 + 0.5 * rows * columns], -1)
    return np.rint(rgb * np.iinfo(dtype).max).astype(dtype)


def noise(shape: tuple[int, ...], dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def apart(x: np.ndarray, y: np.ndarray) -> float:
    assert x.shape == y.shape
    return float(np.abs(x.astype(float) - y.astype(float)).max())


def turned(rgb: np.ndarray, orientation: int) -> np.ndarray:
    """`rgb` as a camera stores it, for a reader that undoes the EXIF orientation. (Exif 2.3, 4.6.4)"""
    undo = [
        lambda x: x,
        lambda x: x[:, ::-1],
        lambda x: np.rot90(x, 2),
        lambda x: x[::-1],
        lambda x: x.swapaxes(0, 1),
        lambda x: np.rot90(x, 1),
        lambda x: np.rot90(x, 2).swapaxes(0, 1),
        lambda x: np.rot90(x, -1),
    ]
    return np.ascontiguousarray(undo[orientation - 1](rgb))


def encoded(array: np.ndarray, format: str, orientation: int = 1, **options) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    file = io.BytesIO()
    Image.fromarray(array).save(file, format, exif=exif, **options)
    return file.getvalue()


def tiff16(rgb: np.ndarray, orientation: int) -> bytes:
    """A plain 16-bit RGB TIFF, written out by hand: no writer at hand gives one an orientation."""
    entries = [
        (256, 4, 1, rgb.shape[1]),
        (257, 4, 1, rgb.shape[0]),
        (258, 3, 3, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, 14),
        (274, 3, 1, orientation),
        (277, 3, 1, 3),
        (278, 4, 1, rgb.shape[0]),
        (279, 4, 1, rgb.nbytes),
    ]
    directory = (
        struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries) + bytes(4)
    )
    return struct.pack("<2sHIHHH", b"II", 42, 14 + rgb.nbytes, 16, 16, 16) + rgb.tobytes() + directory


def chunk(name: bytes, content: bytes) -> bytes:
    """Of a PNG."""
    checksum = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def png(samples: np.ndarray, bits: int, clear: int | None = None) -> bytes:
    """HxW grey or HxWx2 grey with alpha, written out by hand: no writer at hand has all depths of these.

    clear: the grey level that is transparent.
    """
    height, width = samples.shape[:2]
    kind = 0 if samples.ndim == 2 else 4
    rows = samples.reshape(height, -1, 1) >> np.arange(bits)[::-1] & 1
    filtered = np.pad(np.packbits(rows.reshape(height, -1), axis=1), ((0, 0), (1, 0)))
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)),
            b"" if clear is None else chunk(b"tRNS", struct.pack(">H", clear)),
            chunk(b"IDAT", zlib.compress(filtered.tobytes())),
            chunk(b"IEND", b""),
        )
    )


# --- there and back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".TIFF"])
@pytest.mark.parametrize("channels", ["grey", "rgb", "rgba"])
def test_channels_bits_and_alpha_come_back_exactly(tmp_path, suffix, channels, dtype):
    rgb, alpha = noise((21, 34, 3), dtype), noise((21, 34), dtype)
    image = {"grey": rgb[..., 0], "rgb": rgb, "rgba": np.dstack([rgb, alpha])}[channels]
    write_image(tmp_path / f"first{suffix}", image)
    picture = load(tmp_path / f"first{suffix}")
    assert picture.grey == (channels == "grey") and (picture.alpha is not None) == (channels == "rgba")
    assert picture.rgb.dtype == dtype and picture.rgb.shape == (21, 34, 3)
    assert np.array_equal(picture.rgb, np.dstack([image] * 3) if picture.grey else rgb)
    save(tmp_path / f"second{suffix}", picture)
    again = load(tmp_path / f"second{suffix}")
    assert np.array_equal(again.rgb, picture.rgb) and again.grey == picture.grey
    assert np.array_equal(again.alpha, alpha) if channels == "rgba" else again.alpha is None


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".JPG", ".bmp", ".webp"])
def test_8_bit_formats(tmp_path, suffix):
    write_image(tmp_path / f"x{suffix}", smooth())
    picture = load(tmp_path / f"x{suffix}")
    assert picture.alpha is None and not picture.grey
    assert apart(picture.rgb, smooth()) <= (0 if suffix == ".bmp" else 12)


def test_grey_jpeg_stays_grey_and_webp_keeps_alpha(tmp_path):
    write_image(tmp_path / "grey.jpg", smooth()[..., 0])
    picture = load(tmp_path / "grey.jpg")
    assert picture.grey and apart(picture.rgb[..., 0], smooth()[..., 0]) <= 6
    save(tmp_path / "out.jpg", picture)
    assert Image.open(tmp_path / "out.jpg").mode == "L"
    alpha = smooth()[..., 2]
    write_image(tmp_path / "alpha.webp", np.dstack([smooth(), alpha]))
    assert np.array_equal(load(tmp_path / "alpha.webp").alpha, alpha)


def test_a_lossless_webp_stays_lossless(tmp_path):
    for name, options in (("plain", {}), ("profile", {"icc_profile": b"VP8 or VP8Lossless" * 9})):
        Image.fromarray(noise((12, 15, 4)) | 1).save(
            tmp_path / "x.webp", lossless=True, exact=True, **options
        )
        picture = load(tmp_path / "x.webp")
        assert picture.lossless, name
        save(tmp_path / "out.webp", picture)
        again = load(tmp_path / "out.webp")
        assert np.array_equal(again.rgb, picture.rgb) and np.array_equal(again.alpha, picture.alpha)
    Image.fromarray(smooth()).save(tmp_path / "x.webp", quality=90)
    save(tmp_path / "out.png", Picture(smooth()))
    assert not load(tmp_path / "x.webp").lossless
    assert not load(tmp_path / "out.png").lossless


def test_a_lossless_webp_with_a_profile_of_odd_length_stays_lossless(tmp_path):
    Image.fromarray(smooth()).save(tmp_path / "x.webp", lossless=True, icc_profile=b"x" * 163)
    assert load(tmp_path / "x.webp").lossless


@pytest.mark.parametrize(
    ("bits", "masks", "pixel"),
    [(32, (0xFF0000, 0xFF00, 0xFF), 0x00B4B4B4), (16, (0xF800, 0x7E0, 0x1F), 0xFFFF)],
)
def test_a_bmp_without_alpha_has_none_and_its_white_is_white(tmp_path, bits, masks, pixel):
    size = 4 * 8 * bits // 8
    header = struct.pack("<2sIHHI", b"BM", 66 + size, 0, 0, 66)
    header += struct.pack("<IiiHHIIiiII3I", 40, 8, 4, 1, bits, 3, size, 0, 0, 0, 0, *masks)
    (tmp_path / "x.bmp").write_bytes(header + 32 * pixel.to_bytes(bits // 8, "little"))
    picture = load(tmp_path / "x.bmp")
    assert picture.alpha is None
    assert (picture.rgb == (180 if bits == 32 else 255)).all()


def test_grey_with_alpha_comes_back_as_grey_colours_with_alpha(tmp_path):
    grey_alpha = noise((12, 15, 2))
    for name in ("x.png", "x.tif"):
        Image.fromarray(grey_alpha).save(tmp_path / name)
        picture = load(tmp_path / name)
        assert picture.grey and np.array_equal(picture.alpha, grey_alpha[..., 1])
        assert np.array_equal(picture.rgb, np.dstack([grey_alpha[..., 0]] * 3))
        save(tmp_path / f"out{name}", picture)
        assert np.array_equal(load(tmp_path / f"out{name}").rgb, picture.rgb)


def test_16_bit_grey_with_alpha_comes_back_as_grey_colours_with_alpha(tmp_path):
    grey_alpha = noise((12, 15, 2), np.uint16)
    (tmp_path / "x.png").write_bytes(png(grey_alpha, 16))
    picture = load(tmp_path / "x.png")
    assert picture.grey and images.is_grey(tmp_path / "x.png")
    assert np.array_equal(picture.rgb, np.dstack([grey_alpha[..., 0]] * 3))
    assert np.array_equal(picture.alpha, grey_alpha[..., 1])


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_level_becomes_alpha(tmp_path, bits):
    dtype, most = (np.uint16, 65535) if bits == 16 else (np.uint8, 255)
    grey = noise((12, 15), dtype) >> most.bit_length() - bits
    for clear in (int(grey[3, 4]), 0, 2**bits - 1):
        (tmp_path / "x.png").write_bytes(png(grey, bits, clear))
        picture = load(tmp_path / "x.png")
        assert picture.grey and picture.alpha.dtype == dtype
        assert np.array_equal(picture.rgb[..., 0], grey * (most // (2**bits - 1)))
        assert np.array_equal(picture.alpha, np.where(grey == clear, 0, most))
        save(tmp_path / "out.png", picture)
        assert np.array_equal(load(tmp_path / "out.png").alpha, picture.alpha)
    if bits == 8:  # of two bytes, of which the lower one counts
        (tmp_path / "x.png").write_bytes(png(grey, bits, clear=0x0105))
        assert np.array_equal(load(tmp_path / "x.png").alpha, np.where(grey == 5, 0, 255))


def test_what_is_grey_by_its_first_bytes_is_grey_when_read(tmp_path):
    """Scored pictures go by the former."""
    grey = smooth()[..., 0]
    for array in (
        grey > 99,
        grey,
        np.dstack([grey, grey]),
        smooth()[..., 0].astype(np.uint16) * 257,
        smooth(),
    ):
        for name in ("x.png", "x.tif"):
            Image.fromarray(array).save(tmp_path / name)
            assert images.is_grey(tmp_path / name) == load(tmp_path / name).grey == (array.shape[-1] != 3), (
                array.dtype
            )


def test_a_grey_picture_whose_colours_drifted_apart_is_written_grey(tmp_path):
    drifted = np.dstack([smooth()[..., 0], smooth()[..., 0] + 10, smooth()[..., 0]])
    save(tmp_path / "x.png", Picture(drifted, grey=True))
    assert load(tmp_path / "x.png").grey
    assert (
        apart(load(tmp_path / "x.png").rgb, np.rint(drifted @ [0.299, 0.587, 0.114])[..., None].repeat(3, 2))
        <= 1
    )


def test_a_jpeg_is_of_quality_95_unless_told_otherwise(tmp_path):
    save(tmp_path / "a.jpg", Picture(smooth()))
    with Image.open(tmp_path / "a.jpg") as image:
        assert [*image.quantization[0]][:2] == [2, 1]  # libjpeg's, of that quality


def test_quality_makes_a_difference(tmp_path):
    for name in ("x.jpg", "x.webp"):
        write_image(tmp_path / name, smooth(), quality=30)
        small = (tmp_path / name).stat().st_size
        write_image(tmp_path / name, smooth(), quality=98)
        assert (tmp_path / name).stat().st_size > small


def test_what_a_format_cannot_hold_is_given_up_and_said(tmp_path, caplog):
    image = np.dstack([smooth(dtype=np.uint16), np.full((48, 64), 30000, np.uint16)])
    with caplog.at_level(logging.WARNING):
        write_image(tmp_path / "x.jpg", image)
    assert "8 bits" in caplog.text and "alpha" in caplog.text and "x.jpg" in caplog.text
    assert apart(read_image(tmp_path / "x.jpg"), smooth()) <= 12


@pytest.mark.parametrize("suffix", [".bmp", ".webp"])
def test_16_bits_are_rounded_where_a_format_holds_8(tmp_path, suffix):
    """OpenCV makes all of them white."""
    write_image(tmp_path / f"x{suffix}", smooth(dtype=np.uint16))
    assert apart(images.read_image(tmp_path / f"x{suffix}"), smooth()) <= 12


def test_alpha_of_an_8_bit_tiff_leaves_its_colours_alone(tmp_path):
    rgba = noise((20, 30, 4))
    (tmp_path / "x.tif").write_bytes(encoded(rgba, "TIFF"))
    picture = load(tmp_path / "x.tif")
    assert np.array_equal(picture.rgb, rgba[..., :3]) and np.array_equal(picture.alpha, rgba[..., 3])


@pytest.mark.parametrize(
    "format, options", [("JPEG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})]
)
def test_cmyk_becomes_rgb_without_alpha(tmp_path, format, options):
    Image.fromarray(smooth()).convert("CMYK").save(tmp_path / "x", format, **options)
    picture = load(tmp_path / "x")
    assert picture.alpha is None and apart(picture.rgb, smooth()) <= 12


@pytest.mark.parametrize(
    "mode, format", [("P", "PNG"), ("P", "BMP"), ("P", "TIFF"), ("1", "PNG"), ("1", "TIFF")]
)
def test_palettes_and_single_bits_are_expanded(tmp_path, mode, format):
    image = Image.fromarray(smooth()).convert(mode)
    image.save(tmp_path / "x", format)
    assert np.array_equal(read_image(tmp_path / "x"), np.asarray(image.convert("RGB")))


# --- reading for training and scoring -----------------------------------------------------------------------


def test_read_image_gives_8_bit_rgb_of_anything(tmp_path):
    write_image(tmp_path / "grey.png", smooth()[..., 0])
    write_image(tmp_path / "alpha.png", np.dstack([smooth(), noise((48, 64))]))
    write_image(tmp_path / "deep.png", smooth(dtype=np.uint16))
    assert np.array_equal(read_image(tmp_path / "grey.png"), np.dstack([smooth()[..., 0]] * 3))
    assert np.array_equal(read_image(tmp_path / "alpha.png"), smooth())
    deep = read_image(tmp_path / "deep.png")
    assert deep.dtype == np.uint8
    assert np.array_equal(deep, np.rint(smooth(dtype=np.uint16) / 257).astype(np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "format, alpha", [("JPEG", False), *((f, a) for f in ("PNG", "TIFF", "WEBP") for a in (False, True))]
)
def test_exif_orientation_is_applied_also_with_alpha(tmp_path, format, alpha, orientation):
    upright = np.dstack([smooth(), smooth()[..., 1]]) if alpha else smooth()
    options = {"lossless": True} if format == "WEBP" else {}
    path = tmp_path / "x"
    path.write_bytes(encoded(turned(upright, orientation), format, orientation, **options))
    picture = load(path)
    assert apart(picture.rgb, smooth()) <= (12 if format == "JPEG" else 0)
    if alpha:
        assert np.array_equal(picture.alpha, smooth()[..., 1])
    assert apart(read_image(path), picture.rgb) == 0
    assert image_size(path) == (48, 64)
    save(tmp_path / "out.png", picture)
    assert apart(load(tmp_path / "out.png").rgb, picture.rgb) == 0  # not turned twice


@pytest.mark.parametrize(
    "format, options",
    [("TIFF", {}), ("PNG", {}), ("PNG", {"default_image": True}), ("WEBP", {"lossless": True})],
)
def test_of_several_pages_or_frames_the_first_is_read_and_it_is_said(tmp_path, caplog, format, options):
    more = [Image.fromarray(noise((48, 64, 3))), Image.fromarray(255 - smooth())]
    Image.fromarray(smooth()).save(tmp_path / "x", format, save_all=True, append_images=more, **options)
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(load(tmp_path / "x").rgb, smooth())
    load(tmp_path / "x")
    assert caplog.text.count(f"{tmp_path / 'x'}: holds 3 pages or frames; only the first is read") == 1


def test_a_camera_s_second_jpeg_is_not_worth_a_word(tmp_path, caplog):
    Image.fromarray(smooth()).save(
        tmp_path / "x.jpg", "MPO", save_all=True, append_images=[Image.fromarray(smooth(24, 32))]
    )
    with caplog.at_level(logging.WARNING):
        assert apart(load(tmp_path / "x.jpg").rgb, smooth()) <= 12
    assert caplog.text == ""


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_a_16_bit_tiff(tmp_path, orientation):
    upright = noise((10, 14, 3), np.uint16)
    (tmp_path / "x.tif").write_bytes(tiff16(turned(upright, orientation), orientation))
    assert np.array_equal(load(tmp_path / "x.tif").rgb, upright)
    assert image_size(tmp_path / "x.tif") == (10, 14)


def test_illegible_exif_does_not_spoil_the_picture(tmp_path):
    Image.fromarray(smooth()).save(
        tmp_path / "x.jpg", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff no EXIF at all"
    )
    assert apart(read_image(tmp_path / "x.jpg"), smooth()) <= 12


@pytest.mark.parametrize("orientation", [0, 9])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_an_orientation_that_there_is_none_of_turns_nothing(tmp_path, format, orientation):
    (tmp_path / "x").write_bytes(encoded(smooth(), format, orientation))
    assert apart(load(tmp_path / "x").rgb, smooth()) <= 12
    assert images.image_size(tmp_path / "x") == (48, 64)


def test_the_content_tells_the_format_and_not_the_name(tmp_path):
    (tmp_path / "x.jpg").write_bytes(encoded(smooth(), "PNG"))
    assert np.array_equal(read_image(tmp_path / "x.jpg"), smooth())


def test_names_with_spaces_and_non_ascii_letters(tmp_path):
    path = tmp_path / "Régen im März" / "雨 01 ☂.png"
    write_image(path, smooth())
    assert np.array_equal(read_image(str(path)), smooth())
    assert list_images(path.parent) == [path]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "TIFF", "WEBP"])
def test_image_size_agrees_with_the_picture(tmp_path, format):
    (tmp_path / "x").write_bytes(encoded(smooth(31, 17), format))
    assert image_size(tmp_path / "x") == read_image(tmp_path / "x").shape[:2] == (31, 17)


# --- what is not a whole picture ----------------------------------------------------------------------------


def refused(path: Path, found: str, readers=(load, read_image, image_size)) -> None:
    for reader in readers:
        with pytest.raises(UserError, match=found) as error:
            reader(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_empty_and_foreign_files_are_refused(tmp_path):
    refused(tmp_path / "missing.png", "No such file")
    refused(tmp_path, "directory")
    (tmp_path / "empty.png").touch()
    refused(tmp_path / "empty.png", "0 bytes")
    (tmp_path / "text.jpg").write_text("This is no picture.")
    refused(tmp_path / "text.jpg", "no JPEG, PNG, BMP, TIFF or WebP")
    (tmp_path / "film.gif").write_bytes(b"GIF89a" + bytes(100))
    refused(tmp_path / "film.gif", "no JPEG, PNG, BMP, TIFF or WebP")


TRUNCATABLE = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("PNG", {}),
    ("BMP", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
]


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("format, options", TRUNCATABLE)
def test_truncated_files_are_refused(tmp_path, capfd, format, options, share):
    whole = encoded(noise((60, 80, 3)) // 4, format, **options)
    (tmp_path / "x").write_bytes(whole[: int(len(whole) * share)])
    cheap = () if format in ("BMP", "TIFF") else (image_size,)  # nothing but decoding shows it in those
    refused(
        tmp_path / "x", "truncated or damaged|header is damaged|or is damaged", (load, read_image, *cheap)
    )
    assert "OpenCV" not in capfd.readouterr().err


def test_a_truncated_jpeg_with_a_whole_thumbnail_is_refused(tmp_path):
    thumbnail = encoded(smooth(24, 32), "JPEG")
    assert thumbnail.endswith(b"\xff\xd9")
    segment = b"Exif\0\0" + thumbnail
    whole = encoded(noise((200, 200, 3)), "JPEG")
    whole = whole[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + whole[2:]
    path = tmp_path / "x.jpg"
    path.write_bytes(whole)
    assert read_image(path).shape == (200, 200, 3)
    for share in (0.3, 0.6):
        path.write_bytes(whole[: int(len(whole) * share)])
        refused(path, "truncated")


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 4}])
def test_a_jpeg_with_a_piece_missing_inside_is_refused_though_it_has_its_end(tmp_path, capfd, options):
    """Decoders fill the bottom with grey and say nothing."""
    path = tmp_path / "x.jpg"
    whole = encoded(noise((96, 96, 3)), "JPEG", **options)
    path.write_bytes(whole)
    assert load(path).rgb.shape == (96, 96, 3)
    assert capfd.readouterr().err == ""  # nor does the check print of what it tries
    path.write_bytes(whole[:-502] + whole[-2:])
    refused(path, "ends before its last pixels", (load, read_image))


def test_a_jpeg_may_fill_up_before_its_markers(tmp_path):
    """With any number of FF (ITU-T T.81, B.1.1.2)."""
    whole = encoded(noise((96, 96, 3)), "JPEG", restart_marker_blocks=4)
    (tmp_path / "x.jpg").write_bytes(whole)
    start = whole.index(b"\xff\xda")
    filled = whole[:start] + re.sub(rb"(?=\xff[\xd0-\xda])", b"\xff", whole[start:])
    (tmp_path / "y.jpg").write_bytes(filled)
    assert len(filled) > len(whole)
    assert np.array_equal(load(tmp_path / "y.jpg").rgb, load(tmp_path / "x.jpg").rgb)
    (tmp_path / "y.jpg").write_bytes(filled[:-502] + filled[-2:])
    refused(tmp_path / "y.jpg", "ends before its last pixels", (load, read_image))


def test_a_large_colour_profile_is_no_damage(tmp_path):
    """Pillow's own bound is a megabyte."""
    image = noise((8, 8, 3))
    (tmp_path / "x.png").write_bytes(encoded(image, "PNG", icc_profile=b"profile " * 250_000))
    assert np.array_equal(load(tmp_path / "x.png").rgb, image)


def test_a_tiff_with_a_damaged_strip_is_refused(tmp_path):
    """OpenCV leaves it black and says nothing."""
    data = bytearray(encoded(noise((60, 80, 3)), "TIFF", compression="tiff_adobe_deflate"))
    data[len(data) // 2] ^= 1
    (tmp_path / "x.tif").write_bytes(data)
    refused(tmp_path / "x.tif", "damaged", (load, read_image))


@pytest.mark.parametrize("kind, width", [(2, struct.pack("<I", 53)), (11, struct.pack("<f", 53))])
def test_a_tiff_whose_width_is_text_or_a_fraction_is_refused(tmp_path, kind, width):
    data = encoded(noise((48, 53, 3)), "TIFF")  # 53 is the letter 5
    whole, other = struct.pack("<HHII", 256, 4, 1, 53), struct.pack("<HHI", 256, kind, 1) + width
    assert whole in data
    (tmp_path / "x.tif").write_bytes(data.replace(whole, other))
    refused(tmp_path / "x.tif", "damaged")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_with_fewer_strips_than_its_height_is_refused(tmp_path, dtype):
    """Pillow leaves what has none black; OpenCV, which reads 16 bits, takes the file's header for it."""
    data = encoded(noise((60, 80), dtype), "TIFF")
    taller = data.replace(struct.pack("<HHII", 257, 4, 1, 60), struct.pack("<HHII", 257, 4, 1, 90))
    assert taller != data
    (tmp_path / "x.tif").write_bytes(taller)
    refused(tmp_path / "x.tif", "damaged")


def test_natural_order_takes_digits_of_any_script(tmp_path):
    names = ["\u06631.png", "\u00b2.png", "1.png", "a1.png", "a10.png", "a2.png"]
    for name in names:
        (tmp_path / name).touch()
    found = [path.name for path in list_images(tmp_path)]
    assert sorted(found) == sorted(names) and found.index("a2.png") < found.index("a10.png")


def test_bytes_after_the_end_do_no_harm(tmp_path):
    for format in ("JPEG", "PNG"):
        (tmp_path / "x").write_bytes(encoded(smooth(), format) + b"appended by a phone" * 10)
        assert apart(read_image(tmp_path / "x"), smooth()) <= 12


def test_a_png_with_a_flipped_bit_is_refused(tmp_path):
    data = bytearray(encoded(noise((60, 80, 3)), "PNG"))
    data[len(data) // 2] ^= 1
    (tmp_path / "x.png").write_bytes(data)
    refused(tmp_path / "x.png", "damaged")


def test_a_wrong_checksum_of_what_is_not_pixels_is_no_damage(tmp_path):
    data = encoded(smooth(), "PNG")
    note = bytearray(chunk(b"tEXt", b"a\0b"))
    note[-1] ^= 1
    (tmp_path / "x.png").write_bytes(data[:-12] + note + data[-12:])
    assert np.array_equal(load(tmp_path / "x.png").rgb, smooth())


def test_absurd_sizes_are_refused_from_the_header(tmp_path):
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    refused(tmp_path / "bomb.png", "100000x100000 pixels")
    pages = encoded(smooth(), "TIFF", save_all=True, append_images=[Image.fromarray(smooth())])
    wide = pages.replace(struct.pack("<HHII", 256, 4, 1, 64), struct.pack("<HHII", 256, 4, 1, 2**30), 1)
    (tmp_path / "bomb.tif").write_bytes(wide)
    refused(tmp_path / "bomb.tif", "1073741824x48 pixels")


def test_a_tiff_that_is_another_format_as_well_is_read_as_the_tiff_whose_header_was_checked(tmp_path):
    picture = smooth()[..., 0]
    other = b"Name: x\r\nImage type: Greyscale image\r\nImage size (x*y): 64*48\r\n\x1a"  # Pillow's IM format
    file = io.BytesIO()
    file.write(struct.pack("<4sI", b"II*\0", 4096) + other + bytes(4096 - 8 - len(other)))
    Image.fromarray(picture).save(file, "TIFF")
    (tmp_path / "x.tif").write_bytes(file.getvalue())
    assert np.array_equal(load(tmp_path / "x.tif").rgb[..., 0], picture)


def test_the_bound_on_pixels_is_exact(tmp_path, monkeypatch):
    write_image(tmp_path / "x.png", smooth(40, 50))
    monkeypatch.setattr(images, "MAX_PIXELS", 2000)
    assert read_image(tmp_path / "x.png").shape == (40, 50, 3)
    monkeypatch.setattr(images, "MAX_PIXELS", 1999)
    refused(tmp_path / "x.png", "50x40 pixels")


def test_floating_point_samples_are_refused(tmp_path):
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "x.tif")
    refused(tmp_path / "x.tif", "float32", readers=(load, read_image))


@pytest.mark.parametrize("tag, value", [("photometric", 0), ("planarconfig", 2)])
def test_16_bit_tiffs_that_opencv_misreads_are_refused(tmp_path, tag, value):
    """White as zero came out as a negative, planes of colours as three small pictures."""
    path, picture = tmp_path / "x.tif", smooth(dtype=np.uint16)
    write_tiff(path, picture[..., 0])
    assert np.array_equal(load(path).rgb[..., 0], picture[..., 0])
    samples = picture.transpose(2, 0, 1) if tag == "planarconfig" else picture[..., 0]
    write_tiff(path, samples, **{tag: value})
    with pytest.raises(UserError, match=r"x\.tif: is a 16-bit TIFF with white as zero or a plane"):
        load(path)


def test_a_grey_16_bit_tiff_in_planes_has_but_one_and_is_read(tmp_path):
    grey = smooth(dtype=np.uint16)[..., 0]
    write_tiff(tmp_path / "x.tif", grey, planarconfig=2)
    assert np.array_equal(load(tmp_path / "x.tif").rgb[..., 0], grey)


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("kind", [1, 3])  # grey, of a palette
def test_a_tiff_whose_alpha_is_a_plane_of_its_own_is_not_read_as_transparent(tmp_path, compression, kind):
    planes = np.stack([smooth()[..., 0], np.full((48, 64), 200, np.uint8)])
    how = {"photometric": "minisblack", "extrasamples": ["unassalpha"], "metadata": None}
    how["extratags"] = [(320, "H", 768, [*range(768)], True)] if kind == 3 else []
    tifffile.imwrite(tmp_path / "x.tif", planes, planarconfig="separate", compression=compression, **how)
    with tifffile.TiffFile(tmp_path / "x.tif", mode="r+b") as tiff:
        tiff.pages[0].tags["PhotometricInterpretation"].overwrite(kind)
    refused(tmp_path / "x.tif", "of a kind that Pillow lacks", readers=(load, read_image))


def write_tiff(path, samples, photometric=None, planarconfig=1):
    """HxW or, in planes, 3xHxW uint16 samples, one strip a plane."""
    planes = samples[None] if samples.ndim == 2 else samples
    count, height, width = planes.shape
    if photometric is None:
        photometric = 1 if count == 1 else 2
    size = planes[0].nbytes
    tables = (
        8 + 2 + 12 * 10 + 4
    )  # after ten entries: offsets and sizes of the strips, and bits of the samples
    offsets = [tables + 10 * count + i * size for i in range(count)]
    entries = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, count, tables + 8 * count), (259, 3, 1, 1)]
    entries += [(262, 3, 1, photometric), (273, 4, count, tables), (277, 3, 1, count), (278, 3, 1, height)]
    entries += [(279, 4, count, tables + 4 * count), (284, 3, 1, planarconfig)]
    if count == 1:  # such values stand in the entries themselves
        values = {258: 16, 273: offsets[0], 279: size}
        entries = [(tag, kind, number, values.get(tag, value)) for tag, kind, number, value in entries]
    directory = struct.pack("<H", 10) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    after = struct.pack(f"<{2 * count}I{count}H", *offsets, *[size] * count, *[16] * count)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8) + directory + after + planes.tobytes())


def test_what_threads_read_at_once_leaves_warnings_and_opencv_as_they_were(tmp_path):
    write_image(tmp_path / "x.png", np.zeros((16, 16, 3), np.uint8))
    logger = cv2 if hasattr(cv2, "setLogLevel") else cv2.utils.logging
    before = logger.getLogLevel(), list(warnings.filters)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(image_size, [tmp_path / "x.png"] * 2000))
    assert (logger.getLogLevel(), list(warnings.filters)) == before


@pytest.mark.parametrize("format", ["BMP", "TIFF"])
def test_a_picture_too_large_for_the_memory_is_not_called_damaged(tmp_path, monkeypatch, format):
    (tmp_path / "x").write_bytes(encoded(smooth(), format))
    monkeypatch.setattr(Image.Image, "convert", lambda self, mode: bytearray(2**62))
    with pytest.raises(MemoryError):
        load(tmp_path / "x")


def test_the_log_level_of_opencv_is_left_as_it_was(tmp_path):
    logger = cv2 if hasattr(cv2, "setLogLevel") else cv2.utils.logging
    before = logger.getLogLevel()
    write_image(tmp_path / "x.tif", smooth(dtype=np.uint16))
    data = (tmp_path / "x.tif").read_bytes()
    (tmp_path / "x.tif").write_bytes(data[:100] + bytes(200) + data[300:])
    refused(tmp_path / "x.tif", "truncated", readers=(load,))
    assert logger.getLogLevel() == before


# --- writing ------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_no_half_file(tmp_path, monkeypatch):
    write_image(tmp_path / "x.png", smooth())
    before = (tmp_path / "x.png").read_bytes()

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"x\.png: cannot be written: No space left"):
        write_image(tmp_path / "x.png", noise((48, 64, 3)))
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]
    assert (tmp_path / "x.png").read_bytes() == before


def test_folders_are_made_and_nothing_else_is_left_in_them(tmp_path):
    write_image(tmp_path / "a" / "b" / "x.png", smooth())
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["x.png"]


@pytest.mark.skipif(sys.platform == "win32", reason="file modes are POSIX's")
def test_results_are_as_readable_as_other_new_files(tmp_path):
    (tmp_path / "other").touch()
    write_image(tmp_path / "x.png", smooth())
    assert (tmp_path / "x.png").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_what_cannot_be_written_is_refused_with_the_path(tmp_path):
    (tmp_path / "file").touch()
    for name, found in (
        ("x.gif", r"x\.gif: cannot be written with \.gif extension; give one of \.jpg"),
        ("x", "x: cannot be written with no extension"),
        ("file/x.png", "cannot be written"),
    ):
        with pytest.raises(UserError, match=found):
            write_image(tmp_path / name, smooth())
    with pytest.raises(UserError, match=r"x\.webp: .*20000x8 pixels; try \.png"):
        write_image(tmp_path / "x.webp", np.zeros((8, 20000, 3), np.uint8))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"x\.png: cannot be written: Permission denied"):
        write_image(tmp_path / "x.png", smooth())


def test_a_folder_that_cannot_be_written_is_told_from_a_name_that_cannot(tmp_path):
    (tmp_path / "file").touch()
    for folder in ("file", "file/below", "file/further/below"):
        with pytest.raises(CannotWrite, match=f"{folder}: cannot be written: Not a directory"):
            check_folder(tmp_path / folder)
    check_folder(tmp_path)
    check_folder(tmp_path / "not" / "yet")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(CannotWrite):
        write_image(tmp_path / "file" / "x.png", smooth())
    with pytest.raises(UserError, match="cannot be written") as error:
        write_image(tmp_path / f"{'x' * 300}.png", smooth())
    assert not isinstance(error.value, CannotWrite)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8, 3)),
        np.zeros((8, 8, 2), np.uint8),
        np.zeros(8, np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        None,
    ],
)
def test_arrays_that_are_no_image_are_refused(tmp_path, image):
    with pytest.raises(ValueError, match=r"image is .*; HxW, HxWx3 or HxWx4 of uint8 or uint16 is allowed"):
        write_image(tmp_path / "x.png", image)
    assert list(tmp_path.iterdir()) == []


# --- listing ------------------------------------------------------------------------------------------------


def test_list_images_sorts_naturally_and_takes_any_case(tmp_path):
    names = ["10.png", "2.PNG", "1.jpeg", "img12.webp", "img2.TIFF", "img2b.bmp", "z/3.Jpg", "z/20.tif"]
    for name in [*names, "notes.txt", ".hidden.png", "._2.png", "z/.x.jpg"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / ".thumbnails").mkdir()
    (tmp_path / ".thumbnails" / "1.png").touch()
    top = ["1.jpeg", "2.PNG", "10.png", "img2.TIFF", "img2b.bmp", "img12.webp"]
    assert list_images(tmp_path) == [tmp_path / name for name in top]
    everything = [p.relative_to(tmp_path).as_posix() for p in list_images(str(tmp_path), recursive=True)]
    assert everything == [*top, "z/3.Jpg", "z/20.tif"]


@pytest.mark.skipif(os.name != "posix", reason="links need rights elsewhere")
def test_linked_folders_are_listed_and_links_that_lead_back_are_not_followed(tmp_path, monkeypatch, caplog):
    for name in ("here/a.png", "elsewhere/b.png", "elsewhere/c/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "c" / "back").symlink_to(tmp_path / "here")
    (tmp_path / "here" / "self").symlink_to(tmp_path / "here")
    (tmp_path / "here" / "again").symlink_to(tmp_path / "elsewhere")

    def listed():
        return [p.relative_to(tmp_path / "here").as_posix() for p in list_images(tmp_path / "here", True)]

    assert listed() == ["a.png", "again/b.png", "again/c/d.png"]
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("again"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert listed() == ["a.png", "link/b.png", "link/c/d.png"]
    assert "here/again: cannot be read: Permission denied; left out" in caplog.text
    monkeypatch.setattr(os, "listdir", lambda path: scandir(tmp_path / "none"))
    with pytest.raises(UserError, match=r"here: cannot be read: No such file"):
        list_images(tmp_path / "here")


def test_list_images_of_nothing(tmp_path):
    assert list_images(tmp_path) == []
    with pytest.raises(UserError, match="no such folder"):
        list_images(tmp_path / "missing")
    (tmp_path / "file.png").touch()
    with pytest.raises(UserError, match=r"file\.png: is not a folder"):
        list_images(tmp_path / "file.png")


# --- real files ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not DATA.is_dir(), reason="shared/data is not here")
def test_real_photographs_are_read_as_opencv_reads_them():
    for path in list_images(DATA / "real-rain")[:20]:
        expected = cv2.cvtColor(cv2.imread(str(path), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        assert np.array_equal(read_image(path), expected), path
        assert image_size(path) == expected.shape[:2]
