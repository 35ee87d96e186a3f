"""The page: for each table its numbers, plots, effects, classes, losses, exhibits, and how to make it again."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from html import escape
from importlib.resources import files
from pathlib import Path

import pandas as pd

from ablations.exhibits.stored import name_of, read_exhibit, subject_of
from ablations.page import exhibit as exhibits
from ablations.page import markup
from ablations.page.classes import class_table
from ablations.page.plots import ap_against_depth, ap_against_latency, gain_by_detector
from ablations.page.repeated import effects_plot, loss_plot
from ablations.rows.effects import EFFECTS_TITLE, effects_notes, effects_text
from ablations.rows.frame import as_text
from ablations.rows.gains import GAINS_NOTE, GAINS_TITLE, gains_table
from ablations.rows.plots import markers_of
from ablations.rows.row import Row, machine_of
from ablations.rows.sections import Section

TITLE = "DyHead ablation"
INTRODUCTION = (
    "Average precision in percent. L, S and C are scale, spatial and task attention; <code>baseline</code> is the "
    "detector with its own towers, <code>none</code> a DyHead with all three switched off."
)


def make_page(sections: Sequence[Section], directory: Path, problems: Iterable[str] = ()) -> str:
    """The whole HTML text, which refers to nothing outside itself.

    Args:
        sections: What it shows, at least one.
        directory: Where loss curves and exhibits are kept beside the rows.
        problems: Sentences that stand at its top.
    """
    assets = files("ablations.page")
    style = assets.joinpath("style.css").read_text()
    style += f":root {{ {markup.colours(dark=False)} }}\n"
    style += f"@media (prefers-color-scheme: dark) {{ :root {{ {markup.colours(dark=True)} }} }}\n"
    entries = "".join(
        f'<li><a href="#section-{number}">{escape(section.title)}</a></li>'
        for number, section in enumerate(sections, 1)
    )
    contents = f'<nav aria-label="Tables"><ul>{entries}</ul></nav>\n' if len(sections) > 1 else ""
    warnings = "".join(f'<p class="problem">{escape(problem)}</p>\n' for problem in problems)
    body = "".join(_section(section, number, directory) for number, section in enumerate(sections, 1))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{TITLE}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f"<header><h1>{TITLE}</h1>\n<p>{INTRODUCTION}</p>\n{contents}{warnings}</header>\n<main>\n{body}</main>\n"
        f"<script>{assets.joinpath('script.js').read_text()}</script>\n</body>\n</html>\n"
    )


def _section(section: Section, number: int, directory: Path) -> str:
    frame = section.frame
    legend = markup.legend(frame["attentions"], markers_of(frame))
    parts = [
        f'<section id="section-{number}" aria-labelledby="title-{number}">\n<h2 id="title-{number}">'
        f'{escape(section.title)}</h2>\n<p class="machine">{escape(section.machine)}</p>\n',
        _facts(section),
        markup.table(as_text(frame), f"Results on {section.title}"),
        markup.notes(section.notes),
    ]
    parts.append('<div class="plots">\n')
    for drawn in (ap_against_latency(frame), ap_against_depth(frame), gain_by_detector(frame)):
        if drawn is not None:
            parts.append(markup.plot(drawn, number, legend if drawn.name == "latency" else ""))
    parts.append("</div>\n")
    parts.append(_gains(frame))
    parts.append(_effects(section.effects, number))
    parts.append(class_table(section.rows))
    losses = loss_plot(section.rows, directory)
    if losses is not None:
        parts.append(markup.plot(losses, number, markup.legend(frame["attentions"], {})))
    parts.append(_exhibit(section, number, directory))
    parts.append(_reproduce(section.rows))
    parts.append("</section>\n")
    return "".join(parts)


def _facts(section: Section) -> str:
    """The three numbers that a reader looks for first."""
    frame, text = section.frame, as_text(section.frame)
    facts = []
    if frame["AP"].notna().any():
        best = int(frame["AP"].fillna(-1.0).argmax())
        facts.append(("highest AP", text["AP"].iloc[best], _line_name(frame.iloc[best])))
    subject = subject_of(section)
    if subject is not None:
        cell = subject.row["cell"]
        wanted = [cell["detector"], "LSC", cell["depth"]]
        same = (frame[["detector", "attentions", "depth"]] == wanted).all(axis=1) & frame["delta_AP"].notna()
        if same.any():
            first = int(same.argmax())
            facts.append(("LSC against baseline", text["delta_AP"].iloc[first], f"AP, {_line_name(frame.iloc[first])}"))
    images = {count for row in section.rows if isinstance(count := row.get("images"), int)}
    if images:
        facts.append(("validation images", " and ".join(map(str, sorted(images))), ""))
    facts.append(("cells", str(len(frame)), f"{int(frame['seeds'].sum())} good runs"))
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>"
        for name, value, more in facts
    )
    return f'<dl class="facts">{items}</dl>\n'


def _line_name(line: pd.Series) -> str:
    depth = "" if pd.isna(line["depth"]) else f", depth {line['depth']}"
    return f"{line['detector']} {line['attentions']}{depth}"


def _gains(frame: pd.DataFrame) -> str:
    gains = gains_table(frame)
    if gains.empty:
        return ""
    return (
        f'<h3>{escape(GAINS_TITLE)}</h3>\n<p class="aside">{escape(GAINS_NOTE)}</p>\n{markup.table(gains, GAINS_TITLE)}'
    )


def _effects(effects: pd.DataFrame, number: int) -> str:
    drawn = effects_plot(effects)
    if drawn is None:
        return ""
    return (
        f"{markup.plot(drawn, number)}<details><summary>The same as numbers</summary>"
        f"{markup.table(effects_text(effects), EFFECTS_TITLE)}</details>\n{markup.notes(effects_notes(effects))}"
    )


def _exhibit(section: Section, number: int, directory: Path) -> str:
    subject = subject_of(section)
    if subject is None:
        return ""
    found = read_exhibit(directory, subject.row["key"])
    content = None
    if found is None:
        reason = "none was kept; a run makes it at its end, and so does python -m ablations.report DIR --data DATA"
    elif "reason" in found:
        reason = str(found["reason"])
    else:
        reason = "its file is not one that this version reads"
        with suppress(ValueError, TypeError, LookupError):
            content = exhibits.show(found, number)
    heading = f"<h3>Inside the attentions: {escape(name_of(subject.row))}</h3>\n"
    return heading + (content if content is not None else f'<p class="aside">No exhibit: {escape(reason)}.</p>\n')


def _reproduce(rows: list[Row]) -> str:
    machines = [machine_of(row) for row in rows]
    commits = list(dict.fromkeys(commit for machine in reversed(machines) if (commit := machine.get("commit"))))
    commands = dict.fromkeys(machine["command"] for machine in machines if machine.get("command"))
    checkout = [f"git checkout {commit}" for commit in commits[:1]]
    lines = [*checkout, "pip install -c constraints.txt -e '.[ablations]'", *commands]
    words = []
    if len(commits) > 1:
        words.append(f"Rows come from {len(commits)} commits, the latest first: {', '.join(commits)}.")
    if any(machine.get("dirty") for machine in machines):
        words.append("Some rows were made with uncommitted changes.")
    note = f'<p class="aside">{escape(" ".join(words))}</p>\n' if words else ""
    return f'<h3>How to reproduce</h3>\n{note}<pre tabindex="0">{escape(chr(10).join(lines))}</pre>\n'
