"""The picture of its own: every point has a name, none lies on another, and the same rows give the same bytes."""

import xml.etree.ElementTree as ElementTree

import pytest
from matplotlib.colors import to_rgb
from synthetic_rows import GPU, make_row, make_rows

from ablations.rows.picture import draw_picture, write_pictures
from ablations.rows.sections import make_sections


def names_and_extents(figure):
    figure.draw_without_rendering()
    return {text.get_text(): text.get_window_extent() for axes in figure.axes for text in axes.texts}


def draw(rows):
    return draw_picture(make_sections(rows)[0])


def test_every_cell_of_the_default_grid_has_its_name():
    names = names_and_extents(draw(make_rows(depths=(1, 2))))
    subsets = ("none", "L", "S", "C", "LS", "LC", "SC", "LSC")
    assert set(names) == {"baseline", *(f"{subset} ×{depth}" for subset in subsets for depth in (1, 2))}


def test_no_name_lies_on_another_and_the_baseline_keeps_its_own():
    figure = draw(make_rows(depths=(1, 2, 4, 6, 8, 10)))
    names = names_and_extents(figure)
    assert "baseline" in names and len(names) > 30
    extents = list(names.values())
    assert not any(a.overlaps(b) for number, a in enumerate(extents) for b in extents[:number])
    inside = figure.axes[0].bbox
    assert all(inside.x0 <= a.x0 and a.x1 <= inside.x1 and inside.y0 <= a.y0 and a.y1 <= inside.y1 for a in extents)


def test_it_is_as_wide_as_a_readme_on_a_white_ground_and_names_the_machine():
    figure = draw(make_rows())
    assert 96 * figure.get_figwidth() == pytest.approx(700, abs=5)
    assert to_rgb(figure.get_facecolor()) == (1, 1, 1)
    (caption,) = figure.texts
    words = " ".join(caption.get_text().split())
    assert "device: Test CPU (2 cores)" in words and "generated-tiny" in words and "commit: 0123456789ab" in words
    box = caption.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 < figure.axes[0].bbox.y0


def test_error_bars_are_the_half_widths_of_the_table():
    section = make_sections(make_rows((1, 2), (0, 1)))[0]
    figure = draw_picture(section)
    segments = [line for bars in figure.axes[0].collections for line in bars.get_segments()]
    upright = sorted((high[1] - low[1]) / 2 for low, high in segments if low[0] == high[0])
    assert upright == pytest.approx(sorted(section.frame["delta_AP_half_width"].dropna())) and len(upright) == 16
    assert "Bars of AP: 95 % interval" in " ".join(figure.texts[0].get_text().split())
    assert "Bars" not in draw(make_rows()).texts[0].get_text()


def test_the_same_rows_give_the_same_bytes(tmp_path):
    rows = make_rows()
    for name, order in (("a", rows), ("b", rows[::-1])):
        (tmp_path / name).mkdir()
        assert write_pictures(order, tmp_path / name) == [tmp_path / name / "ap_against_latency.svg"]
    first, second = ((tmp_path / name / "ap_against_latency.svg").read_bytes() for name in "ab")
    assert first == second and b"<dc:date>" not in first
    assert ElementTree.fromstring(first).tag == "{http://www.w3.org/2000/svg}svg"


def test_a_picture_has_the_number_of_its_table_and_old_ones_go(tmp_path):
    gpu = make_rows(machine=GPU, cell={"device_kind": "cuda"}, started="2027-01-01T00:00:00+00:00")
    first, second = tmp_path / "ap_against_latency.svg", tmp_path / "ap_against_latency-2.svg"
    assert write_pictures(make_rows() + gpu, tmp_path) == [first, second]
    assert write_pictures(make_rows(), tmp_path) == [first] and not second.exists()
    few = [make_row("baseline"), make_row("LSC")]
    assert write_pictures(few, tmp_path) == [] and not first.exists()
