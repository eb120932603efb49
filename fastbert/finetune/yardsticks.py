"""What a fine-tuned model must be worth more than: counted words, and what most examples have.

Words of a text, or those around a word, go into scikit-learn's logistic regression; of a question's
paragraph it is the sentence with most of the question's words. How much is regularized was chosen
on the training examples of sentiment and entities, of 1, 3, 10, 30 and 100. Nothing is drawn: a
second run finds the same.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastbert.finetune import metrics, squad
from fastbert.finetune.data import Data
from fastbert.finetune.metrics import Evaluation
from fastbert.finetune.needs import needs
from fastbert.finetune.tasks.base import Example

BAG, OVERLAP, MAJORITY = "bag-of-words", "sentence-overlap", "majority"
_SENTENCE = re.compile(r"\S.*?(?:[.!?](?=\s)|$)", re.DOTALL)

Found = tuple[str, Evaluation | str]
"""A yardstick's name, and what it is worth or why there is none."""


def _logistic(vectors: Any, strength: float) -> Any:
    linear = needs("sklearn.linear_model").LogisticRegression(C=strength, max_iter=1000)
    return needs("sklearn.pipeline").make_pipeline(vectors, linear)


def of_texts(data: Data) -> list[Found]:
    """TF-IDF of words and pairs of words; the label of most texts."""
    texts, labels = ([one.fields[key] for one in data.train] for key in ("text", "label"))
    vectors = needs("sklearn.feature_extraction.text").TfidfVectorizer(ngram_range=(1, 2))
    fitted = _logistic(vectors, 30.0).fit(texts, labels)
    names = list(fitted.classes_)
    wanted = [names.index(one.fields["label"]) for one in data.eval]
    chances = fitted.predict_proba([one.fields["text"] for one in data.eval])
    most = names.index(Counter(labels).most_common(1)[0][0])
    always = np.tile(np.eye(len(names))[most], (len(wanted), 1))
    return [
        (BAG, metrics.classification(wanted, chances, names)),
        (MAJORITY, metrics.classification(wanted, always, names)),
    ]


def of_words(data: Data) -> list[Found]:
    """Each word with its neighbours, alone; the tag of most words."""

    def described(examples: Sequence[Example]) -> list[dict[str, float]]:
        return [features for one in examples for features in _around(one.fields["tokens"])]

    given = [tag for one in data.train for tag in one.fields["tags"]]
    vectors = needs("sklearn.feature_extraction").DictVectorizer()
    fitted = _logistic(vectors, 10.0).fit(described(data.train), given)
    wanted = [one.fields["tags"] for one in data.eval]
    found = iter(map(str, fitted.predict(described(data.eval))))
    most = Counter(given).most_common(1)[0][0]
    return [
        (BAG, metrics.entities(wanted, [[next(found) for _ in tags] for tags in wanted])),
        (MAJORITY, metrics.entities(wanted, [[most] * len(tags) for tags in wanted])),
    ]


def _around(words: Sequence[str]) -> list[dict[str, float]]:
    each = ["", *words, ""]
    return [
        {
            f"{place}:{feature}": 1.0
            for place, word in enumerate(each[at : at + 3])
            for feature in _features(word)
        }
        for at in range(len(words))
    ]


def _features(word: str) -> list[str]:
    """A word in lower case, its first and last letters, and its shape: Xx-0 of Covid-19."""
    low = word.lower()
    shape = "".join("0" if c.isdigit() else "X" if c.isupper() else "x" if c.islower() else c
                    for c in word)  # fmt: skip
    shape = re.sub(r"(.)\1+", r"\1", shape)
    parts = (part for n in (2, 3) for part in (f"begins {low[:n]}", f"ends {low[-n:]}"))
    return [f"is {low}", f"looks {shape}", *parts]


def of_paragraphs(data: Data) -> list[Found]:
    """The sentence that shares most words with the question, the first of equals."""
    right, given = {}, {}
    for place, one in enumerate(data.eval):
        asked = set(squad.words(one.fields["question"]))
        sentences = [found[0] for found in _SENTENCE.finditer(one.fields["context"])]
        right[str(place)] = [text for text, _ in one.fields["answers"]]
        given[str(place)] = max(sentences, key=lambda text: len(asked & set(squad.words(text))))
    return [
        (OVERLAP, metrics.answers(right, given)),
        (MAJORITY, "spans of a paragraph are no classes"),
    ]


YARDSTICKS: dict[str, Callable[[Data], list[Found]]] = {
    "classify": of_texts,
    "tag": of_words,
    "answer": of_paragraphs,
}
"""By the task's name; of texts with one label, of entities, of answerable questions."""
