"""Image files: a check of header, size and end marker, and the full decode to RGB.

Whatever Pillow decodes is read, the first frame of it, told apart by its content and not by its extension. Two formats
stay closed, because nothing in a data set is executed: EPS, which Pillow hands to Ghostscript, and IPTC, which may hold
an image of any format and so an EPS. JPEG and PNG have a check that does not decode; all others are decoded by it.
"""

import mmap
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

# From here on Pillow refuses an image as a decompression bomb.
MAX_PIXELS = 178_956_970
MAX_FILE_BYTES = 1 << 30

_HEAD_BYTES = 4096
_MAX_SEGMENTS = 4096
_JPEG_SIGNATURE = b"\xff\xd8\xff"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
_JPEG_END = b"\xff\xd9"
# Every start-of-frame marker; C4, C8 and CC lie between them and mean something else.
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_ORIENTATION_TAG = 0x0112
_CLOSED_FORMATS = frozenset({"EPS", "IPTC"})
# A check that decodes in many threads takes images of more pixels than this singly, to bound its memory.
LARGE_PIXELS = 1 << 22
_LARGE = threading.Lock()
# What brings pixels stored under an EXIF orientation (TIFF 6.0, tag 274) upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image file that cannot be used; the text says what is wrong with it but does not name the file."""


class Header(NamedTuple):
    """What an image file says of itself.

    Attributes:
        width, height: Size in pixels as Pillow decodes it.
        orientation: EXIF orientation, 1..8, of those pixels; 1 where Pillow itself turns them, as it does for TIFF.
        file_bytes: Size of the file.
        decoded: Whether all pixels were decoded and found good.
    """

    width: int
    height: int
    orientation: int
    file_bytes: int
    decoded: bool = False


def limit_pixels(most: int | None) -> int:
    """The most pixels that an image may have, with Pillow told to open such images without a warning.

    Pillow's own limit, `Image.MAX_IMAGE_PIXELS`, holds for the whole process and all its threads; it is raised where it
    is lower, never lowered.

    Args:
        most: None for MAX_PIXELS.

    Raises:
        ValueError: `most` is not a positive whole number.
    """
    if most is None:
        most = MAX_PIXELS
    if type(most) is not int or most < 1:
        raise ValueError(f"max_image_pixels is {most!r}, expected a positive whole number")
    if Image.MAX_IMAGE_PIXELS is not None and most > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = most
    return most


def applied_orientation(header: Header, width: int, height: int) -> int | None:
    """The EXIF orientation to apply so that the image has the declared size, or None if no reading gives that size.

    COCO's format does not mention EXIF, and tools disagree: most annotate the image as it is displayed, some the pixels
    as they are stored. The declared size tells them apart, so it decides; where both readings have that size (no
    quarter turn, or a square) the image is taken as displayed.
    """
    stored = (header.width, header.height)
    if upright_size(header) == (width, height):
        return header.orientation
    return 1 if stored == (width, height) else None


@contextmanager
def one_at_a_time(width: int, height: int) -> Iterator[None]:
    """Held while an image of this size is decoded to check it: of large ones there is one at a time."""
    with _LARGE if width * height > LARGE_PIXELS else nullcontext():
        yield


def upright_size(header: Header) -> tuple[int, int]:
    """Width and height of an image as it is displayed."""
    return (header.height, header.width) if header.orientation >= 5 else (header.width, header.height)


