"""What a run shows while it runs: finished cells as rows of a table, the ones under way in a line below."""

import shutil
import sys
import time
from typing import TextIO

from ablations.experiment.experiment import Event, Learned, Stage, Step
from ablations.experiment.worker import Finished
from ablations.grid import Cell
from ablations.rows.row import Row, metrics_of, training_of

COLUMNS = (
    ("cell", 34),
    ("AP", 6),
    ("AP50", 6),
    ("latency_ms", 11),
    ("images_per_s", 13),
    ("minutes", 8),
    ("status", 8),
)
# Share of a cell's time that is training; the rest is evaluation and measurement.
TRAINING_SHARE = 0.85
# Share of a cell's time that is behind it when a stage begins.
BEHIND = {"start": 0.0, "evaluate": TRAINING_SHARE, "measure": 0.95}


class Progress:
    """Prints a row per finished cell; on a terminal also a line of what is under way, plain lines elsewhere.

    Args:
        total: Number of cells that will run.
        stream: Where to print.
    """

    def __init__(self, total: int, stream: TextIO = sys.stdout):
        self.total = total
        self.stream = stream
        self.live = stream.isatty()
        self.began = time.monotonic()
        self.finished = 0
        self.under_way: dict[Cell, tuple[str, float]] = {}
        self.line("  ".join(name.rjust(width) if i else name.ljust(width) for i, (name, width) in enumerate(COLUMNS)))

    def notice(self, cell: Cell, event: Event | Finished) -> None:
        """Show an event of `ablations.experiment.pool.run_cells`."""
        match event:
            case Finished(row):
                self.under_way.pop(cell, None)
                self.finished += 1
                counted = "" if self.live else f"  [{self.finished}/{self.total}, {self.remaining()}]"
                self.line(describe(cell, row) + counted)
            case Step(step, loss):
                share = TRAINING_SHARE * step / cell.steps
                self.under_way[cell] = (f"step {step}/{cell.steps} loss {loss:.3f}", share)
            case Stage(name):
                self.under_way[cell] = (name, BEHIND[name])
            case Learned():
                pass
        if self.live:
            self.status()

    def line(self, text: str) -> None:
        """Print a line above the status line."""
        self.stream.write(("\r\x1b[K" if self.live else "") + text + "\n")
        self.stream.flush()

    def status(self) -> None:
        """Redraw the status line."""
        cells = "  |  ".join(f"{cell.name}: {text}" for cell, (text, _) in self.under_way.items())
        text = f"{self.finished}/{self.total}, {self.remaining()}  {cells}"
        self.stream.write("\r\x1b[K" + text[: shutil.get_terminal_size().columns - 1])
        self.stream.flush()

    def remaining(self) -> str:
        """Time since the start, and how long the rest takes at the pace so far."""
        elapsed = time.monotonic() - self.began
        done = self.finished + sum(share for _, share in self.under_way.values())
        if self.finished == self.total:
            return f"{clock(elapsed)} in all"
        left = f", about {clock(elapsed / done * (self.total - done))} left" if done > 0.2 else ""
        return clock(elapsed) + left

    def close(self) -> None:
        """Take the status line away."""
        if self.live:
            self.stream.write("\r\x1b[K")
            self.stream.flush()


def describe(cell: Cell, row: Row) -> str:
    """One row of the live table."""
    metrics = metrics_of(row)
    seconds = training_of(row).get("seconds")
    values = (
        metrics.get("AP"),
        metrics.get("AP50"),
        row.get("latency_ms_p50"),
        row.get("images_per_s"),
        seconds and seconds / 60,
    )
    numbers = ["" if value is None else f"{value:.1f}" for value in values]
    cells = [cell.name.ljust(COLUMNS[0][1]), *(n.rjust(w) for n, (_, w) in zip(numbers, COLUMNS[1:], strict=False))]
    reason = f"  {row['reason']}" if row.get("reason") else ""
    return "  ".join([*cells, row["status"].rjust(COLUMNS[-1][1])]) + reason


def clock(seconds: float) -> str:
    """Seconds as minutes:seconds, with hours where there are any.

    Example:
        >>> clock(62.4), clock(3725)
        ('1:02', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
