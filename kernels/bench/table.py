"""Rows of the benchmarks to tables.

    pytest --benchmark-only --benchmark-json rows.json
    python -m kernels.bench.table rows.json results/NAME

Writes `kernels.json`, the rows without what nobody reads, and `kernels.md`, the tables. Several files of rows from one
machine and commit make one table; a `kernels.json` is such a file, too. What a later file has measured again replaces
what an earlier one has.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from tabulate import tabulate

from kernels.bench.goals import GOALS, Name, verdict
from kernels.bench.op import plain_mode

DEVICES = {"cuda": "GPU", "cpu": "CPU"}
NUMBERS = {
    "ms_p20": "ms p20",
    "ms_p50": "ms p50",
    "ms_p80": "ms p80",
    "TFLOP/s": "TFLOP/s",
    "GB/s": "GB/s",
    "percent_of_roof": "% of roof",
    "error": "error",
    "peak_MB": "peak MB",
    "workspace_MB": "workspace MB",
    "per_empty": "÷ empty",
}
OURS = ("ours", "graph")
RIVALS = ("torchvision", "onnxruntime", "plain", "eager", "compiled", "dense")
NOTES = """\
- ms: percentiles of a call's time. error: the largest difference from float64 of outputs and gradients, each relative
  to the largest value it should have; rows whose error is beyond its limit are not reported.
  In 16 bits no error of a deformable convolution exceeds that of the same steps in PyTorch, each rounded to that type.
- TFLOP/s and GB/s count what must be computed and moved. % of roof: the least time, by this machine's copy bandwidth
  and its dense 3x3 convolution as measured in the same run, over the time.
- peak MB: memory beyond what lies there before the call; workspace MB: that beyond the results, too. GPU only.
- ÷ empty: the time over that of a custom operator that does nothing, measured in turn; what a call costs besides its
  work, on the path in PyTorch and, as `launches`, down to Triton's own door.
- torchvision ÷ and so on: the rival's time over ours, at the same shape, precision and mode; dense is a channels-last
  convolution without sampling, the bound and no rival. Deterministic modes stand beside the rivals' ordinary ones.
"""


@dataclass(frozen=True)
class Measurement:
    """What one or several runs of the benchmarks on one machine left.

    `machine`: what it was measured on, by name. `commands`: one a run. `date`: of the last run. `rows`: the numbers of
    every case. `missing`: why a rival could not run. `failed`: names of the cases that failed.
    """

    machine: dict[str, object]
    commands: list[str]
    date: str
    rows: dict[Name, dict[str, Any]]
    missing: dict[Name, str]
    failed: list[str]


def read(path: Path) -> Measurement:
    """Read what `pytest --benchmark-only --benchmark-json PATH` wrote, or a `kernels.json`.

    Raises:
        ValueError: the file is neither; the message names it.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    try:
        info = content["machine_info"]
        # A case may break after it was timed.
        good = [bench["extra_info"] for bench in content["benchmarks"] if bench.get("name") not in content["failed"]]
        rows = {_name(row): row for row in good}
        missing = {_name(row): row["reason"] for row in content["missing"]}
        found = Measurement(info["machine"], info["commands"], content["datetime"], rows, missing, content["failed"])
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no rows of this project's benchmarks: {error!r} in them") from error
    if not all(isinstance(row.get("ms_p50"), float) for row in rows.values()):
        raise ValueError(f"{path}: a row has no time; was it written with --benchmark-only?")
    return found


def merge(first: Measurement, second: Measurement, path: Path) -> Measurement:
    """Both in one.

    Raises:
        ValueError: they are from different machines or commits; the message names `path`, the file of the second.
    """
    keys = first.machine.keys() | second.machine.keys()
    for key in sorted(keys):
        ours, theirs = first.machine.get(key), second.machine.get(key)
        if ours != theirs:
            raise ValueError(f"{path}: not measured where the files before it were: {key} is {theirs}, not {ours}")
    rows = first.rows | second.rows
    missing = {name: why for name, why in (first.missing | second.missing).items() if name not in rows}
    commands = list(dict.fromkeys(first.commands + second.commands))
    again = {_case(name) for name in second.rows}
    failed = [case for case in first.failed if case[case.find("[") :] not in again] + second.failed
    return Measurement(first.machine, commands, max(first.date, second.date), rows, missing, failed)


def _name(row: dict[str, Any]) -> Name:
    return Name(**{field.name: row[field.name] for field in fields(Name)})


def _case(name: Name) -> str:
    """As pytest writes it behind the name of a test."""
    return f"[{name.op}-{name.shape}-{name.precision}-{name.mode}-{name.provider}]"


