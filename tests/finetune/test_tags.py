"""Tags of tokens: schemes told apart, broken sequences named, spans as seqeval finds them."""

import random

import pytest

from fastbert.errors import UserError
from fastbert.finetune.tags import (
    IOB1,
    IOB2,
    IOBES,
    NONE,
    check,
    kinds,
    of_entities,
    of_spans,
    scheme_of,
    spans,
    to_iob2,
    words_of,
)


def test_kinds_are_types_or_labels() -> None:
    assert kinds(["B-per", "I-per", "O", "S-a-b"]) == ["a-b", "per"]
    assert kinds(["NOUN", "VERB", "NOUN"]) == ["NOUN", "VERB"]
    assert kinds(["O"]) == []


def test_entities_may_be_triples() -> None:
    assert of_entities("Ada ran", [[0, 3, "per"]], "x:1")[1] == ["B-per", "O"]
    with pytest.raises(UserError, match=r"^x:1: an entity must have integers start and end, and"):
        of_entities("Ada ran", [[0, 3]], "x:1")


# Ada Lovelace | Paris London | met, in each scheme; two entities of one type side by side
SENTENCE = {
    IOB1: ["I-per", "I-per", "I-loc", "B-loc", "O", "I-creative-work"],
    IOB2: ["B-per", "I-per", "B-loc", "B-loc", "O", "B-creative-work"],
    IOBES: ["B-per", "E-per", "S-loc", "S-loc", "O", "S-creative-work"],
}
BILOU = ["B-per", "L-per", "U-loc", "U-loc", "O", "U-creative-work"]
ENTITIES = [("per", 0, 2), ("loc", 2, 3), ("loc", 3, 4), ("creative-work", 5, 6)]


@pytest.mark.parametrize("scheme", SENTENCE)
def test_a_scheme_is_told_and_turned_into_another(scheme: str) -> None:
    tags = SENTENCE[scheme]
    assert scheme_of([["O"], tags]) == scheme
    check(tags, scheme, "x:1")
    assert spans(tags) == ENTITIES
    assert to_iob2(tags, scheme) == SENTENCE[IOB2]
    assert of_spans(spans(SENTENCE[IOB2]), len(tags), scheme) == tags


def test_bilou_is_iobes_in_other_letters() -> None:
    assert scheme_of([BILOU]) == IOBES
    check(BILOU, IOBES, "x:1")
    assert spans(BILOU) == ENTITIES
    assert to_iob2(BILOU, IOBES) == SENTENCE[IOB2]


@pytest.mark.parametrize(
    ("sequences", "scheme"),
    [
        ([["NOUN", "VERB", "O"]], NONE),
        ([["O", "O"]], NONE),
        ([["S-BAR", "NP"]], NONE),  # labels with hyphens, of which one looks like a tag
        ([["B-x", "O", "B-x"]], IOB2),  # contradicts neither
        ([["O", "I-x"], ["I-x"], ["B-y", "I-y"]], IOB1),  # of three entities one speaks for IOB2
        ([["O", "I-x"], ["B-x"], ["B-y", "I-y"]], IOB2),
    ],
)
def test_schemes_of_odd_corpora(sequences: list[list[str]], scheme: str) -> None:
    assert scheme_of(sequences) == scheme


@pytest.mark.parametrize(
    ("scheme", "tags", "wrong", "told"),
    [
        (IOB2, "O I-x", 1, "'I-x' stands after 'O': in IOB2 an entity begins with B-x"),
        (IOB2, "I-x", 0, "'I-x' begins its sentence: in IOB2"),
        (IOB2, "B-y I-x", 1, "'I-x' stands after 'B-y'"),
        (IOB2, "B-x I-x E-x", 2, "'E-x' is none of IOB2: O, B-TYPE, I-TYPE"),
        (IOB2, "B-x X", 1, "'X' is none of IOB2"),
        (IOB2, "B-", 0, "'B-' is none of IOB2"),
        (IOB1, "O B-x", 1, "'B-x' stands after 'O': in IOB1 an entity begins with I-x"),
        (IOB1, "I-y B-x", 1, "'B-x' stands after 'I-y'"),
        (IOBES, "O E-x", 1, "'E-x' stands after 'O': in IOBES an entity begins with B-x"),
        (IOBES, "B-x E-y", 0, "'B-x' stands before 'E-y': in IOBES an entity ends with E-x"),
        (IOBES, "B-x I-x", 1, "'I-x' ends its sentence"),
        (IOBES, "S-x I-x", 1, "'I-x' stands after 'S-x'"),
        (IOBES, "B-x B-x", 0, "'B-x' stands before 'B-x'"),
    ],
)
def test_a_broken_sequence_is_named_with_its_place(
    scheme: str, tags: str, wrong: int, told: str
) -> None:
    with pytest.raises(UserError) as caught:
        check(tags.split(), scheme, "a.jsonl:7")
    assert str(caught.value).startswith(f"a.jsonl:7: tag {wrong + 1} {told}")
    with pytest.raises(UserError) as caught:
        check(tags.split(), scheme, "dir/a.conll:10", range(10, 20))
    assert str(caught.value).startswith(f"dir/a.conll:{10 + wrong}: tag {told}")


