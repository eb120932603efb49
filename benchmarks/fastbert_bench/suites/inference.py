"""Encoding and filling masks, ours beside Hugging Face's: `fastbert bench inference`.

Two tasks: `encode` gives each sequence the mean of its last hidden states, `fill-mask` gives the
logits of the masked tokens. A third, `texts`, begins with strings: `fastbert.encode` beside what
sentence-transformers does, which sorts them by length and pads batches of 32. Throughput is taken
on batches, latency on one sequence of the batch's median length at a time. All contenders are in
one process, interleaved round by round, with the same weights, in evaluation mode. Rivals get their
best configuration: batches are padded to their longest sequence and no further, a single sequence
has no mask, the vocabulary is scored at masked positions only, torch.nn.TransformerEncoder may use
its nested tensors, and on a CPU everybody gets our setting of the allocator.

Before anything is timed, the hidden states of all real tokens and the logits of all masked ones
must agree with ours. ModernBERT is another architecture of about as many parameters with random
weights: its rows say `same_work: false`.

B sequences, S longest sequence, T real tokens of a batch, M masked tokens, H hidden size,
V vocabulary.
"""

import copy
import dataclasses
import functools
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.config import ModelConfig, model_config
from fastbert.data.batch import Batch
from fastbert.errors import RunError
from fastbert.hf.accelerate import accelerate
from fastbert.hf.encode import encode as encode_texts
from fastbert.model.bert import Bert
from fastbert.progress import progress_bar
from fastbert.train.device import (
    can_compile,
    check_weights,
    choose_device,
    choose_dtype,
    keep_freed_memory,
)
from fastbert_bench.config import INFERENCE_RIVAL_NAMES, InferenceBenchConfig
from fastbert_bench.measure import result as results
from fastbert_bench.measure.energy import EnergyMeter
from fastbert_bench.measure.flops import MLM_PROBABILITY, flops_per_token, mfu
from fastbert_bench.measure.lengths import lengths_asked
from fastbert_bench.measure.memory import peak_of
from fastbert_bench.measure.processes import one_line
from fastbert_bench.measure.result import Row
from fastbert_bench.measure.timing import figures, in_turn, timed
from fastbert_bench.suites import contenders as ways
from fastbert_bench.suites.contenders import (
    MissingError,
    PaddedBatch,
    TorchEncoder,
    execution_of,
    make_batches,
    rivals_asked,
    seeded,
    weights_of,
)

TASKS = ("encode", "fill-mask")
ACCELERATED = "fastbert.accelerate"
TEXTS_PER_SEQUENCE, SORTED_TOGETHER = 8, 32
# Of a hidden state or a logit, whose size is about 1. FlashAttention has no fp32.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.05}
SECONDS_PER_ROUND, SECONDS_OF_ENERGY = 0.3, 2.0
LATENCIES = 20
"""Single sequences timed in each round."""


@dataclasses.dataclass
class Contender:
    """One way to run BERT: its tasks, what shows that it computes the same, what was measured."""

    name: str
    tasks: dict[str, Callable[[Any], Tensor]]
    """Task -> its answer for a batch: (B, H), or (M, V)."""
    batches: Sequence[Batch] | Sequence[PaddedBatch] | Sequence[list[str]]
    singles: Sequence[Batch] | Sequence[PaddedBatch] | Sequence[list[str]]
    """Batches of one sequence."""
    answers: dict[str, Tensor]
    """For batch 0: hidden states (T, H), their means (B, H), logits (M, V). Empty where it is
    another model."""
    checked_in: torch.dtype = torch.float32
    seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    latencies: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    peak_bytes: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.answers = {what: tensor.float().cpu() for what, tensor in self.answers.items()}

    def run(self, task: str, index: int) -> Tensor:
        return self.tasks[task](self.batches[index % len(self.batches)])

    def one(self, task: str, index: int) -> Tensor:
        return self.tasks[task](self.singles[index % len(self.singles)])


