"""Every setting of fastbert: its name, default, unit, bounds and help, defined here and only here.

A configuration is a frozen dataclass whose fields carry that knowledge as metadata. Command-line
options, TOML files, `--print-config` and validation all derive from the fields (`settings`), so a
new setting is one new line. Names are Hugging Face's: `BertConfig` for the model,
`TrainingArguments` for training. Standard library only, so that a mistake is told at once.
"""

import codecs
import hashlib
import json
import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import NoneType
from typing import Any, TypeVar, get_args

from fastbert.errors import UserError, did_you_mean

GROUPS = {
    "run": "where and on what it runs",
    "model": "its size and dropout",
    "data": "text, tokens and batches",
    "train": "the optimizer and its schedule",
    "logs": "what is reported, evaluated and saved",
    "bench": "what is measured, and against what",
    "estimate": "what is planned, and on what",
    "profile": "what is recorded, and where it is written",
}

# Upper bounds far beyond every use, and far below what would fill a memory by a typing mistake.
_MOST_TOKENS = 2**24  # of a batch: an H100 holds 2**17 of BERT base
_LONGEST = 2**20  # tokens of a sequence
_MOST_STEPS = 10**7  # BERT has 10**6, and each step's learning rate is kept
_MOST = 2**31 - 1  # of what only counts
_MOST_WORDS = 10**6  # that a tokenizer can learn
_MOST_WORKERS = 256
_MOST_AHEAD = 256
_LARGEST_SEED = 2**63 - 1
_MOST_DROPOUT = 0.99  # the kernels keep no bit beyond 0.998

_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
}


@dataclass(frozen=True)
class Setting:
    """One field of a configuration, as the command line, TOML and validation see it."""

    name: str
    type: type
    """bool, int, float or str."""
    optional: bool
    """Whether None is allowed."""
    default: Any
    group: str
    help: str
    choices: tuple[str, ...]
    pattern: str
    """Regular expression of values allowed beside `choices`."""
    at_least: float | None
    more_than: float | None
    at_most: float | None
    less_than: float | None

    @property
    def flag(self) -> str:
        """The option on the command line."""
        return "--" + self.name.replace("_", "-")


def _setting(
    default: Any,
    help: str,
    group: str,
    *,
    choices: tuple[str, ...] = (),
    pattern: str = "",
    at_least: float | None = None,
    more_than: float | None = None,
    at_most: float | None = None,
    less_than: float | None = None,
) -> Any:
    metadata = {
        "help": help,
        "group": group,
        "choices": choices,
        "pattern": pattern,
        "at_least": at_least,
        "more_than": more_than,
        "at_most": at_most,
        "less_than": less_than,
    }
    return field(default=default, metadata=metadata)


def settings(config_class: type) -> tuple[Setting, ...]:
    """Returns the settings of a configuration class, in the order of its fields."""
    found = []
    for f in fields(config_class):
        kinds = [kind for kind in (get_args(f.type) or (f.type,)) if kind is not NoneType]
        optional = NoneType in get_args(f.type)
        found.append(Setting(f.name, kinds[0], optional, f.default, **f.metadata))
    return tuple(found)


