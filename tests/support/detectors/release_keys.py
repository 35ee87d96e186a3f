"""The keys and shapes of every release, written down from the sources of its framework, with our name for each.

Nothing here asks a module of ours. `keys(name)` gives triples: a key as the release's file has it, its shape, and our
key, or None for bookkeeping that nothing reads.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Triple = tuple[str, tuple[int, ...], str | None]


@dataclass(frozen=True)
class Sizes:
    """How large a release is: by default the R-50 ones; a Swin has `side`, the cells along a window."""

    classes: int = 80
    depth: int = 6
    channels: int = 256
    stem: int = 64
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    heads: tuple[int, ...] = ()
    side: int = 0


SWIN_T = Sizes(stem=96, blocks=(2, 2, 6, 2), heads=(3, 6, 12, 24), side=7)
SWIN_L = Sizes(stem=192, blocks=(2, 2, 18, 2), heads=(6, 12, 24, 48), side=12)
TINY = Sizes(classes=3, depth=2, channels=16, stem=4, blocks=(1, 2, 1, 1))
TINY_SWIN = Sizes(classes=3, depth=2, channels=16, stem=8, blocks=(2, 1, 2, 1), heads=(1, 2, 2, 4), side=3)


def layer(theirs: str, ours: str, *shape: int, bias: bool = True) -> Iterator[Triple]:
    """A weight and, unless there is none, its bias."""
    yield f"{theirs}.weight", shape, f"{ours}.weight"
    if bias:
        yield f"{theirs}.bias", shape[:1], f"{ours}.bias"


def batch_norm(theirs: str, ours: str, channels: int) -> Iterator[Triple]:
    for name in ("weight", "bias", "running_mean", "running_var"):
        yield f"{theirs}.{name}", (channels,), f"{ours}.{name}"


def official_dyhead(s: Sizes, theirs: str = "backbone.dyhead_tower", ours: str = "trunk.blocks") -> Iterator[Triple]:
    c = s.channels
    for k in range(s.depth):
        # The first one samples the coarser level although it stands in front of the others.
        for number, neighbour in enumerate(("from_coarser", "from_same", "from_finer")):
            yield from layer(f"{theirs}.{k}.DyConv.{number}.conv", f"{ours}.{k}.spatial.{neighbour}", c, c, 3, 3)
            yield from layer(f"{theirs}.{k}.DyConv.{number}.bn", f"{ours}.{k}.spatial.{neighbour}.norm", c)
        yield from layer(f"{theirs}.{k}.AttnConv.1", f"{ours}.{k}.scale.gate", 1, c, 1, 1)
        yield from layer(f"{theirs}.{k}.relu.fc.0", f"{ours}.{k}.task.reduce", c // 4, c)
        yield from layer(f"{theirs}.{k}.relu.fc.2", f"{ours}.{k}.task.expand", 4 * c, c // 4)
        yield from layer(f"{theirs}.{k}.offset", f"{ours}.{k}.spatial.offset", 27, c, 3, 3)


def mmdet_dyhead(
    s: Sizes, theirs: str = "neck.1.dyhead_blocks", ours: str = "trunk.blocks", relu: str = "mmdet"
) -> Iterator[Triple]:
    c = s.channels
    for k in range(s.depth):
        for word, neighbour in (("high", "from_coarser"), ("mid", "from_same"), ("low", "from_finer")):
            place = f"{ours}.{k}.spatial.{neighbour}"
            yield from layer(f"{theirs}.{k}.spatial_conv_{word}.conv", place, c, c, 3, 3, bias=False)
            yield from layer(f"{theirs}.{k}.spatial_conv_{word}.norm", f"{place}.norm", c)
        yield from layer(f"{theirs}.{k}.spatial_conv_offset", f"{ours}.{k}.spatial.offset", 27, c, 3, 3)
        yield from layer(f"{theirs}.{k}.scale_attn_module.1", f"{ours}.{k}.scale.gate", 1, c, 1, 1)
        task = f"{theirs}.{k}.task_attn_module"
        if relu == "mmdet":
            yield from layer(f"{task}.conv1.conv", f"{ours}.{k}.task.reduce", c // 4, c, 1, 1)
            yield from layer(f"{task}.conv2.conv", f"{ours}.{k}.task.expand", 4 * c, c // 4, 1, 1)
        else:
            yield from layer(f"{task}.fc.0", f"{ours}.{k}.task.reduce", c // 4, c)
            yield from layer(f"{task}.fc.2", f"{ours}.{k}.task.expand", 4 * c, c // 4)


def bottlenecks(s: Sizes) -> Iterator[tuple[int, int, int, int, int]]:
    """Stage from 1, block, channels in, inside and out."""
    inputs = s.stem
    for stage, blocks in enumerate(s.blocks):
        for block in range(blocks):
            yield stage + 1, block, inputs, s.stem * 2**stage, s.stem * 2 ** (stage + 2)
            inputs = s.stem * 2 ** (stage + 2)


def official_resnet(s: Sizes) -> Iterator[Triple]:
    body = "backbone.backbone.bottom_up"
    yield from layer(f"{body}.stem.conv1", "backbone.conv1", s.stem, 3, 7, 7, bias=False)
    yield from batch_norm(f"{body}.stem.conv1.norm", "backbone.bn1", s.stem)
    for stage, block, inputs, inner, outputs in bottlenecks(s):
        theirs, ours = f"{body}.res{stage + 1}.{block}", f"backbone.layer{stage}.{block}"
        for n, shape in ((1, (inner, inputs, 1, 1)), (2, (inner, inner, 3, 3)), (3, (outputs, inner, 1, 1))):
            yield from layer(f"{theirs}.conv{n}", f"{ours}.conv{n}", *shape, bias=False)
            yield from batch_norm(f"{theirs}.conv{n}.norm", f"{ours}.bn{n}", shape[0])
        if not block:
            yield from layer(f"{theirs}.shortcut", f"{ours}.downsample.0", outputs, inputs, 1, 1, bias=False)
            yield from batch_norm(f"{theirs}.shortcut.norm", f"{ours}.downsample.1", outputs)


def mmdet_resnet(s: Sizes) -> Iterator[Triple]:
    yield from layer("backbone.conv1", "backbone.conv1", s.stem, 3, 7, 7, bias=False)
    yield from batch_norm("backbone.bn1", "backbone.bn1", s.stem)
    yield "backbone.bn1.num_batches_tracked", (), None
    for stage, block, inputs, inner, outputs in bottlenecks(s):
        at = f"backbone.layer{stage}.{block}"
        for n, shape in ((1, (inner, inputs, 1, 1)), (2, (inner, inner, 3, 3)), (3, (outputs, inner, 1, 1))):
            yield from layer(f"{at}.conv{n}", f"{at}.conv{n}", *shape, bias=False)
            yield from batch_norm(f"{at}.bn{n}", f"{at}.bn{n}", shape[0])
        if not block:
            yield from layer(f"{at}.downsample.0", f"{at}.downsample.0", outputs, inputs, 1, 1, bias=False)
            yield from batch_norm(f"{at}.downsample.1", f"{at}.downsample.1", outputs)
            yield f"{at}.downsample.1.num_batches_tracked", (), None


def swin(s: Sizes, body: str, words: dict[str, str]) -> Iterator[Triple]:
    """A Swin whose parts have the authors' words unless `words` has others."""

    def say(part: str) -> str:
        return words.get(part, part)

    yield from layer(f"{body}.patch_embed.{say('proj')}", "backbone.patch_embed.proj", s.stem, 3, 4, 4)
    yield from layer(f"{body}.patch_embed.norm", "backbone.patch_embed.norm", s.stem)
    for i, (blocks, heads) in enumerate(zip(s.blocks, s.heads, strict=True)):
        c = s.stem * 2**i
        for k in range(blocks):
            theirs, ours = f"{body}.{say('layers')}.{i}.blocks.{k}", f"backbone.layers.{i}.blocks.{k}"
            attn, table = f"{theirs}.{say('attn')}", "relative_position_bias_table"
            yield f"{attn}.{table}", ((2 * s.side - 1) ** 2, heads), f"{ours}.attn.{table}"
            yield f"{attn}.relative_position_index", (s.side**2, s.side**2), None
            for norm in ("norm1", "norm2"):
                yield from layer(f"{theirs}.{norm}", f"{ours}.{norm}", c)
            yield from layer(f"{attn}.qkv", f"{ours}.attn.qkv", 3 * c, c)
            yield from layer(f"{attn}.proj", f"{ours}.attn.proj", c, c)
            yield from layer(f"{theirs}.{say('mlp.fc1')}", f"{ours}.mlp.fc1", 4 * c, c)
            yield from layer(f"{theirs}.{say('mlp.fc2')}", f"{ours}.mlp.fc2", c, 4 * c)
        if i < 3:
            theirs, ours = f"{body}.{say('layers')}.{i}.downsample", f"backbone.layers.{i}.downsample"
            yield from layer(f"{theirs}.reduction", f"{ours}.reduction", 2 * c, 4 * c, bias=False)
            yield from layer(f"{theirs}.norm", f"{ours}.norm", 4 * c)
        if i:
            yield from layer(f"{body}.norm{i}", f"backbone.norm{i}", c)


