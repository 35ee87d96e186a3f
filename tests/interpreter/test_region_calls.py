"""Malformed and extreme calls of RoIAlign, BorderAlign and suppression, on the Triton path; bfloat16 is wrong here."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from region_calls import MALFORMED, check_sampled, check_suppression, malformed_call, refusal, sampled, suppression

FLOATING = [torch.float32, torch.float32, torch.float64, torch.float16]
# A call that is refused costs nothing here, one that runs up to a second.
REFUSED = settings(max_examples=250, deadline=None, derandomize=True, database=None)
EXTREME = settings(REFUSED, max_examples=60)


@pytest.mark.parametrize("name", MALFORMED)
@REFUSED
@given(data=st.data())
def test_malformed_calls_are_refused_alike_on_both_paths(name, data):
    call = data.draw(malformed_call(name))
    assert refusal(call, "triton") == refusal(call, "torch")


@pytest.mark.parametrize("kind", ["lists", "rows", "border"])
@EXTREME
@given(data=st.data())
def test_extreme_samples_are_the_definitions(kind, data):
    check_sampled(kind, data.draw(sampled(kind, FLOATING)), "triton")


@pytest.mark.parametrize("with_labels", [False, True], ids=["nms", "batched_nms"])
@EXTREME
@given(data=st.data())
def test_extreme_boxes_are_suppressed_as_in_the_plain_walk(with_labels, data):
    check_suppression(data.draw(suppression(with_labels, FLOATING)), "triton")
