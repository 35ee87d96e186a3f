"""The rows of a session on disk: written as they are measured, so that what kills the program takes none with it."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE = "session.jsonl"
# The outcome of a stage that need not be run again.
DONE = "done"


@dataclass(frozen=True)
class Row:
    """One measured number, beside what was predicted.

    Attributes:
        stage: The stage that measured it.
        what: What was measured; one of a stage has one number.
        value: The number; None where there is none, and `note` says why.
        unit: Its unit.
        predicted: The number, or the range, that was expected, in that unit.
        basis: What the prediction follows from.
        note: Anything else.
    """

    stage: str
    what: str
    value: float | None
    unit: str
    predicted: str = ""
    basis: str = ""
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: `DONE`, or why not; and how many seconds it took."""

    stage: str
    outcome: str
    seconds: float


class Store:
    """The rows and outcomes of one session, in one file of a directory that is made where it is missing.

    Args:
        directory: Where `session.jsonl` lies.
        machine: Device, versions and commit, in one line.
        rehearsed: Whether these are no measurements.

    Raises:
        ValueError: The file has rows of another machine or commit, or rehearsed rows beside measured ones.
    """

    def __init__(self, directory: Path, machine: str, rehearsed: bool) -> None:
        self.directory, self.machine, self.rehearsed = directory, machine, rehearsed
        self.path = directory / FILE
        directory.mkdir(parents=True, exist_ok=True)
        here = f"{machine}, a rehearsal" if rehearsed else machine
        before = [record["machine"] for record in self._records("machine")]
        if before and before[0] != here:
            raise ValueError(f"{self.path} has rows of {before[0]}, and this is {here}")
        if not before:
            append(self.path, {"machine": here, "rehearsed": rehearsed})

    def rows(self) -> list[Row]:
        """What was measured; of what was measured again, the last."""
        found = [Row(**record) for record in self._records("what")]
        return list({(row.stage, row.what): row for row in found}.values())

    def outcomes(self) -> dict[str, Outcome]:
        """How every stage that was begun ended the last time."""
        return {record["stage"]: Outcome(**record) for record in self._records("outcome")}

    def add(self, entry: Row | Outcome) -> None:
        """Write a row or an outcome behind the others."""
        append(self.path, asdict(entry) | {"rehearsed": self.rehearsed})

    def _records(self, key: str) -> Iterator[dict[str, Any]]:
        """The records that have this key, without what all of them have."""
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:
                # A program that is killed may leave half a line.
                continue
            if key in record:
                record.pop("rehearsed")
                yield record


def append(path: Path, record: dict[str, Any]) -> None:
    """Write one line behind what is there; half a line there stays alone."""
    with path.open("ab+") as file:
        file.seek(0, 2)
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(record).encode() + b"\n")
