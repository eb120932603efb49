"""What was trained is what AutoTokenizer gives: many tokenizers over odd strings in many scripts.

Runs with whatever transformers is installed; `make test-transformers-4` runs it with version 4.
"""

import itertools
import json
import random
import unicodedata

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from fastbert.data.tokenize import WordPiece
from fastbert.data.tokenizer_files import ROLES, SPECIAL_TOKENS

SCRIPTS = {
    "Latin": "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    "\u00e9\u00c8\u00f1\u00df\u0130\u0131\ufb01\u01c5\u1ec7\u00f8\u0142\u1e9e",
    "Greek": "\u03b1\u03b2\u03ac\u03a3\u03c3\u03c2\u039f\u0394\u038c\u1f84\u0390\u0391",
    "Cyrillic": "\u0430\u0431\u0439\u0451\u0419\u0401\u044f\u042f\u0491\u0407",
    "Arabic": "\u0627\u0644\u0633\u0644\u0627\u0645\u064e\u064f\u0650\u0651\u0622\u0640\u067e"
    "\u0660\u0661\u061f\u060c\u06d4\ufefb",
    "Hebrew": "\u05e9\u05c1\u05dc\u05d5\u05b9\u05dd\u05be\u05d0",
    "Devanagari": "\u0939\u093f\u0928\u094d\u0926\u0940\u092e\u0947\u0902\u0964\u0967\u095b",
    "Bengali": "\u09ac\u09be\u0982\u09b2\u09be\u09df\u09cb",
    "Thai": "\u0e44\u0e21\u0e48\u0e21\u0e35\u0e02\u0e49\u0e2d\u0e21\u0e39\u0e25\u0e33\u0e46",
    "Khmer": "\u1797\u17b6\u179f\u17b6\u1781\u17d2\u1798\u17c2\u179a\u17d4",
    "Georgian": "\u10e5\u10d0\u10e0\u10d7\u1c90\u1cb8",
    "Hangul": "\ud55c\uad6d\uc5b4\u1112\u1161\u11ab\u3131",
    "Han": "\u4e2d\u6587\u5b57\U00020000\u3402\uf900\u3007\u3001\u3002",
    "Kana": "\u304b\u304c\u30ac\u30d1\u30fc\uff76\uff9e\u3063",
    "Ethiopic": "\u12a0\u121b\u122d\u129b\u1362",
}
ODD = (
    *("\u0301", "\u0308", "\u20e3", "\ufe0f", "\u200d", "\u200b", "\u00ad", "\ufeff", "\u202e"),
    *("\t", "\u00a0", "\u2028", "\u3000", "\x00", "\x01", "\x7f", "\x85", "\ufffd", "\ue000"),
    *("\U0001f600", "\U0001f468\u200d\U0001f469", "\U0001fae8", "1", "42", "\u00bd", "\u0664"),
    *(".", ",", "'", "\u2019", "-", "\u2014", "_", "##", "#", "$", "`", "^", "<", ">", "\u00ab"),
    *("[MASK]", "[SEP]", "[UNK]", "<mask>", "<user>", "@user", "[unused1]", " [MASK] ."),
)


def odd_strings(count: int = 500, seed: int = 7) -> list[str]:
    """Words of one or two scripts with odd characters between and inside them."""
    draw = random.Random(seed)
    names = list(SCRIPTS)
    texts = [
        "",
        " ",
        "er m\u00f6chte f\u00fcr die",
        "\u039f\u0394\u039f\u03a3 x",
        "A" * 101,
        "b" * 250,
    ]
    texts += ["\u0e44\u0e21\u0e48\u0e21\u0e35\u0e02\u0e49\u0e2d\u0e21\u0e39\u0e25" * 12]
    while len(texts) < count:
        scripts = draw.choices(names, k=draw.choice((1, 1, 2)))
        parts = []
        for _ in range(draw.randint(1, 8)):
            letters = draw.choices(SCRIPTS[draw.choice(scripts)], k=draw.randint(1, 9))
            if draw.random() < 0.4:
                letters.insert(draw.randint(0, len(letters)), draw.choice(ODD))
            parts.append("".join(letters))
            parts.append(draw.choice((" ", " ", "", *ODD)))
        texts.append("".join(parts))
    return texts


