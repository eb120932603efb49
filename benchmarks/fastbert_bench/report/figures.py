"""The pictures of `fastbert bench report`, each drawn for light and for dark pages.

A picture says in its alt text what it shows, with numbers: the page can be read without seeing it.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastbert_bench.measure.result import Row
from fastbert_bench.report.files import timed

_INK = {
    "light": {"paper": "#ffffff", "ink": "#20242b", "grid": "#d9dde3"},
    "dark": {"paper": "#16191e", "ink": "#e4e7ec", "grid": "#3a414c"},
}
OURS, PEER = "#2f7de1", "#8b95a5"
# Told apart by most kinds of colour blindness, and visible on both papers (Okabe and Ito).
COLOURS = ("#2f7de1", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8b95a5", "#b3a100")
MARKERS = "os^DvPX*<>"
WIDTH = 8.0  # inches
MOST_NUMBERS = 48  # in a roofline; more would hide each other


@dataclass(frozen=True)
class Picture:
    """`draw` returns a new figure in the colours that matplotlib is set to."""

    name: str
    title: str
    alt: str
    draw: Callable[[], Figure]

    def png(self, theme: str) -> bytes:
        """The picture on a "light" or "dark" page."""
        ink = _INK[theme]
        colours: dict[Any, Any] = {
            "figure.facecolor": ink["paper"], "axes.facecolor": ink["paper"],
            "savefig.facecolor": ink["paper"], "text.color": ink["ink"],
            "axes.labelcolor": ink["ink"], "axes.edgecolor": ink["grid"],
            "xtick.color": ink["ink"], "ytick.color": ink["ink"], "grid.color": ink["grid"],
            "legend.facecolor": ink["paper"], "legend.edgecolor": ink["grid"],
        }  # fmt: skip
        shape: dict[Any, Any] = {
            "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
            "axes.axisbelow": True, "figure.constrained_layout.use": True, "figure.dpi": 130,
        }  # fmt: skip
        target = io.BytesIO()
        with matplotlib.rc_context({**colours, **shape}):
            figure = self.draw()
            figure.suptitle(fill(self.title, 125), x=0.01, ha="left", fontsize=9)
            FigureCanvasAgg(figure)
            figure.savefig(target, format="png", metadata={"Software": None})
        return target.getvalue()


def is_ours(name: str) -> bool:
    return name.rpartition(", ")[2].startswith(("fastbert", "ours"))


def short(value: float) -> str:
    """Three digits and a prefix: 11.3k, 1.04M, 0.0123."""
    for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * scale:
            return f"{value / scale:.3g}{prefix}"
    return f"{value:.3g}"


def _whiskers(row: Row, key: str) -> tuple[float, float]:
    """How far p20 and p80 lie below and above the figure; a rate falls as the time rises."""
    value, times = row[key], timed(row)
    if not {"ms", "ms_p20", "ms_p80"} <= times.keys():
        return 0.0, 0.0
    low, high = times["ms_p20"] / times["ms"], times["ms_p80"] / times["ms"]
    if not key.startswith("ms"):
        low, high = 1 / high, 1 / low
    return value * max(0.0, 1 - low), value * max(0.0, high - 1)


def _axes(height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, height))
    return figure, figure.subplots()


def _tick(value: float, _: object = None) -> str:
    return short(value) if value else "0"


def _beside(axes: Any, place: tuple[float, float], text: str, **look: Any) -> None:
    axes.annotate(text, place, (6, 0), textcoords="offset points", va="center", **look)


def _bar(axes: Any, place: float, row: Row, key: str, colour: str, thick: float) -> float:
    """A bar with whiskers from the 20th to the 80th percentile; returns where it ends."""
    below, above = _whiskers(row, key)
    axes.barh(place, row[key], thick, color=colour)
    if below or above:
        axes.errorbar(
            row[key], place, xerr=[[below], [above]], fmt="none", capsize=3, lw=1.2,
            ecolor=matplotlib.rcParams["text.color"],
        )  # fmt: skip
    return float(row[key] + above)


def bars(name: str, title: str, rows: Sequence[Row], key: str, unit: str) -> Picture:
    """One bar a row, with whiskers from the 20th to the 80th percentile."""

    def draw() -> Figure:
        figure, axes = _axes(0.9 + 0.36 * len(rows))
        ends = []
        for place, row in enumerate(rows):
            colour = OURS if is_ours(row["name"]) else PEER
            ends.append(_bar(axes, place, row, key, colour, 0.66))
            _beside(axes, (ends[-1], place), short(row[key]))
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, 1.18 * max(ends))
        axes.set_xlabel(unit)
        axes.xaxis.set_major_formatter(_tick)
        axes.grid(axis="x")
        return figure

    told = "; ".join(f"{row['name']} {short(row[key])}" for row in rows)
    return Picture(name, title, f"Bars, {unit}: {told}.", draw)


def kernel_bars(name: str, op: str, rows: Sequence[Row]) -> Picture:
    """Times of one op: a group of bars for each direction and shape."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        place = row["name"].removeprefix(f"{op} ").removesuffix(f", {row['contender']}")
        groups.setdefault(place, []).append(row)
    names = list(dict.fromkeys(row["contender"] for row in rows))
    colours = _colours(names)

    def draw() -> Figure:
        figure, axes = _axes(0.9 + 0.22 * len(rows) + 0.3 * len(groups))
        place, ticks = 0.0, []
        for group in groups.values():
            ticks.append(place + (len(group) - 1) / 2)
            for row in group:
                end = _bar(axes, place, row, "ms", colours[row["contender"]], 0.86)
                text = f"{row['contender']} {short(row['ms'])}"
                _beside(axes, (end, place), text, fontsize=8)
                place += 1
            place += 1
        axes.set_yticks(ticks, list(groups))
        axes.invert_yaxis()
        values = [row["ms"] for row in rows]
        if max(values) > 30 * min(values):
            axes.set_xscale("log")
            axes.set_xlim(min(values) / 2, max(values) * 12)
        else:
            axes.set_xlim(0, 1.45 * max(values))
        axes.set_xlabel("milliseconds, less is better")
        axes.xaxis.set_major_formatter(_tick)
        axes.grid(axis="x")
        return figure

    told = "; ".join(f"{row['name'].removeprefix(op)} {short(row['ms'])} ms" for row in rows)
    return Picture(name, f"{op}: ours and others", f"Bars of {op}:{told}.", draw)


