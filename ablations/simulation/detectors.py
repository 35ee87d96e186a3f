"""Detectors made of random numbers: hits and false alarms from rates that differ between cells, seeds and images.

An image has 1 + Poisson(2) objects of one category. How well a cell's run finds an object is a sum: the cell's ability,
what the seed does to all cells, what it does to this one, how hard the image and the object are, how hard they are for
this cell, and luck of this run. The sum decides whether the object is found, how well its box fits (the IoU, in ten
steps as COCO's thresholds) and how high its score is. False alarms are Poisson, more of them where an image is hard and
the cell is weak. Scores have fifty steps, and all detections of one score make one step of the curve, so AP under any
weights of images comes from histograms; otherwise it is COCO's: precision made monotone and read at 101 recalls, the
mean over ten thresholds.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

Array = np.ndarray[Any, np.dtype[Any]]

SCORES, THRESHOLDS = 50, 10
# Standard deviations, in units of an object's difficulty for one run: by seed; by seed and cell; by image; by cell and
# image; by run and image; by cell and object; by run and object.
SEED, RUN, IMAGE, CELL_IMAGE, RUN_IMAGE, CELL_OBJECT, RUN_OBJECT = 0.05, 0.05, 0.5, 0.25, 0.2, 0.6, 0.6
FALSE_ALARMS = 2.0


@dataclass(frozen=True)
class Images:
    """Random images.

    Attributes:
        objects: (I,) how many.
        image: (objects,) the image of each.
        easy: (objects,) how easy each is, for everyone.
        clean: (I,) how easy each image is.
    """

    objects: Array
    image: Array
    easy: Array
    clean: Array


def draw_images(count: int, random: np.random.Generator) -> Images:
    """So many images."""
    objects = 1 + random.poisson(2.0, count)
    clean = random.normal(0, IMAGE, count)
    image = np.repeat(np.arange(count), objects)
    return Images(objects, image, clean[image] + random.normal(0, 1, len(image)), clean)


@dataclass(frozen=True)
class Detector:
    """A cell: what all its runs share on given images.

    Attributes:
        ability: Larger is better.
        of_image, of_object: What its kind makes of each image and object.
    """

    ability: float
    of_image: Array
    of_object: Array

    @classmethod
    def draw(cls, ability: float, images: Images, random: np.random.Generator) -> "Detector":
        """A cell on these images."""
        of_image = random.normal(0, CELL_IMAGE, len(images.objects))
        return cls(ability, of_image, random.normal(0, CELL_OBJECT, len(images.image)))

    def run(self, luck: float, images: Images, random: np.random.Generator) -> sparse.csr_array:
        """The detections of one training run, whose seed shifts it by `luck`: (SCORES × (1 + THRESHOLDS), I) counts.

        A row is a score, from the highest down, and the number of thresholds that the box passes.
        """
        of_image = self.ability + luck + self.of_image + random.normal(0, RUN_IMAGE, len(images.objects))
        skill = of_image[images.image] + images.easy + self.of_object + random.normal(0, RUN_OBJECT, len(images.image))
        found = random.random(len(skill)) < _logistic(2 * skill + 1.5)
        image, skill = images.image[found], skill[found]
        passed = np.clip(np.round(5.5 + 2 * skill + random.normal(0, 1.5, len(skill))), 0, THRESHOLDS).astype(int)
        scores = _logistic(0.8 + skill + random.normal(0, 0.8, len(skill)))
        alarms = random.poisson(FALSE_ALARMS * np.exp(-0.4 * (of_image + images.clean)))
        wrong = _logistic(random.normal(-1.2, 1.0, alarms.sum()))
        image = np.concatenate([image, np.repeat(np.arange(len(alarms)), alarms)])
        passed = np.concatenate([passed, np.zeros(len(wrong), int)])
        place = SCORES - 1 - np.minimum((np.concatenate([scores, wrong]) * SCORES).astype(int), SCORES - 1)
        row = place * (1 + THRESHOLDS) + passed
        return sparse.csr_array(
            (np.ones(len(row), np.float32), (row, image)), shape=(SCORES * (1 + THRESHOLDS), len(alarms))
        )


def average_precision(detections: sparse.csr_array, objects: Array, weights: Array) -> Array:
    """AP in percent under weights of images.

    Args:
        detections: Of one run (`Detector.run`).
        objects: (I,) how many there are in each image.
        weights: (I, B) float32, how often each image counts.

    Returns:
        (B,) float32.
    """
    histogram = (detections @ weights).reshape(SCORES, 1 + THRESHOLDS, -1).cumsum(axis=0)
    # hits[:, t]: detections that pass threshold t or more.
    hits = histogram[:, :0:-1].cumsum(axis=1)[:, ::-1]
    every = hits[:, :1] + histogram[:, :1]
    precision = hits / np.maximum(every, 1)
    precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    # How many of the recalls 0, 0.01, ..., 1 are reached so far.
    reached = np.floor(hits * (100 / (objects @ weights)) + 1e-3)
    reached += every > 0
    reached[1:] -= reached[:-1].copy()
    return 100 * np.einsum("stb,stb->b", reached, precision) / THRESHOLDS / 101


def _logistic(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))