def ours(
    name: str, model: Bert, batches: Sequence[Batch], singles: Sequence[Batch], dtype: torch.dtype
) -> Contender:
    """fastbert, over packed sequences."""

    def hidden(batch: Batch, rows: Tensor | None = None) -> Tensor:
        return model.encode(
            batch.input_ids, batch.token_type_ids, batch.position_ids, batch.cu_seqlens,
            batch.max_seqlen, rows=rows,
        )  # fmt: skip

    def encode(batch: Batch) -> Tensor:
        lengths = batch.cu_seqlens.diff().long()
        x = hidden(batch)
        # segment_reduce adds up in the dtype it is given.
        means = torch.segment_reduce(x.float(), "mean", lengths=lengths, unsafe=True)
        return means.to(x.dtype)

    def fill(batch: Batch) -> Tensor:
        assert model.mlm is not None
        return model.mlm.logits(hidden(batch, batch.masked_positions), model.embeddings.word)

    batch = batches[0]
    answers = {"hidden states": hidden(batch), "means": encode(batch), "logits": fill(batch)}
    model.to(dtype)
    return Contender(name, {"encode": encode, "fill-mask": fill}, batches, singles, answers)


Hidden = Callable[[Tensor, Tensor | None, Tensor], Tensor]
"""(B, S) ids, mask (None: no padding) and token types to (B, S, H)."""


