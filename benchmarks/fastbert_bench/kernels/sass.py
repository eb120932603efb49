"""What a kernel's machine code costs, counted: the cycles that its main loop asks of each pipe.

`nvdisasm` prints the code; loops are found by their backward branches. An instruction of one warp
holds a pipe of its sub-partition, a quarter of a multiprocessor, for so many cycles, by throughputs
after the CUDA C++ Programming Guide. kernels/README.md has the rules in a table, and says what they
leave out.
"""

import bisect
import dataclasses
import functools
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from fastbert_bench.kernels.costs import A100, H100


@dataclasses.dataclass(frozen=True)
class Machine:
    """A GPU as the counts see it; rates are a multiprocessor's, in a clock."""

    multiprocessors: int
    clock: float
    """Hz that all its multiprocessors are taken to hold under load."""
    tensor: int
    """FLOPs of bf16 products."""
    fma: int
    """Cycles of a sub-partition for one warp's FFMA."""
    memory: float
    """Bytes a second of the whole GPU."""
    shared: int
    """Bytes of shared memory."""
    l2: int = 32
    """Bytes to and from the L2. Argued, not measured: 7.4 TB/s of an H100, 4.9 of an A100."""


MACHINES = {
    80: Machine(108, 1.41e9, 2048, 2, A100.bandwidth, 164 * 1024),
    90: Machine(132, 1.755e9, 4096, 1, H100.bandwidth, 228 * 1024),
}

# Of a multiprocessor (CUDA C++ Programming Guide, technical specifications by compute capability):
# registers, warps, programs. A program pays 1 KiB of shared memory more than it asks for; registers
# belong to four quarters, which give them to warps in units of 256.
REGISTERS, WARPS, PROGRAMS, QUARTERS = 65_536, 64, 32, 4
RESERVED, SHARED_UNIT, REGISTER_UNIT = 1024, 128, 256

_OPCODES = {
    "float": "FADD FFMA FMUL HADD2 HFMA2 HMUL2",
    "double": "DADD DFMA DMUL DSETP",
    "IMAD": "IMAD",
    "alu": "BMSK CS2R F2FP FMNMX FSEL FSET FSETP HMNMX2 HSETP2 I2FP IABS IADD3 IMNMX ISETP LEA "
    "LOP3 MOV P2R PLOP3 PRMT R2P SEL SGXT SHF VIADD VIADDMNMX VIMNMX VOTE",
    "mufu": "F2F F2I FLO FRND I2F MUFU POPC",
    "tensor": "HGMMA HMMA",
    "matrix": "LDSM STSM",
    "shared": "LDS REDUX SHFL STS",
    "load": "LDG LDGSTS",
    "store": "ATOMG RED REDG STG",
    "bulk": "UTMALDG",
    "spills": "LDL STL",
    "barriers": "BAR DEPBAR FENCE LDGDEPBAR MEMBAR SYNCS WARPGROUP",
    "issue": "BRA BREAK BSSY BSYNC CALL ELECT EXIT LDC R2UR RET S2R S2UR VOTEU WARPSYNC",
}
_KINDS = {opcode: kind for kind, opcodes in _OPCODES.items() for opcode in opcodes.split()}
_LINE = re.compile(r"\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*)")
_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


class Instruction(NamedTuple):
    opcode: str
    """With its suffixes: IMAD.HI.U32."""
    operands: str


@functools.cache
def _kind(opcode: str) -> str:
    """By `_OPCODES`; nothing for NOP, "unknown" where no rule counts it."""
    base = opcode.partition(".")[0]
    if base == "NOP":
        return ""
    return "issue" if re.match("U(?!TMA|BLK)", base) else _KINDS.get(base, "unknown")


@functools.cache
def _bytes(opcode: str) -> int:
    """What an access moves for one thread."""
    for part in opcode.split(".")[1:]:
        if several := re.fullmatch(r"B?F(16|32)x(\d)", part):
            return int(several[1]) // 8 * int(several[2])
        if part in _BYTES:
            return _BYTES[part]
    return 4


@dataclasses.dataclass(frozen=True)
class Counts:
    """One pass through a stretch of the code: by one warp, but what is said to be the program's."""

    issue: int = 0
    fma: int = 0
    alu: int = 0
    mufu: int = 0
    flops: int = 0
    shared: int = 0
    """Bytes of shared memory."""
    operands: int = 0
    """Bytes of shared memory that products read."""
    barriers: int = 0
    loaded: int = 0
    """Bytes from global memory or the L2, as `stored`."""
    stored: int = 0
    bulk: int = 0
    """Bytes that bulk copies bring the program."""
    spills: int = 0
    copies: int = 0
    """Instructions that copy to shared memory while the warp goes on."""


