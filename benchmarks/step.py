"""The training step against Hugging Face's: `fastbert bench step`.

The same sequences, weights, dropout, precision (bf16 autocast for Hugging Face), clipping and fused
AdamW for every contender, in one process, interleaved round by round. Before anything is timed, all
contenders must give the same loss (dropout off) on the first batch. Only real tokens count.

On a CPU, fastbert tells glibc to keep freed memory; Hugging Face runs with glibc's own policy, as
its users have it, and as `hf-...+malloc` once more with ours, which helps it much.

B sequences, S longest sequence, T real tokens of a batch, V vocabulary.
"""

import dataclasses
import functools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastbert.config import ModelConfig, PretrainConfig, StepBenchConfig, model_config
from fastbert.data.batch import Batch
from fastbert.errors import RunError, UserError
from fastbert.hf import to_hf
from fastbert.model.bert import Bert
from fastbert.ops import choose_ops
from fastbert.train.device import can_compile, choose_device, choose_dtype, keep_freed_memory
from fastbert.train.step import TrainStep, compile_model, model_inputs

MLM_PROBABILITY = 0.15
LEARNING_RATE = 1e-4
NUM_BATCHES = 4
# bf16 keeps 8 bits: logits of either side are off by some 1e-2, a mean loss of ~10 by less.
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-3}
SECONDS_PER_ROUND = 0.5

PaddedBatch = dict[str, Tensor]
_Step = Callable[[int], float]


@dataclasses.dataclass
class Contender:
    """One way to train: how to step, what it says of the first batch, and what was measured."""

    name: str
    step: _Step
    """Trains on batch `index` and returns the loss."""
    first_loss: float
    """Loss of batch 0 with the initial weights, dropout off."""
    state_bytes: int
    """Weights, masters and moments, which live between steps."""
    keeps_memory: bool
    """Whether freed memory stays with the process (on a CPU, see `keep_freed_memory`)."""
    seconds: list[float] = dataclasses.field(default_factory=list)
    peak_bytes: int = 0
    """State and the most that one step holds beside it, gradients included."""


def natural_lengths(B: int, S: int, rng: np.random.Generator) -> np.ndarray:
    """(B,) lengths as in a shuffled corpus cut at S: normal around 0.55 S, clipped to [8, S]."""
    return np.clip(np.rint(rng.normal(0.55 * S, 0.25 * S, B)), min(8, S), S).astype(np.int64)


