"""What DyHead adds to each detector, beside what the paper prints for it."""

import pandas as pd

from ablations.rows.printed import DETECTORS_AP, DETECTORS_SOURCE

COLUMNS = ("detector", "depth", "formulation", "baseline", "LSC", "gain", "paper_baseline", "paper_LSC", "paper_gain")
GAINS_TITLE = "Gain of DyHead over each detector's own head"
GAINS_NOTE = (
    "AP of baseline and LSC in percent, gain in points. "
    f"paper_*: {DETECTORS_SOURCE}; empty where it prints no such pair."
)


def gains_table(frame: pd.DataFrame) -> pd.DataFrame:
    """One line for each LSC cell of a detector that has a baseline, as text; no line below two such detectors.

    Args:
        frame: Of `ablations.rows.tables.make_frame`.

    Returns:
        `COLUMNS`; empty where there is no number, `gain ± deviation` where there are several seeds.
    """
    own = frame[frame["attentions"] == "baseline"].set_index("detector")["AP"]
    full = frame[(frame["attentions"] == "LSC") & frame["detector"].isin(own.index)]
    if full["detector"].nunique() < 2:
        full = full[:0]
    return pd.DataFrame([_line(line, own[line["detector"]]) for _, line in full.iterrows()], columns=COLUMNS, dtype=str)


def _line(line: pd.Series, baseline: float) -> dict[str, str]:
    gain, deviation = _text(line["delta_AP"], "+"), _text(line.get("delta_AP_std"))
    shown = {
        "detector": line["detector"],
        "depth": str(line["depth"]),
        "formulation": line["formulation"],
        "baseline": _text(baseline),
        "LSC": _text(line["AP"]),
        "gain": f"{gain} ± {deviation}" if deviation else gain,
    }
    before, after = DETECTORS_AP.get(line["detector"], (None, None))
    if before is None:
        return shown | dict.fromkeys(COLUMNS[-3:], "")
    return shown | {
        "paper_baseline": _text(before),
        "paper_LSC": _text(after),
        "paper_gain": _text(after - before, "+"),
    }


def _text(value: float | None, sign: str = "") -> str:
    return "" if value is None or pd.isna(value) else f"{value:{sign}.1f}"
