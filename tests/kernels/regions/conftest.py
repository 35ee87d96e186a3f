"""Under the interpreter these tests run on the Triton path, and elsewhere on the one that the device takes."""

import pytest

from kernels import use_backend
from kernels.backend import INTERPRET


@pytest.fixture(autouse=True)
def path():
    with use_backend("triton" if INTERPRET else "auto"):
        yield
