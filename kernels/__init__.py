"""GPU operators of DyHead in Triton, each with a plain PyTorch path."""

from kernels.backend import use_backend
from kernels.deform_conv import deform_conv2d, deform_conv2d_levels
from kernels.dynamic_relu import dynamic_relu
from kernels.op import OPS

__all__ = ["OPS", "deform_conv2d", "deform_conv2d_levels", "dynamic_relu", "use_backend"]
