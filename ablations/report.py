"""`python -m ablations.report DIR`: tables, plots and one self-contained `report.html`, from the rows of DIR alone."""

import argparse
import sys
from collections.abc import Iterable
from html import escape
from pathlib import Path

import pandas as pd

from ablations.files import atomic_write_text
from ablations.rows.effects import EFFECTS_TITLE, effects_notes, effects_text
from ablations.rows.frame import as_text
from ablations.rows.gains import GAINS_NOTE, GAINS_TITLE, gains_table
from ablations.rows.picture import write_pictures
from ablations.rows.plots import ap_against_depth, ap_against_latency, gain_by_detector, to_svg
from ablations.rows.row import Row, machine_of
from ablations.rows.sections import Section, make_sections
from ablations.rows.statistics import stored_replicates
from ablations.rows.store import read_all
from ablations.rows.tables import write_tables

CAPTIONS = {
    ap_against_latency: "AP against latency. The steps join the cells that none beats in both; dashed: the baseline.",
    ap_against_depth: "AP against depth, one line a subset of the attentions; dashed: the baseline.",
    gain_by_detector: "Each detector with its own towers and with the best of its DyHead cells.",
}

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 3rem; border-bottom: 1px solid #ddd; }
h3 { font-size: 1.05rem; margin-top: 2rem; }
.machine, .notes, figcaption { color: #555; font-size: 0.85rem; } .machine { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.82rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: 0.22rem 0.55rem; text-align: right; border-bottom: 1px solid #eee; }
th { border-bottom: 2px solid #999; cursor: pointer; user-select: none; } th:hover { background: #f3f3f3; }
.text { text-align: left; }
tr.baseline { background: #f4f4f4; font-weight: 600; } tr.failed, .problem { color: #a40000; }
figure { margin: 1.5rem 0; } figure svg { max-width: 100%; height: auto; }
pre { background: #f6f6f6; padding: 0.7rem; overflow-x: auto; }
"""

# A click on a heading sorts by that column, a second one the other way; what is empty goes last.
SCRIPT = """
document.querySelectorAll("th").forEach(function (heading) {
  heading.addEventListener("click", function () {
    var body = heading.closest("table").tBodies[0], down = heading.dataset.down !== "1", column = heading.cellIndex;
    heading.dataset.down = down ? "1" : "0";
    function value(row) {
      var text = row.cells[column].textContent, number = parseFloat(text);
      return isNaN(number) ? text : number;
    }
    Array.from(body.rows).sort(function (a, b) {
      var x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
    }).forEach(function (row) { body.appendChild(row); });
  });
});
"""


def write_results(rows: Iterable[Row], directory: str | Path, problems: Iterable[str] = ()) -> list[Path]:
    """Write all that is made from rows: the tables, the pictures, the report; arguments and errors as below."""
    rows = list(rows)
    return [
        *write_tables(rows, directory),
        *write_pictures(rows, directory),
        write_report(rows, directory, problems),
    ]


def write_report(rows: Iterable[Row], directory: str | Path, problems: Iterable[str] = ()) -> Path:
    """Write `report.html` into `directory`; it needs no other file and no network.

    Args:
        rows: What it is made of (`read_rows`).
        directory: Where it goes.
        problems: Files that are not rows, one sentence each; they stand at its top.

    Returns:
        The file.

    Raises:
        ValueError: There are no rows.
        OSError: The file cannot be written.
    """
    directory = Path(directory)
    sections = make_sections(rows, stored_replicates(directory))
    if not sections:
        raise ValueError(f"{directory} holds no rows to report on")
    body = "".join(f"<p class='problem'>{escape(problem)}</p>\n" for problem in problems)
    body += "".join(_section(section, number) for number, section in enumerate(sections, 1))
    path = directory / "report.html"
    atomic_write_text(
        path,
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>DyHead ablation</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>DyHead ablation</h1>\n"
        "<p>Average precision in percent. L, S and C are scale, spatial and task attention; <code>baseline</code> is "
        "the detector with its own towers, <code>none</code> a DyHead with all three switched off. "
        f"A click on a heading sorts.</p>\n{body}<script>{SCRIPT}</script>\n</body>\n</html>\n",
    )
    return path


def _section(section: Section, number: int) -> str:
    parts = [
        f"<h2>{escape(section.title)}</h2>\n<p class='machine'>{escape(section.machine)}</p>\n",
        _table(as_text(section.frame)),
        "<ul class='notes'>" + "".join(f"<li>{escape(note)}</li>" for note in section.notes) + "</ul>\n",
    ]
    for draw, caption in CAPTIONS.items():
        figure = draw(section.frame)
        if figure is not None:
            svg = to_svg(figure, f"{draw.__name__}-{number}")
            label = escape(caption, quote=True)
            svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
            parts.append(f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>\n")
    parts.append(_gains(section.frame))
    parts.append(_effects(section.effects))
    parts.append(_reproduce(section.rows))
    return "".join(parts)


def _table(text: pd.DataFrame) -> str:
    names = [str(name) for name in text]
    numeric = {name: bool(text[name].str.match(r"^[+-]?\d|^$").all()) for name in names}
    kind = {name: "" if numeric[name] else " class='text'" for name in names}
    head = "".join(f"<th{kind[name]}>{escape(name)}</th>" for name in names)
    rows = []
    for _, line in text.iterrows():
        row = "baseline" if line.get("attentions") == "baseline" else ""
        if "ok" not in line.get("status", "ok"):
            row += " failed"
        cells = "".join(f"<td{kind[name]}>{escape(line[name])}</td>" for name in names)
        rows.append(f"<tr class='{row.strip()}'>{cells}</tr>\n" if row else f"<tr>{cells}</tr>\n")
    return (
        f"<div class='scroll'><table><thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(rows)}</tbody></table></div>\n"
    )


def _gains(frame: pd.DataFrame) -> str:
    gains = gains_table(frame)
    if gains.empty:
        return ""
    return f"<h3>{escape(GAINS_TITLE)}</h3>\n<p class='notes'>{escape(GAINS_NOTE)}</p>\n{_table(gains)}"


def _effects(effects: pd.DataFrame) -> str:
    if effects.empty:
        return ""
    notes = "".join(f"<li>{escape(note)}</li>" for note in effects_notes(effects))
    return f"<h3>{EFFECTS_TITLE}</h3>\n{_table(effects_text(effects))}<ul class='notes'>{notes}</ul>\n"


def _reproduce(rows: list[Row]) -> str:
    machines = [machine_of(row) for row in rows]
    commits = list(dict.fromkeys(commit for machine in reversed(machines) if (commit := machine.get("commit"))))
    commands = dict.fromkeys(machine["command"] for machine in machines if machine.get("command"))
    lines = [f"git checkout {commit}" for commit in commits[:1]] + ["pip install -c constraints.txt -e ."] + [*commands]
    words = []
    if len(commits) > 1:
        words.append(f"Rows come from {len(commits)} commits, the latest first: {', '.join(commits)}.")
    if any(machine.get("dirty") for machine in machines):
        words.append("Some rows were made with uncommitted changes.")
    note = f"<p class='notes'>{escape(' '.join(words))}</p>\n" if words else ""
    return f"<h3>How to reproduce</h3>\n{note}<pre>{escape(chr(10).join(lines))}</pre>\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit code: 0, or 2 where there is nothing to report on."""
    parser = argparse.ArgumentParser(prog="python -m ablations.report", description=__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help="a directory that ablations.run wrote its rows to")
    directory = parser.parse_args(arguments).directory
    if not directory.is_dir():
        print(f"error: there is no directory {directory}", file=sys.stderr)
        return 2
    try:
        rows, problems = read_all(directory)
        paths = write_results(rows, directory, problems)
    except (ValueError, OSError) as error:
        print(f"error: {error}; rows are read from {directory / 'cells'}", file=sys.stderr)
        return 2
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
