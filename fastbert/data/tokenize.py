"""WordPiece: trained on a corpus or loaded from a file, and saved so that transformers loads it.

V is the size of the vocabulary. Algorithm: https://arxiv.org/abs/1609.08144; layout and
normalisation: https://github.com/google-research/bert.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from fastbert.errors import UserError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_WORD = 100
"""Characters of the longest word; WordPiece makes a longer one [UNK]."""
MODEL_MAX_LENGTH = 512


@dataclass(frozen=True, eq=False)
class TokenIds:
    """What packing and masking need to know of a vocabulary."""

    vocab_size: int
    pad: int
    unk: int
    cls: int
    sep: int
    mask: int
    special: NDArray[np.int64]
    """Ids that are never predicted, ascending."""
    is_continuation: NDArray[np.bool_]
    """(V,) whether the piece continues a word."""


class WordPiece:
    """A WordPiece vocabulary with BERT's normalisation.

    Attributes:
        tokens: the pieces by id.
        vocab_size: V.
        pad_id, unk_id, cls_id, sep_id, mask_id: ids of the special tokens.
        special_ids: int64, ascending, the ids that are no text.
        is_continuation: (V,) bool, whether a piece starts with "##".
        do_lower_case: whether text is lower-cased.
        digest: hash of everything that decides which ids a text becomes.
    """

    def __init__(self, tokenizer: Tokenizer, name: str = "tokenizer") -> None:
        """Wraps a tokenizer whose model is WordPiece.

        Raises:
            UserError: a special token is missing, or ids have gaps; `name` is in the message.
        """
        tokenizer.no_padding()
        tokenizer.no_truncation()
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        self.tokens: list[str] = sorted(vocab, key=lambda token: vocab[token])
        self.vocab_size = len(self.tokens)
        if vocab[self.tokens[-1]] != self.vocab_size - 1:
            raise UserError(f"{name}: token ids have gaps; they must run from 0 to V - 1")
        for token in SPECIAL_TOKENS:
            if token not in vocab:
                raise UserError(f"{name}: the special token {token} is missing; BERT needs it")
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (
            vocab[token] for token in SPECIAL_TOKENS
        )
        added = tokenizer.get_added_tokens_decoder()
        special = {vocab[token] for token in SPECIAL_TOKENS}
        special |= {index for index, token in added.items() if token.special}
        self.special_ids: NDArray[np.int64] = np.array(sorted(special), dtype=np.int64)
        self.is_continuation: NDArray[np.bool_] = np.array(
            [token.startswith("##") for token in self.tokens]
        )
        self._tokenizer = tokenizer
        state = json.loads(tokenizer.to_str())
        self.do_lower_case = _lower_cases(state)
        decisive = [self.tokens, *(state[part] for part in ("normalizer", "pre_tokenizer"))]
        self.digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    @property
    def ids(self) -> TokenIds:
        """The ids alone, which other processes can be given cheaply."""
        return TokenIds(
            vocab_size=self.vocab_size,
            pad=self.pad_id,
            unk=self.unk_id,
            cls=self.cls_id,
            sep=self.sep_id,
            mask=self.mask_id,
            special=self.special_ids,
            is_continuation=self.is_continuation,
        )

    def encode_batch(self, texts: list[str], *, parse_special: bool = False) -> list[list[int]]:
        """Returns the ids of each text, without [CLS] and [SEP].

        Args:
            texts: any strings; one without a word gives an empty list.
            parse_special: whether "[MASK]" and the like in a text become the special token, as in
                transformers. In a corpus they must not: they are text like any other.
        """
        self._tokenizer.encode_special_tokens = not parse_special
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids, pieces joined to words, special tokens left out."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json, vocab.txt and tokenizer_config.json as transformers reads them."""
        os.makedirs(folder, exist_ok=True)
        self._tokenizer.encode_special_tokens = False
        self._tokenizer.save(os.path.join(folder, "tokenizer.json"))
        with open(os.path.join(folder, "vocab.txt"), "w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{token}\n" for token in self.tokens)
        config = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": self.do_lower_case,
            "model_max_length": MODEL_MAX_LENGTH,
            **{f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS},
        }
        path = os.path.join(folder, "tokenizer_config.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump(config, file, indent=2)
            file.write("\n")

    @classmethod
    def train(
        cls, sentences: Iterable[str], vocab_size: int, do_lower_case: bool = True
    ) -> "WordPiece":
        """Returns a vocabulary learnt from sentences; the same sentences give the same vocabulary.

        The library's trainer numbers single characters in the order of a randomly seeded hash
        table and breaks ties between merges by these numbers. So the words are counted here, the
        characters are numbered beforehand, and the trainer reads the words in sorted order.

        Args:
            sentences: text, read once.
            vocab_size: V to reach; a small corpus may give fewer pieces.
            do_lower_case: whether to lower-case and strip accents.

        Raises:
            UserError: `vocab_size` leaves no room for characters, or there is no word.
        """
        words = _count_words(sentences, do_lower_case)
        room = (vocab_size - len(SPECIAL_TOKENS)) // 2
        if room < 1:
            raise UserError(f"vocab_size = {vocab_size} must be at least 100")
        if not words:
            raise UserError("the text to train a tokenizer on holds no word")
        alphabet = _alphabet(words, room)
        later = {char for word in words for char in word[1:] if char in alphabet}
        pinned = sorted(alphabet) + [f"##{char}" for char in sorted(later)]
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            special_tokens=[*SPECIAL_TOKENS, *pinned],
            initial_alphabet=sorted(alphabet),
            limit_alphabet=len(alphabet),
            show_progress=False,
        )
        learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        learner.train_from_iterator(_repeat(words, alphabet), trainer)
        vocab = learner.get_vocab()
        return cls(_bert_tokenizer(sorted(vocab, key=lambda token: vocab[token]), do_lower_case))

    @classmethod
    def load(cls, path: str | os.PathLike[str], do_lower_case: bool | None = None) -> "WordPiece":
        """Returns the vocabulary of a file.

        Args:
            path: a vocab.txt, a tokenizer.json, or a folder that holds one of them.
            do_lower_case: whether to lower-case; None takes what the file, or the
                tokenizer_config.json beside it, says, and True where nothing does.

        Raises:
            UserError: the file is missing, damaged, no WordPiece vocabulary, or says something
                else than `do_lower_case`.
        """
        path = os.fspath(path)
        if os.path.isdir(path):
            names = [os.path.join(path, name) for name in ("tokenizer.json", "vocab.txt")]
            found = next(filter(os.path.isfile, names), None)
            if found is None:
                raise UserError(f"{path}: the folder holds neither tokenizer.json nor vocab.txt")
            path = found
        if not path.endswith(".json"):
            said = _config_lower_case(os.path.join(os.path.dirname(path), "tokenizer_config.json"))
            if do_lower_case is None:
                do_lower_case = True if said is None else said
            return cls(_bert_tokenizer(_read_vocab(path), do_lower_case), path)
        wordpiece = cls(_read_tokenizer(path), path)
        if do_lower_case not in (None, wordpiece.do_lower_case):
            asked, right = (str(said).lower() for said in (do_lower_case, not do_lower_case))
            raise UserError(f"{path}: do_lower_case = {asked}, but its normalizer says {right}")
        return wordpiece


