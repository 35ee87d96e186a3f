"""What a run shows: a live table that fits the terminal, plain lines elsewhere, a sane terminal after Ctrl-C."""

import io
import os
import re
import signal
import subprocess
import sys
import termios
import time
from dataclasses import replace

import pytest
from cells import CELL
from places import ROOT
from terminal import Terminal

from ablations.executors import progress as module
from ablations.executors.progress import Progress, clock
from ablations.executors.worker import Elsewhere, Finished
from ablations.experiment.experiment import Learned, Stage, Step
from ablations.generate import generate

CELLS = [replace(CELL, attentions=a, depth=d) for d in (1, 2, 3, 4, 5) for a in ("", "L", "S", "C", "LS", "LC", "LSC")]
GOOD = {"status": "ok", "metrics": {"AP": 31.25, "AP50": 55.0}, "training": {"seconds": 90.0, "loss": 0.75}}
BAD = {"status": "diverged", "reason": "loss is not finite [step 3]"}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def test_elsewhere_than_on_a_terminal_there_is_a_line_for_each_finished_cell():
    stream = io.StringIO()
    progress = Progress(CELLS[:2], stream)
    for event in (Stage("start"), Step(40, 1.5), Stage("evaluate"), Learned({"metrics": {"AP": 3.0}}), Finished(GOOD)):
        progress.notice(CELLS[0], event)
    progress.line("seed 3 complete")
    progress.notice(CELLS[1], Finished(BAD))
    progress.close()
    heading, first, note, second = stream.getvalue().splitlines()
    assert heading.split() == ["cell", "AP", "AP50", "latency_ms", "images_per_s", "minutes", "status"]
    assert first.startswith(CELLS[0].name) and re.search(
        r" 31\.2 +55\.0 +1\.5 +ok  \[1/2, 0:00, about .* left\]$", first
    )
    assert note == "seed 3 complete"
    assert second.startswith(CELLS[1].name) and "diverged  loss is not finite [step 3]  [2/2, 0:00 in all]" in second
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()


def row_of(lines, cell):
    (line,) = [line for line in lines if line.strip().startswith(f"{cell.name} ")]
    return line.split(cell.name, 1)[1].split()


def test_on_a_terminal_a_table_follows_the_cells(monkeypatch):
    monkeypatch.setattr(module, "SECONDS_PER_DRAWING", 0.0)
    terminal = Terminal()
    progress = Progress(CELLS[:4], terminal.stream)
    first, second, third, _ = CELLS[:4]
    for cell, event in (
        (first, Stage("start")),
        (second, Stage("start")),
        (third, Stage("start")),
        (first, Step(10, 2.5)),
        (first, Stage("evaluate")),
        (first, Learned({"metrics": {"AP": 12.34}})),
        (second, Step(60, 1.5)),
        (third, Elsewhere()),
    ):
        progress.notice(cell, event)
    screen = terminal.screen()
    assert row_of(screen, first) == ["evaluating", "10/100", "2.500", "12.3", row_of(screen, first)[-1]]
    assert row_of(screen, second) == ["training", "60/100", "1.500"]
    assert row_of(screen, third) == ["elsewhere"] and row_of(screen, CELLS[3]) == ["waiting"]
    assert any("0 of 4 done" in line and "1 evaluating, 1 training, 1 elsewhere, 1 waiting" in line for line in screen)

    progress.notice(first, Finished(GOOD))
    progress.notice(second, Finished(BAD))
    progress.line("seed 3 complete")
    screen = terminal.screen()
    assert row_of(screen, first) == ["ok", "10/100", "0.750", "31.2"]
    assert row_of(screen, second)[0] == "diverged"
    above = [line for line in screen if "diverged: " in line or "complete" in line]
    assert above == [f"diverged: {second.name}: loss is not finite [step 3]", "seed 3 complete"]

    # At the end the plain lines take the table's place, and the cursor is back.
    progress.close()
    screen = [line for line in terminal.screen() if line]
    assert screen[:2] == above and screen[2].split()[0] == "cell" and len(screen) == 5
    assert terminal.text.rindex("\x1b[?25h") > terminal.text.rindex("\x1b[?25l")


