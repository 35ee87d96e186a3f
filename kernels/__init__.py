"""GPU operators of DyHead in Triton, each with a plain PyTorch path."""

from kernels.backend import use_backend
from kernels.deform_conv import deform_conv2d, deform_conv2d_levels

__all__ = ["deform_conv2d", "deform_conv2d_levels", "use_backend"]
