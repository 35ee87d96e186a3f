"""One image of the generated set: background, clutter, labelled shapes that hide one another, light and noise."""

import colorsys
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ablations.generated.contours import mask_to_polygons, mask_to_runs, polygon_area
from ablations.generated.outlines import SHAPES, Outline, Shape, blob, deformed, hollow, stroke

# Every 25th image has no labelled object.
EMPTY_EVERY, EMPTY_AT = 25, 7


@dataclass(frozen=True)
class Difficulty:
    """What decides how hard a generated set is. Lengths are in pixels, ranges are inclusive (low, high) pairs.

    Attributes:
        train, val: Number of images.
        sizes: (width, height) of the images, drawn per image.
        classes: How many of `SHAPES`, from the first.
        objects: Labelled objects per image.
        scale: Longest side of an object before rotation; its logarithm is uniform.
        close_ups: Fraction of the images whose largest object is drawn as large as `close_up` says.
        close_up: Longest side of such an object, in shorter sides of the image.
        crowds: Fraction of the images with a crowd region.
        deform: Strength of the deformations, as in `ablations.generated.outlines.deformed`.
        clutter, occluders: Unlabelled things behind and in front of the objects.
        hollow: Fraction of the clutter that is the bare border of a class's shape.
        colour_bias: Fraction of the objects that have the colour of their class; the others have any.
        contrast: Distance in RGB between an object and what is behind it.
        texture: Strength of the patterns on background and objects, in grey levels.
        noise: Standard deviation of the pixel noise, in grey levels.
        visible: The least fraction of an object that may be left in sight.
        supersample: Sub-pixels per pixel and axis when edges are drawn.
        jpeg: Write JPEG (quality 92) instead of PNG.
    """

    train: int
    val: int
    sizes: tuple[tuple[int, int], ...]
    classes: int
    objects: tuple[int, int]
    scale: tuple[float, float]
    close_ups: float
    close_up: tuple[float, float]
    crowds: float
    deform: float
    clutter: tuple[int, int]
    occluders: tuple[int, int]
    hollow: float
    colour_bias: float
    contrast: tuple[float, float]
    texture: tuple[float, float]
    noise: tuple[float, float]
    visible: float
    supersample: int
    jpeg: bool


