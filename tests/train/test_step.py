"""One optimizer step: accumulation changes nothing, and the losses lie on Hugging Face's."""

import dataclasses
import math

import pytest
import torch
from transformers import BertForPreTraining as HFPreTraining
from transformers import get_linear_schedule_with_warmup

from fastbert.config import ModelConfig, PretrainConfig
from fastbert.data.batch import Batch
from fastbert.hf.weights import save_folder, to_hf
from fastbert.model.bert import Bert
from fastbert.ops import REFERENCE, Ops, cpu_ops
from fastbert.train.step import TrainStep

V, S = 211, 24
SIZES = ModelConfig(
    V, 64, 2, 2, 128, max_position_embeddings=32, hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)  # fmt: skip


Sequence = tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]
"""ids, types, labels (-100 where nothing is predicted), next-sentence label."""


def sequences(lengths: list[int], generator: torch.Generator) -> list[Sequence]:
    def draw(high: int, size: int) -> torch.Tensor:
        return torch.randint(1, high, (size,), generator=generator)

    found = []
    for n in lengths:
        types = (torch.arange(n) >= n // 2).long()
        chosen = torch.rand(n, generator=generator) < 0.2
        labels = torch.where(chosen, draw(V, n) // 4, -100)
        found.append((draw(V, n), types, labels, int(draw(3, 1)) - 1))
    return found


def packed(rows: list[Sequence], T: int, N: int, M: int) -> Batch:
    """As the packer lays them: [PAD] in sequences of its own, empty slots at T."""
    ids, types, positions = (torch.zeros(T, dtype=torch.int64) for _ in range(3))
    cu = [0]
    masked, labels, next_sentence = [], [], []
    for row_ids, row_types, row_labels, follows in rows:
        start, n = cu[-1], len(row_ids)
        ids[start : start + n], types[start : start + n] = row_ids, row_types
        positions[start : start + n] = torch.arange(n)
        where = (row_labels != -100).nonzero().flatten()
        masked += (where + start).tolist()
        labels += row_labels[where].tolist()
        next_sentence.append(follows)
        cu.append(start + n)
    used = cu[-1]
    while cu[-1] < T:
        cu.append(min(cu[-1] + S, T))
        positions[cu[-2] : cu[-1]] = torch.arange(cu[-1] - cu[-2])
    assert len(cu) <= N + 1 and len(masked) <= M
    cu += [T] * (N + 1 - len(cu))
    spare = M - len(masked)
    return Batch(
        ids, types, positions, torch.tensor(cu, dtype=torch.int32),
        torch.tensor(masked + [0] * spare), torch.tensor(labels + [-100] * spare),
        torch.tensor(next_sentence + [-100] * (N - len(rows))), S, used, len(rows),
    )  # fmt: skip


def padded(rows: list[Sequence]) -> dict[str, torch.Tensor]:
    def pad(index: int, value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            [row[index] for row in rows],  # type: ignore[misc]
            batch_first=True,
            padding_value=value,
        )

    lengths = torch.tensor([len(row[0]) for row in rows])
    return {
        "input_ids": pad(0, 0),
        "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
        "token_type_ids": pad(1, 0),
        "labels": pad(2, -100),
        "next_sentence_label": torch.tensor([row[3] for row in rows]),
    }


def gradient(rows: list[list[Sequence]], T: int) -> tuple[dict[str, torch.Tensor], float]:
    torch.manual_seed(3)
    config = PretrainConfig(max_grad_norm=0.0, learning_rate=1e-3)
    step = TrainStep(Bert(SIZES), config, torch.float32)
    step([packed(part, T, 12, 80) for part in rows])
    return {n: g.clone() for n, g in step.flat.views(step.flat.grad).items()}, step.read().loss


def test_accumulation_changes_nothing_but_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = sequences([24, 3, 17, 9, 24, 1, 12, 20], generator)
    whole, loss = gradient([rows], 160)
    # Micro-batches of unequal token, mask and sequence counts: a mean of means would differ.
    parts, sum_of_losses = gradient([rows[:1], rows[1:3], rows[3:7], rows[7:]], 64)
    assert math.isclose(loss, sum_of_losses, rel_tol=1e-6)
    total = math.hypot(*(g.norm().item() for g in whole.values()))
    for name, wanted in whole.items():
        # A bias's gradient may be a small rest of large terms: 1% of the whole is its floor.
        scale = max(wanted.norm().item(), 0.01 * total)
        assert (parts[name] - wanted).norm() <= 1e-6 * scale, name


def test_gradients_are_those_of_hugging_face(tmp_path: object) -> None:
    torch.manual_seed(3)
    model = Bert(SIZES)
    theirs = _theirs(model, tmp_path)
    generator = torch.Generator().manual_seed(0)
    rows = sequences([24, 3, 17, 9, 1], generator)
    step = TrainStep(model, PretrainConfig(max_grad_norm=0.0, learning_rate=1e-3), torch.float32)
    step([packed(rows, 96, 8, 40)])
    want = theirs(**padded(rows)).loss
    want.backward()
    assert math.isclose(step.read().loss, want.item(), rel_tol=1e-6)
    ours = to_hf(step.flat.views(step.flat.grad), SIZES)
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        scale = parameter.grad.abs().max().clamp(min=1e-3)
        assert (ours[name] - parameter.grad).abs().max() < 1e-4 * scale, name


def _theirs(model: Bert, tmp_path: object) -> HFPreTraining:
    save_folder(f"{tmp_path}/hf", dict(model.named_parameters()), SIZES, "BertForPreTraining")
    return HFPreTraining.from_pretrained(f"{tmp_path}/hf").train()


def test_100_steps_lie_on_hugging_faces(tmp_path: object) -> None:
    torch.manual_seed(3)
    model = Bert(SIZES)
    theirs = _theirs(model, tmp_path)
    config = PretrainConfig(
        learning_rate=2e-3, max_steps=100, warmup_steps=10, lr_scheduler_type="linear"
    )
    step = TrainStep(model, config, torch.float32)
    matrices = [p for p in theirs.parameters() if p.dim() > 1]
    vectors = [p for p in theirs.parameters() if p.dim() < 2]
    rule = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )
    rates = get_linear_schedule_with_warmup(rule, config.warmup_steps, config.max_steps)
    generator = torch.Generator().manual_seed(5)
    differences, first, last, clipped = [], 0.0, 0.0, 0
    for _ in range(100):
        lengths = torch.randint(1, S + 1, (10,), generator=generator).tolist()
        rows = sequences(lengths, generator)
        step([packed(rows, 10 * S, 22, 100)])
        ours = step.read()
        want = theirs(**padded(rows)).loss
        want.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), config.max_grad_norm)
        clipped += bool(norm > config.max_grad_norm)
        rule.step()
        rates.step()
        rule.zero_grad()
        differences.append(abs(ours.loss - want.item()))
        first, last = first or ours.loss, ours.loss
    assert max(differences) < 1e-3
    assert clipped > 10 and last < first - 1  # both were at work, and both learnt


