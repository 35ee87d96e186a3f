"""One record for each operator: what its tests compare, its benchmarks time and its tables count."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernels.deform_conv import operator as deform_conv
from kernels.dynamic_relu import operator as dynamic_relu

MODES = ("forward", "backward", "both")
# The same under PyTorch's deterministic algorithms, where that makes a difference.
DETERMINISTIC = ("deterministic-backward", "deterministic-both")


def plain_mode(mode: str) -> str:
    """The one of `MODES` that a mode is, deterministic or not."""
    return mode.removeprefix("deterministic-")


@dataclass(frozen=True)
class Shape:
    """One feature map: `name` is its pyramid level."""

    name: str
    batch: int
    channels: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.name}-b{self.batch}"


def pyramid(batch: int, channels: int = 256) -> list[Shape]:
    """P3 to P7 of an image of 800x1333 pixels, padded to a multiple of 32."""
    sizes = {"P3": (100, 168), "P4": (50, 84), "P5": (25, 42), "P6": (13, 21), "P7": (7, 11)}
    return [Shape(name, batch, channels, height, width) for name, (height, width) in sizes.items()]


@dataclass(frozen=True)
class Op:
    """An operator, its definition and its cost.

    Attributes:
        name: Of the public function.
        function: The operator, called with the tensors of `make_inputs` by name.
        reference: The definition in differentiable plain PyTorch, called alike.
        make_inputs: (shape, dtype, device, seed) -> the tensors by name, all differentiable; one is `input`.
        shared: Names of the tensors that all images of a batch share; the others have the batch in front.
        forward_flops: Floating-point operations of one forward call on such tensors.
        backward_ratio: Operations of the backward, as a multiple of the forward's.
        tolerance: How many times the error of the reference in the same precision the operator may have.
        steps_rounded: Whether in 16 bits the reference's error is that of its steps in that type, and none is exceeded;
            otherwise that of a reference in float32 whose results are rounded.
    """

    name: str
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    make_inputs: Callable[[Shape, torch.dtype, torch.device | str, int], dict[str, Tensor]]
    shared: tuple[str, ...]
    forward_flops: Callable[[dict[str, Tensor]], int]
    backward_ratio: float
    tolerance: float
    steps_rounded: bool

    def flops(self, inputs: dict[str, Tensor], mode: str) -> int:
        """Operations of a call in one of `MODES`."""
        factor = {"forward": 1, "backward": self.backward_ratio, "both": 1 + self.backward_ratio}[mode]
        return int(self.forward_flops(inputs) * factor)

    def bytes_moved(self, inputs: dict[str, Tensor], output: Tensor, mode: str) -> int:
        """Bytes that must cross the memory bus: every operand read once, every result written once.

        The backward reads the inputs and the gradient of the output, and writes a gradient of every input.
        """
        read, written = sum(x.nbytes for x in inputs.values()), output.nbytes
        return {"forward": read + written, "backward": 2 * read + written, "both": 3 * read + 2 * written}[mode]

    def errors(
        self,
        function: Callable[..., Tensor],
        inputs: dict[str, Tensor],
        within: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> dict[str, float]:
        """Largest error of the output and of every gradient, against the reference in float64.

        Each is relative to the largest magnitude of what it should be, so they are comparable across quantities. The
        scalar differentiated is the output's product with fixed random numbers. `function`, forward and backward, runs
        in the context that `within` makes, the reference outside of it.
        """
        cotangent = _cotangent(function, inputs)
        with within():
            found = _results(function, inputs, cotangent)
        expected = self._expected(inputs, cotangent)
        return {name: _relative_error(found[name], expected[name]) for name in found}

    def output_error(self, function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> float:
        """The error of the output alone, as in `errors`, of a `function` that has no gradients."""
        with torch.no_grad():
            return _relative_error(function(**inputs), self.reference(**{n: x.double() for n, x in inputs.items()}))

    def limits(self, inputs: dict[str, Tensor], floor: float) -> dict[str, float]:
        """What `errors` may be: `tolerance` times the reference's own in this precision, and `floor` on top.

        With `steps_rounded`, in 16 bits, the reference's own, or `floor` where that is less than the rounding of a
        result.
        """
        if self.steps_rounded and inputs["input"].dtype.itemsize == 2:
            return {name: max(error, floor) for name, error in self.errors(self.reference, inputs).items()}

        def rounded(**tensors: Tensor) -> Tensor:
            wide = {name: x.to(torch.promote_types(x.dtype, torch.float32)) for name, x in tensors.items()}
            return self.reference(**wide).to(tensors["input"].dtype)

        return {name: self.tolerance * error + floor for name, error in self.errors(rounded, inputs).items()}

    def _expected(self, inputs: dict[str, Tensor], cotangent: Tensor) -> dict[str, Tensor]:
        # Image by image: the reference keeps many intermediate maps, in float64.
        parts = []
        for i in range(cotangent.shape[0]):
            image = {n: (x if n in self.shared else x[i : i + 1]).detach().double() for n, x in inputs.items()}
            parts.append(_results(self.reference, image, cotangent[i : i + 1].double()))
        names = {name: [part[name] for part in parts] for name in parts[0]}
        return {n: sum(xs[1:], xs[0]) if n in self.shared else torch.cat(xs) for n, xs in names.items()}


def rounding(dtype: torch.dtype, terms: int) -> float:
    """The relative error that a sum of `terms` numbers has in any order: a random walk, and the rounding of the result.

    Sums are taken in float32, or in float64 for float64 tensors, which is what every operator here does.
    """
    accumulator = torch.promote_types(dtype, torch.float32)
    return torch.finfo(dtype).eps + terms**0.5 * torch.finfo(accumulator).eps


def _cotangent(function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = function(**inputs)
    generator = torch.Generator().manual_seed(output.numel())
    return torch.randn(output.shape, generator=generator).to(output)


def _results(function: Callable[..., Tensor], inputs: dict[str, Tensor], cotangent: Tensor) -> dict[str, Tensor]:
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    output = function(**inputs)
    gradients = torch.autograd.grad(output, list(inputs.values()), cotangent)
    return {"output": output.detach()} | dict(zip(inputs, gradients, strict=True))


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def _random(seed: int) -> Callable[..., Tensor]:
    # Made on the CPU, so that every device is given the same numbers.
    generator = torch.Generator().manual_seed(seed)
    return lambda *size: torch.randn(size, generator=generator)


def _deform_conv2d_inputs(shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int) -> dict[str, Tensor]:
    # Offsets of some pixels, as trained heads have them, and masks between 0 and 1. The offset's gradient jumps where a
    # coordinate is an integer, so a coordinate that rounding moves across one has another gradient altogether: odd
    # sixteenths never come near, and are the same number in every type.
    n, c, h, w, random = shape.batch, shape.channels, shape.height, shape.width, _random(seed)
    inputs = {
        "input": random(n, c, h, w),
        "offset": (16 * random(n, 18, h, w)).floor().add(0.5).div(8).clamp(-15.9375, 15.9375),
        "weight": random(c, c, 3, 3) / (9 * c) ** 0.5,
        "mask": random(n, 9, h, w).sigmoid(),
    }
    return {k: x.to(device, dtype, memory_format=torch.channels_last).requires_grad_() for k, x in inputs.items()}


def _dynamic_relu_inputs(shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int) -> dict[str, Tensor]:
    # The ranges that a hard sigmoid leaves: slopes in [0, 2] and [-1, 1], intercepts in [-0.5, 0.5].
    n, c, random = shape.batch, shape.channels, _random(seed)
    input = random(n, c, shape.height, shape.width).to(device, dtype, memory_format=torch.channels_last)
    centre, width = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([1.0, 0.5, 1.0, 0.5])
    coefficients = centre[:, None] + width[:, None] * random(n, 4, c).clamp(-1, 1)
    return {"input": input.requires_grad_(), "coefficients": coefficients.to(device, dtype).requires_grad_()}


def _deform_conv2d_flops(inputs: dict[str, Tensor]) -> int:
    n, _, h, w = inputs["offset"].shape
    return 2 * n * h * w * inputs["weight"].numel()


OPS = {
    op.name: op
    for op in (
        Op(
            name="deform_conv2d",
            function=partial(deform_conv.deform_conv2d, padding=(1, 1)),
            reference=partial(deform_conv.reference, padding=(1, 1)),
            make_inputs=_deform_conv2d_inputs,
            shared=("weight",),
            forward_flops=_deform_conv2d_flops,
            # The products for the gradients of the samples and of the weight; the interpolation is left out, as in
            # forward.
            backward_ratio=2,
            tolerance=2,
            steps_rounded=True,
        ),
        Op(
            name="dynamic_relu",
            function=dynamic_relu.dynamic_relu,
            reference=dynamic_relu.reference,
            make_inputs=_dynamic_relu_inputs,
            shared=(),
            # Two products and two sums; backward: which line (2), its share (2), the input (3), four sums (6).
            forward_flops=lambda inputs: 4 * inputs["input"].numel(),
            backward_ratio=13 / 4,
            tolerance=2,
            steps_rounded=False,
        ),
    )
}
