"""What stands beside a vocabulary, and what the text decides: each setting read, none ignored."""

import json
import unicodedata

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers
from transformers import AutoTokenizer, BertTokenizer

from fastbert.data.tokenize import WordPiece
from fastbert.data.tokenizer_files import SPECIAL_TOKENS
from fastbert.errors import UserError

WORDS = ["m\u00f6chte", "mochte", "M\u00f6chte", "er", "Er", "\u4e2d", "\u6587", "\u4e2d\u6587"]
TEXT = "Er M\u00f6chte er m\u00f6chte"


def write(folder, name, content):
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def vocabulary(folder, tokens=(*SPECIAL_TOKENS, *WORDS), **config):
    """A vocab.txt, its config beside it where there is one, and what it makes of a text."""
    path = folder / "vocab.txt"
    path.write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    if config:
        write(folder, "tokenizer_config.json", config)
    return path


def words(wordpiece, text=TEXT, **options):
    (ids,) = wordpiece.encode_batch([text], **options)
    return " ".join(wordpiece.tokens[i] for i in ids)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "er mochte er mochte"),
        ({"do_lower_case": False}, "Er M\u00f6chte er m\u00f6chte"),
        ({"strip_accents": False}, "er m\u00f6chte er m\u00f6chte"),
        ({"strip_accents": None}, "er mochte er mochte"),
        ({"do_lower_case": False, "strip_accents": True}, "Er [UNK] er mochte"),
        ({"do_basic_tokenize": False}, "Er M\u00f6chte er m\u00f6chte"),
        ({"never_split": ["Er"]}, "Er mochte er mochte"),
    ],
)
def test_settings_beside_a_vocabulary(tmp_path, config, expected):
    path = vocabulary(tmp_path, **config)
    assert words(WordPiece.load(path)) == words(WordPiece.load(tmp_path)) == expected


@pytest.mark.parametrize("split", [True, False])
def test_chinese_characters_are_parted_or_not(tmp_path, split):
    path = vocabulary(tmp_path, tokenize_chinese_chars=split)
    expected = "\u4e2d \u6587" if split else "\u4e2d\u6587"
    assert words(WordPiece.load(path), "\u4e2d\u6587") == expected


@pytest.mark.parametrize("split", [True, False])
def test_prefix_of_pieces(tmp_path, split):
    path = vocabulary(tmp_path, (*SPECIAL_TOKENS, "un", "@@do"), wordpieces_prefix="@@")
    wordpiece = WordPiece.load(path)
    assert words(wordpiece, "undo") == "un @@do"
    assert wordpiece.is_continuation.nonzero()[0].tolist() == [6]


def test_added_tokens_of_three_files(tmp_path):
    path = vocabulary(
        tmp_path,
        added_tokens_decoder={
            "13": {"content": "<a>", "lstrip": True, "special": True},
            "5": {"content": "m\u00f6chte", "normalized": False},
        },
        additional_special_tokens=["<b>"],
    )
    write(tmp_path, "added_tokens.json", {"<c>": 14})
    write(tmp_path, "special_tokens_map.json", {"mask_token": "[MASK]", "sep_token": "[SEP]"})
    wordpiece = WordPiece.load(path)
    assert wordpiece.tokens[13:] == ["<a>", "<c>", "<b>"]
    assert words(wordpiece, "er <A> <a><c> m\u00f6chte<b>", parse_special=True) == (
        "er [UNK] [UNK] [UNK] <a> <c> m\u00f6chte <b>"
    )
    assert {13, 15} < set(wordpiece.special_ids.tolist())


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("form", ["string", "object"])
def test_special_tokens_of_other_names(tmp_path, file, form):
    names = {"cls": "<s>", "unk": "<u>", "mask": "<m>", "pad": "<p>", "sep": "</s>"}
    path = vocabulary(tmp_path, (*names.values(), "er"))
    write(
        tmp_path,
        file,
        {f"{r}_token": t if form == "string" else {"content": t} for r, t in names.items()},
    )
    wordpiece = WordPiece.load(path)
    ids = (wordpiece.cls_id, wordpiece.unk_id, wordpiece.mask_id, wordpiece.pad_id)
    assert (*ids, wordpiece.sep_id) == (0, 1, 2, 3, 4)
    assert wordpiece.special_ids.tolist() == [0, 1, 2, 3, 4]
    assert words(wordpiece, "er ? <m>") == "er <u> <u> <u> <u>"
    assert words(wordpiece, "er ? <m>", parse_special=True) == "er <u> <m>"


