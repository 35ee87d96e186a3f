"""The report's pictures, from a table's frame: AP against latency, AP against depth, the gain of each detector.

Matplotlib figures without pyplot, so nothing global is touched; the same rows give the same SVG text.
"""

import io
import itertools
import re
from typing import TYPE_CHECKING, Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

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
    "legend.fontsize": 8,
    "legend.frameon": False,
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
PANEL = (5.2, 3.6)
MOST_COLUMNS = 2
SMALL = 8


def ap_against_latency(frame: pd.DataFrame) -> Figure | None:
    """A panel a detector, a point a line of the table; the steps join the points that none beats in both.

    None where no detector has more than a baseline and one line with DyHead; `gain_by_detector` shows those.
    """
    frame = compared(frame)
    if frame.empty:
        return None
    depths = sorted(frame["depth"].dropna().unique())
    markers = {depth: MARKERS[index % len(MARKERS)] for index, depth in enumerate(depths)}
    with matplotlib.rc_context(STYLE):
        figure, panels = _panels(frame)
        for axes, part in panels:
            for _, line in part.iterrows():
                draw_point(axes, line, markers.get(line["depth"], "*"))
            draw_baseline(axes, part, vertical=True)
            axes.set_xlabel("latency at batch size 1, median (ms)")
            axes.set_ylabel("AP (%)")
            axes.margins(0.12)
        _draw_legend(figure, frame, markers)
        for axes, part in panels:
            _draw_frontier(figure, axes, part)
    return figure


def ap_against_depth(frame: pd.DataFrame) -> Figure | None:
    """One line a subset of the attentions, the baseline dashed. None where there are not two depths to compare."""
    frame = frame.dropna(subset=["AP"])
    if frame["depth"].nunique() < 2:
        return None
    with matplotlib.rc_context(STYLE):
        figure, panels = _panels(frame)
        for axes, part in panels:
            depths = sorted(part["depth"].dropna().astype(int).unique())
            ends = [(depths[-1], line["AP"], "baseline") for _, line in _baseline(part).iterrows()]
            blocks = part.dropna(subset=["depth"])
            for key, line in blocks.groupby("attentions", sort=False):
                attentions = str(key)
                line = line.sort_values("depth")
                axes.errorbar(
                    line["depth"].astype(int),
                    line["AP"],
                    yerr=line["AP_std"].fillna(0) if "AP_std" in line else None,
                    color=colour_of(attentions),
                    marker="o",
                    markersize=5,
                    linewidth=2.2 if attentions == "LSC" else 1.4,
                    elinewidth=0.9,
                    capsize=2,
                )
                ends.append((int(line["depth"].iloc[-1]), line["AP"].iloc[-1], attentions))
            draw_baseline(axes, part, vertical=False)
            axes.set_xticks(depths)
            axes.set_xlabel("depth (blocks)")
            axes.set_ylabel("AP (%)")
            axes.margins(x=0.06, y=0.1)
            _name_ends(figure, axes, ends)
    return figure


def gain_by_detector(frame: pd.DataFrame) -> Figure | None:
    """From each detector's baseline to its best line with DyHead, in AP and latency. None below two such detectors."""
    pairs = []
    for detector, part in frame.dropna(subset=["AP", "latency_ms_p50"]).groupby("detector", sort=False):
        baseline, others = _baseline(part), part[part["attentions"] != "baseline"]
        if len(baseline) and len(others):
            pairs.append((str(detector), baseline.iloc[0], others.iloc[int(others["AP"].argmax())]))
    if len(pairs) < 2:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.6, 1.6 + 0.36 * len(pairs)), layout="constrained")
        bars, plane = figure.subplots(1, 2, width_ratios=(1, 1))
        palette = matplotlib.colormaps["tab10"]
        for height, (_, baseline, best) in enumerate(reversed(pairs)):
            colour = palette((len(pairs) - 1 - height) % 10)
            bars.plot([baseline["AP"], best["AP"]], [height, height], color="#bbbbbb", linewidth=2, zorder=2)
            bars.plot(baseline["AP"], height, "*", markersize=12, color="black", zorder=3)
            bars.plot(best["AP"], height, "o", markersize=8, color=colour, zorder=3)
            name = f"{best['AP'] - baseline['AP']:+.1f}  ({best['attentions']}, depth {best['depth']})"
            right = max(baseline["AP"], best["AP"])
            bars.annotate(name, (right, height), (9, 0), textcoords="offset points", va="center", fontsize=SMALL)
            plane.plot(
                [baseline["latency_ms_p50"], best["latency_ms_p50"]],
                [baseline["AP"], best["AP"]],
                color=colour,
                linewidth=1.2,
            )
            plane.plot(baseline["latency_ms_p50"], baseline["AP"], "*", markersize=12, color=colour)
            plane.plot(best["latency_ms_p50"], best["AP"], "o", markersize=7, color=colour)
        bars.set_yticks(range(len(pairs)), [detector for detector, _, _ in reversed(pairs)])
        bars.set_xlabel("AP (%): ★ own towers (baseline), ● best with DyHead")
        bars.margins(x=0.12, y=0.12)
        bars.set_xlim(right=bars.get_xlim()[1] + 0.45 * (bars.get_xlim()[1] - bars.get_xlim()[0]))
        bars.grid(axis="y", visible=False)
        plane.set_xlabel("latency at batch size 1, median (ms)")
        plane.set_ylabel("AP (%)")
        plane.margins(0.12)
        _name_ends(figure, plane, [(b["latency_ms_p50"], b["AP"], detector) for detector, _, b in pairs])
    return figure


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element for a page; `name` keeps its ids apart from those of other figures."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\bid=\"", f'id="{name}-', text)
    return re.sub(r"(url\(#|href=\"#)", rf"\g<1>{name}-", text)


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


