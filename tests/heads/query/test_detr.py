"""DETR against mmdetection's vectors, its transformer against PyTorch's, and its edges."""

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from golden_scene import CASES, CLASSES, EDGES, IMAGES, difference, random_boxes, targets_of

from ablations.experiment.measure import count_gmacs, count_parameters
from heads import build_detector
from heads.query.detr import DETRHead, DETROutputs
from heads.query.transformer import Attention, DecoderLayer, EncoderLayer, padding_mask, sine_positions


def lost(vectors: dict) -> float:
    """Ten times the most that mmdetection itself lost in float32, in any quantity."""
    return 10 * json.loads(str(vectors["meta"]))["fp32_vs_f64_max"]


def head_of(**changes) -> DETRHead:
    arguments = {"in_channels": 32, "num_classes": CLASSES, "queries": 25, "layers": 3, "max_detections": 20}
    return DETRHead(**arguments | changes)


def raw_of(vectors: dict, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.from_numpy(vectors[f"raw.{k}"]).to(dtype).requires_grad_() for k in ("cls", "box_logit"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_costs_and_pairs_are_mmdetections(golden, case, dtype):
    vectors, head = golden("detr_mmdet"), head_of()
    logits, boxes = raw_of(vectors, dtype)
    outputs, targets = DETROutputs(logits, boxes.sigmoid()), targets_of(vectors, case, dtype)
    tolerance = lost(vectors) if dtype == torch.float32 else 1e-12
    for image, target in enumerate(targets):
        costs = head.costs(outputs.logits[:, image], outputs.boxes[:, image], target, IMAGES[image])
        for name, cost in zip(("cls", "l1", "giou"), costs, strict=True):
            for layer in range(3):
                assert difference(cost[layer], vectors[f"{case}.d{layer}.cost_{name}.{image}"]) <= tolerance, name
    prediction, box = head.pairs(outputs, targets, IMAGES)
    paired = torch.full((3, 2, 25), -1)
    paired.view(-1)[prediction] = box
    first = len(targets[0]["boxes"])
    for layer in range(3):
        for image in range(2):
            want = vectors[f"{case}.d{layer}.assigned_gt_inds.{image}"]
            got = paired[layer, image].numpy()
            np.testing.assert_array_equal(np.where(got < 0, 0, got - image * first + 1), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_mmdetections(golden, case, dtype):
    vectors = golden("detr_mmdet")
    logits, boxes = raw_of(vectors, dtype)
    losses = head_of().loss(DETROutputs(logits, boxes.sigmoid()), targets_of(vectors, case, dtype), IMAGES)
    assert len(losses) == 9
    # mmdetection divides by a float32 number in a run of float64 too.
    tolerance = lost(vectors) if dtype == torch.float32 else 2e-7
    for name, loss in losses.items():
        assert abs(loss.item() - vectors[f"{case}.{name}"]) <= tolerance, name
    grads = torch.autograd.grad(sum(losses.values()), (logits, boxes))
    for name, grad in zip(("cls", "box_logit"), grads, strict=True):
        # Some of the stored gradients, of up to 1, are float32.
        assert difference(grad, vectors[f"{case}.grad.{name}"]) <= (tolerance if dtype == torch.float32 else 6e-8)


@pytest.mark.parametrize("stored", ["default", "rescaled"])
def test_detections_are_mmdetections(golden, stored):
    vectors = golden("detr_mmdet")
    logits, boxes = raw_of(vectors, torch.float32)
    scene = json.loads(str(vectors["meta"]))["scene"]
    for image, got in enumerate(head_of().predict(DETROutputs(logits, boxes.sigmoid()), IMAGES)):
        scale = 1 / torch.tensor(scene["scale_factor_wh"][image] * 2) if stored == "rescaled" else 1
        np.testing.assert_array_equal(got["labels"].numpy(), vectors[f"det_{stored}.{image}.labels"])
        assert difference(got["boxes"] * scale, vectors[f"det_{stored}.{image}.bboxes"]) <= lost(vectors)
        assert difference(got["scores"], vectors[f"det_{stored}.{image}.scores"]) <= lost(vectors)


def test_predictors_are_mmdetections(golden):
    vectors, head = golden("detr_mmdet"), head_of().double()
    names = {"fc_cls": head.class_logits, "reg_ffn.layers.0.0": head.box_layers[0]}
    names |= {"reg_ffn.layers.1": head.box_layers[1], "fc_reg": head.box_layers[2]}
    with torch.no_grad():
        for name, layer in names.items():
            layer.weight.copy_(torch.from_numpy(vectors[f"head.param.{name}.weight"]))
            layer.bias.copy_(torch.from_numpy(vectors[f"head.param.{name}.bias"]))
    outputs = head.predictions(torch.from_numpy(vectors["head.hidden_states"]).double())
    assert difference(outputs.logits, vectors["head.cls"]) <= 1e-12
    assert difference(outputs.boxes, vectors["head.box_sigmoid"]) <= 1e-12


def test_positions_are_mmdetections(golden):
    vectors = golden("detr_mmdet")
    positions = sine_positions(torch.from_numpy(vectors["pe.mask"]).bool(), 16)
    # Angles up to 2π, stored in float32.
    assert difference(positions.permute(0, 3, 1, 2), vectors["pe.normalized"]) <= 1e-5


def test_padding_by_hand():
    mask = padding_mask([(64, 96), (33, 20)], (64, 96), (2, 3), "cpu")
    assert mask.tolist() == [[[False] * 3] * 2, [[False, True, True]] * 2]
    assert padding_mask([(32, 64)], (64, 96), (2, 3), "cpu").tolist() == [[[False, False, True], [True] * 3]]


def pytorchs(ours: Attention) -> Callable[..., torch.Tensor]:
    """PyTorch's attention with the same weights, called as ours is."""
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True).eval()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in (ours.query, ours.key, ours.value)]))
        theirs.in_proj_bias.copy_(torch.cat([p.bias for p in (ours.query, ours.key, ours.value)]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    return lambda query, key, value, mask=None: theirs(query, key, value, mask, need_weights=False)[0]


def test_attention_is_pytorchs():
    torch.manual_seed(0)
    ours = Attention(16, 4, 0.1).eval()
    q, k, v = torch.randn(2, 5, 16), torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    mask = torch.arange(9) >= torch.tensor([[9], [6]])
    torch.testing.assert_close(ours(q, k, v, mask), pytorchs(ours)(q, k, v, mask))
    # What is masked has no influence.
    torch.testing.assert_close(ours(q, k, v, mask)[1:], ours(q[1:], k[1:, :6], v[1:, :6]))


def test_layers_put_positions_where_the_paper_puts_them():
    """Its Figure 10: positions are added to what is compared, in every attention, and never to what is passed on."""
    torch.manual_seed(0)
    encoder, decoder = EncoderLayer(16, 4, 32, 0.1).eval(), DecoderLayer(16, 4, 32, 0.1).eval()
    tokens, positions, x, queries = (torch.randn(2, n, 16) for n in (9, 9, 5, 5))
    mask = torch.arange(9) >= torch.tensor([[9], [6]])
    placed = tokens + positions
    expected = encoder.norms[0](tokens + pytorchs(encoder.attention)(placed, placed, tokens, mask))
    expected = encoder.norms[1](expected + encoder.feed(expected))
    torch.testing.assert_close(encoder(tokens, positions, mask), expected)
    expected = decoder.norms[0](x + pytorchs(decoder.among)(x + queries, x + queries, x))
    seen = pytorchs(decoder.across)(expected + queries, placed, tokens, mask)
    expected = decoder.norms[1](expected + seen)
    expected = decoder.norms[2](expected + decoder.feed(expected))
    torch.testing.assert_close(decoder(x, queries, tokens, positions, mask), expected)


def tiny(attentions: str | None) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_detector("detr", 3, "tiny", attentions, 1, channels=16)


def test_cells_in_the_padding_have_no_influence():
    model = tiny(None).eval()
    cells, padding = torch.randn(1, 16, 2, 2), torch.randn(1, 16, 2, 3)

    def predictions(cells):
        given = model.fpn.register_forward_hook(lambda *_: [cells])
        with torch.no_grad():
            outputs = model.raw(torch.zeros(1, 3, 64, 32 * cells.shape[-1]), [(64, 64)])
        given.remove()
        return outputs

    torch.testing.assert_close(predictions(torch.cat([cells, padding], -1)), predictions(cells))


@pytest.mark.parametrize("attentions", [None, "LSC"], ids=["baseline", "LSC"])
def test_padding_does_not_change_what_is_seen(attentions):
    """Only convolutions may look across the edge of an image, and those see zeros there, padded or not."""
    model = tiny(attentions).eval()
    small, large = torch.rand(3, 64, 64), torch.rand(3, 64, 128)
    sizes = [(64, 64), (64, 128)]
    with torch.no_grad():
        together = model.raw(model.batch([small, large]), sizes)
        shifted = model.raw(model.batch([small, large]), [(64, 64), (64, 64)])
        assert not torch.allclose(together.boxes[:, 1], shifted.boxes[:, 1])
        torch.testing.assert_close(together.boxes[:, 0], shifted.boxes[:, 0])
        # A call of the detector tells the sizes.
        found, want = model([small, large]), model.head.predict(together, sizes)
        assert all(torch.equal(a[key], b[key]) for a, b in zip(found, want, strict=True) for key in b)
    silent = dict(model.train().named_parameters())
    losses = model([small, large], [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}] * 2)
    assert all(loss.isfinite() for loss in losses.values())
    losses = model([small, large], [{"boxes": torch.tensor([[4.0, 4, 50, 60]]), "labels": torch.tensor([2])}] * 2)
    sum(losses.values()).backward()
    assert not [name for name, p in silent.items() if p.grad is None or not p.grad.isfinite().all()]


@pytest.mark.parametrize("name", EDGES)
def test_losses_are_finite_at_the_edges(name):
    generator = torch.Generator().manual_seed(2)
    boxes = [
        random_boxes(b, 128, generator) if isinstance(b, int) else torch.tensor(b).reshape(-1, 4) for b in EDGES[name]
    ]
    targets = [{"boxes": b, "labels": torch.zeros(len(b), dtype=torch.long)} for b in boxes]
    sizes = [(128, 128)] * len(boxes)
    logits = torch.randn(3, len(boxes), 25, 4, generator=generator, requires_grad=True)
    shares = torch.randn(3, len(boxes), 25, 4, generator=generator, requires_grad=True)
    outputs = DETROutputs(logits, shares.sigmoid())
    losses = head_of(num_classes=3).loss(outputs, targets, sizes)
    sum(losses.values()).backward()
    assert all(loss.isfinite() and loss.ndim == 0 for loss in losses.values())
    assert logits.grad.isfinite().all() and shares.grad.isfinite().all()
    assert all(value.isfinite().all() for r in head_of().predict(outputs, sizes) for value in r.values())


def test_broken_predictions_do_not_crash():
    outputs = DETROutputs(torch.full((1, 1, 25, 4), torch.nan), torch.full((1, 1, 25, 4), torch.nan))
    targets = [{"boxes": torch.tensor([[4.0, 4, 50, 60]]), "labels": torch.tensor([2])}]
    assert head_of(num_classes=3).loss(outputs, targets, [(64, 64)])["loss_bbox"].isnan()


def test_half_precision_gives_float32_losses_and_boxes():
    model = tiny("LSC")
    images, target = [torch.rand(3, 64, 64)], {"boxes": torch.tensor([[4.0, 4, 50, 60]]), "labels": torch.tensor([2])}
    with torch.autocast("cpu", torch.bfloat16):
        assert all(loss.dtype == torch.float32 for loss in model(images, [target]).values())
        assert model.eval()(images)[0]["boxes"].dtype == torch.float32


def test_r50_has_the_published_size():
    with torch.device("meta"):
        model = build_detector("detr", 91, "resnet50", None)
    # The authors' R-50 model with its 91 classes; frozen norms are not counted.
    assert count_parameters(model) == 41_524_768
    # The paper's Table 1 has 86, the mean over a hundred images of several shapes; a usual one is 800×1066.
    assert count_gmacs(model, [torch.empty(3, 800, 1066)]) == pytest.approx(86, rel=0.06)
    # No published figure was found for 800×1333: 25×42 cells of C5, 100 queries, 6 layers of each kind, all of which
    # predict. What is left is the backbone: 4.09 at 224×224, and for 800×1344 by the area.
    cells, queries, c = 25 * 42, 100, 256
    encoder = cells * (4 * c * c + 2 * cells * c + 2 * c * 2048)
    decoder = queries * (6 * c * c + 2 * queries * c + 2 * cells * c + 2 * c * 2048) + 2 * cells * c * c
    predictors = queries * (c * 92 + 2 * c * c + 4 * c)
    by_hand = (cells * 2048 * c + 6 * (encoder + decoder + predictors)) / 1e9
    gmacs = count_gmacs(model, [torch.empty(3, 800, 1333)])
    assert gmacs - by_hand == pytest.approx(4.087 * 800 * 1344 / 224**2, rel=0.01)
