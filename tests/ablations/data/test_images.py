"""Image files of a data directory: absent, cut, damaged, of another size, turned by EXIF, in every colour mode."""

import io
import os
import shutil
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from tiny_coco import edited, problem, write, write_json

from ablations.data import image_files
from ablations.data.coco import read_image, read_split
from ablations.data.images import ImageError, applied_orientation, decode, read_header
from ablations.data.problems import DataError


@pytest.mark.parametrize("name", ["wide.jpg", "tall.png", "sub/empty.jpg"])
def test_image_that_is_absent(tmp_path, name):
    root = write(tmp_path)
    (root / "train2017" / name).unlink()
    assert len(problem(root, f"image '{name}'", "absent: there is no such file").problems) == 1


@pytest.mark.parametrize("name", ["wide.jpg", "tall.png"])
def test_image_cut_anywhere(tmp_path, name):
    """Every shorter version of a file is refused by the cheap check."""
    path = write(tmp_path) / "train2017" / name
    whole = path.read_bytes()
    assert read_header(path)
    for length in reversed(range(len(whole))):
        os.truncate(path, length)
        with pytest.raises(ImageError):
            read_header(path)
    path.write_bytes(whole[: len(whole) // 2])
    problem(tmp_path, f"image '{name}'")
    path.write_bytes(whole[:-2])
    problem(tmp_path, f"image '{name}'", "truncated: the end marker is missing")


def test_data_after_the_image_is_no_mistake(tmp_path):
    root = write(tmp_path)
    for name in ("wide.jpg", "tall.png"):
        with open(root / "train2017" / name, "ab") as file:
            file.write(bytes(5000))
    assert len(read_split(root, "train").images) == 3


def test_a_thumbnail_does_not_pass_for_the_image(tmp_path):
    """The end marker inside an EXIF thumbnail is not that of the image."""
    thumbnail = io.BytesIO()
    Image.new("RGB", (8, 8)).save(thumbnail, "JPEG")
    path = write(tmp_path) / "train2017" / "wide.jpg"
    exif = b"Exif\0\0II*\0\x08\0\0\0\0\0" + thumbnail.getvalue()
    data = path.read_bytes()
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
    path.write_bytes(data)
    assert read_header(path)[:3] == (20, 16, 1)
    path.write_bytes(data[:-2])
    problem(tmp_path, "image 'wide.jpg'", "end marker is missing")
    path.write_bytes(data[: 6 + len(exif)])
    problem(tmp_path, "image 'wide.jpg'", "truncated")


def test_segments_that_come_before_the_frame(tmp_path):
    """Huffman tables may stand before the frame header; their marker lies among those of frames."""
    path = write(tmp_path) / "train2017" / "wide.jpg"
    data = path.read_bytes()
    frame, table = data.index(b"\xff\xc0"), data.index(b"\xff\xc4")
    (length,) = struct.unpack(">H", data[table + 2 : table + 4])
    moved = data[table : table + 2 + length]
    assert frame < table
    path.write_bytes(data[:frame] + moved + data[frame:table] + data[table + len(moved) :])
    assert read_header(path)[:3] == (20, 16, 1)
    assert decode(path, 20, 16).shape == (16, 20, 3)


OTHER = {
    "empty": (b"", "the file is empty"),
    "text": (b"<html>404</html>", "no image of a format that is read"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 16\n", "no image of a format that is read"),
    "gif": (b"GIF89a" + bytes(60), "no image of a format that is read"),
}


@pytest.mark.parametrize("case", OTHER)
def test_file_that_is_no_image(tmp_path, case):
    root = write(tmp_path)
    (root / "train2017" / "wide.jpg").write_bytes(OTHER[case][0])
    problem(root, "image 'wide.jpg' (id 31)", OTHER[case][1])


def test_image_of_another_size_than_declared(tmp_path):
    def change(document):
        document["images"][0].update(width=24)
        document["images"][1].update(height=25)
        document["annotations"].pop(2)

    error = problem(
        write(tmp_path, edited(change)),
        "image 'wide.jpg' (id 31): it has 20x16 pixels, but 24x16 are declared",
        "image 'tall.png' (id 12): it has 10x24 pixels, but 10x25 are declared",
    )
    assert len(error.problems) == 2


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_image_bomb(tmp_path):
    root = write(tmp_path)
    (root / "train2017" / "tall.png").write_bytes(png(100_000, 100_000))
    problem(root, "image 'tall.png'", "100000x100000 pixels; at most 178956970 are decoded")
    (root / "train2017" / "tall.png").write_bytes(png(0, 5))
    problem(root, "image 'tall.png'", "0x5 pixels")


def test_links_lead_wherever_the_user_keeps_the_images(tmp_path):
    store = tmp_path / "store"
    root = write(tmp_path / "data")
    plain = read_split(root, "train")
    (root / "train2017").rename(store)
    # The folder itself, a folder in it, a file by an absolute and by a relative path, and a link to a link.
    (root / "train2017").symlink_to(store)
    assert read_split(root, "train").fingerprint == plain.fingerprint
    (root / "train2017").unlink()
    (root / "train2017").mkdir()
    (root / "train2017" / "sub").symlink_to(store / "sub")
    (root / "train2017" / "wide.jpg").symlink_to(store / "wide.jpg")
    (tmp_path / "link").symlink_to("store/tall.png")
    (root / "train2017" / "tall.png").symlink_to("../../link")
    linked = read_split(root, "train")
    assert linked.fingerprint == plain.fingerprint
    assert [read_image(record).shape for record in linked.images] == [(24, 10, 3), (18, 18, 3), (16, 20, 3)]


def test_links_that_lead_nowhere(tmp_path):
    root = write(tmp_path)
    wide, tall, sub = (root / "train2017" / name for name in ("wide.jpg", "tall.png", "sub"))
    wide.unlink()
    wide.symlink_to(tmp_path / "gone.jpg")
    tall.unlink()
    tall.symlink_to("tall.png")
    shutil.rmtree(sub)
    sub.symlink_to(tmp_path)
    error = problem(
        root,
        "image 'wide.jpg' (id 31): absent: a symbolic link that leads to no file",
        "image 'tall.png' (id 12): cannot be read: Too many levels of symbolic links",
        "image 'sub/empty.jpg' (id 25): absent",
    )
    assert len(error.problems) == 3
    wide.unlink()
    wide.symlink_to("/dev/zero")
    problem(root, "image 'wide.jpg' (id 31): not a regular file")


def test_things_that_are_no_files(tmp_path):
    root = write(tmp_path)
    for name in ("wide.jpg", "tall.png", "sub/empty.jpg"):
        (root / "train2017" / name).unlink()
    os.mkfifo(root / "train2017" / "wide.jpg")
    (root / "train2017" / "tall.png").mkdir()
    shutil.rmtree(root / "train2017" / "sub")
    (root / "train2017" / "sub").touch()
    error = problem(
        root,
        "image 'wide.jpg' (id 31): not a regular file",
        "image 'tall.png'",
        "image 'sub/empty.jpg' (id 25): absent",
    )
    assert len(error.problems) == 3


def test_name_too_long_for_the_file_system(tmp_path):
    contents = edited(lambda document: document["images"][0].update(file_name="x" * 5000))
    problem(write(tmp_path, contents), "image 'xxx", "cannot be read: File name too long")


def saved(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


ORIENTED = [(name, orientation) for name in ("x.jpg", "x.png") for orientation in range(1, 9)]


@pytest.mark.parametrize("name,orientation", ORIENTED)
def test_exif_orientation(tmp_path, name, orientation):
    """The declared size decides whether the image is meant as displayed or as stored."""
    pixels = np.random.default_rng(orientation).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / name, Image.fromarray(pixels), exif=exif)
    header = read_header(path)
    assert header[:3] == (9, 6, orientation)
    with Image.open(path) as image:
        stored = np.asarray(image)
        upright = np.asarray(ImageOps.exif_transpose(image))
    height, width = upright.shape[:2]
    assert applied_orientation(header, width, height) == orientation
    np.testing.assert_array_equal(decode(path, width, height, orientation), upright)
    if orientation >= 5:
        assert applied_orientation(header, 9, 6) == 1
        np.testing.assert_array_equal(decode(path, 9, 6, 1), stored)
    assert applied_orientation(header, 9, 7) is None


def test_oriented_image_in_a_data_directory(tmp_path):
    root = write(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = root / "train2017" / "wide.jpg"
    with Image.open(path) as image:
        image.load()
        image.save(path, exif=exif)
    stored = next(r for r in read_split(root, "train").images if r.image_id == 31)
    assert (stored.orientation, read_image(stored).shape) == (1, (16, 20, 3))
    contents = edited(
        lambda document: (document["images"][0].update(width=16, height=20), document["annotations"].pop(2))
    )
    write_json(root, "train", contents["train"])
    upright = next(r for r in read_split(root, "train").images if r.image_id == 31)
    assert (upright.orientation, read_image(upright).shape) == (6, (20, 16, 3))
    np.testing.assert_array_equal(read_image(upright), np.rot90(read_image(stored), -1))


def test_colour_modes_become_rgb(tmp_path):
    ramp = np.arange(0, 240, 2, dtype=np.uint8).reshape(10, 12)
    grey = np.repeat(ramp[..., None], 3, 2)
    rgb = np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    palette = Image.fromarray(ramp).convert("P")
    palette.putpalette([255 - v for v in range(256) for _ in range(3)])
    cmyk = np.dstack([np.zeros_like(ramp)] * 3 + [ramp])
    deep = (ramp.astype(np.uint16) << 8) | 0xFF - ramp
    cases = {
        "grey.png": (Image.fromarray(ramp), {}, grey),
        "grey-alpha.png": (Image.fromarray(np.dstack([ramp, 255 - ramp])), {}, grey),
        "alpha.png": (Image.fromarray(np.dstack([rgb, ramp])), {}, rgb),
        "palette.png": (palette, {}, 255 - grey),
        "palette-alpha.png": (palette, {"transparency": bytes(range(256))}, 255 - grey),
        "bits.png": (Image.fromarray(ramp > 100), {}, np.where(grey > 100, 255, 0)),
        # 16 bits: v * 255 / 65535, to the nearest.
        "deep.png": (Image.fromarray(deep), {}, np.rint(deep / 257.0)[..., None].repeat(3, 2)),
        "cmyk.jpg": (Image.fromarray(cmyk, "CMYK"), {"quality": 100, "subsampling": 0}, 255 - grey),
        "grey.jpg": (Image.fromarray(ramp), {"quality": 100}, grey),
        "progressive.jpg": (Image.fromarray(grey), {"quality": 100, "progressive": True}, grey),
    }
    for name, (image, options, expected) in cases.items():
        path = saved(tmp_path / name, image, **options)
        assert read_header(path)[:3] == (12, 10, 1), name
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = decode(path, 12, 10)
        assert got.dtype == np.uint8 and got.shape == (10, 12, 3), name
        # JPEG at full quality is off by a rounding or two; PNG is exact.
        assert np.abs(got - expected.astype(float)).max() <= (2 if name.endswith("jpg") else 0), name


def test_a_jpeg_named_png_is_read_for_what_it_is(tmp_path):
    root = write(tmp_path)
    folder = root / "train2017"
    with Image.open(folder / "tall.png") as image:
        image.load()
        image.save(folder / "tall.png", format="JPEG")
    assert read_image(read_split(root, "train").images[0]).shape == (24, 10, 3)


def test_damage_that_only_decoding_finds(tmp_path, monkeypatch):
    root = write(tmp_path)
    path = root / "train2017" / "tall.png"
    data = bytearray(path.read_bytes())
    spot = data.index(b"IDAT") + 40
    data[spot : spot + 20] = bytes(20)
    path.write_bytes(data)
    problem(root, "image 'tall.png' (id 12): it does not decode")
    # Of a larger split the header and the end marker are all that is read: 20x16, 10x24 and 18x18 pixels.
    pixels = 20 * 16 + 10 * 24 + 18 * 18
    monkeypatch.setattr(image_files, "DECODED_PIXELS", pixels)
    problem(root, "image 'tall.png' (id 12): it does not decode")
    monkeypatch.setattr(image_files, "DECODED_PIXELS", pixels - 1)
    record = read_split(root, "train").images[0]
    with pytest.raises(DataError, match=r"tall\.png: it does not decode") as caught:
        read_image(record)
    assert caught.value.path == path
    path.unlink()
    with pytest.raises(DataError, match=r"tall\.png: it does not decode: FileNotFoundError"):
        read_image(record)
    Image.new("RGB", (11, 24)).save(path)
    with pytest.raises(DataError, match=r"tall\.png: it has 11x24 pixels, expected 10x24"):
        read_image(record)
