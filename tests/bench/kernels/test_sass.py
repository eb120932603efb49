"""Counts of machine code: against a count by hand, and by what kernels must compute and move."""

import pytest

from fastbert_bench.kernels import counts, sass

# Inner loops of attention for sm_90 in bf16 with D = 64, as Triton 3.7.1 compiled them once, and
# what an independent count by hand gave for 128 x 128 scores: issue, ALU, MUFU and tensor cycles of
# a sub-partition, and KB from and to the L2 without the rows' statistics. A slash marks a product
# whose first operand lies in registers.
LOOPS = {
    "forward p=0.0": (
        (128, 128, 8), (974, 572, 1056, 1024, 32),
        "68 FMNMX 68 FADD 66 FFMA 66 MUFU.EX2 34 FMUL 32 F2FP 21 UIADD3 20 IMAD 18 IADD3 16 ISETP "
        "9 UMOV 8 SHFL 8 SEL 8 HGMMA.64x64x16/ 8 LDGSTS.E.BYPASS.128 7 LDS 4 HGMMA.64x128x16 "
        "3 USHF 3 ULEA 3 WARPGROUP 2 BAR 2 UISETP 2 ULOP3 2 USEL 2 USGXT 2 LDGDEPBAR 1 DEPBAR "
        "1 MEMBAR 1 FENCE 1 VIADD",
    ),
    "forward p=0.1": (
        (128, 128, 8), (1734, 1836, 1056, 1024, 32),
        "126 LOP3 77 PRMT 72 SEL 68 FMNMX 68 FADD 66 FFMA 66 MUFU.EX2 40 IMAD 38 IMAD.HI.U32 "
        "34 FMUL 32 F2FP 32 IADD3 28 ISETP 23 UIADD3 19 VIADD 9 UMOV 8 SHFL 8 HGMMA.64x64x16/ "
        "8 LDGSTS.E.BYPASS.128 7 LDS 6 UISETP 5 PLOP3 4 HGMMA.64x128x16 3 USHF 3 ULEA 3 WARPGROUP "
        "2 BAR 2 ULOP3 2 USEL 2 USGXT 2 LDGDEPBAR 1 DEPBAR 1 MEMBAR 1 FENCE",
    ),
    "head p=0.0": (
        (128, 64, 8), (2500, 1352, 1024, 2560, 192),
        "67 IMAD 35 UIADD3 33 CS2R 32 FFMA 32 FMNMX 32 MUFU.EX2 32 F2FP 32 FADD 32 FMUL 28 IADD3 "
        "18 ISETP 17 UMOV 16 LDG.E.128 16 STS.128 16 LDSM.16.MT88.4 16 HGMMA.64x32x16/ 16 LEA "
        "16 STS.64 16 LDS.64 14 R2UR 11 BAR 11 ULOP3 10 WARPGROUP 8 UIMAD 8 ULEA 8 HGMMA.64x64x16 "
        "8 STSM.16.M88.4 8 LDSM.16.M88.4 8 STG.E.128 6 MOV 4 LDG.E 4 MEMBAR 4 FENCE "
        "4 HGMMA.64x64x16/ 2 LOP3 1 USHF 1 SHF 1 UISETP 1 PLOP3",
    ),
    "head p=0.1": (
        (128, 64, 8), (3756, 3224, 1024, 2560, 192),
        "107 IMAD 101 LOP3 42 IMAD.HI.U32 41 PRMT 35 UIADD3 33 CS2R 32 FFMA 32 FMNMX 32 MUFU.EX2 "
        "32 F2FP 32 FSEL 32 SEL 32 FADD 32 FMUL 28 IADD3 26 ISETP 19 UMOV 18 LEA 16 LDG.E.128 "
        "16 STS.128 16 LDSM.16.MT88.4 16 HGMMA.64x32x16/ 16 STS.64 16 LDS.64 14 R2UR 12 VIADD "
        "11 BAR 10 WARPGROUP 9 PLOP3 8 UIMAD 8 ULEA 8 HGMMA.64x64x16 8 STSM.16.M88.4 "
        "8 LDSM.16.M88.4 8 STG.E.128 5 ULOP3 4 LDG.E 4 MEMBAR 4 FENCE 4 MOV 4 HGMMA.64x64x16/ "
        "3 USHF 2 SHF 1 SGXT 1 UISETP",
    ),
    "columns p=0.1": (
        (128, 64, 8), (2768, 2544, 1024, 2048, 64),
        "92 LOP3 55 IMAD 46 IMAD.WIDE 42 SEL 36 PRMT 34 FSEL 32 FFMA 32 FMNMX 32 MUFU.EX2 32 F2FP "
        "32 FADD 32 FMUL 29 UIADD3 23 ISETP 16 LDSM.16.MT88.4 16 HGMMA.64x32x16/ 14 VIADD 13 UMOV "
        "11 LDS 8 HGMMA.64x64x16 8 STSM.16.M88.4 8 IADD3 8 LDGSTS.E.BYPASS.128 6 WARPGROUP 5 BAR "
        "5 ULOP3 4 ULEA 4 LEA 4 LDGDEPBAR 2 UISETP 2 USEL 2 USHF 2 LDGSTS.E 1 DEPBAR 1 MEMBAR "
        "1 FENCE 1 SHF",
    ),
    "query p=0.1": (
        (128, 128, 8), (1594, 1428, 1024, 1536, 32),
        "127 LOP3 64 FFMA 64 FMNMX 64 MUFU.EX2 64 FSEL 64 FADD 64 FMUL 38 IMAD.HI.U32 36 IMAD "
        "33 UIADD3 32 F2FP 24 ISETP 17 VIADD 16 IADD3 8 UMOV 8 HGMMA.64x128x16 8 SEL "
        "8 HGMMA.64x64x16/ 8 LDGSTS.E.BYPASS.128 7 USHF 7 LDS 5 WARPGROUP 5 PLOP3 4 UISETP 4 ULEA "
        "3 ULOP3 3 UIMAD 2 BAR 2 USEL 2 USGXT 2 LDGDEPBAR 1 DEPBAR 1 MEMBAR 1 FENCE",
    ),
}  # fmt: skip