@dataclass(frozen=True)
class Stencil:
    """An outline laid on the image: where its box begins, in pixels, and which sub-pixels of the box it covers.

    `whole` is its area in sub-pixels with what lies outside the image, `sub` the sub-pixels per pixel and axis.
    """

    x: int
    y: int
    mask: np.ndarray
    whole: float

    sub: int

    def box(self, scale: int = 1) -> tuple[slice, slice]:
        """Rows and columns of the box in an array with `scale` entries per pixel and axis."""
        height, width = (n // self.sub * scale for n in self.mask.shape)
        y, x = self.y * scale, self.x * scale
        return slice(y, y + height), slice(x, x + width)


@dataclass
class Thing:
    """A labelled object or crowd region: sub-pixels it covers in all and those in sight, and the box around the latter.

    The box, in sub-pixels (top, left, bottom, right), may be larger than needed.
    """

    category_id: int
    crowd: bool
    whole: float
    seen: int
    box: tuple[int, int, int, int]


class Canvas:
    """The pixels of an image in the making, and beside them, in sub-pixels, which object is in sight where."""

    def __init__(self, rng: np.random.Generator, difficulty: Difficulty):
        self.rng, self.difficulty, self.sub = rng, difficulty, difficulty.supersample
        self.width, self.height = difficulty.sizes[rng.integers(len(difficulty.sizes))]
        self.pixels = self._background()
        self.labels = np.zeros((self.height * self.sub, self.width * self.sub), dtype=np.uint8)
        # Label i in `labels` is entry i - 1 here; 0 is what nobody asks for.
        self.things: list[Thing] = []

    def _background(self) -> np.ndarray:
        rng = self.rng
        base = np.array(_any_colour(rng, saturation=(0.0, 0.6), value=(0.1, 0.95)))
        knots = base + rng.normal(0, rng.uniform(*self.difficulty.texture) * 1.2, (*rng.integers(2, 6, 2), 3))
        image = Image.fromarray(np.clip(knots, 0, 255).astype(np.uint8))
        smooth = np.asarray(image.resize((self.width, self.height), Image.Resampling.BICUBIC), dtype=np.float32)
        return smooth + self._pattern(self.height, self.width)

    def _pattern(self, height: int, width: int) -> np.ndarray:
        """A texture (height, width, 1) in grey levels around zero: none, gradient, stripes, checks or waves."""
        rng = self.rng
        kind, angle, amplitude = rng.integers(5), rng.uniform(0, math.pi), rng.uniform(*self.difficulty.texture)
        period = math.exp(rng.uniform(math.log(4), math.log(24)))
        y, x = np.arange(height)[:, None], np.arange(width)
        along = (x * math.cos(angle) + y * math.sin(angle)).astype(np.float32) * (2 * math.pi / period)
        across = (y * math.cos(angle) - x * math.sin(angle)).astype(np.float32) * (2 * math.pi / period)
        if kind == 0:
            wave = np.zeros((height, width), dtype=np.float32)
        elif kind == 1:
            wave = 1.5 * (along - along.mean()) / max(float(np.ptp(along)), 1.0)
        elif kind == 2:
            wave = np.clip(2 * np.sin(along), -1, 1)
        elif kind == 3:
            wave = np.clip(3 * np.sin(along) * np.sin(across), -1, 1)
        else:
            wave = np.sin(along + 1.5 * np.sin(across * 0.6))
        return (amplitude * wave)[:, :, None]

    def stencil(self, outline: Outline, centre: np.ndarray, size: float) -> Stencil | None:
        """`outline` drawn `size` pixels long around `centre` (x, y), cut at the image's borders; None when outside."""
        contours = [centre + size * points for points in outline]
        low, high = np.floor(contours[0].min(0)).astype(int), np.ceil(contours[0].max(0)).astype(int)
        x0, y0 = max(low[0], 0), max(low[1], 0)
        x1, y1 = min(high[0], self.width), min(high[1], self.height)
        if x0 >= x1 or y0 >= y1:
            return None
        drawn = Image.new("L", ((x1 - x0) * self.sub, (y1 - y0) * self.sub))
        pen = ImageDraw.Draw(drawn)
        for i, points in enumerate(contours):
            # Pillow's coordinates name pixel centres, ours pixel edges.
            pen.polygon(((points - (x0, y0)) * self.sub - 0.5).ravel().tolist(), fill=0 if i else 1)
        whole = polygon_area(contours[0]) - sum(polygon_area(points) for points in contours[1:])
        return Stencil(int(x0), int(y0), np.asarray(drawn, dtype=bool), whole * self.sub**2, self.sub)

    def hidden(self, stencil: Stencil) -> np.ndarray:
        """How many sub-pixels of each of `things` the stencil would hide."""
        if not self.things:
            return np.zeros(0, dtype=np.int64)
        under = self.labels[stencil.box(self.sub)][stencil.mask]
        return np.bincount(under, minlength=len(self.things) + 1)[1:]

    def fits(self, stencil: Stencil, part_of: Thing | None = None) -> bool:
        """Would every object stay in sight well enough with the stencil, perhaps a part of one of them, on top?"""
        return all(
            thing.seen - hidden >= self.difficulty.visible * thing.whole
            for thing, hidden in zip(self.things, self.hidden(stencil), strict=True)
            if hidden and thing is not part_of
        )

    def paint(self, stencil: Stencil, colour: np.ndarray, label: int = 0) -> None:
        """Blend a textured `colour` into the pixels under `stencil` and give its sub-pixels to `label` (0: nobody)."""
        for thing, hidden in zip(self.things, self.hidden(stencil), strict=True):
            thing.seen -= int(hidden)
        self.labels[stencil.box(self.sub)][stencil.mask] = label
        cover = Image.fromarray(stencil.mask.astype(np.uint8) * 255).reduce(self.sub)
        alpha = np.asarray(cover, dtype=np.float32)[:, :, None] / 255
        area = self.pixels[stencil.box()]
        area += alpha * (colour + self._pattern(*alpha.shape[:2]) - area)

    def paint_thing(self, stencil: Stencil, colour: np.ndarray, shape: Shape, crowd: Thing | None = None) -> Thing:
        """Paint a new object of class `shape`, or another member of `crowd`, which is the last of `things`."""
        covered = int(np.count_nonzero(stencil.mask))
        rows, columns = stencil.box(self.sub)
        box = (rows.start, columns.start, rows.stop, columns.stop)
        label = len(self.things) + (crowd is None)
        self.paint(stencil, colour, label)
        if crowd is None:
            self.things.append(Thing(shape.category_id, False, stencil.whole, covered, box))
        else:
            crowd.crowd, crowd.seen = True, crowd.seen + covered
            crowd.whole = crowd.seen
            crowd.box = (*np.minimum(crowd.box[:2], box[:2]).tolist(), *np.maximum(crowd.box[2:], box[2:]).tolist())
        return self.things[label - 1]

    def colour(self, stencil: Stencil, hue: float | None) -> np.ndarray:
        """A colour as far from what is under `stencil` as the difficulty's contrast range says; near `hue` if given."""
        rng = self.rng
        behind = self.pixels[stencil.box()].mean((0, 1))
        wanted = rng.uniform(*self.difficulty.contrast)
        best, best_distance = behind, -1.0
        for _ in range(6):
            if hue is None:
                colour = np.array(_any_colour(rng))
            else:
                colour = np.array(_any_colour(rng, (hue - 0.04, hue + 0.04), (0.65, 1.0), (0.5, 1.0)))
            distance = float(np.sqrt(((colour - behind) ** 2).sum()))
            if distance > best_distance:
                best, best_distance = colour, distance
            if distance >= wanted:
                break
        # A colour much too far away is drawn in, so that faint objects are as frequent as bold ones.
        return behind + (best - behind) * min(1.0, wanted / max(best_distance, 1.0)) if hue is None else best

    def clutter(self, front: bool) -> None:
        """Paint one unlabelled thing where it leaves every object in sight."""
        rng, difficulty = self.rng, self.difficulty
        span = min(self.width, self.height)
        for _ in range(5):
            kind = rng.random()
            size = span * math.exp(rng.uniform(math.log(0.1), math.log(0.7)))
            if front or kind < 0.4:
                outline = stroke(rng, rng.uniform(0.02, 0.06))
                size = max(size, span * 0.3)
            elif kind < 1 - difficulty.hollow:
                outline = blob(rng)
            else:
                shape = SHAPES[rng.integers(difficulty.classes)]
                outline = hollow(rng, shape, difficulty.deform, rng.uniform(0.03, 0.06))
            stencil = self.stencil(outline, rng.uniform(0, (self.width, self.height)), size)
            if stencil is not None and self.fits(stencil):
                self.paint(stencil, self.colour(stencil, None))
                return

    def place(self, shape: Shape, size: float, tries: int = 12) -> None:
        """Paint one labelled instance where it and all others stay in sight; give up after `tries` positions."""
        rng, difficulty = self.rng, self.difficulty
        outline = deformed(rng, shape, difficulty.deform)
        hue = shape.hue if rng.random() < difficulty.colour_bias else None
        extent, margin = np.array([self.width, self.height]), 0.4 * size
        for _ in range(tries):
            centre = rng.uniform(np.minimum(margin, extent / 2), np.maximum(extent - margin, extent / 2))
            stencil = self.stencil(outline, centre, size)
            if stencil is None or np.count_nonzero(stencil.mask) < max(difficulty.visible, 0.75) * stencil.whole:
                continue
            if self.fits(stencil):
                self.paint_thing(stencil, self.colour(stencil, hue), shape)
                return

    def crowd(self, shape: Shape) -> None:
        """Paint a cluster of small instances of one class that share one label."""
        rng, difficulty = self.rng, self.difficulty
        count, size = int(rng.integers(10, 20)), difficulty.scale[0] * rng.uniform(1.0, 1.6)
        reach = size * math.sqrt(count) * 0.75
        centre = rng.uniform((reach, reach), (self.width - reach, self.height - reach))
        crowd = None
        for _ in range(count):
            around = centre + np.clip(rng.normal(0, reach / 2, 2), -reach, reach)
            stencil = self.stencil(deformed(rng, shape, difficulty.deform), around, size * rng.uniform(0.8, 1.25))
            if stencil is not None and self.fits(stencil, crowd):
                crowd = self.paint_thing(stencil, self.colour(stencil, None), shape, crowd)

    def finished(self) -> np.ndarray:
        """The pixels as uint8 (height, width, 3), after the image's own light, blur and noise."""
        rng = self.rng
        light = rng.uniform(0.75, 1.15) * rng.uniform(0.88, 1.12, 3)
        gain = rng.uniform(0.75, 1.1)
        # Uniform noise: random bytes, whose standard deviation is 73.9, cost a tenth of Gaussian numbers.
        noise = np.frombuffer(rng.bytes(self.pixels.size), dtype=np.uint8).reshape(self.pixels.shape)
        strength = rng.uniform(*self.difficulty.noise) / 73.9
        # light * (gain * (pixels - 128) + 128) + strength * (noise - 127.5), and half a level to round
        pixels = self.pixels * (light * gain).astype(np.float32)
        pixels += np.float32(strength) * noise
        pixels += (light * 128 * (1 - gain) - strength * 127.5 + 0.5).astype(np.float32)
        image = Image.fromarray(np.clip(pixels, 0, 255, out=pixels).astype(np.uint8))
        if rng.random() < 0.3:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))
        return np.asarray(image)

    def annotations(self) -> list[dict[str, Any]]:
        """COCO annotations without ids, in painting order.

        An object's area is that of its sub-pixels in sight, its box that of its polygons. A crowd region is stored as a
        mask of whole pixels, and so are its area and box.
        """
        result = []
        for label, thing in enumerate(self.things, start=1):
            top, left, bottom, right = thing.box
            mask = self.labels[top:bottom, left:right] == label
            if thing.crowd:
                # A sub-pixel in the middle of each pixel decides, so that the runs are of the image's own size.
                middle = self.sub // 2
                region = self.labels[middle :: self.sub, middle :: self.sub] == label
                segmentation: Any = mask_to_runs(region)
                points = np.argwhere(region)[:, ::-1]
                low, high = points.min(0), points.max(0) + 1
                area: float = len(points)
            else:
                polygons = mask_to_polygons(mask, tolerance=0.35 * self.sub, speck=self.sub**2)
                polygons = [np.round(np.add(points, (left, top)) / self.sub, 2) for points in polygons]
                segmentation = [points.ravel().tolist() for points in polygons]
                points = np.concatenate(polygons)
                low, high = points.min(0), points.max(0)
                area = np.count_nonzero(mask) / self.sub**2
            result.append(
                {
                    "category_id": thing.category_id,
                    "iscrowd": int(thing.crowd),
                    "area": round(area, 2),
                    "bbox": np.round([*low, *(high - low)], 2).tolist(),
                    "segmentation": segmentation,
                }
            )
        return result


