"""The model's sizes and everything that pre-training can be told, each setting defined once.

Names are Hugging Face's: `BertConfig` for the model, `TrainingArguments` for training. Standard
library only, so that a mistake is told at once.
"""

import json
import math
import os
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from fastbert.errors import UserError, did_you_mean
from fastbert.recipes import CLASSIC, RECIPES, with_recipes
from fastbert.schedules import Phase, lengths, numbers, united
from fastbert.settings import (
    LARGEST_SEED,
    LONGEST,
    MOST,
    MOST_AHEAD,
    MOST_DROPOUT,
    MOST_STEPS,
    MOST_TOKENS,
    MOST_WORDS,
    MOST_WORKERS,
    Config,
    Group,
    check_fields,
    check_not_empty,
    checked,
    exists,
    load_config,
    read_json,
    setting,
    settings,
    show,
)

RUN = Group("run", "where and on what it runs")
RECIPE = Group("recipe", "settings that belong together; each given beside it overrides its own")
MODEL = Group("model", "its size, start and dropout")
DATA = Group("data", "text, tokens and batches")
TRAIN = Group("train", "the optimizer and its schedule")
LOGS = Group("logs", "what is reported, evaluated and saved")


@dataclass(frozen=True)
class ModelConfig(Config):
    """The shape of a BERT, as transformers' `BertConfig` names it; the defaults are BERT base.

    Raises:
        UserError: a value is out of bounds, or two do not fit together.
    """

    vocab_size: int = setting(30522, "tokens in the vocabulary", MODEL, at_least=1, at_most=2**24)
    hidden_size: int = setting(768, "width of the hidden states", MODEL, at_least=1, at_most=2**16)
    num_hidden_layers: int = setting(12, "layers of the encoder", MODEL, at_least=1, at_most=1000)
    num_attention_heads: int = setting(
        12, "attention heads per layer", MODEL, at_least=1, at_most=2**16
    )
    intermediate_size: int = setting(3072, "width inside the MLP", MODEL, at_least=1, at_most=2**18)
    hidden_act: str = setting(
        "gelu",
        "activation of the MLP: gelu is exact (erf), the other two are its tanh form",
        MODEL,
        choices=("gelu", "gelu_new", "gelu_pytorch_tanh"),
    )
    hidden_dropout_prob: float = setting(
        0.1, "dropout of hidden states", MODEL, at_least=0, at_most=MOST_DROPOUT
    )
    attention_probs_dropout_prob: float = setting(
        0.1, "dropout of attention probabilities", MODEL, at_least=0, at_most=MOST_DROPOUT
    )
    max_position_embeddings: int = setting(
        512, "longest sequence, tokens", MODEL, at_least=1, at_most=LONGEST
    )
    type_vocab_size: int = setting(2, "token types", MODEL, at_least=1, at_most=2**16)
    initializer_range: float = setting(
        0.02, "standard deviation of initial weights", MODEL, at_least=0, at_most=100
    )
    layer_norm_eps: float = setting(
        1e-12, "added to the variance in LayerNorm", MODEL, at_least=1e-30, at_most=1
    )
    pad_token_id: int = setting(0, "token of padding", MODEL, at_least=0, at_most=2**24 - 1)

    def __post_init__(self) -> None:
        check_fields(self)
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


PRESETS = {
    "tiny": _google_size(2, 128),  # 4.4 million parameters
    "mini": _google_size(4, 256),  # 11 million
    "small": _google_size(4, 512),  # 29 million
    "medium": _google_size(8, 512),  # 41 million
    "base": _google_size(12, 768),  # 109 million
    "large": _google_size(24, 1024),  # 335 million
}
"""Sizes of https://github.com/google-research/bert, all with heads 64 wide."""


def model_config(name_or_path: str, **changes: Any) -> ModelConfig:
    """Returns the configuration of a preset, or of a Hugging Face config.json.

    Args:
        name_or_path: a key of `PRESETS`, the path of a config.json, or a folder that holds one.
        changes: settings of `ModelConfig` that are to be others, such as `vocab_size`.

    Raises:
        UserError: no such preset or file, the file describes something other than this BERT, or a
            change is wrong.
    """
    return replace(_found(name_or_path), **changes)


