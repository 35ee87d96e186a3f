"""These tests need TRITON_INTERPRET=1 from the start; tests/conftest.py has the command that runs them."""

from kernels.backend import INTERPRET

collect_ignore_glob = [] if INTERPRET else ["test_*.py"]