TEXTS = odd_strings()


def vocabulary(specials: tuple[str, ...], prefix: str) -> dict[str, int]:
    """The special tokens, most characters in every form, and some longer pieces."""
    text = "".join(TEXTS)
    forms = {text, text.lower(), *(unicodedata.normalize(form, text) for form in ("NFD", "NFKC"))}
    chars = sorted({char for form in forms for char in form if not char.isspace()})
    kept = [char for index, char in enumerate(chars) if index % 7]
    pieces = [
        "m\u00f6chte",
        "mochte",
        "fur",
        "f\u00fcr",
        "er",
        "die",
        "user",
        "\u0120er",
        "\u2581er",
    ]
    inner = [prefix + piece for piece in (*kept, "chte", "ab", "cd", "42")] if prefix else []
    tokens = dict.fromkeys((*specials, "[unused1]", "@user", *kept, *pieces, *inner))
    return {token: index for index, token in enumerate(tokens)}


def bert_normalizer(lower: bool, accents: bool | None, chinese: bool = True, clean: bool = True):
    return normalizers.BertNormalizer(
        clean_text=clean, handle_chinese_chars=chinese, strip_accents=accents, lowercase=lower
    )


NORMALIZERS = {
    **{
        f"bert-{lower:d}{accents}{chinese:d}": bert_normalizer(lower, accents, chinese)
        for lower, accents, chinese in itertools.product(
            (True, False), (None, True, False), (True, False)
        )
    },
    "dirty": bert_normalizer(True, None, clean=False),
    "none": None,
    "nfkc-lower": normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
    "strip": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    "replace": normalizers.Sequence(
        [normalizers.Replace(Regex(r"\p{Nd}+"), "1"), bert_normalizer(True, False)]
    ),
}
PRE_TOKENIZERS = {
    "bert": pre_tokenizers.BertPreTokenizer(),
    "whitespace": pre_tokenizers.Whitespace(),
    "split": pre_tokenizers.WhitespaceSplit(),
    "digits": pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Digits(individual_digits=True)]
    ),
    "bytes": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "bytes-bare": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "metaspace": pre_tokenizers.Metaspace(),
    "scripts": pre_tokenizers.Sequence(
        [pre_tokenizers.UnicodeScripts(), pre_tokenizers.BertPreTokenizer()]
    ),
    "punctuation": pre_tokenizers.Punctuation(),
}
SPECIALS = {
    "bert": SPECIAL_TOKENS,
    "roberta": ("<pad>", "<unk>", "<s>", "</s>", "<mask>"),
    "late": ("[UNK]", "[PAD]", "[MASK]", "[SEP]", "[CLS]"),
}
ADDED = {
    "none": (),
    "user": (AddedToken("<user>"), AddedToken("@user", single_word=True, normalized=True)),
    "flags": (
        AddedToken("m\u00f6chte", normalized=True),
        AddedToken("<user>", lstrip=True, rstrip=True, special=True),
        AddedToken("42", normalized=False),
    ),
}


def folder_of(tmp_path, normalizer, pre_tokenizer, specials, added, longest, prefix, processor):
    """A folder as a user may bring it: tokenizer.json, and the special tokens' names."""
    names = SPECIALS[specials]
    roles = dict(zip(ROLES, names, strict=True))
    if specials == "late":
        roles = {name[1:-1].lower(): name for name in names}
    tokenizer = Tokenizer(
        models.WordPiece(
            vocabulary(names, prefix),
            unk_token=roles["unk"],
            continuing_subword_prefix=prefix,
            max_input_chars_per_word=longest,
        )
    )
    if NORMALIZERS[normalizer] is not None:
        tokenizer.normalizer = NORMALIZERS[normalizer]
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre_tokenizer]
    mask = AddedToken(roles["mask"], lstrip=added == "flags", special=True, normalized=False)
    tokenizer.add_special_tokens([*(n for n in names if n != roles["mask"]), mask])
    tokenizer.add_tokens(list(ADDED[added]))
    if processor:
        sep, cls = ((roles[role], tokenizer.token_to_id(roles[role])) for role in ("sep", "cls"))
        tokenizer.post_processor = processors.BertProcessing(sep, cls)
    folder = tmp_path / "given"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {f"{role}_token": token for role, token in roles.items()}
    if specials != "bert":
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