def test_the_time_left_is_at_the_cells_own_pace(monkeypatch):
    """50 s for 50 of 100 steps that began at the 20th of an earlier run: 0.85 x 0.3 of it left, and the rest."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    progress = Progress(CELLS[:1], io.StringIO())
    progress.notice(CELLS[0], Stage("start"))
    progress.notice(CELLS[0], Step(20, 1.0))
    now[0] += 50
    progress.notice(CELLS[0], Step(70, 1.0))
    assert progress.states[CELLS[0]].left() == clock(50 / (0.85 * 0.5) * (1 - 0.85 * 0.7))
    progress.notice(CELLS[0], Finished(GOOD))
    assert progress.states[CELLS[0]].left() == ""


@pytest.mark.parametrize("height", [5, 12, 24])
def test_many_cells_fit_the_terminal(height, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_PER_DRAWING", 0.0)
    terminal = Terminal(height)
    progress = Progress(CELLS, terminal.stream)
    for done, cell in enumerate(CELLS[:-2]):
        progress.notice(cell, Stage("start"))
        progress.notice(cell, Step(50, 1.0))
        lines = [line for line in terminal.screen() if line]
        assert len(lines) < height
        assert row_of(lines, cell)[:2] == ["training", "50/100"]
        if done and height > 5:
            assert row_of(lines, CELLS[done - 1])[0] == "ok", "the last that was finished"
        assert f"{done} of {len(CELLS)} done" in lines[-1] or f"{done} of {len(CELLS)} done" in lines[-2]
        progress.notice(cell, Finished(GOOD))
    progress.close()
    assert max(map(int, re.findall(r"\x1b\[(\d+)A", terminal.text)), default=1) < height


def test_on_a_narrow_terminal_names_are_cut_and_numbers_are_not(monkeypatch):
    monkeypatch.setattr(module, "SECONDS_PER_DRAWING", 0.0)
    terminal = Terminal(width=64)
    progress = Progress(CELLS[:2], terminal.stream)
    progress.notice(CELLS[1], Stage("evaluate"))
    progress.notice(CELLS[1], Learned({"metrics": {"AP": 12.34}}))
    progress.notice(CELLS[1], Step(100, 12.5))
    (line,) = [line for line in terminal.screen() if "100/100" in line]
    assert "…" in line and line.split()[-4:] == ["evaluating", "100/100", "12.500", "12.3"]
    progress.close()


SLOW = """
import sys, time
from dataclasses import replace
from ablations import run
from ablations.experiment.experiment import Stage

def forever(cells, job, workers, notice, ranks):
    notice(cells[0], Stage("start"))
    time.sleep(60)

run.run_cells = forever
sys.exit(run.main(sys.argv[1:]))
"""


def test_ctrl_c_leaves_the_terminal_sane(tmp_path):
    data = generate(tmp_path / "data", "tiny", train=6, val=4)
    terminal = Terminal()
    before = termios.tcgetattr(terminal.slave)
    command = [sys.executable, "-c", SLOW, "--grid", "--data", str(data), "--out", str(tmp_path / "out")]
    places = dict.fromkeys(("stdin", "stdout", "stderr"), terminal.slave)
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "TERM": "xterm"}, **places)
    deadline = time.monotonic() + 120
    while "training" not in terminal.read().split("NO GPU")[-1].split("memory.")[-1] and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert "interrupted before the first cell ended; go on with: " in "".join(terminal.screen())
    assert terminal.text.rindex("\x1b[?25h") > terminal.text.rindex("\x1b[?25l")
    assert termios.tcgetattr(terminal.slave) == before
    assert not any("atss baseline" in line for line in terminal.screen()), "the live table is gone"
