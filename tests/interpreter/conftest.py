"""These tests need TRITON_INTERPRET=1 from the start: a run of their own, for which tests/conftest.py has the command."""

from kernels.backend import INTERPRET

collect_ignore_glob = [] if INTERPRET else ["test_*.py"]
