"""What an evaluation found: eval.json, report.html (one page that needs nothing else), pictures."""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from fastbert.errors import RunError
from fastbert.finetune import pictures
from fastbert.finetune.metrics import METRICS, Evaluation, Spread

_MOST_MISTAKES = 50
_MOST_LETTERS = 1200  # of a text on the page
_AROUND = 240  # letters shown on either side of what is marked in a longer text
_MOST_OF_A_NAME = 80
_HEADLINES = 4
_CONFUSIONS = 20  # pairs of classes that are listed

_STYLE = (
    pictures.STYLE
    + """
:root { color-scheme: light dark; --paper: #fff; --ink: #20242b; --dim: #5b6472; --line: #d9dde3;
  --stripe: #f5f7f9; --right: #1a62bf; --wrong: #b04400; --deepest: 0.6; }
@media (prefers-color-scheme: dark) { :root { --paper: #16191e; --ink: #e4e7ec; --dim: #a3adbb;
  --line: #3a414c; --stripe: #1e2229; --right: #7db4ff; --wrong: #ff9c5b; --deepest: 0.45; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 68rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 1rem 0 0; line-height: 1.2; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
figure { margin: 1rem 0; }
figcaption, .dim { color: var(--dim); font-size: 0.85rem; }
.scroll { overflow-x: auto; }
.side { display: flex; flex-wrap: wrap; gap: 1rem 2rem; }
.side > * { flex: 1 1 20rem; min-width: 0; max-width: 30rem; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.7rem; text-align: right; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: normal; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td:first-child { min-width: 7rem; max-width: 22rem; overflow-wrap: anywhere; white-space: normal; }
.names :is(th, td):nth-child(2) { text-align: left; max-width: 22rem; overflow-wrap: anywhere;
  white-space: normal; }
tbody tr:nth-child(even) { background: var(--stripe); }
td.f1 { background: linear-gradient(to right, color-mix(in srgb, var(--right) 28%, transparent)
  calc(var(--share) * 100%), transparent 0); min-width: 7rem; }
.settings :is(th, td) { text-align: left; overflow-wrap: anywhere; white-space: normal; }
.cards { display: flex; flex-wrap: wrap; gap: 0.75rem; margin: 1.5rem 0; padding: 0; }
.cards > div { flex: 1 1 9rem; max-width: 16rem; padding: 0.6rem 0.9rem;
  border: 1px solid var(--line); border-radius: 6px; }
.cards dt { color: var(--dim); font-size: 0.85rem; }
.cards dd { margin: 0; font-size: 1.7rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.cards dd small { display: block; color: var(--dim); font-size: 0.85rem; }
.mistakes { list-style: none; padding: 0; }
.mistakes > li { padding: 0.8rem 0; border-bottom: 1px solid var(--line); }
.mistakes p { margin: 0.35rem 0; }
.mistakes ol { margin: 0.35rem 0 0.35rem 6.1rem; padding-left: 1.4rem; }
.text { white-space: pre-wrap; }
.said { display: grid; grid-template-columns: 5.5rem minmax(0, 1fr); gap: 0.6rem;
  align-items: baseline; margin: 0.35rem 0; }
.key { color: var(--dim); font-size: 0.85rem; }
mark { padding: 0.05rem 0; border-radius: 2px; background: none; color: inherit;
  border-bottom: 2px solid var(--dim); }
mark.right { border-bottom-color: var(--right);
  background: color-mix(in srgb, var(--right) 22%, transparent); }
mark.wrong { border-bottom: 2px dashed var(--wrong);
  background: color-mix(in srgb, var(--wrong) 22%, transparent); }
mark.right.wrong { background: color-mix(in srgb, var(--right) 22%, transparent); }
mark small { margin: 0 0.15rem 0 0.3rem; color: var(--dim); }
@media (max-width: 32rem) { th, td { padding: 0.2rem 0.4rem; } svg.plot { font-size: 15px; }
  td:first-child { min-width: 5.5rem; } td.f1 { min-width: 4rem; }
  .said { grid-template-columns: 4.5rem minmax(0, 1fr); } .mistakes ol { margin-left: 5.1rem; } }
b.right { color: var(--right); }
b.wrong { color: var(--wrong); }
"""
)


