"""AP against latency as a picture of its own, for a README: every point named, the machine below, on a white ground.

The report's plots are read with its tables beside them; this one is read alone, at a width of 700 pixels.
"""

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from ablations.files import atomic_write_text
from ablations.rows.plots import (
    STYLE,
    bars_are,
    colour_of,
    compared,
    comparisons,
    draw_baseline,
    draw_point,
    markers_of,
    to_svg,
)
from ablations.rows.row import Row
from ablations.rows.sections import Section, make_sections
from ablations.rows.statistics import stored_replicates

NAME = "ap_against_latency"
# Inches; a browser shows 96 pixels of each.
WIDTH, PANEL_HEIGHT, LINE = 7.3, 4.2, 0.165
CAPTION_CHARACTERS = 134
LEGEND = (
    "L, S, C: scale, spatial, task attention; none: all three off; ×2: two blocks. ★ baseline: the detector with "
    "its own towers."
)
# On which sides of its point a name may stand, the best first.
SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
HORIZONTAL: dict[int, Literal["left", "center", "right"]] = {1: "left", 0: "center", -1: "right"}
VERTICAL: dict[int, Literal["bottom", "center_baseline", "top"]] = {1: "bottom", 0: "center_baseline", -1: "top"}


def write_pictures(rows: Iterable[Row], directory: str | Path) -> list[Path]:
    """Write `ap_against_latency.svg` into `directory`: of the table in `table.csv`, `-2` of that in `table-2.csv`, ...

    Args:
        rows: What the pictures are made of (`read_rows`).
        directory: Where they go. Pictures of an earlier time that these rows do not make are removed.

    Returns:
        The files; none for a table with too few lines to compare. The same rows give the same bytes.

    Raises:
        OSError: A file cannot be written.
    """
    directory = Path(directory)
    texts = {}
    for number, section in enumerate(make_sections(rows, stored_replicates(directory)), 1):
        figure = draw_picture(section)
        if figure is not None:
            texts[f"{NAME}{f'-{number}' if number > 1 else ''}.svg"] = to_svg(figure, f"{NAME}-{number}") + "\n"
    for path in directory.glob(f"{NAME}*.svg"):
        if path.name not in texts:
            path.unlink(missing_ok=True)
    for name, text in texts.items():
        atomic_write_text(directory / name, text)
    return [directory / name for name in texts]


def draw_picture(section: Section) -> Figure | None:
    """AP against latency with every point named as far as there is room; None where there is nothing to compare.

    `LSC ×2` is a DyHead with all three attentions and two blocks. The best keep theirs where room is short.
    """
    frame = compared(section.frame)
    if frame.empty:
        return None
    caption = [
        *textwrap.wrap(f"{LEGEND} {bars_are(frame, True)}".strip(), CAPTION_CHARACTERS),
        *textwrap.wrap(f"{section.title} | {section.machine}", CAPTION_CHARACTERS),
    ]
    markers = markers_of(frame)
    with matplotlib.rc_context({**STYLE, "font.size": 10, "axes.titlesize": 11}):
        parts = comparisons(frame)
        height = PANEL_HEIGHT * len(parts) + LINE * (len(caption) + 0.7)
        fraction = PANEL_HEIGHT * len(parts) / height
        figure = Figure(figsize=(WIDTH, height))
        figure.set_layout_engine("constrained", rect=(0, 1 - fraction, 1, fraction))
        style: dict[str, Any] = {"fontsize": 7.5, "color": "#333333", "va": "top", "linespacing": 1.35}
        figure.text(0.02, 1 - fraction, "\n".join(caption), **style).set_in_layout(False)
        panels = [axes for (axes,) in figure.subplots(len(parts), 1, squeeze=False, sharex=True, sharey=True)]
        for axes, (title, part) in zip(panels, parts, strict=True):
            axes.set_title(f"{title}: AP against latency")
            axes.tick_params(labelbottom=True)
            for _, line in part.iterrows():
                draw_point(axes, line, markers.get(line["depth"], "*"))
            draw_baseline(axes, part, vertical=True)
            axes.set_xlabel("latency at batch size 1, median (ms)")
            axes.set_ylabel("AP (%)")
            axes.margins(0.1)
        figure.draw_without_rendering()
        for axes, (_, part) in zip(panels, parts, strict=True):
            _name_points(figure, axes, part)
    return figure


def _name_points(figure: Figure, axes: Axes, part: pd.DataFrame) -> None:
    scale = figure.dpi / 72
    lines = [line for _, line in part.iterrows()]
    lines.sort(key=lambda line: (line["attentions"] != "baseline", -line["AP"], line["latency_ms_p50"]))
    points = [axes.transData.transform((line["latency_ms_p50"], line["AP"])) for line in lines]
    radii = [(9 if line["attentions"] == "baseline" else 5) * scale for line in lines]
    taken = [Bbox.from_bounds(x - r, y - r, 2 * r, 2 * r) for (x, y), r in zip(points, radii, strict=True)]
    for line in lines:
        baseline = line["attentions"] == "baseline"
        text = axes.annotate(
            "baseline" if baseline else f"{line['attentions']} ×{line['depth']}",
            (line["latency_ms_p50"], line["AP"]),
            (0, 0),
            textcoords="offset points",
            color=_dark(colour_of(line["attentions"])),
            fontsize=9,
            fontweight="bold" if baseline else "normal",
            zorder=6,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )
        # The layout is made already; a name must not change it.
        text.set_in_layout(False)
        if (extent := _place(text, axes, taken, 11 if baseline else 7)) is None:
            text.remove()
        else:
            taken.append(extent)


def _dark(colour: str) -> tuple[float, ...]:
    """A colour in which small text can be read on white."""
    return tuple(0.72 * channel for channel in to_rgb(colour))


def _place(text: Annotation, axes: Axes, taken: list[Bbox], reach: int) -> Bbox | None:
    """Put a name beside its point where it lies on nothing.

    Args:
        text: The name.
        axes: The panel, which the name must not leave.
        taken: What it must not lie on, in pixels.
        reach: Distance from the middle of the point in points of 1/72 inch; a little more where that is not free.

    Returns:
        What the name covers, or None where there is no room.
    """
    for distance in (reach, reach + 5):
        for side, height in SIDES:
            text.set_position((side * distance, height * distance))
            text.set_horizontalalignment(HORIZONTAL[side])
            text.set_verticalalignment(VERTICAL[height])
            extent = text.get_window_extent()
            inside = axes.bbox.x0 <= extent.x0 and extent.x1 <= axes.bbox.x1
            inside = inside and axes.bbox.y0 <= extent.y0 and extent.y1 <= axes.bbox.y1
            if inside and not any(extent.overlaps(other) for other in taken):
                return extent
    return None
