"""Files of weights, read without running what may be hidden in them, and the state dict that lies in a checkpoint."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Under what a checkpoint keeps the weights as they were trained,
TRAINED = ("model", "state_dict", "model_state_dict", "model_state", "module")
# their averages, where the tool that writes both evaluates the averages,
EVALUATED = ("ema", "model_ema", "state_dict_ema")
# and averages of tools that evaluate the other ones, or now these and now those.
AVERAGED = ("ema_model", "ema_state", "ema_state_dict", "model_ema_state_dict", "ema_model_state_dict")
# What wrappers put in front of names: torch.compile, FSDP and activation checkpoints, which may wrap a submodule alone,
COMPILED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# DataParallel, DistributedDataParallel and AveragedModel, Fabric, Lightning.
WRAPPERS = ("module", *COMPILED, "_forward_module", "model")
# Single numbers that those who average keep beside the weights.
COUNTERS = ("n_averaged", "steps", "step", "num_updates", "updates", "decay", "initted")


def read_weights(path: str | Path) -> dict[str, Any]:
    """The contents of a file of weights, on the CPU.

    Args:
        path: A `.safetensors` file, or any other that `torch.save` wrote.

    Returns:
        Names to tensors, or, as it was saved, a dict around such a dict.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: It is a `.safetensors` file, and safetensors is not installed.
        ValueError: The file is broken, holds something other than a dict, or holds objects that only running code could
            restore; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        if path.suffix == ".safetensors":
            try:
                from safetensors import SafetensorError
                from safetensors.torch import load_file
            except ImportError as error:
                raise ImportError(f"{path} needs safetensors: pip install 'dyhead-lab[ablations]'") from error

            try:
                return load_file(path)
            except SafetensorError as error:
                raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = (str(error) or "it is empty").splitlines()[0]
        fix = "if it is whole and you trust it, save its state dict alone"
        raise ValueError(f"{path} cannot be read as plain tensors: {reason}; {fix}") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a dict of tensors")
    return dict(state)


def bare_state(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict of a checkpoint, without the containers around it and the prefixes that wrappers left.

    Containers (`TRAINED`, `EVALUATED`, `AVERAGED`) may be nested. A prefix (`WRAPPERS`) is taken off where all tensors
    have it, as often as they have one, in any order; what compiled or sharded submodules leave (`COMPILED`) also in the
    middle of a name. Counters of averaging are left out. What has no container and no prefix stays as it is.

    Where a checkpoint holds trained weights and their averages, those are taken that the tool that writes it evaluates:

    - `ema` (RT-DETR, D-FINE), `model_ema` (torchvision's references), `state_dict_ema` (timm) before trained ones;
    - `state_dict` before `ema_state_dict`: mmengine swaps the two when it saves, so that `state_dict` has the averages
      and `ema_state_dict` the trained weights. mmcv's buffers `ema_*` are the same inside one dict, and are left out.

    Any other choice of two is the caller's: DINO, for one, evaluates `model` although `ema_model` is there.

    Returns:
        Names to tensors, and whatever else lay between them.

    Raises:
        TypeError: The checkpoint is no dict.
        ValueError: It holds several states and none of the above tells which, or two names become one; they are listed.
    """
    if not isinstance(checkpoint, Mapping):
        raise TypeError(f"a checkpoint must be a dict, got {type(checkpoint).__name__}")
    while found := [name for name in (*TRAINED, *EVALUATED, *AVERAGED) if _holds_tensors(checkpoint.get(name))]:
        checkpoint = checkpoint[_evaluated(found)]

    state = _without_counters({str(key): value for key, value in checkpoint.items()})
    while prefix := _shared_prefix(state):
        state = _without_counters({key.removeprefix(prefix): value for key, value in state.items()})

    bare: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for key, value in state.items():
        first, *others = key.split(".")
        name = ".".join([first, *(part for part in others if part not in COMPILED)])
        if name in bare:
            raise ValueError(f"two names of the checkpoint are one without wrappers: {origin[name]} and {key}")
        bare[name], origin[name] = value, key
    averages = {f"ema_{name.replace('.', '_')}" for name in bare}
    return {name: value for name, value in bare.items() if name not in averages}


def _holds_tensors(value: Any) -> bool:
    """Whether a container holds a state, perhaps in further containers; a configuration is none."""
    return isinstance(value, Mapping) and (
        any(isinstance(v, Tensor) for v in value.values())
        or any(_holds_tensors(value.get(name)) for name in (*TRAINED, *EVALUATED, *AVERAGED))
    )


def _evaluated(found: list[str]) -> str:
    """Which of the containers of one checkpoint holds what its tool evaluates; see `bare_state`."""
    if len(found) == 1:
        return found[0]
    if found == ["state_dict", "ema_state_dict"]:
        return "state_dict"
    averages = [name for name in found if name not in TRAINED]
    if len(averages) == 1 and averages[0] in EVALUATED:
        return averages[0]
    raise ValueError(
        f"the checkpoint holds several states: {', '.join(found)}; give the one that is meant, as checkpoint[name]"
    )


def _without_counters(state: dict[str, Any]) -> dict[str, Any]:
    """A state without single numbers of averaging; a weight of such a name stays."""
    return {
        key: value
        for key, value in state.items()
        if key not in COUNTERS or (isinstance(value, Tensor) and value.numel() != 1)
    }


def _shared_prefix(state: dict[str, Any]) -> str | None:
    """A wrapper's prefix that the names of all tensors have."""
    names = [key for key, value in state.items() if isinstance(value, Tensor)]
    for wrapper in WRAPPERS if names else ():
        if all(name.startswith(f"{wrapper}.") for name in names):
            return f"{wrapper}."
    return None
