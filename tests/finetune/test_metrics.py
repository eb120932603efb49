"""Every metric against the library that defines it, or a hand computation; and the odd cases."""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import scipy.stats
import seqeval.metrics
import sklearn.metrics as sk

from fastbert.errors import RunError
from fastbert.finetune import metrics, squad
from fastbert.finetune.metrics import METRICS, Evaluation


def drawn(examples: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and probabilities that know something of them."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, examples)
    logits = generator.normal(size=(examples, classes)) + 1.5 * np.eye(classes)[labels]
    exponents = np.exp(logits)
    return labels, exponents / exponents.sum(axis=1, keepdims=True)


def check(found: Evaluation, kind: str) -> Evaluation:
    """What holds for every evaluation: JSON without nan, and only metrics that may be asked for."""
    json.dumps([found.metrics, found.details], allow_nan=False)
    assert found.metrics.keys() <= set(METRICS[kind])
    assert METRICS[kind][0] in found.metrics
    assert all(type(value) is float for value in found.metrics.values())
    return found


def by_average(wanted: Any, predicted: Any, averages: Sequence[str]) -> dict[str, float]:
    expected = {}
    for average in averages:
        for name in ("precision", "recall", "f1"):
            score = getattr(sk, f"{name}_score")
            expected[f"{average}_{name}"] = score(
                wanted, predicted, average=average, zero_division=0
            )
    return expected


@pytest.mark.parametrize("classes", [2, 3, 60])
def test_classification_has_the_numbers_of_scikit_learn(classes: int) -> None:
    labels, probabilities = drawn(100, classes)
    names = [f"class {place}" for place in range(classes)]
    found = check(metrics.classification(labels, probabilities, names), "classify")
    predicted = probabilities.argmax(axis=1)
    assert 0.2 < found.metrics["accuracy"] < 0.95
    expected = by_average(labels, predicted, ("macro", "micro", "weighted"))
    expected["accuracy"] = sk.accuracy_score(labels, predicted)
    expected["matthews"] = sk.matthews_corrcoef(labels, predicted)
    expected["brier_score"] = sk.brier_score_loss(
        labels, probabilities[:, 1] if classes == 2 else probabilities,
        labels=range(classes),
    )  # fmt: skip
    if classes < 60:  # else some never occur, of which it warns
        expected["balanced_accuracy"] = sk.balanced_accuracy_score(labels, predicted)
    assert {name: found.metrics[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    confusion = sk.confusion_matrix(labels, predicted, labels=range(classes))
    assert found.details["confusion"] == {"names": names, "counts": confusion.tolist()}
    report = sk.classification_report(
        labels, predicted, labels=range(classes), target_names=names, output_dict=True,
        zero_division=0,
    )  # fmt: skip
    for row in found.details["classes"]:
        same = {**row, "f1-score": row["f1"]}
        assert {name: same[name] for name in report[row["name"]]} == report[row["name"]]
    assert ("f1" in found.metrics) == (classes == 2)


def test_of_two_classes_the_second_is_the_positive_one() -> None:
    labels, probabilities = drawn(80, 2)
    found = metrics.classification(labels, probabilities, ["no", "yes"])
    predicted = probabilities.argmax(axis=1)
    assert found.details["positive"] == "yes"
    expected = {
        "f1": sk.f1_score(labels, predicted),
        "precision": sk.precision_score(labels, predicted),
        "recall": sk.recall_score(labels, predicted),
        "average_precision": sk.average_precision_score(labels, probabilities[:, 1]),
        "roc_auc": sk.roc_auc_score(labels, probabilities[:, 1]),
    }
    assert {name: found.metrics[name] for name in expected} == pytest.approx(expected)
    assert found.metrics["f1"] != pytest.approx(sk.f1_score(labels, predicted, pos_label=0))


def test_a_class_without_an_example_is_listed_and_does_not_pull_averages_down() -> None:
    probabilities = [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.7, 0.2, 0.1]]
    found = check(metrics.classification([0, 1, 1], probabilities, ["a", "b", "c"]), "classify")
    assert found.details["classes"][2] == {
        "name": "c", "precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0
    }  # fmt: skip
    assert found.metrics["macro_f1"] == pytest.approx(2 / 3)
    assert found.metrics["balanced_accuracy"] == pytest.approx(0.75)


def test_a_class_that_is_only_predicted_does_count_in_averages() -> None:
    probabilities = [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.2, 0.7]]
    found = metrics.classification([0, 1, 1], probabilities, ["a", "b", "c"])
    assert found.metrics["macro_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_in_the_evaluation_data(label: int) -> None:
    sure = np.eye(2)[[label] * 3]
    found = check(metrics.classification([label] * 3, sure, ["no", "yes"]), "classify")
    assert found.metrics["accuracy"] == 1.0
    assert found.metrics["matthews"] == 0.0
    assert found.metrics["f1"] == float(label)
    assert "roc_auc" not in found.metrics
    assert found.details["notes"] == [
        f"All examples are {['no', 'yes'][label]}: average_precision and roc_auc are undefined."
    ]


def test_expected_calibration_error_by_hand() -> None:
    # Bins of 1/15: 0.95 and 0.97 in the last, 0.55 in (8/15, 9/15], 1/3 closes (4/15, 5/15].
    confidences = np.array([0.95, 0.97, 0.55, 1 / 3])
    known = metrics.calibration(confidences, np.array([True, False, True, False]))
    expected = (2 * abs(0.96 - 0.5) + abs(0.55 - 1.0) + abs(1 / 3 - 0.0)) / 4
    assert known["expected_calibration_error"] == pytest.approx(expected)
    counts = [row["count"] for row in known["bins"]]
    assert counts == [0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 2]
    assert known["bins"][14]["accuracy"] == 0.5
    assert known["bins"][14]["confidence"] == pytest.approx(0.96)
    assert known["bins"][0]["accuracy"] is None


def test_every_edge_of_a_bin_belongs_to_the_bin_below() -> None:
    edges = np.linspace(0, 1, metrics.BINS + 1)
    known = metrics.calibration(edges, np.ones(len(edges), dtype=bool))
    assert [row["count"] for row in known["bins"]] == [2] + [1] * 14


@pytest.mark.parametrize("names", [["a", "b", "c", "d"], ["a", "b"]])
def test_several_labels_have_the_numbers_of_scikit_learn(names: list[str]) -> None:
    generator = np.random.default_rng(1)
    wanted = generator.integers(0, 2, (50, len(names)))
    wanted[:5] = 0
    wanted[:, -1] = 0  # one without an example
    given = np.clip(0.5 * wanted + 0.6 * generator.random(wanted.shape), 0, 1)
    found = check(metrics.multi_label(wanted, given, names), "classify several")
    decided = (given >= 0.5).astype(int)
    expected = by_average(wanted, decided, ("micro", "macro", "weighted"))
    expected["samples_f1"] = sk.f1_score(wanted, decided, average="samples", zero_division=0)
    expected["subset_accuracy"] = sk.accuracy_score(wanted, decided)
    expected["brier_score"] = sk.brier_score_loss(wanted.ravel(), given.ravel())
    assert 0.05 < expected["subset_accuracy"] < 0.95
    assert {name: found.metrics[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert [row["support"] for row in found.details["classes"]] == wanted.sum(axis=0).tolist()
    assert sum(row["count"] for row in found.details["calibration"]["bins"]) == wanted.size


def test_one_of_several_labels_alone_is_not_two_classes() -> None:
    given = [[0.9], [0.2], [0.7], [0.1]]
    found = check(metrics.multi_label([[1], [1], [0], [0]], given, ["a"]), "classify several")
    assert found.metrics["macro_f1"] == found.metrics["micro_f1"] == pytest.approx(0.5)
    assert found.metrics["samples_f1"] == pytest.approx(0.25)
    assert [row["name"] for row in found.details["classes"]] == ["a"]


def test_the_threshold_of_several_labels_is_reached_by_what_equals_it() -> None:
    found = metrics.multi_label([[1, 0]], [[0.7, 0.6]], ["a", "b"], threshold=0.7)
    assert found.metrics["subset_accuracy"] == 1.0
    assert metrics.multi_label([[1, 0]], [[0.7, 0.6]], ["a", "b"]).metrics["micro_f1"] < 1


def test_several_labels_none_of_which_is_there_or_predicted() -> None:
    found = check(metrics.multi_label([[0, 0]], [[0.1, 0.2]], ["a", "b"]), "classify several")
    assert found.metrics["micro_f1"] == found.metrics["samples_f1"] == 0.0
    assert found.metrics["subset_accuracy"] == 1.0


def test_scores_have_the_numbers_of_scipy_and_scikit_learn() -> None:
    generator = np.random.default_rng(2)
    wanted = generator.integers(0, 6, 40).astype(float)  # with ties
    given = wanted + generator.normal(size=40)
    found = check(metrics.scores(wanted, given), "classify score")
    assert found.metrics == pytest.approx(
        {
            "pearson": scipy.stats.pearsonr(wanted, given).statistic,
            "spearman": scipy.stats.spearmanr(wanted, given).statistic,
            "mse": sk.mean_squared_error(wanted, given),
            "mae": sk.mean_absolute_error(wanted, given),
            "r2": sk.r2_score(wanted, given),
        }
    )
    assert found.details["points"][3] == [wanted[3], given[3]]


@pytest.mark.parametrize(
    ("wanted", "given", "said"),
    [
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], "all labels are"),
        ([1.0, 2.0, 3.0], [0.1, 0.1, 0.1], "all predictions are"),
        ([0.0, 0.0], [0.0, 0.0], "all labels and all predictions are"),
        ([1.0, 2.0, 3.0], [1e9, 1e9 + 1e-7, 1e9], "all predictions are"),  # rounding noise
        ([2.5], [1.0], "all labels and all predictions are"),
    ],
)
def test_a_correlation_with_a_constant_is_0_and_said(
    wanted: list[float], given: list[float], said: str
) -> None:
    found = check(metrics.scores(wanted, given), "classify score")
    assert found.metrics["pearson"] == found.metrics["spearman"] == 0.0
    assert said in found.details["notes"][0]
    if "labels" in said:
        assert found.metrics["r2"] == 0.0


def test_a_long_constant_is_one_although_its_mean_is_rounded() -> None:
    found = metrics.similarity(np.arange(1_000_003), np.full(1_000_003, 0.1))
    assert found.metrics == {"pearson": 0.0, "spearman": 0.0}
    assert len(found.details["points"]) <= 1000


def test_similarity_is_a_rank_correlation() -> None:
    found = check(metrics.similarity([0, 1, 2, 3], [0.0, 0.1, 0.2, 0.9]), "embed score")
    assert found.metrics["spearman"] == pytest.approx(1.0)
    assert 0.8 < found.metrics["pearson"] < 0.95


WANTED = [
    ["B-per", "I-per", "O", "B-loc", "O"],
    ["O", "B-org", "I-org", "O"],
    ["B-per", "B-per", "O"],
    ["O", "O"],
]
GIVEN = [
    ["B-per", "I-per", "O", "B-org", "O"],
    ["O", "I-org", "I-org", "O"],  # right in the default mode, wrong in a strict one
    ["B-per", "I-per", "O"],
    ["B-misc", "O"],
]


def test_entities_by_hand_and_by_seqeval() -> None:
    found = check(metrics.entities(WANTED, GIVEN, ["loc", "never"]), "tag")
    # 5 entities, 5 predicted; right are the first person and the organisation.
    assert found.metrics["precision"] == pytest.approx(2 / 5)
    assert found.metrics["recall"] == pytest.approx(2 / 5)
    assert found.metrics["accuracy"] == pytest.approx(10 / 14)
    for average, prefix in (("micro", ""), ("macro", "macro_"), ("weighted", "weighted_")):
        for name in ("precision", "recall", "f1"):
            score = getattr(seqeval.metrics, f"{name}_score")
            expected = score(WANTED, GIVEN, average=average, zero_division=0)
            assert found.metrics[f"{prefix}{name}"] == pytest.approx(expected)
    assert found.metrics["accuracy"] == seqeval.metrics.accuracy_score(WANTED, GIVEN)
    rows = {row["name"]: row for row in found.details["classes"]}
    assert [*rows] == ["loc", "misc", "never", "org", "per"]
    assert {name: row["support"] for name, row in rows.items()} == {
        "loc": 1, "misc": 0, "never": 0, "org": 1, "per": 3
    }  # fmt: skip
    assert rows["org"] | {"name": "org"} == {
        "name": "org", "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "support": 1
    }  # fmt: skip
    confusion = found.details["confusion"]
    assert confusion["names"] == ["O", "loc", "misc", "never", "org", "per"]
    assert confusion["counts"][0] == [6, 0, 1, 0, 0, 0]
    assert confusion["counts"][1] == [0, 0, 0, 0, 1, 0]
    assert np.sum(confusion["counts"]) == 14


@pytest.mark.parametrize("types", [[], ["per"]])
def test_no_entity_at_all(types: list[str]) -> None:
    found = check(metrics.entities([["O", "O"]], [["O", "O"]], types), "tag")
    assert found.metrics["f1"] == found.metrics["macro_f1"] == 0.0
    assert found.metrics["accuracy"] == 1.0
    assert "No entity" in found.details["notes"][0]
    assert [row["name"] for row in found.details["classes"]] == types


def test_entities_of_which_none_is_found_or_all_are_invented() -> None:
    nothing, one = [["O", "O", "O"]], [["B-x-y", "I-x-y", "O"]]
    for wanted, given in ((one, nothing), (nothing, one)):
        found = check(metrics.entities(wanted, given), "tag")
        assert found.metrics["f1"] == found.metrics["weighted_f1"] == 0.0
        assert [row["name"] for row in found.details["classes"]] == ["x-y"]


@pytest.mark.parametrize("kind", ["tag", "tag tokens"])
def test_calibration_of_words(kind: str) -> None:
    by_kind = metrics.entities if kind == "tag" else metrics.token_labels
    wanted, given = [["B-a", "O", "O"], [], ["B-b"]], [["B-a", "O", "B-a"], [], ["B-a"]]
    sure = [np.array(one, np.float32) for one in ([0.95, 0.97, 0.55], [], [0.5])]
    found = check(by_kind(wanted, given, [], sure), kind)
    expected = (2 * abs(0.96 - 1.0) + 0.55 + 0.5) / 4
    assert found.metrics["expected_calibration_error"] == pytest.approx(expected)
    counts = [row["count"] for row in found.details["calibration"]["bins"]]
    assert (counts[14], counts[8], counts[7], sum(counts)) == (2, 1, 1, 4)
    assert "calibration" not in by_kind(wanted, given).details
    with pytest.raises(RunError, match="diverged"):
        by_kind(wanted, given, [], [*sure[:2], np.array([math.nan])])


def test_sentences_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        metrics.entities([["O", "O"]], [["O"]])


def test_token_labels_count_each_token() -> None:
    wanted, given = [["N", "V"], ["N"]], [["N", "N"], ["N"]]
    found = check(metrics.token_labels(wanted, given, ["N", "V", "X"]), "tag tokens")
    assert found.metrics["accuracy"] == pytest.approx(2 / 3)
    assert found.metrics["macro_f1"] == pytest.approx(0.4)
    assert (found.details["examples"], found.details["tokens"]) == (2, 3)
    assert [row["support"] for row in found.details["classes"]] == [2, 1, 0]


@pytest.mark.parametrize(
    ("predicted", "golds", "exact", "f1"),
    [
        ("The Cat!", ["cat"], 1, 1),
        ("cat sat on mat", ["the cat sat", "a dog"], 0, 2 * (2 / 4) * (2 / 2) / (2 / 4 + 2 / 2)),
        ("cat cat", ["cat"], 0, 2 / 3),  # a word counts as often as both have it
        ("theatre an other", ["Theatre other"], 1, 1),  # articles are whole words
        ("U.S.", ["us"], 1, 1),
        ("a-b", ["ab"], 1, 1),
        ("dog", ["cat"], 0, 0),
        ("", ["cat"], 0, 0),
        ("one\u00a0 two", ["one two"], 1, 1),
    ],
)
def test_an_answer_by_hand(predicted: str, golds: list[str], exact: float, f1: float) -> None:
    for version_2 in (False, True):
        assert squad.score(predicted, golds, version_2) == pytest.approx((exact, f1))


@pytest.mark.parametrize(
    ("predicted", "golds", "version_2", "expected"),
    [
        ("", [], True, (1, 1)),
        ("the", [], True, (1, 1)),
        ("cat", [], True, (0, 0)),
        ("A", ["a"], False, (1, 0)),
        ("A", ["a"], True, (1, 1)),
        ("", ["a", "cat"], True, (0, 0)),  # "a" is left out
        ("", ["a", "cat"], False, (1, 0)),
    ],
)
def test_where_the_two_versions_differ(
    predicted: str, golds: list[str], version_2: bool, expected: tuple[float, float]
) -> None:
    assert squad.score(predicted, golds, version_2) == expected


def test_answers_all_of_which_exist_are_scored_as_in_the_first_version() -> None:
    references = {"1": ["cat"], "2": ["the cat sat", "sat"], "3": ["dog"], "4": ["a"]}
    predicted = {"1": "Cat.", "2": "cat sat on", "3": "", "4": "a"}
    found = check(metrics.answers(references, predicted), "answer")
    assert found.metrics == pytest.approx({"exact_match": 50.0, "f1": 100 * (1 + 0.8) / 4})
    assert found.details["definition"] == "SQuAD 1.1"


def test_answers_some_of_which_do_not_exist() -> None:
    references = {"1": ["cat"], "2": ["big dog"], "3": [], "4": []}
    predicted = {"1": "cat", "2": "dog", "3": "", "4": "mouse"}
    found = check(metrics.answers(references, predicted), "answer")
    assert found.metrics == pytest.approx(
        {
            "exact_match": 50.0,
            "f1": 25 * (1 + 2 / 3 + 1),
            "has_answer_exact_match": 50.0,
            "has_answer_f1": 50 * (1 + 2 / 3),
            "no_answer_exact_match": 50.0,
            "no_answer_f1": 50.0,
        }
    )
    assert found.details["definition"] == "SQuAD 2.0"


def test_the_best_threshold_by_hand() -> None:
    references = {"1": ["cat"], "2": ["big dog"], "3": [], "4": []}
    predicted = {"1": "cat", "2": "dog", "3": "rat", "4": "mouse"}
    no_answer = {"1": 0.1, "2": 0.4, "3": 0.3, "4": 0.9}
    found = check(metrics.answers(references, predicted, no_answer, 0.35), "answer")
    # Answered from the least likely to be unanswerable on: none 2; "1" 3; "3" 2; "2" 2.67.
    assert found.metrics["best_f1"] == found.metrics["best_exact"] == 75.0
    assert found.details["thresholds"] == {"best_exact": 0.1, "best_f1": 0.1}
    # At 0.35, "1" and "3" are answered.
    assert found.metrics["exact_match"] == found.metrics["f1"] == 50.0
    assert metrics.answers(references, predicted, no_answer).metrics["f1"] == pytest.approx(
        100 * (1 + 2 / 3) / 4
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_best_threshold_is_the_best_of_all(seed: int) -> None:
    generator = np.random.default_rng(seed)
    references: dict[str, list[str]] = {}
    predicted, no_answer = {}, {}
    for place in range(12):
        one = str(place)
        references[one] = [] if generator.random() < 0.5 else ["big cat"]
        predicted[one] = str(generator.choice(["big cat", "cat", "dog"]))
        no_answer[one] = round(float(generator.uniform(0.05, 0.5)), 1 if seed % 2 else 6)  # ties
    references["0"] = []
    found = metrics.answers(references, predicted, no_answer)
    for name, best in (("exact_match", "best_exact"), ("f1", "best_f1")):

        def at(threshold: float, name: str = name) -> float:
            return metrics.answers(references, predicted, no_answer, threshold).metrics[name]

        of_all = max(at(threshold) for threshold in (0.0, *no_answer.values()))
        assert found.metrics[best] == pytest.approx(of_all)
        assert at(found.details["thresholds"][best]) == pytest.approx(of_all)


def test_choices_of_different_numbers() -> None:
    found = check(metrics.choices([0, 2], [[0.9, 0.1], [0.2, 0.5, 0.3]]), "choose")
    assert found.metrics["accuracy"] == 0.5
    assert found.metrics["expected_calibration_error"] == pytest.approx((0.1 + 0.5) / 2)
    assert found.metrics["brier_score"] == pytest.approx((0.02 + 0.04 + 0.25 + 0.49) / 2)


def retrieval(similarities: Any) -> metrics.Evaluation:
    right = np.eye(len(similarities), dtype=bool)
    return metrics.retrieval(*metrics.places(similarities, right))


def test_retrieval_by_hand() -> None:
    similarities = np.zeros((12, 12))
    similarities[:, 0] = 0.5
    np.fill_diagonal(similarities, 0.4)
    similarities[0, 0] = 0.9  # first at place 1, ten others at place 2
    similarities[11] = np.linspace(1.0, 0.1, 12)  # last at place 12
    found = check(retrieval(similarities), "embed")
    assert found.metrics == pytest.approx(
        {
            "accuracy_at_1": 1 / 12,
            "accuracy_at_3": 11 / 12,
            "accuracy_at_10": 11 / 12,
            "mrr_at_10": (1 + 10 / 2) / 12,
        }
    )
    assert found.details["notes"] == ["The median place is 2."]


def test_retrieval_where_all_are_equal_is_chance() -> None:
    found = check(retrieval(np.ones((20, 20), dtype=np.float32)), "embed")
    assert found.metrics["accuracy_at_1"] == pytest.approx(1 / 20)
    assert found.metrics["accuracy_at_10"] == pytest.approx(10 / 20)
    assert found.metrics["mrr_at_10"] == pytest.approx(sum(1 / r for r in range(1, 11)) / 20)
    two = retrieval([[0.3, 0.3], [0.1, 0.3]]).metrics
    assert two["accuracy_at_1"] == pytest.approx(0.75)


def test_mean_and_deviation_of_the_metrics_that_all_have() -> None:
    seeds = [
        Evaluation({"accuracy": 0.5, "roc_auc": 1.0}),
        Evaluation({"accuracy": 0.7}),
        Evaluation({"accuracy": 0.9, "roc_auc": 1.0}),
    ]
    found = metrics.mean_and_deviation(seeds)
    assert [*found] == ["accuracy"]
    assert found["accuracy"].mean == pytest.approx(0.7)
    assert found["accuracy"].deviation == pytest.approx(0.2)
    assert found["accuracy"].values == [0.5, 0.7, 0.9]
    assert metrics.mean_and_deviation(seeds[:1])["accuracy"].deviation is None


def test_outputs_that_are_not_finite_are_a_failed_run() -> None:
    for broken in (math.nan, math.inf):
        with pytest.raises(RunError, match="diverged"):
            metrics.classification([0], [[broken, 0.5]], ["a", "b"])
        with pytest.raises(RunError, match="diverged"):
            metrics.scores([0.0], [broken])


def test_each_kind_of_task_has_a_metric_of_which_more_is_better_by_default() -> None:
    for names in METRICS.values():
        assert names[0] not in metrics.LESS_IS_BETTER
        assert len(set(names)) == len(names)
        assert names[-1] == "loss"
    assert set().union(*METRICS.values()) >= metrics.LESS_IS_BETTER
