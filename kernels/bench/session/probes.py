"""Measurements that are no benchmark of an operator: this machine's roofs, and questions that only a GPU answers.

    python -m kernels.bench.session.probes DIR NAME ...

adds the rows of some of `PROBES` to a session. Under TRITON_INTERPRET=1 all is tiny, and the rows are no measurements.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import INTERPRET, use_backend
from kernels.bench import roofline, tune
from kernels.bench.compile import disassembled
from kernels.bench.loops import main_loops
from kernels.bench.op import OPS, Shape, pyramid
from kernels.bench.roofline import default_device, seconds_per_call
from kernels.bench.session import gather_kernels
from kernels.bench.session.carveout import DRIVERS_CHOICE, enough, loaded_kernels, prefer
from kernels.bench.session.store import FILE, Row, append
from kernels.runtime.tiles import fit, on_trial
from kernels.sampling.launch import FORWARD

# What docs/kernels/predictions.md assumes of an H200.
COPY, MATMUL, DENSE = 4.3e12, 790e12, 650e12
# Of one multiprocessor on sm_90, in one clock; and its clocks in a second.
OPERATIONS, CLOCK = 4096, 1.755e9
ASSUMED = "assumed in docs/kernels/predictions.md"
BY_ISSUE = "tensor cores, or issue where that takes longer, in the main loop's code"

Found = Iterator[Row]


def _sizes() -> tuple[str, list[Shape], str]:
    """Precision, the levels of a pyramid, and the device: P3 to P7 at batch 8, or some pixels."""
    if INTERPRET:
        return "fp32", [Shape("4x4", 1, 16, 4, 4)], "cpu"
    return "bf16", pyramid(batch=8), "cuda"


def _milliseconds(call: Callable[[], object]) -> float:
    # The interpreter is slow, and nobody reads its times.
    return 1e3 * (seconds_per_call(call, 0.0, 1) if INTERPRET else seconds_per_call(call))


def roofs() -> Found:
    """Copying, multiplying, convolving, and adding to memory from many programs at once."""
    precision, shapes, name = _sizes()
    device, shape = torch.device(name), shapes[0]

    def row(what: str, value: float, unit: str, predicted: str, basis: str = ASSUMED) -> Row:
        return Row("roofs", what, value, unit, predicted, basis)

    if INTERPRET:
        x = torch.ones(16)
        yield row("copy", 2 * x.nbytes / _milliseconds(x.clone) / 1e6, "GB/s", f"{COPY / 1e9:.0f}")
    else:
        yield row("copy", roofline.copy_bytes_per_second(device) / 1e9, "GB/s", f"{COPY / 1e9:.0f}")
        rate = roofline.matmul_flops_per_second(device, precision)
        yield row(f"matrix product {precision}", rate / 1e12, "TFLOP/s", f"{MATMUL / 1e12:.0f}")
    size = (shape.batch, shape.channels, shape.height, shape.width)
    x, weight = (
        torch.randn(s, dtype=roofline.DTYPES[precision], device=device)
        .to(memory_format=torch.channels_last)
        .requires_grad_()
        for s in (size, (shape.channels, shape.channels, 3, 3))
    )
    flops = 2 * shape.batch * shape.height * shape.width * weight.numel()
    dense, basis = f"dense 3x3 convolution {shape} {precision}", f"{DENSE / 1e12:.0f} TFLOP/s, an assumption"
    with torch.no_grad():
        forward = _milliseconds(lambda: F.conv2d(x, weight, padding=1))
    yield row(f"{dense}, forward", forward, "ms", f"{1e3 * flops / DENSE:.3f}", basis)
    y = F.conv2d(x, weight, padding=1)
    gradient = torch.randn_like(y)
    backward = _milliseconds(lambda: torch.autograd.grad(y, (x, weight), gradient, retain_graph=True))
    yield row(f"{dense}, backward", backward, "ms", f"{2e3 * flops / DENSE:.3f}", basis)
    yield row("additions of float32 to memory", _additions(device), "GB/s", "1300 to 5200")


def _additions(device: torch.device) -> float:
    programs, parts, block = (4, 2, 16) if INTERPRET else (33600, 16, 256)
    target = torch.zeros(4 * programs, block, device=device)
    # Runs around the program's own, as the corners of neighbouring samples have them.
    near = torch.randint(-300, 300, (programs, parts)) + 4 * torch.arange(programs)[:, None]
    place = near.clamp(0, len(target) - 1).int().to(device)
    run = gather_kernels.scatter_add_kernel[(programs,)]
    spent = _milliseconds(lambda: run(target, place, parts, block, num_warps=2))
    return 4 * programs * parts * block / spent / 1e6


def gathers() -> Found:
    """Does a barrier wait for loads in flight? Is mixing corners in 16 bits faster? Are two stages enough?"""
    height, width, channels, outputs, batch = (8, 16, 32, 16, 1) if INTERPRET else (96, 176, 256, 256, 8)
    dtype, device = (torch.float16, "cpu") if INTERPRET else (torch.bfloat16, "cuda")
    taps, pixels, inputs = 9, 128, _gather_inputs(batch, height, width, channels, outputs, dtype, device)
    rows = inputs["base"].shape[1]
    out = torch.empty(rows, outputs, dtype=dtype, device=device)
    expected = _gather_reference(inputs, width)
    for packed, early, stages in (
        (True, True, 3),
        (True, False, 3),
        (False, True, 3),
        (False, False, 3),
        (True, True, 2),
    ):
        constants: dict[str, Any] = {"C": channels, "OUT": outputs, "TAPS": taps, "PIXELS": pixels, "BLOCK_C": 32}
        constants |= {"PACKED": packed, "EARLY": early, "num_warps": 8, "num_stages": stages}

        def run(constants: dict[str, Any] = constants) -> Any:
            kernel = gather_kernels.gather_product_kernel[(rows // pixels,)]
            return kernel(*inputs.values(), out, rows, width, **constants)

        compiled = run()
        error = ((out.float() - expected).abs().max() / expected.abs().max()).item()
        if not error < 0.02:
            raise RuntimeError(f"the gather with {constants} is wrong: its largest relative error is {error}")
        mixed, place = "in 16 bits" if packed else "in float32", "before" if early else "behind"
        what = f"gather and product, mixed {mixed}, next corners {place} the barrier, {stages} stages"
        predicted, step = _by_issue(compiled, 2 * rows * taps * channels * outputs)
        yield Row("gathers", what, _milliseconds(run), "ms", predicted, BY_ISSUE, f"error {error:.1e}{step}")


def _gather_inputs(
    batch: int, height: int, width: int, channels: int, outputs: int, dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    """Samples some pixels around their own place, all within the map, in tiles of 8x16 pixels."""
    random = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y, x = (a.view(height // 8, 8, width // 16, 16).transpose(1, 2).reshape(-1) for a in (y, x))
    tap = torch.arange(9)[:, None]
    moved_y, moved_x = (torch.randint(-2, 3, (9, len(y)), generator=random) for _ in range(2))
    place = (y + tap // 3 - 1 + moved_y).clamp(0, height - 2) * width + (x + tap % 3 - 1 + moved_x).clamp(0, width - 2)
    base = (place[:, None] + (torch.arange(batch) * height * width)[:, None]).flatten(1).int()
    shares = torch.rand(4, *base.shape, generator=random)
    tensors = {
        "x": torch.randn(batch * height * width, channels, generator=random).to(dtype),
        "base": base,
        "shares": (shares / shares.sum(0)).to(dtype),
        "weight": (torch.randn(9, channels, outputs, generator=random) / (9 * channels) ** 0.5).to(dtype),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _gather_reference(inputs: dict[str, Tensor], width: int) -> Tensor:
    x, base, shares, weight = (tensor if tensor.dtype == torch.int32 else tensor.float() for tensor in inputs.values())
    total = torch.zeros((), device=x.device)
    for tap in range(len(base)):
        places = (base[tap] + step for step in (0, 1, width, width + 1))
        samples = sum(x[place] * share[:, None] for place, share in zip(places, shares[:, tap], strict=True))
        total = total + samples @ weight[tap]
    return total


def _by_issue(compiled: Any, flops: int) -> tuple[str, str]:
    """Milliseconds that the tensor cores, or issuing a step of the main loop, take for these operations at least.

    Also what a step has of barriers and fences, which differ between versions of Triton. Both are empty for a kernel
    that does not multiply, and under the interpreter.
    """
    try:
        loops = main_loops(disassembled(compiled.asm["cubin"]), compiled.metadata.num_warps)
        count = torch.cuda.get_device_properties().multi_processor_count
    except Exception:
        # Whatever is missing here, a prediction is no reason to lose a measurement.
        return "", ""
    loop = max((loop for loop in loops if loop.place != "outer"), key=lambda loop: loop.ratio)
    least = 1e3 * flops * max(1.0, loop.ratio) / (OPERATIONS * CLOCK * count)
    return f"{least:.3f}", f"; a step: {loop.instructions} instructions, {loop.bar} barriers, {loop.fence} fences"


def forward() -> Found:
    """The forward convolution with two and three stages, and with more of the memory left to the L1 cache."""
    precision, shapes, device = _sizes()
    shape, dtype = shapes[0], roofline.DTYPES[precision]
    tiles = fit(FORWARD, dtype, torch.device(device), shape.channels, shape.channels)
    flops = 2 * 9 * shape.batch * shape.height * shape.width * shape.channels**2
    for stages in (2, 3):
        what = f"forward {shape} {precision}, {stages} stages"
        with on_trial(FORWARD.kernel, replace(tiles, stages=stages)):
            run = tune.calls(OPS["deform_conv2d"], (), shape, precision, device)
            run()
            kernels = [kernel for kernel in loaded_kernels() if kernel.metadata.num_stages == stages]
            predicted, step = max((_by_issue(kernel, flops) for kernel in kernels), default=("", ""))
            shared = f"shared: {[kernel.metadata.shared for kernel in kernels]} bytes{step}" if kernels else ""
            yield Row("forward", f"{what}, as loaded", _milliseconds(run), "ms", predicted, BY_ISSUE, shared)
            for split in ("what one program needs", "all shared memory"):
                try:
                    if not kernels:
                        raise RuntimeError("nothing was compiled")
                    shares = [enough(kernel) if split.startswith("what") else 100 for kernel in kernels]
                    for kernel, percent in zip(kernels, shares, strict=True):
                        prefer(kernel, percent)
                    value, note = _milliseconds(run), f"carve-outs: {shares} %"
                except RuntimeError as error:
                    value, note = None, f"not measured: {error}"
                yield Row("forward", f"{what}, carve-out: {split}", value, "ms", predicted, BY_ISSUE, note)
            for kernel in kernels:
                prefer(kernel, DRIVERS_CHOICE)


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """PyTorch's deterministic algorithms, without the filling of fresh memory that finds mistakes."""
    settings: Any = torch.utils.deterministic
    fill, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        settings.fill_uninitialized_memory = fill


