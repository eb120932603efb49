"""transformers' models after our line: the stage `dropin` of `python -m fastbert_bench.gpu`.

Each head beside transformers' own, same weights, dropout off, fp32: losses and every gradient, with
padding right, left and whole; then bf16 autocast as Trainer has it, dropout, layers computed twice,
and a training loop, in which the time of a step stands beside Hugging Face SDPA's. Each check is a
row {"check", "ok", numbers}, on disk as soon as known.

B sequences padded to S.
"""

import copy
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastbert_bench.gpu import part
from fastbert_bench.kernels.checks import Row
from fastbert_bench.measure import result as results

HEADS = ("BertForPreTraining", "BertForMaskedLM", "BertForSequenceClassification")
SEED = 7
# Relative errors, in the Euclidean norm. Sums in fp32 in another order; bf16 rounds by 2^-9 some
# twenty times in a row.
ALLOWED_FP32, ALLOWED_BF16 = 1e-4, 0.05
ROUNDS, WANTED = 5, 2.0


def masks(B: int, S: int) -> dict[str, Tensor]:
    """(B, S) of each kind: padding right, left, and a sequence that is nothing else."""
    lengths = torch.linspace(S, 3, B).long()
    right = (torch.arange(S) < lengths[:, None]).long()
    left = right.flip(1)
    empty = left.clone()
    empty[1] = 0
    return {"right": right, "left, one all padding": empty}


def batch_of(head: str, mask: Tensor, vocab_size: int) -> dict[str, Tensor]:
    """Random tokens and labels."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(5, vocab_size, mask.shape, generator=generator)
    chosen = (torch.rand(mask.shape, generator=generator) < 0.15) & (mask != 0)
    words = torch.where(chosen, ids, -100)
    pairs = torch.arange(len(mask)) % 2
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    if head == "BertForPreTraining":
        return batch | {"labels": words, "next_sentence_label": pairs}
    return batch | {"labels": words if head == "BertForMaskedLM" else pairs}


def models(head: str, device: torch.device, **changes: Any) -> tuple[Any, Any]:
    """transformers' model and the same after our line."""
    import transformers

    from fastbert.hf.accelerate import accelerate

    small: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2,
        "intermediate_size": 128,
    }  # fmt: skip
    sizes = {"num_hidden_layers": 2} if device.type == "cuda" else small
    torch.manual_seed(SEED)
    config = transformers.BertConfig(**(sizes | changes))
    theirs = getattr(transformers, head)(config).to(device).train()
    return theirs, accelerate(copy.deepcopy(theirs))


def _gradients(model: Any, batch: Mapping[str, Tensor], autocast: bool) -> tuple[float, Tensor]:
    """The loss, and all gradients in one row."""
    model.zero_grad()
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        loss = model(**batch).loss
    loss.backward()
    found = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    return float(loss.detach()), torch.cat(found)


def _close(
    check: str, found: tuple[float, Tensor], exact: tuple[float, Tensor], allowed: float
) -> Row:
    error = float((found[1] - exact[1]).norm() / exact[1].norm())
    off = abs(found[0] - exact[0]) / abs(exact[0])
    ok = found[1].shape == exact[1].shape and error <= allowed and off <= allowed
    return {"check": check, "ok": ok, "error": error, "loss_error": off, "allowed": allowed}


