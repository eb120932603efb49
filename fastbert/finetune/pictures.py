"""Pictures of an evaluation: as SVG for a page, which follows its theme, and as PNG to be sent on.

An SVG takes its colours from the classes that `STYLE` defines by the page's own colours: --paper,
--ink, --dim, --line, --right, --wrong. Each says in its label what it shows, with numbers.
"""

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import Any, NamedTuple
from unicodedata import east_asian_width

STYLE = """
svg { display: block; font: 12px system-ui, sans-serif; font-variant-numeric: tabular-nums; }
svg.plot { width: 100%; max-width: 30rem; height: auto; }
svg text { fill: var(--ink); }
svg .dim { fill: var(--dim); }
svg .small { font-size: 9px; }
svg .grid { stroke: var(--line); fill: none; }
svg .right { fill: var(--right); }
svg .wrong { fill: var(--wrong); }
svg .cell { fill-opacity: calc(var(--share) * var(--deepest)); }
svg .line { fill: none; stroke: var(--right); stroke-width: 1.5; stroke-linejoin: round; }
svg .second { fill: none; stroke: var(--wrong); stroke-width: 1.5; }
svg .dots { fill: var(--right); }
svg .second-dots { fill: var(--wrong); }
svg .ideal { stroke: var(--dim); stroke-dasharray: 4 4; }
svg .bar { fill: var(--right); fill-opacity: 0.65; }
svg .faint { fill: var(--dim); fill-opacity: 0.45; }
"""
MOST_CLASSES = 40
"""In a confusion matrix; of more, those with the most mistakes."""
_MOST_LETTERS = 22  # of a name in a picture
_MOST_POINTS = 300  # of a line
_JOINERS = "\u200c\u200d"  # within words of Persian and within emojis


class Line(NamedTuple):
    """What goes over steps."""

    name: str
    points: Sequence[tuple[float, float]]
    dots: bool
    """Whether each point is marked."""


def clipped(name: str, most: int = _MOST_LETTERS) -> str:
    """A name as long as a picture has room for; a wide letter (Chinese, Japanese) counts twice."""
    name = "".join(one if one.isprintable() or one in _JOINERS else " " for one in name)
    if _width(name) <= most:
        return name
    while _width(name) > most - 1:
        name = name[:most] if len(name) > most else name[:-1]
    return name + "…"


def _width(name: str) -> int:
    return sum(2 if east_asian_width(letter) in "WF" else 1 for letter in name)


def shown_classes(counts: Sequence[Sequence[int]]) -> list[int]:
    """The classes that a picture of a confusion matrix has room for, in their order."""
    places = range(len(counts))
    missed = [
        sum(counts[one]) + sum(row[one] for row in counts) - 2 * counts[one][one] for one in places
    ]
    return sorted(sorted(places, key=lambda one: -missed[one])[:MOST_CLASSES])


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.005 else "&lt;1%"


def _cell_text(count: int) -> str:
    if count < 10_000:
        return str(count)
    return f"{count / 1000:.0f}k" if count < 999_500 else f"{count / 1e6:.1f}M"


