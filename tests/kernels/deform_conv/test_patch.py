"""`patch_torchvision` on a stand-in for torchvision, whose function fails as users see it fail, and on the real one."""

import functools
import importlib
import subprocess
import sys
import threading
from types import ModuleType

import pytest
import torch
from places import ROOT
from torch import nn

import kernels
from kernels import DeformConv2d, deform_conv2d, patch_torchvision

FAILS = "Could not run 'torchvision::deform_conv2d' with arguments from the 'CUDA' backend"
SOURCE = f"""
from torch import nn


def deform_conv2d(input, offset, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), mask=None):
    raise NotImplementedError({FAILS!r})


class DeformConv2d(nn.Module):
    def __init__(self, like):
        super().__init__()
        self.weight, self.bias, self.padding = like.weight, like.bias, like.padding

    def forward(self, input, offset, mask=None):
        return deform_conv2d(input, offset, self.weight, self.bias, padding=self.padding, mask=mask)
"""
LAYER = DeformConv2d(4, 6, 3, padding=1)
X, OFFSET, MASK = torch.rand(1, 4, 5, 6), torch.randn(1, 18, 5, 6), torch.rand(1, 9, 5, 6)
EXPECTED = LAYER(X, OFFSET, MASK).detach()


def call(function):
    """As BiRefNet calls it."""
    return function(input=X, offset=OFFSET, weight=LAYER.weight, bias=LAYER.bias, padding=(1, 1), mask=MASK, stride=1)


def is_routed(function) -> bool:
    try:
        return torch.equal(call(function), EXPECTED)
    except NotImplementedError as error:
        assert FAILS in str(error)
        return False


@pytest.fixture
def make(monkeypatch):
    """Put a module into `sys.modules`, for as long as the test runs."""

    def module(name: str, source: str = "", **names) -> ModuleType:
        made = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, made)
        vars(made).update(names)
        exec(source, vars(made))
        return made

    return module


@pytest.fixture
def ops(make):
    """The stand-in's `torchvision.ops`, with its file `deform_conv`."""
    made = make("torchvision.ops.deform_conv", SOURCE)
    ops = make("torchvision.ops", deform_conv=made, deform_conv2d=made.deform_conv2d, DeformConv2d=made.DeformConv2d)
    make("torchvision", ops=ops, __path__=[])
    yield ops
    assert not is_routed(ops.deform_conv2d), "a test left its patch in force"


def test_the_stand_in_fails_as_torchvision_does(ops):
    with pytest.raises(NotImplementedError, match="Could not run"):
        call(ops.deform_conv2d)


def test_functions_and_modules_are_routed_while_the_statement_runs(ops):
    theirs, layer = ops.deform_conv2d, ops.DeformConv2d(LAYER)
    with patch_torchvision():
        assert is_routed(ops.deform_conv2d) and is_routed(ops.deform_conv.deform_conv2d)
        assert torch.equal(layer(X, OFFSET, MASK), EXPECTED)
        assert torch.equal(ops.DeformConv2d(LAYER)(X, OFFSET, MASK), EXPECTED)
    assert ops.deform_conv2d is theirs and ops.deform_conv.deform_conv2d is theirs
    with pytest.raises(NotImplementedError):
        layer(X, OFFSET, MASK)


def test_a_call_without_the_statement_and_its_undoing(ops):
    theirs = ops.deform_conv2d
    patch = patch_torchvision()
    assert is_routed(ops.deform_conv2d)
    patch.undo()
    assert ops.deform_conv2d is theirs
    patch.undo()
    assert ops.deform_conv2d is theirs
    with pytest.raises(RuntimeError, match="has been undone"):
        with patch:
            pass


def test_a_statement_that_fails_is_undone(ops):
    with pytest.raises(KeyError):
        with patch_torchvision():
            raise KeyError
    assert not is_routed(ops.deform_conv2d)


def test_names_that_models_imported_before_are_routed(ops, make):
    model = make("model", "from torchvision.ops import deform_conv2d as dcn\ndef forward(call): return call(dcn)")
    theirs = model.dcn
    assert theirs is ops.deform_conv2d
    with patch_torchvision():
        assert torch.equal(model.forward(call), EXPECTED)
    assert model.dcn is theirs


def test_names_that_models_import_meanwhile_are_torchvisions_afterwards(ops, make):
    with patch_torchvision():
        model = make("model", "from torchvision.ops import deform_conv2d")
        kept = functools.partial(model.deform_conv2d)
        assert is_routed(model.deform_conv2d) and is_routed(kept)
    assert model.deform_conv2d is ops.deform_conv2d
    # What no global name holds cannot be exchanged; it knows by itself.
    assert not is_routed(kept)


def test_nobody_else_loses_the_operator(ops, make):
    user = make("user", "from kernels import deform_conv2d")
    with patch_torchvision():
        assert user.deform_conv2d is deform_conv2d
    assert user.deform_conv2d is deform_conv2d and kernels.deform_conv2d is deform_conv2d


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_patches_count_whatever_the_order_they_are_undone_in(ops, order):
    theirs = ops.deform_conv2d
    patches = [patch_torchvision() for _ in range(3)]
    for number in order:
        assert is_routed(ops.deform_conv2d)
        patches[number].undo()
        patches[number].undo()
    assert ops.deform_conv2d is theirs


