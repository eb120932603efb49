"""How fast batches come when a step costs nothing: `fastbert bench data`.

Random documents with sentence and document lengths of an encyclopedia are written as shards to a
temporary folder, beyond the size of a processor's caches. Then batches are taken as fast as they
come, with each number of workers in turn, round by round. Only real tokens count, and a core counts
by the CPU time that the caller and its workers spent: where workers outnumber the cores they share
them, and the figure per core tells what one more core would bring. On a GPU the batches travel
there, and a round ends when the last one has arrived.

`hf-collator` is what Hugging Face's examples train from: a torch DataLoader over sequences that are
lists of tokens already, with transformers' DataCollatorForLanguageModeling, which pads to the
longest and masks at random. It gets sequences that our packer planned, in memory, as many real
tokens a batch, and as many workers; it plans and packs nothing.

S longest sequence, T tokens of a batch, V vocabulary, W workers.
"""

import dataclasses
import importlib.util
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastbert.config import model_config
from fastbert.data.batch import Batch
from fastbert.data.mask import IGNORE
from fastbert.data.pack import Packer
from fastbert.data.parallel import available_cores
from fastbert.data.shards import Shards, _SplitWriter, write_meta
from fastbert.data.tokenize import TokenIds
from fastbert.data.workers import BatchLoader, DevicePrefetcher
from fastbert.errors import RunError, UserError
from fastbert.train.device import check_workers, choose_device
from fastbert_bench.config import DATA_RIVAL_NAMES, DataBenchConfig, integers
from fastbert_bench.measure import result as results
from fastbert_bench.measure.flops import MLM_PROBABILITY
from fastbert_bench.measure.lengths import file_lengths
from fastbert_bench.measure.result import Row
from fastbert_bench.measure.timing import in_turn, quantiles, synchronize
from fastbert_bench.suites.contenders import MissingError, rivals_asked

V = 30522
"""Tokens in the vocabulary of BERT, uncased; from `CONTINUATIONS` on they stand for "##" pieces."""
CONTINUATIONS = 24694
PAD, UNK, CLS, SEP, MASK = SPECIAL = (0, 100, 101, 102, 103)
WORDS = 104
"""Ids from here on stand for text."""
TARGET, TARGET_PER_CORE = 3e6, 4e5
"""Real tokens a second at S = 512: what 4 workers shall deliver, and each core for itself."""
SETTLING = 3
"""Rounds of all prefetched batches taken before the clock starts, as they cost nothing."""
LONGEST_DOCUMENT = 128
"""Of `lengths = full`, in sequences: only the last one of a document is not full."""
IDLE_SECONDS = 0.1
"""Workers rest who spend less than a tenth of it while it passes."""
RIVAL_TOKENS = 2**20
"""Of the sequences that a rival holds as lists, some 60 MB, over and over again."""


