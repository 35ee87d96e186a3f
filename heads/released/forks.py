"""DyHead inside a YOLO model: which keys of such a state dict are its blocks'.

Forks of YOLO add a detection layer whose attribute `dyhead` holds the blocks one after the other, so that layer N has
`model.N.dyhead.K.spatial_conv_high.conv.weight` and so on. The blocks are mmdetection's, with its dynamic ReLU
(`task_attn_module.conv1.conv`) or the authors' (`task_attn_module.fc.0`). Others copy mmdetection's neck
(`dyhead_blocks`) or the authors' tower (`dyhead_tower`, with `DyConv`) into a layer. These are the names that a search
of public code found, the first by far the most often.
"""

import re
from collections.abc import Mapping
from typing import Any

# Layer of the YOLO model, whose own prefix `model.` may be gone; attribute; block; and what only blocks of DyHead have.
_HEAD = re.compile(
    r"(?P<layer>(?:model\.)*\d+\.)(?:\w+\.)?(?P<attribute>dyhead|dyhead_blocks|dyhead_tower)\.\d+\."
    r"(?:spatial_conv_(?:high|mid|low|offset)|DyConv)\..+"
)
_LAYER = re.compile(r"(?:model\.)*\d+\..+")


def head_alone(state: Mapping[str, Any]) -> dict[str, Any]:
    """A YOLO model's DyHead, and nothing else of the model; any other state stays as it is.

    Args:
        state: Names to tensors.

    Returns:
        The keys of the head, from its attribute's name on, and those that are of no layer of the model.

    Raises:
        ValueError: The model has several heads; they are listed.
    """
    heads = {(m["layer"], m[0][: m.end("attribute")]) for key in state if (m := _HEAD.fullmatch(key))}
    if len(heads) > 1:
        found = ", ".join(sorted(head for _, head in heads))
        raise ValueError(f"the state dict holds several DyHeads: {found}; give the keys of the one that is meant")
    if not heads:
        return dict(state)
    ((_, head),) = heads
    attribute = head.rsplit(".", 1)[-1]
    return {
        attribute + key.removeprefix(head) if key.startswith(f"{head}.") else key: value
        for key, value in state.items()
        if key.startswith(f"{head}.") or not _LAYER.fullmatch(key)
    }
