"""What is written for Hugging Face's Kernel Hub: its files, and that a copy computes what this package computes."""

import ast
import base64
import hashlib
import json
import keyword
import os
import re
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import pytest
import torch
from places import ROOT, TESTS

from kernels import deform_conv2d, dynamic_relu, roi_align
from kernels.bench.hub import layers, layout, modules
from kernels.bench.hub.__main__ import main
from kernels.bench.hub.card import NEEDS

HERE = TESTS / "kernels" / "bench" / "hub"
VARIANTS = {"torch-cpu": "cpu", "torch-cuda": "cuda", "torch-rocm": "rocm"}
each_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder that the program writes."""
    out = tmp_path_factory.mktemp("hub") / "out"
    assert main([str(out)]) == 0
    return out


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def metadata(out, variant):
    return json.loads((out / "build" / variant / "metadata.json").read_text())


def beside(out, variant, backend):
    """What `beside.py` says."""
    paths = os.pathsep.join(map(str, (ROOT, TESTS / "support")))
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    environment["TRITON_INTERPRET"] = "1" if backend == "triton" else "0"
    command = [sys.executable, HERE / "beside.py", out / "build" / variant, backend]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_written_twice_it_is_the_same(out, tmp_path):
    assert main([str(tmp_path)]) == 0
    assert content(tmp_path) == content(out)


def test_what_it_wrote_is_written_anew_and_the_rest_stays(out, tmp_path):
    assert main([str(tmp_path), "--owner", "someone"]) == 0
    assert "someone/dyhead" in (tmp_path / "README.md").read_text()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("theirs")
    (tmp_path / "build" / "torch-cpu" / "stale.py").write_text("")
    assert main([str(tmp_path)]) == 0
    assert content(tmp_path) == content(out) | {".git/HEAD": b"theirs"}


@pytest.mark.parametrize("name", ["notes.txt", "build.toml"])
def test_what_others_wrote_is_left_alone(tmp_path, capsys, name):
    (tmp_path / name).write_text("[general]")
    assert main([str(tmp_path)]) == main([str(tmp_path / name)]) == 2
    assert "holds files that this program did not write" in capsys.readouterr().err
    assert content(tmp_path) == {name: b"[general]"}


def test_an_owner_is_a_name(tmp_path, capsys):
    assert main([str(tmp_path), "--owner", 'a"/b']) == 2
    assert "no user or organisation" in capsys.readouterr().err and not any(tmp_path.iterdir())


@each_variant
def test_imports_are_relative_and_of_what_is_there(out, variant):
    folder = out / "build" / variant
    allowed = sys.stdlib_module_names | {"torch"} | ({"triton"} if variant != "torch-cpu" else set())
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.relative_to(folder)}: {ast.unparse(node)}" if isinstance(node, ast.ImportFrom) else path
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, where
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in allowed, where
            elif isinstance(node, ast.ImportFrom):
                place = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                assert place.is_relative_to(folder), where
                for alias in node.names:
                    inner = [place / f"{alias.name}.py", place.with_suffix(".py"), place / "__init__.py"]
                    assert any(file.is_file() for file in inner), where


def code(path):
    """What a file says, but for where it imports from and what its texts are."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            node.module, node.level = None, 0
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.dump(tree)


def test_the_code_is_this_package_s(out):
    kernels, folder = ROOT / "kernels", out / "build" / "torch-cuda"
    moved = {name: kernels / "bench" / "hub" / f"{name}.py" for name in ("package", "layers")}
    own = {folder / "__init__.py": moved["package"], folder / "layers.py": moved["layers"]}
    copies = set(folder.rglob("*.py")) - {folder / "dyhead" / "__init__.py"}
    assert {str(path.relative_to(folder)) for path in copies} >= {"deform_conv/launch.py", "sampling/maps.py"}
    for path in copies:
        assert code(path) == code(own.get(path, kernels / path.relative_to(folder))), path


@each_variant
def test_metadata_are_complete(out, variant):
    found = metadata(out, variant)
    assert {"id", "name", "version", "license", "python-depends", "backend", "digest"} <= found.keys()
    assert found["id"].isidentifier() and not keyword.iskeyword(found["id"])
    assert re.fullmatch("[a-z][-a-z0-9]*[a-z0-9]", found["name"]) and found["license"] == "mit"
    assert type(found["version"]) is int and found["python-depends"] == []
    assert found["backend"] == {"type": VARIANTS[variant]}
    files = content(out / "build" / variant)
    del files["metadata.json"]
    digests = {path: base64.b64encode(hashlib.sha256(x).digest()).decode() for path, x in files.items()}
    assert found["digest"] == {"algorithm": "sha256", "files": digests}


def test_every_variant_has_a_namespace_of_its_own(out):
    names = {metadata(out, variant)["id"] for variant in VARIANTS}
    assert len(names | {"dyhead"}) == len(VARIANTS) + 1
    for variant in VARIANTS:
        texts = [path.read_text() for path in (out / "build" / variant).rglob("*.py")]
        assert sum(f'NAMESPACE = "{metadata(out, variant)["id"]}"' in text for text in texts) == 1
        # Nor do docstrings and examples name what a user of the Hub does not have.
        assert not any(re.search(r"ops\.dyhead\b|\"dyhead\"|dyhead::|from kernels\b", text) for text in texts)


