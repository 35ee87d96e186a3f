"""A thousand steps of training on the fused path, beside the PyTorch path; and that the comparison can fail."""

import numpy as np
import pytest
from loss_curves import distance, loss_curve, noise

from heads.dyhead import attention
from kernels.bench.roofline import float32_products

STEPS = 30


@pytest.mark.gpu
def test_training_on_the_fused_path_stays_within_the_noise():
    """With the same seed, the paths' smoothed curves are no farther apart than those of two of three seeds.

    And, which says more, no farther than twice what curves of one seed are that began with other last digits.
    """
    # So that rounding is all that tells the paths apart.
    with float32_products("fp32"):
        seeds = [loss_curve("torch", seed, 1000, "cuda") for seed in range(3)]
        digits = [seeds[0], *(loss_curve("torch", 0, 1000, "cuda", nudge=nudge) for nudge in (1, 2))]
        fused = loss_curve("triton", 0, 1000, "cuda")
    assert np.isfinite(fused).all()
    assert distance(fused, seeds[0]) <= noise(seeds)
    assert distance(fused, seeds[0]) <= 2 * noise(digits)


def short_curve(**options):
    return loss_curve("torch", options.pop("seed", 0), STEPS, "cpu", channels=16, count=16, **options)


def test_a_wrong_gradient_leaves_the_noise_and_the_same_seed_does_not(monkeypatch):
    plain = short_curve()
    assert np.array_equal(short_curve(), plain) and plain[-5:].mean() < plain[:5].mean()
    digits = noise([plain, short_curve(nudge=1)])
    assert 0 < digits < distance(plain, short_curve(seed=1))
    # The activation's backward of the wrong sign, as a dropped minus makes it.
    relu = attention.dynamic_relu
    monkeypatch.setattr(attention, "dynamic_relu", lambda x, c: 2 * relu(x, c).detach() - relu(x, c))
    assert distance(short_curve(), plain) > 2 * digits


def test_distance_is_that_of_smoothed_curves():
    steps = np.arange(1000)
    curve = 2 * np.exp(-steps / 300) + 0.5
    rough = np.random.default_rng(0).normal(1, 0.1, (2, 1000))
    # Noise of a tenth a step is 0.014 in the mean of 50.
    assert 0.005 < distance(curve * rough[0], curve * rough[1]) < 0.04
    assert distance(curve, 1.1 * curve) == pytest.approx(np.log(1.1))
    assert distance(curve, curve + 0.5 * (steps > 900)) > 0.15
