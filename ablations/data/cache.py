"""Data sets that are parsed once a machine: checked columns in files, which processes map and share.

Parsing COCO's instances takes each process tens of seconds and gigabytes. The first process to read a data directory
stores what came of it; all others open that:

    CACHE/<key>.json         one object: the instances files it was made of, every column's dtype, shape and CRC-32, and
                             all that is not a column; its SHA-256 stands in the line above it
    CACHE/<key>-<number>/    plain .npy files, opened with `mmap_mode="r"` and `allow_pickle=False`
    CACHE/<key>.lock         held by the one that parses, while the others wait

The key is that of the directory and of how it is read, so that a changed data set takes the place of what it was
before. What is opened is never trusted for being there: a file that is damaged, foreign or of another content is said,
and made anew from the instances files. Loading executes nothing.
"""

import hashlib
import json
import os
import secrets
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from ablations.data.annotations import Annotations
from ablations.data.coco import SPLITS, both, check_images, find_root, read_dataset
from ablations.data.image_files import ImageFiles
from ablations.data.images import limit_pixels
from ablations.data.segments import Segmentations
from ablations.data.split import Dataset, Records, Split
from ablations.files import FileLock, atomic_write_bytes

# Part of the key: what an older version has stored is not found by a newer one.
FORMAT = 1

# Size in bytes, time of change of the content and of the file's entry in ns, of each instances file.
Stamps = list[list[int]]


class Damaged(ValueError):
    """A file of the cache is not what was stored."""


class Other(Exception):
    """What is stored is sound, and of other instances files."""


def to_stderr(text: str) -> None:
    """Tell of something on the standard error stream."""
    print(f"note: {text}", file=sys.stderr)


def open_dataset(
    directory: str | os.PathLike[str],
    *,
    masks: bool = False,
    bad_annotations: Literal["refuse", "drop"] = "drop",
    max_image_pixels: int | None = None,
    cache: Path | None,
    checked: bool,
    say: Callable[[str], None] = to_stderr,
) -> Dataset:
    """What `read_dataset` gives, parsed by the first process that asks for it and mapped by all others.

    Args:
        masks, bad_annotations, max_image_pixels: As in `read_split`.
        cache: Where parsed data are kept; made if need be, and left unused, which is said, if nothing can be written
            there. None to read without.
        checked: Whether this run has checked the data already: the instances files are then known by their size and
            times, and the image files are not looked at. Otherwise their SHA-256 decides, and every image file is
            checked as by `read_dataset`.
        say: Called with a sentence on what is damaged or cannot be written.

    Raises:
        DataError, ValueError: As in `read_dataset`.
    """
    most_pixels = limit_pixels(max_image_pixels)
    root = find_root(directory)

    def read() -> Dataset:
        return read_dataset(directory, masks=masks, bad_annotations=bad_annotations, max_image_pixels=max_image_pixels)

    if cache is None:
        return read()
    entry = _Entry(cache, root, masks, bad_annotations, max_image_pixels)
    if checked:
        try:
            return entry.open(entry.stamps())
        except (OSError, Damaged, Other):
            # Looked at again with the lock, by one process at a time.
            pass
    with entry.locked() as problem:
        if problem is not None:
            if not checked:
                say(f"parsed data are not kept: {problem}")
            return read()
        try:
            stamps = entry.stamps()
        except OSError:
            # Reading says what is wrong with them.
            return read()
        try:
            data = entry.open(None, thorough=not checked)
            if not entry.is_of(data, stamps, thorough=not checked):
                raise Other
            if not checked:
                data = entry.rechecked(data, stamps, most_pixels)
            return data
        except Damaged as damage:
            say(f"{damage}; it is made anew")
        except (FileNotFoundError, Other):
            pass
        except OSError as error:
            say(f"{entry.index} cannot be read: {error.strerror}; it is made anew")
        data = read()
        try:
            return entry.store(data, stamps)
        except OSError as error:
            say(f"parsed data are not kept: {error}")
            return data


