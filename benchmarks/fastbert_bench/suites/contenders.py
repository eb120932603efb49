"""Ways to train the same BERT on the same sequences: ours, Hugging Face's, PyTorch's own encoder.

Every contender has the same weights, real tokens, dropout, optimizer, clipping and precision (bf16
autocast over fp32 weights for the rivals, as their users train). `check_fair` says so before
anything is timed: with dropout off and in fp32, the loss of every single masked token must agree,
which a leak of attention across sequences or into padding changes by hundreds of times more than
rounding does.

B sequences, S longest sequence, T real tokens of a batch, M masked tokens, V vocabulary.
"""

import copy
import dataclasses
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastbert.config import ModelConfig, PretrainConfig, to_hf_dict
from fastbert.data.batch import Batch
from fastbert.errors import RunError, UserError
from fastbert.hf.weights import to_hf
from fastbert.model.bert import Bert
from fastbert.ops import Ops
from fastbert.train.device import Execution, can_compile, choose_execution
from fastbert.train.graph import launcher
from fastbert.train.step import TrainStep, model_inputs
from fastbert_bench.config import InferenceBenchConfig, StepBenchConfig
from fastbert_bench.measure.flops import MLM_PROBABILITY

LEARNING_RATE = 1e-4
NUM_BATCHES = 4
# Of one token's loss, in nats. In fp32 rounding leaves 1e-6; attention that leaks into padding
# moves it by 8e-4 (one head of 32), 3e-2 (mini) or 0.5 (base).
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.2}

PaddedBatch = dict[str, Tensor]

ACCELERATED = "fastbert.accelerate"

RIVALS = {
    "hf-eager": "Hugging Face, eager attention",
    "hf-sdpa": "Hugging Face, PyTorch's scaled_dot_product_attention",
    "hf-sdpa-cudnn": "the same, cuDNN's attention before PyTorch's own (1.7 to 2.3x, padded)",
    "hf-flash": "Hugging Face, FlashAttention 2 (package flash-attn)",
    "hf-flash-flat": "the same on sequences laid end to end, masked words alone",
    "hf-eager-compile": "the same under torch.compile",
    "hf-sdpa-compile": "the same under torch.compile",
    "hf-flash-compile": "the same under torch.compile",
    "hf-sdpa-compile-max": "the same under torch.compile, mode max-autotune",
    ACCELERATED: "Hugging Face's model after fastbert.accelerate(model)",
    "torch-encoder": "torch.nn.TransformerEncoder with BERT's embeddings and heads",
    "modernbert": "transformers' ModernBERT",
    "liger": "Liger-Kernel",
}


class MissingError(Exception):
    """A rival that cannot run here, and why."""


@dataclasses.dataclass
class Evidence:
    """What shows that a contender does the work of another."""

    name: str
    token_losses: Tensor
    """(M,) of batch 0 with the initial weights, dropout off."""
    losses_dtype: torch.dtype
    """Of the arithmetic behind `token_losses`."""
    drops: bool
    """Whether two forwards in training mode differ."""
    real_tokens: int
    """Of a batch: what its throughput is counted in."""
    sequences: int
    """Of a batch."""


@dataclasses.dataclass
class Contender(Evidence):
    """One way to train: how to step, what shows that it computes the same, what was measured."""

    step: Callable[[int], object]
    """Trains on batch `index`; may return before the device is done."""
    state_bytes: int
    """Weights, masters and moments, which live between steps."""
    keeps_memory: bool = False
    """Whether freed memory stays with the process (on a CPU, see `keep_freed_memory`)."""
    seconds: list[float] = dataclasses.field(default_factory=list)
    peak_bytes: int = 0
    """State and the most that one step holds beside it, gradients included."""


def make_recipe(seed: int, **changes: Any) -> PretrainConfig:
    """What every contender trains by: a constant learning rate, AdamW, clipping."""
    return PretrainConfig(
        seed=seed,
        learning_rate=LEARNING_RATE,
        max_steps=10**5,
        warmup_steps=0,
        lr_scheduler_type="constant",
        **changes,
    )


