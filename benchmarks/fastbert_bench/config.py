"""Everything that `fastbert bench`, `profile` and `estimate` can be told, each setting once.

Standard library only, so that a mistake is told at once: the suites themselves import torch.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from fastbert import config as engine
from fastbert import settings
from fastbert.errors import UserError, did_you_mean
from fastbert.settings import Group, setting

BENCH = Group("bench", "what is measured, and against what")
ESTIMATE = Group("estimate", "what is planned, and on what")
PROFILE = Group("profile", "what is recorded, and where it is written")

STEP_RIVAL_NAMES = (
    *("hf-eager", "hf-sdpa", "hf-sdpa-cudnn", "hf-flash", "hf-flash-flat", "hf-eager-compile"),
    *("hf-sdpa-compile", "hf-flash-compile", "hf-sdpa-compile-max"),
    *("torch-encoder", "modernbert", "liger", "fastbert.accelerate"),
)
STEP_RIVALS = {
    "cpu": "hf-eager,hf-sdpa,hf-sdpa-compile,torch-encoder,hf-sdpa+malloc,hf-sdpa-compile+malloc,"
    "fastbert.accelerate",
    "cuda": ",".join(STEP_RIVAL_NAMES),
}
"""What `against = auto` means on each type of device."""
DATA_RIVAL_NAMES = ("hf-collator",)
INFERENCE_RIVAL_NAMES = (
    *("hf-eager", "hf-sdpa", "hf-flash", "hf-sdpa-compile", "torch-encoder", "modernbert"),
)
CONVERGENCE_RIVAL_NAMES = ("hf-trainer", "hf-loop")
DROPIN_TASKS = ("mlm", "classification")
FINETUNE_SETS = ("sentiment", "entities", "questions")
FINETUNE_RIVAL_NAMES = ("hf-trainer", "hf-trainer+malloc")
KERNEL_OPS = (
    *("attention", "dropout_add_layer_norm", "linear_cross_entropy", "adamw", "linear_gelu"),
    *("gelu_layer_norm", "bias_gelu", "embed_layer_norm", "lamb", "mask_tokens"),
    "symmetric_product",
)
KERNEL_PEER_NAMES = (
    *("reference", "eager", "compile", "fa2", "fa3", "fa4", "cudnn", "liger", "torch-own"),
    *("bare-gemm", "bare-gemms", "torch-fused", "torch-foreach", "adamw"),
)
PICTURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")
ESTIMATE_GPUS = ("h100", "h200", "a100-80gb", "a100-40gb", "cpu")

_bench = partial(setting, group=BENCH)
_estimate = partial(setting, group=ESTIMATE)
_profile = partial(setting, group=PROFILE)


def _lengths(group: Group) -> Any:
    help = "of the sequences: natural (as in real text), full, or a file with one a line"
    return setting("natural", help, group)


def _batch_size(group: Group, default: int = 32) -> Any:
    return setting(default, "sequences per batch", group, at_least=1, at_most=2**16)


def _tokens_per_batch(default: int, of: str) -> Any:
    help = f"tokens of {of}"
    return _bench(default, help, at_least=8, at_most=settings.MOST_TOKENS)


def _rounds(of: str = "each contender is") -> Any:
    return _bench(5, f"times {of} measured, in turn", at_least=1, at_most=10**4)


def _against(rivals: str = "rivals", more: str = "none = no rival") -> Any:
    return _bench("auto", f"{rivals}, separated by commas ({more})")


def _json(group: Group, of: str = "measurements") -> Any:
    return setting("", f"file to write the {of} to", group)


def _png(group: Group, of: str) -> Any:
    return setting("", f"file to draw {of} into", group)


def _check_picture(png: str) -> None:
    if png and os.path.splitext(png)[1].lower() not in PICTURES:
        raise UserError(f"png = {png!r} must end in one of {', '.join(PICTURES)}")


def check_kernel(name: str) -> str:
    """The name of an op that `profile kernel` was given.

    Raises:
        UserError: there is none, or no such op.
    """
    known = ", ".join(KERNEL_OPS)
    if not name:
        first = KERNEL_OPS[0]
        raise UserError(f"profile kernel needs one of {known}: fastbert profile kernel {first}")
    if name not in KERNEL_OPS:
        raise UserError(f"unknown kernel {name!r}{did_you_mean(name, KERNEL_OPS)} ({known})")
    return name


def _check_names(
    name: str, given: str, known: tuple[str, ...], words: Iterable[str] = ("auto", "none")
) -> None:
    for one in [] if given in words else given.split(","):
        if one.removesuffix("+malloc" if known is STEP_RIVAL_NAMES else "") not in known:
            shown = f"{name} = {given!r}" + (f": {one!r}" if one != given else "")
            raise UserError(
                f"{shown} must be one of {', '.join(known)}{did_you_mean(one, known)}"
            )


def _check_tokens(config: "_SideBySideConfig | DropinBenchConfig | ProfileStepConfig") -> None:
    if config.batch_size * config.max_seq_length > settings.MOST_TOKENS:
        engine.check_positions(config.model, config.max_seq_length)
        raise UserError(
            f"batch_size = {config.batch_size} x max_seq_length = {config.max_seq_length} tokens "
            f"must be at most {settings.MOST_TOKENS}"
        )


def integers(name: str, text: str, at_least: int, at_most: int = settings.MOST) -> list[int]:
    """The integers of a setting like "512,128".

    Raises:
        UserError: something else stands there, or a number is out of bounds.
    """
    parts = text.split(",")
    if not all(
        re.fullmatch("[0-9]{1,12}", part) and at_least <= int(part) <= at_most for part in parts
    ):
        raise UserError(
            f"{name} = {settings.show(text)} must be integers of at least {at_least} and at most "
            f"{at_most}, separated by commas"
        )
    return [int(part) for part in parts]


@dataclass(frozen=True)
class _SideBySideConfig:
    """What contenders are that see the same batch."""

    device: str = engine.device_setting(BENCH)
    model: str = engine.model_setting(BENCH, "mini")
    batch_size: int = _batch_size(BENCH)
    max_seq_length: int = engine.max_seq_length_setting(BENCH)
    lengths: str = _lengths(BENCH)
    against: str = _against()
    rounds: int = _rounds()
    json: str = _json(BENCH)
    seed: int = engine.seed_setting(BENCH, "weights, batches and dropout")
    precision: str = engine.precision_setting(BENCH)

    rivals: ClassVar[tuple[str, ...]]
    """What may stand in `against`."""

    def __post_init__(self) -> None:
        settings.check_fields(self)
        _check_tokens(self)
        _check_names("against", self.against, self.rivals)
        settings.check_not_empty(self, "lengths")


@dataclass(frozen=True)
class StepBenchConfig(_SideBySideConfig):
    """Everything `fastbert bench step` can be told.

    Raises:
        UserError: a value is out of bounds.
    """

    against: str = _against(more="none = no rival; +malloc = with our allocator setting")

    rivals = STEP_RIVAL_NAMES


@dataclass(frozen=True)
class InferenceBenchConfig(_SideBySideConfig):
    """Everything `fastbert bench inference` can be told.

    Raises:
        UserError: a value is out of bounds.
    """

    seed: int = engine.seed_setting(BENCH, "weights and batches")
    precision: str = engine.precision_setting(
        BENCH, ("auto", "fp32", "bf16", "fp16"), of="weights and activations"
    )

    rivals = INFERENCE_RIVAL_NAMES


@dataclass(frozen=True)
class DataBenchConfig:
    """Everything `fastbert bench data` can be told.

    Raises:
        UserError: a value is out of bounds.
    """

    device: str = engine.device_setting(BENCH, "where batches go (auto = the GPU if there is one)")
    model: str = engine.model_setting(BENCH, "base", "whose vocabulary: ")
    lengths: str = _bench(
        "natural", "natural (as in real text), full, or a file with those of sentences, one a line"
    )
    against: str = _against()
    max_seq_lengths: str = _bench("512,128", "each longest sequence to measure, tokens")
    num_workers: str = _bench("0,1,2,4", "each number of worker processes to measure")
    tokens_per_batch: int = _tokens_per_batch(65536, "a batch")
    dataloader_prefetch_factor: int = _bench(
        2, "batches that each worker prepares ahead", at_least=1, at_most=settings.MOST_AHEAD
    )
    corpus_tokens: int = _bench(
        2**24, "tokens of the random corpus", at_least=1000, at_most=2**30
    )
    rounds: int = _rounds("each is")
    seconds: float = _bench(2.0, "of each round", more_than=0, at_most=3600)
    json: str = _json(BENCH)
    seed: int = engine.seed_setting(BENCH, "corpus and batches")

    def __post_init__(self) -> None:
        settings.check_fields(self)
        lengths = integers("max_seq_lengths", self.max_seq_lengths, 8, settings.LONGEST)
        integers("num_workers", self.num_workers, 0, settings.MOST_WORKERS)
        _check_names("against", self.against, DATA_RIVAL_NAMES)
        settings.check_not_empty(self, "lengths")
        if max(lengths) > self.tokens_per_batch:
            raise UserError(
                f"max_seq_lengths = {self.max_seq_lengths!r}: {max(lengths)} must be at most "
                f"tokens_per_batch = {self.tokens_per_batch}"
            )


@dataclass(frozen=True)
class KernelBenchConfig:
    """Everything `fastbert bench kernels` can be told.

    Raises:
        UserError: a value is out of bounds.
    """

    device: str = engine.device_setting(BENCH, any_gpu=False)
    model: str = _bench(
        "auto",
        "of the widths: preset or path of a config.json (auto = base, large; on a CPU mini)",
    )
    lengths: str = _bench(
        "full", "that attention sees: natural (as in real text), full, or a file with one a line"
    )
    against: str = _against("peers", "none = no peer")
    op: str = _bench("all", "ops to measure, separated by commas")
    quick: bool = _bench(False, "fewer and smaller sizes, fewer rounds")
    json: str = _json(BENCH)

    def __post_init__(self) -> None:
        settings.check_fields(self)
        _check_names("op", self.op, KERNEL_OPS, ("all",))
        _check_names("against", self.against, KERNEL_PEER_NAMES)
        settings.check_not_empty(self, "lengths")


@dataclass(frozen=True)
class ConvergenceBenchConfig:
    """Everything `fastbert bench convergence` can be told.

    Raises:
        UserError: a value is out of bounds.
    """

    device: str = engine.device_setting(BENCH)
    model: str = engine.model_setting(BENCH, "tiny")
    data: str = engine.data_setting(BENCH)
    tokenizer: str = engine.tokenizer_setting(BENCH)
    vocab_size: int = engine.vocab_size_setting(BENCH)
    max_seq_length: int = engine.max_seq_length_setting(BENCH)
    lengths: str = _bench(
        "natural", "of the sequences: natural (some cut short on purpose), or full"
    )
    tokens_per_batch: int = _tokens_per_batch(4096, "a step")
    max_steps: int = _bench(
        400, "optimizer steps of each contender", at_least=1, at_most=settings.MOST_STEPS
    )
    warmup_steps: int | float = engine.warmup_steps_setting(BENCH, 40)
    learning_rate: float | None = engine.learning_rate_setting(BENCH)
    eval_steps: int = _bench(50, "steps between evaluations", at_least=1, at_most=settings.MOST)
    max_eval_batches: int = engine.max_eval_batches_setting(BENCH, 8)
    target_loss: float | None = _bench(
        None, "held-out MLM loss to time (none = the highest final loss)", more_than=0, at_most=1e6
    )
    against: str = _against(more="none = no rival; hf-trainer needs accelerate")
    json: str = _json(BENCH)
    png: str = _png(BENCH, "loss over wall time")
    seed: int = engine.seed_setting(BENCH, "weights, batches and dropout")
    precision: str = engine.precision_setting(BENCH, ("auto", "fp32", "bf16"))

    def __post_init__(self) -> None:
        settings.check_fields(self)
        _check_names("against", self.against, CONVERGENCE_RIVAL_NAMES)
        _check_picture(self.png)
        if self.lengths not in ("natural", "full"):
            raise UserError(
                f"lengths = {self.lengths!r} must be natural or full: the text decides the lengths"
            )
        engine.check_batch_holds_a_sequence(self.model, self.tokens_per_batch, self.max_seq_length)


@dataclass(frozen=True)
class DropinBenchConfig:
    """Everything `fastbert bench dropin` can be told.

    Raises:
        UserError: a value is out of bounds.
    """

    device: str = engine.device_setting(BENCH)
    model: str = engine.model_setting(BENCH, "base")
    batch_size: int = _batch_size(BENCH, 16)
    max_seq_length: int = engine.max_seq_length_setting(BENCH)
    lengths: str = _lengths(BENCH)
    task: str = _bench(",".join(DROPIN_TASKS), "what Trainer trains, separated by commas")
    shapes: bool = _bench(False, "also bare calls at small and large shapes, without Trainer")
    rounds: int = _rounds()
    json: str = _json(BENCH)
    seed: int = engine.seed_setting(BENCH, "weights and batches")
    precision: str = engine.precision_setting(BENCH, ("auto", "fp32", "bf16"))

    def __post_init__(self) -> None:
        settings.check_fields(self)
        _check_tokens(self)
        _check_names("task", self.task, DROPIN_TASKS, ())
        settings.check_not_empty(self, "lengths")

    def tasks(self) -> list[str]:
        """Those of `task`, each once."""
        return list(dict.fromkeys(self.task.split(",")))


@dataclass(frozen=True)
class FinetuneBenchConfig:
    """Everything `fastbert bench finetune` can be told.

    Raises:
        UserError: a value is out of bounds.
    """

    model: str = _bench("", "folder of a pre-trained model (none is downloaded)")
    name: str = _bench("", "what the result calls it (empty = as its folder)")
    data: str = _bench("", "folder of sentiment-train.tsv, -eval.tsv and so on")
    sets: str = _bench(",".join(FINETUNE_SETS), "what is learnt, separated by commas")
    seeds: int = _bench(
        3, "trainings of each contender, with seed, seed + 1, ...", at_least=1, at_most=99
    )
    max_steps: int = _bench(
        0, "steps of a training, for a rehearsal (0 = all epochs)", at_least=0,
        at_most=settings.MOST_STEPS,
    )  # fmt: skip
    against: str = _against(more="+malloc = with our allocator setting")
    json: str = _json(BENCH)
    seed: int = engine.seed_setting(BENCH, "new weights, data order and dropout")

    def __post_init__(self) -> None:
        settings.check_fields(self)
        for name, what in (("model", "a pre-trained model"), ("data", "the data sets")):
            if not getattr(self, name):
                raise UserError(f"{name} = '': give --{name} DIR, the folder of {what}")
        _check_names("sets", self.sets, FINETUNE_SETS, ())
        _check_names("against", self.against, FINETUNE_RIVAL_NAMES, ("auto",))

    def names(self) -> list[str]:
        """Those of `sets`, each once."""
        return list(dict.fromkeys(self.sets.split(",")))

    def rivals(self) -> list[str]:
        """Those of `against`, each once."""
        asked = FINETUNE_RIVAL_NAMES if self.against == "auto" else self.against.split(",")
        return list(dict.fromkeys(asked))


@dataclass(frozen=True)
class ServeBenchConfig:
    """Everything `fastbert bench serve` can be told.

    Raises:
        UserError: a value is out of bounds.
    """

    model: str = engine.model_setting(BENCH, "mini")
    name: str = _bench("", "what the result calls it (empty = as it was given)")
    texts: str = _bench(
        "short", "of 5 to 256 tokens: short = most of them are, even = each length as likely",
        choices=("short", "even"),
    )  # fmt: skip
    clients: str = _bench("1,8,64", "that ask at once, separated by commas")
    seconds: float = _bench(10.0, "for which they ask, each time", at_least=0.1, at_most=3600.0)
    rounds: int = _rounds()
    json: str = _json(BENCH)
    seed: int = engine.seed_setting(BENCH, "weights and texts")

    def __post_init__(self) -> None:
        settings.check_fields(self)
        integers("clients", self.clients, 1, 10_000)


@dataclass(frozen=True)
class ReportConfig:
    """Everything `fastbert bench report` can be told, but the files.

    Raises:
        UserError: a value is not text.
    """

    out: str = _bench("runs/report", "folder of the page and its pictures")
    against: str = _bench(
        "", "folder of results to compare with, or the commit that holds the same files"
    )
    readme: bool = _bench(False, "rewrite the README's measurements from benchmarks/results")

    def __post_init__(self) -> None:
        settings.check_fields(self)
        settings.check_not_empty(self, "out")


@dataclass(frozen=True)
class EstimateConfig:
    """Everything `fastbert estimate` can be told.

    Raises:
        UserError: a value is out of bounds, or two do not fit together.
    """

    model: str = engine.model_setting(ESTIMATE, "base")
    lengths: str = _lengths(ESTIMATE)
    max_seq_length: int = engine.max_seq_length_setting(ESTIMATE, 512)
    vocab_size: int | None = _estimate(
        None,
        "tokens in the vocabulary (none = the model's own)",
        at_least=1,
        at_most=settings.MOST_WORDS,
    )
    tokens: float | None = _estimate(
        None,
        "real tokens of the whole run, e.g. 3.3B (none = 1.31e11, as BERT)",
        more_than=0,
        at_most=1e18,
    )
    epochs: float | None = _estimate(
        None, "instead of tokens: times that the corpus is read", more_than=0, at_most=1e9
    )
    corpus_tokens: float | None = _estimate(
        None, "real tokens of the corpus, for epochs, e.g. 3.3B", more_than=0, at_most=1e18
    )
    gpu: str = _estimate("h100", "what it runs on: " + ", ".join(ESTIMATE_GPUS))
    gpus: str = _estimate(
        "1", "how many, with one copy of the model each; several to compare them: 1,8,64"
    )
    optim: str = _estimate("adamw", "the optimizer of the step", choices=("adamw", "muon"))
    muon_split_qkv: bool = _estimate(
        True, "of optim = muon: query, key and value each a matrix, not one joined"
    )
    price_per_hour: float | None = _estimate(
        None, "dollars for one GPU and hour (none = no costs)", at_least=0, at_most=1e9
    )
    tokens_per_batch: int | None = _estimate(
        None,
        "of one GPU's forward and backward pass (none = what fits)",
        at_least=8,
        at_most=settings.MOST_TOKENS,
    )
    json: str = _json(ESTIMATE, "estimate")

    def __post_init__(self) -> None:
        settings.check_fields(self)
        if self.gpu not in ESTIMATE_GPUS:
            meant = did_you_mean(self.gpu, ESTIMATE_GPUS)
            raise UserError(f"gpu = {self.gpu!r} must be one of {', '.join(ESTIMATE_GPUS)}{meant}")
        settings.check_not_empty(self, "lengths")
        self.counts()
        if (self.epochs is None) != (self.corpus_tokens is None):
            raise UserError("epochs and corpus_tokens belong together: give both, or tokens")
        if self.tokens is not None and self.epochs is not None:
            raise UserError(
                f"tokens = {self.tokens:g} and epochs = {self.epochs:g} say the same: give one"
            )
        T, S = self.tokens_per_batch, self.max_seq_length
        if T is not None:
            engine.check_batch_holds_a_sequence(self.model, T, S)
        if self.gpu == "cpu" and self.counts() != [1]:
            raise UserError(f"gpus = {self.gpus} must be 1 with gpu = 'cpu'")

    def counts(self) -> list[int]:
        """The numbers of GPUs that `gpus` names, each once and in order.

        Raises:
            UserError: it names none, or too many GPUs.
        """
        return sorted({*integers("gpus", self.gpus, 1, 1024)})


@dataclass(frozen=True)
class ProfileStepConfig:
    """Everything `fastbert profile step` can be told.

    Raises:
        UserError: a value is out of bounds.
    """

    device: str = engine.device_setting(PROFILE)
    model: str = engine.model_setting(PROFILE, "mini")
    batch_size: int = _batch_size(PROFILE)
    max_seq_length: int = engine.max_seq_length_setting(PROFILE)
    lengths: str = _lengths(PROFILE)
    precision: str = engine.precision_setting(PROFILE)
    step: str = engine.step_setting(PROFILE)
    json: str = _profile("profile-step.json", "file to write the table to")
    trace: str = _profile("", "file to write the Chrome trace to (empty = beside the JSON)")
    seed: int = engine.seed_setting(PROFILE, "weights, batches and dropout")

    def __post_init__(self) -> None:
        settings.check_fields(self)
        _check_tokens(self)
        settings.check_not_empty(self, "lengths", "json")


_MOST_ELEMENTS = 2**33
_MOST_OF_SIZE = {
    "T": settings.MOST_TOKENS,
    "S": settings.LONGEST,
    "H": 2**16,
    "A": 2**16,
    "F": 2**18,
    "V": 2**24,
    "M": settings.MOST_TOKENS,
}


@dataclass(frozen=True)
class ProfileKernelConfig:
    """Everything `fastbert profile kernel` can be told, but the kernel's name.

    Raises:
        UserError: a value is out of bounds, or `shape` cannot be read.
    """

    shape: str = _profile(
        "", "sizes by letter, e.g. T=65536,S=512,H=768 (empty = BERT base's, small on a CPU)"
    )
    device: str = engine.device_setting(PROFILE)
    arch: str = _profile(
        "auto",
        "which GPU's machine code is counted (auto = the GPU's, or both without one)",
        choices=("auto", "sm_80", "sm_90"),
    )
    json: str = _json(PROFILE)
    png: str = _png(PROFILE, "the roofline")

    def __post_init__(self) -> None:
        settings.check_fields(self)
        _check_picture(self.png)
        self.sizes()

    def sizes(self) -> dict[str, int]:
        """The sizes that `shape` names.

        Raises:
            UserError: it is not written as LETTER=NUMBER,... with letters that are known.
        """
        shown, found = f"shape = {settings.show(self.shape)}", {}
        for part in self.shape.split(",") if self.shape else []:
            match = re.fullmatch(r"\s*([A-Za-z]+)=([1-9][0-9]{0,9})\s*", part)
            if not match:
                odd = settings.show(part)
                raise UserError(f"{shown}: {odd} must be LETTER=NUMBER, e.g. T=4096")
            most = _MOST_OF_SIZE.get(match[1])
            if most is None:
                raise UserError(f"{shown}: {match[1]!r} must be one of {', '.join(_MOST_OF_SIZE)}")
            if int(match[2]) > most:
                raise UserError(f"{shown}: {match[1]} must be at most {most}")
            found[match[1]] = int(match[2])
        for rows, columns in (("T", "S"), ("T", "H"), ("T", "F"), ("M", "V")):
            if found.get(rows, 1) * found.get(columns, 1) > _MOST_ELEMENTS:
                raise UserError(f"{shown}: {rows} x {columns} must be at most {_MOST_ELEMENTS}")
        return found
