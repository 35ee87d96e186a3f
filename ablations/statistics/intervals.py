"""Intervals of contrasts: what a difference, or an effect of several cells, is worth.

Two things vary. *Training*: another seed gives another AP; its variance comes from the seeds that were run, pooled over
the cells of a table (`ablations.statistics.training`). *Images*: other images give another AP; its variance comes from
replicates, in which images are drawn anew with replacement, the same draw for every cell and seed (Efron's bootstrap of
whole images). Their sum would count one part twice: what a single run does with single images shows between seeds, and
over images too. The mean over seeds hides only a part of it, so the covariance of replicates *between* seeds is taken
for the images' part, and the seeds' variance carries the rest. The degrees of freedom of the sum are Welch's and
Satterthwaite's (Biometrics Bulletin 1946). `python -m ablations.simulate` shows that such intervals hold the truth.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy import optimize, special, stats

from ablations.statistics.training import Array, K, Spread, Training

CONFIDENCE, POWER = 0.95, 0.8
Covers = Literal["training and images", "images only", "training only"]


class Run(NamedTuple):
    """One trained and evaluated cell.

    Attributes:
        value: The number of interest over all images, AP in percent say.
        replicates: (B,) the same number for every draw of images, the same draws in every run; None where not stored.
            NaN where a draw has no object to find.
    """

    value: float
    replicates: Array | None = None


@dataclass(frozen=True)
class Interval:
    """An estimate and what it is worth.

    Attributes:
        estimate: Mean over the seeds.
        error: Its standard error.
        freedom: Degrees of freedom of `error`.
        covers: What else it would be in another experiment: another training, other images, or both.
        seeds: The seeds behind the estimate.
    """

    estimate: float
    error: float
    freedom: float
    covers: Covers
    seeds: tuple[int, ...]

    @property
    def half_width(self) -> float:
        """Of the interval that holds the truth in 95 of 100 experiments."""
        return float(special.stdtrit(self.freedom, (1 + CONFIDENCE) / 2)) * self.error

    @property
    def p(self) -> float | None:
        """Of no difference at all, not corrected for others; None unless both training and images are covered."""
        if self.covers != "training and images":
            return None
        if not self.error:
            return float(self.estimate == 0)
        return float(2 * special.stdtr(self.freedom, -abs(self.estimate) / self.error))


def contrast(
    weights: Mapping[K, float],
    runs: Mapping[K, Mapping[int, Run]],
    training: Mapping[K, Training[K]],
    images: int | None = None,
) -> tuple[float, Interval | None] | None:
    """The sum of `weights` × cells and its interval, over the seeds that all these cells share.

    Args:
        weights: Of each cell; they should sum to 0, so that what a seed does to all cells cancels.
        runs: By cell and seed.
        training: For each cell, the pool that it belongs to.
        images: How many were evaluated, for the degrees of freedom; the number of replicates where unknown.

    Returns:
        The estimate and its interval; no interval where neither seeds nor replicates say anything. None without a seed
        that all cells share.
    """
    seeds = tuple(sorted(set.intersection(*(set(runs[cell]) for cell in weights))))
    if not seeds:
        return None
    n = len(seeds)
    chosen = [[runs[cell][seed] for cell in weights] for seed in seeds]
    factors = np.array(list(weights.values()))
    estimate = float(np.mean([factors @ [run.value for run in of_seed] for of_seed in chosen]))

    squares: defaultdict[int, float] = defaultdict(float)
    spreads: dict[int, Spread | None] = {}
    for cell, weight in weights.items():
        spread = training[cell].of(cell)
        squares[id(spread)] += weight**2 / n
        spreads[id(spread)] = spread
    known = [(squares[key] * spread.variance, spread.freedom) for key, spread in spreads.items() if spread]
    parts = known if len(known) == len(spreads) else []
    trained = bool(parts)

    replicates = _replicates(chosen, factors)
    if replicates is not None:
        freedom = min(images or replicates.shape[1], replicates.shape[1]) - 1
        parts = [*parts, (image_variance(replicates, trained), freedom)]
    if not parts:
        return estimate, None
    covers: Covers
    covers = "training only" if replicates is None else "training and images" if trained else "images only"
    return estimate, Interval(estimate, *_sum(parts), covers, seeds)


def image_variance(replicates: Array, trained: bool) -> float:
    """The variance that other images would bring to a mean over seeds.

    Args:
        replicates: (n, B), by seed.
        trained: Whether the variance between seeds is known and added: then the mean covariance between seeds (of two
            or more), else the variance of their mean.
    """
    n = len(replicates)
    covariance = np.atleast_2d(np.cov(replicates))
    if not trained or n == 1:
        return float(covariance.sum()) / n**2
    return max(0.0, float(covariance.sum() - np.trace(covariance)) / (n * (n - 1)))


def _replicates(chosen: Sequence[Sequence[Run]], factors: Array) -> Array | None:
    """(n, B) the contrast by seed and draw, without draws that have nothing to find; None where a run has none."""
    stored = [run.replicates for of_seed in chosen for run in of_seed]
    found = [each for each in stored if each is not None]
    if len(found) < len(stored) or len({each.shape for each in found}) > 1:
        return None
    by_seed = np.stack(found).astype(np.float64).reshape(len(chosen), len(factors), -1)
    contrasts = np.einsum("ncb,c->nb", by_seed, factors)
    contrasts = contrasts[:, np.isfinite(contrasts).all(axis=0)]
    return contrasts if contrasts.shape[1] > 1 else None


def _sum(parts: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Standard error and degrees of freedom of a sum of estimated variances (Welch and Satterthwaite)."""
    parts = list(parts)
    total = sum(variance for variance, _ in parts)
    spread = sum(variance**2 / freedom for variance, freedom in parts)
    return float(np.sqrt(total)), total**2 / spread if spread else min(freedom for _, freedom in parts)


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Each p corrected for all of them (Holm, Scandinavian Journal of Statistics 1979); None is no comparison.

    Example:
        >>> from ablations.statistics.intervals import holm
        >>> holm([0.25, 0.0625, None, 0.125])
        [0.25, 0.1875, None, 0.25]
    """
    known = sorted((value, place) for place, value in enumerate(p) if value is not None)
    corrected: list[float | None] = [None] * len(p)
    highest = 0.0
    for rank, (value, place) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * value))
        corrected[place] = highest
    return corrected


def resolved(intervals: Iterable[Interval], comparisons: int) -> float | None:
    """The smallest difference that is found in four of five experiments, by the median of the intervals.

    Found: p below 0.05 after division by the number of comparisons, Holm's first step. From the noncentral t
    distribution; None without an interval that covers training and images.
    """
    sizes = []
    for interval in intervals:
        if interval.covers == "training and images" and interval.error > 0:
            critical = -float(special.stdtrit(interval.freedom, (1 - CONFIDENCE) / 2 / comparisons))

            def missing(shift: float, critical: float = critical, freedom: float = interval.freedom) -> float:
                return float(stats.nct.sf(critical, freedom, shift)) - POWER

            sizes.append(float(optimize.brentq(missing, 0, 2 * critical + 5)) * interval.error)
    return float(np.median(sizes)) if sizes else None
