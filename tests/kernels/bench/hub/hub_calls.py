"""The same calls of our operators in any copy of them, and how a copy is loaded; imported without pytest."""

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location

import torch

FUNCTIONS = ("deform_conv2d", "dynamic_relu", "roi_align", "dyhead_block")


def load(variant, folder=None):
    """A variant that was written, as Hugging Face's package loads it: alone, by its path, under its `id`.

    Args:
        variant: Its path.
        folder: In the variant, which is then loaded instead, under its own name.
    """
    name = folder or json.loads((variant / "metadata.json").read_text())["id"]
    spec = spec_from_file_location(name, variant / (folder or "") / "__init__.py")
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def namespace(package):
    """Where the operators of a copy are registered."""
    return sys.modules[f"{package.__name__}.runtime.operator"].NAMESPACE


def registered(name):
    """Whether `torch.ops` has an operator under this namespace."""
    return torch._C._dispatch_has_kernel(f"{name}::deform_conv2d")


def deform_conv2d_tensors(dtype=torch.float32):
    """input, offset, weight, bias, mask of one deformable convolution with stride 2, padding 1."""
    torch.manual_seed(1)
    shapes = (1, 4, 7, 6), (1, 18, 4, 3), (6, 2, 3, 3), (6,), (1, 9, 4, 3)
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def _deform_conv2d(package, dtype):
    tensors = deform_conv2d_tensors(dtype)
    x, offset, weight, bias, mask = tensors
    return tensors, [package.deform_conv2d(x, offset, weight, bias, 2, 1, mask=mask)]


def _dynamic_relu(package, dtype):
    tensors = [torch.randn(2, 3, 5, 4).to(dtype).requires_grad_(), torch.randn(2, 4, 3).requires_grad_()]
    return tensors, [package.dynamic_relu(*tensors)]


def _roi_align(package, dtype):
    features = torch.randn(2, 3, 6, 5).to(dtype).requires_grad_()
    boxes = [torch.tensor([[2.0, 3.0, 30.0, 41.0], [-4.0, 1.0, 9.0, 17.0]]), torch.tensor([[0.0, 0.0, 39.0, 20.0]])]
    return [features], [package.roi_align(features, boxes, (2, 3), spatial_scale=1 / 8)]


def _dyhead_block(package, dtype):
    def tensors(*shapes):
        return [(torch.randn(shape) / 4).to(dtype).requires_grad_() for shape in shapes]

    features = tensors((1, 16, 5, 4), (1, 16, 3, 2))
    weights, scales, shifts = (tensors(*[shape] * 3) for shape in ((16, 16, 3, 3), (16,), (16,)))
    offset, gate = tensors((27, 16, 3, 3), (27,)), tensors((1, 16), (1,))
    layers = tensors((4, 16), (4,), (64, 4), (64,))
    block = package.BlockParameters(weights, scales, shifts, offset=offset, gate=gate, dynamic_relu=layers)
    return [*features, *weights, *scales, *shifts, *offset, *gate, *layers], package.dyhead_block(features, block)


def results(package, dtype=torch.float32, functions=FUNCTIONS):
    """What every function returns and all its gradients, by the function's name and a number.

    Args:
        package: Whatever has the functions.
        dtype: Of the maps.
        functions: Names.
    """
    torch.set_num_threads(1)
    found = {}
    for function in functions:
        torch.manual_seed(0)
        tensors, outputs = globals()[f"_{function}"](package, dtype)
        grads = torch.autograd.grad(outputs, tensors, [torch.randn(x.shape).to(x.dtype) for x in outputs])
        found |= {f"{function} output {i}": x.detach() for i, x in enumerate(outputs)}
        found |= {f"{function} gradient {i}": x for i, x in enumerate(grads)}
    return found


def unequal(found, wanted):
    """The results that differ in a bit, or that one side lacks, or that say nothing as all of them are 0."""
    names = found.keys() | wanted.keys()
    both = found.keys() & wanted.keys()
    differ = {name for name in both if not torch.equal(found[name], wanted[name]) or not found[name].any()}
    return sorted((names - both) | differ)