def parse(sass: Sequence[str]) -> tuple[list[Instruction], list[range]]:
    """Instructions of lines that `nvdisasm -c -b` printed, and loops: a branch leads backward."""
    code: list[Instruction] = []
    places: dict[int, int] = {}
    for line in sass:
        if found := _LINE.match(line):
            places[int(found[1], 16)] = len(code)
            code.append(Instruction(found[2], found[3]))
    loops = []
    for last, instruction in enumerate(code):
        if instruction.opcode.startswith("BRA"):
            target = re.search(r"0x([0-9a-f]+)\s*$", instruction.operands)
            first = places.get(int(target[1], 16), last) if target else last
            if first < last:
                loops.append(range(first, last + 1))
    return code, loops


def split(sass: str, sizes: Sequence[int]) -> list[list[str]]:
    """The lines of each of several kernels of so many bytes, printed as they follow each other."""
    ends = list(itertools.accumulate(sizes))
    found: list[list[str]] = [[] for _ in ends]
    for line in sass.splitlines():
        if one := _LINE.match(line):
            found[bisect.bisect(ends, int(one[1], 16))].append(line)
    return found


def main_part(code: Sequence[Instruction], loops: Sequence[range]) -> Sequence[int]:
    """The loop in which a kernel spends its time; where there is none, what lies in no loop.

    Of those that hold no other such loop: the one that multiplies most, and of equals the shortest,
    for the others also mask; in a kernel that multiplies nowhere, the longest that reads memory.
    """
    work = [_product(one)[0] if _kind(one.opcode) == "tensor" else 0 for one in code]
    multiplies = any(work)
    if not multiplies:
        work = [_kind(one.opcode) == "load" for one in code]
    doing = [loop for loop in loops if any(work[i] for i in loop)]
    inner = [a for a in doing if not any(b != a and b[0] in a and b[-1] in a for b in doing)]
    if inner and multiplies:
        return max(inner, key=lambda loop: (sum(work[i] for i in loop), -len(loop)))
    if inner:
        return max(inner, key=len)
    return [i for i in range(len(code)) if not any(i in loop for loop in loops)]


def count(code: Sequence[Instruction], arch: int) -> Counts:
    """What a pass through `code` costs.

    Raises:
        ValueError: an instruction that no rule covers.
    """
    found: Counter[str] = Counter()
    for index, instruction in enumerate(code):
        parts = instruction.opcode.split(".")[1:]
        kind, width = _kind(instruction.opcode), 32 * _bytes(instruction.opcode)
        if kind == "unknown":
            raise ValueError(f"no rule counts {instruction.opcode}")
        found["issue"] += kind != ""
        if kind == "float":
            found["fma"] += MACHINES[arch].fma
        elif kind == "double":
            found["fma"] += 2 * MACHINES[arch].fma
        elif kind == "IMAD":
            found["fma"] += 4 if {"HI", "WIDE"} & set(parts) else 2
        elif kind == "alu":
            found["alu"] += 2
        elif kind == "mufu":
            found["mufu"] += 8
        elif kind == "tensor":
            flops, operands = _product(instruction)
            found["flops"] += flops
            found["operands"] += operands
        elif kind == "matrix":  # 8 x 8 elements of 16 bits, or as many as its number says
            found["shared"] += 128 * (int(parts[-1]) if parts[-1].isdigit() else 1)
        elif kind == "shared":
            found["shared"] += width
        elif kind == "load":
            found["loaded"] += width
            if instruction.opcode.startswith("LDGSTS"):
                found["shared"] += width
                found["copies"] += 1
        elif kind == "store":
            found["stored"] += width
        elif kind == "bulk":
            found["copies"] += 1
        elif kind in ("spills", "barriers"):
            found[kind] += 1
            if instruction.opcode.startswith("SYNCS.ARRIVE.TRANS64"):
                found["bulk"] += _expected(code[:index], instruction.operands.split()[-1])
    return Counts(**found)


