"""What a pre-training will take, before anyone pays for it: `fastbert estimate`.

A step is every launch of it, one after the other, priced by `estimate.step_cost`; printed by
family, between the best and the worst that is likely. Where a step of that model was measured on
that device, the file under benchmarks/results/ replaces the model's time, and the model only
carries it to another batch.

T tokens and N sequences of a batch, s the mean length of the sequence that a token stands in,
H hidden size.
"""

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbert.config import ModelConfig, PretrainConfig, model_config
from fastbert.errors import RunError, UserError
from fastbert.train import muon
from fastbert_bench.config import EstimateConfig
from fastbert_bench.estimate.launch_list import sizes_of
from fastbert_bench.estimate.step_cost import (
    AMPERE,
    CPU,
    HOPPER,
    OPTIMIZER,
    SHORTEST,
    SYMMETRIC_TILE,
    TRITON,
    Lengths,
    Moods,
    Muon,
    StepCost,
    step_cost,
)
from fastbert_bench.kernels.costs import A100, H100, Ceilings
from fastbert_bench.kernels.sass import MACHINES
from fastbert_bench.measure import result
from fastbert_bench.measure.flops import (
    MLM_PROBABILITY,
    PEAK_FLOPS,
    executed_flops_per_token,
    flops_per_token,
)
from fastbert_bench.measure.lengths import file_lengths, lengths_asked
from fastbert_bench.measure.places import RESULTS, ROOT
from fastbert_kernels.attention_config import HEAD_SIZES

GIB = 2**30
NODE_GPUS = 8
INFINIBAND = 400e9 / 8
"""Bytes a second and direction of one port."""
LINK_SHARE = 0.8
"""Of a link's datasheet rate that an all-reduce reaches."""
USABLE_MEMORY = 0.9
POWER_SHARE = 0.85
LARGEST_KNOWN_BATCH = 65_536
"""Sequences: LAMB's published recipes end here (You et al. 2020)."""
BERT_TOKENS = 1e6 * 256 * 512
SIMILAR = 0.25
"""How far s may lie from a measurement's for it to be used."""
DRAWN = 4096
"""Lengths drawn to stand for `natural`."""


@dataclasses.dataclass(frozen=True)
class Device:
    """What a device reaches at best, and which shares of that a step's kernels reach."""

    names: str
    """Regular expression: how its driver names it."""
    ceilings: Ceilings
    source: str
    """Where the ceilings come from."""
    memory_bytes: float
    moods: Moods
    arch: int | None
    """Whose counts price its kernels: 80 or 90; None for a CPU."""
    peak_flops: float | None = None
    power_watts: float | None = None
    """Power limit of the part."""
    nvlink: float = 0.0
    """Bytes a second and direction; 0: no link."""

    def step(
        self, sizes: ModelConfig, tokens: float, lengths: Lengths, of_muon: Muon | None = None
    ) -> StepCost:
        """The model of a step on it, of AdamW alone or with Muon."""
        return step_cost(sizes, tokens, lengths, self.ceilings, self.moods, self.arch, of_muon)


_DATASHEET = "assumed: 90% of the data sheet's bandwidth"
# The SXM parts.
DEVICES = {
    "h100": Device(
        "H100 80GB HBM3", H100, "measured: a device copy",
        79 * GIB, HOPPER, 90, PEAK_FLOPS["H100"], 700, 450e9,
    ),
    "h200": Device(
        r"\bH200$", Ceilings(0.9 * 4.8e12, H100.matrix), _DATASHEET,
        139 * GIB, HOPPER, 90, PEAK_FLOPS["H200"], 700, 450e9,
    ),
    "a100-80gb": Device(
        "A100-SXM4-80GB", A100, _DATASHEET, 79 * GIB, AMPERE, 80, PEAK_FLOPS["A100"], 400, 300e9
    ),
    "a100-40gb": Device(
        "A100-SXM4-40GB", Ceilings(0.9 * 1.555e12, A100.matrix), _DATASHEET,
        39 * GIB, AMPERE, 80, PEAK_FLOPS["A100"], 400, 300e9,
    ),
    # The 2 cores of benchmarks/results/amd-epyc-2-cores. Products at the model's shapes reach 445
    # GFLOP/s in bf16 on one core. The bandwidth is no copy's (39 GB/s on one core) but what the
    # passes of a whole step reach: several passes for one of the list, dispatch, page faults; it
    # is the one number fitted to the committed steps.
    "cpu": Device(
        "^AMD EPYC$", Ceilings(8.0e9, 2 * 445e9),
        "2 cores of an AMD EPYC: the bandwidth fitted to the committed steps, 890 GFLOP/s measured",
        23 * GIB, CPU, None,
    ),
}  # fmt: skip


