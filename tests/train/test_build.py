"""`fastbert.make_step`: the step of a run for a loop of one's own."""

import copy
import dataclasses
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import fastbert
from fastbert.config import ModelConfig
from fastbert.data.batch import Batch
from fastbert.errors import RunError, UserError
from fastbert.train import build, graph
from fastbert.train.device import Execution, choose_execution
from fastbert.train.phases import dropout_in_use
from fastbert.train.step import TrainStep

V, CLS, SEP = 120, 2, 3
SIZES = ModelConfig(V, 32, 2, 2, 64, max_position_embeddings=16)
RECIPE: dict[str, Any] = {
    "max_seq_length": 16, "tokens_per_batch": 64, "max_steps": 6, "warmup_steps": 2,
    "learning_rate": 1e-2, "device": "cpu", "precision": "fp32",
}  # fmt: skip


def recipe(**changes: Any) -> fastbert.PretrainConfig:
    return fastbert.PretrainConfig(**RECIPE | changes)


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "input_ids": [CLS, *torch.randint(5, V, (n,), generator=generator).tolist(), SEP],
            "next_sentence_label": n % 2,
        }
        for n in [3, 14, 9, 5, 11, 7, 14, 2] * 6
    ]
    packed = fastbert.pack(
        rows, tokens_per_batch=64, max_seq_length=16, vocab_size=V, mask_token_id=4,
        special_token_ids=(1, CLS, SEP),
    )  # fmt: skip
    return list(packed)[:6]


def test_settings_are_copied_whole() -> None:
    config = recipe()
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert again == config


def test_it_learns_and_counts(batches: list[Batch]) -> None:
    step = fastbert.make_step(recipe(), SIZES)
    assert isinstance(step, TrainStep) and step.model.config == SIZES
    assert [note.partition(":")[0] for note in step.notes] == [
        *("device", "precision", "ops", "torch.compile", "step", "optimizer"),
    ]
    losses = []
    for _ in range(6):
        step(batches[:1])
        losses.append(step.read().loss)
    assert losses[-1] < losses[0] - 0.3
    assert (step.done, step.read().updates) == (6, 6)
    with pytest.raises(ValueError, match="max_steps = 6 steps are done: the schedule ends there"):
        step(batches[:1])


def test_it_chooses_what_a_run_chooses(batches: list[Batch]) -> None:
    config = recipe(hidden_dropout_prob=0.3, nsp=False)
    step = fastbert.make_step(config, SIZES)
    execution = choose_execution(config, SIZES)
    assert step.notes == execution.reasons and step.model.config == SIZES
    assert dropout_in_use(step.model) == (0.3, SIZES.attention_probs_dropout_prob)
    theirs = build.build_step(config, SIZES, execution)
    assert step.model.ops.name == theirs.model.ops.name and step.model.next_sentence is None
    for batch in batches[:2]:
        step([batch])
        theirs([batch])
    assert torch.equal(step.flat.master, theirs.flat.master)
    preset = fastbert.make_step(recipe(model="tiny", nsp=False))
    assert preset.model.config == fastbert.model_config("tiny")


def test_dropout_follows_its_schedule(batches: list[Batch]) -> None:
    step = fastbert.make_step(recipe(hidden_dropout_prob="0.3:0.5,0"), SIZES)
    state = step.state_dict()["counters"]
    found = []
    for _ in range(6):
        step(batches[:1])
        found.append(dropout_in_use(step.model)[0])
    assert found == [0.3, 0.3, 0.3, 0.0, 0.0, 0.0]
    assert step.model.config == SIZES
    step.load_state_dict({**step.state_dict(), "counters": state})
    step(batches[:1])
    assert dropout_in_use(step.model)[0] == 0.3


