"""Child processes that run a script, for tests of what several processes do to the same files."""

import subprocess
import sys

from places import ROOT


def start(script, *arguments):
    """A child process that runs `script` in the repository; its arguments are sys.argv[1:]."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(processes, seconds=60):
    outputs = []
    for process in processes:
        out, err = process.communicate(timeout=seconds)
        assert process.returncode == 0, err
        outputs.append(out)
    return outputs