def drawn_lengths(config: EstimateConfig) -> np.ndarray:  # (B,)
    """The lengths that `config` names, cut at its `max_seq_length`.

    Raises:
        UserError: a file that cannot be read, or a line that is no length.
    """
    S = config.max_seq_length
    if config.lengths in ("full", "natural"):
        return lengths_asked(config.lengths, DRAWN, S, np.random.default_rng(42))
    return np.minimum(file_lengths(config.lengths), S)


def parameters(sizes: ModelConfig) -> int:
    """Of the encoder, the pooler and both heads; the output matrix is the embedding."""
    return sizes_of(sizes, 0, 0, 0)["P"]


def _embedding_rows(sizes: ModelConfig) -> int:
    return sizes.vocab_size + sizes.max_position_embeddings + sizes.type_vocab_size


# Memory


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device; activations and logits by token, as `fastbert.train.device` counts."""

    state_bytes: float
    bytes_per_token: float
    device_bytes: float

    @classmethod
    def of(cls, sizes: ModelConfig, device: Device, *, with_muon: bool = False) -> "Memory":
        layer = (8 * sizes.hidden_size + 2 * sizes.intermediate_size) * 2
        logits = MLM_PROBABILITY * sizes.vocab_size * 2
        state = (2 + 4 + 4 + 8) * parameters(sizes)
        if with_muon:  # one moment of its matrices; its scratch comes when activations have gone
            state -= 4 * muon.num_parameters(sizes)
        return cls(state, layer * sizes.num_hidden_layers + logits, device.memory_bytes)

    def needed(self, tokens: float) -> float:
        """Bytes of a device on which a micro-batch of so many tokens fits."""
        return (self.state_bytes + tokens * self.bytes_per_token) / USABLE_MEMORY

    def most_tokens(self, S: int) -> int:
        """Of the largest micro-batch: whole sequences of S tokens."""
        free = USABLE_MEMORY * self.device_bytes - self.state_bytes
        return max(0, int(free / self.bytes_per_token) // S * S)


def micro_batch(config: EstimateConfig, memory: Memory) -> int:
    """Tokens of a device's micro-batch: as asked, else the most whole sequences that fit.

    Raises:
        UserError: not even one sequence fits, or not what was asked for.
    """
    S, asked = config.max_seq_length, config.tokens_per_batch
    most = memory.most_tokens(S)
    has = f"gpu = {config.gpu!r} has {memory.device_bytes / GIB:.0f} GiB"
    if most == 0:
        raise UserError(
            f"model = {config.model!r} with one sequence of {S} tokens needs "
            f"{memory.needed(S) / GIB:.1f} GiB, of which weights, gradients and moments take "
            f"{memory.state_bytes / GIB:.1f}: {has}"
        )
    if asked is not None and memory.needed(asked) > memory.device_bytes:
        raise UserError(
            f"tokens_per_batch = {asked} needs {memory.needed(asked) / GIB:.1f} GiB: {has}, where "
            f"at most {most} tokens fit"
        )
    return asked or most


# Measurements


@dataclasses.dataclass(frozen=True)
class Measured:
    """fastbert's step in a committed file."""

    path: Path
    model: ModelConfig
    tokens: int
    lengths: Lengths
    seconds: float
    joules_per_million_tokens: float | None

    def factor(self, device: Device) -> float:
        """How many times as long the step took as the model says."""
        return self.seconds / device.step(self.model, self.tokens, self.lengths).seconds


