"""The tables of a directory: `table.csv`, `table.md`, `table.tex`, and `effects.csv` where there are effects.

`table.md` and `table.tex` hold all sections, each behind its machine line; a CSV file holds one: `table.csv` the one
that was started first, `table-2.csv`, `table-3.csv`, ... the others in the order in which they were started.
"""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from ablations.files import atomic_write_text
from ablations.rows.effects import EFFECTS_TITLE, effects_notes, effects_text
from ablations.rows.frame import TEXTS, as_text
from ablations.rows.gains import GAINS_NOTE, GAINS_TITLE, gains_table
from ablations.rows.latex import to_latex
from ablations.rows.row import Row
from ablations.rows.sections import Section, make_sections
from ablations.rows.statistics import stored_replicates

# The columns of a table that is read in passing.
SUMMARY = ("detector", "attentions", "depth", "AP", "delta_AP", "params_M", "latency_ms_p50")


def write_tables(rows: Iterable[Row], directory: str | Path) -> list[Path]:
    """Write `table.csv` (and `table-2.csv`, ...), `table.md`, `table.tex` and `effects.csv` into `directory`.

    Args:
        rows: What the tables are made of (`read_rows`).
        directory: Where they go, and where the rows' replicates lie. Tables of an earlier time that these rows do not
            make are removed.

    Returns:
        The files.

    Raises:
        ValueError: There are no rows.
        OSError: A file cannot be written.
    """
    directory = Path(directory)
    sections = make_sections(rows, stored_replicates(directory))
    if not sections:
        raise ValueError(f"{directory} holds no rows to make a table of")
    texts = {}
    for n, section in enumerate(sections, 1):
        number = f"-{n}" if n > 1 else ""
        texts[f"table{number}.csv"] = _csv(section.machine, section.frame)
        if not section.effects.empty:
            texts[f"effects{number}.csv"] = _csv(section.machine, section.effects)
    for path in [*directory.glob("table-*.csv"), *directory.glob("effects*.csv")]:
        if path.name not in texts:
            path.unlink(missing_ok=True)
    texts["table.md"] = "\n".join(map(to_markdown, sections))
    texts["table.tex"] = "\n".join(to_latex(section, number) for number, section in enumerate(sections, 1))
    for name, text in texts.items():
        atomic_write_text(directory / name, text)
    return [directory / name for name in texts]


def to_csv(section: Section) -> str:
    """The machine line as a comment, then the numbers: `pandas.read_csv(path, comment="#")` reads them back."""
    return _csv(section.machine, section.frame)


def _csv(machine: str, frame: pd.DataFrame) -> str:
    return f"# {machine}\n" + frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def to_markdown(section: Section) -> str:
    """The machine line, the title, the table and its notes; then the effects and the gains, where there are some."""
    text = f"{section.machine}\n\n**{section.title}**\n\n{_markdown(as_text(section.frame))}\n\n{_list(section.notes)}"
    if not section.effects.empty:
        effects = _markdown(effects_text(section.effects))
        text += f"\n**{EFFECTS_TITLE}**\n\n{effects}\n\n{_list(effects_notes(section.effects))}"
    gains = gains_table(section.frame)
    return text if gains.empty else f"{text}\n**{GAINS_TITLE}**\n\n{_markdown(gains)}\n\n{_list([GAINS_NOTE])}"


def to_summary(section: Section) -> str:
    """The columns of `SUMMARY`, and what `delta_AP` is worth: for a README, the machine line as its last note."""
    text = as_text(section.frame)
    names = [name for name in SUMMARY if name != "detector" or text["detector"].nunique() > 1]
    return f"{_markdown(text[names])}\n\n{_list([*section.statistics.notes(), section.machine])}"


def _list(notes: Iterable[str]) -> str:
    return "".join(f"- {note}\n" for note in notes)


def _markdown(text: pd.DataFrame) -> str:
    text = text.map(lambda cell: cell.replace("|", "\\|"))
    align = ["left" if name in TEXTS else "right" for name in text]
    return text.to_markdown(index=False, colalign=align, disable_numparse=True)
