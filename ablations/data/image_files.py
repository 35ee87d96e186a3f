"""The image files of a split: each is there, has the declared size and, where that is affordable, decodes."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ablations.data.annotations import ImageEntry
from ablations.data.images import (
    Header,
    ImageError,
    applied_orientation,
    decode,
    one_at_a_time,
    read_header,
    upright_size,
)
from ablations.data.problems import DataError, quote

# A split of no more pixels than this is decoded as a whole before anything trains on it, in a few seconds. Of a larger
# one the JPEG and PNG files are judged by header and end marker alone, and damage in their pixels ends a training run.
DECODED_PIXELS = 270_000_000
THREADS = 16

Item = TypeVar("Item")
Result = TypeVar("Result")


class ImageFiles:
    """The image files of one split, every file's header read once.

    Args:
        path: The instances file, for the messages.
        folder: The directory that its file names are relative to.
        most_pixels: The most pixels of an image.
    """

    def __init__(self, path: Path, folder: Path, most_pixels: int):
        self.path, self.folder, self.most_pixels = path, os.fspath(folder), most_pixels
        self.known: dict[str, Header | str] = {}

    def sizes(self, names: list[str]) -> list[tuple[int, int] | str]:
        """Width and height in pixels of each image as it is displayed, or what is wrong with its file.

        Raises:
            DataError: The folder is missing.
        """
        self._check_folder(len(names))
        headers = _in_threads(self._header, names, 64)
        self.known = dict(zip(names, headers, strict=True))
        return [header if isinstance(header, str) else upright_size(header) for header in headers]

    def check(self, entries: list[ImageEntry]) -> list[Header]:
        """The header of every image.

        Raises:
            DataError: The folder is missing, or lists each image that is absent, damaged or of another size.
        """
        self._check_folder(len(entries))
        whole = sum(entry.width * entry.height for entry in entries) <= DECODED_PIXELS
        # Threads decode side by side, and wait for cold or remote disks. From the page cache a header takes about 13 µs
        # with one thread as with sixteen.
        results = _in_threads(lambda entry: self._check_file(entry, whole), entries, 4 if whole else 512)
        headers, problems = [], []
        for entry, result in zip(entries, results, strict=True):
            if isinstance(result, str):
                problems.append(f"image {quote(entry.file_name)} (id {quote(entry.image_id)}): {result}")
            else:
                headers.append(result)
        if problems:
            raise DataError(self.path, problems)
        return headers

    def _check_folder(self, count: int) -> None:
        if not os.path.isdir(self.folder):
            raise DataError(self.folder, [f"no such directory, but {self.path.name} names {count} images in it"])

    def _check_file(self, entry: ImageEntry, whole: bool) -> Header | str:
        """The header of one image, or what is wrong with it."""
        header = self.known.get(entry.file_name) or self._header(entry.file_name)
        if isinstance(header, str):
            return header
        orientation = applied_orientation(header, entry.width, entry.height)
        if orientation is None:
            return f"it has {header.width}x{header.height} pixels, but {entry.width}x{entry.height} are declared"
        if whole and not header.decoded:
            try:
                with one_at_a_time(entry.width, entry.height):
                    decode(os.path.join(self.folder, entry.file_name), entry.width, entry.height, orientation)
            except ImageError as error:
                return str(error)
            except MemoryError:
                return NO_MEMORY
        return header

    def _header(self, name: str) -> Header | str:
        path = os.path.join(self.folder, name)
        try:
            return read_header(path, self.most_pixels)
        except ImageError as error:
            return str(error)
        except MemoryError:
            return NO_MEMORY
        except (FileNotFoundError, NotADirectoryError):
            if os.path.islink(path):
                return "absent: a symbolic link that leads to no file"
            return f"absent: there is no such file in {quote(self.folder)}"
        except OSError as error:
            return f"cannot be read: {error.strerror or error}"


NO_MEMORY = "it does not decode: there is not enough memory"


def _in_threads(check: Callable[[Item], Result], items: Sequence[Item], chunk: int) -> list[Result]:
    """`check` of every item, in order."""
    chunks = [items[start : start + chunk] for start in range(0, len(items), chunk)]
    with ThreadPoolExecutor(THREADS) as pool:
        return [result for results in pool.map(lambda part: list(map(check, part)), chunks) for result in results]
