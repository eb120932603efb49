"""Why a model says what it says of a text: attention, attention rollout, integrated gradients.

Rollout: Abnar and Zuidema 2020. Integrated gradients: Sundararajan et al. 2017, by captum, along
the straight line from the word embeddings of [PAD] to those of the text.

L layers, A heads, S tokens of a text, W its words, V vocabulary.
"""

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastbert.errors import RunError, UserError, did_you_mean
from fastbert.finetune.needs import needs
from fastbert.finetune.predict import described
from fastbert.finetune.tasks.answer import Answer
from fastbert.finetune.tasks.base import Example, Feature
from fastbert.finetune.tasks.classify import SCORE, Classify
from fastbert.hf.load import load_head, load_model, load_tokenizer, saved_head, sentence_layout

TOLERANCE = 0.05
"""The error of integrated gradients, as a share of what they explain, that ends the search."""
STEPS = (32, 64, 128, 256, 512)
_TOKENS_PER_BATCH = 1024  # logits of masked words: 125 MB at V = 30,522


@dataclass(frozen=True)
class Word:
    """A word as the tokenizer splits them, whole again."""

    text: str
    start: int
    end: int
    """Characters of `Explanation.texts[part]`."""
    part: int
    tokens: tuple[int, int]
    """Its first token, and the one after its last."""


@dataclass(frozen=True)
class Gradients:
    """Integrated gradients of one output."""

    tokens: np.ndarray
    """(S,) float64: what each token adds to the output; 0 where the baseline has the same."""
    output: float
    baseline: float
    """The output for [PAD] in place of every word."""
    steps: int
    """Points of the line at which gradients were taken."""

    @property
    def delta(self) -> float:
        """By how much the attributions miss `output - baseline`, which is their sum in theory."""
        return float(self.tokens.sum()) - (self.output - self.baseline)

    @property
    def error(self) -> float:
        """`delta` as a share of `output - baseline`; 0 of a text that is its own baseline."""
        if not self.delta:
            return 0.0
        explained = abs(self.output - self.baseline)
        return abs(self.delta) / explained if explained else float("inf")