def _found(name_or_path: str) -> ModelConfig:
    if name_or_path in PRESETS:
        return PRESETS[name_or_path]
    shown = f"model = {show(name_or_path)}"
    if not exists(name_or_path):
        if name_or_path.endswith(".json") or os.path.dirname(name_or_path):
            raise UserError(f"{shown}: no such file or folder (nothing is downloaded)")
        raise UserError(
            f"{shown} is not a preset{did_you_mean(name_or_path, PRESETS)} "
            f"(presets: {', '.join(PRESETS)}; else the path of a config.json or its folder)"
        )
    path = name_or_path
    if path.endswith((".safetensors", ".bin", ".pt", ".pth", ".ckpt")) and not os.path.isdir(path):
        raise UserError(
            f"{shown} is a file of weights: give its folder, "
            f"{os.path.dirname(path) or '.'!r}, or the config.json there"
        )
    if os.path.isdir(path):
        path = os.path.join(path, "config.json")
        if not os.path.exists(path):
            raise UserError(f"{shown}: the folder holds no config.json")
    return _from_hf_dict(read_json(path), path)


# What a config.json must say for this engine to compute the same model, and what its absence means.
_HF_MUST_BE: dict[str, tuple[Any, Any]] = {
    "model_type": ("bert", None),
    "position_embedding_type": ("absolute", "absolute"),
    "is_decoder": (False, False),
    "add_cross_attention": (False, False),
    "tie_word_embeddings": (True, True),
}


def _shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | float | str | None) else show(value)


def _from_hf_dict(content: dict[str, Any], path: str) -> ModelConfig:
    for key, (right, absent) in _HF_MUST_BE.items():
        value = content.get(key, absent)
        if value != right:
            given = f"{key} = {_shown(value)}" if key in content else f"{key} is missing: it"
            raise UserError(f"{path}: {given} must be {json.dumps(right)}")
    known = [one for one in settings(ModelConfig) if one.name in content]
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
        **{one.name: getattr(config, one.name) for one in settings(ModelConfig)},
    }


# Checkpoints to begin with

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Weights in a Hugging Face folder; where they are in parts, NAME.index.json names these."""
KEPT_SIZES = "model.json"
"""In the folder of a run that began with a checkpoint: that one's sizes."""


def holds_weights(folder: str) -> bool:
    """Whether a Hugging Face folder holds weights, whole or in parts."""
    names = (name + end for name in WEIGHTS for end in ("", ".index.json"))
    return any(exists(os.path.join(folder, name)) for name in names)


def initial_folder(init_from: str) -> str:
    """Returns the Hugging Face folder that is meant: the one named, or `hf/` of a run.

    Raises:
        UserError: there is none, or it lacks config.json or weights.
    """
    shown = f"init_from = {show(init_from)}"
    if not exists(init_from):
        raise UserError(f"{shown}: no such folder (nothing is downloaded)")
    if not os.path.isdir(init_from):
        folder = os.path.dirname(init_from) or "."
        raise UserError(f"{shown} is a file: give its folder, {folder!r}")
    if exists(os.path.join(init_from, "config.json")):
        folder = init_from
    elif exists(os.path.join(init_from, "hf", "config.json")):
        folder = os.path.join(init_from, "hf")
    elif exists(os.path.join(init_from, "checkpoints")):
        raise UserError(f"{shown} is a run without hf/, which is there once the run has ended")
    else:
        raise UserError(f"{shown}: the folder holds no config.json")
    if not holds_weights(folder):
        raise UserError(f"{shown}: the folder holds neither {' nor '.join(WEIGHTS)}")
    return folder


# Settings that more than one command has.


def device_setting(
    group: Group, help: str = "device (auto = the GPU if there is one)", *, any_gpu: bool = True
) -> Any:
    """auto, cpu or cuda, and cuda:N where `any_gpu`."""
    pattern = "cuda:[0-9]{1,2}" if any_gpu else ""
    return setting("auto", help, group, choices=("auto", "cpu", "cuda"), pattern=pattern)


def model_setting(group: Group, default: str, of: str = "") -> Any:
    """A preset's name, or the path of a config.json."""
    help = f"{of}preset ({', '.join(PRESETS)}) or path of a config.json"
    return setting(default, help, group, aka=("model_name_or_path", "model_name"))


