"""Tiles: the table of a kernel, what was tuned for a device, and files that are no such thing."""

import json
from dataclasses import asdict

import pytest
import torch
import triton

from kernels.runtime import tiles
from kernels.runtime.tiles import Table, Tiles, fit, on_trial, read_tuned, tuned_file

GPU = torch.device("cuda", 0)
TABLE = Table("some kernel", {"16": Tiles(8, 8, 64, 256, 8, 2), "exact": Tiles(4, 8, 16, 32, 4, 1)})
TUNED = Tiles(4, 16, 32, 128, 4, 3)
ROW = {"kernel": "some kernel", "class": "16", "channels": 256, "outputs": 256, "tiles": asdict(TUNED), "ms": 1.0}
FILE = {"device": "Some GPU/2", "triton": triton.__version__, "rows": [ROW]}


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """Write a file of tuned tiles for a GPU that is not there."""
    monkeypatch.setattr(tiles, "TUNED", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU/2")
    tiles._tuned.cache_clear()

    def write(content):
        tuned_file("Some GPU/2").write_text(content if isinstance(content, str) else json.dumps(content))

    yield write
    tiles._tuned.cache_clear()


def test_without_a_file_the_table_holds_and_shrinks_to_the_channels(tuned):
    assert fit(TABLE, torch.bfloat16, GPU, 256, 256) == TABLE["16"]
    assert fit(TABLE, torch.float64, GPU, 256, 256) == TABLE["exact"]
    assert fit(TABLE, torch.float16, GPU, 5, 72) == Tiles(8, 8, 16, 128, 8, 2)


def test_what_was_tuned_is_taken_for_its_kernel_type_and_channels_alone(tuned):
    tuned(FILE)
    assert fit(TABLE, torch.bfloat16, GPU, 256, 256) == fit(TABLE, torch.float16, GPU, 256, 256) == TUNED
    assert fit(TABLE, torch.float64, GPU, 256, 256) == TABLE["exact"]
    assert fit(TABLE, torch.bfloat16, GPU, 128, 256) == TABLE["16"]
    assert fit(TABLE, torch.bfloat16, GPU, 256, 128) == Tiles(8, 8, 64, 128, 8, 2)
    assert fit(Table("another", TABLE), torch.bfloat16, GPU, 256, 256) == TABLE["16"]
    assert fit(TABLE, torch.bfloat16, torch.device("meta"), 256, 256) == TABLE["16"]


@pytest.mark.parametrize("change", [{"device": "Some GPU"}, {"triton": "2.0.0"}])
def test_a_file_from_another_device_or_triton_does_not_count(tuned, change):
    tuned(FILE | change)
    assert fit(TABLE, torch.bfloat16, GPU, 256, 256) == TABLE["16"]


def test_the_file_is_read_once(tuned):
    tuned(FILE)
    fit(TABLE, torch.bfloat16, GPU, 256, 256)
    tuned("broken since")
    assert fit(TABLE, torch.bfloat16, GPU, 256, 256) == TUNED


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        {"device": "Some GPU/2"},
        FILE | {"rows": [ROW | {"tiles": {"height": 8}}]},
        FILE | {"rows": [ROW | {"tiles": asdict(TUNED) | {"warps": "4"}}]},
        FILE | {"rows": [ROW | {"tiles": asdict(TUNED) | {"o": 0}}]},
        FILE | {"rows": [{k: v for k, v in ROW.items() if k != "class"}]},
    ],
)
def test_a_broken_file_is_an_error_that_names_it(tuned, content):
    tuned(content)
    with pytest.raises(ValueError, match=r"Some_GPU_2\.json is no file of tuned tiles: "):
        fit(TABLE, torch.bfloat16, GPU, 256, 256)


def test_shipped_files_are_what_they_say():
    for path in tiles.TUNED.glob("*.json"):
        device = json.loads(path.read_text())["device"]
        assert tuned_file(device) == path
        read_tuned(path, device)


def test_tiles_on_trial_go_first_and_only_inside_the_block(tuned):
    tuned(FILE)
    with on_trial("some kernel", Tiles(2, 4, 64, 512, 4, 2)):
        assert fit(TABLE, torch.bfloat16, GPU, 256, 256) == Tiles(2, 4, 64, 256, 4, 2)
        assert fit(Table("another", TABLE), torch.bfloat16, GPU, 256, 256) == TABLE["16"]
    assert fit(TABLE, torch.bfloat16, GPU, 256, 256) == TUNED
