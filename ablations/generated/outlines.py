"""The outlines of the generated set's classes and distractors, and the deformations that every instance goes through.

An outline is a list of closed contours, float64 arrays (n, 2) of (x, y) in units of about one: the first is the outer
boundary, the others are holes. Deformation bends edges, so every contour is sampled densely first.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Outline = list[np.ndarray]
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Shape:
    """A class of the generated set; `hue` in [0, 1) is its usual colour where the difficulty ties colour to class."""

    name: str
    category_id: int
    contours: Callable[[], list[Points]]
    hue: float


def _polar(radius: Callable[[float], float], count: int = 48, start: float = 0.0, stop: float = 1.0) -> Points:
    """Points at `radius(t)` for `count` angles 2*pi*t; a full turn leaves out the repeated last point."""
    full = stop - start >= 1
    ts = [start + (stop - start) * i / (count if full else count - 1) for i in range(count)]
    return [(radius(t) * math.cos(2 * math.pi * t), radius(t) * math.sin(2 * math.pi * t)) for t in ts]


def _spikes(points: int, inner: float) -> Points:
    return _polar_list([1.0 if i % 2 == 0 else inner for i in range(2 * points)])


def _polar_list(radii: list[float]) -> Points:
    return [
        (r * math.sin(2 * math.pi * i / len(radii)), -r * math.cos(2 * math.pi * i / len(radii)))
        for i, r in enumerate(radii)
    ]


def _crescent() -> Points:
    # Outer arc of the unit circle, closed by the arc of a circle of radius 0.85 around (0.5, 0); they meet at `tip`.
    tip = math.acos((1 + 0.25 - 0.85**2) / (2 * 0.5))
    outer = [tip + (2 * math.pi - 2 * tip) * i / 31 for i in range(32)]
    x, y = math.cos(tip), math.sin(tip)
    inside = math.atan2(y, x - 0.5)
    inner = [-inside + (2 * inside - 2 * math.pi) * i / 23 for i in range(1, 23)]
    return [(math.cos(a), math.sin(a)) for a in outer] + [(0.5 + 0.85 * math.cos(a), 0.85 * math.sin(a)) for a in inner]


def _heart() -> Points:
    ts = [2 * math.pi * i / 48 for i in range(48)]
    curve = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in ts]
    return [(math.sin(t) ** 3, -c / 16) for t, c in zip(ts, curve, strict=True)]


def _drop() -> Points:
    ts = [2 * math.pi * i / 48 for i in range(48)]
    return [(0.9 * math.sin(t) * math.sin(t / 2) ** 2, -math.cos(t)) for t in ts]


def _horseshoe() -> Points:
    arc = [math.pi * i / 20 for i in range(21)]
    outer = [(math.cos(a), -math.sin(a)) for a in arc]
    inner = [(0.48 * math.cos(a), -0.48 * math.sin(a)) for a in reversed(arc)]
    return [(1, 0.9), *outer, (-1, 0.9), (-0.48, 0.9), *inner, (0.48, 0.9)]


# The first five are the classes of `tiny`, the first twelve those of `small`, all of them those of `paper`. The ids
# have gaps, as COCO's have, so that a reader which takes an id for an index is found out.
SHAPES = (
    Shape("ellipse", 3, lambda: [_polar(lambda t: 1.0)], 0.00),
    Shape("rectangle", 4, lambda: [[(-1, -0.75), (1, -0.75), (1, 0.75), (-1, 0.75)]], 0.60),
    Shape("triangle", 9, lambda: [_polar_list([1.0] * 3)], 0.33),
    Shape("star", 17, lambda: [_spikes(5, 0.42)], 0.15),
    Shape("cross", 22, lambda: [_plus(0.3)], 0.82),
    Shape("ring", 27, lambda: [_polar(lambda t: 1.0), _polar(lambda t: 0.52)], 0.08),
    Shape("crescent", 28, lambda: [_crescent()], 0.50),
    Shape("arrow", 36, lambda: [_arrow()], 0.70),
    Shape("heart", 41, lambda: [_heart()], 0.95),
    Shape("elbow", 44, lambda: [[(-1, -1), (-0.3, -1), (-0.3, 0.3), (1, 0.3), (1, 1), (-1, 1)]], 0.40),
    Shape("hourglass", 50, lambda: [[(-0.8, -1), (0.8, -1), (0.16, 0), (0.8, 1), (-0.8, 1), (-0.16, 0)]], 0.22),
    Shape("drop", 53, lambda: [_drop()], 0.55),
    Shape(
        "tee",
        61,
        lambda: [[(-1, -1), (1, -1), (1, -0.4), (0.3, -0.4), (0.3, 1), (-0.3, 1), (-0.3, -0.4), (-1, -0.4)]],
        0.28,
    ),
    Shape("chevron", 64, lambda: [[(-1, -0.7), (-0.3, -1), (0.9, 0), (-0.3, 1), (-1, 0.7), (-0.1, 0)]], 0.65),
    Shape("semicircle", 70, lambda: [_polar(lambda t: 1.0, 28, 0.0, 0.5)], 0.03),
    Shape("horseshoe", 74, lambda: [_horseshoe()], 0.77),
    Shape("gear", 77, lambda: [_polar_list([1.0, 1.0, 0.68, 0.68] * 8)], 0.12),
    Shape("trefoil", 81, lambda: [_polar(lambda t: 0.62 + 0.38 * math.cos(6 * math.pi * t), 60)], 0.45),
    Shape(
        "zigzag",
        85,
        lambda: [[(-1, -1), (0.35, -1), (0.35, 0.4), (1, 0.4), (1, 1), (-0.35, 1), (-0.35, -0.4), (-1, -0.4)]],
        0.88,
    ),
    Shape("hexagon", 90, lambda: [_polar_list([1.0] * 6)], 0.18),
)


def _plus(arm: float) -> Points:
    return [
        (-arm, -1),
        (arm, -1),
        (arm, -arm),
        (1, -arm),
        (1, arm),
        (arm, arm),
        (arm, 1),
        (-arm, 1),
        (-arm, arm),
        (-1, arm),
        (-1, -arm),
        (-arm, -arm),
    ]


def _arrow() -> Points:
    return [(0, -1), (0.8, -0.1), (0.3, -0.1), (0.3, 1), (-0.3, 1), (-0.3, -0.1), (-0.8, -0.1)]


def _dense(points: Points, step: float = 0.2) -> np.ndarray:
    """The contour with every edge divided into pieces no longer than `step`."""
    corners = np.array(points, dtype=np.float64)
    ahead = np.roll(corners, -1, axis=0)
    pieces = np.maximum(1, np.ceil(np.hypot(*(ahead - corners).T) / step)).astype(int)
    return np.concatenate(
        [p + (q - p) * (np.arange(n) / n)[:, None] for p, q, n in zip(corners, ahead, pieces, strict=True)]
    )


_OUTLINES = {shape.name: [_dense(points) for points in shape.contours()] for shape in SHAPES}


def _rotate(points: np.ndarray, angle: float) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    return points @ np.array([[c, s], [-s, c]])


def _normalised(outline: Outline) -> Outline:
    """Centred on its box, with the longer side of the box equal to 1."""
    low, high = outline[0].min(0), outline[0].max(0)
    return [(points - (low + high) / 2) / (high - low).max() for points in outline]


def deformed(rng: np.random.Generator, shape: Shape, strength: float) -> Outline:
    """One instance of `shape`: bent, stretched, sheared, perhaps mirrored, and turned by any angle.

    Args:
        strength: 0 turns and mirrors only; 1 bends by up to 0.4, stretches up to 1 : 2 and shears by up to 0.5.

    Returns:
        Contours centred on their box, whose longer side is 1.
    """
    axis, turn = rng.uniform(0, 2 * math.pi, 2)
    bend = rng.uniform(-0.4, 0.4) * strength
    stretch = 2 ** (rng.uniform(-0.5, 0.5) * strength)
    shear = rng.uniform(-0.5, 0.5) * strength
    mirror = 1 if rng.random() < 0.5 else -1
    result = []
    for points in _OUTLINES[shape.name]:
        p = _rotate(points * (1, mirror), axis)
        x, y = p[:, 0] + bend * p[:, 1] ** 2, p[:, 1]
        p = np.stack([x * stretch + shear * y, y / stretch], axis=1)
        result.append(_rotate(p, turn))
    return _normalised(result)


def blob(rng: np.random.Generator) -> Outline:
    """An irregular patch with lobes of no symmetry, unlike every class; scaled as `deformed`."""
    angle = np.arange(64) * (2 * math.pi / 64)
    radius = 1 + sum(
        rng.uniform(0.14, 0.3) * np.cos(k * angle + phase)
        for k, phase in zip((2, 3, 5), rng.uniform(0, 2 * math.pi, 3), strict=True)
    )
    return _normalised([np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)])


def stroke(rng: np.random.Generator, width: float) -> Outline:
    """A curved ribbon `width` wide along its whole length of about 1; scaled as `deformed`."""
    t = np.linspace(-1, 1, 24)
    bow = rng.uniform(-0.5, 0.5)
    wave = rng.uniform(0, 0.18)
    spine = np.stack([t, bow * t**2 + wave * np.sin(rng.uniform(2, 7) * t)], axis=1)
    along = np.gradient(spine, axis=0)
    normal = np.stack([-along[:, 1], along[:, 0]], axis=1) / np.hypot(*along.T)[:, None]
    ribbon = np.concatenate([spine + width * normal, (spine - width * normal)[::-1]])
    return _normalised([_rotate(ribbon, rng.uniform(0, 2 * math.pi))])


def hollow(rng: np.random.Generator, shape: Shape, strength: float, width: float) -> Outline:
    """The border, `width` wide, of a deformed `shape` and nothing inside: only its filling tells it from a class."""
    outer = deformed(rng, shape, strength)[0]
    along = np.roll(outer, -1, axis=0) - np.roll(outer, 1, axis=0)
    normal = np.stack([-along[:, 1], along[:, 0]], axis=1) / np.hypot(*along.T)[:, None]
    x, y = outer.T
    inwards = np.sign(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))
    return [outer, outer + inwards * width * normal]
