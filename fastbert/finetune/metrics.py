"""What a fine-tuned model is worth, in the numbers that the field quotes.

By scikit-learn, scipy, seqeval and the definitions of SQuAD's scripts; a function for each kind of
task, on plain Python and numpy values. N examples, K classes. Nothing here is ever nan: what has
no value by its definition is 0 or left out, and a note says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbert.errors import RunError
from fastbert.finetune import squad
from fastbert.finetune.needs import needs

_CLASSES = (
    *("accuracy", "macro_f1", "weighted_f1", "matthews", "balanced_accuracy", "macro_precision"),
    *("macro_recall", "weighted_precision", "weighted_recall"),
    *("micro_f1", "micro_precision", "micro_recall"),
)
OF_TWO_CLASSES = ("f1", "precision", "recall", "average_precision", "roc_auc")
_CALIBRATION = ("expected_calibration_error", "brier_score")
_SCORES = ("pearson", "spearman", "mse", "mae", "r2")
_ENTITIES = ("f1", "precision", "recall", "macro_f1", "macro_precision", "macro_recall")

METRICS: dict[str, tuple[str, ...]] = {
    "classify": (*_CLASSES, *OF_TWO_CLASSES, *_CALIBRATION, "loss"),
    "classify several": (
        *("micro_f1", "macro_f1", "weighted_f1", "samples_f1", "subset_accuracy"),
        *("micro_precision", "micro_recall", "macro_precision", "macro_recall"),
        *("weighted_precision", "weighted_recall", *_CALIBRATION, "loss"),
    ),
    "classify score": (*_SCORES, "loss"),
    "tag": (
        *(*_ENTITIES, "weighted_f1", "weighted_precision", "weighted_recall", "accuracy"),
        *("expected_calibration_error", "loss"),
    ),
    "tag tokens": (*_CLASSES, "expected_calibration_error", "loss"),
    "answer": (
        *("f1", "exact_match", "has_answer_f1", "has_answer_exact_match", "no_answer_f1"),
        *("no_answer_exact_match", "best_f1", "best_exact", "loss"),
    ),
    "choose": ("accuracy", *_CALIBRATION, "loss"),
    "embed": ("mrr_at_10", "accuracy_at_1", "accuracy_at_3", "accuracy_at_10", "loss"),
    "embed score": ("spearman", "pearson", "loss"),
}
"""Kind of task -> the metrics that its evaluation can have; by the first the best model is chosen.