def make_batches(
    lengths: np.ndarray,  # (B,)
    S: int,
    vocab_size: int,
    rng: np.random.Generator,
    low: int = 1000,  # the first id that is a word
) -> tuple[list[PaddedBatch], list[Batch]]:
    """The same random sequences twice: padded for the rivals, packed for us.

    Every batch has the same lengths, so T is constant; the longest first, as our loader lays them.
    """
    if vocab_size <= low:
        raise UserError(f"vocab_size = {vocab_size} of the model must be more than {low}")
    B = len(lengths)
    lengths = np.sort(lengths)[::-1]
    packed = []
    for _ in range(NUM_BATCHES):
        real = np.arange(S) < lengths[:, None]
        ids = rng.integers(low, vocab_size, (B, S))
        types = (np.arange(S) >= lengths[:, None] // 2).astype(np.int64)
        masked = np.zeros((B, S), dtype=bool)
        for row, length in enumerate(lengths):  # never [CLS] or the last [SEP], as in training
            count = max(1, round(MLM_PROBABILITY * length))
            masked[row, rng.choice(np.arange(1, length - 1), count, replace=False)] = True
        packed.append(
            Batch(
                input_ids=torch.from_numpy(ids[real]),
                token_type_ids=torch.from_numpy(types[real]),
                position_ids=torch.from_numpy(np.broadcast_to(np.arange(S), (B, S))[real]),
                cu_seqlens=torch.from_numpy(np.concatenate(([0], np.cumsum(lengths))).astype("i4")),
                masked_positions=torch.from_numpy(np.flatnonzero(masked[real])),
                masked_labels=torch.from_numpy(ids[masked]),
                next_sentence_labels=torch.from_numpy(rng.integers(0, 2, B)),
                max_seqlen=S,
                num_tokens=int(lengths.sum()),
                num_sequences=B,
            )
        )
    return [padded(batch, 0, S) for batch in packed], packed


def padded(batch: Batch, pad_token_id: int = 0, S: int | None = None) -> PaddedBatch:
    """The real sequences of a packed batch as Hugging Face's models take them.

    Padded to S, or to the longest of them.
    """
    N = batch.num_sequences
    starts = batch.cu_seqlens[: N + 1].long()
    T, lengths = int(starts[-1]), starts.diff()
    real = torch.arange(S or int(lengths.max())) < lengths[:, None]  # (N, S)
    labels = torch.full((T,), -100)
    chosen = batch.masked_labels != -100
    labels[batch.masked_positions[chosen]] = batch.masked_labels[chosen]

    def spread(values: Tensor, filler: int) -> Tensor:  # (T,) -> (N, S)
        return torch.full(real.shape, filler).masked_scatter_(real, values)

    return {
        "input_ids": spread(batch.input_ids[:T], pad_token_id),
        "attention_mask": real.long(),
        "token_type_ids": spread(batch.token_type_ids[:T], 0),
        "labels": spread(labels, -100),
        "next_sentence_label": batch.next_sentence_labels[:N],
    }


def rivals_asked(against: str, auto: Iterable[str]) -> list[str]:
    """The names in `--against`; `auto` where it says so."""
    if against == "none":
        return []
    return list(auto) if against == "auto" else against.split(",")


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def execution_of(
    config: StepBenchConfig | InferenceBenchConfig, sizes: ModelConfig, compiled: bool
) -> Execution:
    """How `fastbert pretrain` would run with these settings."""
    compile = "on" if compiled else "off"
    asked = PretrainConfig(device=config.device, precision=config.precision, torch_compile=compile)
    return choose_execution(asked, sizes)


def seeded(sizes: ModelConfig, ops: Ops, seed: int, device: torch.device) -> Bert:
    """The model with the same initial weights for everybody."""
    torch.manual_seed(seed)
    return Bert(sizes, ops).to(device)


def weights_of(model: Bert, sizes: ModelConfig) -> dict[str, Tensor]:
    """A copy of a model's weights, by Hugging Face's names."""
    found = to_hf(dict(model.named_parameters()), sizes)
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def ours(
    name: str,
    model: Bert,
    batches: list[Batch],
    recipe: PretrainConfig,
    dtype: torch.dtype,
    *,
    graph: bool = False,
    main_grads: bool = True,
    losses_dtype: torch.dtype = torch.float32,
) -> Contender:
    """fastbert's own training step, the one `fastbert pretrain` runs.

    Args:
        name, model, batches, recipe, dtype: what to train, on what.
        graph: whether the step is launched as one CUDA graph.
        main_grads: whether products add weight gradients straight to the flat buffer.
        losses_dtype: what the evidence is computed in: fp32 but for ops that have none.
    """
    batch = batches[0]
    plain = model if losses_dtype == torch.float32 else copy.deepcopy(model).to(losses_dtype)
    with torch.no_grad():
        logits = plain.eval().predict(*model_inputs(batch)).mlm
        losses = F.cross_entropy(logits, batch.masked_labels, reduction="none").cpu()
        sums = []
        for step in (0, 1):
            plain.train().seed_dropout(recipe.seed, step)
            mlm, _ = plain(*model_inputs(batch), batch.masked_labels, batch.next_sentence_labels)
            sums.append(float(mlm))
        del plain, logits
    train_step = TrainStep(model, recipe, dtype, main_grads=main_grads)
    launch = launcher(train_step, graph, accumulates=False)
    flat = train_step.flat
    state = [flat.master, flat.grad, *train_step.optimizer.moments]
    if flat.weights is not flat.master:
        state.append(flat.weights)
    return Contender(
        name=name,
        token_losses=losses,
        losses_dtype=losses_dtype,
        drops=sums[0] != sums[1],
        real_tokens=batch.num_tokens,
        sequences=batch.num_sequences,
        step=lambda index: launch([batches[index % NUM_BATCHES]]),
        state_bytes=_bytes(state),
        keeps_memory=True,
    )


def rival(
    name: str,
    sizes: ModelConfig,
    weights: dict[str, Tensor],
    batches: list[PaddedBatch],
    recipe: PretrainConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> Contender:
    """One of `RIVALS`, with the initial weights given under Hugging Face's names.

    Raises:
        MissingError: it cannot run here, or computes something else by design.
        UserError: there is no such rival.
    """
    if name not in RIVALS:
        raise UserError(f"{name!r} is no rival: {', '.join(RIVALS)}")
    if name == "modernbert":
        raise MissingError(
            "computes something else (rotary positions, gated MLP, local attention), so its losses "
            "cannot agree"
        )
    if name == "liger":
        raise MissingError("Liger-Kernel has no BERT; its ops are peers of `bench kernels`")
    if "compile" in name and not can_compile(device):
        raise MissingError("torch.compile needs a C++ compiler here")
    real_tokens, sequences = int(batches[0]["attention_mask"].sum()), len(batches[0]["labels"])
    model: Any
    if name == "torch-encoder":
        model = TorchEncoder(sizes, weights).to(device)
    else:
        model = _hugging_face(name, sizes, weights, dtype).to(device)
    if name.endswith("-flat"):
        model, batches = _Flat(model), [flattened(batch) for batch in batches]
    check_dtype = dtype if name.startswith("hf-flash") else torch.float32

    batch = batches[0]
    with torch.no_grad(), autocast(device, check_dtype):
        logits = model.eval()(**batch).prediction_logits
        chosen = batch["labels"] != -100
        losses = F.cross_entropy(logits[chosen].float(), batch["labels"][chosen], reduction="none")
        del logits
        torch.manual_seed(recipe.seed)
        model.train()
        drops = float(model(**batch).loss) != float(model(**batch).loss)
    optimizer = adamw(model, recipe)
    attention_order: Callable[[], AbstractContextManager[Any]] = nullcontext
    if name.endswith("-cudnn"):
        if device.type != "cuda":
            raise MissingError("cuDNN's attention needs a GPU")
        attention_order = _cudnn_first
    forward = model
    if "compile" in name:
        mode = "max-autotune" if name.endswith("-max") else "default"
        forward = torch.compile(model, dynamic=False, mode=mode)

    def step(index: int) -> None:
        with autocast(device, dtype), attention_order():
            loss = forward(**batches[index % NUM_BATCHES]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Contender(
        name=name,
        token_losses=losses.cpu(),
        losses_dtype=check_dtype,
        drops=drops,
        real_tokens=real_tokens,
        sequences=sequences,
        step=step,
        # Weights and two moments; gradients are freed after each step and so count in its peak.
        state_bytes=3 * _bytes(list(model.parameters())),
    )


def _cudnn_first() -> AbstractContextManager[Any]:
    order = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION,
             SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)  # fmt: skip
    return sdpa_kernel(list(order), set_priority=True)


def part_of(batch: PaddedBatch, count: int) -> Tensor:  # (count,)
    """Rows of a batch whose lengths stand for all: every so-manieth by length, in their order.

    Batches with the same lengths in another order give parts with the same lengths.
    """
    by_length = batch["attention_mask"].sum(1).argsort(stable=True)
    ranks = torch.arange(count, device=by_length.device) * len(by_length) // count
    return by_length[ranks].sort().values


def flattened(batch: PaddedBatch) -> dict[str, Any]:
    """The sequences end to end as one row, as transformers' DataCollatorWithFlattening does."""
    real = batch["attention_mask"].bool()
    lengths = real.sum(1)
    ends = F.pad(lengths.cumsum(0), (1, 0)).int()
    positions = torch.arange(real.shape[1], device=real.device).expand_as(real)
    flat = {name: batch[name][real][None] for name in ("input_ids", "token_type_ids", "labels")}
    longest = int(lengths.max())
    return flat | {
        "position_ids": positions[real][None],
        "cu_seq_lens_q": ends, "cu_seq_lens_k": ends,
        "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip


class _Flat(nn.Module):
    """A model without next-sentence head: one row has one [CLS] for all its sequences."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> "_Output":
        output = self.model(**inputs)
        return _Output(output.loss, output.logits)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """What runs in `dtype` where PyTorch's users would have it so; off for fp32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def adamw(model: nn.Module, recipe: PretrainConfig) -> torch.optim.AdamW:
    """The recipe's optimizer in PyTorch's terms: vectors do not decay."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay},
         {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.learning_rate or 0.0,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        fused=True,
    )  # fmt: skip


def _hugging_face(
    name: str, sizes: ModelConfig, weights: dict[str, Tensor], dtype: torch.dtype
) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM, BertForPreTraining

    from fastbert.hf.accelerate import accelerate

    config = BertConfig(**to_hf_dict(sizes, "BertForPreTraining"))
    attention = "sdpa" if name == ACCELERATED else name.split("-")[1]
    if attention == "flash":
        if importlib.util.find_spec("flash_attn") is None:
            raise MissingError("the package flash-attn is not installed")
        if dtype == torch.float32:
            raise MissingError("FlashAttention takes fp16 or bf16, not fp32")
        attention = "flash_attention_2"
    config._attn_implementation = attention
    model = (BertForMaskedLM if name.endswith("-flat") else BertForPreTraining)(config)
    model.load_state_dict(weights, strict=False)
    return accelerate(model) if name == ACCELERATED else model


@dataclasses.dataclass
class _Output:
    loss: Tensor
    prediction_logits: Tensor


class TorchEncoder(nn.Module):
    """BERT around torch.nn.TransformerEncoder, written as one would by its documentation."""

    def __init__(self, sizes: ModelConfig, weights: dict[str, Tensor]) -> None:
        super().__init__()
        H, eps = sizes.hidden_size, sizes.layer_norm_eps
        if sizes.hidden_act != "gelu":
            raise MissingError(f"torch.nn.TransformerEncoder has no {sizes.hidden_act}")
        if sizes.hidden_dropout_prob != sizes.attention_probs_dropout_prob:
            raise MissingError("torch.nn.TransformerEncoder has one dropout for everything")
        dropout = sizes.hidden_dropout_prob
        self.word = nn.Embedding(sizes.vocab_size, H, padding_idx=sizes.pad_token_id)
        self.position = nn.Embedding(sizes.max_position_embeddings, H)
        self.token_type = nn.Embedding(sizes.type_vocab_size, H)
        self.norm, self.dropout = nn.LayerNorm(H, eps=eps), nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(
            H, sizes.num_attention_heads, sizes.intermediate_size, dropout, "gelu",
            layer_norm_eps=eps, batch_first=True,
        )  # fmt: skip
        # BERT drops nothing between GELU and the second product.
        layer.dropout = nn.Identity()  # type: ignore[assignment]
        self.encoder = nn.TransformerEncoder(
            layer, sizes.num_hidden_layers, enable_nested_tensor=False
        )
        self.pooler, self.next_sentence = nn.Linear(H, H), nn.Linear(H, 2)
        self.transform, self.transform_norm = nn.Linear(H, H), nn.LayerNorm(H, eps=eps)
        self.decoder = nn.Linear(H, sizes.vocab_size)
        self.decoder.weight = self.word.weight
        self.load_state_dict(_torch_names(weights))

    def forward(
        self,
        input_ids: Tensor,  # (B, S)
        attention_mask: Tensor,
        token_type_ids: Tensor,
        labels: Tensor,
        next_sentence_label: Tensor,  # (B,)
    ) -> _Output:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.word(input_ids) + self.position(positions) + self.token_type(token_type_ids)
        x = self.dropout(self.norm(x))
        x = self.encoder(x, src_key_padding_mask=attention_mask == 0)
        logits = self.decoder(self.transform_norm(F.gelu(self.transform(x))))
        scores = self.next_sentence(torch.tanh(self.pooler(x[:, 0])))
        mlm = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return _Output(mlm + F.cross_entropy(scores.float(), next_sentence_label), logits)


# Hugging Face's names -> `TorchEncoder`'s, of whatever begins or goes on so.
_TORCH_NAMES = {
    "bert.embeddings.word_embeddings": "word",
    "bert.embeddings.position_embeddings": "position",
    "bert.embeddings.token_type_embeddings": "token_type",
    "bert.embeddings.LayerNorm": "norm",
    "bert.pooler.dense": "pooler",
    "cls.seq_relationship": "next_sentence",
    "cls.predictions.transform.dense": "transform",
    "cls.predictions.transform.LayerNorm": "transform_norm",
    "cls.predictions.bias": "decoder.bias",
    "bert.encoder.layer": "encoder.layers",
    "attention.output.dense": "self_attn.out_proj",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "linear1",
    "output.dense": "linear2",
    "output.LayerNorm": "norm2",
}


def _torch_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's weights by `TorchEncoder`'s names; query, key and value are one there."""
    found = {"decoder.weight": weights["bert.embeddings.word_embeddings.weight"]}
    for given, tensor in weights.items():
        name = given
        for theirs, mine in _TORCH_NAMES.items():
            name = name.replace(theirs, mine)
        if ".attention.self.query." in name:
            parts = [weights[given.replace("query", part)] for part in ("query", "key", "value")]
            found[name.replace("attention.self.query.", "self_attn.in_proj_")] = torch.cat(parts)
        elif ".attention.self." not in name:
            found[name] = tensor
    return found


def check_fair(reference: Evidence, other: Evidence, drops: bool) -> None:
    """Refuses to compare contenders that do not do the same work.

    Raises:
        RunError: a token's loss differs by more than the dtype allows, dropout is off where the
            model has it, or throughput would be counted in other tokens.
    """
    pair = f"{other.name} and {reference.name}"
    if other.real_tokens != reference.real_tokens:
        raise RunError(
            f"not comparable: {pair} count {other.real_tokens} and {reference.real_tokens} tokens "
            "in a batch; [PAD] is no work"
        )
    if drops and not other.drops:
        raise RunError(f"not comparable: {other.name} trains without dropout")
    if other.token_losses.shape != reference.token_losses.shape:
        raise RunError(f"not comparable: {pair} predict other tokens")
    difference = float((other.token_losses - reference.token_losses).abs().max())
    tolerance = max(TOLERANCE[c.losses_dtype] for c in (reference, other))
    if not difference <= tolerance:
        raise RunError(
            f"not comparable: {pair} differ by {difference:.2g} nats in the loss of a token (same "
            f"weights and batch, no dropout; rounding leaves less than {tolerance:g})"
        )
