"""WordPiece: trained on a corpus or loaded from its files, and saved so that transformers loads it.

V is the size of the vocabulary. Algorithm: https://arxiv.org/abs/1609.08144; layout and
normalisation: https://github.com/google-research/bert.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from fastbert.data import tokenizer_files
from fastbert.data.tokenizer_files import (
    CONFIG,
    DESCRIPTION,
    ROLES,
    VOCABULARY,
    Description,
)
from fastbert.data.tokenizer_training import count_chunks, learn
from fastbert.errors import UserError


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
    """A WordPiece vocabulary with its normalisation.

    Attributes:
        tokens: the pieces by id.
        vocab_size: V.
        pad_id, unk_id, cls_id, sep_id, mask_id: ids of the special tokens.
        special_ids: int64, ascending, the ids that are no text.
        is_continuation: (V,) bool, whether a piece continues a word.
        do_lower_case: whether text is lower-cased.
        digest: hash of everything that decides which ids a text becomes.
        notes: what its user should know, one line each.
    """

    def __init__(self, description: Description, name: str = "tokenizer") -> None:
        """Builds the tokenizer of a description.

        Raises:
            UserError: the library refuses it; `name` is in the message.
        """
        self._tokenizer = tokenizer_files.built(json.dumps(description.state), name)
        # As the library writes it, so that a file it wrote gives the same digest.
        self._state: dict[str, Any] = json.loads(self._tokenizer.to_str())
        self._roles, self.notes = description.roles, description.notes
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.tokens: list[str] = sorted(vocab, key=lambda token: vocab[token])
        self.vocab_size = len(self.tokens)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (
            vocab[self._roles[role]] for role in ROLES
        )
        added = {token["id"]: token for token in self._state["added_tokens"]}
        special = sorted(index for index, token in added.items() if token["special"])
        self.special_ids: NDArray[np.int64] = np.array(special, dtype=np.int64)
        prefix = self._state["model"]["continuing_subword_prefix"]
        self.is_continuation: NDArray[np.bool_] = np.array(
            [
                bool(prefix) and token.startswith(prefix) and index not in added
                for index, token in enumerate(self.tokens)
            ]
        )
        self._corpus_tokenizer = self._tokenizer
        if len(special) > len(ROLES):
            # Special tokens that a user added are meant to stand in texts: only the five roles are
            # text like any other there.
            tokens = [
                {**token, "special": token["id"] in self._role_ids} for token in added.values()
            ]
            self._corpus_tokenizer = tokenizer_files.built(
                json.dumps({**self._state, "added_tokens": tokens}), name
            )
        said = tokenizer_files.normalization(self._state["normalizer"])
        self.do_lower_case = said["do_lower_case"]
        parts = ("model", "normalizer", "pre_tokenizer", "added_tokens")
        decisive = [self._roles, *(self._state[part] for part in parts)]
        self.digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    @property
    def _role_ids(self) -> tuple[int, ...]:
        return self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id

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
            parse_special: whether "[MASK]" and the other four in a text become the special token,
                as in transformers. In a corpus they must not: they are text like any other.
        """
        tokenizer = self._tokenizer if parse_special else self._corpus_tokenizer
        tokenizer.encode_special_tokens = not parse_special
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def unknown_characters(self, texts: list[str]) -> int:
        """Returns how many characters of texts are in words that become the unknown token."""
        self._corpus_tokenizer.encode_special_tokens = True
        return sum(
            end - start
            for encoding in self._corpus_tokenizer.encode_batch(texts, add_special_tokens=False)
            for index, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if index == self.unk_id
        )

    def words(self, text: str) -> list[str]:
        """Returns the words of a text, normalised, as WordPiece is given them to cut."""
        normalizer, split = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        text = normalizer.normalize_str(text) if normalizer is not None else text
        return [word for word, _ in split.pre_tokenize_str(text)] if split is not None else [text]

    @property
    def lower_cases_alone(self) -> bool | None:
        """Whether a word of ASCII letters and digits is lower-cased, and no more is done to it.

        None where that is not sure: with a normalizer or pre-tokenizer other than BERT's own.
        """
        kinds = [(self._state[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer")]
        return self.do_lower_case if kinds == ["BertNormalizer", "BertPreTokenizer"] else None

    def pieces(self, words: list[str]) -> list[list[int]]:
        """Returns the ids that WordPiece cuts each of `words` into, as `words` gave them."""
        encodings = Tokenizer(self._tokenizer.model).encode_batch_fast(words)
        return [encoding.ids for encoding in encodings]

    def why_no_word(self, word: str) -> str:
        """Returns why `with_words` cannot take a word, "" where it can.

        Args:
            word: as `words` gives it.
        """
        longest = self._state["model"]["max_input_chars_per_word"]
        prefix = self._state["model"]["continuing_subword_prefix"]
        if len(word) > longest:
            return f"has more than {longest} characters"
        if prefix and word.startswith(prefix):
            return f"begins as the continuation of a word does, with {prefix!r}"
        return ""

    def with_words(self, words: Iterable[str]) -> "WordPiece":
        """Returns this tokenizer with more whole words; its own ids stay, theirs follow.

        They become part of the WordPiece vocabulary: normalised and cut as all others.

        Args:
            words: as `words` gives them, none of them a token yet.

        Raises:
            UserError: added tokens stand behind the WordPiece vocabulary, where theirs would be.
        """
        vocab = self._state["model"]["vocab"]
        if len(vocab) != self.vocab_size:
            first = next(token for token in self.tokens if token not in vocab)
            raise UserError(
                f"the tokenizer has {self.vocab_size - len(vocab)} added tokens, {first[:50]!r} "
                "first, behind its WordPiece vocabulary, so that no word can follow there"
            )
        more = {word: self.vocab_size + index for index, word in enumerate(words)}
        model = {**self._state["model"], "vocab": {**vocab, **more}}
        return WordPiece(Description({**self._state, "model": model}, self._roles, self.notes))

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids, pieces joined to words, special tokens left out."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def save(self, folder: str | os.PathLike[str], model_max_length: int = 512) -> None:
        """Writes what transformers' AutoTokenizer reads, of version 4 and 5, slow or fast.

        The class is the one that runs tokenizer.json as it is: BertTokenizer builds a normalizer of
        its own, and its Python form differs from it in small things (a final sigma, new emoji).
        vocab.txt is for other programs, and there only where it says all.

        Args:
            folder: made if missing.
            model_max_length: positions of the model, tokens.
        """
        os.makedirs(folder, exist_ok=True)
        self._tokenizer.encode_special_tokens = False
        self._tokenizer.save(os.path.join(folder, DESCRIPTION))
        plain = tokenizer_files.expressible_by_vocabulary(self._state)
        path = os.path.join(folder, VOCABULARY)
        if plain is not None:
            with open(path, "w", encoding="utf-8", newline="\n") as file:
                file.writelines(f"{token}\n" for token in self.tokens)
        elif os.path.exists(path):
            os.remove(path)
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model_max_length,
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
            **(plain or {}),
            **{f"{role}_token": token for role, token in self._roles.items()},
        }
        others = [
            token["content"]
            for token in self._state["added_tokens"]
            if token["special"] and token["content"] not in self._roles.values()
        ]
        if others:
            config["additional_special_tokens"] = others
        pre_tokenizer = self._state["pre_tokenizer"] or {}
        if "add_prefix_space" in pre_tokenizer:  # else version 4 turns it off
            config["add_prefix_space"] = pre_tokenizer["add_prefix_space"]
        with open(os.path.join(folder, CONFIG), "w", encoding="utf-8") as file:
            json.dump(config, file, indent=2)
            file.write("\n")

    @classmethod
    def train(
        cls,
        sentences: Iterable[str] | Mapping[str, int],
        vocab_size: int,
        do_lower_case: bool = True,
        strip_accents: bool | None = None,
        *,
        progress: bool = False,
    ) -> "WordPiece":
        """Returns a vocabulary learnt from sentences; the same sentences give the same vocabulary.

        Args:
            sentences: text, read once; or what `count_chunks` has counted in it.
            vocab_size: V to reach; a small corpus may give fewer pieces.
            do_lower_case: whether to lower-case.
            strip_accents: whether to take accents off letters: from all, from none, or (None) where
                the text is lower-cased, and then from Latin, Greek and Cyrillic letters only, for
                in other scripts the marks are vowels and tones.
            progress: whether to show a bar on stderr.

        Raises:
            UserError: `vocab_size` leaves no room for characters, there is no word, or a library
                that the text's script needs is missing.
        """
        chunks = sentences if isinstance(sentences, Mapping) else count_chunks(sentences)
        return cls(learn(chunks, vocab_size, do_lower_case, strip_accents, progress))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        do_lower_case: bool | None = None,
        strip_accents: bool | None = None,
    ) -> "WordPiece":
        """Returns the tokenizer of a file and of what stands beside it.

        Args:
            path: a vocab.txt, a tokenizer.json, or a folder that holds one of them.
            do_lower_case: whether to lower-case; None takes what the files say, and True where
                none does.
            strip_accents: whether to take accents off letters; None likewise, and as
                `do_lower_case` where no file says it.

        Raises:
            UserError: a file is missing, damaged, no WordPiece vocabulary, or says something else
                than another or than an argument.
        """
        path = os.fspath(path)
        asked = {"do_lower_case": do_lower_case, "strip_accents": strip_accents}
        given = {name: value for name, value in asked.items() if value is not None}
        return cls(tokenizer_files.read(path, given), path)
