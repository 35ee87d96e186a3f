"""What a detector asks of its prediction head is a class: every head keeps it, and nobody probes for more."""

import ast
import re

import pytest
import torch
from places import ROOT

from heads import build_detector
from heads.build import DETECTORS
from heads.detector import PredictionHead

PROBES = {"isinstance", "issubclass", "hasattr", "getattr"}
# What is not to be asked for its class, nor for what it has.
PARTS = re.compile(r"(^|\.)(head|trunk|fpn|backbone|model|detector)$")
FILES = [path for package in ("kernels", "heads", "ablations") for path in sorted((ROOT / package).rglob("*.py"))]


def probes(source: str) -> list[str]:
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        ast.unparse(call)
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id in PROBES and PARTS.search(ast.unparse(call.args[0]))
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_asks_what_a_head_is(path):
    assert probes(path.read_text()) == []


def test_the_search_for_probes_finds_them():
    assert probes("hasattr(getattr(self.model, 'head', None), 'full_image')") == ["getattr(self.model, 'head', None)"]
    assert probes("isinstance(head, DETRHead)") == ["isinstance(head, DETRHead)"]
    assert probes("isinstance(heads, list)\ngetattr(options, 'model')") == []


@pytest.mark.parametrize("name", DETECTORS)
def test_every_head_keeps_the_contract(name):
    with torch.device("meta"):
        head = build_detector(name, 3, "tiny", channels=16).head
    assert isinstance(head, PredictionHead) and head.num_classes == 3
    for method in ("forward", "loss", "predict"):
        assert getattr(type(head), method) is not getattr(PredictionHead, method)


def test_a_head_without_methods_says_so_and_has_nothing_to_compute_for_a_full_image():
    head = PredictionHead()
    assert not head.needs_masks and head.full_image(None) is None
    for call in (lambda: head([], []), lambda: head.loss(None, [], []), lambda: head.predict(None, [])):
        with pytest.raises(NotImplementedError):
            call()
