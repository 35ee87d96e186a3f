"""Deformable convolution, dynamic ReLU, RoIAlign and the block of DyHead, in Triton for GPUs and PyTorch for CPUs.

All functions are differentiable once, in float16, bfloat16, float32 and float64, take `torch.compile` and autocast, and
check their arguments; `layers` has those that can replace a module's forward.
"""

from kernels.backend import use_backend
from kernels.bench.hub import layers
from kernels.block.dyhead_block import dyhead_block
from kernels.block.parameters import BlockParameters
from kernels.deform_conv.operator import deform_conv2d
from kernels.dynamic_relu.operator import dynamic_relu
from kernels.regions.roi_align import roi_align

__all__ = ["BlockParameters", "deform_conv2d", "dyhead_block", "dynamic_relu", "layers", "roi_align", "use_backend"]
