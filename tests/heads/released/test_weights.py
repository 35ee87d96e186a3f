"""Whatever wrappers and containers stand around released weights, the same parameters are loaded, or nothing is."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from official_weights import official_state
from torch import nn
from torch.optim.swa_utils import AveragedModel

from heads import load_released
from heads.backbones.resnet import BACKBONES, CaffeBottleneck, FrozenBatchNorm2d, ResNet, load_imagenet
from heads.released.layouts import build_released, open_released
from heads.released.weights import COUNTERS, bare_state


def detector():
    body = ResNet(CaffeBottleneck, (1, 1, 1, 1), 4, FrozenBatchNorm2d)
    return build_released("official", 3, depth=1, channels=16, backbone=body)


MODEL = detector()
STATE = official_state(MODEL)
OTHER = {key: value + 1 for key, value in STATE.items()}
# Spelled out, so that none can be lost.
TRAINED = ("model", "state_dict", "model_state_dict", "model_state", "module")
EVALUATED = ("ema", "model_ema", "state_dict_ema")
AVERAGED = ("ema_model", "ema_state", "ema_state_dict", "model_ema_state_dict", "ema_model_state_dict")
CONTAINERS = (*TRAINED, *EVALUATED, *AVERAGED)
COMPILED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
WRAPPERS = ("module", *COMPILED, "_forward_module", "model")


def prefixed(prefix: str, state: dict | None = None) -> dict:
    return {prefix + key: value for key, value in (STATE if state is None else state).items()}


def inside(part: str) -> dict:
    """Names as they are where the pyramid alone is wrapped."""
    return {key.replace("backbone.backbone.", f"backbone.{part}.backbone."): value for key, value in STATE.items()}


def counted(state: dict, **counters) -> dict:
    return {**{key: torch.tensor(value) for key, value in counters.items()}, **state}


SAME = {
    "bare": STATE,
    "float16": {key: value.half().float() for key, value in STATE.items()},
    **{name: {name: STATE, "epoch": 12, "rng": torch.zeros(3)} for name in CONTAINERS},
    **{f"{prefix}.": prefixed(f"{prefix}.") for prefix in WRAPPERS},
    **{f"{part} inside": inside(part) for part in COMPILED},
    **{f"{name} in model": {"model": {name: prefixed("module."), "optimizer": {}}} for name in CONTAINERS},
    "DDP of compile": prefixed("module._orig_mod."),
    "compile of DDP": prefixed("_orig_mod.module."),
    "compile of FSDP of Lightning": prefixed("model._orig_mod._fsdp_wrapped_module."),
    "DDP twice": prefixed("module.module."),
    "compiled inside and out": {f"module._orig_mod.{key}": value for key, value in inside("_orig_mod").items()},
    "AveragedModel": counted(prefixed("module."), n_averaged=7),
    "DDP of AveragedModel of DDP": prefixed("module.", counted(prefixed("module.module."), n_averaged=7)),
    "RT-DETR": {"ema": {"module": STATE, "updates": 5, "warmups": 2000}, "model": OTHER, "last_epoch": 3},
    "RT-DETR without averages": {"model": STATE, "ema": None, "last_epoch": 3},
    "timm": {"arch": "x", "state_dict": OTHER, "state_dict_ema": STATE, "optimizer": {"state": {}}},
    "torchvision": {"model": OTHER, "model_ema": counted(prefixed("module."), n_averaged=1), "epoch": 3},
    "DeepSpeed": {"module": STATE, "ds_version": "0.16", "optimizer": None},
    "detectron2": {"model": STATE, "iteration": 90_000, "trainer": {"iteration": 90_000}},
    "Lightning": {"state_dict": prefixed("model."), "hyper_parameters": {"model": {"depth": 6}}},
    "a configuration beside it": {"model": {"depth": 6}, "state_dict": STATE},
    "nothing beside it": {"model": {}, "state_dict": STATE},
    # The averages are in `state_dict`.
    "mmengine": {"state_dict": STATE, "ema_state_dict": counted(prefixed("module.", OTHER), steps=90), "meta": {}},
    "mmengine, averages alone": {"ema_state_dict": counted(prefixed("module."), steps=90)},
    "mmcv": {"state_dict": {**STATE, **{f"ema_{key.replace('.', '_')}": value for key, value in OTHER.items()}}},
    "counters": {**STATE, **dict.fromkeys(COUNTERS, 3)},
}


def parameters(checkpoint) -> dict[str, torch.Tensor]:
    model = detector()
    load_released(model, checkpoint)
    return model.state_dict()


WANT = parameters(STATE)


def equal(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    return found.keys() == want.keys() and all(torch.equal(value, want[key]) for key, value in found.items())


@pytest.mark.parametrize("what", SAME)
def test_wrapped_weights_are_the_bare_ones(what):
    want = parameters(SAME["float16"]) if what == "float16" else WANT
    assert equal(parameters(SAME[what]), want)
    assert equal(open_released("official", SAME[what]).state_dict(), want)


def test_weights_in_float16_are_loaded():
    assert equal(parameters({key: value.half() for key, value in STATE.items()}), parameters(SAME["float16"]))


def test_what_is_given_stays_as_it_is():
    checkpoint = {"ema": {"module": counted(prefixed("module."), n_averaged=7)}}
    before = {key: id(value) for key, value in checkpoint["ema"]["module"].items()}
    found = bare_state(checkpoint)
    assert {key: id(value) for key, value in checkpoint["ema"]["module"].items()} == before
    assert all(found[key] is value for key, value in STATE.items()) and list(found) == list(STATE)


def test_the_wrappers_are_those_of_torch():
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    want = module.state_dict()
    module[1] = torch.compile(module[1])
    wrapped = AveragedModel(torch.compile(nn.DataParallel(module)))
    assert list(wrapped.state_dict())[-1] == "module._orig_mod.module.1._orig_mod.num_batches_tracked"
    assert equal(bare_state({"model_ema": wrapped.state_dict()}), want)


@pytest.mark.parametrize("prefix", [f"{wrapper}." for wrapper in WRAPPERS])
def test_a_prefix_of_half_of_the_names_is_listed(prefix):
    half = {(prefix if i % 2 else "") + key: value for i, (key, value) in enumerate(STATE.items())}
    with pytest.raises(ValueError, match="no counterpart here: ") as caught:
        load_released(detector(), half)
    # The layouts' patterns let anything stand in front of some names; what they do not, is listed.
    for key in ("head.cls_logits.weight", "head.bbox_pred.weight", "head.cls_logits.bias", "head.scales.0.scale"):
        if key not in half:
            assert f"no counterpart here: {prefix}{key}" in str(caught.value)
            assert f"missing: {key}" in str(caught.value)


def test_a_submodule_of_ddp_is_listed():
    """`module.` inside a name may be the name of a submodule."""
    with pytest.raises(ValueError, match=r"no counterpart here: head\.module\.cls_logits"):
        load_released(detector(), {key.replace("head.", "head.module."): value for key, value in STATE.items()})


AMBIGUOUS = [
    {"model": STATE, "ema_model": OTHER},
    {"model": STATE, "ema_state": OTHER},
    {"model": STATE, "ema_state_dict": OTHER},
    {"model": STATE, "state_dict": OTHER},
    {"ema": {"module": STATE}, "model_ema": OTHER},
    {"state_dict": STATE, "ema_state_dict": OTHER, "ema": {"module": OTHER}},
    {"ema": {"module": STATE, "model": OTHER}},
]


@pytest.mark.parametrize("checkpoint", AMBIGUOUS, ids=lambda checkpoint: " ".join(checkpoint))
def test_two_states_of_which_no_rule_tells_are_listed(checkpoint):
    inner = checkpoint["ema"] if list(checkpoint) == ["ema"] else checkpoint
    with pytest.raises(ValueError, match="several states: ") as caught:
        load_released(detector(), checkpoint)
    listed = re.search("several states: (.*);", str(caught.value))[1]
    assert sorted(listed.split(", ")) == sorted(inner)


def test_two_names_that_become_one_are_listed():
    key = "backbone.backbone.fpn_lateral5.weight"
    twice = {**STATE, "backbone._orig_mod.backbone.fpn_lateral5.weight": STATE[key]}
    with pytest.raises(ValueError, match=rf"are one without wrappers: {key} and backbone\._orig_mod\.backbone"):
        load_released(detector(), twice)


def test_a_weight_with_the_name_of_a_counter_is_listed():
    with pytest.raises(ValueError, match=r"no counterpart here: steps$"):
        load_released(detector(), {**STATE, "steps": torch.zeros(2)})


@pytest.mark.parametrize("prefix", ["", "module."])
def test_what_is_no_tensor_is_listed(prefix):
    state = prefixed(prefix, {**STATE, "head.bbox_pred.bias": [1.0, 2.0], "head.extra": 3})
    for load in (lambda: load_released(detector(), state), lambda: open_released("official", state)):
        with pytest.raises(
            ValueError, match=r"(?s)missing: head.bbox_pred.bias.*here: head.bbox_pred.bias\n.*head.extra"
        ):
            load()


def test_what_is_no_tensor_needs_no_prefix():
    with pytest.raises(ValueError, match=r"does not fit:\n  no counterpart here: epoch$"):
        load_released(detector(), {**prefixed("module."), "epoch": 3})


@pytest.mark.parametrize("wrong", [[STATE], None, "weights.pth"], ids=["list", "None", "str"])
def test_no_dict_is_a_type_error(wrong):
    with pytest.raises(TypeError, match="a checkpoint must be a dict, got"):
        load_released(detector(), wrong)


PARTS = {"model": {"backbone": STATE}}


@pytest.mark.parametrize("wrong", [{}, {"model": {}}, PARTS, {1: torch.zeros(1)}], ids=["none", "empty", "parts", "1"])
def test_a_dict_without_a_state_has_no_layout(wrong):
    with pytest.raises(ValueError, match="neither the authors' layout"):
        load_released(detector(), wrong)


@pytest.mark.parametrize(
    ("container", "prefix"), [(None, "module."), ("model", ""), ("state_dict_ema", "module._orig_mod.")]
)
def test_imagenet_weights_are_unwrapped(tmp_path, container, prefix):
    source, backbone = BACKBONES["tiny"](), BACKBONES["tiny"]()
    state = prefixed(prefix, {**source.state_dict(), "fc.weight": torch.zeros(1000, 128)})
    torch.save({container: state, "epoch": 3} if container else state, tmp_path / "weights.pth")
    load_imagenet(backbone, tmp_path / "weights.pth")
    assert equal(backbone.state_dict(), source.state_dict())


@st.composite
def wrapped(draw) -> dict:
    """Containers and prefixes in any order around the sound state, counters between them."""
    state = inside(draw(st.sampled_from(COMPILED))) if draw(st.booleans()) else dict(STATE)
    for prefix in draw(st.lists(st.sampled_from(WRAPPERS), max_size=5)):
        counters = draw(st.dictionaries(st.sampled_from(COUNTERS), st.integers(0, 9), max_size=2))
        state = prefixed(f"{prefix}.", counted(state, **counters))
    for container in draw(st.lists(st.sampled_from(CONTAINERS), max_size=4)):
        others = st.sampled_from([None, 3, "text", {}, {"state": {}}, torch.zeros(2)])
        beside = draw(st.dictionaries(st.sampled_from(["optimizer", "epoch", "meta", *COUNTERS]), others, max_size=3))
        if container in EVALUATED and draw(st.booleans()):
            beside[draw(st.sampled_from(TRAINED))] = OTHER
        state = {container: state, **beside}
    return state


@settings(max_examples=150, deadline=None)
@given(wrapped())
def test_any_nesting_is_taken_off(checkpoint):
    found = bare_state(checkpoint)
    assert found.keys() == STATE.keys() and all(found[key] is value for key, value in STATE.items())
