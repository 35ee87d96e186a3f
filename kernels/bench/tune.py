"""Measure which tiles of the deformable convolution's kernels are fastest on the present GPU, and keep them.

    python -m kernels.bench.tune [--only TEXT]

Starts at the tiles in use and changes one size after the other, as long as that helps; what computes something else or
does not compile is passed over. Writes `kernels/tuned/<device>.json`, which `kernels.runtime.tiles` reads; rows of
that file that are not measured now stay as they are.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from kernels.bench.op import OPS, Op, Shape, pyramid, rounding
from kernels.bench.roofline import DTYPES, default_device, float32_products, seconds_per_call
from kernels.runtime.tiles import Table, Tiles, fit, on_trial, read_tuned, tuned_file, type_class
from kernels.sampling.inverse import GATHER
from kernels.sampling.launch import FORWARD, SAMPLES, WEIGHT

# The kernels, and the gradients that need this one and no other; none is the forward pass.
KERNELS = ((FORWARD, ()), (SAMPLES, ("input", "offset", "mask")), (WEIGHT, ("weight",)), (GATHER, ("input",)))
# One precision of every class of types.
PRECISIONS = ("bf16", "tf32", "fp32")
CHOICES = {
    "height": (4, 8, 16),
    "width": (4, 8, 16),
    "c": (16, 32, 64, 128),
    "o": (64, 128, 256),
    "warps": (4, 8),
    "stages": (1, 2, 3, 4),
}
# What `kernels.runtime.tiles` looks a row up by.
KEY = ("kernel", "class", "channels", "outputs")
# A gain below this is noise.
GAIN = 0.98


def calls(op: Op, wanted: tuple[str, ...], shape: Shape, precision: str, device: str) -> Callable[[], list[Tensor]]:
    """A call without arguments that returns the output, or the wanted gradients, and computes nothing else."""
    tensors = op.make_inputs(shape, DTYPES[precision], device, 0)
    inputs = {name: x.detach().requires_grad_(name in wanted) for name, x in tensors.items()}
    output = op.function(**inputs)
    if not wanted:
        return lambda: [op.function(**inputs)]
    leaves, cotangent = [inputs[name] for name in wanted], torch.ones_like(output)
    return lambda: list(torch.autograd.grad(output, leaves, cotangent, retain_graph=True))


def neighbours(tiles: Tiles) -> Iterator[Tiles]:
    """All tiles that differ in one size."""
    for name, sizes in CHOICES.items():
        yield from (replace(tiles, **{name: size}) for size in sizes if size != getattr(tiles, name))


def search(
    start: Tiles,
    seconds: Callable[[Tiles], float | None],
    prepare: Callable[[list[Tiles]], object] = lambda candidates: None,
) -> tuple[Tiles, float, float]:
    """The best tiles found, their time and that of `start`; `seconds` is None for tiles that will not do.

    `prepare` is given what is timed next.

    Raises:
        RuntimeError: `start` itself will not do.
    """
    at_start = seconds(start)
    if at_start is None:
        raise RuntimeError(f"{start}, the tiles in use, do not run")
    times: dict[Tiles, float | None] = {start: at_start}
    best, least, previous = start, at_start, None
    while best != previous:
        previous = best
        candidates = [tiles for tiles in neighbours(previous) if tiles not in times]
        prepare(candidates)
        for tiles in candidates:
            time = times[tiles] = seconds(tiles)
            if time is not None and time < GAIN * least:
                best, least = tiles, time
    return best, least, at_start


def judge(kernel: str, runs: list[Callable[[], list[Tensor]]], limit: float) -> Callable[[Tiles], float | None]:
    """How to time tiles of a kernel: seconds of all `runs` together, None if they fail or differ beyond `limit`."""
    expected = [run() for run in runs]

    def seconds(tiles: Tiles) -> float | None:
        with on_trial(kernel, tiles):
            try:
                found = [run() for run in runs]
            except TritonError:
                return None
            pairs = [(f, e) for fs, es in zip(found, expected, strict=True) for f, e in zip(fs, es, strict=True)]
            if not all((f.double() - e.double()).abs().max() <= limit * e.abs().max() for f, e in pairs):
                return None
            return sum(map(seconds_per_call, runs))

    return seconds


@cache
def _kept_call(name: str, wanted: tuple[str, ...], shape: Shape, precision: str, device: str) -> Callable[[], Any]:
    return calls(OPS[name], wanted, shape, precision, device)


def _compile(kernel: str, tiles: Tiles, deterministic: bool, precision: str, call: tuple[Any, ...]) -> None:
    """Make one call of a kernel with these tiles, in a process of its own."""
    torch.use_deterministic_algorithms(deterministic)
    with float32_products(precision), on_trial(kernel, tiles):
        _kept_call(*call)()


def compile_ahead(
    pool: Executor, kernel: str, precision: str, every_call: list[tuple[Any, ...]], candidates: list[Tiles]
) -> None:
    """Compile all candidates at once, into Triton's cache on disk: in turn it takes longer than timing them."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    pairs = [(tiles, call) for tiles in candidates for call in every_call]
    # What does not do is found out again where it is timed, and without a pool the search is slower, no more.
    with suppress(BrokenExecutor):
        wait([pool.submit(_compile, kernel, tiles, deterministic, precision, call) for tiles, call in pairs])


