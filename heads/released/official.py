"""Names of the authors' releases, which are detectron2's with DyHead around the pyramid, as rules for `names.py`.

Sources: DynamicHead's `dyhead/dyhead.py`, `extra/swint.py`, `extra/atss.py`; detectron2's `modeling/backbone/fpn.py`,
`meta_arch/retinanet.py`, `proposal_generator/rpn.py` and `roi_heads/`.
"""

# A bare DyHead's keys may lack what stands in front of the number of the block; YOLO forks chose other names for it.
TOWER = r"(?:(?:.*dyhead_tower|dyhead|dyhead_blocks)\.)?(\d+)\."

# (their key, our key), read by `names.translate`; the first rule that matches a whole key wins.
OFFICIAL = [
    (TOWER + r"DyConv\.([012])\.conv\.(weight|bias)", r"trunk.blocks.\1.spatial.<\2>.\3"),
    (TOWER + r"DyConv\.([012])\.bn\.(weight|bias)", r"trunk.blocks.\1.spatial.<\2>.norm.\3"),
    (TOWER + r"offset\.(weight|bias)", r"trunk.blocks.\1.spatial.offset.\2"),
    (TOWER + r"AttnConv\.1\.(weight|bias)", r"trunk.blocks.\1.scale.gate.\2"),
    (TOWER + r"relu\.fc\.0\.(weight|bias)", r"trunk.blocks.\1.task.reduce.\2"),
    (TOWER + r"relu\.fc\.2\.(weight|bias)", r"trunk.blocks.\1.task.expand.\2"),
    (r".*bottom_up\.stem\.conv1\.weight", r"backbone.conv1.weight"),
    (r".*bottom_up\.stem\.conv1\.norm\.(\w+)", r"backbone.bn1.\1"),
    (r".*bottom_up\.res([2-5])\.(\d+)\.conv(\d)\.weight", r"backbone.layer[\1].\2.conv\3.weight"),
    (r".*bottom_up\.res([2-5])\.(\d+)\.conv(\d)\.norm\.(\w+)", r"backbone.layer[\1].\2.bn\3.\4"),
    (r".*bottom_up\.res([2-5])\.(\d+)\.shortcut\.weight", r"backbone.layer[\1].\2.downsample.0.weight"),
    (r".*bottom_up\.res([2-5])\.(\d+)\.shortcut\.norm\.(\w+)", r"backbone.layer[\1].\2.downsample.1.\3"),
    # Swin's names are its authors', and so are ours.
    (r".*bottom_up\.((?:patch_embed|layers|norm\d)\..+)", r"backbone.\1"),
    (r".*fpn_(lateral|output)([345])\.(weight|bias)", r"fpn.\1.{\2}.\3"),
    (r".*top_block\.(p6|p7)\.(weight|bias)", r"fpn.\1.\2"),
    (r"head\.cls_subnet\.(\d)\.(weight|bias)", r"trunk.towers.classification.\1.\2"),
    (r"head\.bbox_subnet\.(\d)\.(weight|bias)", r"trunk.towers.regression.\1.\2"),
    (r"head\.(cls_logits|cls_score|bbox_pred|centerness|scales)(\..+)", r"head.\1\2"),
]
OFFICIAL_TWO_STAGE = [
    (r".*fpn_(lateral|output)([2345])\.(weight|bias)", r"fpn.\1.|\2|.\3"),
    (r"proposal_generator\.rpn_head\.conv\.(weight|bias)", r"head.rpn.conv.\1"),
    (r"proposal_generator\.rpn_head\.objectness_logits\.(weight|bias)", r"head.rpn.objectness.\1"),
    (r"proposal_generator\.rpn_head\.anchor_deltas\.(weight|bias)", r"head.rpn.bbox_pred.\1"),
    (r"roi_heads\.box_head\.(fc[12])\.(weight|bias)", r"head.box.\1.\2"),
    (r"roi_heads\.box_predictor\.(cls_score|bbox_pred)\.(weight|bias)", r"head.box.\1.\2"),
    *OFFICIAL,
]