def precision_setting(
    group: Group,
    choices: tuple[str, ...] = ("auto", "fp32", "tf32", "bf16", "fp16"),
    *,
    of: str = "activations",
    otherwise: str = "",
) -> Any:
    """Of what a model computes in; auto decides by the device."""
    help = f"of {of} (auto = bf16 where the device is fast at it{otherwise})"
    aka = ("fp16", "bf16", "fp32", "tf32", "amp", "dtype", "mixed_precision")
    return setting("auto", help, group, choices=choices, aka=aka)


def num_threads_setting(group: Group) -> Any:
    """Of a CPU."""
    help = "CPU threads of one operation (0 = torch's choice)"
    return setting(0, help, group, at_least=0, at_most=1024)


def step_setting(group: Group) -> Any:
    """Eager, or recorded."""
    help = "how a step is launched (auto = as one CUDA graph on a GPU)"
    return setting("auto", help, group, choices=("auto", "eager", "graph"))


def seed_setting(group: Group, of: str) -> Any:
    """Any that PyTorch takes."""
    return setting(42, f"seed of {of}", group, at_least=0, at_most=LARGEST_SEED)


def max_seq_length_setting(group: Group, default: int = 128) -> Any:
    """In tokens."""
    aka = ("max_length", "max_len", "seq_length", "seq_len", "block_size")
    help = "longest sequence, tokens"
    return setting(default, help, group, at_least=8, at_most=LONGEST, aka=aka)


def data_setting(group: Group) -> Any:
    """Where raw text comes from."""
    aka = ("train_file", "train_data", "dataset", "data_dir", "corpus", "input")
    return setting("builtin", "text file or folder of text files, or builtin", group, aka=aka)


_TOKENIZER_NAMES = ("tokenizer_name", "vocab", "vocab_file")


def tokenizer_setting(group: Group) -> Any:
    """A given tokenizer, or one of the data's own."""
    help = "path of a tokenizer or its folder, or train = train one on the data"
    return setting("train", help, group, aka=_TOKENIZER_NAMES)


def vocab_size_setting(group: Group) -> Any:
    """Of a tokenizer that is trained."""
    help = "tokens in the vocabulary of a trained tokenizer"
    return setting(4096, help, group, at_least=100, at_most=MOST_WORDS)


def learning_rate_setting(group: Group, base: str = "2e-3") -> Any:
    """Its default belongs to the model: see `peak_learning_rate`."""
    help = f"peak learning rate (none = {base} x 128 / hidden_size)"
    return setting(None, help, group, more_than=0, at_most=1000, aka=("lr", "peak_lr"))


def warmup_steps_setting(group: Group, default: int) -> Any:
    """Linear, from 0."""
    help = "steps over which the learning rate rises, or their share of max_steps"
    aka = ("warmup", "warmup_ratio", "num_warmup_steps")
    return setting(default, help, group, at_least=0, at_most=MOST, aka=aka, share_too=True)


def steps_of(given: float, max_steps: int) -> int:
    """Steps given as a number or as a share, which is rounded up as transformers 5 does."""
    return int(given) if given >= 1 else math.ceil(max_steps * given)


def max_eval_batches_setting(group: Group, default: int) -> Any:
    """Of held-out documents."""
    help = "batches of one evaluation at most"
    return setting(default, help, group, at_least=1, at_most=10**5)


def check_positions(model: str, max_seq_length: int) -> None:
    """Refuses sequences that the model has no positions for.

    Raises:
        UserError: it has not, or there is no such model.
    """
    longest = model_config(model).max_position_embeddings
    if max_seq_length > longest:
        raise UserError(
            f"max_seq_length = {max_seq_length} must be at most {longest}, "
            f"max_position_embeddings of model = {model!r}"
        )


def check_batch_holds_a_sequence(model: str, tokens_per_batch: int, max_seq_length: int) -> None:
    """Refuses batches that are shorter than a sequence, or sequences that no batch could bear.

    Raises:
        UserError: says which of them is at fault.
    """
    if tokens_per_batch < max_seq_length:
        check_positions(model, max_seq_length)
        raise UserError(
            f"tokens_per_batch = {tokens_per_batch} must be at least "
            f"max_seq_length = {max_seq_length}"
        )


