"""`fastbert serve` under load, beside the same service with Hugging Face's batches: `bench serve`.

Clients ask over HTTP, each its next text once it has its answer, and every contender is a process
of its own (see `services`). A text is classified; its length is drawn, 5 to 256 tokens. Contenders
take turns, round by round, while the others rest; clients are on the same machine, and take of its
cores what they need. `transformers` is a call of tokenizer and model without any service, one text
after another: what a single client should not have to wait longer than. Before anything is timed,
all must give the same probabilities.

Random weights and made-up words: what a model says changes no time.
"""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbert.config import ModelConfig, model_config
from fastbert.errors import RunError
from fastbert.finetune.needs import needs
from fastbert.progress import progress_bar
from fastbert.serve.config import LIBRARIES
from fastbert.train.device import check_weights, fast_bf16, keep_freed_memory
from fastbert_bench.config import ServeBenchConfig, integers
from fastbert_bench.measure import result as results
from fastbert_bench.measure.load import Load, ask_once, post, run_clients
from fastbert_bench.measure.result import Row
from fastbert_bench.measure.timing import in_turn
from fastbert_bench.suites.services import SERVICES, service

CPU = torch.device("cpu")
SHORTEST, LONGEST, MEDIAN, SPREAD = 5, 256, 32, 0.9
"""Tokens of a text: as requests of people are, most of them short; log-normal."""
TEXTS = 997
CALL = "transformers"
TOLERANCE = {"fastbert-bf16": 0.02}
"""Of a probability; 1e-4 in fp32."""
_CHECKED = 24


def text_lengths(kind: str, most: int, rng: np.random.Generator) -> np.ndarray:
    """(TEXTS,) tokens of texts, special ones included.

    Args:
        kind: "short", log-normal around 32; "even", each length as likely as another.
        most: that the model takes.
        rng: draws.
    """
    longest = min(LONGEST, most)
    if kind == "even":
        return rng.integers(SHORTEST, longest + 1, TEXTS)
    drawn = np.exp(rng.normal(np.log(MEDIAN), SPREAD, TEXTS))
    return np.clip(np.rint(drawn), SHORTEST, longest).astype(np.int64)


def save_model(folder: Path, sizes: ModelConfig, seed: int) -> list[str]:
    """A classifier with random weights, and its tokenizer; returns words of one token each."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    words = [f"w{index}" for index in range(sizes.vocab_size - len(special))]
    torch.manual_seed(seed)
    config: Any = BertConfig(**asdict(sizes))
    config.num_labels = 2
    model = BertForSequenceClassification(config)
    model.save_pretrained(folder)
    ids = {word: index for index, word in enumerate((*special, *words))}
    tokenizer = BertTokenizer(vocab=ids, model_max_length=sizes.max_position_embeddings)
    tokenizer.save_pretrained(folder)
    return words


@dataclass
class Contender:
    """One way to get answers, and what was met in each round, by the number of clients."""

    name: str
    clients: tuple[int, ...]
    load: Callable[[int], Load]
    probabilities: Callable[[str], float]
    loads: dict[int, list[Load]] = field(default_factory=dict)


def of_service(
    name: str, address: tuple[str, int], texts: Sequence[str], config: ServeBenchConfig
) -> Contender:
    """A service at an address."""
    requests = [post("/predict", json.dumps({"inputs": text}).encode()) for text in texts]

    def probability(text: str) -> float:
        answer = ask_once(address, post("/predict", json.dumps({"inputs": text}).encode()))
        return float(answer["predictions"][0]["probabilities"]["LABEL_0"])

    return Contender(
        name,
        tuple(integers("clients", config.clients, 1, 10_000)),
        lambda clients: run_clients(address, requests, clients, config.seconds),
        probability,
    )


@torch.inference_mode()
def of_call(model: Path, texts: Sequence[str], config: ServeBenchConfig) -> Contender:
    """transformers itself, in this process."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    network: Any = AutoModelForSequenceClassification.from_pretrained(model).eval()

    @torch.inference_mode()
    def probability(text: str) -> float:
        inputs = tokenizer(text, return_tensors="pt")
        return float(network(**inputs).logits.softmax(1)[0, 0])

    place = 0

    def load(clients: int) -> Load:
        nonlocal place
        latencies, began = [], time.perf_counter()
        while (asked := time.perf_counter()) < began + config.seconds:
            probability(texts[place % len(texts)])
            place += 1
            latencies.append(time.perf_counter() - asked)
        return Load(time.perf_counter() - began, np.array(latencies), len(latencies), 0)

    return Contender(CALL, (1,), load, probability)


