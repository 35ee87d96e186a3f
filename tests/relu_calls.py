"""Calls of the dynamic ReLU: with a NaN in one place, malformed ones, and extreme ones to be checked."""

import torch
from torch import Tensor

from kernels import dynamic_relu
from kernels.dynamic_relu import dynamic_relu_reference

PLACES = ("input", "a1", "b1", "a2", "b2", "cotangent")


def gradients(function, input: Tensor, coefficients: Tensor, cotangent: Tensor) -> list[Tensor]:
    """The output, and both gradients for the cotangent."""
    input, coefficients = input.detach().requires_grad_(), coefficients.detach().requires_grad_()
    output = function(input, coefficients)
    return [output.detach(), *torch.autograd.grad(output, (input, coefficients), cotangent)]


def check_nan(place: str, dtype: torch.dtype) -> None:
    """A NaN in one of `PLACES` reaches what it reaches in the definition; numbers are exact, and some lines meet."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"input": (2, 3, 2, 3), "coefficients": (2, 4, 3), "cotangent": (2, 3, 2, 3)}
    values = {n: torch.randint(-2, 3, s, generator=generator).to(dtype) for n, s in shapes.items()}
    if place in ("input", "cotangent"):
        values[place][0, 1, 1, 0] = torch.nan
    else:
        values["coefficients"][0, PLACES.index(place) - 1, 1] = torch.nan
    found = gradients(dynamic_relu, **values)
    expected = gradients(dynamic_relu_reference, **{name: x.double() for name, x in values.items()})
    assert expected[0].isnan().any() or expected[1].isnan().any()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.to(dtype), rtol=0, atol=0, equal_nan=True)
