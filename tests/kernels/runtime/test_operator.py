"""How operators are registered and called: when the dispatcher is skipped, what is remembered, and what is the same."""

import ast
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import border_align, deform_conv2d, deform_conv2d_levels, dynamic_relu, nms, roi_align, use_backend
from kernels.runtime import checks
from kernels.runtime.checks import remembered
from kernels.runtime.operator import Operator, once, signature

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("package", ["kernels", "heads", "ablations"])
def test_what_is_private_to_pytorch_is_used_in_one_file(package):
    for path in (ROOT / package).rglob("*.py"):
        if path != ROOT / "kernels/runtime/operator.py":
            for node in ast.walk(ast.parse(path.read_text())):
                named = isinstance(node, ast.Attribute) and node.attr == "_C"
                imported = isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch._C")
                assert not named and not imported, f"{path}:{node.lineno}"


SHAPES = {
    "x": (2, 4, 5, 6),
    "offset": (2, 18, 5, 6),
    "mask": (2, 9, 5, 6),
    "weight": (3, 4, 3, 3),
    "lines": (2, 4, 4),
}


def tensors(names: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (2, 4, 5, 6),
        "offset": (2, 18, 5, 6),
        "mask": (2, 9, 5, 6),
        "weight": (3, 4, 3, 3),
        "lines": (2, 4, 4),
    }
    return {name: torch.rand(shapes[name], generator=generator) for name in names.split()}


BOX = torch.tensor([[0.5, 0.5, 3.0, 4.0]])
# Every operator as a function of a map.
CALLS = {
    "deform_conv2d": lambda x: deform_conv2d(x, **tensors("offset weight mask"), padding=1),
    "dynamic_relu": lambda x: dynamic_relu(x, tensors("lines")["lines"]),
    "roi_align": lambda x: roi_align(x, [BOX, BOX], (2, 2)),
    "border_align": lambda x: border_align(x, BOX[None].repeat(2, 1, 1), 2),
}


@pytest.fixture
def dispatched(monkeypatch):
    """The names of the operators that went through the dispatcher."""
    seen = []
    call = Operator.__call__

    def spy(self, key, *arguments):
        if key is None:
            seen.append(self.name)
        return call(self, key, *arguments)

    monkeypatch.setattr(Operator, "__call__", spy)
    return seen


class Named(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **kwargs or {})


class Function(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("name", CALLS)
def test_a_plain_call_skips_the_dispatcher_and_gives_the_same(name, dispatched):
    x = tensors("x")["x"].requires_grad_()
    straight = CALLS[name](x)
    (gradient,) = torch.autograd.grad(straight.square().sum(), x)
    assert not dispatched
    with Named() as mode:
        around = CALLS[name](x)
        (expected,) = torch.autograd.grad(around.square().sum(), x)
    assert dispatched == [name]
    assert {f"dyhead::{name}", f"dyhead::{name}_backward"} <= set(mode.names)
    assert torch.equal(straight, around) and torch.equal(gradient, expected)
    assert straight.stride() == around.stride()


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_the_result_of_a_plain_call_can_be_changed_in_place(name, requires_grad):
    x = tensors("x")["x"].requires_grad_(requires_grad)
    scale = torch.tensor(2.0, requires_grad=True)
    out = CALLS[name](x)
    expected = out.detach().sum()
    (found,) = torch.autograd.grad(out.mul_(scale).sum(), scale)
    torch.testing.assert_close(found, expected)


OBSERVERS = {
    "a dispatch mode": Named,
    "a function mode": Function,
    "a default device": lambda: torch.device("cpu"),
    "a profiler": profile,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("name", OBSERVERS)
def test_whoever_listens_is_told(name, dispatched):
    x, lines = tensors("x lines").values()
    with OBSERVERS[name]() as observer:
        dynamic_relu(x, lines)
    assert dispatched == ["dynamic_relu"]
    if name == "a profiler":
        assert "dyhead::dynamic_relu" in {event.name for event in observer.events()}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: use_backend("torch")])
def test_nobody_listens_without_gradients_and_on_a_chosen_path(context, dispatched):
    with context():
        dynamic_relu(*tensors("x lines").values())
    assert not dispatched


def test_tensors_of_another_kind_have_no_signature():
    x = torch.ones(2, 3)
    with torch.inference_mode():
        frozen = torch.ones(2, 3)
    plain = (x, torch.nn.Parameter(x), frozen)
    assert all(signature(each) is not None for each in plain)
    other = (x.as_subclass(Subclass), x.to("meta"), x.to_sparse(), torch._neg_view(x), [x], 1.0, x.numpy())
    assert all(signature(x, each) is None for each in other)
    seen = []
    torch.vmap(lambda row: seen.append(signature(row)) or row)(x)
    torch.func.grad(lambda y: seen.append(signature(y)) or y.sum())(x)
    torch.jit.trace(lambda y: seen.append(signature(y)) or y + 1, x, check_trace=False)
    assert seen == [None] * 3


