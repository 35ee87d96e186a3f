"""Training's variance: the two-way residual by hand, cells that lack seeds, and a planted cell out of line."""

import numpy as np
import pytest
from scipy import stats

from ablations.statistics.training import Spread, Training, pool


def cells(table):
    return {f"cell {c}": {s: float(v) for s, v in enumerate(row) if not np.isnan(v)} for c, row in enumerate(table)}


def noise(cells=10, seeds=3, seed=0):
    return np.random.default_rng(seed).normal(size=(cells, seeds))


def test_two_cells_have_half_the_variance_of_their_differences():
    # Differences of 2, 4 and 6: variance 4.
    found = pool({"a": {0: 20.0, 1: 21.0, 2: 19.0}, "b": {0: 22.0, 1: 25.0, 2: 25.0}})
    assert found == Training(Spread(pytest.approx(2.0), 2), {}, 2)


def test_what_cells_and_seeds_do_to_all_is_no_variance():
    table = noise()
    moved = table + 10 * np.arange(10)[:, None] + [0, -30, 50]
    rest = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    assert pool(cells(moved)).pooled == Spread(pytest.approx((rest**2).sum() / 18), 18)


def test_cells_with_fewer_seeds_take_part():
    table = noise(4, 3)
    table[1, 2] = table[2, 0] = np.nan
    found = pool(cells(table))
    # Ten numbers, less four cells and three seeds, of which one is the level of all.
    assert found.pooled.freedom == 10 - 4 - 3 + 1 and found.cells == 4
    # By hand: least squares with dummies, the first seed as the level.
    where = np.argwhere(~np.isnan(table))
    design = np.array([[*(c == np.arange(4)), *(s == np.arange(1, 3))] for c, s in where], dtype=float)
    known = table[tuple(where.T)]
    rest = known - design @ np.linalg.solve(design.T @ design, design.T @ known)
    assert found.pooled.variance == pytest.approx((rest**2).sum() / 4)
    lonely = cells(table) | {"lonely": {7: 3.0}}
    assert pool(lonely) == found


def test_without_a_second_seed_nothing_is_known():
    assert pool({"a": {0: 1.0}, "b": {0: 2.0}}) == Training() == pool({})
    assert pool({"a": {0: 1.0, 1: 2.0}}).pooled is None, "one cell: what the seed does cannot be told from the rest"
    assert pool({"a": {0: 1.0, 1: 2.0}, "b": {2: 1.0, 3: 2.0}}).pooled is None


def test_a_cell_out_of_line_keeps_its_own_variance():
    table = noise()
    table[4] *= 40
    found = pool(cells(table))
    assert list(found.own) == ["cell 4"] and found.own["cell 4"].freedom == 2 and found.cells == 9
    assert found.own["cell 4"].variance == pytest.approx(table[4].var(ddof=1), rel=0.1)
    assert found.of("cell 4") == found.own["cell 4"] and found.of("cell 3") == found.pooled
    assert found.pooled == pool({name: runs for name, runs in cells(table).items() if name != "cell 4"}).pooled


def test_the_test_is_brown_and_forsythes_of_one_cell_against_the_rest():
    strange = []
    for factor in (1.0, 2.0, 3.0, 4.0, 6.0):
        table = noise(6, 5, 4)
        table[0] *= factor
        rest = table - table.mean(0)
        distances = np.abs(rest - np.median(rest, axis=1, keepdims=True))
        p = [stats.f_oneway(distances[c], np.delete(distances, c, 0).ravel()).pvalue for c in range(6)]
        strange.append(set(pool(cells(table)).own))
        assert strange[-1] == {f"cell {c}" for c in range(6) if p[c] < 0.01}
    assert strange[0] == set() and strange[-1] == {"cell 0"}


@pytest.mark.parametrize("seeds", [2, 3])
def test_cells_in_line_are_seldom_taken_for_others(seeds):
    strange = sum(len(pool(cells(noise(10, seeds, seed))).own) for seed in range(100))
    assert strange <= (0 if seeds == 2 else 30), "at 1 %: ten of a thousand"


def test_the_order_of_cells_and_seeds_does_not_matter():
    table = noise()
    table[4] *= 40
    turned = {name: dict(reversed(runs.items())) for name, runs in reversed(cells(table).items())}
    one, other = pool(cells(table)), pool(turned)
    assert one.pooled.variance == pytest.approx(other.pooled.variance) and one.own.keys() == other.own.keys()


def test_runs_that_repeat_to_the_last_digit_are_no_trouble():
    assert pool(cells(np.zeros((5, 3)))) == Training(Spread(0.0, 8), {}, 5)
