"""A program of the tests, for an environment with Hugging Face's `kernels`: loads what was written as its users do.

    python theirs.py OUT RESULTS ROOT

Offline. Says what differs from RESULTS, which our environment has computed, and from the package in the checkout ROOT,
which is loaded into the same process: what both call `kernels` is taken off the list of modules between the two.
"""

import json
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

out, saved, root = map(Path, sys.argv[1:4])
sys.path.insert(0, str(root))
import kernels as ours  # noqa: E402

for name in [name for name in sys.modules if name.split(".")[0] == "kernels"]:
    sys.modules[f"our_{name}"] = sys.modules.pop(name)
    sys.modules[f"our_{name}"].__name__ = f"our_{name}"
sys.path.remove(str(root))

from hub_calls import deform_conv2d_tensors, namespace, registered, results, unequal  # noqa: E402
from kernels._rust import Build, Digest, Metadata  # noqa: E402

import kernels  # noqa: E402
from kernels import Mode, use_kernel_forward_from_hub, use_kernelized_func  # noqa: E402

assert kernels.__version__ != ours.__version__ and Path(kernels.__file__) != Path(ours.__file__)


def replaced(*arguments):
    raise AssertionError("the forward of the module ran, not that of the kernel")


@use_kernel_forward_from_hub("DeformConv2d")
class DeformConv2d(nn.Module):
    """torchvision's module of this name, as far as a kernel sees it."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True):
        super().__init__()
        self.stride, self.padding, self.dilation = ((x, x) for x in (stride, padding, dilation))
        self.weight = nn.Parameter(torch.zeros(out_channels, in_channels // groups, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def forward(self, input, offset, mask=None):
        return replaced(input, offset, mask)


@use_kernel_forward_from_hub("DynamicReLU")
def activate(input, coefficients):
    return replaced(input, coefficients)


@use_kernel_forward_from_hub("RoIAlign")
class RoIAlign(nn.Module):
    """torchvision's module of this name, as far as a kernel sees it."""

    output_size, spatial_scale, sampling_ratio, aligned = (2, 3), 0.5, -1, False

    def forward(self, input, rois):
        return replaced(input, rois)


@use_kernelized_func(activate)
class Model(nn.Module):
    """All three, one after the other."""

    def __init__(self):
        super().__init__()
        self.convolution, self.pool = DeformConv2d(4, 6, 3, stride=2, padding=1, groups=2), RoIAlign()

    def forward(self, input, offset, mask, coefficients, rois):
        return self.pool(activate(self.convolution(input, offset, mask), coefficients), rois)


def kernelized(mode, compiled):
    """Output and gradients of the model beside those of our functions: what is not the same bit for bit."""
    model = Model()
    mapping = {
        name: {"cpu": kernels.LocalLayerRepository(out, layer_name=name)}
        for name in ("DeformConv2d", "DynamicReLU", "RoIAlign")
    }
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        # Without a fallback nothing is passed over.
        model = kernels.kernelize(model, mode=mode, device="cpu", use_fallback=False)
    input, offset, weight, bias, mask = deform_conv2d_tensors()
    with torch.no_grad():
        model.convolution.weight.copy_(weight)
        model.convolution.bias.copy_(bias)
    coefficients = torch.randn(1, 4, 6, requires_grad=True)
    rois = torch.tensor([[0.0, 0.5, 0.5, 4.0, 5.0], [0.0, 1.0, 0.0, 5.0, 3.0]])
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    training = Mode.TRAINING in mode
    with torch.set_grad_enabled(training):
        found = call(input, offset, mask, coefficients, rois)
        wanted = ours.deform_conv2d(input, offset, weight, bias, 2, 1, mask=mask)
        wanted = ours.roi_align(ours.dynamic_relu(wanted, coefficients), rois, (2, 3), 0.5, -1, False)
    sides = [{"output": found}, {"output": wanted}]
    if training:
        leaves = input, offset, mask, coefficients
        own = [*model.convolution.parameters()], [weight, bias]
        for side, output, parameters in zip(sides, (found, wanted), own, strict=True):
            grads = torch.autograd.grad(output.square().sum(), [*leaves, *parameters])
            side |= {f"gradient {i}": x for i, x in enumerate(grads)}
    return unequal(*sides)


said = {"versions": [kernels.__version__, torch.__version__]}
loaded = kernels.get_local_kernel(out)
# By the path of a variant another one loads, too; on a CPU without its kernels.
other = kernels.get_local_kernel(out / "build" / "torch-cuda")
said["namespaces"] = [namespace(x) for x in (loaded, other, ours)]
said["registered"] = [registered(name) for name in said["namespaces"]]
wanted = torch.load(saved)
said["unequal"] = {namespace(x): unequal(results(x), wanted) for x in (loaded, other, ours)}
said["kernelized"] = {
    f"{mode}{' compiled' * compiled}": kernelized(mode, compiled)
    for mode, compiled in (
        (Mode.INFERENCE, False),
        (Mode.TRAINING, False),
        (Mode.INFERENCE | Mode.TORCH_COMPILE, True),
        (Mode.TRAINING | Mode.TORCH_COMPILE, True),
    )
}
said["backends"] = [str(backend) for backend in Build.open(out).general.backends]
said["metadata"] = {}
for variant in sorted((out / "build").iterdir()):
    metadata = Metadata.read_from_file(variant / "metadata.json")
    metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, variant))
    said["metadata"][variant.name] = [metadata.id, str(metadata.name), metadata.version, metadata.license]

# The examples of the card run as they stand, but for a LayerRepository: its version is looked up online, always.
# torchvision, if it is not here, is the module above.
try:
    import torchvision.ops  # noqa: F401
except ImportError:
    sys.modules["torchvision"] = ModuleType("torchvision")
    sys.modules["torchvision.ops"] = ModuleType("torchvision.ops")
    sys.modules["torchvision.ops"].DeformConv2d = DeformConv2d
blocks = [part.split("```")[0] for part in (out / "README.md").read_text().split("```python\n")[1:]]
scope = {}
said["card"] = [" LayerRepository" in block for block in blocks]
for block in blocks:
    if " LayerRepository" not in block:
        exec(block, scope)
said["card"] += [list(scope["y"].shape), scope["x"].grad is not None]
print(json.dumps(said))
