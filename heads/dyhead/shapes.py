"""`python -m heads.dyhead.shapes`: the shape of the features around each attention, in both formulations."""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from heads.dyhead.dyhead import FORMULATIONS, DyHead

NAMES = {"scale": "L  scale attention", "spatial": "S  spatial attention", "task": "C  task attention"}


Maps = Tensor | list[Tensor] | list[list[Tensor]]


def describe(x: Maps) -> str:
    """The shape of a tensor, or of every tensor in a list of (lists of) tensors."""
    if isinstance(x, Tensor):
        return "×".join(map(str, x.shape))
    return "\n".join(" + ".join(describe(y) for y in row) if isinstance(row, list) else describe(row) for row in x)


def trace(head: DyHead, features: list[Tensor]) -> list[tuple[str, str, str]]:
    """Shapes around the attentions of the first block, in the order in which they run.

    Args:
        head: Any DyHead with a block.
        features: One (N, C, H_l, W_l) a level, finest first.

    Returns:
        Name, shapes in, shapes out, one row an attention, between a row for the pyramid in and one for it out.
    """
    rows: list[tuple[str, str, str]] = []

    def note(label: str) -> Callable[[Any, tuple[Maps, ...], Maps], None]:
        return lambda _, inputs, output: rows.append((label, describe(inputs[0]), describe(output)))

    hooks = [getattr(head.blocks[0], name).register_forward_hook(note(label)) for name, label in NAMES.items()]
    with torch.no_grad():
        output = head(features)
    for hook in hooks:
        hook.remove()
    return [("pyramid in", "", describe(features)), *rows, ("pyramid out", "", describe(output))]


def main() -> None:
    """Print the shapes of both formulations."""
    parser = argparse.ArgumentParser(prog="python -m heads.dyhead.shapes", description=__doc__)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1344), metavar=("H", "W"), help="image, in pixels")
    parser.add_argument("--channels", type=int, default=256)
    arguments = parser.parse_args()

    sizes = [tuple(-(-side // stride) for side in arguments.size) for stride in (8, 16, 32, 64, 128)]
    # Shapes need no numbers: on the meta device nothing is computed.
    with torch.device("meta"):
        features = [torch.empty(1, arguments.channels, *size) for size in sizes]
        for formulation in FORMULATIONS:
            head = DyHead(arguments.channels, depth=1, formulation=formulation)
            layout = "N×C×H×W per level" if formulation == "released" else "N×L×C×H×W at the median level's size"
            print(f"\n{formulation} formulation, {layout}; '+' joins the neighbours a level samples\n")
            print(tabulate(trace(head, features), headers=("", "before", "after"), tablefmt="github"))


if __name__ == "__main__":
    main()
