"""GPU operators of DyHead in Triton, each with a plain PyTorch path.

What holds for all of them, on both paths:

- Arguments are checked once, before a path is chosen, and no check reads what a tensor holds
  (`kernels/runtime/checks.py`). A ValueError, or a TypeError for a wrong Python type, names the argument, what it is
  and what is wanted.
- A coordinate (an offset, a side of a box, the index of a box's image) that is NaN, infinite or of no image samples
  nothing: its samples count as 0 and have a gradient of 0, and no other sample, image or box is touched.
- A NaN or an infinity anywhere else, in a map, a mask, a weight or a gradient, spreads as in plain PyTorch: to what is
  computed from it, 0 × NaN included, and to nothing else. The few exceptions stand at the top of the operator's file.
"""

from kernels.backend import use_backend
from kernels.block.dyhead_block import dyhead_block, dyhead_blocks
from kernels.block.parameters import BlockParameters
from kernels.deform_conv.module import DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack
from kernels.deform_conv.operator import deform_conv2d, deform_conv2d_levels
from kernels.deform_conv.patch import patch_torchvision
from kernels.dynamic_relu.operator import dynamic_relu
from kernels.regions.border_align import border_align
from kernels.regions.nms import batched_nms, nms
from kernels.regions.nms_mask import nms_mask
from kernels.regions.roi_align import roi_align
from kernels.version import __version__

__all__ = [
    "BlockParameters",
    "DeformConv2d",
    "DeformConv2dPack",
    "ModulatedDeformConv2dPack",
    "__version__",
    "batched_nms",
    "border_align",
    "deform_conv2d",
    "deform_conv2d_levels",
    "dyhead_block",
    "dyhead_blocks",
    "dynamic_relu",
    "nms",
    "nms_mask",
    "patch_torchvision",
    "roi_align",
    "use_backend",
]

# What others import of Hugging Face's package of this name.
_OF_HUGGING_FACE = ("get_kernel", "get_local_kernel", "get_locked_kernel", "has_kernel", "kernelize")


def __getattr__(name: str) -> object:
    if name in _OF_HUGGING_FACE:
        # Not an AttributeError, which `from kernels import` replaces by a message of its own.
        raise ImportError(
            f"{name} is of Hugging Face's package kernels; the one at {__file__} is dyhead-lab's: keep the two in "
            "separate environments"
        )
    raise AttributeError(f"module 'kernels' has no attribute {name!r}")
