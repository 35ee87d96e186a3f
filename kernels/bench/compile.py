"""Every kernel in every shipped configuration, compiled ahead of time for GPUs that need not be here.

    python -m kernels.bench.compile [--target sm_90 ...] [--only TEXT] [-o DIR]

prints what the compilers made of each: registers, spills, shared memory, tensor-core instructions, widths of the global
loads, asynchronous copies. Counts are of instructions in the code, not of executions. A second table has the main loops
of the 16-bit kernels that multiply matrices, on sm_90: see `kernels.bench.loops`. The exit code is 1 where a kernel
spills, multiplies matrices without tensor cores or needs more shared memory than the GPU has.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import triton
from tabulate import tabulate
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.backend import INTERPRET
from kernels.bench.fingerprint import fingerprint
from kernels.bench.loops import Loop, main_loops
from kernels.bench.specs import all_specs
from kernels.runtime.compile_spec import CompileSpec, Slot


@dataclass(frozen=True)
class Target:
    """A GPU to compile for, and the shared memory one program of it may take, in bytes."""

    gpu: GPUTarget
    shared_limit: int


# Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA 3 ISA guide (LDS).
TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_86": Target(GPUTarget("cuda", 86, 32), 99 * 1024),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
# What the committed table has: the GPUs of data centres, for which the tiles are chosen.
TABLE = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Row:
    """What a compiler made of one kernel for one target.

    `spill_bytes` is thread-local memory: registers that did not fit. `tensor_core` counts matrix instructions (HMMA,
    HGMMA, UTCHMMA, DMMA; MFMA on AMD), `global_loads` loads by their width in bits, `async_copies` cp.async (LDGSTS)
    and bulk copies (UTMALDG), or loads straight to LDS on AMD. `source` is the `fingerprint` of what was compiled.
    `loops` are the main loops of a 16-bit kernel that multiplies, on sm_90. `problem` is empty for a good kernel; a
    kernel that does not compile has no figures.
    """

    kernel: str
    dtype: str
    target: str
    warps: int
    stages: int
    source: str
    problem: str
    registers: int | None = None
    spill_bytes: int | None = None
    shared_bytes: int | None = None
    tensor_core: int | None = None
    global_loads: str | None = None
    async_copies: int | None = None
    loops: tuple[Loop, ...] = ()


def compile_spec(spec: CompileSpec, target: str) -> Row:
    """Compile one kernel for one of `TARGETS` and read the machine code.

    Raises:
        ValueError: `spec` does not describe the arguments of its kernel.
    """
    row = Row(spec.name, spec.dtype, target, spec.num_warps, spec.num_stages, fingerprint(spec), problem="")
    gpu = TARGETS[target].gpu
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, "enable_fp_fusion": not spec.exact}
    source = _source(spec)
    try:
        compiled = triton.compile(source, target=gpu, options=options)
    except Exception as error:
        return replace(row, problem=f"does not compile: {type(error).__name__}: {error}")
    code = disassembled(compiled.asm["cubin"]) if gpu.backend == "cuda" else compiled.asm["amdgcn"]
    found = _read_nvidia(code) if gpu.backend == "cuda" else _read_amd(code)
    if spec.uses_dot and found["tensor_core"] and target == "sm_90" and spec.dtype in ("fp16", "bf16"):
        found["loops"] = tuple(main_loops(code, spec.num_warps))
    found["shared_bytes"] = compiled.metadata.shared
    return replace(row, problem=_problem(spec, TARGETS[target], found), **found)


def _source(spec: CompileSpec) -> ASTSource:
    names = spec.kernel.arg_names
    described = [*spec.signature, *spec.constexprs]
    if sorted(described) != sorted(names):
        raise ValueError(f"{spec.name}: arguments {sorted(described)} are described, the kernel takes {sorted(names)}")

    def at(path: Slot) -> tuple[int, ...]:
        return (names.index(path[0]), *path[1:])

    aligned = [at(path) for path in spec.divisible]
    for name, kind in spec.signature.items():
        fields = enumerate(kind) if isinstance(kind, tuple) else [(None, kind)]
        aligned += [at((name,) if i is None else (name, i)) for i, field in fields if field.startswith("*")]
    return ASTSource(
        fn=spec.kernel,
        signature={name: spec.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in spec.constexprs.items()}
        | {at(path): value for path, value in spec.compiled_in},
        attrs={place: [["tt.divisibility", 16]] for place in sorted(aligned)},
    )


def _problem(spec: CompileSpec, target: Target, found: dict[str, Any]) -> str:
    problems = []
    if found["spill_bytes"]:
        problems.append(f"spills {found['spill_bytes']} bytes")
    if spec.uses_dot and not found["tensor_core"]:
        problems.append("no tensor-core instruction")
    if found["shared_bytes"] > target.shared_limit:
        problems.append(f"needs {found['shared_bytes']} bytes of shared memory, the limit is {target.shared_limit}")
    return "; ".join(problems)


def disassembled(cubin: bytes) -> str:
    """What `cuobjdump` says of a compiled kernel: its resources, and its machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _read_nvidia(text: str) -> dict[str, Any]:
    registers, stack, local = map(int, _found(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text))
    widths = Counter(
        int(width.removeprefix("U").removeprefix("S"))
        for opcode in re.findall(r"\b(?:LDG|LDGSTS)\.[A-Z0-9.]+", text)
        for width in (re.findall(r"\.([US]?(?:8|16|64|128))(?=\.|$)", opcode) or ["32"])[:1]
    )
    return {
        "registers": registers,
        "spill_bytes": stack + local,
        "tensor_core": len(re.findall(r"\b(?:[HDIQ]|HG|QG|IG|UTC[A-Z]+)MMA\b", text)),
        "global_loads": _loads(widths),
        "async_copies": len(re.findall(r"\b(?:LDGSTS|UTMALDG)\b", text)),
    }


