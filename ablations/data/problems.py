"""What is wrong with a data set, and how it is said: one error that lists all problems of a file, one line each."""

import os
import reprlib
from collections import Counter
from collections.abc import Collection
from pathlib import Path

SHOWN_PROBLEMS = 50
# Integers up to here survive a trip through a float64, which JSON writers and pycocotools make with some of them.
MAX_EXACT = 1 << 53
# What can stand for an id: signed and unsigned integers of 64 bits.
MIN_ID, MAX_ID = -(1 << 63), (1 << 64) - 1

MISSING = object()
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxdict, _REPR.maxstring, _REPR.maxother = 3, 8, 8, 120, 120


class DataError(ValueError):
    """The data cannot be used. `str()` is one message that names the file and lists its problems.

    Attributes:
        path: The file or directory at fault.
        problems: Every problem found, one line each.
    """

    def __init__(self, path: str | os.PathLike[str], problems: list[str]):
        # Exactly the arguments, so that the exception survives pickling between processes.
        super().__init__(path, problems)
        self.path = Path(path)
        self.problems = list(problems)

    def __str__(self) -> str:
        name = _printable(self.path)
        if len(self.problems) == 1:
            return f"{name}: {self.problems[0]}"
        lines = [f"{name}: {len(self.problems)} problems"]
        lines += [f"  - {problem}" for problem in self.problems[:SHOWN_PROBLEMS]]
        if len(self.problems) > SHOWN_PROBLEMS:
            lines.append(f"  - and {len(self.problems) - SHOWN_PROBLEMS} more")
        return "\n".join(lines)


def _printable(path: Path) -> str:
    text = str(path)
    return text if text.isprintable() else repr(text)


def quote(value: object) -> str:
    """A short, printable form of any value of a JSON file: nothing in it can reach the terminal as a control code."""
    if value is None or value is True or value is False:
        return {None: "null", True: "true", False: "false"}[value]
    return _REPR.repr(value)


def wrong(key: str, value: object, expected: str) -> str:
    """The problem of an entry whose `key` is absent (`MISSING`) or is not what is expected."""
    return f" has no {quote(key)}" if value is MISSING else f": {quote(key)} is {quote(value)}, expected {expected}"


class Lenient:
    """Counts what was read although it is not as COCO writes it, and how it was taken."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()

    def add(self, what: str, taken: str = "", count: int = 1) -> None:
        """Count more of a kind; `taken` says what it was read as."""
        self.counts[what, taken] += count

    def note(self) -> list[str]:
        """One line, or none where nothing was counted."""
        if not self.counts:
            return []
        parts = [f"{what} ({n}, {taken})" if taken else f"{what} ({n})" for (what, taken), n in self.counts.items()]
        return ["read leniently: " + ", ".join(parts)]


def identity(value: object, lenient: Lenient) -> int | str | None:
    """An id as it is compared and sorted: a whole number of 64 bits or a text; None where it is neither."""
    if type(value) is int and MIN_ID <= value <= MAX_ID:
        if not -MAX_EXACT <= value <= MAX_EXACT:
            lenient.add("ids beyond 2^53")
        return value
    if type(value) is str:
        lenient.add("ids that are text")
        return value
    number = whole(value)
    if number is not None:
        lenient.add("ids written as 1.0", "taken as 1")
    return number


ID = "a whole number of 64 bits or a text"


def whole(value: object) -> int | None:
    """A whole number, written as 640 or as 640.0, that a float64 holds exactly; None for anything else."""
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and -MAX_EXACT <= value <= MAX_EXACT else None


def mixed(kind: str, ids: Collection[int | str]) -> list[str]:
    """The problem of ids of which some are numbers and some text: they have no order."""
    texts = [value for value in ids if type(value) is str]
    if not texts or len(texts) == len(ids):
        return []
    number = min(value for value in ids if type(value) is not str)
    return [f"{kind} ids are numbers and text, {number} and {quote(min(texts))}: their order is undefined"]