def _show(value: Any) -> str:
    """The value as a message shows it: what a file holds may be of any length and depth."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    try:
        text = repr(value)
    except RecursionError:
        return f"a deep {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:120]} ... ({len(text)} characters)"


def _json(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | float | str | None) else _show(value)


def _bound(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def checked(setting: Setting, value: Any, where: str = "") -> Any:
    """Returns `value` in the setting's type (an int is fine for a float) once it is within bounds.

    Args:
        setting: what the value is for.
        value: what a file, the command line or a caller gave.
        where: "run.toml: " or the like, the start of the message.

    Raises:
        UserError: the type is wrong, or the value is out of bounds.
    """
    if value is None and setting.optional:
        return None
    shown = f"{where}{setting.name} = {_show(value)}"
    if setting.type is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            raise UserError(f"{shown} must be a finite number") from None
    if type(value) is not setting.type:
        raise UserError(f"{shown} must be {_KINDS[setting.type]}")
    if isinstance(value, str):
        _check_text(setting, value, shown)
    elif isinstance(value, int | float):
        _check_number(setting, value, shown)
    return value


def _check_text(setting: Setting, value: str, shown: str) -> None:
    if "\0" in value or not _is_utf8(value):
        raise UserError(f"{shown} must be text in UTF-8 without NUL characters")
    if not setting.choices or value in setting.choices:
        return
    if setting.pattern and re.fullmatch(setting.pattern, value):
        return
    raise UserError(f"{shown} must be {choices_text(setting)}")


def _is_utf8(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # a file name of undecodable bytes, which no TOML file can hold
        return False
    return True


def choices_text(setting: Setting) -> str:
    """Returns "auto, cpu, cuda or cuda:N"; empty where everything is allowed."""
    allowed = [*setting.choices]
    if setting.pattern:
        allowed.append(pattern_text(setting).replace("LANGUAGE", "a language's code (de, hi ...)"))
    return " or ".join(filter(None, [", ".join(allowed[:-1]), *allowed[-1:]]))


def pattern_text(setting: Setting) -> str:
    """Returns "cuda:N" for the pattern of a device, "LANGUAGE" for that of a code like "de"."""
    return re.sub(r"\[0-9\]\S*", "N", re.sub(r"\[a-z\]\S*", "LANGUAGE", setting.pattern))


def _check_number(setting: Setting, value: float, shown: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{shown} must be a finite number")
    bounds = [
        (setting.at_least, "at least", lambda bound: value >= bound),
        (setting.more_than, "more than", lambda bound: value > bound),
        (setting.at_most, "at most", lambda bound: value <= bound),
        (setting.less_than, "less than", lambda bound: value < bound),
    ]
    given = [(bound, words, holds) for bound, words, holds in bounds if bound is not None]
    if not all(holds(bound) for bound, _, holds in given):
        raise UserError(f"{shown} must be " + " and ".join(f"{w} {_bound(b)}" for b, w, _ in given))


def _check_fields(config: Any) -> None:
    for setting in settings(type(config)):
        value = checked(setting, getattr(config, setting.name))
        object.__setattr__(config, setting.name, value)


# The model: names and defaults of transformers' BertConfig.


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a BERT, as transformers' `BertConfig` names it; the defaults are BERT base.

    Raises:
        UserError: a value is out of bounds, or two do not fit together.
    """

    vocab_size: int = _setting(
        30522, "tokens in the vocabulary", "model", at_least=1, at_most=2**24
    )
    hidden_size: int = _setting(
        768, "width of the hidden states", "model", at_least=1, at_most=2**16
    )
    num_hidden_layers: int = _setting(
        12, "layers of the encoder", "model", at_least=1, at_most=1000
    )
    num_attention_heads: int = _setting(
        12, "attention heads per layer", "model", at_least=1, at_most=2**16
    )
    intermediate_size: int = _setting(
        3072, "width inside the MLP", "model", at_least=1, at_most=2**18
    )
    hidden_act: str = _setting(
        "gelu",
        "activation of the MLP: gelu is exact (erf), the other two are its tanh form",
        "model",
        choices=("gelu", "gelu_new", "gelu_pytorch_tanh"),
    )
    hidden_dropout_prob: float = _setting(
        0.1, "dropout of hidden states", "model", at_least=0, at_most=_MOST_DROPOUT
    )
    attention_probs_dropout_prob: float = _setting(
        0.1, "dropout of attention probabilities", "model", at_least=0, at_most=_MOST_DROPOUT
    )
    max_position_embeddings: int = _setting(
        512, "longest sequence, tokens", "model", at_least=1, at_most=_LONGEST
    )
    type_vocab_size: int = _setting(2, "token types", "model", at_least=1, at_most=2**16)
    initializer_range: float = _setting(
        0.02, "standard deviation of initial weights", "model", at_least=0, at_most=100
    )
    layer_norm_eps: float = _setting(
        1e-12, "added to the variance in LayerNorm", "model", at_least=1e-30, at_most=1
    )
    pad_token_id: int = _setting(0, "token of padding", "model", at_least=0, at_most=2**24 - 1)

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size = {self.hidden_size} must be a multiple of "
                f"num_attention_heads = {self.num_attention_heads}"
            )
        if self.pad_token_id >= self.vocab_size:
            raise UserError(
                f"pad_token_id = {self.pad_token_id} must be less than "
                f"vocab_size = {self.vocab_size}"
            )

    def num_parameters(self, *, nsp: bool = True) -> int:
        """Weights of BERT with its masked-word head, and with pooler and next-sentence head."""
        H, F = self.hidden_size, self.intermediate_size
        rows = self.vocab_size + self.max_position_embeddings + self.type_vocab_size
        layer = 4 * (H * H + H) + (H * F + F) + (F * H + H) + 2 * 2 * H
        heads = H * H + 3 * H + self.vocab_size + (H * H + H + 2 * H + 2 if nsp else 0)
        return rows * H + 2 * H + self.num_hidden_layers * layer + heads

    @property
    def head_size(self) -> int:
        """Width of one attention head, D."""
        return self.hidden_size // self.num_attention_heads


def _google_size(layers: int, hidden_size: int) -> ModelConfig:
    return ModelConfig(
        num_hidden_layers=layers,
        hidden_size=hidden_size,
        num_attention_heads=hidden_size // 64,
        intermediate_size=4 * hidden_size,
    )


def tiny() -> ModelConfig:
    """2 layers of 128, 2 heads: 4.4 million parameters."""
    return _google_size(2, 128)


def mini() -> ModelConfig:
    """4 layers of 256, 4 heads: 11 million parameters."""
    return _google_size(4, 256)


def small() -> ModelConfig:
    """4 layers of 512, 8 heads: 29 million parameters."""
    return _google_size(4, 512)


def medium() -> ModelConfig:
    """8 layers of 512, 8 heads: 41 million parameters."""
    return _google_size(8, 512)


def base() -> ModelConfig:
    """12 layers of 768, 12 heads: 109 million parameters."""
    return _google_size(12, 768)


def large() -> ModelConfig:
    """24 layers of 1024, 16 heads: 335 million parameters."""
    return _google_size(24, 1024)


# Sizes of https://github.com/google-research/bert, all with heads 64 wide.
PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "tiny": tiny,
    "mini": mini,
    "small": small,
    "medium": medium,
    "base": base,
    "large": large,
}


def model_config(name_or_path: str) -> ModelConfig:
    """Returns the configuration of a preset, or of a Hugging Face config.json.

    Args:
        name_or_path: a key of `PRESETS`, the path of a config.json, or a folder that holds one.

    Raises:
        UserError: no such preset or file, or the file describes something other than this BERT.
    """
    if name_or_path in PRESETS:
        return PRESETS[name_or_path]()
    shown = f"model = {name_or_path!r}"
    if not _exists(name_or_path):
        if name_or_path.endswith(".json") or os.path.dirname(name_or_path):
            raise UserError(f"{shown}: no such file or folder (nothing is downloaded)")
        raise UserError(
            f"{shown} is not a preset{did_you_mean(name_or_path, PRESETS)} "
            f"(presets: {', '.join(PRESETS)}; else the path of a config.json or its folder)"
        )
    path = name_or_path
    if os.path.isdir(path):
        path = os.path.join(path, "config.json")
        if not os.path.exists(path):
            raise UserError(f"{shown}: the folder holds no config.json")
    return _from_hf_dict(_read_json(path), path)


def _exists(path: str) -> bool:
    try:
        return os.path.exists(path)
    except ValueError:  # a NUL, or what no file name can hold
        return False


