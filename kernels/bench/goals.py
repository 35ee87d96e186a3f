"""What the kernels should reach, as ratios of rows measured in one run, so that no clock of one machine matters."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Name:
    """What tells one row of the benchmarks from all others."""

    device: str
    op: str
    shape: str
    precision: str
    mode: str
    provider: str


@dataclass(frozen=True)
class Quantity:
    """A number of one row, or the quotient of the same number of two."""

    label: str
    field: str
    row: Name
    over: Name | None = None

    def measured(self, rows: dict[Name, dict[str, Any]]) -> float | None:
        """The number; None where a row is not there or does not have it."""
        value = self._number(rows, self.row)
        if value is None or self.over is None:
            return value
        over = self._number(rows, self.over)
        # Memory beyond the results may be none at all.
        return None if over is None else value / over if over > 0 else float("inf")

    def _number(self, rows: dict[Name, dict[str, Any]], name: Name) -> float | None:
        number: float | None = rows.get(name, {}).get(self.field)
        return number


@dataclass(frozen=True)
class Goal:
    """One line of the table: what, the numbers to reach and to aim for, and the quantities that are held to them."""

    what: str
    reach: str
    aim: str
    quantities: tuple[Quantity, ...]


def _conv(
    rival: str, mode: str, ours_mode: str, precision: str, levels: Sequence[str] = ("P3",), field: str = "ms_p50"
) -> Iterator[Quantity]:
    """A rival's number over ours at every level; where the rival has no bfloat16, ours in bfloat16 beside it."""
    for own in dict.fromkeys((precision, "bf16")):
        for level in levels:
            theirs = Name("cuda", "deform_conv2d", f"{level}-b8", precision, mode, rival)
            ours = replace(theirs, precision=own, mode=ours_mode, provider="ours")
            yield Quantity(level if own == precision else f"{level}, ours in bf16", field, theirs, ours)


def _head(op: str, batch: int, mode: str, provider: str, rivals: tuple[str, ...]) -> Iterator[Quantity]:
    labels = {"torchvision": "torchvision's operator", "eager": "plain PyTorch"}
    for rival in rivals:
        theirs = Name("cuda", op, f"c256-b{batch}", "fp16", mode, rival)
        yield Quantity(labels[rival], "ms_p50", theirs, replace(theirs, provider=provider))


_RELU = Name("cuda", "dynamic_relu", "P3-b8", "bf16", "forward", "ours")
_CPU = Name("cpu", "deform_conv2d", "P3-b1", "fp32", "both", "dense")
_BOTH = ("torchvision", "eager")

GOALS = (
    Goal(
        "deformable convolution forward, bf16: dense cuDNN channels last ÷ ours",
        "0.50",
        "0.65",
        tuple(_conv("dense", "forward", "forward", "bf16")),
    ),
    Goal(
        "forward, fp16: torchvision ÷ ours",
        "6",
        "12",
        tuple(_conv("torchvision", "forward", "forward", "fp16", ("P3", "P4"))),
    ),
    Goal(
        "forward + backward, fp16: torchvision ÷ ours",
        "4",
        "8",
        tuple(_conv("torchvision", "both", "both", "fp16", ("P3", "P4"))),
    ),
    Goal(
        "deterministic backward, bf16: dense cuDNN backward ÷ ours",
        "0.25",
        "0.44",
        tuple(_conv("dense", "backward", "deterministic-backward", "bf16")),
    ),
    Goal(
        "memory of forward + backward beyond inputs, output and gradients, deterministic, fp16: torchvision ÷ ours",
        "5",
        "10",
        tuple(_conv("torchvision", "both", "deterministic-both", "fp16", field="workspace_MB")),
    ),
    Goal(
        "dynamic ReLU forward, 16 bit: per cent of the measured copy bandwidth",
        "85",
        "95",
        tuple(Quantity(f"P3 {p}", "percent_of_roof", replace(_RELU, precision=p)) for p in ("fp16", "bf16")),
    ),
    Goal(
        "DyHead block forward, all levels, fp16: eager ÷ ours",
        "6",
        "12",
        tuple(_head("block", 8, "forward", "ours", _BOTH)),
    ),
    Goal(
        "DyHead-6 forward at batch 1, fp16: eager ÷ ours under a CUDA graph",
        "8",
        "20",
        tuple(_head("dyhead6", 1, "forward", "graph", _BOTH)),
    ),
    Goal(
        "DyHead-6 forward + backward, fp16: eager ÷ ours",
        "4",
        "8",
        tuple(_head("dyhead6", 8, "both", "ours", _BOTH)),
    ),
    Goal(
        "on a CPU: deformable convolution forward + backward, batch 1, fp32: dense ÷ ours",
        "0.40",
        "",
        (Quantity("P3", "ms_p50", _CPU, replace(_CPU, provider="ours")),),
    ),
)


def verdict(goal: Goal, rows: dict[Name, dict[str, Any]]) -> str:
    """The goal's quantities as measured, each behind its label; "not measured" where a row is not there."""
    found = {quantity.label: quantity.measured(rows) for quantity in goal.quantities}
    if all(value is None for value in found.values()):
        return "not measured"
    return "; ".join(f"{label}: {'not measured' if v is None else f'{v:.3g}'}" for label, v in found.items())
