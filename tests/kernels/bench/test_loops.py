"""What is read from machine code, and what the main loops of the kernels may cost."""

import pandas as pd
import pytest
from compiled import compiled, find
from places import ROOT

from kernels.bench.fingerprint import fingerprint
from kernels.bench.loops import main_loops
from kernels.bench.specs import all_specs

# Limits in bf16 on sm_90, for every innermost main loop of a kernel: figures of `Loop`, or of `Row`, or one of
# `DERIVED`. Issuing may take as long as the products, not longer; shared memory beyond 48 KiB makes the driver take it
# from the L1 cache, where a gather's neighbours lie.
FORWARD = {"bar": 2, "sts": 0, "ldsm": 0, "shared_bytes": 49152, "spill_bytes": 0}
SAMPLES = {"ratio": 1.0, "bar_per_64_channels": 8, "spill_bytes": 0}
WEIGHT = {"ratio": 1.3, "bar": 2, "shared_bytes": 73728, "spill_bytes": 0}
GATHER = {"ratio": 1.2, "sts_16": 0, "shared_bytes": 49152, "spill_bytes": 0}
GATES = {
    "deform_conv2d forward": FORWARD | {"instructions": 200, "ratio": 0.80},
    "block convolutions forward": FORWARD | {"instructions": 200, "ratio": 0.90},
    "deform_conv2d backward samples": SAMPLES,
    "block convolutions backward samples": SAMPLES,
    # The additions to the map, 32 instructions of a warp for 64 channels, are not in the products' shadow.
    "deform_conv2d backward samples and map": SAMPLES | {"ratio": 1.9},
    "block convolutions backward samples and map": SAMPLES | {"ratio": 1.9},
    "deform_conv2d backward weight": WEIGHT,
    "block convolutions backward weight": WEIGHT,
    "deform_conv2d backward gather": GATHER,
    "block convolutions backward gather": GATHER,
}
DERIVED = {"bar_per_64_channels": lambda loop, spec: loop.bar * 64 / spec.settings["BLOCK_C"]}

# Shortened by hand. A loop that stages a tile and multiplies it, within a loop that multiplies, too; in between a wait
# and a loop without products.
NESTED = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                         /* 0x00000a00ff017b82 */
                                                                                  /* 0x000e700000000800 */
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ; /* 0x00000002ff0075a7 */
        /*0020*/              @!P0 BRA 0x10 ;                                     /* 0xfffffffc00f88947 */
        /*0030*/                   LDG.E.128 R4, desc[UR8][R2.64] ;               /* 0x0000000802047981 */
        /*0040*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR8][R2.64] ;   /* 0x0000000002097fae */
        /*0050*/                   LDGDEPBAR ;                                    /* 0x00000000000079af */
        /*0060*/                   DEPBAR.LE SB0, 0x1 ;                           /* 0x000080400000791a */
        /*0070*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;                  /* 0x0000000000007b1d */
        /*0080*/                   WARPGROUP.ARRIVE ;                             /* 0x00000000000079c5 */
        /*0090*/                   HGMMA.64x256x16.F32.BF16 R24, R156, gdesc[UR12], R24, gsb0 ; /* 0x03e0000c9c187df0 */
        /*00a0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;                /* 0x00008000000079c5 */
        /*00b0*/              @!P1 STS.U16 [R7], R4 ;                             /* 0x0000000407009388 */
        /*00c0*/                   STS.U8 [R7+0x2], R4 ;                          /* 0x0000020407007388 */
        /*00d0*/                   STS [R7+0x4], R5 ;                             /* 0x0000040507007388 */
        /*00e0*/                   STS.64 [R7+0x8], R6 ;                          /* 0x0000080607007388 */
        /*00f0*/                   STS.128 [R7+0x10], R4 ;                        /* 0x0000100407007388 */
        /*0100*/                   MEMBAR.ALL.CTA ;                               /* 0x0000000000007992 */
        /*0110*/                   FENCE.VIEW.ASYNC.S ;                           /* 0x00000000000073c6 */
        /*0120*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;                  /* 0x0000000000007b1d */
        /*0130*/                   LDSM.16.M88.4 R72, [R5+UR4+0x8000] ;           /* 0x008000040548783b */
        /*0140*/                   HGMMA.64x64x16.F32.BF16 R24, R72, gdesc[UR12], R24 ; /* 0x00e0000c48187df0 */
        /*0150*/                   HGMMA.64x64x16.F32.BF16 R24, R76, gdesc[UR4], R24, gsb0 ; /* 0x00e000044c187df0 */
        /*0160*/                   SHFL.BFLY PT, R3, R2, 0x2, 0x1f ;              /* 0x0c401f0002037f89 */
        /*0170*/               @P2 BRA 0xb0 ;                                     /* 0xfffffffc00f82947 */
        /*0180*/                   REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU desc[UR8][R2.64], R4 ; /* 0x00000004020079a6 */
        /*0190*/               @P3 BRA 0x1b0 ;                                    /* 0x0000000000103947 */
        /*01a0*/               @P3 BRA 0x30 ;                                     /* 0xfffffffc00a03947 */
        /*01b0*/                   ATOMG.E.ADD.STRONG.GPU PT, R2, desc[UR8][R2.64], R5 ; /* 0x80000005020279a8 */
        /*01c0*/              @UP0 BRA 0x30 ;                                     /* 0xfffffffc00980947 */
        /*01d0*/                   EXIT ;                                         /* 0x000000000000794d */
        /*01e0*/                   BRA 0x1e0;                                     /* 0xfffffffc00fc7947 */