def checks(device: torch.device) -> Iterator[Row]:
    """Each head and mask in fp32; bf16, dropout and checkpoints once."""
    B, S = (8, 512) if device.type == "cuda" else (4, 16)
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    for head in HEADS:
        theirs, ours = models(head, device, **none)
        vocab_size = theirs.config.vocab_size
        for name, mask in masks(B, S).items():
            batch = {k: v.to(device) for k, v in batch_of(head, mask, vocab_size).items()}
            exact = _gradients(theirs, batch, False)
            yield _close(f"{head}, {name}, fp32", _gradients(ours, batch, False), exact,
                         ALLOWED_FP32)  # fmt: skip
            if name == "right":
                yield _close(f"{head}, bf16 autocast", _gradients(ours, batch, True), exact,
                             ALLOWED_BF16)  # fmt: skip
    _, ours = models(HEADS[1], device)
    batch = {k: v.to(device) for k, v in batch_of(HEADS[1], masks(B, S)["right"], 97).items()}
    drawn = []
    for seed, again in ((1, False), (1, True), (2, False)):
        for layer in ours.bert.encoder.layer:
            layer.gradient_checkpointing = again
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        torch.manual_seed(seed)
        drawn.append(_gradients(ours, batch, True))
    (one, of_one), (two, of_two), (three, _) = drawn
    yield {"check": "dropout is drawn from torch's seed", "ok": one == two != three}
    yield {
        "check": "layers computed twice draw the same dropout",
        "ok": torch.equal(of_one, of_two),
    }


def loop(device: torch.device) -> dict[str, Any]:
    """Seconds of a step of masked words as Trainer makes it, in turn: theirs, and after our line.

    bf16 autocast, dropout, clipping, torch's fused AdamW; base size at natural lengths on a GPU.
    """
    import numpy as np

    from fastbert_bench.measure.lengths import natural_lengths

    cuda = device.type == "cuda"
    B, S = (32, 512) if cuda else (4, 16)
    lengths = torch.from_numpy(natural_lengths(B, S, np.random.default_rng(SEED)))
    mask = (torch.arange(S) < lengths[:, None]).long()
    changes = {"num_hidden_layers": 12} if cuda else {}
    pair = models(HEADS[1], device, **changes)
    batch = batch_of(HEADS[1], mask, pair[0].config.vocab_size)
    batch = {name: value.to(device) for name, value in batch.items()}
    rules = [torch.optim.AdamW(model.parameters(), 1e-5, fused=True) for model in pair]

    def step(index: int) -> float:
        model, rule = pair[index], rules[index]
        begun = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rule.step()
        rule.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    steps = 4 if cuda else 1
    rounds: list[list[float]] = [[], []]
    for index in (0, 1):
        step(index)
        step(index)
    for _ in range(ROUNDS):
        for index in (0, 1):
            rounds[index].append(sum(step(index) for _ in range(steps)) / steps)
    ratio = float(np.median(np.divide(rounds[0], rounds[1])))
    theirs, ours = (float(np.median(one)) * 1e3 for one in rounds)
    return {
        "sequences": B, "longest": S, "real_tokens": int(lengths.sum()), "hf_sdpa_ms": theirs,
        "ms": ours, "ratio": ratio, "wanted": WANTED,
    }  # fmt: skip


def measure(device: torch.device) -> Iterator[dict[str, Any]]:
    """What is known, again and again as more is found."""
    found: dict[str, Any] = {
        "stage": "dropin", "conditions": results.conditions(device), "checks": []
    }  # fmt: skip
    for row in checks(device):
        found["checks"].append(row)
        yield found
    part.free(device)
    yield found | {"loop": loop(device)}


def table(found: Mapping[str, Any]) -> list[str]:
    """Two lines, and one for each failure."""
    line, failures = part.verdict("dropin", found["checks"])
    lines = [line]
    if told := found.get("loop"):
        lines.append(
            f"  masked words, {told['sequences']} sequences of at most {told['longest']}, "
            f"{told['real_tokens']} real tokens: hf-sdpa {told['hf_sdpa_ms']:.1f} ms, after "
            f"fastbert.accelerate {told['ms']:.1f} ms: {told['ratio']:.2f}x ({told['wanted']:g})"
        )
    return [*lines, *failures]


def main(argv: Sequence[str] | None = None) -> int:
    args = part.parser("dropin").parse_args(argv)
    return part.checked(measure(part.device_of(args)), args.out)


if __name__ == "__main__":
    sys.exit(main())
