"""DyHead, the detectors it plugs into, and the weights released for them.

A name is imported when it is asked for, so that `from heads import DyHead` loads no detector.
"""

import importlib
from typing import TYPE_CHECKING

import kernels

if not hasattr(kernels, "deform_conv2d"):
    raise ImportError(
        f"the package kernels at {kernels.__file__} is not dyhead-lab's, which heads needs, but another of that name, "
        "such as Hugging Face's: keep the two in separate environments, or take our operators into that one with "
        "`python -m kernels.bench.hub DIR` and its get_local_kernel"
    )

if TYPE_CHECKING:
    from heads.backbones.resnet import BACKBONES
    from heads.build import DETECTORS, build_detector
    from heads.detector import Detector
    from heads.dyhead.dyhead import DyHead
    from heads.released.layouts import open_released
    from heads.released.names import load_released

__all__ = ["BACKBONES", "DETECTORS", "Detector", "DyHead", "build_detector", "load_released", "open_released"]

_MODULES = {
    "BACKBONES": "heads.backbones.resnet",
    "DETECTORS": "heads.build",
    "Detector": "heads.detector",
    "DyHead": "heads.dyhead.dyhead",
    "build_detector": "heads.build",
    "load_released": "heads.released.names",
    "open_released": "heads.released.layouts",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'heads' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    # The next look-up finds it without this function.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
