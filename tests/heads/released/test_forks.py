"""The DyHead of a YOLO model is loaded from the model's whole state dict; nothing else of the model is looked at."""

import re

import pytest
import torch
from release_keys import Sizes, mmdet_dyhead, official_dyhead, random_state

from heads import DyHead, load_released
from heads.dyhead.attention import Branch

SIZES = Sizes(depth=2, channels=16)
# What stands in front of the blocks' numbers, and whose block and dynamic ReLU they are.
FORKS = {
    "Detect_DyHead": ("dyhead", "mmdet", "official"),
    "mmdetection's dynamic ReLU": ("dyhead", "mmdet", "mmdet"),
    "mmdetection's neck": ("dyhead_blocks", "mmdet", "mmdet"),
    "a neck in a layer": ("neck.dyhead_blocks", "mmdet", "mmdet"),
    "the authors' tower": ("dyhead_tower", "official", "official"),
    "the authors' blocks": ("dyhead", "official", "official"),
}


def triples_of(fork, layer="22."):
    attribute, block, relu = FORKS[fork]
    place, ours = f"{layer}{attribute}", "blocks"
    if block == "official":
        return list(official_dyhead(SIZES, place, ours))
    return list(mmdet_dyhead(SIZES, place, ours, relu))


# Layers of a YOLO model before the head, and what the head has besides DyHead.
REST = {
    "0.conv.weight": torch.zeros(16, 3, 3, 3),
    "0.bn.running_mean": torch.zeros(16),
    "9.cv1.bn.num_batches_tracked": torch.tensor(3),
    "22.conv.0.0.conv.weight": torch.zeros(16, 32, 1, 1),
    "22.cv2.0.2.bias": torch.zeros(64),
    "22.dfl.conv.weight": torch.zeros(1, 16, 1, 1),
}


def head():
    return DyHead(channels=16, depth=2, levels=3, coarse_offsets="prefix")


@pytest.mark.parametrize("prefix", ["", "model.", "model.model.", "module.model."])
@pytest.mark.parametrize("fork", FORKS)
def test_a_yolo_models_dyhead_is_found(fork, prefix):
    triples = triples_of(fork)
    state = random_state(triples)
    model = head()
    load_released(model, {"model": {prefix + key: value for key, value in {**REST, **state}.items()}})
    loaded = model.state_dict()
    assert loaded.keys() == {ours for _, _, ours in triples}
    for theirs, _, ours in triples:
        assert torch.equal(loaded[ours].flatten(), state[theirs].flatten()), (theirs, ours)
    has_bias = {m.bias is not None for m in model.modules() if isinstance(m, Branch)}
    assert has_bias == {FORKS[fork][1] == "official"}
    maps = model([torch.rand(1, 16, 8 // 2**level, 8 // 2**level) for level in range(3)])
    assert [x.shape[-1] for x in maps] == [8, 4, 2]


@pytest.mark.parametrize("fork", FORKS)
def test_a_layers_own_state_dict_is_read(fork):
    """As `model[22].dyhead.state_dict()` gives it, or the layer's with nothing else in it."""
    state = random_state(triples_of(fork, ""))
    wanted = head()
    load_released(wanted, random_state(triples_of(fork)))
    bare = {key.removeprefix(f"{FORKS[fork][0]}."): value for key, value in state.items()}
    for given in (bare, {} if FORKS[fork][0].startswith("neck") else state):
        if given:
            model = head()
            load_released(model, given)
            assert all(torch.equal(value, wanted.state_dict()[key]) for key, value in model.state_dict().items())


def test_several_heads_are_listed():
    state = {**REST, **random_state(triples_of("Detect_DyHead"))}
    state |= random_state(triples_of("the authors' tower", "15."))
    with pytest.raises(ValueError, match=r"several DyHeads: 15\.dyhead_tower, 22\.dyhead; give the keys of the one"):
        load_released(head(), state)
    # Two in one layer are two as well.
    state = random_state(triples_of("Detect_DyHead")) | random_state(triples_of("mmdetection's neck"))
    with pytest.raises(ValueError, match=r"several DyHeads: 22\.dyhead, 22\.dyhead_blocks;"):
        load_released(head(), state)


def test_what_is_of_no_layer_is_listed():
    state = {
        **random_state(triples_of("Detect_DyHead")),
        "backbone.conv1.weight": torch.zeros(3),
        "stride": torch.ones(3),
    }
    with pytest.raises(ValueError) as caught:
        load_released(head(), state)
    listed = re.findall("no counterpart here: (.*)", str(caught.value))
    assert sorted(listed) == ["backbone.conv1.weight", "stride"]


def test_what_a_head_has_besides_a_dyheads_weights_is_listed():
    """BatchNorm instead of GroupNorm, and another convolution in one place: blocks that do not compute what ours do."""
    state = {**REST, **random_state(triples_of("Detect_DyHead"))}
    state["22.dyhead.0.spatial_conv_low.norm.running_mean"] = torch.zeros(16)
    state["22.dyhead.1.spatial_conv_mid.bn.weight"] = state.pop("22.dyhead.1.spatial_conv_mid.norm.weight")
    with pytest.raises(ValueError) as caught:
        load_released(head(), state)
    assert str(caught.value).splitlines()[1:] == [
        "  missing: blocks.1.spatial.from_same.norm.weight",
        "  no counterpart here: dyhead.0.spatial_conv_low.norm.running_mean",
        "  no counterpart here: dyhead.1.spatial_conv_mid.bn.weight",
    ]


def test_a_yolo_model_without_dyhead_is_refused():
    with pytest.raises(ValueError, match=r"neither the authors' layout .* in forks of YOLO"):
        load_released(head(), REST)


def test_a_head_for_each_level_is_none():
    """Blocks of one level alone, as some forks have them under the same attribute, see no neighbours."""
    state = {
        key.replace("dyhead.", "dyhead.0."): value for key, value in random_state(triples_of("Detect_DyHead")).items()
    }
    with pytest.raises(ValueError, match=r"no counterpart here: 22\.dyhead\.0\.0\.spatial_conv_high"):
        load_released(head(), {**REST, **state})


def test_two_names_of_one_weight_are_listed():
    state = random_state(triples_of("Detect_DyHead", ""))
    state["dyhead_blocks.0.spatial_conv_offset.bias"] = torch.zeros(27)
    with pytest.raises(ValueError, match=r"two keys for one: blocks\.0\.spatial\.offset\.bias"):
        load_released(head(), state)