def _read_text(path: str, kind: str, most_bytes: int) -> str:
    """A whole text file in UTF-8, with or without a byte order mark; line ends become "\\n".

    Raises:
        UserError: it cannot be read, or is something else; `kind` names what it should be.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(most_bytes + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > most_bytes:
        raise UserError(f"{path}: not {kind}: it is larger than {most_bytes >> 20} MiB")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content[:4]:
        raise UserError(f"{path}: not {kind}: it looks like UTF-16 or UTF-32; convert it to UTF-8")
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not {kind}: it must be text in UTF-8, which byte {error.start} is not"
        ) from None


def _read_json(path: str) -> dict[str, Any]:
    text = _read_text(path, "JSON", 2**24)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # absurd numbers or nesting
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold one JSON object, not {type(content).__name__}")
    return content


# What a config.json must say for this engine to compute the same model, and what its absence means.
_HF_MUST_BE: dict[str, tuple[Any, Any]] = {
    "model_type": ("bert", None),
    "position_embedding_type": ("absolute", "absolute"),
    "is_decoder": (False, False),
    "add_cross_attention": (False, False),
    "tie_word_embeddings": (True, True),
}


def _from_hf_dict(content: dict[str, Any], path: str) -> ModelConfig:
    for key, (right, absent) in _HF_MUST_BE.items():
        value = content.get(key, absent)
        if value != right:
            given = f"{key} = {_json(value)}" if key in content else f"{key} is missing: it"
            raise UserError(f"{path}: {given} must be {json.dumps(right)}")
    known = [setting for setting in settings(ModelConfig) if setting.name in content]
    try:
        return ModelConfig(**{s.name: checked(s, content[s.name]) for s in known})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def to_hf_dict(config: ModelConfig, architecture: str) -> dict[str, Any]:
    """Returns the content of a config.json that transformers' `BertConfig` reads.

    Args:
        config: the model.
        architecture: the transformers class of the weights, e.g. "BertForPreTraining".
    """
    return {
        "architectures": [architecture],
        "model_type": "bert",
        "dtype": "float32",
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
        **{setting.name: getattr(config, setting.name) for setting in settings(ModelConfig)},
    }


_DEVICES: dict[str, Any] = {"choices": ("auto", "cpu", "cuda"), "pattern": "cuda:[0-9]{1,2}"}
_PRECISIONS: dict[str, Any] = {"choices": ("auto", "fp32", "tf32", "bf16", "fp16")}


@dataclass(frozen=True)
class PretrainConfig:
    """Everything `fastbert pretrain` can be told.

    Raises:
        UserError: a value is out of bounds, or two do not fit together.
    """

    out: str = _setting(
        "auto", "folder of the run (auto = the next free runs/pretrain-001 ...)", "run"
    )
    device: str = _setting("auto", "device (auto = the GPU if there is one)", "run", **_DEVICES)
    seed: int = _setting(
        42,
        "seed of weights, data order, masks and dropout",
        "run",
        at_least=0,
        at_most=_LARGEST_SEED,
    )
    resume: str = _setting(
        "", "checkpoint to go on from: its path, or auto = the last one under out", "run"
    )
    precision: str = _setting(
        "auto",
        "of activations (auto = bf16 where the device is fast at it, else fp16 on a GPU)",
        "run",
        **_PRECISIONS,
    )
    step: str = _setting(
        "auto",
        "how a step is launched (auto = as one CUDA graph on a GPU)",
        "run",
        choices=("auto", "eager", "graph"),
    )
    kernels: str = _setting(
        "auto",
        "the fused ops (auto = our Triton kernels where they can run, else plain PyTorch)",
        "run",
        choices=("auto", "triton", "reference"),
    )
    attn_implementation: str = _setting(
        "auto",
        "attention on a GPU (torch, flash_attn: FlashAttention 2 of PyTorch or its package)",
        "run",
        choices=("auto", "triton", "torch", "flash_attn", "fa3", "fa4"),
    )
    torch_compile: str = _setting(
        "auto", "compile the model with torch.compile", "run", choices=("auto", "on", "off")
    )
    stop_at_step: int = _setting(
        0,
        "end this call after that step, the schedule unchanged (0 = off)",
        "run",
        at_least=0,
        at_most=_MOST_STEPS,
    )
    num_threads: int = _setting(
        0, "CPU threads of one operation (0 = torch's choice)", "run", at_least=0, at_most=1024
    )
    dataloader_num_workers: int | None = _setting(
        None,
        "processes that pack and mask batches (none = 1 for a GPU, else 0)",
        "run",
        at_least=0,
        at_most=_MOST_WORKERS,
    )
    dataloader_prefetch_factor: int = _setting(
        2, "batches that each of them prepares ahead", "run", at_least=1, at_most=_MOST_AHEAD
    )

    model: str = _setting(
        "tiny", "preset (" + ", ".join(PRESETS) + ") or path of a config.json", "model"
    )
    hidden_dropout_prob: float | None = _setting(
        None,
        "dropout of hidden states (none = the model's own)",
        "model",
        at_least=0,
        at_most=_MOST_DROPOUT,
    )
    attention_probs_dropout_prob: float | None = _setting(
        None,
        "dropout of attention probabilities (none = the model's own)",
        "model",
        at_least=0,
        at_most=_MOST_DROPOUT,
    )

    data: str = _setting("builtin", "text file or folder of text files, or builtin", "data")
    sentence_splitter: str = _setting(
        "auto",
        "sentences (auto = by the script of each line, line = a line is one, else a language: de)",
        "data",
        choices=("auto", "line"),
        pattern="[a-z]{2,3}",
    )
    tokenizer: str = _setting(
        "train", "path of a tokenizer or its folder, or train = train one on the data", "data"
    )
    vocab_size: int = _setting(
        4096,
        "tokens in the vocabulary of a trained tokenizer",
        "data",
        at_least=100,
        at_most=_MOST_WORDS,
    )
    do_lower_case: bool | None = _setting(
        None, "lower-case the text (unset = as the tokenizer's files say, else yes)", "data"
    )
    strip_accents: bool | None = _setting(
        None,
        "take accents off (unset = as the files say, else with lower case, where they are accents)",
        "data",
    )
    max_seq_length: int = _setting(
        128, "longest sequence, tokens", "data", at_least=8, at_most=_LONGEST
    )
    mlm_probability: float = _setting(
        0.15, "share of tokens to predict", "data", more_than=0, less_than=1
    )
    whole_word_mask: bool = _setting(False, "mask all pieces of a word together", "data")
    nsp: bool = _setting(True, "train next-sentence prediction beside MLM", "data")
    short_seq_prob: float = _setting(
        0.1, "share of sequences cut short on purpose", "data", at_least=0, at_most=1
    )
    tokens_per_batch: int = _setting(
        4096, "tokens of one forward and backward pass", "data", at_least=8, at_most=_MOST_TOKENS
    )
    validation_fraction: float = _setting(
        0.05, "share of documents held out (0 = none)", "data", at_least=0, less_than=1
    )

    curriculum: str = _setting(
        "",
        "shorter sequences first, as LENGTH:SHARE of the steps, e.g. 128:0.9 (empty = none)",
        "data",
    )

    max_steps: int = _setting(
        2400, "optimizer steps of the whole run", "train", at_least=1, at_most=_MOST_STEPS
    )
    learning_rate: float | None = _setting(
        None,
        "peak learning rate (none = 2e-3 x 128 / hidden_size)",
        "train",
        more_than=0,
        at_most=1000,
    )
    weight_decay: float = _setting(
        0.01, "decay of weights, not of biases and LayerNorm", "train", at_least=0, at_most=1000
    )
    adam_beta1: float = _setting(0.9, "decay of the first moment", "train", at_least=0, less_than=1)
    # BERT's 0.999 remembers the large first gradients for a whole short run: after 2,400 steps like
    # the demo's the held-out loss was 5.69 with it and 5.39 with RoBERTa's 0.98.
    adam_beta2: float = _setting(
        0.98, "decay of the second moment (BERT: 0.999)", "train", at_least=0, less_than=1
    )
    adam_epsilon: float = _setting(
        1e-6, "added to the root of the second moment", "train", at_least=1e-30, at_most=1000
    )
    max_grad_norm: float = _setting(
        1.0, "clip the gradient to this norm (0 = off)", "train", at_least=0, at_most=1e30
    )
    optim: str = _setting(
        "adamw",
        "the optimizer (adamw, lamb = the fastest form here)",
        "train",
        choices=("adamw", "lamb", "adamw_torch_fused", "adamw_apex_fused", "lamb_apex_fused"),
    )
    gradient_precision: str = _setting(
        "fp32", "of the gradients that a step adds up", "train", choices=("fp32", "bf16")
    )
    lr_scheduler_type: str = _setting(
        "linear",
        "shape of the learning rate after warm-up",
        "train",
        choices=("linear", "cosine", "constant", "warmup_stable_decay"),
    )
    warmup_steps: int = _setting(
        200, "steps over which the learning rate rises", "train", at_least=0, at_most=_MOST
    )
    decay_steps: int = _setting(
        0,
        "steps of warmup_stable_decay's fall (0 = 10% of max_steps)",
        "train",
        at_least=0,
        at_most=_MOST_STEPS,
    )
    gradient_accumulation_steps: int = _setting(
        1, "batches per optimizer step", "train", at_least=1, at_most=2**16
    )
    batch_ramp_steps: int = _setting(
        0,
        "steps over which the batches per optimizer step grow from 1 to that number (0 = off)",
        "train",
        at_least=0,
        at_most=_MOST_STEPS,
    )
    gradient_checkpointing: bool = _setting(
        False, "compute layers again in the backward: less memory, a third more time", "train"
    )
    last_layer_masked_only: bool = _setting(
        True,
        "run the last layer, keys and values aside, only where a loss reads it (exact)",
        "train",
    )

    logging_steps: int = _setting(10, "steps between log lines", "logs", at_least=1, at_most=_MOST)
    eval_steps: int = _setting(
        250, "steps between evaluations (0 = only at the end)", "logs", at_least=0, at_most=_MOST
    )
    save_steps: int = _setting(
        250, "steps between checkpoints (0 = only at the end)", "logs", at_least=0, at_most=_MOST
    )
    save_total_limit: int = _setting(
        3, "newest checkpoints kept", "logs", at_least=1, at_most=_MOST
    )
    max_eval_batches: int = _setting(
        32, "batches of one evaluation at most", "logs", at_least=1, at_most=10**5
    )
    report_to: str = _setting(
        "tensorboard", "where curves go beside the log", "logs", choices=("tensorboard", "none")
    )

    def __post_init__(self) -> None:
        _check_fields(self)
        for name in ("out", "model", "data", "tokenizer"):
            if not getattr(self, name):
                raise UserError(f"{name} = '' must not be empty")
        if self.tokens_per_batch < self.max_seq_length:
            raise UserError(
                f"tokens_per_batch = {self.tokens_per_batch} must be at least "
                f"max_seq_length = {self.max_seq_length}"
            )
        self.phases()
        if self.batch_ramp_steps and self.gradient_accumulation_steps == 1:
            raise UserError(
                f"batch_ramp_steps = {self.batch_ramp_steps} needs gradient_accumulation_steps of "
                "2 or more to grow to"
            )
        if self.decay_steps and self.lr_scheduler_type != "warmup_stable_decay":
            raise UserError(
                f"decay_steps = {self.decay_steps} belongs to lr_scheduler_type = "
                f"'warmup_stable_decay': it must be 0 with {self.lr_scheduler_type!r}"
            )

    def phases(self) -> tuple[tuple[int, int], ...]:
        """(sequence length, the step it ends before) of each phase of `curriculum`, in order.

        Raises:
            UserError: `curriculum` cannot be read, or does not fit `max_seq_length`.
        """
        shown, found, share = f"curriculum = {_show(self.curriculum)}", [], 0.0
        for part in self.curriculum.split(",") if self.curriculum else []:
            match = re.fullmatch(r"\s*([0-9]{1,9}):([0-9]*\.?[0-9]+)\s*", part)
            if not match:
                raise UserError(f"{shown}: {_show(part)} must be LENGTH:SHARE, e.g. 128:0.9")
            length, share = int(match[1]), share + float(match[2])
            if not 8 <= length <= self.max_seq_length:
                raise UserError(
                    f"{shown}: length {length} must be at least 8 and at most max_seq_length = "
                    f"{self.max_seq_length}"
                )
            if not float(match[2]) > 0 or share >= 1:
                raise UserError(f"{shown}: shares must be more than 0 and sum to less than 1")
            found.append((length, round(share * self.max_steps)))
        return (*found, (self.max_seq_length, self.max_steps))

    def accumulation_at(self, step: int) -> int:
        """Batches of optimizer step `step`, counted from 0."""
        most = self.gradient_accumulation_steps
        if step >= self.batch_ramp_steps:
            return most
        return min(most, 1 + step * most // self.batch_ramp_steps)

    @property
    def stable_decay_steps(self) -> int:
        """Steps of warmup_stable_decay's fall, its default of 10% filled in."""
        return self.decay_steps or math.ceil(self.max_steps / 10)


