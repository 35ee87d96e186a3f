"""Training batches on their device, the next one copied while a step computes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ablations.data.batch import Batch


class Feed:
    """The batches of a loader on a device.

    On a GPU `prefetch` copies the next batch on a stream of its own, beside the kernels of the step that was launched
    before it. Memory that is not pinned (`Loader`'s `pin`) is copied as well, and the caller waits for it. On a CPU
    batches go through untouched. A batch depends on its step alone, whatever was copied ahead.

    Args:
        batch: Step number -> batch, a pure function.
        device: Where the batches are wanted.
        cuda: What makes streams.
    """

    def __init__(self, batch: Callable[[int], Batch], device: torch.device, cuda: Any = torch.cuda):
        self.batch, self.device, self.cuda = batch, device, cuda
        self.stream = cuda.Stream(device) if device.type == "cuda" else None
        self.ahead: tuple[int, Batch] | None = None

    def __call__(self, step: int) -> Batch:
        """The batch of a step, ready for what is launched on the current stream from now on."""
        if self.stream is None:
            return self.batch(step)
        if self.ahead is None or self.ahead[0] != step:
            self.prefetch(step)
        assert self.ahead is not None
        batch, self.ahead = self.ahead[1], None
        current = self.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        # The memory belongs to the copying stream, which must not take it back while the step still reads it.
        for tensor in [*batch.images, *(v for t in batch.targets for v in t.values() if isinstance(v, Tensor))]:
            tensor.record_stream(current)
        return batch

    def prefetch(self, step: int) -> None:
        """Begin to copy the batch of a step. To be called when all of the step before it has been launched."""
        if self.stream is None:
            return
        batch = self.batch(step)
        with self.cuda.stream(self.stream):
            images = [image.to(self.device, non_blocking=True) for image in batch.images]
            targets = [
                {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in target.items()}
                for target in batch.targets
            ]
        self.ahead = step, Batch(images, targets, batch.extent)
