"""The session of a first GPU: rehearsed as a whole, and what happens where it is stopped, fails or has no time."""

import csv
import json
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import bench_heads
import bench_kernels
import pytest
import torch
import triton
from places import ROOT
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.backend import INTERPRET
from kernels.bench import tune
from kernels.bench.compile import disassembled
from kernels.bench.goals import Name
from kernels.bench.session import __main__ as session
from kernels.bench.session import carveout, probes, report, stages
from kernels.bench.session.gather_kernels import gather_product_kernel
from kernels.bench.session.stages import REHEARSAL_STAGES, STAGES, Stage
from kernels.bench.session.store import DONE, Outcome, Row, Store

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: nothing to rehearse")


def start(out, *arguments, minutes="10"):
    return session.main(["--rehearse", "--minutes", minutes, "--out", str(out), *arguments])


def test_a_rehearsal_runs_every_stage_and_is_no_measurement(tmp_path, capsys):
    assert start(tmp_path) == 0, (tmp_path / "session.log").read_text()[-4000:]
    assert capsys.readouterr().out.count(": done, ") == len(REHEARSAL_STAGES)
    files = {path.name for path in tmp_path.iterdir()}
    assert files >= {"kernels.md", "session.csv", "session.jsonl", "kernels.json", "kernels-tuned.json"}
    assert len(files) <= 8
    text = (tmp_path / "kernels.md").read_text()
    assert text.startswith("**A rehearsal: nothing in here is a measurement.**") and "| measured |" not in text
    with (tmp_path / "session.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["rehearsed"] for row in rows} == {"True"}
    assert {"tests", "roofs", "gathers", "forward", "input-gradient", "tune", "benchmarks"} <= {
        r["stage"] for r in rows
    }
    records = [json.loads(line) for line in (tmp_path / "session.jsonl").read_text().splitlines()]
    assert all(record["rehearsed"] for record in records)
    for name in ("kernels.json", "kernels-tuned.json"):
        assert stages.REHEARSAL in json.loads((tmp_path / name).read_text())["machine_info"]["machine"].values()
    # The same command again has nothing left to do.
    assert start(tmp_path, minutes="0") == 0
    assert capsys.readouterr().out.count(": done before\n") == len(REHEARSAL_STAGES)


def test_what_does_not_fit_is_not_begun_and_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(session, "run", None)
    assert start(tmp_path, minutes="0") == 1
    printed = capsys.readouterr().out
    assert printed.count(": skipped, ") == len(REHEARSAL_STAGES)
    assert "tuned: skipped, nothing was done to come after (tune)" in printed
    assert (tmp_path / "kernels.md").read_text().count("| not run ") == len(REHEARSAL_STAGES)


@pytest.fixture
def one_stage(monkeypatch):
    """A session of one stage, which ends as the returned list says, run by run."""
    outcomes = []
    monkeypatch.setattr(session, "REHEARSAL_STAGES", (Stage("roofs", "probe", "roofs", 1),))
    monkeypatch.setattr(session.Clock, "run", lambda self, command, environment, most: outcomes.pop(0))
    return outcomes


def test_a_stopped_stage_is_run_again_and_a_failed_one_if_asked_to(tmp_path, capsys, one_stage):
    one_stage += ["stopped: the time was over", "failed: exit code 1: a | b", DONE]
    assert start(tmp_path) == 1
    assert start(tmp_path) == 1
    assert "| failed: exit code 1: a / b " in (tmp_path / "kernels.md").read_text()
    assert start(tmp_path) == 1 and len(one_stage) == 1
    assert start(tmp_path, "--retry-failed") == 0 and not one_stage
    assert capsys.readouterr().out.count("failed: exit code 1: a | b before") == 1


def test_a_process_is_stopped_when_the_time_is_over_and_its_fault_is_told(tmp_path):
    log = tmp_path / "log"
    forever, over, clock = [sys.executable, "-c", "while True: pass"], session.Clock(0, log), session.Clock(600, log)
    assert over.run(forever, {}, most=600) == "stopped: the time was over"
    assert clock.run(forever, {}, most=1) == "failed: not done after 1 s"
    assert clock.run([sys.executable, "-c", "pass"], {}, most=600) == DONE
    assert clock.run([sys.executable, "-c", "raise SystemExit('no')"], {}, most=600) == "failed: exit code 1: no"


def test_rows_survive_a_kill_and_do_not_mix(tmp_path):
    store = Store(tmp_path, "some GPU", rehearsed=False)
    store.add(Row("roofs", "copy", 1.0, "GB/s"))
    with store.path.open("a") as file:
        file.write('{"stage": "roofs", "wh')
    again = Store(tmp_path, "some GPU", rehearsed=False)
    again.add(Row("roofs", "copy", 2.0, "GB/s"))
    again.add(Outcome("roofs", DONE, 3.0))
    assert again.rows() == [Row("roofs", "copy", 2.0, "GB/s")]
    assert again.outcomes() == {"roofs": Outcome("roofs", DONE, 3.0)}
    for machine, rehearsed in (("another GPU", False), ("some GPU", True)):
        with pytest.raises(ValueError, match="has rows of some GPU, and this is"):
            Store(tmp_path, machine, rehearsed)


def test_without_a_gpu_it_says_so_in_one_line(tmp_path, capsys):
    assert session.main(["--minutes", "1", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: torch sees no GPU; --rehearse needs none\n"


def test_failed_tests_are_rows(tmp_path):
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure message="1 is not 2&#10;more"/>'
        '</testcase><testcase name="c"><skipped/></testcase></testsuite></testsuites>'
    )
    store = Store(tmp_path, "some GPU", rehearsed=False)
    stages._collect_tests(Stage("tests", "tests", "", 1), store, tmp_path)
    assert [(row.what, row.value, row.note) for row in store.rows()] == [
        ("tests passed", 1, ""),
        ("tests failed", 1, ""),
        ("tests skipped", 1, ""),
        ("failed: b", None, "1 is not 2"),
    ]


def test_a_prediction_is_the_larger_of_two_least_times():
    name = Name("cuda", "deform_conv2d", "P3-b8", "bf16", "forward", "ours")
    # A millisecond of 395 GFLOP and 43 MB: half a millisecond of multiplying, a hundredth of copying.
    row = {"ms_p50": 1.0, "TFLOP/s": 395.0, "GB/s": 43.0}
    assert report._least(name, row) == "0.5000"
    assert report._least(name, row | {"TFLOP/s": 0.0}) == "0.0100"
    assert (
        report._least(replace(name, provider="torchvision"), row)
        == report._least(replace(name, device="cpu"), row)
        == ""
    )


def selected(expression: str, names: set[str]) -> set[str]:
    """What `pytest -k` would choose of these names."""

    def holds(name: str) -> bool:
        words = re.sub(r"[^\s()]+", lambda m: m[0] if m[0] in ("and", "or", "not") else str(m[0] in name), expression)
        return eval(words)

    return {name for name in names if holds(name)}


def test_the_benchmarks_of_a_session_are_the_headline_on_every_level():
    heads = {str(case) for case in bench_heads.GPU_CASES}
    operators = {str(case) for case in bench_kernels.cases("cuda", timed=True)}
    chosen = {s.name: selected(s.select, heads | operators) for s in STAGES if s.kind == "benchmark"}
    assert all(chosen.values())
    every = set().union(*(names for stage, names in chosen.items() if not stage.startswith("tuned")))
    for level, batch in ((level, batch) for level in ("P3", "P4", "P5", "P6", "P7") for batch in (1, 8)):
        for mode in ("forward", "both", "deterministic-backward"):
            assert f"deform_conv2d-{level}-b{batch}-bf16-{mode}-ours" in every
        assert f"deform_conv2d-{level}-b{batch}-bf16-backward-dense" in every
        assert f"dynamic_relu-{level}-b{batch}-bf16-forward-ours" in every
    wanted = {"deform_conv2d-P3-b8-fp16-both-torchvision", "deform_conv2d-P4-b1-fp16-forward-torchvision"}
    wanted |= {f"block-c256-b8-bf16-forward-{provider}" for provider in ("eager", "compiled", "ours", "graph")}
    wanted |= {f"dyhead6-c256-b1-fp16-forward-{provider}" for provider in ("eager", "ours", "graph")}
    assert wanted <= every
    # Only one kind of stage waits for a compiler.
    assert [stage for stage, names in chosen.items() if any("compiled" in name for name in names)] == ["block compiled"]


def test_every_search_for_tiles_is_for_one_kernel():
    jobs = [f"{table.kernel} {precision}" for table, _ in tune.KERNELS for precision in tune.PRECISIONS]
    for stage in STAGES:
        if stage.kind == "tune":
            assert sum(stage.select in job for job in jobs) == 1, stage.select


def test_a_carve_out_has_room_for_one_program_and_needs_a_driver(monkeypatch):
    whole = SimpleNamespace(shared_memory_per_multiprocessor=228 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: whole)
    kernel = SimpleNamespace(metadata=SimpleNamespace(shared=56 * 1024), function=1)
    assert carveout.enough(kernel) == 25

    def refuses(name):
        return SimpleNamespace(cuFuncSetAttribute=lambda function, attribute, percent: 1)

    monkeypatch.setattr(carveout.ctypes, "CDLL", refuses)
    with pytest.raises(RuntimeError, match="cuFuncSetAttribute returns 1"):
        carveout.prefer(kernel, 25)


def test_the_tests_of_a_session_are_there():
    arguments = next(stage for stage in STAGES if stage.kind == "tests").select.split("|")
    assert all((ROOT / path).exists() for path in arguments if path.endswith(".py"))


@pytest.mark.skipif(INTERPRET, reason="what is interpreted has no code")
@pytest.mark.parametrize("early", [True, False])
def test_the_gather_asks_what_it_should(early, monkeypatch):
    """The corners' loads, 16 bytes each, stand before the barrier that a product waits for, or behind the product."""
    names = gather_product_kernel.arg_names
    pointers = dict.fromkeys(("x", "shares", "weight", "out"), "*bf16") | {"base": "*i32"}
    numbers = {"C": 256, "OUT": 256, "TAPS": 9, "PIXELS": 128, "BLOCK_C": 32, "PACKED": True, "EARLY": early}
    signature = pointers | {"rows": "i32", "W": "i32"} | dict.fromkeys(numbers, "constexpr")
    source = ASTSource(
        fn=gather_product_kernel,
        signature={name: signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in numbers.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, "rows")},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "num_stages": 3})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(multi_processor_count=132))
    predicted, step = probes._by_issue(compiled, flops=4096 * 132 * 1_755_000)
    # A millisecond, as issuing takes less than the products do.
    assert predicted == "1.000" and ", 3 barriers, " in step
    code = re.findall(r"\*/\s+(?:@!?U?P\w+ )?(LDG\.E\.128|HGMMA)\b", disassembled(compiled.asm["cubin"]))
    # Eight loads ahead of the loop, and eight in it.
    product = code.index("HGMMA")
    assert code[:product].count("LDG.E.128") == (16 if early else 8)
    assert code[product:].count("LDG.E.128") == (0 if early else 8)