def test_a_recorded_step_is_checked_and_counted_too(
    batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a recorder that repeats the work itself, and no GPU."""

    class Recorder:
        def __init__(self, device: torch.device) -> None:
            self.recorded = 0

        def __call__(self, work: graph.Work) -> graph.Work:
            return work

        def forget(self) -> None:
            pass

        def run(self, work: graph.Work) -> None:
            work()

    def recorded(config: Any, model: Any) -> Execution:
        return dataclasses.replace(choose_execution(config, model), graph=True)

    eager = fastbert.make_step(recipe(gradient_accumulation_steps=2), SIZES)
    monkeypatch.setattr(graph, "CudaRecorder", Recorder)
    monkeypatch.setattr(build, "choose_execution", recorded)
    step = fastbert.make_step(recipe(gradient_accumulation_steps=2), SIZES)
    for first in (0, 2, 4, 0):
        eager(batches[first : first + 2])
        step(batches[first : first + 2])
    assert step.done == 4
    assert torch.allclose(step.flat.master, eager.flat.master, atol=1e-6)
    gone = weakref.ref(step)
    gc.disable()
    try:
        del step
        assert gone() is None, "its memory waits for the collector"
    finally:
        gc.enable()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_goes_on_from_its_state_bit_for_bit(batches: list[Batch], precision: str) -> None:
    one, other = (fastbert.make_step(recipe(precision=precision), SIZES) for _ in range(2))
    for batch in batches[:3]:
        one([batch])
    state = one.state_dict()
    copied = {part: {k: v.clone() for k, v in state[part].items()} for part in
              ("weights", "optimizer")}  # fmt: skip
    for batch in batches[3:]:
        one([batch])
    other.load_state_dict({**copied, "counters": state["counters"]})
    assert other.done == 3
    for batch in batches[3:]:
        other([batch])
    assert torch.equal(one.flat.master, other.flat.master)
    assert one.state_dict()["counters"] == other.state_dict()["counters"]


def test_weights_come_from_a_folder_and_go_to_one(batches: list[Batch], tmp_path: Path) -> None:
    import transformers

    wordpiece = fastbert.WordPiece.train(["the quick brown fox, again."], 100)
    step = fastbert.make_step(recipe(), SIZES)
    step(batches[:1])
    step(batches[1:2])
    fastbert.save_pretrained(step, tmp_path / "hf", wordpiece)
    theirs = transformers.AutoModelForPreTraining.from_pretrained(tmp_path / "hf")
    assert type(theirs).__name__ == "BertForPreTraining"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (len(tokenizer), tokenizer.model_max_length) == (wordpiece.vocab_size, 16)
    fastbert.save_pretrained(step.model, tmp_path / "again", tokenizer)
    assert (tmp_path / "again/tokenizer.json").exists()

    model = fastbert.load_pretrained(tmp_path / "hf")
    of_run = fastbert.load_pretrained(tmp_path)  # a run's folder holds hf/
    assert torch.equal(of_run.embeddings.word, model.embeddings.word)
    with pytest.raises(TypeError, match=r"a BertConfig is no ModelConfig: fastbert\.model_config"):
        fastbert.Bert(transformers.BertConfig())  # type: ignore[arg-type]
    copied = fastbert.make_step(recipe(), model)
    assert torch.equal(copied.flat.master, step.flat.master)
    mlm = fastbert.make_step(recipe(nsp=False), model)
    fastbert.save_pretrained(mlm, tmp_path / "mlm")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "mlm")
    assert torch.equal(theirs.bert.embeddings.word_embeddings.weight, model.embeddings.word)
    with pytest.raises(UserError, match=r"the model has no pooler.*: give one with it, or nsp ="):
        fastbert.make_step(recipe(), mlm.model)
    encoder = fastbert.Bert(SIZES, mlm=False, next_sentence=False)
    fastbert.save_pretrained(encoder, tmp_path / "encoder")
    transformers.AutoModel.from_pretrained(tmp_path / "encoder")
    again = fastbert.load_pretrained(tmp_path / "encoder")
    assert again.pooler is not None and again.mlm is None
    with pytest.raises(UserError, match="a str is neither a TrainStep nor a fastbert"):
        fastbert.save_pretrained("encoder", tmp_path / "no")  # type: ignore[arg-type]
    with pytest.raises(RunError, match="cannot write the model"):
        fastbert.save_pretrained(encoder, tmp_path / "mlm/config.json")


def test_what_the_model_cannot_take_is_told(batches: list[Batch]) -> None:
    batch = batches[0]
    step = fastbert.make_step(recipe(), SIZES)
    with pytest.raises(ValueError, match=r"2 micro-batches in a step: .* = 1 allows 1"):
        step(batches[:2])
    with pytest.raises(ValueError, match="0 micro-batches in a step"):
        step([])
    for wrong in (batch, None, [None], iter([batch])):
        with pytest.raises(TypeError, match=r"a step takes a list of fastbert\.Batch: step\(\["):
            step(wrong)  # type: ignore[arg-type]
    for copied in (copy.deepcopy, pickle.dumps):  # a copy's step would be the original's
        with pytest.raises(TypeError, match=r"neither copied nor pickled: take its state_dict\(\)"):
            copied(step)
    with pytest.raises(UserError, match=r"model must be sizes, as .* not 'tiny'"):
        fastbert.make_step(recipe(), "tiny")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"config must be a fastbert\.PretrainConfig"):
        fastbert.make_step({"max_steps": 2})  # type: ignore[arg-type]
    headless = fastbert.Bert(SIZES, mlm=False)
    with pytest.raises(UserError, match=r"has no mlm\.transform\.weight: give one with it$"):
        fastbert.make_step(recipe(nsp=False), headless)
    unlabelled = dataclasses.replace(
        batch, next_sentence_labels=torch.full_like(batch.next_sentence_labels, -100)
    )
    with pytest.raises(ValueError, match=r"no sequence has a next-sentence label: .* nsp = False"):
        step([unlabelled])
    small = ModelConfig(100, 32, 2, 2, 64, max_position_embeddings=16)
    with pytest.raises(ValueError, match=r"input_ids has 1\d\d: it must be 0 to 99 in"):
        fastbert.make_step(recipe(), small)([batch])
    for name, value in (
        *(("input_ids", -1), ("masked_labels", -5), ("next_sentence_labels", 2)),
        *(("masked_positions", len(batch.input_ids)), ("token_type_ids", 2), ("position_ids", 512)),
    ):
        changed = getattr(batch, name).clone()
        changed[0] = value
        with pytest.raises(ValueError, match=f"{name} has {value}: it must be 0 to "):
            step([dataclasses.replace(batch, **{name: changed})])
    with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to \d+, by max_seqlen = 1 "):
        step([dataclasses.replace(batch, max_seqlen=1)])
    short = ModelConfig(V, 32, 2, 2, 64, max_position_embeddings=8)
    with pytest.raises(ValueError, match="max_seqlen = 16 must be at most max_position_embeddings"):
        fastbert.make_step(recipe(), short)([batch])
    with pytest.raises(UserError, match="type_vocab_size = 1: sentence pairs need 2; or nsp"):
        fastbert.make_step(recipe(), ModelConfig(V, 32, 2, 2, 64, type_vocab_size=1))
    with pytest.raises(UserError, match="this torch sees no GPU"):
        fastbert.make_step(recipe(device="cuda:7"), SIZES) if not torch.cuda.is_available() else (
            pytest.skip("there is a GPU")
        )
    assert step.done == 0 and step.read().updates == 0