def official_swin(s: Sizes) -> Iterator[Triple]:
    return swin(s, "backbone.backbone.bottom_up", {})


def mmdet_swin(s: Sizes) -> Iterator[Triple]:
    words = {"proj": "projection", "layers": "stages", "attn": "attn.w_msa"}
    return swin(s, "backbone", words | {"mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1"})


def maps_of(s: Sizes, finest: int) -> list[int]:
    """Channels of C2 or C3 to C5."""
    return [s.stem * 2 ** (level - 2) * (1 if s.side else 4) for level in range(finest, 6)]


def official_fpn(s: Sizes, finest: int = 3) -> Iterator[Triple]:
    body, c = "backbone.backbone", s.channels
    for number, inputs in enumerate(maps_of(s, finest)):
        yield from layer(f"{body}.fpn_lateral{number + finest}", f"fpn.lateral.{number}", c, inputs, 1, 1)
        yield from layer(f"{body}.fpn_output{number + finest}", f"fpn.output.{number}", c, c, 3, 3)
    for level in ("p6", "p7") if finest == 3 else ():
        yield from layer(f"{body}.top_block.{level}", f"fpn.{level}", c, c, 3, 3)


def mmdet_fpn(s: Sizes, finest: int = 3) -> Iterator[Triple]:
    c = s.channels
    for number, inputs in enumerate(maps_of(s, finest)):
        yield from layer(f"neck.0.lateral_convs.{number}.conv", f"fpn.lateral.{number}", c, inputs, 1, 1)
        yield from layer(f"neck.0.fpn_convs.{number}.conv", f"fpn.output.{number}", c, c, 3, 3)
    for number, level in ((3, "p6"), (4, "p7")) if finest == 3 else ():
        yield from layer(f"neck.0.fpn_convs.{number}.conv", f"fpn.{level}", c, c, 3, 3)