def keep_dataset(
    data: Dataset,
    *,
    masks: bool = False,
    bad_annotations: Literal["refuse", "drop"] = "drop",
    max_image_pixels: int | None = None,
    cache: Path,
    say: Callable[[str], None] = to_stderr,
) -> Dataset:
    """Store data that were read in this way when there was no place for them yet; returns them mapped.

    Nothing is stored where the instances files have changed since, nor where nothing can be written, which is said.
    """
    entry = _Entry(cache, data.root, masks, bad_annotations, max_image_pixels)
    with entry.locked() as problem:
        try:
            if problem is not None:
                raise problem
            stamps = entry.stamps()
            if all(_sha256(split.path) == split.digest for split in (data.train, data.val)):
                return entry.store(data, stamps)
        except OSError as error:
            say(f"parsed data are not kept: {error}")
        return data


class _Entry:
    """What is stored of one data directory, read in one way."""

    def __init__(self, cache: Path, root: Path, masks: bool, bad_annotations: str, max_image_pixels: int | None):
        made_of = [FORMAT, os.fspath(root.resolve()), masks, bad_annotations, max_image_pixels]
        self.cache, self.root = cache, root
        self.key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]
        self.index = cache / f"{self.key}.json"
        self.known: dict[str, Any] = {}

    @contextmanager
    def locked(self) -> Iterator[OSError | None]:
        """Held by one process at a time; gives what stands in the way of a lock, without which nothing is written."""
        lock, problem = None, None
        try:
            lock = FileLock(self.cache / f"{self.key}.lock")
            lock.acquire()
        except OSError as error:
            problem = error
        try:
            yield problem
        finally:
            if lock is not None:
                lock.release()

    def stamps(self) -> Stamps:
        """Of the instances files as they are now."""
        found = [os.stat(_instances(self.root, name)) for name in SPLITS]
        return [[status.st_size, status.st_mtime_ns, status.st_ctime_ns] for status in found]

    def open(self, stamps: Stamps | None, thorough: bool = False) -> Dataset:
        """The stored data, mapped.

        Args:
            stamps: Those that the instances files must have had; None for any.
            thorough: Whether every byte is compared with its check sum, about a second for COCO.

        Raises:
            OSError: Nothing is stored, or it cannot be read.
            Damaged: It is not what was stored.
            Other: It is of other stamps.
        """
        self.known = known = _read_index(self.index)
        if stamps is not None and known["stamps"] != stamps:
            raise Other
        return both(self.root, lambda name: self._split(name, known, thorough))

    def is_of(self, data: Dataset, stamps: Stamps, thorough: bool) -> bool:
        """Whether opened data are those of the instances files as they are now."""
        if not thorough and self.known["stamps"] == stamps:
            return True
        # The sizes that the image files have given may be others by now.
        if thorough and (data.train.measured or data.val.measured):
            return False
        return all(_sha256(split.path) == split.digest for split in (data.train, data.val))

    def rechecked(self, data: Dataset, stamps: Stamps, most_pixels: int) -> Dataset:
        """Opened data with their image files checked; stored again if these, or the stamps, are others.

        Raises:
            DataError: Lists the problems of the image files.
            OSError: The data could not be stored.
        """
        parts = {"train": data.train, "val": data.val}

        def check(name: Literal["train", "val"]) -> Split:
            split = parts[name]
            return check_images(split, ImageFiles(split.path, self.root / f"{name}2017", most_pixels))

        fresh = both(self.root, check)
        same = self.known["stamps"] == stamps and all(
            split.fingerprint == parts[split.name].fingerprint
            and np.array_equal(_records(split).orientation, _records(parts[split.name]).orientation)
            for split in (fresh.train, fresh.val)
        )
        return data if same else self.store(fresh, stamps)

    def store(self, data: Dataset, stamps: Stamps) -> Dataset:
        """Store data, in the place of what was stored before, and open them.

        Raises:
            OSError: They could not be written; nothing is left of them.
        """
        folder = self.cache / f"{self.key}-{secrets.token_hex(4)}"
        folder.mkdir()
        try:
            columns: dict[str, Any] = {}
            splits = {}
            for split in (data.train, data.val):
                texts: dict[str, list[int | str]] = {}
                for name, values in _columns(split).items():
                    if values.dtype == object:
                        texts[name] = values.tolist()
                        continue
                    values = np.ascontiguousarray(values)
                    np.save(folder / f"{name}.npy", values, allow_pickle=False)
                    columns[name] = [values.dtype.str, list(values.shape), zlib.crc32(values.data)]
                splits[split.name] = _rest(split) | {"texts": texts}
            index = {"folder": folder.name, "stamps": stamps, "columns": columns, "splits": splits}
            body = json.dumps(index).encode()
            # Files that a power cut leaves empty are found by their check sums when the next run begins.
            atomic_write_bytes(self.index, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        # Who has them mapped keeps them until it ends.
        for other in self.cache.glob(f"{self.key}-*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        try:
            return self.open(None)
        except Damaged as damage:
            raise OSError(f"{damage}, just after it was written") from damage

    def _split(self, name: Literal["train", "val"], known: dict[str, Any], thorough: bool) -> Split:
        rest, folder = known["splits"][name], self.cache / known["folder"]

        def holder(kind: str, fields: tuple[str, ...]) -> dict[str, np.ndarray]:
            return {field: column(f"{name}-{kind}-{field}") for field in fields}

        def column(full: str) -> np.ndarray:
            if full in rest["texts"]:
                values = np.empty(len(rest["texts"][full]), dtype=object)
                values[:] = rest["texts"][full]
                return values
            return _mapped(folder / f"{full}.npy", known["columns"][full], thorough)

        segmentation = Segmentations(**holder("segmentation", _fields(Segmentations)))
        odd = {row: problem for row, problem in rest["odd"]}
        annotations = Annotations(**holder("annotations", _fields(Annotations)), segmentation=segmentation, odd=odd)
        records = Records(
            folder=os.fspath(self.root / f"{name}2017"),
            annotations=annotations,
            **holder("images", _fields(Records)),
        )
        return Split(
            name=name,
            path=_instances(self.root, name),
            images=records,
            category_ids=tuple(rest["category_ids"]),
            category_names=tuple(rest["category_names"]),
            annotations=annotations,
            **{field: rest[field] for field in _PLAIN},
        )


# Of a split, as JSON holds them.
_PLAIN = ("digest", "measured", "fingerprint", "notes", "dropped")


def _rest(split: Split) -> dict[str, Any]:
    """What is no column of a split."""
    return {
        **{field: getattr(split, field) for field in _PLAIN},
        "category_ids": list(split.category_ids),
        "category_names": list(split.category_names),
        "odd": list(split.annotations.odd.items()),
    }


def _fields(holder: type) -> tuple[str, ...]:
    """The columns among the fields of a data class."""
    return tuple(name for name, kind in holder.__annotations__.items() if kind is np.ndarray)


def _columns(split: Split) -> dict[str, np.ndarray]:
    """Every column of a split by the name of its file."""
    holders: dict[str, object] = {
        "annotations": split.annotations,
        "segmentation": split.annotations.segmentation,
        "images": split.images,
    }
    return {
        f"{split.name}-{kind}-{field}": getattr(holder, field)
        for kind, holder in holders.items()
        for field in _fields(type(holder))
    }


def _records(split: Split) -> Records:
    return cast(Records, split.images)


def _instances(root: Path, name: str) -> Path:
    return root / "annotations" / f"instances_{name}2017.json"


def _read_index(path: Path) -> dict[str, Any]:
    """The JSON of an entry.

    Raises:
        OSError: It is not there or cannot be read.
        Damaged: It is not what was written.
    """
    digest, _, body = path.read_bytes().partition(b"\n")
    if digest != hashlib.sha256(body).hexdigest().encode():
        raise Damaged(f"{path} is damaged")
    return cast(dict[str, Any], json.loads(body))


def _mapped(path: Path, stored: list[Any], thorough: bool) -> np.ndarray:
    """A column of the file `path`, read-only; `stored` is its dtype, shape and CRC-32.

    Raises:
        OSError: It is not there or cannot be read.
        Damaged: It is not what was written.
    """
    try:
        column = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (ValueError, EOFError) as error:
        raise Damaged(f"{path} is damaged") from error
    if [column.dtype.str, list(column.shape)] != stored[:2] or (thorough and zlib.crc32(column.data) != stored[2]):
        raise Damaged(f"{path} is damaged")
    return column


def _sha256(path: Path) -> str | None:
    """The SHA-256 of a file; None where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
