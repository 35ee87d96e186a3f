"""The tests in tests/interpreter run in a child process, beside the others: it takes minutes, and one core."""

import os
import re
import subprocess
import sys
import tempfile
from typing import IO

from places import TESTS

FOLDER = TESTS / "interpreter"
COMMAND = [sys.executable, "-m", "pytest", str(FOLDER), "-p", "no:cacheprovider", "--tb=short"]


class InterpreterChild:
    """A pytest plugin: starts the child where its test will run, moves that test to the end, and leaves no child."""

    def __init__(self):
        self.process: subprocess.Popen | None = None
        self.output: IO[str] | None = None

    def pytest_collection_modifyitems(self, items):
        items.sort(key=lambda item: "interpreter_child" in getattr(item, "fixturenames", ()))

    def pytest_collection_finish(self, session):
        option = session.config.option
        wanted = session.items and "interpreter_child" in getattr(session.items[-1], "fixturenames", ())
        if wanted and not option.collectonly and not getattr(option, "benchmark_only", False):
            self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115
            # Triton reads TRITON_INTERPRET when a kernel is made, so it has to be there before the first import.
            environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(
                COMMAND, env=environment, cwd=FOLDER.parents[1], stdout=self.output, stderr=subprocess.STDOUT
            )

    def pytest_unconfigure(self):
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def result(self) -> tuple[int, int, str]:
        """The exit code of the child, how many tests passed in it, and what it printed; waits for its end."""
        code = self.process.wait()
        self.output.seek(0)
        text = self.output.read()
        passed = re.search(r"(\d+) passed", text)
        return code, int(passed[1]) if passed else 0, text