def write_shards(
    folder: Path, tokens: int, seed: int, *, V: int = V, lengths: str = "natural", S: int = 512
) -> Shards:
    """Writes about so many random tokens as documents of sentences.

    Args:
        folder: where to.
        tokens: how many, at least.
        seed: of everything random.
        V: tokens in the vocabulary.
        lengths: "natural", sentences of 25 on average in documents of 30; "full", sentences of at
            most S / 8 in documents of many S; else the file that lengths of sentences are drawn
            from, 30 a document.
        S: longest sequence that "full" fills.
    """
    rng = np.random.default_rng(seed)
    given = None if lengths in ("natural", "full") else file_lengths(lengths)
    writer = _SplitWriter(os.fspath(folder), "train", np.dtype(_dtype(V)))
    longest = max(2, S // 8) if lengths == "full" else 256
    while writer.tokens < tokens:
        sentences = rng.geometric(1 / 30)
        if lengths == "full":
            sentences = max(2, min(LONGEST_DOCUMENT * S, tokens // 4) // min(25, longest))
        if given is None:
            counts = np.clip(np.rint(rng.lognormal(3.08, 0.53, sentences)), 2, longest)
        else:
            counts = rng.choice(given, sentences)
        ids = rng.integers(WORDS, V, int(counts.sum())).tolist()
        ends = np.cumsum(counts).astype(int).tolist()
        starts = [0, *ends[:-1]]
        writer.add([ids[start:end] for start, end in zip(starts, ends, strict=True)])
    writer.finish()
    stats = {
        kind: {"train": getattr(writer, kind)} for kind in ("documents", "sentences", "tokens")
    }
    meta = {
        "dtype": _dtype(V),
        "shards": {"train": writer.shards},
        "vocab_size": V,
        "fingerprint": "",
        "stats": stats,
        "files": writer.files,
    }
    write_meta(folder, meta)
    return Shards.open(folder, "train")


def _dtype(V: int) -> str:
    return "uint16" if V <= 2**16 else "uint32"


def token_ids(V: int = V) -> TokenIds:
    """What packing needs to know of BERT's uncased vocabulary, or of V tokens that are alike."""
    continuation = np.arange(V) >= V * CONTINUATIONS // 30522
    return TokenIds(V, PAD, UNK, CLS, SEP, MASK, np.array(SPECIAL), continuation)


class Taken(NamedTuple):
    """A batch as it is counted."""

    tokens: int
    """Real ones."""
    sequences: int


@dataclasses.dataclass
class Source:
    """Batches without end, from one contender with one number of workers."""

    name: str
    W: int
    take: Callable[[], Taken]
    pids: Sequence[int]
    """Of its workers."""
    ahead: int
    """Batches that are ready at most."""
    seen: Callable[[], tuple[Tensor, Tensor, Taken]]
    """A batch's ids as they were before masking, its labels (`IGNORE`: not masked), and how it is
    counted."""
    rounds: "list[Round]" = dataclasses.field(default_factory=list)
    """What was measured."""
    peak_bytes: int | None = None
    """Of a GPU; None on a CPU."""


def packer(shards: Shards, S: int, config: DataBenchConfig) -> Packer:
    """What plans the sequences of every contender."""
    return Packer(
        shards,
        token_ids(shards.vocab_size),
        tokens_per_batch=config.tokens_per_batch,
        max_seq_length=S,
        short_seq_prob=0.0 if config.lengths == "full" else 0.1,
        seed=config.seed,
    )


def unmasked(batch: Batch) -> Tensor:
    """(T,) ids of a batch before they were masked."""
    ids, chosen = batch.input_ids.clone(), batch.masked_labels != IGNORE
    ids[batch.masked_positions[chosen]] = batch.masked_labels[chosen]
    return ids


def ours(
    shards: Shards, S: int, W: int, config: DataBenchConfig, device: torch.device, stack: ExitStack
) -> Source:
    """fastbert's loader, and on a GPU the prefetcher behind it."""
    loader = BatchLoader(packer(shards, S, config), W, config.dataloader_prefetch_factor)
    batches: Iterator[Batch] = loader
    if device.type == "cuda":
        batches = DevicePrefetcher(loader, device)
    stack.callback(loader.close)
    loader.start()

    def take() -> Taken:
        batch = next(batches)
        return Taken(batch.num_tokens, batch.num_sequences)

    def seen() -> tuple[Tensor, Tensor, Taken]:
        batch = next(batches)
        return unmasked(batch), batch.masked_labels, Taken(batch.num_tokens, batch.num_sequences)

    ahead = max(1, W * config.dataloader_prefetch_factor)
    return Source("fastbert", W, take, loader.pids, ahead, seen)


def sequences_of(shards: Shards, S: int, config: DataBenchConfig) -> list[dict[str, Any]]:
    """Sequences that our packer plans, unmasked, as lists: what a tokenized dataset holds."""
    batches, tokens = packer(shards, S, config), 0
    found: list[dict[str, Any]] = []
    while tokens < min(shards.num_tokens, RIVAL_TOKENS):
        batch = next(batches)
        tokens += batch.num_tokens
        ids = unmasked(batch)
        ends = batch.cu_seqlens[: batch.num_sequences + 1].tolist()
        columns = ids.tolist(), batch.token_type_ids.tolist(), (ids < WORDS).long().tolist()
        labels = batch.next_sentence_labels.tolist()
        for start, end, label in zip(ends, ends[1:], labels, strict=False):
            names = ("input_ids", "token_type_ids", "special_tokens_mask")
            row: dict[str, Any] = {
                name: column[start:end] for name, column in zip(names, columns, strict=True)
            }
            found.append(row | {"next_sentence_label": label})
    return found


def hf_collator(
    rows: list[dict[str, Any]], V: int, W: int, config: DataBenchConfig, device: torch.device
) -> Source:
    """torch's DataLoader and transformers' collator, in their fastest form.

    Raises:
        MissingError: a package is not installed.
    """
    for package in ("transformers", "tokenizers"):
        if importlib.util.find_spec(package) is None:
            raise MissingError(f"the package {package} is not installed")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from torch.utils.data import DataLoader, RandomSampler
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    names = dict(zip(SPECIAL, ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), strict=True))
    words = {names.get(index, f"w{index}"): index for index in range(V)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="[UNK]")),
        pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip
    mean = statistics.fmean(len(row["input_ids"]) for row in rows)
    sampler: Any = RandomSampler(rows, replacement=True, num_samples=2**40)  # without end
    loader: Any = DataLoader(
        rows,  # type: ignore[arg-type]  # a list is a dataset
        batch_size=max(1, round(config.tokens_per_batch / mean)),
        sampler=sampler,
        num_workers=W,
        prefetch_factor=config.dataloader_prefetch_factor if W else None,
        collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm_probability=MLM_PROBABILITY),
        pin_memory=device.type == "cuda",
    )
    before = {child.pid for child in multiprocessing.active_children()}
    batches = iter(loader)
    pids = [c.pid for c in multiprocessing.active_children() if c.pid and c.pid not in before]

    def batch() -> tuple[dict[str, Tensor], Taken]:
        made = next(batches)
        taken = Taken(int(made["attention_mask"].sum()), len(made["input_ids"]))
        return {key: value.to(device, non_blocking=True) for key, value in made.items()}, taken

    def seen() -> tuple[Tensor, Tensor, Taken]:
        made, taken = batch()
        labels = made["labels"]  # a word may have become any other one, [PAD] too
        return torch.where(labels != IGNORE, labels, made["input_ids"]), labels, taken

    ahead = max(1, W * config.dataloader_prefetch_factor)
    return Source("hf-collator", W, lambda: batch()[1], pids, ahead, seen)