def _bert_tokenizer(tokens: list[str], do_lower_case: bool) -> Tokenizer:
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=MAX_WORD)
    )
    present = [token for token in SPECIAL_TOKENS if token in vocab]
    tokenizer.add_special_tokens(present)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=do_lower_case)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    if "[CLS]" in vocab and "[SEP]" in vocab:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS]:0 $A:0 [SEP]:0",
            pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
            special_tokens=[(token, vocab[token]) for token in ("[CLS]", "[SEP]")],
        )
    return tokenizer


def _count_words(sentences: Iterable[str], do_lower_case: bool) -> dict[str, int]:
    normalize = normalizers.BertNormalizer(lowercase=do_lower_case).normalize_str
    chunks: Counter[str] = Counter()
    for sentence in sentences:
        chunks.update(normalize(sentence).split())
    split = pre_tokenizers.BertPreTokenizer().pre_tokenize_str
    words: Counter[str] = Counter()
    for chunk, count in chunks.items():
        for word, _ in split(chunk):
            if len(word) <= MAX_WORD:
                words[word] += count
    return {word: words[word] for word in sorted(words)}


# Google's English vocabulary knows 997 characters. Where a corpus has more (Chinese, Japanese),
# those beyond the thousandth must be worth their place.
ALPHABET = 1_000
COVERAGE = 0.9999


def _alphabet(words: dict[str, int], room: int) -> set[str]:
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for char in word:
            counts[char] += count
    ranked = sorted(counts, key=lambda char: (-counts[char], char))
    covered = np.cumsum([counts[char] for char in ranked])
    worthy = int(np.searchsorted(covered, COVERAGE * covered[-1])) + 1
    return set(ranked[: min(room, max(ALPHABET, worthy))])


def _repeat(words: dict[str, int], alphabet: set[str]) -> Iterable[str]:
    """Yields each word as often as it was counted, a thousand at a time."""
    for word, count in words.items():
        if alphabet.issuperset(word):
            for done in range(0, count, 1_000):
                yield " ".join([word] * min(1_000, count - done))


def _read_vocab(path: str) -> list[str]:
    tokens: dict[str, int] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            lines = [line.rstrip("\r\n") for line in file]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8; a vocabulary holds one token per line") from None
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise UserError(f"{path}: is empty; a vocabulary holds one token per line")
    for number, token in enumerate(lines, start=1):
        if not token.strip():
            raise UserError(f"{path}:{number}: is blank; a vocabulary holds one token per line")
        if token in tokens:
            raise UserError(f"{path}:{number}: {token!r} is already on line {tokens[token]}")
        tokens[token] = number
    return lines


def _read_tokenizer(path: str) -> Tokenizer:
    try:
        with open(path, encoding="utf-8") as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8; a tokenizer.json is JSON in UTF-8") from None
    try:
        state = json.loads(content)
        kind = state["model"].get("type", "WordPiece")
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path}: is not a tokenizer of the tokenizers library") from None
    if kind != "WordPiece":
        raise UserError(f"{path}: its model is {kind}; BERT needs WordPiece")
    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: is not a valid tokenizer: {error}") from None
    if not isinstance(tokenizer.model, models.WordPiece):
        raise UserError(f"{path}: its model is not WordPiece, which BERT needs")
    if not tokenizer.get_vocab_size():
        raise UserError(f"{path}: its vocabulary is empty")
    return tokenizer


def _lower_cases(state: dict) -> bool:
    """Whether the normalizer of a tokenizer.json lower-cases."""
    normalizer = state.get("normalizer") or {}
    parts = normalizer.get("normalizers", [normalizer])
    return any(part.get("lowercase") or part.get("type") == "Lowercase" for part in parts)


def _config_lower_case(path: str) -> bool | None:
    try:
        with open(path, encoding="utf-8") as file:
            said = json.load(file).get("do_lower_case")
    except (OSError, ValueError, AttributeError):
        return None
    return said if isinstance(said, bool) else None
