"""The least-cost assignment against all permutations, and against known optima of a size that those cannot reach."""

from itertools import permutations

import numpy as np
import pytest

from heads.query.hungarian import least_cost_assignment


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (3, 3), (2, 6), (6, 3), (5, 7), (7, 6)])
@pytest.mark.parametrize("whole", [False, True], ids=["real", "with ties"])
def test_no_permutation_is_cheaper(shape, whole):
    generator = np.random.default_rng(0)
    for _ in range(10):
        cost = generator.integers(-3, 4, shape).astype(float) if whole else generator.normal(size=shape)
        rows, columns = least_cost_assignment(cost)
        assert len(rows) == len(set(rows)) == len(set(columns)) == min(shape)
        assert (np.diff(rows) > 0).all()
        small, large = sorted(shape)
        upright = cost if shape[0] <= shape[1] else cost.T
        best = min(upright[np.arange(small), list(p)].sum() for p in permutations(range(large), small))
        assert cost[rows, columns].sum() == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("shape", [(60, 60), (40, 100), (150, 90)])
def test_a_hidden_optimum_is_found(shape):
    """Costs that are prices of row and column plus a surplus, which is 0 for one pairing and positive elsewhere."""
    generator = np.random.default_rng(1)
    small, large = sorted(shape)
    surplus = generator.random((small, large)) + 1e-3
    hidden = generator.permutation(large)[:small]
    surplus[np.arange(small), hidden] = 0
    # Columns that stay free must cost as much as any other.
    prices = np.zeros(large)
    prices[hidden] = -generator.random(small)
    cost = surplus + 10 * generator.normal(size=(small, 1)) + prices
    if shape[0] <= shape[1]:
        np.testing.assert_array_equal(least_cost_assignment(cost)[1], hidden)
    else:
        rows, columns = least_cost_assignment(cost.T)
        np.testing.assert_array_equal(hidden[columns], rows)


def test_nothing_to_assign_and_what_cannot_be():
    for shape in ((0, 4), (4, 0), (0, 0)):
        rows, columns = least_cost_assignment(np.zeros(shape))
        assert len(rows) == len(columns) == 0
    with pytest.raises(ValueError, match="finite"):
        least_cost_assignment(np.array([[1.0, np.nan]]))