def trained(steps: int = 4, dtype: torch.dtype = torch.float32, **changes: object) -> TrainStep:
    """A model after some steps on the same batches, dropout on."""
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(0)
    names = ("gradient_checkpointing", "last_layer_masked_only", "ops")
    options = {k: changes.pop(k) for k in names if k in changes}
    dropout = changes.pop("dropout", 0.1)
    sizes = dataclasses.replace(
        SIZES, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
    )
    settings = {"learning_rate": 1e-3, "warmup_steps": 0, "max_steps": 50, **changes}
    step = TrainStep(Bert(sizes, **options), PretrainConfig(**settings), dtype)  # type: ignore
    for _ in range(steps):
        step([packed(sequences([24, 3, 17, 9], generator), 72, 8, 40)])
    return step


def test_gradient_checkpointing_changes_no_bit() -> None:
    plain, again = trained(), trained(gradient_checkpointing=True)
    assert torch.equal(plain.flat.master, again.flat.master)
    assert plain.read() == again.read()


@pytest.mark.parametrize("ops", [REFERENCE, cpu_ops(False)], ids=["reference", "cpu"])
def test_the_last_layers_saving_is_exact(ops: Ops) -> None:
    """Dropout's bits belong to tokens, whichever of them are there."""
    saved, whole = (
        trained(steps=1, last_layer_masked_only=only, ops=ops) for only in (True, False)
    )
    assert math.isclose(saved.read().loss, whole.read().loss, rel_tol=1e-6)
    scale = whole.flat.grad.abs().max()
    assert (saved.flat.grad - whole.flat.grad).abs().max() < 1e-6 * scale
    # A run goes on with either from where the other has brought it.
    with torch.no_grad():
        whole.flat.master.copy_(saved.flat.master)
    losses = []
    for step in (saved, whole):
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            step([packed(sequences([24, 3, 17, 9], generator), 72, 8, 40)])
            losses.append(step.read().loss)
    for a, b in zip(losses[:3], losses[3:], strict=True):
        assert math.isclose(a, b, rel_tol=1e-5)


def test_compiled_layers_give_the_same_losses() -> None:
    """torch.compile's tracing; what its code generator makes of it is checked on a GPU."""
    plain = trained(steps=0, dropout=0.0)
    traced = trained(steps=0, dropout=0.0)
    traced = TrainStep(traced.model, traced.config, main_grads=False)
    for layer in traced.model.layers:
        layer.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        batch = packed(sequences([24, 3, 17, 9], generator), 72, 8, 40)
        plain([batch])
        traced([batch])
        assert math.isclose(plain.read().loss, traced.read().loss, rel_tol=1e-6)