@pytest.mark.parametrize(
    ("config", "asked", "message"),
    [
        ({"do_lower_case": False}, {"do_lower_case": True}, "do_lower_case = true, but .*false"),
        ({"do_lower_case": True}, {"do_lower_case": False}, "tokenizer_config.json says true"),
        ({"strip_accents": True}, {"strip_accents": False}, "strip_accents = false, but .*true"),
        ({"do_lower_case": "no"}, {}, r'do_lower_case = "no" must be true or false'),
        ({"strip_accents": "x" * 999}, {}, r'= "x{76}\.\.\. must be true or false'),
        ({"never_split": ["else"]}, {}, "never_split .*'else', which is no token"),
        ({"never_split": 3}, {}, "never_split = 3 must be a list of words"),
        ({"mask_token": "<m>"}, {}, "special token <m> is missing"),
        ({"mask_token": "[SEP]"}, {}, r"\[SEP\] has two roles"),
        ({"mask_token": 3}, {}, "must be a token"),
        ({"unk_token": None, "pad_token": {"content": 1}}, {}, "must be a token"),
        ({"added_tokens_decoder": {"99": {"content": "x"}}}, {}, "ids have gaps"),
        ({"added_tokens_decoder": {"5": {"content": "er"}}}, {}, "'er' has id 8, but 5 in a file"),
        ({"added_tokens_decoder": {"a": {"content": "x"}}}, {}, "must be the id of 'x'"),
        ({"added_tokens_decoder": [1]}, {}, "must hold one JSON object"),
        ({"additional_special_tokens": "x"}, {}, "must be a list of tokens"),
        ({"added_tokens_decoder": {"13": {"content": "x", "lstrip": 1}}}, {}, "true or false"),
        ({"additional_special_tokens": [5]}, {}, "must be a token"),
        ({"tokenizer_class": "BertJapaneseTokenizer"}, {}, "'BertJapaneseTokenizer' beside it"),
        ({"wordpieces_prefix": 1}, {}, "wordpieces_prefix = 1 must be a string"),
    ],
)
def test_contradictions_and_mistakes_name_both_sides(tmp_path, config, asked, message):
    path = vocabulary(tmp_path, **config)
    with pytest.raises(UserError, match=message) as caught:
        WordPiece.load(path, **asked)
    assert str(tmp_path) in str(caught.value)


def test_names_in_two_files_must_agree(tmp_path):
    path = vocabulary(tmp_path, mask_token="[MASK]", tokenizer_class="ElectraTokenizerFast")
    write(tmp_path, "special_tokens_map.json", {"mask_token": {"content": "er"}})
    with pytest.raises(UserError, match=r"mask_token = 'er', but tokenizer_config.json .*\[MASK\]"):
        WordPiece.load(path)


