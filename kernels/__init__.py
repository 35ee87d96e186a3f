"""GPU operators of DyHead in Triton, each with a plain PyTorch path."""

from kernels.backend import use_backend
from kernels.border_align import border_align
from kernels.deform_conv import deform_conv2d, deform_conv2d_levels
from kernels.dynamic_relu import dynamic_relu
from kernels.nms import batched_nms, nms
from kernels.op import OPS
from kernels.roi_align import roi_align

__all__ = [
    "OPS",
    "batched_nms",
    "border_align",
    "deform_conv2d",
    "deform_conv2d_levels",
    "dynamic_relu",
    "nms",
    "roi_align",
    "use_backend",
]
