"""Every kernel we ship, compiled ahead of time: `python -m fastbert_bench.kernels.compile_report`.

Needs no GPU. Compiles each case of each op module with Triton's own ptxas and reads the machine
code: registers, spills, shared memory, tensor-core and bulk-copy instructions, and what the main
loop asks of each pipe (`kernels.sass`). Exits 1 where a kernel spills in its main loop or much
outside it, keeps a stack, wants more shared memory than a multiprocessor lends, does a dot without
wgmma that was meant to use it, or passes its committed counts by over 5% (`kernels.counts`):
the ways in which a change or a Triton upgrade ruins a kernel silently. `--accept` commits the
counts that were found; `--match`, `--tiles` and `--maxnreg` try others.
`kernels.compile_compare` lays the reports of several Tritons side by side.
"""

import argparse
import dataclasses
import importlib
import json
import os
import pkgutil
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import fastbert_kernels
from fastbert_bench.kernels import counts, sass
from fastbert_kernels.compile_cases import CompileCase

# Outside the main loop, once a block of columns: nothing beside the 4,000 instructions of the loop.
FEW_SPILLS = 16
TOGETHER = 32  # kernels that are disassembled at once
# What one program may ask for: CUDA C++ Programming Guide, table of compute capabilities.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
HEADER = (
    f"{'kernel':<34} {'configuration':<32} {'arch':<6} {'regs':>4} {'shared':>7} {'spills':>6} "
    f"{'stack':>5} {'mma':>12} {'bulk':>4} {'16 B':>7} {'sass':>6} {'held':>4} {'issue':>6} "
    f"{'ALU':>6} {'FMA':>6} {'MUFU':>6} {'tensor':>6} {'smem':>6} {'memory':>6} {'bars':>4} "
    f"{'KB':>6} {'cycles':>6}  bound"
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One case compiled for one architecture."""

    kernel: str
    configuration: str
    arch: int
    tiles: tuple[int, ...]
    """Sizes of its blocks, warps of a program, pipelining depth."""
    registers: int
    shared: int
    """Bytes of shared memory a program asks for."""
    spills: int
    """LDL and STL instructions."""
    stack: int
    """Bytes a thread."""
    hmma: int
    hgmma: int
    bulk_copies: int
    wide_accesses: int
    """Global loads and stores of 16 bytes a thread."""
    accesses: int
    """All global loads and stores."""
    instructions: int
    held: int
    """Programs on a multiprocessor at once."""
    main: sass.Counts | None
    """One pass of a warp through the main loop; None for an architecture without rates."""
    cost: sass.Cost | None
    """Of a program, for 128 x 128 scores where the kernel is attention."""
    failures: tuple[str, ...]

    def row(self) -> str:
        mma = f"{self.hgmma} HGMMA" if self.hgmma else f"{self.hmma} HMMA" if self.hmma else "-"
        spills = f"{self.main.spills}/{self.spills}" if self.main and self.spills else self.spills
        return (
            f"{self.kernel:<34} {self.configuration:<32} sm_{self.arch:<3} {self.registers:>4} "
            f"{self.shared:>7} {spills:>6} {self.stack:>5} {mma:>12} {self.bulk_copies:>4} "
            f"{f'{self.wide_accesses}/{self.accesses}':>7} {self.instructions:>6}"
            + self._costs()
        )

    def _costs(self) -> str:
        if self.main is None or self.cost is None:
            return ""
        pipes = " ".join(f"{round(cycles):>6}" for cycles in self.cost.cycles.values())
        return (
            f" {self.held:>4} {pipes} {self.main.barriers:>4} {self.cost.bytes / 1024:>6.1f} "
            f"{round(self.cost.total):>6}  {self.cost}"
        )

    @property
    def label(self) -> str:
        return _label(self.kernel, self.configuration, self.arch)


def _label(kernel: str, configuration: str, arch: int) -> str:
    return f"{kernel} [{configuration}] sm_{arch}"


def shipped_cases() -> Iterator[CompileCase]:
    """The cases of every op module of the kernel library."""
    for module in pkgutil.iter_modules(fastbert_kernels.__path__):
        yield from cases_of(f"fastbert_kernels.{module.name}")


def cases_of(module: str) -> list[CompileCase]:
    found = getattr(importlib.import_module(module), "compile_cases", None)
    return found() if found else []


class Built(NamedTuple):
    """What the compiler made of a case."""

    case: CompileCase
    arch: int
    cubin: bytes
    shared: int


def compile_case(case: CompileCase, arch: int) -> Compiled:
    """Compiles one case and reads the result.

    Raises:
        Exception: whatever the compiler raises.
    """
    return read([build(case, arch)])[0]


def build(case: CompileCase, arch: int) -> Built:
    """Compiles one case.

    Raises:
        Exception: whatever the compiler raises.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.fn.arg_names
    unknown = (case.signature.keys() | case.constexprs.keys()) ^ set(names)
    if unknown:
        raise ValueError(f"{case.name}: {sorted(unknown)} given or expected, but not both")
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    divisible = [
        (i,)
        for i, (name, param) in enumerate(zip(names, case.fn.params, strict=True))
        if not param.do_not_specialize
        and (signature[name].startswith("*") or name in case.divisible_by_16)
    ]
    kernel = triton.compile(
        ASTSource(
            case.fn,
            signature,
            constexprs=dict(case.constexprs),
            attrs={index: [["tt.divisibility", 16]] for index in divisible},
        ),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages}
        | ({"maxnreg": case.maxnreg} if case.maxnreg else {}),
    )
    return Built(case, arch, kernel.asm["cubin"], kernel.metadata.shared)


