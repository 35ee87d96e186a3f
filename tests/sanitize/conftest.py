"""Every launch of these tests is Triton's own IR, executed on a CPU that passes for a GPU; see requirements.txt."""

import pytest
import torch


@pytest.fixture(autouse=True)
def checked(monkeypatch, poison):
    """Tensors claim to be on a GPU; a launch that leaves its tensors or races raises, and no launch is too large.

    Yields:
        The session: `launches` is the number of kernels launched so far.
    """
    sanitize = pytest.importorskip("ttsem.sanitize", reason="ttsem is not installed; `make sanitize` installs it")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in ("is_available", "device_count", "get_device_name", "get_device_capability"):
        # The session replaces these for good.
        monkeypatch.setattr(torch.cuda, name, getattr(torch.cuda, name))
    with sanitize.session() as session:
        yield session
    assert session.launches and not session.races_unchecked


@pytest.fixture(params=[False, True], ids=["atomics", "deterministic"])
def algorithms(request):
    """With atomic additions, and as `torch.use_deterministic_algorithms` wants it."""
    torch.use_deterministic_algorithms(request.param)
    yield
    torch.use_deterministic_algorithms(False)
