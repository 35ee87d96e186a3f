"""The Triton kernels on CPU tensors: one child process, because Triton reads TRITON_INTERPRET when a kernel is made."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreter"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_under_the_interpreter():
    """Everything in tests/interpreter passes; a failure shows what the child printed."""
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-p", "no:cacheprovider", "--tb=short"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(command, env=environment, cwd=FOLDER.parents[1], capture_output=True, text=True)
    if child.returncode != 0:
        pytest.fail(f"{' '.join(command)}\n{child.stdout[-8000:]}\n{child.stderr[-2000:]}", pytrace=False)
    passed = re.search(r"(\d+) passed", child.stdout)
    files = len(list(FOLDER.glob("test_*.py")))
    assert passed and int(passed[1]) >= files, child.stdout[-2000:]