def read(built: Sequence[Built]) -> list[Compiled]:
    """Reads the machine code of each; one start of `nvdisasm`, 0.3 s of a core, serves many."""
    listings: dict[int, list[str]] = {}
    for arch in {one.arch for one in built}:
        mine = [index for index, one in enumerate(built) if one.arch == arch]
        codes = [_code(built[index].cubin) for index in mine]
        sass_of_all = _tool("nvdisasm", "-ndf", "-c", "-b", f"SM{arch}", content=b"".join(codes))
        listings |= zip(mine, sass.split(sass_of_all, [*map(len, codes)]), strict=True)
    return [_read(one, listings[index]) for index, one in enumerate(built)]


def _code(cubin: bytes) -> bytes:
    """The instructions in an ELF file: its sections named .text.KERNEL."""
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    size, number, names = struct.unpack_from("<3H", cubin, 0x3A)
    sections = [
        struct.unpack_from("<2I4Q", cubin, headers + index * size) for index in range(number)
    ]  # name, type, flags, address, offset, size
    start = sections[names][4]
    return b"".join(
        cubin[offset : offset + length]
        for name, *_, offset, length in sections
        if cubin.startswith(b".text.", start + name)
    )


def _read(built: Built, listing: Sequence[str]) -> Compiled:
    case, arch, cubin, shared = built
    usage = _tool("cuobjdump", "-res-usage", content=cubin)
    code, loops = sass.parse(listing)
    opcodes = Counter(instruction.opcode for instruction in code)

    def count(pattern: str) -> int:
        return sum(n for opcode, n in opcodes.items() if re.match(pattern, opcode))

    registers, stack = (
        max(map(int, re.findall(rf"{field}:(\d+)", usage))) for field in ("REG", "STACK")
    )
    spills, hgmma = count(r"(LDL|STL)\b"), count("HGMMA")
    failures = []
    if shared > SHARED_LIMIT[arch]:
        failures.append(f"wants {shared} bytes of shared memory, has {SHARED_LIMIT[arch]}")
    if arch == 90 and case.needs_wgmma and not hgmma:
        failures.append("needs wgmma and has no HGMMA")
    held, main, cost = 0, None, None
    if arch in sass.MACHINES:
        held, _ = sass.programs(registers, shared, case.num_warps, arch)
        try:
            main = sass.count([code[i] for i in sass.main_part(code, loops)], arch)
            cost = sass.cost(main, case.num_warps, held, arch, _passes(case))
        except ValueError as error:
            failures.append(str(error))
    inside = main.spills if main else spills
    ruined = inside > 0 or spills > FEW_SPILLS
    if ruined:
        failures.append(f"spills: {spills} LDL/STL, {inside} of them in the main loop")
    if stack and (ruined or not spills):
        failures.append(f"keeps {stack} bytes of stack a thread")
    return Compiled(
        kernel=case.name,
        configuration=case.configuration,
        arch=arch,
        tiles=(
            *(value for name, value in case.constexprs.items() if name.startswith("BLOCK")),
            case.num_warps, case.num_stages,
        ),
        registers=registers,
        shared=shared,
        spills=spills,
        stack=stack,
        hmma=count("HMMA"),
        hgmma=hgmma,
        bulk_copies=count("UTMA(LDG|STG|REDG)|UBLK"),
        wide_accesses=count(r"(LDG|STG|LDGSTS)\b.*\.128"),
        accesses=count(r"(LDG|STG|LDGSTS)\b"),
        instructions=sum(opcodes.values()) - opcodes["NOP"],
        held=held,
        main=main,
        cost=cost,
        failures=tuple(failures),
    )


def _passes(case: CompileCase) -> float:
    """Passes through the main loop that 128 x 128 scores take in attention; others are told one."""
    if {"BLOCK_M", "BLOCK_N"} <= case.constexprs.keys():
        return 128 * 128 / (case.constexprs["BLOCK_M"] * case.constexprs["BLOCK_N"])
    return 1