def listing(*lines: str) -> list[str]:
    """As nvdisasm prints it; a line that ends in a colon names the next one's address."""
    code: list[str] = []
    places: dict[str, str] = {}
    for line in lines:
        if line.endswith(":"):
            places[line[:-1]] = f"{16 * len(code):#x}"
        else:
            *words, last = line.split(" ")
            shown = " ".join([*words, places.get(last, last)])
            code.append(f"        /*{16 * len(code):04x}*/ {'':>16} {shown} ;")
    return code


def unfolded(loop: str) -> list[str]:
    """The instructions that "2 BAR 1 FENCE" stands for."""
    words = loop.split()
    found = []
    for number, opcode in zip(words[::2], words[1::2], strict=True):
        first = "R4" if opcode.endswith("/") else "gdesc[UR4]"
        found += [f"{opcode.rstrip('/')} R8, {first}, gdesc[UR8], R8"] * int(number)
    return found


def counted(*lines: str, arch: int = 90) -> sass.Counts:
    code, _ = sass.parse(listing(*lines))
    return sass.count(code, arch)


@pytest.mark.parametrize("name", LOOPS)
def test_a_count_by_hand_is_reproduced(name):
    (rows, columns, warps), by_hand, loop = LOOPS[name]
    lines = unfolded(loop)
    text = listing(
        "S2R R0, SR_TID.X", *["MUFU.EX2 R1, R1"] * 9,  # before the loop
        "a:", *lines, "@P0 BRA a",
        "b:", *lines, "FSEL R1, R1, R2, P0", "@P1 BRA P3, b",  # its masked twin
        "c:", *["STG.E.128 desc[UR4][R2.64], R4"] * 4, "@P2 BRA c",
        "EXIT", "d:", "BRA d", "NOP",
    )  # fmt: skip
    code, loops = sass.parse(text)
    assert len(loops) == 3  # the trap behind the end is none
    assert sass.split("\n".join([".text:", *text]), [16 * 5, 16 * 2, 16 * (len(text) - 7)]) == [
        text[:5], text[5:7], text[7:]
    ]  # fmt: skip
    part = sass.main_part(code, loops)
    found = sass.count([code[i] for i in part], 90)
    cost = sass.cost(found, warps, 1, 90, 128 * 128 / (rows * columns))
    cycles = [cost.cycles[pipe] for pipe in ("issue", "ALU", "MUFU", "tensor")]
    assert cycles == list(by_hand[:4])
    assert cost.bytes / 1024 == pytest.approx(by_hand[4], rel=0.07)


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("LDG.E.128 R4, desc[UR4][R2.64]", "loaded", 32 * 16),
        ("@!P0 LDG.E.U16 R4, desc[UR4][R2.64]", "loaded", 32 * 2),
        ("LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]", "shared", 32 * 16),
        ("REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R4", "stored", 32 * 16),
        ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2.64], R4", "stored", 32 * 4),
        ("STG.E.64 desc[UR4][R2.64], R4", "stored", 32 * 8),
        ("LDSM.16.M88.4 R4, [R1]", "shared", 4 * 128),
        ("LDSM.16.M88 R4, [R1]", "shared", 128),
        ("HGMMA.64x128x16.F32.BF16 R8, gdesc[UR4], R8", "operands", (64 + 128) * 16 * 2 // 4),
        ("HGMMA.64x128x16.F32.BF16 R8, R4, gdesc[UR4], R8", "operands", 128 * 16 * 2 // 4),
        ("HGMMA.64x128x16.F32.BF16 R8, R4, gdesc[UR4], R8", "flops", 2 * 64 * 128 * 16 // 4),
        ("HMMA.16816.F32.BF16 R4, R8, R2, R4", "flops", 2 * 16 * 8 * 16),
        ("IMAD.WIDE.U32 R4, R8, R2, R4", "fma", 4),
        ("IMAD.MOV.U32 R4, RZ, RZ, R4", "fma", 2),
        ("LDL.64 R4, [R1]", "spills", 1),
        ("@UP0 UIADD3 UR4, UR4, 0x1, URZ", "issue", 1),
        ("NOP", "issue", 0),
    ],
)
def test_what_an_instruction_costs(line, field, value):
    assert getattr(counted(line), field) == value


def test_halves_of_the_rate_on_an_a100():
    assert counted("FFMA R4, R8, R2, R4", arch=80).fma == 2
    assert counted("FFMA R4, R8, R2, R4", arch=90).fma == 1


def test_bulk_copies_bring_what_their_barrier_expects():
    copy = ("@P1 MOV R3, 0x8000", "MOV R4, 0x10", "@P1 SYNCS.ARRIVE.TRANS64 RZ, [UR5+0x1c], R3",
            "UTMALDG.2D [UR24], [UR12]")  # fmt: skip
    found = counted(*copy)
    assert (found.bulk, found.copies, found.barriers) == (0x8000, 1, 1)
    assert sass.cost(found, 8, 2, 90).bytes == 0x8000  # of the program, however many its warps
    with pytest.raises(ValueError, match="how many bytes a bulk copy moves: R3"):
        counted(*copy[1:])


@pytest.mark.parametrize("opcode", ["FNEW", "UTMASTG.2D", "HGMMA.64x64x8.F32.TF32"])
def test_what_no_rule_counts_is_refused(opcode):
    with pytest.raises(ValueError, match=f"no rule counts {opcode}"):
        counted(f"{opcode} R4, R8, R2")


def test_a_program_alone_waits_for_its_products_and_loads():
    flops = 4096 * 512
    waits = sass.Counts(
        issue=400, alu=600, flops=flops // 4, shared=1280, operands=6400, loaded=3200
    )  # fmt: skip
    assert sass.cost(waits, 4, 2, 90).total == 600
    alone = sass.cost(waits, 4, 1, 90)
    assert (alone.total, alone.limit) == (600 + 512 + 400, "ALU + tensor + L2")
    ahead = sass.cost(sass.Counts(**vars(waits) | {"copies": 1}), 4, 1, 90)
    assert (ahead.total, ahead.limit) == (600 + 512, "ALU + tensor")
    assert alone.rate == pytest.approx(flops / 1512 * 132 * 1.755e9)
    rates = "to".join(f" {flops / cycles * 132 * 1.755e-3:.3g} " for cycles in (1112, 600)).strip()
    assert str(ahead) == f"{rates} TFLOP/s by ALU + tensor"


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "arch", "held", "limit"),
    [
        (32, 0, 8, 90, 8, "warps"),
        (253, 81_920, 8, 90, 1, "registers"),
        # 134 x 32 registers are given as 4,352, of which a quarter of the file holds 3.
        (134, 0, 1, 80, 12, "registers"),
        (64, 100_000, 4, 80, 1, "shared memory"),
        (64, 100_000, 4, 90, 2, "shared memory"),
        (24, 0, 1, 90, 32, "programs"),
    ],
)
def test_programs_at_once(registers, shared, warps, arch, held, limit):
    assert sass.programs(registers, shared, warps, arch) == (held, limit)


