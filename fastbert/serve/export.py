"""A model for other programs: a graph of ONNX, a folder of Hugging Face, or its weights alone.

Whatever is written is whole or not there, and a graph is there only once ONNX Runtime has said the
same as torch.

N texts, M masked tokens, H hidden size, V vocabulary.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from fastbert import __version__
from fastbert.errors import RunError, UserError
from fastbert.finetune.columns import Columns, detect, usable
from fastbert.finetune.data import class_order
from fastbert.finetune.infer import batches, infer
from fastbert.finetune.inputs import Table
from fastbert.finetune.predict import Pipeline, make_task
from fastbert.finetune.tasks import TASKS
from fastbert.finetune.tasks.base import Feature
from fastbert.hf.encode import DTYPES
from fastbert.hf.load import (
    load_tokenizer,
    load_whole,
    longest_sequence,
    positions,
    saved_head,
)
from fastbert.hf.onnx import (
    Exported,
    OnnxModel,
    check_graph,
    newest_opset,
    quantize,
    write_graph,
)
from fastbert.hf.relatives import FAMILIES
from fastbert.hf.save import PROMPTS, replaced, write_beside, write_model
from fastbert.hf.weights import local_folder
from fastbert.progress import progress_bar
from fastbert.settings import show

Say = Callable[[str], None]

GRAPH, QUANTIZED = "onnx/model.onnx", "onnx/model_quantized.onnx"
"""Where transformers.js, Optimum, sentence-transformers and text-embeddings-inference look."""
FILL_MASK = "fill-mask"
_LONGEST = 1024  # tokens of a sequence that graphs are checked with: attention's memory is squared
_MASKED = 0.15
_LOGITS = 2**25  # of masked words that are held at once: 128 MB


@dataclass(frozen=True)
class Source:
    """A model that is exported.

    Attributes:
        where: its folder, as it was named.
        folder: of Hugging Face.
        task: what it does: one of `fastbert.finetune.tasks.TASKS`, or "fill-mask".
        head: see `fastbert.hf.load.load_whole`.
        config: of transformers.
        tokenizer: the same.
        description: of an encoder: see `fastbert.hf.save.save_model`; of others empty.
    """

    where: str
    folder: Path
    task: str
    head: str
    config: Any
    tokenizer: Any
    description: Mapping[str, Any]


def read_source(
    where: str, task: str = "auto", pooling: str = "auto", normalize: bool | None = None
) -> Source:
    """Finds out what a folder's model is, and what it shall become.

    Args:
        where: a folder of a run or of Hugging Face.
        task: what it is for; "auto": as its folder says; "embed" leaves a head behind.
        pooling: of an encoder: "mean", "cls", or "auto": as its folder says, else "mean".
        normalize: of an encoder, whether vectors get length 1; None: as its folder says.

    Raises:
        UserError: no model, one that cannot be exported, or one for another task.
    """
    if not os.path.isdir(where):
        raise UserError(f"model = {show(where)}: no such folder")
    saved, config = saved_head(where)
    folder = local_folder(where)
    types = ("bert", *(family.module.replace("_", "-") for family in FAMILIES))
    if config.model_type not in types:
        raise UserError(
            f"{where}: {config.model_type} cannot be exported: it must be one of {', '.join(types)}"
        )
    head = _head(where, folder, saved, config, task)
    tokenizer = load_tokenizer(where)
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{where}: {type(tokenizer).__name__} is no fast tokenizer")
    name = next((one for one, kind in TASKS.items() if kind.head == head), FILL_MASK)
    tokenizer.model_max_length = longest_sequence(where, tokenizer)
    tokenizer.init_kwargs["model_input_names"] = list(tokenizer.model_input_names)  # is saved
    for of_here in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(of_here, None)
    description: dict[str, Any] = {}
    if name == "embed":
        made = make_task(name, where, config, tokenizer, None)
        made.pooling = made.pooling if pooling == "auto" else pooling
        made.normalize = made.normalize if normalize is None else normalize
        if made.pooling not in ("mean", "cls"):
            raise UserError(f"{where}: pooling {show(made.pooling)} must be mean or cls")
        description = made.description
    elif pooling != "auto" or normalize is not None:
        which = "pooling" if pooling != "auto" else "normalize"
        raise UserError(f"{which}: {where} is for {name}: vectors need --task embed")
    return Source(where, folder, name, head, config, tokenizer, description)


def _head(where: str, folder: Path, saved: str, config: Any, task: str) -> str:
    architecture = (config.architectures or [""])[0]
    whole = architecture == "BertForPreTraining"
    if task == "embed":
        return ""
    if saved == "MaskedLM" and task == "auto" and (folder / "modules.json").exists():
        return ""
    found = "PreTraining" if whole else saved
    if not found and not architecture.endswith("Model"):
        raise UserError(
            f"{where}: {architecture or 'a model without architectures'} cannot be exported with "
            "its head: ask for the encoder alone (--task embed)"
        )
    is_for = next((name for name, kind in TASKS.items() if kind.head == found), FILL_MASK)
    if task not in ("auto", is_for):
        raise UserError(f"task = {task!r}: {where} holds a model for {is_for}")
    return found


def export_hf(source: Source, out: Path, dtype: str, say: Say) -> None:
    """Writes a folder that transformers loads, of an encoder sentence-transformers as well.

    Args:
        source: what is exported.
        out: the folder, which is made.
        dtype: "fp32", "bf16", "fp16", or "auto": as it was saved.
        say: gets a line for each thing that was done.

    Raises:
        UserError: weights that fp16 cannot hold.
        RunError: it cannot be written.
    """
    model = _weights(source, dtype)
    with replaced(out) as temporary:
        write_model(temporary, model, source.tokenizer, source.description)
        _beside(source, temporary)
    say(_written(out))


def export_safetensors(source: Source, out: Path, dtype: str, say: Say) -> None:
    """Writes one file of weights, by the names that Hugging Face gives them.

    Args:
        source, out, dtype, say: as in `export_hf`, with a file for a folder.

    Raises:
        UserError: weights that fp16 cannot hold.
        RunError: it cannot be written.
    """
    model = _weights(source, dtype)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    state = {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    metadata = {
        "format": "pt",
        "architecture": type(model).__name__,
        "source": os.path.basename(os.path.abspath(source.where)),
        "writer": f"fastbert {__version__}",
    }
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(state, temporary, metadata)
        temporary.chmod(mode)  # safetensors lets its own user alone read
        os.replace(temporary, out)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{out}: cannot be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    say(f"wrote {out}: {len(state)} tensors, {_size(out.stat().st_size)}")


def _weights(source: Source, dtype: str) -> nn.Module:
    model = load_whole(source.folder, source.head)
    if dtype != "auto":
        model = model.to(DTYPES[dtype])
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            kind = f" as {dtype}" if dtype != "auto" else ""
            raise UserError(f"{source.where}: {name} is not finite{kind}: give another --dtype")
    return model


def _beside(source: Source, folder: Path) -> None:
    """What tokenizers of other languages read, and what a text begins with."""
    tokenizer = source.tokenizer
    if type(tokenizer.backend_tokenizer.model).__name__ == "WordPiece":
        words = sorted((number, word) for word, number in tokenizer.get_vocab().items())
        if [number for number, _ in words] == list(range(len(words))):
            text = "".join(f"{word}\n" for _, word in words)
            (folder / "vocab.txt").write_text(text, encoding="utf-8", newline="\n")
    if source.description and (source.folder / PROMPTS).exists():
        shutil.copyfile(source.folder / PROMPTS, folder / PROMPTS)


def _written(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    shown = ", ".join(
        f"{path.relative_to(folder).as_posix()} {_size(path.stat().st_size)}"
        for path in files
        if path.suffix in (".safetensors", ".onnx", ".data")
    )
    return f"wrote {folder}: {len(files)} files: {shown}"


def _bytes(graph: Path) -> int:
    """Of a graph, and of its weights where they stand beside it."""
    return sum(path.stat().st_size for path in graph.parent.glob(f"{graph.name}*"))


def _size(number: int) -> str:
    return f"{number / 1e6:.1f} MB" if number >= 1e6 else f"{number / 1e3:.1f} kB"


def export_onnx(
    source: Source,
    out: Path,
    opset: int,
    tolerance: float,
    judge: "Judge | None",
    say: Say,
    result: Say,
) -> None:
    """Writes a folder with a graph, once it says what torch says.

    Args:
        source: what is exported; weights in fp32.
        out: the folder, which is made.
        opset: of ONNX; 0: the newest that torch writes and ONNX Runtime runs.
        tolerance: see `fastbert.hf.onnx.check_graph`.
        judge: measures what int8 loses; None: there is no graph in int8.
        say: gets a line for each thing that was done.
        result: gets a line for each thing that was measured.

    Raises:
        RunError: there is no graph, it says something else, or it cannot be written.
    """
    head = "MaskedLM" if source.head == "PreTraining" else source.head
    if head != source.head:
        say("its head for next sentences is left out: a graph gives one kind of logits")
    model: Any = load_whole(source.folder, head).float()
    takes_types = "token_type_ids" in source.tokenizer.model_input_names
    pooling = source.description.get("pooling", "")
    normalize = bool(source.description.get("normalize"))
    exported = Exported(model, head, takes_types, pooling, normalize)
    opset = opset or newest_opset()
    with replaced(out) as temporary:
        graph, small = temporary / GRAPH, temporary / QUANTIZED
        graph.parent.mkdir(parents=True)
        write_graph(exported, graph, opset)
        axes = ", ".join(exported.graph.axes)
        say(
            f"graph: opset {opset}, {', '.join(exported.graph.inputs)} ({axes}) -> "
            f"{', '.join(exported.graph.outputs)}"
        )
        longest = min(positions(source.config), _LONGEST)
        worst, largest = check_graph(exported, graph, longest, tolerance)
        result(
            f"largest difference from torch: {worst:.2g} (of values up to {largest:.3g}, batches "
            f"up to 2 x {longest} tokens)"
        )
        if judge is not None:
            quantize(graph, small)
            a, b = map(_bytes, (graph, small))
            result(f"int8: {_size(b)}, fp32: {_size(a)} ({b / a:.0%})")
            for line in judge.lines(graph, small):
                result(line)
        write_beside(temporary, model, source.tokenizer, source.description)
        _beside(source, temporary)
    say(_written(out))


class Judge:
    """What a model in int8 loses, measured on rows of a table.

    Args:
        source: the model.
        table: read whole.
        named: columns by role, see `fastbert.finetune.columns.detect`.
        separator: between several labels in a field of text.
        say: gets a line for each thing that was found.

    Raises:
        UserError: the table lacks what the model's task needs.
    """

    def __init__(
        self, source: Source, table: Table, named: Mapping[str, str], separator: str, say: Say
    ) -> None:
        self.source, self.separator = source, separator
        self.columns, self.labelled = _columns(source, table, named)
        self.rows, skipped = usable(table, self.columns)
        self.order = class_order(table, self.columns)
        say(f"eval: {table.path}: {len(self.rows):,} rows ({table.format}), {self.columns.line()}")
        for one, kind in ((table.skipped, "file"), (skipped, "row")):
            if one.total:
                say(one.line(table.path, kind))
        if self.labelled:  # a label that no one knows is told before a graph is made
            task = self._task()
            task.meet([task.example(row, self.columns, True) for row in self.rows])

    def lines(self, fp32: Path, int8: Path) -> list[str]:
        """What is said of both graphs on the same rows."""
        both = {"fp32": OnnxModel(fp32), "int8": OnnxModel(int8)}
        lines = []
        if self.labelled:
            found = [self._metrics(name, model) for name, model in both.items()]
            lines += _compared(*found)
        if self.source.task == "embed":
            lines.append(_cosines(*(self._vectors(name, model) for name, model in both.items())))
        elif self.source.task == FILL_MASK:
            lines += _compared(*(self._masked(name, model) for name, model in both.items()))
        return lines

    def _task(self) -> Any:
        name = "embed" if self.source.task == FILL_MASK else self.source.task
        where = self.source.where
        made = make_task(name, where, self.source.config, load_tokenizer(where), None)
        made.order = self.order
        if self.separator:
            made.separator = self.separator
        return made

    def _metrics(self, name: str, model: OnnxModel) -> Mapping[str, float]:
        with progress_bar(total=len(self.rows), desc=f"eval {name}", unit="row") as bar:
            return Pipeline(self._task(), model).judge(self.rows, self.columns, bar)[2].metrics

    def _features(self) -> tuple[Any, list[Feature]]:
        task = self._task()
        examples = [task.example(row, self.columns, False) for row in self.rows]
        return task, task.features(examples, False)

    def _vectors(self, name: str, model: OnnxModel) -> np.ndarray:  # (N, H)
        task, features = self._features()
        with progress_bar(total=len(features), desc=f"eval {name}", unit="row") as bar:
            return np.concatenate(infer(task, model, features, progress=bar)[0])

    def _masked(self, name: str, model: OnnxModel) -> Mapping[str, float]:
        """Loss and accuracy of words that are masked, the same ones for every model."""
        task, features = self._features()
        hidden = _hidden(task.tokenizer, features)
        loss = right = count = 0.0
        most = max(1, _LOGITS // self.source.config.vocab_size)
        with progress_bar(total=len(features), desc=f"eval {name}", unit="row") as bar:
            for places in batches(features, most):
                batch = task.batch([features[place] for place in places])
                masks = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
                for row, place in enumerate(places):
                    masks[row, hidden[place]] = True
                wanted = batch["input_ids"][masks]
                batch["input_ids"][masks] = task.tokenizer.mask_token_id
                logits = model(**batch).logits[masks]  # (M, V)
                loss += float(F.cross_entropy(logits, wanted, reduction="sum"))
                right += float((logits.argmax(1) == wanted).sum())
                count += len(wanted)
                bar.update(len(places))
        return {"masked words": count, "loss": loss / count, "accuracy": right / count}


def _columns(source: Source, table: Table, named: Mapping[str, str]) -> tuple[Columns, bool]:
    """The columns that are read, and whether there are labels among them."""
    if source.task not in ("embed", FILL_MASK):
        return detect(table, source.task, named), True
    if source.task == "embed" and {"text_pair", "label", "negative"} & {*named}:
        return detect(table, source.task, named), True
    found = detect(table, "embed", named, with_labels=False)
    of = {role: name for role, name in found.of.items() if role == "text"}
    return Columns("embed", of, (), found.among), False


def _compared(fp32: Mapping[str, float], int8: Mapping[str, float]) -> list[str]:
    return [
        f"{name}: {fp32[name]:.4f} fp32, {int8[name]:.4f} int8 ({int8[name] - fp32[name]:+.4f})"
        for name in fp32
    ]


def _cosines(fp32: np.ndarray, int8: np.ndarray) -> str:
    dots = (fp32 * int8).sum(1)
    cosines = dots / (np.linalg.norm(fp32, axis=1) * np.linalg.norm(int8, axis=1))
    return (
        f"cosine of int8 to fp32: mean {cosines.mean():.5f}, least {cosines.min():.5f} "
        f"({len(cosines):,} texts)"
    )


def _hidden(tokenizer: Any, features: Sequence[Feature]) -> list[list[int]]:
    """Of each sequence the places of the words to be masked: 15% of all, one at least."""
    special = {*tokenizer.all_special_ids}
    draw = np.random.default_rng(0)
    found = []
    for feature in features:
        ids = feature.inputs[0]["input_ids"]
        words = [place for place, token in enumerate(ids) if token not in special]
        count = min(len(words), max(1, round(_MASKED * len(words))))
        found.append(sorted(map(int, draw.choice(words, count, replace=False))) if words else [])
    return found
