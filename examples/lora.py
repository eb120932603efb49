"""Train LoRA adapters (PEFT) of a classifier: one line makes it fast, before PEFT or after it.

python examples/lora.py [FOLDER]: of a BERT and its tokenizer; without one, a tiny model.
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
)

import fastbert

TEXTS = ["a good film", "bad", "good , and short", "a bad film : much too long and too loud"]

if sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
else:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(" ".join(TEXTS).split()))]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertForSequenceClassification(
        BertConfig(vocab_size=len(words), intermediate_size=128, **sizes)
    )

model = get_peft_model(model, LoraConfig("SEQ_CLS", r=8, target_modules="all-linear"))
fastbert.accelerate(model)  # the line

batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
labels = torch.tensor([int("good" in text) for text in TEXTS])
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
for step in range(20):
    loss = model(**batch, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.3f}")

merged = model.merge_and_unload()  # a plain model again, still fast
print(type(merged), merged.eval()(**batch).logits.argmax(1).tolist())
