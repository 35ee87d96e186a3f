"""What every test may rely on: where the golden vectors lie, which machine parts are here, and poisoned memory."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tabulate import tabulate

GOLDEN = Path(__file__).parent / "golden"


def pytest_configure(config):
    # Without the flag a benchmark runs once, untimed: enough to see that it still works.
    if not config.getoption("benchmark_only", True):
        config.option.benchmark_disable = True


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
        return
    rows = [{"benchmark": benchmark.name} | benchmark.extra_info for benchmark in measured]
    terminalreporter.write_line(tabulate(rows, headers="keys", floatfmt=".4g"))
    reasons = {str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", ())}
    for reason in sorted(reason for reason in reasons if "missing provider" in reason):
        terminalreporter.write_line(reason.removeprefix("Skipped: "), yellow=True)
    if not measured:
        terminalreporter.write_line("ERROR: --benchmark-only, but nothing was measured", red=True)


def pytest_benchmark_update_machine_info(config, machine_info):
    from kernels.roofline import default_device, machine_line

    machine_info["summary"] = machine_line(default_device())


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a GPU; torch sees none")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def golden():
    """Load one file of golden vectors as a dict of arrays."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
            return dict(file)

    return load


@pytest.fixture
def poison(monkeypatch):
    """`torch.empty` and its kin hand out NaN, so an element that nobody writes fails the comparison."""

    def poisoned(make):
        def call(*arguments, **options):
            tensor = make(*arguments, **options)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return call

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
