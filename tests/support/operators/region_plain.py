"""RoIAlign, BorderAlign and suppression by plain loops in NumPy, in the precision that they are given.

They share nothing with the operators: a wrong shift, a swapped axis or a wrong end of a range there is none here. What
is read with a weight of 0 is read: 0 × NaN is NaN.
"""

import math

import numpy as np


def _cell(position, length):
    """The cells around a position, the share of the second; None more than a cell outside, and where it is NaN."""
    if not -1 <= position <= length:
        return None
    position = min(max(position, type(position)(0)), type(position)(length - 1))
    low = math.floor(position)
    return low, min(low + 1, length - 1), position - type(position)(low)


def _roi_axis(first, last, bins, length, ratio, aligned):
    """Of each bin, how much each of the cells that it reads counts: a dict by cell."""
    real = type(first)
    size = last - first
    if not np.isfinite(size):
        return [{} for _ in range(bins)]
    if aligned:
        first = first - real(0.5)
    else:
        size = max(size, real(1))
    step = size / real(bins)
    samples = real(ratio) if ratio > 0 else max(np.ceil(step), real(0))
    spacing = step / max(samples, real(1))
    weights = []
    for bin in range(bins):
        start, found = first + real(bin) * step + real(0.5) * spacing, {}
        if samples <= 10_000:
            numbers = range(int(samples))
        else:
            # The box is far larger than the map: the numbers around those on it.
            near, far = sorted(((-1 - float(start)) / float(spacing), (length - float(start)) / float(spacing)))
            numbers = range(max(int(near) - 3, 0), min(int(far) + 3, int(samples)))[: 4 * length + 20]
        for number in numbers:
            cell = _cell(start + real(number) * spacing, length)
            if cell is not None:
                low, high, share = cell
                found[low] = found.get(low, 0) + (1 - share) / samples
                found[high] = found.get(high, 0) + share / samples
        weights.append(found)
    return weights


def roi_align(features, boxes, images, output_size, ratio, aligned, grad):
    """The output (R, C, P, Q) for boxes (R, 4) in cells, and what `grad` of its shape gives the features."""
    real = boxes.dtype.type
    features, grad = features.astype(real), grad.astype(real)
    n, channels, height, width = features.shape
    out, total = np.zeros((len(boxes), channels, *output_size), real), np.zeros_like(features)
    for r, (box, image) in enumerate(zip(boxes, images, strict=True)):
        if not 0 <= image < n:
            continue
        rows = _roi_axis(box[1], box[3], output_size[0], height, ratio, aligned)
        columns = _roi_axis(box[0], box[2], output_size[1], width, ratio, aligned)
        for p, row in enumerate(rows):
            for q, column in enumerate(columns):
                for y, down in row.items():
                    for x, across in column.items():
                        out[r, :, p, q] += real(down * across) * features[image, :, y, x]
                        total[image, :, y, x] += real(down * across) * grad[r, :, p, q]
    return out, total


def border_align(features, boxes, pool_size, grad):
    """The output (N, C, n, 4), and what `grad` of its shape gives the features."""
    real = boxes.dtype.type
    features, grad = features.astype(real), grad.astype(real)
    images, channels, height, width = features.shape
    channels //= 4
    out, total = np.zeros((images, channels, boxes.shape[1], 4), real), np.zeros_like(features)
    for image in range(images):
        for number, (x1, y1, x2, y2) in enumerate(boxes[image]):
            wide, high = (x2 - x1) / real(pool_size), (y2 - y1) / real(pool_size)
            lines = ((x1, y1, wide, None), (x1, y1, None, high), (x2, y2, -wide, None), (x2, y2, None, -high))
            for border, (x, y, right, down) in enumerate(lines):
                maps = slice(border * channels, (border + 1) * channels)
                corners, values = [], []
                for i in range(pool_size + 1):
                    column = _cell(x if right is None else x + real(i) * right, width)
                    row = _cell(y if down is None else y + real(i) * down, height)
                    four = []
                    if column is not None and row is not None:
                        for at_y, of_y in ((row[0], 1 - row[2]), (row[1], row[2])):
                            for at_x, of_x in ((column[0], 1 - column[2]), (column[1], column[2])):
                                four.append((at_y, at_x, real(of_y * of_x)))
                    corners.append(four)
                    values.append(sum((w * features[image, maps, a, b] for a, b, w in four), np.zeros(channels, real)))
                # NaN is the largest, and of equal values it is the first.
                values = np.stack(values)
                for c in range(channels):
                    best = int(np.argmax(values[:, c]))
                    out[image, c, number, border] = values[best, c]
                    for a, b, w in corners[best]:
                        total[image, border * channels + c, a, b] += w * grad[image, c, number, border]
    return out, total


def nms(boxes, scores, labels, threshold, limit):
    """The indices kept, box by box, in the type of the boxes."""
    real = boxes.dtype.type
    threshold = real(threshold)
    order = sorted(range(len(boxes)), key=lambda i: (not math.isnan(scores[i]), -scores[i]))
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    alive, kept = np.ones(len(boxes), bool), []
    for index in order:
        if not alive[index]:
            continue
        if len(kept) == limit:
            break
        kept.append(index)
        if not np.isfinite(area[index]):
            continue
        sides = np.minimum(boxes[index, 2:], boxes[:, 2:]) - np.maximum(boxes[index, :2], boxes[:, :2])
        shared = sides.clip(min=real(0)).prod(1)
        overlap = shared / (area[index] + area - shared)
        alive &= ~((overlap > threshold) & np.isfinite(area) & (labels == labels[index]))
    return kept
