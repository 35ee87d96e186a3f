"""Runs a DyHead block on stored inputs and pairs every output and gradient with the stored one."""

import numpy as np
import torch

from heads import DyHead, load_released


def sampled(value, key):
    """A gradient as the file stores it: whole, or every 37th element with sum and norm where it is large."""
    return value.flatten()[::37] if key.endswith(".every37") else value


def run_golden(files, error, dtype):
    """Load a golden block, run it, and yield (quantity, ours, theirs, float32's error by the file's own account)."""
    data = {k: v for file in files for k, v in file.items()}
    state = {k.removeprefix("param."): torch.from_numpy(v).to(dtype) for k, v in data.items() if k.startswith("param.")}
    levels = sum(key.startswith("input.") for key in data)
    inputs = [torch.from_numpy(data[f"input.{i}"]).to(dtype).requires_grad_() for i in range(levels)]
    head = DyHead(inputs[0].shape[1], depth=1, coarse_offsets="prefix").to(dtype)
    load_released(head, state)
    names = dict(zip_released(head, state))
    outputs = head(inputs)
    sum((y * torch.from_numpy(data[f"cot.{i}"]).to(dtype)).sum() for i, y in enumerate(outputs)).backward()

    for i, y in enumerate(outputs):
        yield f"output.{i}", y.detach(), data[f"output.{i}"], error["outputs"]
        yield f"grad.input.{i}", inputs[i].grad, data[f"grad.input.{i}"], error["grad_inputs"]
    for key, theirs in data.items():
        if key.startswith("grad.param.") and not key.endswith("sum_l2"):
            released = key.removeprefix("grad.param.").removesuffix(".every37")
            ours = names[released].grad.reshape(state[released].shape)
            yield key, sampled(ours, key), theirs, error["grad_params_rel"] * max(1.0, np.abs(theirs).max())


def zip_released(head, state):
    """Pair released names with our parameters by loading tensors that carry their own index."""
    numbered = {key: torch.full_like(value, i) for i, (key, value) in enumerate(state.items())}
    values = {name: p.detach().clone() for name, p in head.named_parameters()}
    load_released(head, numbered)
    pairs = [(list(state)[int(p.flatten()[0])], p) for p in head.parameters()]
    with torch.no_grad():
        for name, p in head.named_parameters():
            p.copy_(values[name])
    return pairs
