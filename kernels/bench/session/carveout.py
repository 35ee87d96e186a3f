"""How a multiprocessor's memory is split between shared memory and the L1 cache, asked for kernel by kernel.

Triton asks the driver to prefer shared memory for every kernel that takes more than 48 KiB of it, and a gather wants
the L1 cache. The driver takes a share as a hint, and may choose a larger one.
"""

import ctypes
import sys
from math import ceil
from typing import Any

import torch
from triton.runtime.jit import JITFunction

# CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT: per cent of the largest shared memory, or the driver's own choice.
_CARVEOUT = 9
DRIVERS_CHOICE = -1
# What the driver takes for itself of every program's shared memory.
_RESERVED = 1024


def loaded_kernels() -> list[Any]:
    """This package's compiled kernels that have been run on the present device; none under the interpreter."""
    found = {
        id(value): value
        for name, module in list(sys.modules.items())
        if name.startswith("kernels.")
        for value in vars(module).values()
        if isinstance(value, JITFunction)
    }
    # Of a device there are the kernels, their keys, and what compiles them.
    caches = [cache for function in found.values() for cache in function.device_caches.values()]
    return [kernel for cache in caches for kernel in cache[0].values()]


def enough(kernel: Any) -> int:
    """The least share in which one program of a compiled kernel has room, in per cent."""
    whole = torch.cuda.get_device_properties().shared_memory_per_multiprocessor
    return min(100, ceil(100 * (kernel.metadata.shared + _RESERVED) / whole))


def prefer(kernel: Any, percent: int) -> None:
    """Ask for a share of shared memory for a compiled kernel that has been run.

    Raises:
        RuntimeError: There is no CUDA driver, or it refuses.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise RuntimeError(f"no CUDA driver ({error})") from error
    status = driver.cuFuncSetAttribute(ctypes.c_void_p(kernel.function), _CARVEOUT, percent)
    if status:
        raise RuntimeError(f"cuFuncSetAttribute returns {status}")
