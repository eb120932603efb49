"""What people put around a BERT: accelerate, PEFT, sentence-transformers, pipelines, DDP."""

import multiprocessing
from typing import Any

import accelerate as accelerate_library
import peft
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import BertTokenizer, pipeline

import fastbert

from .berts import (
    HEADS,
    assert_close,
    assert_same_training,
    batch,
    bert,
    config,
    gradients,
    loss_of,
    pair,
)

TEXTS = ["the cat sat", "one dog ran to town where rain fell and the cat sat on a mat", "rain"]
WORDS = sorted(set(" ".join(TEXTS).split()))


def fast(lines: list[str]) -> bool:
    return any("no padding is computed" in line for line in lines) and not any(
        "own path" in line for line in lines
    )


# accelerate


@pytest.mark.parametrize("first", [True, False], ids=["line-first", "prepare-first"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_prepared_by_accelerate(first, precision, said):
    theirs, ours = bert("BertForMaskedLM"), bert("BertForMaskedLM")
    found = []
    for model in (theirs, ours):
        if model is ours and first:
            fastbert.accelerate(model)
        accelerate_library.state.AcceleratorState._reset_state(True)
        accelerator = accelerate_library.Accelerator(cpu=True, mixed_precision=precision)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        if model is ours and not first:
            fastbert.accelerate(prepared)
        loss = prepared(**batch("BertForMaskedLM")).loss
        accelerator.backward(loss)
        optimizer.step()
        found.append((loss.detach(), gradients(model)))
    tolerance = 1e-4 if precision == "no" else 0.1
    torch.testing.assert_close(found[1][0], found[0][0], rtol=tolerance, atol=tolerance)
    assert_close(found[0][1], found[1][1], tolerance=tolerance)
    assert fast(said)


def test_a_forward_that_was_replaced_stays(said):
    accelerate_library.state.AcceleratorState._reset_state(True)
    accelerator = accelerate_library.Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(bert("BertForMaskedLM"))
    fastbert.accelerate(model)
    assert model(**batch("BertForMaskedLM")).logits is not None
    assert "BertForMaskedLM: its forward was replaced: it stays transformers' own" in said
    with pytest.raises(ValueError, match="forward of BertModel was replaced"):
        fastbert.accelerate(accelerator.prepare(bert("BertModel")))
    model = accelerator.prepare(fastbert.accelerate(bert("BertForMaskedLM")))
    assert model(**batch("BertForMaskedLM")).logits is None
    assert fastbert.decelerate(model)(**batch("BertForMaskedLM")).loss.isfinite()


@pytest.mark.parametrize("first", [True, False], ids=["line-first", "hooks-first"])
@pytest.mark.parametrize("how", ["offload", "dispatch"])
def test_hooks_of_accelerate(first, how, said):
    theirs, ours = (model.eval() for model in (bert("BertForMaskedLM"), bert("BertForMaskedLM")))
    if first:
        fastbert.accelerate(ours)
    if how == "offload":
        accelerate_library.cpu_offload(ours, torch.device("cpu"))
    else:
        for module in list(ours.modules()):
            hook = accelerate_library.hooks.AlignDevicesHook("cpu", io_same_device=True)
            accelerate_library.hooks.add_hook_to_module(module, hook)
    if not first:
        fastbert.accelerate(ours)
    given = batch("BertForMaskedLM")
    real = given["attention_mask"].bool()
    with torch.no_grad():
        a, b = theirs(**given), ours(**given)
    torch.testing.assert_close(b.logits[real], a.logits[real], atol=1e-5, rtol=0)
    torch.testing.assert_close(b.loss, a.loss)
    assert fast(said)
    torch.testing.assert_close(fastbert.decelerate(ours)(**given).loss, a.loss)
    accelerate_library.hooks.remove_hook_from_submodules(ours)
    torch.testing.assert_close(ours(**given).loss, a.loss)


def test_empty_weights_and_device_maps(tmp_path, said):
    theirs = bert("BertForMaskedLM").eval()
    theirs.save_pretrained(tmp_path)
    with accelerate_library.init_empty_weights():
        empty = fastbert.accelerate(transformers.BertForMaskedLM(config()))
    assert empty.cls.predictions.bias.is_meta
    empty.tie_weights()
    filled = accelerate_library.load_checkpoint_and_dispatch(
        empty, str(tmp_path / "model.safetensors"), device_map={"": "cpu"}
    )
    mapped = fastbert.BertForMaskedLM.from_pretrained(tmp_path, device_map="cpu")
    late = fastbert.accelerate(
        transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, device_map="cpu")
    )
    given = batch("BertForMaskedLM")
    want = theirs(**given).loss
    for model in (filled, mapped, late):
        torch.testing.assert_close(model.eval()(**given).loss, want)
    assert fast(said)


# PEFT


@pytest.mark.parametrize("targets", [["query", "value"], "all-linear"], ids=["some", "all"])
@pytest.mark.parametrize("first", [True, False], ids=["line-first", "lora-first"])
def test_lora(tmp_path, targets, first, said):
    def made(line: bool) -> Any:
        model = bert("BertForSequenceClassification")
        if line and first:
            fastbert.accelerate(model)
        torch.manual_seed(9)
        wrapped = peft.get_peft_model(
            model,
            peft.LoraConfig("SEQ_CLS", r=4, target_modules=targets, init_lora_weights=False),
        )
        return fastbert.accelerate(wrapped) if line and not first else wrapped

    theirs, ours = made(False), made(True)
    given = batch("BertForSequenceClassification")
    assert_same_training(theirs, ours, given)
    assert all("lora" in name or "classifier" in name for name in gradients(ours))
    assert fast(said)
    want = theirs.eval()(**given).logits
    ours.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(
        fastbert.accelerate(bert("BertForSequenceClassification")), tmp_path
    ).eval()
    merged = ours.eval().merge_and_unload()
    for model in (ours, loaded, merged):
        torch.testing.assert_close(model(**given).logits, want, atol=1e-5, rtol=1e-5)
    assert type(merged) is fastbert.BertForSequenceClassification


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_prompts_and_prefixes(kind, said):
    def made(line: bool) -> Any:
        model = bert("BertForSequenceClassification")
        torch.manual_seed(9)
        wrapped = peft.get_peft_model(
            fastbert.accelerate(model) if line else model,
            getattr(peft, kind)(task_type="SEQ_CLS", num_virtual_tokens=3),
        )
        return wrapped

    assert_same_training(made(False), made(True), batch("BertForSequenceClassification"))
    assert fast(said) == (kind == "PromptTuningConfig")
    if kind == "PrefixTuningConfig":
        assert "own path: past_key_values" in " ".join(said)


# What reads text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A masked-word model's folder, with a tokenizer of whole words."""
    path = tmp_path_factory.mktemp("model")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}).save_pretrained(path)
    bert("BertForMaskedLM").save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("task", "head", "given"),
    [
        ("fill-mask", "BertForMaskedLM", [f"{text} [MASK]" for text in TEXTS]),
        ("text-classification", "BertForSequenceClassification", TEXTS),
        ("ner", "BertForTokenClassification", TEXTS),
        ("feature-extraction", "BertModel", TEXTS),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pipelines(folder, task, head, given):
    tokenizer = BertTokenizer.from_pretrained(folder)
    found = []
    for model in pair(head):
        run = pipeline(task, model=model.eval(), tokenizer=tokenizer, device="cpu")
        found.append(run(given, batch_size=1 if task == "feature-extraction" else 3))
    flat = [_numbers(one) for one in found]
    assert flat[0]
    assert flat[1] == pytest.approx(flat[0], abs=1e-5)


def _numbers(nested: Any) -> list[float]:
    if isinstance(nested, dict):
        nested = list(nested.values())
    if isinstance(nested, list | tuple):
        return [x for one in nested for x in _numbers(one)]
    return [] if isinstance(nested, str) else [float(nested)]


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_sentence_transformers(folder, pooling, said):
    found = []
    for line in (False, True):
        words = Transformer(str(folder))
        model = SentenceTransformer(
            modules=[words, Pooling(words.get_word_embedding_dimension(), pooling_mode=pooling)],
            device="cpu",
        )
        if line:
            assert fastbert.accelerate(model) is model
        found.append(model.encode(TEXTS, show_progress_bar=False, convert_to_tensor=True))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=0)
    assert fast(said)


