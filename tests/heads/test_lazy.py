"""`heads` needs torch, triton and numpy alone, and imports a name when it is asked for."""

import subprocess
import sys
import textwrap

import pytest
from places import ROOT

import heads
from heads.build import DETECTORS

# Everything beyond the core dependencies that this machine may have.
BLOCKED = ("pandas", "matplotlib", "PIL", "pycocotools", "tabulate", "safetensors", "scipy", "torchvision")
BLOCK = f"""
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(f"{{name}} is not installed here", name=name)
sys.meta_path.insert(0, Block())
"""
DETECT = """
import torch
import kernels
from heads import build_detector
images = [torch.rand(3, 32, 64, generator=torch.Generator().manual_seed(0))]
outline = torch.tensor([8.0, 8, 40, 8, 40, 28, 8, 28])
target = {"boxes": torch.tensor([[8.0, 8, 40, 28]]), "labels": torch.tensor([1])}
bitmap = torch.zeros(1, 32, 64, dtype=torch.bool)
bitmap[0, 8:28, 8:40] = True
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_every_detector_is_built_and_runs_with_the_core_dependencies_alone():
    run = f"""
for name in {list(DETECTORS)}:
    model = build_detector(name, 3, "tiny", "LSC", depth=1, channels=16)
    wanted = target | ({{"masks": bitmap}} if model.needs_masks else {{}})
    sum(model(images, [wanted]).values()).backward()
    with torch.inference_mode():
        (found,) = model.eval()(images)
    assert found["boxes"].shape == (len(found["scores"]), 4)
print("all ran")
"""
    result = python(BLOCK + DETECT + run)
    assert (result.returncode, result.stdout) == (0, "all ran\n"), result.stderr


def test_masks_as_polygons_say_what_draws_them():
    polygons = """
model = build_detector("mask_rcnn", 3, "tiny", "LSC", depth=1, channels=16)
model(images, [target | {"masks": [[outline.numpy()]]}])
"""
    result = python(BLOCK + DETECT + polygons)
    assert (
        result.returncode and "ImportError" in result.stderr and "pip install 'dyhead-lab[ablations]'" in result.stderr
    )
    result = python(DETECT + polygons)
    assert result.returncode == 0, result.stderr


def test_a_safetensors_file_says_what_reads_it(tmp_path):
    (tmp_path / "weights.safetensors").touch()
    result = python(
        f"{BLOCK}\nfrom heads.released.weights import read_weights\nread_weights(r'{tmp_path}/weights.safetensors')"
    )
    assert "ImportError" in result.stderr and "pip install 'dyhead-lab[ablations]'" in result.stderr


def test_the_blocked_modules_cannot_be_imported():
    tries = "".join(f"try:\n    import {name}\nexcept ImportError:\n    print('{name}')\n" for name in BLOCKED)
    assert python(BLOCK + tries).stdout.split() == list(BLOCKED)


def test_a_dyhead_loads_no_detector():
    code = """
        import sys
        from heads import DyHead
        loaded = [name for name in sys.modules if name.startswith(("heads.dense", "heads.two_stage", "heads.query"))]
        assert DyHead.__name__ == "DyHead" and loaded == [], loaded
    """
    result = python(textwrap.dedent(code))
    assert result.returncode == 0, result.stderr


def test_every_public_name_is_there_and_no_other():
    for name in heads.__all__:
        assert name in dir(heads) and getattr(heads, name) is not None
    assert heads.__all__ == sorted(heads.__all__)
    with pytest.raises(AttributeError, match="module 'heads' has no attribute 'Dyhead'"):
        _ = heads.Dyhead
    with pytest.raises(ImportError, match="Dyhead"):
        from heads import Dyhead  # noqa: F401
