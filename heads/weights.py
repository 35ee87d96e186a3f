"""Files of weights, read without running what may be hidden in them."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch


def read_weights(path: str | Path) -> dict:
    """The contents of a file of weights, on the CPU.

    Args:
        path: A `.safetensors` file, or any other that `torch.save` wrote.

    Returns:
        Names to tensors, or, as it was saved, a dict around such a dict.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is broken, holds something other than a dict, or holds objects that only running code could
            restore; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors import SafetensorError
            from safetensors.torch import load_file

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
    return state
