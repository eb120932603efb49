"""Held-out quality: MLM loss and accuracy, NSP accuracy, and what a unigram model would score."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.data.batch import Batch
from fastbert.data.shards import Shards
from fastbert.data.tokenize import WordPiece
from fastbert.model.bert import Bert
from fastbert.train.step import model_inputs


@dataclass(frozen=True)
class Evaluation:
    """Means over the held-out batches; losses in nats, NSP accuracy NaN where it is not trained."""

    mlm_loss: float
    mlm_accuracy: float
    nsp_accuracy: float
    unigram_loss: float

    def metrics(self) -> dict[str, float]:
        """`eval/...` keys, those that are not a number left out."""
        return {f"eval/{k}": v for k, v in asdict(self).items() if v == v}


def unigram_log_probabilities(counts: np.ndarray, special_ids: np.ndarray) -> Tensor:
    """log P(token) (V,) fp32 by training counts, one added to each; special tokens get none."""
    smoothed = counts.astype(np.float64) + 1.0
    smoothed[special_ids] = 0.0
    with np.errstate(divide="ignore"):
        return torch.from_numpy(np.log(smoothed / smoothed.sum())).float()


@torch.no_grad()
def evaluate(
    model: Bert,
    batches: Sequence[Batch],
    unigram: Tensor,  # (V,) log probabilities
) -> Evaluation:
    """Scores the model on batches whose masks are fixed, dropout off.

    Runs eager even where the model is compiled: a second set of compiled graphs would cost more
    than it saves.
    """
    model.eval()
    device = unigram.device
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    masked = labelled = 0
    with torch.compiler.set_stance("force_eager"):
        for batch in batches:
            batch = batch.to(device)
            logits = model.predict(*model_inputs(batch))
            labels, next_labels = batch.masked_labels, batch.next_sentence_labels
            real, paired = labels != -100, next_labels != -100
            labels, next_labels = labels[real], next_labels[paired]
            scores, next_scores = logits.mlm[real], logits.next_sentence[paired]
            sums[0] += F.cross_entropy(scores, labels, reduction="sum")
            sums[1] += (scores.argmax(-1) == labels).sum()
            sums[2] += (next_scores.argmax(-1) == next_labels).sum()
            sums[3] -= unigram[labels].sum()
            masked += labels.numel()
            labelled += next_labels.numel()
    mlm_loss, mlm_hits, nsp_hits, unigram_loss = sums.tolist()
    trained_nsp = model.next_sentence is not None and labelled > 0
    return Evaluation(
        mlm_loss / max(masked, 1),
        mlm_hits / max(masked, 1),
        nsp_hits / labelled if trained_nsp else float("nan"),
        unigram_loss / max(masked, 1),
    )


@dataclass(frozen=True)
class FillMask:
    """One prediction: the text with its hole, the right word, and what the model would say."""

    text: str
    answer: str
    guesses: tuple[tuple[str, float], ...]  # word, probability

    def __str__(self) -> str:
        guesses = ", ".join(f"{word} {probability:.0%}" for word, probability in self.guesses)
        return f"{self.text}\n    -> {guesses}   (it was: {self.answer})"


@torch.no_grad()
def fill_masks(
    model: Bert,
    tokenizer: WordPiece,
    sentences: Sequence[Sequence[int]],  # token ids, no special tokens
    top: int = 3,
) -> list[FillMask]:
    """Hides the longest whole word of each sentence and asks the model for it."""
    model.eval()
    device = model.embeddings.word.device
    results = []
    for sentence in sentences:
        ids = [tokenizer.cls_id, *sentence, tokenizer.sep_id]
        whole = [
            index
            for index in range(1, len(ids) - 1)
            if not tokenizer.is_continuation[ids[index]]
            and not tokenizer.is_continuation[ids[index + 1]]
        ]
        if not whole:
            continue
        hole = max(whole, key=lambda index: len(tokenizer.tokens[ids[index]]))
        answer, ids[hole] = ids[hole], tokenizer.mask_id
        with torch.compiler.set_stance("force_eager"):
            logits = model.predict(
                torch.tensor(ids, device=device),
                torch.zeros(len(ids), dtype=torch.int64, device=device),
                torch.arange(len(ids), device=device),
                torch.tensor([0, len(ids)], dtype=torch.int32, device=device),
                len(ids),
                torch.tensor([hole], device=device),
            ).mlm[0]
        logits[torch.from_numpy(tokenizer.special_ids)] = float("-inf")  # no word of a text
        logits[tokenizer.vocab_size :] = float("-inf")  # rows that no token has
        best = torch.softmax(logits.float(), -1).topk(top)
        guesses = tuple(
            (tokenizer.tokens[index], probability)
            for index, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        )
        before, after = tokenizer.decode(ids[1:hole]), tokenizer.decode(ids[hole + 1 : -1])
        text = f"{before} [MASK] {after}"
        results.append(FillMask(text.strip(), tokenizer.tokens[answer], guesses))
    return results


def sentences_to_show(shards: Shards, longest: int, wanted: int = 4) -> list[list[int]]:
    """Token ids of some held-out sentences for `fill_masks`, from all over the text.

    Args:
        shards: the held-out part.
        longest: tokens that the model takes at most; 24 are enough to read.
        wanted: how many.
    """
    longest = min(24, longest)
    lengths = shards.sentence_lengths
    fitting = np.flatnonzero((lengths >= 8) & (lengths <= longest))
    if not len(fitting):
        fitting = np.argsort(-lengths, kind="stable")[:wanted]  # cut to what fits
    stride = max(1, len(fitting) // wanted)
    offsets = shards.sentence_offsets
    return [
        shards.tokens(offsets[index], offsets[index + 1])[:longest].tolist()
        for index in fitting[::stride][:wanted]
    ]
