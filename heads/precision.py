"""The precision in which losses and boxes are computed."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision (float16, bfloat16) as float32; any other tensor as it is.

    Layers may run in half precision, under autocast. Coordinates of hundreds of pixels and sums over all anchors need
    more.
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
