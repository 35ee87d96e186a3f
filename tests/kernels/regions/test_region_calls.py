"""Malformed and extreme calls of RoIAlign, BorderAlign and suppression: refused by name, or the definition's values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from region_calls import MALFORMED, check_sampled, check_suppression, malformed_call, refusal, sampled, suppression

FLOATING = [torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16]
EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize("name", MALFORMED)
@EXAMPLES
@given(data=st.data())
def test_malformed_calls_are_refused(name, data):
    refusal(data.draw(malformed_call(name)), "torch")


@pytest.mark.parametrize("kind", ["lists", "rows", "border"])
@EXAMPLES
@given(data=st.data())
def test_extreme_samples_are_the_definitions(kind, data):
    check_sampled(kind, data.draw(sampled(kind, FLOATING)), "torch")


@pytest.mark.parametrize("with_labels", [False, True], ids=["nms", "batched_nms"])
@EXAMPLES
@given(data=st.data())
def test_extreme_boxes_are_suppressed_as_in_the_plain_walk(with_labels, data):
    check_suppression(data.draw(suppression(with_labels, FLOATING)), "torch")
