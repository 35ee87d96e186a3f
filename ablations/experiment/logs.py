"""`--log`: a cell's loss curve and its AP, written for the dashboards of other projects as well."""

import contextlib
import importlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from ablations.grid import Cell

# By the value of --log, the module that writes. Each is installed by the name that --log has for it.
LOGS = {"tensorboard": "torch.utils.tensorboard", "trackio": "trackio", "wandb": "wandb"}
PROJECT = "dyhead-lab"


class Log(Protocol):
    """Where a cell's scalars go."""

    def write(self, step: int, scalars: Mapping[str, float | None]) -> None:
        """Take scalars of a training step; None is left out."""

    def close(self) -> None:
        """Write what is still to be written."""


class NoLog:
    """Without `--log`."""

    def write(self, step: int, scalars: Mapping[str, float | None]) -> None:
        """Take no notice."""

    def close(self) -> None:
        """Do nothing."""


class TensorBoard:
    """Event files in a folder of their own below `logs` in the directory of the results."""

    def __init__(self, cell: Cell, out: Path):
        self.writer = module("tensorboard").SummaryWriter(str(folder(out, cell)))

    def write(self, step: int, scalars: Mapping[str, float | None]) -> None:
        """Take scalars of a training step."""
        for name, value in known(scalars).items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        """Close the file."""
        self.writer.close()


class Dashboard:
    """wandb, or trackio, which takes the same calls. Their greetings would run into the lines of this program."""

    def __init__(self, name: str, cell: Cell, out: Path):
        self.module = module(name)
        itself = {"id": cell.key, "dir": str(out)} if name == "wandb" else {}
        with silence():
            self.module.init(project=PROJECT, name=run_name(cell), config=cell.stored(), resume="allow", **itself)

    def write(self, step: int, scalars: Mapping[str, float | None]) -> None:
        """Take scalars of a training step."""
        if values := known(scalars):
            self.module.log(values, step=step)

    def close(self) -> None:
        """Wait until all is sent."""
        with silence():
            self.module.finish()


def open_log(name: str | None, cell: Cell, out: Path) -> Log:
    """The log of a cell: one of `LOGS`, or None for none."""
    if name is None:
        return NoLog()
    return TensorBoard(cell, out) if name == "tensorboard" else Dashboard(name, cell, out)


def module(name: str) -> Any:
    """The module behind a value of --log.

    Raises:
        ValueError: It is not installed or does not import; the message says what to do.
    """
    try:
        return importlib.import_module(LOGS[name])
    except ImportError as error:
        raise ValueError(f"--log {name} does not import ({error}); pip install --upgrade {name}") from error


def run_name(cell: Cell) -> str:
    """The name of a cell, and the beginning of its key: cells of two presets or learning rates have one name."""
    return f"{cell.name} {cell.key[:6]}"


def folder(out: Path, cell: Cell) -> Path:
    """Where TensorBoard finds a cell."""
    return out / "logs" / run_name(cell)


def known(scalars: Mapping[str, float | None]) -> dict[str, float]:
    """The scalars that have a value."""
    return {name: value for name, value in scalars.items() if value is not None}


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep what is printed within from the terminal."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