def _tool(name: str, *args: str, content: bytes) -> str:
    """Runs one of the CUDA tools that Triton ships on a file with that content."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(content)
        file.flush()
        return subprocess.run(
            [str(path), *args, file.name], check=True, capture_output=True, text=True,
            errors="replace",
        ).stdout  # fmt: skip


def _ptxas(arch: int) -> str:
    """The version of the ptxas that this Triton takes for an architecture."""
    from triton.backends.nvidia.compiler import get_ptxas_version

    said = get_ptxas_version(arch)
    found = re.search(r"\bV(\d[\d.]*)", said)
    return found[1] if found else said.strip()


def _try_build(job: tuple[CompileCase, int]) -> Built | str:
    case, arch = job
    try:
        return build(case, arch)
    except Exception as error:  # what the compiler raises is the finding
        label = _label(case.name, case.configuration, arch)
        return f"{label}: does not compile: {error!r}"


def _tiles(text: str) -> tuple[int, int, int, int]:
    block_m, block_n, warps, stages = map(int, text.split(","))
    return block_m, block_n, warps, stages


def _with(
    case: CompileCase, tiles: tuple[int, int, int, int] | None, maxnreg: int | None
) -> CompileCase:
    """The case with other tiles, where it is attention's, or another limit of registers."""
    if tiles and {"BLOCK_M", "BLOCK_N"} <= case.constexprs.keys():
        constexprs = {**case.constexprs, "BLOCK_M": tiles[0], "BLOCK_N": tiles[1]}
        case = dataclasses.replace(
            case, constexprs=constexprs, num_warps=tiles[2], num_stages=tiles[3]
        )
    return dataclasses.replace(case, maxnreg=maxnreg) if maxnreg else case


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastbert_bench.kernels.compile_report")
    parser.add_argument(
        "--arch", action="append", choices=[f"sm_{arch}" for arch in SHARED_LIMIT],
        help="repeatable; default sm_80 and sm_90",
    )  # fmt: skip
    parser.add_argument(
        "--module", action="append", help="a module with compile_cases(); default all of ours"
    )
    parser.add_argument("--match", default="", help="only cases whose name or configuration has it")
    parser.add_argument(
        "--tiles", type=_tiles, metavar="M,N,WARPS,STAGES", help="other tiles of attention, to try"
    )
    parser.add_argument("--maxnreg", type=int, help="registers a thread may have, to try")
    parser.add_argument("--accept", action="store_true", help="commit the counts as they are")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the report")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("TRITON_INTERPRET is set: nothing would be compiled. Unset it")
    archs = [int(arch.removeprefix("sm_")) for arch in args.arch or ("sm_80", "sm_90")]
    cases = [case for module in args.module for case in cases_of(module)] if args.module else None
    cases = list(shipped_cases()) if cases is None else cases
    cases = [case for case in cases if args.match in f"{case.name} {case.configuration}"]
    tried = bool(args.tiles or args.maxnreg)
    if tried:
        cases = [_with(case, args.tiles, args.maxnreg) for case in cases]

    import triton

    ptxas = {f"sm_{arch}": _ptxas(arch) for arch in archs}
    tools = ", ".join(f"ptxas {version} for {arch}" for arch, version in ptxas.items())
    print(f"Triton {triton.__version__}; {tools}")
    print(HEADER)
    table: list[Compiled] = []
    failures = []
    jobs = [(case, arch) for case in cases for arch in archs if arch in case.archs]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the compiler and ptxas let go of the GIL
        built = pool.map(_try_build, jobs)
        while group := list(islice(built, TOGETHER)):
            rows = iter(read([one for one in group if isinstance(one, Built)]))
            for one in group:
                if isinstance(one, str):
                    failures.append(one)
                    continue
                compiled = next(rows)
                print(compiled.row(), flush=True)
                table.append(compiled)
                failures += [f"{compiled.label}: {failure}" for failure in compiled.failures]
    if not tried:
        every = {_label(case.name, case.configuration, arch) for case, arch in jobs}
        shipped = None if args.module or args.match or args.arch else every
        found = {row.label: counts.figures(row.held, row.cost) for row in table if row.cost}
        committed = counts.read()
        worse = counts.grown(committed, found, triton.__version__, shipped)
        if args.accept:
            counts.write(counts.accept(committed, found, triton.__version__, shipped))
            for one in worse:
                print(f"accepted: {one}")
        else:
            failures += worse
    if args.json:
        report = {
            "triton": triton.__version__,
            "ptxas": ptxas,
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "asked": len(jobs),
            "failures": failures,
            "compiled": [dataclasses.asdict(compiled) for compiled in table],
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for failure in failures:
        print(failure, file=sys.stderr)
    print(f"{len(table)} compiled, {len(failures)} failures")
    return 1 if failures or not table else 0


if __name__ == "__main__":
    sys.exit(main())
