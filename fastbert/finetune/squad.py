"""Exact match and F1 of answers, as the official scripts of SQuAD 1.1 and 2.0 define them.

Rajpurkar et al. 2016 and 2018. All functions here give shares; the scripts print them times 100.
"""

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


class Score(NamedTuple):
    """What one answer, or the mean of many, is worth: both between 0 and 1."""

    exact_match: float
    f1: float


class Best(NamedTuple):
    """The best mean score, and the threshold that gives it."""

    score: float
    threshold: float
    """A question counts as unanswered where its no-answer probability is above this."""


def words(text: str) -> list[str]:
    """The words that are compared: lower case, without ASCII punctuation and English articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def score(predicted: str, golds: Sequence[str], version_2: bool) -> Score:
    """An answer against all that count as right; the best of them decides.

    Args:
        predicted: "" for no answer.
        golds: texts; none for a question without an answer.
        version_2: as SQuAD 2.0 has it. It leaves out golds of which nothing remains but
            punctuation and articles, and two empty answers agree; in 1.1 their F1 is 0.
    """
    found = words(predicted)
    wanted = [words(gold) for gold in golds]
    if version_2:
        wanted = list(filter(None, wanted)) or [[]]
    both = [Score(float(found == one), _f1(found, one, version_2)) for one in wanted]
    return Score(max(one.exact_match for one in both), max(one.f1 for one in both))


def _f1(found: list[str], wanted: list[str], version_2: bool) -> float:
    if version_2 and not (found and wanted):
        return float(found == wanted)
    same = (Counter(found) & Counter(wanted)).total()
    return 2 * same / (len(found) + len(wanted)) if same else 0.0


def mean(scores: Iterable[Score]) -> Score:
    """The mean of one or more scores."""
    exact_match, f1 = zip(*scores, strict=True)
    return Score(sum(exact_match) / len(exact_match), sum(f1) / len(f1))


def best(
    scores: Mapping[str, float], unanswerable: set[str], no_answer: Mapping[str, float]
) -> Best:
    """The best mean score over thresholds of the no-answer probability.

    Questions of one probability change together, so that the threshold does give the score; the
    script takes them one by one, and where some are equal its best can be one that no threshold
    gives.

    Args:
        scores: question -> what its answer is worth.
        unanswerable: the questions without an answer.
        no_answer: question -> probability that it has no answer.
    """
    total = float(len(unanswerable))  # every question unanswered
    found = Best(total, 0.0)
    ordered = sorted(scores, key=lambda one: no_answer[one])
    for place, one in enumerate(ordered, 1):
        total += scores[one] - (one in unanswerable)
        last = place == len(ordered) or no_answer[ordered[place]] > no_answer[one]
        if last and total > found.score:
            found = Best(total, no_answer[one])
    return Best(found.score / len(scores), found.threshold)
