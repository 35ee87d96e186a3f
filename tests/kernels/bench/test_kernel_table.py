"""The tables of the benchmarks: what they show, what they hold to the goals, and files that are none."""

import json

import pytest

from kernels.bench.goals import GOALS, verdict
from kernels.bench.table import main, read

MACHINE = {"device": "Some GPU", "cores": 16, "driver": "1.2", "threads": None, "commit": "0123456789ab"}


def row(op, shape, precision, mode, provider, ms=1.0, device="cuda", **others):
    names = {"op": op, "shape": shape, "precision": precision, "mode": mode, "provider": provider, "device": device}
    times = {"ms_p20": 0.9 * ms, "ms_p50": ms, "ms_p80": 1.1 * ms, "TFLOP/s": 2.0, "GB/s": 3.0, "error": 1e-3}
    return names | times | {"percent_of_roof": 50.0} | others


def rows_file(path, rows, missing=(), failed=(), machine=MACHINE, command="pytest --benchmark-only"):
    content = {
        "machine_info": {"node": "somebodys-laptop", "machine": machine, "commands": [command]},
        "commit_info": {},
        "datetime": "2026-01-02T03:04:05+00:00",
        "benchmarks": [
            {"name": f"test[{'-'.join(list(r.values())[:5])}]", "extra_info": r, "stats": {"data": [1.0]}} for r in rows
        ],
        "missing": list(missing),
        "failed": list(failed),
    }
    path.write_text(json.dumps(content))
    return path


def conv(provider, ms=1.0, shape="P3-b8", precision="fp16", mode="forward", **others):
    return row("deform_conv2d", shape, precision, mode, provider, ms, **others)


def cells(markdown, *words):
    """The table line that starts with these cells, as a dict by its header."""
    header, before = None, []
    for line in markdown.splitlines():
        parts = [part.strip() for part in line.strip("|").split("|")]
        if line.startswith("|-"):
            header = before
        if header and parts[: len(words)] == list(words):
            return dict(zip(header, parts, strict=True))
        before = parts
    raise AssertionError(f"no line {words} in\n{markdown}")


def tables(tmp_path, *files):
    assert main([*map(str, files), str(tmp_path / "results")]) == 0
    return (tmp_path / "results" / "kernels.md").read_text()


def test_a_line_has_every_number_and_the_rivals_times_over_ours(tmp_path):
    rivals = [conv("torchvision", 12.0), conv("compiled", 5.0), conv("dense", 0.8, error=None)]
    text = tables(tmp_path, rows_file(tmp_path / "rows.json", [conv("ours", 2.0, peak_MB=7.0), *rivals]))
    assert text.startswith("device: Some GPU | cores: 16 | driver: 1.2 | threads: none | commit: 0123456789ab\n")
    assert "    pytest --benchmark-only\n" in text
    ours = cells(text, "P3-b8", "fp16", "forward", "ours")
    assert [ours[f"ms p{n}"] for n in (20, 50, 80)] == ["1.8", "2", "2.2"]
    assert (ours["TFLOP/s"], ours["GB/s"], ours["% of roof"]) == ("2", "3", "50")
    assert (ours["error"], ours["peak MB"]) == ("0.001", "7")
    assert (ours["torchvision ÷"], ours["compiled ÷"], ours["dense ÷"]) == ("6", "2.5", "0.4")
    dense = cells(text, "P3-b8", "fp16", "forward", "dense")
    assert dense["error"] == dense["torchvision ÷"] == "" and dense["ms p50"] == "0.8"


def test_a_missing_rival_is_named_and_no_row_of_another_case_takes_its_place(tmp_path):
    missing = conv("torchvision", precision="bf16") | {"reason": "it knows no bfloat16"}
    rows = [conv("ours", precision="bf16"), conv("torchvision", 9.0), conv("dense", 3.0, "P4-b8", "bf16")]
    text = tables(tmp_path, rows_file(tmp_path / "rows.json", rows, [missing]))
    ours = cells(text, "P3-b8", "bf16", "forward", "ours")
    assert ours["torchvision ÷"] == "missing" and ours.get("dense ÷", "") == ""
    assert cells(text, "P3-b8", "bf16", "forward", "torchvision")["ms p50"] == "missing"
    assert "- missing: torchvision, 1 rows: it knows no bfloat16" in text


def test_a_deterministic_mode_stands_beside_the_rivals_plain_one(tmp_path):
    rows = [conv("ours", 4.0, mode="deterministic-backward"), conv("dense", 1.0, mode="backward")]
    text = tables(tmp_path, rows_file(tmp_path / "rows.json", rows))
    assert cells(text, "P3-b8", "fp16", "deterministic backward", "ours")["dense ÷"] == "0.25"


def test_cpu_and_gpu_and_operators_have_tables_of_their_own(tmp_path):
    rows = [conv("ours"), conv("ours", device="cpu"), row("block", "c256-b8", "fp16", "forward", "ours")]
    text = tables(tmp_path, rows_file(tmp_path / "rows.json", rows))
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Goals",
        "## deform_conv2d, GPU",
        "## block, GPU",
        "## deform_conv2d, CPU",
    ]