@pytest.mark.parametrize("content", ["[1]", "{", "\udcff", '{"a": 1e999}'])
def test_damaged_files_beside(tmp_path, content):
    path = vocabulary(tmp_path)
    (tmp_path / "special_tokens_map.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    if content == '{"a": 1e999}':
        assert words(WordPiece.load(path))
        return
    with pytest.raises(UserError, match="special_tokens_map"):
        WordPiece.load(path)


def test_a_flag_says_it_where_no_file_does(tmp_path):
    path = vocabulary(tmp_path)
    assert words(WordPiece.load(path, do_lower_case=False)) == TEXT
    assert words(WordPiece.load(path, strip_accents=False)) == TEXT.lower()
    (note,) = WordPiece.load(path).notes
    assert "2 of its 13 tokens have capitals" in note
    assert not WordPiece.load(path, do_lower_case=True).notes


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("accents", [None, True, False])
@pytest.mark.parametrize("chinese", [True, False])
def test_folders_that_transformers_saves(tmp_path, lower, accents, chinese):
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *WORDS))}
    theirs = BertTokenizer(
        vocab, do_lower_case=lower, strip_accents=accents, tokenize_chinese_chars=chinese
    )
    theirs.save_pretrained(tmp_path)
    text = f"{TEXT} \u4e2d\u6587"
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert WordPiece.load(tmp_path).encode_batch([text]) == [ids]
    (tmp_path / "tokenizer.json").unlink()
    vocabulary(tmp_path)
    assert WordPiece.load(tmp_path).encode_batch([text]) == [ids]


def test_config_has_its_way_over_tokenizer_json(tmp_path):
    WordPiece.load(vocabulary(tmp_path), strip_accents=False).save(tmp_path)
    config = {"strip_accents": True, "tokenizer_class": "BertTokenizer", "do_lower_case": True}
    write(tmp_path, "tokenizer_config.json", config)
    wordpiece = WordPiece.load(tmp_path)
    assert words(wordpiece) == "er mochte er mochte"
    assert "strip_accents = true is followed" in wordpiece.notes[0]
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs([TEXT], add_special_tokens=False)["input_ids"]
    assert wordpiece.encode_batch([TEXT]) == ids
    with pytest.raises(UserError, match="strip_accents = false, but its normalizer says true"):
        WordPiece.load(tmp_path, strip_accents=False)


def test_config_cannot_change_another_normalizer(tmp_path):
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate(SPECIAL_TOKENS)}))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", {"do_lower_case": False})
    with pytest.raises(UserError, match=r"do_lower_case = false, but the normalizer of .* true"):
        WordPiece.load(tmp_path)


def test_special_tokens_that_a_user_added_are_tokens_in_a_corpus(tmp_path):
    path = vocabulary(tmp_path, additional_special_tokens=["[USER]", "er"], bos_token="[BOS]")
    wordpiece = WordPiece.load(path)
    text = "[USER] er [MASK] [BOS]"
    assert words(wordpiece, text) == "[USER] er [UNK] [UNK] [UNK] [BOS]"
    assert words(wordpiece, text, parse_special=True) == "[USER] er [MASK] [BOS]"
    assert wordpiece.special_ids.tolist() == [0, 1, 2, 3, 4, 8, 13, 14]


def test_a_class_that_stands_in_config_json(tmp_path):
    path = vocabulary(tmp_path, do_lower_case=False)
    write(tmp_path, "config.json", {"tokenizer_class": "BertJapaneseTokenizer"})
    with pytest.raises(UserError, match="BertJapaneseTokenizer"):
        WordPiece.load(path)
    write(tmp_path, "config.json", {"tokenizer_class": "BertTokenizer"})
    assert WordPiece.load(path).vocab_size == 13
    vocabulary(tmp_path, word_tokenizer_type="mecab")
    with pytest.raises(UserError, match="word_tokenizer_type = \"mecab\" must be 'basic'"):
        WordPiece.load(path)


def test_normalizer_of_patterns_cannot_be_asked_for_accents(tmp_path):
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate(SPECIAL_TOKENS)}))
    tokenizer.normalizer = normalizers.Replace(Regex(r"\p{M}"), "")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert WordPiece.load(tmp_path).vocab_size == 5
    with pytest.raises(UserError, match="otherwise, by patterns of its own"):
        WordPiece.load(tmp_path, strip_accents=True)


