"""Whole words for a vocabulary that has their pieces: each one token, all other ids as before."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from fastbert.data.tokenize import WordPiece
from fastbert.data.tokenizer_files import SPECIAL_TOKENS
from fastbert.data.tokenizer_training import count_chunks
from fastbert.data.vocabulary import with_words_of_file, with_words_of_text
from fastbert.errors import UserError
from fastbert.hf.export import check_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
BASE = [*SPECIAL_TOKENS, *LETTERS, *(f"##{c}" for c in LETTERS), "cell", "##ular", "the", "-", "."]
OLD = "The cells, the cell-like and a word: caf\u00e9 \u4e2d."


def wordpiece(folder, tokens=BASE, **config):
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return WordPiece.load(folder)


def auto(folder, tokenizer):
    """What transformers makes of it."""
    tokenizer.save(folder)
    check_tokenizer(tokenizer, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    found = AutoTokenizer.from_pretrained(folder)
    assert WordPiece.load(folder).digest == tokenizer.digest
    return lambda text: found(text, add_special_tokens=False)["input_ids"]


def test_words_of_a_file_become_one_token_each(tmp_path):
    base = wordpiece(tmp_path)
    before = base.encode_batch([OLD])[0]
    path = tmp_path / "words.txt"
    path.write_text(
        "Apoptosis\n\n  caf\u00e9s \ncell\napoptosis\nTHE\n[MASK]\nmitosis\r\n", "utf-8"
    )
    extended, note = with_words_of_file(base, str(path))
    assert note == (
        f"3 words added, 'apoptosis', 'cafes', 'mitosis' of {path} "
        "(4 skipped: in the vocabulary, or there twice)"
    )
    V = base.vocab_size
    assert extended.tokens == [*base.tokens, "apoptosis", "cafes", "mitosis"]
    encode = auto(tmp_path, extended)
    for text, ids in (
        ("apoptosis", [V]),
        ("APOPTOSIS of Caf\u00e9s", [V, *base.encode_batch(["of"])[0], V + 1]),
        ("mitosis.", [V + 2, base.tokens.index(".")]),
        (OLD, before),
    ):
        assert encode(text) == extended.encode_batch([text])[0] == ids
    assert (tmp_path / "vocab.txt").read_text().splitlines() == extended.tokens
    assert base.pieces(["apoptosis"]) == base.encode_batch(["apoptosis"])


BAD_WORDS = {
    "two words\n": ":1: 'two words' holds spaces: give a word a line",
    "one\n\n\u0301\n": ":3: '\u0301' is empty once it is normalised: leave it out",
    "stem-cell\n": ":1: 'stem-cell' is parted into 'stem', '-', 'cell', which no token can span",
    "\u4e2d\u6587\n": ":1: '\u4e2d\u6587' is parted into '\u4e2d', '\u6587'",
    "x" * 101: " has more than 100 characters",
    "cell\nThe\n\n": ": holds no word that is new to the vocabulary (2 skipped",
    "": ": holds no word that is new to the vocabulary",
    b"\xff\xfea\0": ": not a list of words: it looks like UTF-16",
    b"a\n\xff\n": ": not a list of words: it must be text in UTF-8, which byte 2 is not",
}


@pytest.mark.parametrize(("content", "message"), BAD_WORDS.items(), ids=range(len(BAD_WORDS)))
def test_a_bad_file_of_words_is_one_line(tmp_path, content, message):
    path = tmp_path / "words.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as raised:
        with_words_of_file(wordpiece(tmp_path), str(path))
    assert str(raised.value).startswith(f"{path}:") and message in str(raised.value)


def test_words_that_save_most_are_learnt(tmp_path):
    base = wordpiece(tmp_path)
    text = ["Ribosome the cellular, RIBOSOME: cellular-cellular."] * 3 + ["axon nova", "the \u00fe"]
    # ribosome 6 x 7 = 42, cellular 9 x 1 = 9, then axon and nova 3 each, by the alphabet.
    for count, words in ((1, ["ribosome"]), (3, ["ribosome", "cellular", "axon"])):
        extended, note = with_words_of_text(base, count_chunks(text), count)
        assert extended.tokens[base.vocab_size :] == words
        tokens = [sum(map(len, tokenizer.encode_batch(text))) for tokenizer in (extended, base)]
        change = f"{tokens[0] / tokens[1] - 1:+.1%}"
        assert note.endswith(
            f"; the text has {tokens[0]} tokens, {tokens[1]} without them ({change})"
        )
    extended, note = with_words_of_text(base, count_chunks(text), 9)
    assert note.startswith("4 words added, 'ribosome', 'cellular', 'axon', 'nova' of 9 asked for:")
    assert auto(tmp_path, extended)("Nova ribosome") == [base.vocab_size + 3, base.vocab_size]
    with pytest.raises(UserError, match="every word of the data is one token already"):
        with_words_of_text(extended, count_chunks(text), 9)


def test_capitals_stay_where_the_tokenizer_keeps_them(tmp_path):
    base = wordpiece(tmp_path, [*BASE, *LETTERS.upper()], do_lower_case=False)
    text = ["Ribosome ribosome Ribosome"]
    extended, _ = with_words_of_text(base, count_chunks(text), 1)
    assert extended.tokens[-1] == "Ribosome"
    path = tmp_path / "words.txt"
    path.write_text("DNAse\n")
    assert with_words_of_file(base, str(path))[0].tokens[-1] == "DNAse"


def test_tokens_behind_the_vocabulary_are_refused(tmp_path):
    wordpiece(tmp_path).save(tmp_path)
    raw = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    raw.add_tokens([AddedToken("<user>")])
    raw.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="has 1 added tokens, '<user>' first, behind its WordPiece"):
        with_words_of_text(WordPiece.load(tmp_path), {"ribosome": 1}, 1)


def test_a_word_that_begins_with_an_added_token_is_refused(tmp_path):
    wordpiece(tmp_path).save(tmp_path)
    raw = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    raw.add_tokens([AddedToken("cell", normalized=True)])
    raw.save(str(tmp_path / "tokenizer.json"))
    path = tmp_path / "words.txt"
    path.write_text("axon\ncellulose\n")
    with pytest.raises(UserError, match=r":2: 'cellulose' does not become one token: an added"):
        with_words_of_file(WordPiece.load(tmp_path), str(path))
