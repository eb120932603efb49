"""Which column is what, what a row says for a task, and the message where that is unclear."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastbert.errors import UserError
from fastbert.finetune.columns import Columns, detect, usable
from fastbert.finetune.inputs import Row, Table, read_table
from fastbert.finetune.values import read_answers, read_choices, read_tagged


def table(columns: str, *rows: list[Any]) -> Table:
    names = tuple(columns.split())
    lines = [Row(dict(zip(names, row, strict=True)), f"x.tsv:{n}") for n, row in enumerate(rows, 2)]
    return Table("x.tsv", names, lines, "tsv")


def found(columns: str, task: str, **more: Any) -> dict[str, Any]:
    chosen = detect(table(columns), task, more.pop("named", {}), **more)
    return {**chosen.of, **({"choices": chosen.choices} if chosen.choices else {})}


@pytest.mark.parametrize(
    ("columns", "task", "roles"),
    [
        ("text label score", "classify", "text=text label=label"),
        ("Review Stars", "classify", "text=Review label=Stars"),
        ("idx sentence label", "classify", "text=sentence label=label id=idx"),
        ("id qid1 question1 question2 is_duplicate", "classify", "text=question1 "
         "text_pair=question2 label=is_duplicate id=id"),
        ("index question sentence label", "classify", "text=question text_pair=sentence "
         "label=label"),
        ("premise hypothesis gold_label", "classify", "text=premise text_pair=hypothesis "
         "label=gold_label"),
        ("Quality #1_ID #2_ID #1_String #2_String", "classify", "text=#1_String "
         "text_pair=#2_String label=Quality"),
        ("tokens tags", "tag", "tokens=tokens tags=tags"),
        ("id words ner_tags pos_tags", "tag", "tokens=words tags=ner_tags id=id"),
        ("text entities", "tag", "text=text entities=entities"),
        ("id question context answers", "answer", "question=question context=context "
         "answers=answers id=id"),
        ("query passage answer answer_start", "answer", "question=query context=passage "
         "answers=answer answer_start=answer_start"),
        ("anchor positive negative", "embed", "text=anchor text_pair=positive negative=negative"),
        ("sentence1 sentence2 score", "embed", "text=sentence1 text_pair=sentence2 label=score"),
        ("query passage", "embed", "text=query text_pair=passage"),
    ],
)  # fmt: skip
def test_columns_are_found_by_their_usual_names(columns: str, task: str, roles: str) -> None:
    assert found(columns, task) == dict(role.split("=") for role in roles.split())


@pytest.mark.parametrize(
    ("columns", "roles"),
    [
        ("question choices answerKey", {"question": "question", "label": "answerKey",
                                        "choices": ("choices",)}),
        ("sent1 sent2 ending0 ending1 ending2 label", {
            "question": "sent2", "context": "sent1", "label": "label",
            "choices": ("ending0", "ending1", "ending2")}),
        ("premise choice1 choice2 label", {"context": "premise", "label": "label",
                                           "choices": ("choice1", "choice2")}),
        ("question A B C D answer", {"question": "question", "label": "answer",
                                     "choices": ("A", "B", "C", "D")}),
        ("article question options answer", {"question": "question", "context": "article",
                                             "label": "answer", "choices": ("options",)}),
    ],
)  # fmt: skip
def test_choices_are_one_column_or_numbered_ones(columns: str, roles: dict[str, Any]) -> None:
    assert found(columns, "choose") == roles


def test_flags_come_before_names() -> None:
    named = {"text": "title", "label": "score"}
    assert found("text title label score", "classify", named=named) == named
    named = {"choices": "y,x", "question": "q", "label": "l"}
    assert found("q x y l", "choose", named=named)["choices"] == ("y", "x")
    named = {"text": "said", "tags": "marks"}
    assert found("said marks", "tag", named=named) == {"text": "said", "entities": "marks"}
    assert found("1 2 3", "tag", named={"tokens": "2", "tags": "3"}) == {"tokens": "2", "tags": "3"}


def test_without_labels_none_are_looked_for() -> None:
    assert found("sentence stars sentiment", "classify", with_labels=False) == {"text": "sentence"}
    assert found("text", "tag", with_labels=False) == {"text": "text"}
    assert found("tokens", "tag", with_labels=False) == {"tokens": "tokens"}
    answers = found("question context", "answer", with_labels=False)
    assert answers == {"question": "question", "context": "context"}
    choices = found("question choices", "choose", with_labels=False)
    assert choices == {"question": "question", "choices": ("choices",)}
    assert found("content", "embed", with_labels=False) == {"text": "content"}


LONG = [f"a sentence of some length, the {n}th" for n in range(12)]


def test_by_content_the_label_has_few_values_and_the_text_is_long() -> None:
    rows = [[f"u{n}", text, "good" if n % 3 else "bad", n] for n, text in enumerate(LONG)]
    columns = detect(table("who what how when", *rows), "classify", {})
    assert dict(columns.of) == {"text": "what", "label": "how"}
    assert columns.line() == "text = 'what', label = 'how' (of columns who, what, how, when)"


def test_a_label_found_by_content_is_met_again() -> None:
    rows = [[text, str(n)] for n, text in enumerate(LONG)]
    for count in (2, 12):
        with pytest.raises(UserError, match="no column for the label among columns text, index"):
            detect(table("text index", *rows[:count]), "classify", {})


def test_rows_may_be_sorted_by_class() -> None:
    rows = [["a film", "good" if n < 1500 else "bad"] for n in range(3000)]
    assert detect(table("text which", *rows), "classify", {}).of["label"] == "which"


def test_a_long_number_or_digest_is_no_text() -> None:
    rows = [["f" * 64, str(10**70 + n), text, n % 2] for n, text in enumerate(LONG)]
    assert detect(table("a b c label", *rows), "classify", {}).of["text"] == "c"


def test_two_columns_that_could_be_it_are_named() -> None:
    rows = [[text, "ab"[n % 2], "xy"[n % 2]] for n, text in enumerate(LONG)]
    with pytest.raises(UserError) as caught:
        detect(table("c d e", *rows), "classify", {})
    assert str(caught.value) == (
        "x.tsv: label could be 'd' or 'e' (of columns c, d, e): name it with --label-column NAME"
    )
    rows = [[text, text[::-1], "xy"[n % 2]] for n, text in enumerate(LONG)]
    with pytest.raises(UserError, match=r"text could be 'c' or 'd' .*--text-column NAME"):
        detect(table("c d label", *rows), "classify", {})
    with pytest.raises(UserError, match=r"label could be 'class' or 'topic' .*--label-column"):
        found("text class topic", "classify")


@pytest.mark.parametrize(
    ("columns", "task", "told"),
    [
        ("text other", "classify", "the label among columns text, other: name it with --label-c"),
        ("label", "classify", "the text among column label: name it with --text-column NAME"),
        ("text", "tag", "tokens among column text: name it with --tokens-column NAME, or give "
         "--format conll"),
        ("tokens", "tag", "tags among column tokens: name it with --tags-column NAME"),
        ("id context", "answer", "the question among columns id, context: name it with --questio"),
        ("question", "answer", "the context among column question: name it with --context-column"),
        ("question context", "answer", "answers among columns question, context: name it with"),
        ("question label", "choose", "choices among columns question, label: name it with "
         "--choices-columns NAME or A,B,C"),
        ("question choices", "choose", "the label among columns question, choices"),
        ("choices label", "choose", "the question among columns choices, label"),
        ("text", "embed", "the text_pair among column text: name it with --text-pair-column"),
    ],
)  # fmt: skip
def test_a_column_that_is_missing_names_its_flag(columns: str, task: str, told: str) -> None:
    rows = [[f"{n}{column}" for column in columns.split()] for n in range(4)]
    rows = [["a b" if c == "text" else value for c, value in zip(columns.split(), row, strict=True)]
            for row in rows]  # fmt: skip
    if told.startswith("the text among"):
        rows = []
    with pytest.raises(UserError) as caught:
        detect(table(columns, *rows), task, {})
    assert str(caught.value).startswith(f"x.tsv: no column for {told}")


def test_a_named_column_that_is_not_there() -> None:
    with pytest.raises(UserError) as caught:
        found("sentence label", "classify", named={"text": "sentense"})
    assert str(caught.value) == (
        "--text-column sentense: x.tsv has no column 'sentense': did you mean 'sentence'?"
    )
    with pytest.raises(UserError, match=r"--choices-columns a,b: x.tsv has no column 'b', but "):
        found("a text", "choose", named={"choices": "a,b"})


def test_a_column_is_for_one_thing() -> None:
    with pytest.raises(UserError, match=r"^column 'text' is named for two things at once$"):
        found("text label", "classify", named={"text": "text", "label": "text"})
    with pytest.raises(UserError, match=r"^column 'x' is named for two things at once$"):
        found("q x l", "choose", named={"choices": "x,x"})


def test_rows_with_an_empty_field_are_counted() -> None:
    rows = [["a film", "good"], [" ", "good"], ["a film", ""], ["a book", None], ["fine", "bad"]]
    whole = table("text label", *rows)
    kept, skipped = usable(whole, detect(whole, "classify", {}))
    assert [row.where for row in kept] == ["x.tsv:2", "x.tsv:6"]
    assert skipped.line("x.tsv") == (
        "skipped 3 rows of x.tsv: 1 with an empty text (first: x.tsv:3), "
        "2 without a label (first: x.tsv:4)"
    )
    empty = table("text label", ["", "good"])
    with pytest.raises(UserError, match=r"^x.tsv: no row is left: skipped 1 row of x.tsv: 1 with"):
        usable(empty, detect(empty, "classify", {}))


def test_what_is_empty() -> None:
    several = table("text label", ["a", []], ["a", float("nan")])
    kept, skipped = usable(several, detect(several, "classify", {}))
    assert len(kept) == 1 and skipped.counts == {"without a label": 1}
    answers = table(
        "question context answers",
        ["q", "c", None],
        ["q", "c", ""],
        ["q", "c", {"text": [], "answer_start": []}],
    )
    kept, skipped = usable(answers, detect(answers, "answer", {}))
    assert len(kept) == 2 and skipped.counts == {"without answers": 1}
    tokens = table("tokens tags", [[], []], [["a"], ["O"]])
    assert usable(tokens, detect(tokens, "tag", {}))[1].counts == {"with empty tokens": 1}


def test_a_text_that_is_none() -> None:
    rows = table("text label", [5, "good"])
    with pytest.raises(UserError, match=r"^x.tsv:2: text = 5 must be text$"):
        usable(rows, detect(rows, "classify", {}))


def one(task: str, **values: Any) -> tuple[Row, Columns]:
    row = Row(values, "x.jsonl:3")
    return row, detect(Table("x.jsonl", tuple(values), [row], "jsonl"), task, {})


@pytest.mark.parametrize(
    ("tokens", "tags"),
    [
        (["Ada", "ran"], ["B-x", "O"]),
        ('["Ada", "ran"]', '["B-x", "O"]'),
        ("Ada ran", "B-x O"),
    ],
)
def test_tokens_are_lists_json_or_words(tokens: Any, tags: Any) -> None:
    read = read_tagged(*one("tag", tokens=tokens, tags=tags))
    assert read.text == "Ada ran" and read.tags == ["B-x", "O"] and read.lines == ()
    assert [read.text[begin:end] for begin, end in read.words] == ["Ada", "ran"]


def test_lists_in_pythons_notation_are_no_words() -> None:
    for tokens in ("['Ada', 'ran']", "['Ada' 'ran']", "[None]"):
        with pytest.raises(UserError, match=r"^x.jsonl:3: .* is in Python's notation: write it"):
            read_tagged(*one("tag", tokens=tokens, tags="B-x O"))
    assert read_tagged(*one("tag", tokens="[ ' ]", tags="O O O")).tags == ["O", "O", "O"]


def test_an_empty_token_of_conll_is_named_by_its_line() -> None:
    given = one("tag", tokens=["Ada", ""], tags=["O", "O"], lines=[3, 4])
    with pytest.raises(UserError, match=r"^x.jsonl:4: '' among the tokens must be text"):
        read_tagged(*given)


def test_tags_may_be_numbers_and_tokens_may_not() -> None:
    assert read_tagged(*one("tag", tokens=["a"], tags=[3])).tags == ["3"]
    with pytest.raises(UserError, match=r"^x.jsonl:3: 3 among the tokens must be text"):
        read_tagged(*one("tag", tokens=[3], tags=["O"]))
    with pytest.raises(UserError, match=r"^x.jsonl:3: tags = 7 must be a list"):
        read_tagged(*one("tag", tokens=["a"], tags=7))


def test_tokens_and_tags_of_different_length() -> None:
    with pytest.raises(UserError, match=r"^x.jsonl:3: 2 tokens and 1 tags: must be as many$"):
        read_tagged(*one("tag", tokens=["Ada", "ran"], tags=["O"]))


def test_entities_are_read_from_json_in_a_field() -> None:
    entities = [{"start": 0, "end": 3, "type": "x"}]
    read = read_tagged(*one("tag", text="Ada ran", entities=json.dumps(entities)))
    assert read.tags == ["B-x", "O"] and read.words == [(0, 3), (4, 7)]
    row = Row({"text": "Ada ran"}, "-:1")
    unlabelled = read_tagged(row, Columns("tag", {"text": "text"}))
    assert unlabelled.tags is None and unlabelled.words == [(0, 3), (4, 7)]


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["Ada"], "answer_start": [4]},
        {"text": "Ada", "answer_start": 4},
        [{"text": "Ada", "answer_start": 4}],
        '{"text": ["Ada"], "answer_start": [4]}',
    ],
)
def test_answers_in_their_forms(answers: Any) -> None:
    given = one("answer", question="Who?", context="Was Ada here", answers=answers)
    assert read_answers(*given) == [("Ada", 4)]


def test_an_answer_beside_its_start_and_none() -> None:
    values = {"question": "Who?", "context": "Was Ada here"}
    assert read_answers(*one("answer", **values, answer="Ada", answer_start="4")) == [("Ada", 4)]
    assert read_answers(*one("answer", **values, answer="Ada", answer_start="4.0")) == [("Ada", 4)]
    assert read_answers(*one("answer", **values, answer="", answer_start="")) == []
    assert read_answers(*one("answer", **values, answers=[])) == []


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ({"text": ["Ada"], "answer_start": [3]}, "'Ada' is not at character 3 of the context, "
         "where ' Ad' stands"),
        ({"text": ["Ada"], "answer_start": [-8]}, "at character -8 of the context, for it has 12"),
        ({"text": ["Ada"], "answer_start": [99]}, "at character 99 of the context, for it has 12"),
        ({"text": ["Ada"], "answer_start": [4, 5]}, "as many texts as answer_start"),
        ("Ada", "must hold as many texts as answer_start"),
        ({"text": ["Ada"], "answer_start": [4.0]}, "answer_start, integers"),
    ],
)  # fmt: skip
def test_an_answer_that_is_not_there(answers: Any, told: str) -> None:
    given = one("answer", question="Who?", context="Was Ada here", answers=answers)
    with pytest.raises(UserError, match=r"^x\.jsonl:3: ") as caught:
        read_answers(*given)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("choices", "label", "right"),
    [
        (["x", "y", "z"], 2, 2),
        (["x", "y", "z"], "2", 2),
        (["x", "y", "z"], "b", 1),
        (["x", "y", "z"], "x", 0),
        ('["x", "y"]', "1", 1),
        ({"text": ["x", "y"], "label": ["1", "2"]}, "2", 1),
        ([{"text": "x", "label": "A"}, {"text": "y", "label": "B"}], "B", 1),
        (["2", "3"], "3", 1),
        (["0", "2"], "0", 0),
    ],
)
def test_the_right_choice_in_its_forms(choices: Any, label: Any, right: int) -> None:
    assert read_choices(*one("choose", question="q", choices=choices, label=label))[1] == right


def test_numbered_choices_may_be_fewer() -> None:
    values = {"question": "q", "choice0": "x", "choice1": "y", "choice2": "", "label": "1"}
    assert read_choices(*one("choose", **values)) == (["x", "y"], 1)
    row = Row({"q": "q", "c": ["x", "y"]}, "-:1")
    assert read_choices(row, Columns("choose", {"question": "q"}, ("c",))) == (["x", "y"], None)


@pytest.mark.parametrize(
    ("choices", "label", "told"),
    [
        (["x"], 0, "a list of two or more"),
        ("x", 0, "a list of two or more"),
        (["x", " "], 0, "choice 1 is ' '"),
        (["x", "y"], 2, "label = 2 is none of 2 choices: it must be 0 to 1, A to B, or"),
        (["x", "y"], "C", "label = 'C' is none of 2 choices"),
        (["x", "y"], "zz", "label = 'zz' is none of 2 choices"),
        (["x", "y"], 0.5, "label = 0.5 is none of 2 choices"),
        (["x", "y"], -1, "label = -1 is none of 2 choices"),
        (["1", "2"], "1", "label = '1' may be choice 0 or choice 1"),
    ],
)
def test_a_choice_that_is_none(choices: Any, label: Any, told: str) -> None:
    with pytest.raises(UserError, match=r"^x\.jsonl:3: ") as caught:
        read_choices(*one("choose", question="q", choices=choices, label=label))
    assert told in str(caught.value)


DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data")
@pytest.mark.parametrize(
    ("name", "task", "count"),
    [
        ("sentiment-train.tsv", "classify", 2364),
        ("entities-train.conll", "tag", 800),
        ("questions-eval.json", "answer", 293),
    ],
)
def test_real_data_is_read_whole(name: str, task: str, count: int) -> None:
    whole = read_table(DATA / name, "train")
    columns = detect(whole, task, {})
    rows, skipped = usable(whole, columns)
    assert len(rows) == count and skipped.total == 0
    for row in rows:
        if task == "answer":
            assert read_answers(row, columns)
        elif task == "tag":
            assert read_tagged(row, columns).tags
        else:
            assert columns.value(row, "label") in ("positive", "negative")
