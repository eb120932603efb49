"""A share split off: of each label its part, none for evaluation alone, equal texts together."""

from collections import Counter
from collections.abc import Collection

import pytest

from fastbert.finetune.split import split


def counts(classes: list[Collection[str]], places: list[int]) -> Counter[str]:
    return Counter(name for place in places for name in classes[place])


def test_a_split_is_the_same_everywhere() -> None:
    places, classes = list(range(20)), list("ab" * 10)
    assert split(places, classes, 0.25, 3)[1] == [0, 4, 7, 9, 16]
    assert split(places, [()] * 20, 0.2, 0)[1] == [2, 3, 11, 13]
    assert split(places, classes, 0.25, 4)[1] != [0, 4, 7, 9, 16]


@pytest.mark.parametrize("seed", range(5))
def test_each_class_has_its_share_and_training_all_of_them(seed: int) -> None:
    classes = list("a" * 100 + "b" * 20 + "ccd")
    stays, held = split(range(123), classes, 0.1, seed)
    assert sorted(stays + held) == list(range(123))
    assert counts(classes, held) == {"a": 10, "b": 2, "c": 1}
    assert set(counts(classes, split(range(123), classes, 0.99, seed)[0])) == set("abcd")


@pytest.mark.parametrize("seed", range(5))
def test_many_small_classes_are_not_more_than_the_share(seed: int) -> None:
    classes = [[f"{n // 2}"] for n in range(200)]
    stays, held = split(range(200), classes, 0.1, seed)
    assert len(held) == 20
    assert len(set(counts(classes, stays))) == 100


@pytest.mark.parametrize("seed", range(5))
def test_of_several_labels_each_has_its_share(seed: int) -> None:
    classes: list[Collection[str]] = [["a", "b"], ["a"], ["b"], ["c", "a"], []] * 20
    classes += [["a", f"alone {n}"] for n in range(6)]
    stays, held = split(range(106), classes, 0.2, seed)
    found = counts(classes, held)
    assert found == {"a": 13, "b": 8, "c": 4}
    # 4, and the part of the six that must stay
    assert sum(not classes[place] for place in held) == 5
    assert set(counts(classes, stays)) >= {f"alone {n}" for n in range(6)}


@pytest.mark.parametrize("seed", range(5))
def test_equal_texts_stand_on_one_side(seed: int) -> None:
    texts, classes = [n % 30 for n in range(90)], ["ab"[n % 2] for n in range(90)]
    stays, held = split(texts, classes, 0.2, seed)
    assert not {texts[n] for n in stays} & {texts[n] for n in held}
    assert counts(classes, held) == {"a": 9, "b": 9}
    stays, held = split([0] * 20 + list(range(1, 11)), [()] * 30, 0.1, seed)
    assert len(held) == 3 and min(held) >= 20


def test_a_small_file_gives_one_and_one_text_of_a_label_none() -> None:
    assert [len(part) for part in split(range(3), ["a", "a", "b"], 0.1, 0)] == [2, 1]
    assert split(range(2), ["a", "b"], 0.1, 0) == ([0, 1], [])
    assert split([0, 0, 0, 1, 1], list("aaabb"), 0.4, 0)[1] == []