def resolved(config: PretrainConfig) -> PretrainConfig:
    """Returns the configuration with the settings filled in that depend on the model.

    Raises:
        UserError: the model does not exist.
    """
    if config.learning_rate is not None:
        return config
    return replace(config, learning_rate=2e-3 * 128 / model_config(config.model).hidden_size)


STEP_RIVAL_NAMES = (
    *("hf-eager", "hf-sdpa", "hf-sdpa-cudnn", "hf-flash", "hf-flash-flat", "hf-eager-compile"),
    *("hf-sdpa-compile", "hf-flash-compile", "hf-sdpa-compile-max"),
    *("torch-encoder", "modernbert", "liger"),
)
STEP_RIVALS = {
    "cpu": "hf-eager,hf-sdpa,hf-sdpa-compile,torch-encoder,hf-sdpa+malloc,hf-sdpa-compile+malloc",
    "cuda": ",".join(STEP_RIVAL_NAMES),
}
"""What `against = auto` means on each type of device."""


@dataclass(frozen=True)
class StepBenchConfig:
    """Everything `fastbert bench step` can be told.

    Raises:
        UserError: a value is out of bounds.
    """

    device: str = _setting("auto", "device (auto = the GPU if there is one)", "bench", **_DEVICES)
    model: str = _setting(
        "mini", "preset (" + ", ".join(PRESETS) + ") or path of a config.json", "bench"
    )
    batch_size: int = _setting(32, "sequences per batch", "bench", at_least=1, at_most=2**16)
    max_seq_length: int = _setting(
        128, "longest sequence, tokens", "bench", at_least=8, at_most=_LONGEST
    )
    lengths: str = _setting(
        "natural",
        "of the sequences: natural (as in real text), full, or a file with one a line",
        "bench",
    )
    against: str = _setting(
        "auto",
        "rivals, separated by commas (none = no rival; +malloc = with our allocator setting)",
        "bench",
    )
    rounds: int = _setting(
        5, "times each contender is measured, in turn", "bench", at_least=1, at_most=10**4
    )
    json: str = _setting("", "file to write the measurements to", "bench")
    seed: int = _setting(
        42, "seed of weights, batches and dropout", "bench", at_least=0, at_most=_LARGEST_SEED
    )
    precision: str = _setting(
        "auto",
        "of activations (auto = bf16 where the device is fast at it)",
        "bench",
        **_PRECISIONS,
    )

    def __post_init__(self) -> None:
        _check_fields(self)
        _check_tokens(self)
        names = [] if self.against in ("auto", "none") else self.against.split(",")
        for name in names:
            if name.removesuffix("+malloc") not in STEP_RIVAL_NAMES:
                raise UserError(
                    f"against = {self.against!r}: {name!r}{did_you_mean(name, STEP_RIVAL_NAMES)} "
                    f"must be one of {', '.join(STEP_RIVAL_NAMES)}"
                )
        if not self.lengths:
            raise UserError("lengths = '' must not be empty")


