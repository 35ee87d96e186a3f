"""A section as LaTeX, for a two-column paper."""

from collections.abc import Iterable

import pandas as pd

from ablations.rows.effects import EFFECTS_TITLE, effects_notes, effects_text
from ablations.rows.frame import TEXTS, as_text
from ablations.rows.gains import GAINS_NOTE, GAINS_TITLE, gains_table
from ablations.rows.sections import Section

HEADINGS = {
    "AP50": "AP$_{50}$",
    "AP75": "AP$_{75}$",
    "APs": "AP$_S$",
    "APm": "AP$_M$",
    "APl": "AP$_L$",
    "delta_AP": r"$\Delta$AP",
    "paper_AP": "AP (paper)",
    "segm_AP": "AP$^{mask}$",
    "params_M": "params (M)",
    "images_per_s": "images/s",
    "latency_ms_p50": "ms (p50)",
    "latency_ms_p90": "ms (p90)",
    "peak_memory_MB": "MB",
}
ESCAPES = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}


def to_latex(section: Section, number: int = 1) -> str:
    """A `table*` for two-column papers, with one of the effects and one of the gains where there are some; booktabs.

    Columns without any value are left out.
    """
    table = _table(as_text(section.frame), section.title, f"tab:dyhead-ablation-{number}")
    text = f"% {section.machine}\n{_comments(section.notes)}{table}"
    if not section.effects.empty:
        text += _comments(effects_notes(section.effects))
        text += _table(effects_text(section.effects), EFFECTS_TITLE, f"tab:dyhead-effects-{number}")
    gains = gains_table(section.frame)
    return text if gains.empty else f"{text}% {GAINS_NOTE}\n{_table(gains, GAINS_TITLE, f'tab:dyhead-gains-{number}')}"


def _comments(notes: Iterable[str]) -> str:
    return "".join(f"% {' '.join(note.split())}\n" for note in notes)


def _table(text: pd.DataFrame, caption: str, label: str) -> str:
    text = text[[name for name in text if (text[name] != "").any()]].map(_escape)
    align = "".join("l" if name in TEXTS else "r" for name in text)
    text.columns = [HEADINGS.get(name, _escape(name)) for name in map(str, text)]
    tabular = text.to_latex(index=False, escape=False, column_format=align)
    return (
        "\\begin{table*}[t]\n\\centering\n\\scriptsize\n\\setlength{\\tabcolsep}{3pt}\n"
        f"\\caption{{{_escape(caption)}}}\n\\label{{{label}}}\n"
        f"{tabular}\\end{{table*}}\n"
    )


def _escape(text: str) -> str:
    return "".join(ESCAPES.get(character, character) for character in text)
