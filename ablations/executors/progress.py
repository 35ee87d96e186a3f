"""What a run shows while it runs: on a terminal a table of cells that changes in place, plain lines elsewhere."""

import os
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import TextIO

from rich import box
from rich.console import Console, ConsoleDimensions, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ablations.executors.worker import Elsewhere, Finished, Notice
from ablations.experiment.experiment import Learned, Said, Stage, Step
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
# What a cell does in each stage, and the share of its time that is behind it when the stage begins.
STAGES = {"start": ("training", 0.0), "evaluate": ("evaluating", TRAINING_SHARE), "measure": ("measuring", 0.95)}
STYLES = {"waiting": "dim", "elsewhere": "dim", "training": "cyan", "evaluating": "cyan", "measuring": "cyan"}
# Lines of the live table that are not cells: its heading, a rule, the counts, and the line of the cursor.
AROUND = 4
# The table is drawn at most so often. Nothing happens, and so nothing is drawn, while a cell measures its speed.
SECONDS_PER_DRAWING = 0.2


@dataclass
class State:
    """How far a cell is.

    Attributes:
        word: A stage, `waiting`, `elsewhere` (another run has it), or the status of its row.
        share: Share of its time that is behind it.
        step, loss: Of its last training step that was heard of.
        ap: AP in percent, once it is known.
        since: When it began to train here, `time.monotonic`, and its share then.
    """

    word: str = "waiting"
    share: float = 0.0
    step: int | None = None
    loss: float | None = None
    ap: float | None = None
    since: tuple[float, float] | None = None

    def left(self) -> str:
        """Time until the cell is done, at its own pace."""
        if self.since is None or self.word not in {word for word, _ in STAGES.values()}:
            return ""
        began, share = self.since
        behind = self.share - share
        return clock((time.monotonic() - began) / behind * (1 - self.share)) if behind > 0.02 else ""


class Progress:
    """Shows cells on a terminal as a table with their states, elsewhere as one line a finished cell.

    Args:
        cells: The cells that will run, in their order.
        stream: Where to print; standard output if None.
    """

    def __init__(self, cells: list[Cell], stream: TextIO | None = None):
        self.states = {cell: State() for cell in cells}
        self.stream = stream or sys.stdout
        self.began = time.monotonic()
        self.drawn = 0.0
        self.finished: dict[Cell, Row] = {}
        self.console = Console(file=self.stream)
        self.live: Live | None = None
        if self.stream.isatty() and not self.console.is_dumb_terminal:
            # What is printed at the end stays; the live table would be cut off at the terminal's height.
            self.live = Live(console=self.console, auto_refresh=False, transient=True, get_renderable=self.table)
            self.live.start()
        else:
            self.heading()

    def notice(self, cell: Cell, event: Notice) -> None:
        """Show an event of `ablations.executors.pool.run_cells`."""
        state = self.states[cell]
        match event:
            case Finished(row):
                state.word, state.share, state.ap = row["status"], 1.0, metrics_of(row).get("AP")
                state.loss = training_of(row).get("loss", state.loss)
                self.finished[cell] = row
                if self.live is None:
                    self.line(f"{describe(cell, row)}  [{len(self.finished)}/{len(self.states)}, {self.remaining()}]")
                elif row.get("reason"):
                    self.line(f"{row['status']}: {cell.name}: {row['reason']}")
            case Step(step, loss):
                state.step, state.loss, state.share = step, loss, TRAINING_SHARE * step / cell.steps
                state.since = state.since or (time.monotonic(), state.share)
            case Stage(name):
                state.word, state.share = STAGES[name]
                if name == "start":
                    state.since = None
            case Learned(parts):
                state.ap = (parts.get("metrics") or {}).get("AP", state.ap)
            case Said(text):
                self.line(text)
            case Elsewhere():
                state.word = "elsewhere"
        if not isinstance(event, Step) or time.monotonic() - self.drawn > SECONDS_PER_DRAWING:
            self.draw()

    def draw(self) -> None:
        """Bring the live table up to date, if there is one."""
        if self.live is not None:
            # The stream may be another terminal than the standard ones, which rich asks, and may change its size.
            size = os.get_terminal_size(self.stream.fileno())
            if all(size):
                self.console.size = ConsoleDimensions(*size)
            self.live.refresh()
            self.drawn = time.monotonic()

    def line(self, text: str) -> None:
        """Print a line that stays, above the live table."""
        if self.live is not None:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)

    def heading(self) -> None:
        """Print the names of the columns of `describe`."""
        self.line("  ".join(name.rjust(width) if i else name.ljust(width) for i, (name, width) in enumerate(COLUMNS)))

    def table(self) -> Group:
        """The cells, as many as the terminal is high, with their states and the counts."""
        counts = Counter(state.word for state in self.states.values())
        words = ", ".join(f"{number} {word}" for word, number in counts.items())
        below = f" {len(self.finished)} of {len(self.states)} done, {self.remaining()}: {words}"
        table = Table(box=box.SIMPLE_HEAD, show_edge=False)
        # Where the terminal is narrow, names are cut and nothing else: rich narrows the columns that may wrap.
        table.add_column("cell")
        table.add_column("state", no_wrap=True, min_width=10)
        for name, width in (("step", 9), ("loss", 6), ("AP", 4), ("left", 5)):
            table.add_column(name, justify="right", no_wrap=True, min_width=width)
        for cell in self.shown(max(1, self.console.height - AROUND)):
            state = self.states[cell]
            style = STYLES.get(state.word, "green" if state.word == "ok" else "bold red")
            step = "" if state.step is None else f"{state.step}/{cell.steps}"
            loss, ap = ("" if value is None else f"{value:.{n}f}" for value, n in ((state.loss, 3), (state.ap, 1)))
            label = Text(cell.name, no_wrap=True, overflow="ellipsis")
            table.add_row(label, Text(state.word, style), step, loss, ap, state.left())
        return Group(table, Text(below, no_wrap=True, overflow="ellipsis"))

    def shown(self, most: int) -> list[Cell]:
        """All cells if they are no more than `most`; else the finished last, those under way, and the next ones."""
        if len(self.states) <= most:
            return list(self.states)
        waiting = [cell for cell, state in self.states.items() if state.word == "waiting"]
        busy = [cell for cell, state in self.states.items() if state.word != "waiting" and cell not in self.finished]
        room = max(0, most - len(busy))
        finished = list(self.finished)[-room:] if room else []
        return [*finished, *busy, *waiting][:most]

    def remaining(self) -> str:
        """Time since the start, and how long the rest takes at the pace so far."""
        elapsed = time.monotonic() - self.began
        total = len(self.states)
        if len(self.finished) == total:
            return f"{clock(elapsed)} in all"
        done = sum(state.share for state in self.states.values())
        left = f", about {clock(elapsed / done * (total - done))} left" if done > 0.2 else ""
        return clock(elapsed) + left

    def close(self) -> None:
        """Leave the terminal as it was, with a line for each finished cell in place of the live table."""
        if self.live is not None:
            self.live.stop()
            self.live = None
            if self.finished:
                self.heading()
            for cell, row in self.finished.items():
                self.line(describe(cell, row))


def describe(cell: Cell, row: Row) -> str:
    """What stays of a finished cell: a line in `COLUMNS`."""
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
