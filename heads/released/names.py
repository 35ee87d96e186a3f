"""Weights released by the authors of DyHead, by mmdetection and by forks of YOLO, loaded into our modules.

All hold the same numbers under other names: `official.py` and `mmdetection.py` have the rules, `forks.py` finds the
DyHead in a YOLO model. The order of the convolutions also differs from how it reads: the authors' `DyConv.0` and
mmdetection's `spatial_conv_high` sample the coarser level, `.2` and `_low` the finer one. All were trained with
`coarse_offsets="prefix"`; another mode gives other detections. What else a release computes besides its weights stands
in `heads/released/settings.py`.
"""

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

from torch import Tensor, nn

from heads.detector import Detector
from heads.dyhead.attention import Branch
from heads.dyhead.dyhead import DyHead
from heads.released.forks import head_alone
from heads.released.mmdetection import MMDETECTION, MMDETECTION_TWO_STAGE, in_our_order
from heads.released.official import OFFICIAL, OFFICIAL_TWO_STAGE
from heads.released.weights import bare_state

Author = Literal["official", "mmdet"]
Kind = Literal["atss", "retinanet", "faster_rcnn"]
Body = Literal["resnet", "swin"]

NEIGHBOURS = {
    "0": "from_coarser",
    "1": "from_same",
    "2": "from_finer",
    "high": "from_coarser",
    "mid": "from_same",
    "low": "from_finer",
}
# What a number in a template is counted from, by the bracket before it.
FIRST = {"[": 1, "|": 2, "{": 3}
# What only keys of these detectors and backbones have.
KINDS: dict[Author, dict[Kind, re.Pattern[str]]] = {
    "official": {
        "atss": re.compile(r"head\.(cls_logits|centerness)\..*"),
        "retinanet": re.compile(r"head\.(cls_subnet|bbox_subnet|cls_score)\..*"),
        "faster_rcnn": re.compile(r"(proposal_generator|roi_heads)\..*"),
    },
    "mmdet": {
        "atss": re.compile(r"bbox_head\.atss_.*"),
        "retinanet": re.compile(r"bbox_head\.retina_.*"),
        "faster_rcnn": re.compile(r"(rpn_head|roi_head)\..*"),
    },
}
BODIES: dict[Body, re.Pattern[str]] = {
    "swin": re.compile(r".*\.relative_position_bias_table"),
    "resnet": re.compile(r".*bottom_up\.(stem|res\d)\..*|backbone\.(conv1|layer\d)\..*"),
}
# Keys of other frameworks' bookkeeping that no computation of ours reads.
BOOKKEEPING = re.compile(
    r".*num_batches_tracked|.*anchor_generator\.cell_anchors\..*|.*\.relative_position_index|pixel_(mean|std)"
)
# What a released state dict does not record: batches counted, and RetinaNet's running mean of positives.
UNRECORDED = re.compile(r".*num_batches_tracked|head\.running_positives")


class Contents(NamedTuple):
    """What the names of a released state dict tell.

    Attributes:
        author: Whose names they are.
        kind: The detector they are of, None where only a part of one is there.
        body: Its backbone, None where there is none.
    """

    author: Author
    kind: Kind | None
    body: Body | None

    @property
    def rules(self) -> list[tuple[str, str]]:
        """What `translate` translates these names by."""
        if self.author == "official":
            return OFFICIAL_TWO_STAGE if self.kind == "faster_rcnn" else OFFICIAL
        return MMDETECTION_TWO_STAGE if self.kind == "faster_rcnn" else MMDETECTION

    def __str__(self) -> str:
        author = {"official": "the authors'", "mmdet": "mmdetection's"}[self.author]
        kinds = {"atss": "ATSS", "retinanet": "RetinaNet", "faster_rcnn": "Faster R-CNN"}
        bodies = {"resnet": " on a ResNet", "swin": " on a Swin"}
        return f"{author} {kinds[self.kind] if self.kind else 'DyHead'}{bodies[self.body] if self.body else ''}"