@dataclass(frozen=True)
class Explanation:
    """What `explain` finds of one text."""

    texts: tuple[str, ...]
    """The text, or the two as the model reads them: a question stands before its text."""
    tokens: tuple[str, ...]
    words: tuple[Word, ...]
    cut: int
    """Tokens at the end that the model has no room for."""
    attentions: np.ndarray
    """(L, A, S, S) float32: what each token (row) takes from each (column); rows sum to 1."""
    rollout: np.ndarray
    """(S, S) float32: the same through all layers."""
    token: int | None
    """Where the prediction is read; of an encoder alone, and of a class, the first token. None of a
    vector of a text, which is the mean of all."""
    prediction: dict[str, Any]
    """Empty of an encoder alone."""
    target: str
    """In words, the output that `gradients` explain."""
    gradients: Gradients | None
    note: str
    """Why there are no `gradients`; empty where there are."""

    @property
    def attributions(self) -> np.ndarray | None:
        """(W,) float64: integrated gradients, summed over each word's tokens."""
        return None if self.gradients is None else self.per_word(self.gradients.tokens)

    @property
    def flow(self) -> np.ndarray:
        """(S,) float32: what of each token reaches the place where the prediction is read."""
        found: np.ndarray = self.rollout.mean(0) if self.token is None else self.rollout[self.token]
        return found

    @property
    def delta(self) -> float | None:
        """See `Gradients.delta`."""
        return None if self.gradients is None else self.gradients.delta

    def per_word(self, values: np.ndarray) -> np.ndarray:
        """(S,) of tokens to (W,), summed."""
        return np.array([values[slice(*word.tokens)].sum() for word in self.words])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the page that `fastbert explain` writes, for this text alone.

        Raises:
            RunError: it cannot be written.
        """
        from fastbert.finetune.explain_page import write_page

        write_page(path, [self])

    def __str__(self) -> str:
        if self.attributions is None:
            return f"{self.target}: {self.note}" if self.target else self.note
        order = np.argsort(-np.abs(self.attributions), kind="stable")[:5]
        most = ", ".join(f"{self.words[i].text} {self.attributions[i]:+.2f}" for i in order)
        return f"{self.target}: {most}"


def explain(
    text: str,
    folder: str | os.PathLike[str],
    *,
    pair: str | None = None,
    question: str | None = None,
    target: str | None = None,
    word: int | None = None,
    mask: int | None = None,
    max_length: int | None = None,
) -> Explanation:
    """Attention, rollout and integrated gradients of one text; of several, keep an `Explainer`.

    Args:
        text: any; beyond the model's positions it is cut, and `cut` counts the tokens.
        folder: of a model, with the head that it was saved with, and its tokenizer.
        pair: the second text, where the model reads two.
        question: that a model for answers is asked about `text`.
        target: the label, tag or (for [MASK]) word whose logit is explained; None: the best.
        word: whose tag is explained, counted from 1; None: the first that gets a tag other than O.
        mask: which [MASK] is explained, counted from 1; None: the first.
        max_length: tokens at most, special ones included; None: what a model of classes was trained
            with, and of others what there are positions for.

    Raises:
        UserError: there is no such model, label or word, or no text.
        RunError: what the model returns is not finite.
    """
    return Explainer(folder)(
        text,
        pair=pair,
        question=question,
        target=target,
        word=word,
        mask=mask,
        max_length=max_length,
    )


def rollout(attentions: np.ndarray) -> np.ndarray:
    """Attention through all layers, half of each taken by the residual connection.

    Args:
        attentions: (L, A, S, S), rows that sum to 1.

    Returns:
        (S, S) of the same dtype; rows sum to 1.
    """
    mixed = (attentions.mean(1) + np.eye(attentions.shape[-1], dtype=attentions.dtype)) / 2
    mixed /= mixed.sum(-1, keepdims=True)
    through = mixed[0]
    for layer in mixed[1:]:
        through = layer @ through
    return through


def integrated_gradients(
    score: Callable[[Tensor], Tensor], embedding: nn.Module, ids: Tensor, baseline: Tensor
) -> Gradients:
    """What each token adds to an output, by as many steps as it takes, up to the last of `STEPS`.

    Args:
        score: (B, S) ids to (B,) outputs; calls `embedding` once.
        embedding: of ids to vectors.
        ids: (1, S) int64.
        baseline: (1, S) int64, where the line begins.

    Raises:
        UserError: captum is not installed.
    """
    attribution = needs("captum.attr").LayerIntegratedGradients(score, embedding)
    with torch.no_grad():
        output, begin = float(score(ids)), float(score(baseline))
    for steps in STEPS:
        values = attribution.attribute(
            ids,
            baselines=baseline,
            n_steps=steps,
            internal_batch_size=max(1, _TOKENS_PER_BATCH // ids.shape[1]),
        )
        tokens = values.detach().sum(-1)[0].double().cpu().numpy()
        found = Gradients(tokens, output, begin, steps)
        if found.error < TOLERANCE:
            break
    return found


@dataclass(frozen=True)
class _Asked:
    """What a head predicts, and which of its outputs is to be explained."""

    prediction: dict[str, Any]
    target: str
    token: int
    pick: Callable[[Any], Tensor]  # what the model returns -> (B,)


class Explainer:
    """A folder's model and tokenizer; on a GPU where there is one.

    Args:
        folder: of a BERT or a relative of its build, as transformers saves it.

    Raises:
        UserError: one of these is missing, the model has no table of positions, or captum is not
            installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = os.fspath(folder)
        self.head, config = saved_head(folder)
        self._told = described(self.folder, config)
        self.tokenizer = load_tokenizer(folder)
        if not self.tokenizer.is_fast:
            raise UserError(f"{self.folder}: its tokenizer knows no offsets; tokenizer.json does")
        self.model: Any = self._load()
        if self.head:
            needs("captum.attr")
        # Of the kernels that transformers chooses from, this one shows what it weighs by.
        self.model.set_attn_implementation("eager")
        self.model.float().to("cuda" if torch.cuda.is_available() else "cpu")
        tables = (
            module
            for name, module in self.model.named_modules()
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
        )
        table = next(tables, None)
        if table is None:
            raise UserError(
                f"{self.folder}: {config.model_type} has no table of positions; BERT, RoBERTa, "
                "DistilBERT, ELECTRA and what is built like them can be explained"
            )
        self._first_position = 0 if table.padding_idx is None else table.padding_idx + 1
        self._longest = min(
            table.num_embeddings - self._first_position, self.tokenizer.model_max_length
        )
        # As `fastbert predict`, which reads the rest as well where there are tags or answers.
        told = self._told.get("max_seq_length") if self.head == "SequenceClassification" else None
        self._usual = min(self._longest, told) if isinstance(told, int) else self._longest
        self._reads_all = not self.head and self._pooling() == "mean"

    def _load(self) -> Any:
        self._without = "the model has no head: attention alone"
        if self.head == "MultipleChoice":
            self.head = ""
            self._without = "of multiple choice only the attention is shown, of each text by itself"
        elif self.head:
            return load_head(self.folder, self.head)
        elif self.tokenizer.mask_token_id is not None:
            try:  # with next sentences, masked words are a head that has another name
                model = load_head(self.folder, "MaskedLM")
            except UserError:
                return load_model(self.folder)
            self.head = "MaskedLM"
            return model
        return load_model(self.folder)

    def _pooling(self) -> str:
        told = self._told
        if "pooling" not in told:
            with suppress(UserError):  # layers that we do not know: attention is what it is
                told = sentence_layout(self.folder)
        return str(told.get("pooling", ""))

    def __call__(
        self,
        text: str,
        *,
        pair: str | None = None,
        question: str | None = None,
        target: str | None = None,
        word: int | None = None,
        mask: int | None = None,
        max_length: int | None = None,
    ) -> Explanation:
        """See `explain`."""
        texts = self._texts(text, pair, question)
        encoding, cut = self._encode(texts, max_length)
        words = _words(texts, encoding)
        for part, one in enumerate(texts):
            if not any(found.part == part for found in words):
                raise UserError(f"text {one[:60]!r} holds no word")
        given = {
            name: torch.tensor([encoding[name]], device=self.model.device)
            for name in ("input_ids", "token_type_ids", "attention_mask")
            if name in encoding
        }
        ids = given.pop("input_ids")
        given["position_ids"] = torch.arange(ids.shape[1], device=ids.device)[None]
        given["position_ids"] += self._first_position

        def run(ids: Tensor, **more: Any) -> Any:
            rows = {name: value.expand(len(ids), -1) for name, value in given.items()}
            return self.model(input_ids=ids, **rows, **more)

        with torch.no_grad():
            output = run(ids, output_attentions=True)
        seen = [*output.attentions, *(one for one in output.values() if isinstance(one, Tensor))]
        if not all(one.isfinite().all() for one in seen):
            raise RunError(
                f"{self.folder}: the model's outputs are not finite: its weights are broken"
            )
        attentions = torch.cat(output.attentions).cpu().numpy()
        asked, note = self._ask(output, texts, encoding, words, target, word, mask)
        gradients = None
        if asked is not None:
            kept = torch.isin(ids, self._kept(ids))
            baseline = torch.where(kept, ids, self._pad())
            pick = asked.pick
            gradients = integrated_gradients(
                lambda ids: pick(run(ids)), self.model.get_input_embeddings(), ids, baseline
            )
        return Explanation(
            texts=texts,
            tokens=tuple(map(self._readable, encoding.tokens())),
            words=words,
            cut=cut,
            attentions=attentions,
            rollout=rollout(attentions),
            token=asked.token if asked else None if self._reads_all else 0,
            prediction=asked.prediction if asked else {},
            target=asked.target if asked else "",
            gradients=gradients,
            note=note,
        )

    def _texts(self, text: str, pair: str | None, question: str | None) -> tuple[str, ...]:
        if self.head == "QuestionAnswering":
            if question is None or pair is not None:
                raise UserError(f"{self.folder} answers questions: give one, as --question")
        elif question is not None:
            raise UserError(f"--question: {self.folder} was not trained to answer questions")
        for name, value in (("text", text), ("--pair", pair), ("--question", question)):
            if value is not None and not value.strip():
                raise UserError(f"{name} {value!r} is empty")
            if value is not None and any("\ud800" <= char <= "\udfff" for char in value):
                raise UserError(f"{name} {value[:60]!r} is not UTF-8")
        return tuple(one for one in (question, text, pair) if one is not None)

    def _encode(self, texts: tuple[str, ...], max_length: int | None) -> tuple[Any, int]:
        longest = min(self._longest, max_length or self._usual)
        whole = self.tokenizer(*texts, verbose=False)
        cut = max(0, len(whole["input_ids"]) - longest)
        if not cut:
            return whole, 0
        asks = self.head == "QuestionAnswering"
        least = self.tokenizer.num_special_tokens_to_add(pair=len(texts) > 1) + len(texts)
        if asks:
            least += len(self.tokenizer(texts[0], add_special_tokens=False)["input_ids"]) - 1
        if longest < least:
            raise UserError(f"at most {longest} tokens: must be at least {least}")
        how = "only_second" if asks else "longest_first"
        return self.tokenizer(*texts, truncation=how, max_length=longest), cut

    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        if pad is None:
            raise UserError(f"{self.folder}: its tokenizer knows no [PAD] to compare with")
        return int(pad)

    def _kept(self, ids: Tensor) -> Tensor:
        """What the baseline keeps: without the mask there would be nothing to fill."""
        special = self.tokenizer
        kept = (special.cls_token_id, special.sep_token_id, special.mask_token_id)
        return torch.tensor([one for one in kept if one is not None], device=ids.device)

    def _readable(self, token: str) -> str:
        if token.startswith("##"):
            return token
        return self.tokenizer.convert_tokens_to_string([token]).strip() or token

    def _ask(
        self,
        output: Any,
        texts: tuple[str, ...],
        encoding: Any,
        words: tuple[Word, ...],
        target: str | None,
        word: int | None,
        mask: int | None,
    ) -> tuple[_Asked | None, str]:
        """What is to be explained, or why nothing is."""
        if word is not None and self.head != "TokenClassification":
            raise UserError(f"--word {word}: {self.folder} gives no tag to words")
        if mask is not None and self.head != "MaskedLM":
            raise UserError(f"--mask {mask}: {self.folder} fills no {self.tokenizer.mask_token}")
        if target is not None and self.head in ("", "QuestionAnswering"):
            raise UserError(f"--target {target}: {self.folder} has no labels")
        if self.head == "SequenceClassification":
            return self._ask_class(output, target), ""
        if self.head == "TokenClassification":
            return self._ask_tag(output, words, target, word), ""
        if self.head == "QuestionAnswering":
            return self._ask_answer(output, texts, encoding), ""
        if self.head == "MaskedLM":
            name, ids = self.tokenizer.mask_token, encoding["input_ids"]
            holes = [at for at, one in enumerate(ids) if one == self.tokenizer.mask_token_id]
            if holes:
                return self._ask_mask(output, holes, target, mask), ""
            for option, value in (("--target", target), ("--mask", mask)):
                if value is not None:
                    raise UserError(f"{option} {value}: the text holds no {name}")
            return None, f"no {name} to fill: attention alone"
        return None, self._without

    def _ask_class(self, output: Any, target: str | None) -> _Asked:
        task = Classify(self.tokenizer, self._usual, self._told)
        [prediction] = task.predictions([], [], task.raw(output.logits.float(), {}))
        index = int(output.logits[0].argmax())
        if target is not None:
            index = _place(target, task.labels, "labels")
        what = "score" if task.problem == SCORE else "logit"
        return _Asked(
            prediction, f"{what} of {task.labels[index]}", 0, lambda out: out.logits[:, index]
        )

    def _ask_tag(
        self, output: Any, words: tuple[Word, ...], target: str | None, word: int | None
    ) -> _Asked:
        labels = self._told["labels"]
        chances = output.logits[0].float().softmax(-1)[[word.tokens[0] for word in words]]
        tags = [labels[index] for index in chances.argmax(-1).tolist()]
        if word is None:
            word = next((place for place, tag in enumerate(tags, 1) if tag != "O"), 1)
        if not 1 <= word <= len(words):
            raise UserError(f"--word {word}: must be from 1 to {len(words)}, the words of the text")
        tag = tags[word - 1] if target is None else target
        index, token = _place(tag, labels, "tags"), words[word - 1].tokens[0]
        prediction = {
            "word": words[word - 1].text,
            "tag": tags[word - 1],
            "score": float(chances[word - 1].max()),
            "tags": tags,
        }
        what = f'logit of {tag} for word {word}, "{words[word - 1].text}"'
        return _Asked(prediction, what, token, lambda out: out.logits[:, token, index])

    def _ask_answer(self, output: Any, texts: tuple[str, ...], encoding: Any) -> _Asked:
        task = Answer(self.tokenizer, self._longest, self._told)
        parts = zip(encoding.encodings[0].offsets, encoding.sequence_ids(), strict=True)
        feature = Feature(0, [], None, [span if part == 1 else None for span, part in parts])
        example = Example("", dict(zip(task.roles, texts, strict=True)))
        logits = torch.cat((output.start_logits, output.end_logits)).float().cpu().numpy()
        [prediction] = task.predictions([example], [feature], [logits])
        said, token = "no answer", 0
        if prediction["answer"]:
            said = f'the answer "{prediction["answer"]}"'
            token = encoding.char_to_token(prediction["start"], sequence_index=1)
        return _Asked(
            prediction, f"start logit of {said}", token, lambda out: out.start_logits[:, token]
        )

    def _ask_mask(
        self, output: Any, holes: list[int], target: str | None, mask: int | None
    ) -> _Asked:
        name = self.tokenizer.mask_token
        if not 1 <= (mask or 1) <= len(holes):
            raise UserError(
                f"--mask {mask}: must be from 1 to {len(holes)}, the {name} of the text"
            )
        token = holes[(mask or 1) - 1]
        which = f"{name} {mask or 1} of {len(holes)}" if len(holes) > 1 else name
        chances = output.logits[0, token].float().softmax(-1)
        best = chances.topk(min(5, len(chances)))
        guesses = [
            {"token_str": self.tokenizer.decode([index]), "token": index, "score": chance}
            for index, chance in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        index = guesses[0]["token"]
        if target is not None:
            vocabulary = self.tokenizer.get_vocab()
            spellings = (target, f"Ġ{target}", f"▁{target}")  # byte-level BPE's, SentencePiece's
            known = next((one for one in spellings if one in vocabulary), target)
            index = vocabulary[known] if known in vocabulary else _place(target, vocabulary, "")
        word = self.tokenizer.decode([index]).strip()
        return _Asked(
            {"guesses": guesses},
            f"logit of {word} for {which}",
            token,
            lambda out: out.logits[:, token, index],
        )


def _place(label: str, labels: Iterable[str], what: str) -> int:
    """The index of a label.

    Raises:
        UserError: there is none.
    """
    known = list(labels)
    if label in known:
        return known.index(label)
    some = f" ({', '.join(known[:20])}{', ...' if len(known) > 20 else ''})" if what else ""
    of_what = f"none of the model's {what}" if what else "no single token of the tokenizer"
    raise UserError(f"--target {label}: {of_what}{did_you_mean(label, known)}{some}")


def _words(texts: tuple[str, ...], encoding: Any) -> tuple[Word, ...]:
    found: dict[tuple[int, int], tuple[int, int, int, int]] = {}
    places = zip(encoding.sequence_ids(), encoding.word_ids(), strict=True)
    for token, (part, word) in enumerate(places):
        if part is None or word is None:
            continue
        start, end = encoding.token_to_chars(token)
        begin, before, first, _ = found.get((part, word), (start, end, token, token))
        found[part, word] = min(begin, start), max(before, end), first, token + 1
    words: list[Word] = []
    blank = None  # tokens of nothing but spaces belong to the word before, or else to the next
    for (part, _), (start, end, first, after) in found.items():
        text = texts[part][start:end]
        if text.strip():
            start += len(text) - len(text.lstrip())  # some tokenizers count the space before it
            text = text.strip()
            first = first if blank is None else blank
            words.append(Word(text, start, start + len(text), part, (first, after)))
            blank = None
        elif words and words[-1].part == part:
            words[-1] = replace(words[-1], tokens=(words[-1].tokens[0], after))
        else:
            blank = first if blank is None else blank
    return tuple(words)