# Committed counts

A, B = [2, 100, 80, 60, 8, 64, 20, 30, 100], [1, 100, 80, 60, 8, 64, 20, 30, 164]


def test_what_grew_by_more_than_5_percent_is_said(tmp_path):
    table = {"k [a] sm_90": {"3.7.1": A}, "k [b] sm_90": {"3.7.1": B, "3.6.0": B}}
    found = {"k [a] sm_90": [1, 105, 85, *A[3:]], "k [b] sm_90": B}
    assert counts.grown(table, found, "3.7.1") == [
        "k [a] sm_90: held 2 -> 1", "k [a] sm_90: ALU 80 -> 85"
    ]  # fmt: skip
    assert counts.grown(table, {"k [b] sm_90": [3, *[n // 2 for n in B[1:]]]}, "3.7.1") == []
    assert counts.grown(table, found, "3.8.0") == []
    assert counts.grown(table, found, "3.8.0", found.keys()) == [
        "no counts are committed for Triton 3.8.0"
    ]
    assert counts.grown(table, {"k [c] sm_90": A}, "3.7.1", {"k [a] sm_90", "k [c] sm_90"}) == [
        "k [c] sm_90: no counts are committed",
        "k [b] sm_90: counts are committed, but it is not shipped",
    ]
    accepted = counts.accept(table, found, "3.7.1", {"k [a] sm_90"} | found.keys())
    assert counts.grown(accepted, found, "3.7.1", found.keys()) == []
    assert accepted["k [b] sm_90"] == {"3.7.1": B, "3.6.0": B}
    assert counts.accept(table, {}, "3.7.1", {"k [b] sm_90"}).keys() == {"k [b] sm_90"}
    counts.write(accepted, tmp_path / "counts.json")
    assert counts.read(tmp_path / "counts.json") == accepted
    assert (tmp_path / "counts.json").read_text().count("\n") == len(accepted) + 2