def integers(name: str, text: str, at_least: int, at_most: int = _MOST) -> list[int]:
    """The integers of a setting like "512,128".

    Raises:
        UserError: something else stands there, or a number is out of bounds.
    """
    parts = text.split(",")
    if not all(
        re.fullmatch("[0-9]{1,12}", part) and at_least <= int(part) <= at_most for part in parts
    ):
        raise UserError(
            f"{name} = {_show(text)} must be integers of at least {at_least} and at most "
            f"{at_most}, separated by commas"
        )
    return [int(part) for part in parts]


def _check_tokens(config: "StepBenchConfig | InferenceBenchConfig | ProfileStepConfig") -> None:
    if config.batch_size * config.max_seq_length > _MOST_TOKENS:
        raise UserError(
            f"batch_size = {config.batch_size} x max_seq_length = {config.max_seq_length} tokens "
            f"must be at most {_MOST_TOKENS}"
        )


def _check_names(setting: str, text: str, known: tuple[str, ...], words: tuple[str, ...]) -> None:
    for name in [] if text in words else text.split(","):
        if name not in known:
            raise UserError(
                f"{setting} = {text!r}: {name!r} must be one of {', '.join(known)}"
                f"{did_you_mean(name, known)}"
            )


DATA_RIVAL_NAMES = ("hf-collator",)