def confusion_svg(names: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """A confusion matrix: a row for each true class, shaded by its share of the row.

    Args:
        names: of the classes.
        counts: (K, K).
    """
    places = shown_classes(counts)
    classes = len(places)
    cell = next(
        size for most, size in ((4, 76), (10, 52), (20, 36), (MOST_CLASSES, 21)) if classes <= most
    )
    labels = [clipped(names[place]) for place in places]
    longest = max(map(_width, labels)) * 7
    left = longest + 34
    turned = longest > cell - 8
    top = (longest * 0.72 if turned else 0) + 44
    size = classes * cell
    width = left + size + (longest * 0.72 if turned else 8)
    right = sum(counts[place][place] for place in range(len(counts)))
    said = f"Confusion matrix: {right:,} of {sum(map(sum, counts)):,} are right."
    parts = [
        f'<text class="dim" x="{left}" y="14">predicted</text>',
        f'<text class="dim" text-anchor="middle" transform="translate(14 {top + size / 2}) '
        'rotate(-90)">true</text>',
    ]
    for index, (place, label) in enumerate(zip(places, labels, strict=True)):
        title = f"<title>{escape(clipped(names[place], 200))}</title>"
        middle = top + (index + 0.5) * cell + 4
        parts.append(f'<text x="{left - 8}" y="{middle}" text-anchor="end">{escape(label)}{title}')
        x, y = left + (index + 0.5) * cell, top - 10
        turn = f'transform="translate({x + 3} {y}) rotate(-45)"'
        where = turn if turned else f'x="{x}" y="{y}" text-anchor="middle"'
        parts.append(f"</text><text {where}>{escape(label)}{title}</text>")
    for index in range(classes + 1):
        at = index * cell
        parts.append(f'<path class="grid" d="M{left} {top + at}h{size}M{left + at} {top}v{size}"/>')
    for row, place in enumerate(places):
        total = sum(counts[place])
        for column, other in enumerate(places):
            if count := counts[place][other]:
                parts.append(
                    _cell(left + column * cell, top + row * cell, cell, count, total, row == column)
                    + f"<title>true {escape(clipped(names[place], 80))}, predicted "
                    f"{escape(clipped(names[other], 80))}: {count:,} of {total:,}</title></g>"
                )
    height = top + size + 8
    return (
        f'<svg role="img" aria-label="{said}" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}">{"".join(parts)}</svg>'
    )


def _cell(x: float, y: float, size: int, count: int, total: int, right: bool) -> str:
    share = count / total
    kind = "right" if right else "wrong"
    middle, base = x + size / 2, y + size / 2 + 4
    texts = f'<text x="{middle}" y="{base}" text-anchor="middle">{_cell_text(count)}</text>'
    if size >= 52:
        texts = (
            f'<text x="{middle}" y="{base - 6}" text-anchor="middle">{_cell_text(count)}</text>'
            f'<text class="small" x="{middle}" y="{base + 9}" text-anchor="middle">'
            f"{_percent(share)}</text>"
        )
    elif size < 36:
        texts = texts.replace("<text", '<text class="small"').replace(f"{base}", f"{base - 1}")
    return (
        f'<g><rect class="cell {kind}" style="--share:{share:.3f}" x="{x + 0.5}" y="{y + 0.5}" '
        f'width="{size - 1}" height="{size - 1}"/>{texts}'
    )


@dataclass
class _Plot:
    """Axes of an SVG; x and y in the data's numbers."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_label: str
    y_label: str
    height: float = 260.0
    width: float = 480.0
    parts: list[str] = field(default_factory=list)

    left, right, top, bottom = 52.0, 12.0, 26.0, 40.0

    def x(self, value: float) -> float:
        low, high = self.x_range
        inside = self.width - self.left - self.right
        return round(self.left + (value - low) / (high - low) * inside, 1)

    def y(self, value: float) -> float:
        low, high = self.y_range
        inside = self.height - self.top - self.bottom
        return round(self.height - self.bottom - (value - low) / (high - low) * inside, 1)

    def axes(self) -> None:
        x0, x1 = map(self.x, self.x_range)
        for tick in _ticks(*self.y_range, 5 if self.height > 200 else 3):
            y = self.y(tick)
            self.parts.append(
                f'<path class="grid" d="M{x0} {y}H{x1}"/><text class="dim" x="{x0 - 6}" '
                f'y="{y + 4}" text-anchor="end">{_tick(tick)}</text>'
            )
        for tick in _ticks(*self.x_range):
            shown = _tick(tick)
            x = min(self.x(tick), self.width - 4 * len(shown))  # half of it beside the middle
            self.parts.append(
                f'<text class="dim" x="{x}" y="{self.height - self.bottom + 16}" '
                f'text-anchor="middle">{shown}</text>'
            )
        self.parts.append(
            f'<text class="dim" x="{(x0 + x1) / 2}" y="{self.height - 6}" '
            f'text-anchor="middle">{escape(self.x_label)}</text>'
            f'<text x="{x0 - 44}" y="13">{escape(self.y_label)}</text>'
        )

    def svg(self, said: str) -> str:
        return (
            f'<svg class="plot" role="img" aria-label="{escape(said)}" '
            f'viewBox="0 0 {self.width:.0f} {self.height:.0f}">{"".join(self.parts)}</svg>'
        )


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from low to high."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(one for one in (1, 2, 5, 10) if one * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [place * step for place in range(first, math.floor(high / step + 1e-9) + 1)]


def _tick(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _range(values: Sequence[float], margin: float = 0.05) -> tuple[float, float]:
    low, high = min(values), max(values)
    # All equal, or so nearly that ticks between them would be one number.
    room = (high - low) * margin if high - low > 1e-9 * abs(high) else max(abs(high) * 0.1, 0.1)
    return low - room, high + room


def reliability_svg(calibration: Mapping[str, Any], x_label: str, y_label: str, unit: str) -> str:
    """How often what is said with some confidence is right, and how many have that confidence.

    Args:
        calibration: what `fastbert.finetune.metrics.calibration` returns.
        x_label: of the confidence.
        y_label: of how often it is right.
        unit: what is counted.
    """
    bins = [one for one in calibration["bins"] if one["count"]]
    plot = _Plot((0.0, 1.0), (0.0, 1.0), "", y_label)
    plot.axes()
    x, y = plot.x, plot.y
    for one in bins:
        said = f"{one['accuracy']:.3f} at {one['confidence']:.3f}, {one['count']:,} {unit}"
        width, height = x(one["high"]) - x(one["low"]) - 2, y(0) - y(one["accuracy"])
        plot.parts.append(
            f'<rect class="bar" x="{x(one["low"]) + 1}" y="{y(one["accuracy"])}" '
            f'width="{width:.1f}" height="{height:.1f}"><title>{said}</title></rect>'
            f'<circle class="second-dots" cx="{x(one["confidence"])}" cy="{y(one["accuracy"])}" '
            'r="3"/>'
        )
    plot.parts.append(f'<path class="ideal" d="M{x(0)} {y(0)}L{x(1)} {y(1)}"/>')
    most = max(2.0, *(one["count"] for one in bins))  # so that ticks are whole numbers
    counts = _Plot((0.0, 1.0), (0.0, most), x_label, unit, height=130.0)
    counts.axes()
    for one in bins:
        width = counts.x(one["high"]) - counts.x(one["low"]) - 2
        height = counts.y(0) - counts.y(one["count"])
        counts.parts.append(
            f'<rect class="faint" x="{counts.x(one["low"]) + 1}" y="{counts.y(one["count"])}" '
            f'width="{width:.1f}" height="{height:.1f}"/>'
        )
    error = calibration["expected_calibration_error"]
    said = f"Reliability diagram, expected calibration error {error:.3f}"
    return plot.svg(said) + counts.svg(f"How many {unit} each bin has")


def lines_svg(lines: Sequence[Line], y_label: str) -> str:
    """One or two lines over steps."""
    steps = [step for line in lines for step, _ in line.points]
    values = [value for line in lines for _, value in line.points]
    plot = _Plot(_range([0, *steps], 0.0), _range(values), "step", y_label)
    plot.axes()
    for place, line in enumerate(lines):
        points = [(plot.x(step), plot.y(value)) for step, value in _thinned(line)]
        kind, dots = ("second", "second-dots") if place else ("line", "dots")
        path = "M" + "L".join(f"{x} {y}" for x, y in points)
        plot.parts.append(f'<path class="{kind}" d="{path}"/>')
        if line.dots or len(points) == 1:
            plot.parts += [f'<circle class="{dots}" cx="{x}" cy="{y}" r="3"/>' for x, y in points]
        if len(lines) > 1:
            x = plot.width - 200 + 96 * place
            plot.parts.append(
                f'<path class="{kind}" d="M{x} 9h16"/><text x="{x + 21}" y="13">'
                f"{escape(line.name)}</text>"
            )
    ends = "; ".join(f"{line.name} ends at {line.points[-1][1]:.4g}" for line in lines)
    return plot.svg(f"{y_label} over steps: {ends}")


def _thinned(line: Line) -> list[tuple[float, float]]:
    """Means of as many neighbours as leave the line readable."""
    size = -(-len(line.points) // _MOST_POINTS)
    cuts = [*range(0, len(line.points), size), len(line.points)]
    blocks = [line.points[start:end] for start, end in pairwise(cuts)]
    return [(block[-1][0], sum(value for _, value in block) / len(block)) for block in blocks]


def points_svg(points: Sequence[tuple[float, float]]) -> str:
    """Predictions over labels, with the line on which they are equal."""
    both = _range([value for point in points for value in point])
    plot = _Plot(both, both, "label", "predicted", height=400.0)
    plot.axes()
    (low, high), x, y = both, plot.x, plot.y
    plot.parts.append(f'<path class="ideal" d="M{x(low)} {y(low)}L{x(high)} {y(high)}"/>')
    plot.parts += [
        f'<circle class="dots" fill-opacity="0.4" cx="{x(label)}" cy="{y(predicted)}" r="3"/>'
        for label, predicted in points
    ]
    return plot.svg(f"{len(points):,} predictions over their labels, from {low:.3g} to {high:.3g}")


def confusion_png(names: Sequence[str], counts: Sequence[Sequence[int]]) -> bytes:
    """The confusion matrix on white."""
    import numpy as np
    from matplotlib.figure import Figure  # not pyplot, whose backend is the caller's choice

    places = shown_classes(counts)
    shown = np.array(counts)[np.ix_(places, places)]
    totals = np.array(counts).sum(axis=1)[places]
    shares = shown / np.maximum(totals, 1)[:, None]
    labels = [clipped(names[place]) for place in places]
    classes = len(places)
    side = 2.5 + classes * (0.62 if classes <= 10 else 0.36)
    figure = Figure(figsize=(side, side), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(classes), labels, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(range(classes), labels, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    for row, column in zip(*shown.nonzero(), strict=True):
        dark = shares[row, column] > 0.5
        axes.text(
            column, row, _cell_text(int(shown[row, column])), ha="center", va="center",
            fontsize=9 if classes <= 10 else 7, color="white" if dark else "#20242b",
        )  # fmt: skip
    return _png(figure)


def reliability_png(calibration: Mapping[str, Any], x_label: str, y_label: str, unit: str) -> bytes:
    """The reliability diagram on white."""
    from matplotlib.figure import Figure

    bins = [one for one in calibration["bins"] if one["count"]]
    figure = Figure(figsize=(5, 5.5), dpi=130, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    places = [(one["low"] + one["high"]) / 2 for one in bins]
    width = bins[0]["high"] - bins[0]["low"]
    rates = [one["accuracy"] for one in bins]
    above.bar(places, rates, width * 0.94, color="#2f7de1", alpha=0.65)
    above.plot([0, 1], [0, 1], "--", color="#5b6472")
    above.plot([one["confidence"] for one in bins], rates, "o", color="#b04400", markersize=4)
    above.set_ylabel(y_label)
    above.set_xlim(0, 1)
    above.set_ylim(0, 1)
    error = calibration["expected_calibration_error"]
    above.set_title(f"expected calibration error {error:.3f}", fontsize=10)
    below.bar(places, [one["count"] for one in bins], width * 0.94, color="#8b95a5")
    below.set_xlabel(x_label)
    below.set_ylabel(unit)
    return _png(figure)


def _png(figure: Any) -> bytes:
    target = io.BytesIO()
    with warnings.catch_warnings():
        # A name in letters that the font lacks; the page has them by the reader's fonts.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(target, format="png", metadata={"Software": None})
    return target.getvalue()