def read_header(path: str | os.PathLike[str], most: int = MAX_PIXELS) -> Header:
    """Check one image file: a regular file, a header, a sane size, the end marker; decode it if that is the only check.

    For JPEG and PNG it costs one open and two small reads; a file whose last bytes are not its end marker is searched
    for it once. Links are followed.

    Args:
        path: The file.
        most: The most pixels of an image.

    Raises:
        ImageError: The file is unreadable, of a kind that is not read, truncated, or larger than `most`.
        OSError: The file cannot be opened.
        ValueError: The path cannot be given to the system (a NUL, a lone surrogate).
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    # O_NONBLOCK: a pipe in the place of an image must not stop the check.
    file = os.open(path, flags)
    try:
        return _inspect(file, most)
    except struct.error as error:
        raise ImageError("truncated: the header ends early") from error
    finally:
        os.close(file)


def _inspect(file: int, most: int) -> Header:
    status = os.fstat(file)
    if status.st_mode & 0o170000 != 0o100000:
        raise ImageError("not a regular file")
    if status.st_size > MAX_FILE_BYTES:
        raise ImageError(f"the file has {status.st_size} bytes; at most {MAX_FILE_BYTES} are read")
    window = _Window(file, status.st_size)
    head = window.head
    if head.startswith(_JPEG_SIGNATURE):
        width, height, orientation, pixels = _jpeg_header(window)
        end = _JPEG_END
    elif head.startswith(_PNG_SIGNATURE):
        width, height, orientation, pixels = _png_header(window)
        end = _PNG_END
    elif not head:
        raise ImageError("the file is empty")
    else:
        return _decoded_header(file, most)
    _check_size(width, height, most)
    if window.read(max(status.st_size - len(end), 0), len(end)) != end and not _is_after(file, pixels, end):
        raise ImageError("truncated: the end marker is missing")
    return Header(width, height, orientation, status.st_size)


def _check_size(width: int, height: int, most: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"its header gives a size of {width}x{height} pixels")
    if width * height > most:
        raise ImageError(f"its header gives {width}x{height} pixels; {_at_most(most)}")


def _at_most(most: int) -> str:
    return f"at most {most} are decoded, unless --max-image-pixels gives another number"


def _decoded_header(file: int, most: int) -> Header:
    """The header of a file that is neither JPEG nor PNG, which only decoding can tell to be whole."""
    limit_pixels(most)
    with _decoding(), open(file, "rb", closefd=False) as stream, Image.open(stream, formats=_formats(b"")) as image:
        size = image.size
        _check_size(*size, most)
        with one_at_a_time(*size):
            _to_rgb(image)
        if image.size != size:
            raise ImageError(f"its header gives {size[0]}x{size[1]} pixels, but it has {image.size[0]}x{image.size[1]}")
        try:
            orientation = image.getexif().get(_ORIENTATION_TAG, 1)
        except Exception:
            # Viewers ignore a malformed block too.
            orientation = 1
        orientation = orientation if orientation in range(1, 9) else 1
        return Header(*size, int(orientation), os.fstat(file).st_size, decoded=True)


def _formats(head: bytes) -> tuple[str, ...]:
    """The formats that a file with these first bytes may have, of those that Pillow reads here."""
    if head.startswith((_JPEG_SIGNATURE, _PNG_SIGNATURE)):
        return ("JPEG", "PNG")
    Image.init()
    return tuple(name for name in Image.ID if name not in _CLOSED_FORMATS)


@contextmanager
def _decoding() -> Iterator[None]:
    """Turns whatever Pillow stumbles on into an `ImageError`: OSError, SyntaxError, ValueError, zlib.error, ..."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError("no image of a format that is read") from error
    except Exception as error:
        raise ImageError(f"it does not decode: {type(error).__name__}: {error}") from error


class _Window:
    """Reads at an offset, served from the first bytes of the file where they suffice."""

    def __init__(self, file: int, size: int):
        self.file = file
        self.head = os.pread(file, min(size, _HEAD_BYTES), 0)

    def read(self, offset: int, count: int) -> bytes:
        if offset + count <= len(self.head):
            return self.head[offset : offset + count]
        return os.pread(self.file, count, offset)


def _is_after(file: int, pixels: int, end: bytes) -> bool:
    """Whether the end marker stands anywhere after the start of the pixel data.

    Some cameras append data after the image. Inside compressed JPEG data an FF byte is always followed by 00 or a
    restart marker, so a truncated stream cannot hold the end marker by chance.
    """
    with mmap.mmap(file, 0, access=mmap.ACCESS_READ) as content:
        return content.rfind(end, pixels) >= 0


