"""A trained model and its tokenizer as a folder that transformers loads: whole, or not there."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fastbert.errors import RunError
from fastbert.hf.load import quiet

DESCRIPTION = "fastbert"
"""The key of config.json that holds what a task needs to know beside transformers' settings."""
PROMPTS = "config_sentence_transformers.json"
"""What sentence-transformers puts before texts, and how it compares vectors."""


def save_model(folder: Path, model: Any, tokenizer: Any, description: Mapping[str, Any]) -> None:
    """Writes config.json, weights and tokenizer, in place of what was there.

    Args:
        folder: to be made, or replaced.
        model: of transformers; for one of PEFT, what it becomes with its adapters merged.
        tokenizer: of transformers.
        description: see `DESCRIPTION`; its `pooling`, "mean" or "cls", makes it a folder of
            sentence-transformers as well.

    Raises:
        RunError: it cannot be written.
    """
    with replaced(folder) as temporary:
        write_model(temporary, model, tokenizer, description)


def write_model(folder: Path, model: Any, tokenizer: Any, description: Mapping[str, Any]) -> None:
    """As `save_model`, into a folder whose caller sees to it that it is whole or not there."""
    with quiet():
        model.save_pretrained(folder, max_shard_size=_ONE_FILE)
    write_beside(folder, model, tokenizer, description)
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", path)  # safetensors lets its own user alone read


_ONE_FILE = "1000GB"  # transformers would make several of a large model


def write_beside(folder: Path, model: Any, tokenizer: Any, description: Mapping[str, Any]) -> None:
    """Writes all that stands beside a model's weights, see `save_model`.

    Args:
        folder: made if missing.
        model, tokenizer: as in `save_model`.
        description: the same; an empty one leaves what `model.config` has.
    """
    config, kind = model.config, type(model).__name__
    if description:
        setattr(config, DESCRIPTION, dict(description))
    config.architectures = [kind]
    config.dtype = str(model.dtype).removeprefix("torch.")
    with quiet():
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if kind.endswith("Classification"):
        _name_labels(folder / "config.json", config.id2label)
    if "pooling" in description:
        _write_layout(folder, config.hidden_size, description)


def _name_labels(path: Path, labels: Mapping[int, str]) -> None:
    """Labels that transformers leaves out where they have the names it would give them itself."""
    content = {
        "id2label": {str(number): name for number, name in labels.items()},
        "label2id": {name: number for number, name in labels.items()},
    }
    content |= json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """Yields a place to write what takes the folder's at the end, whole or not at all.

    Raises:
        RunError: it cannot be written.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    old = folder.with_name(f".{folder.name}.old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        yield temporary
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = (error.strerror or error) if isinstance(error, OSError) else error
        raise RunError(f"{folder}: cannot be written: {reason}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def recover(folder: Path) -> None:
    """Brings back the folder that a process was killed over while it replaced it; tidies up."""
    shutil.rmtree(folder.with_name(f".{folder.name}.tmp"), ignore_errors=True)
    old = folder.with_name(f".{folder.name}.old")
    if old.is_dir() and not folder.exists():
        os.replace(old, folder)


def _write_layout(folder: Path, width: int, description: Mapping[str, Any]) -> None:
    """The modules of sentence-transformers: this model, and what makes one vector of its states."""
    kinds = {"Transformer": "", "Pooling": "1_Pooling"}
    if description.get("normalize"):
        kinds["Normalize"] = "2_Normalize"
    modules = [
        {
            "idx": place,
            "name": str(place),
            "path": path,
            "type": f"sentence_transformers.models.{kind}",
        }
        for place, (kind, path) in enumerate(kinds.items())
    ]
    pooling = description["pooling"]
    pooled = {
        "word_embedding_dimension": width,
        "pooling_mode_cls_token": pooling == "cls",
        "pooling_mode_mean_tokens": pooling == "mean",
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,  # which text-embeddings-inference asked for
    }
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": pooled,
        "sentence_bert_config.json": {"max_seq_length": description["max_seq_length"]},
        PROMPTS: {
            "model_type": "SentenceTransformer",
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }
    for path in filter(None, kinds.values()):
        (folder / path).mkdir()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