def atss(s: Sizes, theirs: tuple[str, str, str, str], kernel: int) -> Iterator[Triple]:
    classes, boxes, centerness, scales = theirs
    yield from layer(classes, "head.cls_logits", s.classes, s.channels, kernel, kernel)
    yield from layer(boxes, "head.bbox_pred", 4, s.channels, kernel, kernel)
    yield from layer(centerness, "head.centerness", 1, s.channels, kernel, kernel)
    for level in range(5):
        # A scalar in mmdetection, one number in a row in the authors' code.
        yield f"{scales}.{level}.scale", (1,) if scales == "head.scales" else (), f"head.scales.{level}.scale"


OFFICIAL_ATSS = ("head.cls_logits", "head.bbox_pred", "head.centerness", "head.scales")
MMDET_ATSS = ("bbox_head.atss_cls", "bbox_head.atss_reg", "bbox_head.atss_centerness", "bbox_head.scales")


def official_retinanet(s: Sizes) -> Iterator[Triple]:
    # Where no norm stands between, a ReLU follows each convolution in the list.
    for number in (0, 2, 4, 6):
        for theirs, ours in (("cls_subnet", "classification"), ("bbox_subnet", "regression")):
            at = f"trunk.towers.{ours}.{number}"
            yield from layer(f"head.{theirs}.{number}", at, s.channels, s.channels, 3, 3)
    yield from layer("head.cls_score", "head.cls_score", 9 * s.classes, s.channels, 3, 3)
    yield from layer("head.bbox_pred", "head.bbox_pred", 36, s.channels, 3, 3)
    for level in range(5):
        yield f"anchor_generator.cell_anchors.{level}", (9, 4), None


