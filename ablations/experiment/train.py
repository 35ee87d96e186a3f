"""The training loop of one cell: SGD or AdamW, warm-up, step schedule, clipping, checkpoints, exact resume.

A step is a pure function of the weights, the optimiser's state, the seed and the step's number: the batch and every
random draw are derived from them. A checkpoint therefore needs no loader state, and a run that was killed and resumed
ends with the same bits on a CPU as one that was not.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ablations.data.batch import Batch, Target
from ablations.data.feed import Feed
from ablations.experiment.curve import CURVE, Curve, Scalars
from ablations.experiment.group import ALONE, Group
from ablations.experiment.precision import autocast
from ablations.experiment.trained import CHECKPOINT, read_checkpoint
from ablations.files import atomic_file
from ablations.grid import Cell
from ablations.rows.row import Training
from ablations.rows.store import warn
from heads.parameters import parameter_kinds

MOMENTUM = 0.9
MAX_GRADIENT_NORM = 10.0
# The paper divides the learning rate by 10 after 67 % and 89 % of the steps.
MILESTONES = (0.67, 0.89)
CHECKPOINTS = 5


# What the backbone makes of images with these targets that are padded to this extent; None where it is not known.
Known = Callable[[list[Tensor], list[Target], tuple[int, int]], list[Tensor] | None]


class Diverged(RuntimeError):
    """The loss stopped being a finite number."""


def learning_rate(cell: Cell, step: int) -> float:
    """Linear warm-up, then a tenth after each milestone, or half a cosine down to 0."""
    warmup = min(1.0, (step + 1) / cell.warmup) if cell.warmup else 1.0
    if cell.schedule == "cosine":
        return cell.lr * warmup * 0.5 * (1 + math.cos(math.pi * step / cell.steps))
    drops = sum(step >= milestone * cell.steps for milestone in MILESTONES)
    return cell.lr * warmup * 0.1**drops


def parameter_groups(model: nn.Module, cell: Cell) -> list[dict[str, Any]]:
    """Trained parameters in groups with a `weight_decay` and an `lr_share` each.

    Weight decay is for weights, not for biases, norms and scales, nor for Swin's biases of relative positions, as
    published. `lr_share`, of the cell's learning rate, may differ in the backbone and where offsets are predicted.
    """
    groups, kinds = defaultdict(list), parameter_kinds(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = kinds[name]
            share = cell.backbone_lr if kind.in_backbone else 1.0
            if kind.predicts_offsets:
                share *= cell.offset_lr
            groups[cell.weight_decay if kind.decays else 0.0, share].append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_share": share}
        for (decay, share), parameters in groups.items()
    ]


def build_optimizer(model: nn.Module, cell: Cell, device: torch.device) -> torch.optim.Optimizer:
    """The cell's optimiser: SGD with momentum, or AdamW with PyTorch's betas."""
    fused = device.type in ("cpu", "cuda")
    groups = parameter_groups(model, cell)
    if cell.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=cell.lr, momentum=MOMENTUM, fused=fused)
    if cell.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=cell.lr, fused=fused)
    raise ValueError(f"unknown optimizer {cell.optimizer!r}; it is sgd or adamw")


def train(
    cell: Cell,
    model: nn.Module,
    batch: Callable[[int], Batch],
    device: torch.device,
    directory: Path,
    busy: Callable[[], AbstractContextManager[object]] = nullcontext,
    report: Callable[[int, float], None] = lambda step, loss: None,
    log: Callable[[int, Scalars], None] = lambda step, scalars: None,
    saved: Callable[[int], None] = lambda step: None,
    features: Known = lambda images, targets, extent: None,
    group: Group = ALONE,
    parts: int | None = None,
    say: Callable[[str], None] = warn,
) -> Training:
    """Train `model` in place, from the checkpoint in `directory` if there is one.

    Args:
        cell: Supplies the optimiser, the schedule, the seed and the precision.
        model: On `device`, freshly initialised with the cell's seed.
        batch: Step number -> images and targets, this rank's share of them; a pure function.
        device: Where to train.
        directory: Where checkpoints and the loss curve are kept; made if need be.
        busy: Context manager around every step; latency is measured only while no step runs.
        report: Called with the step's number and its loss.
        log: Called with every line of the loss curve.
        saved: Called with the step of every checkpoint that has been written.
        features: The backbone's maps of images on `device`, where they are known.
        group: This process among those that train the cell together; rank 0 reads and writes the files.
        parts: Equal parts that a step's images are trained on one after the other; None for the cell's `accumulate`.
        say: Called with a sentence on a checkpoint that cannot be used.

    Returns:
        `steps`, `images`, `seconds` and `loss`, the mean of the watched steps in the last tenth.

    Raises:
        Diverged: A loss was not finite; the message has the step and the parts of the loss.
    """
    optimizer = build_optimizer(model, cell, device)
    checkpoint = directory / CHECKPOINT
    step, tail, sums, seconds = load_checkpoint(checkpoint, model, optimizer, device, group, say)
    curve = Curve(directory / CURVE, cell.steps, step, sums, log) if group.rank == 0 else None
    parts, trained = parts or cell.accumulate, group.together(model.train())
    began = time.monotonic() - seconds
    every = math.ceil(cell.steps / CHECKPOINTS)
    feed = Feed(batch, device)
    while step < cell.steps:
        with busy():
            torch.manual_seed(cell.seed * 1_000_003 + step)
            shown = feed(step)
            lr = learning_rate(cell, step)
            for settings in optimizer.param_groups:
                settings["lr"] = lr * settings["lr_share"]
            optimizer.zero_grad(set_to_none=True)
            losses = group.mean(backward(trained, shown, parts, device, cell.precision, features, group))
            if step + 1 < cell.steps:
                feed.prefetch(step + 1)
            if curve is not None:
                curve.add(losses, lr)
            # Asking a GPU for the value waits for it, so there it is asked only now and then.
            step += 1
            watched = device.type == "cpu" or step % 20 == 0 or step % every == 0 or step == cell.steps
            if watched:
                if curve is not None:
                    curve.write()
                value = float(sum(losses.values()))
                if not math.isfinite(value):
                    values = ", ".join(f"{name} {loss.item():g}" for name, loss in losses.items())
                    raise Diverged(f"loss is not finite at step {step} of {cell.steps}: {values}")
            nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            if watched:
                report(step, value)
                if step > 0.9 * cell.steps:
                    tail.append(value)
        if curve is not None and (step % every == 0 or step == cell.steps):
            save_checkpoint(checkpoint, model, optimizer, step, tail, curve.sums, time.monotonic() - began)
            saved(step)
    seconds = time.monotonic() - began
    return {"steps": step, "images": step * cell.batch_size, "seconds": seconds, "loss": sum(tail) / len(tail)}


def backward(
    model: nn.Module,
    batch: Batch,
    parts: int,
    device: torch.device,
    precision: str,
    features: Known,
    group: Group = ALONE,
) -> dict[str, Tensor]:
    """Add the gradients of a step's loss to those of the parameters; returns its parts without graph.

    Of a step in several parts the loss is the mean of theirs, each normalised by its own objects.
    """
    size = len(batch.images) // parts
    total: dict[str, Tensor] = {}
    for start in range(0, len(batch.images), size):
        images, targets = batch.images[start : start + size], batch.targets[start : start + size]
        last = start + size == len(batch.images)
        # Ranks add up their gradients once a step, behind its last part.
        with nullcontext() if last else group.apart(model):
            known = features(images, targets, batch.extent)
            with autocast(device, precision):
                losses = model(images, targets, check_targets=False, features=known, extent=batch.extent)
            if parts > 1:
                losses = {name: loss / parts for name, loss in losses.items()}
            sum(losses.values()).backward()
        for name, loss in losses.items():
            total[name] = total[name] + loss.detach() if name in total else loss.detach()
    return total


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    tail: list[float],
    sums: Tensor | None,
    seconds: float,
) -> None:
    """Write a checkpoint so that a kill at any moment leaves either the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    with atomic_file(path) as file:
        torch.save({**state, "step": step, "tail": tail, "sums": sums, "seconds": seconds}, file)


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    group: Group = ALONE,
    say: Callable[[str], None] = warn,
) -> tuple[int, list[float], Tensor | None, float]:
    """Restore a checkpoint: its step, the last losses, `Curve.sums`, and its seconds; zeros where there is none."""
    state = group.first(lambda: read_checkpoint(path, model, say))
    if state is None:
        return 0, [], None, 0.0
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    sums = state["sums"]
    return state["step"], state["tail"], None if sums is None else sums.to(device), state["seconds"]
