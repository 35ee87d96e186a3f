"""The order in which batches are copied, waited for and used, with streams that only note what is asked of them."""

from contextlib import contextmanager

import pytest
import torch

from ablations.data.batch import Batch
from ablations.data.feed import Feed

GPU = torch.device("cuda", 0)


class Cuda:
    """Stands in for `torch.cuda`: notes every call."""

    def __init__(self):
        self.calls, self.now = [], "current"

    def Stream(self, device):
        return "side"

    def current_stream(self, device):
        return self

    def wait_stream(self, stream):
        self.calls.append(f"{self.now} waits for {stream}")

    @contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream
        yield
        self.now = before


class Noting(torch.Tensor):
    """A tensor that notes where it is copied, and who says to use it."""

    def to(self, device, non_blocking):
        assert device == GPU and non_blocking
        self.cuda_.calls.append(f"{self.called} copied on {self.cuda_.now}")
        return self

    def record_stream(self, stream):
        assert stream is self.cuda_
        self.cuda_.calls.append(f"{self.called} used by {self.cuda_.now}")


def noting(cuda, name):
    tensor = torch.empty(1).as_subclass(Noting)
    tensor.cuda_, tensor.called = cuda, name
    return tensor


@pytest.fixture
def cuda():
    return Cuda()


@pytest.fixture
def feed(cuda):
    def batch(step):
        cuda.calls.append(f"make {step}")
        return Batch(
            [noting(cuda, f"image {step}")], [{"boxes": noting(cuda, f"boxes {step}"), "image_id": step}], (1, 1)
        )

    return Feed(batch, GPU, cuda)


def test_a_batch_is_copied_aside_and_waited_for_when_it_is_used(feed, cuda):
    feed.prefetch(3)
    assert cuda.calls == ["make 3", "image 3 copied on side", "boxes 3 copied on side"]
    cuda.calls.clear()
    assert feed(3).targets[0]["image_id"] == 3
    assert cuda.calls == ["current waits for side", "image 3 used by current", "boxes 3 used by current"]


def test_a_batch_depends_on_its_step_whatever_was_copied_ahead(feed, cuda):
    feed.prefetch(4)
    assert feed(9).targets[0]["image_id"] == 9
    assert feed(9).targets[0]["image_id"] == 9
    assert cuda.calls.count("make 9") == 2


def test_on_a_cpu_batches_go_through_untouched(cuda):
    batches = {step: Batch([], [], (step, step)) for step in range(2)}
    feed = Feed(batches.__getitem__, torch.device("cpu"), cuda)
    feed.prefetch(1)
    assert feed(0) is batches[0] and cuda.calls == [] and feed.ahead is None
