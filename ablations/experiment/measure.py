"""What a detector costs: parameters, multiply-adds, images per second, latency and memory."""

import time
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from heads.detector import Detector
from kernels import use_backend

# A percentile of fewer runs means little; a budget of seconds is overdrawn rather than undercut.
LEAST_RUNS = 5
MOST_RUNS = 1000


class Speed(TypedDict):
    """What `measure_latency` measures.

    Attributes:
        images_per_s: The batch's size over the median time of a batch.
        latency_ms_p50, latency_ms_p90: Percentiles at batch size 1.
        peak_memory_MB: Weights and what the batch needs beside them, in 10^6 bytes; None on a CPU.
        batch_size_measured: Images in the batch.
        threads: PyTorch's, on the CPU.
    """

    images_per_s: float
    latency_ms_p50: float
    latency_ms_p90: float
    peak_memory_MB: float | None
    batch_size_measured: int
    threads: int


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, frozen ones included, shared ones once. Statistics of frozen norms are no parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


class _Raw(nn.Module):
    """The part of a detector whose cost does not depend on what is in the image."""

    def __init__(self, model: Detector):
        super().__init__()
        self.model = model

    def forward(self, images: list[Tensor]) -> Any:
        outputs = self.model.raw(self.model.batch(images))
        # A second stage costs the same for any full list of proposals.
        self.model.head.full_image(outputs)
        return outputs


class _Uncounted(TorchDispatchMode):
    """Notes operators outside PyTorch's own that have no FLOP formula: the counter would take them for free."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func.namespace not in ("aten", "prim", "prims", "profiler") and func._overloadpacket not in flop_registry:
            self.names.add(str(func._overloadpacket))
        return func(*args, **(kwargs or {}))


def count_gmacs(model: Detector, images: Sequence[Tensor]) -> float:
    """10^9 multiply-adds an image of backbone, pyramid, trunk and prediction head; of a second stage for all proposals.

    Convolutions and matrix products count; elementwise work, target assignment and NMS do not, as in the paper's
    Table 2 (whose "GFLOPs" are multiply-adds). Nothing is computed: weights and images are replaced by tensors without
    memory, so an 800 × 1344 image costs neither time nor space, and the count is the same for every device and backend.

    Args:
        model: A detector on any device, also on `meta`.
        images: (3, H, W) each, of any dtype and device; only their shapes matter. Padded as the detector pads them.

    Raises:
        RuntimeError: An operator of ours has no FLOP formula (`torch.utils.flop_counter.register_flop_formula`).
    """
    raw = _Raw(model)
    # Each slot of each module once. A module that is reached by two names must not be swapped twice: functional_call
    # would put the second stand-in back as if it were the original.
    state = {
        f"{prefix}.{name}": value
        for prefix, module in raw.named_modules()
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    }
    counter = FlopCounterMode(display=False)
    uncounted = _Uncounted()
    # Fake tensors say that they are on a CPU, whatever the model is on, and take the separate operators: fused kernels
    # are launched behind PyTorch's back, where the counter does not see them.
    with torch.no_grad(), torch.device("cpu"), use_backend("torch"), FakeTensorMode(), counter, uncounted:
        fakes = {name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) for name, x in state.items()}
        inputs = [torch.empty(image.shape, dtype=image.dtype) for image in images]
        functional_call(raw, fakes, (inputs,), tie_weights=False)
    if uncounted.names:
        raise RuntimeError(f"no FLOP formula is registered for {', '.join(sorted(uncounted.names))}")
    return counter.get_total_flops() / 2 / 1e9 / len(images)


def measure_latency(
    model: nn.Module, images: Sequence[Tensor], device: torch.device | str, seconds: float = 0.8
) -> Speed:
    """Speed from image tensors on the device to boxes after NMS, on a synchronised clock after a warm-up.

    Call it while nothing else runs (`ablations.experiment.room`), inside the autocast of the cell's precision if it has
    one.

    Args:
        model: A detector on `device`; put into evaluation mode for the while.
        images: (3, H, W) each; all of them together are the batch of `images_per_s`, one after another the batches of
            the latency.
        device: Where to measure.
        seconds: Time for each of the two measurements; at least 5 runs are made of each, however long they take.
    """
    device = torch.device(device)
    images = [image.to(device) for image in images]
    before = _start_memory(device)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            batches = _time(model, [images], device, seconds)
            singles = _time(model, [[image] for image in images], device, seconds)
    finally:
        model.train(training)
    return {
        "images_per_s": len(images) / float(np.median(batches)),
        "latency_ms_p50": 1e3 * float(np.percentile(singles, 50)),
        "latency_ms_p90": 1e3 * float(np.percentile(singles, 90)),
        "peak_memory_MB": _peak_memory(model, device, before),
        "batch_size_measured": len(images),
        "threads": torch.get_num_threads(),
    }


def _time(model: nn.Module, inputs: list[list[Tensor]], device: torch.device, seconds: float) -> list[float]:
    """Seconds of single runs, the inputs taken in turn."""
    # Every input once and a quarter of the budget: shapes differ, and kernels are chosen or compiled by shape.
    began = time.perf_counter()
    warmed = 0
    while warmed < len(inputs) or (time.perf_counter() - began < seconds / 4 and warmed < MOST_RUNS):
        model(inputs[warmed % len(inputs)])
        _synchronize(device)
        warmed += 1
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < LEAST_RUNS or (time.perf_counter() - began < seconds and len(times) < MOST_RUNS):
        _synchronize(device)
        start = time.perf_counter()
        model(inputs[len(times) % len(inputs)])
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return times


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _start_memory(device: torch.device) -> int:
    """Bytes in use now; the peak is counted from here."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak_memory(model: nn.Module, device: torch.device, before: int) -> float | None:
    if device.type != "cuda":
        return None
    # What training left behind (gradients, a data loader's tensors) is not the detector's need.
    weights = sum(value.numel() * value.element_size() for value in [*model.parameters(), *model.buffers()])
    return (torch.cuda.max_memory_allocated(device) - before + weights) / 1e6
