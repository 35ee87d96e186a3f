"""The region proposal network against mmdetection's vectors, its sample, and its edges."""

import numpy as np
import pytest
import torch
from golden_scene import CASES, IMAGES, assigned, float32_loss, targets_of

from heads.boxes.assign import BACKGROUND, IGNORED
from heads.boxes.rows import flatten_levels
from heads.boxes.sample import sample
from heads.two_stage.rpn import RPNHead, RPNOutputs

SIZES = ((32, 40), (16, 20), (8, 10), (4, 5), (2, 3))
PROPOSALS = {
    "train": (2000, 1000, 0.0),
    "test": (1000, 1000, 0.0),
    "small": (100, 50, 0.0),
    "minsize12": (1000, 1000, 12.0),
}


def outputs_of(vectors: dict, dtype: torch.dtype = torch.float32, grad: bool = False) -> RPNOutputs:
    logits, deltas = (
        flatten_levels([torch.from_numpy(vectors[f"raw.{k}.{level}"]).to(dtype) for level in range(5)], values)
        for k, values in (("cls", 1), ("reg", 4))
    )
    return RPNOutputs(logits[..., 0].requires_grad_(grad), deltas.requires_grad_(grad), SIZES)


def lost(vectors: dict, key: str) -> float:
    return float32_loss(vectors, key)[key]


@pytest.mark.parametrize("case", CASES)
def test_anchors_and_matches_are_mmdetections(golden, case):
    vectors, head = golden("rpn_mmdet"), RPNHead(8)
    grid = head.grid(outputs_of(vectors))
    if case == "full":
        want = np.concatenate([vectors[f"full.anchors.{level}"] for level in range(5)])
        np.testing.assert_array_equal(grid.anchors.numpy(), want)
    want = vectors[f"{case}.assigned_gt_inds"]
    targets = targets_of(vectors, case)
    matched = head.match(grid, targets, IMAGES)
    np.testing.assert_array_equal(np.where(vectors[f"{case}.valid_flags"], assigned(matched, targets), -2), want)
    assert (matched.numpy()[~vectors[f"{case}.valid_flags"]] == IGNORED).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_mmdetections(golden, case, dtype):
    vectors = golden("rpn_mmdet")
    raw = outputs_of(vectors, dtype, grad=True)
    chosen = torch.from_numpy(vectors[f"{case}.sampled"])
    losses = RPNHead(8).loss(raw, targets_of(vectors, case, dtype), IMAGES, chosen)
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_bbox"}
    for name, loss in losses.items():
        # mmdetection rounds the loss to float32 on its way, in a run of float64 too.
        tolerance = max(lost(vectors, name), 1e-7 * loss.item())
        assert abs(loss.item() - vectors[f"{case}.{name}"].sum()) <= tolerance, name
    grads = torch.autograd.grad(sum(losses.values()), raw[:2])
    for kind, values, grad in zip(("cls", "reg"), (1, 4), grads, strict=True):
        maps = [torch.from_numpy(vectors[f"{case}.grad.{kind}.{level}"]) for level in range(5)]
        want = flatten_levels(maps, values).numpy()
        assert np.abs(grad.numpy().reshape(want.shape) - want).max() <= lost(vectors, "grad"), kind


@pytest.mark.parametrize("case", CASES)
def test_deltas_of_the_positives_are_mmdetections(golden, case):
    vectors, head = golden("rpn_mmdet"), RPNHead(8)
    grid, targets = head.grid(outputs_of(vectors)), targets_of(vectors, case)
    matched = head.match(grid, targets, IMAGES)
    for image in range(2):
        at = np.flatnonzero(vectors[f"{case}.bbox_weights"][image])
        deltas = head.coder.encode(torch.cat([t["boxes"] for t in targets])[matched[image, at]], grid.anchors[at])
        want = vectors[f"{case}.bbox_targets"][image, at]
        assert np.abs(deltas.numpy() - want).max(initial=0) <= lost(vectors, "bbox_targets")


@pytest.mark.parametrize("name", PROPOSALS)
def test_proposals_are_mmdetections(golden, name):
    vectors = golden("rpn_mmdet")
    per_level, per_image, least_side = PROPOSALS[name]
    found = RPNHead(8, least_side=least_side).proposals(outputs_of(vectors), IMAGES, per_level, per_image)
    for image, (boxes, scores) in enumerate(found):
        want = vectors[f"prop_{name}.{image}.bboxes"]
        assert boxes.shape == want.shape
        assert np.abs(boxes.numpy() - want).max() <= lost(vectors, f"prop_{name}")
        assert np.abs(scores.numpy() - vectors[f"prop_{name}.{image}.scores"]).max() <= lost(vectors, f"prop_{name}")


def test_a_sample_has_the_stated_numbers_and_follows_the_seed():
    matched = torch.full((3, 400), BACKGROUND)
    matched[0, :100] = 1
    matched[0, 100:150] = IGNORED
    matched[1, :3] = 0
    matched[2, 10:] = IGNORED
    torch.manual_seed(1)
    chosen = sample(matched, 64, 0.25)
    positive = chosen & (matched >= 0)
    assert positive.sum(1).tolist() == [16, 3, 0]
    assert chosen.sum(1).tolist() == [64, 64, 10]
    assert not (chosen & (matched == IGNORED)).any()
    assert not torch.equal(chosen, sample(matched, 64, 0.25))
    torch.manual_seed(1)
    assert torch.equal(chosen, sample(matched, 64, 0.25))


def test_a_sample_is_drawn_evenly():
    torch.manual_seed(0)
    matched = torch.where(torch.arange(40) < 20, 0, BACKGROUND).repeat(2000, 1)
    share = sample(matched, 20, 0.5).float().mean(0)
    # Half of each group; 2,000 draws have a standard deviation of 0.011.
    assert (share - 0.5).abs().max() < 0.06


def test_the_convolution_reads_every_level_in_order():
    torch.manual_seed(0)
    head = RPNHead(4, (8, 16))
    features = [torch.randn(2, 4, 3, 5), torch.randn(2, 4, 2, 3)]
    outputs = head(features)
    start = 0
    for f in features:
        rows = slice(start, start + 3 * f.shape[2] * f.shape[3])
        start = rows.stop
        hidden = head.conv(f).relu()
        torch.testing.assert_close(outputs.logits[:, rows], head.objectness(hidden).permute(0, 2, 3, 1).flatten(1))
        deltas = head.bbox_pred(hidden).permute(0, 2, 3, 1).reshape(2, -1, 4)
        torch.testing.assert_close(outputs.deltas[:, rows], deltas)
    assert start == outputs.logits.shape[1]


def test_broken_outputs_give_no_proposals():
    """Training notices a loss that is not finite after the second stage has seen the proposals."""
    head = RPNHead(4, (8,))
    outputs = RPNOutputs(torch.full((1, 48), torch.nan), torch.full((1, 48, 4), torch.nan), ((4, 4),))
    ((boxes, scores),) = head.proposals(outputs, [(32, 32)], 100, 50)
    assert boxes.shape == (0, 4) and scores.shape == (0,)
