"""What was written, loaded by Hugging Face's own `kernels`, offline, in an environment of its own: `make hub`."""

import json
import os
import subprocess

import pytest
import torch
from hub_calls import results
from places import ROOT, TESTS

import kernels
from kernels.bench.hub.layout import write

PYTHON = os.environ.get("DYHEAD_HUB_PYTHON")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="DYHEAD_HUB_PYTHON names no Python with Hugging Face's kernels; `make hub` makes one"
)


def run(out, tmp_path, **variables):
    """What `theirs.py` says of a folder that was written."""
    saved = tmp_path / "results.pt"
    torch.save(results(kernels), saved)
    environment = {name: x for name, x in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "DISABLE_TELEMETRY": "1"} | variables
    command = [PYTHON, TESTS / "kernels" / "bench" / "hub" / "theirs.py", out, saved, ROOT]
    ended = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    write(folder / "out")
    return run(folder / "out", folder)


def test_it_is_of_the_versions_that_are_compared(said):
    assert said["versions"] == ["0.17.2", torch.__version__]


def test_two_variants_and_our_package_are_registered_side_by_side(said):
    cpu, cuda, own = said["namespaces"]
    assert cpu.startswith("_dyhead_cpu_") and cuda.startswith("_dyhead_cuda_") and own == "dyhead"
    assert said["registered"] == [True, True, True]


def test_the_bits_are_those_of_our_environment(said):
    assert said["unequal"] == {name: [] for name in said["namespaces"]}


def test_layers_take_the_place_of_modules_in_every_mode(said):
    assert len(said["kernelized"]) == 4 and not any(said["kernelized"].values())


def test_their_parsers_take_metadata_digests_and_build_toml(said):
    assert said["backends"] == ["cpu", "cuda", "rocm"]
    assert sorted(said["metadata"]) == ["torch-cpu", "torch-cuda", "torch-rocm"]
    assert {tuple(found[1:]) for found in said["metadata"].values()} == {("dyhead", 0, "mit")}


def test_the_card_s_examples_run(said):
    assert said["card"] == [False, False, [2, 32, 8, 8], True]


def test_so_do_those_of_a_card_with_an_owner(tmp_path):
    out = tmp_path / "out"
    write(out, "someone")
    assert run(out, tmp_path, LOCAL_KERNELS=f"someone/dyhead={out}")["card"] == [False, True, [2, 32, 8, 8], True]
