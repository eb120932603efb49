"""Compile reports of several Tritons side by side: would an upgrade ruin a kernel?

`python -m fastbert_bench.kernels.compile_compare FILE... --readme`, with files of
`fastbert_bench.kernels.compile_report --json`, writes the tables of kernels/README.md; `make
compile-report-table` makes the files, too.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastbert_bench.kernels import sass
from fastbert_bench.kernels.costs import README
from fastbert_bench.measure.marked import with_lines

BEGIN, END = "<!-- make compile-report-table -->", "<!-- end of the compile reports -->"
COSTS_BEGIN, COSTS_END = "<!-- counts: make compile-report-table -->", "<!-- end of the counts -->"
ARCH = 90
# `pip install torch==... --dry-run` says what each torch asks for.
TORCH = {"3.6": "2.11", "3.7": "2.12, 2.13", "3.8": "2.14", "3.9": "2.15"}
# (kernel, configuration): where BERT's training step spends its time in kernels of ours.
SHOWN = (
    ("attention_forward_kernel", "forward bf16 D=64 p=0.1"),
    ("attention_forward_kernel", "short bf16 D=64 p=0.1"),
    ("attention_backward_kernel", "head bf16 D=64 p=0.1"),
    ("attention_backward_kernel", "tile bf16 D=64 p=0.1"),
    ("dropout_add_layer_norm", "bf16 H=768 p=0.1"),
    ("dropout_add_layer_norm", "bf16 H=1024 p=0.1"),
    ("dropout_add_layer_norm_backward", "bf16 H=768 p=0.1"),
    ("dropout_add_layer_norm_backward", "bf16 H=1024 p=0.1"),
    ("softmax_gradient", "bf16 smoothing=0.0 gradient=True"),
    ("adamw", "grad fp32, weights bf16"),
)
# And of these, what the machine code asks for.
COUNTED = (
    ("attention_forward_kernel", "forward bf16 D=64 p=0.0"),
    ("attention_forward_kernel", "forward bf16 D=64 p=0.1"),
    ("attention_forward_kernel", "short bf16 D=64 p=0.1"),
    ("attention_backward_kernel", "tile bf16 D=64 p=0.1"),
    ("attention_backward_kernel", "head bf16 D=64 p=0.0"),
    ("attention_backward_kernel", "head bf16 D=64 p=0.1"),
    ("attention_backward_kernel", "columns bf16 D=64 p=0.1"),
    ("attention_backward_query_kernel", "query bf16 D=64 p=0.1"),
    ("linear_gelu", "bf16 none"),
    ("gelu_linear_backward", "bf16 none"),
    ("dropout_add_layer_norm", "bf16 H=768 p=0.1"),
    ("dropout_add_layer_norm", "bf16 H=1024 p=0.1"),
    ("dropout_add_layer_norm_backward", "bf16 H=768 p=0.1"),
    ("dropout_add_layer_norm_backward", "bf16 H=1024 p=0.1"),
    ("bias_gelu", "bf16 none"),
    ("gelu_backward", "bf16 none"),
    ("softmax_gradient", "bf16 smoothing=0.0 gradient=True"),
    ("adamw", "grad fp32, weights bf16"),
)

Report = dict[str, Any]
Cases = dict[tuple[str, str], dict[str, Any]]


def read(paths: Sequence[Path]) -> list[Report]:
    """The reports.

    Raises:
        ValueError: a file is none, or two are of the same Triton.
    """
    reports = []
    for path in paths:
        report = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(report, dict) or not {"triton", "compiled"} <= report.keys():
            raise ValueError(f"{path}: not written by fastbert_bench.kernels.compile_report --json")
        reports.append(report)
    versions = [report["triton"] for report in reports]
    if len(set(versions)) < len(versions):
        raise ValueError(f"two reports of the same Triton: {', '.join(versions)}")
    return reports


def table_lines(reports: Sequence[Report]) -> Iterator[str]:
    """The table as Markdown: a column a report.

    Raises:
        ValueError: a report lacks a kernel that the table shows.
    """
    found = [_cases(report) for report in reports]
    yield "| |" + "".join(f" Triton {report['triton']} |" for report in reports)
    yield "|---|" + "--:|" * len(reports)
    rows: list[tuple[str, list[str]]] = [
        ("torch that pins it", [_torch(report["triton"]) for report in reports]),
        ("ptxas", [_ptxas(report["ptxas"]) for report in reports]),
        ("date", [report["date"] for report in reports]),
        ("cases compiled", [f"{len(r['compiled'])} of {r['asked']}" for r in reports]),
        ("failures", [str(len(report["failures"])) for report in reports]),
    ]
    for name, configuration in SHOWN:
        key = name, configuration
        cells = [_figures(cases, key, report) for cases, report in zip(found, reports, strict=True)]
        rows.append((f"`{name}` {configuration}", cells))
    rows.append(("grows most over the first column", [_growth(found[0], cases) for cases in found]))
    for label, cells in rows:
        yield f"| {label} | {' | '.join(cells)} |"


def cost_lines(reports: Sequence[Report], detailed: str) -> Iterator[str]:
    """What the machine code of sm_90 asks for, as Markdown.

    Args:
        reports: the first column to show a bound for, and so on.
        detailed: the Triton of which everything is shown; of the others, the bound.

    Raises:
        ValueError: a report lacks a kernel that the table shows, or no report is of `detailed`.
    """
    found = {report["triton"]: _cases(report) for report in reports}
    if detailed not in found:
        raise ValueError(f"no report is of Triton {detailed}, whose counts the table shows")
    others = [triton for triton in found if triton != detailed]
    yield (
        "| | tile, warps, stages | registers | programs | issue | ALU | FMA | MUFU | tensor "
        f"| shared | memory | KB | bound, Triton {detailed} |"
        + "".join(f" {triton} |" for triton in others)
    )
    yield "|---|---|" + "--:|" * 10 + "---|" + "--:|" * len(others)
    for key in COUNTED:
        rows = {triton: cases.get(key) for triton, cases in found.items()}
        if missing := [triton for triton, row in rows.items() if not row or not row.get("cost")]:
            raise ValueError(f"the report of Triton {missing[0]} has no counts of {' '.join(key)}")
        costs = {triton: sass.Cost(**row["cost"]) for triton, row in rows.items() if row}
        row, cost = rows[detailed], costs[detailed]
        assert row is not None
        *blocks, warps, stages = row["tiles"]
        cells = [
            f"`{key[0]}` {key[1]}", f"{' x '.join(map(str, blocks))}, {warps}, {stages}",
            row["registers"], row["held"], *(f"{n:,.0f}" for n in cost.cycles.values()),
            f"{cost.bytes / 1024:.0f}", cost,
            *(f"{costs[triton].rate / 1e12:.3g}" for triton in others),
        ]  # fmt: skip
        yield f"| {' | '.join(map(str, cells))} |"


def _cases(report: Report) -> Cases:
    return {
        (row["kernel"], row["configuration"]): row
        for row in report["compiled"]
        if row["arch"] == ARCH
    }


def _torch(triton: str) -> str:
    return TORCH.get(".".join(triton.split(".")[:2]), "-")


def _ptxas(versions: dict[str, str]) -> str:
    if len(set(versions.values())) == 1:
        return next(iter(versions.values()))
    return ", ".join(f"{version} ({arch})" for arch, version in versions.items())


def _figures(cases: Cases, key: tuple[str, str], report: Report) -> str:
    row = cases.get(key)
    if row:
        failed = ", fails" if row["failures"] else ""
        return f"{row['registers']}, {row['instructions']:,}{failed}"
    label = f"{key[0]} [{key[1]}] sm_{ARCH}"
    if any(failure.startswith(f"{label}: ") for failure in report["failures"]):
        return "does not compile"
    raise ValueError(f"the report of Triton {report['triton']} has no {label}")


def _growth(first: Cases, cases: Cases) -> str:
    """The case, of all, whose instructions grew most."""
    both = first.keys() & cases.keys()
    ratio, key = max((cases[key]["instructions"] / first[key]["instructions"], key) for key in both)
    return f"{ratio - 1:+.0%}: `{key[0]}` {key[1]}" if ratio > 1 else "none"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastbert_bench.kernels.compile_compare")
    parser.add_argument("file", nargs="+", type=Path, help="made by compile_report --json")
    parser.add_argument("--readme", action="store_true", help=f"write the table into {README.name}")
    args = parser.parse_args(argv)
    try:
        reports = read(args.file)
        lines = list(table_lines(reports))
        costs = list(cost_lines(reports, version("triton")))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if args.readme:
        readme = with_lines(README.read_text(encoding="utf-8"), README, BEGIN, END, lines)
        readme = with_lines(readme, README, COSTS_BEGIN, COSTS_END, costs)
        README.write_text(readme, encoding="utf-8")
    else:
        print("\n".join([*lines, "", *costs]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
