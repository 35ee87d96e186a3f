"""The card of the repository, which the Hub shows as its page."""

# What pyproject.toml asks for. The Hub's rules say Python 3.9; torch 2.11 itself needs 3.10.
NEEDS = {"requires-python": ">=3.11", "torch": ">=2.11,<2.14", "triton": ">=3.6,<3.8"}
_TEXT = """\
---
library_name: kernels
license: {license}
tags:
  - kernels
  - deformable-convolution
  - dynamic-relu
  - object-detection
---

# {name}

Deformable convolution (DCNv2), dynamic ReLU, RoIAlign and the whole block of DyHead: Triton on a GPU, plain PyTorch
on a CPU. All have gradients in float16, bfloat16, float32 and float64, are operators of their own for `torch.compile`
and `torch.export`, follow autocast, and compute the same bits twice under `torch.use_deterministic_algorithms(True)`.

There is nothing to build. Needed are Python {python}, torch {torch} and, on a GPU, Triton {triton}, which comes
with torch. (The Hub asks for code that runs with Python 3.9. This uses what 3.10 brought, as the torch that it needs
does, and was tested with 3.11.) The kernels for GPUs were compiled ahead of time and run under Triton's interpreter;
they have not run on a GPU yet.

## Functions

```python
{imports}import torch

{load}
device = "cuda" if torch.cuda.is_available() else "cpu"
x = torch.randn(2, 16, 8, 8, device=device, requires_grad=True)
weight = torch.randn(32, 16, 3, 3, device=device)
offset, mask = torch.zeros(2, 18, 8, 8, device=device), torch.ones(2, 9, 8, 8, device=device)
y = {name}.deform_conv2d(x, offset, weight, padding=1, mask=mask)
y = {name}.dynamic_relu(y, torch.zeros(2, 4, 32, device=device))
y.sum().backward()
```

| function | what |
| --- | --- |
| `deform_conv2d` | with the arguments of `torchvision.ops.deform_conv2d` |
| `dynamic_relu` | the larger of two lines per image and channel; coefficients (N, 4, C): a1, b1, a2, b2 |
| `roi_align` | with the arguments of `torchvision.ops.roi_align`, but `aligned=True` unless given |
| `dyhead_block` | a pyramid and the `BlockParameters` of one block; on a GPU a few launches for all levels |
| `use_backend` | `with use_backend("torch"):` runs plain PyTorch on a GPU, too |

Docstrings say shapes, types and errors: `help({name}.deform_conv2d)`.

## Layers

```python
{layer_imports}from kernels import Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping
from torchvision.ops import DeformConv2d

replace_kernel_forward_from_hub(DeformConv2d, "DeformConv2d")
layer = {layer}
model = torch.nn.ModuleList([DeformConv2d(16, 32, 3, padding=1)]).to(device)
with use_kernel_mapping({{"DeformConv2d": {{kind: layer for kind in ("cpu", "cuda", "rocm")}}}}):
    model = kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE)
y = model[0](x, offset, mask)
```

`DeformConv2d` and `RoIAlign` stand in for torchvision's modules of these names, `DynamicReLU` for a module or a
function of a map and its coefficients. All have gradients and are for `Mode.TORCH_COMPILE`, too.
"""


def card(name: str, version: int, license: str, repository: str | None) -> str:
    """The card in Markdown, with an example that runs as it stands.

    Args:
        name: Of the kernel.
        version: Of the kernel, which its users name.
        license: As the Hub abbreviates it.
        repository: `owner/name` on the Hub; without it, examples load the folder in which the card lies.
    """
    if repository is None:
        imports, layer_imports = "from pathlib import Path\n\n", "from kernels import LocalLayerRepository\n"
        load = f'from kernels import get_local_kernel\n\n{name} = get_local_kernel(Path("."))  # this folder'
        layer = 'LocalLayerRepository(Path("."), layer_name="DeformConv2d")'
    else:
        imports, layer_imports = "", "from kernels import LayerRepository\n"
        which = f'"{repository}", version={version}, trust_remote_code=True'
        load = f"from kernels import get_kernel\n\n{name} = get_kernel({which})"
        layer = f'LayerRepository("{repository}", layer_name="DeformConv2d", version={version}, trust_remote_code=True)'
    return _TEXT.format(
        name=name,
        license=license,
        imports=imports,
        load=load,
        layer_imports=layer_imports,
        layer=layer,
        python=NEEDS["requires-python"],
        torch=NEEDS["torch"],
        triton=NEEDS["triton"],
    )
