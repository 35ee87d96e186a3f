"""Intervals of contrasts against formulas by hand: which variance stands where, and what is left out."""

import numpy as np
import pytest
from scipy import stats

from ablations.statistics.intervals import Interval, Run, contrast, holm, image_variance, resolved
from ablations.statistics.training import Spread, Training

POOL = Training(Spread(4.0, 10))


def runs(replicates=True, seeds=(0, 1, 2), draws=500):
    random = np.random.default_rng(1)
    image = random.normal(size=(2, draws))
    drawn = {cell: {s: image[c] + 0.5 * random.normal(size=draws) for s in range(3)} for c, cell in enumerate("ab")}
    values = {"a": (20.0, 21.0, 19.0), "b": (22.0, 25.0, 25.0)}
    return {cell: {s: Run(values[cell][s], drawn[cell][s] if replicates else None) for s in seeds} for cell in "ab"}


def difference(runs, pool=POOL, images=50):
    return contrast({"b": 1, "a": -1}, runs, dict.fromkeys("ab", pool), images)


def test_training_and_images_by_hand():
    table = runs()
    value, found = difference(table)
    drawn = np.array([table["b"][s].replicates - table["a"][s].replicates for s in range(3)])
    of_images = np.cov(drawn)[np.triu_indices(3, 1)].mean()
    of_training = 2 * 4.0 / 3
    error = np.sqrt(of_training + of_images)
    freedom = error**4 / (of_training**2 / 10 + of_images**2 / 49)
    assert value == found.estimate == pytest.approx(4.0) and found.seeds == (0, 1, 2)
    assert (found.error, found.freedom) == (pytest.approx(error), pytest.approx(freedom))
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, freedom) * error)
    assert found.p == pytest.approx(2 * stats.t.sf(4.0 / error, freedom))
    assert found.covers == "training and images"


def test_what_single_runs_do_with_single_images_is_counted_once():
    random = np.random.default_rng(2)
    image, alone = random.normal(size=(1, 200_000)), random.normal(size=(4, 200_000))
    drawn = 2 * image + 3 * alone
    # The seeds' variance holds 9 / 4 already; without it the replicates' mean is all there is.
    assert image_variance(drawn, trained=True) == pytest.approx(4, rel=0.05)
    assert image_variance(drawn, trained=False) == pytest.approx(4 + 9 / 4, rel=0.05)
    assert image_variance(drawn[:1], trained=True) == pytest.approx(4 + 9, rel=0.05)
    assert image_variance(np.array([[1.0, -1, 1, -1], [-1, 1, -1, 1]]), trained=True) == 0


def test_without_replicates_training_alone_is_covered():
    _, found = difference(runs(replicates=False))
    assert found.covers == "training only" and found.p is None
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, 10) * np.sqrt(8 / 3))
    table = runs()
    table["a"][1] = Run(21.0)
    assert difference(table)[1].covers == "training only", "one run without is enough"
    table["a"][1] = Run(21.0, np.zeros(7))
    assert difference(table)[1].covers == "training only", "other draws than those of the others"


def test_one_seed_covers_images_alone():
    table = runs(seeds=(1,))
    value, found = difference(table, Training())
    drawn = table["b"][1].replicates - table["a"][1].replicates
    assert value == 4.0 and found.covers == "images only" and found.p is None
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, 49) * drawn.std(ddof=1))
    assert difference(runs(replicates=False, seeds=(1,)), Training()) == (4.0, None)


def test_only_seeds_that_both_have_are_compared():
    table = runs()
    del table["a"][0], table["b"][1]
    value, found = difference(table)
    assert value == 6.0 and found.seeds == (2,) and found.covers == "training and images"
    del table["a"][2]
    assert difference(table) is None


def test_a_cell_out_of_line_brings_its_own_variance():
    pool = Training(Spread(4.0, 10), {"b": Spread(100.0, 2)})
    _, found = difference(runs(replicates=False), pool)
    assert found.error == pytest.approx(np.sqrt(104 / 3))
    assert found.freedom == pytest.approx(104**2 / (4**2 / 10 + 100**2 / 2))


def test_draws_with_nothing_to_find_are_left_out():
    table = runs()
    full = difference({cell: {s: Run(r.value, r.replicates[5:]) for s, r in t.items()} for cell, t in table.items()})
    for by_seed in table.values():
        for run in by_seed.values():
            run.replicates[:5] = np.nan
    assert difference(table) == full


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, None, 0.7]) == [1.0, None, 1.0] and holm([]) == [] and holm([None]) == [None]


@pytest.mark.parametrize("comparisons", [1, 16])
def test_what_is_resolved_is_found_in_four_of_five(comparisons):
    freedom, error = 12, 0.7
    size = resolved([Interval(0.0, error, freedom, "training and images", (0, 1))] * 3, comparisons)
    random = np.random.default_rng(0)
    # A t statistic of an estimate that is truly `size`, with an estimated standard error.
    t = (size / error + random.normal(size=100_000)) / np.sqrt(random.chisquare(freedom, 100_000) / freedom)
    assert np.mean(2 * stats.t.sf(abs(t), freedom) < 0.05 / comparisons) == pytest.approx(0.8, abs=0.01)


def test_intervals_that_cover_a_part_resolve_nothing():
    assert resolved([Interval(0.0, 1.0, 5, "images only", (0,))], 1) is None and resolved([], 1) is None
