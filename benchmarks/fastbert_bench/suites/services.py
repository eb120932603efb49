"""Services to be asked by clients, each a process: `python -m fastbert_bench.suites.services WAY`.

All are `fastbert serve` with its batcher; what differs is how a batch is computed and how much is
in one. Those of fastbert compute sequences end to end, `hf-padded` and `hf-single` by transformers'
own classes, padded to the longest of the batch. The single ones take one text at a time.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fastbert.errors import RunError
from fastbert.serve.config import ServeConfig
from fastbert.train.device import keep_freed_memory
from fastbert_bench.measure.places import importable, module_command

SERVICES = ("fastbert", "fastbert-bf16", "hf-padded", "fastbert-single", "hf-single")
Address = tuple[str, int]


@contextmanager
def service(way: str, model: str) -> Iterator[Address]:
    """Where one listens until the end of the block.

    Args:
        way: one of `SERVICES`.
        model: a folder, of a model for one text.

    Raises:
        RunError: it does not begin to listen.
    """
    process = subprocess.Popen(
        module_command(__name__, way, model), env=importable(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://([\d.]+):(\d+)", process.stdout.readline())
        if found is None:
            raise RunError(f"the service {way} has not begun to listen")
        yield found[1], int(found[2])
    finally:
        process.terminate()
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def main(way: str, model: str) -> None:
    """Serves one way until a signal."""
    from fastbert.hf.accelerate import decelerate  # a bench without a service lacks its libraries
    from fastbert.serve.app import Service
    from fastbert.serve.models import load
    from fastbert.serve.server import serve
    from fastbert.serve.work import Predict

    engine, _, kind = way.partition("-")
    config = ServeConfig(
        model=model, port=0, access_log=False, shutdown_delay=0.0, timeout=600.0,
        precision="bf16" if kind == "bf16" else "fp32",
        max_batch_tokens=1 if kind == "single" else 0,
    )  # fmt: skip
    served = load(config)
    keep_freed_memory()
    if engine == "hf":
        work = served.works["predict"]
        assert isinstance(work, Predict)
        decelerate(work.pipe.model)
    serve(Service(served, config), config)


if __name__ == "__main__":
    main(*sys.argv[1:])
