"""How much one training run differs from the next: the variance between seeds, pooled over the cells of a table.

Cells of one table were trained with the same seeds, and a seed means the same order of the data, so AP is modelled as
cell + seed + rest, and the variance of the rest is that of one run. Every pair of cells contributes to it: C cells with
n seeds each have (C − 1)(n − 1) degrees of freedom. A mean over cells of the variances of their differences to one
baseline has not: all of them share the baseline's luck, and the simulation (`python -m ablations.simulate`) shows it.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from scipy import stats

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]
K = TypeVar("K", bound=Hashable)

# A cell is out of line where Brown and Forsythe's test says so at this level.
LEVEL = 0.01
# With two seeds both lie equally far from their median, and with three cells the rest is what the third one left.
FEWEST_SEEDS, FEWEST_CELLS = 3, 4


class Spread(NamedTuple):
    """A variance, and the degrees of freedom that it was estimated with."""

    variance: float
    freedom: float


@dataclass(frozen=True)
class Training(Generic[K]):
    """The variance of one run, the seed's part (which all cells share) aside.

    Attributes:
        pooled: Of the cells that are in line; None where no cell has a second seed.
        own: Of those out of line.
        cells: The number of cells with several seeds behind `pooled`.
    """

    pooled: Spread | None = None
    own: Mapping[K, Spread] = field(default_factory=dict)
    cells: int = 0

    def of(self, cell: K) -> Spread | None:
        """The variance that holds for a cell."""
        return self.own.get(cell, self.pooled)


def pool(values: Mapping[K, Mapping[int, float]]) -> Training[K]:
    """The variance of one run, from a number for each cell and seed; cells may lack seeds.

    A cell is out of line where the distances of its runs from their median differ from those of all other cells
    (Brown and Forsythe, JASA 1974, one group against the rest, at 1 %); it keeps its own variance, around the seed's
    part that the others give. With three seeds the test sees gross differences alone.

    Example:
        >>> from ablations.statistics.training import pool
        >>> found = pool({"baseline": {0: 20.0, 1: 21.0}, "LSC": {0: 22.0, 1: 25.0}}).pooled
        >>> round(found.variance, 6), found.freedom
        (1.0, 1)
    """
    names = [cell for cell, runs in values.items() if len(runs) > 1]
    if not names:
        return Training()
    seeds = sorted({seed for cell in names for seed in values[cell]})
    table = np.array([[values[cell].get(seed, np.nan) for seed in seeds] for cell in names])
    pooled, _ = _fit(table)
    strange = _out_of_line(table)
    if not pooled or not strange.any():
        return Training(pooled, cells=len(names))
    rest, seed_part = _fit(table[~strange])
    if not rest:
        return Training(pooled, cells=len(names))
    own = {}
    for row in np.flatnonzero(strange):
        runs = (table[row] - seed_part)[~np.isnan(table[row] + seed_part)]
        if len(runs) > 1:
            own[names[row]] = Spread(float(runs.var(ddof=1)), len(runs) - 1)
    return Training(rest, own, int((~strange).sum()))


def _fit(table: Array) -> tuple[Spread | None, Array]:
    """The variance that cell + seed leave in a table (cells, seeds), NaN for what is not there, by least squares.

    Returns:
        The variance, or None without a degree of freedom, and the seeds' part, NaN for a seed that no cell has.
    """
    cell, seed = np.nonzero(~np.isnan(table))
    design = np.concatenate([np.eye(table.shape[0])[cell], np.eye(table.shape[1])[seed]], axis=1)
    known = table[cell, seed]
    solution, _, rank, _ = np.linalg.lstsq(design, known, rcond=None)
    freedom = len(known) - int(rank)
    seed_part = np.where(np.isin(np.arange(table.shape[1]), seed), solution[table.shape[0] :], np.nan)
    if not freedom:
        return None, seed_part
    return Spread(float(((known - design @ solution) ** 2).sum() / freedom), freedom), seed_part


def _out_of_line(table: Array) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which cells' runs scatter otherwise than those of all others."""
    strange = np.zeros(len(table), dtype=bool)
    _, seed_part = _fit(table)
    distances = []
    for row in table - seed_part:
        runs = row[~np.isnan(row)]
        distances.append(np.abs(runs - np.median(runs)) if len(runs) >= FEWEST_SEEDS else runs[:0])
    count = np.array([len(found) for found in distances])
    tested = count > 0
    # Where runs repeat to the last digits there is nothing to test.
    if tested.sum() < FEWEST_CELLS or np.ptp(np.concatenate(distances)) < 1e-9:
        return strange
    total = np.array([found.sum() for found in distances])
    squares = np.array([(found**2).sum() for found in distances])
    others, of_others = count.sum() - count[tested], total.sum() - total[tested]
    one, of_one = count[tested], total[tested]
    within = squares.sum() - of_one**2 / one - of_others**2 / others
    t = (of_one / one - of_others / others) / np.sqrt(within / (count.sum() - 2) * (1 / one + 1 / others))
    strange[tested] = 2 * stats.t.sf(np.abs(t), count.sum() - 2) < LEVEL
    return strange
