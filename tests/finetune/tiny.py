"""Tiny models of four families, two layers by 32, their tokenizers, and data to fine-tune with."""

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from tokenizers import pre_tokenizers

from fastbert.finetune.config import CONFIGS
from fastbert.finetune.loop import FinetuneResult
from fastbert.finetune.runs import finetune

WORDS = (
    *("good", "fine", "great", "nice", "bad", "poor", "awful", "sad", "the", "a", "film", "book"),
    *("plot", "was", "is", "it", "and", "very", "of", "in", "ada", "bob", "carl", "met", "saw"),
    *("paris", "rome", "who", "where", "when", "near", "to", "by", "on", "we", "they"),
)
PIECES = ("##s", "##ly", "##er", "##ing", "##ton", "##ville")
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def config(family: str = "bert", **changes: Any) -> Any:
    """No dropout; 66 positions, of which RoBERTa leaves two to its padding."""
    size = len(wordpieces()) if family != "roberta" else len(byte_pairs())
    if family == "distilbert":
        values: dict[str, Any] = {
            "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "dropout": 0.0,
            "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "qa_dropout": 0.0,
        }  # fmt: skip
    else:
        values = {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 64, "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }  # fmt: skip
    kind = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert", "electra": "Electra"}
    values |= {"vocab_size": size, "max_position_embeddings": 66}
    if family == "roberta":
        values |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    if family == "electra":
        values |= {"embedding_size": 16}
    return getattr(transformers, f"{kind[family]}Config")(**values | changes)


def wordpieces() -> dict[str, int]:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    rest = [*letters, *(f"##{letter}" for letter in letters), "?", ".", ","]
    return {word: n for n, word in enumerate(dict.fromkeys([*_SPECIAL, *WORDS, *PIECES, *rest]))}


def byte_pairs() -> dict[str, int]:
    """All bytes, and no merges: a piece a byte."""
    special = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    return {
        word: n for n, word in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }


def tokenizer(family: str = "bert") -> Any:
    if family == "roberta":
        return transformers.RobertaTokenizer(vocab=byte_pairs(), merges=[], model_max_length=64)
    return transformers.BertTokenizer(vocab=wordpieces(), model_max_length=66)


def model(head: str = "ForMaskedLM", family: str = "bert", seed: int = 1, **changes: Any) -> Any:
    """With weights large enough that a mistake shows."""
    torch.manual_seed(seed)
    kind = getattr(transformers, f"AutoModel{head}")
    made = kind.from_config(config(family, **changes))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


def save(folder: Path, head: str = "ForMaskedLM", family: str = "bert", **changes: Any) -> Path:
    model(head, family, **changes).save_pretrained(folder)
    tokenizer(family).save_pretrained(folder)
    return folder


POSITIVE, NEGATIVE = ("good", "fine", "great", "nice"), ("bad", "poor", "awful", "sad")


def sentences(count: int, classes: int = 2, seed: int = 0) -> list[tuple[str, str]]:
    """Texts of three to twelve words, and their labels: a, b, ... by the word among them."""
    draw = random.Random(seed)
    rest = WORDS[8:]
    marks = [POSITIVE, NEGATIVE, ("ada", "bob", "carl"), ("paris", "rome")][:classes]
    found = []
    for place in range(count):
        words = [draw.choice(rest) for _ in range(draw.randint(2, 11))]
        words.insert(draw.randrange(len(words)), draw.choice(marks[place % classes]))
        found.append((" ".join(words), "abcd"[place % classes]))
    return found


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def labelled(path: Path, count: int, classes: int = 2, seed: int = 0) -> Path:
    return write_rows(
        path, [{"text": text, "label": label} for text, label in sentences(count, classes, seed)]
    )


def tagged(path: Path, count: int, seed: int = 0) -> Path:
    """CoNLL: persons of one or two words, and places."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        sentence = [(draw.choice(WORDS[8:15]), "O") for _ in range(draw.randint(1, 8))]
        at = draw.randrange(len(sentence) + 1)
        who = [("ada", "B-person"), (draw.choice(("carlton", "bobville")), "I-person")]
        what = who[: draw.randint(1, 2)] if draw.random() < 0.6 else [("paris", "B-place")]
        lines += [f"{word}\t{tag}" for word, tag in (*sentence[:at], *what, *sentence[at:])]
        lines.append("")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def asked(path: Path, count: int, seed: int = 0, unanswerable: bool = False) -> Path:
    """Questions on paragraphs of up to forty words."""
    draw = random.Random(seed)
    rows = []
    for place in range(count):
        words = [draw.choice(WORDS[8:20]) for _ in range(draw.randint(4, 40))]
        who, where = draw.choice(("ada", "bob", "carl")), draw.choice(("paris", "rome"))
        words[draw.randrange(len(words))] = who
        words.append(where)
        context = " ".join(words)
        ask, answer = ("who is it ?", who) if place % 2 else ("where is it ?", where)
        answers = {"text": [answer], "answer_start": [context.index(answer)]}
        if unanswerable and place % 3 == 0:
            answers = {"text": [], "answer_start": []}
        rows.append({"id": f"q{place}", "question": ask, "context": context, "answers": answers})
    return write_rows(path, rows)


def run(task: str, model: Path, train: Path, out: Path, **changes: Any) -> FinetuneResult:
    """Every step's loss is logged; no curves beside the log."""
    settings = {
        "eval": "0.2", "logging_steps": 1, "report_to": "none", "num_train_epochs": 2.0,
        "per_device_train_batch_size": 4, "learning_rate": 1e-3, "device": "cpu",
    } | changes  # fmt: skip
    paths = {name: str(path) for name, path in (("model", model), ("train", train), ("out", out))}
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in settings.items()}
    return finetune(CONFIGS[task](**paths, **settings))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "hf" / "model.safetensors")
