"""A model as a graph of ONNX: made, checked against torch in ONNX Runtime, quantised, called.

The graph is that of transformers' own modules, padded, with every axis but the hidden ones free.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.errors import RunError
from fastbert.hf.load import quiet

NEWEST_OPSET = 23
"""That torch's exporter writes."""
_OUTPUTS = {
    "": ("last_hidden_state",),
    "QuestionAnswering": ("start_logits", "end_logits"),
}
_OF_TOKENS = ("", "TokenClassification", "QuestionAnswering", "MaskedLM")
_CHECKED = ((1, 1), (1, 7), (3, 17))
"""Sequences and the tokens of the longest; a batch of the longest that the model takes follows."""


@dataclass(frozen=True)
class Graph:
    """What a graph takes and gives.

    Attributes:
        head: see `fastbert.hf.load.HEADS`; "" for an encoder alone.
        inputs: names, in the order of the model's arguments.
        outputs: names, as transformers has them.
    """

    head: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def axes(self) -> tuple[str, ...]:
        """Of each input."""
        choices = ("choices",) if self.head == "MultipleChoice" else ()
        return ("batch", *choices, "sequence")


class Exported(nn.Module):
    """A model of transformers as the graph will be: tensors in, tensors out.

    Args:
        model: with one of `fastbert.hf.load.HEADS` or none, in fp32; not accelerated.
        head: which.
        types: whether it takes token types.
        pooling: of an encoder: "mean" or "cls", which adds `sentence_embedding`.
        normalize: whether that gets length 1.
    """

    def __init__(
        self, model: Any, head: str, types: bool, pooling: str = "", normalize: bool = False
    ) -> None:
        super().__init__()
        model.set_attn_implementation("eager")
        self.model, self.pooling, self.normalize = model, pooling, normalize
        inputs = ("input_ids", "attention_mask", *(("token_type_ids",) if types else ()))
        outputs = _OUTPUTS.get(head, ("logits",))
        if pooling:
            outputs = (*outputs, "sentence_embedding")
        self.graph = Graph(head, inputs, outputs)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            given["token_type_ids"] = token_type_ids
        found = self.model(**given)
        if not self.pooling:
            return tuple(found[name] for name in self.graph.outputs)
        states = found["last_hidden_state"]
        if self.pooling == "cls":
            vectors = states[:, 0]
        else:
            mask = attention_mask[:, :, None].to(states.dtype)
            vectors = (states * mask).sum(1) / mask.sum(1)
        return states, F.normalize(vectors, dim=1) if self.normalize else vectors


def write_graph(exported: Exported, path: Path, opset: int) -> None:
    """Writes a graph: one file, unless it holds more than the 2 GB that one can.

    Args:
        exported: the model.
        path: of the file, whose folder is there.
        opset: of ONNX.

    Raises:
        RunError: torch cannot make a graph of it.
    """
    import onnx

    graph = exported.graph
    shape = (2, 3, 7) if "choices" in graph.axes else (2, 7)
    example = {name: torch.ones(shape, dtype=torch.long) for name in graph.inputs}
    example["input_ids"] = torch.arange(example["input_ids"].numel()).view(shape) % 5 + 2
    if "token_type_ids" in example:
        example["token_type_ids"] = torch.zeros(shape, dtype=torch.long)
    axes = {name: dict(enumerate(graph.axes)) for name in graph.inputs}
    try:
        with silent(), torch.no_grad():
            program = torch.onnx.export(
                exported.eval(),
                kwargs=example,
                dynamo=True,
                dynamic_shapes=axes,
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                opset_version=opset,
                verbose=False,
            )
            assert program is not None
            _forget_sources(program.model)
            size = sum(one.numel() * one.element_size() for one in exported.parameters())
            program.save(path, external_data=size > _MOST_BYTES)
        onnx.checker.check_model(os.fspath(path), full_check=True)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from None
    except Exception as error:
        kind = type(exported.model).__name__
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunError(f"{kind}: no graph of opset {opset} can be made: {first[:200]}") from error


_MOST_BYTES = 2**31 - 2**24  # a file of ONNX holds less than 2 GiB, its nodes included