def tune(
    table: Table,
    wanted: tuple[str, ...],
    precision: str,
    device: torch.device,
    shapes: list[Shape],
    pool: Executor | None = None,
) -> dict[str, Any]:
    """Search the tiles of one kernel; returns a row of a tuned file, with the times of both in milliseconds.

    With a `pool` of processes, kernels are compiled there ahead of their turn.
    """
    op, dtype, channels = OPS["deform_conv2d"], DTYPES[precision], shapes[0].channels
    before = torch.are_deterministic_algorithms_enabled()
    # Only they take the kernel that gathers the input's gradient.
    torch.use_deterministic_algorithms(table is GATHER)
    try:
        with float32_products(precision):
            runs = [calls(op, wanted, shape, precision, str(device)) for shape in shapes]
            limit = 4 * rounding(dtype, 9 * channels) + (2.0**-9 if precision == "tf32" else 0)
            start = fit(table, dtype, device, channels, channels)
            every_call = [(op.name, wanted, shape, precision, str(device)) for shape in shapes]
            ahead = [partial(compile_ahead, pool, table.kernel, precision, every_call)] if pool else []
            best, seconds, at_start = search(start, judge(table.kernel, runs, limit), *ahead)
            names = {"kernel": table.kernel, "class": type_class(dtype, device), "channels": channels}
    finally:
        torch.use_deterministic_algorithms(before)
    return names | {"outputs": channels, "tiles": asdict(best), "ms": 1e3 * seconds, "ms_before": 1e3 * at_start}


def write(path: Path, device_name: str, row: dict[str, Any]) -> None:
    """Put a row into the file of a device, in place of the one with the same key."""
    # A file of another version of Triton counts as none.
    rows = json.loads(path.read_text())["rows"] if path.exists() and read_tuned(path, device_name) else []
    content = {
        "device": device_name,
        "triton": triton.__version__,
        "rows": [old for old in rows if any(old[name] != row[name] for name in KEY)] + [row],
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit code: 0, or 2 where there is nothing to tune."""
    parser = argparse.ArgumentParser("python -m kernels.bench.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels whose name and precision contain this")
    options = parser.parse_args(arguments)
    device = default_device()
    if device.type != "cuda":
        print("error: tiles are measured on a GPU, and torch sees none", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name(device)
    jobs = [(*job, precision) for job in KERNELS for precision in PRECISIONS]
    chosen = [job for job in jobs if options.only in f"{job[0].kernel} {job[2]}"]
    if not chosen:
        parser.error(f"nothing contains {options.only!r}; there are {', '.join(t.kernel for t, _ in KERNELS)}")
    workers = max(1, min(8, (os.cpu_count() or 1) - 1))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for table, wanted, precision in chosen:
            row = tune(table, wanted, precision, device, pyramid(batch=8)[:2], pool)
            write(tuned_file(name), name, row)
            print(f"{table.kernel} {precision}: {row['ms_before']:.3f} ms before, {row['ms']:.3f} with {row['tiles']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