def load_released(module: DyHead | Detector, state_dict: Mapping[str, Tensor]) -> None:
    """Load a released state dict into a `DyHead` or a whole detector, in place.

    Whose names they are is recognised, once `heads.released.weights.bare_state` has taken off what a checkpoint and
    wrappers put around them. Where there are biases in front of the GroupNorms, they are added to `module`. Channels
    that mmdetection's Swin keeps in another order are put in ours.

    A bare `DyHead` can also be loaded from the state dict of a whole YOLO model with one in it, if the names say so:
    `model.N.dyhead.K.` or the same without `model.`, N being the layer (see `heads/released/forks.py`). The head is
    taken, and the other layers of the model are left alone. Whether the fork computes what its names promise, no name
    can tell: some call a block DyHead that has no deformable convolution, or sample the coarser level another way.

    Args:
        module: A `DyHead(formulation="released")`, or a detector with one in its trunk.
        state_dict: Names to tensors, or a checkpoint around them. Names of a bare `DyHead` may lack everything up to
            `dyhead_tower.` or `neck.1.`.

    Raises:
        ValueError: The names are nobody's, keys could not be mapped, tensors of `module` stayed without a value, or
            shapes differ; the message lists them all. Or the checkpoint holds several states, or several DyHeads.

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
    if isinstance(module, DyHead):
        state_dict = head_alone(state_dict)
    contents = recognise(state_dict)
    prefix, place = ("trunk.", "") if isinstance(module, DyHead) else ("", dyhead_place(module))

    loaded: dict[str, Tensor] = {}
    unmapped, twice = [], []
    for key, value in state_dict.items():
        if BOOKKEEPING.fullmatch(key):
            continue
        name = translate(key, contents.rules)
        if name is None or not name.startswith(prefix) or not isinstance(value, Tensor):
            unmapped.append(key)
            continue
        name = re.sub(r"^trunk\.(?=blocks\.)", place, name) if not prefix else name.removeprefix(prefix)
        if name in loaded:
            twice.append(name)
        loaded[name] = in_our_order(name, value) if contents.author == "mmdet" else value

    if any(re.search(r"spatial\.from_\w+\.bias", key) for key in loaded):
        for branch in (m for m in module.modules() if isinstance(m, Branch) and m.bias is None):
            branch.bias = nn.Parameter(branch.weight.new_zeros(branch.weight.shape[0]))

    expected = {k: v for k, v in module.state_dict().items() if not UNRECORDED.fullmatch(k)}
    problems = [f"no counterpart here: {key}" for key in unmapped]
    problems += [f"two keys for one: {key}" for key in twice]
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


def recognise(state_dict: Mapping[str, object]) -> Contents:
    """Whose names a state dict has, and of what.

    Raises:
        ValueError: It has no DyHead by any of the known names.
    """
    author: Author
    if any(".DyConv." in key for key in state_dict):
        author = "official"
    elif any(re.search(r"dyhead_blocks\.|(^|\.)\d+\.spatial_conv_(high|mid|low|offset)\.", key) for key in state_dict):
        author = "mmdet"
    else:
        raise ValueError(
            "neither the authors' layout (keys with `.DyConv.`) nor mmdetection's (`dyhead_blocks.`, in forks of YOLO "
            f"`N.dyhead.K.spatial_conv_…`); the keys begin with {', '.join(list(state_dict)[:5])}"
        )
    kinds, bodies = KINDS[author].items(), BODIES.items()
    kind = next((kind for kind, pattern in kinds if any(map(pattern.fullmatch, state_dict))), None)
    body = next((body for body, pattern in bodies if any(map(pattern.fullmatch, state_dict))), None)
    return Contents(author, kind, body)


def dyhead_place(detector: Detector) -> str:
    """What the names of a detector's DyHead begin with: `trunk.`, or further inside where the trunk has more in it."""
    places = [name for name, module in detector.trunk.named_modules() if isinstance(module, DyHead)]
    if not places:
        raise ValueError(f"the detector has no DyHead in its trunk, which is a {type(detector.trunk).__name__}")
    return "trunk." + (f"{places[0]}." if places[0] else "")


def translate(key: str, rules: list[tuple[str, str]]) -> str | None:
    """Our name for a released key, or None.

    Args:
        key: As it stands in the state dict.
        rules: Pairs of a pattern for a whole key and the template of our name, of which the first that matches wins. In
            a template `<n>` is looked up in `NEIGHBOURS`, `[n]` becomes n - 1, `|n|` n - 2, `{n}` n - 3, and `(n)` 2 n.
    """
    for pattern, template in rules:
        match = re.fullmatch(pattern, key)
        if match:
            name = re.sub(r"<(\w+)>", lambda m: NEIGHBOURS[m[1]], match.expand(template))
            # detectron2 counts stages from res2, and pyramid convolutions from the finest map's level.
            name = re.sub(r"([\[|{])(\d)[\]|}]", lambda m: str(int(m[2]) - FIRST[m[1]]), name)
            # In a tower of ours a ReLU stands between two convolutions.
            return re.sub(r"\((\d)\)", lambda m: str(int(m[1]) * 2), name)
    return None
