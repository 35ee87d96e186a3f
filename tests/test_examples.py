"""The examples in docstrings run, and the public functions and classes have one."""

import doctest
import importlib
import inspect

import pytest
from places import ROOT

import heads
import kernels

FILES = [path for package in ("kernels", "heads", "ablations") for path in sorted((ROOT / package).rglob("*.py"))]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in FILES
    if "    >>> " in path.read_text(encoding="utf-8")
]
# `dyhead_block` shows the first two; the last takes a whole checkpoint.
SHOWN_ELSEWHERE = {"BlockParameters", "dyhead_blocks", "open_released"}
# Dicts and constants are what they hold.
PUBLIC = [
    pytest.param(getattr(package, name), id=f"{package.__name__}.{name}")
    for package in (kernels, heads)
    for name in package.__all__
    if callable(getattr(package, name)) and name not in SHOWN_ELSEWHERE
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried > 0 and failed == 0


@pytest.mark.parametrize("public", PUBLIC)
def test_what_is_public_has_an_example(public):
    assert ">>> " in (inspect.getdoc(public) or "")
