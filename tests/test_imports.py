"""The one rule of the house: imports run downward, ablations → heads → kernels."""

import ast
from pathlib import Path

import pytest
from places import ROOT

ALLOWED = {"kernels": {"kernels"}, "heads": {"heads", "kernels"}, "ablations": {"ablations", "heads", "kernels"}}
FILES = [path for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]


def imported_packages(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction, write the package's name"
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downward(path):
    package = path.relative_to(ROOT).parts[0]
    assert imported_packages(path) & {*ALLOWED, "tests"} <= ALLOWED[package]
