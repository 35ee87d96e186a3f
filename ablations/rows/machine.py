"""Which machine, which software and which commit made a number: the part of every row that says where it is from."""

import argparse
import functools
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ablations.rows.row import Machine

ROOT = Path(__file__).resolve().parents[2]
CODE = ("kernels", "heads", "ablations")


def device_name(text: str) -> str:
    """`cpu`, `cuda` or `cuda:N` of a device that is here, for argparse; `auto` is the GPU, or the CPU without one."""
    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    # `cpu:0` is PyTorch's as well, but no row may say that it comes from another device than `cpu`.
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"unknown device {text!r}; it is auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text != "cpu" and int(match[1] or 0) >= count:
        raise argparse.ArgumentTypeError(f"{text} is not here: torch sees {count} GPUs")
    return text


def machine_info(device: str | torch.device | None = None, command: str | None = None) -> Machine:
    """The `machine` of a row.

    Args:
        device: Where the cell runs; the first GPU, or the CPU where there is none, if it is not given.
        command: The command line, if it is not this process's own.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    commit, dirty = _commit()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "driver": _driver() if device.type == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton", "pytorch-triton", "pytorch-triton-rocm"),
        "commit": commit,
        "dirty": dirty,
        "command": public_command(own_command() if command is None else command),
    }


def machine_line(machines: Iterable[Machine]) -> str:
    """One line for the top of a table. Rows from several machines, commits or commands show each value once."""
    machines = list(machines)

    def each(write: Callable[[Machine], object]) -> str:
        return " and ".join(dict.fromkeys(str(write(machine)) for machine in machines)) or "unknown"

    def device(machine: Machine) -> str:
        cores = machine.get("cores")
        return f"{machine.get('device') or 'unknown'}{f' ({cores} cores)' if cores else ''}"

    def commit(machine: Machine) -> str:
        name = (machine.get("commit") or "unknown")[:12]
        return f"{name} with uncommitted changes" if machine.get("dirty") else name

    line = " | ".join(
        (
            f"device: {each(device)}",
            f"driver: {each(lambda machine: machine.get('driver') or 'none')}",
            f"python: {each(lambda machine: machine.get('python') or 'unknown')}",
            f"torch: {each(lambda machine: machine.get('torch') or 'unknown')}",
            f"triton: {each(lambda machine: machine.get('triton') or 'none')}",
            f"commit: {each(commit)}",
            f"command: {each(lambda machine: machine.get('command') or 'unknown')}",
        )
    )
    return " ".join(line.split())


def own_command() -> str:
    """This process's command as it was typed: `python -m package.module ...` or `python script ...`."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    module = spec.name.removesuffix(".__main__") if spec else None
    start = ["python", "-m", module] if module else ["python", *sys.argv[:1]]
    return shlex.join([*start, *sys.argv[1:]])


def public_command(command: str) -> str:
    """`command` with absolute paths made relative to the working directory, or cut to `.../name` outside of it.

    Example:
        >>> from ablations.rows.machine import public_command
        >>> public_command("python -m ablations.run --grid --data /somewhere/else/coco")
        'python -m ablations.run --grid --data .../coco'
    """

    def relative(match: re.Match[str]) -> str:
        path = Path(match["path"])
        inside = path.is_relative_to(Path.cwd())
        return match["before"] + (str(path.relative_to(Path.cwd())) if inside else f".../{path.name}")

    return shlex.join(re.sub(r"(?P<before>^|=)(?P<path>/.*)", relative, token) for token in shlex.split(command))


@functools.cache
def _cpu_name() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine() or "CPU"


@functools.cache
def _driver() -> str | None:
    if torch.version.hip:
        version = Path("/sys/module/amdgpu/version")
        return version.read_text().strip() if version.exists() else f"ROCm {torch.version.hip}"
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0] or None


@functools.cache
def _commit() -> tuple[str | None, bool | None]:
    # A copy inside somebody else's repository must not be given that repository's commit.
    top = _output("git", "-C", str(ROOT), "rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != ROOT:
        return None, None
    commit = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    return commit or None, bool(_output("git", "-C", str(ROOT), "status", "--porcelain", "--", *CODE))


def _version(*names: str) -> str | None:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _output(*command: str) -> str:
    """What a command prints, or nothing when it is missing, fails or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
