"""What a row stores: one cell, where and how it was run, and every number that it gave.

In memory a row is the JSON object of its file, unchanged: what an earlier or a later version wrote beside the fields
below is kept. A failed cell has a row as well, with its `reason` and all that was known before it failed.
"""

import json
import math
import numbers
from collections.abc import Mapping
from typing import Any, Literal, NoReturn, NotRequired, TypedDict, cast, get_args

Status = Literal["ok", "diverged", "oom", "bad_data", "crashed"]
STATUSES: tuple[Status, ...] = get_args(Status)

# What a detector costs; a row may lack each of them, or hold null.
Measure = Literal["params_M", "GMACs", "images_per_s", "latency_ms_p50", "latency_ms_p90", "peak_memory_MB"]
MEASURES: tuple[Measure, ...] = get_args(Measure)

# `ablations.evaluation.evaluate.METRICS` in percent; None for a size class without ground truth.
Metrics = Mapping[str, float | None]


class Settings(TypedDict):
    """The cell (`ablations.grid.Cell.stored`): the fields that every row has, and those that tables are ordered by.

    All other fields of a cell are there as well, as far as they existed when the row was written.
    """

    detector: str
    attentions: str
    depth: int | None
    seed: int
    data: NotRequired[str]
    data_fingerprint: NotRequired[str]
    backbone: NotRequired[str]
    formulation: NotRequired[str | None]
    coarse_offsets: NotRequired[str | None]
    placement: NotRequired[str | None]
    accumulate: NotRequired[int]
    device_kind: NotRequired[str]


class Machine(TypedDict, total=False):
    """Where a row comes from.

    Attributes:
        device: Name of the GPU or the CPU.
        cores: CPU cores that the process could use.
        driver: Version of the GPU's driver; None on a CPU.
        python, torch, triton: Versions; None for a Triton that is not installed.
        commit: Of this repository; None outside a git checkout.
        dirty: Whether the code differed from the commit; None outside a git checkout.
        command: The command line, without absolute paths.
    """

    device: str
    cores: int | None
    driver: str | None
    python: str
    torch: str
    triton: str | None
    commit: str | None
    dirty: bool | None
    command: str


class Training(TypedDict, total=False):
    """What a finished training leaves on record.

    Attributes:
        steps: Number of steps.
        images: Images seen.
        seconds: Time that the steps took, summed over all runs of an interrupted training.
        loss: Mean loss of the last tenth of the steps.
        ranks: Processes that trained it together, each on a device of its own.
        halved: Steps before which memory was short, and the images that are trained on at once were halved; absent
            where it never was.
        commit: The commit that trained; rows made before it was recorded lack it.
    """

    steps: int
    images: int
    seconds: float
    loss: float | None
    ranks: int
    halved: list[int]
    commit: str | None


class Results(TypedDict, total=False):
    """What becomes known while a cell runs; a failed cell's row has what was known before it failed.

    Attributes:
        training: The training that the weights come from.
        weights: Their file, relative to the directory of the results.
        metrics: Of the boxes, in percent; a good row has at least `AP`.
        segm_metrics: Of the masks, where the detector has them.
        errors: The points of AP50 that mending each of `ablations.evaluation.errors.ERRORS` alone would give back.
        class_AP: AP of the boxes in percent by the name of the category; None for one without ground truth.
        files: Sizes in bytes of detections and replicates, which lie beside the row, by name.
        images: Number of images evaluated.
        params_M, GMACs: Millions of parameters, and 10^9 multiply-adds an image.
        images_per_s: Throughput at `batch_size_measured`.
        latency_ms_p50, latency_ms_p90: Percentiles at batch size 1.
        peak_memory_MB: In 10^6 bytes; None on a CPU.
        batch_size_measured, threads: How the speed was measured.
    """

    training: Training | None
    weights: str
    metrics: Metrics | None
    segm_metrics: Metrics | None
    errors: Metrics | None
    class_AP: Metrics | None
    files: dict[str, int] | None
    images: int | None
    params_M: float | None
    GMACs: float | None
    images_per_s: float | None
    latency_ms_p50: float | None
    latency_ms_p90: float | None
    peak_memory_MB: float | None
    batch_size_measured: int | None
    threads: int | None


