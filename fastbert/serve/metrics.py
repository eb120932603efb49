"""What Prometheus is told; nothing of any text."""

from typing import Any

from fastbert.finetune.needs import needs
from fastbert.serve.batcher import Batcher, Observer

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SHARES = tuple(step / 10 for step in range(1, 11))
_TOKENS = tuple(2**power for power in range(3, 18))


class Metrics(Observer):
    """Counters and histograms of one service, in a registry of its own."""

    def __init__(self) -> None:
        prometheus: Any = needs("prometheus_client")
        self._registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=self._registry)
        self._gauge = prometheus.Gauge
        self._latest = prometheus.exposition.generate_latest
        kinds, to = prometheus, {"registry": self._registry}
        self.requests = kinds.Counter(
            "fastbert_requests", "Answers given", ["endpoint", "status"], **to
        )
        self.seconds = kinds.Histogram(
            "fastbert_request_seconds", "From a request's head to its answer's end", ["endpoint"],
            buckets=_SECONDS, **to,
        )  # fmt: skip
        self.queue_seconds = kinds.Histogram(
            "fastbert_queue_seconds", "From coming to the first batch", buckets=_SECONDS, **to
        )
        self.texts = kinds.Counter("fastbert_texts", "Texts answered", ["work"], **to)
        self.truncated = kinds.Counter("fastbert_texts_truncated", "Texts that were cut", **to)
        self.tokens = kinds.Counter("fastbert_tokens", "Tokens computed", ["work"], **to)
        self.batch_seconds = kinds.Histogram(
            "fastbert_batch_seconds", "Computing a batch", buckets=_SECONDS, **to
        )
        self.batch_tokens = kinds.Histogram(
            "fastbert_batch_tokens", "Tokens of a batch", buckets=_TOKENS, **to
        )
        self.batch_sequences = kinds.Histogram(
            "fastbert_batch_sequences", "Sequences of a batch", buckets=_TOKENS[:10], **to
        )
        self.batch_fill = kinds.Histogram(
            "fastbert_batch_fill", "Share of a batch's tokens that are used", buckets=_SHARES, **to
        )

    def watch(self, batcher: Batcher, requests: Any) -> None:
        """Tells the depth of the queue.

        Args:
            batcher: whose.
            requests: a function that counts the requests that are being served.
        """
        for name, help, read in (
            ("fastbert_queue_texts", "Texts that wait or are computed", lambda: batcher.inputs),
            ("fastbert_queue_tokens", "Tokens that no batch has taken", lambda: batcher.tokens),
            ("fastbert_requests_in_flight", "Requests being served", requests),
        ):
            self._gauge(name, help, registry=self._registry).set_function(read)

    def batch(self, work: str, sequences: int, tokens: int, fill: float, seconds: float) -> None:
        self.tokens.labels(work).inc(tokens)
        self.batch_seconds.observe(seconds)
        self.batch_tokens.observe(tokens)
        self.batch_sequences.observe(sequences)
        self.batch_fill.observe(fill)

    def page(self) -> bytes:
        """All of it, in Prometheus' text format."""
        found: bytes = self._latest(self._registry)
        return found