RIVALS = {"hf-collator": hf_collator}


def check_same(source: Source) -> None:
    """Refuses to time batches that hold something else than is counted.

    Raises:
        RunError: padding is counted, or another share of the tokens is masked.
    """
    ids, labels, taken = source.seen()
    real, masked = int((ids != PAD).sum()), int((labels != IGNORE).sum())
    if real != taken.tokens:
        raise RunError(
            f"not comparable: {source.name} counts {taken.tokens} tokens in a batch of {real}; "
            "[PAD] is no work"
        )
    # Within five standard deviations; some count the three special tokens of a sequence, which are
    # never masked, and some mask at least one token of each.
    spread, share = 5 * (MLM_PROBABILITY / real) ** 0.5, taken.sequences / real
    low = MLM_PROBABILITY * (1 - 3 * share) - spread
    if not low <= masked / real <= MLM_PROBABILITY + share + spread:
        raise RunError(
            f"not comparable: {source.name} masks {masked / real:.1%} of the tokens, not "
            f"{MLM_PROBABILITY:.0%}"
        )


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU time that workers have spent, in all their threads."""
    # Linux numbers the CPU clock of another process so (clock_getcpuclockid).
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)


def rest(pids: Sequence[int]) -> None:
    """Waits until workers have made all they may make ahead: who comes next has the cores alone."""
    spent = float("-inf")
    while cpu_seconds(pids) - spent > 0.1 * IDLE_SECONDS:
        spent = cpu_seconds(pids)
        time.sleep(IDLE_SECONDS)


class Round(NamedTuple):
    """What came in one round."""

    tokens: int
    sequences: int
    batches: int
    wall: float
    cpu: float


def one_round(source: Source, settle: int, seconds: float, device: torch.device) -> Round:
    """Takes batches for so long, until the last of them is on the device."""
    for _ in range(settle):
        source.take()
    synchronize(device)
    taken = []
    spent, started = time.process_time() + cpu_seconds(source.pids), time.perf_counter()
    while time.perf_counter() - started < seconds:
        taken.append(source.take())
    synchronize(device)
    wall = time.perf_counter() - started
    cpu = time.process_time() + cpu_seconds(source.pids) - spent
    rest(source.pids)
    tokens, sequences = (sum(column) for column in zip(*taken, strict=True))
    return Round(tokens, sequences, len(taken), wall, cpu)


def run(config: DataBenchConfig) -> dict[str, Any]:
    """Measures as `config` says and returns the result.

    Raises:
        UserError: a vocabulary without text, or lengths that cannot be read.
        RunError: a rival that does not deliver the same.
    """
    device, V = choose_device(config.device), model_config(config.model).vocab_size
    check_workers("num_workers", max(integers("num_workers", config.num_workers, 0)))
    if V <= WORDS:
        raise UserError(f"model = {config.model!r}: vocab_size = {V} must be more than {WORDS}")
    asked = rivals_asked(config.against, DATA_RIVAL_NAMES)
    rows: list[Row] = []
    missing: list[dict[str, str]] = []
    lengths = integers("max_seq_lengths", config.max_seq_lengths, 8)
    with tempfile.TemporaryDirectory(prefix="fastbert-bench-") as folder:
        shards = write_shards(
            Path(folder), config.corpus_tokens, config.seed, V=V, lengths=config.lengths,
            S=max(lengths),
        )  # fmt: skip
        for S in lengths:
            measured, absent = _measure(shards, S, config, device, asked)
            rows += measured
            missing += [one for one in absent if one not in missing]
    missing += results.gaps(
        rows,
        {
            "mfu": "a loader computes nothing of the model",
            "peak_memory_bytes": "on a CPU, batches lie in memory that processes share and no "
            "counter of tensors sees",
            "watts": "a loader works on the CPU, which has no energy counter that we read",
        },
    )
    cores = available_cores()
    return results.make(
        "data", dataclasses.asdict(config), device, rows, missing, cores=cores, vocab_size=V
    )


def _measure(
    shards: Shards, S: int, config: DataBenchConfig, device: torch.device, against: Sequence[str]
) -> tuple[list[Row], list[dict[str, str]]]:
    missing: list[dict[str, str]] = []
    with ExitStack() as stack:
        sources: list[Source] = []
        sequences = sequences_of(shards, S, config) if against else []
        for W in dict.fromkeys(integers("num_workers", config.num_workers, 0)):
            sources.append(ours(shards, S, W, config, device, stack))
            for name in against:
                try:
                    sources.append(RIVALS[name](sequences, shards.vocab_size, W, config, device))
                except MissingError as error:
                    missing.append({"name": name, "why": str(error)})
        for source in sources:
            check_same(source)
            rest(source.pids)
        for _, source in in_turn(sources, config.rounds, f"length {S}"):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            settle = SETTLING * source.ahead
            source.rounds.append(one_round(source, settle, config.seconds, device))
            if device.type == "cuda":
                peak = int(torch.cuda.max_memory_allocated(device))
                source.peak_bytes = max(peak, source.peak_bytes or 0)
    own = {source.W: source for source in sources if source.name == "fastbert"}
    by_workers = sorted(sources, key=lambda source: source.W)
    return [_row(S, source, own[source.W]) for source in by_workers], missing


def _row(S: int, source: Source, first: Source) -> Row:
    name, rounds = source.name, source.rounds
    rates = [one.tokens / one.wall for one in rounds]
    per_core = [one.tokens / one.cpu for one in rounds]
    times = [one.wall / one.batches * 1e3 for one in rounds]
    label = f"length {S}, {source.W} workers"
    pairs = [best.tokens / best.wall / rate for best, rate in zip(first.rounds, rates, strict=True)]
    return {
        "name": label if name == "fastbert" else f"{label}, {name}",
        "contender": name,
        "compared_with": "fastbert",
        "ratio": statistics.median(pairs),
        "max_seq_length": S,
        "num_workers": source.W,
        **quantiles(times),
        "rounds_ms": times,
        "real_tokens_per_second": statistics.median(rates),
        "sequences_per_second": statistics.median(one.sequences / one.wall for one in rounds),
        "mfu": None,
        "peak_memory_bytes": source.peak_bytes,
        "watts": None,
        "joules_per_million_tokens": None,
        "real_tokens_per_second_and_core": statistics.median(per_core),
        "cores_used": sum(one.cpu for one in rounds) / sum(one.wall for one in rounds),
        "rounds_tokens_per_second": rates,
        "rounds_tokens_per_second_and_core": per_core,
    }


def table(result: dict[str, Any]) -> str:
    """The rows as text, one line each, a line for each that is missing, and the verdict."""
    cores: results.Columns = {
        "cores": lambda row: f"{row['cores_used']:.2f}",
        "tok/s/core": lambda row: f"{row['real_tokens_per_second_and_core']:,.0f}",
    }

    def remark(row: Row) -> str:
        compared = f"{row['ratio']:.2f}x as fast" if row["contender"] != "fastbert" else ""
        crowded = row["num_workers"] >= result["cores"]
        return compared + ("   more processes than cores" if crowded else "")

    shown = results.table(result, "a batch", cores, ("fastbert is", remark))
    return f"{shown}\n{verdict(result['rows'])}"


def verdict(rows: Sequence[Row]) -> str:
    """Whether the target is met, where it was measured."""
    for row in rows:
        ours = row.get("contender", "fastbert") == "fastbert"
        if ours and (row["max_seq_length"], row["num_workers"]) == (512, 4):
            met = row["real_tokens_per_second"] >= TARGET
            met &= row["real_tokens_per_second_and_core"] >= TARGET_PER_CORE
            return (
                f"target, 4 workers at length 512: {TARGET:,.0f} tokens/s and "
                f"{TARGET_PER_CORE:,.0f} per core: {'met' if met else 'missed'}"
            )
    return "target: not measured (4 workers at length 512)"


def asked(config: DataBenchConfig, result: dict[str, Any]) -> str:
    """The settings that matter, in words."""
    return (
        f"{config.tokens_per_batch} tokens a batch, {Path(config.lengths).name} lengths, a "
        f"vocabulary of {result['vocab_size']}, a step that costs nothing"
    )