@pytest.mark.parametrize(
    "token", ["\u2028", "\u00a0", "\r", "x\r", "\u3000", "\x85", "\x0b", "\x1c", " "]
)
def test_only_an_empty_line_is_blank(tmp_path, token):
    wordpiece = WordPiece.load(vocabulary(tmp_path, (*SPECIAL_TOKENS, token, "er")))
    assert wordpiece.tokens == [*SPECIAL_TOKENS, token, "er"]
    wordpiece.save(tmp_path / "saved")
    assert WordPiece.load(tmp_path / "saved").digest == wordpiece.digest
    if "\r" not in token:  # which other programs would take for a line's end: no vocab.txt
        (tmp_path / "saved" / "tokenizer.json").unlink()
        assert WordPiece.load(tmp_path / "saved").tokens == wordpiece.tokens


def test_vocabulary_with_line_ends_of_windows_and_a_mark(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join((*SPECIAL_TOKENS, "er")).encode())
    assert WordPiece.load(path).tokens == [*SPECIAL_TOKENS, "er"]


def test_digest_covers_all_that_changes_ids(tmp_path):
    path = vocabulary(tmp_path)
    state = json.loads(Tokenizer.from_str(json.dumps(WordPiece.load(path)._state)).to_str())
    digests = {WordPiece.load(path).digest}
    assert {WordPiece.load(path, do_lower_case=True).digest} == digests
    changes = [
        ("model", "max_input_chars_per_word", 50),
        ("model", "continuing_subword_prefix", "@@"),
        ("normalizer", "lowercase", False),
        ("normalizer", "strip_accents", False),
        ("normalizer", "handle_chinese_chars", False),
        ("normalizer", "clean_text", False),
        ("pre_tokenizer", "type", "Whitespace"),
    ]
    added = {"single_word": True, "lstrip": False, "rstrip": False, "normalized": False}
    changed = [{**state, part: {**state[part], name: value}} for part, name, value in changes]
    changed += [
        {
            **state,
            "added_tokens": [
                *state["added_tokens"],
                {"id": 8, "content": "er", "special": special, **added},
            ],
        }
        for special in (True, False)
    ]
    for number, content in enumerate(changed, start=2):
        write(tmp_path, "tokenizer.json", content)
        digests.add(WordPiece.load(tmp_path / "tokenizer.json").digest)
        assert len(digests) == number
    tokens = [*state["model"]["vocab"], "zzz"]
    joined = {"id": 13, "content": "zzz", "special": False, **added}
    for vocab in (tokens, tokens[:-1]):  # the model's own word, or none of its
        model = {**state["model"], "vocab": {token: i for i, token in enumerate(vocab)}}
        content = {**state, "model": model, "added_tokens": [*state["added_tokens"], joined]}
        write(tmp_path, "tokenizer.json", content)
        digests.add(WordPiece.load(tmp_path / "tokenizer.json").digest)
    assert len(digests) == len(changed) + 3
    write(tmp_path, "tokenizer.json", {**state, "truncation": None, "post_processor": None})
    assert WordPiece.load(tmp_path).digest in digests  # set by us, whatever the file says


# Scripts


MARKS = {
    "Thai": "\u0e44\u0e21\u0e48\u0e21\u0e35\u0e02\u0e49\u0e2d\u0e21\u0e39\u0e25",
    "Devanagari": "\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902",
    "Arabic": "\u0645\u064f\u062d\u064e\u0645\u0651\u064e\u062f \u0622\u0628",
    "Hebrew": "\u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd",
    "Kana": "\u304c\u304e\u30d1\u30d4",
    "Hangul": "\ud55c\uad6d\uc5b4",
    "Bengali": "\u09ac\u09be\u0982\u09b2\u09be",
    "Burmese": "\u1019\u103c\u1014\u103a\u1019\u102c\u1005\u102c",
    "Khmer": "\u1797\u17b6\u179f\u17b6\u1781\u17d2\u1798\u17c2\u179a",
    "Lao": "\u0e9e\u0eb2\u0eaa\u0eb2\u0ea5\u0eb2\u0ea7",
}