@dataclass(frozen=True)
class DataBenchConfig:
    """Everything `fastbert bench data` can be told.

    Raises:
        UserError: a value is out of bounds.
    """

    device: str = _setting(
        "auto", "where batches go (auto = the GPU if there is one)", "bench", **_DEVICES
    )
    model: str = _setting(
        "base",
        "whose vocabulary: preset (" + ", ".join(PRESETS) + ") or path of a config.json",
        "bench",
    )
    lengths: str = _setting(
        "natural",
        "natural (as in real text), full, or a file with those of sentences, one a line",
        "bench",
    )
    against: str = _setting("auto", "rivals, separated by commas (none = no rival)", "bench")
    max_seq_lengths: str = _setting("512,128", "each longest sequence to measure, tokens", "bench")
    num_workers: str = _setting("0,1,2,4", "each number of worker processes to measure", "bench")
    tokens_per_batch: int = _setting(
        65536, "tokens of a batch", "bench", at_least=8, at_most=_MOST_TOKENS
    )
    dataloader_prefetch_factor: int = _setting(
        2, "batches that each worker prepares ahead", "bench", at_least=1, at_most=_MOST_AHEAD
    )
    corpus_tokens: int = _setting(
        2**24, "tokens of the random corpus", "bench", at_least=1000, at_most=2**30
    )
    rounds: int = _setting(5, "times each is measured, in turn", "bench", at_least=1, at_most=10**4)
    seconds: float = _setting(2.0, "of each round", "bench", more_than=0, at_most=3600)
    json: str = _setting("", "file to write the measurements to", "bench")
    seed: int = _setting(
        42, "seed of corpus and batches", "bench", at_least=0, at_most=_LARGEST_SEED
    )

    def __post_init__(self) -> None:
        _check_fields(self)
        lengths = integers("max_seq_lengths", self.max_seq_lengths, 8, _LONGEST)
        integers("num_workers", self.num_workers, 0, _MOST_WORKERS)
        _check_names("against", self.against, DATA_RIVAL_NAMES, ("auto", "none"))
        if not self.lengths:
            raise UserError("lengths = '' must not be empty")
        if max(lengths) > self.tokens_per_batch:
            raise UserError(
                f"max_seq_lengths = {self.max_seq_lengths!r}: {max(lengths)} must be at most "
                f"tokens_per_batch = {self.tokens_per_batch}"
            )


KERNEL_OPS = (
    *("attention", "dropout_add_layer_norm", "linear_cross_entropy", "adamw", "linear_gelu"),
    *("gelu_layer_norm", "bias_gelu", "embed_layer_norm", "lamb", "mask_tokens"),
)


KERNEL_PEER_NAMES = (
    *("reference", "eager", "compile", "fa2", "fa3", "fa4", "cudnn", "liger", "torch-own"),
    *("bare-gemm", "bare-gemms", "torch-fused", "torch-foreach", "adamw"),
)


@dataclass(frozen=True)
class KernelBenchConfig:
    """Everything `fastbert bench kernels` can be told.

    Raises:
        UserError: a value is out of bounds.
    """

    device: str = _setting(
        "auto", "device (auto = the GPU if there is one)", "bench", choices=("auto", "cpu", "cuda")
    )
    model: str = _setting(
        "auto",
        "of the widths: preset or path of a config.json (auto = base, large; on a CPU mini)",
        "bench",
    )
    lengths: str = _setting(
        "full",
        "that attention sees: natural (as in real text), full, or a file with one a line",
        "bench",
    )
    against: str = _setting("auto", "peers, separated by commas (none = no peer)", "bench")
    op: str = _setting("all", "ops to measure, separated by commas", "bench")
    quick: bool = _setting(False, "fewer and smaller sizes, fewer rounds", "bench")
    json: str = _setting("", "file to write the measurements to", "bench")

    def __post_init__(self) -> None:
        _check_fields(self)
        _check_names("op", self.op, KERNEL_OPS, ("all",))
        _check_names("against", self.against, KERNEL_PEER_NAMES, ("auto", "none"))
        if not self.lengths:
            raise UserError("lengths = '' must not be empty")


INFERENCE_RIVAL_NAMES = (
    *("hf-eager", "hf-sdpa", "hf-flash", "hf-sdpa-compile", "torch-encoder", "modernbert"),
)


@dataclass(frozen=True)
class InferenceBenchConfig:
    """Everything `fastbert bench inference` can be told.

    Raises:
        UserError: a value is out of bounds.
    """

    device: str = _setting("auto", "device (auto = the GPU if there is one)", "bench", **_DEVICES)
    model: str = _setting(
        "mini", "preset (" + ", ".join(PRESETS) + ") or path of a config.json", "bench"
    )
    batch_size: int = _setting(32, "sequences per batch", "bench", at_least=1, at_most=2**16)
    max_seq_length: int = _setting(
        128, "longest sequence, tokens", "bench", at_least=8, at_most=_LONGEST
    )
    lengths: str = _setting(
        "natural",
        "of the sequences: natural (as in real text), full, or a file with one a line",
        "bench",
    )
    against: str = _setting("auto", "rivals, separated by commas (none = no rival)", "bench")
    rounds: int = _setting(
        5, "times each contender is measured, in turn", "bench", at_least=1, at_most=10**4
    )
    json: str = _setting("", "file to write the measurements to", "bench")
    seed: int = _setting(
        42, "seed of weights and batches", "bench", at_least=0, at_most=_LARGEST_SEED
    )
    precision: str = _setting(
        "auto",
        "of weights and activations (auto = bf16 where the device is fast at it)",
        "bench",
        choices=("auto", "fp32", "bf16", "fp16"),
    )

    def __post_init__(self) -> None:
        _check_fields(self)
        _check_tokens(self)
        _check_names("against", self.against, INFERENCE_RIVAL_NAMES, ("auto", "none"))
        if not self.lengths:
            raise UserError("lengths = '' must not be empty")


CONVERGENCE_RIVAL_NAMES = ("hf-trainer", "hf-loop")