@dataclass
class Report:
    """An evaluation with what led to it.

    Attributes:
        title: of the page.
        task: a kind of task as `METRICS` has them.
        settings: by name.
        evaluation: metrics and details.
        mistakes: the worst first, each with `where` ("reviews.tsv:17"), `input` (name -> text;
            `choices` a list), and `expected` and `predicted`, in the shapes of predictions. The
            page shows the first 50; a span may be given as `start` and `end` in characters of
            `input["text"]` or `input["context"]`.
        history: the rows of metrics.jsonl.
        notes: sentences that a reader should know.
        seeds: metric -> its spread over several seeds.
        baselines: name -> its metrics, shown beside ours.
    """

    title: str
    task: str
    settings: Mapping[str, Any]
    evaluation: Evaluation
    mistakes: Sequence[Mapping[str, Any]] = ()
    history: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()
    seeds: Mapping[str, Spread] = field(default_factory=dict)
    baselines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def write_report(folder: str | os.PathLike[str], report: Report) -> Path:
    """Writes eval.json, report.html and, where there is something to draw, their pictures.

    The pictures are confusion.png and reliability.png. Each file is whole or not there.

    Args:
        folder: made where it is missing.
        report: what to write.

    Returns:
        The page's path.

    Raises:
        RunError: something cannot be written.
    """
    details = report.evaluation.details
    files = {}
    if "confusion" in details:
        files["confusion.png"] = pictures.confusion_png(**details["confusion"])
    if "calibration" in details:
        axes = _calibration_axes(report.task)
        files["reliability.png"] = pictures.reliability_png(
            details["calibration"], *axes, _unit(details)
        )
    content = json.dumps(_plain(_as_json(report)), ensure_ascii=False, allow_nan=False, indent=1)
    # Half of a surrogate pair, which JSON can hold and UTF-8 cannot, stays what JSON writes for it.
    files["eval.json"] = f"{content}\n".encode("utf-8", "backslashreplace")
    files["report.html"] = _page(report).encode("utf-8", "replace")
    root = Path(folder)
    for name, data in files.items():
        write_file(root / name, data)
    return root / "report.html"


def write_file(path: Path, data: bytes) -> None:
    """Writes a file, whole or not at all.

    Raises:
        RunError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from None


def _as_json(report: Report) -> dict[str, Any]:
    found = {
        "title": report.title,
        "task": report.task,
        "metrics": report.evaluation.metrics,
        "details": report.evaluation.details,
        "seeds": {name: asdict(spread) for name, spread in report.seeds.items()},
        "baselines": report.baselines,
        "notes": report.notes,
        "mistakes": report.mistakes,
        "history": report.history,
        "settings": report.settings,
    }
    return {name: value for name, value in found.items() if value or name == "metrics"}


def _plain(value: Any) -> Any:
    """The value as JSON has it: numpy's become Python's, what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if hasattr(value, "tolist"):  # an array or a number of numpy
        value = value.tolist()
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _page(report: Report) -> str:
    details = report.evaluation.details
    counted = [
        f"{details[name]:,} {name}" for name in ("examples", "tokens", "unanswerable")
        if details.get(name)
    ]  # fmt: skip
    parts = [
        f"<h1>{escape(report.title)}</h1>",
        f'<p class="dim">{escape(" · ".join([report.task, *counted]))}</p>',
        *_headlines(report),
        bullets([*report.notes, *details.get("notes", [])]),
        *_all_metrics(report),
    ]
    if details.get("classes"):
        parts += ["<h2>Classes</h2>", _class_table(details["classes"])]
    if "confusion" in details:
        parts += _confusion(**details["confusion"], unit=_unit(details))
    if details.get("points"):
        parts += ["<h2>Predictions and labels</h2>", pictures.points_svg(details["points"])]
    if "calibration" in details:
        parts += _calibration(details["calibration"], report.task, _unit(details))
    parts += _curves(report)
    parts += _mistakes(report.mistakes)
    if report.settings:
        rows = [[cell(name), cell(_shown(value))] for name, value in report.settings.items()]
        parts += ["<h2>Settings</h2>", table(["setting", "value"], rows, "settings")]
    return page(report.title, parts)


