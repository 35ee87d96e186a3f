"""A detector of `build_detector` from a file of its weights alone: what the weights tell need not be said again."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from heads.backbones.resnet import BACKBONES
from heads.build import DETECTORS, TWO_STAGE, build_detector
from heads.detector import Detector
from heads.released.weights import bare_state

# The layer whose outputs are one for each class, and how many more, or times more, there are.
CLASS_LAYERS = {
    "atss": ("head.cls_logits.weight", lambda n: n),
    "borderdet": ("head.cls_logits.weight", lambda n: n),
    "fcos": ("head.cls_logits.weight", lambda n: n),
    "reppoints": ("head.cls_out.weight", lambda n: n),
    # Nine anchors in a cell.
    "retinanet": ("head.cls_score.weight", lambda n: n // 9),
    # Beside the background.
    "faster_rcnn": ("head.box.cls_score.weight", lambda n: n - 1),
    "mask_rcnn": ("head.box.cls_score.weight", lambda n: n - 1),
    "cascade_rcnn": ("head.stages.0.cls_score.weight", lambda n: n - 1),
    "detr": ("head.class_logits.weight", lambda n: n - 1),
}


def open_detector(name: str, checkpoint: Mapping[str, Any], *, coarse_offsets: str = "crop") -> Detector:
    """The detector whose `state_dict` this is, with these weights.

    Backbone, classes, channels, depth, attentions, formulation and placement are read off names and shapes.

    Args:
        name: One of `DETECTORS`.
        checkpoint: State dict, or a checkpoint that holds it, such as one that `ablations.run` leaves beside a row; see
            `heads.released.weights.bare_state`.
        coarse_offsets: See `DyHead`; no weight tells it.

    Raises:
        ValueError: The name is unknown, or the weights are not those of such a detector; the message lists what does
            not fit.

    Example:
        >>> from heads import build_detector
        >>> from heads.opened import open_detector
        >>> weights = build_detector("fcos", 7, "tiny", attentions="SC", depth=2, channels=16).state_dict()
        >>> detector = open_detector("fcos", weights)
        >>> detector.head.num_classes, detector.trunk.attentions, len(detector.trunk.blocks)
        (7, 'SC', 2)
    """
    if name not in DETECTORS:
        raise ValueError(f"unknown detector {name!r}; the detectors are {', '.join(DETECTORS)}")
    state = {key: value for key, value in bare_state(checkpoint).items() if isinstance(value, Tensor)}
    detector = build_detector(name, coarse_offsets=coarse_offsets, **settings_of(name, state))
    expected = {key: value.shape for key, value in detector.state_dict().items()}
    problems = [f"without a value: {key}" for key in expected if key not in state]
    problems += [f"unknown: {key}" for key in state if key not in expected]
    problems += [
        f"{key} is {tuple(state[key].shape)}, not {tuple(shape)}"
        for key, shape in expected.items()
        if key in state and state[key].shape != shape
    ]
    if problems:
        shown = "\n  ".join(problems[:10] + ([f"and {len(problems) - 10} more"] if len(problems) > 10 else []))
        raise ValueError(f"these are no weights of {name!r} as build_detector makes it:\n  {shown}")
    detector.load_state_dict(state)
    return detector


def settings_of(name: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of `build_detector` that the names and shapes of a state dict tell.

    Raises:
        ValueError: They are those of no backbone, or the layers for classes or the pyramid are missing.
    """
    layer, classes = CLASS_LAYERS[name]
    pyramid = "fpn.projection.weight" if "fpn.projection.weight" in state else "fpn.lateral.0.weight"
    for key in (layer, pyramid):
        if key not in state:
            raise ValueError(f"these are no weights of {name!r} as build_detector makes it: {key} is missing")
    settings = {
        "backbone": backbone_of(name, state),
        "num_classes": classes(len(state[layer])),
        "channels": len(state[pyramid]),
    }
    depth = len({key.split(".")[2] for key in state if key.startswith("trunk.blocks.")})
    if not depth:
        return settings | {"attentions": None}
    marks = {"L": ("scale.gate", "scale.mix"), "S": ("spatial.offset",), "C": ("task.reduce",)}
    moved = any(".task.reduce." in key for key in state if key.startswith("head."))
    letters = [
        letter
        for letter, parts in marks.items()
        if any(f"trunk.blocks.0.{part}.weight" in state for part in parts) or (letter == "C" and moved)
    ]
    # Without any learned task attention, only the width of the layer behind RoIAlign tells that it took its place.
    around = name in TWO_STAGE and not any(".fc1." in key for key in state if key.startswith("head."))
    return settings | {
        "depth": depth,
        "attentions": "".join(letters),
        "formulation": "paper" if "trunk.blocks.0.spatial.weight" in state else "released",
        "placement": "around_roi" if around else "trunk",
    }


def backbone_of(name: str, state: Mapping[str, Tensor]) -> str:
    """The name of the backbone with such weights.

    Raises:
        ValueError: There is none.
    """
    shapes = {key: value.shape for key, value in state.items() if key.startswith("backbone.")}
    for backbone, build in BACKBONES.items():
        with torch.device("meta"):
            like = build(finest=2 if name in TWO_STAGE else 3)
        if shapes == {f"backbone.{key}": value.shape for key, value in like.state_dict().items()}:
            return backbone
    raise ValueError(f"the weights are of no backbone of ours, which are {', '.join(BACKBONES)}")
