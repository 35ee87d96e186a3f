"""Tables: order, averages, deltas, empty slices, what shares a table, and three formats that others can read."""

import re

import numpy as np
import pandas as pd
import pytest
from synthetic_rows import GPU, make_row, make_rows, synthetic_ap

from ablations.rows.frame import COLUMNS, as_text, make_frame
from ablations.rows.latex import to_latex
from ablations.rows.sections import make_sections
from ablations.rows.store import read_rows, write_row
from ablations.rows.tables import to_csv, to_markdown, write_tables

DESIGN_COLUMNS = (
    "detector, attentions, depth, formulation, seeds, AP, AP50, AP75, APs, APm, APl, "
    "delta_AP, delta_AP_half_width, delta_AP_p, delta_AP_covers, params_M, GMACs, "
    "images_per_s, latency_ms_p50, latency_ms_p90, peak_memory_MB, status"
)
DESIGN_COLUMNS = DESIGN_COLUMNS.split(", ")
# What is read: the interval of delta_AP stands beside it.
SHOWN_COLUMNS = [name for name in DESIGN_COLUMNS if not name.startswith("delta_AP_")]
COCO = {"data": "coco", "backbone": "resnet50"}


def one(rows):
    (section,) = make_sections(rows)
    return section


def line(frame, attentions, depth=None, **others):
    for name, value in others.items():
        frame = frame[frame[name] == value]
    frame = frame[frame["attentions"] == attentions]
    found = frame[frame["depth"].isna()] if depth is None else frame[frame["depth"] == depth]
    assert len(found) == 1
    return found.iloc[0]


def test_columns_and_the_order_of_lines():
    rows = make_rows(depths=(2, 1))
    frame = make_frame(rows[::-1])
    assert list(frame.columns) == DESIGN_COLUMNS
    expected = ["baseline"] + [name for name in ("none", "L", "S", "C", "LS", "LC", "SC", "LSC") for _ in range(2)]
    assert list(frame["attentions"]) == expected
    assert list(frame["depth"][1:]) == [1, 2] * 8 and pd.isna(frame["depth"][0])
    assert set(frame["status"]) == {"ok"} and set(frame["seeds"]) == {1}


def test_numbers_stand_where_they_belong():
    got = line(make_frame(make_rows()), "LS", 2)
    row = make_row("LS", 2)
    assert got["AP"] == synthetic_ap("LS", 2) and got["APl"] == row["metrics"]["APl"]
    assert got["delta_AP"] == pytest.approx(synthetic_ap("LS", 2) - synthetic_ap("baseline", None))
    for name in ("params_M", "GMACs", "images_per_s", "latency_ms_p50", "latency_ms_p90"):
        assert got[name] == row[name]
    assert line(make_frame(make_rows()), "baseline")["delta_AP"] == 0


def test_delta_is_to_the_baseline_of_the_same_detector():
    rows = [make_row(name, 1, cell={"detector": d}) for d in ("atss", "fcos") for name in ("baseline", "LSC")]
    rows[2]["metrics"]["AP"] = 10.0
    rows.append(make_row("LSC", 1, cell={"detector": "retinanet"}))
    frame = make_frame(rows)
    lsc = synthetic_ap("LSC", 1)
    assert line(frame, "LSC", 1, detector="atss")["delta_AP"] == pytest.approx(lsc - 24)
    assert line(frame, "LSC", 1, detector="fcos")["delta_AP"] == pytest.approx(lsc - 10)
    assert pd.isna(line(frame, "LSC", 1, detector="retinanet")["delta_AP"])
    assert list(frame["attentions"]) == ["baseline", "LSC", "baseline", "LSC", "LSC"]


def test_a_baseline_that_failed_is_no_baseline():
    frame = make_frame([make_row("baseline", status="oom"), make_row("L", 1)])
    assert frame["delta_AP"].isna().all() and list(frame["status"]) == ["oom", "ok"]


def test_seeds_are_averaged_and_deltas_are_paired():
    aps = {"baseline": [24.0, 25.0, 23.0], "LSC": [27.0, 29.0, 25.0]}
    rows = []
    for name, values in aps.items():
        for seed, ap in enumerate(values):
            row = make_row(name, 1, seed)
            row["metrics"]["AP"] = ap
            rows.append(row)
    frame = make_frame(rows)
    got = line(frame, "LSC", 1)
    assert got["seeds"] == 3
    assert got["AP"] == pytest.approx(27) and got["AP_std"] == pytest.approx(np.std(aps["LSC"], ddof=1))
    differences = np.subtract(aps["LSC"], aps["baseline"])
    assert got["delta_AP"] == pytest.approx(3) and got["delta_AP_std"] == pytest.approx(np.std(differences, ddof=1))
    assert list(frame.columns[: len(DESIGN_COLUMNS)]) == DESIGN_COLUMNS
    assert "params_M_std" not in frame and "latency_ms_p50_std" in frame
    text = line(as_text(frame).replace({"depth": {"": None}}).astype({"depth": "Int64"}), "LSC", 1)
    assert text["AP"] == "27.0" and text["delta_AP"] == "+3.0 ± 2.5 (training only)"
    assert list(as_text(frame).columns) == SHOWN_COLUMNS


