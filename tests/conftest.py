"""What every test may rely on: where the golden vectors lie, which machine parts are here, and poisoned memory."""

import os
import shlex
from collections import Counter

import numpy as np
import pytest
import torch
from interpreter import quicken
from places import GOLDEN, TESTS
from tabulate import tabulate

from ablations.rows.machine import machine_info as describe_machine
from kernels.backend import INTERPRET

INTERPRETED = "TRITON_INTERPRET=1 pytest tests/interpreter tests/kernels/regions"


class Unmeasured:
    """Benchmarks that left no row: rivals that are missing, with the reason, and cases that failed."""

    def __init__(self):
        self.missing: list[dict[str, str]] = []
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report):
        properties = dict(report.user_properties)
        if report.when == "call" and "missing" in properties:
            self.missing.append(properties["missing"])
        if report.failed:
            self.failed.append(report.nodeid.split("::")[-1])

    def pytest_benchmark_update_json(self, output_json):
        output_json |= {"missing": self.missing, "failed": self.failed}


def pytest_configure(config):
    config.pluginmanager.register(Unmeasured(), "unmeasured")
    if INTERPRET:
        quicken()
    # Without the flag a benchmark runs once, untimed: enough to see that it still works.
    if not config.getoption("benchmark_only", True):
        config.option.benchmark_disable = True
        # Deterministic algorithms refuse cuBLAS without it. Timed cases set it where they need it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _measured(config) -> list | None:
    """What `--benchmark-only` measured; None without the flag."""
    if config.getoption("benchmark_only", False) and not config.option.collectonly:
        return config._benchmarksession.benchmarks
    return None


def pytest_sessionfinish(session):
    if _measured(session.config) == [] and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    measured = _measured(config)
    if measured is None:
        if not INTERPRET and config.args_source is config.ArgsSource.TESTPATHS:
            terminalreporter.write_line(f"the Triton kernels are tested by a run of its own: {INTERPRETED}")
        return
    rows = [
        {"benchmark": benchmark.name} | {k: v for k, v in benchmark.extra_info.items() if not isinstance(v, str)}
        for benchmark in measured
    ]
    terminalreporter.write_line(tabulate(rows, headers="keys", floatfmt=".4g"))
    missing = config.pluginmanager.get_plugin("unmeasured").missing
    for (provider, reason), count in Counter((row["provider"], row["reason"]) for row in missing).items():
        terminalreporter.write_line(f"missing provider {provider} ({count} rows): {reason}", yellow=True)
    if not measured:
        terminalreporter.write_line("ERROR: --benchmark-only, but nothing was measured", red=True)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine = describe_machine(command=shlex.join(["pytest", *map(str, config.invocation_params.args)]))
    command, commit, dirty = (machine.pop(name) for name in ("command", "commit", "dirty"))
    machine["commit"] = f"{(commit or 'unknown')[:12]}{' with uncommitted changes' if dirty else ''}"
    if not torch.cuda.is_available():
        machine["threads"] = torch.get_num_threads()
    machine_info |= {"machine": machine, "commands": [command]}


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a GPU; torch sees none")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
    # One process either interprets kernels or does not: Triton reads the variable when a kernel is made.
    left = [item for item in items if not _belongs_here(item)]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if _belongs_here(item)]


def _belongs_here(item) -> bool:
    for_the_interpreter = "interpreter" in item.keywords or TESTS / "interpreter" in item.path.parents
    return for_the_interpreter or "both_paths" in item.keywords if INTERPRET else not for_the_interpreter


@pytest.fixture
def golden():
    """Load one file of golden vectors as a dict of arrays."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
            return dict(file)

    return load


@pytest.fixture
def poison(monkeypatch):
    """`torch.empty` and its kin hand out NaN and absurd integers: what nobody writes fails the comparison."""

    def poisoned(make):
        def call(*arguments, **options):
            tensor = make(*arguments, **options)
            floating = tensor.is_floating_point()
            return tensor.fill_(torch.nan if floating else torch.iinfo(tensor.dtype).max)

        return call

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
