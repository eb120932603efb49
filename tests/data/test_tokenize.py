"""WordPiece: training and encoding, beside what BERT's own tokenizer does."""

import json
import os
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models

from fastbert.data.tokenize import WordPiece
from fastbert.data.tokenizer_files import SPECIAL_TOKENS
from fastbert.errors import UserError

TEXT = [
    "The unbelievable cafe, the caf\u00e9 and the na\u00efve believers of Z\u00fcrich.",
    "\u4e2d\u6587\u5b57 and \u65e5\u672c\u8a9e mixed with English.",
    "Believing is seeing; seeing is believing! Unseen, unbelieved.",
    "It's 1,234.5 \u20ac -- or (perhaps) 99%.",
] * 3
PROBES = [
    *TEXT,
    "",
    "UPPER lower \u00c9\u00c8 \u0130stanbul \ufb01 \u01c5",
    "tabs\tand\u00a0spaces\u200b \x01 control",
    "\U0001f600 emoji \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "x" * 101 + " " + "the" * 33,
    "[MASK] and [SEP] inside [CLS]",
]


def vocabulary(tmp_path, tokens, name="vocab.txt"):
    path = tmp_path / name
    path.write_text("".join(f"{token}\n" for token in tokens))
    return path


def test_layout_and_attributes():
    wordpiece = WordPiece.train(TEXT, 300)
    assert wordpiece.tokens[:5] == list(SPECIAL_TOKENS)
    ids = (wordpiece.pad_id, wordpiece.unk_id, wordpiece.cls_id, wordpiece.sep_id)
    assert (*ids, wordpiece.mask_id) == (0, 1, 2, 3, 4)
    assert wordpiece.vocab_size == len(wordpiece.tokens) <= 300
    assert wordpiece.special_ids.tolist() == [0, 1, 2, 3, 4]
    marked = [wordpiece.tokens[i] for i in wordpiece.is_continuation.nonzero()[0]]
    assert marked == [token for token in wordpiece.tokens if token.startswith("##")]
    assert wordpiece.ids.vocab_size == wordpiece.vocab_size


def test_size_is_reached_and_kept():
    words = [f"{a}{b}{c}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwx"]
    assert WordPiece.train([" ".join(words)] * 3, 200).vocab_size == 200


def test_training_gives_the_same_vocabulary_in_every_process():
    code = (
        "from fastbert.data.tokenize import WordPiece; from pydoc_data.topics import topics;"
        "print(WordPiece.train(sorted(topics.values()), 2000).digest)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**environment, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in range(3)
    }
    assert len(found) == 1


def test_rare_characters_give_way_in_a_small_vocabulary():
    text = ["common words here " * 50 + "".join(chr(0x4E00 + n) for n in range(500))]
    wordpiece = WordPiece.train(text, 100)
    assert wordpiece.vocab_size <= 100
    assert wordpiece.unk_id not in wordpiece.encode_batch(["common here"])[0]


def test_encoding():
    wordpiece = WordPiece.train(TEXT, 300)
    encoded = wordpiece.encode_batch(["", "  ", "believe", "[SEP]", "\u2603"])
    assert encoded[:2] == [[], []]
    assert not set(encoded[2]) & set(wordpiece.special_ids.tolist())
    assert wordpiece.sep_id not in encoded[3]
    assert encoded[4] == [wordpiece.unk_id]
    assert wordpiece.encode_batch(["[SEP]"], parse_special=True) == [[wordpiece.sep_id]]
    assert wordpiece.decode(encoded[2]) == "believe"


@pytest.mark.parametrize("do_lower_case", [True, False])
def test_transformers_reads_it(tmp_path, monkeypatch, do_lower_case):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    wordpiece = WordPiece.train(TEXT, 300, do_lower_case)
    wordpiece.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.is_fast
    assert theirs.model_max_length == 512
    assert len(theirs) == wordpiece.vocab_size
    assert theirs.mask_token_id == wordpiece.mask_id
    assert theirs.convert_ids_to_tokens(range(len(theirs))) == wordpiece.tokens
    ours = wordpiece.encode_batch(PROBES, parse_special=True)
    assert theirs(PROBES, add_special_tokens=False)["input_ids"] == ours
    pair = theirs("the cafe", "seeing")
    a, b = wordpiece.encode_batch(["the cafe", "seeing"])
    cls, sep = wordpiece.cls_id, wordpiece.sep_id
    assert pair["input_ids"] == [cls, *a, sep, *b, sep]
    assert pair["token_type_ids"] == [0] * (len(a) + 2) + [1] * (len(b) + 1)


