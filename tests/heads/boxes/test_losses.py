"""Detection losses against mmdetection's vectors."""

import numpy as np
import pytest
import torch

from heads.boxes.losses import centerness_loss, giou_loss, iou_loss, sigmoid_focal_loss, smooth_l1_loss

# mmdetection adds this to every normaliser.
EPS = float(np.finfo(np.float32).eps)


def double(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).double()


@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (1.5, 0.4), (0.0, 0.5)])
def test_focal_loss(golden, gamma, alpha):
    vectors = golden("pieces_losses")
    stored = {k: vectors[f"focal.g{gamma}_a{alpha}.{k}"] for k in ("loss", "grad", "per")}
    targets, weight = torch.from_numpy(vectors["focal.targets"]), double(vectors["focal.weight"])
    logits = double(vectors["focal.logits"]).requires_grad_()
    settings = {"alpha": alpha, "gamma": gamma}
    # Each element by itself: one row, one class.
    for row, column in [(r, c) for r in range(50) for c in range(7)]:
        is_target = torch.where(targets[row] == column, 0, 1)
        one = sigmoid_focal_loss(logits[row, column].view(1, 1), is_target.view(1), normaliser=1, **settings)
        assert one.item() == pytest.approx(stored["per"][row, column], rel=1e-12)
    loss = sigmoid_focal_loss(logits, targets, normaliser=11 + EPS, weight=weight, **settings)
    assert loss.item() == pytest.approx(stored["loss"], rel=1e-12)
    (grad,) = torch.autograd.grad(loss, logits)
    np.testing.assert_allclose(grad, stored["grad"], rtol=1e-9, atol=1e-15)


def test_focal_loss_loses_what_float32_loses(golden):
    """Against itself in float64, beside the same formula written with PyTorch's own cross-entropy in float32."""
    vectors = golden("pieces_losses")
    targets = torch.from_numpy(vectors["focal.targets"])
    exact = sigmoid_focal_loss(double(vectors["focal.logits"]), targets, normaliser=1)
    logits = torch.from_numpy(vectors["focal.logits"])
    one_hot = torch.nn.functional.one_hot(targets, 8)[:, :7].float()
    p = logits.sigmoid()
    plain = torch.nn.functional.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
    plain = plain * (1 - p * one_hot - (1 - p) * (1 - one_hot)) ** 2 * (0.25 * one_hot + 0.75 * (1 - one_hot))
    ours = sigmoid_focal_loss(logits, targets, normaliser=1)
    assert abs(ours - exact) <= 2 * abs(plain.sum() - exact) + exact * torch.finfo(torch.float32).eps


def test_focal_loss_of_extreme_logits_is_finite():
    logits = torch.tensor([[-1e4, 1e4, 0.0], [1e4, -1e4, 88.0]], requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.tensor([0, 3]), normaliser=1.0)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite() and grad.isfinite().all()
    # A target at -10000 costs alpha * 10000 and pulls with alpha; a target at +10000 costs nothing.
    assert grad[0, 0].item() == pytest.approx(-0.25)
    assert sigmoid_focal_loss(logits[:1], torch.tensor([1]), normaliser=1.0).item() == pytest.approx(
        0.75 * 0.25 * np.log(2)
    )


def test_focal_loss_gradient_by_differences():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    labels, weight = torch.tensor([[0, 3, 1, 2], [-1, 2, 0, 3]]), torch.rand(2, 4, generator=generator)
    assert torch.autograd.gradcheck(
        lambda x: sigmoid_focal_loss(x, labels, normaliser=3.0, weight=weight, gamma=1.7), logits
    )


def test_focal_loss_without_a_row_is_zero():
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.zeros(0, dtype=torch.long), normaliser=1)
    loss.backward()
    assert loss.item() == 0 and logits.grad.shape == (0, 5)


@pytest.mark.parametrize(("name", "function"), [("giou", giou_loss), ("iou_log", iou_loss)])
def test_box_losses(golden, name, function):
    vectors = golden("pieces_losses")
    a, b, w = (double(vectors[k][:27]) for k in "abw")
    a.requires_grad_()
    for row in range(27):
        one = function(a[row : row + 1], b[row : row + 1], normaliser=1)
        assert one.item() == pytest.approx(vectors[f"{name}.per"][row], rel=1e-12)
    loss = function(a, b, weight=w, normaliser=7.5 + EPS)
    assert loss.item() == pytest.approx(vectors[f"{name}.loss_w_avg7.5"].item(), rel=1e-12)
    (grad,) = torch.autograd.grad(loss, a)
    np.testing.assert_allclose(grad, vectors[f"{name}.grad"], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(("name", "beta"), [("l1", 0.0), ("smoothl1_b1", 1.0), ("smoothl1_b011", 0.11)])
def test_smooth_l1(golden, name, beta):
    vectors = golden("pieces_losses")
    a, b, w = (double(vectors[k]) for k in "abw")
    a.requires_grad_()
    assert smooth_l1_loss(a, b, beta=beta, normaliser=2).item() == pytest.approx(vectors[f"{name}.per"].sum() / 2)
    loss = smooth_l1_loss(a, b, beta=beta, weight=w, normaliser=7.5 + EPS)
    assert loss.item() == pytest.approx(vectors[f"{name}.loss_w_avg7.5"].item(), rel=1e-12)
    (grad,) = torch.autograd.grad(loss, a)
    np.testing.assert_allclose(grad, vectors[f"{name}.grad"], rtol=1e-9, atol=1e-14)


def test_centerness_loss(golden):
    vectors = golden("pieces_losses")
    logits = double(vectors["bce.x"]).requires_grad_()
    loss = centerness_loss(logits, double(vectors["bce.t"]), normaliser=5 + EPS)
    assert loss.item() == pytest.approx(vectors["bce.loss_avg5"].item(), rel=1e-12)
    (grad,) = torch.autograd.grad(loss, logits)
    np.testing.assert_allclose(grad, vectors["bce.grad"], rtol=1e-9, atol=1e-15)