def test_a_signature_tells_calls_apart():
    x = torch.ones(2, 3)
    calls = [(x,), (x, None), (None, x), (x, x), (x[:1],), (x.t(),), (x.double(),), (x[0],)]
    assert len({signature(*call) for call in calls}) == len(calls)
    assert signature(x) == signature(torch.zeros(2, 3)) == signature(torch.nn.Parameter(x))


def test_a_check_is_made_once_a_signature_and_forgets_errors_and_the_oldest(monkeypatch):
    monkeypatch.setattr(checks, "KEPT", 2)
    calls = []

    @remembered
    def check(value):
        calls.append(value)
        if value < 0:
            raise ValueError
        return 2 * value

    assert [check(key, key) for key in (1, 2, 1, 2)] == [2, 4, 2, 4] and calls == [1, 2]
    assert check(3, 3) == 6 and check(2, 2) == 4 and calls == [1, 2, 3]
    assert check(1, 1) == 2 and calls == [1, 2, 3, 1]
    assert check(None, 7) == check(None, 7) == 14 and calls[-2:] == [7, 7]
    for _ in range(2):
        with pytest.raises(ValueError):
            check(-1, -1)
    assert calls[-2:] == [-1, -1]


def test_what_looks_like_a_good_call_is_still_refused():
    """Each of these has the shapes of a call that was good, and settings that are equal to its."""
    x, offset, weight = tensors("x offset weight").values()
    deform_conv2d(x, offset, weight, padding=1)
    for name, value in (("padding", True), ("stride", 1.0), ("stride", (1, True))):
        with pytest.raises(TypeError, match=f"{name} must be a whole number"):
            deform_conv2d(x, offset, weight, **{"padding": 1, name: value})
    deform_conv2d_levels([x], [offset], weight, padding=1)
    with pytest.raises(ValueError, match="masks must be as many as inputs, 1, got 0"):
        deform_conv2d_levels([x], [offset], weight, padding=1, masks=[])
    with pytest.raises(TypeError, match="inputs must be a list"):
        deform_conv2d_levels(x, [offset], weight, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        deform_conv2d(x.bfloat16(), offset, weight, padding=1)
    with pytest.raises(ValueError, match="input must be of weight's type"):
        deform_conv2d(x.bfloat16(), offset, weight, padding=1)


def test_the_same_shapes_with_other_settings_are_another_call():
    x, offset, weight = tensors("x offset weight").values()
    first = deform_conv2d(x, offset, weight, padding=1)
    second = deform_conv2d(x, offset, weight, padding=2, dilation=2)
    assert first.shape == second.shape and not torch.equal(first, second)
    assert torch.equal(deform_conv2d(x, offset, weight, padding=(1, 1)), first)


@pytest.mark.parametrize("name", CALLS)
def test_a_second_derivative_is_refused_with_one_sentence(name):
    x = tensors("x")["x"].requires_grad_()
    (gradient,) = torch.autograd.grad(CALLS[name](x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=rf"^{name} has no second derivative$"):
        gradient.sum().backward()


def test_once_computes_and_then_refuses():
    x = torch.ones(2, requires_grad=True)
    assert once("thing", lambda: [x.detach() + 1], [x.detach()])[0].grad_fn is None
    with torch.no_grad():
        assert once("thing", lambda: x + 1, [[x]]).grad_fn is None
    (found,) = once("thing", lambda: [x + 1], [3, [x]])
    with pytest.raises(NotImplementedError, match=r"^thing has no second derivative$"):
        found.sum().backward()


@pytest.mark.parametrize("name", CALLS)
def test_autocast_changes_nothing_inside(name):
    """Its matrix products would be in bfloat16."""
    x = tensors("x")["x"].bfloat16().float().requires_grad_()
    if name == "deform_conv2d":
        pytest.skip("it is cast as a whole, which its own tests check")
    expected = CALLS[name](x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    with torch.autocast("cpu", torch.bfloat16):
        found = CALLS[name](x)
        (other,) = torch.autograd.grad(found.square().sum(), x)
    assert torch.equal(found, expected) and torch.equal(gradient, other)


def test_a_constant_result_needs_no_gradient():
    boxes, scores = torch.rand(3, 4).requires_grad_(), torch.rand(3).requires_grad_()
    assert not nms(boxes, scores, 0.5).requires_grad
