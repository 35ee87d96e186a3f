"""The Triton kernels on CPU tensors: what became of the child process in which they are tested."""

import importlib.util

import pytest
from interpreter_child import COMMAND, FOLDER


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_under_the_interpreter(interpreter_child):
    """Everything in tests/interpreter passes; a failure shows what the child printed."""
    code, passed, printed = interpreter_child.result()
    if code != 0:
        pytest.fail(f"{' '.join(COMMAND)}\n{printed[-8000:]}", pytrace=False)
    assert passed >= len(list(FOLDER.glob("test_*.py"))), printed[-2000:]
