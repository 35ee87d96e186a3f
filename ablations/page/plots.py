"""The report's plots, each a list of panels of one size: a page puts as many side by side as fit."""

import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from ablations.rows.plots import (
    STYLE,
    bars_are,
    colour_of,
    compared,
    comparisons,
    draw_baseline,
    draw_point,
    markers_of,
    spread,
)

# Inches; a page shows 96 pixels of each, less on a phone.
SIZE = (4.6, 3.4)
BELOW, ABOVE = 0.45, 0.1
SMALL = 8


class Panel(NamedTuple):
    """A figure and the line above it."""

    title: str
    figure: Figure


class Plot(NamedTuple):
    """Panels that belong together.

    Attributes:
        name: A word for ids.
        title: What is shown, a few words.
        caption: How to read it.
        panels: At least one.
        mosaic: Whether the others are small ones around the first.
    """

    name: str
    title: str
    caption: str
    panels: list[Panel]
    mosaic: bool = False


def panel(
    draw: Callable[[Figure, Axes], None], size: tuple[float, float] = SIZE, left: float = 0.55, right: float = 0.12
) -> Figure:
    """A figure of one pair of axes that `draw` fills; `left` and `right` of them stay free, in inches as `size`."""
    width, height = size
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size)
        draw(
            figure,
            figure.add_axes((left / width, BELOW / height, 1 - (left + right) / width, 1 - (BELOW + ABOVE) / height)),
        )
    return figure


def ap_against_latency(frame: pd.DataFrame) -> Plot | None:
    """A panel a detector and formulation, a point a line of the table.

    None where no detector has more than a baseline and one line with DyHead; `gain_by_detector` shows those.
    """
    frame = compared(frame)
    if frame.empty:
        return None
    markers = markers_of(frame)
    limits = _limits(frame, "latency_ms_p50"), _limits(frame, "AP")

    def fill(part: pd.DataFrame) -> Callable[[Figure, Axes], None]:
        def draw(figure: Figure, axes: Axes) -> None:
            for _, line in part.iterrows():
                draw_point(axes, line, markers.get(line["depth"], "*"), _tip(line))
            draw_baseline(axes, part, vertical=True)
            axes.set(xlabel="latency at batch size 1, median (ms)", ylabel="AP (%)", xlim=limits[0], ylim=limits[1])
            _draw_frontier(figure, axes, part)

        return draw

    caption = f"The steps join the cells that none beats in both; dashed: the baseline. {bars_are(frame, True)}".strip()
    panels = [Panel(title, panel(fill(part))) for title, part in comparisons(frame)]
    return Plot("latency", "AP against latency", caption, panels)


def ap_against_depth(frame: pd.DataFrame) -> Plot | None:
    """One line a subset of the attentions, the baseline dashed. None where there are not two depths to compare."""
    frame = frame.dropna(subset=["AP"])
    if frame["depth"].nunique() < 2:
        return None
    limits = _limits(frame, "AP")

    def fill(part: pd.DataFrame) -> Callable[[Figure, Axes], None]:
        return lambda figure, axes: _draw_depths(figure, axes, part, limits)

    caption = f"One line a subset of the attentions; dashed: the baseline. {bars_are(frame)}".strip()
    panels = [Panel(title, panel(fill(part), right=0.7)) for title, part in comparisons(frame)]
    return Plot("depth", "AP against depth", caption, panels)


def _draw_depths(figure: Figure, axes: Axes, part: pd.DataFrame, limits: tuple[float, float]) -> None:
    depths = sorted(part["depth"].dropna().astype(int).unique())
    ends = [(depths[-1], line["AP"], "baseline") for _, line in _baseline(part).iterrows()]
    groups = list(part.dropna(subset=["depth"]).groupby("attentions", sort=False))
    # Lines of one depth stand beside each other, so that their bars can be told apart.
    step = 0.03 * (depths[-1] - depths[0])
    for number, (key, line) in enumerate(groups):
        attentions, line = str(key), line.sort_values("depth")
        bars = [spread(each, "AP") for _, each in line.iterrows()]
        axes.errorbar(
            line["depth"].astype(int) + step * (number - (len(groups) - 1) / 2) / 2,
            line["AP"],
            yerr=[value or 0.0 for value in bars] if any(bars) else None,
            color=colour_of(attentions),
            marker="o",
            markersize=4.5,
            linewidth=2.2 if attentions == "LSC" else 1.3,
            elinewidth=0.8,
        )[0].set_gid(f"tip:{attentions}")
        ends.append((int(line["depth"].iloc[-1]), line["AP"].iloc[-1], attentions))
    draw_baseline(axes, part, vertical=False)
    axes.set_xticks(depths)
    axes.set(xlabel="depth (blocks)", ylabel="AP (%)", ylim=limits)
    axes.margins(x=0.06)
    name_ends(figure, axes, ends)


