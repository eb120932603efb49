"""Tiny models of every kind, and a service that answers for one on a port of its own."""

import http.client
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from fastbert.serve.app import Service
from fastbert.serve.config import ServeConfig
from fastbert.serve.models import load
from fastbert.serve.server import Server

TEXT = "the cat sat on a mat while Ada Lovelace wrote to her friend in London about engines"
WORDS = TEXT.split()
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *dict.fromkeys(word.lower() for word in WORDS if len(word) > 1),
    *LETTERS,
    *(f"##{letter}" for letter in LETTERS),
    *".,!?()",
]
TAGS = ["O", "B-person", "I-person", "B-place", "I-place"]


def names(labels: Sequence[str]) -> dict[str, Any]:
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {name: number for number, name in enumerate(labels)},
    }


HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "classify": ("ForSequenceClassification", names(["bad", "fair", "good"])),
    "several": (
        "ForSequenceClassification",
        names(["a", "b", "c"]) | {"problem_type": "multi_label_classification"},
    ),
    "score": ("ForSequenceClassification", {"num_labels": 1}),
    "tag": ("ForTokenClassification", names(TAGS)),
    "answer": ("ForQuestionAnswering", {}),
    "choose": ("ForMultipleChoice", {}),
    "embed": ("Model", {}),
    "masked": ("ForMaskedLM", {}),
    "pretrained": ("ForPreTraining", {}),
}


def saved(folder: Path, kind: str, *, positions: int = 64, layers: int = 2) -> str:
    """The folder of a random model of a kind; the same is made only once."""
    where = folder / f"{kind}-{positions}-{layers}"
    if where.exists():
        return str(where)
    head, changes = HEADS[kind]
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=layers,
        num_attention_heads=2, intermediate_size=64, max_position_embeddings=positions, **changes,
    )  # fmt: skip
    model = getattr(transformers, f"Bert{head}")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(where)
    ids = {word: index for index, word in enumerate(VOCABULARY)}
    transformers.BertTokenizer(vocab=ids, model_max_length=positions).save_pretrained(where)
    return str(where)


class Running:
    """A service in a thread of this process."""

    def __init__(self, server: Server, service: Service) -> None:
        self.server, self.service = server, service
        self.address = server.address

    def ask(
        self,
        path: str,
        content: Any = None,
        *,
        method: str | None = None,
        headers: Mapping[str, str] = {},
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON or text, and headers of an answer; `content` is bytes or to be JSON."""
        connection = http.client.HTTPConnection(*self.address, timeout=60)
        given = {"content-type": "application/json"} if content is not None else {}
        body = content if content is None or isinstance(content, bytes) else json.dumps(content)
        try:
            asked = method or ("GET" if content is None else "POST")
            connection.request(asked, path, body, given | dict(headers))
            answer = connection.getresponse()
            text = answer.read()
            found = {name.lower(): value for name, value in answer.getheaders()}
        finally:
            connection.close()
        if found.get("content-type") == "application/json":
            return answer.status, json.loads(text), found
        return answer.status, text.decode(), found

    def right(self, path: str, content: Any) -> Any:
        """The answer to a request that is fine."""
        status, found, _ = self.ask(path, content)
        assert status == 200, (status, found)
        return found

    def wrong(self, path: str, content: Any, status: int = 422) -> str:
        """The message to a request that is not."""
        given, found, _ = self.ask(path, content)
        assert given == status, (given, found)
        return str(found["error"]["message"])


@contextmanager
def serving(model: str, tokens: Sequence[str] = (), **settings: Any) -> Iterator[Running]:
    """Serves until the end of the block."""
    settings = {"port": 0, "access_log": False, "shutdown_delay": 0.0} | settings
    config = ServeConfig(model=model, **settings)
    service = Service(load(config), config, tokens)
    server = Server(service, config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        yield Running(server, service)
    finally:
        server.should_exit = True
        thread.join()
        service.close()
    assert not service.batcher.broken
    assert service.batcher.inputs == service.batcher.tokens == service.in_flight == 0