def _panels(frame: pd.DataFrame) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """A figure with one panel a detector and formulation."""
    parts = comparisons(frame)
    columns = min(len(parts), MOST_COLUMNS)
    rows = -(-len(parts) // columns)
    figure = Figure(figsize=(PANEL[0] * columns + 1.1, PANEL[1] * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for panel, (title, _) in zip(axes, parts, strict=False):
        panel.set_title(title)
        panel.tick_params(labelbottom=True, labelleft=True)
    for unused in axes[len(parts) :]:
        unused.set_axis_off()
    return figure, [(panel, part) for panel, (_, part) in zip(axes, parts, strict=False)]


def _baseline(part: pd.DataFrame) -> pd.DataFrame:
    return part[part["attentions"] == "baseline"]


def colour_of(attentions: str) -> str:
    return "black" if attentions == "baseline" else COLOURS.get(attentions, "#444444")


def _deviation(line: pd.Series, name: str) -> float | None:
    value = line.get(f"{name}_std")
    return None if value is None or pd.isna(value) else value


def draw_point(axes: Axes, line: pd.Series, marker: str) -> None:
    baseline = line["attentions"] == "baseline"
    axes.errorbar(
        line["latency_ms_p50"],
        line["AP"],
        xerr=_deviation(line, "latency_ms_p50"),
        yerr=_deviation(line, "AP"),
        marker="*" if baseline else marker,
        markersize=14 if baseline else 7,
        color=colour_of(line["attentions"]),
        markeredgecolor="white",
        markeredgewidth=0.6,
        elinewidth=0.9,
        zorder=5 if baseline else 4,
    )


def draw_baseline(axes: Axes, part: pd.DataFrame, vertical: bool) -> None:
    for _, line in _baseline(part).iterrows():
        style: dict[str, Any] = {"color": "black", "linewidth": 0.9, "linestyle": (0, (4, 3)), "zorder": 1}
        axes.axhline(line["AP"], **style)
        if vertical:
            axes.axvline(line["latency_ms_p50"], **style)
        elif deviation := _deviation(line, "AP"):
            low, high = line["AP"] - deviation, line["AP"] + deviation
            axes.axhspan(low, high, color="black", alpha=0.07, linewidth=0, zorder=0)


def _draw_legend(figure: Figure, frame: pd.DataFrame, markers: dict[int, str]) -> None:
    def entry(label: str, marker: str, colour: str, size: float = 7) -> Line2D:
        return Line2D([], [], linestyle="", marker=marker, markersize=size, color=colour, label=label)

    present = set(frame["attentions"])
    handles = [entry("baseline", "*", "black", 11)] if "baseline" in present else []
    handles += [entry(name, "o", colour) for name, colour in COLOURS.items() if name in present]
    handles += [entry(f"depth {depth}", marker, "#555555") for depth, marker in markers.items()]
    figure.legend(handles=handles, loc="outside right upper", handletextpad=0.2)


def _draw_frontier(figure: Figure, axes: Axes, part: pd.DataFrame) -> None:
    """Join and name the points that no other beats in both AP and latency.

    Nothing lies up and to the left of such a point, so that is where its name is put. Of names that would lie on each
    other the one with the higher AP stays.
    """
    frontier, best = [], float("-inf")
    for _, line in part.sort_values(["latency_ms_p50", "AP"], ascending=[True, False]).iterrows():
        if line["AP"] > best:
            frontier.append(line)
            best = line["AP"]
    corners = [(line["latency_ms_p50"], line["AP"]) for line in frontier]
    axes.step(*zip(*corners, strict=True), where="post", color="#888888", linewidth=1, zorder=2)
    taken: list[Bbox] = []
    for line, corner in reversed(list(zip(frontier, corners, strict=True))):
        if line["attentions"] == "baseline":
            continue
        name = axes.annotate(
            f"{line['attentions']}, depth {line['depth']}",
            corner,
            (-5, 4),
            textcoords="offset points",
            ha="right",
            fontsize=SMALL,
            zorder=3,
        )
        figure.draw_without_rendering()
        extent = name.get_window_extent()
        if any(extent.overlaps(other) for other in taken):
            name.remove()
        else:
            taken.append(extent)


def _name_ends(figure: Figure, axes: Axes, ends: list[tuple[float, float, str]]) -> None:
    """Name points on their right, the names pushed apart where they would overlap."""
    figure.draw_without_rendering()
    gap = 11 * figure.dpi / 72
    names = []
    for x, y, name in sorted(ends, key=lambda end: end[1]):
        height = axes.transData.transform((x, y))[1]
        names.append([height, height, x, y, name])
    for lower, upper in itertools.pairwise(names):
        upper[1] = max(upper[1], lower[1] + gap)
    # The pile goes down again by what it was pushed up on average, so names stay about as high as their points.
    shift = sum(placed - height for height, placed, *_ in names) / len(names)
    for height, placed, x, y, name in names:
        axes.annotate(
            name,
            (x, y),
            (14, (placed - shift - height) * 72 / figure.dpi),
            textcoords="offset points",
            color=colour_of(name),
            va="center",
            fontsize=SMALL,
            fontweight="bold" if name == "LSC" else "normal",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour_of(name), "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3},
        )
