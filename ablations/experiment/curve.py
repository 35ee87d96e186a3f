"""The loss curve of a training: JSON lines beside its weights, which a resumed run neither repeats nor skips.

Each line is the mean of the steps since the line before, and there are about 200 however long the training is:

    {"step": 3, "lr": 0.003, "loss": 2.31, "loss_bbox": 0.92, "loss_centerness": 0.66, "loss_cls": 0.73}
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ablations.files import atomic_write_text, named

CURVE = "losses.jsonl"
LINES = 200

# By name; null where it was not finite.
Scalars = dict[str, float | None]


class Curve:
    """Sums losses where they are and asks a device for their values only when told to.

    Args:
        path: The file; what it holds from later steps than `step` is taken out, and not logged again.
        steps: Of the whole training.
        step: Steps that are done.
        sums: What `Curve.sums` was after them; None at the beginning of a line.
        log: Called with every line's step and the rest of it.
    """

    def __init__(
        self,
        path: Path,
        steps: int,
        step: int = 0,
        sums: Tensor | None = None,
        log: Callable[[int, Scalars], None] = lambda step, scalars: None,
    ):
        self.path, self.steps, self.step, self.sums, self.log = path, steps, step, sums, log
        self.every = math.ceil(steps / LINES)
        self.waiting: list[tuple[int, float, list[str], Tensor]] = []
        lines = read_curve(path)
        self.logged = max((line["step"] for line in lines), default=0)
        if lines:
            atomic_write_text(path, "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step))

    def add(self, losses: Mapping[str, Tensor], lr: float) -> None:
        """Take the losses of the next step, scalars whose sum was minimised, and its learning rate."""
        names = sorted(losses)
        values = torch.stack([losses[name].detach().float() for name in names])
        self.sums = values if self.sums is None else self.sums + values
        behind = self.step % self.every
        self.step += 1
        if self.step % self.every == 0 or self.step == self.steps:
            self.waiting.append((self.step, lr, names, self.sums / (behind + 1)))
            self.sums = None

    def write(self) -> None:
        """Write the lines that are complete, and hand them to the log."""
        if not self.waiting:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with named(self.path), self.path.open("a") as file:
            for step, lr, names, means in self.waiting:
                values = dict(zip(names, means.tolist(), strict=True))
                scalars = {"lr": lr, "loss": sum(values.values()), **values}
                line = {name: float(f"{x:.6g}") if math.isfinite(x) else None for name, x in scalars.items()}
                file.write(json.dumps({"step": step, **line}) + "\n")
                if step > self.logged:
                    self.log(step, line)
        self.waiting.clear()


def read_curve(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a loss curve, in order; none where there is no file. A line that a kill cut off is left out."""
    try:
        texts = Path(path).read_text().splitlines()
    except FileNotFoundError:
        return []
    lines = []
    for text in texts:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines
