"""What keeps a detector from a higher AP50: the six error types of TIDE (Bolya et al., ECCV 2020).

Every false detection has one type, by its largest IoU with the objects of its own and of the other categories, and an
object that nothing found is missed; detections on crowds are neither right nor wrong and have none. The tests run in
the order of the authors' code (tidecv), where types overlap:

| type | false because | mended |
| --- | --- | --- |
| `loc` | IoU 0.1 to 0.5 with an object of its category | right, or gone where that object is found by another |
| `cls` | IoU 0.5 or more with an object of another category | in that object's category, else as `loc` |
| `dup` | more than 0.5 with an object of its category that a better one found | gone |
| `bkg` | at most 0.1 with everything | gone |
| `both` | all others | gone |
| `miss` | an object that neither is found nor belongs to a `loc` or a `cls` | does not count |

Of several mended detections of one object the one with the highest score is right and the others are gone. Each type is
mended alone, and its number is what AP50 gains. Where they differ, this follows the paper: tidecv lets `loc` and `cls`
compete for an object though only one of them is mended, sets a loss to 0, keeps 100 detections an image where
pycocotools keeps them of each category, and gives AP 0 to a category without objects.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ablations.evaluation.matches import THRESHOLDS, Bools, Floats, Ints, Matches, Nearest
from ablations.evaluation.weighted import Weights, in_threads, interpolated, over_categories, weighted_objects

ERRORS = ("cls", "loc", "both", "dup", "bkg", "miss")
FOREGROUND = THRESHOLDS[0]
BACKGROUND = 0.1


class Types(NamedTuple):
    """What is wrong with N detections and G annotations.

    Attributes:
        detection: (N,) an index of `ERRORS`, or -1 where a detection is right or ignored.
        found: (G,) whether an annotation was given to a detection.
        missed: (G,) whether an annotation is an object that is missed.
        true: (N,) whether a detection is right.
        counted: (N,) whether it is right or wrong, not ignored.
    """

    detection: Ints
    found: Bools
    missed: Bools
    true: Bools
    counted: Bools


def error_types(matches: Matches) -> Types:
    """Tell the errors apart, at IoU 0.5 and among all sizes."""
    parts = [matches.of(0, category) for category in range(matches.categories)]
    true, counted = (np.concatenate([part[i][0] for part in parts] or [np.zeros(0, bool)]) for i in (0, 1))
    own, other = matches.same.overlap, matches.other.overlap
    tests = (
        (own >= BACKGROUND) & (own <= FOREGROUND),
        other >= FOREGROUND,
        own > FOREGROUND,
        other <= BACKGROUND,
    )
    kinds = [ERRORS.index(name) for name in ("loc", "cls", "dup", "bkg")]
    kind = np.where(counted & ~true, np.select(tests, kinds, ERRORS.index("both")), -1)

    found = np.zeros(len(matches.object_image), dtype=bool)
    first = matches.matched[0, 0]
    found[first[first >= 0]] = True
    missed = ~found & ~matches.ignored[0]
    for name, nearest in (("loc", matches.same), ("cls", matches.other)):
        missed[nearest.object[kind == ERRORS.index(name)]] = False
    return Types(kind, found, missed, true, counted)


def gains(matches: Matches, weights: Sequence[Weights], base: Floats) -> dict[str, Floats]:
    """How many points of AP50 mending each type of error alone would give back, (B,) in percent.

    Args:
        matches: What was found.
        weights: Blocks (images, b) of how often each image counts, B in all.
        base: (K, B) AP50 as it is, by category: `precisions(...)[0, 0]`.
    """
    types = error_types(matches)
    positives = weighted_objects(matches.objects(0), weights)
    there = np.isfinite(base)
    # Without its missed objects a category may have none left; what it found is then wrong, and its AP 0.
    hidden = np.zeros((matches.categories, matches.images))
    np.add.at(hidden, (matches.object_category[types.missed], matches.object_image[types.missed]), 1)
    remaining = positives - weighted_objects(hidden, weights)

    gained = {}
    for number, name in enumerate(ERRORS):
        true, kept, category = types.true.copy(), types.counted.copy(), matches.category
        kept &= types.detection != number
        if name in ("loc", "cls"):
            nearest = matches.same if name == "loc" else matches.other
            mended = _mended(matches, types, number, nearest)
            true[mended] = kept[mended] = True
            category = category.copy()
            category[mended] = matches.object_category[nearest.object[mended]]
        precision = _precision(matches, true, kept, category, weights, remaining if name == "miss" else positives)
        gained[name] = 100 * over_categories(np.where(there, np.nan_to_num(precision) - base, np.nan))
    return gained


def _mended(matches: Matches, types: Types, number: int, nearest: Nearest) -> Ints:
    """The detections of an error type that mending makes right: of each object not found, the one that scores most."""
    wrong = np.flatnonzero(types.detection == number)
    wrong = wrong[~types.found[nearest.object[wrong]]]
    order = wrong[np.lexsort((-matches.score[wrong], nearest.object[wrong]))]
    return order[np.diff(nearest.object[order], prepend=-1) != 0]


def _precision(
    matches: Matches, true: Bools, kept: Bools, category: Ints, weights: Sequence[Weights], positives: Ints
) -> Floats:
    """AP50 (K, B), a fraction, of the kept detections, some of which are of another category than they were."""
    chosen = np.flatnonzero(kept)
    chosen = chosen[np.lexsort((matches.image[chosen], -matches.score[chosen], category[chosen]))]
    bounds = np.searchsorted(category[chosen], np.arange(matches.categories + 1))
    results = np.full(positives.shape, np.nan)

    def fill(k: int) -> None:
        part = chosen[bounds[k] : bounds[k + 1]]
        counted = np.ones((1, len(part)), dtype=bool)
        results[k] = interpolated(matches.image[part], true[None, part], counted, weights, positives[k])[0]

    in_threads(fill, ((k,) for k in range(matches.categories)))
    return results
