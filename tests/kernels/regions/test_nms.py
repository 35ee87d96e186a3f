"""Suppression against mmcv's vectors and against the plain greedy loop."""

import importlib

import numpy as np
import pytest
import region_plain
import torch

from kernels import batched_nms, nms
from kernels.backend import resolve_backend

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def plain_nms(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, threshold: float) -> list[int]:
    """The definition, box by box, in float32."""
    with np.errstate(invalid="ignore"):
        return region_plain.nms(boxes.astype(np.float32), scores, labels, threshold, None)


def random_scene(count: int, seed: int, classes: int = 1, duplicates: bool = False, ties: bool = False):
    rng = np.random.default_rng(seed)
    corner, side = rng.uniform(0, 200, (count, 2)), rng.uniform(0, 60, (count, 2))
    boxes = np.concatenate([corner, corner + side], 1).astype(np.float32)
    if duplicates:
        boxes = boxes[rng.integers(0, max(1, count // 4), count)]
    scores = rng.random(count).astype(np.float32)
    if ties:
        scores = (scores * 10).round() / 10
    return boxes, scores, rng.integers(0, classes, count)


@pytest.mark.both_paths
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.6, 0.7])
def test_mmcv_vectors(golden, threshold, device):
    vectors = golden("pieces_nms")
    boxes, scores, labels = (torch.from_numpy(vectors[k]).to(device) for k in ("boxes", "scores", "labels"))
    np.testing.assert_array_equal(nms(boxes, scores, threshold).cpu(), vectors[f"nms.keep_{threshold}"])
    keep = batched_nms(boxes, scores, labels, threshold)
    np.testing.assert_array_equal(keep.cpu(), vectors[f"batched.keep_{threshold}"])
    if threshold == 0.5:
        np.testing.assert_array_equal(keep.cpu(), vectors["split.keep_0.5"])
        ten = batched_nms(boxes, scores, labels, threshold, max_output=10)
        np.testing.assert_array_equal(ten.cpu(), vectors["nms_thr0.3_max10.keep_0.5"])


@pytest.mark.both_paths
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("threshold", [0.5, 0.6])
def test_an_overlap_equal_to_the_threshold_is_kept(golden, threshold, device):
    vectors = golden("pieces_nms")
    boxes, scores = (torch.from_numpy(vectors[f"thr.{k}"]).to(device) for k in ("boxes", "scores"))
    np.testing.assert_array_equal(nms(boxes, scores, threshold).cpu(), vectors[f"thr.keep_{threshold}"])


def check_scene(scene, seed, threshold, device="cpu"):
    boxes, scores, labels = random_scene(seed=seed, **scene)
    want = plain_nms(boxes, scores, labels, threshold)
    tensors = [torch.from_numpy(a).to(device) for a in (boxes, scores, labels)]
    keep = batched_nms(*tensors, threshold)
    assert keep.device.type == device and keep.tolist() == want
    assert batched_nms(*tensors, threshold, max_output=50).tolist() == want[:50]
    if scene.get("classes", 1) == 1:
        assert nms(*tensors[:2], threshold).tolist() == want


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "scene",
    [
        pytest.param({"count": 1}, id="one"),
        pytest.param({"count": 128}, id="one block"),
        pytest.param({"count": 129}, id="one more than a block"),
        pytest.param({"count": 700, "duplicates": True}, id="duplicates"),
        pytest.param({"count": 700, "ties": True}, id="ties"),
        pytest.param({"count": 700, "duplicates": True, "ties": True, "classes": 3}, id="all of it"),
        pytest.param({"count": 3000}, id="3000 boxes"),
        pytest.param({"count": 3000, "classes": 20}, id="3000 boxes of 20 classes"),
    ],
)
def test_equals_the_greedy_loop(scene, device):
    for seed, threshold in enumerate((0.1, 0.5, 0.7)):
        check_scene(scene, seed, threshold, device)


@pytest.mark.both_paths
def test_ties_go_by_index():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 11], [30, 30, 40, 40], [0, 0, 10, 10]])
    assert nms(boxes, torch.full((4,), 0.5), 0.5).tolist() == [0, 2]
    assert nms(boxes.flip(0), torch.full((4,), 0.5), 0.5).tolist() == [0, 1]


@pytest.mark.both_paths
def test_labels_do_not_move_the_boxes():
    """With class 100,000 as a shift in float32 these two boxes would become the same."""
    boxes = torch.tensor([[0.0, 0, 0.3, 0.3], [0.2, 0.2, 0.5, 0.5]])
    assert batched_nms(boxes, torch.tensor([0.9, 0.8]), torch.tensor([100_000, 100_000]), 0.5).tolist() == [0, 1]