def test_a_seed_that_failed_is_told_and_not_averaged():
    rows = [make_row("baseline", seed=seed) for seed in range(3)]
    rows += [make_row("L", 1, seed=0), make_row("L", 1, seed=1), make_row("L", 1, seed=2, status="diverged")]
    got = line(make_frame(rows), "L", 1)
    assert got["status"] == "2 ok, 1 diverged" and got["seeds"] == 2
    assert got["AP"] == pytest.approx(np.mean([synthetic_ap("L", 1, 0), synthetic_ap("L", 1, 1)]))
    # Over the two seeds that the baseline has, too.
    assert got["delta_AP"] == pytest.approx(got["AP"] - 24.15)
    assert any("over the seeds that the baseline has" not in note for note in one(rows).notes)


def test_a_failed_cell_is_a_line_with_its_status_and_reason():
    section = one([*make_rows(depths=(1,)), make_row("LSC", 2, status="diverged")])
    got = line(section.frame, "LSC", 2)
    assert got["status"] == "diverged" and got["seeds"] == 0
    assert got[["AP", "delta_AP", "params_M", "latency_ms_p50"]].isna().all()
    assert any("diverged: atss LSC depth 2 seed 0: loss is nan at step 12" in note for note in section.notes)


def test_an_empty_size_class_stays_empty_everywhere(tmp_path):
    for row in make_rows(seeds=(0, 1)):
        write_row(tmp_path, row)
    write_tables(read_rows(tmp_path), tmp_path)
    csv = pd.read_csv(tmp_path / "table.csv", comment="#")
    assert csv["APs"].isna().all() and csv["peak_memory_MB"].isna().all() and csv["APm"].notna().all()
    text = as_text(one(make_rows(seeds=(0, 1))).frame)
    assert set(text["APs"]) == {""} and set(text["peak_memory_MB"]) == {""}
    for path in tmp_path.glob("table*"):
        assert not re.search(r"\bnan\b|<NA>|None|-100", path.read_text()), path


def test_an_ok_row_without_any_ground_truth_has_no_delta():
    row = make_row("L", 1)
    row["metrics"] = dict.fromkeys(row["metrics"])
    assert pd.isna(line(make_frame([make_row("baseline"), row]), "L", 1)["delta_AP"])


def test_cpu_and_gpu_rows_never_share_a_table(tmp_path):
    gpu = [make_row(name, 1, machine=GPU, cell={"device_kind": "cuda"}) for name in ("baseline", "LSC")]
    other = make_row("LSC", 2, machine={"device": "Other GPU"}, cell={"device_kind": "cuda"}, key="other")
    rows = [*make_rows(), *gpu, other]
    for row in gpu:
        row["metrics"]["AP"] += 1
    sections = make_sections(rows)
    assert [len(section.rows) for section in sections] == [17, 2, 1]
    assert all(len({row["machine"]["device"] for row in section.rows}) == 1 for section in sections)
    assert line(sections[1].frame, "LSC", 1)["delta_AP"] == pytest.approx(synthetic_ap("LSC", 1) - 24)
    for row in rows:
        write_row(tmp_path, row)
    (tmp_path / "table-9.csv").write_text("left from a longer run")
    write_tables(read_rows(tmp_path), tmp_path)
    assert sorted(path.name for path in tmp_path.glob("table*")) == [
        "table-2.csv",
        "table-3.csv",
        "table.csv",
        "table.md",
        "table.tex",
    ]
    markdown = (tmp_path / "table.md").read_text()
    assert markdown.count("device: ") == 3
    assert markdown.index("Test CPU") < markdown.index("Test GPU") < markdown.index("Other GPU")


def test_another_schedule_or_data_set_is_another_table():
    longer = make_row("LSC", 1, cell={"steps": 800}, key="longer", started="2027")
    assert [len(section.rows) for section in make_sections([*make_rows(), longer])] == [17, 1]
    other = make_row("LSC", 1, cell={"data_fingerprint": "beef"}, key="other", started="2027")
    assert [len(section.rows) for section in make_sections([*make_rows(), other])] == [17, 1]
    other["cell"]["detector"] = "fcos"
    assert [len(section.rows) for section in make_sections([*make_rows(), other])] == [17, 1]