def rival(
    name: str,
    sizes: ModelConfig,
    weights: dict[str, Tensor],
    batches: Sequence[PaddedBatch],
    singles: Sequence[PaddedBatch],
    dtype: torch.dtype,
    device: torch.device,
) -> Contender:
    """One of `INFERENCE_RIVAL_NAMES`, or `ACCELERATED`.

    Its weights are given under Hugging Face's names.

    Raises:
        MissingError: it cannot run here.
    """
    if "compile" in name and not can_compile(device):
        raise MissingError("torch.compile needs a C++ compiler here")
    make = {"torch-encoder": _torch_encoder, "modernbert": _modern_bert}.get(name)
    if make is None:
        model, forward, score = _hugging_face(name, sizes, weights, dtype)
    else:
        model, forward, score = make(sizes, weights)
    model.to(device).eval()
    check_dtype = dtype if name == "hf-flash" else torch.float32

    def encode(batch: PaddedBatch) -> Tensor:
        mask = batch.get("attention_mask")
        x = forward(batch["input_ids"], mask, batch["token_type_ids"])
        if mask is None:
            return x.mean(1)
        real = mask[:, :, None].to(x.dtype)
        return (x * real).sum(1) / real.sum(1)

    def fill(batch: PaddedBatch) -> Tensor:
        x = forward(batch["input_ids"], batch.get("attention_mask"), batch["token_type_ids"])
        return score(x.flatten(0, 1).index_select(0, batch["masked"]))

    answers: dict[str, Tensor] = {}
    if name != "modernbert":
        batch = batches[0]
        model.to(check_dtype)
        x = forward(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
        hidden = x[batch["attention_mask"].bool()]
        answers = {"hidden states": hidden, "means": encode(batch), "logits": fill(batch)}
    model.to(dtype)
    tasks: dict[str, Callable[[PaddedBatch], Tensor]] = {"encode": encode, "fill-mask": fill}
    if "compile" in name:
        tasks = {task: torch.compile(call, dynamic=False) for task, call in tasks.items()}
    return Contender(name, tasks, batches, singles, answers, check_dtype)


Made = tuple[torch.nn.Module, Hidden, Callable[[Tensor], Tensor]]
"""Model, hidden states, and logits of chosen hidden states."""


def _hugging_face(
    name: str, sizes: ModelConfig, weights: dict[str, Tensor], dtype: torch.dtype
) -> Made:
    plain = "hf-sdpa" if name == ACCELERATED else name
    model: Any = ways._hugging_face(plain, sizes, weights, dtype)
    if name == ACCELERATED:
        accelerate(model)
    return (
        model,
        lambda ids, mask, types: model.bert(ids, attention_mask=mask, token_type_ids=types)[0],
        model.cls.predictions,
    )


def _torch_encoder(sizes: ModelConfig, weights: dict[str, Tensor]) -> Made:
    model = TorchEncoder(sizes, weights)
    # No work on padding; for an odd number of heads torch has no such path.
    model.encoder.use_nested_tensor = sizes.num_attention_heads % 2 == 0

    def forward(ids: Tensor, mask: Tensor | None, types: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = model.norm(model.word(ids) + model.position(positions) + model.token_type(types))
        padding = None if mask is None else mask == 0
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*nested tensors.*", UserWarning)
            hidden: Tensor = model.encoder(x, src_key_padding_mask=padding)
        return hidden

    return (
        model,
        forward,
        lambda x: model.decoder(model.transform_norm(F.gelu(model.transform(x)))),
    )


def _modern_bert(sizes: ModelConfig, weights: dict[str, Tensor]) -> Made:
    if importlib.util.find_spec("transformers.models.modernbert") is None:
        raise MissingError("this transformers has no ModernBERT")
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    # A gated MLP has three matrices where BERT's has two.
    width = max(8, round(sizes.intermediate_size * 2 / 3 / 8) * 8)
    names = ("pad_token_id", "cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id")
    special: dict[str, Any] = dict.fromkeys(names, sizes.pad_token_id)  # within any vocabulary
    config = ModernBertConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        intermediate_size=width,
        max_position_embeddings=sizes.max_position_embeddings,
        **special,
    )
    config._attn_implementation = "sdpa"
    model: Any = ModernBertForMaskedLM(config)
    return (
        model,
        lambda ids, mask, types: model.model(ids, attention_mask=mask)[0],
        lambda x: model.decoder(model.head(x)),
    )


def of_texts(
    sizes: ModelConfig,
    weights: dict[str, Tensor],
    lengths: np.ndarray,  # (N,)
    rng: np.random.Generator,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Contender]:
    """`fastbert.encode`, and what sentence-transformers does with the same texts."""
    from transformers import BertTokenizer

    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    words = [*special, *(f"w{index}" for index in range(sizes.vocab_size - len(special)))]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    model: Any = ways._hugging_face("hf-sdpa", sizes, weights, dtype)
    theirs = model.bert.to(device).eval()
    mine = accelerate(copy.deepcopy(theirs))

    def drawn(lengths: np.ndarray) -> list[str]:
        return [
            " ".join(words[index] for index in rng.integers(len(special), len(words), length - 2))
            for length in lengths
        ]

    def ours(texts: list[str]) -> Tensor:
        return torch.from_numpy(encode_texts(texts, mine, tokenizer))

    def sort_and_pad(texts: list[str]) -> Tensor:
        order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
        out = torch.empty(len(texts), sizes.hidden_size)
        for begin in range(0, len(order), SORTED_TOGETHER):
            rows = order[begin : begin + SORTED_TOGETHER]
            inputs = tokenizer([texts[row] for row in rows], padding=True, return_tensors="pt")
            inputs = inputs.to(device)
            x = theirs(**inputs)[0]
            real = inputs["attention_mask"][:, :, None].to(x.dtype)
            out[rows] = ((x * real).sum(1) / real.sum(1)).float().cpu()
        return out

    many, one = drawn(lengths), drawn(np.array([int(np.median(lengths))]))
    contenders = [
        Contender(name, {"texts": call}, [many], [one], {"means": call(many)})
        for name, call in (("fastbert.encode", ours), ("hf-sdpa-sorted", sort_and_pad))
    ]
    for module in (mine, theirs):
        module.to(dtype)
    return contenders


def check_same(first: Contender, other: Contender) -> None:
    """Refuses to compare contenders that answer differently.

    Raises:
        RunError: a hidden state or a logit differs by more than rounding does.
    """
    tolerance = TOLERANCE[other.checked_in]
    for what, theirs in other.answers.items():
        mine = first.answers[what]
        same = mine.shape == theirs.shape
        difference = float((mine - theirs).abs().max()) if same else float("nan")
        if not difference <= tolerance:
            raise RunError(
                f"not comparable: {other.name} and {first.name} differ by {difference:.2g} in "
                f"their {what} (same weights and batch; rounding leaves less than {tolerance:g})"
            )


def measure(contenders: Sequence[Contender], rounds: int, device: torch.device) -> None:
    """Fills in `seconds` (one entry a round), `latencies` and `peak_bytes`."""
    counts: dict[tuple[str, str], int] = {}
    pairs = [(contender, task) for contender in contenders for task in contender.tasks]
    for contender, task in progress_bar(pairs, desc="warm-up", unit="task"):
        run, one = (functools.partial(call, task) for call in (contender.run, contender.one))
        timed(run, range(3), device)
        timed(one, range(3), device)
        contender.peak_bytes[task] = peak_of(functools.partial(run, 0), device)
        once = timed(run, (1,), device)
        counts[contender.name, task] = max(1, min(50, round(SECONDS_PER_ROUND / once)))
        contender.seconds[task], contender.latencies[task] = [], []
    for _, (contender, task) in in_turn(pairs, rounds):
        run, one = (functools.partial(call, task) for call in (contender.run, contender.one))
        timed(run, (0,), device)  # settles caches after the one before
        count = counts[contender.name, task]
        contender.seconds[task].append(timed(run, range(count), device))
        timed(one, (0,), device)
        latencies = [timed(one, (index,), device) for index in range(LATENCIES)]
        contender.latencies[task] += latencies


def summary(
    contenders: Sequence[Contender], sizes: ModelConfig, lengths: np.ndarray, device: torch.device
) -> list[Row]:
    """One row for each contender and task; the first contender is what others are compared with."""
    meter, T = EnergyMeter(device), int(lengths.sum())
    H, V = sizes.hidden_size, sizes.vocab_size
    forward = flops_per_token(sizes, lengths) / 3
    states = forward - MLM_PROBABILITY * 2 * (H**2 + H * V)
    flops = {"fill-mask": forward, "encode": states, "texts": states}
    rows = []
    for task in contenders[0].tasks:
        best = np.array(contenders[0].seconds[task])
        for contender in contenders:
            seconds = np.array(contender.seconds[task])
            middle = float(np.median(seconds))
            p50, p99 = np.percentile(contender.latencies[task], (50, 99)) * 1e3
            call = functools.partial(contender.run, task)
            spent = meter.measure(call, SECONDS_OF_ENERGY, middle)
            same = bool(contender.answers)
            rows.append(
                {
                    "name": f"{task}, {contender.name}",
                    "task": task,
                    "contender": contender.name,
                    "same_work": same,
                    **figures(contender.seconds[task], T, len(lengths), spent),
                    "latency_ms_p50": float(p50),
                    "latency_ms_p99": float(p99),
                    "mfu": mfu(flops[task] * T / middle, device) if same else None,
                    "peak_memory_bytes": contender.peak_bytes[task],
                    "ratio": float(np.median(seconds / best)),
                }
            )
    return rows


def table(result: dict[str, Any]) -> str:
    """The rows as text, one line each, and a line for each that is missing."""
    latency: results.Columns = {
        "1 seq p50": lambda row: f"{row['latency_ms_p50']:.2f}",
        "p99": lambda row: f"{row['latency_ms_p99']:.2f}",
    }

    def compared(row: Row) -> str:
        other = "" if row["same_work"] else " (another architecture)"
        return f"{row['ratio']:.2f}x as fast{other}"

    remarks = "the first of each task is", compared
    return results.table(result, "a batch", latency, remarks)


@torch.inference_mode(False)  # whose tensors our attention on a CPU cannot tell from others
def _batches(
    lengths: np.ndarray, V: int, rng: np.random.Generator, device: torch.device
) -> tuple[list[PaddedBatch], list[Batch]]:
    """Both forms on the device; the padded ones also tell where, in (B · S), masked tokens are."""
    padded, packed = make_batches(lengths, int(lengths.max()), V, rng)
    for batch in padded:
        batch["masked"] = (batch.pop("labels").flatten() != -100).nonzero().squeeze(1)
    there = [{key: value.to(device) for key, value in batch.items()} for batch in padded]
    return there, [batch.to(device) for batch in packed]


@torch.inference_mode()
def run(config: InferenceBenchConfig) -> dict[str, Any]:
    """Measures as `config` says and returns the result."""
    device, sizes = choose_device(config.device), model_config(config.model)
    check_weights(config.model, sizes, device, 4)
    dtype, _ = choose_dtype(config.precision, device)
    rng = np.random.default_rng(config.seed)
    lengths = lengths_asked(config.lengths, config.batch_size, config.max_seq_length, rng)
    padded, packed = _batches(lengths, sizes.vocab_size, rng, device)
    median = int(np.median(lengths))
    padded_ones, packed_ones = _batches(np.array([median]), sizes.vocab_size, rng, device)
    for batch in padded_ones:
        del batch["attention_mask"]
    if device.type == "cpu":
        keep_freed_memory()

    def model(compiled: bool) -> Bert:
        ops = execution_of(config, sizes, compiled).ops
        return seeded(sizes, ops, config.seed, device).eval()

    plain = model(False)
    weights = weights_of(plain, sizes)
    contenders, missing = [], []
    if device.type == "cpu" and can_compile(device):
        contenders.append(ours("fastbert", model(True), packed, packed_ones, dtype))
    name = "fastbert-eager" if contenders else "fastbert"
    contenders.append(ours(name, plain, packed, packed_ones, dtype))
    check_same(contenders[0], contenders[-1])
    contenders.append(rival(ACCELERATED, sizes, weights, padded, padded_ones, dtype, device))
    check_same(contenders[0], contenders[-1])
    for name in rivals_asked(config.against, INFERENCE_RIVAL_NAMES):
        try:
            one = rival(name, sizes, weights, padded, padded_ones, dtype, device)
            check_same(contenders[0], one)
            for task in TASKS:  # compiles
                one.run(task, 0)
                one.one(task, 0)
            contenders.append(one)
        except MissingError as error:
            missing.append({"name": name, "why": str(error)})
        except RuntimeError as error:  # a dtype or a size that it cannot do, no memory, …
            missing.append({"name": name, "why": one_line(error)})
    text_lengths = lengths_asked(
        config.lengths, TEXTS_PER_SEQUENCE * config.batch_size, config.max_seq_length, rng
    )
    texts = of_texts(sizes, weights, text_lengths, rng, dtype, device)
    check_same(*texts)
    measure(contenders, config.rounds, device)
    measure(texts, config.rounds, device)
    rows = summary(contenders, sizes, lengths, device)
    rows += summary(texts, sizes, text_lengths, device)
    return results.of_model(
        "inference", config, device, dtype, sizes, rows, missing,
        real_tokens=int(lengths.sum()),
        padded_tokens=int(lengths.max()) * len(lengths),
        lengths=lengths.tolist(),
        latency_tokens=median,
    )  # fmt: skip


def asked(config: InferenceBenchConfig, result: dict[str, Any]) -> str:
    """The settings that matter, in words."""
    return (
        f"{config.model}, {config.batch_size} sequences of at most {config.max_seq_length}, "
        f"{result['real_tokens']} real tokens; latency of one sequence of "
        f"{result['latency_tokens']}"
    )
