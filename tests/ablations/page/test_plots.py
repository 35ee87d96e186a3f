"""The report's plots: every subset shown, names that can be read, error bars that are the table's, nothing invented."""

import itertools
import json
import re

import matplotlib.text
import numpy as np
import pandas as pd
import pytest
from synthetic_rows import make_row, make_rows, synthetic_ap

from ablations.page.markup import themed
from ablations.page.plots import ap_against_depth, ap_against_latency, gain_by_detector, panel
from ablations.page.repeated import POINTS, effects_plot, loss_plot, read_losses
from ablations.rows.effects import ALL, EFFECTS_COLUMNS
from ablations.rows.frame import make_frame
from ablations.rows.plots import to_svg

DETECTORS = ("atss", "fcos", "retinanet")


def axes_of(plot):
    """The only pair of axes of a plot with one panel."""
    (panel,) = plot.panels
    return panel.figure.axes[0]


def overlapping_names(figure):
    """Pairs of names in the pictures that lie on each other."""
    figure.draw_without_rendering()
    pairs = []
    for axes in figure.axes:
        names = [text for text in axes.texts if isinstance(text, matplotlib.text.Annotation) and text.get_text()]
        boxes = [(name.get_text(), matplotlib.text.Text.get_window_extent(name)) for name in names]
        pairs += [(a[0], b[0]) for a, b in itertools.combinations(boxes, 2) if a[1].overlaps(b[1])]
    return pairs


def equal_rows():
    """All cells of one depth alike: the worst case for names."""
    rows = make_rows(depths=(1, 2))
    for row in rows:
        row["metrics"]["AP"] = 20.0 + 0.05 * (row["cell"]["depth"] or 0)
    return rows


@pytest.mark.parametrize("rows", [make_rows((1, 2, 4, 6), (0, 1, 2)), equal_rows()], ids=["four depths", "all alike"])
def test_names_in_pictures_do_not_lie_on_each_other(rows):
    frame = make_frame(rows)
    for draw in (ap_against_latency, ap_against_depth):
        assert [overlapping_names(panel.figure) for panel in draw(frame).panels] == [[]]


def test_ap_against_depth_shows_every_subset_and_the_baseline():
    axes = axes_of(ap_against_depth(make_frame(make_rows(depths=(1, 2, 6)))))
    names = {text.get_text() for text in axes.texts}
    assert names == {"baseline", "none", "L", "S", "C", "LS", "LC", "SC", "LSC"}
    curves = [list(line.get_ydata()) for line in axes.lines if len(line.get_xdata()) == 3]
    assert [synthetic_ap("SC", depth) for depth in (1, 2, 6)] in curves and len(curves) == 8
    assert [24.0, 24.0] in [list(line.get_ydata()) for line in axes.lines]
    assert list(axes.get_xticks()) == [1, 2, 6]


def test_ap_against_latency_joins_the_points_that_none_beats():
    points = {"none": (5.0, 20.0), "L": (6.0, 19.0), "S": (7.0, 25.0), "C": (7.0, 24.0), "LSC": (7.5, 25.0)}
    rows = [make_row("baseline", latency_ms_p50=8.0)]
    rows[0]["metrics"]["AP"] = 26.0
    for name, (latency, ap) in points.items():
        row = make_row(name, 1, latency_ms_p50=latency)
        row["metrics"]["AP"] = ap
        rows.append(row)
    axes = axes_of(ap_against_latency(make_frame(rows)))
    steps = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
    assert [line.get_xydata().tolist() for line in steps] == [[[5, 20], [7, 25], [8, 26]]]
    assert {text.get_text() for text in axes.texts} == {"none, depth 1", "S, depth 1"}


def test_panels_for_detectors_and_formulations():
    rows = [*make_rows(), *make_rows(cell={"detector": "fcos"})]
    paper = [row for row in make_rows(cell={"formulation": "paper", "coarse_offsets": None}) if row["cell"]["depth"]]
    plot = ap_against_depth(make_frame(rows + paper))
    assert [panel.title for panel in plot.panels] == ["atss, released", "atss, paper", "fcos"]
    assert len({panel.figure.axes[0].get_ylim() for panel in plot.panels}) == 1, "panels of one scale"


def test_the_gain_of_each_detector():
    rows = [make_row(name, 1, cell={"detector": d}) for d in DETECTORS for name in ("baseline", "LSC")]
    plot = gain_by_detector(make_frame(rows))
    gain = synthetic_ap("LSC", 1) - 24
    bars, plane = (panel.figure.axes[0] for panel in plot.panels)
    assert [text.get_text() for text in bars.texts] == [f"{gain:+.1f}  (LSC, depth 1)"] * 3
    assert {text.get_text() for text in plane.texts} == set(DETECTORS)
    assert [overlapping_names(panel.figure) for panel in plot.panels] == [[], []]


def test_no_picture_where_there_is_nothing_to_compare():
    nothing = make_frame([make_row("LSC", 1, status="oom"), make_row("baseline", status="crashed")])
    one_depth = make_frame(make_rows(depths=(1,)))
    assert ap_against_latency(nothing) is ap_against_depth(nothing) is gain_by_detector(nothing) is None
    assert ap_against_depth(one_depth) is None and gain_by_detector(one_depth) is None
    unmeasured = make_frame([row | {"latency_ms_p50": None} for row in make_rows()])
    assert ap_against_latency(unmeasured) is None and ap_against_depth(unmeasured) is not None
    assert isinstance(one_depth, pd.DataFrame) and ap_against_latency(one_depth) is not None