def test_a_copy_for_cpus_beside_this_package_has_its_bits(out):
    found = beside(out, "torch-cpu", "torch")
    assert found["namespaces"] == [metadata(out, "torch-cpu")["id"], "dyhead"] and found["registered"] == [True, True]
    assert found["unequal"] == [] and found["older"] == []
    assert len(found["examples"]) == 4 and all(not failed and tried for failed, tried in found["examples"])
    assert found["message"] == "parameters must be BlockParameters, got None"
    # What only a GPU's variant has says so when it is asked for.
    assert {"block.launch", "deform_conv.launch"} <= found["imported"].keys()
    assert all("not in the variant for CPUs" in text for text in found["imported"].values())


def test_a_copy_for_gpus_beside_this_package_has_its_bits(out):
    found = beside(out, "torch-cuda", "triton")
    assert found["namespaces"] == [metadata(out, "torch-cuda")["id"], "dyhead"] and found["registered"] == [True, True]
    assert found["unequal"] == [] and found["older"] == [] and found["imported"] == {}
    assert found["tuned"] == str(out / "build" / "torch-cuda" / "tuned" / "Some_GPU.json")


def test_tuned_tiles_go_along(out, tmp_path, monkeypatch):
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "Some_GPU.json").write_text("{}")
    monkeypatch.setattr(layout, "PACKAGE", tmp_path)
    files = layout.repository_files()
    assert {path for path in files if "tuned/" in path} == {
        f"build/{variant}/tuned/Some_GPU.json" for variant in ("torch-cuda", "torch-rocm")
    }
    found = json.loads(files["build/torch-cuda/metadata.json"])
    assert "tuned/Some_GPU.json" in found["digest"]["files"]
    assert found["id"] != metadata(out, "torch-cuda")["id"], "another content has another namespace"


@pytest.mark.parametrize(
    ("start", "triton", "message"),
    [
        ("kernels.regions.nms", True, "kernels.regions.nms imports numpy"),
        ("kernels.bench.table", True, "kernels.bench.table imports tabulate"),
        ("kernels.block.launch", False, "Triton outside of a function"),
    ],
)
def test_an_import_that_the_hub_forbids_is_named(monkeypatch, start, triton, message):
    monkeypatch.setattr(modules, "START", start)
    with pytest.raises(ValueError, match=message):
        modules.needed(triton)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import kernels.backend", "no relative form"),
        ("from kernels import nms", "imports all that kernels has"),
        ("from kernels.bench.hub import layers, layout", "several places"),
    ],
)
def test_an_import_without_a_relative_form_is_named(tmp_path, monkeypatch, text, message):
    path, start = tmp_path / "start.py", "kernels.start"
    path.write_text(f"{text}\n")
    whole = modules._path
    monkeypatch.setattr(modules, "_path", lambda module: path if module == start else whole(module))
    with pytest.raises(ValueError, match=message):
        for statement in modules._imports.__wrapped__(start):
            modules._relative(statement, start)


def test_the_card_asks_for_what_the_project_asks_for(out):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {name: f"{name}{NEEDS[name]}" for name in ("torch", "triton")}
    assert project["requires-python"] == NEEDS["requires-python"]
    assert [line.split(";")[0] for line in project["dependencies"][:2]] == list(wanted.values())
    card = (out / "README.md").read_text()
    assert all(needed in card for needed in NEEDS.values())


def test_layers_are_pure_and_compute_what_the_functions_compute():
    x, offset, mask = torch.randn(1, 4, 5, 6), torch.randn(1, 18, 2, 2), torch.rand(1, 9, 2, 2)
    rois, lines = torch.tensor([[0.0, 1.0, 1.0, 30.0, 20.0]]), torch.randn(1, 4, 4)
    kept = SimpleNamespace(weight=torch.randn(2, 4, 3, 3), bias=torch.randn(2), stride=(2, 2), padding=1, dilation=2)
    wanted = deform_conv2d(x, offset, kept.weight, kept.bias, 2, 1, 2, mask)
    assert torch.equal(layers.DeformConv2d.forward(kept, x, offset, mask), wanted)
    assert torch.equal(layers.DynamicReLU.forward(None, x, lines), dynamic_relu(x, lines))
    kept = SimpleNamespace(output_size=(2, 3), spatial_scale=1 / 4, sampling_ratio=2, aligned=False)
    wanted = roi_align(x, rois, (2, 3), 1 / 4, 2, False)
    assert torch.equal(layers.RoIAlign.forward(kept, x, rois), wanted)
    for layer in (layers.DeformConv2d, layers.DynamicReLU, layers.RoIAlign):
        own = set(vars(layer)) - {"__module__", "__doc__", "__annotations__"}
        assert own == {"forward", "can_torch_compile", "has_backward"}
