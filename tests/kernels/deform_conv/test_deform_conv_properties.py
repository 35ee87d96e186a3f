"""Malformed and extreme calls of deformable convolutions: refused by name, or the definition's values."""

import pytest
import torch
from deform_calls import (
    AXES,
    UNREAL,
    alone,
    check_extreme,
    check_unreal,
    defined,
    extreme_call,
    second_of_two_levels,
)
from deform_malformed import Call, malformed, malformed_call, refusal
from hypothesis import given, settings
from hypothesis import strategies as st

FLOATING = [torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16]
EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True, database=None)
levels = pytest.mark.parametrize("levels", [False, True], ids=["one", "levels"])


@levels
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_every_single_mistake_is_refused(levels, autocast):
    function, good, wrong, mixed = malformed(levels, 0)
    for change in wrong if autocast else [*wrong, *mixed]:
        refusal(Call(function, good | change, autocast), "torch")


@levels
@EXAMPLES
@given(data=st.data())
def test_malformed_calls_are_refused(levels, data):
    refusal(data.draw(malformed_call(levels)), "torch")


@levels
@EXAMPLES
@given(data=st.data())
def test_extreme_calls_are_the_definitions(levels, data):
    check_extreme(data.draw(extreme_call(levels, FLOATING)), "torch", levels)


@pytest.mark.parametrize("masked", [True, False], ids=["masks", "no masks"])
@pytest.mark.parametrize("function", [alone, second_of_two_levels, defined], ids=["one", "levels", "reference"])
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("value", UNREAL)
def test_an_unreal_offset_samples_nothing(value, axes, function, masked):
    check_unreal(function, value, AXES[axes], masked)