@pytest.mark.both_paths
def test_boxes_without_area_stay():
    boxes = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5], [0, 0, 10, 10]])
    assert nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist() == [0, 1, 2]


@pytest.mark.both_paths
def test_no_box_gives_no_index():
    keep = batched_nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long), 0.5)
    assert keep.shape == (0,) and keep.dtype == torch.int64
    assert nms(torch.zeros(1, 4), torch.zeros(1), 0.5, max_output=0).tolist() == []


@pytest.mark.both_paths
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_compared_in_float32(dtype):
    boxes, scores, _ = (torch.from_numpy(a) for a in random_scene(90, 3))
    boxes = boxes.to(dtype).requires_grad_()
    want = plain_nms(boxes.detach().float().numpy(), scores.numpy(), np.zeros(90), 0.3)
    assert nms(boxes, scores.double().requires_grad_(), 0.3).tolist() == want


@pytest.mark.both_paths
def test_boxes_that_are_not_finite_suppress_nothing():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, torch.nan, 10], [0, 0, torch.inf, 10], [0, 0, 10, 11]])
    assert nms(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6]), 0.5).tolist() == [0, 1, 2]


@pytest.mark.both_paths
def test_float64_is_compared_in_float64():
    """In float32 the first two boxes would be one, and so would the two thresholds."""
    boxes = 1e9 + torch.tensor([[0.0, 0, 8, 8], [8, 8, 16, 16], [0, 0, 8, 9]], dtype=torch.float64)
    scores = torch.tensor([0.9, 0.8, 0.7])
    assert nms(boxes, scores, 0.5).tolist() == [0, 1]
    overlap = 64 / 72
    assert nms(boxes, scores, overlap).tolist() == [0, 1, 2]
    assert nms(boxes, scores, overlap - 1e-12).tolist() == [0, 1]
    assert batched_nms(boxes, scores, torch.tensor([1, 1, 2], dtype=torch.uint8), 0.5).tolist() == [0, 1, 2]


@pytest.mark.both_paths
def test_any_threshold():
    """Also one that float32 does not hold; a box that is not finite takes no part even below 0."""
    boxes = torch.tensor([[0.0, 0, 9, 9], [20, 20, 30, 30], [0, torch.nan, 9, 9], [0, 0, 9, 9], [-torch.inf, 0, 9, 9]])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    wanted = {-0.1: [0, 2, 4], -1e300: [0, 2, 4], 0: [0, 1, 2, 4], 1: [0, 1, 2, 3, 4], 1e300: [0, 1, 2, 3, 4]}
    for threshold, want in (wanted | {torch.inf: [0, 1, 2, 3, 4], -torch.inf: [0, 2, 4]}).items():
        for dtype in (torch.float32, torch.float64):
            assert nms(boxes.to(dtype), scores, threshold).tolist() == want, (threshold, dtype)


@pytest.mark.both_paths
def test_scores_that_are_not_numbers_come_first():
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 9], [20, 20, 30, 30], [20, 20, 30, 31]])
    scores = torch.tensor([torch.inf, torch.nan, -torch.inf, torch.nan])
    assert nms(boxes, scores, 0.5).tolist() == [1, 3]
    assert torch.equal(nms(boxes, scores, 2.0), scores.argsort(descending=True, stable=True))


def test_refusals():
    boxes, scores, labels = torch.zeros(3, 4), torch.zeros(3), torch.zeros(3, dtype=torch.long)
    for arguments, kind, message in (
        ((boxes[:, :3], scores, labels, 0.5), ValueError, r"boxes must be \(n, 4\), got shape \(3, 3\)"),
        ((boxes, scores[:2], labels, 0.5), ValueError, r"scores must be \(3,\), one for each box, got shape \(2,\)"),
        ((boxes, scores, labels.repeat(2), 0.5), ValueError, r"labels must be \(3,\), .*, got shape \(6,\)"),
        ((boxes, scores, scores, 0.5), ValueError, "labels must be of integers"),
        ((boxes, scores, None, 0.5), TypeError, "labels must be a tensor"),
        ((boxes, scores, labels, torch.nan), ValueError, "iou_threshold must be a number, got NaN"),
        ((boxes, scores, labels, 0.5, -1), ValueError, "max_output must be within"),
        ((boxes, scores.to("meta"), labels, 0.5), ValueError, "scores must be on the device of boxes, cpu"),
        ((boxes.to("meta"), scores.to("meta"), labels.to("meta"), 0.5), ValueError, "boxes must have values"),
    ):
        with pytest.raises(kind, match=message):
            batched_nms(*arguments)


