"""DyHead, the detectors it plugs into, and the weights released for them."""

from heads.build import build_detector
from heads.dyhead.dyhead import DyHead
from heads.released.names import load_released

__all__ = ["DyHead", "build_detector", "load_released"]