def faster_rcnn(s: Sizes, theirs: tuple[str, ...]) -> Iterator[Triple]:
    c, hidden = s.channels, 4 * s.channels
    conv, objectness, deltas, fc1, fc2, classes, boxes = theirs
    yield from layer(conv, "head.rpn.conv", c, c, 3, 3)
    yield from layer(objectness, "head.rpn.objectness", 3, c, 1, 1)
    yield from layer(deltas, "head.rpn.bbox_pred", 12, c, 1, 1)
    yield from layer(fc1, "head.box.fc1", hidden, 49 * c)
    yield from layer(fc2, "head.box.fc2", hidden, hidden)
    # The background comes last in both.
    yield from layer(classes, "head.box.cls_score", s.classes + 1, hidden)
    yield from layer(boxes, "head.box.bbox_pred", 4 * s.classes, hidden)


RPN, ROI = "proposal_generator.rpn_head", "roi_heads"
OFFICIAL_RCNN = (
    f"{RPN}.conv",
    f"{RPN}.objectness_logits",
    f"{RPN}.anchor_deltas",
    f"{ROI}.box_head.fc1",
    f"{ROI}.box_head.fc2",
    f"{ROI}.box_predictor.cls_score",
    f"{ROI}.box_predictor.bbox_pred",
)
MMDET_RCNN = (
    "rpn_head.rpn_conv",
    "rpn_head.rpn_cls",
    "rpn_head.rpn_reg",
    "roi_head.bbox_head.shared_fcs.0",
    "roi_head.bbox_head.shared_fcs.1",
    "roi_head.bbox_head.fc_cls",
    "roi_head.bbox_head.fc_reg",
)


def official_cells(levels: int) -> Iterator[Triple]:
    for level in range(levels):
        yield f"proposal_generator.anchor_generator.cell_anchors.{level}", (3, 4), None


PARTS = {
    "official": lambda s: [official_resnet(s), official_fpn(s), official_dyhead(s), atss(s, OFFICIAL_ATSS, 1)],
    "official-swin-t": lambda s: [official_swin(s), official_fpn(s), official_dyhead(s), atss(s, OFFICIAL_ATSS, 1)],
    "mmdet-r50-caffe": lambda s: [mmdet_resnet(s), mmdet_fpn(s), mmdet_dyhead(s), atss(s, MMDET_ATSS, 1)],
    "mmdet-r50": lambda s: [mmdet_resnet(s), mmdet_fpn(s), mmdet_dyhead(s), atss(s, MMDET_ATSS, 3)],
    "mmdet-swin-l": lambda s: [mmdet_swin(s), mmdet_fpn(s), mmdet_dyhead(s), atss(s, MMDET_ATSS, 1)],
    "official-retinanet-r50": lambda s: [
        official_resnet(s),
        official_fpn(s),
        official_dyhead(s, ours="trunk.dyhead.blocks"),
        official_retinanet(s),
    ],
    "official-faster-rcnn-r50": lambda s: [
        official_resnet(s),
        official_fpn(s, 2),
        official_dyhead(s),
        faster_rcnn(s, OFFICIAL_RCNN),
        official_cells(5),
    ],
    "mmdet-faster-rcnn-r50": lambda s: [
        mmdet_resnet(s),
        mmdet_fpn(s, 2),
        mmdet_dyhead(s),
        faster_rcnn(s, MMDET_RCNN),
    ],
}
FULL = dict.fromkeys(PARTS, Sizes()) | {"official-swin-t": SWIN_T, "mmdet-swin-l": SWIN_L}
SMALL = dict.fromkeys(PARTS, TINY) | {"official-swin-t": TINY_SWIN, "mmdet-swin-l": TINY_SWIN}


def keys(name: str, sizes: Sizes) -> list[Triple]:
    """The keys of a release at any size."""
    return [triple for part in PARTS[name](sizes) for triple in part]


def random_state(triples: list[Triple], device: str = "cpu") -> dict[str, Tensor]:
    """Random weights under the release's names, so that no two numbers that have a place are the same."""
    if device == "meta":
        return {theirs: torch.empty(shape, device="meta") for theirs, shape, _ in triples}
    total = sum(int(torch.Size(shape).numel()) for _, shape, _ in triples)
    numbers = torch.randperm(total, generator=torch.Generator().manual_seed(0)).double() / total
    # Every number in steps that float32 tells apart.
    assert total < 2**24
    parts = numbers.float().split([int(torch.Size(shape).numel()) for _, shape, _ in triples])
    return {theirs: part.view(shape) for (theirs, shape, _), part in zip(triples, parts, strict=True)}
