"""Tables drawn again and again from detectors whose true AP is known: how often does an interval hold the truth?"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

from ablations.rows.effects import EFFECTS, effect_weights
from ablations.rows.frame import SUBSETS
from ablations.simulation.detectors import RUN, SEED, Detector, average_precision, draw_images
from ablations.statistics.intervals import CONFIDENCE, Interval, Run, contrast
from ablations.statistics.training import Training, pool

# A cell of the table: its attentions and its depth.
Name = tuple[str, int]
BASELINE: Name = ("baseline", 0)
# What an attention adds to the ability of a detector, and a second block; in units of an object's difficulty.
GAINS = {"L": 0.06, "S": 0.2, "C": 0.1}
SYNERGY, DEPTH, WITHOUT = 0.08, 0.1, -0.15

# What is compared: what the tables print, and what would be simpler.
METHODS = (
    "as in the tables",
    "one part counted twice",
    "variances of differences averaged",
    "training only",
    "images only",
)


class Coverage(NamedTuple):
    """How intervals of one kind did.

    Attributes:
        images, seeds: Of each drawn table.
        kind: `differences` or `effects`.
        method: One of `METHODS`.
        coverage: The share that held the truth.
        error: Its standard error; intervals of one drawn table count as one draw.
        half_width: The median, in points of AP.
    """

    images: int
    seeds: int
    kind: str
    method: str
    coverage: float
    error: float
    half_width: float


@dataclass(frozen=True)
class Design:
    """The cells of a table and the contrasts of it.

    Attributes:
        abilities: Of every cell, the baseline first.
        contrasts: By kind, each as the weights of the cells.
    """

    abilities: Mapping[Name, float]
    contrasts: Mapping[str, list[dict[Name, float]]]


def make_design(depths: tuple[int, ...] = (1, 2)) -> Design:
    """A baseline and eight subsets at each depth: 16 cells and the baseline for two."""
    abilities = {BASELINE: 0.0}
    for depth in depths:
        for subset in SUBSETS:
            letters = set(subset) & set(GAINS)
            gain = sum(GAINS[letter] for letter in sorted(letters)) + SYNERGY * ({"L", "S"} <= letters)
            abilities[subset, depth] = WITHOUT + gain + DEPTH * (depth - 1)
    differences = [{cell: 1.0, BASELINE: -1.0} for cell in abilities if cell != BASELINE]
    effects = []
    for over in [*[(depth,) for depth in depths], *([depths] if len(depths) > 1 else [])]:
        for name in EFFECTS:
            weights = effect_weights(name.replace("×", ""))
            effects.append({(s, depth): w / len(over) for s, w in weights.items() for depth in over})
    return Design(abilities, {"differences": differences, "effects": effects})


def true_ap(design: Design, images: int, random: np.random.Generator) -> dict[Name, float]:
    """AP of each cell in percent on so many images, in expectation over seeds (Gauss and Hermite, five nodes)."""
    nodes, shares = np.polynomial.hermite_e.hermegauss(5)
    drawn = draw_images(images, random)
    once = np.ones((images, 1), np.float32)
    truth = {}
    for cell, ability in design.abilities.items():
        detector = Detector.draw(ability, drawn, random)
        runs = (detector.run(luck, drawn, random) for luck in nodes * np.hypot(SEED, RUN))
        aps = [average_precision(run, drawn.objects, once)[0] for run in runs]
        truth[cell] = float(np.dot(shares, aps) / shares.sum())
    return truth


def draw_table(
    design: Design, images: int, seeds: int, replicates: int, random: np.random.Generator
) -> dict[Name, dict[int, Run]]:
    """What a grid would store: AP and its replicates for each cell and seed, all on the same new images."""
    drawn = draw_images(images, random)
    weights = np.ones((images, 1 + replicates), np.float32)
    weights[:, 1:] = random.multinomial(images, np.full(images, 1 / images), size=replicates).T
    of_seed = random.normal(0, SEED, seeds)
    table: dict[Name, dict[int, Run]] = {}
    for cell, ability in design.abilities.items():
        detector = Detector.draw(ability, drawn, random)
        table[cell] = {}
        for seed in range(seeds):
            run = detector.run(of_seed[seed] + random.normal(0, RUN), drawn, random)
            ap = average_precision(run, drawn.objects, weights)
            table[cell][seed] = Run(float(ap[0]), ap[1:])
    return table


def coverage(
    design: Design,
    truth: Mapping[Name, float],
    images: int,
    seeds: int,
    draws: int,
    replicates: int,
    tell: Callable[[int], object] = lambda draw: None,
) -> list[Coverage]:
    """Draw tables and count.

    Args:
        design: The cells.
        truth: `true_ap` of it.
        images, seeds: Of each table.
        draws: How many tables; a table is a function of its number, `images` and `seeds`.
        replicates: Of the images of each.
        tell: Called with the number of each table that is done.

    Returns:
        A line for each kind and method.
    """
    held: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    widths: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for draw in range(draws):
        table = draw_table(design, images, seeds, replicates, np.random.default_rng([images, seeds, draw]))
        for kind, contrasts in design.contrasts.items():
            hits: defaultdict[str, list[bool]] = defaultdict(list)
            for weights, found in zip(contrasts, intervals(contrasts, table, images), strict=True):
                actual = sum(weight * truth[cell] for cell, weight in weights.items())
                for method, interval in found.items():
                    hits[method].append(abs(interval.estimate - actual) <= interval.half_width)
                    widths[kind, method].append(interval.half_width)
            for method, each in hits.items():
                held[kind, method].append(float(np.mean(each)))
        tell(draw)
    return [
        Coverage(images, seeds, *key, float(np.mean(each)), stats.sem(each), float(np.median(widths[key])))
        for key, each in held.items()
    ]


def intervals(
    contrasts: list[dict[Name, float]], table: Mapping[Name, Mapping[int, Run]], images: int
) -> Iterator[dict[str, Interval]]:
    """Each contrast's interval by every method that applies to it."""
    training = pool({cell: {seed: run.value for seed, run in runs.items()} for cell, runs in table.items()})
    alone: dict[Name, dict[int, Run]]
    alone = {cell: {seed: Run(run.value) for seed, run in runs.items()} for cell, runs in table.items()}
    unseen: Training[Name] = Training()
    simple = _averaged(table)
    for weights in contrasts:
        found = {}
        for method, runs, trained in (
            ("as in the tables", table, training),
            ("training only", alone, training),
            ("images only", table, unseen),
        ):
            _, interval = contrast(weights, runs, dict.fromkeys(weights, trained), images) or (0, None)
            assert interval is not None
            found[method] = interval
        seeds, drawn = found["training only"], found["images only"]
        found["one part counted twice"] = _added(seeds, drawn)
        if BASELINE in weights:
            averaged = Interval(seeds.estimate, simple.error, simple.freedom, seeds.covers, seeds.seeds)
            found["variances of differences averaged"] = _added(averaged, drawn)
        yield {method: found[method] for method in METHODS if method in found}


def _averaged(table: Mapping[Name, Mapping[int, Run]]) -> Interval:
    """Training's part as the mean over cells of the variances of their differences, cells × (n − 1) taken as free."""
    values = np.array([[run.value for run in runs.values()] for runs in table.values()])
    differences = values[1:] - values[0]
    cells, n = differences.shape
    return Interval(
        0.0, float(np.sqrt(differences.var(axis=1, ddof=1).mean() / n)), cells * (n - 1), "training only", ()
    )


def _added(one: Interval, other: Interval) -> Interval:
    """Both parts in full."""
    parts = [(one.error**2, one.freedom), (other.error**2, other.freedom)]
    total = sum(variance for variance, _ in parts)
    freedom = total**2 / sum(variance**2 / free for variance, free in parts)
    return Interval(one.estimate, total**0.5, freedom, "training and images", one.seeds)


def holds(line: Coverage, tolerance: float = 0.02) -> bool:
    """Whether the share is that of a 95 % interval."""
    return abs(line.coverage - CONFIDENCE) <= tolerance
