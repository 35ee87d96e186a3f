"""Trained weights outlive their evaluation: where they lie, and when a cell needs no training.

What training reads and what evaluation reads are told apart. The weights of a cell lie in `cells/<training key>/`, a
hash of everything that decides them (`Cell.training_key`); when training has ended, `training.json` beside them says
so. The loss curve lies there, too, and each cell has a copy of it in `cells/<key>/`. A cell whose evaluation failed,
whose val part was mended, or that differs from another one in how it is tested finds them there and is only evaluated.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ablations.experiment.curve import CURVE
from ablations.files import atomic_write_bytes, atomic_write_text
from ablations.grid import DATA, Cell
from ablations.rows.row import Row, Training, training_of
from ablations.rows.store import set_aside

CHECKPOINT = "checkpoint.pt"
RECORD = "training.json"
# What a checkpoint holds.
PARTS = frozenset({"model", "optimizer", "step", "tail", "sums", "seconds"})
HALVED = "halved.json"
# How often a cell that runs out of memory is tried with half as many images at once.
HALVINGS = 3


def folder(out: Path, cell: Cell) -> Path:
    """Where the weights of a cell are, or will be."""
    return out / "cells" / cell.training_key


def find(out: Path, cell: Cell) -> Training | None:
    """The record of this cell's training, or None if it has not ended or its weights are gone."""
    directory = folder(out, cell)
    try:
        record = json.loads((directory / RECORD).read_text())
    except (OSError, ValueError):
        return None
    return cast(Training, record) if isinstance(record, dict) and (directory / CHECKPOINT).is_file() else None


def keep(out: Path, cell: Cell, record: Training) -> None:
    """Put on record that training has ended; the weights are there already."""
    atomic_write_text(folder(out, cell) / RECORD, json.dumps(record) + "\n")


def damaged_record(out: Path, cell: Cell) -> str | None:
    """What is wrong with the record of a training that has ended; None where it is whole, or there is none."""
    path = folder(out, cell) / RECORD
    try:
        whole = isinstance(json.loads(path.read_text()), dict)
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        whole = False
    return None if whole else f"{path} is damaged: it is no record of a training"


def checkpoint_of(path: Path, model: nn.Module, parts: Set[str]) -> dict[str, Any]:
    """The content of a checkpoint, its tensors on the CPU.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It cannot be read, or is not of this model.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        shapes = {name: value.shape for name, value in state["model"].items()}
    except (OSError, MemoryError):
        raise
    # A file that was cut off may fail in any of the layers of pickle, zip and tensors.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged ({reason})") from error
    if shapes != {name: value.shape for name, value in model.state_dict().items()} or parts - state.keys():
        raise ValueError(f"{path} is damaged (it is not of this model)")
    return state


def read_checkpoint(
    path: Path, model: nn.Module, say: Callable[[str], None], parts: Set[str] = PARTS
) -> dict[str, Any] | None:
    """As `checkpoint_of`, None where there is none.

    One that cannot be used is set aside with the record of its training, and said, which also gives None.
    """
    try:
        return checkpoint_of(path, model, parts)
    except FileNotFoundError:
        return None
    except ValueError as problem:
        place = set_aside(path.parents[2], [path, path.with_name(RECORD)])
        say(f"{problem}; set aside in {place}; a run trains it again")
        return None


def load(out: Path, cell: Cell, model: nn.Module, say: Callable[[str], None]) -> bool:
    """Give `model` the trained weights of a cell that `find` knows of; False, and said, where they are damaged."""
    state = read_checkpoint(folder(out, cell) / CHECKPOINT, model, say, {"model"})
    if state is not None:
        model.load_state_dict(state["model"])
    return state is not None


def halved(out: Path, cell: Cell) -> list[int]:
    """The steps before which this cell's training ran out of memory, and what it trains on at once was halved."""
    try:
        steps = json.loads((folder(out, cell) / HALVED).read_text())
    except (OSError, ValueError):
        return []
    return steps if isinstance(steps, list) else []


def halve(out: Path, cell: Cell, ranks: int) -> bool:
    """Train on half as many images at once from here on; False where that was done too often, or there is one a rank.

    The images of a step stay the same: they are trained on in twice as many parts, one after the other.

    Args:
        out, cell: As for `folder`.
        ranks: Processes that train the cell together.
    """
    steps = [*halved(out, cell), checkpoint_step(folder(out, cell) / CHECKPOINT)]
    if len(steps) > HALVINGS or cell.batch_size % (ranks * cell.accumulate * 2 ** len(steps)):
        return False
    folder(out, cell).mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder(out, cell) / HALVED, json.dumps(steps) + "\n")
    return True


def checkpoint_step(path: Path) -> int:
    """How many steps were done at a checkpoint; 0 where there is none that can be read."""
    try:
        return int(torch.load(path, map_location="cpu", mmap=True, weights_only=True)["step"])
    # The training that goes on looks at it more closely, and says what is wrong with it.
    except Exception:
        return 0


def clear(out: Path, cell: Cell) -> None:
    """Remove what earlier, failed runs of a cell left beside its row."""
    shutil.rmtree(out / "cells" / cell.key, ignore_errors=True)


def copy_curve(out: Path, cell: Cell) -> None:
    """Put the loss curve of a cell's training, as far as it came, among the files of the cell."""
    if (source := folder(out, cell) / CURVE).is_file():
        target = out / "cells" / cell.key / CURVE
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(target, source.read_bytes())


def is_done(out: Path, cell: Cell, row: Row | None, retry_failed: bool) -> bool:
    """Whether a cell needs nothing more: it has a good row, or one of a training that failed and is not to be retried.

    A failed row of a cell whose training ended is one of a failed evaluation: that is tried again by every run.
    """
    if row is None or row["status"] == "ok":
        return row is not None
    return not retry_failed and find(out, cell) is None


def outdated(rows: Iterable[Row], cells: Iterable[Cell]) -> list[Row]:
    """Failed rows of these cells on data that have been changed since: what failed there does not belong into a table.

    A row counts where its data were bad or its evaluation failed, and all but the data is that of one of `cells`.
    """
    wanted = {_but_data(cell.stored()): cell.key for cell in cells}
    return [
        row
        for row in rows
        if row["status"] != "ok"
        and (row["status"] == "bad_data" or training_of(row))
        and wanted.get(_but_data(row["cell"]), row["key"]) != row["key"]
    ]


def _but_data(stored: Mapping[str, object]) -> str:
    return json.dumps({name: value for name, value in stored.items() if name not in DATA}, sort_keys=True)