def _colours(names: Sequence[str]) -> dict[str, str]:
    """Ours is always blue."""
    first = [name for name in names if name in ("ours", "fastbert")]
    ordered = [*first, *(name for name in names if name not in first)]
    shift = 0 if first else 1
    return {name: COLOURS[(i + shift) % len(COLOURS)] for i, name in enumerate(ordered)}


def lines(
    name: str,
    title: str,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    *,
    points: bool,
) -> Picture:
    """One line a contender; `points` marks each and shows only x values that were measured."""
    colours = _colours(list(curves))

    def draw() -> Figure:
        figure, axes = _axes(4.2)
        for index, (label, curve) in enumerate(curves.items()):
            marker = MARKERS[index % len(MARKERS)] if points else None
            axes.plot(*zip(*curve, strict=True), marker=marker, color=colours[label],
                      lw=2.2 if is_ours(label) else 1.3, label=label)  # fmt: skip
        if points:
            measured = sorted({x for curve in curves.values() for x, _ in curve})
            axes.set_xscale("log")
            axes.set_xticks(measured, [f"{x:g}" for x in measured])
            axes.minorticks_off()
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(_tick)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid()
        # Beside the plot: it never hides a line.
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
        return figure

    told = "; ".join(
        f"{label} from {short(curve[0][1])} at {short(curve[0][0])} "
        f"to {short(curve[-1][1])} at {short(curve[-1][0])}"
        for label, curve in curves.items()
    )
    return Picture(name, title, f"Lines, {y_label} over {x_label}: {told}.", draw)


def waterfall(name: str, title: str, whole_ms: float, rows: Sequence[Row]) -> Picture:
    """What each saving gives: the step's time, and the time added where one is switched off."""
    ordered = sorted(rows, key=lambda row: row["ratio"], reverse=True)
    added = [(row["ratio"] - 1) * whole_ms for row in ordered]

    def draw() -> Figure:
        figure, axes = _axes(1.2 + 0.4 * (len(ordered) + 1))
        axes.barh(0, whole_ms, 0.66, color=OURS)
        for place, more in enumerate(added, start=1):
            axes.barh(place, more, 0.66, left=whole_ms, color="#d55e00" if more > 0 else "#009e73")
        axes.axvline(whole_ms, color=OURS, lw=1)
        ends = [whole_ms, *(whole_ms + max(0.0, more) for more in added)]
        texts = [f"{short(whole_ms)} ms", *(f"{more:+.3g} ms" for more in added)]
        for place, (end, text) in enumerate(zip(ends, texts, strict=True)):
            _beside(axes, (end, place), text)
        axes.set_yticks(range(len(ends)), ["whole step", *(row["name"] for row in ordered)])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.16 * max(ends))
        axes.set_xlabel("milliseconds a step")
        axes.grid(axis="x")
        return figure

    told = "; ".join(
        f"{row['name']} {more:+.3g} ms" for row, more in zip(ordered, added, strict=True)
    )
    return Picture(name, title, f"Whole step {short(whole_ms)} ms. Switched off: {told}.", draw)