def _found(pattern: str, text: str) -> tuple[str, ...]:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the compiler's report has nothing like {pattern}")
    return match.groups()


def _read_amd(assembly: str) -> dict[str, Any]:
    def count(field: str) -> int:
        return int(_found(rf"\.{field}:\s+(\d+)", assembly)[0])

    bits = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16, "ubyte": 8}
    widths = Counter(
        bits[width] for width in re.findall(r"\b(?:global|buffer|flat)_load_(dwordx\d|[a-z]+)(?=_|\s)", assembly)
    )
    # A spilled vector register goes to scratch memory, a spilled scalar register to a lane of a vector register.
    spilled = 4 * (count("vgpr_spill_count") + count("sgpr_spill_count"))
    return {
        "registers": count("vgpr_count"),
        "spill_bytes": max(count("private_segment_fixed_size"), spilled),
        "tensor_core": len(re.findall(r"\bv_(?:s?mfmac?|wmma)_", assembly)),
        "global_loads": _loads(widths),
        "async_copies": len(re.findall(r"\b(?:global_load_lds_|buffer_load_\w+ .*\blds\b)", assembly)),
    }


def _loads(widths: Counter[int]) -> str:
    return " ".join(f"{width}x{widths[width]}" for width in sorted(widths, reverse=True))


def _compile_numbered(job: tuple[int, str]) -> Row:
    # Kernels cannot be pickled, so a worker process is given the number of a spec.
    number, target = job
    return compile_spec(all_specs(target)[number], target)


def compile_all(targets: Iterable[str], only: str = "", processes: int = 1) -> list[Row]:
    """Compile every kernel whose name or dtype contains `only` for every target, in `processes` processes."""
    specs = all_specs()
    jobs = [(i, t) for i, spec in enumerate(specs) if only in f"{spec.name} {spec.dtype}" for t in targets]
    if processes == 1:
        return [_compile_numbered(job) for job in jobs]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_compile_numbered, jobs))


def _tables(rows: list[Row]) -> dict[str, pd.DataFrame]:
    """The tables by the names of their files; there is none of the loops where no row has any."""
    kernels = pd.DataFrame([asdict(row) for row in rows]).drop(columns="loops")
    for last in ("source", "problem"):
        kernels.insert(len(kernels.columns) - 1, last, kernels.pop(last))
    loops = [
        {"kernel": row.kernel, "dtype": row.dtype, "warps": row.warps, "stages": row.stages}
        | asdict(loop)
        | {"registers": row.registers, "spill_bytes": row.spill_bytes, "shared_bytes": row.shared_bytes}
        | {"source": row.source}
        for row in rows
        for loop in row.loops
    ]
    return {"compile": kernels} | ({"loops": pd.DataFrame(loops)} if loops else {})


def _write(directory: Path, header: str, tables: dict[str, pd.DataFrame]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        (directory / f"{name}.csv").write_text(f"# {header}\n{table.to_csv(index=False)}")
        (directory / f"{name}.md").write_text(f"{header}\n\n{_markdown(table)}\n")


def _markdown(table: pd.DataFrame) -> str:
    rows = table.to_dict("records")
    headers = {str(name): str(name).replace("_", " ") for name in table}
    return tabulate(rows, headers=headers, tablefmt="github")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m kernels.bench.compile", description=__doc__.split("\n\n")[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TABLE), help="default: %(default)s")
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels whose name and dtype contain this")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 8), help="default: %(default)s")
    parser.add_argument("-o", "--out", type=Path, metavar="DIR", help="write the tables there, too: .md and .csv")
    options = parser.parse_args(arguments)
    if INTERPRET:
        parser.error("a kernel decorated under TRITON_INTERPRET=1 cannot be compiled; unset it")
    rows = compile_all(options.target, options.only, options.processes)
    if not rows:
        names = ", ".join(sorted({spec.name for spec in all_specs()}))
        parser.error(f"no kernel contains {options.only!r}; there are {names}")
    tables = _tables(rows)
    command = " ".join(["python -m kernels.bench.compile", *(arguments or sys.argv[1:])])
    header = f"triton {triton.__version__}, {command}"
    print(f"{header}\n\n{_markdown(tables['compile'])}")
    if "loops" in tables:
        print(f"\nMain loops on sm_90, a step:\n\n{_markdown(tables['loops'])}")
    if options.out:
        _write(options.out, header, tables)
    failed = [f"{row.kernel} {row.dtype} {row.target}: {row.problem}" for row in rows if row.problem]
    print(f"\n{len(rows)} compiled, {len(failed)} with a problem", *failed, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
