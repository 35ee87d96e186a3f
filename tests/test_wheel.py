"""The wheel that `pip wheel .` makes: what is in it, that it runs without the repository, and beside a namesake."""

import re
import subprocess
import sys
import zipfile

import pytest
from places import ROOT

THEIRS = "def get_kernel(repository): ...\n"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The folder into which the wheel was unpacked, as pip does it."""
    folder = tmp_path_factory.mktemp("wheel")
    # A copy of what git has: a build leaves folders behind.
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.split("\0"):
        if re.match(r"(kernels|heads|ablations)/|pyproject.toml|README.md|LICENSE", name) and (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--quiet", "-w", ".."]
    subprocess.run(command, cwd=folder / "source", check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    assert re.fullmatch(r"dyhead_lab-[\d.]+\w*-py3-none-any\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(code, *places, cwd):
    start = f"import sys; sys.path[:0] = {[str(place) for place in places]}\n"
    return subprocess.run([sys.executable, "-I", "-c", start + code], cwd=cwd, capture_output=True, text=True)


def test_the_packages_and_what_they_read_are_in_it(unpacked):
    inside = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    tracked = subprocess.run(
        ["git", "ls-files", "kernels", "heads", "ablations"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {name for name in tracked if (ROOT / name).is_file()} - inside
    assert {name.split("/")[0] for name in inside if "dist-info" not in name} == {"kernels", "heads", "ablations"}


def test_readmes_three_lines_run_from_it(unpacked, tmp_path):
    block = re.search(r"```python\n(>>> import torch; from heads.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.removeprefix(">>> ") for line in block[1].splitlines() if line.startswith(">>> ")]
    code = "\n".join([*lines[:-1], f"print({lines[-1]})", "import heads; print(heads.__file__)"])
    done = run(code, unpacked, cwd=tmp_path)
    wanted = [line for line in block[1].splitlines() if line.startswith("[")]
    assert done.stdout.splitlines() == [*wanted, str(unpacked / "heads" / "__init__.py")], done.stderr


def test_a_namesake_in_place_of_ours_is_said(unpacked, tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(THEIRS)
    done = run("from heads import DyHead", tmp_path, unpacked, cwd=tmp_path)
    assert f"ImportError: the package kernels at {tmp_path}/kernels/__init__.py is not dyhead-lab's" in done.stderr
    assert "keep the two in separate environments" in done.stderr


def test_ours_in_place_of_the_namesake_is_said(unpacked, tmp_path):
    done = run("from kernels import get_kernel", unpacked, cwd=tmp_path)
    assert "ImportError: get_kernel is of Hugging Face's package kernels; the one at" in done.stderr
    done = run("import kernels; print(hasattr(kernels, 'no_such_name'))", unpacked, cwd=tmp_path)
    assert done.stdout == "False\n"