def roofline(
    name: str, title: str, rows: Sequence[Row], bandwidth: float, matrix: float
) -> Picture:
    """Every kernel by its number, below what a copy and a matrix product reached.

    Args:
        name: of the file.
        title: of the picture.
        rows: with `number`, `name`, `share`, `ms`, `bytes` and `flops`.
        bandwidth: measured, bytes a second.
        matrix: measured, FLOPs a second.
    """
    movers = [row for row in rows if not row["flops"]]
    products = [row for row in rows if row["flops"]]

    def rate(row: Row, key: str) -> float:
        return float(row[key] / (row["ms"] / 1e3))

    def draw() -> Figure:
        figure = Figure(figsize=(WIDTH, 4.8))
        left, right = figure.subplots(1, 2, width_ratios=(2, 3))
        _numbered(left, [(place, rate(row, "bytes"), row) for place, row in enumerate(movers)])
        left.axhline(bandwidth, color="#d55e00")
        left.annotate(f"copy {short(bandwidth)}B/s", (0, 1.01), xycoords="axes fraction",
                      color="#d55e00", fontsize=9)  # fmt: skip
        reached = [bandwidth, *(rate(row, "bytes") for row in movers)]
        if min(reached) < bandwidth / 30:
            left.set_yscale("log")
        else:
            left.set_ylim(0, 1.05 * max(reached))
        left.set_xlim(-1, max(1, len(movers)))
        left.set_xticks([])
        left.set_xlabel("without matrix products, by number")
        left.set_ylabel("bytes a second")
        left.yaxis.set_major_formatter(_tick)
        left.grid(axis="y")
        places = [row["flops"] / row["bytes"] for row in products]
        ridge = matrix / bandwidth
        span = (min([ridge, *places]) / 3, max([ridge, *places]) * 3)
        right.plot(
            (span[0], ridge, span[1]), (bandwidth * span[0], matrix, matrix), color="#d55e00"
        )
        _numbered(right, [(x, rate(row, "flops"), row)
                          for x, row in zip(places, products, strict=True)])  # fmt: skip
        right.set_xscale("log")
        right.set_yscale("log")
        rates = [matrix, bandwidth * span[0], *(rate(row, "flops") for row in products)]
        right.set_ylim(min([matrix / 30, *rates]) / 1.5, max(rates) * 1.5)
        right.minorticks_off()
        right.set_xlabel("FLOPs a byte that must be moved")
        right.set_ylabel("FLOPs a second")
        right.annotate(f"matrix product {short(matrix)}FLOP/s", (0, 1.01),
                       xycoords="axes fraction", color="#d55e00", fontsize=9)  # fmt: skip
        for axis in (right.xaxis, right.yaxis):
            axis.set_major_formatter(_tick)
        right.grid()
        return figure

    told = "; ".join(
        f"{row['number']} {row['name']} {row['share']:.1%} of its ceiling" for row in rows
    )
    text = f"Copy {short(bandwidth)}B/s, matrix product {short(matrix)}FLOP/s. {told}."
    return Picture(name, title, text, draw)


def share(row: Row, bandwidth: float, matrix: float) -> float:
    """Of the rate that no kernel can beat which must do this."""
    floor = max(row["bytes"] / bandwidth, row["flops"] / matrix)
    return float(floor / (row["ms"] / 1e3))


def _numbered(axes: Any, places: Sequence[tuple[float, float, Row]]) -> None:
    groups = list(dict.fromkeys(row.get("op") or row["name"] for _, _, row in places))
    for x, y, row in places:
        group = groups.index(row.get("op") or row["name"])
        axes.plot(x, y, "o", ms=6, color=COLOURS[group % len(COLOURS)])
        if row["number"] <= MOST_NUMBERS:
            axes.annotate(
                str(row["number"]), (x, y), (4, 4), textcoords="offset points", fontsize=8
            )


def forest(name: str, title: str, moves: Sequence[Mapping[str, Any]]) -> Picture:
    """New time over old with its interval, a line a row; what moved beyond noise is filled."""
    colours = {"faster": "#009e73", "slower": "#d55e00"}

    def draw() -> Figure:
        figure, axes = _axes(1.0 + 0.3 * len(moves))
        for place, move in enumerate(moves):
            colour = colours.get(move["verdict"], PEER)
            axes.plot((move["low"], move["high"]), (place, place), color=colour, lw=2)
            axes.plot(move["ratio"], place, "o", color=colour)
        axes.axvline(1, color=matplotlib.rcParams["text.color"], lw=1)
        axes.set_xscale("log")
        ends = [abs(math.log(move[key])) for move in moves for key in ("low", "high")]
        reach = math.exp(1.15 * max([0.05, *ends]))
        axes.set_xlim(1 / reach, reach)
        axes.minorticks_off()
        ticks = [reach ** (step / 2) for step in range(-2, 3)]
        axes.set_xticks(ticks, [f"{tick:.3g}x" for tick in ticks])
        axes.set_yticks(range(len(moves)), [move["name"] for move in moves], fontsize=8)
        axes.set_ylim(len(moves) - 0.4, -0.6)
        axes.set_xlabel("new time over old: left of 1 is faster")
        axes.grid(axis="x")
        return figure

    told = "; ".join(f"{move['name']} {move['ratio']:.3g}x {move['verdict']}" for move in moves)
    return Picture(name, title, f"New time over old: {told}.", draw)
