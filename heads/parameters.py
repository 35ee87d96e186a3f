"""What a training treats apart: biases of positions, layers that predict offsets or classes, the backbone.

A module names its own special parameters where it makes them; nobody else has to know the names of its layers.
"""

from typing import ClassVar, NamedTuple

from torch import nn


class SpecialParameters(nn.Module):
    """Base class of modules some of whose parameters are trained in another way than the rest.

    Attributes:
        offset_layers: Names of the layers that predict where another convolution samples, and with which weights.
        position_biases: Names of the parameters that are biases of positions, although they are matrices.
        class_layers: Names of the layers that give class logits to a focal loss.
    """

    offset_layers: ClassVar[tuple[str, ...]] = ()
    position_biases: ClassVar[tuple[str, ...]] = ()
    class_layers: ClassVar[tuple[str, ...]] = ()


class ParameterKind(NamedTuple):
    """What a parameter is, as far as weight decay and learning rates depend on it.

    Attributes:
        decays: It is a weight, and no bias, norm, scale or bias of positions.
        in_backbone: It belongs to the backbone.
        predicts_offsets: It belongs to a layer that predicts offsets and masks of samples.
        predicts_classes: It belongs to a layer that gives class logits to a focal loss.
    """

    decays: bool
    in_backbone: bool
    predicts_offsets: bool
    predicts_classes: bool


def parameter_kinds(model: nn.Module) -> dict[str, ParameterKind]:
    """The kind of every parameter of a detector, in the order of `named_parameters`.

    Args:
        model: A `Detector`, or any module that holds its backbone as `backbone`.

    Returns:
        Name -> kind, frozen parameters included.

    Example:
        >>> from heads import DyHead
        >>> from heads.parameters import parameter_kinds
        >>> kinds = parameter_kinds(DyHead(16, depth=1))
        >>> kinds["blocks.0.spatial.offset.weight"]
        ParameterKind(decays=True, in_backbone=False, predicts_offsets=True, predicts_classes=False)
    """
    kinds = {}
    for name, parameter in model.named_parameters():
        layer, _, leaf = name.rpartition(".")
        block, _, layer_leaf = layer.rpartition(".")
        kinds[name] = ParameterKind(
            decays=parameter.ndim > 1 and leaf not in _special(model, layer).position_biases,
            in_backbone=name.startswith("backbone."),
            predicts_offsets=layer_leaf in _special(model, block).offset_layers,
            predicts_classes=layer_leaf in _special(model, block).class_layers,
        )
    return kinds


def _special(model: nn.Module, path: str) -> type[SpecialParameters]:
    kind = type(model.get_submodule(path))
    return kind if issubclass(kind, SpecialParameters) else SpecialParameters