@with_recipes
@dataclass(frozen=True)
class PretrainConfig(Config):
    """Everything `fastbert pretrain` can be told.

    What is not given is as `recipe` says, and what that does not say is the default.

    Raises:
        UserError: a value is out of bounds, or two do not fit together.
    """

    command: ClassVar[str] = "pretrain"

    out: str = setting(
        "auto",
        "folder of the run (auto = the next free runs/pretrain-001 ...)",
        RUN,
        aka=("output_dir", "output", "save_dir"),
    )
    device: str = device_setting(RUN)
    seed: int = seed_setting(RUN, "weights, data order, masks and dropout")
    resume: str = setting(
        "",
        "checkpoint to go on from: its path, or auto = the last one under out",
        RUN,
        aka=("resume_from_checkpoint", "checkpoint"),
    )
    precision: str = precision_setting(RUN, otherwise=", else fp16 on a GPU")
    step: str = step_setting(RUN)
    kernels: str = setting(
        "auto",
        "the fused ops (auto = our Triton kernels where they can run, else plain PyTorch)",
        RUN,
        choices=("auto", "triton", "reference"),
    )
    attn_implementation: str = setting(
        "auto",
        "attention on a GPU (torch, flash_attn: FlashAttention 2 of PyTorch or its package)",
        RUN,
        choices=("auto", "triton", "torch", "flash_attn", "fa3", "fa4"),
    )
    torch_compile: str = setting(
        "auto", "compile the model with torch.compile", RUN, choices=("auto", "on", "off")
    )
    stop_at_step: int = setting(
        0,
        "end this call after that step, the schedule unchanged (0 = off)",
        RUN,
        at_least=0,
        at_most=MOST_STEPS,
    )
    num_threads: int = num_threads_setting(RUN)
    dataloader_num_workers: int | None = setting(
        None,
        "processes that pack and mask batches (none = 1 for a GPU, else 0)",
        RUN,
        at_least=0,
        at_most=MOST_WORKERS,
        aka=("num_workers", "workers"),
    )
    dataloader_prefetch_factor: int = setting(
        2, "batches that each of them prepares ahead", RUN, at_least=1, at_most=MOST_AHEAD
    )

    recipe: str = setting(
        CLASSIC, f"{', '.join(RECIPES)}, or the path of a TOML file of settings", RECIPE
    )

    model: str = setting(
        "auto",
        f"preset ({', '.join(PRESETS)}) or config.json (auto: init_from's or tiny)",
        MODEL,
        aka=("model_name", "config_name"),
    )
    init_from: str = setting(
        "",
        "checkpoint whose weights to begin with: a Hugging Face folder or a run (empty = none)",
        MODEL,
        aka=(
            *("model_name_or_path", "init_checkpoint", "init_from_checkpoint"),
            *("from_pretrained", "pretrained_model", "load_weights"),
        ),
    )
    hidden_dropout_prob: float | str | None = setting(
        None,
        "dropout of hidden states in training, or a schedule: 0.0:0.8,0.1 (none = the model's)",
        MODEL,
        at_least=0,
        at_most=MOST_DROPOUT,
        schedule_too=True,
    )
    attention_probs_dropout_prob: float | str | None = setting(
        None,
        "dropout of attention in training, or a schedule: 0.0:0.8,0.1 (none = the model's)",
        MODEL,
        at_least=0,
        at_most=MOST_DROPOUT,
        schedule_too=True,
    )
    initializer_range: str = setting(
        "model",
        "deviation of new weights (model = its own, auto = 0.02, below 768 wide more)",
        MODEL,
        choices=("model", "auto"),
        pattern=r"[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?",
        number_too=True,
        aka=("init_std", "initializer_std", "init_range"),
    )
    position_init: str = setting(
        "normal",
        "how the position table starts, which is trained (sinusoidal: Vaswani et al. 2017)",
        MODEL,
        choices=("normal", "sinusoidal"),
    )

    data: str = data_setting(DATA)
    sentence_splitter: str = setting(
        "auto",
        "sentences (auto = by the script of each line, line = a line is one, else a language: de)",
        DATA,
        choices=("auto", "line"),
        pattern="[a-z]{2,3}",
    )
    tokenizer: str = setting(
        "auto",
        "a tokenizer's path, or train = train one on the data (auto = init_from's, else train)",
        DATA,
        aka=_TOKENIZER_NAMES,
    )
    vocab_size: int = vocab_size_setting(DATA)
    add_tokens: str = setting(
        "",
        "words to add to init_from's vocabulary: a file of them, or how many to learn (empty = 0)",
        DATA,
        number_too=True,
        aka=("new_tokens", "additional_tokens", "extend_vocab", "vocab_extension"),
    )
    do_lower_case: bool | None = setting(
        None, "lower-case the text (none = as the tokenizer's files say, else yes)", DATA
    )
    strip_accents: bool | None = setting(
        None,
        "take accents off (none = as the files say, else with lower case, where they are accents)",
        DATA,
    )
    max_seq_length: int = max_seq_length_setting(DATA)
    mlm_probability: float | str = setting(
        0.15,
        "share of tokens to predict, or a schedule: 0.3:0.6,0.15 (evaluation: always 0.15)",
        DATA,
        more_than=0,
        less_than=1,
        schedule_too=True,
    )
    whole_word_mask: bool = setting(False, "mask all pieces of a word together", DATA)
    nsp: bool = setting(True, "train next-sentence prediction beside MLM", DATA)
    short_seq_prob: float = setting(
        0.1, "share of sequences cut short on purpose", DATA, at_least=0, at_most=1
    )
    tokens_per_batch: int = setting(
        4096,
        "tokens of one forward and backward pass",
        DATA,
        at_least=8,
        at_most=MOST_TOKENS,
        aka=("batch_size", "train_batch_size", "per_device_train_batch_size"),
    )
    validation_fraction: float = setting(
        0.05, "share of documents held out (0 = none)", DATA, at_least=0, less_than=1
    )

    curriculum: str = setting(
        "",
        "shorter sequences first, as LENGTH:SHARE of the steps: 128:0.9 or 1/4:0.9 (empty = none)",
        DATA,
    )

    max_steps: int = setting(
        2400,
        "optimizer steps of the whole run",
        TRAIN,
        at_least=1,
        at_most=MOST_STEPS,
        aka=("epochs", "num_epochs", "num_train_epochs", "steps", "num_steps", "total_steps"),
    )
    learning_rate: float | None = learning_rate_setting(TRAIN, "base_learning_rate")
    base_learning_rate: float = setting(
        2e-3,
        "peak where learning_rate is none, for a model 128 wide; others get it x 128 / hidden_size",
        TRAIN,
        more_than=0,
        at_most=1000,
        aka=("base_lr",),
    )
    weight_decay: float = setting(
        0.01, "decay of weights, not of biases and LayerNorm", TRAIN, at_least=0, at_most=1000
    )
    adam_beta1: float = setting(0.9, "decay of the first moment", TRAIN, at_least=0, less_than=1)
    # BERT's 0.999 remembers the large first gradients for a whole short run: after 2,400 steps like
    # the demo's the held-out loss was 5.69 with it and 5.39 with RoBERTa's 0.98.
    adam_beta2: float = setting(
        0.98, "decay of the second moment (BERT: 0.999)", TRAIN, at_least=0, less_than=1
    )
    adam_epsilon: float = setting(
        1e-6, "added to the root of the second moment", TRAIN, at_least=1e-30, at_most=1000
    )
    max_grad_norm: float = setting(
        1.0, "clip the gradient to this norm (0 = off)", TRAIN, at_least=0, at_most=1e30
    )
    optim: str = setting(
        "adamw",
        "the optimizer (adamw, lamb, muon = the fastest form here)",
        TRAIN,
        choices=(
            *("adamw", "lamb", "muon"),
            *("adamw_torch_fused", "adamw_apex_fused", "lamb_apex_fused"),
        ),
        aka=("optimizer",),
    )
    muon_learning_rate: float = setting(
        0.01,
        "of optim = muon: peak rate of its matrices, over time as learning_rate",
        TRAIN,
        more_than=0,
        at_most=1000,
        aka=("muon_lr", "matrix_lr"),
    )
    muon_momentum: float = setting(
        0.95, "of optim = muon: decay of its one moment", TRAIN, at_least=0, less_than=1
    )
    muon_nesterov: bool = setting(True, "of optim = muon: Nesterov's momentum", TRAIN)
    muon_ns_steps: int = setting(
        5, "of optim = muon: steps of Newton-Schulz", TRAIN, at_least=1, at_most=20
    )
    muon_weight_decay: float = setting(
        0.0, "of optim = muon: decay of its matrices", TRAIN, at_least=0, at_most=1000
    )
    muon_adjust_lr_fn: str = setting(
        "original",
        "of optim = muon: how the rate follows a matrix's shape (torch.optim.Muon's names)",
        TRAIN,
        choices=("original", "match_rms_adamw"),
    )
    muon_split_qkv: bool = setting(
        True, "of optim = muon: query, key and value each a matrix, not one joined", TRAIN
    )
    embedding_lr_factor: float = setting(
        1.0,
        "learning rate of the embedding tables over the others'",
        TRAIN,
        more_than=0,
        at_most=1000,
        aka=("embedding_lr_multiplier", "embedding_lr", "embedding_learning_rate"),
    )
    gradient_precision: str = setting(
        "fp32", "of the gradients that a step adds up", TRAIN, choices=("fp32", "bf16")
    )
    lr_scheduler_type: str = setting(
        "linear",
        "shape of the learning rate after warm-up",
        TRAIN,
        choices=("linear", "cosine", "constant", "warmup_stable_decay"),
        aka=("scheduler", "lr_scheduler"),
    )
    warmup_steps: int | float = warmup_steps_setting(TRAIN, 200)
    decay_steps: int | float = setting(
        0,
        "steps of warmup_stable_decay's fall, or their share of max_steps (0 = 10% of max_steps)",
        TRAIN,
        at_least=0,
        at_most=MOST_STEPS,
        share_too=True,
    )
    decay_type: str = setting(
        "cosine", "form of that fall", TRAIN, choices=("cosine", "linear", "1-sqrt")
    )
    gradient_accumulation_steps: int = setting(
        1,
        "batches per optimizer step",
        TRAIN,
        at_least=1,
        at_most=2**16,
        aka=("grad_accum", "grad_accum_steps", "accumulation_steps", "accumulate_grad_batches"),
    )
    batch_ramp_steps: int = setting(
        0,
        "steps over which the batches per optimizer step grow from 1 to that number (0 = off)",
        TRAIN,
        at_least=0,
        at_most=MOST_STEPS,
    )
    gradient_checkpointing: bool = setting(
        False, "compute layers again in the backward: less memory, a third more time", TRAIN
    )
    last_layer_masked_only: bool = setting(
        True,
        "run the last layer, keys and values aside, only where a loss reads it (exact)",
        TRAIN,
    )

    logging_steps: int = setting(10, "steps between log lines", LOGS, at_least=1, at_most=MOST)
    eval_steps: int = setting(
        250, "steps between evaluations (0 = only at the end)", LOGS, at_least=0, at_most=MOST
    )
    save_steps: int = setting(
        250, "steps between checkpoints (0 = only at the end)", LOGS, at_least=0, at_most=MOST
    )
    save_total_limit: int = setting(3, "newest checkpoints kept", LOGS, at_least=1, at_most=MOST)
    max_eval_batches: int = max_eval_batches_setting(LOGS, 32)
    report_to: str = setting(
        "tensorboard", "where curves go beside the log", LOGS, choices=("tensorboard", "none")
    )

    def __post_init__(self) -> None:
        check_fields(self)
        check_not_empty(self, "out", "model", "data", "tokenizer")
        self._check_beginning()
        self.initialized(ModelConfig())
        if self.tokens_per_batch < self.max_seq_length:  # else init_from needs not be there yet
            check_batch_holds_a_sequence(
                self.sizes_from, self.tokens_per_batch, self.max_seq_length
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
        if self.decay_type != "cosine" and self.lr_scheduler_type != "warmup_stable_decay":
            raise UserError(
                f"decay_type = {self.decay_type!r} belongs to lr_scheduler_type = "
                f"'warmup_stable_decay': leave it out with {self.lr_scheduler_type!r}"
            )

    def _check_beginning(self) -> None:
        shown = f"add_tokens = {show(self.add_tokens)}"
        if self.init_from and self.tokenizer == "train":
            raise UserError(
                f"init_from = {show(self.init_from)} has word embeddings of a vocabulary of its "
                "own: leave tokenizer = 'train' out; add_tokens adds words of the data"
            )
        if self.add_tokens and not self.init_from:
            raise UserError(f"{shown} needs init_from: a vocabulary learnt from data needs none")
        if self.add_tokens.isdecimal() and not 1 <= int(self.add_tokens[:9]) <= MOST_WORDS:
            raise UserError(f"{shown} must be at least 1 and at most {MOST_WORDS}, or a file")

    @property
    def sizes_from(self) -> str:
        """What `model_config` reads the model's sizes from; a run that goes on has kept them."""
        if not self.init_from:
            return "tiny" if self.model == "auto" else self.model
        kept = os.path.join(self.out, KEPT_SIZES)
        return kept if self.resume and exists(kept) else initial_folder(self.init_from)

    @classmethod
    def load(cls, path: str | os.PathLike[str], **changes: Any) -> Self:
        """The settings of a TOML file, such as a run's config.toml, but for `changes`.

        `PretrainConfig.load("runs/pretrain-001/config.toml", resume="auto")` goes on with that run.

        Raises:
            UserError: the file cannot be read, a name is unknown, or a value is wrong.
        """
        return load_config(cls, path, changes)

    def phases(self) -> tuple[Phase, ...]:
        """What the schedules of length, masking and dropout make of the run, in order.

        Raises:
            UserError: a schedule cannot be read, or does not fit `max_seq_length` or `max_steps`.
        """
        scheduled = [one for one in settings(PretrainConfig) if one.schedule_too]
        by_name = {
            one.name: numbers(one, getattr(self, one.name), self.max_steps) for one in scheduled
        }
        shorter_first = lengths(self.curriculum, self.max_seq_length, self.max_steps)
        return united(shorter_first, *(by_name[name] for name in Phase._fields[1:-1]))

    def accumulation_at(self, step: int) -> int:
        """Batches of optimizer step `step`, counted from 0."""
        most = self.gradient_accumulation_steps
        if step >= self.batch_ramp_steps:
            return most
        return min(most, 1 + step * most // self.batch_ramp_steps)

    def initialized(self, sizes: ModelConfig) -> ModelConfig:
        """The sizes with the `initializer_range` that is asked for.

        Raises:
            UserError: a number is out of bounds.
        """
        if self.initializer_range == "model":
            return sizes
        if self.initializer_range == "auto":
            asked = 0.02 * math.sqrt(max(1.0, 768 / sizes.hidden_size))
        else:
            asked = float(self.initializer_range)
        return replace(sizes, initializer_range=asked)

    @property
    def rising_steps(self) -> int:
        """Steps of the warm-up, where `warmup_steps` may be a share."""
        return steps_of(self.warmup_steps, self.max_steps)

    @property
    def stable_decay_steps(self) -> int:
        """Steps of warmup_stable_decay's fall, its default of 10% filled in."""
        return stable_decay_steps(self.decay_steps, self.max_steps)


def stable_decay_steps(decay_steps: float, max_steps: int) -> int:
    """Steps of warmup_stable_decay's fall; by default, 0, a tenth of all."""
    return steps_of(decay_steps, max_steps) if decay_steps else math.ceil(max_steps / 10)


def peak_learning_rate(model: ModelConfig, base: float) -> float:
    """The default: `base` at a width of 128, less for wider models."""
    return base * 128 / model.hidden_size


def resolved(config: PretrainConfig) -> PretrainConfig:
    """Returns the configuration with the settings filled in that depend on others.

    Raises:
        UserError: the model does not exist.
    """
    if not config.init_from:
        tokenizer = "train" if config.tokenizer == "auto" else config.tokenizer
        config = replace(config, model=config.sizes_from, tokenizer=tokenizer)
    if config.learning_rate is not None:
        return config
    peak = peak_learning_rate(model_config(config.sizes_from), config.base_learning_rate)
    return replace(config, learning_rate=peak)