@pytest.mark.parametrize("do_lower_case", [True, False])
@pytest.mark.parametrize("name", ["", "vocab.txt", "tokenizer.json"])
def test_load_gives_back_what_was_saved(tmp_path, name, do_lower_case):
    wordpiece = WordPiece.train(TEXT, 300, do_lower_case)
    wordpiece.save(tmp_path)
    loaded = WordPiece.load(tmp_path / name if name else tmp_path)
    assert loaded.digest == wordpiece.digest
    assert loaded.do_lower_case is do_lower_case
    assert loaded.encode_batch(PROBES) == wordpiece.encode_batch(PROBES)


def test_digest_depends_on_case_and_tokens(tmp_path):
    path = vocabulary(tmp_path, [*SPECIAL_TOKENS, "a"])
    lower, cased = WordPiece.load(path, True), WordPiece.load(path, False)
    other = WordPiece.load(vocabulary(tmp_path, [*SPECIAL_TOKENS, "b"]), True)
    assert len({lower.digest, cased.digest, other.digest}) == 3


def test_google_layout_with_unused_tokens(tmp_path):
    tokens = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "##s"]
    wordpiece = WordPiece.load(vocabulary(tmp_path, tokens))
    assert wordpiece.special_ids.tolist() == [0, 2, 3, 4, 5]
    assert wordpiece.encode_batch(["Hellos"]) == [[6, 7]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n", r"vocab\.txt: the special token \[MASK\] is missing"),
        ("[UNK]\n[CLS]\n[SEP]\n[MASK]\n", r"\[PAD\] is missing"),
        ("[PAD]\na\na\n", r"vocab\.txt:3: 'a' is already on line 2"),
        ("[PAD]\n\na\n", r"vocab\.txt:2: is blank"),
    ],
)
def test_bad_vocabulary(tmp_path, content, message):
    (tmp_path / "vocab.txt").write_text(content)
    with pytest.raises(UserError, match=message):
        WordPiece.load(tmp_path / "vocab.txt")


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match=r"vocab\.txt: cannot be read"):
        WordPiece.load(tmp_path / "vocab.txt")
    with pytest.raises(UserError, match=r"no\.json: cannot be read"):
        WordPiece.load(tmp_path / "no.json")
    with pytest.raises(UserError, match="holds neither"):
        WordPiece.load(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not UTF-8"):
        WordPiece.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not a tokenizer"),
        ("{}", "is not a tokenizer"),
        ("[1]", "is not a tokenizer"),
        ('{"model": {"type": "BPE"}}', "its model is BPE; BERT needs WordPiece"),
        ('{"model": {"type": "WordPiece", "vocab": 3}}', "is not a valid tokenizer"),
        (json.dumps({"model": None}), "is not a tokenizer"),
    ],
)
def test_bad_tokenizer_json(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=message):
        WordPiece.load(tmp_path)


def test_tokenizer_json_without_its_tokens(tmp_path):
    path = str(tmp_path / "tokenizer.json")
    Tokenizer(models.WordPiece({}, unk_token="[UNK]")).save(path)
    with pytest.raises(UserError, match="empty"):
        WordPiece.load(path)
    Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")).save(path)
    with pytest.raises(UserError, match=r"\[PAD\] is missing"):
        WordPiece.load(path)
    vocab = {token: 2 * index for index, token in enumerate(SPECIAL_TOKENS)}
    Tokenizer(models.WordPiece(vocab, unk_token="[UNK]")).save(path)
    with pytest.raises(UserError, match="gaps"):
        WordPiece.load(path)


def test_case_must_not_contradict_the_file(tmp_path):
    WordPiece.train(TEXT, 300, do_lower_case=False).save(tmp_path)
    with pytest.raises(UserError, match="do_lower_case = true, but its normalizer says false"):
        WordPiece.load(tmp_path, True)


def test_padding_and_truncation_of_a_file_are_ignored(tmp_path):
    wordpiece = WordPiece.train(TEXT, 300)
    wordpiece.save(tmp_path)
    raw = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    raw.enable_truncation(4)
    raw.enable_padding(length=64)
    raw.save(str(tmp_path / "tokenizer.json"))
    assert WordPiece.load(tmp_path).encode_batch(TEXT) == wordpiece.encode_batch(TEXT)


def test_nothing_to_train_on():
    with pytest.raises(UserError, match="holds no word"):
        WordPiece.train([" ", ""], 100)
    with pytest.raises(UserError, match="vocab_size = 5"):
        WordPiece.train(["word"], 5)