AXES = (
    tuple(NORMALIZERS),
    tuple(PRE_TOKENIZERS),
    tuple(SPECIALS),
    tuple(ADDED),
    (100, 5, 300),
    ("##", "@@", ""),
    (True, False),
)


def grid() -> list[tuple]:
    """Each value of each axis beside the first values of the others, then mixtures."""
    first = tuple(axis[0] for axis in AXES)
    cases = {
        (*first[:place], value, *first[place + 1 :]): None
        for place, axis in enumerate(AXES)
        for value in axis
    }
    draw = random.Random(11)
    cases |= {tuple(draw.choice(axis) for axis in AXES): None for _ in range(15)}
    return list(cases)


def check(wordpiece: WordPiece, folder, monkeypatch) -> None:
    """Saves the tokenizer as a run does, and compares every class that AutoTokenizer gives."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    wordpiece.save(folder, model_max_length=77)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    ours = wordpiece.encode_batch(TEXTS, parse_special=True)
    for use_fast in (True, False):
        theirs = AutoTokenizer.from_pretrained(folder, use_fast=use_fast)
        assert theirs(TEXTS, add_special_tokens=False)["input_ids"] == ours
        assert theirs.model_max_length == 77
        assert len(theirs) == wordpiece.vocab_size
        assert theirs.get_vocab() == {token: i for i, token in enumerate(wordpiece.tokens)}
        roles = [
            getattr(theirs, f"{role}_token_id") for role in ("pad", "unk", "cls", "sep", "mask")
        ]
        assert roles == [
            *(wordpiece.pad_id, wordpiece.unk_id, wordpiece.cls_id),
            *(wordpiece.sep_id, wordpiece.mask_id),
        ]
        assert set(theirs.all_special_ids) == set(wordpiece.special_ids.tolist())
        a, b = ours[2], ours[3]
        cls, sep = wordpiece.cls_id, wordpiece.sep_id
        pair = theirs(TEXTS[2], TEXTS[3])
        assert pair["input_ids"] == [cls, *a, sep, *b, sep]
        assert pair["token_type_ids"] == [0] * (len(a) + 2) + [1] * (len(b) + 1)
    again = WordPiece.load(folder)
    assert again.digest == wordpiece.digest
    assert again.encode_batch(TEXTS) == wordpiece.encode_batch(TEXTS)


@pytest.mark.parametrize("case", grid(), ids=lambda case: "-".join(map(str, case)))
def test_every_accepted_tokenizer_is_exported_as_it_is(tmp_path, monkeypatch, case):
    given = folder_of(tmp_path, *case)
    wordpiece = WordPiece.load(given)
    raw = Tokenizer.from_file(str(given / "tokenizer.json"))
    ids = [encoding.ids for encoding in raw.encode_batch(TEXTS, add_special_tokens=False)]
    assert wordpiece.encode_batch(TEXTS, parse_special=True) == ids
    (tmp_path / "out").mkdir()
    check(wordpiece, tmp_path / "out", monkeypatch)


@pytest.mark.parametrize("do_lower_case", [True, False])
@pytest.mark.parametrize("strip_accents", [None, True, False])
@pytest.mark.parametrize("texts", ["latin", "all"])
def test_trained_tokenizer_is_exported_as_it_is(
    tmp_path, monkeypatch, do_lower_case, strip_accents, texts
):
    pytest.importorskip("icu4py")
    text = (
        TEXTS if texts == "all" else ["Er m\u00f6chte f\u00fcr die Caf\u00e9s \u0130stanbul."] * 9
    )
    check(WordPiece.train(text, 900, do_lower_case, strip_accents), tmp_path, monkeypatch)
