"""What a compiled kernel was made from, as a short hash that tells whether a table of compiled kernels is stale."""

import ast
import hashlib
import textwrap
from functools import cache
from typing import Any

import triton
from triton.language import constexpr
from triton.runtime.jit import JITFunction

from kernels.runtime.compile_spec import CompileSpec


def fingerprint(spec: CompileSpec) -> str:
    """Twelve hexadecimal digits of the kernel, every device function it calls, and how it is compiled.

    Comments, docstrings, annotations, layout and the place of a function in its file do not count, nor does what is
    Triton's own: the table says with which version it was made.
    """
    sources: dict[str, str] = {}
    _collect(spec.kernel, sources)
    settings = [
        sorted((name, repr(kind)) for name, kind in spec.signature.items()),
        sorted((name, _plain(value)) for name, value in spec.settings.items()),
        (spec.num_warps, spec.num_stages, spec.compiled_in, sorted(spec.divisible), spec.exact),
    ]
    text = repr(sorted(sources.items())) + repr(settings)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _collect(function: Any, sources: dict[str, str]) -> None:
    """Add the code of a `@triton.jit` function and of all that it reaches, by name."""
    key = f"{function.fn.__module__}.{function.fn.__qualname__}"
    if key in sources:
        return
    code, names = _code(function)
    sources[key] = code
    for name in names:
        value = function.fn.__globals__
        try:
            for number, part in enumerate(name.split(".")):
                value = value[part] if number == 0 else getattr(value, part)
        except (KeyError, AttributeError):
            continue
        if isinstance(value, JITFunction) and not value.fn.__module__.startswith("triton."):
            _collect(value, sources)
        elif isinstance(value, (int, float, str, tuple, constexpr)):
            sources[f"{key}: {name}"] = _plain(value)
        elif isinstance(value, type) and issubclass(value, tuple):
            sources[f"{key}: {name}"] = repr(getattr(value, "_fields", ()))


@cache
def _code(function: Any) -> tuple[str, tuple[str, ...]]:
    """The code without what does not count, and the names that it reads."""
    tree = ast.parse(textwrap.dedent(function.src))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.decorator_list, node.returns = [], None
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        elif isinstance(node, ast.arg) and "constexpr" not in ast.dump(node.annotation or ast.Constant(0)):
            node.annotation = None
    names = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, (ast.Name, ast.Attribute))}
    return ast.unparse(tree), tuple(sorted(names))


def _plain(value: Any) -> str:
    value = value.value if isinstance(value, constexpr) else value
    if isinstance(value, triton.language.dtype):
        return value.name
    return repr(value)
