"""A kernel's signature can be read: what belongs together is a NamedTuple, and no formatting is switched off."""

import ast

import pytest
from places import ROOT

FILES = sorted((ROOT / "kernels").rglob("*.py"))
# What a kernel or a device function takes besides what is known at compilation; a NamedTuple is one.
MOST = 14


def functions():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(x) for x in node.decorator_list):
                yield pytest.param(node, id=f"{path.relative_to(ROOT / 'kernels')}:{node.name}")


@pytest.mark.parametrize("function", list(functions()))
def test_a_kernel_takes_few_arguments(function):
    known = [a for a in function.args.args if a.annotation is not None and "constexpr" in ast.unparse(a.annotation)]
    assert len(function.args.args) - len(known) <= MOST


def test_formatting_is_not_switched_off():
    places = [path for folder in ("kernels", "heads", "ablations", "tests") for path in (ROOT / folder).rglob("*.py")]
    switched = {str(path.relative_to(ROOT)): path.read_text().count("# fmt: ") for path in places}
    assert sum(count for path, count in switched.items() if not path.endswith("test_signatures.py")) <= 5, switched
