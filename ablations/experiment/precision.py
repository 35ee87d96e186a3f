"""Mixed precision: the one autocast of training, evaluation and measurement."""

import torch


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast that a cell's precision asks for; `"fp32"` asks for none.

    bfloat16 has float32's range, so no loss scaling goes with it.

    Args:
        device: Where the model runs.
        precision: `"fp32"` or `"bf16"`.

    Example:
        >>> layer, x = torch.nn.Linear(2, 2), torch.zeros(1, 2)
        >>> with autocast(x.device, "bf16"):
        ...     print(layer(x).dtype)
        torch.bfloat16
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