def measurements(device: Device, results: Path = RESULTS) -> list[Measured]:
    """The steps in bf16 that `bench step` and the GPU command left of a device.

    Raises:
        RunError: a file whose lengths do not add up to its tokens.
    """
    found = []
    for path in sorted(results.rglob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("benchmark") != "step" or content["dtype"] != "bfloat16":
            continue
        if not re.search(device.names, content["conditions"]["device"]):
            continue
        ours = next((row for row in content["rows"] if row["name"] == "fastbert"), None)
        if ours is None:
            continue
        model, lengths = ModelConfig(**content["model"]), np.array(content["lengths"])
        if int(lengths.sum()) != content["real_tokens"]:
            raise RunError(f"{path}: the lengths do not add up to real_tokens")
        found.append(
            Measured(
                path, model, content["real_tokens"], Lengths.of(lengths), ours["ms"] / 1e3,
                ours.get("joules_per_million_tokens"),
            )
        )  # fmt: skip
    return found


def nearest(
    found: Sequence[Measured], sizes: ModelConfig, tokens: int, lengths: Lengths
) -> Measured | None:
    """The measurement of this model at similar lengths whose batch is nearest; None: there is none.

    Dropout and the like do not change what a step costs.
    """

    def shape(model: ModelConfig) -> tuple[int, ...]:
        return (
            model.num_hidden_layers, model.hidden_size, model.num_attention_heads,
            model.intermediate_size, model.vocab_size,
        )  # fmt: skip

    alike = [
        one
        for one in found
        if shape(one.model) == shape(sizes)
        and abs(one.lengths.attended / lengths.attended - 1) <= SIMILAR
    ]
    return min(alike, key=lambda one: abs(math.log(one.tokens / tokens)), default=None)


# Several GPUs


def all_reduce_seconds(bytes: float, gpus: int, device: Device) -> float:
    """A ring: each GPU sends and receives 2 (g - 1) / g of the bytes over its slowest link."""
    if gpus == 1:
        return 0.0
    link = device.nvlink if gpus <= NODE_GPUS else INFINIBAND
    return 2 * (gpus - 1) / gpus * bytes / (link * LINK_SHARE)


def exposed_seconds(
    sizes: ModelConfig, gpus: int, backward_seconds: float, device: Device
) -> float:
    """What of the all-reduce of fp32 gradients the backward does not hide.

    The tied embedding has its gradient only when the backward ends.
    """
    late = _embedding_rows(sizes) * sizes.hidden_size
    hidden = all_reduce_seconds(4 * (parameters(sizes) - late), gpus, device)
    tail = all_reduce_seconds(4 * late, gpus, device)
    return tail + max(0.0, hidden - backward_seconds)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A whole run on so many GPUs."""

    gpus: int
    tokens_per_batch: int
    """On each."""
    step_seconds: float
    low_seconds: float
    """Of the step, all at its best; a measured step has no range."""
    high_seconds: float
    exposed_seconds: float
    sequences_per_step: float
    optimizer_steps: int
    tokens_per_second: float
    efficiency: float
    """Throughput over that of as many GPUs that need not talk."""
    mfu: float | None
    """By the FLOPs of the model."""
    mfu_executed: float | None
    """By those that are executed: the last layer's skipped rows are not counted."""
    days: float
    dollars: float | None
    kilowatt_hours: float | None


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Everything that is printed."""

    config: EstimateConfig
    model: ModelConfig
    device: Device
    lengths: Lengths
    tokens: float
    micro_batch: int
    memory: Memory
    source: str
    watts: float | None
    watts_from: str
    cost: StepCost
    """The modelled step of one device."""
    plans: list[Plan]


def estimate(config: EstimateConfig, results: Path = RESULTS) -> Estimate:
    """Works it all out.

    Raises:
        UserError: settings that do not fit the model or the memory.
    """
    sizes, device = model_config(config.model), DEVICES[config.gpu]
    if config.vocab_size is not None:
        sizes = dataclasses.replace(sizes, vocab_size=config.vocab_size)
    drawn = drawn_lengths(config)
    lengths = Lengths.of(drawn)
    of_muon = Muon(config.muon_split_qkv) if config.optim == "muon" else None
    memory = Memory.of(sizes, device, with_muon=of_muon is not None)
    T = micro_batch(config, memory)
    committed = measurements(device, results)
    measured = nearest(committed, sizes, T, lengths)
    factor = measured.factor(device) if measured else 1.0
    watts, watts_from = _watts(device, measured)
    masked = round(MLM_PROBABILITY * float(drawn.sum()))
    flops = flops_per_token(sizes, drawn), executed_flops_per_token(sizes, drawn, masked)
    tokens, price = tokens_asked(config), config.price_per_hour

    def plan(gpus: int, micro: int) -> Plan:
        cost = device.step(sizes, micro, lengths, of_muon)
        alone = factor * cost.seconds
        exposed = exposed_seconds(sizes, gpus, factor * cost.backward_seconds, device)
        rate = micro * gpus / (alone + exposed)
        hours = tokens / rate / 3600
        per_token = flops[0], flops[1] + cost.family(OPTIMIZER).flops / micro
        shares = [
            one * rate / gpus / device.peak_flops if device.peak_flops else None
            for one in per_token
        ]
        return Plan(
            gpus=gpus,
            tokens_per_batch=micro,
            step_seconds=alone + exposed,
            low_seconds=(alone if measured else cost.low) + exposed,
            high_seconds=(alone if measured else cost.high) + exposed,
            exposed_seconds=exposed,
            sequences_per_step=micro * gpus / lengths.mean,
            optimizer_steps=math.ceil(tokens / (micro * gpus)),
            tokens_per_second=rate,
            efficiency=alone / (alone + exposed),
            mfu=shares[0],
            mfu_executed=shares[1],
            days=hours / 24,
            dollars=None if price is None else hours * price * gpus,
            kilowatt_hours=None if watts is None else hours * watts * gpus / 1e3,
        )

    plans = []
    for gpus in config.counts():
        plans.append(plan(gpus, T))
        most = int(LARGEST_KNOWN_BATCH * lengths.mean / gpus)
        if most < T:
            plans.append(plan(gpus, most))
    return Estimate(
        config, sizes, device, lengths, tokens, T, memory,
        _source(measured, T, bool(committed), config.optim),
        watts, watts_from, device.step(sizes, T, lengths, of_muon), plans,
    )  # fmt: skip


def tokens_asked(config: EstimateConfig) -> float:
    """Real tokens of the whole run."""
    if config.epochs is not None and config.corpus_tokens is not None:
        return config.epochs * config.corpus_tokens
    return config.tokens or BERT_TOKENS


def _source(measured: Measured | None, T: int, known: bool, optim: str) -> str:
    if measured is None:
        what = "this model at such lengths is " if known else ""
        if not RESULTS.is_dir():
            return "modelled: measured results are in the repository, not in the package"
        return f"modelled: {what}not yet measured on this device"
    path = measured.path
    told = f"from {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}"
    if measured.tokens != T:
        told += f" ({measured.tokens:,} tokens a step; the model carries it to {T:,})"
    if optim == "muon":
        told += "; measured with AdamW, the model carries it to Muon"
    return told


def _watts(device: Device, measured: Measured | None) -> tuple[float | None, str]:
    if measured and measured.joules_per_million_tokens:
        watts = measured.joules_per_million_tokens * measured.tokens / measured.seconds / 1e6
        return watts, "measured in that file"
    if device.power_watts is None:
        return None, "not known for this device"
    told = f"assumed, {POWER_SHARE:.0%} of the part's limit of {device.power_watts:.0f} W"
    return device.power_watts * POWER_SHARE, told


def assumptions(found: Estimate) -> list[str]:
    """What the figures rest on, one line each."""
    device, config = found.device, found.config
    lines = [f"bandwidth: {device.ceilings.bandwidth / 1e9:,.4g} GB/s ({device.source})"]
    if device.arch:
        machine, (likely, best, worst) = MACHINES[device.arch], device.moods
        reached = [
            f"{what} {a:.0%} ({c:.0%} to {b:.0%})"
            for what, a, b, c in (
                ("products", likely.product, best.product, worst.product),
                ("attention", likely.attention, best.attention, worst.attention),
                ("passes", likely.bandwidth, best.bandwidth, worst.bandwidth),
            )
        ]
        lines += [
            f"{machine.multiprocessors} multiprocessors at {machine.clock / 1e9:g} GHz: attention "
            f"by the counts of counts.json for Triton {TRITON}, products by tiles in whole "
            "waves, all else by its bytes",
            f"what is reached of that, assumed: {', '.join(reached)}; "
            f"{likely.gap_seconds * 1e6:g} µs between kernels of a CUDA graph, "
            f"{SHORTEST * 1e6:g} µs for the shortest",
        ]
    else:
        lines.append(
            f"products: {device.ceilings.matrix / 1e9:,.0f} GFLOP/s; attention "
            f"{device.moods.likely.attention:.0%} of that, and its scores written to memory"
        )
    rule = "Muon and AdamW" if config.optim == "muon" else "AdamW"
    lines += [
        f"step: bf16, {rule}, {MLM_PROBABILITY:.0%} of tokens masked, one micro-batch a step, the "
        "last layer on masked and [CLS] tokens only, data never waits; no evaluation, no failures",
        "launches, bytes and FLOPs: launch_list.json; MFU by the model's FLOPs of real "
        "tokens, and by those executed: the last layer skips rows",
        "memory: 18 bytes a parameter (bf16 weights 2, masters 4, gradients 4, moments 8), 8 H + "
        f"2 F values a token and layer, bf16 logits; {USABLE_MEMORY:.0%} of the device usable",
        f"lengths: mean {found.lengths.mean:.0f}, by tokens {found.lengths.attended:.0f}",
        f"power: {found.watts_from}" + ("; the GPU alone, no host, no cooling" * bool(found.watts)),
    ]
    if config.optim == "muon":
        lines.append(_of_muon(found))
    if config.epochs is None and config.tokens is None:
        lines.append(f"tokens: {BERT_TOKENS:.3g} as BERT's own run, 1M steps of 256 x 512")
    if config.vocab_size is None:
        lines.append(
            f"vocabulary: {found.model.vocab_size:,} tokens, the model's own; a tokenizer that "
            f"`fastbert pretrain` trains has {PretrainConfig.vocab_size:,} unless told otherwise "
            "(--vocab-size, here and there)"
        )
    if max(config.counts()) > 1:
        lines += [
            "several GPUs: never measured; data parallel, a ring all-reduces 4 bytes a parameter, "
            "hidden by the backward except for the tied embedding, which ends with it",
            f"links: NVLink {device.nvlink / 1e9:.0f} GB/s up to {NODE_GPUS} GPUs, beyond that one "
            f"InfiniBand port of {INFINIBAND * 8 / 1e9:.0f} Gb/s; {LINK_SHARE:.0%} of either; no "
            "latency, no stragglers",
        ]
    return lines


def _of_muon(found: Estimate) -> str:
    sizes, split, defaults = found.model, found.config.muon_split_qkv, Muon()
    flops = muon.newton_schulz_flops(sizes, split, defaults.ns_steps)
    how = "on a CPU in fp32"
    if found.device.arch:
        how = (
            f"of symmetric products half the tiles of {SYMMETRIC_TILE} and the diagonal; each GPU "
            "orthogonalizes all matrices"
        )
    return (
        f"Muon: {sum(muon.shapes(sizes, split).values())} matrices, 4 bytes a parameter less; "
        f"Newton-Schulz {defaults.ns_steps} times, {flops / 1e12:.2f} TFLOP a step, which MFU by "
        f"the model's FLOPs does not count; launches from the matrices' shapes, {how}"
    )


def warnings(found: Estimate) -> list[str]:
    """What would go wrong although the arithmetic works."""
    most, head = LARGEST_KNOWN_BATCH, found.model.hidden_size // found.model.num_attention_heads
    unpriced = [
        f"heads of {head}: our kernels have {', '.join(map(str, HEAD_SIZES))}; a GPU takes plain "
        "PyTorch for this model, which is not what is priced here"
    ]
    return unpriced * bool(found.device.arch and head not in HEAD_SIZES) + [
        f"{plan.gpus:,} GPUs with {plan.tokens_per_batch:,} tokens each are "
        f"{plan.sequences_per_step:,.0f} sequences a step: LAMB's published recipes end at {most:,}"
        for plan in found.plans
        if plan.sequences_per_step > most
    ]


def as_result(found: Estimate) -> dict[str, Any]:
    """The estimate as a result file; its conditions are of the machine that did the sums."""
    rows = []
    for plan in found.plans:
        joules = plan.kilowatt_hours and plan.kilowatt_hours * 3.6e12 / found.tokens
        rows.append(
            {
                "name": f"{plan.gpus} x {found.config.gpu}, {plan.tokens_per_batch} tokens each",
                "ms": plan.step_seconds * 1e3,
                "real_tokens_per_second": plan.tokens_per_second,
                "sequences_per_second": plan.tokens_per_second / found.lengths.mean,
                "mfu": plan.mfu,
                "watts": None if found.watts is None else found.watts * plan.gpus,
                "joules_per_million_tokens": joules,
                "peak_memory_bytes": round(
                    found.memory.state_bytes + plan.tokens_per_batch * found.memory.bytes_per_token
                ),
                **dataclasses.asdict(plan),
            }
        )
    missing = []
    if found.config.price_per_hour is None:
        missing.append({"name": "dollars", "why": "no price per hour was given"})
    if found.watts is None:
        missing.append({"name": "energy", "why": "the power of this device is not known"})
    if found.device.peak_flops is None:
        missing.append({"name": "mfu", "why": "the peak rate of this device is not known"})
    return result.make(
        "estimate", dataclasses.asdict(found.config), torch.device("cpu"), rows, missing,
        source=found.source,
        tokens=found.tokens,
        parameters=parameters(found.model),
        state_bytes=found.memory.state_bytes,
        bytes_per_token=found.memory.bytes_per_token,
        largest_tokens_per_batch=found.memory.most_tokens(found.config.max_seq_length),
        families=[family._asdict() for family in found.cost.families],
        warnings=warnings(found),
        assumptions=assumptions(found),
    )  # fmt: skip


def _plan_lines(plans: Sequence[Plan]) -> list[str]:
    """A line for each number of GPUs, in columns as wide as what stands in them."""
    rows = [
        ["GPUs", "tokens each", "ms/step", "low", "high", "exposed", "scaling", "tokens/s", "MFU",
         "exec.", "seq/step", "steps", "time", "dollars", "kWh"],
    ]  # fmt: skip
    for plan in plans:
        milliseconds = (plan.step_seconds, plan.low_seconds, plan.high_seconds)
        rows.append([
            f"{plan.gpus:,}", f"{plan.tokens_per_batch:,}",
            *(f"{seconds * 1e3:,.1f}" for seconds in milliseconds),
            f"{plan.exposed_seconds * 1e3:.1f}", f"{plan.efficiency:.1%}",
            f"{plan.tokens_per_second:,.0f}", or_dash(plan.mfu, ".1%"),
            or_dash(plan.mfu_executed, ".1%"), f"{plan.sequences_per_step:,.0f}",
            f"{plan.optimizer_steps:,}", duration(plan.days * 86400),
            or_dash(plan.dollars, ",.0f"), or_dash(plan.kilowatt_hours, ",.0f"),
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
            for row in rows]  # fmt: skip


def table(found: Estimate) -> str:
    """The estimate as text."""
    memory, T, config = found.memory, found.micro_batch, found.config
    lines = [
        f"{config.model} ({parameters(found.model) / 1e6:.0f}M parameters, vocabulary "
        f"{found.model.vocab_size:,}), lengths "
        f"{config.lengths} up to {config.max_seq_length}, {found.tokens:.4g} tokens, {config.gpu}",
        f"step time, {found.source}",
        f"memory of each: {memory.state_bytes / GIB:.1f} GiB of weights, gradients and moments + "
        f"{T * memory.bytes_per_token / GIB:.1f} of activations and logits, of "
        f"{memory.device_bytes / GIB:.0f}; the largest micro-batch is "
        f"{memory.most_tokens(config.max_seq_length):,} tokens",
        "",
        *family_lines(found.cost, T),
        "",
        *_plan_lines(found.plans),
    ]
    lines += [f"warning: {line}" for line in warnings(found)]
    return "\n".join((*lines, "", "assumptions", *(f"- {line}" for line in assumptions(found))))


def family_lines(cost: StepCost, tokens: int) -> list[str]:
    """The modelled step by family of kernels: what takes its time, and what it waits for."""
    lines = [
        f"{f'a step of {tokens:,} tokens, modelled':<36}{'launches':>9}{'ms':>10}{'share':>7}"
        f"{'low':>10}{'high':>10}  {'waits for':<13}{'filled':>7}{'TFLOP':>8}{'GB':>8}"
    ]
    for one in cost.families:
        if one.launches or one.seconds:
            lines.append(
                f"{one.name:<36}{one.launches:>9,}{one.seconds * 1e3:>10,.2f}"
                f"{one.seconds / cost.seconds:>7.1%}{one.low * 1e3:>10,.2f}{one.high * 1e3:>10,.2f}"
                f"  {one.limit:<13}{or_dash(one.filled, '.0%'):>7}"
                f"{one.flops / 1e12:>8,.2f}{one.bytes / 1e9:>8,.1f}"
            )
    lines.append(
        f"{'all':<36}{cost.launches:>9,}{cost.seconds * 1e3:>10,.2f}{'':>7}"
        f"{cost.low * 1e3:>10,.2f}{cost.high * 1e3:>10,.2f}"
    )
    return lines


def duration(seconds: float) -> str:
    """In the largest unit of which it is more than two."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds > 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 1 else "under a second"


def or_dash(value: float | None, form: str) -> str:
    """A figure as a table has it; "-" where it is not known."""
    return "-" if value is None else format(value, form)


def main(config: EstimateConfig) -> None:
    """Prints the estimate, writes JSON where asked.

    Raises:
        UserError: settings that do not fit.
        RunError: a file that cannot be written.
    """
    found = estimate(config)
    if config.json:
        result.write(as_result(found), Path(config.json))
    print(table(found))
