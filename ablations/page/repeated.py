"""Plots of what was repeated: effects of the attentions with their intervals, and loss curves of every seed."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ablations.experiment.curve import CURVE, read_curve
from ablations.page.plots import Panel, Plot, panel
from ablations.rows.effects import ALL, EFFECTS, EFFECTS_TITLE
from ablations.rows.frame import SUBSETS, formulation_name
from ablations.rows.plots import MARKERS, colour_of
from ablations.rows.row import Row

# Inches; of the small panels a phone shows two side by side.
LARGE, SMALL = (4.6, 4.5), (2.3, 2.15)
ERRORS = ("cls", "loc", "both", "dup", "bkg", "miss")
# Points of a loss curve: more cannot be told apart in a panel.
POINTS = 100
Curve = list[tuple[float, float]]


def effects_plot(effects: pd.DataFrame) -> Plot | None:
    """The effects on AP by depth, then those on every other metric over all depths.

    Args:
        effects: A section's (`ablations.rows.effects.effects_table`).

    Returns:
        None where there is none.
    """
    if effects.empty:
        return None
    groups = list(effects.groupby(["detector", "formulation"], sort=False))
    panels = []
    for (detector, formulation), part in groups:
        name = f"{detector}, {formulation}: " if len(groups) > 1 else ""
        depths = list(dict.fromkeys(part["depth"]))
        on_ap = part[part["metric"] == "AP"]
        if len(on_ap):
            panels.append(Panel(f"{name}AP", panel(_dots(on_ap, depths), LARGE, 0.62)))
        last = ALL if ALL in depths else depths[-1]
        for metric, lines in part[(part["metric"] != "AP") & (part["depth"] == last)].groupby("metric", sort=False):
            title = f"{name}{metric}{' (errors)' if metric in ERRORS else ''}"
            panels.append(Panel(title, panel(_dots(lines, [last]), SMALL, 0.62, 0.05)))
    caption = (
        "Points gained where the attention is on, mean over the settings of the others; ×: an interaction. ◆: over "
        "all depths. Bars: 95 % intervals; filled: p < 0.05, corrected. Errors: points of AP50 that an error type "
        "costs, so less is better."
    )
    return Plot("effects", EFFECTS_TITLE, caption, panels, mosaic=True) if panels else None


def _dots(lines: pd.DataFrame, depths: Sequence[object]) -> Callable[[Figure, Axes], None]:
    names = [name for name in EFFECTS if name in set(lines["effect"])]

    def draw(figure: Figure, axes: Axes) -> None:
        axes.axvline(0, color="black", linewidth=0.9, zorder=1)
        for _, line in lines.iterrows():
            position = depths.index(line["depth"])
            whole = line["depth"] == ALL
            height = names.index(line["effect"]) + (position - (len(depths) - 1) / 2) * 0.6 / len(depths)
            colour = colour_of(line["effect"].replace("×", ""))
            half = line["half_width"]
            sure = pd.notna(line["p"]) and line["p"] < 0.05
            depth = "all depths" if whole else f"depth {line['depth']}"
            width = f" ± {half:.2f}" if pd.notna(half) else ""
            axes.errorbar(
                line["value"],
                height,
                xerr=None if pd.isna(half) else half,
                marker="D" if whole else MARKERS[position % len(MARKERS)],
                markersize=6 if whole else 4.5,
                color=colour,
                markerfacecolor=colour if sure else "white",
                elinewidth=1.6 if whole else 0.9,
                zorder=3,
            )[0].set_gid(f"tip:{line['effect']}, {depth}: {line['value']:+.2f}{width}")
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel("points")
        axes.margins(x=0.12)
        axes.grid(axis="y", visible=False)

    return draw


def loss_plot(rows: Iterable[Row], directory: Path) -> Plot | None:
    """The training loss of every cell whose curve was kept, a panel a depth, with the baseline in each; else None."""
    curves: defaultdict[tuple[str, str, int | None], defaultdict[str, list[Curve]]]
    curves = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cell = row["cell"]
        formulation = formulation_name(cell.get("formulation"), None, cell.get("placement"))
        curve = read_losses(directory, row["key"])
        if curve:
            curves[cell["detector"], formulation, cell["depth"]][cell["attentions"]].append(curve)
    baselines = {
        detector: by["baseline"] for (detector, _, depth), by in curves.items() if depth is None and "baseline" in by
    }
    shown = [(key, by) for key, by in curves.items() if key[2] is not None]
    if not shown:
        shown = list(curves.items())
    detectors, formulations = ({key[part] for key, _ in shown} for part in (0, 1))
    panels = []
    for (detector, formulation, depth), by in sorted(shown, key=lambda each: str(each[0])):
        words = [detector] * (len(detectors) > 1) + [formulation] * (len(formulations) > 1)
        words += [] if depth is None else [f"depth {depth}"]
        together = {"baseline": baselines.get(detector, []), **by}
        panels.append(Panel(", ".join(words) or detector, panel(_losses(together))))
    caption = "Training loss, thin: each seed, thick: their mean. Losses of different heads are different sums."
    return Plot("losses", "Loss curves", caption, panels) if panels else None


def read_losses(directory: Path, key: str) -> Curve:
    """Step and loss of a cell, at most `POINTS` of them, each the mean of its neighbours; empty where none was kept."""
    try:
        lines = read_curve(directory / "cells" / key / CURVE)
        curve = [(float(line["step"]), float(line["loss"])) for line in lines if line["loss"] is not None]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    if len(curve) <= POINTS:
        return curve
    return [tuple(part.mean(0).tolist()) for part in np.array_split(np.array(curve), POINTS)]


def _losses(by_attentions: dict[str, list[Curve]]) -> Callable[[Figure, Axes], None]:
    def draw(figure: Figure, axes: Axes) -> None:
        for attentions in ("baseline", *SUBSETS):
            curves = [curve for curve in by_attentions.get(attentions, []) if curve]
            if not curves:
                continue
            colour = colour_of(attentions)
            if len(curves) > 1:
                for curve in curves:
                    axes.plot(*zip(*curve, strict=True), color=colour, linewidth=0.5, alpha=0.4)
            shortest = min(map(len, curves))
            mean = np.mean([curve[:shortest] for curve in curves], axis=0)
            style = "--" if attentions == "baseline" else "-"
            thick = 2.0 if attentions == "LSC" else 1.2
            (line,) = axes.plot(mean[:, 0], mean[:, 1], style, color=colour, linewidth=thick)
            line.set_gid(f"tip:{attentions}")
        axes.set_yscale("log")
        for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set(xlabel="step", ylabel="loss")

    return draw
