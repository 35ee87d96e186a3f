"""Weights released by the authors of DyHead and by mmdetection, loaded into our modules.

Both layouts hold the same numbers under other names. Their convolution order also differs from how it reads: the
authors' `DyConv.0` and mmdetection's `spatial_conv_high` sample the coarser level, `.2` and `_low` the finer one.
Both were trained with `coarse_offsets="prefix"`; another mode gives other detections. What else a release computes
besides its weights stands in `heads/released/layouts.py`.
"""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from heads.detector import Detector
from heads.dyhead.attention import Branch
from heads.dyhead.dyhead import DyHead
from heads.released.weights import bare_state

NEIGHBOURS = {
    "0": "from_coarser",
    "1": "from_same",
    "2": "from_finer",
    "high": "from_coarser",
    "mid": "from_same",
    "low": "from_finer",
}

# A bare DyHead's keys may lack what stands in front of the number of the block.
TOWER = r"(?:.*dyhead_tower\.)?(\d+)\."
BLOCKS = r"(?:neck\.1\.)?dyhead_blocks\.(\d+)\."

# (layout's key, our key); the first rule that matches a whole key wins. In ours `<n>` is
# looked up in NEIGHBOURS, `[n]` counts from 2 and `{n}` from 3; `(n)` counts convolutions between which ReLUs stand.
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
    (r".*fpn_(lateral|output)([345])\.(weight|bias)", r"fpn.\1.{\2}.\3"),
    (r".*top_block\.(p6|p7)\.(weight|bias)", r"fpn.\1.\2"),
    (r"head\.(cls_logits|bbox_pred|centerness|scales)(\..+)", r"head.\1\2"),
]
MMDETECTION = [
    (BLOCKS + r"spatial_conv_(high|mid|low)\.conv\.(weight|bias)", r"trunk.blocks.\1.spatial.<\2>.\3"),
    (BLOCKS + r"spatial_conv_(high|mid|low)\.norm\.(weight|bias)", r"trunk.blocks.\1.spatial.<\2>.norm.\3"),
    (BLOCKS + r"spatial_conv_offset\.(weight|bias)", r"trunk.blocks.\1.spatial.offset.\2"),
    (BLOCKS + r"scale_attn_module\.1\.(weight|bias)", r"trunk.blocks.\1.scale.gate.\2"),
    (BLOCKS + r"task_attn_module\.conv1\.conv\.(weight|bias)", r"trunk.blocks.\1.task.reduce.\2"),
    (BLOCKS + r"task_attn_module\.conv2\.conv\.(weight|bias)", r"trunk.blocks.\1.task.expand.\2"),
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
# Keys of other frameworks' bookkeeping that no computation of ours reads.
BOOKKEEPING = re.compile(r".*num_batches_tracked|.*anchor_generator\.cell_anchors\..*")


def load_released(module: DyHead | Detector, state_dict: Mapping[str, Tensor]) -> None:
    """Load a released state dict into a `DyHead` or a whole detector, in place.

    The layout, the authors' or mmdetection's, is recognised by its key names, once `heads.released.weights.bare_state`
    has taken off what a checkpoint and wrappers put around them. Where the layout has biases in front of the
    GroupNorms, they are added to `module`.

    Args:
        module: A `DyHead(formulation="released")`, or a detector with one as its trunk.
        state_dict: Names to tensors, or a checkpoint around them. Names of a bare `DyHead` may lack everything up to
            `dyhead_tower.` or `neck.1.`.

    Raises:
        ValueError: The layout is unknown, keys could not be mapped, tensors of `module` stayed without a value, or
            shapes differ; the message lists them all. Or the checkpoint holds several states.

    Example:
        One block in mmdetection's layout, here with random weights:

        >>> import torch
        >>> from heads import DyHead, load_released
        >>> shapes = {"spatial_conv_offset": (27, 16, 3, 3), "scale_attn_module.1": (1, 16, 1, 1)}
        >>> shapes |= {"task_attn_module.conv1.conv": (4, 16, 1, 1), "task_attn_module.conv2.conv": (64, 4, 1, 1)}
        >>> shapes |= {f"spatial_conv_{neighbour}.norm": (16,) for neighbour in ("high", "mid", "low")}
        >>> block = {f"{name}.weight": torch.rand(shape) for name, shape in shapes.items()}
        >>> block |= {f"{name}.bias": torch.rand(shape[0]) for name, shape in shapes.items()}
        >>> block |= {f"spatial_conv_{n}.conv.weight": torch.rand(16, 16, 3, 3) for n in ("high", "mid", "low")}
        >>> head = DyHead(channels=16, depth=1, coarse_offsets="prefix")
        >>> load_released(head, {f"neck.1.dyhead_blocks.0.{name}": value for name, value in block.items()})
        >>> torch.equal(head.blocks[0].spatial.from_finer.weight, block["spatial_conv_low.conv.weight"])
        True
    """
    state_dict = bare_state(state_dict)
    rules = recognise(state_dict)
    prefix = "trunk." if isinstance(module, DyHead) else ""
    trunk = module if isinstance(module, DyHead) else module.trunk

    loaded, unmapped = {}, []
    for key, value in state_dict.items():
        if BOOKKEEPING.fullmatch(key):
            continue
        name = translate(key, rules)
        if name is None or not name.startswith(prefix) or not isinstance(value, Tensor):
            unmapped.append(key)
        else:
            loaded[name.removeprefix(prefix)] = value

    if any(re.search(r"spatial\.from_\w+\.bias", key) for key in loaded):
        for branch in (m for m in trunk.modules() if isinstance(m, Branch) and m.bias is None):
            branch.bias = nn.Parameter(branch.weight.new_zeros(branch.weight.shape[0]))

    expected = {k: v for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}
    problems = [f"no counterpart here: {key}" for key in unmapped]
    problems += [f"no counterpart here: {key}" for key in loaded if key not in expected]
    problems += [f"missing: {key}" for key in expected if key not in loaded]
    for key in loaded.keys() & expected.keys():
        # 1×1 convolutions are linear layers here, and scalars may have one axis.
        if [s for s in loaded[key].shape if s > 1] != [s for s in expected[key].shape if s > 1]:
            problems.append(f"shape of {key}: {tuple(loaded[key].shape)}, here {tuple(expected[key].shape)}")
        else:
            loaded[key] = loaded[key].reshape(expected[key].shape)
    if problems:
        raise ValueError("the state dict does not fit:\n  " + "\n  ".join(sorted(problems)))
    module.load_state_dict(loaded, strict=False)


def recognise(state_dict: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """The mapping rules of the layout that `state_dict` is in."""
    if any(".DyConv." in key for key in state_dict):
        return OFFICIAL
    if any("dyhead_blocks." in key for key in state_dict):
        return MMDETECTION
    raise ValueError(
        "neither the authors' layout (keys with `.DyConv.`) nor mmdetection's (`dyhead_blocks.`); the keys begin with "
        + ", ".join(list(state_dict)[:5])
    )


def translate(key: str, rules: list[tuple[str, str]]) -> str | None:
    """Our name for a released key, or None."""
    for pattern, template in rules:
        match = re.fullmatch(pattern, key)
        if match:
            name = re.sub(r"<(\w+)>", lambda m: NEIGHBOURS[m[1]], match.expand(template))
            # detectron2 counts stages from res2 and pyramid convolutions from level 3.
            name = re.sub(r"\[(\d)\]", lambda m: str(int(m[1]) - 1), name)
            name = re.sub(r"\{(\d)\}", lambda m: str(int(m[1]) - 3), name)
            # In a tower of ours a ReLU stands between two convolutions.
            return re.sub(r"\((\d)\)", lambda m: str(int(m[1]) * 2), name)
    return None