def page(title: str, parts: Iterable[str]) -> str:
    """A page of this look.

    Args:
        title: of the browser's window.
        parts: of the page, HTML.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _headlines(report: Report) -> list[str]:
    metrics = report.evaluation.metrics
    number = _number_of(report.task)
    chosen = [name for name in METRICS[report.task] if name in metrics][:_HEADLINES]
    cards = []
    for name in chosen:
        below = ""
        if name in report.seeds:
            spread = report.seeds[name]
            below = f"<small>{_spread(spread, number)} over {len(spread.values)} seeds</small>"
        cards.append(
            f"<div><dt>{escape(_words(name))}</dt><dd>{number(metrics[name])}{below}</dd></div>"
        )
    return [f'<dl class="cards">{"".join(cards)}</dl>']


def _all_metrics(report: Report) -> list[str]:
    metrics = report.evaluation.metrics
    number = _number_of(report.task)
    known = [name for name in METRICS[report.task] if name in metrics]
    head, rows = ["metric", "this model", *(["mean ± deviation"] if report.seeds else [])], []
    for name in [*known, *(name for name in metrics if name not in known)]:
        row = [cell(_words(name)), cell(number(metrics[name]))]
        if report.seeds:
            row.append(cell(_spread(report.seeds[name], number) if name in report.seeds else "—"))
        row += [cell(number(one.get(name))) for one in report.baselines.values()]
        rows.append(row)
    parts = ["<h2>Metrics</h2>", table([*head, *report.baselines], rows)]
    if "positive" in report.evaluation.details:
        parts.append(
            '<p class="dim">F1, precision, recall, average precision and ROC AUC are those of the '
            f"class {escape(report.evaluation.details['positive'])}.</p>"
        )
    if "thresholds" in report.evaluation.details:
        known_at = report.evaluation.details["thresholds"].items()
        said = ", ".join(f"{_words(name)} at {value:.4g}" for name, value in known_at)
        parts.append(f'<p class="dim">Thresholds of the no-answer probability: {said}.</p>')
    return parts


def _class_table(classes: Iterable[Mapping[str, Any]]) -> str:
    rows = []
    for one in classes:
        share = f' class="f1" style="--share:{one["f1"]:.3f}"'
        numbers = [cell(_number(one[name])) for name in ("precision", "recall")]
        rows.append(
            [
                _name_cell(one["name"]),
                *numbers,
                f"<td{share}>{_number(one['f1'])}</td>",
                cell(f"{one['support']:,}"),
            ]
        )
    return table(["class", "precision", "recall", "F1", "support"], rows)


def _unit(details: Mapping[str, Any]) -> str:
    """What is counted."""
    return "tokens" if "tokens" in details else "examples"


def _confusion(names: Sequence[str], counts: Sequence[Sequence[int]], unit: str) -> list[str]:
    said = f"Counts; the shade is the share of all {unit} of the true class."
    most = []
    if len(names) > pictures.MOST_CLASSES:
        said += f" Shown are the {pictures.MOST_CLASSES} of {len(names)} with the most mistakes."
        wrong = [
            (count, sum(row), name, other)
            for name, row in zip(names, counts, strict=True)
            for other, count in zip(names, row, strict=True)
            if count > 1 and other != name
        ]
        rows = [
            [_name_cell(name), _name_cell(other), cell(f"{count:,}"), cell(f"{total:,}")]
            for count, total, name, other in sorted(wrong, key=lambda one: -one[0])[:_CONFUSIONS]
        ]
        head = ["true", "predicted", unit, "of"]
        most = ["<h3>What is confused most</h3>", table(head, rows, "names")] if rows else []
    return [
        "<h2>Confusion matrix</h2>",
        f'<figure><div class="scroll">{pictures.confusion_svg(names, counts)}</div>'
        f"<figcaption>{said}</figcaption></figure>",
        *most,
    ]


def _calibration_axes(task: str) -> tuple[str, str]:
    if task == "classify several":
        return "probability of a label", "share with the label"
    return "confidence", "accuracy"


def _calibration(calibration: Mapping[str, Any], task: str, unit: str) -> list[str]:
    said = (
        f"Expected calibration error {_number(calibration['expected_calibration_error'])} over "
        f"{len(calibration['bins'])} bins"
    )
    if "brier_score" in calibration:
        said += f", Brier score {_number(calibration['brier_score'])}"
    picture = pictures.reliability_svg(calibration, *_calibration_axes(task), unit)
    return [
        "<h2>Calibration</h2>",
        f"<figure>{picture}<figcaption>{said}. On the dashed line, probabilities come true as "
        "often as they say; below it they are too high.</figcaption></figure>",
    ]


def _curves(report: Report) -> list[str]:
    def line(key: str, name: str) -> list[pictures.Line]:
        points = [
            (row["step"], row[key]) for row in report.history
            if isinstance(row.get(key), int | float) and math.isfinite(row[key])
        ]  # fmt: skip
        return [pictures.Line(name, points, "/" in key)] if points else []

    figures = []
    if lines := [*line("loss", "training"), *line("eval/loss", "evaluation")]:
        figures.append(pictures.lines_svg(lines, "loss"))
    wanted = [str(report.settings.get("metric_for_best_model")), *METRICS[report.task]]
    for name in wanted:
        if name != "loss" and (lines := line(f"eval/{name}", name)):
            figures.append(pictures.lines_svg(lines, f"{_words(name)} in evaluation"))
            break
    shown = "".join(f"<figure>{one}</figure>" for one in figures)
    return ["<h2>Learning curves</h2>", f'<div class="side">{shown}</div>'] if figures else []


def _mistakes(mistakes: Sequence[Mapping[str, Any]]) -> list[str]:
    if not mistakes:
        return []
    shown = mistakes[:_MOST_MISTAKES]
    said = "The worst first."
    if len(mistakes) > len(shown):
        said = f"The worst {len(shown)} of the {len(mistakes):,} in eval.json, the worst first."
    items = "".join(f"<li>{_mistake(one)}</li>" for one in shown)
    return [
        "<h2>Mistakes</h2>",
        f'<p class="dim">{said}</p><ol class="mistakes">{items}</ol>',
    ]


class _Span(NamedTuple):
    start: int
    end: int
    kind: str
    label: str


def _mistake(mistake: Mapping[str, Any]) -> str:
    given, expected, predicted = (mistake[name] for name in ("input", "expected", "predicted"))
    parts = [f'<p class="dim">{escape(str(mistake["where"]))}</p>']
    if "entities" in expected:
        return "".join([*parts, *_entities(given["text"], expected, predicted)])
    for name, value in given.items():
        if name == "choices":
            marks = {expected.get("choice"): "right", predicted.get("choice"): "wrong"}
            items = "".join(_choice(text, marks.get(place)) for place, text in enumerate(value))
            parts.append(f'<ol start="0">{items}</ol>')
            continue
        spans = [
            _Span(one["start"], one["end"], kind, "")
            for one, kind in ((expected, "right"), (predicted, "wrong"))
            if name == "context" and "answer" in one and one["answer"] and "start" in one
        ]
        text = str(value)
        parts.append(_said(name, _marked(text, spans, _parts(text, spans))))
    parts.append(_said("expected", f'<b class="right">{_prediction(expected)}</b>', "ltr"))
    wrong = f'<b class="wrong">{_prediction(predicted)}</b>'
    return "".join([*parts, _said("predicted", wrong + _sureness(expected, predicted), "ltr")])


def _said(key: str, content: str, direction: str = "auto") -> str:
    return (
        f'<div class="said"><span class="key">{escape(key)}</span>'
        f'<div class="text" dir="{direction}">{content}</div></div>'
    )


def _choice(text: str, kind: str | None) -> str:
    content = _name(text)
    return f'<li><b class="{kind}">{content}</b></li>' if kind else f"<li>{content}</li>"


def _name(text: Any) -> str:
    """A text of the data, in whatever script, that leaves the order of what stands around it."""
    return f"<bdi>{escape(_clipped(str(text)))}</bdi>"


def _entities(
    text: str, expected: Mapping[str, Any], predicted: Mapping[str, Any]
) -> Iterable[str]:
    sides = [
        {(one["start"], one["end"], one["type"]) for one in side["entities"]}
        for side in (expected, predicted)
    ]
    spans = [
        [
            _Span(start, end, "right" if (start, end, kind) in other else "wrong", kind)
            for start, end, kind in sorted(side)
        ]
        for side, other in zip(sides, reversed(sides), strict=True)
    ]
    parts = _parts(text, [one for one in (*spans[0], *spans[1]) if one.kind == "wrong"])
    for name, side in zip(("expected", "predicted"), spans, strict=True):
        yield _said(name, _marked(text, side, parts))


def _parts(text: str, spans: Iterable[_Span]) -> list[tuple[int, int]]:
    """Which parts of a text are shown: all of it, or of a long one what is around the spans."""
    if len(text) <= _MOST_LETTERS:
        return [(0, len(text))]
    parts: list[tuple[int, int]] = []
    for start, end in sorted((one.start - _AROUND, one.end + _AROUND) for one in spans):
        if parts and start <= parts[-1][1]:
            start, end = parts[-1][0], max(parts.pop()[1], end)
        parts.append((max(0, start), min(end, len(text))))
    room, shown = _MOST_LETTERS, []
    for start, end in parts or [(0, len(text))]:
        if room:
            shown.append((start, min(end, start + room)))
            room -= shown[-1][1] - start
    return shown


def _marked(text: str, spans: Sequence[_Span], parts: Sequence[tuple[int, int]]) -> str:
    """Parts of a text with its spans marked, which may overlap."""
    found = ["… "] if parts[0][0] else []
    for number, (first, last) in enumerate(parts):
        if number:
            found.append(" … ")
        cuts = {first, last, *(one.start for one in spans), *(one.end for one in spans)}
        for start, end in pairwise(sorted(cut for cut in cuts if first <= cut <= last)):
            found.append(_piece(text[start:end], end, [
                one for one in spans if one.start <= start and end <= one.end
            ]))  # fmt: skip
    if parts[-1][1] < len(text):
        found.append(" …")
    if parts != [(0, len(text))]:
        found.append(f' <span class="dim">({len(text):,} characters)</span>')
    return "".join(found)


def _piece(text: str, end: int, over: Sequence[_Span]) -> str:
    if not over:
        return escape(text)
    kind = " ".join(sorted({one.kind for one in over}))
    labels = [escape(one.label) for one in over if one.end == end and one.label]
    shown = f"<small>{' '.join(labels)}</small>" if labels else ""
    return f'<mark class="{kind}">{escape(text)}{shown}</mark>'


def _prediction(said: Mapping[str, Any]) -> str:
    """What was expected or predicted, in words."""
    for key, none in (("label", ""), ("answer", "no answer"), ("choice", "")):
        if key in said:
            return none if none and not said[key] else _name(said[key])
    for key, none, between in (("labels", "no label", ", "), ("answers", "no answer", " / ")):
        if key in said:
            return between.join(map(_name, said[key])) or none
    if [*said] == ["score"]:
        return _number(said["score"])
    return ", ".join(f"{_name(key)} {_name(_shown(value))}" for key, value in said.items())


def _sureness(expected: Mapping[str, Any], predicted: Mapping[str, Any]) -> str:
    if [*predicted] == ["score"]:
        return ""
    shown = [f"score {_number(predicted['score'])}"] if "score" in predicted else []
    if "no_answer" in predicted:
        shown.append(f"no answer {_number(predicted['no_answer'])}")
    known = predicted.get("probabilities")
    if isinstance(known, Mapping):
        names = expected.get("labels", [expected.get("label")])
        names = [*names, *(one for one in predicted.get("labels", []) if one not in names)]
        shown += [f"{_name(one)} {_number(known[one])}" for one in names if one in known]
    elif known is not None and "choice" in expected:
        shown.append(f"{expected['choice']} {_number(known[expected['choice']])}")
    return f' <span class="dim">{", ".join(shown)}</span>' if shown else ""


def _clipped(text: str) -> str:
    return text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]} …"


def bullets(lines: Sequence[str]) -> str:
    """A list of texts; nothing where there are none."""
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table.

    Args:
        head: texts.
        rows: of cells, HTML.
        kind: a class for its looks.
    """
    titles = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return (
        f'<div class="scroll {kind}"><table><thead><tr>{titles}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _name_cell(name: str) -> str:
    short = pictures.clipped(name, _MOST_OF_A_NAME)
    titled = "" if short == name else f' title="{escape(name)}"'
    return f"<td{titled}>{escape(short)}</td>"


def cell(text: str) -> str:
    """A cell of a table with a text."""
    return f"<td>{escape(text)}</td>"


_SPELLED = {
    **{"f1": "F1", "mrr": "MRR", "roc": "ROC", "auc": "AUC", "r2": "R²", "mse": "MSE"},
    **{name.lower(): name for name in ("MAE", "Matthews", "Brier", "Pearson", "Spearman")},
}


def _words(name: str) -> str:
    """A metric as a reader knows it."""
    return " ".join(_SPELLED.get(word, word) for word in name.split("_"))


def _spread(spread: Spread, number: Callable[[Any], str]) -> str:
    if spread.deviation is None:
        return number(spread.mean)
    return f"{number(spread.mean)} ± {number(spread.deviation)}"


def _number_of(task: str) -> Callable[[Any], str]:
    """How a metric is written; those of answers are in percent."""
    return partial(_number, digits=2) if task == "answer" else _number


def _number(value: Any, digits: int = 3) -> str:
    if value is None or not math.isfinite(value):
        return "—"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    shown = f"{value:.{digits}f}"
    return shown if float(shown) or not value else f"{value:.2g}"  # 0.0004 is not 0


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
