"""From a binary mask to COCO's segmentations: polygons for an object, run lengths for a crowd region."""

import numpy as np


def _loops(mask: np.ndarray) -> list[tuple[np.ndarray, bool]]:
    """The boundary loops of a mask along pixel edges, each as (corners, is_hole).

    A loop of axis-parallel edges is given by its corners alone: within a row, sorted by x, the corners pair up into
    the horizontal edges, and within a column, sorted by y, into the vertical ones. Following both pairings in turn
    walks the loop. Where two pixels touch at a corner only, that corner counts twice.
    """
    m = np.pad(mask, 1).astype(np.int8)
    a, b, c, d = m[:-1, :-1], m[:-1, 1:], m[1:, :-1], m[1:, 1:]
    count = ((a ^ b ^ c ^ d) + 2 * ((a == d) & (b == c) & (a != b))).astype(np.int8)
    ys, xs = np.nonzero(count)
    times = count[ys, xs]
    ys, xs = np.repeat(ys, times), np.repeat(xs, times)
    order = np.lexsort((ys, xs))
    partners = np.empty(len(order), dtype=np.int64)
    partners[order[0::2]], partners[order[1::2]] = order[1::2], order[0::2]
    vertical = partners.tolist()
    seen = bytearray(len(vertical))
    loops = []
    for start in range(0, len(vertical), 2):
        if seen[start]:
            continue
        # The first corner met of a loop is its topmost, and its partner (an odd index) lies to the right of it.
        walk: list[int] = []
        at = start
        while not seen[at]:
            partner = at ^ 1
            seen[at] = seen[partner] = 1
            walk += (at, partner)
            at = vertical[partner]
        hole = not mask[ys[start], xs[start]]
        loops.append((np.stack([xs[walk], ys[walk]], axis=1).astype(np.float64), hole))
    return loops


def polygon_area(points: np.ndarray) -> float:
    """Area of a simple polygon (n, 2), by the shoelace formula.

    Example:
        >>> import numpy as np
        >>> from ablations.generated.contours import polygon_area
        >>> polygon_area(np.array([[0, 0], [4, 0], [0, 3]]))
        6.0
    """
    x, y = points.T
    return abs(float(np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1]) + x[-1] * y[0] - x[0] * y[-1])) / 2


def _rounded(corners: np.ndarray) -> np.ndarray:
    """Every corner replaced by the two points half a pixel before and after it, so that stairs become slanted lines."""
    ahead = np.concatenate([corners[1:], corners[:1]])
    half = np.sign(ahead - corners) / 2
    return np.stack([corners + half, ahead - half], axis=1).reshape(-1, 2)


def _simplified(points: np.ndarray, tolerance: float) -> np.ndarray:
    """The closed polygon with as few of its points as keep it within `tolerance` (Douglas and Peucker, 1973)."""
    far = int(np.argmax(((points - points[0]) ** 2).sum(1)))
    closed = np.concatenate([points, points[:1]])
    keep, stack = {0, far}, [(0, far), (far, len(points))]
    while stack:
        first, last = stack.pop()
        if last - first < 2:
            continue
        dx, dy = closed[last] - closed[first]
        offset = closed[first + 1 : last] - closed[first]
        length = (dx * dx + dy * dy) ** 0.5
        distance = np.abs(offset[:, 1] * dx - offset[:, 0] * dy) / length if length > 0 else np.sqrt((offset**2).sum(1))
        worst = int(distance.argmax())
        if distance[worst] > tolerance:
            middle = first + 1 + worst
            keep.add(middle)
            stack += [(first, middle), (middle, last)]
    return points[sorted(keep)]


def _contains(polygon: np.ndarray, point: np.ndarray) -> bool:
    """Even-odd rule: is the point inside the polygon of axis-parallel edges."""
    ahead = np.concatenate([polygon[1:], polygon[:1]])
    vertical = polygon[:, 0] == ahead[:, 0]
    low, high = np.minimum(polygon[:, 1], ahead[:, 1]), np.maximum(polygon[:, 1], ahead[:, 1])
    return bool(np.sum(vertical & (low <= point[1]) & (point[1] < high) & (polygon[:, 0] > point[0])) % 2)


def _joined(outer: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """One polygon from an outline and a hole in it.

    COCO unites the polygons of an object, so a hole can only be said by a slit that leads to it. It is walked once in
    each direction, between the two nearest vertices, and encloses nothing.
    """
    gap = ((outer[:, None] - hole[None]) ** 2).sum(2)
    i, j = np.unravel_index(int(gap.argmin()), gap.shape)
    around = np.concatenate([hole[j:], hole[: j + 1]])[::-1]
    return np.concatenate([outer[: i + 1], around, outer[i:]])


def mask_to_polygons(mask: np.ndarray, tolerance: float, speck: float) -> list[np.ndarray]:
    """The regions of a mask as simple polygons, holes joined to the outline around them by a slit.

    Args:
        mask: (H, W) bool, with at least one pixel set.
        tolerance: The greatest distance, in pixels, between a dropped contour point and its polygon.
        speck: Regions and holes of a smaller area, in square pixels, are left out; the largest region never is.

    Returns:
        One float64 array (n >= 3, 2) of (x, y) per region, in pixel edges: the pixel in column 0 spans 0 to 1.
    """
    loops = _loops(mask)
    regions = sorted((corners for corners, hole in loops if not hole), key=polygon_area, reverse=True)
    regions = [corners for i, corners in enumerate(regions) if i == 0 or polygon_area(corners) >= speck]
    polygons = []
    for corners in regions:
        slim = _simplified(_rounded(corners), tolerance)
        polygons.append(slim if len(slim) >= 3 else corners)
    for corners, hole in loops:
        if not hole or polygon_area(corners) < speck:
            continue
        inside = [i for i, region in enumerate(regions) if _contains(region, corners[0])]
        slim = _simplified(_rounded(corners), tolerance)
        # The smallest region around the hole is its own: regions are sorted by falling area.
        if inside and len(slim) >= 3:
            polygons[inside[-1]] = _joined(polygons[inside[-1]], slim)
    return polygons


def mask_to_runs(mask: np.ndarray) -> dict[str, list[int]]:
    """COCO's uncompressed run-length encoding of a (H, W) bool mask: columns first, beginning with a run of zeros.

    Example:
        >>> import numpy as np
        >>> from ablations.generated.contours import mask_to_runs
        >>> mask_to_runs(np.array([[False, True], [False, True]]))
        {'counts': [2, 2], 'size': [2, 2]}
    """
    flat = np.concatenate([[False], mask.T.reshape(-1), [False]])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    ends = np.concatenate([[0], changes, [mask.size]])
    counts = np.diff(ends)
    if mask.size in changes:
        counts = counts[:-1]
    return {"counts": counts.tolist(), "size": list(mask.shape)}
