"""Exhibits of trained cells, from their weights, their detections and the data; kept as JSON for the report."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ablations.data.batch import Shown
from ablations.data.coco import read_image
from ablations.data.loader import EvalLoader
from ablations.data.split import Dataset, ImageRecord, Split
from ablations.evaluation.detections import FILE, read_detections
from ablations.exhibits.choose import Change, by_image, changes, extremes
from ablations.exhibits.pictures import best_boxes, image_uri, map_uri, truth_boxes
from ablations.exhibits.probe import Probe, probe, samples
from ablations.exhibits.stored import FOLDER, Exhibit, Subject, exhibit_path, name_of, read_exhibit, subject_of
from ablations.experiment import trained
from ablations.experiment.experiment import build
from ablations.files import atomic_write_text
from ablations.grid import Cell
from ablations.rows.row import Row
from ablations.rows.sections import make_sections
from heads.detector import Detector

# Images of each side that are shown, and images that gates and slopes are averaged over.
EACH, AVERAGED = 3, 16
# Of the finest levels maps and positions are shown; the others have few pixels or none.
LEVELS = 3


def write_exhibits(rows: Iterable[Row], directory: str | Path, data: Dataset | None) -> None:
    """Make the exhibit of every table that has an LSC cell, and remove exhibits of cells that no table shows.

    What cannot be made leaves what an earlier run made of the same cell, or else a file that holds the reason: nothing
    that goes wrong here may cost a run its tables.

    Args:
        rows: Of the directory (`read_rows`).
        directory: Where `cells` lies.
        data: The data set that the rows are of; None where it is not at hand.
    """
    directory = Path(directory)
    subjects = [subject for section in make_sections(rows) if (subject := subject_of(section)) is not None]
    for subject in subjects:
        key = subject.row["key"]
        path = exhibit_path(directory, key)
        try:
            exhibit = make_exhibit(subject, directory, data)
        except Exception as error:
            earlier = read_exhibit(directory, key)
            if earlier is not None and "reason" not in earlier:
                continue
            exhibit = {"key": key, "reason": " ".join(str(error).split()) or type(error).__name__}
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, json.dumps(exhibit, separators=(",", ":")) + "\n")
    shown = {subject.row["key"] for subject in subjects}
    for path in (directory / FOLDER).glob("*.json"):
        if path.stem not in shown:
            path.unlink(missing_ok=True)


def make_exhibit(subject: Subject, directory: Path, data: Dataset | None) -> Exhibit:
    """The exhibit of one cell.

    Raises:
        ValueError: Something that it is made of is missing; the message says what.
        OSError: A file cannot be read.
        DataError: An image does not decode.
    """
    cell = restored(subject.row)
    if data is None:
        raise ValueError("the data set is not at hand; name its directory with --data")
    if data.fingerprint != cell.data_fingerprint:
        raise ValueError(f"{data.root} is not the data set that the cell was evaluated on")
    if trained.find(directory, cell) is None:
        raise ValueError(f"the weights of {name_of(subject.row)} are gone")
    model = build(cell, len(data.train.category_ids), None)
    weights = trained.folder(directory, cell) / trained.CHECKPOINT
    model.load_state_dict(trained.checkpoint_of(weights, model, {"model"})["model"])
    model.eval()
    exhibit: Exhibit = {"key": cell.key, "notes": [], "pictures": []}
    try:
        exhibit |= _pictures(subject, directory, data.val)
    except (OSError, ValueError) as error:
        exhibit["notes"].append(f"No boxes side by side: {error}.")
    exhibit |= _averages(model, cell, data.val)
    record = _shown_record(data.val, exhibit["pictures"])
    if record is not None:
        exhibit |= _one_image(model, cell, data.val, record)
    return exhibit


def restored(row: Row) -> Cell:
    """The cell of a stored row.

    Raises:
        ValueError: The row is of another version, whose cells have other fields.
    """
    stored: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in row["cell"].items()
    }
    stored["attentions"] = {"baseline": None, "none": ""}.get(stored["attentions"], stored["attentions"])
    try:
        cell = Cell(**stored)
    except TypeError as error:
        raise ValueError(f"the row of {name_of(row)} was written by another version: {error}") from error
    if cell.key != row["key"]:
        raise ValueError(f"the row of {name_of(row)} was written by another version")
    return cell


def _pictures(subject: Subject, directory: Path, val: Split) -> Exhibit:
    """The images whose AP changes most, with what was annotated and found in them."""
    if subject.baseline is None:
        raise ValueError(f"there is no baseline of seed {subject.row['cell']['seed']}")
    truth = by_image(val.ground_truth["annotations"])
    before, after = (
        by_image(read_detections(directory / "cells" / row["key"] / FILE)) for row in (subject.baseline, subject.row)
    )
    ordered = changes(truth, before, after)
    names = dict(zip(val.category_ids, val.category_names, strict=True))
    records = {record.image_id: record for record in val.images}

    def picture(change: Change) -> dict[str, Any]:
        image = change.image_id
        return _picture(records[image]) | {
            "AP": [round(change.before, 1), round(change.after, 1)],
            "truth": truth_boxes(truth[image], names),
            "baseline": best_boxes(truth[image], before.get(image, []), names),
            "dyhead": best_boxes(truth[image], after.get(image, []), names),
        }

    return {
        "pictures": [picture(change) for change in extremes(ordered, EACH)],
        "compared": len(ordered),
        "rise": sum(change.after > change.before for change in ordered),
        "fall": sum(change.after < change.before for change in ordered),
    }


def _picture(record: ImageRecord) -> dict[str, Any]:
    return {
        "image_id": record.image_id,
        "width": record.width,
        "height": record.height,
        "image": image_uri(read_image(record)),
    }


def _shown(val: Split, records: Sequence[ImageRecord], cell: Cell) -> Iterable[tuple[Tensor, Shown]]:
    """Images as evaluation shows them to the detector, one by one."""
    for (image,), (origin,) in EvalLoader(replace(val, images=list(records)), 1, cell.test_size[0], cell.max_size):
        yield image, origin


def _averages(model: Detector, cell: Cell, val: Split) -> Exhibit:
    """Gates and slopes of every block and level, means over the first images."""
    seen = [probe(model, image) for image, _ in _shown(val, val.images[:AVERAGED], cell)]
    gates: list[list[list[float]]] = []
    slopes: list[list[list[list[float]]] | None] = []
    for blocks in zip(*(each.blocks for each in seen), strict=True):
        if blocks[0].gates is not None:
            gates.append([_means(level) for level in zip(*(block.gates or [] for block in blocks), strict=True)])
        if blocks[0].slopes is not None:
            levels = zip(*(block.slopes or [] for block in blocks), strict=True)
            slopes.append([_rounded(torch.stack(list(level)).mean(0)) for level in levels])
        else:
            slopes.append(None)
    return {
        "images": len(seen),
        "levels": [_level(stride) for stride in seen[0].strides],
        "released": seen[0].released,
        "gates": gates,
        "slopes": slopes if any(each is not None for each in slopes) else [],
    }


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [round(sum(column) / len(column), 3) for column in zip(*rows, strict=True)]


def _rounded(values: Tensor) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in values.tolist()]


def _level(stride: float) -> str:
    """A level's usual name: P3 has stride 8."""
    return f"P{round(math.log2(stride))}"


