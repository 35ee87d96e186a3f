"""What is done, most valuable first: every stage in a process of its own, so that a fault of one is that stage's."""

import json
import os
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from kernels.bench.session.store import DONE, Row, Store
from kernels.bench.table import merge, read, to_json
from kernels.runtime.tiles import TUNED, tuned_file

ROOT = Path(__file__).parents[3]
# Rows of the benchmarks, as `kernels.bench.table` takes them: with the tiles that are shipped, and with tuned ones.
ROWS, TUNED_ROWS, GRID = "kernels.json", "kernels-tuned.json", "ablations.jsonl"
REHEARSAL = "nothing in here is a measurement"
_PYTEST = ("-m", "pytest", "-p", "no:cacheprovider")
_BENCHMARKS = ("tests/kernels/bench/bench_kernels.py", "tests/kernels/bench/bench_heads.py")


@dataclass(frozen=True)
class Stage:
    """One process of a session.

    Attributes:
        name: Its name in the rows.
        kind: One of `KINDS`.
        select: What of its kind it does.
        seconds: What it takes on an H200 with nothing compiled, an estimate.
        after: The kind of a stage that must have been done before.
    """

    name: str
    kind: str
    select: str
    seconds: int
    after: str = ""


@dataclass(frozen=True)
class Kind:
    """How a kind of stage is run: `command` makes the arguments of Python, `collect` the rows afterwards.

    Both are given the stage, the session, and a directory of their own for what the process leaves. `partly` says
    whether rows are there also where the process was stopped.
    """

    command: Callable[[Stage, Store, Path], list[str]]
    collect: Callable[[Stage, Store, Path], None]
    partly: bool = False


def _run_tests(stage: Stage, store: Store, place: Path) -> list[str]:
    # What takes time is compiling, which several processes do at once.
    workers = ["-n", "8"] if find_spec("xdist") and not store.rehearsed else []
    return [*_PYTEST, *workers, f"--junitxml={place / 'tests.xml'}", *stage.select.split("|")]


