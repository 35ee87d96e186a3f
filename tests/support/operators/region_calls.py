"""Calls of RoIAlign, BorderAlign and suppression for property tests: malformed ones, and extreme ones to be checked."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import region_plain as plain
import torch
from hypothesis import strategies as st
from poisoned import LAYOUTS, Buffers
from torch import Tensor

from kernels import batched_nms, border_align, nms, roi_align, use_backend

# What numbers a whole number, a real number and a flag are not.
_NO_INTEGERS = (None, 2.0, True, "2", torch.tensor(2), np.array([2]), [], {}, 1j, 10**30, -(10**30))
_NO_NUMBERS = (None, True, "0.5", b"1", torch.tensor(0.5), np.array([0.5]), [0.5], {}, 1j, torch.nan, 10**400)
_NO_FLAGS = (None, 0, 1, "True", 1.0, torch.tensor(True), np.True_)


def _no_tensors(wanted: Tensor, integers: bool = False) -> list[Any]:
    """What a tensor of that many dimensions and that kind is not."""
    dtypes = (torch.float32, torch.bool, torch.complex64) if integers else (torch.int64, torch.bool, torch.complex64)
    wrong = [wanted.to(dtype) for dtype in dtypes]
    wrong += [wanted[None], wanted[..., 0], wanted.to("meta"), wanted.to_sparse()]
    return [*wrong, None, 2, 0.5, "tensor", wanted.numpy(), {}, [1.0, 2.0], [[1.0, 2.0]], object()]


def _features(seed: int, channels: int) -> Tensor:
    return torch.randn(2, channels, 3, 4, generator=torch.Generator().manual_seed(seed))


def _boxes(seed: int, *shape: int) -> Tensor:
    corner = 3 * torch.rand(*shape, 2, generator=torch.Generator().manual_seed(seed))
    return torch.cat([corner, corner + 2], -1)


class Malformed(NamedTuple):
    """A function, arguments that it takes, and by argument what it must refuse."""

    function: Callable
    good: dict[str, Any]
    wrong: dict[str, list[Any]]


def _roi(seed: int, rows: bool) -> Malformed:
    features, own = _features(seed, 2), _boxes(seed, 3)
    image = torch.tensor([[0.0], [1.0], [1.0]])
    boxes = torch.cat([image, own], 1) if rows else [own, own[:1]]
    wrong_boxes = [*_no_tensors(torch.cat([image, own], 1)), own, torch.cat([own, own], 1), own[:, :3]]
    wrong_boxes += [[], [own], [own, own, own], (own, None), [own, own.numpy()], [own.tolist(), own.tolist()]]
    wrong_boxes += [[own, x] for x in (own[0], own[None], own[:, :3], torch.cat([image, own], 1), own.long())]
    wrong_boxes += [[own, own.to("meta")], [own.bool(), own], (b for b in (own, own)), iter([own, own])]
    wrong = {
        "features": [*_no_tensors(features), features[:, :, :0], features[..., :0], own, [features, features]],
        "boxes": [*wrong_boxes, features],
        "output_size": [
            *_NO_INTEGERS[:3],
            *_NO_INTEGERS[3:],
            0,
            -1,
            2**31,
            (2,),
            (1, 2, 3),
            (2, 0),
            (2, 2.0),
            (None, 1),
        ],
        "spatial_scale": [*_NO_NUMBERS, 0, -0.5, torch.inf, -torch.inf, (1, 1)],
        "sampling_ratio": [*_NO_INTEGERS, 2**31, -(2**31), (2, 2)],
        "aligned": list(_NO_FLAGS),
    }
    return Malformed(roi_align, {"features": features, "boxes": boxes, "output_size": 2}, wrong)


def _border(seed: int) -> Malformed:
    features, boxes = _features(seed, 8), _boxes(seed, 2, 3)
    wrong = {
        "features": [
            *_no_tensors(features),
            *(features[:, :c] for c in (1, 6, 7)),
            features[:, :, :0],
            boxes,
            features[:1],
        ],
        # Two wrong arguments must not fit one another.
        "boxes": [
            *_no_tensors(boxes),
            torch.cat([boxes, boxes[:1]]),
            boxes[..., :3],
            torch.cat([boxes, boxes], -1),
            features,
        ],
        "pool_size": [*_NO_INTEGERS, 0, -1, 256, 2**31, (2, 2)],
    }
    return Malformed(border_align, {"features": features, "boxes": boxes, "pool_size": 2}, wrong)


def _suppression(seed: int, with_labels: bool) -> Malformed:
    boxes, scores, labels = _boxes(seed, 4), torch.arange(4.0), torch.tensor([0, 0, 1, 1])
    wrong = {
        "boxes": [*_no_tensors(boxes), boxes[:3], boxes[:, :3], torch.cat([boxes, boxes], 1), boxes.t()[:3], scores],
        # Two wrong arguments must not fit one another.
        "scores": [*_no_tensors(scores), scores[:2], torch.arange(5.0), scores[:, None], boxes],
        "iou_threshold": list(_NO_NUMBERS),
        "max_output": [x for x in _NO_INTEGERS if x is not None] + [-1, (2, 2)],
    }
    good = {"boxes": boxes, "scores": scores}
    if with_labels:
        good |= {"labels": labels}
        wrong["labels"] = [*_no_tensors(labels, integers=True), labels[:3], labels.repeat(2), labels[:, None], boxes]
    return Malformed(batched_nms if with_labels else nms, good | {"iou_threshold": 0.5}, wrong)


MALFORMED = {
    "roi_align of lists": lambda seed: _roi(seed, False),
    "roi_align of rows": lambda seed: _roi(seed, True),
    "border_align": _border,
    "nms": lambda seed: _suppression(seed, False),
    "batched_nms": lambda seed: _suppression(seed, True),
}


@st.composite
def malformed_call(draw, name: str) -> tuple[Callable, dict[str, Any]]:
    """One of the functions, and arguments of which one or two are wrong, or two have changed places."""
    function, good, wrong = MALFORMED[name](draw(st.integers(0, 2**20)))
    arguments = dict(good)
    if draw(st.integers(0, 9)) == 0:
        first, second = draw(st.permutations(list(good)))[:2]
        arguments[first], arguments[second] = arguments[second], arguments[first]
        return function, arguments
    for argument in draw(st.lists(st.sampled_from(list(wrong)), min_size=1, max_size=2, unique=True)):
        arguments[argument] = draw(st.sampled_from(wrong[argument]))
    return function, arguments


def refusal(call: tuple[Callable, dict[str, Any]], backend: str) -> tuple[type, str]:
    """The error of a malformed call, which begins with the name of an argument."""
    function, arguments = call
    with use_backend(backend), pytest.raises((ValueError, TypeError)) as caught:
        function(**arguments)
    assert caught.type in (ValueError, TypeError)
    assert re.match(
        "|".join(rf"{name}\b" for name in [*arguments, "spatial_scale", "sampling_ratio"]), str(caught.value)
    )
    return caught.type, str(caught.value)


_SPECIAL = (
    0.0,
    -1.0,
    0.5,
    1.0,
    2.0,
    3.0,
    4.0,
    -50.0,
    50.0,
    1e4,
    -1e4,
    1e9,
    1e30,
    -1e30,
    3e38,
    torch.nan,
    torch.inf,
    -torch.inf,
)


def _coordinates(draw, count: int, generator: torch.Generator) -> Tensor:
    """(count, 4) float64: a few special, the others on, around and across a map of four cells, any corner first."""
    boxes = (6 * torch.rand(count, 4, generator=generator, dtype=torch.float64) - 1) * draw(st.sampled_from([1, 1, 30]))
    if draw(st.booleans()):
        # So that samples lie on cells and exactly on the edge of what is read.
        boxes = (2 * boxes).round() / 2
    if draw(st.booleans()):
        boxes[:, :2] -= 20
    for number in draw(st.lists(st.integers(0, max(4 * count - 1, 0)), max_size=3)) if count else []:
        boxes.view(-1)[number] = draw(st.sampled_from(_SPECIAL))
    return boxes


def _map(draw, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Random numbers, sometimes with a NaN."""
    found = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if found.numel() and draw(st.booleans()):
        found.view(-1)[draw(st.integers(0, found.numel() - 1))] = torch.nan
    return found


