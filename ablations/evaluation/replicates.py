"""What a cell's row and its intervals need of one evaluation: error types, AP by category, and replicates over images.

A replicate draws as many images as there are, with replacement. All cells of a data set share their draws, so that
differences between cells are differences on the same images.
"""

import hashlib
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ablations.evaluation.detections import Id, Predictions
from ablations.evaluation.errors import ERRORS, gains
from ablations.evaluation.evaluate import METRICS
from ablations.evaluation.matches import MOST_DETECTIONS, Floats, Matches, match
from ablations.evaluation.weighted import Weights, in_blocks, precisions, summary
from ablations.files import atomic_file

FILE = "replicates.npz"

REPLICATES = 1000
NAMES = (*METRICS[:6], *ERRORS)


class Summary(NamedTuple):
    """One evaluation beyond its twelve numbers.

    Attributes:
        errors: The points of AP50 that mending each type of error alone would give back; None without ground truth.
        class_AP: AP in percent by the name of the category; None where it has no object.
        replicates: (B, len(NAMES)) float32, in percent and points; NaN where a slice has no ground truth.
    """

    errors: dict[str, float | None]
    class_AP: dict[str, float | None]
    replicates: NDArray[np.float32]


def image_weights(images: int, seed_text: str, replicates: int = REPLICATES) -> NDArray[np.int32]:
    """How often each image counts in each replicate, (replicates, images) int32; each row's sum is `images`.

    A pure function of its arguments, on every machine and with every version of NumPy: the draws are made from the raw
    bits of PCG64, whose stream NumPy keeps.
    """
    seed = int.from_bytes(hashlib.sha256(seed_text.encode()).digest())
    bits = np.random.PCG64(seed).random_raw(replicates * images).reshape(replicates, images) >> np.uint64(32)
    drawn = (bits * np.uint64(images) >> np.uint64(32)).astype(np.int64)
    drawn += images * np.arange(replicates)[:, None]
    return np.bincount(drawn.ravel(), minlength=replicates * images).reshape(replicates, images).astype(np.int32)


def summarise(
    ground_truth: Mapping[str, Any],
    detections: Predictions,
    category_ids: Sequence[Id],
    seed_text: str,
    replicates: int = REPLICATES,
) -> Summary:
    """Error types, AP by category and replicates of the boxes that a cell found.

    Args:
        ground_truth: An instances file in COCO's layout, as for `ablations.evaluation.evaluate.evaluate`.
        detections: One `(image_id, detections)` for every image.
        category_ids: The category id of each label; only these categories are evaluated.
        seed_text: What decides the draws; a row's `data_fingerprint`.
        replicates: How many draws.

    Raises:
        ValueError: A score, box or label cannot be; the message names the image.
    """
    matches = match(ground_truth, detections, category_ids)
    draws = image_weights(matches.images, seed_text, replicates)
    exact = MOST_DETECTIONS * matches.images < 2**24
    once = _values(matches, in_blocks(matches, np.ones((1, matches.images), int), np.float64))
    drawn = _values(matches, in_blocks(matches, draws, np.float32 if exact else np.float64))
    names = category_names(ground_truth)
    return Summary(
        {name: _number(once[0][name][0]) for name in ERRORS},
        {names[i]: _number(100 * ap) for i, ap in zip(category_ids, once[1][:, 0], strict=True)},
        np.stack([drawn[0][name] for name in NAMES], axis=1).astype(np.float32),
    )


def category_names(ground_truth: Mapping[str, Any]) -> dict[Id, str]:
    """The name of each category by its id; categories of one name are told apart by their ids."""
    names = {category["id"]: str(category.get("name", category["id"])) for category in ground_truth["categories"]}
    shared = {name for name, count in Counter(names.values()).items() if count > 1}
    return {id_: f"{name} ({id_})" if name in shared else name for id_, name in names.items()}


def _values(matches: Matches, weights: Sequence[Weights]) -> tuple[dict[str, Floats], Floats]:
    """What `NAMES` says, (B,) each, and AP (K, B) by category, a fraction."""
    precision = precisions(matches, weights)
    return summary(precision) | gains(matches, weights, precision[0, 0]), precision[0].mean(axis=0)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def write_replicates(path: str | Path, replicates: NDArray[np.float32]) -> None:
    """Write replicates (B, len(NAMES)), whole or not at all.

    Raises:
        OSError: The file cannot be written; what stood there is unchanged.
    """
    with atomic_file(path) as file:
        np.savez_compressed(file, names=np.array(NAMES), values=replicates)


def read_replicates(path: str | Path) -> NDArray[np.float32] | None:
    """The replicates (B, len(NAMES)) of a file; None where there is none, or one of other columns.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged: none that `write_replicates` has written, or cut off.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["values"] if tuple(file["names"].tolist()) == NAMES else None
    except FileNotFoundError:
        return None
    except (EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