def test_rows_from_before_a_setting_existed_are_another_table():
    later = make_row("LSC", 1, cell={"optimizer": "sgd"}, key="later", started="2027")
    assert [len(section.rows) for section in make_sections([*make_rows(), later])] == [17, 1]


def test_detectors_with_schedules_of_their_own_share_a_table():
    rows = [make_row(name, 1) for name in ("baseline", "LSC")]
    rows += [make_row(name, 1, cell={"detector": "detr", "steps": 4000}) for name in ("baseline", "LSC")]
    section = one(rows)
    assert len(section.frame) == 4
    assert any("steps: atss 400, detr 4000" in note for note in section.notes)
    assert "steps" not in section.notes[0]


def test_sections_keep_the_order_in_which_they_were_started():
    early = make_row("L", 1, cell={"steps": 800}, key="z", started="2025-01-01T00:00:00+00:00")
    rows = [*make_rows(), early]
    for shuffled in (rows, rows[::-1]):
        assert [len(section.rows) for section in make_sections(shuffled)] == [1, 17]


def test_formulations_are_told_apart():
    rows = [
        make_row("LSC", 1, cell={"formulation": "paper", "coarse_offsets": None}),
        make_row("LSC", 1, cell={"coarse_offsets": "resize"}),
        make_row("LSC", 1, cell={"coarse_offsets": "prefix"}),
        make_row("LSC", 1, cell={"placement": "around_roi"}),
        make_row("LSC", 1),
    ]
    frame = make_frame(rows)
    names = ["released", "released, around_roi", "released, prefix", "released, resize", "paper"]
    assert list(frame["formulation"]) == names
    without_offsets = [make_row("L", 1, cell={"formulation": name}) for name in ("paper", "released")]
    assert list(make_frame(without_offsets)["formulation"]) == ["released", "paper"]
    assert as_text(make_frame([make_row("baseline")]))["formulation"][0] == ""


def test_the_papers_figures_stand_beside_ours_on_coco_only():
    rows = [make_row(name, depth, cell=COCO) for name in ("L", "LSC") for depth in (1, 6, 7)]
    rows.append(make_row("baseline", cell=COCO))
    rows += [make_row(name, 6, cell=COCO | {"detector": "fcos"}) for name in ("baseline", "LSC", "L")]
    section = one(rows)
    columns = list(section.frame.columns)
    assert columns.index("paper_AP") == columns.index("delta_AP_covers") + 1
    assert [name for name in columns if name != "paper_AP"] == DESIGN_COLUMNS
    figures = {
        (row["detector"], row["attentions"], None if pd.isna(row["depth"]) else row["depth"]): row["paper_AP"]
        for _, row in section.frame.iterrows()
    }
    expected = {
        ("atss", "baseline", None): 39.0,
        ("atss", "L", 1): None,
        ("atss", "L", 6): 39.9,
        ("atss", "L", 7): None,
        ("atss", "LSC", 1): 36.7,
        ("atss", "LSC", 6): 42.6,
        ("atss", "LSC", 7): None,
        ("fcos", "baseline", None): 38.8,
        ("fcos", "LSC", 6): 40.0,
        ("fcos", "L", 6): None,
    }
    assert {key: None if pd.isna(value) else value for key, value in figures.items()} == expected
    assert any("CVPR 2021" in note for note in section.notes)
    for cell in (COCO | {"data": "generated-paper"}, COCO | {"backbone": "tiny"}):
        assert "paper_AP" not in make_frame([make_row("LSC", 6, cell=cell)])


def test_rows_measured_differently_are_named():
    rows = make_rows(depths=(1,))
    assert any("batch size 8" in note and "1 CPU thread." in note for note in one(rows).notes)
    rows[3]["threads"] = 2
    assert any("cannot be compared" in note for note in one(rows).notes)


def test_csv_reads_back_as_the_frame():
    section = one([*make_rows(seeds=(0, 1)), make_row("LSC", 6, status="crashed")])
    text = to_csv(section)
    first, header = text.split("\n")[:2]
    assert first == f"# {section.machine}" and header.split(",")[: len(DESIGN_COLUMNS)] == DESIGN_COLUMNS
    back = pd.read_csv(pd.io.common.StringIO(text), comment="#", keep_default_na=False, na_values=[""])
    assert list(back["attentions"]) == list(section.frame["attentions"])
    for name in ("depth", "AP", "AP_std", "delta_AP", "GMACs", "latency_ms_p50"):
        np.testing.assert_allclose(back[name].astype(float), section.frame[name].astype("float64"), rtol=1e-5)


