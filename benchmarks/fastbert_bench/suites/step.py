"""The training step against Hugging Face's: `fastbert bench step`.

All contenders in one process, interleaved round by round; `contenders` says what makes them
comparable, and checks it. Only real tokens count.

On a CPU, fastbert tells glibc to keep freed memory; the rivals run with glibc's own policy, as
their users have it, and as `...+malloc` once more with ours, which helps them much.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fastbert.config import ModelConfig, model_config
from fastbert.ops import Ops
from fastbert.progress import progress_bar
from fastbert.train.device import (
    can_compile,
    check_weights,
    choose_device,
    keep_freed_memory,
)
from fastbert_bench.config import STEP_RIVALS, StepBenchConfig
from fastbert_bench.measure import result as results
from fastbert_bench.measure.energy import EnergyMeter
from fastbert_bench.measure.flops import flops_per_token, mfu
from fastbert_bench.measure.lengths import lengths_asked
from fastbert_bench.measure.memory import peak_of
from fastbert_bench.measure.processes import one_line
from fastbert_bench.measure.timing import figures, in_turn, timed
from fastbert_bench.suites.contenders import (
    Contender,
    MissingError,
    check_fair,
    execution_of,
    make_batches,
    make_recipe,
    ours,
    rival,
    rivals_asked,
    seeded,
    weights_of,
)

SECONDS_PER_ROUND = 0.5
SECONDS_OF_ENERGY = 1.0


def measure(
    contenders: Sequence[Contender], rounds: int, device: torch.device
) -> tuple[list[Contender], list[dict[str, str]]]:
    """Fills in `seconds` (one entry a round) and `peak_bytes`; compilation happens beforehand.

    Returns:
        The contenders that were measured, and {"name", "why"} of rivals that cannot run: out of
        memory, or a compiler's failure. Ours must run.
    """
    steps_per_round = {}
    able, failed = [], []
    bar = progress_bar(contenders, desc="warm-up", unit="contender")
    for contender in bar:
        bar.set_postfix_str(contender.name)
        _set_allocator(contender, device)
        try:
            timed(contender.step, (0, 1), device)
            third = functools.partial(timed, contender.step, (2,), device)
            contender.peak_bytes = contender.state_bytes + peak_of(third, device)
            once = timed(contender.step, (3,), device)
        except Exception as error:
            if contender is contenders[0]:
                raise
            failed.append({"name": contender.name, "why": one_line(error)})
            continue
        able.append(contender)
        steps_per_round[contender.name] = max(1, min(20, round(SECONDS_PER_ROUND / once)))
    for round_index, contender in in_turn(able, rounds):
        count = steps_per_round[contender.name]
        _set_allocator(contender, device)
        timed(contender.step, (0,), device)  # settles caches and heap after the one before
        first = 4 + round_index * count
        contender.seconds.append(timed(contender.step, range(first, first + count), device))
    return able, failed


def _set_allocator(contender: Contender, device: torch.device) -> None:
    if device.type == "cpu":
        keep_freed_memory(contender.keeps_memory)


def summary(
    contenders: Sequence[Contender], sizes: ModelConfig, lengths: np.ndarray, device: torch.device
) -> list[dict[str, Any]]:
    """One row a contender: times, real tokens/s, MFU, memory, energy, and the ratio to the first.

    Ratios are of times a token, medians of the rounds' own, so a slow spell of the machine cancels.
    """
    best, meter = contenders[0], EnergyMeter(device)
    rows = []
    for contender in contenders:
        T = contender.real_tokens
        flops = flops_per_token(sizes, lengths) * T
        seconds = np.array(contender.seconds)
        middle = float(np.median(seconds))
        spent = meter.measure(contender.step, SECONDS_OF_ENERGY, middle)
        rows.append(
            {
                "name": contender.name,
                **figures(contender.seconds, T, contender.sequences, spent),
                "mfu": mfu(flops / middle, device),
                "peak_memory_bytes": contender.peak_bytes,
                "ratio": float(np.median(seconds / np.array(best.seconds))) * best.real_tokens / T,
                "memory_of_first_over_this": best.peak_bytes / contender.peak_bytes,
                "first_loss": float(contender.token_losses.mean()),
            }
        )
    return rows


def table(result: dict[str, Any]) -> str:
    """The rows as text, one line a contender, and a line for each that is missing."""
    remarks = f"{result['rows'][0]['name']} is", lambda row: f"{row['ratio']:.2f}x as fast"
    return results.table(result, "a step", {}, remarks)


def run(config: StepBenchConfig) -> dict[str, Any]:
    """Measures as `config` says and returns the result."""
    device = choose_device(config.device)
    sizes = model_config(config.model)
    check_weights(config.model, sizes, device)
    rng = np.random.default_rng(config.seed)
    lengths = lengths_asked(config.lengths, config.batch_size, config.max_seq_length, rng)
    padded, packed = make_batches(lengths, config.max_seq_length, sizes.vocab_size, rng)
    padded = [{key: value.to(device) for key, value in batch.items()} for batch in padded]
    packed = [batch.to(device) for batch in packed]
    recipe = make_recipe(config.seed)
    plain = execution_of(config, sizes, compiled=False)
    dtype = plain.dtype

    def own(name: str, ops: Ops, graph: bool = False) -> Contender:
        model = seeded(sizes, ops, config.seed, device)
        return ours(name, model, packed, recipe, dtype, graph=graph)

    weights = weights_of(seeded(sizes, plain.ops, config.seed, device), sizes)
    contenders: list[Contender] = []
    if device.type == "cuda":
        contenders.append(own("fastbert", plain.ops, plain.graph))
    elif can_compile(device):
        contenders.append(own("fastbert", execution_of(config, sizes, compiled=True).ops))
    contenders.append(own("fastbert-eager", plain.ops))
    drops = sizes.hidden_dropout_prob > 0 or sizes.attention_probs_dropout_prob > 0
    missing: list[dict[str, str]] = []
    made: dict[str, Contender | str] = {}
    for name in rivals_asked(config.against, STEP_RIVALS[device.type].split(",")):
        plain_name = name.removesuffix("+malloc")
        if plain_name not in made:
            try:
                found = rival(plain_name, sizes, weights, padded, recipe, dtype, device)
                check_fair(contenders[0], found, drops)
                made[plain_name] = found
            except MissingError as error:
                made[plain_name] = str(error)
        one = made[plain_name]
        if isinstance(one, str):
            missing.append({"name": name, "why": one})
        else:
            contenders.append(
                dataclasses.replace(one, name=name, keeps_memory=name != plain_name, seconds=[])
            )
    check_fair(contenders[0], contenders[-1], drops)
    contenders, failed = measure(contenders, config.rounds, device)
    rows = summary(contenders, sizes, lengths, device)
    return results.of_model(
        "step", config, device, dtype, sizes, rows, missing + failed,
        real_tokens=contenders[0].real_tokens,
        padded_tokens=config.batch_size * config.max_seq_length,
        lengths=lengths.tolist(),
    )  # fmt: skip


def asked(config: StepBenchConfig, result: dict[str, Any]) -> str:
    """The settings that matter, in words."""
    share = result["real_tokens"] / result["padded_tokens"]
    return (
        f"{config.model}, {config.batch_size} sequences of at most {config.max_seq_length}, "
        f"{result['real_tokens']} real tokens ({share:.0%} of the padded)"
    )
