"""Images of every format that Pillow decodes: read as Pillow reads them, found broken in time, never executed."""

import io
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps, features
from places import ROOT
from tiny_coco import problem, write

from ablations.data import image_files, images
from ablations.data.coco import read_dataset, read_image, read_split
from ablations.data.images import MAX_PIXELS, ImageError, applied_orientation, decode, limit_pixels, read_header

# What is saved without loss must come back as it was; of the others as Pillow decodes them.
FORMATS = {
    "webp": ("WEBP", {"lossless": True}),
    "webp-lossy": ("WEBP", {}),
    "bmp": ("BMP", {}),
    "dib": ("DIB", {}),
    "tiff": ("TIFF", {}),
    "tiff-deflate": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    "tiff-jpeg": ("TIFF", {"compression": "jpeg"}),
    "gif": ("GIF", {}),
    "ppm": ("PPM", {}),
    "tga": ("TGA", {}),
    "tga-runs": ("TGA", {"compression": "tga_rle"}),
    "pcx": ("PCX", {}),
    "sgi": ("SGI", {}),
    "qoi": ("QOI", {}),
    "jpeg2000": ("JPEG2000", {}),
    "avif": ("AVIF", {}),
}
NEEDS = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}


def encoded(name: str, image: Image.Image, **more) -> bytes:
    """An image file of one of `FORMATS`; skips what this build of Pillow lacks."""
    kind, options = FORMATS.get(name, (name, {}))
    if kind in NEEDS and not features.check(NEEDS[kind]):
        pytest.skip(f"Pillow was built without {kind}")
    file = io.BytesIO()
    image.save(file, kind, **options, **more)
    return file.getvalue()