# Two processes


def _in_one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    found = {}
    for head in HEADS:
        model = fastbert.accelerate(bert(head))
        parallel = DistributedDataParallel(model)
        loss_of(parallel, _half(head, rank)).backward()
        found[head] = gradients(model)
    model = fastbert.accelerate(bert("BertForMaskedLM"))
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss_of(model, _half("BertForMaskedLM", rank)).backward()
    found["sharded"] = {name: grad.full_tensor() for name, grad in gradients(model).items()}
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _half(head: str, rank: int) -> dict[str, torch.Tensor]:
    return {name: x[2 * rank : 2 * rank + 2] for name, x in batch(head).items()}


def test_two_processes_have_the_gradients_of_one(tmp_path):
    """Their mean, by DDP and FSDP2; `find_unused_parameters` is not needed for any head."""
    # A fork has imported everything already; autograd forbids it only where there is a GPU.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    both = [context.Process(target=_in_one_of_two, args=(i, str(tmp_path))) for i in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in range(2))
    for head in HEADS:
        assert first[head].keys() == second[head].keys()
        model = bert(head)
        ((loss_of(model, _half(head, 0)) + loss_of(model, _half(head, 1))) / 2).backward()
        assert_close(gradients(model), first[head])
        for name, gradient in second[head].items():
            assert torch.equal(gradient, first[head][name])
    assert_close(first["BertForMaskedLM"], first["sharded"])
