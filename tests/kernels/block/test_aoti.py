"""What AOTInductor packages runs where `kernels` alone is imported."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from lively import lively_detector
from places import ROOT

from heads import DyHead
from heads.onnx.model import ExportedDetector

# What the compiler makes of the program's frame costs most of its time, and nothing here.
QUICK = {"aot_inductor.compile_wrapper_opt_level": "O0"}
FRESH = """
import sys, torch, kernels
maps, wanted = torch.load(sys.argv[1])
found = torch._inductor.aoti_load_package(sys.argv[2])(maps)
assert "heads" not in sys.modules
print(max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True)))
"""


def a_dyhead():
    torch.manual_seed(0)
    head = DyHead(16, 1, levels=1).eval()
    torch.nn.init.normal_(head.blocks[0].spatial.offset.weight, std=0.1)
    return head, [torch.randn(2, 16, 12, 9)]


def a_detector():
    return ExportedDetector(lively_detector("atss"), raw=True), torch.rand(2, 3, 270, 330)


@pytest.mark.skipif(
    "DYHEAD_EXPORTS" not in os.environ, reason="takes minutes: DYHEAD_EXPORTS=1 or `make parity` runs it"
)
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler, which AOTInductor needs")
@pytest.mark.parametrize("make", [a_dyhead, a_detector])
def test_a_package_in_a_fresh_process(make, tmp_path):
    head, maps = make()
    with torch.no_grad():
        program = torch.export.export(head, (maps,))
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "head.pt2"), inductor_configs=QUICK
        )
        torch.save((maps, head(maps)), tmp_path / "values.pt")
    command = [sys.executable, "-c", FRESH, str(tmp_path / "values.pt"), package]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout and float(done.stdout) < 1e-5, done.stderr
