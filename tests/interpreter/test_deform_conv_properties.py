"""Malformed and extreme calls of deformable convolutions on the Triton path; bfloat16 is wrong here."""

import pytest
import torch
from deform_calls import (
    AXES,
    UNREAL,
    alone,
    check_extreme,
    check_unreal,
    extreme_call,
    second_of_two_levels,
)
from deform_malformed import malformed_call, refusal
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kernels import use_backend

FLOATING = [torch.float32, torch.float32, torch.float64, torch.float16]
MALFORMED = settings(max_examples=280, deadline=None, derandomize=True, database=None)
# Every call is some tenths of a second, and making a failure smaller would take hundreds of them.
EXTREME = settings(MALFORMED, max_examples=10, phases=[Phase.generate])
levels = pytest.mark.parametrize("levels", [False, True], ids=["one", "levels"])


@levels
@MALFORMED
@given(data=st.data())
def test_malformed_calls_are_refused_alike_on_both_paths(levels, data):
    call = data.draw(malformed_call(levels))
    assert refusal(call, "triton") == refusal(call, "torch")


@levels
@EXTREME
@given(data=st.data())
def test_extreme_calls_are_the_definitions(levels, data):
    check_extreme(data.draw(extreme_call(levels, FLOATING, few=True)), "triton", levels)


@pytest.mark.parametrize("inverse", [False, True], ids=["atomic", "deterministic"])
@pytest.mark.parametrize(("value", "axes"), list(zip(UNREAL, AXES, strict=True)))
def test_an_unreal_offset_samples_nothing(value, axes, inverse):
    with use_backend("triton"):
        check_unreal(alone, value, AXES[axes], inverse=inverse)


@pytest.mark.parametrize("inverse", [False, True], ids=["atomic", "deterministic"])
def test_an_unreal_offset_of_a_level_samples_nothing(inverse):
    with use_backend("triton"):
        check_unreal(second_of_two_levels, torch.nan, AXES["dy"], masked=False, inverse=inverse)
