"""Two sets of results, row by row: what moved beyond noise?"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastbert_bench.measure.result import Row
from fastbert_bench.report.files import Result, timed

LEAST_ROUNDS, DRAWS = 5, 4000
RULE = (
    f"A row has moved if its two ranges from the 20th to the 80th percentile of the rounds do not "
    f"overlap and, where the files hold the rounds' own times, the 95% bootstrap interval of the "
    f"ratio of the two medians ({DRAWS} draws of each run's rounds) leaves out 1. The line in the "
    f"picture is that interval; without rounds it goes from the new p20 over the old p80 to the "
    f"new p80 over the old p20. Fewer than {LEAST_ROUNDS} rounds on a side tell nothing. Rounds "
    f"know nothing of how a machine differs from one run to the next: where rows of other people's "
    f"code have moved too, that is what moved them. Among many rows a few percent move by chance."
)

Move = dict[str, Any]


def moves(old: Sequence[Result], new: Sequence[Result]) -> tuple[list[Move], list[str]]:
    """A row for each pair with times on both sides, and lines on what has no counterpart."""
    before = {result.identity: result for result in old}
    found: list[Move] = []
    lines: list[str] = []
    for result in new:
        other = before.pop(result.identity, None)
        if other is None:
            lines.append(f"{result.file}: no such measurement on a {result.device} in the old set")
            continue
        was = {row["name"]: timed(row) for row in other.rows}
        for row, times in ((row, timed(row)) for row in result.rows):
            if "ms" in times and "ms" in was.get(row["name"], {}):
                found.append({"label": result.label} | _move(row["name"], was[row["name"]], times))
            elif row["name"] not in was:
                lines.append(f"{result.file}: {row['name']} is not in {other.file}")
        now = {row["name"] for row in result.rows}
        lines += [
            f"{other.file}: {name} is not in {result.file}" for name in was if name not in now
        ]
    lines += [f"{other.file}: not in the new set" for other in before.values()]
    return found, lines


def _move(name: str, old: Row, new: Row) -> Move:
    told = {"name": name, "old": old["ms"], "new": new["ms"], "ratio": new["ms"] / old["ms"]}
    if not {"ms_p20", "ms_p80"} <= old.keys() & new.keys():
        return told | {"low": told["ratio"], "high": told["ratio"], "verdict": "no spread is known"}
    low, high = new["ms_p20"] / old["ms_p80"], new["ms_p80"] / old["ms_p20"]
    apart = low > 1 or high < 1
    if "rounds_ms" in old and "rounds_ms" in new:
        low, high = interval(old["rounds_ms"], new["rounds_ms"])
    counts = [len(row.get("rounds_ms", ())) for row in (old, new)]
    if min(counts) == 0:
        verdict = "unknown rounds"
    elif min(counts) < LEAST_ROUNDS:
        verdict = "too few rounds"
    elif apart and not low <= 1 <= high:
        verdict = "slower" if told["ratio"] > 1 else "faster"
    else:
        verdict = "within noise"
    return told | {"low": low, "high": high, "verdict": verdict}


def interval(old: Sequence[float], new: Sequence[float]) -> tuple[float, float]:
    """95% bootstrap interval of median(new) / median(old); the same for the same rounds."""
    rng = np.random.default_rng(0)
    drawn = [
        np.median(rng.choice(np.asarray(times), (DRAWS, len(times))), axis=1)
        for times in (old, new)
    ]
    low, high = np.percentile(drawn[1] / drawn[0], (2.5, 97.5))
    return float(low), float(high)
