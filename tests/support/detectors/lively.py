"""Detectors with random weights that find something: their scores are spread over 0 … 1 instead of all being alike."""

import torch
from torch import Tensor

from heads import build_detector
from heads.detector import Detector

# More would bring the best scores so near to 1 that float32 does not tell them apart.
SPREAD = 1.0


def lively_detector(name: str, attentions: str | None = "LSC", **settings) -> Detector:
    """A tiny detector in evaluation mode whose class logits have a standard deviation of `SPREAD`, offsets included."""
    torch.manual_seed(0)
    settings = {"num_classes": 3, "backbone": "tiny", "channels": 32, "depth": 1} | settings
    return enliven(build_detector(name, attentions=attentions, **settings).eval())


@torch.no_grad()
def enliven(detector: Detector) -> Detector:
    """Give a detector offsets, and scale its last layers; see `lively_detector`."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in detector.trunk.named_parameters():
        if "offset" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    batch = torch.randn(1, 3, 96, 128, generator=generator)
    outputs = detector.raw(batch)
    head = detector.head
    for layer in getattr(head, "class_layers", ()):
        found: Tensor = outputs.border_logits if layer == "border_cls" else outputs.logits
        spread(getattr(head, layer), found)
    if hasattr(head, "rpn"):
        spread(head.rpn.objectness, outputs.rpn.logits)
        for box in getattr(head, "stages", None) or [head.box]:
            box.cls_score.register_forward_hook(once(lambda layer, _, found: spread(layer, found)))
        head.predict(detector.raw(batch), [(96, 128)])
        for box in getattr(head, "stages", None) or [head.box]:
            box.cls_score._forward_hooks.clear()
    return detector


def spread(layer: torch.nn.Conv2d | torch.nn.Linear, found: Tensor) -> None:
    """Scale a layer so that what it found would have had a mean of about 0 and a standard deviation of `SPREAD`."""
    layer.weight.mul_(SPREAD / found.std())
    layer.bias.zero_()


def once(function):
    """A hook that scales the layer and leaves the result to the next call."""

    def hook(layer, inputs, found):
        function(layer, inputs, found)
        return layer.forward(*inputs)

    return hook