def check_same(contenders: Sequence[Contender], texts: Sequence[str]) -> dict[str, float]:
    """The largest difference of a probability from the first contender's, by name.

    Raises:
        RunError: it is more than rounding leaves.
    """
    wanted = [contenders[0].probabilities(text) for text in texts]
    found = {}
    for other in contenders[1:]:
        gaps = [abs(other.probabilities(a) - b) for a, b in zip(texts, wanted, strict=True)]
        found[other.name] = float(np.max(gaps))
        if not found[other.name] <= TOLERANCE.get(other.name, 1e-4):
            raise RunError(
                f"not comparable: probabilities of {other.name} and {contenders[0].name} differ "
                f"by {found[other.name]:.2g}, which is more than rounding leaves"
            )
    return found


def measure(contenders: Sequence[Contender], rounds: int) -> None:
    """Fills in `loads`."""
    pairs = [(one, clients) for one in contenders for clients in one.clients]
    for one, clients in progress_bar(pairs, desc="warm-up", unit="contender"):
        if clients == one.clients[-1]:
            one.load(clients)
    pairs.sort(key=lambda pair: pair[1])
    for _, (one, clients) in in_turn(pairs, rounds):
        one.loads.setdefault(clients, []).append(one.load(clients))


def summary(contenders: Sequence[Contender], mean_tokens: float) -> list[Row]:
    """A row for each contender and number of clients, beside ours with as many."""
    ours = contenders[0]
    rows = []
    for clients in ours.clients:
        base = np.array([load.rate for load in ours.loads[clients]])
        for one in contenders:
            if clients not in one.loads:
                continue
            loads = one.loads[clients]
            rates = np.array([load.rate for load in loads])
            rate = float(np.median(rates))
            latencies = np.concatenate([load.latencies for load in loads])
            p50, p99 = 1e3 * np.quantile(latencies, (0.5, 0.99))
            rows.append(
                {
                    "name": f"{clients} client{'s' * (clients > 1)}, {one.name}",
                    "task": f"{clients} clients",
                    "contender": one.name,
                    "clients": clients,
                    "sequences_per_second": rate,
                    "real_tokens_per_second": rate * mean_tokens,
                    "rates_of_rounds": rates.tolist(),
                    "latency_ms_p50": float(p50),
                    "latency_ms_p99": float(p99),
                    "compared_with": ours.name,
                    "ratio": float(np.median(base / rates)),
                }
            )
    return rows


def run(config: ServeBenchConfig) -> dict[str, Any]:
    """Measures as `config` says and returns the result."""
    for module in LIBRARIES:
        needs(module)
    sizes = model_config(config.model)
    check_weights(config.model, sizes, CPU, 4)
    rng = np.random.default_rng(config.seed)
    lengths = text_lengths(config.texts, sizes.max_position_embeddings, rng)
    keep_freed_memory()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastbert-bench-")))
        words = save_model(folder, sizes, config.seed)
        texts = [" ".join(rng.choice(words, length - 2)) for length in lengths]
        contenders, missing = [], []
        for name in SERVICES:
            if name.endswith("bf16") and not fast_bf16(CPU):
                missing.append({"name": name, "why": "this CPU has no bf16"})
                continue
            address = stack.enter_context(service(name, str(folder)))
            contenders.append(of_service(name, address, texts, config))
        contenders.append(of_call(folder, texts, config))
        differences = check_same(contenders, texts[:_CHECKED])
        measure(contenders, config.rounds)
    rows = summary(contenders, float(lengths.mean()))
    settings = asdict(config)
    settings["model"] = config.name or config.model
    return results.make(
        "serve", settings, CPU, rows, missing,
        dtype="float32", model=asdict(sizes), mean_tokens=float(lengths.mean()),
        differences=differences,
    )  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The rows as text, one line each."""
    latency: results.Columns = {
        "p50 ms": lambda row: f"{row['latency_ms_p50']:.1f}",
        "p99 ms": lambda row: f"{row['latency_ms_p99']:.1f}",
    }
    remarks = "the first of as many clients is", lambda row: f"{row['ratio']:.2f}x as fast"
    return results.table(result, "a text", latency, remarks)


def asked(config: ServeBenchConfig, result: dict[str, Any]) -> str:
    """The settings that matter, in words."""
    fp32 = max(gap for name, gap in result["differences"].items() if not name.endswith("bf16"))
    return (
        f"{result['settings']['model']}, texts of {SHORTEST} to {LONGEST} tokens ({config.texts},"
        f" {result['mean_tokens']:.0f} on average), probabilities agree within {fp32:.1e}"
    )
