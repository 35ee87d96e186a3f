"""mmdetection's box heads and proposals in the golden vectors, as ours."""

import torch

NAMES = {
    "shared_fcs.0": "fc1",
    "shared_fcs.1": "fc2",
    "fc_cls": "cls_score",
    "fc_reg": "bbox_pred",
}


def load_box_head(box: torch.nn.Module, vectors: dict, prefix: str) -> None:
    """mmdetection's parameters of one box head, whose names begin with `prefix`, into ours."""
    with torch.no_grad():
        for theirs, ours in NAMES.items():
            for kind in ("weight", "bias"):
                box.get_parameter(f"{ours}.{kind}").copy_(torch.from_numpy(vectors[f"{prefix}.{theirs}.{kind}"]))


def proposals_of(vectors: dict, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.from_numpy(vectors[f"proposals.{image}"]).to(dtype) for image in range(2)]


def rois_of(boxes: list[torch.Tensor]) -> torch.Tensor:
    """mmdetection's (R, 5) with the image's index first."""
    return torch.cat([torch.cat([b.new_full((len(b), 1), i), b], 1) for i, b in enumerate(boxes)])