def _shown_record(val: Split, pictures: Sequence[dict[str, Any]]) -> ImageRecord | None:
    """The image that gains most, else the first one with an object."""
    wanted = pictures[0]["image_id"] if pictures else None
    with_objects = [record for record in val.images if len(record.boxes)]
    return next((record for record in with_objects if record.image_id == wanted), next(iter(with_objects), None))


def _one_image(model: Detector, cell: Cell, val: Split, record: ImageRecord) -> Exhibit:
    """Maps around each attention and the positions of S for the middle of the image's largest object."""
    ((image, origin),) = _shown(val, [record], cell)
    seen = probe(model, image)
    areas = (record.boxes[:, 2:] - record.boxes[:, :2]).prod(1)
    x1, y1, x2, y2 = record.boxes[int(areas.argmax())].tolist()
    point = ((x1 + x2) / 2, (y1 + y2) / 2)
    ratio = torch.tensor([origin.ratio[1], origin.ratio[0]])
    numbers = sorted({0, len(seen.blocks) - 1}) if seen.blocks else []
    positions, maps = [], []
    for number in numbers:
        for level in range(min(LEVELS, len(seen.strides)) if seen.released else 1):
            found = samples(seen, number, level, point[0] * origin.ratio[1], point[1] * origin.ratio[0])
            if found:
                name = _level(seen.strides[level]) if seen.released else "all levels"
                places = {
                    each.neighbour: [
                        [round(x, 1), round(y, 1), round(mask, 2)]
                        for (x, y), mask in zip((each.points / ratio).tolist(), each.mask.tolist(), strict=True)
                    ]
                    for each in found
                }
                positions.append({"block": number + 1, "level": name, "samples": places})
        maps.append({"block": number + 1, "stages": _maps(seen, number, image)})
    picture = _picture(record) | {"point": [round(value, 1) for value in point]}
    return {"picture": picture, "positions": positions, "maps": maps}


def _maps(seen: Probe, number: int, image: Tensor) -> list[dict[str, Any]]:
    """Of one block each stage's finest maps, cut to the image where it was padded."""
    stages = []
    for name, levels in seen.blocks[number].stages:
        shown = []
        for level, values in enumerate(levels[:LEVELS]):
            stride = seen.stride(level)
            height, width = (max(1, round(side / stride)) for side in image.shape[-2:])
            values = values[:height, :width]
            shown.append({"level": level, "image": map_uri(values), "largest": round(float(values.max()), 3)})
        stages.append({"stage": name, "levels": shown})
    return stages