def make_batches(config: StepBenchConfig, vocab_size: int) -> tuple[list[PaddedBatch], list[Batch]]:
    """The same random sequences twice: padded for Hugging Face, packed for us.

    Every batch has the same lengths in another order, so T is constant.
    """
    rng = np.random.default_rng(config.seed)
    B, S = config.batch_size, config.max_seq_length
    lengths = np.full(B, S) if config.lengths == "full" else natural_lengths(B, S, rng)
    padded, packed = [], []
    for _ in range(NUM_BATCHES):
        lengths = rng.permutation(lengths)
        real = np.arange(S) < lengths[:, None]
        ids = rng.integers(1000, vocab_size, (B, S)) * real
        types = ((np.arange(S) >= lengths[:, None] // 2) & real).astype(np.int64)
        masked = np.zeros((B, S), dtype=bool)
        for row, length in enumerate(lengths):  # never [CLS] or the last [SEP], as in training
            count = max(1, round(MLM_PROBABILITY * length))
            masked[row, rng.choice(np.arange(1, length - 1), count, replace=False)] = True
        labels = np.where(masked, ids, -100)
        nsp = rng.integers(0, 2, B)
        padded.append(
            {
                "input_ids": torch.from_numpy(ids),
                "attention_mask": torch.from_numpy(real.astype(np.int64)),
                "token_type_ids": torch.from_numpy(types),
                "labels": torch.from_numpy(labels),
                "next_sentence_label": torch.from_numpy(nsp),
            }
        )
        packed.append(
            Batch(
                input_ids=torch.from_numpy(ids[real]),
                token_type_ids=torch.from_numpy(types[real]),
                position_ids=torch.from_numpy(np.broadcast_to(np.arange(S), (B, S))[real]),
                cu_seqlens=torch.from_numpy(np.concatenate(([0], np.cumsum(lengths))).astype("i4")),
                masked_positions=torch.from_numpy(np.flatnonzero(masked[real])),
                masked_labels=torch.from_numpy(labels[masked]),
                next_sentence_labels=torch.from_numpy(nsp),
                max_seqlen=S,
                num_tokens=int(lengths.sum()),
                num_sequences=B,
            )
        )
    return padded, packed


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def ours(
    name: str,
    model: Bert,
    batches: list[Batch],
    recipe: PretrainConfig,
    dtype: torch.dtype,
    *,
    compiled: bool,
) -> Contender:
    """fastbert's own training step, the one `fastbert pretrain` runs."""
    if compiled and model.embeddings.word.is_cuda:
        compile_model(model)
    train_step = TrainStep(model, recipe, dtype)
    batch = batches[0]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        sums = model.eval()(*model_inputs(batch), batch.masked_labels, batch.next_sentence_labels)
    first_loss = sums.mlm / batch.masked_labels.numel() + sums.next_sentence / batch.num_sequences
    flat, optimizer = train_step.flat, train_step.optimizer
    state = [flat.master, flat.grad, optimizer.exp_avg, optimizer.exp_avg_sq]
    if flat.weights is not flat.master:
        state.append(flat.weights)

    def step(index: int) -> float:
        result = train_step([batches[index % NUM_BATCHES]], index, LEARNING_RATE)
        return result.loss

    return Contender(name, step, float(first_loss), _bytes(state), keeps_memory=True)


def hugging_face(
    name: str,
    sizes: ModelConfig,
    weights: dict[str, Tensor],
    batches: list[PaddedBatch],
    recipe: PretrainConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> Contender:
    """transformers' BertForPreTraining with eager or SDPA attention, the latter also compiled."""
    from transformers import BertConfig, BertForPreTraining

    from fastbert.config import to_hf_dict

    config = BertConfig(**to_hf_dict(sizes, "BertForPreTraining"))
    config._attn_implementation = "eager" if name == "hf-eager" else "sdpa"
    model: Any = BertForPreTraining(config)
    model.to(device)
    model.load_state_dict(weights, strict=False)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        fused=True,
    )

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype != torch.float32)

    with torch.no_grad(), autocast():
        first_loss = float(model.eval()(**batches[0]).loss)
    model.train()
    forward = torch.compile(model, dynamic=False) if name == "hf-compile" else model

    def step(index: int) -> float:
        with autocast():
            loss = forward(**batches[index % NUM_BATCHES]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    # Weights and two moments; gradients are freed after each step and so count in its peak.
    state_bytes = 3 * _bytes(list(model.parameters()))
    return Contender(name, step, first_loss, state_bytes, keeps_memory=False)


def check_same_loss(contenders: Sequence[Contender], dtype: torch.dtype) -> None:
    """Refuses to compare contenders that do not compute the same thing.

    Raises:
        RunError: two first losses differ by more than the dtype allows.
    """
    reference = contenders[0]
    for other in contenders[1:]:
        difference = abs(other.first_loss / reference.first_loss - 1)
        if not difference <= LOSS_TOLERANCE[dtype]:
            raise RunError(
                f"not comparable: the first loss of {other.name} is {other.first_loss:.5f}, that "
                f"of {reference.name} {reference.first_loss:.5f} (same weights and batch)"
            )


def peak_of(step: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors alive during `step` beyond those alive before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return int(torch.cuda.max_memory_allocated(device) - before)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    alive = most = 0
    for _, size in sorted(_allocations(profile.profiler.kineto_results.experimental_event_tree())):
        alive += size
        most = max(most, alive)
    return int(most)


def _allocations(events: Any) -> Iterator[tuple[int, int]]:
    """(time, bytes) of every allocation, bytes negative for what is freed."""
    for event in events:
        if event.name == "[memory]":
            yield event.start_time_ns, event.extra_fields.alloc_size
        yield from _allocations(event.children)


def measure(contenders: Sequence[Contender], rounds: int, device: torch.device) -> None:
    """Fills in `seconds` (one entry a round) and `peak_bytes`; compilation happens beforehand."""

    def synchronized(contender: Contender, index: int) -> None:
        contender.step(index)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    steps_per_round = {}
    bar = tqdm(contenders, desc="warm-up", unit="contender", file=sys.stderr)
    for contender in bar:
        bar.set_postfix_str(contender.name)
        _set_allocator(contender, device)
        synchronized(contender, 0)
        synchronized(contender, 1)
        contender.peak_bytes = contender.state_bytes + peak_of(
            functools.partial(synchronized, contender, 2), device
        )
        started = time.perf_counter()
        synchronized(contender, 3)
        once = time.perf_counter() - started
        steps_per_round[contender.name] = max(1, min(20, round(SECONDS_PER_ROUND / once)))
    for round_index in tqdm(range(rounds), desc="measuring", unit="round", file=sys.stderr):
        # Every other round runs backwards, so that a drift of the machine favours nobody.
        for contender in contenders if round_index % 2 == 0 else reversed(contenders):
            count = steps_per_round[contender.name]
            _set_allocator(contender, device)
            synchronized(contender, 0)  # settles caches and heap after the one before
            started = time.perf_counter()
            for index in range(count):
                contender.step(4 + round_index * count + index)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            contender.seconds.append((time.perf_counter() - started) / count)


def _set_allocator(contender: Contender, device: torch.device) -> None:
    if device.type == "cpu":
        keep_freed_memory(contender.keeps_memory)


def summary(contenders: Sequence[Contender], T: int) -> list[dict[str, Any]]:
    """One row a contender: times, real tokens/s, memory, and how many times slower than the first.

    Ratios are medians of the rounds' own ratios, so a slow spell of the machine cancels.
    """
    best = contenders[0]
    rows = []
    for contender in contenders:
        milliseconds = np.array(contender.seconds) * 1e3
        ratios = np.array(contender.seconds) / np.array(best.seconds)
        rows.append(
            {
                "name": contender.name,
                "ms_per_step": float(np.median(milliseconds)),
                "ms_p20": float(np.percentile(milliseconds, 20)),
                "ms_p80": float(np.percentile(milliseconds, 80)),
                "real_tokens_per_second": T / statistics.median(contender.seconds),
                "peak_memory_bytes": contender.peak_bytes,
                "speedup_of_first_over_this": float(np.median(ratios)),
                "memory_of_first_over_this": best.peak_bytes / contender.peak_bytes,
                "first_loss": contender.first_loss,
                "rounds_ms": milliseconds.tolist(),
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text, one line a contender."""
    first = rows[0]["name"]
    lines = [
        f"{'contender':<18}{'ms/step':>9}{'p20':>8}{'p80':>8}{'real tok/s':>12}"
        f"{'peak MiB':>10}{'memory':>8}   {first} is"
    ]
    for row in rows:
        lines.append(
            f"{row['name']:<18}{row['ms_per_step']:>9.1f}{row['ms_p20']:>8.1f}{row['ms_p80']:>8.1f}"
            f"{row['real_tokens_per_second']:>12,.0f}{row['peak_memory_bytes'] / 2**20:>10,.0f}"
            f"{row['memory_of_first_over_this']:>8.0%}"
            f"   {row['speedup_of_first_over_this']:.2f}x as fast"
        )
    return "\n".join(lines)


def conditions(config: StepBenchConfig, device: torch.device) -> dict[str, Any]:
    """What a reader needs to believe, or repeat, the figures."""
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "settings": dataclasses.asdict(config),
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    root = Path(__file__).resolve().parent.parent
    try:
        head = subprocess.run(
            ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip()


def run(config: StepBenchConfig) -> dict[str, Any]:
    """Measures as `config` says and returns conditions and rows."""
    device = choose_device(config.device)
    dtype, _ = choose_dtype(config.precision, device)
    sizes = model_config(config.model)
    if config.max_seq_length > sizes.max_position_embeddings:
        raise UserError(
            f"max_seq_length = {config.max_seq_length} must be at most the model's "
            f"max_position_embeddings = {sizes.max_position_embeddings}"
        )
    padded, packed = make_batches(config, sizes.vocab_size)
    padded = [{key: value.to(device) for key, value in batch.items()} for batch in padded]
    packed = [batch.to(device) for batch in packed]
    recipe = PretrainConfig(seed=config.seed, learning_rate=LEARNING_RATE, max_steps=10**6)

    def model(compiled: bool = False) -> Bert:
        torch.manual_seed(config.seed)
        return Bert(sizes, choose_ops(device.type, compiled)).to(device)

    weights = {
        name: tensor.detach().clone()
        for name, tensor in to_hf(dict(model().named_parameters()), sizes).items()
    }
    contenders = []
    if can_compile(device):
        contenders.append(
            ours("fastbert", model(compiled=True), packed, recipe, dtype, compiled=True)
        )
    contenders.append(ours("fastbert-eager", model(), packed, recipe, dtype, compiled=False))
    rivals: dict[str, Contender] = {}
    for name in config.against.split(",") if config.against != "none" else []:
        plain = name.removesuffix("+malloc")
        if plain == "hf-compile" and not can_compile(device):
            print(f"{name}: left out, no C++ compiler here", file=sys.stderr)
            continue
        if plain not in rivals:
            rivals[plain] = hugging_face(plain, sizes, weights, padded, recipe, dtype, device)
        contenders.append(
            dataclasses.replace(rivals[plain], name=name, keeps_memory=name != plain, seconds=[])
        )
    check_same_loss(contenders, dtype)
    measure(contenders, config.rounds, device)
    T = packed[0].num_tokens
    return {
        "benchmark": "step",
        "conditions": conditions(config, device),
        "dtype": str(dtype).removeprefix("torch."),
        "real_tokens": T,
        "padded_tokens": config.batch_size * config.max_seq_length,
        "contenders": summary(contenders, T),
    }


def main(config: StepBenchConfig) -> None:
    """Runs the benchmark, prints its table, writes JSON where asked.

    Raises:
        UserError: settings that do not fit, or a JSON path that cannot be written.
        RunError: contenders that do not compute the same thing.
    """
    if config.json and not Path(config.json).resolve().parent.is_dir():
        raise UserError(f"json = {config.json!r}: no such folder")
    result = run(config)
    told = result["conditions"]
    share = result["real_tokens"] / result["padded_tokens"]
    print(
        f"{told['device']}, {told['threads']} threads, torch {told['torch']}, {result['dtype']}; "
        f"{config.model}, {config.batch_size} sequences of at most {config.max_seq_length}, "
        f"{result['real_tokens']} real tokens ({share:.0%} of the padded)"
    )
    print(table(result["contenders"]))
    if config.json:
        try:
            Path(config.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"json = {config.json!r}: {error.strerror}") from None
