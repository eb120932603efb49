"""The OpenAPI document says what is so: schemathesis finds nothing that contradicts it."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from .served import saved, serving

EXAMPLES = 5
"""Of each operation and kind of data; 200 found nothing, either."""


@pytest.mark.skipif(not importlib.util.find_spec("schemathesis"), reason="needs schemathesis")
@pytest.mark.parametrize(
    "kind", ["classify", "several", "score", "tag", "answer", "choose", "pretrained"]
)
def test_schemathesis_finds_nothing(tmp_path: Path, kind: str) -> None:
    with serving(saved(tmp_path, kind), served_model_name="tiny") as running:
        host, port = running.address
        command = [sys.executable, "-m", "schemathesis.cli", "run"]
        options = {"max-examples": EXAMPLES, "seed": 1, "checks": "all", "workers": 2}
        found = subprocess.run(
            [
                *command,
                f"http://{host}:{port}/openapi.json",
                *(f"--{name}={value}" for name, value in options.items()),
                "--phases=examples,coverage,fuzzing,stateful",
                "--no-color",
            ],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=280,
        )
        assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
        assert running.service.metrics.requests.labels("/ready", "200")._value.get() > 0