def _work(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _compare(name: str, found: Tensor, same: np.ndarray, want: np.ndarray, slack: float) -> None:
    """At most as far from the float64 definition as plain loops in the same precision, and NaN where those are."""
    same, want = torch.from_numpy(same).to(found.dtype), torch.from_numpy(want)
    assert found.shape == same.shape, name
    assert torch.equal(found.isnan(), same.isnan()), name
    found, same = found.double(), same.double()
    error = (found - want).abs()
    allowed = (same - want).abs() + slack
    # Where rounding decides whether a NaN is read there is no float64 value.
    close = torch.where(want.isnan() | same.isnan(), True, error <= allowed)
    assert close.all(), (name, error[~close], allowed[~close])


def _far(boxes: Tensor) -> bool:
    """Whether a side lies where float32 does not tell cells apart: then no one can say which of them are read."""
    return bool((boxes.double().nan_to_num(0, 0, 0).abs() > 1e5).any())


class Sampled(NamedTuple):
    """An extreme call of RoIAlign or BorderAlign; `boxes` as the definition takes them, before they are converted."""

    features: Tensor
    boxes: Tensor
    images: list[float] | None
    options: dict[str, Any]
    cotangent: Callable[[tuple[int, ...]], Tensor]
    layouts: tuple[str, str]


@st.composite
def sampled(draw, kind: str, dtypes: list[torch.dtype]) -> Sampled:
    """Maps of one cell and more, boxes of any kind or none, no images, no channels, NaN in the map and the gradient."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    dtype, of_boxes = draw(st.sampled_from(dtypes)), draw(st.sampled_from(dtypes))
    n, channels = draw(st.sampled_from([0, 1, 1, 1, 2])), draw(st.sampled_from([0, 1, 2, 3]))
    height, width, count = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(0, 2))
    bad_gradient = draw(st.integers(0, 3)) == 0

    def cotangent(shape):
        found = torch.randn(shape, generator=generator, dtype=torch.float64)
        if bad_gradient and found.numel() and not _far(boxes):
            found.view(-1)[found.numel() // 2] = torch.nan
        return found

    layouts = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(LAYOUTS))
    if kind == "border":
        features = _map(draw, (n, 4 * channels, height, width), dtype, generator)
        boxes = _coordinates(draw, n * count, generator).view(n, count, 4).to(of_boxes)
        features = features.nan_to_num(0) if _far(boxes) else features
        return Sampled(features, boxes, None, {"pool_size": draw(st.sampled_from([1, 2, 2]))}, cotangent, layouts)
    features = _map(draw, (n, channels, height, width), dtype, generator)
    if kind == "rows":
        images = [draw(st.sampled_from([0.0, 1.0, 1.5, -0.5, -1.0, 2.0, 1e9, -0.0, torch.nan])) for _ in range(count)]
    else:
        images = sorted(draw(st.integers(0, n - 1)) for _ in range(count)) if n else []
    options = {
        "output_size": draw(st.sampled_from([1, 2, (1, 3), [2, 1]])),
        "spatial_scale": draw(st.sampled_from([1.0, 0.25, 0.3, 2])),
        "sampling_ratio": draw(st.sampled_from([-1, 0, 0, 1, 2, 3])),
        "aligned": draw(st.booleans()),
    }
    boxes = (_coordinates(draw, len(images), generator) / options["spatial_scale"]).to(of_boxes)
    features = features.nan_to_num(0) if _far(boxes) else features
    return Sampled(features, boxes, images, options, cotangent, layouts)


def check_sampled(kind: str, case: Sampled, backend: str) -> None:
    """A call in buffers of poison, forward and backward, against plain loops."""
    buffers = Buffers()
    x = buffers.place(case.features.requires_grad_(), case.layouts[0])
    boxes, layout = case.boxes, case.layouts[1]
    if kind == "rows":
        given = buffers.place(torch.cat([torch.tensor(case.images).view(-1, 1).to(boxes.dtype), boxes], 1), layout)
    elif kind == "lists":
        given = [
            buffers.place(boxes[[i for i, image in enumerate(case.images) if image == own]], layout)
            for own in range(len(x))
        ]
    else:
        given = buffers.place(boxes, layout)
    function = border_align if kind == "border" else roi_align
    with use_backend(backend), buffers.guarded():
        out = function(x, given, **case.options)
    cotangent = case.cotangent(out.shape).to(out.dtype)
    with use_backend(backend), buffers.guarded():
        (grad,) = torch.autograd.grad(out, x, buffers.place(cotangent, layout))
    assert buffers.intact()
    work = _work(x.dtype)
    assert out.dtype == (x.dtype if kind == "border" else work) and grad.dtype == x.dtype
    images = None if case.images is None else [-1 if not 0 <= i < len(x) else int(i) for i in case.images]
    results = []
    with np.errstate(all="ignore"):
        for real in (work, torch.float64):
            arguments = x.detach().double().numpy(), boxes.to(real).numpy(), cotangent.double().numpy()
            results.append(_plain(kind, *arguments, images, case.options))
    size = [t.nan_to_num(0).abs().amax().item() if t.numel() else 0 for t in (x.detach().double(), cotangent.double())]
    for name, found, of_size, same, want in zip(
        ("output", "gradient"), (out.detach(), grad), size, *results, strict=True
    ):
        # Half precision is rounded once more, at the end.
        end = 0 if found.dtype == work else torch.finfo(found.dtype).eps
        _compare(name, found, same, want, 4 * of_size * (64 * torch.finfo(work).eps + end))


def _plain(kind: str, features, boxes, grad, images, options):
    if kind == "border":
        return plain.border_align(features, boxes, options["pool_size"], grad)
    size = options["output_size"]
    size = (size, size) if isinstance(size, int) else tuple(size)
    cells = boxes * boxes.dtype.type(options["spatial_scale"])
    return plain.roi_align(features, cells, images, size, max(options["sampling_ratio"], 0), options["aligned"], grad)


class Suppression(NamedTuple):
    """An extreme call of suppression."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor | None
    threshold: float
    limit: int | None
    layout: str


@st.composite
def suppression(draw, with_labels: bool, dtypes: list[torch.dtype]) -> Suppression:
    """No box to more than two words of 64, ties, duplicates, NaN scores, any threshold, boxes that are not finite."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    dtype = draw(st.sampled_from(dtypes))
    count = draw(st.sampled_from([0, 1, 2, 3, 5, 8, 13, 13, 21, 30, 64, 65, 129, 130]))
    boxes = _coordinates(draw, count, generator)
    if draw(st.booleans()):
        boxes = torch.cat([boxes[:, :2], boxes[:, :2] + 3 * boxes[:, 2:].abs()], 1)
    if count and draw(st.booleans()):
        boxes = boxes[torch.randint(0, max(count // 3, 1), (count,), generator=generator)]
    if draw(st.integers(0, 3)) == 0:
        # What float32 would round to boxes of whole multiples of 64.
        boxes = boxes + 1e9
    scores = torch.randint(0, draw(st.sampled_from([1, 4, 1000])), (count,), generator=generator).double()
    if count and draw(st.booleans()):
        scores[draw(st.integers(0, count - 1))] = draw(st.sampled_from([torch.nan, torch.inf, -torch.inf, -0.0]))
    labels = None
    if with_labels:
        of_labels = draw(st.sampled_from([torch.int64, torch.int32, torch.uint8]))
        labels = torch.randint(0, 3, (count,), generator=generator).to(of_labels)
    threshold = draw(st.sampled_from([0.5, 0.3, 0.7, 0, 1, -0.1, 1.5, 1e300, -torch.inf, torch.inf, 1 / 3]))
    limit = draw(st.sampled_from([None, None, 0, 1, 3, 200, 10**12]))
    of_scores = draw(st.sampled_from(dtypes))
    return Suppression(boxes.to(dtype), scores.to(of_scores), labels, threshold, limit, draw(st.sampled_from(LAYOUTS)))


def check_suppression(case: Suppression, backend: str) -> None:
    """A call in buffers of poison against the plain greedy walk: the same indices."""
    buffers = Buffers()
    given = [buffers.place(x, case.layout) for x in case[:3] if x is not None]
    function = nms if case.labels is None else batched_nms
    with use_backend(backend), buffers.guarded():
        found = function(*given, case.threshold, case.limit)
    assert buffers.intact()
    labels = torch.zeros(len(case.boxes)) if case.labels is None else case.labels
    boxes = case.boxes.to(_work(case.boxes.dtype))
    with np.errstate(all="ignore"):
        want = plain.nms(boxes.numpy(), case.scores.tolist(), labels.numpy(), case.threshold, case.limit)
    assert found.dtype == torch.int64 and found.tolist() == want
