"""The main loops of a compiled kernel, read from its machine code: what a step issues, beside what its products take.

Where issuing takes longer than the tensor cores do, they wait, whatever else the kernel does well. Counts are of
instructions in the code: one behind a branch counts as if it ran, and a loop within a loop counts once.
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

# Operations of all tensor cores of a multiprocessor in one clock, on sm_90, by the type of the factors.
_PER_CLOCK = {"F16": 4096, "BF16": 4096, "TF32": 2048}
# A multiprocessor issues one instruction for each of its four schedulers.
_SCHEDULERS = 4


class _Instruction(NamedTuple):
    address: int
    text: str
    # The opcode and its modifiers.
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Loop:
    """One step of a loop with matrix instructions in it; counts are a warp's, clocks a multiprocessor's for a program.

    `place` is "inner" for a loop without such a loop in it and "outer" for one around such loops; it is "none" where no
    loop has matrix instructions, and the whole program is taken for a step. `ratio` is that of `issue_clocks` to
    `tensor_clocks`. `bar` counts block barriers, `fence` fences of memory (MEMBAR, FENCE), `sts_*` stores to shared
    memory by width in bits, with `sts_16` for all narrower ones, too, `red` additions to global memory, also atomic.
    """

    place: str
    instructions: int
    tensor_clocks: int
    issue_clocks: int
    ratio: float
    bar: int
    fence: int
    sts_128: int
    sts_64: int
    sts_32: int
    sts_16: int
    stsm: int
    ldsm: int
    ldg: int
    ldgsts: int
    shfl: int
    red: int

    @property
    def sts(self) -> int:
        """All stores to shared memory."""
        return self.sts_128 + self.sts_64 + self.sts_32 + self.sts_16 + self.stsm


def main_loops(sass: str, warps: int) -> list[Loop]:
    """The loops with matrix instructions in them, in the order of the code.

    Args:
        sass: What `cuobjdump -sass` prints of one kernel for sm_90.
        warps: Of one program.

    Raises:
        ValueError: The kernel has no matrix instruction, or one of a shape or type that is not known here.
    """
    code = _instructions(sass)
    if not any(map(_multiplies, code)):
        raise ValueError("no matrix instruction in the code")
    # A loop with several ways back to its head reaches to the last of them.
    ends = {target: i.address for i in code if (target := _target(i)) is not None and target < i.address}
    bodies = {(head, end): [i for i in code if head <= i.address <= end] for head, end in ends.items()}
    bodies = {span: body for span, body in bodies.items() if any(map(_multiplies, body))}
    if not bodies:
        return [_count("none", code, warps)]

    def place(span: tuple[int, int]) -> str:
        within = [other for other in bodies if other != span and span[0] <= other[0] and other[1] <= span[1]]
        return "outer" if within else "inner"

    return [_count(place(span), body, warps) for span, body in sorted(bodies.items())]


def _instructions(sass: str) -> list[_Instruction]:
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+((?:@!?U?P\w+\s+)?([A-Z0-9_.a-z]+)[^;]*);", sass)
    return [_Instruction(int(address, 16), text, tuple(opcode.split("."))) for address, text, opcode in found]


def _target(instruction: _Instruction) -> int | None:
    match = re.search(r"0x([0-9a-f]+)\s*$", instruction.text) if instruction.parts[0] == "BRA" else None
    return int(match[1], 16) if match else None


def _multiplies(instruction: _Instruction) -> bool:
    return instruction.parts[0] in ("HGMMA", "HMMA")


def _clocks(instruction: _Instruction, warps: int) -> float:
    """How long the tensor cores work on a matrix instruction of all warps."""
    shape = re.fullmatch(r"64x(\d+)x(\d+)|(16)8(8|16)", instruction.parts[1])
    kind = next((part for part in reversed(instruction.parts) if part in _PER_CLOCK), "F16")
    if shape is None:
        raise ValueError(f"a matrix instruction that is not known here: {instruction.text.strip()}")
    # HGMMA is one product of four warps, 64 rows; HMMA is one of each warp, 16 rows and 8 columns.
    m, n, k = (16, 8, int(shape[4])) if shape[3] else (64, int(shape[1]), int(shape[2]))
    together = 1 if shape[3] else 4
    return 2 * m * n * k * (warps / together) / _PER_CLOCK[kind]


def _count(place: str, body: list[_Instruction], warps: int) -> Loop:
    opcodes = Counter(i.parts[0] for i in body)
    widths: Counter[int] = Counter()
    for i in body:
        if i.parts[0] == "STS":
            bits = next((int(part.lstrip("US")) for part in i.parts if re.fullmatch(r"[US]?(8|16|64|128)", part)), 32)
            widths[max(bits, 16)] += 1
    issue = len(body) * warps // _SCHEDULERS
    tensor = round(sum(_clocks(i, warps) for i in body if _multiplies(i)))
    return Loop(
        place=place,
        instructions=len(body),
        tensor_clocks=tensor,
        issue_clocks=issue,
        ratio=round(issue / tensor, 2),
        bar=opcodes["BAR"],
        fence=opcodes["MEMBAR"] + opcodes["FENCE"],
        sts_128=widths[128],
        sts_64=widths[64],
        sts_32=widths[32],
        sts_16=widths[16],
        stsm=opcodes["STSM"],
        ldsm=opcodes["LDSM"],
        ldg=opcodes["LDG"],
        ldgsts=opcodes["LDGSTS"],
        shfl=opcodes["SHFL"],
        red=sum(opcodes[name] for name in ("RED", "REDG", "ATOM", "ATOMG")),
    )