def noise(width: int = 20, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_whatever_its_name_says(tmp_path, name):
    root = write(tmp_path)
    path = root / "train2017" / "wide.jpg"
    path.write_bytes(encoded(name, noise()))
    record = read_dataset(root).train.images[2]
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(read_image(record), expected)
    if FORMATS[name][0] in ("BMP", "PPM", "TGA", "QOI") or name in ("webp", "tiff"):
        np.testing.assert_array_equal(read_image(record), np.asarray(noise()))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning:PIL")
@pytest.mark.parametrize("name", FORMATS)
def test_a_cut_file_is_found_before_training(tmp_path, name):
    root = write(tmp_path)
    path = root / "train2017" / "wide.jpg"
    whole = encoded(name, noise())
    for length in (1, 20, len(whole) // 2):
        path.write_bytes(whole[:length])
        problem(root, "image 'wide.jpg' (id 31): ")
    # However large the data set is: only decoding can tell for these.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_files, "DECODED_PIXELS", 0)
        problem(root, "image 'wide.jpg' (id 31): ")


def test_the_declared_size_counts_for_every_format(tmp_path):
    root = write(tmp_path)
    (root / "train2017" / "wide.jpg").write_bytes(encoded("webp", noise(20, 17)))
    problem(root, "image 'wide.jpg' (id 31): it has 20x17 pixels, but 20x16 are declared")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["webp", "tiff", "tiff-deflate", "avif"])
def test_orientation_is_applied_once(tmp_path, name, orientation):
    """Pillow turns a TIFF as it opens it and leaves the others to us; all come out as `exif_transpose` has them."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "x"
    path.write_bytes(encoded(name, noise(9, 6), exif=exif))
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    header = read_header(path)
    height, width = upright.shape[:2]
    assert (width, height) == ((6, 9) if orientation >= 5 else (9, 6)) and header.decoded
    applied = applied_orientation(header, width, height)
    assert applied == (1 if name.startswith("tiff") else orientation)
    np.testing.assert_array_equal(decode(path, width, height, applied), upright)


@pytest.mark.parametrize("orientation", [0, 9, 300])
def test_an_orientation_that_does_not_exist_is_none(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("webp", "PNG", "JPEG"):
        (tmp_path / name).write_bytes(encoded(name, noise(), exif=exif))
        assert read_header(tmp_path / name)[:3] == (20, 16, 1)


def test_of_several_frames_the_first_is_read(tmp_path):
    first, second = noise(), Image.new("RGB", (20, 16), "red")
    for name in ("gif", "webp", "tiff"):
        path = tmp_path / name
        path.write_bytes(encoded(name, first, save_all=True, append_images=[second]))
        with Image.open(path) as image:
            assert image.n_frames == 2
            expected = np.asarray(image.convert("RGB"))
        assert read_header(path)[:3] == (20, 16, 1)
        np.testing.assert_array_equal(decode(path, 20, 16), expected)


def test_deep_and_odd_modes(tmp_path):
    ramp = np.arange(0, 65536, 205, dtype=np.uint16).reshape(16, 20)
    eighth = np.rint(ramp / 257.0)[..., None].repeat(3, 2)
    for name, image in (("tiff", Image.fromarray(ramp)), ("ppm", Image.fromarray(ramp.astype(np.int32), "I"))):
        path = tmp_path / name
        path.write_bytes(encoded(name, image))
        np.testing.assert_array_equal(decode(path, 20, 16), eighth)
    # 32 bits have no agreed range: as Pillow converts them, which cuts at 255.
    path.write_bytes(encoded("tiff", Image.fromarray(np.full((16, 20), 300, np.int32), "I")))
    assert (decode(path, 20, 16) == 255).all()


def test_nothing_is_executed(tmp_path, monkeypatch):
    """An EPS is a program. Pillow hands it to Ghostscript, also where it is wrapped in an IPTC file."""
    called = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments, **options: called.append(1) or noise().im)
    path = tmp_path / "x.jpg"
    eps = encoded("EPS", noise())
    path.write_bytes(eps)
    with Image.open(path) as image:
        image.load()
    assert called == [1], "the trap works"
    fields = [(3, 20, b"\x00\x14"), (3, 30, b"\x00\x10"), (3, 60, b"\x01\x00"), (3, 65, b"\x00"), (3, 120, b"\x05")]
    fields += [(8, 10, eps[:30000])]
    iptc = b"".join(b"\x1c" + bytes([a, b]) + len(body).to_bytes(2, "big") + body for a, b, body in fields)
    for content in (eps, iptc):
        path.write_bytes(content)
        with pytest.raises(ImageError, match="no image of a format that is read"):
            read_header(path)
        with pytest.raises(ImageError, match="no image of a format that is read"):
            decode(path, 20, 16)
    assert called == [1]


def test_the_limit_of_pixels(tmp_path):
    """The largest image has 18x18 = 324 pixels."""
    root = write(tmp_path)
    assert read_dataset(root, max_image_pixels=324).notes == []
    declared = "the declared size is 18x18; at most 323 pixels are read, unless --max-image-pixels gives another number"
    error = problem(root, declared, max_image_pixels=323)
    assert len(error.problems) == 1
    # A file may be larger than was declared.
    for name in ("webp", "PNG", "JPEG"):
        (root / "train2017" / "wide.jpg").write_bytes(encoded(name, noise(30, 30)))
        header = (
            "its header gives 30x30 pixels; at most 324 are decoded, unless --max-image-pixels gives another number"
        )
        problem(root, f"image 'wide.jpg' (id 31): {header}", max_image_pixels=324)


def test_pillows_own_limit_gives_way(tmp_path, monkeypatch):
    """Below ours it neither warns nor refuses, in whatever process or thread an image is decoded."""
    root = write(tmp_path)
    (root / "train2017" / "wide.jpg").write_bytes(encoded("webp", noise()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for pillows in (300, 100):
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows)
            records = read_split(root, "train", max_image_pixels=324).images
            # As in a process that has not read the data itself.
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows)
            assert [read_image(record).shape for record in records] == [(24, 10, 3), (18, 18, 3), (16, 20, 3)]
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows)
            assert read_header(root / "train2017" / "wide.jpg", 324)[:2] == (20, 16)


def test_pillows_limit_is_raised_and_never_lowered(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert limit_pixels(50) == 50 and Image.MAX_IMAGE_PIXELS == 100
    assert limit_pixels(None) == MAX_PIXELS == Image.MAX_IMAGE_PIXELS
    assert limit_pixels(10**9) == 10**9 == Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert limit_pixels(100) == 100 and Image.MAX_IMAGE_PIXELS is None
    with pytest.raises(ValueError, match="max_image_pixels is 0"):
        limit_pixels(0)


def test_importing_changes_no_setting_of_pillow():
    code = "from PIL import Image; before = Image.MAX_IMAGE_PIXELS; import ablations.data.coco; "
    code += f"assert Image.MAX_IMAGE_PIXELS == before and 2 * before == {MAX_PIXELS}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_large_images_are_checked_one_at_a_time(monkeypatch):
    monkeypatch.setattr(images, "LARGE_PIXELS", 100)
    with images.one_at_a_time(10, 11):
        assert images._LARGE.locked()
        with images.one_at_a_time(10, 10):
            pass
    assert not images._LARGE.locked()
