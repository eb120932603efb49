"""More examples to train with: words masked, and replaced by what the model itself would say.

Wu et al. 2019 without its label embedding; labels are kept, which is a guess like any.
"""

import dataclasses
import random
import re
from collections.abc import Sequence
from itertools import chain

import torch

from fastbert.errors import UserError
from fastbert.finetune.tags import words_of
from fastbert.finetune.tasks.base import Example
from fastbert.hf.fill_mask import MaskFiller
from fastbert.progress import progress_bar

SHARE = 0.15
"""Of a text's words that are replaced, at least one."""
_GUESSES = 10
_TOGETHER = 64
_LETTER = re.compile(r"\w")


def augmented(
    examples: Sequence[Example],
    role: str,
    count: int,
    model: str,
    seed: int,
    *,
    markers: Sequence[str] = (),
    device: str | torch.device = "cpu",
) -> list[Example]:
    """Examples like those given with some words others; fewer where nothing can be replaced.

    Args:
        examples: to begin with.
        role: the field that holds the text.
        count: of those to make; each is taken once before one is taken again.
        model: a folder whose model has the head for masked words.
        seed: of what is chosen.
        markers: marks around entities, which stay.
        device: where the model computes.

    Raises:
        UserError: the model lacks that head.
    """
    try:
        fill = MaskFiller(model)
    except UserError as error:
        raise UserError(f"augment needs the head for masked words: {error}") from None
    fill.model.to(device)
    draw = random.Random(seed)
    order = draw.sample(examples, len(examples))
    chosen = [order[place % len(order)] for place in range(count)]
    made: list[Example] = []
    bar = progress_bar(total=count, desc="augment", unit="text")
    for begin in range(0, count, _TOGETHER):
        together = chosen[begin : begin + _TOGETHER]
        texts, places = [], []
        for one in together:
            text, spans = _masked(one.fields[role], fill, draw, markers)
            texts.append(text)
            places.append(spans)
        holes = [place for place, spans in enumerate(places) if spans]
        found = iter(fill([texts[place] for place in holes], _GUESSES) if holes else ())
        for one, text, spans in zip(together, texts, places, strict=True):
            for old in spans:
                word = _other(next(found).guesses, old, draw)
                text = text.replace(fill.tokenizer.mask_token, word, 1)
            if text == one.fields[role]:
                continue
            fields = one.fields | {role: text}
            made.append(dataclasses.replace(one, where=f"{one.where}, augmented", fields=fields))
        bar.update(len(together))
    bar.close()
    return made


def _masked(
    text: str, fill: MaskFiller, draw: random.Random, markers: Sequence[str]
) -> tuple[str, list[str]]:
    """The text with some words masked, and these; as it is where it would be too long."""
    mask = fill.tokenizer.mask_token
    marks = [m.span() for mark in markers for m in re.finditer(re.escape(mark), text)]
    words = [
        (begin, end)
        for begin, end in words_of(text, chain.from_iterable(marks))
        if _LETTER.match(text, begin) and not any(first <= begin < last for first, last in marks)
    ]
    tokens = len(fill.tokenizer(text, verbose=False)["input_ids"])
    if not words or mask in text or tokens > fill.encoder.positions():
        return text, []
    count = max(1, round(SHARE * len(words)))
    chosen = sorted(draw.sample(words, count))
    old = [text[begin:end] for begin, end in chosen]
    for begin, end in reversed(chosen):
        text = text[:begin] + mask + text[end:]
    return text, old


def _is_word(text: str) -> bool:
    return bool(_LETTER.match(text)) and words_of(text) == [(0, len(text))]


def _other(guesses: Sequence[tuple[str, int, float]], old: str, draw: random.Random) -> str:
    """A whole word other than the one that stood there, by its probability."""
    words = {
        word.strip(): chance
        for word, _, chance in guesses
        if _is_word(word.strip()) and word.strip().lower() != old.lower()
    }
    if not words:
        return old
    return draw.choices(list(words), list(words.values()))[0]
