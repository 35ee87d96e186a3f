"""The rules of the house: imports run downward and in no circle, files and folders stay small."""

import ast
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from places import ROOT

ALLOWED = {"kernels": {"kernels"}, "heads": {"heads", "kernels"}, "ablations": {"ablations", "heads", "kernels"}}
FILES = [path for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MOST_LINES, MOST_FILES = 400, 14


def name_of(path: Path) -> str:
    """The module's name; a package is named by its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path) for path in FILES}


def imported(path: Path) -> set[str]:
    """What a file imports, also inside functions and for types alone: names of modules, or of what is in them."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction, write the package's name"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in inner}
    return names


def circle(imports: dict[str, set[str]]) -> list[str]:
    """A path along imports that comes back to where it began; empty where there is none."""
    done: set[str] = set()

    def walk(module: str, way: list[str]) -> list[str]:
        if module in way:
            return [*way[way.index(module) :], module]
        if module not in done:
            for other in sorted(imports.get(module, ())):
                if found := walk(other, [*way, module]):
                    return found
            done.add(module)
        return []

    return next((found for module in sorted(imports) if (found := walk(module, []))), [])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downward(path):
    package = path.relative_to(ROOT).parts[0]
    assert {name.split(".")[0] for name in imported(path)} & {*ALLOWED, "tests"} <= ALLOWED[package]


def test_no_import_comes_back_to_where_it_began():
    # A package's own face (`from kernels import nms`) imports its modules; a module that imports the face is a circle.
    assert circle({name_of(path): imported(path) & MODULES for path in FILES}) == []


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("path", FILES + TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_has_at_most_400_lines(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


def test_a_folder_has_at_most_14_files():
    count = Counter(path.parent.relative_to(ROOT) for path in FILES + TESTS if path.name != "__init__.py")
    assert {str(folder): n for folder, n in count.items() if n > MOST_FILES} == {}


def test_every_file_is_tracked_or_wanted():
    """A module that git ignores works here and nowhere else."""
    command = ["git", "check-ignore", *map(str, FILES + TESTS)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout == ""