def _expected(before: Sequence[Instruction], register: str) -> int:
    """Bytes that a barrier is told to wait for: a constant moved to a register."""
    for instruction in reversed(before):
        moved = re.fullmatch(rf"{register}, (?:RZ, RZ, )?(0x[0-9a-f]+) *", instruction.operands)
        if moved and "MOV" in instruction.opcode:
            return int(moved[1], 16)
    raise ValueError(f"the code does not say how many bytes a bulk copy moves: {register}")


def _product(instruction: Instruction) -> tuple[int, int]:
    """FLOPs of a warp's share of a product, and bytes that it reads from shared memory."""
    kind, shape, *types = instruction.opcode.split(".")
    if "TF32" in types:
        raise ValueError(f"no rule counts {instruction.opcode}")
    if kind == "HMMA":
        return 2 * 16 * 8 * int(shape[3:]), 0
    m, n, k = map(int, shape.split("x"))  # of four warps; one operand may lie in their registers
    rows = n + m * instruction.operands.split(", ")[1].startswith("gdesc")
    return 2 * m * n * k // 4, 2 * rows * k // 4


def programs(registers: int, shared: int, warps: int, arch: int) -> tuple[int, str]:
    """Programs that a multiprocessor holds at once, and what limits them.

    Args:
        registers: of a thread.
        shared: bytes that a program asks for.
        warps: of a program.
        arch: 80 or 90.
    """
    of_a_warp = _rounded_up(registers * 32, REGISTER_UNIT)
    limits = {
        "warps": WARPS // warps,
        "programs": PROGRAMS,
        "registers": QUARTERS * (REGISTERS // QUARTERS // of_a_warp) // warps,
        "shared memory": MACHINES[arch].shared // _rounded_up(shared + RESERVED, SHARED_UNIT),
    }
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit], limit


def _rounded_up(amount: int, unit: int) -> int:
    return -(-amount // unit) * unit


@dataclasses.dataclass(frozen=True)
class Cost:
    """What some passes of a program through its main part take of a multiprocessor."""

    cycles: dict[str, float]
    """By pipe: issue, ALU, FMA, MUFU, tensor, shared and L2 (memory, where nothing multiplies)."""
    flops: float
    bytes: float
    total: float
    """Where programs overlap, the slowest pipe. A program alone waits for its products, and for
    what it loads unless that is copied ahead: then their sum with the slowest of the rest."""
    limit: str
    rate: float
    """FLOPs a second of the whole GPU; bytes where nothing multiplies."""

    def __str__(self) -> str:
        """The bound; where a program is alone, also the one with everything overlapped."""
        unit = "TFLOP/s" if self.flops else "TB/s"
        rates = [self.rate, self.rate * self.total / max(self.cycles.values())]
        told = " to ".join(dict.fromkeys(f"{rate / 1e12:.3g}" for rate in rates))
        return f"{told} {unit} by {self.limit}"


def cost(counts: Counts, warps: float, held: int, arch: int, scale: float = 1) -> Cost:
    """What the counts of a main part mean for a program of `warps`, `held` at once.

    Args:
        scale: passes that make the unit of which cycles, FLOPs and bytes are told.
    """
    machine = MACHINES[arch]
    warps *= scale
    flops = counts.flops * warps
    moved = (counts.loaded + counts.stored) * warps + counts.bulk * scale
    memory, width = "L2", float(machine.l2)
    if not flops:
        memory, width = "memory", machine.memory / machine.multiprocessors / machine.clock
    accesses, operands = counts.shared * warps / 128, counts.operands * warps / 128
    cycles = {
        "issue": counts.issue * warps / 4,
        "ALU": counts.alu * warps / 4,
        "FMA": counts.fma * warps / 4,
        "MUFU": counts.mufu * warps / 4,
        "tensor": flops / machine.tensor,
        "shared": accesses + operands,
        memory: moved / width,
    }
    phases = [cycles]
    if held == 1:
        rest = cycles | {"tensor": 0.0, "shared": accesses}
        phases = [rest, {"tensor": cycles["tensor"], "operands": operands}]
        if not counts.copies:
            phases.append({memory: rest.pop(memory)})
    slowest = [max(phase, key=phase.__getitem__) for phase in phases]
    total = sum(phase[pipe] for phase, pipe in zip(phases, slowest, strict=True))
    limit = " + ".join(pipe for phase, pipe in zip(phases, slowest, strict=True) if phase[pipe])
    rate = (flops or moved) * machine.multiprocessors * machine.clock / total
    return Cost(cycles, flops, moved, total, limit, rate)
