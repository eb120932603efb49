"""The README's section of measurements, made from the files under benchmarks/results/.

Every table names its device, every column or row its date and file; a kind of device without a file
is "not yet measured".
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from fastbert.errors import UserError
from fastbert_bench.measure.marked import with_lines
from fastbert_bench.measure.places import RESULTS, ROOT
from fastbert_bench.measure.result import Row, metric
from fastbert_bench.report.files import TITLES, Result, in_folder

README = ROOT / "README.md"
BEGIN = "<!-- fastbert bench report --readme -->"
END = "<!-- end of the measurements -->"


def section(results: Path = RESULTS) -> Iterator[str]:
    """The section, line by line."""
    found, refused = in_folder(results)
    for on_gpu, words in ((False, "CPU"), (True, "GPU")):
        devices = list(dict.fromkeys(one.device for one in found if one.on_gpu == on_gpu))
        if not devices:
            yield f"On a {words}: not yet measured."
            yield ""
        for device in devices:
            yield f"**{device} ({words})**"
            yield ""
            here = [one for one in found if one.device == device and one.on_gpu == on_gpu]
            yield from _steps([one for one in here if one.kind == "step"], results)
            for one in here:
                if one.kind == "serve":
                    yield from _service(one, results)
                elif one.kind != "step":
                    yield from _rows(one, results)
    for line in refused:
        yield f"Left out: {line.replace(f'{results}/', '')}"
        yield ""


def _link(result: Result, results: Path) -> str:
    """The file, as the README links it, and the day."""
    path = Path(result.file).relative_to(results)
    return f"[{result.stem}](benchmarks/results/{path.as_posix()}), {result.date}"


def _steps(steps: Sequence[Result], results: Path) -> Iterator[str]:
    """One table of all training steps: a column a file, a row a contender."""
    if not steps:
        return
    yield "| training step: real tokens/s (fastbert is … as fast) |" + "".join(
        f" {one.workload}; {_link(one, results)} |" for one in steps
    )
    yield "|---|" + "--:|" * len(steps)
    for name in dict.fromkeys(row["name"] for one in steps for row in one.rows):
        cells = []
        for one in steps:
            row = {row["name"]: row for row in one.rows}.get(name)
            why = {gap["name"]: gap["why"] for gap in one.missing}.get(name, "not measured")
            cells.append(_rate(row) if row else why)
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""


def _rate(row: Row) -> str:
    if "real_tokens_per_second" not in row:
        return "not available"
    rate = f"{row['real_tokens_per_second']:,.0f}"
    return rate if row.get("ratio", 1) == 1 else f"{rate} ({row['ratio']:.1f}x)"


def _service(result: Result, results: Path) -> Iterator[str]:
    """One table of a service: a column for each number of clients, a row a contender."""
    clients = sorted({row["clients"] for row in result.rows})
    what = "texts/s (fastbert is … as fast), p50 / p99"
    yield f"| service: {result.workload}: {what}; {_link(result, results)} |" + "".join(
        f" {count} client{'s' * (count > 1)} |" for count in clients
    )
    yield "|---|" + "--:|" * len(clients)
    cells = {(row["contender"], row["clients"]): _wait(row) for row in result.rows}
    for name in dict.fromkeys(row["contender"] for row in result.rows):
        yield f"| {name} | {' | '.join(cells.get((name, count), '-') for count in clients)} |"
    yield ""


def _wait(row: Row) -> str:
    waits = " / ".join(_number(row[f"latency_ms_{part}"]) for part in ("p50", "p99"))
    return f"{_number(row['sequences_per_second'])}{_compared(row)}, {waits} ms"


def _rows(result: Result, results: Path) -> Iterator[str]:
    """One table of any other file."""
    if result.kind.startswith("profile") or result.kind == "estimate":
        return
    head = f"{TITLES[result.kind].lower()}: {result.workload}; {_link(result, results)}"
    if result.kind == "kernels":
        rows = [
            (row["name"].removesuffix(", ours"),
             f"{row['ms']:.3g} ms" + (f", {row['floor_share']:.0%} of its ceiling"
                                      if "floor_share" in row else ""))
            for row in result.rows if row.get("ms") and row.get("contender", "ours") == "ours"
        ]  # fmt: skip
    else:  # of many shapes, only the worst
        named = (row for row in result.rows if row.get("task") != "shapes")
        worst = (row for row in result.rows if row["name"].startswith("worst"))
        shown = [*named, *worst]
        rows = [(row["name"], _figure(row)) for row in shown]
    yield f"| {head} | |"
    yield "|---|--:|"
    for name, figure in rows:
        yield f"| {name} | {figure} |"
    yield ""


def _figure(row: Row) -> str:
    """What a row says in one number, and how it compares with the first."""
    if "seconds_to_target" in row and row["seconds_to_target"] is None:
        return "never reached the target loss"
    if "metric_mean" in row:
        time = f", {_number(row['ms'] / 1e3)} s{_compared(row)}" if "ms" in row else ""
        return metric(row) + time
    for key, unit in (
        ("seconds_to_target", "s to the target loss"),
        ("real_tokens_per_second", "real tokens/s"),
        ("ms", "ms"),
    ):
        if key in row:
            return f"{_number(row[key])} {unit}{_compared(row)}"
    return "not available"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _compared(row: Row) -> str:
    """A digit more where the first would hide on which side of 1 it lies."""
    ratio = row.get("ratio", 1)
    if ratio == 1:
        return ""
    return f" ({ratio:.2f}x)" if 0.9 < ratio < 1.1 else f" ({ratio:.1f}x)"


def with_section(readme: str, results: Path = RESULTS) -> str:
    """`readme` with what lies between the two marks replaced.

    Raises:
        ValueError: a mark is missing.
    """
    return with_lines(readme, README, BEGIN, END, ("", *section(results)))


def write_readme() -> Path:
    """Rewrites the section; returns the README's path.

    Raises:
        UserError: there is no README, as where fastbert is installed without its repository.
    """
    try:
        README.write_text(with_section(README.read_text(encoding="utf-8")), encoding="utf-8")
    except OSError as error:
        raise UserError(f"readme: {README} cannot be rewritten: {error.strerror}") from None
    return README
