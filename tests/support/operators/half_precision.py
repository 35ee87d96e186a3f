"""What the Triton path may lose in 16 bits, measured by what plain PyTorch loses."""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels import use_backend

Run = Callable[[torch.dtype], tuple[Sequence[Tensor], dict[str, Tensor]]]


def check_half(run: Run, dtype: torch.dtype, few: Sequence[str] = ()) -> None:
    """Compare outputs, and gradients for random cotangents, with plain PyTorch in float64.

    The norm of the errors may be that of plain PyTorch in 16 bits, or twice that of plain PyTorch in float32 with its
    results rounded to 16 bits, whichever is larger, and a quarter more, for rounding is chance. A weight and a bias
    count together, and so do a block's three branches: the error of a sum of few numbers is chance altogether.

    Args:
        run: Makes outputs from the same numbers, those of `dtype`, in the type that it is given, and says by name what
            to differentiate them in.
        dtype: float16 or bfloat16.
        few: Layers whose gradients are made of some numbers only, each a sum that cancels; they may lose four times as
            much, not a quarter more.
    """
    with use_backend("torch"):
        exact, *lost = (_results(run(other), dtype) for other in (torch.float64, dtype, torch.float32))
    found = _results(run(dtype), dtype)
    assert found.keys() == exact.keys()
    layers = defaultdict(list)
    for name, value in exact.items():
        errors = [(x[name].to(dtype).double() - value).norm() ** 2 for x in (found, *lost)]
        layer = re.sub(r"from_(same|finer|coarser)", "from_all", name.removesuffix(".weight").removesuffix(".bias"))
        layers[layer].append(torch.stack(errors))
    for name, errors in layers.items():
        error, lost, least = sum(errors).sqrt().tolist()
        limit = (4 if name in few else 1.25) * max(lost, 2 * least)
        # Not `error > limit`, which NaN passes.
        assert error <= limit, f"{name}: error {error:.3g}, PyTorch's {lost:.3g}, in float32 {least:.3g}"


def _results(made: tuple[Sequence[Tensor], dict[str, Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
    outputs, leaves = made
    generator = torch.Generator().manual_seed(2)
    # Rounded to the same numbers in every type.
    cotangents = [torch.randn(y.shape, generator=generator).to(dtype).to(y) for y in outputs]
    # With a single level the neighbours' weights are not used.
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)} | dict(zip(leaves, grads, strict=True))
    return {name: x for name, x in found.items() if x is not None}
