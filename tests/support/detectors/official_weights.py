"""Weights under the names of detectron2 and the authors."""

import torch

from heads.detector import Detector


def official_state(model: Detector) -> dict[str, torch.Tensor]:
    """Random weights for `model` under the names of detectron2 and the authors, biases of convolutions included."""
    stem, state = "backbone.backbone.bottom_up", {}
    generator = torch.Generator().manual_seed(0)
    for key, value in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        parts = key.split(".")
        if key.startswith("backbone.layer"):
            name = {"downsample": "shortcut"}.get(parts[3], parts[3])
            norm = parts[3].startswith("bn") or (name == "shortcut" and parts[4] == "1")
            name = f"{name.replace('bn', 'conv')}.norm" if norm else name
            theirs = f"{stem}.res{int(parts[1][5:]) + 1}.{parts[2]}.{name}.{parts[-1]}"
        elif parts[0] == "backbone":
            theirs = f"{stem}.stem.conv1.{'norm.' if parts[1] == 'bn1' else ''}{parts[-1]}"
        elif parts[0] == "fpn":
            level = f"top_block.{parts[1]}" if parts[1] in ("p6", "p7") else f"fpn_{parts[1]}{int(parts[2]) + 3}"
            theirs = f"backbone.backbone.{level}.{parts[-1]}"
        elif parts[0] == "trunk":
            module = ".".join(parts[3:-1])
            numbers = {"from_coarser": "0", "from_same": "1", "from_finer": "2"}
            if parts[4] in numbers:
                module = f"DyConv.{numbers[parts[4]]}.{'bn' if 'norm' in parts else 'conv'}"
            names = {"scale.gate": "AttnConv.1", "task.reduce": "relu.fc.0", "task.expand": "relu.fc.2"}
            module = "offset" if module == "spatial.offset" else names.get(module, module)
            theirs = f"backbone.dyhead_tower.{parts[2]}.{module}.{parts[-1]}"
        else:
            theirs = key
        state[theirs] = torch.rand(value.shape, generator=generator) + 0.5
    for key in [key for key in state if ".DyConv." in key and key.endswith("conv.weight")]:
        state[key.replace("weight", "bias")] = torch.rand(len(state[key]), generator=generator)
    return state