def _forget_sources(model: Any) -> None:
    """Leaves out which lines of which files on this machine a node comes from."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


@contextmanager
def silent() -> Iterator[None]:
    """Of what torch's exporter and ONNX Runtime's quantiser tell of themselves."""
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "root")
    loggers = [logging.getLogger(None if name == "root" else name) for name in names]
    before = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, before, strict=True):
            one.setLevel(level)


def newest_opset() -> int:
    """The newest that torch writes and the installed ONNX Runtime runs."""
    import onnx
    from onnx import helper

    kind = onnx.TensorProto.FLOAT
    ends = [helper.make_tensor_value_info(name, kind, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", ends[:1], ends[1:])
    for opset in range(min(NEWEST_OPSET, onnx.defs.onnx_opset_version()), 18, -1):
        imports = [helper.make_opsetid("", opset)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=10)
        try:
            session(model.SerializeToString())
        except Exception:  # of ONNX Runtime's own kinds
            continue
        return opset
    return 18


def session(source: Path | bytes) -> Any:
    """A session of ONNX Runtime on the CPU, with as many threads as torch takes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    given = source if isinstance(source, bytes) else os.fspath(source)
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def check_graph(
    exported: Exported, path: Path, longest: int, tolerance: float
) -> tuple[float, float]:
    """Compares what ONNX Runtime says with what torch says, at real tokens of padded batches.

    Args:
        exported: the model.
        path: its graph.
        longest: tokens of a sequence.
        tolerance: the largest difference that is let through; both compute in fp32.

    Returns:
        The largest difference of any output, and the largest value there.

    Raises:
        RunError: a difference is larger, or an output is not finite.
    """
    graph = exported.graph
    try:
        run = session(path)
    except Exception as error:  # of ONNX Runtime's own kinds
        reason = str(error).splitlines()[0][:300]
        raise RunError(f"ONNX Runtime does not take the graph: {reason}") from error
    worst = largest = 0.0
    generator = torch.Generator().manual_seed(0)
    for sequences, length in (*_CHECKED, (2, longest)):
        given = _batch(exported, sequences, min(length, longest), generator)
        with torch.inference_mode():
            wanted = exported(**given)
        found = run.run(list(graph.outputs), {name: one.numpy() for name, one in given.items()})
        real = given["attention_mask"].bool().numpy()
        for name, a, b in zip(graph.outputs, wanted, found, strict=True):
            x, of_tokens = a.numpy(), graph.head in _OF_TOKENS and name != "sentence_embedding"
            if x.shape != b.shape:
                raise RunError(f"the graph gives {name} of shape {b.shape}, torch of {x.shape}")
            difference = np.abs(x - b)[real] if of_tokens else np.abs(x - b)
            worst = float(np.fmax(worst, difference.max()))
            largest = float(np.fmax(largest, np.abs(x[real] if of_tokens else x).max()))
            if not difference.max() <= tolerance:  # as NaN is
                raise RunError(
                    f"the graph's {name} differs from torch's by {difference.max():.2g} in a batch "
                    f"of {sequences} x {min(length, longest)} tokens, more than "
                    f"tolerance = {tolerance:g} (its largest value is {np.abs(x).max():.3g}): "
                    "nothing is written"
                )
    return worst, largest


def _batch(
    exported: Exported, sequences: int, length: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Random tokens; each sequence but the first is shorter than those before it."""
    config, axes = exported.model.config, exported.graph.axes
    rows = sequences * (3 if "choices" in axes else 1)
    pad = config.pad_token_id or 0
    ids = torch.randint(0, config.vocab_size, (rows, length), generator=generator)
    ids[ids == pad] = (pad + 1) % config.vocab_size
    lengths = torch.tensor([max(1, length - row * length // rows) for row in range(rows)])
    mask = (torch.arange(length) < lengths[:, None]).long()
    given = {"input_ids": ids.where(mask.bool(), torch.tensor(pad)), "attention_mask": mask}
    if "token_type_ids" in exported.graph.inputs:
        types = torch.randint(0, config.type_vocab_size, ids.shape, generator=generator)
        given["token_type_ids"] = types * mask
    if "choices" in axes:
        given = {name: one.view(sequences, 3, length) for name, one in given.items()}
    return given


def quantize(path: Path, to: Path) -> None:
    """Writes a graph with weights in int8 and activations quantised as they come.

    Raises:
        RunError: it cannot be made.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    try:
        with silent():
            quantize_dynamic(path, to, per_channel=True, weight_type=QuantType.QInt8)
    except OSError as error:
        raise RunError(f"{to}: cannot be written: {error.strerror or error}") from None


class OnnxModel(nn.Module):
    """A graph called as the model that it was made of, with batches padded, on the CPU.

    Args:
        path: of the graph.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)  # whose device is asked for
        self.session = session(path)
        self.takes = [one.name for one in self.session.get_inputs()]
        self.gives = [one.name for one in self.session.get_outputs()]

    def forward(self, **given: Any) -> SimpleNamespace:
        """Its outputs by name; `given` may hold more than it takes."""
        inputs = {name: given[name] for name in self.takes if name in given}
        if "token_type_ids" in self.takes and "token_type_ids" not in inputs:
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        found = self.session.run(self.gives, {name: one.numpy() for name, one in inputs.items()})
        return SimpleNamespace(
            **{name: torch.from_numpy(one) for name, one in zip(self.gives, found, strict=True)}
        )


def opset_of(path: Path) -> int:
    """Of ONNX' own operators."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    return next(int(one.version) for one in model.opset_import if one.domain in ("", "ai.onnx"))
