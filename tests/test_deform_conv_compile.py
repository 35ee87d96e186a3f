"""What the compilers make of deform_conv2d's gathers, and that what is compiled is what a launch would run."""

import re

import pytest
import torch

from kernels.compile import compile_spec
from kernels.deform_conv_launch import Launch, _forward_launch, _levels, compile_specs


def wide_loads(row) -> int:
    return int(re.search(r"\b128x(\d+)", row.global_loads)[1])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["forward", "backward weight"])
def test_corners_are_loaded_16_bytes_at_a_time_and_not_copied(name, dtype):
    spec = next(s for s in compile_specs() if s.name == f"deform_conv2d {name}" and s.dtype == dtype)
    row = compile_spec(spec, "sm_90")
    # Of a step's corners each thread holds this many pieces of 16 bytes; they are loaded before the loop and in it.
    pixels = spec.constexprs["TILE_H"] * spec.constexprs["TILE_W"]
    size = 4 if dtype == "fp32" else 2
    pieces = 4 * pixels * spec.constexprs["BLOCK_C"] * size // (16 * 32 * spec.num_warps)
    assert wide_loads(row) - row.async_copies >= 2 * pieces


def test_strides_of_one_are_compiled_in():
    # A launch with a channels-last offset compiles its channel stride in; the specification must say the same.
    spec = next(s for s in compile_specs() if s.name == "deform_conv2d forward")
    assert spec.constexprs["offset_c"] == spec.constexprs["mask_c"] == spec.constexprs["out_c"] == 1
    assert "offset_h" in spec.signature and "out_w" in spec.divisible


def test_large_images_take_64_bit_places():
    def launch(height: int) -> Launch:
        new = lambda channels: torch.empty(1, channels, height, 4096, dtype=torch.bfloat16, device="meta")  # noqa: E731
        weight = torch.empty(64, 64, 3, 3, dtype=torch.bfloat16, device="meta")
        (level,) = _levels([new(64)], [new(18)], [new(9)], weight, [1, 1], [1, 1], [1, 1])
        return _forward_launch(level, weight, None, new(64))

    assert str(launch(1024).constants["INDEX"]) == "int32"
    assert str(launch(8192).constants["INDEX"]) == "int64"
