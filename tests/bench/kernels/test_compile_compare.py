"""Compile reports of several Tritons side by side."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from fastbert_bench.kernels import compile_compare
from fastbert_bench.kernels import costs as kernels
from fastbert_bench.kernels.compile_report import shipped_cases

KEYS = [*dict.fromkeys(compile_compare.SHOWN + compile_compare.COUNTED), ("other", "fp32")]
TRITON = version("triton")


def report(triton: str, failures: tuple[str, ...] = (), **instructions: int) -> dict[str, Any]:
    """One in which every kernel has 500 instructions, or those of its name."""
    pipes = ("issue", "ALU", "FMA", "MUFU", "tensor", "shared", "L2")
    cost = {
        "cycles": {pipe: i for i, pipe in enumerate(pipes, 1)}, "flops": 1, "bytes": 2048,
        "total": 14, "limit": "L2", "rate": 3e14,
    }  # fmt: skip
    row = {"registers": 64, "failures": [], "held": 1, "tiles": [128, 64, 8, 2], "cost": cost}
    return {
        "triton": triton, "ptxas": {"sm_80": "12.8.93", "sm_90": "12.8.93"}, "date": "2026-01-02",
        "asked": 2 * len(KEYS), "failures": list(failures),
        "compiled": [
            row | {"kernel": name, "configuration": configuration, "arch": arch,
                   "instructions": instructions.get(name, 500) if arch == 90 else 9999}
            for name, configuration in KEYS for arch in (80, 90)
        ],
    }  # fmt: skip


def cells(reports: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Label of a row -> its cells."""
    rows = [line.strip("| ").split(" | ") for line in compile_compare.table_lines(reports)]
    return {row[0]: row[1:] for row in rows}


def test_what_grew_shows() -> None:
    newer = report("3.9.0", adamw=1250, other=2000) | {"ptxas": {"sm_80": "12.8", "sm_90": "13.1"}}
    table = cells([report("3.6.0"), newer])
    assert table["Triton 3.6.0"] == ["Triton 3.9.0"]
    assert table["torch that pins it"] == ["2.11", "2.15"]
    assert table["ptxas"] == ["12.8.93", "12.8 (sm_80), 13.1 (sm_90)"]
    assert table["date"] == ["2026-01-02"] * 2
    assert table["cases compiled"] == [f"{2 * len(KEYS)} of {2 * len(KEYS)}"] * 2
    assert table["failures"] == ["0", "0"]
    assert table["`adamw` grad fp32, weights bf16"] == ["64, 500", "64, 1,250"]
    assert table["grows most over the first column"] == ["none", "+300%: `other` fp32"]


def test_what_fails_shows() -> None:
    spills, broken = report("3.7.1", ("a", "b")), report("3.9.0")
    adamw = [row for row in spills["compiled"] if row["kernel"] == "adamw"]
    adamw[1]["failures"] = ["spills: 8 LDL/STL"]
    broken["compiled"] = [row for row in broken["compiled"] if row["kernel"] != "adamw"]
    broken["failures"] = ["adamw [grad fp32, weights bf16] sm_90: does not compile: KeyError('x')"]
    table = cells([spills, broken])
    assert table["failures"] == ["2", "1"]
    assert table["`adamw` grad fp32, weights bf16"] == ["64, 500, fails", "does not compile"]
    broken["failures"] = []
    with pytest.raises(ValueError, match=r"Triton 3\.9\.0 has no adamw \[grad fp32, weights bf16"):
        cells([spills, broken])


def test_every_kernel_of_the_table_is_shipped() -> None:
    shipped = {(case.name, case.configuration) for case in shipped_cases() if 90 in case.archs}
    assert shipped.issuperset(KEYS[:-1])


def test_what_the_machine_code_asks_for_shows() -> None:
    older, (name, configuration) = report("3.6.0"), compile_compare.COUNTED[0]
    mine = [row for row in older["compiled"] if row["configuration"] == configuration]
    mine[1]["cost"] = mine[1]["cost"] | {"rate": 2.5e14}
    head, _, first, *rest = compile_compare.cost_lines([older, report(TRITON)], TRITON)
    assert head.endswith(f" KB | bound, Triton {TRITON} | 3.6.0 |")
    assert first == (
        f"| `{name}` {configuration} | 128 x 64, 8, 2 | 64 | 1 | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 2 | "
        "300 to 600 TFLOP/s by L2 | 250 |"
    )
    assert len(rest) == len(compile_compare.COUNTED) - 1
    with pytest.raises(ValueError, match=f"no report is of Triton {TRITON}"):
        list(compile_compare.cost_lines([older], TRITON))
    older["compiled"].remove(mine[1])
    with pytest.raises(ValueError, match=rf"Triton 3\.6\.0 has no counts of {name}"):
        list(compile_compare.cost_lines([older, report(TRITON)], TRITON))


def test_the_readme_is_rewritten_between_its_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = [
        (compile_compare.BEGIN, compile_compare.END),
        (compile_compare.COSTS_BEGIN, compile_compare.COSTS_END),
    ]
    for begin, _ in marks:
        assert kernels.README.read_text(encoding="utf-8").count(begin) == 1
    readme = tmp_path / "README.md"
    readme.write_text("\n".join(f"above\n{begin}\nold\n{end}\nbelow" for begin, end in marks))
    monkeypatch.setattr(compile_compare, "README", readme)
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    reports = [report("3.6.0"), report(TRITON)]
    for file, made in zip(files, reports, strict=True):
        file.write_text(json.dumps(made))
    assert compile_compare.main([*map(str, files), "--readme"]) == 0
    tables = [
        compile_compare.table_lines(reports), compile_compare.cost_lines(reports, TRITON)
    ]  # fmt: skip
    assert readme.read_text().splitlines() == [
        line
        for (begin, end), table in zip(marks, tables, strict=True)
        for line in ("above", begin, *table, end, "below")
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(report("3.6.0")), "two reports of the same Triton: 3.6.0, 3.6.0"),
        ("[]", "b.json: not written by fastbert_bench.kernels.compile_report --json"),
    ],
)
def test_other_files_are_refused(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(json.dumps(report("3.6.0")))
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(SystemExit) as stop:
        compile_compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert stop.value.code == 2 and message in capsys.readouterr().err
