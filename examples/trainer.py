"""Fine-tune a classifier with transformers' Trainer: one line makes it fast.

python examples/trainer.py [FOLDER]: of a BERT and its tokenizer; without one, a tiny model.
"""

import sys

from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    Trainer,
    TrainingArguments,
)

import fastbert

TEXTS = ["a good film", "bad", "good , and short", "a bad film : much too long and too loud"] * 8

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

fastbert.accelerate(model)  # the line

rows = [{**tokenizer(text), "label": int("good" in text)} for text in TEXTS]
settings = {"learning_rate": 5e-4, "num_train_epochs": 5, "logging_steps": 4, "report_to": []}
trainer = Trainer(
    model,
    TrainingArguments("runs/example", save_strategy="no", **settings),
    train_dataset=rows,
    eval_dataset=rows,
    processing_class=tokenizer,
)
trainer.train()
print(trainer.evaluate())
