"""Sentence embeddings by sentence-transformers: one line makes them fast.

python examples/embeddings.py [FOLDER]: of such a model; without one, a tiny one.
"""

import sys
import tempfile

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertModel, BertTokenizer

import fastbert

TEXTS = ["the cat sat", "the cat sat on a mat", "rain fell all day in the town where we live"]


def tiny() -> SentenceTransformer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(" ".join(TEXTS).split()))]
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    with tempfile.TemporaryDirectory() as folder:
        BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
        config = BertConfig(vocab_size=len(words), intermediate_size=128, **sizes)
        BertModel(config).save_pretrained(folder)
        words_of = Transformer(folder)
    return SentenceTransformer(modules=[words_of, Pooling(64, pooling_mode="mean")])


model = SentenceTransformer(sys.argv[1]) if sys.argv[1:] else tiny()

fastbert.accelerate(model)  # the line

embeddings = model.encode(TEXTS, show_progress_bar=False)
print(model.similarity(embeddings, embeddings))
