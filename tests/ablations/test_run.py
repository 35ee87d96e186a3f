"""The command line end to end: what it prints, what it writes, and how it ends."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_coco import REAL, needs_coco

from ablations import run
from ablations.experiment.curve import read_curve
from ablations.generate import generate
from ablations.grid import PRESETS, build_grid, only
from ablations.options import parse
from ablations.rows import store
from ablations.rows.store import read_rows

# The tiny preset with hardly any steps.
BRIEF = {"steps": 10, "batch_size": 2, "warmup": 2, "channels": 16, "seeds": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("data"), "tiny", train=12, val=5)


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", replace(PRESETS["tiny"], **BRIEF))


def weights(out: Path, row: dict) -> dict[str, torch.Tensor]:
    return torch.load(out / row["weights"], weights_only=True)["model"]


def test_the_default_grid_has_17_cells_and_every_subset_at_both_depths(data):
    options = parse(["--grid", "--data", str(data)])
    base = run.base_cell(options, run.open_data(options))
    cells = build_grid("default", PRESETS["tiny"], base, ["atss"], 1)
    assert len(cells) == len({cell.key for cell in cells}) == 17
    assert cells[0].attentions is None and cells[0].depth is None
    assert {(cell.attentions, cell.depth) for cell in cells[1:]} == {
        (a, d) for a in ("", "L", "S", "C", "LS", "LC", "SC", "LSC") for d in (1, 2)
    }
    assert len({(cell.steps, cell.batch_size, cell.lr) for cell in cells}) == 1
    assert [c.name for c in only(cells, "LSC,depth=1")] == ["atss LSC depth 1"]
    assert [c.name for c in only(cells, "depth=")] == ["atss baseline"]
    # The offsets of the coarser level exist only where spatial attention is on.
    assert {cell.coarse_offsets for cell in cells if "S" not in (cell.attentions or "")} == {None}
    full = build_grid("full", PRESETS["tiny"], base, ["atss"], 2)
    assert len(full) == len({cell.key for cell in full})
    assert {cell.formulation for cell in full} == {None, "released", "paper"}
    assert {cell.coarse_offsets for cell in full} == {None, "crop", "prefix", "resize"}
    assert {cell.placement for cell in full} == {"trunk"}
    # Where there is a second stage, the last block can sit around RoIAlign.
    split = build_grid("full", PRESETS["tiny"], base, ["faster_rcnn"], 1)
    assert [cell.placement for cell in split].count("around_roi") == len(split) // 2
    assert len({cell.name for cell in split}) == len(split) and len({cell.name for cell in full}) == len(full)
    assert len(build_grid("detectors", PRESETS["tiny"], base, ["atss", "fcos"], 1)) == 4


def test_detectors_and_backbones_train_as_published_where_that_is_not_sgd(data):
    def schedules(backbone):
        options = parse(["--grid", "detectors", "--data", str(data), "--backbone", backbone, "--preset", "paper"])
        base = run.base_cell(options, run.open_data(options))
        cells = build_grid("detectors", options.preset, base, ["atss", "detr"], 1)
        found = {(c.detector, c.optimizer, c.lr, c.backbone_lr, c.weight_decay) for c in cells}
        assert len(found) == 2, "a detector is trained alike with and without DyHead"
        return found

    detr = ("detr", "adamw", 1e-4, 0.1)
    assert schedules("resnet50") == {("atss", "sgd", 0.01, 1.0, 1e-4), (*detr, 1e-4)}
    assert PRESETS["paper"].exceptions_for("cascade_rcnn", "resnet50") == {"lr": 0.02}
    # What DETR does not say for itself is the backbone's.
    assert schedules("swin_t") == {("atss", "adamw", 5e-5, 1.0, 0.05), (*detr, 0.05)}


def test_retinanet_has_half_the_rate_of_sgd_unless_its_backbone_has_one():
    preset = PRESETS["small"]
    assert preset.exceptions_for("retinanet", preset.backbone) == {"lr": preset.lr / 2}
    assert preset.exceptions_for("retinanet", "swin_t") == preset.exceptions_for("atss", "swin_t")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "nonsense"], "default"),
        (["--grid", "--preset", "huge"], "tiny"),
        (["--grid", "--detector", "atss,yolo"], "unknown detector 'yolo'; the detectors are atss, "),
        (["--grid", "--seeds", "0"], "from 1 on"),
        (["--grid", "--device", "tpu"], "cuda:N"),
        (["--grid", "--device", "cpu:0"], "cuda:N"),
        (["--grid", "--device", "cuda:99"], "torch sees"),
        (["--grid", "--backend", "triton", "--device", "cpu"], "TRITON_INTERPRET=1"),
        (["--grid", "detectors", "--test-flip"], "without mask_rcnn"),
        (["--grid", "--detector", "mask_rcnn", "--test-sizes", "96,128"], "without mask_rcnn"),
        (["--grid", "--test-sizes", "96,400"], "a --max-size of as many; it is 128"),
        (["--grid", "--accumulate", "3"], "does not divide the batch of 8 images; give one of 1, 2, 4, 8"),
        (["--grid", "--batch-size", "6", "--accumulate", "4"], "give one of 1, 2, 3, 6, or another --batch-size"),
        (["--grid", "--lr", "0"], "not a finite number above 0"),
        (["--grid", "--depths", "1,0"], "from 1 on"),
        (["--grid", "--precision", "fp16"], "fp32"),
        (["--grid", "--log", "csv"], "tensorboard"),
        ([], "--grid"),
    ],
)
def test_usage_errors_name_what_is_valid_and_end_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ("X", "has attentions=X; here it is one of baseline, none"),
        ("depth=9", "one of (empty), 1, 2"),
        ("size=1", "columns are"),
    ],
)
def test_only_lists_what_there_is(terms, message, data, tmp_path, capsys):
    assert run.main(["--grid", "--data", str(data), "--out", str(tmp_path / "out"), "--only", terms]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_data_ends_with_2_before_anything_is_written(data, tmp_path, capsys):
    broken = tmp_path / "broken"
    (broken / "annotations").mkdir(parents=True)
    (broken / "annotations" / "instances_train2017.json").write_text('{"images": [')
    assert run.main(["--grid", "--data", str(broken), "--out", str(tmp_path / "out")]) == 2
    assert "instances_train2017.json" in capsys.readouterr().err
    assert run.main(["--grid", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    assert "nowhere: no such directory" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["file", "file/out"])
def test_a_file_where_results_should_go_is_a_usage_error(place, data, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run.main(["--grid", "--data", str(data), "--out", str(tmp_path / place)]) == 2
    assert f"--out {tmp_path / place} is not a directory" in capsys.readouterr().err


def test_weights_are_checked_before_anything_is_written(brief, data, tmp_path, capsys):
    arguments = ["--grid", "--data", str(data), "--out", str(tmp_path / "out"), "--weights"]
    assert run.main([*arguments, str(tmp_path / "absent.pth")]) == 2
    assert "no weights at" in capsys.readouterr().err
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    assert run.main([*arguments, str(tmp_path / "other.pth")]) == 2
    assert "missing: ['bn1.bias'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_lists_and_runs_nothing(brief, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert run.main(["--grid", "depth", "--data", str(data), "--out", str(out), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "3 cells, 0 done, 3 to run" in printed and "atss LSC depth 2" in printed
    assert not out.exists()


def test_a_grid_runs_to_tables_and_a_second_call_runs_nothing(brief, data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    arguments = ["--grid", "combinations", "--data", str(data), "--out", str(out), "--only", "LSC"]
    assert run.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "NO GPU" in printed and "NOT MEASURED" in printed
    (row,) = read_rows(out)
    assert row["status"] == "ok" and row["training"]["steps"] == 10 and row["training"]["images"] == 20
    lines = read_curve(out / "cells" / row["key"] / "losses.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 11)) and {"lr", "loss", "loss_cls"} <= lines[0].keys()
    assert row["peak_memory_MB"] is None and row["latency_ms_p50"] > 0 and row["GMACs"] > 0
    table = (out / "table.md").read_text()
    assert "device:" in table.splitlines()[0] and "LSC" in table
    for name in ("table.csv", "table.tex", "report.html"):
        assert (out / name).stat().st_size > 0
    changed = (out / "cells" / f"{row['key']}.json").stat().st_mtime_ns

    parse, read = store._parse, []
    with monkeypatch.context() as counted:
        counted.setattr(store, "_parse", lambda path: read.append(path.stem) or parse(path))
        assert run.main(arguments) == 0
    assert read == [row["key"]] * 2, "rows are read to see what there is to do, and for the tables and the report"
    assert "1 cells, 1 done, 0 to run" in capsys.readouterr().out
    assert (out / "cells" / f"{row['key']}.json").stat().st_mtime_ns == changed


def test_multi_scale_training_and_testing_are_cells_of_their_own(brief, data, tmp_path):
    out = tmp_path / "out"
    arguments = ["--grid", "--data", str(data), "--out", str(out), "--only", "LSC,depth=1", "--test-flip"]
    assert run.main([*arguments, "--train-sizes", "96,128", "--test-sizes", "96,128", "--max-size", "150"]) == 0
    (row,) = read_rows(out)
    assert row["cell"]["max_size"] == 150
    assert row["cell"]["image_size"] == [96, 128] and row["cell"]["test_size"] == [96, 128]
    assert row["cell"]["test_flip"] and row["status"] == "ok"


def test_a_diverging_cell_becomes_a_row_and_the_others_go_on(brief, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", replace(PRESETS["tiny"], lr=1e30))
    out = tmp_path / "out"
    arguments = ["--grid", "depth", "--data", str(data), "--out", str(out), "--only", "attentions=LSC"]
    assert run.main(arguments) == 1
    rows = read_rows(out)
    assert [row["status"] for row in rows] == ["diverged", "diverged"]
    assert all("not finite at step" in row["reason"] for row in rows)
    assert "--retry-failed" in capsys.readouterr().err
    assert "diverged" in (out / "table.md").read_text()
    # A failed cell is not tried again unless it is asked for.
    assert run.main(arguments) == 1
    assert "2 done, 0 to run" in capsys.readouterr().out


@needs_coco
def test_real_coco_trains_and_evaluates(brief, tmp_path):
    out = tmp_path / "out"
    assert (
        run.main(["--grid", "--data", str(REAL), "--preset", "tiny", "--only", "LSC,depth=1", "--out", str(out)]) == 0
    )
    (row,) = read_rows(out)
    assert row["status"] == "ok" and row["cell"]["data"] == "coco"
    assert row["metrics"]["AP"] is not None
