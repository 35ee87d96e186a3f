"""What operations cost on GPUs: time on one at a share of its peak, and on several that run cells side by side."""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

# Dense peaks by their vendors' data sheets, 10^12 operations a second: of bf16 with float32 sums, and of TF32, in which
# float32 convolutions run. Found by the words of a device's name; the first of these that are all in it counts.
PEAKS = {
    "B200": (2250.0, 1125.0),
    "H200 NVL": (835.0, 418.0),
    "H200": (989.0, 494.0),
    "H100 PCIe": (756.0, 378.0),
    "H100 NVL": (835.0, 418.0),
    "H100": (989.0, 494.0),
    "A100": (312.0, 156.0),
    "L40S": (362.0, 183.0),
    "L4": (121.0, 60.0),
    "RTX 4090": (165.0, 82.6),
    "RTX 3090": (71.0, 35.6),
    "MI325X": (1307.0, 653.0),
    "MI300X": (1307.0, 653.0),
}
# The share of its peak that a GPU is taken to reach; nothing here has measured it. Norms, activations and samples move
# memory and count no operations, so it is far from that of a matrix product.
SHARE = 0.1


@dataclass(frozen=True)
class Gpu:
    """A GPU that hours are told for.

    Attributes:
        name: As it calls itself.
        peaks: Of bf16 and of float32, 10^12 operations a second.
        memory: Bytes.
        assumed: Why it is this one, where it is not the one that is here; else empty.
    """

    name: str
    peaks: tuple[float, float]
    memory: float
    assumed: str = ""

    def peak(self, precision: str) -> float:
        """Operations a second in `"bf16"` or `"fp32"`."""
        return 1e12 * self.peaks[precision != "bf16"]


DEFAULT = Gpu("H100 SXM", PEAKS["H100"], 80e9)


def peaks_of(name: str) -> tuple[float, float] | None:
    """The entry of `PEAKS` for a device that calls itself so; None where there is none.

    Example:
        >>> peaks_of("NVIDIA H100 80GB HBM3"), peaks_of("NVIDIA L40"), peaks_of("NVIDIA A100-SXM4-80GB")
        ((989.0, 494.0), None, (312.0, 156.0))
    """
    words = {*name.replace("-", " ").split()}
    return next((peaks for entry, peaks in PEAKS.items() if words >= {*entry.split()}), None)


def gpu(device: str) -> Gpu:
    """The GPU that a run on `device` would use, or an H100 where there is none or its peak is not known."""
    if device == "cpu" or not torch.cuda.is_available():
        return replace(DEFAULT, assumed="want of a GPU")
    here = torch.cuda.get_device_properties(device)
    peaks = peaks_of(here.name)
    if peaks is None:
        return replace(DEFAULT, assumed=f"want of {here.name}'s peak")
    return Gpu(here.name, peaks, here.total_memory)


def makespan(seconds: Iterable[float], gpus: int) -> float:
    """How long cells take side by side, each on one of so many GPUs: the longest first, each where it can begin first.

    Example:
        >>> makespan([5, 4, 3, 3, 3], 2), makespan([5, 1], 8)
        (10.0, 5.0)
    """
    ends = [0.0] * gpus
    for taken in sorted(seconds, reverse=True):
        heapq.heapreplace(ends, ends[0] + taken)
    return max(ends)


def span(seconds: float) -> str:
    """Days and hours, hours and minutes, or minutes, whichever says it in two numbers.

    Example:
        >>> span(200_000), span(7_500), span(20)
        ('2 d 8 h', '2 h 5 min', '0 min')
    """
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h"
