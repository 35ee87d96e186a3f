"""Names of mmdetection's releases, as rules for `names.py`, and the one layer whose channels it keeps in another order.

Sources: mmdetection 3.3's `models/necks/dyhead.py` and `fpn.py`, `models/backbones/swin.py`, `models/dense_heads/` and
`models/roi_heads/bbox_heads/convfc_bbox_head.py`.
"""

import re

from torch import Tensor

# A bare DyHead's keys may lack what stands in front of the number of the block; YOLO forks chose other names for it.
BLOCKS = r"(?:(?:(?:neck\.1\.)?dyhead_blocks|dyhead|dyhead_tower)\.)?(\d+)\."

# (their key, our key), read by `names.translate`; the first rule that matches a whole key wins.
MMDETECTION = [
    (BLOCKS + r"spatial_conv_(high|mid|low)\.conv\.(weight|bias)", r"trunk.blocks.\1.spatial.<\2>.\3"),
    (BLOCKS + r"spatial_conv_(high|mid|low)\.norm\.(weight|bias)", r"trunk.blocks.\1.spatial.<\2>.norm.\3"),
    (BLOCKS + r"spatial_conv_offset\.(weight|bias)", r"trunk.blocks.\1.spatial.offset.\2"),
    (BLOCKS + r"scale_attn_module\.1\.(weight|bias)", r"trunk.blocks.\1.scale.gate.\2"),
    (BLOCKS + r"task_attn_module\.conv1\.conv\.(weight|bias)", r"trunk.blocks.\1.task.reduce.\2"),
    (BLOCKS + r"task_attn_module\.conv2\.conv\.(weight|bias)", r"trunk.blocks.\1.task.expand.\2"),
    # Forks put the authors' dynamic ReLU into mmdetection's block.
    (BLOCKS + r"task_attn_module\.fc\.0\.(weight|bias)", r"trunk.blocks.\1.task.reduce.\2"),
    (BLOCKS + r"task_attn_module\.fc\.2\.(weight|bias)", r"trunk.blocks.\1.task.expand.\2"),
    (r"backbone\.patch_embed\.projection\.(weight|bias)", r"backbone.patch_embed.proj.\1"),
    (r"backbone\.stages\.(\d)\.blocks\.(\d+)\.attn\.w_msa\.(.+)", r"backbone.layers.\1.blocks.\2.attn.\3"),
    (r"backbone\.stages\.(\d)\.blocks\.(\d+)\.ffn\.layers\.0\.0\.(.+)", r"backbone.layers.\1.blocks.\2.mlp.fc1.\3"),
    (r"backbone\.stages\.(\d)\.blocks\.(\d+)\.ffn\.layers\.1\.(.+)", r"backbone.layers.\1.blocks.\2.mlp.fc2.\3"),
    (r"backbone\.stages\.(.+)", r"backbone.layers.\1"),
    (r"(backbone\..+)", r"\1"),
    (r"neck\.0\.lateral_convs\.(\d)\.conv\.(weight|bias)", r"fpn.lateral.\1.\2"),
    (r"neck\.0\.fpn_convs\.([012])\.conv\.(weight|bias)", r"fpn.output.\1.\2"),
    (r"neck\.0\.fpn_convs\.3\.conv\.(weight|bias)", r"fpn.p6.\1"),
    (r"neck\.0\.fpn_convs\.4\.conv\.(weight|bias)", r"fpn.p7.\1"),
    (r"bbox_head\.atss_cls\.(weight|bias)", r"head.cls_logits.\1"),
    (r"bbox_head\.atss_reg\.(weight|bias)", r"head.bbox_pred.\1"),
    (r"bbox_head\.atss_centerness\.(weight|bias)", r"head.centerness.\1"),
    (r"bbox_head\.(scales\..+)", r"head.\1"),
    (r"bbox_head\.cls_convs\.(\d)\.conv\.(weight|bias)", r"trunk.towers.classification.(\1).\2"),
    (r"bbox_head\.reg_convs\.(\d)\.conv\.(weight|bias)", r"trunk.towers.regression.(\1).\2"),
    (r"bbox_head\.retina_cls\.(weight|bias)", r"head.cls_score.\1"),
    (r"bbox_head\.retina_reg\.(weight|bias)", r"head.bbox_pred.\1"),
]
MMDETECTION_TWO_STAGE = [
    (r"neck\.0\.fpn_convs\.([0123])\.conv\.(weight|bias)", r"fpn.output.\1.\2"),
    (r"rpn_head\.rpn_conv\.(weight|bias)", r"head.rpn.conv.\1"),
    (r"rpn_head\.rpn_cls\.(weight|bias)", r"head.rpn.objectness.\1"),
    (r"rpn_head\.rpn_reg\.(weight|bias)", r"head.rpn.bbox_pred.\1"),
    (r"roi_head\.bbox_head\.shared_fcs\.0\.(weight|bias)", r"head.box.fc1.\1"),
    (r"roi_head\.bbox_head\.shared_fcs\.1\.(weight|bias)", r"head.box.fc2.\1"),
    (r"roi_head\.bbox_head\.fc_cls\.(weight|bias)", r"head.box.cls_score.\1"),
    (r"roi_head\.bbox_head\.fc_reg\.(weight|bias)", r"head.box.bbox_pred.\1"),
    *MMDETECTION,
]

_MERGING = re.compile(r"backbone\.layers\.\d\.downsample\.(?:norm|reduction)\.\w+")


def in_our_order(name: str, value: Tensor) -> Tensor:
    """A tensor of mmdetection with its channels in our order.

    Where Swin merges 2×2 cells of C channels, mmdetection unfolds them: the four cells of a channel stand together, row
    by row. In Swin's own code, and here, the C channels of a cell do, and cells go column by column.

    Args:
        name: Ours.
        value: Of any shape; of a merging layer the last axis is 4 C, otherwise nothing changes.
    """
    if not _MERGING.fullmatch(name) or not value.dim() or value.shape[-1] % 4:
        return value
    cells = value.unflatten(-1, (-1, 2, 2))
    return cells.movedim(-3, -1).transpose(-2, -3).flatten(-3)