"""
STRAIGHT = """
        /*0000*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;          /* 0x0000000c0804723c */
        /*0010*/                   HMMA.1688.F32.TF32 R4, R8, R12, R4 ;           /* 0x0000000c0804723c */
        /*0020*/                   HGMMA.64x32x8.F32.TF32 R24, gdesc[UR8], R24 ;  /* 0x00600008001879f0 */
        /*0030*/                   EXIT ;                                         /* 0x000000000000794d */
"""


def test_an_excerpt_is_counted_loop_by_loop():
    outer, inner = main_loops(NESTED, warps=8)
    # From 0xb0 up to and with 0x170; two warpgroups, each with two products of 64 columns.
    assert (inner.place, inner.instructions, inner.issue_clocks) == ("inner", 13, 26)
    assert (inner.tensor_clocks, inner.ratio) == (2 * 2 * 32, 0.2)
    assert (inner.bar, inner.fence, inner.ldsm, inner.shfl) == (1, 2, 1, 1)
    assert (inner.sts_128, inner.sts_64, inner.sts_32, inner.sts_16, inner.sts) == (1, 1, 1, 2, 5)
    assert (inner.ldg, inner.ldgsts, inner.red, inner.stsm) == (0, 0, 0, 0)
    # From 0x30 to the last way back to it, 0x1c0.
    assert (outer.place, outer.instructions, outer.issue_clocks) == ("outer", 26, 52)
    assert (outer.tensor_clocks, outer.ratio) == (2 * (128 + 2 * 32), 0.14)
    assert (outer.bar, outer.ldg, outer.ldgsts, outer.red, outer.sts) == (2, 1, 1, 2, 5)


def test_without_a_loop_the_program_is_the_step():
    (whole,) = main_loops(STRAIGHT, warps=4)
    assert (whole.place, whole.instructions, whole.issue_clocks) == ("none", 4, 4)
    # The instructions of four warps at 4,096 operations a clock, half as many in TF32; one product of a warpgroup.
    assert whole.tensor_clocks == 4 + 4 + 16


def test_what_does_not_multiply_or_is_not_known_is_an_error():
    with pytest.raises(ValueError, match="no matrix instruction"):
        main_loops(STRAIGHT.replace("HGMMA", "IMAD").replace("HMMA", "IMAD"), warps=4)
    with pytest.raises(ValueError, match=r"not known here: HMMA\.SP\.16816"):
        main_loops(STRAIGHT.replace("HMMA.16816", "HMMA.SP.16816"), warps=4)


@pytest.mark.parametrize("name", GATES)
def test_a_main_loop_keeps_within_its_gates(name):
    row, spec = compiled(name, "bf16", "sm_90"), find(name, "bf16")
    for loop in row.loops:
        if loop.place == "outer":
            continue
        found = {
            figure: DERIVED[figure](loop, spec)
            if figure in DERIVED
            else getattr(loop, figure, getattr(row, figure, None))
            for figure in GATES[name]
        }
        assert all(found[figure] <= limit for figure, limit in GATES[name].items()), f"{found} beyond {GATES[name]}"
    assert row.loops


def test_every_16_bit_kernel_that_multiplies_is_in_the_committed_table():
    table = pd.read_csv(ROOT / "results" / "compile" / "loops.csv", comment="#")
    wanted = {
        (spec.name, spec.dtype, fingerprint(spec))
        for spec in all_specs()
        if spec.uses_dot and spec.dtype in ("fp16", "bf16")
    }
    assert set(zip(table.kernel, table.dtype, table.source, strict=True)) == wanted
    assert (table.ratio > 0).all() and (table.spill_bytes == 0).all()
