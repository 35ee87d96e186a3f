"""How large the pieces of the convolution kernels are, and how they multiply.

Every kernel has a `Table`, chosen without a GPU. Where `python -m kernels.bench.tune` has measured a better choice on
the present device with the present Triton, that choice stands in `kernels/tuned/<device>.json` and is taken instead. It
is read once and only looked up afterwards: nothing is ever timed while a model runs.
"""

import json
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import triton

from kernels.backend import INTERPRET

TUNED = Path(__file__).parents[1] / "tuned"


@dataclass(frozen=True)
class Tiles:
    """Sizes of a program: output pixels, input and output channels, warps, stages of the pipeline."""

    height: int
    width: int
    c: int
    o: int
    warps: int
    stages: int


class Table(dict[str, Tiles]):
    """The tiles of a kernel for every class of type, see `type_class`; `kernel` is its name in tuned files.

    A key may name a `family` of GPUs behind the class, for tiles of its own.
    """

    def __init__(self, kernel: str, tiles: dict[str, Tiles]):
        super().__init__(tiles)
        self.kernel = kernel

    def of(self, kind: str, family: str) -> Tiles:
        """The tiles for a class of type on a family of GPUs."""
        return self.get(f"{kind} {family}") or self[kind]


# (kernel, class of type, input channels, output channels)
Key = tuple[str, str, int, int]
_on_trial: dict[str, Tiles] = {}


# Triton's own are made for kernels as well, and cost as much as a launch.
def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_2(number: int) -> int:
    """The least power of two that is no less than a positive number."""
    return 1 << (number - 1).bit_length()


def precision(dtype: torch.dtype, device: torch.device) -> str:
    """How products of float32 are made: as PyTorch's own convolutions are told to make them."""
    if dtype != torch.float32 or _float32_products() != "tf32":
        return "ieee"
    if family(device) == "mfma" and device.type == "cuda" and not _has_tf32(device):
        return "ieee"
    return "tf32"


def _has_tf32(device: torch.device) -> bool:
    return torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx94")


def packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a GPU adds and multiplies two numbers of a 16-bit type at once, each rounded."""
    return dtype.itemsize == 2 and not (dtype == torch.bfloat16 and family(device) == "mfma")


def choices(dtype: torch.dtype) -> Hashable:
    """What `fit` and `precision` depend on for tensors of `dtype`, besides their arguments."""
    return tuple(_on_trial.items()), _float32_products() if dtype == torch.float32 else ""


def _float32_products() -> str:
    # The module is made when it is imported, which a type checker does not see.
    products: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return products


def type_class(dtype: torch.dtype, device: torch.device) -> str:
    """ "16" for 16-bit tensors, "32" for products of float32 on tensor cores, "exact" for all others.

    The others are float64, and float32 where its products must not be rounded and the tensor cores would.
    """
    if dtype.itemsize == 2:
        return "16"
    if INTERPRET or precision(dtype, device) == "tf32" or (family(device) == "mfma" and dtype == torch.float32):
        return "32"
    return "exact"


def family(device: torch.device) -> str:
    """How a GPU multiplies matrices.

    "wgmma" for groups of warps that read shared memory (compute capability 9.x and 10.x), "mma" for single warps, on
    multiprocessors that may have no more than 99 KiB of it, "mfma" for AMD's. Elsewhere "wgmma".
    """
    if _assumed:
        return _assumed[-1]
    if torch.version.hip:
        return "mfma"
    known = device.type == "cuda" and torch.cuda.is_available()
    if known and torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return "mma"
    return "wgmma"


_assumed: list[str] = []


@contextmanager
def assuming(name: str) -> Iterator[None]:
    """Inside the `with` block tiles are those for a `family`, whatever GPU is here."""
    _assumed.append(name)
    try:
        yield
    finally:
        _assumed.pop()


def fit(table: Table, dtype: torch.dtype, device: torch.device, span: int, o: int) -> Tiles:
    """The tiles of a kernel for tensors of `dtype`, no larger than `span` input and `o` output channels need.

    Raises:
        ValueError: the file of tuned tiles for this device is broken; the message names it.
    """
    kind = type_class(dtype, device)
    tiles = (
        _on_trial.get(table.kernel)
        or _tuned(device).get((table.kernel, kind, span, o))
        or table.of(kind, family(device))
    )
    # A product needs at least 16 of each.
    c, o = (min(most, max(16, power_of_2(size))) for most, size in ((tiles.c, span), (tiles.o, o)))
    # The interpreter's time is that of its programs' number, hardly of their size; a warp has 16 pixels, as on a GPU.
    height, width, warps = (16, 16, 16) if INTERPRET else (tiles.height, tiles.width, tiles.warps)
    return Tiles(height, width, c, o, warps, tiles.stages)


@contextmanager
def on_trial(kernel: str, tiles: Tiles) -> Iterator[None]:
    """Inside the `with` block the kernel of this name runs with these tiles."""
    _on_trial[kernel] = tiles
    try:
        yield
    finally:
        del _on_trial[kernel]


def tuned_file(device_name: str) -> Path:
    """Where the tuned tiles of a device lie."""
    return TUNED / f"{'_'.join(device_name.split()).replace('/', '_')}.json"


def read_tuned(path: Path, device_name: str) -> dict[Key, Tiles]:
    """The tiles in a file that `kernels.bench.tune` wrote, if it wrote it on such a device with this version of Triton.

    Raises:
        ValueError: it is not such a file; the message names it.
    """
    try:
        content = json.loads(path.read_text())
        found = {
            (row["kernel"], row["class"], int(row["channels"]), int(row["outputs"])): Tiles(**row["tiles"])
            for row in content["rows"]
        }
        fits = (content["device"], content["triton"]) == (device_name, triton.__version__)
        if not all(type(size) is int and size > 0 for tiles in found.values() for size in vars(tiles).values()):
            raise ValueError("a size of a tile is no positive integer")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{path} is no file of tuned tiles: {error!r}; delete it or run kernels.bench.tune again"
        raise ValueError(reason) from error
    return found if fits else {}


@cache
def _tuned(device: torch.device) -> dict[Key, Tiles]:
    if device.type != "cuda":
        return {}
    name = torch.cuda.get_device_name(device)
    path = tuned_file(name)
    return read_tuned(path, name) if path.exists() else {}
