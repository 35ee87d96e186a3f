"""Loss curves: about 200 lines of means, which a resumed training neither repeats nor skips."""

import json
from dataclasses import replace

import pytest
import torch
from cells import CELL
from torch import nn

from ablations.data.batch import Batch
from ablations.experiment.curve import CURVE, LINES, Curve, read_curve
from ablations.experiment.train import train

CPU = torch.device("cpu")


class Falling(nn.Module):
    """Two losses that fall with the step that a batch is."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images, targets, *, check_targets, features, extent):
        step = images[0].sum()
        return {"loss_cls": 0 * self.weight.sum() + 1 / (1 + step), "loss_bbox": 2 / (1 + step)}


def batch(step):
    return Batch([torch.full((1,), float(step))], [{}], (1, 1))


class Killed(Exception):
    pass


@pytest.mark.parametrize("steps", [7, 200, 201, 1050])
def test_each_line_is_the_mean_of_the_steps_since_the_one_before(steps, tmp_path):
    logged = {}
    cell = replace(CELL, steps=steps)
    train(cell, Falling(), batch, CPU, tmp_path, log=logged.__setitem__)
    lines = read_curve(tmp_path / CURVE)
    assert len(lines) <= LINES and lines[-1]["step"] == steps
    before = 0
    for line in lines:
        mean = sum(1 / (1 + step) for step in range(before, line["step"])) / (line["step"] - before)
        assert line["loss_cls"] == pytest.approx(mean, rel=1e-5) and line["loss_bbox"] == pytest.approx(
            2 * mean, rel=1e-5
        )
        assert line["loss"] == pytest.approx(3 * mean, rel=1e-5)
        before = line["step"]
    assert logged == {line["step"]: {k: v for k, v in line.items() if k != "step"} for line in lines}
    # Beside the drops of the schedule there is the warm-up.
    assert lines[0]["lr"] < CELL.lr


@pytest.mark.parametrize("stop", [0, 1, 99, 100, 101, 263, 499])
def test_a_curve_of_a_resumed_training_is_that_of_a_whole_one(stop, tmp_path):
    """Lines of three steps and checkpoints every hundred: the sums of a line under way are in the checkpoint."""
    cell = replace(CELL, steps=500)
    whole, logged = [], []
    train(cell, Falling(), batch, CPU, tmp_path / "whole", log=lambda step, _: whole.append(step))

    def deadly(step):
        if step == stop:
            raise Killed
        return batch(step)

    def log(step, _):
        logged.append(step)

    with pytest.raises(Killed):
        train(cell, Falling(), deadly, CPU, tmp_path / "part", log=log)
    if stop > 3:
        # A kill may also cut a line.
        with (tmp_path / "part" / CURVE).open("a") as file:
            file.write('{"step": 49')
    train(cell, Falling(), batch, CPU, tmp_path / "part", log=log)
    assert (tmp_path / "part" / CURVE).read_bytes() == (tmp_path / "whole" / CURVE).read_bytes()
    assert logged == whole, "what was logged before the kill is not logged again"


def test_nothing_is_asked_of_a_device_before_the_lines_are_written(tmp_path):
    curve = Curve(tmp_path / "deep" / CURVE, steps=400)
    for step in range(400):
        curve.add({"loss_cls": torch.tensor(float(step))}, 0.1)
    assert not (tmp_path / "deep").exists()
    curve.write()
    curve.write()
    lines = [json.loads(line) for line in (tmp_path / "deep" / CURVE).read_text().splitlines()]
    assert [line["loss"] for line in lines] == [2 * n + 0.5 for n in range(200)]