@pytest.mark.parametrize("text", MARKS.values(), ids=MARKS)
def test_no_letter_of_a_script_is_lost(text):
    wordpiece = WordPiece.train([text] * 20, 200)
    (ids,) = wordpiece.encode_batch([text])
    assert wordpiece.unk_id not in ids
    spelled = "".join(wordpiece.tokens[i].removeprefix("##") for i in ids)
    assert spelled == unicodedata.normalize("NFC", text.replace(" ", ""))


def test_accents_are_still_taken_off_where_they_are_accents():
    text = " ".join((*MARKS.values(), "M\u00f6chte", "\u0386\u03bb\u03c6\u03b1", "\u0401\u0436"))
    wordpiece = WordPiece.train([text] * 20, 400)
    latin, greek, cyrillic = ("m\u00f6chte", "\u03ac\u03bb\u03c6\u03b1", "\u0451\u0436")
    a = wordpiece.encode_batch([latin, greek, cyrillic, "1\ufe0f"])
    b = wordpiece.encode_batch(["mochte", "\u03b1\u03bb\u03c6\u03b1", "\u0435\u0436", "1"])
    assert a == b
    assert any("accents are taken off Latin" in note for note in wordpiece.notes)


def test_a_text_without_such_marks_gets_berts_own_normalizer():
    wordpiece = WordPiece.train(["Er m\u00f6chte f\u00fcr 2\ufe0f\u20e3 Caf\u00e9s"] * 5, 100)
    assert wordpiece._state["normalizer"]["type"] == "BertNormalizer"
    assert not wordpiece.notes


def test_marks_lost_are_counted():
    rare = ["plain words " * 20_000, MARKS["Thai"]]
    (note,) = WordPiece.train(rare, 100).notes
    assert note.startswith("4 marks (0.002%")
    (note, *_) = WordPiece.train([MARKS["Thai"]], 100, strip_accents=True).notes
    assert note.startswith("4 marks (36")


PHRASES = [
    # "Thailand", "people", "language", "no data", "Bangkok", "write", in phrases without spaces
    "\u0e1b\u0e23\u0e30\u0e40\u0e17\u0e28\u0e44\u0e17\u0e22\u0e44\u0e21\u0e48\u0e21\u0e35\u0e02\u0e49\u0e2d\u0e21\u0e39\u0e25",
    "\u0e1b\u0e23\u0e30\u0e0a\u0e32\u0e0a\u0e19\u0e1b\u0e23\u0e30\u0e40\u0e17\u0e28\u0e44\u0e17\u0e22",
    "\u0e01\u0e23\u0e38\u0e07\u0e40\u0e17\u0e1e\u0e21\u0e35\u0e1b\u0e23\u0e30\u0e0a\u0e32\u0e0a\u0e19",
    "\u0e02\u0e49\u0e2d\u0e21\u0e39\u0e25\u0e1b\u0e23\u0e30\u0e0a\u0e32\u0e0a\u0e19\u0e44\u0e21\u0e48\u0e21\u0e35\u0e20\u0e32\u0e29\u0e32",
]


def test_words_of_a_script_without_spaces_are_learnt_as_words():
    wordpiece = WordPiece.train(PHRASES * 20, 300)
    people = "\u0e1b\u0e23\u0e30\u0e0a\u0e32\u0e0a\u0e19"
    assert {people, f"##{people}"} <= set(wordpiece.tokens)
    assert not set(PHRASES) & set(wordpiece.tokens)
    assert wordpiece.vocab_size <= 300
    for length in (10, 100, 1_000):
        text = "".join(PHRASES * length)[: 40 * length]
        (ids,) = wordpiece.encode_batch([text])
        assert wordpiece.unk_id not in ids
        assert len(ids) < len(text) / 2.5
        assert wordpiece.unknown_characters([text]) == 0


def test_unknown_characters_are_counted():
    wordpiece = WordPiece.train(["the words of text"] * 5, 100)
    assert wordpiece.unknown_characters(["the \u0416\u0416\u0416 of " + "z" * 7, "text"]) == 10
