"""RoIAlign against mmcv's golden vectors."""

import numpy as np
import torch

from kernels import roi_align


def boxes_of(rois: np.ndarray, images: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(R, 5) rows image, x1, y1, x2, y2 as boxes by image, and the order that groups them so."""
    rois = torch.from_numpy(rois).to(dtype)
    order = rois[:, 0].argsort(stable=True)
    return [rois[rois[:, 0] == image, 1:] for image in range(images)], order


def check_vectors(vectors, aligned, ratio, size, dtype, device="cpu"):
    key = f"aligned{int(aligned)}.sr{ratio}.{size[0]}x{size[1]}"
    x = torch.from_numpy(vectors["x"]).to(device, dtype).requires_grad_()
    boxes, order = boxes_of(vectors["rois"], len(x), dtype)
    y = roi_align(x, [b.to(device) for b in boxes], size, 0.125, ratio, aligned)
    (grad,) = torch.autograd.grad(y, x, torch.from_numpy(vectors[f"{key}.cot"])[order].to(device, dtype))
    # Positions reach 20 cells; ten roundings of a float32 there.
    tolerance = 1e-12 if dtype == torch.float64 else 10 * 20 * 1.2e-7
    assert y.dtype == dtype
    assert np.abs(y.detach().cpu().numpy() - vectors[f"{key}.y"][order]).max() <= tolerance
    want = vectors[f"{key}.grad_x"]
    assert np.abs(grad.cpu().numpy() - want).max() <= tolerance * max(1, np.abs(want).max())
