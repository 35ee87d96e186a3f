"""The roofs of this machine, measured: how fast it copies memory, multiplies matrices and convolves.

    python -m kernels.bench.roofline [--device cuda]

A benchmark that says "per cent of the roof" takes the roof from here, in the same process.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from tabulate import tabulate

from kernels.bench.op import Shape, pyramid

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronised_clock() -> float:
    """Seconds, read once the GPU has finished what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_per_call(call: Callable[[], object], at_least: float = 0.02, repeats: int = 7) -> float:
    """Median time of a call; each of `repeats` measurements runs it often enough to last `at_least` seconds."""
    call()
    start = synchronised_clock()
    call()
    calls = max(1, int(at_least / max(synchronised_clock() - start, 1e-6)))
    times = []
    for _ in range(repeats):
        start = synchronised_clock()
        for _ in range(calls):
            call()
        times.append((synchronised_clock() - start) / calls)
    return statistics.median(times)


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Inside the `with` block PyTorch multiplies and convolves float32 tensors in TF32 if `precision` says so."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def copy_bytes_per_second(device: torch.device) -> float:
    """Bandwidth of copying a tensor far larger than the caches, bytes read and bytes written both counted."""
    source = torch.ones((512 if device.type == "cuda" else 64) * 2**20, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_per_call(lambda: target.copy_(source))


def matmul_flops_per_second(device: torch.device, precision: str) -> float:
    """Rate of one large square matrix product in one of `DTYPES`."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, dtype=DTYPES[precision], device=device) for _ in range(2))
    with float32_products(precision):
        return 2 * size**3 / seconds_per_call(lambda: a @ b)


def convolution_flops_per_second(device: torch.device, precision: str, shape: Shape) -> float:
    """Rate of a dense channels-last 3x3 convolution that keeps the shape and the number of channels."""
    size = (shape.batch, shape.channels, shape.height, shape.width)
    x, weight = (
        torch.randn(s, dtype=DTYPES[precision], device=device).to(memory_format=torch.channels_last)
        for s in (size, (shape.channels, shape.channels, 3, 3))
    )
    flops = 2 * shape.batch * shape.height * shape.width * weight.numel()
    with float32_products(precision):
        return flops / seconds_per_call(lambda: F.conv2d(x, weight, padding=1))


def machine_line(device: torch.device) -> str:
    """Device, threads, driver and versions in one line."""
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, {'HIP' if torch.version.hip else 'CUDA'} "
        name += str(torch.version.hip or torch.version.cuda)
    else:
        name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m kernels.bench.roofline", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", type=torch.device, default=default_device(), help="default: %(default)s")
    device = parser.parse_args(arguments).device
    gpu = device.type == "cuda"
    rows = [["copy", "", f"{copy_bytes_per_second(device) / 1e9:.1f} GB/s"]]
    shape = pyramid(batch=8)[0] if gpu else Shape("16x16", 8, 64, 16, 16)
    for precision in DTYPES if gpu else ("fp32",):
        rows.append(["matmul", precision, f"{matmul_flops_per_second(device, precision) / 1e12:.3f} TFLOP/s"])
        rate = convolution_flops_per_second(device, precision, shape)
        rows.append([f"conv 3x3 {shape}, {shape.channels} channels", precision, f"{rate / 1e12:.3f} TFLOP/s"])
    print(f"{machine_line(device)}\n\n{tabulate(rows, headers=['roof', 'precision', 'measured'], tablefmt='github')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