def _any_colour(
    rng: np.random.Generator,
    hue: tuple[float, float] = (0.0, 1.0),
    saturation: tuple[float, float] = (0.1, 1.0),
    value: tuple[float, float] = (0.15, 1.0),
) -> list[float]:
    rgb = colorsys.hsv_to_rgb(rng.uniform(*hue) % 1.0, rng.uniform(*saturation), rng.uniform(*value))
    return [255 * channel for channel in rgb]


def draw_scene(difficulty: Difficulty, seed: int, split: int, index: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Image number `index` of split 0 (train) or 1 (val), the same for the same arguments in any process.

    Returns:
        The pixels, uint8 (H, W, 3) RGB, and the COCO annotations without `id` and `image_id`.
    """
    canvas = composed(difficulty, seed, split, index)
    return canvas.finished(), canvas.annotations()


def composed(difficulty: Difficulty, seed: int, split: int, index: int) -> Canvas:
    """The image before its light and noise, with the record of what is in sight in it."""
    rng = np.random.default_rng([seed, split, index])
    canvas = Canvas(rng, difficulty)
    for _ in range(rng.integers(difficulty.clutter[0], difficulty.clutter[1] + 1)):
        canvas.clutter(front=False)
    if index % EMPTY_EVERY != EMPTY_AT:
        if rng.random() < difficulty.crowds:
            canvas.crowd(SHAPES[rng.integers(difficulty.classes)])
        low, high = np.log(difficulty.scale)
        count = rng.integers(difficulty.objects[0], difficulty.objects[1] + 1)
        sizes = np.exp(rng.uniform(low, high, count))
        if rng.random() < difficulty.close_ups:
            sizes[0] = min(canvas.width, canvas.height) * rng.uniform(*difficulty.close_up)
        # The largest comes first and takes its class from the index, so that each class occurs in any run of images.
        for i, size in enumerate(np.sort(sizes)[::-1]):
            shape = index if i == 0 else rng.integers(difficulty.classes)
            canvas.place(SHAPES[shape % difficulty.classes], float(size))
    for _ in range(rng.integers(difficulty.occluders[0], difficulty.occluders[1] + 1)):
        canvas.clutter(front=True)
    return canvas