def gain_by_detector(frame: pd.DataFrame) -> Plot | None:
    """From each detector's baseline to its best line with DyHead, in AP and latency. None below two such detectors."""
    pairs = []
    for detector, part in frame.dropna(subset=["AP", "latency_ms_p50"]).groupby("detector", sort=False):
        baseline, others = _baseline(part), part[part["attentions"] != "baseline"]
        if len(baseline) and len(others):
            pairs.append((str(detector), baseline.iloc[0], others.iloc[int(others["AP"].argmax())]))
    if len(pairs) < 2:
        return None
    palette = matplotlib.colormaps["tab10"]

    def draw_gains(figure: Figure, axes: Axes) -> None:
        for height, (_, baseline, best) in enumerate(reversed(pairs)):
            axes.plot([baseline["AP"], best["AP"]], [height, height], color="#888888", linewidth=1.6, zorder=2)
            axes.plot(baseline["AP"], height, "*", markersize=11, color="black", zorder=3)
            axes.plot(best["AP"], height, "o", markersize=7, color=palette((len(pairs) - 1 - height) % 10), zorder=3)
            half = spread(best, "AP")
            gain = f"{best['AP'] - baseline['AP']:+.1f}" + (f" ± {half:.1f}" if half else "")
            name = f"{gain}  ({best['attentions']}, depth {best['depth']})"
            right = max(baseline["AP"], best["AP"])
            axes.annotate(name, (right, height), (8, 0), textcoords="offset points", va="center", fontsize=SMALL)
        axes.set_yticks(range(len(pairs)), [detector for detector, _, _ in reversed(pairs)])
        axes.set_xlabel("AP (%)")
        axes.margins(x=0.08, y=0.12)
        axes.set_xlim(right=axes.get_xlim()[1] + 0.75 * (axes.get_xlim()[1] - axes.get_xlim()[0]))
        axes.grid(axis="y", visible=False)

    def draw_plane(figure: Figure, axes: Axes) -> None:
        for number, (_, baseline, best) in enumerate(pairs):
            colour = palette(number % 10)
            ends = [baseline["latency_ms_p50"], best["latency_ms_p50"]], [baseline["AP"], best["AP"]]
            axes.plot(*ends, color=colour, linewidth=1.2)
            axes.plot(baseline["latency_ms_p50"], baseline["AP"], "*", markersize=11, color=colour)
            axes.plot(best["latency_ms_p50"], best["AP"], "o", markersize=6, color=colour)
        axes.set(xlabel="latency at batch size 1, median (ms)", ylabel="AP (%)")
        axes.margins(0.12)
        name_ends(figure, axes, [(b["latency_ms_p50"], b["AP"], detector) for detector, _, b in pairs])

    size = (SIZE[0], max(SIZE[1], 1.0 + 0.3 * len(pairs)))
    panels = [
        Panel("gain in AP", panel(draw_gains, size, 0.95)),
        Panel("AP and latency", panel(draw_plane, size, right=0.9)),
    ]
    caption = "★ own towers (baseline), ● best of its DyHead cells, which is the luckiest one as well."
    return Plot("gain", "Each detector with its own towers and with DyHead", caption, panels)


def _limits(frame: pd.DataFrame, name: str) -> tuple[float, float]:
    """Limits that all panels share, with the error bars inside."""
    bars = [(line[name], spread(line, name) or 0.0) for _, line in frame.iterrows()]
    low, high = min(value - bar for value, bar in bars), max(value + bar for value, bar in bars)
    room = 0.12 * (high - low) or 1.0
    return low - room, high + room


def _tip(line: pd.Series) -> str:
    depth = "" if pd.isna(line["depth"]) else f", depth {line['depth']}"
    half = spread(line, "AP")
    width = f" ± {half:.1f}" if half else ""
    return f"{line['attentions']}{depth}: AP {line['AP']:.1f}{width}, {line['latency_ms_p50']:.3g} ms"


def _baseline(part: pd.DataFrame) -> pd.DataFrame:
    return part[part["attentions"] == "baseline"]


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
            zorder=6,
        )
        figure.draw_without_rendering()
        extent = name.get_window_extent()
        if any(extent.overlaps(other) for other in taken):
            name.remove()
        else:
            taken.append(extent)


def name_ends(figure: Figure, axes: Axes, ends: Iterable[tuple[float, float, str]]) -> None:
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
            (16, (placed - shift - height) * 72 / figure.dpi),
            textcoords="offset points",
            color=colour_of(name),
            va="center",
            fontsize=SMALL,
            fontweight="bold" if name == "LSC" else "normal",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour_of(name), "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3},
        )
