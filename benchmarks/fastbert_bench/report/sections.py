"""The sections of the report: for each kind of result, its pictures and the numbers beside them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastbert_bench.measure.result import Row
from fastbert_bench.report import figures
from fastbert_bench.report.compare import RULE, moves
from fastbert_bench.report.files import TITLES, Result
from fastbert_bench.report.page import Page, flat, number

# Column of a table -> its heading, in this order; others follow under their own names.
_COLUMNS = {
    "ms": "ms", "ms_p20": "p20", "ms_p80": "p80", "real_tokens_per_second": "real tokens/s",
    "sequences_per_second": "sequences/s", "mfu": "MFU", "peak_memory_bytes": "peak memory, MiB",
    "watts": "watts", "joules_per_million_tokens": "J / 10⁶ tokens",
    "ratio": "speed of the first", "metric": "metric", "metric_mean": "held out, %",
    "metric_deviation": "± over seeds",
}  # fmt: skip
_IN_NAME = ("name", "layer", "op", "direction", "contender", "task")
_PERCENT = ("mfu", "share", "floor_share")
_RATES = {
    "real_tokens_per_second": "real tokens a second",
    "sequences_per_second": "sequences a second",
    "ms": "milliseconds, less is better",
}
_AXES = {"max_seq_length": "longest sequence, tokens", "batch_size": "sequences a batch",
         "tokens": "padded tokens a batch"}  # fmt: skip
MOST_BARS = 24


def conditions(result: Result) -> str:
    """Under which circumstances, in one line."""
    told = result.conditions
    parts = [f"{result.device} ({'GPU' if result.on_gpu else 'CPU'})"]
    if not result.on_gpu and "threads" in told:
        parts.append(f"{told['threads']} thread{'s' * (told['threads'] != 1)}")
    known = {"torch": "torch", "triton": "Triton", "transformers": "transformers",
             "python": "Python"}  # fmt: skip
    parts += [f"{name} {told[key]}" for key, name in known.items() if told.get(key)]
    state = (told.get("gpu") or told).get("nvidia_smi")
    if isinstance(state, Mapping):
        parts += [f"{key} {value}" for key, value in state.items()]
    elif state:
        parts.append(f"GPU state {state}")
    date = str(told["date"]).replace("T", " ").replace("+00:00", " UTC")
    return "; ".join([*parts, f"commit {told['commit']}", date, result.file])


def _table(page: Page, rows: Sequence[Row]) -> None:
    """All figures of all rows; a column without a single one becomes a line."""
    cells = [flat(row) for row in rows]
    keys = dict.fromkeys((*_COLUMNS, *(key for row in cells for key in row if key not in _IN_NAME)))
    given = {key: [row[key] for row in cells if key in row] for key in keys}
    heads = {key: _COLUMNS.get(key, key.replace("_", " ")) for key, found in given.items()
             if any(value is not None for value in found)}  # fmt: skip

    def shown(row: Row, key: str) -> str:
        value = row.get(key, "")
        if isinstance(value, float | int) and key in _PERCENT:
            return f"{value:.1%}"
        if isinstance(value, int) and key == "peak_memory_bytes":
            value = value / 2**20
        return number(value) + ("x" if key == "ratio" and value else "")

    page.table(["", *heads.values()],
               [[row["name"], *(shown(row, key) for key in heads)] for row in cells])  # fmt: skip
    absent = [_COLUMNS.get(key, key) for key, found in given.items() if found and key not in heads]
    if absent:
        page.text(f"Not available: {', '.join(absent)}.", dim=True)


def _rates(page: Page, result: Result) -> None:
    """Bars of the figure that matters most, and a table of all figures."""
    page.heading(3, result.label)
    key = next((key for key in _RATES if any(row.get(key) for row in result.rows)), "")
    if not key:
        page.text(f"{result.file} holds no time and no rate to draw.")
        page.text(conditions(result), dim=True)
    for task in dict.fromkeys(row.get("task") for row in result.rows if key):
        rows = [row for row in result.rows if row.get(key) and row.get("task") == task]
        title = f"{task or TITLES[result.kind]}: {result.label}, {_RATES[key]}"
        if len(rows) > MOST_BARS:
            title += f"; the first {MOST_BARS} of {len(rows)}, the table has all"
        name = "-".join(filter(None, (result.stem, task)))
        drawn = figures.bars(name, title, rows[:MOST_BARS], key, _RATES[key])
        page.picture(drawn, conditions(result))
    _table(page, result.rows)


def _step(page: Page, result: Result) -> None:
    _rates(page, result)
    checks, floor = result.more.get("checks"), result.more.get("floor_ms")
    if checks:
        held = sum(value is True for value in checks.values())
        page.text(f"{held} of {len(checks)} checks of correctness hold.")
    if floor:
        page.text(f"The step's bare matrix products alone take {number(floor)} ms.")
    targets = result.more.get("targets")
    if targets:
        said = {True: "met", False: "missed", None: "not measured"}
        page.table(
            ("target", "wanted", "measured", ""),
            [(name, number(one["target"]), number(one["measured"]), said[one["holds"]])
             for name, one in targets.items()],
        )  # fmt: skip
    rows = [row for row in result.more.get("ablations") or [] if "ratio" in row]
    if rows and result.rows:
        title = f"What each saving gives: {result.label}"
        whole = result.rows[0]["ms"]
        drawn = figures.waterfall(f"ablations-{result.stem}", title, whole, rows)
        page.picture(drawn, conditions(result))
        page.text("Each saving is switched off alone, beside the whole step in interleaved rounds; "
                  "the times do not add up to a step without any.")  # fmt: skip
        renamed = [{key: row[key] for key in row if key != "ratio"}
                   | {"times as long as the whole": row["ratio"]} for row in rows]  # fmt: skip
        _table(page, renamed)


def sweeps(page: Page, results: Sequence[Result]) -> None:
    """Throughput over sequence length and over batch, where several files differ in that only."""
    page.heading(2, "Throughput over sequence length and batch")
    drawn = 0
    sized = [one for one in results if {"batch_size", "max_seq_length"} <= one.settings.keys()]
    for x, held in (
        ("max_seq_length", "batch_size"), ("max_seq_length", "tokens"),
        ("batch_size", "max_seq_length"),
    ):  # fmt: skip
        groups: dict[tuple[Any, ...], list[Result]] = {}
        for one in sorted(sized, key=lambda one: one.settings[x]):
            asked = dict(one.settings)
            asked["tokens"] = asked["batch_size"] * asked["max_seq_length"]
            same = (one.kind, one.device, asked.get("model"), asked.get("lengths"),
                    one.more.get("dtype"), asked[held])  # fmt: skip
            groups.setdefault(same, []).append(one)
        for (kind, device, model, lengths, _, value), group in groups.items():
            curves: dict[str, list[tuple[float, float]]] = {}
            for one in group:
                for row in one.rows:
                    if row.get("real_tokens_per_second"):
                        point = (one.settings[x], row["real_tokens_per_second"])
                        curves.setdefault(row["name"], []).append(point)
            xs = sorted({one.settings[x] for one in group})
            if len(xs) < 2 or not curves:
                continue
            drawn += 1
            label = _AXES[x]
            title = (f"{TITLES[kind]} over {label}: {Path(str(model)).name}, {lengths} lengths; "
                     f"{_AXES[held]}: {value}")  # fmt: skip
            unit = "real tokens a second"
            picture = figures.lines(f"{kind}-over-{x}", title, curves, label, unit, points=True)
            told = (f"{one.file} (commit {one.conditions['commit']}, {one.date})" for one in group)
            page.picture(picture, "; ".join((device, *told)))
            page.table(
                (label, *(f"{value:g}" for value in xs)),
                [[name, *(number(dict(curve).get(value, "")) for value in xs)]
                 for name, curve in curves.items()],
            )  # fmt: skip
    if not drawn:
        page.text("No two files differ in sequence length or batch only.")


def _kernels(page: Page, result: Result) -> None:
    page.heading(3, result.label)
    if result.more.get("rehearsal"):
        page.text("A rehearsal in Triton's interpreter: its times say nothing of the kernels.")
    rows = [row for row in result.rows if row.get("ms") and {"op", "contender"} <= row.keys()]
    _roofline(page, result, [row for row in rows if row["contender"] == "ours"])
    for op in dict.fromkeys(row["op"] for row in rows):
        of_op = [row for row in rows if row["op"] == op]
        page.picture(figures.kernel_bars(f"{result.stem}-{op}", op, of_op), conditions(result))
    _table(page, result.rows)


def _roofline(page: Page, result: Result, rows: Sequence[Row]) -> None:
    ceilings = result.more.get("ceilings")
    known = [row for row in rows if row.get("ms") and row.get("bytes")]
    if not ceilings or not known:
        what = "of what it must move" if ceilings else "of measured ceilings"
        page.text(f"No roofline: {result.file} says nothing {what}.")
        return
    rate = ceilings["bandwidth"], ceilings["matrix"]
    placed = [
        row | {"number": place, "name": row["name"].removesuffix(", ours"), "share": row.get(
            "floor_share") or figures.share(row, *rate)}
        for place, row in enumerate(known, start=1)
    ]  # fmt: skip
    title = "Every kernel, by its number, below what a copy and a product reached in this run"
    page.picture(
        figures.roofline(f"roofline-{result.stem}", title, placed, *rate), conditions(result)
    )
    page.table(
        ("kernel", "number", "ms", "GB/s", "TFLOP/s", "share of its ceiling"),
        [(row["name"], row["number"], number(row["ms"]), number(row["bytes"] / row["ms"] / 1e6),
          number(row["flops"] / row["ms"] / 1e9), f"{row['share']:.1%}") for row in placed],
    )  # fmt: skip


def _convergence(page: Page, result: Result) -> None:
    page.heading(3, result.label)
    curves = {
        row["name"]: list(zip(row["eval_seconds"], row["eval_losses"], strict=True))
        for row in result.rows
        if row.get("eval_seconds")
    }
    if curves:
        title = f"Held-out loss over time of training: {result.label}"
        drawn = figures.lines(
            result.stem, title, curves, "seconds of training", "held-out loss, nats", points=False
        )
        page.picture(drawn, conditions(result))
        page.text(f"The loss to reach is {number(result.more.get('target_loss'))}.")
    else:
        page.text(f"{result.file} holds no curve.")
        page.text(conditions(result), dim=True)
    _table(page, result.rows)


def _finetune(page: Page, result: Result) -> None:
    """What each is worth and how fast it trains, data set by data set."""
    if result.more.get("rehearsal"):
        page.text("A rehearsal of a few steps: its figures say nothing of whole trainings.")
    _rates(page, result)
    for task in dict.fromkeys(row["task"] for row in result.rows):
        # Without times, by which a bar would have whiskers.
        rows = [{key: row[key] for key in ("name", "metric", "metric_mean")}
                for row in result.rows if row["task"] == task]  # fmt: skip
        unit = f"{rows[0]['metric']} on the examples held out, percent"
        title = f"{task}: {result.label}, {unit}"
        drawn = figures.bars(f"{result.stem}-{task}-worth", title, rows, "metric_mean", unit)
        page.picture(drawn, conditions(result))


def _serve(page: Page, result: Result) -> None:
    """How many texts a second, and how long each waits, by the number of clients."""
    page.heading(3, result.label)
    names = list(dict.fromkeys(row["contender"] for row in result.rows))
    for key, unit, title in (
        ("sequences_per_second", "texts a second", "Throughput"),
        ("latency_ms_p50", "milliseconds", "Half of the answers come within"),
    ):
        curves = {
            name: [(row["clients"], row[key]) for row in result.rows if row["contender"] == name]
            for name in names
        }
        drawn = figures.lines(
            f"{result.stem}-{key}", f"{title}: {result.label}", curves, "clients", unit, points=True
        )
        page.picture(drawn, conditions(result))
    page.table(
        ("clients", "contender", "texts a second", "p50 ms", "p99 ms", "ours is"),
        [(row["clients"], row["contender"], number(row["sequences_per_second"]),
          number(row["latency_ms_p50"]), number(row["latency_ms_p99"]), f"{row['ratio']:.2f}x")
         for row in result.rows],
    )  # fmt: skip


def _profile_step(page: Page, result: Result) -> None:
    _rates(page, result)
    page.text("First what is worth attacking first: sorted by the time above the floor.")
    _roofline(page, result, result.rows)
    origins = result.more.get("origins") or {}
    if origins:
        page.table(
            ("whose time", "ms a step"), [(name, number(ms)) for name, ms in origins.items()]
        )
    syncs = result.more.get("host_syncs") or []
    page.text(f"The host waits for the device in {len(syncs)} places of a step.")
    if syncs:
        _table(page, syncs)


def _profile_kernel(page: Page, result: Result) -> None:
    page.heading(3, result.label)
    letter, op = result.more["grows"], result.more.get("op", result.stem)
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in result.rows:
        if row.get("ms"):
            curves.setdefault(row["direction"], []).append((row["sizes"][letter], row["ms"]))
    if curves:
        title = f"{op} over {letter}: {result.more.get('implementation')}"
        drawn = figures.lines(result.stem, title, curves, letter, "milliseconds", points=True)
        page.picture(drawn, conditions(result))
    _table(page, result.rows)
    _roofline(page, result, result.rows)
    kernels = result.more.get("kernels") or []
    if kernels:
        _table(page, [{"name": row["kernel"]} | row for row in kernels])


def _estimate(page: Page, result: Result) -> None:
    page.heading(3, result.workload)
    page.text(f"Step time: {result.more.get('source')}. {result.file}, {result.date}.")
    _table(page, result.rows)
    families = result.more.get("families") or []
    if families:
        page.text("A step of one device, modelled, by family of kernels.")
        page.table(
            ("", "launches", "ms", "low", "high", "waits for", "filled"),
            [(one["name"], number(one["launches"]),
              *(number(one[key] * 1e3) for key in ("seconds", "low", "high")), one["limit"],
              number(one["filled"])) for one in families],
        )  # fmt: skip


SECTIONS: dict[str, Callable[[Page, Result], None]] = {
    "step": _step,
    "kernels": _kernels,
    "inference": _rates,
    "data": _rates,
    "convergence": _convergence,
    "dropin": _rates,
    "finetune": _finetune,
    "serve": _serve,
    "profile-step": _profile_step,
    "profile-kernel": _profile_kernel,
    "estimate": _estimate,
}


def comparison(page: Page, old: Sequence[Result], new: Sequence[Result], against: str) -> None:
    """What moved between two sets, and by which rule that is said."""
    page.heading(2, f"Compared with {against}")
    found, lines = moves(old, new)
    page.text(RULE)
    moved = sum(move["verdict"] in ("faster", "slower") for move in found)
    page.text(f"{moved} of {len(found)} rows moved beyond noise.")
    page.bullets(lines)
    for label in dict.fromkeys(move["label"] for move in found):
        page.heading(3, f"{label}: new and old")
        here = [move for move in found if move["label"] == label]
        told = (
            f"{side}: {one.file}, commit {one.conditions['commit']}, {one.date}"
            for side, of in (("old", old), ("new", new))
            for one in of
            if one.label == label
        )
        picture = figures.forest(f"comparison-{label}", f"{label}: new time over old", here)
        page.picture(picture, "; ".join(told))
        page.table(
            ("", "old ms", "new ms", "new / old", "from", "to", "verdict"),
            [(move["name"], number(move["old"]), number(move["new"]),
              *(f"{move[key]:.3f}" for key in ("ratio", "low", "high")), move["verdict"])
             for move in here],
        )  # fmt: skip
