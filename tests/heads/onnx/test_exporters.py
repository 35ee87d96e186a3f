"""A DyHead through both of PyTorch's exporters to ONNX, with open sizes."""

import io

import onnxruntime
import pytest
import torch
from parity import relative_error

from heads import DyHead
from heads.onnx import onnx_translation_table, register_symbolics

LEVELS = ("finest", "middle", "coarsest")


def dyhead(**settings):
    torch.manual_seed(0)
    head = DyHead(16, 1, levels=3, **settings).eval()
    for name, parameter in head.named_parameters():
        if "offset" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return head


def pyramid(batch, *sizes, channels=16):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, channels, *size, generator=generator) for size in sizes]


EXAMPLE = (2, (16, 20), (8, 10), (4, 5))
OTHERS = ((1, (11, 13), (6, 7), (3, 4)), (3, (16, 20), (8, 10), (4, 5)))


def dynamo(head):
    auto = torch.export.Dim.AUTO
    program = torch.onnx.export(
        head,
        (pyramid(*EXAMPLE),),
        dynamo=True,
        opset_version=20,
        dynamic_shapes=([{0: auto, 2: auto, 3: auto}] * 3,),
        custom_translation_table=onnx_translation_table(),
        verbose=False,
    )
    return program.model_proto.SerializeToString()


def torchscript(head, opened=True):
    register_symbolics()
    file = io.BytesIO()
    axes = {name: {0: "batch", 2: f"height_{name}", 3: f"width_{name}"} for name in LEVELS}
    torch.onnx.export(
        head,
        (pyramid(*EXAMPLE),),
        file,
        dynamo=False,
        opset_version=19,
        input_names=list(LEVELS),
        dynamic_axes=axes if opened else None,
    )
    return file.getvalue()


def error(model, head, others):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    run = onnxruntime.InferenceSession(model, options)
    names = [each.name for each in run.get_inputs()]
    errors = []
    for sizes in others:
        maps = pyramid(*sizes)
        found = run.run(None, {name: x.numpy() for name, x in zip(names, maps, strict=True)})
        with torch.inference_mode():
            errors.append(relative_error(head(maps), [torch.from_numpy(x) for x in found]))
    return max(errors)


@pytest.mark.parametrize("settings", [{"coarse_offsets": "prefix"}, {"formulation": "paper"}], ids=str)
def test_the_newer_exporter(settings):
    head = dyhead(**settings)
    assert error(dynamo(head), head, OTHERS) < 1e-5


@pytest.mark.parametrize("coarse_offsets", ["crop", "prefix", "resize"])
@pytest.mark.filterwarnings("ignore")
def test_the_older_exporter(coarse_offsets):
    head = dyhead(coarse_offsets=coarse_offsets)
    assert error(torchscript(head), head, OTHERS) < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_the_older_exporter_writes_the_papers_formulation_for_one_size():
    head = dyhead(formulation="paper")
    assert error(torchscript(head, opened=False), head, [EXAMPLE]) < 1e-5