Those of two classes, of a no-answer probability and of unanswerable questions are there only where
the data have them.
"""

LESS_IS_BETTER = frozenset({"loss", "mse", "mae", *_CALIBRATION})

BINS = 15
"""Of equal width, over which the expected calibration error is taken."""
_MOST_POINTS = 1000  # of a picture of scores


class DivergedError(RunError):
    """A training whose numbers are finite no more."""


@dataclass
class Evaluation:
    """Metrics by name, flat, and what a report draws, as JSON can hold it.

    `details` may have: examples, notes, positive (the class whose f1, precision, recall,
    average_precision and roc_auc stand in `metrics`), classes (name, precision, recall, f1,
    support), confusion (names, counts: rows are the true classes), calibration (bins: low, high,
    count, confidence, accuracy), thresholds, points (label, predicted), ranks.
    """

    metrics: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Spread:
    """One metric over several seeds."""

    mean: float
    deviation: float | None
    """Of the sample (n - 1); None for a single seed."""
    values: list[float]


def classification(
    labels: Sequence[int] | NDArray[np.integer], probabilities: Any, names: Sequence[str]
) -> Evaluation:
    """One label of K.

    Macro averages go over the classes that occur as label or prediction, as in scikit-learn; a
    class that never does is listed with support 0. Of two classes, f1, precision, recall,
    average_precision and roc_auc are those of the second, `details["positive"]`.

    Args:
        labels: (N,) from 0 to K - 1.
        probabilities: (N, K).
        names: of the K classes.

    Raises:
        DivergedError: a probability is not finite.
        UserError: scikit-learn is not installed.
    """
    given = _finite(probabilities)
    wanted = np.asarray(labels, dtype=np.int64)
    predicted = given.argmax(axis=1)
    found = _by_class(wanted, predicted, names)
    if len(names) == 2:
        second = found.details["classes"][1]
        found.metrics |= {name: second[name] for name in ("f1", "precision", "recall")}
        found.details["positive"] = names[1]
        if len(np.unique(wanted)) == 2:
            sk = needs("sklearn.metrics")
            found.metrics["average_precision"] = float(
                sk.average_precision_score(wanted, given[:, 1])
            )
            found.metrics["roc_auc"] = float(sk.roc_auc_score(wanted, given[:, 1]))
        else:
            found.details["notes"].append(
                f"All examples are {names[wanted[0]]}: average_precision and roc_auc are undefined."
            )
    truth = np.eye(len(names))[wanted]
    brier = ((given - truth) ** 2).sum(axis=1).mean() / (2 if len(names) == 2 else 1)
    _add_calibration(found, given.max(axis=1), predicted == wanted, float(brier))
    return found


def multi_label(
    labels: Any, probabilities: Any, names: Sequence[str], threshold: float = 0.5
) -> Evaluation:
    """Any number of K labels; one is predicted where its probability is at least `threshold`.

    An example without labels for which none is predicted counts 0 in samples_f1, as in
    scikit-learn. Calibration compares the probability of each of the N K decisions with how often
    the label is there.

    Args:
        labels: (N, K) of 0 and 1.
        probabilities: (N, K).
        names: of the K labels.
        threshold: between 0 and 1.

    Raises:
        DivergedError: a probability is not finite.
        UserError: scikit-learn is not installed.
    """
    given = _finite(probabilities)
    wanted = np.asarray(labels, dtype=np.int64)
    decided = (given >= threshold).astype(np.int64)
    metrics = {"subset_accuracy": float((wanted == decided).all(axis=1).mean())}
    # To scikit-learn, a single column would be one label of two classes.
    padded, guessed = (np.pad(one, ((0, 0), (0, 1))) for one in (wanted, decided))
    places = list(range(len(names)))
    metrics |= _averages(padded, guessed, ("micro", "macro", "weighted"), places)
    metrics["samples_f1"] = _averages(padded, guessed, ("samples",), places)["samples_f1"]
    details = {
        "examples": len(wanted),
        "notes": [],
        "threshold": threshold,
        "classes": _classes(padded, guessed, names),
    }
    found = Evaluation(metrics, details)
    brier = float(((given - wanted) ** 2).mean())
    _add_calibration(found, given.ravel(), wanted.ravel() == 1, brier)
    return found


def scores(labels: Sequence[float], predicted: Any) -> Evaluation:
    """A number each.

    A correlation with a constant is undefined: it counts as 0, with a note.

    Args:
        labels: (N,).
        predicted: (N,).

    Raises:
        DivergedError: a prediction is not finite.
        UserError: scikit-learn is not installed.
    """
    wanted = np.asarray(labels, dtype=np.float64)
    given = _finite(predicted)
    found = similarity(wanted, given)
    error = given - wanted
    found.metrics["mse"] = float((error**2).mean())
    found.metrics["mae"] = float(np.abs(error).mean())
    if _is_constant(wanted):
        found.metrics["r2"] = 0.0
        found.details["notes"].append("r2 counts as 0, because all labels are equal.")
    else:
        found.metrics["r2"] = float(needs("sklearn.metrics").r2_score(wanted, given))
    return found


def similarity(labels: Sequence[float] | NDArray[np.floating], cosines: Any) -> Evaluation:
    """How well cosines of sentence pairs go with their scores: Spearman and Pearson.

    Args:
        labels: (N,).
        cosines: (N,).

    Raises:
        DivergedError: a cosine is not finite.
        UserError: scipy, which scikit-learn brings along, is not installed.
    """
    wanted = np.asarray(labels, dtype=np.float64)
    given = _finite(cosines)
    every = -(-len(wanted) // _MOST_POINTS)
    points = np.stack([wanted, given], axis=1)[::every].tolist()
    details: dict[str, Any] = {"examples": len(wanted), "notes": [], "points": points}
    constant = [
        name for name, one in (("labels", wanted), ("predictions", given)) if _is_constant(one)
    ]
    if constant:
        details["notes"].append(
            f"Correlations count as 0, because all {' and all '.join(constant)} are equal."
        )
        return Evaluation({"pearson": 0.0, "spearman": 0.0}, details)
    stats = needs("scipy.stats")
    pearson, spearman = (one(wanted, given).statistic for one in (stats.pearsonr, stats.spearmanr))
    return Evaluation({"pearson": float(pearson), "spearman": float(spearman)}, details)


def entities(
    labels: Sequence[Sequence[str]],
    predicted: Sequence[Sequence[str]],
    types: Sequence[str] = (),
    confidences: Sequence[NDArray[np.floating]] | None = None,
) -> Evaluation:
    """Entities of IOB2 tags: one is right where its type and both ends are.

    By seqeval in its default mode, which most published numbers have, transformers' examples
    included: an I- that follows nothing of its type begins an entity, as a B- would. f1, precision
    and recall are micro averages; macro averages go over the types that occur as label or
    prediction. accuracy is that of tokens.

    Args:
        labels: a list of tags for each sentence ("B-person", "I-person", "O").
        predicted: of the same lengths.
        types: to be listed even where they never occur, with support 0.
        confidences: probabilities of the predicted tags, of the same lengths: what calibration of
            tokens is taken over.

    Raises:
        DivergedError: a confidence is not finite.
        UserError: seqeval is not installed.
    """
    pairs = [
        pair for both in zip(labels, predicted, strict=True) for pair in zip(*both, strict=True)
    ]
    kinds = [tuple(tag.partition("-")[2] or "O" for tag in pair) for pair in pairs]
    rows: list[dict[str, Any]] = []
    averages = dict.fromkeys(("micro", "macro", "weighted"), (0.0, 0.0, 0.0))
    notes = []
    if any(kind != "O" for pair in kinds for kind in pair):
        wanted, given = [list(map(list, one)) for one in (labels, predicted)]
        report = needs("seqeval.metrics").classification_report(
            wanted, given, output_dict=True, zero_division=0
        )
        for average in averages:
            averages[average] = _three(report.pop(f"{average} avg"))
        rows = [_row(name, *_three(one), one["support"]) for name, one in report.items()]
    else:
        notes.append("No entity in the labels and none predicted: all of its metrics are 0.")
    known = {row["name"] for row in rows}
    rows += [_row(name, 0.0, 0.0, 0.0, 0) for name in types if name not in known]
    rows.sort(key=lambda row: row["name"])
    metrics = {}
    for average, three in averages.items():
        prefix = "" if average == "micro" else f"{average}_"
        for name, value in zip(("precision", "recall", "f1"), three, strict=True):
            metrics[f"{prefix}{name}"] = value
    metrics["accuracy"] = sum(one == other for one, other in pairs) / len(pairs)
    names = ["O", *(row["name"] for row in rows)]
    place = {name: index for index, name in enumerate(names)}
    true, guessed = np.array([[place[kind] for kind in pair] for pair in kinds]).T
    details = {
        "examples": len(labels),
        "tokens": len(pairs),
        "notes": notes,
        "classes": rows,
        "confusion": {"names": names, "counts": _confusion(true, guessed, len(names))},
    }
    found = Evaluation(metrics, details)
    _calibrate_tokens(found, pairs, confidences)
    return found


def token_labels(
    labels: Sequence[Sequence[str]],
    predicted: Sequence[Sequence[str]],
    names: Sequence[str] = (),
    confidences: Sequence[NDArray[np.floating]] | None = None,
) -> Evaluation:
    """Labels of tokens that are no entities, such as parts of speech; each token counts once.

    Args:
        labels: a list for each sentence.
        predicted: of the same lengths.
        names: to be listed even where they never occur, with support 0.
        confidences: see `entities`.

    Raises:
        DivergedError: a confidence is not finite.
        UserError: scikit-learn is not installed.
    """
    pairs = [
        pair for both in zip(labels, predicted, strict=True) for pair in zip(*both, strict=True)
    ]
    all_names = sorted({*names}.union(*pairs))
    place = {name: index for index, name in enumerate(all_names)}
    wanted, given = np.array([[place[name] for name in pair] for pair in pairs]).T
    found = _by_class(wanted, given, all_names)
    found.details |= {"examples": len(labels), "tokens": len(pairs)}
    _calibrate_tokens(found, pairs, confidences)
    return found


def answers(
    references: Mapping[str, Sequence[str]],
    predicted: Mapping[str, str],
    no_answer: Mapping[str, float] | None = None,
    threshold: float = 1.0,
) -> Evaluation:
    """Answers to questions, in percent, as SQuAD's scripts have them.

    By the script of 2.0 where a question is unanswerable, else by that of 1.1. With `no_answer`
    come best_exact and best_f1 over all thresholds, and these in `details["thresholds"]`; for them
    to mean something, `predicted` must hold the best text even where no answer is likely.

    Args:
        references: question -> texts that are right; none for an unanswerable one.
        predicted: question -> text, "" for no answer; as many as `references`.
        no_answer: question -> probability that it has no answer.
        threshold: above this probability a question counts as unanswered.
    """
    unanswerable = {one for one, golds in references.items() if not golds}
    raw = {
        one: squad.score(predicted[one], golds, bool(unanswerable))
        for one, golds in references.items()
    }
    decided = dict(raw)
    for one in raw:
        if no_answer is not None and no_answer[one] > threshold:
            decided[one] = squad.Score(*[float(one in unanswerable)] * 2)
    parts = {"": [*raw]}
    if unanswerable:
        parts["has_answer_"] = [one for one in raw if one not in unanswerable]
        parts["no_answer_"] = [one for one in raw if one in unanswerable]
    metrics: dict[str, float] = {}
    details: dict[str, Any] = {
        "examples": len(raw),
        "unanswerable": len(unanswerable),
        "definition": "SQuAD 2.0" if unanswerable else "SQuAD 1.1",
        "notes": [],
    }
    for part, chosen in parts.items():
        if chosen:
            mean = squad.mean(decided[one] for one in chosen)
            metrics |= {f"{part}exact_match": 100 * mean.exact_match, f"{part}f1": 100 * mean.f1}
    if no_answer is not None:
        exact, f1 = (
            squad.best({one: both[kind] for one, both in raw.items()}, unanswerable, no_answer)
            for kind in (0, 1)
        )
        metrics |= {"best_exact": 100 * exact.score, "best_f1": 100 * f1.score}
        details["thresholds"] = {"best_exact": exact.threshold, "best_f1": f1.threshold}
    return Evaluation(metrics, details)


def choices(labels: Sequence[int], probabilities: Sequence[Sequence[float]]) -> Evaluation:
    """One of some choices, whose number may differ.

    Args:
        labels: the right one of each, from 0.
        probabilities: a list for each.

    Raises:
        DivergedError: a probability is not finite.
    """
    given = [_finite(one) for one in probabilities]
    right = np.array([one.argmax() == label for one, label in zip(given, labels, strict=True)])
    squares = [
        ((one - np.eye(len(one))[label]) ** 2).sum()
        for one, label in zip(given, labels, strict=True)
    ]
    found = Evaluation({"accuracy": float(right.mean())}, {"examples": len(given), "notes": []})
    _add_calibration(found, np.array([one.max() for one in given]), right, float(np.mean(squares)))
    return found


def places(similarities: Any, right: NDArray[np.bool_]) -> tuple[Any, Any]:
    """Where queries find the nearest text that is right for them.

    Args:
        similarities: (Q, N), of queries to texts.
        right: (Q, N), at least one of each query.

    Returns:
        Of each query, how many wrong texts are nearer, and how many texts are as near, it included.

    Raises:
        DivergedError: a similarity is not finite.
    """
    given = _finite(similarities)
    own = np.where(right, given, -np.inf).max(axis=1, keepdims=True)
    return (given > own).sum(axis=1), ((given == own) & ~right).sum(axis=1) + 1


def retrieval(before: Any, equal: Any) -> Evaluation:
    """How well queries find a text that is right for them.

    Texts that are equally near share their places: what is given is the mean over all orders of
    them, so a model that makes everything equal gets what chance would.

    Args:
        before: (Q,), see `places`.
        equal: (Q,), the same.
    """
    first, as_near = np.asarray(before)[:, None], np.asarray(equal)[:, None]
    ranks = np.arange(1, 11)
    chance = ((ranks > first) & (ranks <= first + as_near)) / as_near  # (Q, 10)
    metrics = {
        f"accuracy_at_{most}": float(chance[:, :most].sum(axis=1).mean()) for most in (1, 3, 10)
    }
    metrics["mrr_at_10"] = float((chance / ranks).sum(axis=1).mean())
    median = float(np.median(first + (as_near + 1) / 2))
    details = {"examples": len(first), "notes": [f"The median place is {median:g}."]}
    return Evaluation(metrics, details)


def mean_and_deviation(evaluations: Sequence[Evaluation]) -> dict[str, Spread]:
    """Each metric that all have, over the seeds."""
    shared = [
        name for name in evaluations[0].metrics if all(name in one.metrics for one in evaluations)
    ]
    found = {}
    for name in shared:
        values = [one.metrics[name] for one in evaluations]
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        found[name] = Spread(float(np.mean(values)), deviation, values)
    return found


def calibration(confidences: NDArray[np.floating], right: NDArray[np.bool_]) -> dict[str, Any]:
    """How far confidence is from how often it is right.

    Guo et al. 2017: in each of 15 bins of equal width, (low, high], the distance of the mean
    confidence and the accuracy; their mean weighted by count is the expected calibration error.

    Args:
        confidences: (N,) between 0 and 1.
        right: (N,).

    Returns:
        expected_calibration_error, and bins: low, high, count, confidence and accuracy (None where
        the count is 0).
    """
    edges = np.linspace(0, 1, BINS + 1)
    # By the edges themselves: 15 times a confidence may round across one.
    bins = np.clip(np.searchsorted(edges, confidences, side="left") - 1, 0, BINS - 1)
    rows: list[dict[str, float | None]] = []
    error = 0.0
    for place in range(BINS):
        inside = bins == place
        count = int(inside.sum())
        confidence = accuracy = None
        if count:
            confidence, accuracy = float(confidences[inside].mean()), float(right[inside].mean())
            error += abs(confidence - accuracy) * count / len(right)
        bounds = {"low": float(edges[place]), "high": float(edges[place + 1])}
        rows.append({**bounds, "count": count, "confidence": confidence, "accuracy": accuracy})
    return {"expected_calibration_error": error, "bins": rows}


def _add_calibration(
    found: Evaluation,
    confidences: NDArray[np.floating],
    right: NDArray[np.bool_],
    brier: float | None = None,
) -> None:
    known = calibration(confidences, right)
    found.metrics["expected_calibration_error"] = known["expected_calibration_error"]
    if brier is not None:
        known["brier_score"] = found.metrics["brier_score"] = brier
    found.details["calibration"] = known


def _calibrate_tokens(
    found: Evaluation,
    pairs: Sequence[tuple[str, str]],
    confidences: Sequence[NDArray[np.floating]] | None,
) -> None:
    if confidences is not None:
        right = np.array([one == other for one, other in pairs])
        _add_calibration(found, _finite(np.concatenate(confidences)), right)


def _by_class(
    labels: NDArray[np.int64], predicted: NDArray[np.int64], names: Sequence[str]
) -> Evaluation:
    rows = _classes(labels, predicted, names)
    metrics = {"accuracy": float((labels == predicted).mean())}
    metrics |= _averages(labels, predicted, ("macro", "micro", "weighted"))
    metrics["matthews"] = 0.0
    if np.ptp(labels) or np.ptp(predicted):  # scikit-learn says 0 as well, but warns of one class
        metrics["matthews"] = float(needs("sklearn.metrics").matthews_corrcoef(labels, predicted))
    metrics["balanced_accuracy"] = float(np.mean([row["recall"] for row in rows if row["support"]]))
    counts = _confusion(labels, predicted, len(names))
    details = {
        "examples": len(labels),
        "notes": [],
        "classes": rows,
        "confusion": {"names": list(names), "counts": counts},
    }
    return Evaluation(metrics, details)


def _averages(
    labels: NDArray[np.int64],
    predicted: NDArray[np.int64],
    averages: Sequence[str],
    places: list[int] | None = None,
) -> dict[str, float]:
    found = {}
    for average in averages:
        *three, _ = needs("sklearn.metrics").precision_recall_fscore_support(
            labels, predicted, labels=places, average=average, zero_division=0
        )
        for name, value in zip(("precision", "recall", "f1"), three, strict=True):
            found[f"{average}_{name}"] = float(value)
    return found


def _classes(
    labels: NDArray[np.int64], predicted: NDArray[np.int64], names: Sequence[str]
) -> list[dict[str, Any]]:
    columns = needs("sklearn.metrics").precision_recall_fscore_support(
        labels, predicted, labels=list(range(len(names))), average=None, zero_division=0
    )
    return [_row(*one) for one in zip(names, *columns, strict=True)]


def _row(name: str, precision: float, recall: float, f1: float, support: int) -> dict[str, Any]:
    shares = {"precision": float(precision), "recall": float(recall), "f1": float(f1)}
    return {"name": name, **shares, "support": int(support)}


def _three(report: Mapping[str, Any]) -> tuple[float, float, float]:
    precision, recall, f1 = (float(report[name]) for name in ("precision", "recall", "f1-score"))
    return precision, recall, f1


def _confusion(
    labels: NDArray[np.int64], predicted: NDArray[np.int64], classes: int
) -> list[list[int]]:
    counts = np.bincount(labels * classes + predicted, minlength=classes**2)
    return [[int(one) for one in row] for row in counts.reshape(classes, classes)]


def _is_constant(values: NDArray[np.float64]) -> bool:
    centred = values - values.mean()
    # Where scipy warns that a correlation would be rounding noise.
    return bool(np.ptp(values) == 0 or np.linalg.norm(centred) <= 1e-13 * abs(values.mean()))


def _finite(values: Any) -> NDArray[np.float64]:
    found = np.asarray(values, dtype=np.float64)
    if not np.isfinite(found).all():
        raise DivergedError("the model's outputs are not finite numbers: its training has diverged")
    return found
