"""Shapes at which deformable convolutions go wrong, and how closely an implementation must follow float64."""

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import deform_conv2d
from kernels.deform_conv.cpu_plan import output_size
from kernels.deform_conv.operator import reference

NAMES = ("input", "offset", "weight", "bias", "mask")


@dataclass(frozen=True)
class Case:
    """One configuration; `why` says what it catches."""

    id: str
    why: str
    batch: int = 2
    channels: int = 6
    outputs: int = 5
    size: tuple[int, int] = (5, 7)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    offset_groups: int = 1
    masked: bool = True
    biased: bool = True
    spread: float = 1.5  # standard deviation of the offsets, in pixels

    def inputs(self, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> dict[str, Tensor | None]:
        """Random tensors by argument name, made in float64 on the CPU and rounded."""
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        axes = (self.size, self.kernel, self.stride, self.padding, self.dilation)
        out = [output_size(*axis) for axis in zip(*axes, strict=True)]
        points = self.offset_groups * self.kernel[0] * self.kernel[1]
        tensors = {
            "input": random(self.batch, self.channels, *self.size),
            "offset": self.spread * random(self.batch, 2 * points, *out),
            "weight": random(self.outputs, self.channels // self.groups, *self.kernel),
            "bias": random(self.outputs) if self.biased else None,
            "mask": random(self.batch, points, *out).sigmoid() if self.masked else None,
        }
        return {name: None if x is None else x.to(device, dtype).requires_grad_() for name, x in tensors.items()}

    @property
    def geometry(self) -> dict[str, tuple[int, int]]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}


CASES = [
    Case("plain", "the ordinary 3x3 convolution at odd sizes"),
    Case("one-pixel", "every tap but one lies outside a 1x1 map", size=(1, 1)),
    Case("column", "a map one pixel wide: both x neighbours are borders", size=(9, 1), spread=0.7),
    Case("tall", "17 rows: one more than a tile of the interpreter", batch=1, size=(17, 18), channels=2, outputs=2),
    Case("strides", "everything differs between y and x, and the size is even",
         size=(8, 10), kernel=(2, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 3)),
    Case("one-tap", "a 1x1 kernel without padding: a single step", kernel=(1, 1), padding=(0, 0)),
    Case("wide-padding", "whole lines of the output see nothing but padding", padding=(4, 3), size=(3, 4)),
    Case("offset-groups", "channels of one block must not mix offset groups", kernel=(2, 2), offset_groups=3),
    Case("weight-groups", "channels of one block must not mix weight groups", kernel=(2, 2), groups=3, outputs=6),
    Case("both-groups", "three weight groups over two offset groups: neither divides the other",
         batch=1, size=(3, 4), kernel=(2, 3), groups=3, offset_groups=2, outputs=6),
    Case("unmodulated", "no mask and no bias (version 1 of the operator)", masked=False, biased=False),
    Case("far", "most samples lie outside, by far more than the map", spread=50.0),
    Case("many-channels", "several blocks of channels, the last one not full", batch=1, channels=70, size=(3, 4)),
    Case("many-outputs", "more outputs than one program holds", batch=1, outputs=260, channels=3, size=(2, 3)),
]  # fmt: skip


def gradients(function: Callable[..., Tensor], inputs: dict[str, Tensor | None], geometry) -> dict[str, Tensor]:
    """The output, and the gradient of every input for a fixed random cotangent."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items() if x is not None}
    output = function(**(dict.fromkeys(NAMES) | leaves), **geometry)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    found = torch.autograd.grad(output, list(leaves.values()), cotangent.to(output))
    return {"output": output.detach()} | dict(zip(leaves, found, strict=True))


def check(
    function: Callable[..., Tensor], case: Case, dtype: torch.dtype, device: str = "cpu", rounding: float | None = None
) -> None:
    """Compare with the reference in float64 on the same numbers.

    The error may be twice what the reference loses in the same precision, and a few roundings of the largest number:
    more of them in float64, where the reference has nothing to lose and the order of its sums is another. In 16 bits it
    may be what the reference loses, or two roundings of the largest number. `rounding` is that of the products, where
    it is not that of the type.
    """
    inputs = case.inputs(dtype, device=device)
    exact = {name: None if x is None else x.double() for name, x in inputs.items()}
    expected = gradients(reference, exact, case.geometry)
    plain = gradients(reference, inputs, case.geometry)
    found = gradients(function, inputs, case.geometry)
    few = 64 if dtype == torch.float64 else 4
    for name, value in expected.items():
        assert found[name].dtype == dtype and found[name].shape == value.shape, name
        error, lost = ((x[name].double() - value).abs().max().item() for x in (found, plain))
        unit = (rounding or torch.finfo(dtype).eps) * value.abs().max().item()
        limit = max(lost, unit) if dtype.itemsize == 2 else 2 * lost + few * unit
        # Not `error > limit`, which NaN passes.
        assert error <= limit, f"{case.id} {name}: error {error:.3g}, allowed {limit:.3g}"


def check_sample(dtype: torch.dtype, device: str = "cpu") -> None:
    """Mean squared errors of masked samples in 16 bits: less than those of the reference, whose steps are rounded.

    The weight is an identity, so that an output is a sample.
    """
    case = Case("", "", batch=1, channels=64, outputs=64, size=(16, 16), kernel=(1, 1), padding=(0, 0), biased=False)
    inputs = case.inputs(dtype, device=device)
    with torch.no_grad():
        inputs["weight"].copy_(torch.eye(64)[:, :, None, None])
        expected = reference(**{name: x if x is None else x.double() for name, x in inputs.items()})
        error, lost = ((f(**inputs).double() - expected).norm().item() ** 2 for f in (deform_conv2d, reference))
    assert error <= 0.95 * lost, f"squared error {error:.3g}, of the reference {lost:.3g}"


def check_golden(function: Callable[..., Tensor], vectors: dict, dtype: torch.dtype) -> None:
    """Compare with one file of golden vectors: ten times the error of mmcv in float32, or rounding in float64."""
    meta = json.loads(str(vectors["meta"]))
    names = {"x": "input", "offset": "offset", "weight": "weight", "bias": "bias", "mask": "mask"}
    inputs = {arg: torch.tensor(vectors[key]).to(dtype) for key, arg in names.items() if key in vectors}
    geometry = {name: (meta[name],) * 2 for name in ("stride", "padding", "dilation")}
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    output = function(**(dict.fromkeys(NAMES) | leaves), **geometry)
    found = torch.autograd.grad(output, list(leaves.values()), torch.tensor(vectors["grad_y"]).to(dtype))
    keys = [f"grad_{key}" for key in names if key in vectors]
    results = {"y": output} | dict(zip(keys, found, strict=True))
    for key, value in results.items():
        expected = torch.tensor(vectors[key]).double()
        error = (value.double() - expected).abs().max().item()
        if dtype == torch.float32:
            limit = 10 * meta["max_abs_diff_vs_mmcv64"]["mmcv32"][key]
        else:
            # The C=256 file is stored in float32.
            limit = 1e-13 * expected.abs().max().item() * (1 if vectors[key].dtype == "float64" else 1e6)
        assert error <= limit, f"{key}: error {error:.3g}, allowed {limit:.3g}"
