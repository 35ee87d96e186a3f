"""What the compilers make of gathers, and that what is compiled is what a launch would run."""

import re
from collections import Counter

import pytest
import torch
import triton
from compiled import compiled, find

from kernels.bench.compile import TARGETS, _source, compile_spec
from kernels.bench.roofline import float32_products
from kernels.bench.specs import all_specs
from kernels.deform_conv.launch import levels
from kernels.runtime.launch import Launch
from kernels.sampling.inverse import Bins, gather_launch
from kernels.sampling.inverse_kernels import Index
from kernels.sampling.launch import forward_launch, new_plan


def wide_loads(row) -> int:
    return int(re.search(r"\b128x(\d+)", row.global_loads)[1])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["forward", "backward weight"])
def test_corners_are_loaded_16_bytes_at_a_time_and_not_copied(name, dtype):
    spec = find(f"deform_conv2d {name}", dtype)
    row = compiled(spec.name, dtype, "sm_90")
    # Of a step's corners each thread holds this many pieces of 16 bytes; they are loaded before the loop and in it.
    pixels = spec.settings["TILE_H"] * spec.settings["TILE_W"]
    size = 4 if dtype == "fp32" else 2
    pieces = 4 * pixels * spec.settings["BLOCK_C"] * size // (16 * 32 * spec.num_warps)
    assert wide_loads(row) - row.async_copies >= 2 * pieces


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_what_is_copied_past_the_l1_cache_is_the_weights(dtype, target):
    spec = find("deform_conv2d forward", dtype, target)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    code = triton.compile(_source(spec), target=TARGETS[target].gpu, options=options).asm["ttgir"]
    copies, loads = (
        Counter(re.findall(rf"{operation} [^\n]*?tensor<(\d+x\d+)x!tt.ptr", code))
        for operation in ("ttg.async_copy_global_to_local", "tt.load")
    )
    pixels = spec.settings["TILE_H"] * spec.settings["TILE_W"]
    c, o = spec.settings["BLOCK_C"], spec.settings["BLOCK_O"]
    assert set(copies) == {f"{c}x{o}"}
    # The four pixels of samples, before the loop and in it.
    assert loads == {f"{pixels}x{c}": 8}


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_gather_loads_rows_16_bytes_at_a_time_and_copies_none(dtype):
    spec = find("deform_conv2d backward gather", dtype)
    row = compiled(spec.name, dtype, "sm_90")
    pieces = (4 if dtype == "fp32" else 2) * spec.settings["BLOCK_O"] / (16 * 32 * spec.num_warps)
    # Rows of the gradients and the weights, of both halves of the outputs, the latter of both halves of the channels.
    assert wide_loads(row) >= pieces * 2 * (spec.settings["ENTRIES"] + 2 * spec.settings["BLOCK_C"])
    assert row.async_copies == 0


@pytest.mark.parametrize("target", TARGETS)
def test_the_gather_of_exact_products_does_not_spill(target):
    with float32_products("ieee"):
        (spec,) = (x for x in all_specs(target) if (x.name, x.dtype) == ("deform_conv2d backward gather", "fp32"))
    assert spec.settings["PRECISION"] == "ieee"
    assert compile_spec(spec, target).spill_bytes == 0


def test_large_images_take_64_bit_places():
    def launch(height: int) -> Launch:
        new = lambda channels: torch.empty(1, channels, height, 4096, dtype=torch.bfloat16, device="meta")  # noqa: E731
        weight = torch.empty(64, 64, 3, 3, dtype=torch.bfloat16, device="meta")
        (level,) = levels([new(64)], [new(18)], [new(9)], weight, [1, 1], [1, 1], [1, 1])
        return forward_launch(level.x, weight, None, new_plan(weight, 1), new(64), None, level.shape, level.maps)

    assert str(launch(1024).constants["K"].INDEX) == "int32"
    assert str(launch(8192).constants["K"].INDEX) == "int64"


def test_many_images_take_64_bit_rows_in_the_gather():
    def launch(batch: int) -> Launch:
        new = lambda channels: torch.empty(batch, channels, 100, 168, dtype=torch.bfloat16, device="meta")  # noqa: E731
        weight = torch.empty(256, 256, 3, 3, dtype=torch.bfloat16, device="meta")
        (level,) = levels([new(256)], [new(18)], [new(9)], weight, [1, 1], [1, 1], [1, 1])
        numbers = torch.empty(16, dtype=torch.int32, device="meta")
        tensors = new(256), weight, new_plan(weight, 1), Index(numbers, numbers), new(256)
        return gather_launch(*tensors, Bins(None, 16, 0, 0), 9, level.shape, level.maps)

    assert str(launch(499).constants["K"].INDEX) == "int32"
    assert str(launch(500).constants["K"].INDEX) == "int64"


@pytest.mark.parametrize(("name", "gathers"), [("samples", 4), ("weight", 8)])
def test_backward_of_a_blocks_convolutions_gathers_16_bytes_at_a_time(name, gathers):
    spec = find(f"block convolutions backward {name}", "bf16")
    row = compiled(spec.name, "bf16", "sm_90")
    # What a thread loads of the map for a tile and block of channels, the weight's gradient also ahead of the loop.
    sizes = spec.settings
    pieces = gathers * sizes["TILE_H"] * sizes["TILE_W"] * sizes["BLOCK_C"] * 2 // (16 * 32 * spec.num_warps)
    assert wide_loads(row) - row.async_copies >= pieces
