"""What the Triton path may lose in 16 bits, measured by what plain PyTorch loses."""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from kernels import use_backend


def check_half(run: Callable[[torch.dtype], dict[str, Tensor]], dtype: torch.dtype) -> None:
    """Compare with plain PyTorch in float64.

    The norm of the errors may be that of plain PyTorch in 16 bits, or twice that of plain PyTorch in float32 with its
    results rounded to 16 bits, whichever is larger, and a quarter more, for rounding is chance. A weight and a bias
    count together: the error of a sum that is a single number is chance altogether.

    Args:
        run: Computes results by name from the same numbers, those of `dtype`, in the type that it is given.
        dtype: float16 or bfloat16.
    """
    with use_backend("torch"):
        exact, chain, wide = run(torch.float64), run(dtype), run(torch.float32)
    found = run(dtype)
    assert found.keys() == exact.keys()
    layers = defaultdict(list)
    for name, value in exact.items():
        errors = [(x[name].to(dtype).double() - value).norm() ** 2 for x in (found, chain, wide)]
        layers[name.removesuffix(".weight").removesuffix(".bias")].append(torch.stack(errors))
    for name, errors in layers.items():
        error, lost, least = sum(errors).sqrt().tolist()
        limit = 1.25 * max(lost, 2 * least)
        # Not `error > limit`, which NaN passes.
        assert error <= limit, f"{name}: error {error:.3g}, PyTorch's {lost:.3g}, in float32 {least:.3g}"
