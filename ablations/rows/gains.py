"""What DyHead adds to each detector, beside what the paper prints for it."""

import pandas as pd

from ablations.rows.frame import delta_text
from ablations.rows.printed import DETECTORS_AP, DETECTORS_SOURCE

COLUMNS = ("detector", "depth", "formulation", "baseline", "LSC", "gain", "paper_baseline", "paper_LSC", "paper_gain")
GAINS_TITLE = "Gain of DyHead over each detector's own head"
GAINS_NOTE = (
    "AP of baseline and LSC in percent, gain in points, with its interval as in the table above. "
    f"paper_*: {DETECTORS_SOURCE}; empty where it prints no such pair."
)


def gains_table(frame: pd.DataFrame) -> pd.DataFrame:
    """One line for each LSC cell of a detector that has a baseline, as text; no line below two such detectors.

    Args:
        frame: A section's (`ablations.rows.frame.make_frame`).

    Returns:
        `COLUMNS`; empty where there is no number, the gain with its interval as in the table.
    """
    baselines = frame[frame["attentions"] == "baseline"].set_index("detector")["AP"]
    full = frame[(frame["attentions"] == "LSC") & frame["detector"].isin(baselines.index)]
    if full["detector"].nunique() < 2:
        full = full[:0]
    lines = [_gain(line, baselines[line["detector"]]) for _, line in full.iterrows()]
    return pd.DataFrame(lines, columns=COLUMNS, dtype=str)


def _gain(line: pd.Series, baseline: float) -> dict[str, str]:
    shown = {
        "detector": line["detector"],
        "depth": str(line["depth"]),
        "formulation": line["formulation"],
        "baseline": _number(baseline),
        "LSC": _number(line["AP"]),
        "gain": delta_text(line),
    }
    if line["detector"] not in DETECTORS_AP:
        return shown | dict.fromkeys(COLUMNS[-3:], "")
    before, after = DETECTORS_AP[line["detector"]]
    return shown | {
        "paper_baseline": _number(before),
        "paper_LSC": _number(after),
        "paper_gain": _number(after - before, "+"),
    }


def _number(value: float | None, sign: str = "") -> str:
    return "" if value is None or pd.isna(value) else f"{value:{sign}.1f}"
