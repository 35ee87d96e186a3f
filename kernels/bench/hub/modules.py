"""Which modules a copy of this package needs, and their text with relative imports.

What is needed is what the imports say, from `package.py` on. Hugging Face's rules allow relative imports and torch
beside the standard library, and Triton on GPUs; anything else that an operator came to import is an error here.
"""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parents[2]
NAME = PACKAGE.name
START = f"{NAME}.bench.hub.package"
# Where a module lies in the copy: these at its top, and all others where they are here.
_MOVED = {START: "", f"{NAME}.bench.hub.layers": "layers"}
_ALLOWED = frozenset(sys.stdlib_module_names) | {"torch", "triton"}
_NAMESPACE = 'NAMESPACE = "dyhead"\n'
_LEFT_OUT = '''\
"""Not in this variant, which has no Triton."""

raise ImportError("{what} is not in the variant for CPUs: load that of your GPU, or select use_backend('torch')")
'''


class Import(NamedTuple):
    """An import statement of this package's.

    Attributes:
        node: The statement.
        modules: What it imports, in the package by full names, and of others the name of their top.
        lazy: Whether it is in a function, and so may never run.
    """

    node: ast.Import | ast.ImportFrom
    modules: tuple[str, ...]
    lazy: bool


def _path(module: str) -> Path:
    """The file of a module of this package, which may not exist."""
    place = PACKAGE.joinpath(*module.split(".")[1:])
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def _is_module(name: str) -> bool:
    return name.split(".")[0] == NAME and _path(name).is_file()


def _is_package(module: str) -> bool:
    return _path(module).name == "__init__.py"


@cache
def _imports(module: str) -> tuple[Import, ...]:
    tree = ast.parse(_path(module).read_text())
    lazy = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for inner in ast.walk(node)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            if any(name.split(".")[0] == NAME for name in names):
                raise ValueError(f"{module}: `{ast.unparse(node)}` has no relative form; write `from ... import`")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            inner = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if _is_module(name) else base for name in inner]
            if NAME in names:
                raise ValueError(f"{module}: `{ast.unparse(node)}` imports all that {NAME} has; name the module")
        else:
            continue
        names = [name if name.split(".")[0] == NAME else name.split(".")[0] for name in names]
        found.append(Import(node, tuple(dict.fromkeys(names)), id(node) in lazy))
    return tuple(found)


def _parents(module: str) -> Iterator[str]:
    """The packages that are imported before the module, but for the top, in whose place the copy's own stands."""
    if module not in _MOVED:
        parts = module.split(".")
        yield from (".".join(parts[:end]) for end in range(2, len(parts)))


@cache
def _with_imports(module: str) -> frozenset[str]:
    """The module and all that is imported when it is: full names in this package, the tops of others."""
    found: set[str] = set()
    queue = [module]
    while queue:
        name = queue.pop()
        if name in found:
            continue
        found.add(name)
        if _is_module(name):
            queue += [*_parents(name), *(x for i in _imports(name) if not i.lazy for x in i.modules)]
    return frozenset(found)


def needed(triton: bool) -> tuple[set[str], set[str]]:
    """The modules that a copy needs, and those it could ask for but is not given.

    Args:
        triton: Whether Triton may be imported. Without it, modules that need it are left out, which only functions
            may import.

    Raises:
        ValueError: something is imported that may not be; the message names it and the module that imports it.
    """
    kept: set[str] = set()
    left_out: set[str] = set()
    queue = [START]
    while queue:
        module = queue.pop()
        reached = _with_imports(module)
        if "triton" in reached and not triton:
            if module == START:
                raise ValueError("an operator imports Triton outside of a function, and there is none beside a CPU")
            left_out.add(module)
            continue
        new = {name for name in reached if _is_module(name)} - kept
        kept |= new
        queue += [x for name in new for i in _imports(name) if i.lazy for x in i.modules if _is_module(x)]
    for module in sorted(kept):
        for statement in _imports(module):
            foreign = [x for x in statement.modules if not _is_module(x)]
            if wrong := [x for x in foreign if x not in _ALLOWED or (x == "triton" and not triton)]:
                raise ValueError(f"{module} imports {', '.join(wrong)}, which a kernel of the Hub may not")
    return kept, left_out


def _location(module: str) -> str:
    """The module's name in the copy, without that of the copy."""
    return _MOVED.get(module, module.partition(".")[2])


def _file(module: str) -> str:
    """The path of the module in the copy."""
    place = _location(module).replace(".", "/")
    return f"{place}/__init__.py".lstrip("/") if _is_package(module) or not place else f"{place}.py"


def _relative(statement: Import, module: str) -> str:
    """What stands between `from` and `import` in the copy."""
    node = statement.node
    assert isinstance(node, ast.ImportFrom)
    parents = set()
    for alias in node.names:
        inner = f"{node.module}.{alias.name}"
        parents.add(_location(inner).rpartition(".")[0] if _is_module(inner) else _location(str(node.module)))
    if len(parents) > 1:
        raise ValueError(f"{module}: `{ast.unparse(node)}` imports from several places of a copy; split it")
    there = [x for x in parents.pop().split(".") if x]
    here = [x for x in _location(module).split(".") if x]
    here = here if _file(module).endswith("__init__.py") else here[:-1]
    common = 0
    while common < min(len(here), len(there)) and here[common] == there[common]:
        common += 1
    return "." * (1 + len(here) - common) + ".".join(there[common:])


def _rewritten(module: str, identity: str, public: list[str]) -> str:
    """The module's text in a copy that is registered, and imported, as `identity`."""
    lines = _path(module).read_text().splitlines(keepends=True)
    for statement in _imports(module):
        if statement.modules[0].split(".")[0] == NAME:
            node = statement.node
            assert isinstance(node, ast.ImportFrom)
            line, old = lines[node.lineno - 1], f"from {node.module} import"
            assert line.count(old) == 1, f"{module}, line {node.lineno}: an import that is not alone in its line"
            lines[node.lineno - 1] = line.replace(old, f"from {_relative(statement, module)} import")
    text = "".join(lines).replace(_NAMESPACE, _NAMESPACE.replace("dyhead", identity))
    # What is left stands in docstrings and messages: examples import what Hugging Face's package has loaded.
    text = text.replace(f"from {NAME} import", f"from {identity} import").replace("ops.dyhead", f"ops.{identity}")
    return re.sub(rf"\b{NAME}\.({'|'.join(public)})\b(?!\.)", r"\1", text)


def public_names() -> list[str]:
    """What the copy exports."""
    for node in ast.parse(_path(START).read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError(f"{START} has no __all__")


def texts(identity: str, triton: bool) -> dict[str, str]:
    """A copy of the operators: its files, by their paths.

    Args:
        identity: Under which its operators are registered, and by which it is imported.
        triton: Whether the copy may import Triton; without it, what needs it is replaced by an ImportError.

    Raises:
        ValueError: as in `needed`, or an import has no relative form, or the namespace is not where it was.
    """
    kept, left_out = needed(triton)
    if sum(_path(module).read_text().count(_NAMESPACE) for module in kept) != 1:
        raise ValueError(f"one module, and once, is to say where operators are registered: {_NAMESPACE.strip()}")
    public = public_names()
    files = {_file(module): _rewritten(module, identity, public) for module in kept}
    files |= {_file(module): _LEFT_OUT.format(what=_location(module)) for module in left_out}
    return dict(sorted(files.items()))
