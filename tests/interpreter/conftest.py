"""These tests need TRITON_INTERPRET=1 from the start; tests/test_interpreter.py runs them in a process that has it."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