def test_weight_gradients_need_no_tensor_of_their_own() -> None:
    """Products add to the flat buffer: autograd leaves `.grad` to vectors and small tables only."""
    step = trained(steps=0)
    left: set[str] = set()
    collect = step.flat.collect_gradients

    def spy() -> None:
        left.update(n for n, p in step.model.named_parameters() if p.grad is not None)
        collect()

    step.flat.collect_gradients = spy  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(0)
    step([packed(sequences([24, 3, 17, 9], generator), 72, 8, 40)])
    assert not {n for n in left if n.endswith(("qkv.weight", "out.weight", "down.weight"))}
    assert "layers.0.qkv.bias" in left
    assert not any(p.grad is not None for p in step.model.parameters())


@pytest.mark.parametrize("gradients", ["fp32", "bf16"])
def test_gradients_in_bf16_by_setting(gradients: str) -> None:
    step = trained(gradient_precision=gradients)
    assert step.flat.grad.dtype == (torch.bfloat16 if gradients == "bf16" else torch.float32)
    assert step.read().updates == 4
    difference = (step.flat.master - trained().flat.master).abs().max()
    assert difference == 0 if gradients == "fp32" else 0 < difference < 5e-3


class TestLossThatIsNotFinite:
    def test_it_never_reaches_the_weights(self) -> None:
        step = trained()
        before = step.flat.master.clone()
        accumulate = step.accumulate

        def infinite(batch: Batch) -> None:
            accumulate(batch)
            step._loss += math.inf  # with a gradient that is finite

        step.accumulate = infinite  # type: ignore[method-assign]
        generator = torch.Generator().manual_seed(0)
        for streak in (1, 2, 3):
            step([packed(sequences([24, 3, 17, 9], generator), 72, 8, 40)])
            metrics = step.read()
            assert (metrics.skipped, metrics.streak, metrics.updates) == (streak, streak, 4)
        assert torch.equal(step.flat.master, before)
        step.accumulate = accumulate  # type: ignore[method-assign]
        step([packed(sequences([24, 3, 17, 9], generator), 72, 8, 40)])
        metrics = step.read()
        assert (metrics.updates, metrics.streak, metrics.loss_steps) == (5, 3, 5)
        step.clear_window()
        assert step.read().streak == 0


class TestFp16:
    def test_overflow_halves_the_scale_and_is_no_failure(self) -> None:
        step = trained(steps=0, dtype=torch.float16)
        step._scale.fill_(2.0**40)
        generator = torch.Generator().manual_seed(0)
        scales = []
        for _ in range(40):
            step([packed(sequences([24, 3, 17, 9], generator), 72, 8, 40)])
            scales.append(step.read().loss_scale)
        metrics = step.read()
        assert metrics.skipped > 10 and metrics.updates == 40 - metrics.skipped > 5
        assert metrics.streak == 0  # it was the scale's fault
        assert scales[0] == 2.0**39 and scales[-1] < 2.0**31
        assert step.flat.master.isfinite().all()

    def test_it_grows_after_2000_good_steps(self) -> None:
        step = trained(steps=1, dtype=torch.float16)
        scale = step.read().loss_scale
        step._good_steps.fill_(1999)
        generator = torch.Generator().manual_seed(0)
        step([packed(sequences([24, 3, 17, 9], generator), 72, 8, 40)])
        assert step.read().loss_scale == 2 * scale

    def test_it_learns_as_fp32_does(self) -> None:
        ours, theirs = trained(steps=8, dtype=torch.float16), trained(steps=8)
        assert ours.read().loss == pytest.approx(theirs.read().loss, rel=5e-3)


def test_no_pass_adds_gradients_between_two_layers() -> None:
    """A layer's input feeds a product and a residual: the product adds their gradients."""
    step = trained(steps=1)
    generator = torch.Generator().manual_seed(1)
    batch = packed(sequences([24, 3, 17, 9], generator), 72, 8, 40)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        step([batch])
    added, products = [], 0
    for event in profile.events():
        above = event.cpu_parent
        while above is not None and "evaluate_function" not in above.name:
            above = above.cpu_parent
        if above is not None:  # in the backward
            products += event.name == "aten::addmm" and [72, 64] in event.input_shapes[:1]
            if event.name in ("aten::add", "aten::add_") and [72, 64] in event.input_shapes:
                added.append(above.name)
    assert added == []
    assert products == 2  # qkv and up; the last layer has fewer rows