class Row(Results):
    """One finished or failed cell.

    Attributes:
        key: Content hash of the cell, and the name of the file.
        cell: Everything that decides the result.
        status: Whether it is good, or how it failed.
        reason: Why it failed; None where it is good.
        machine: Where it was run.
        started, finished: UTC, ISO 8601.
        dropped: For each split, how many annotations were left out, by reason; absent where none was.
    """

    key: str
    cell: Settings
    status: Status
    reason: NotRequired[str | None]
    machine: NotRequired[Machine | None]
    started: NotRequired[str | None]
    finished: NotRequired[str | None]
    dropped: NotRequired[dict[str, dict[str, int]] | None]


def machine_of(row: Row) -> Machine:
    """Where a row comes from; empty where it does not say."""
    return row.get("machine") or Machine()


def training_of(row: Row) -> Training:
    """The training behind a row; empty where none has ended."""
    return row.get("training") or Training()


def metrics_of(row: Row) -> Metrics:
    """The metrics of the boxes; empty where there was no evaluation."""
    return row.get("metrics") or {}


def good(row: Row) -> bool:
    """Whether the cell came to an end."""
    return row["status"] == "ok"


def to_json(row: Mapping[str, Any]) -> bytes:
    """The content of a row's file. NumPy's numbers become Python's, numbers that are not finite become null.

    Raises:
        ValueError: The row lacks something that every row has, or holds it in another type.

    Example:
        >>> from ablations.rows.row import from_json, to_json
        >>> cell = {"detector": "atss", "attentions": "LSC", "depth": 6, "seed": 0}
        >>> row = {"key": "a1", "cell": cell, "status": "ok", "metrics": {"AP": 42.6}, "GMACs": float("nan")}
        >>> from_json(to_json(row), "a1")["GMACs"] is None
        True
    """
    plain = {key: _plain(value) for key, value in row.items()}
    problem = _problem(plain, plain.get("key"))
    if problem:
        raise ValueError(f"not a row: {problem}")
    return (json.dumps(plain, indent=1, allow_nan=False) + "\n").encode()


def from_json(data: bytes, key: str) -> Row:
    """The row of the cell `key` from the content of its file.

    Raises:
        ValueError: The content is no JSON, or not the row of this cell.
        RecursionError: The JSON is nested too deeply.
    """
    row = json.loads(data, parse_constant=_refuse_constant)
    problem = _problem(row, key)
    if problem:
        raise ValueError(problem)
    return cast(Row, row)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    raise ValueError(f"a row holds numbers, text, lists and dicts, not {type(value).__name__}")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _problem(row: object, key: object) -> str | None:
    """What keeps `row` from being the row of the cell `key`, or None."""
    if not isinstance(row, dict):
        return "it is not a JSON object"
    if row.get("key") != key:
        return f"its key is {row.get('key')!r}, its file is named {key!r}"
    if row.get("status") not in STATUSES:
        return f"its status is {row.get('status')!r}; the statuses are {', '.join(STATUSES)}"
    cell = row.get("cell")
    if not isinstance(cell, dict):
        return "it has no cell"
    for name in ("detector", "attentions"):
        if not isinstance(cell.get(name), str):
            return f"cell.{name} is {cell.get(name)!r}, not text"
    depth, seed = cell.get("depth"), cell.get("seed")
    if not isinstance(depth, int | None) or not isinstance(seed, int):
        return f"cell.depth is {depth!r} and cell.seed is {seed!r}; both are whole numbers, depth may be null"
    for name in ("metrics", "errors", "class_AP", "machine", "training", "dropped", "files"):
        if not isinstance(row.get(name), dict | None):
            return f"{name} is {row[name]!r}, not an object"
    metrics = row.get("metrics") or {}
    parts = [metrics, row.get("errors") or {}, row.get("class_AP") or {}]
    parts.append({name: row.get(name) for name in (*MEASURES, "images")})
    for name, value in (item for part in parts for item in part.items()):
        if not _is_number(value):
            return f"{name} is {value!r}, not a number"
    if row["status"] == "ok" and "AP" not in metrics:
        return "its status is ok and it has no metrics.AP"
    return None