@pytest.mark.both_paths
def test_any_strides():
    boxes, scores, labels = (torch.from_numpy(a) for a in random_scene(70, 4, classes=2))
    want = batched_nms(boxes, scores, labels, 0.2)
    found = batched_nms(boxes.t().contiguous().t(), scores.repeat_interleave(2)[::2], labels.repeat(2, 1)[0], 0.2)
    assert torch.equal(found, want)


@pytest.mark.both_paths
def test_opcheck():
    boxes, scores, labels = (torch.from_numpy(a) for a in random_scene(70, 0, classes=2))
    backend = resolve_backend(boxes.device)
    torch.library.opcheck(torch.ops.dyhead.nms.default, (boxes, scores, labels, 0.5, None, backend))
    torch.library.opcheck(torch.ops.dyhead.nms.default, (boxes, scores, None, 0.5, 10, backend))


def test_compile_and_export():
    class Module(torch.nn.Module):
        def forward(self, boxes, scores, labels):
            return boxes[batched_nms(boxes, scores, labels, 0.5, 100)]

    boxes, scores, labels = (torch.from_numpy(a) for a in random_scene(150, 0, classes=2))
    want = Module()(boxes, scores, labels)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(boxes, scores, labels), want)
    count = torch.export.Dim("count", min=2, max=4096)
    program = torch.export.export(Module(), (boxes, scores, labels), dynamic_shapes=({0: count},) * 3)
    other = [torch.from_numpy(a) for a in random_scene(333, 1, classes=2)]
    assert torch.equal(program.module()(*other), Module()(*other))


@pytest.mark.gpu
def test_more_boxes_than_the_matrix_holds():
    check_scene({"count": 33_000}, 0, 0.1, "cuda")


@pytest.mark.gpu
def test_the_host_waits_once():
    boxes, scores, labels = (torch.from_numpy(a).cuda() for a in random_scene(5000, 0, classes=7, ties=True))
    batched_nms(boxes, scores, labels, 0.5)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        batched_nms(boxes, scores, labels, 0.5)
    waits = [event for event in profile.events() if event.name == "aten::_local_scalar_dense"]
    assert len(waits) == 1


@pytest.fixture
def every_bit_set(monkeypatch):
    """Memory that nobody has written says that everything is suppressed."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(-1))


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("scene", "threshold"),
    [
        pytest.param({"count": 1}, 0.5, id="one"),
        pytest.param({"count": 64}, 0.1, id="one tile"),
        pytest.param({"count": 65}, 0.5, id="one more than a tile"),
        pytest.param({"count": 300, "duplicates": True, "ties": True, "classes": 3}, 0.5, id="duplicates and ties"),
        pytest.param({"count": 1030, "classes": 3, "duplicates": True}, 0.3, id="more than 1,000 boxes"),
    ],
)
def test_tiles_equal_the_greedy_loop(scene, threshold, every_bit_set):
    check_scene(scene, 0, threshold)


@pytest.mark.interpreter
def test_each_box_suppresses_only_the_next(every_bit_set):
    """The longest chain within a tile and across tiles: every second box is kept, and each depends on all before."""
    start = torch.arange(150.0)
    boxes = torch.stack([start, start * 0, start + 2.5, start * 0 + 1], 1)
    assert nms(boxes, -start, 0.3).tolist() == list(range(0, 150, 2))


@pytest.mark.interpreter
def test_the_walk_in_pieces(monkeypatch, every_bit_set):
    monkeypatch.setattr(importlib.import_module("kernels.regions.nms_kernels"), "_PIECE", 32)
    check_scene({"count": 200, "duplicates": True}, 1, 0.3)


@pytest.mark.interpreter
def test_more_boxes_than_the_matrix_holds_take_the_other_path(monkeypatch):
    boxes, scores, labels = (torch.from_numpy(a) for a in random_scene(90, 0, classes=2))
    want = batched_nms(boxes, scores, labels, 0.3)
    monkeypatch.setattr(importlib.import_module("kernels.regions.nms"), "_MOST_TRITON", 89)
    monkeypatch.setattr(importlib.import_module("kernels.regions.nms_kernels"), "greedy", None)
    assert torch.equal(batched_nms(boxes, scores, labels, 0.3), want)