def test_markdown_begins_with_the_machine_line_and_has_one_line_an_experiment():
    section = one(make_rows())
    lines = to_markdown(section).split("\n")
    assert lines[0] == section.machine and "Test CPU" in lines[0] and "python -m ablations.run --grid" in lines[0]
    table = [text for text in lines if text.startswith("|")]
    table, effects = table[: 2 + 17], table[2 + 17 :]
    assert len({text.count("|") for text in table}) == 1 and len(effects) == 2 + 3 * 7
    assert [cell.strip() for cell in table[0].strip("|").split("|")] == SHOWN_COLUMNS


def check_latex(text):
    """Environments and braces balance, every line has its columns, and nothing special is left bare."""
    body = "\n".join(row for row in text.split("\n") if not row.startswith("%"))
    open_environments = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+\*?)\}", body):
        if kind == "begin":
            open_environments.append(name)
        else:
            assert open_environments.pop() == name
    assert open_environments == []
    bare = re.sub(r"\\[\\{}%&#_$]", "", body)
    assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0
    assert not re.search(r"[%#±×~^]", bare) and body.isascii()
    assert "_" not in re.sub(r"\$[^$]*\$", "", bare)
    align = re.search(r"\\begin\{tabular\}\{([lr]+)\}", body)[1]
    rows = [row for row in re.sub(r"\\[%&#_{}$]", "", body).split("\n") if row.endswith("\\\\")]
    assert {row.count("&") + 1 for row in rows} == {len(align)}
    return len(rows)


def test_latex_is_whole_and_escaped():
    section = one([*make_rows(seeds=(0, 1)), make_row("LSC", 6, status="bad_data")])
    text = to_latex(section)
    assert text.startswith("% device: Test CPU")
    parts = text.split(r"\end{table*}")[:-1]
    assert [check_latex(part + r"\end{table*}") for part in parts] == [1 + 17 + 1, 1 + 3 * 7]
    assert r"bad\_data" in text and r"$\pm$" in text and r"AP$_{50}$" in text
    assert r"AP$_S$" not in text, "a column without any value has no place in a paper"


HOSTILE = {"data": "a|b & c_d {e} 50% \\input{x} #1 ~ ^ $x$ <script>alert(1)</script>\nsecond line"}


def test_names_that_mean_something_to_a_format_stay_text(tmp_path):
    machine = {"device": "GPU | <b>x</b>\n# not a comment", "command": "python -m x\nevil"}
    rows = [make_row(name, 1, cell=HOSTILE | {"detector": "a|b_c"}, machine=machine) for name in ("baseline", "LSC")]
    rows.append(make_row("L", 1, cell=HOSTILE | {"detector": "a|b_c"}, machine=machine, status="crashed"))
    rows[-1]["reason"] = "first\n\\end{table*} second"
    section = one(rows)
    assert "\n" not in section.machine
    assert len(pd.read_csv(pd.io.common.StringIO(to_csv(section)), comment="#")) == 3
    latex = to_latex(section)
    assert check_latex(latex) == 4
    table = [text for text in to_markdown(section).split("\n") if text.startswith("|")]
    assert len(table) == 5 and len({len(re.findall(r"(?<!\\)\|", text)) for text in table}) == 1
    assert all(note.count("\n") == 0 for note in section.notes[-1:])


def test_the_same_rows_give_the_same_bytes(tmp_path):
    rows = make_rows(seeds=(0, 1))
    for name, order in (("a", rows), ("b", rows[::-1])):
        for row in order:
            write_row(tmp_path / name, row)
        write_tables(read_rows(tmp_path / name), tmp_path / name)
    for path in (tmp_path / "a").glob("table*"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_without_rows_there_is_no_table(tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        write_tables(read_rows(tmp_path), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "shown"), [(0.35124, "0.3512"), (214.73, "214.7"), (1234.5, "1234"), (38.844, "38.84"), (0.0, "0")]
)
def test_costs_are_shown_with_four_digits(value, shown):
    frame = make_frame([make_row("LSC", 1, GMACs=value)])
    assert as_text(frame)["GMACs"][0] == shown


def test_column_names_are_those_of_the_store():
    assert list(COLUMNS) == DESIGN_COLUMNS


def test_mask_ap_has_a_column_where_a_detector_has_masks():
    plain, masked = make_row("baseline"), make_row("LSC", segm_metrics={"AP": 31.5})
    assert "segm_AP" not in make_frame([plain])
    frame = make_frame([plain, masked])
    assert list(frame.columns).index("segm_AP") == list(frame.columns).index("delta_AP_covers") + 1
    assert as_text(frame)["segm_AP"].tolist() == ["", "31.5"]
    assert any("segm_AP" in note for note in one([plain, masked]).notes)
    assert not any("segm_AP" in note for note in one([plain]).notes)
