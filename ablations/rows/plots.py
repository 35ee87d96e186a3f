"""What the pictures of the report and of the README have in common: colours, markers, points, error bars, baselines.

Matplotlib figures without pyplot, so nothing global is touched; the same rows give the same SVG text.
"""

import io
import re
from typing import TYPE_CHECKING, Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

STYLE: "dict[RcKeyType, Any]" = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "svg.fonttype": "path",
}
# Okabe and Ito's colours, which colour-blind readers can tell apart; the baseline is black and has its own marker.
COLOURS = {
    "none": "#999999",
    "L": "#56b4e9",
    "S": "#e69f00",
    "C": "#009e73",
    "LS": "#0072b2",
    "LC": "#cc79a7",
    "SC": "#d55e00",
    "LSC": "#7a0177",
}
# By depth, from the shallowest on.
MARKERS = "os^DvPX<>"


def to_svg(figure: Figure, name: str, fonttype: str = "path") -> str:
    """The figure as an `<svg>` element; `name` keeps its ids apart from those of other figures of a page.

    Letters are paths, which look alike everywhere, or with `fonttype="none"` text in the fonts of the reader.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name, "svg.fonttype": fonttype}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=fonttype == "none")
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\bid=\"", f'id="{name}-', text)
    return re.sub(r"(url\(#|href=\"#)", rf"\g<1>{name}-", text)


def markers_of(frame: pd.DataFrame) -> dict[int, str]:
    """A marker for each depth of a frame."""
    depths = sorted(frame["depth"].dropna().unique())
    return {depth: MARKERS[index % len(MARKERS)] for index, depth in enumerate(depths)}


def compared(frame: pd.DataFrame) -> pd.DataFrame:
    """The lines with AP and latency, of detectors that have more than a baseline and one line with DyHead."""
    frame = frame.dropna(subset=["AP", "latency_ms_p50"])
    return frame[frame.groupby("detector")["AP"].transform("size") > 2]


def comparisons(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """What one panel shows, with its title: a detector and formulation, and in each the detector's baseline."""
    parts = []
    for detector, part in frame.groupby("detector", sort=False):
        baseline = part["attentions"] == "baseline"
        formulations = list(dict.fromkeys(part.loc[~baseline, "formulation"]))
        for formulation in formulations:
            title = f"{detector}, {formulation}" if len(formulations) > 1 else str(detector)
            parts.append((title, part[baseline | (part["formulation"] == formulation)]))
    return parts


def colour_of(attentions: str) -> str:
    return "black" if attentions == "baseline" else COLOURS.get(attentions, "#444444")


def spread(line: pd.Series, name: str) -> float | None:
    """Half the length of an error bar: of AP the half-width of the interval of `delta_AP`, else the deviation.

    None where the line has neither. Within one frame all bars of AP are of one kind: `bars_are`.
    """
    column = "delta_AP_half_width" if name == "AP" and "delta_AP_half_width" in line else f"{name}_std"
    value = line.get(column)
    return None if value is None or pd.isna(value) else float(value)


def bars_are(frame: pd.DataFrame, latency: bool = False) -> str:
    """What the error bars of AP, and of latency where it is an axis, are, for a caption; empty where there are none."""
    parts = []
    if "delta_AP_half_width" in frame:
        if frame["delta_AP_half_width"].notna().any():
            parts.append("Bars of AP: 95 % interval of the difference from the baseline.")
    elif "AP_std" in frame and frame["AP_std"].notna().any():
        parts.append("Bars of AP: sample standard deviation over the seeds.")
    if latency and "latency_ms_p50_std" in frame and frame["latency_ms_p50_std"].notna().any():
        parts.append("Bars of latency: sample standard deviation over the seeds.")
    return " ".join(parts)


def draw_point(axes: Axes, line: pd.Series, marker: str, tip: str = "") -> None:
    """A line of the table at its latency and AP, with error bars; `tip` is shown by a page under the pointer."""
    baseline = line["attentions"] == "baseline"
    bars = axes.errorbar(
        line["latency_ms_p50"],
        line["AP"],
        xerr=spread(line, "latency_ms_p50"),
        yerr=spread(line, "AP"),
        marker="*" if baseline else marker,
        markersize=14 if baseline else 7,
        color=colour_of(line["attentions"]),
        markeredgecolor="white",
        markeredgewidth=0.6,
        elinewidth=0.9,
        zorder=5 if baseline else 4,
    )
    for part in bars[2]:
        part.set_alpha(0.5)
    if tip:
        bars[0].set_gid(f"tip:{tip}")


def draw_baseline(axes: Axes, part: pd.DataFrame, vertical: bool) -> None:
    """Dashed lines at the baseline's AP and, if `vertical`, its latency."""
    for _, line in part[part["attentions"] == "baseline"].iterrows():
        style: dict[str, Any] = {"color": "black", "linewidth": 0.9, "linestyle": (0, (4, 3)), "zorder": 1}
        axes.axhline(line["AP"], **style)
        if vertical:
            axes.axvline(line["latency_ms_p50"], **style)
        elif deviation := spread(line, "AP"):
            low, high = line["AP"] - deviation, line["AP"] + deviation
            axes.axhspan(low, high, color="black", alpha=0.07, linewidth=0, zorder=0)