def input_gradient() -> Found:
    """The input's gradient by atomic additions and by the inverse index."""
    precision, shapes, device = _sizes()
    for shape in shapes[:3]:
        share = shape.height * shape.width / (100 * 168)
        for index, (least, most) in ((False, (1040, 3890)), (True, (540, 540))):
            predicted = " to ".join(f"{share * us / 1e3:.3f}" for us in dict.fromkeys((least, most)))
            with _deterministic(index):
                value = _milliseconds(tune.calls(OPS["deform_conv2d"], ("input",), shape, precision, device))
            what = f"input's gradient {shape} {precision}, by {'the inverse index' if index else 'atomic additions'}"
            yield Row("input-gradient", what, value, "ms", predicted, "least times in docs/kernels/predictions.md")


def tuning() -> Found:
    """One step of the search for tiles, for a rehearsal of it; `kernels.bench.tune` is what searches."""
    precision, shapes, device = _sizes()
    quick = patch.object(tune, "seconds_per_call", lambda call: _milliseconds(call) / 1e3)
    with quick, patch.dict(tune.CHOICES, {"warps": (4, 8)}, clear=True):
        row = tune.tune(FORWARD, (), precision, torch.device(device), shapes[:1])
    yield Row("tune", row["kernel"], row["ms"], "ms", f"{row['ms_before']:.3f}", "before")


PROBES = {"roofs": roofs, "gathers": gathers, "forward": forward, "input-gradient": input_gradient, "tuning": tuning}


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    parser = argparse.ArgumentParser("python -m kernels.bench.session.probes", description=__doc__.split("\n\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("names", nargs="+", choices=PROBES)
    options = parser.parse_args(arguments)
    if not INTERPRET and default_device().type != "cuda":
        parser.error("torch sees no GPU")
    with use_backend("triton"):
        for row in (row for name in options.names for row in PROBES[name]()):
            append(options.directory / FILE, vars(row) | {"rehearsed": INTERPRET})
            print(f"{row.what}: {row.value} {row.unit} (predicted: {row.predicted or 'nothing'})", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