def test_labels_of_single_tokens_are_no_entities() -> None:
    check(["NOUN", "B-", ""], NONE, "x:1")
    assert to_iob2(["NOUN"], NONE) == ["NOUN"]
    assert spans(["NOUN", "X-y", "O"]) == []


def test_any_sequence_has_the_spans_of_seqeval() -> None:
    get_entities = pytest.importorskip("seqeval.metrics.sequence_labeling").get_entities
    draw = random.Random(0)
    known = ["O", *(f"{letter}-{kind}" for letter in "BIES" for kind in ("x", "y-z"))]
    for _ in range(500):
        tags = draw.choices(known, k=draw.randrange(1, 9))
        ours = [(kind, begin, end - 1) for kind, begin, end in spans(tags)]
        assert ours == [tuple(entity) for entity in get_entities(tags)], tags


def test_any_entities_come_back_from_every_scheme() -> None:
    draw = random.Random(1)
    for _ in range(200):
        entities, at = [], 0
        while at < 12:
            begin = at + draw.choice([0, 0, 1])
            at = begin + draw.randrange(1, 4)
            entities.append((draw.choice("xy"), begin, at))
        for scheme in SENTENCE:
            tags = of_spans(entities, at, scheme)
            check(tags, scheme, "x:1")
            assert spans(tags) == entities


def test_words_of_a_text() -> None:
    text = "Ada (35) läuft, 東京"
    words = [text[begin:end] for begin, end in words_of(text)]
    assert words == ["Ada", "(", "35", ")", "läuft", ",", "東", "京"]
    assert words_of("") == words_of(" \n") == []


def test_no_word_ends_amid_what_is_read_as_one_character() -> None:
    wanted = [
        "Rene\u0301e", "हिन्दी", "ब\u200cब", "สวัสดี", "co\u00adop", "👩\u200d👩\u200d👧", "👍🏽",
        "🇩🇪", "1\ufe0f\u20e3", "क्\u200dष", "❤\ufe0f",
    ]  # fmt: skip
    text = " ".join(wanted)
    assert [text[begin:end] for begin, end in words_of(text)] == wanted
    text = "Rene\u0301e,🇩🇪🇫🇷\u200b!"
    assert [text[begin:end] for begin, end in words_of(text)] == [
        "Rene\u0301e", ",", "🇩🇪", "🇫🇷\u200b", "!",
    ]  # fmt: skip


def test_entities_become_tags_of_words_cut_where_they_begin_and_end() -> None:
    text = "in NewYork, Ada B. ran"
    entities = [
        {"start": 12, "end": 18, "label": "per", "text": "Ada B."},
        {"start": 3, "end": 6, "type": "loc"},
        {"start": 6, "end": 10, "type": "loc"},
    ]
    words, tags = of_entities(text, entities, "x:1")
    found = [(text[begin:end], tag) for (begin, end), tag in zip(words, tags, strict=True)]
    assert found == [
        ("in", "O"),
        ("New", "B-loc"),
        ("York", "B-loc"),
        (",", "O"),
        ("Ada", "B-per"),
        ("B", "I-per"),
        (".", "I-per"),
        ("ran", "O"),
    ]


@pytest.mark.parametrize(
    ("entities", "told"),
    [
        ({"start": 0}, "must be a list of objects"),
        (["Ada"], "integers start and end, and a type"),
        ([{"start": 0, "end": "3", "type": "x"}], "integers start and end, and a type"),
        ([{"start": 0, "end": 3}], "integers start and end, and a type"),
        ([{"start": 0, "end": 99, "type": "x"}], "characters 0 to 99 is not within the text"),
        ([{"start": 3, "end": 3, "type": "x"}], "characters 3 to 3"),
        ([{"start": 3, "end": 4, "type": "x"}], "holds no word"),
        ([{"start": 0, "end": 3, "type": "x", "text": "Bob"}], "where 'Ada' stands"),
        (
            [{"start": 0, "end": 7, "type": "x"}, {"start": 4, "end": 7, "type": "x"}],
            "'ran' overlaps",
        ),
    ],
)
def test_wrong_entities_are_named(entities: object, told: str) -> None:
    with pytest.raises(UserError, match=r"^x:1: ") as caught:
        of_entities("Ada ran", entities, "x:1")
    assert told in str(caught.value)
