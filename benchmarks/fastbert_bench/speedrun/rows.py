"""What a speedrun came to: a row of the table, and the curves as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fastbert.errors import RunError
from fastbert_bench.report.figures import Picture, lines
from fastbert_bench.speedrun.race import Point

HEADINGS = (
    "date", "commit", "on", "track", "text", "run", "changed settings", "seeds", "steps",
    "M tokens to the target", "of the budget", "s to the target", "of classic's", "kJ", "loss",
    "what was changed, and why",
)  # fmt: skip
FILES = "speedruns"
"""The folder beside the table that keeps each run's result.json: all settings and points."""
HEAD = """\
# Speedruns

Every run of `fastbert speedrun` adds a row: [the rules](../docs/speedrun.md). Numbers are means ±
standard deviations over the seeds; the loss is that of the last checkpoint, on the reported masks.
Each run's file has all its settings and every point of its curves.
"""


def reached(points: Sequence[Point], target: float | None) -> Point | None:
    """The first checkpoint whose reported loss is at the target or below."""
    return next((one for one in points if target is not None and one.report <= target), None)


def spread(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation, "-" of nothing."""
    if not values:
        return "-"
    around = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{around}"


def row(result: Mapping[str, Any], classic: Mapping[str, Any] | None) -> dict[str, str]:
    """The cells of a result.

    Args:
        result: as `fastbert_bench.speedrun.run` writes it.
        classic: that of the classic recipe on the same device, text and track, for the share of
            its time; None where it has not been run there.
    """
    seeds = {seed: [Point(**one) for one in points] for seed, points in result["points"].items()}
    hits = [hit for points in seeds.values() if (hit := reached(points, result["target"]))]
    whole = len(hits) == len(seeds) > 0
    missed = "" if whole else f"{len(hits)} of {len(seeds)} seeds"
    missed = "no target yet" if result["target"] is None else missed
    seconds = [one.seconds for one in hits]
    theirs = [points[-1]["seconds"] for points in classic["points"].values()] if classic else []
    joules = [one.joules / 1e3 for one in hits if one.joules is not None]
    conditions = result["conditions"]
    cells = (
        conditions["date"][:10],
        conditions["commit"],
        f"{conditions['device']}, {conditions['threads']} threads"
        if conditions["device_type"] == "cpu"
        else conditions["device"],
        result["track"],
        result["corpus"],
        f"[{result['label']}]({FILES}/{result['label']}.json)",
        ", ".join(f"{name}={value}" for name, value in result["given"].items()) or "-",
        str(len(seeds)),
        str(result["max_steps"]),
        missed or spread([one.tokens / 1e6 for one in hits], ".2f"),
        f"{mean(one.tokens for one in hits) / result['budget']:.2f}" if whole else "-",
        spread(seconds, ".0f") if whole else "-",
        f"{mean(seconds) / mean(theirs):.2f}" if whole and theirs else "-",
        spread(joules, ".1f") if whole else "-",
        result.get("failed") or spread([points[-1].report for points in seeds.values()], ".3f"),
        result["note"] or "-",
    )
    return dict(zip(HEADINGS, cells, strict=True))


def append(cells: Mapping[str, str], table: Path, result: str) -> None:
    """Adds a row to the table, which is made where it is missing, and the result's file beside it.

    Raises:
        RunError: it cannot be written.
    """
    line = "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells.values())
    try:
        if not table.exists():
            table.parent.mkdir(parents=True, exist_ok=True)
            head = f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}\n"
            table.write_text(f"{HEAD}\n{head}", encoding="utf-8")
        label = cells["run"][1:].partition("]")[0]
        (table.parent / FILES).mkdir(exist_ok=True)
        (table.parent / FILES / f"{label}.json").write_text(result, encoding="utf-8")
        with table.open("a", encoding="utf-8") as file:
            file.write(f"{line} |\n")
    except OSError as error:
        raise RunError(f"{table}: {error.strerror}; its row would be: {line} |") from None


def picture(result: Mapping[str, Any], classic: Mapping[str, Any] | None) -> Picture:
    """Reported loss over tokens, the mean of the seeds, beside classic's and the target."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for told in filter(None, (result, classic)):
        name = f"{told['label']}, mean of {len(told['points'])}"
        curves[name] = [
            (mean(one["tokens"] for one in seeds) / 1e6, mean(one["report"] for one in seeds))
            for seeds in zip(*told["points"].values(), strict=False)  # after the same steps
        ]
    if result["target"] is not None:
        end = max(curve[-1][0] for curve in curves.values())
        curves["target"] = [(0.0, result["target"]), (end, result["target"])]
    title = f"{result['track']}, {result['corpus']}: held-out MLM loss of {result['label']}"
    return lines("speedrun", title, curves, "M tokens", "nats", points=False)
