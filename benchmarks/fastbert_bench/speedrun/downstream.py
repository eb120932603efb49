"""What a speedrun's checkpoints are worth downstream: fine-tuned by transformers' Trainer.

    python -m fastbert_bench.speedrun.downstream RESULT_FOLDER ... --data FOLDER

A RESULT_FOLDER holds seed-1/hf and so on; each of them is fine-tuned once a task, with its number
as the seed, by the same settings for all. `--data` holds sentiment-{train,eval}.tsv (columns text
and label) and entities-{train,eval}.conll (word, tab, IOB2 tag; a blank line ends a sentence).
Needs the package accelerate.
"""

import argparse
import csv
import importlib.util
import json
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from fastbert.progress import progress_bar
from fastbert_bench.speedrun.rows import spread

EPOCHS = {"sentiment": 5, "entities": 10}
LEARNING_RATE = 5e-4
"""Ten times what is usual for base: the models are some hundred times smaller."""
BATCH = 16
LONGEST = 128


class _Examples(Dataset[dict[str, Any]]):
    def __init__(self, examples: Sequence[dict[str, Any]]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._examples[index]


def sentences(path: Path) -> list[tuple[list[str], list[str]]]:
    """Words and tags of each sentence of a CoNLL file."""
    found = []
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        pairs = [line.split("\t") for line in block.splitlines() if line.strip()]
        if pairs:
            found.append(([word for word, _ in pairs], [tag for _, tag in pairs]))
    return found


def spans(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """The entities of IOB2 tags: first word, word after the last, type."""
    found, start, kind = set(), 0, ""
    for index, tag in enumerate([*tags, "O"]):
        if kind and tag != f"I-{kind}":
            found.add((start, index, kind))
            kind = ""
        if tag != "O" and not kind:  # an I- without its B- begins one, as conlleval has it
            start, kind = index, tag[2:]
    return found


def f1(predicted: Sequence[Sequence[str]], right: Sequence[Sequence[str]]) -> float:
    """F1 of whole entities over all sentences."""
    pairs = [(spans(guess), spans(truth)) for guess, truth in zip(predicted, right, strict=True)]
    hits = sum(len(guess & truth) for guess, truth in pairs)
    return 2 * hits / max(1, sum(len(guess) + len(truth) for guess, truth in pairs))


def sentiment(hf: Path, data: Path, seed: int) -> float:
    """Accuracy."""
    tokenizer = AutoTokenizer.from_pretrained(hf)
    parts = []
    for part in ("train", "eval"):
        with (data / f"sentiment-{part}.tsv").open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        encoded = tokenizer([one["text"] for one in lines], truncation=True, max_length=LONGEST)
        ids = zip(encoded["input_ids"], lines, strict=True)
        parts.append(
            [{"input_ids": i, "labels": int(one["label"] == "positive")} for i, one in ids]
        )
    model = AutoModelForSequenceClassification.from_pretrained(hf, num_labels=2)
    logits, labels = _tuned(model, parts, DataCollatorWithPadding(tokenizer), seed, "sentiment")
    return float((logits.argmax(-1) == labels).mean())


def entities(hf: Path, data: Path, seed: int) -> float:
    """F1 of whole entities."""
    tokenizer = AutoTokenizer.from_pretrained(hf)
    texts = {part: sentences(data / f"entities-{part}.conll") for part in ("train", "eval")}
    tags = sorted({tag for _, some in texts["train"] + texts["eval"] for tag in some})
    parts = []
    for words_and_tags in texts.values():
        encoded = tokenizer(
            [words for words, _ in words_and_tags], is_split_into_words=True, truncation=True,
            max_length=LONGEST,
        )  # fmt: skip
        examples = []
        for index, (_, given) in enumerate(words_and_tags):
            of = encoded.word_ids(index)
            labels = [
                tags.index(given[word]) if word is not None and word != before else -100
                for before, word in pairwise([None, *of])
            ]
            examples.append({"input_ids": encoded["input_ids"][index], "labels": labels})
        parts.append(examples)
    model = AutoModelForTokenClassification.from_pretrained(hf, num_labels=len(tags))
    logits, truths = _tuned(
        model, parts, DataCollatorForTokenClassification(tokenizer), seed, "entities"
    )
    guesses = logits.argmax(-1)
    kept = [truth != -100 for truth in truths]
    return f1(
        [[tags[i] for i in guess[keep]] for guess, keep in zip(guesses, kept, strict=True)],
        [[tags[i] for i in truth[keep]] for truth, keep in zip(truths, kept, strict=True)],
    )


def _tuned(
    model: Any, parts: Sequence[Sequence[dict[str, Any]]], collator: Any, seed: int, task: str
) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels of the held-out part after fine-tuning."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder, num_train_epochs=EPOCHS[task], per_device_train_batch_size=BATCH,
                per_device_eval_batch_size=64, learning_rate=LEARNING_RATE, warmup_steps=0.1,
                seed=seed, report_to="none", save_strategy="no", logging_strategy="no",
                disable_tqdm=True,
            ),
            data_collator=collator,
            train_dataset=_Examples(parts[0]),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        found = trainer.predict(_Examples(parts[1]))
    return np.asarray(found.predictions), np.asarray(found.label_ids)


TASKS = {"sentiment": (sentiment, "accuracy"), "entities": (entities, "F1")}


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table: a row for each folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="RESULT_FOLDER")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path, help="every figure, for the record")
    asked = parser.parse_args(argv)
    if importlib.util.find_spec("accelerate") is None:
        parser.error("transformers' Trainer needs the package accelerate")
    transformers.logging.set_verbosity_error()  # of heads that are new
    transformers.logging.disable_progress_bar()
    heads = [f"{task}, {what}" for task, (_, what) in TASKS.items()]
    print(f"| checkpoints | {' | '.join(heads)} |\n|{'---|' * (1 + len(heads))}")
    every = {}
    for folder in asked.folders:
        runs = sorted(folder.glob("seed-*/hf"), key=lambda hf: int(hf.parent.name[5:]))
        if not runs:
            parser.error(f"{folder} holds no seed-1/hf")
        figures: dict[str, list[float]] = {task: [] for task in TASKS}
        todo = [(task, hf) for task in TASKS for hf in runs]
        for task, hf in progress_bar(todo, desc=f"tuning {folder.name}", unit="model"):
            figures[task].append(TASKS[task][0](hf, asked.data, int(hf.parent.name[5:])))
        every[folder.name] = figures
        cells = (spread(some, ".3f") for some in figures.values())
        print(f"| {folder.name} | {' | '.join(cells)} |")
    if asked.json:
        asked.json.write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
