"""`fastbert export`: a model as a graph of ONNX, as a folder of Hugging Face, or as its weights."""

import os
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from fastbert.commands.checks import check_folder, check_output, check_path
from fastbert.commands.options import Commands, given
from fastbert.commands.predict import COLUMNS, column, named
from fastbert.config import num_threads_setting
from fastbert.errors import UserError
from fastbert.serve.config import TASKS
from fastbert.settings import Config, Group, check_fields, setting, settings
from fastbert.train.interrupts import held_signals

if TYPE_CHECKING:
    from fastbert.serve.export import Judge, Source

RUN = Group("run", "what is exported, as what, and where it goes")
EMBED = Group("embed", "of an encoder: what makes a vector of its states")
GRAPH = Group("graph", "of ONNX")

_FILE = "safetensors"


@dataclass(frozen=True)
class ExportConfig(Config):
    """What `fastbert export` can be told.

    Raises:
        UserError: a value is out of bounds, or two do not fit together.
    """

    command: ClassVar[str] = "export"

    model: str = setting(
        "",
        "folder of a model of ours or of Hugging Face, or of a run",
        RUN,
        aka=("model_name_or_path", "model_name", "model_id", "checkpoint"),
    )
    to: str = setting("", "what it becomes", RUN, choices=("onnx", "hf", _FILE), aka=("target",))
    out: str = setting(
        "", "folder to be made, of safetensors a file", RUN, aka=("output", "output_dir")
    )
    task: str = setting(
        "auto",
        "what it does (auto = as its folder says; embed leaves a head behind)",
        RUN,
        choices=("auto", *TASKS),
    )
    dtype: str = setting(
        "auto",
        "of the weights, hf and safetensors (auto = as they were saved)",
        RUN,
        choices=("auto", "fp32", "bf16", "fp16"),
        aka=("torch_dtype", "precision"),
    )
    num_threads: int = num_threads_setting(RUN)

    pooling: str = setting(
        "auto",
        "auto = as its folder says, else mean",
        EMBED,
        choices=("auto", "mean", "cls"),
        aka=("pooling_mode",),
    )
    normalize: bool | None = setting(
        None, "whether vectors get length 1 (none = as its folder says)", EMBED
    )

    opset: int = setting(
        0,
        "version of the operators (0 = the newest up to 23 that the installed ONNX Runtime runs)",
        GRAPH,
        at_least=0,
        at_most=1000,
        aka=("opset_version",),
    )
    tolerance: float = setting(
        1e-4,
        "largest difference from torch, in any output, that is let through",
        GRAPH,
        more_than=0,
        at_most=1,
        aka=("atol",),
    )
    quantize: str = setting(
        "none",
        "a second graph with weights in int8; --eval measures what it loses",
        GRAPH,
        choices=("none", "int8"),
    )
    eval: str = setting(
        "", "file of labelled rows (of vectors and masked words: of texts)", GRAPH, aka=("data",)
    )
    format: str = setting(
        "auto",
        "of that file (auto = by content)",
        GRAPH,
        choices=("auto", "csv", "tsv", "jsonl", "json", "parquet", "conll", "text"),
    )

    text_column: str = column("the text")
    text_pair_column: str = column("a second text, for pairs")
    tokens_column: str = column("the words, a list")
    question_column: str = column("the question")
    context_column: str = column("the paragraph")
    choices_columns: str = column("the list of choices, or columns of one each: a,b,c")
    label_column: str = column("the label")
    label_separator: str = setting("", "between several labels in a field of text", COLUMNS)
    tags_column: str = column("the tags")
    answers_column: str = column("the answers")
    negative_column: str = column("a text that does not belong")
    score_column: str = column("the similarity")

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.model:
            raise UserError("model = '': give --model DIR, the folder of a model")
        if not self.out:
            what = "FILE, which" if self.to == _FILE else "DIR, the folder that"
            raise UserError(f"out = '': give --out {what} is to be made")
        for one in settings(type(self)):
            if getattr(self, one.name) == one.default:
                continue
            if self.to != "onnx" and one.group in (GRAPH, COLUMNS):
                raise UserError(f"{one.name}: is for --to onnx: leave it out")
            if not self.eval and (one.group is COLUMNS or one.name == "format"):
                raise UserError(f"{one.name}: is of the rows of --eval FILE: give it, too")
        if self.to == "onnx" and self.dtype not in ("auto", "fp32"):
            raise UserError(f"dtype = {self.dtype!r}: a graph is fp32 (--quantize int8 for less)")
        if 0 < self.opset < 18:
            raise UserError(f"opset = {self.opset}: must be 18 or more, or 0 for the newest")
        if self.quantize == "int8" and not self.eval:
            raise UserError(
                "quantize = 'int8': what it loses is measured: give --eval FILE (labelled rows; "
                "of vectors and masked words, texts)"
            )
        if self.eval and self.quantize == "none":
            raise UserError("eval: measures what int8 loses: give --quantize int8, or leave it out")


def add(commands: Commands) -> None:
    """Adds the command."""
    commands.add(
        "export",
        "make of a model what other programs load: ONNX, Hugging Face, safetensors",
        run,
        ExportConfig,
        "--model DIR --to onnx|hf|safetensors --out DIR|FILE",
    )


def run(args: Namespace) -> None:
    """Writes a folder or a file, and says what was measured.

    Raises:
        UserError: a bad request, or a model that cannot be exported.
        RunError: the graph says something else than torch, or the disk is full.
    """
    config: ExportConfig = given(args)
    check_path("model", config.model, words=())
    _check_out(config)
    if config.eval:
        check_path("eval", config.eval, words=())
    with held_signals():
        from fastbert.finetune.needs import needs

        if config.to == "onnx":
            for module in ("onnx", "onnxscript", "onnxruntime"):
                needs(module)
        import torch

        from fastbert.serve import export
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    source = export.read_source(config.model, config.task, config.pooling, config.normalize)
    _say(f"model: {config.model}: {source.config.model_type}, {source.task}{_pooled(source)}")
    out = Path(os.path.realpath(config.out))
    if config.to == "hf":
        export.export_hf(source, out, config.dtype, _say)
    elif config.to == _FILE:
        export.export_safetensors(source, out, config.dtype, _say)
    else:
        judge = _judge(config, source) if config.quantize == "int8" else None
        export.export_onnx(source, out, config.opset, config.tolerance, judge, _say, print)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _pooled(source: "Source") -> str:
    if not source.description:
        return ""
    length = ", of length 1" if source.description["normalize"] else ""
    return f" ({source.description['pooling']} of its states{length})"


def _check_out(config: ExportConfig) -> None:
    out = config.out
    if config.to == _FILE:
        if os.path.isdir(out):
            raise UserError(
                f"out = {out!r} is a folder: give the path of a file, as in {out}/x.safetensors"
            )
        if os.path.exists(out):
            raise UserError(f"out = {out!r} is there already: name another file")
        check_output("out", out)
        return
    check_folder("out", out)
    if os.path.isdir(out) and os.listdir(out):
        raise UserError(f"out = {out!r} already holds files: name another folder")


def _judge(config: ExportConfig, source: "Source") -> "Judge":
    from fastbert.finetune.inputs import read_table
    from fastbert.serve.export import Judge

    table = read_table(
        config.eval, "eval", format=None if config.format == "auto" else config.format
    )
    task = "embed" if source.task == "fill-mask" else source.task
    return Judge(source, table, named(config, task), config.label_separator, _say)