def test_a_case_that_failed_after_it_was_timed_is_named_and_not_reported(tmp_path):
    failed = "test[deform_conv2d-P3-b8-fp16-forward-ours]"
    path = rows_file(tmp_path / "rows.json", [conv("ours", 123.0), conv("dense")], failed=[failed])
    text = tables(tmp_path, path)
    assert "123" not in text.replace("0123456789ab", "") and f"not reported: {failed}" in text
    # Measured again, and well.
    again = rows_file(tmp_path / "again.json", [conv("ours", 2.0)])
    text = tables(tmp_path, path, again)
    assert "not reported: " not in text and cells(text, "P3-b8", "fp16", "forward", "ours")["dense ÷"] == "0.5"


def test_the_written_rows_make_the_same_table_and_say_nothing_of_their_owner(tmp_path):
    missing = conv("torchvision") | {"reason": "not there"}
    first = tables(tmp_path, rows_file(tmp_path / "rows.json", [conv("ours"), conv("dense")], [missing], ["test[x]"]))
    written = tmp_path / "results" / "kernels.json"
    assert "laptop" not in written.read_text() + first
    assert tables(tmp_path, written) == first
    # A second run adds its rows; what it measured again replaces what was there.
    more = rows_file(tmp_path / "more.json", [conv("torchvision", 3.0), conv("dense", 5.0)], command="pytest -k more")
    both = tables(tmp_path, written, more)
    ours = cells(both, "P3-b8", "fp16", "forward", "ours")
    assert (ours["torchvision ÷"], ours["dense ÷"]) == ("3", "5")
    assert "    pytest --benchmark-only\n    pytest -k more\n" in both and "not there" not in both


def test_goals_are_ratios_of_the_rows_they_name(tmp_path):
    rows = [
        conv("dense", 4.0, precision="bf16"),
        conv("ours", 8.0, precision="bf16"),
        conv("torchvision", 70.0),
        conv("ours", 10.0),
        conv("torchvision", 30.0, "P4-b8"),
        conv("ours", 5.0, "P4-b8"),
        conv("torchvision", mode="both", workspace_MB=800.0),
        conv("ours", mode="deterministic-both", workspace_MB=100.0),
        conv("dense", 3.0, precision="bf16", mode="backward"),
        conv("ours", 1.0, precision="bf16", mode="backward"),
        conv("ours", 6.0, precision="bf16", mode="deterministic-backward"),
        row("dynamic_relu", "P3-b8", "bf16", "forward", "ours", percent_of_roof=91.0),
        row("block", "c256-b8", "fp16", "forward", "torchvision", 14.0),
        row("block", "c256-b8", "fp16", "forward", "ours", 2.0),
        row("dyhead6", "c256-b1", "fp16", "forward", "eager", 60.0),
        row("dyhead6", "c256-b1", "fp16", "forward", "ours", 20.0),
        row("dyhead6", "c256-b1", "fp16", "forward", "graph", 4.0),
        conv("dense", 10.0, "P3-b1", "fp32", "both", device="cpu"),
        conv("ours", 20.0, "P3-b1", "fp32", "both", device="cpu"),
    ]
    found = read(rows_file(tmp_path / "rows.json", rows)).rows
    assert [verdict(goal, found) for goal in GOALS] == [
        "P3: 0.5",
        "P3: 7; P4: 6; P3, ours in bf16: 8.75; P4, ours in bf16: not measured",
        "not measured",
        "P3: 0.5",
        "P3: 8; P3, ours in bf16: not measured",
        "P3 fp16: not measured; P3 bf16: 91",
        "torchvision's operator: 7; plain PyTorch: not measured",
        "torchvision's operator: not measured; plain PyTorch: 15",
        "not measured",
        "P3: 0.5",
    ]
    text = tables(tmp_path, tmp_path / "rows.json")
    line = cells(text, "deformable convolution forward, bf16: dense cuDNN channels last ÷ ours")
    assert (line["reach"], line["aim"], line["measured"]) == ("0.50", "0.65", "P3: 0.5")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "Expecting property name"),
        ("[]", "no rows of this project's benchmarks"),
        ('{"machine_info": {"node": "x"}, "benchmarks": []}', "no rows of this project's benchmarks"),
        ('{"machine_info": {}, "benchmarks": ["x"], "failed": []}', "no rows of this project's benchmarks"),
    ],
)
def test_a_file_that_is_none_is_one_error_that_names_it(tmp_path, capsys, content, message):
    path = tmp_path / "broken.json"
    if content is not None:
        path.write_text(content)
    assert main([str(path), str(tmp_path / "results")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1
    assert str(path) in printed and message in printed
    assert not (tmp_path / "results").exists()


def test_rows_of_two_machines_do_not_mix(tmp_path, capsys):
    first = rows_file(tmp_path / "first.json", [conv("ours")])
    second = rows_file(tmp_path / "second.json", [conv("dense")], machine=MACHINE | {"device": "Another GPU"})
    assert main([str(first), str(second), str(tmp_path / "results")]) == 2
    assert capsys.readouterr().err == (
        f"error: {second}: not measured where the files before it were: device is Another GPU, not Some GPU\n"
    )


def test_rows_without_times_and_no_rows_are_errors(tmp_path, capsys):
    untimed = conv("ours")
    del untimed["ms_p50"]
    assert main([str(rows_file(tmp_path / "rows.json", [untimed])), str(tmp_path / "results")]) == 2
    assert "a row has no time" in capsys.readouterr().err
    assert main([str(rows_file(tmp_path / "rows.json", [])), str(tmp_path / "results")]) == 2
    assert "nothing was measured" in capsys.readouterr().err
