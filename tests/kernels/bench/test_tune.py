"""The search for tiles: what it finds, what it passes over, and the file it leaves."""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from triton.errors import TritonError

from kernels.bench import tune
from kernels.bench.op import OPS, Shape
from kernels.runtime import tiles
from kernels.runtime.tiles import Tiles, read_tuned, tuned_file

START = Tiles(8, 8, 32, 256, 8, 2)
BEST = Tiles(4, 16, 64, 128, 4, 3)
SHAPE = Shape("odd", 2, 6, 5, 7)


def distance(found: Tiles) -> float:
    """A time that falls with every size that is right."""
    return 1.0 + sum(size != right for size, right in zip(vars(found).values(), vars(BEST).values(), strict=True))


def test_the_search_goes_downhill_to_the_best_tiles():
    seen = []

    def seconds(found):
        seen.append(found)
        return distance(found)

    assert tune.search(START, seconds) == (BEST, 1.0, distance(START))
    assert len(seen) == len(set(seen)), "tiles were measured twice"


def test_candidates_are_compiled_ahead_and_faults_there_change_nothing(monkeypatch):
    seen = []

    def call():
        seen.append(tiles._on_trial.get("some kernel"))
        if seen[-1].warps == 4:
            raise TritonError

    monkeypatch.setattr(tune, "calls", lambda op, wanted, shape, precision, device: call)
    tune._kept_call.cache_clear()
    with ThreadPoolExecutor(1) as pool:
        ahead = partial(tune.compile_ahead, pool, "some kernel", "fp32", [("dynamic_relu", (), SHAPE, "fp32", "cpu")])
        assert tune.search(START, distance, ahead)[0] == BEST
    assert len(seen) == len(set(seen)) and BEST in seen and tiles._on_trial == {}
    tune._kept_call.cache_clear()


def test_tiles_that_will_not_do_are_passed_over_and_noise_changes_nothing():
    best, _, _ = tune.search(START, lambda found: None if found.o == BEST.o else distance(found))
    assert best == Tiles(4, 16, 64, START.o, 4, 3)
    assert tune.search(START, lambda found: 1.0 if found == START else 0.99)[0] == START
    with pytest.raises(RuntimeError, match="the tiles in use, do not run"):
        tune.search(START, lambda found: None)


def test_only_tiles_that_run_and_compute_the_same_are_timed(monkeypatch):
    monkeypatch.setattr(tune, "seconds_per_call", lambda run: 2.0)

    def run():
        trial = tiles._on_trial.get("some kernel", START)
        if trial.warps == 4:
            raise TritonError
        return [torch.tensor([1.0, 2.0]) * (1.1 if trial.c == 16 else 1.0), torch.tensor([3.0])]

    seconds = tune.judge("some kernel", [run, run], 1e-3)
    assert seconds(START) == 4.0
    assert seconds(Tiles(8, 8, 16, 256, 8, 2)) is None
    assert seconds(Tiles(8, 8, 32, 256, 4, 2)) is None
    assert tiles._on_trial == {}


@pytest.mark.parametrize("wanted", [wanted for _, wanted in tune.KERNELS], ids=str)
def test_a_call_computes_what_its_kernel_is_for(wanted):
    results = tune.calls(OPS["deform_conv2d"], wanted, SHAPE, "fp32", "cpu")()
    inputs = OPS["deform_conv2d"].make_inputs(SHAPE, torch.float32, "cpu", 0)
    output = OPS["deform_conv2d"].function(**inputs)
    gradients = torch.autograd.grad(output.sum(), [inputs[name] for name in wanted]) if wanted else [output]
    for found, expected in zip(results, gradients, strict=True):
        torch.testing.assert_close(found, expected)
    assert all(not x.requires_grad for x in results)


def test_a_kernel_is_tuned_and_its_row_found_again(tmp_path, monkeypatch):
    # Times that only the tiles on trial decide, on the CPU's path: all there is to see without a GPU.
    monkeypatch.setattr(tune, "seconds_per_call", lambda run: distance(tiles._on_trial["convolution"]))
    table, wanted = tune.KERNELS[0]
    row = tune.tune(table, wanted, "bf16", torch.device("cpu"), [SHAPE])
    assert Tiles(**row["tiles"]) == BEST and row["ms"] == 1e3 and row["ms_before"] > 1e3
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(tiles, "TUNED", tmp_path / "tuned")
    path = tuned_file("Some GPU")
    tune.write(path, "Some GPU", row | {"class": "32"})
    tune.write(path, "Some GPU", row | {"tiles": vars(START)})
    tune.write(path, "Some GPU", row)
    key = ("convolution", "16", 6, 6)
    assert read_tuned(path, "Some GPU") == {key: BEST, (key[0], "32", 6, 6): BEST}
    assert len(json.loads(path.read_text())["rows"]) == 2
    # What another version of Triton was measured with goes.
    path.write_text(json.dumps(json.loads(path.read_text()) | {"triton": "2.0.0"}))
    tune.write(path, "Some GPU", row)
    assert read_tuned(path, "Some GPU") == {key: BEST}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(capsys):
    assert tune.main([]) == 2
    assert capsys.readouterr().err == "error: tiles are measured on a GPU, and torch sees none\n"