def _collect_tests(stage: Stage, store: Store, place: Path) -> None:
    cases = list(ET.parse(place / "tests.xml").iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - len(bad) - skipped
    for what, count, expected in (
        ("passed", passed, f"{len(cases)}"),
        ("failed", len(bad), "0"),
        ("skipped", skipped, "0"),
    ):
        store.add(Row(stage.name, f"tests {what}", count, "tests", expected))
    for case in bad:
        fault = next(child for child in case if child.tag in ("failure", "error"))
        lines = (fault.get("message") or fault.text or "").splitlines() or [""]
        store.add(Row(stage.name, f"failed: {case.get('name')}", None, "", note=lines[0][:300]))


def _probe(stage: Stage, store: Store, place: Path) -> list[str]:
    return ["-m", "kernels.bench.session.probes", str(store.directory), *stage.select.split()]


def _benchmark(stage: Stage, store: Store, place: Path) -> list[str]:
    return [*_PYTEST, *_BENCHMARKS, "--benchmark-only", f"--benchmark-json={place / 'rows.json'}", "-k", stage.select]


def _collect_benchmarks(stage: Stage, store: Store, place: Path) -> None:
    path, file = store.directory / (TUNED_ROWS if is_done("tune", store) else ROWS), place / "rows.json"
    found = read(file)
    if store.rehearsed:
        found = replace(found, machine=found.machine | {"rehearsal": REHEARSAL})
    if path.exists():
        found = merge(read(path), found, file)
    # Half a file would be worth less than the one before.
    whole = path.with_suffix(".new")
    whole.write_text(to_json(replace(found, commands=["python -m kernels.bench.session"])))
    whole.replace(path)
    if found.failed:
        raise RuntimeError(f"{len(found.failed)} cases failed: {', '.join(found.failed)[:500]}")


def _tune(stage: Stage, store: Store, place: Path) -> list[str]:
    if store.rehearsed:
        return ["-m", "kernels.bench.session.probes", str(store.directory), "tuning"]
    return ["-m", "kernels.bench.tune", "--only", stage.select]


def _collect_tuned(stage: Stage, store: Store, place: Path) -> None:
    for path in TUNED.glob("*.json") if not store.rehearsed else ():
        content = json.loads(path.read_text())
        if content["device"] not in store.machine:
            continue
        (store.directory / "tuned.json").write_text(path.read_text())
        for row in content["rows"]:
            name = f"{row['kernel']}, {row['class']}"
            store.add(Row("tune", name, row["ms"], "ms", f"{row['ms_before']:.3f}", "before", json.dumps(row["tiles"])))


def restore_tuned(store: Store) -> None:
    """Put the tiles that a session has tuned where the kernels look for them, as far as nothing lies there."""
    kept = store.directory / "tuned.json"
    if kept.exists():
        path = tuned_file(json.loads(kept.read_text())["device"])
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_text(kept.read_text())


def _grid(stage: Stage, store: Store, place: Path) -> list[str]:
    # Many files, and a finished cell is not run again: they lie where they can stay.
    return ["-m", "ablations.run", *stage.select.split(), "--out", str(_grid_directory(store))]


def _grid_directory(store: Store) -> Path:
    return ROOT / "runs" / f"session-{store.directory.name}"


def _collect_grid(stage: Stage, store: Store, place: Path) -> None:
    cells = [path.read_text() for path in sorted((_grid_directory(store) / "cells").glob("*.json"))]
    (store.directory / GRID).write_text("".join(f"{json.dumps(json.loads(cell))}\n" for cell in cells))
    store.add(Row(stage.name, "cells with a row", len(cells), "cells"))


def _nothing(stage: Stage, store: Store, place: Path) -> None:
    """The process has written its rows itself."""


KINDS = {
    "tests": Kind(_run_tests, _collect_tests),
    "probe": Kind(_probe, _nothing, partly=True),
    "benchmark": Kind(_benchmark, _collect_benchmarks),
    "tune": Kind(_tune, _collect_tuned),
    "grid": Kind(_grid, _collect_grid, partly=True),
}

_DEFORM = "tests/kernels/deform_conv/test_deform_conv_gpu.py"
_FUSED = "tests/kernels/block/test_fused_gpu.py"
_TESTS = (
    f"{_DEFORM}|{_FUSED}|tests/kernels/dynamic_relu/test_dynamic_relu.py|-m|gpu|-k|"
    "large or crowded or test_triton_output or same_bits_twice or another_stream or graph"
    " or (test_fused_loses_no_more and (float16 or bfloat16))"
)
_RIVALS = "and not plain and not compiled"
_COARSE = "(P4 or P5 or P6 or P7)"

STAGES = (
    Stage("tests", "tests", _TESTS, 150),
    Stage("roofs", "probe", "roofs", 40),
    Stage("gathers", "probe", "gathers", 40),
    Stage("forward", "probe", "forward", 40),
    Stage("input-gradient", "probe", "input-gradient", 50),
    Stage("headline P3 bf16", "benchmark", f"P3-b8-bf16 {_RIVALS}", 70),
    Stage("headline P3 fp16", "benchmark", f"P3-b8-fp16 {_RIVALS}", 80),
    Stage("headline P4 to P7 bf16", "benchmark", f"b8-bf16 and {_COARSE} {_RIVALS}", 90),
    Stage("headline P4 fp16", "benchmark", f"P4-b8-fp16 {_RIVALS}", 50),
    Stage("headline batch 1 bf16", "benchmark", f"b1-bf16 and (P3 or {_COARSE}) {_RIVALS}", 100),
    Stage("headline batch 1 fp16", "benchmark", f"b1-fp16 and (P3 or {_COARSE}) {_RIVALS}", 110),
    Stage("tune forward", "tune", "convolution bf16", 120),
    Stage("tune points", "tune", "convolution samples bf16", 120),
    Stage("tune weight", "tune", "convolution weight bf16", 120),
    Stage("tune gather", "tune", "convolution gather bf16", 120),
    Stage("tuned P3", "benchmark", f"deform_conv2d-P3-b8-bf16 {_RIVALS}", 70, after="tune"),
    Stage("tuned P4", "benchmark", f"deform_conv2d-P4-b8-bf16 {_RIVALS}", 50, after="tune"),
    Stage("block batch 8 bf16", "benchmark", "block-c256-b8-bf16 and not compiled", 100),
    Stage("block batch 8 fp16", "benchmark", "block-c256-b8-fp16 and not compiled", 100),
    Stage("DyHead-6 batch 1 fp16", "benchmark", "dyhead6-c256-b1-fp16 and forward and not compiled", 80),
    Stage("DyHead-6 batch 8 fp16", "benchmark", "dyhead6-c256-b8-fp16 and not compiled", 200),
    Stage("block compiled", "benchmark", "block-c256-b8-bf16 and compiled", 150),
    # It takes what is left, and goes on cell by cell.
    Stage("ablations", "grid", "--grid --preset small --device cuda", 180),
)

# The same on a CPU, a stage of every kind: the kernels interpreted, the benchmarks on PyTorch's path.
REHEARSAL_STAGES = (
    Stage("tests", "tests", "tests/interpreter/test_dynamic_relu.py|-k|test_ties", 5),
    Stage("questions", "probe", "roofs gathers forward input-gradient", 20),
    Stage("headline", "benchmark", "2x2-b8-fp32-forward-dense or c64-b8-fp32-forward-ours", 9),
    Stage("tune", "tune", "", 9),
    Stage("tuned", "benchmark", "2x2-b8-fp32-forward-dense", 9, after="tune"),
    Stage("ablations", "grid", "--grid --only LSC,depth=1 --device cpu --dry-run", 15),
)


def is_done(kind: str, store: Store) -> bool:
    """Whether a stage of a kind has been done."""
    outcomes = store.outcomes()
    every = REHEARSAL_STAGES if store.rehearsed else STAGES
    return any(s.kind == kind and s.name in outcomes and outcomes[s.name].outcome == DONE for s in every)


def _ours() -> dict[str, str]:
    """The environment but for what pytest-xdist tells its workers: a stage may be a run of tests of its own."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}


def run(stage: Stage, store: Store, process: Callable[[list[str], dict[str, str]], str]) -> str:
    """Run a stage and add its rows; returns its outcome.

    Args:
        stage: One of `STAGES` or `REHEARSAL_STAGES`.
        store: The session.
        process: Runs a command with an environment; returns `DONE`, or what went wrong.
    """
    kind = KINDS[stage.kind]
    # The benchmarks refuse to time an interpreter; everything else is the interpreter's in a rehearsal.
    environment = {"TRITON_INTERPRET": "1"} if store.rehearsed and stage.kind != "benchmark" else {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        outcome = process([sys.executable, *kind.command(stage, store, place)], _ours() | environment)
        try:
            if outcome == DONE or kind.partly or any(place.iterdir()):
                kind.collect(stage, store, place)
        except (OSError, ValueError, RuntimeError, ET.ParseError) as error:
            return outcome if outcome != DONE else f"failed: {error}"
    return outcome