def test_an_svg_keeps_its_ids_apart_from_others():
    first, second = (
        to_svg(ap_against_depth(make_frame(make_rows())).panels[0].figure, name) for name in ("one", "two")
    )
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (first, second)]
    assert not ids[0] & ids[1]
    assert set(re.findall(r"url\(#([^)]+)\)", first)) <= ids[0]


def bars_of(axes):
    """Half the lengths of all error bars upwards."""
    segments = [segment for lines in axes.collections for segment in lines.get_segments()]
    return [(b[1] - a[1]) / 2 for a, b in segments if a[0] == b[0]]


@pytest.mark.parametrize("draw", [ap_against_latency, ap_against_depth])
def test_error_bars_are_the_half_widths_of_the_differences(draw):
    frame = make_frame(make_rows((1, 2), (0, 1)))
    frame["delta_AP_half_width"] = np.where(frame["attentions"] == "baseline", np.nan, 1.25)
    bars = bars_of(axes_of(draw(frame)))
    assert len(bars) == 16 and bars == pytest.approx([1.25] * 16)
    assert "95 % interval" in draw(frame).caption
    assert "Bars" not in draw(make_frame(make_rows())).caption


def test_what_themed_leaves_of_an_svg():
    figure = ap_against_latency(make_frame(make_rows())).panels[0].figure
    svg = themed(to_svg(figure, "one", "none"), "a <label>")
    assert svg.startswith('<svg class="drawn" viewBox=') and 'aria-label="a &lt;label&gt;"' in svg
    assert "<style" not in svg and "DejaVu" not in svg and "#7a0177" not in svg and "var(--LSC)" in svg
    assert "<title>LSC, depth 2: AP 28.0, 17.6 ms</title>" in svg
    assert set(re.findall(r"url\(#([^)]+)\)", svg)) <= set(re.findall(r'\bid="([^"]+)"', svg))
    assert not re.search(r"<[^>]*\d\.\d{3}", svg)


def test_numbers_that_are_read_are_not_shortened():
    figure = panel(lambda figure, axes: axes.set(xticks=[0.25, 0.75], xlim=(0, 1)))
    svg = themed(to_svg(figure, "one", "none"), "ticks at 0.25")
    assert ">0.25<" in svg and ">0.75<" in svg


def effects_frame(depths=("1", "2", ALL), metrics=("AP", "AP50", "loc")):
    lines = [
        ("atss", depth, "released", 3, metric, effect, value, 0.5, p, "training and images")
        for depth in depths
        for metric in metrics
        for effect, value, p in (("L", 1.0, 0.2), ("S", 3.0, 0.001), ("L×S", -0.4, 1.0))
    ]
    return pd.DataFrame(lines, columns=EFFECTS_COLUMNS)


def test_effects_are_dots_with_their_intervals():
    plot = effects_plot(effects_frame())
    assert plot.mosaic and [panel.title for panel in plot.panels] == ["AP", "AP50", "loc (errors)"]
    whole, small, _ = (panel.figure.axes[0] for panel in plot.panels)
    names = [label.get_text() for label in whole.get_yticklabels()]
    assert names == ["L", "S", "L×S"]
    dots = [line for line in whole.lines if line.get_marker() not in ("None", None, "")]
    assert sorted(float(line.get_xdata()[0]) for line in dots) == [-0.4] * 3 + [1.0] * 3 + [3.0] * 3
    filled = {float(line.get_xdata()[0]) for line in dots if line.get_markerfacecolor() != "white"}
    assert filled == {3.0}, "only p < 0.05 is filled"
    widths = {round(b[0] - a[0], 6) for lines in whole.collections for a, b in lines.get_segments()}
    assert widths == {1.0}
    assert len([line for line in small.lines if line.get_marker() == "D"]) == 3, "the small ones are over all depths"
    assert effects_plot(effects_frame()[:0]) is None


def test_loss_curves_of_every_seed_and_their_mean(tmp_path):
    rows = make_rows((1, 2), (0, 1))
    for row in rows:
        folder = tmp_path / "cells" / row["key"]
        folder.mkdir(parents=True)
        lines = [{"step": step, "loss": 2.0 + row["cell"]["seed"]} for step in (10, 20, 30)]
        (folder / "losses.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot = loss_plot(rows, tmp_path)
    assert [panel.title for panel in plot.panels] == ["depth 1", "depth 2"]
    axes = plot.panels[0].figure.axes[0]
    heights = [line.get_ydata()[0] for line in axes.lines]
    assert sorted(heights) == [2.0] * 9 + [2.5] * 9 + [3.0] * 9
    assert loss_plot(rows, tmp_path / "nowhere") is None


def test_a_long_curve_is_thinned_by_means_and_a_broken_one_left_out(tmp_path):
    folder = tmp_path / "cells" / "a"
    folder.mkdir(parents=True)
    (folder / "losses.jsonl").write_text("".join(f'{{"step": {n}, "loss": {n}}}\n' for n in range(1, 401)))
    curve = read_losses(tmp_path, "a")
    assert len(curve) == POINTS and curve[0] == (2.5, 2.5) and curve[-1] == (398.5, 398.5)
    (folder / "losses.jsonl").write_text('{"step": 1, "loss": null}\n{"step": 2, "loss": 3}\n')
    assert read_losses(tmp_path, "a") == [(2, 3)]
    (folder / "losses.jsonl").write_text("[]\n")
    assert read_losses(tmp_path, "a") == []