def test_nested_statements(ops):
    with patch_torchvision():
        with patch_torchvision():
            assert is_routed(ops.deform_conv2d)
        assert is_routed(ops.deform_conv2d)
    assert not is_routed(ops.deform_conv2d)


def test_what_someone_else_put_there_meanwhile_stays(ops):
    def other():
        pass

    theirs = ops.deform_conv.deform_conv2d
    with patch_torchvision():
        ops.deform_conv2d = other
    assert ops.deform_conv2d is other and ops.deform_conv.deform_conv2d is theirs
    ops.deform_conv2d = theirs


def test_two_functions_in_the_two_places_are_both_given_back(ops):
    """Somebody patched one of them before."""
    theirs, other = ops.deform_conv2d, functools.partial(ops.deform_conv2d)
    ops.deform_conv2d = other
    with patch_torchvision():
        assert is_routed(ops.deform_conv2d) and is_routed(ops.deform_conv.deform_conv2d)
    assert ops.deform_conv2d is other and ops.deform_conv.deform_conv2d is theirs


def test_a_lazy_module_is_asked_for_nothing(ops, monkeypatch):
    class Lazy(ModuleType):
        def __getattr__(self, name):
            raise AssertionError(f"asked for {name}")

    monkeypatch.setitem(sys.modules, "lazy", Lazy("lazy"))
    monkeypatch.setitem(sys.modules, "nothing", None)
    with patch_torchvision():
        assert is_routed(ops.deform_conv2d)


def test_threads_that_patch_at_once_leave_nothing_behind(ops):
    theirs, wrong = ops.deform_conv2d, []
    start = threading.Barrier(8)

    def work():
        start.wait()
        for _ in range(20):
            with patch_torchvision():
                if ops.deform_conv2d is theirs:
                    wrong.append("not routed")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and ops.deform_conv2d is theirs


def test_the_signature_is_torchvisions(ops):
    with patch_torchvision():
        arguments = (X, OFFSET, LAYER.weight, LAYER.bias, (1, 1), (1, 1), (1, 1), MASK)
        assert torch.equal(ops.deform_conv2d(*arguments), EXPECTED)
        assert ops.deform_conv2d.__name__ == "deform_conv2d"
        assert ops.deform_conv2d(X, OFFSET[..., 1:-1, 1:-1], LAYER.weight).shape == (1, 6, 3, 4)


def test_a_routed_model_compiles_whole_and_trains(ops):
    layer = ops.DeformConv2d(LAYER)
    with patch_torchvision():
        found = torch.compile(layer, fullgraph=True, backend="aot_eager")(X, OFFSET, MASK)
        torch.testing.assert_close(found, EXPECTED)
        (gradient,) = torch.autograd.grad(found.sum(), LAYER.weight)
    (expected,) = torch.autograd.grad(LAYER(X, OFFSET, MASK).sum(), LAYER.weight)
    torch.testing.assert_close(gradient, expected)


def test_a_compiled_model_notices_the_undoing(ops):
    layer = torch.compile(ops.DeformConv2d(LAYER), backend="eager")
    with patch_torchvision():
        assert torch.equal(layer(X, OFFSET, MASK), EXPECTED)
    with pytest.raises(Exception, match="Could not run"):
        layer(X, OFFSET, MASK)


def test_no_torchvision_is_said_with_the_way_out(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(ImportError, match=r"torchvision is not installed.*kernels\.deform_conv2d") as caught:
        patch_torchvision()
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("operator torchvision::nms does not exist"),
        OSError("libcudart.so.13: cannot open shared object file"),
        ModuleNotFoundError("No module named 'torch._custom_ops'", name="torch._custom_ops"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_torchvision_that_does_not_import_is_said_with_the_way_out(monkeypatch, error):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent(error), *sys.meta_path])
    with pytest.raises(ImportError, match=r"does not import.*another torch.*kernels\.DeformConv2d") as caught:
        patch_torchvision()
    assert caught.value.__cause__ is error and str(error) in str(caught.value)


class Absent:
    """A finder that fails on torchvision: as where there is none, or by another error."""

    def __init__(self, error: Exception | None = None):
        self.error = error

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            raise self.error or ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_importing_the_kernels_imports_no_torchvision():
    code = "import sys, kernels; assert not [name for name in sys.modules if 'torchvision' in name]"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_real_one():
    # One that was built for another torch raises a RuntimeError, not an ImportError.
    try:
        ops = importlib.import_module("torchvision.ops")
    except Exception as error:
        pytest.skip(f"torchvision does not import: {type(error).__name__}: {error}")
    theirs, layer = ops.deform_conv2d, ops.DeformConv2d(4, 6, 3, padding=1)
    ours = DeformConv2d(4, 6, 3, padding=1)
    ours.load_state_dict(layer.state_dict(), strict=True)
    assert repr(ours) == repr(layer) and vars(ours).keys() == vars(layer).keys()
    before = [layer(X, OFFSET, MASK)] if importlib.import_module("torchvision.extension")._has_ops() else []
    with patch_torchvision():
        assert ops.deform_conv2d is not theirs
        found = layer(X, OFFSET, MASK)
    assert torch.equal(found, ours(X, OFFSET, MASK)) and isinstance(layer, nn.Module)
    for expected in before:
        torch.testing.assert_close(found, expected)
    assert ops.deform_conv2d is theirs
