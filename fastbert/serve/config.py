"""What `fastbert serve` can be told. Standard library only, so that a mistake is told at once."""

from dataclasses import dataclass
from typing import ClassVar

from fastbert.config import device_setting, num_threads_setting, precision_setting
from fastbert.errors import UserError
from fastbert.settings import (
    LONGEST,
    MOST_TOKENS,
    Config,
    Group,
    check_fields,
    check_not_empty,
    setting,
)

MODEL = Group("model", "what answers")
BATCHES = Group("batches", "how requests are computed together")
LIMITS = Group("limits", "what is refused rather than computed")
SERVER = Group("server", "where it listens, and for whom")

LIBRARIES = ("fastapi", "uvicorn", "httptools", "prometheus_client", "orjson")
TASKS = ("classify", "tag", "answer", "choose", "embed", "fill-mask")


@dataclass(frozen=True)
class ServeConfig(Config):
    """What `fastbert serve` can be told.

    Raises:
        UserError: a value is out of bounds, or two do not fit together.
    """

    command: ClassVar[str] = "serve"

    model: str = setting(
        "",
        "folder of a model of ours or of Hugging Face, or of a run",
        MODEL,
        aka=("model_name_or_path", "model_name", "model_id", "checkpoint"),
    )
    task: str = setting(
        "auto", "what it does (auto = all that its folder is for)", MODEL, choices=("auto", *TASKS)
    )
    served_model_name: str = setting(
        "auto", "what clients call it (auto = the name of its folder)", MODEL
    )
    precision: str = precision_setting(
        MODEL, ("auto", "fp32", "bf16", "fp16"), otherwise=", on a CPU fp32"
    )
    device: str = device_setting(MODEL)
    num_threads: int = num_threads_setting(MODEL)
    max_seq_length: int | None = setting(
        None, "longest sequence, tokens (none = as the model was trained)", MODEL, at_least=8,
        at_most=LONGEST, aka=("max_length", "max_len", "seq_length"),
    )  # fmt: skip
    threshold: float | None = setting(
        None, "of several labels: probability from which one is given (none = the model's)", MODEL,
        more_than=0, less_than=1,
    )  # fmt: skip

    max_batch_tokens: int = setting(
        0,
        "tokens computed at once (0 = 1,024 on a CPU, 65,536 on a GPU)",
        BATCHES,
        at_least=0,
        at_most=MOST_TOKENS,
        aka=("batch_size", "max_batch_size", "tokens_per_batch"),
    )
    max_wait_ms: float = setting(
        0.0,
        "for which a batch that is not full waits for more, beside what comes while another one is "
        "computed",
        BATCHES,
        at_least=0,
        at_most=10_000,
    )
    max_queue: int = setting(
        4096, "texts that may wait; beyond, 429", BATCHES, at_least=1, at_most=10**6
    )

    truncate: bool = setting(True, "cut texts that are too long, rather than refuse them", LIMITS)
    max_text_tokens: int = setting(
        8192,
        "read of a text that is read in windows (tag, answer); of others, one sequence is",
        LIMITS,
        at_least=8,
        at_most=MOST_TOKENS,
    )
    max_texts: int = setting(
        2048,
        "texts of a request",
        LIMITS,
        at_least=1,
        at_most=10**6,
        aka=("max_client_batch_size",),
    )
    max_body_kb: int = setting(
        1024, "kilobytes of a request", LIMITS, at_least=1, at_most=2**20, aka=("payload_limit",)
    )
    max_requests: int = setting(
        512,
        "requests at once; beyond, 429",
        LIMITS,
        at_least=1,
        at_most=10**6,
        aka=("max_concurrent_requests", "limit_concurrency"),
    )
    timeout: float = setting(
        30.0, "seconds a request may take, reading it included", LIMITS, at_least=0.1,
        at_most=86_400,
    )  # fmt: skip

    host: str = setting("127.0.0.1", "address to listen at (0.0.0.0 = all)", SERVER)
    port: int = setting(
        8000, "port to listen at (0 = any, which is said)", SERVER, at_least=0, at_most=65535
    )
    token_file: str = setting(
        "",
        "file of bearer tokens, one a line: without one of them nothing is answered",
        SERVER,
        aka=("api_key", "token", "api_key_file"),
    )
    shutdown_delay: float = setting(
        1.0,
        "seconds in which SIGTERM still lets new requests in, while /ready says no",
        SERVER,
        at_least=0,
        at_most=3600,
    )
    access_log: bool = setting(True, "a line of JSON for each request, without its texts", SERVER)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.model:
            raise UserError("model = '': give --model DIR, the folder of a model")
        check_not_empty(self, "host", "served_model_name")
        if self.max_texts > self.max_queue:
            raise UserError(
                f"max_texts = {self.max_texts}: a request of so many is more than the queue takes: "
                f"max_queue = {self.max_queue}"
            )