def to_json(found: Measurement) -> str:
    """The rows as `read` takes them, with nothing else."""
    content = {
        "machine_info": {"machine": found.machine, "commands": found.commands},
        "datetime": found.date,
        "benchmarks": [{"extra_info": row} for row in found.rows.values()],
        "missing": [asdict(name) | {"reason": reason} for name, reason in found.missing.items()],
        "failed": found.failed,
    }
    return json.dumps(content, indent=1) + "\n"


def to_markdown(found: Measurement) -> str:
    """Machine and commands, the goals, and a table for every operator of every kind of device."""
    machine = " | ".join(f"{key}: {'none' if value is None else value}" for key, value in found.machine.items())
    commands = "".join(f"    {command}\n" for command in found.commands)
    parts = [f"{machine}\n\n{commands}\n{found.date[:10]}\n", f"## Goals\n\n{_goals(found)}\n"]
    names = sorted({*found.rows, *found.missing}, key=_order(found))
    for (device, op), group in groupby(names, key=lambda name: (name.device, name.op)):
        parts.append(f"## {op}, {DEVICES.get(device, device)}\n\n{_table(found, list(group))}\n")
    parts.append(NOTES + _absent(found))
    return "\n".join(parts)


def _order(found: Measurement) -> Callable[[Name], list[int]]:
    """By device, operator and so on, each in the order in which the benchmarks came to it."""
    names = [*found.rows, *found.missing]
    ranks = [list(dict.fromkeys(getattr(name, field.name) for name in names)) for field in fields(Name)]
    return lambda name: [rank.index(getattr(name, field.name)) for rank, field in zip(ranks, fields(Name), strict=True)]


def _goals(found: Measurement) -> str:
    lines = [[goal.what, goal.reach, goal.aim, verdict(goal, found.rows)] for goal in GOALS]
    return _markdown(lines, ["what", "reach", "aim", "measured"])


def _table(found: Measurement, names: list[Name]) -> str:
    lines = []
    for name in names:
        row, mode = found.rows.get(name), name.mode.replace("-", " ")
        line = [name.shape, name.precision, mode, name.provider]
        if row is None:
            lines.append(line + ["", "missing"] + [""] * (len(NUMBERS) + len(RIVALS) - 2))
        else:
            ratios = [_ratio(found, name, rival) if name.provider in OURS else "" for rival in RIVALS]
            lines.append(line + [_number(row.get(key)) for key in NUMBERS] + ratios)
    headers = ["shape", "precision", "mode", "provider", *NUMBERS.values(), *(f"{rival} ÷" for rival in RIVALS)]
    # A CPU's memory is not measured, and an operator may have no such rival.
    filled = [i for i in range(len(headers)) if any(line[i] for line in lines)]
    return _markdown([[line[i] for i in filled] for line in lines], [headers[i] for i in filled])


def _ratio(found: Measurement, name: Name, rival: str) -> str:
    other = Name(**asdict(name) | {"provider": rival, "mode": plain_mode(name.mode)})
    if other in found.rows:
        return _number(found.rows[other]["ms_p50"] / found.rows[name]["ms_p50"])
    return "missing" if other in found.missing else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _markdown(lines: list[list[str]], headers: list[str]) -> str:
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def _absent(found: Measurement) -> str:
    reasons: dict[tuple[str, str], list[Name]] = {}
    for name, reason in found.missing.items():
        reasons.setdefault((name.provider, reason), []).append(name)
    notes = [f"- missing: {provider}, {len(rows)} rows: {reason}\n" for (provider, reason), rows in reasons.items()]
    return "".join(notes + [f"- failed its check or broke, and is not reported: {name}\n" for name in found.failed])


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit code: 0, or 2 where a file is not what it must be."""
    parser = argparse.ArgumentParser("python -m kernels.bench.table", description=__doc__.split("\n\n")[0])
    parser.add_argument("rows", nargs="+", type=Path, metavar="ROWS.json", help="from --benchmark-json")
    parser.add_argument("target", type=Path, metavar="results/NAME", help="where kernels.md and kernels.json go")
    options = parser.parse_args(arguments)
    try:
        found = read(options.rows[0])
        for path in options.rows[1:]:
            found = merge(found, read(path), path)
        if not found.rows:
            raise ValueError(f"{', '.join(map(str, options.rows))}: nothing was measured")
        options.target.mkdir(parents=True, exist_ok=True)
        (options.target / "kernels.json").write_text(to_json(found))
        (options.target / "kernels.md").write_text(to_markdown(found))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(options.target / "kernels.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