@dataclass(frozen=True)
class ConvergenceBenchConfig:
    """Everything `fastbert bench convergence` can be told.

    Raises:
        UserError: a value is out of bounds.
    """

    device: str = _setting("auto", "device (auto = the GPU if there is one)", "bench", **_DEVICES)
    model: str = _setting(
        "tiny", "preset (" + ", ".join(PRESETS) + ") or path of a config.json", "bench"
    )
    data: str = _setting("builtin", "text file or folder of text files, or builtin", "bench")
    tokenizer: str = _setting(
        "train", "path of a tokenizer or its folder, or train = train one on the data", "bench"
    )
    vocab_size: int = _setting(
        4096,
        "tokens in the vocabulary of a trained tokenizer",
        "bench",
        at_least=100,
        at_most=_MOST_WORDS,
    )
    max_seq_length: int = _setting(
        128, "longest sequence, tokens", "bench", at_least=8, at_most=_LONGEST
    )
    lengths: str = _setting(
        "natural", "of the sequences: natural (some cut short on purpose), or full", "bench"
    )
    tokens_per_batch: int = _setting(
        4096, "tokens of a step", "bench", at_least=8, at_most=_MOST_TOKENS
    )
    max_steps: int = _setting(
        400, "optimizer steps of each contender", "bench", at_least=1, at_most=_MOST_STEPS
    )
    warmup_steps: int = _setting(
        40, "steps over which the learning rate rises", "bench", at_least=0, at_most=_MOST
    )
    learning_rate: float | None = _setting(
        None,
        "peak learning rate (none = 2e-3 x 128 / hidden_size)",
        "bench",
        more_than=0,
        at_most=1000,
    )
    eval_steps: int = _setting(50, "steps between evaluations", "bench", at_least=1, at_most=_MOST)
    max_eval_batches: int = _setting(
        8, "batches of one evaluation at most", "bench", at_least=1, at_most=10**5
    )
    target_loss: float | None = _setting(
        None,
        "held-out MLM loss to time (none = the highest final loss)",
        "bench",
        more_than=0,
        at_most=1e6,
    )
    against: str = _setting(
        "auto",
        "rivals, separated by commas (none = no rival; hf-trainer needs accelerate)",
        "bench",
    )
    json: str = _setting("", "file to write the measurements to", "bench")
    png: str = _setting("", "file to draw loss over wall time into", "bench")
    seed: int = _setting(
        42, "seed of weights, batches and dropout", "bench", at_least=0, at_most=_LARGEST_SEED
    )
    precision: str = _setting(
        "auto",
        "of activations (auto = bf16 where the device is fast at it)",
        "bench",
        choices=("auto", "fp32", "bf16"),
    )

    def __post_init__(self) -> None:
        _check_fields(self)
        _check_names("against", self.against, CONVERGENCE_RIVAL_NAMES, ("auto", "none"))
        if self.lengths not in ("natural", "full"):
            raise UserError(
                f"lengths = {self.lengths!r} must be natural or full: the text decides the lengths"
            )
        if self.tokens_per_batch < self.max_seq_length:
            raise UserError(
                f"tokens_per_batch = {self.tokens_per_batch} must be at least "
                f"max_seq_length = {self.max_seq_length}"
            )


@dataclass(frozen=True)
class ReportConfig:
    """Everything `fastbert bench report` can be told, but the files.

    Raises:
        UserError: a value is not text.
    """

    out: str = _setting("runs/report", "folder of the page and its pictures", "bench")
    against: str = _setting(
        "", "folder of results to compare with, or the commit that holds the same files", "bench"
    )
    readme: bool = _setting(
        False, "rewrite the README's measurements from benchmarks/results", "bench"
    )

    def __post_init__(self) -> None:
        _check_fields(self)
        if not self.out:
            raise UserError("out = '' must not be empty")


ESTIMATE_GPUS = ("h100", "h200", "a100-80gb", "a100-40gb", "cpu")


@dataclass(frozen=True)
class EstimateConfig:
    """Everything `fastbert estimate` can be told.

    Raises:
        UserError: a value is out of bounds, or two do not fit together.
    """

    model: str = _setting(
        "base", "preset (" + ", ".join(PRESETS) + ") or path of a config.json", "estimate"
    )
    lengths: str = _setting(
        "natural",
        "of the sequences: natural (as in real text), full, or a file with one a line",
        "estimate",
    )
    max_seq_length: int = _setting(
        512, "longest sequence, tokens", "estimate", at_least=8, at_most=_LONGEST
    )
    tokens: float | None = _setting(
        None,
        "real tokens of the whole run (none = 1.31e11, as BERT)",
        "estimate",
        more_than=0,
        at_most=1e18,
    )
    epochs: float | None = _setting(
        None,
        "instead of tokens: times that the corpus is read",
        "estimate",
        more_than=0,
        at_most=1e9,
    )
    corpus_tokens: float | None = _setting(
        None, "real tokens of the corpus, for epochs", "estimate", more_than=0, at_most=1e18
    )
    gpu: str = _setting("h100", "what it runs on: " + ", ".join(ESTIMATE_GPUS), "estimate")
    gpus: int = _setting(
        1, "how many, with one copy of the model each", "estimate", at_least=1, at_most=1024
    )
    price_per_hour: float | None = _setting(
        None, "dollars for one GPU and hour (none = no costs)", "estimate", at_least=0, at_most=1e9
    )
    tokens_per_batch: int | None = _setting(
        None,
        "of one GPU's forward and backward pass (none = what fits)",
        "estimate",
        at_least=8,
        at_most=_MOST_TOKENS,
    )
    json: str = _setting("", "file to write the estimate to", "estimate")

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.gpu not in ESTIMATE_GPUS:
            raise UserError(
                f"gpu = {self.gpu!r} must be one of {', '.join(ESTIMATE_GPUS)}"
                f"{did_you_mean(self.gpu, ESTIMATE_GPUS)}"
            )
        if not self.lengths:
            raise UserError("lengths = '' must not be empty")
        if (self.epochs is None) != (self.corpus_tokens is None):
            raise UserError("epochs and corpus_tokens belong together: give both, or tokens")
        if self.tokens is not None and self.epochs is not None:
            raise UserError(
                f"tokens = {self.tokens:g} and epochs = {self.epochs:g} say the same: give one"
            )
        if self.tokens_per_batch is not None and self.tokens_per_batch < self.max_seq_length:
            raise UserError(
                f"tokens_per_batch = {self.tokens_per_batch} must be at least "
                f"max_seq_length = {self.max_seq_length}"
            )
        if self.gpu == "cpu" and self.gpus > 1:
            raise UserError(f"gpus = {self.gpus} must be 1 with gpu = 'cpu'")