def _jpeg_header(window: _Window) -> tuple[int, int, int, int]:
    """Width, height, orientation and the offset of the first scan (ITU-T T.81, annex B)."""
    offset, size, orientation = 2, None, None
    for _ in range(_MAX_SEGMENTS):
        prefix, marker = struct.unpack(">BB", window.read(offset, 2))
        if prefix != 0xFF:
            raise ImageError(f"no JPEG marker at byte {offset}")
        if marker == 0xFF:
            offset += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:
            offset += 2
            continue
        if marker == 0xD9:
            raise ImageError("truncated: it ends before any pixel data")
        (length,) = struct.unpack(">H", window.read(offset + 2, 2))
        if length < 2:
            raise ImageError(f"a JPEG segment of length {length} at byte {offset}")
        if marker in _JPEG_FRAMES and size is None:
            height, width = struct.unpack(">HH", window.read(offset + 5, 4))
            size = (width, height)
        elif marker == 0xE1 and orientation is None:
            payload = window.read(offset + 4, length - 2)
            if payload.startswith(b"Exif\x00\x00"):
                orientation = _tiff_orientation(payload[6:])
        elif marker == 0xDA:
            if size is None:
                raise ImageError("pixel data before any JPEG frame header")
            return *size, orientation or 1, offset + 2 + length
        offset += 2 + length
    raise ImageError(f"more than {_MAX_SEGMENTS} JPEG segments before the pixel data")


def _png_header(window: _Window) -> tuple[int, int, int, int]:
    """Width, height, orientation and the offset of the first pixel data (PNG specification, chunk layout)."""
    length, kind, width, height = struct.unpack(">I4sII", window.read(8, 16))
    if kind != b"IHDR" or length != 13:
        raise ImageError("its first PNG chunk is not IHDR")
    offset, orientation = 8, 1
    for _ in range(_MAX_SEGMENTS):
        length, kind = struct.unpack(">I4s", window.read(offset, 8))
        if kind == b"IDAT":
            return width, height, orientation, offset
        if kind == b"IEND":
            raise ImageError("truncated: it ends before any pixel data")
        if kind == b"eXIf" and length <= 1 << 16:
            orientation = _tiff_orientation(window.read(offset + 8, length))
        offset += 12 + length
    raise ImageError(f"more than {_MAX_SEGMENTS} PNG chunks before the pixel data")


def _tiff_orientation(tiff: bytes) -> int:
    """The orientation in an EXIF block, 1 where it has none or is malformed: viewers ignore such a block too."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(entries):
            tag, kind, count, value = struct.unpack_from(order + "HHIH", tiff, directory + 2 + 12 * entry)
            if tag == _ORIENTATION_TAG:
                return value if kind == 3 and count == 1 and 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1


def decode(path: str | os.PathLike[str], width: int, height: int, orientation: int = 1) -> np.ndarray:
    """Decode an image file to RGB, upright under `orientation`.

    Grey values are repeated, palettes looked up, CMYK converted, 16-bit values rounded to 8 bits, alpha dropped.

    Args:
        width, height: The size that the upright image must have, in pixels.
        orientation: The EXIF orientation to apply, 1..8, as `applied_orientation` gives it.

    Returns:
        (height, width, 3) uint8.

    Raises:
        ImageError: The file cannot be decoded, or has another size by now.
    """
    # Such a size was accepted when the data was read, perhaps in another process.
    limit_pixels(int(width * height))
    stored = (height, width) if orientation >= 5 else (width, height)
    with _decoding(), open(path, "rb") as file:
        head = file.read(len(_PNG_SIGNATURE))
        file.seek(0)
        with Image.open(file, formats=_formats(head)) as image:
            if image.size != stored:
                raise ImageError(f"it has {image.size[0]}x{image.size[1]} pixels, expected {stored[0]}x{stored[1]}")
            rgb = _to_rgb(image)
            if orientation != 1:
                rgb = rgb.transpose(_UPRIGHT[orientation])
            return np.array(rgb)


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    # 16 bits; a portable greymap of as many is opened as 32.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        # Pillow warns unless a palette with per-entry alpha passes through RGBA.
        image = image.convert("RGBA")
    return image.convert("RGB")
