"""Train masked words in a loop of one's own: one line makes it fast.

python examples/loop.py [FOLDER]: of a BERT and its tokenizer; without one, a tiny model.
"""

import sys

import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    DataCollatorForLanguageModeling,
)

import fastbert

TEXTS = ["one two three", "two three four five six seven eight", "three four", "nine ten"] * 8

if sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    model = AutoModelForMaskedLM.from_pretrained(sys.argv[1])
else:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(" ".join(TEXTS).split()))]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertForMaskedLM(BertConfig(vocab_size=len(words), intermediate_size=128, **sizes))

fastbert.accelerate(model)  # the line

device = "cuda" if torch.cuda.is_available() else "cpu"
model.to(device).train()
loader = torch.utils.data.DataLoader(
    [tokenizer(text) for text in TEXTS],
    batch_size=16,
    shuffle=True,
    collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for epoch in range(10):
    for batch in loader:
        loss = model(**batch.to(device)).loss  # logits are None: only labelled words are scored
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