@dataclass(frozen=True)
class ProfileStepConfig:
    """Everything `fastbert profile step` can be told.

    Raises:
        UserError: a value is out of bounds.
    """

    device: str = _setting("auto", "device (auto = the GPU if there is one)", "profile", **_DEVICES)
    model: str = _setting(
        "mini", "preset (" + ", ".join(PRESETS) + ") or path of a config.json", "profile"
    )
    batch_size: int = _setting(32, "sequences per batch", "profile", at_least=1, at_most=2**16)
    max_seq_length: int = _setting(
        128, "longest sequence, tokens", "profile", at_least=8, at_most=_LONGEST
    )
    lengths: str = _setting(
        "natural",
        "of the sequences: natural (as in real text), full, or a file with one a line",
        "profile",
    )
    precision: str = _setting(
        "auto",
        "of activations (auto = bf16 where the device is fast at it)",
        "profile",
        **_PRECISIONS,
    )
    step: str = _setting(
        "auto",
        "how a step is launched (auto = as one CUDA graph on a GPU)",
        "profile",
        choices=("auto", "eager", "graph"),
    )
    json: str = _setting("profile-step.json", "file to write the table to", "profile")
    trace: str = _setting(
        "", "file to write the Chrome trace to (empty = beside the JSON)", "profile"
    )
    seed: int = _setting(
        42, "seed of weights, batches and dropout", "profile", at_least=0, at_most=_LARGEST_SEED
    )

    def __post_init__(self) -> None:
        _check_fields(self)
        _check_tokens(self)
        for name in ("lengths", "json"):
            if not getattr(self, name):
                raise UserError(f"{name} = '' must not be empty")


_MOST_ELEMENTS = 2**33
_MOST_OF_SIZE = {
    "T": _MOST_TOKENS,
    "S": _LONGEST,
    "H": 2**16,
    "A": 2**16,
    "F": 2**18,
    "V": 2**24,
    "M": _MOST_TOKENS,
}


@dataclass(frozen=True)
class ProfileKernelConfig:
    """Everything `fastbert profile kernel` can be told, but the kernel's name.

    Raises:
        UserError: a value is out of bounds, or `shape` cannot be read.
    """

    shape: str = _setting(
        "",
        "sizes by letter, e.g. T=65536,S=512,H=768 (empty = BERT base's, small on a CPU)",
        "profile",
    )
    device: str = _setting("auto", "device (auto = the GPU if there is one)", "profile", **_DEVICES)
    arch: str = _setting(
        "auto",
        "which GPU's machine code is counted (auto = the GPU's, or both without one)",
        "profile",
        choices=("auto", "sm_80", "sm_90"),
    )
    json: str = _setting("", "file to write the measurements to", "profile")
    png: str = _setting("", "file to draw the roofline into", "profile")

    def __post_init__(self) -> None:
        _check_fields(self)
        self.sizes()

    def sizes(self) -> dict[str, int]:
        """The sizes that `shape` names.

        Raises:
            UserError: it is not written as LETTER=NUMBER,... with letters that are known.
        """
        shown, found = f"shape = {_show(self.shape)}", {}
        for part in self.shape.split(",") if self.shape else []:
            match = re.fullmatch(r"\s*([A-Za-z]+)=([1-9][0-9]{0,9})\s*", part)
            if not match:
                raise UserError(f"{shown}: {_show(part)} must be LETTER=NUMBER, e.g. T=4096")
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


Config = TypeVar("Config")


def load_config(
    config_class: type[Config],
    toml_path: str | os.PathLike[str] | None,
    overrides: Mapping[str, Any],
    *,
    sealed: bool = False,
) -> Config:
    """Returns the defaults, overridden by a TOML file, overridden by the command line.

    Args:
        config_class: `PretrainConfig` or another configuration of this file.
        toml_path: file of flat `name = value` lines, or None.
        overrides: settings by name, already of their types.
        sealed: the file must be as `sealed_toml` made it.

    Raises:
        UserError: the file is missing or broken, a name is unknown, a value is wrong.
    """
    values: dict[str, Any] = {}
    if toml_path is not None:
        path = os.fspath(toml_path)
        if sealed and not _has_seal(_read_text(path, "TOML", _MOST_TOML)):
            raise UserError(
                f"{path}: was damaged or changed since the run wrote it: put it back or, if that "
                f"was you, give it as --config {path}"
            )
        values |= _known_values(config_class, _read_toml(path), f"{path}: ")
    values |= _known_values(config_class, overrides, "")
    return config_class(**values)


def _read_toml(path: str) -> dict[str, Any]:
    text = _read_text(path, "TOML", _MOST_TOML)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        told = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", str(error))
        if told:
            path, error_text = f"{path}:{told[2]}:{told[3]}", told[1]
        else:
            error_text = str(error)
        raise UserError(f"{path}: not TOML: {error_text}") from None


def _known_values(config_class: type, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    by_name = {setting.name: setting for setting in settings(config_class)}
    for name, value in given.items():
        if name in by_name:
            continue
        if isinstance(value, dict):
            raise UserError(
                f"{where}[{name[:100]}] is a table: settings stand at the top, as name = value"
            )
        raise UserError(f"{where}unknown setting {_show(name)}{did_you_mean(name, by_name)}")
    return {name: checked(by_name[name], value, where) for name, value in given.items()}


def to_toml(config: Any) -> str:
    """Returns the configuration as TOML that `load_config` reads back exactly.

    Settings stand in their groups, each below its help; one that is None is commented out.
    """
    lines: list[str] = []
    group = ""
    for setting in settings(type(config)):
        if setting.group != group:
            group = setting.group
            lines += (
                ["", f"## {group}: {GROUPS[group]}"] if lines else [f"## {group}: {GROUPS[group]}"]
            )
        allowed = choices_text(setting)
        lines += ["", f"# {setting.help}" + (f": {allowed}" if allowed else "")]
        value = getattr(config, setting.name)
        lines.append(f"# {setting.name} =" if value is None else f"{setting.name} = {_toml(value)}")
    return "\n".join(lines) + "\n"


_SEAL = "\n# SHA-256 of what stands above: "
_MOST_TOML = 2**20


def sealed_toml(config: Any) -> str:
    """Returns `to_toml` with a last line that tells whether the file is still that."""
    text = to_toml(config)
    return f"{text}{_SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n"


def _has_seal(text: str) -> bool:
    text, _, digest = text.rpartition(_SEAL)
    return digest == hashlib.sha256(text.encode()).hexdigest() + "\n"


def _toml(value: bool | int | float | str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):  # JSON's escapes are TOML's, but TOML escapes DEL as well
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
