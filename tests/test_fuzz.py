"""What nobody has thought of: settings, checkpoints, config.json and tokenizers, changed at random.

Seeds are fixed: a case is its number. FASTBERT_FUZZ says how many of each kind there are; `make
fuzz` runs 100, `make fuzz FASTBERT_FUZZ=1000` is for a night. Whatever is given, the command ends
within a minute with 0, 1 or 2 and tells a refusal in one line, without a traceback and without
"failed:"; and where what a run wrote is damaged, it does not end with 0 and another result.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from fastbert.cli import main
from fastbert.config import PretrainConfig
from fastbert.settings import Setting, settings
from fastbert.train import checkpoint

pytestmark = pytest.mark.usefixtures("undrawn")
PATHS = ("out", "data", "model", "tokenizer", "resume", "device", "init_from", "add_tokens")
PATHS += ("recipe",)
CASES = range(int(os.environ.get("FASTBERT_FUZZ", "20")))
SECONDS = 60
TEXT = "\n\n".join(
    "\n".join(f"Sentence {line} of document {page} tells of time and people." for line in range(5))
    for page in range(12)
)
SIZES: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 99,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
SMALL: dict[str, Any] = {
    **{"max_seq_length": 32, "tokens_per_batch": 128, "vocab_size": 150, "max_steps": 1},
    **{"device": "cpu", "precision": "fp32", "torch_compile": "off", "report_to": "none"},
    **{"num_threads": 1, "learning_rate": 1e-3, "warmup_steps": 0, "max_eval_batches": 1},
}


class _Hang(BaseException):
    """A command took longer than a minute."""


@contextlib.contextmanager
def _a_minute() -> Iterator[None]:
    def alarm(number: int, frame: FrameType | None) -> None:
        raise _Hang

    before = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def flags(options: dict[str, Any]) -> list[str]:
    words = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words.append(f"{flag}={value}")
    return words


def run(argv: list[str]) -> int:
    """The command's exit code, after checking how it ended."""
    errors = io.StringIO()
    with _a_minute(), contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        status = main(["pretrain", *argv])
    shown = errors.getvalue()
    assert status in (0, 1, 2), shown
    assert "Traceback" not in shown and "failed: " not in shown, shown
    told = [line for line in shown.splitlines() if "fastbert: " in line]
    if status:
        assert len(told) == 1 and told[0].startswith("fastbert: error: "), shown
        assert len(told[0]) < 1500
        assert shown.splitlines()[-1] == told[0]
    else:
        assert told == []
    return status


class Place:
    """A corpus, a model and a run of three steps out of four, whose result is known."""

    def __init__(self, path: Path) -> None:
        self.path, self.number = path, 0
        (path / "good.txt").write_text(TEXT)
        (path / "model.json").write_text(json.dumps(SIZES))
        self.begun = path / "begun"
        recipe = {"max_steps": 4, "save_steps": 1, "lr_scheduler_type": "constant"}
        begin = {**self.options(), **recipe, "out": self.begun}
        assert run(flags({**begin, "stop_at_step": 3})) == 0
        self.result = self.digest(self.resumed(self.copy())[1])

    def options(self) -> dict[str, Any]:
        return {**SMALL, "data": self.path / "good.txt", "model": self.path / "model.json"}

    def fresh(self) -> Path:
        shutil.rmtree(self.path / "case", ignore_errors=True)
        return self.path / "case"

    def copy(self) -> Path:
        return Path(shutil.copytree(self.begun, self.fresh()))

    def resumed(self, out: Path) -> tuple[int, Path]:
        return run(["--resume", "auto", "--out", str(out)]), out

    def digest(self, out: Path) -> str:
        return hashlib.sha256((out / "hf/model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, few_samples: None) -> Iterator[Place]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastbert.train.report.draw_loss", lambda run: run / "loss.png")
        yield Place(tmp_path_factory.mktemp("fuzz"))


# Anything, and the edges of numbers


def number(rng: random.Random) -> Any:
    """An integer or a float, likely where types end."""
    return rng.choice(
        [
            *(0, 1, -1, 2, 3, 7, 127, 128, 255, 256, 511, 1000, 4096, 65535, 65536),
            *(2**24, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**20, 10**400),
            *(-(2**31), -(2**63), -(10**20), 0.0, -0.0, 0.5, 1.5, 1 - 2**-53, 1 - 1e-9, 1e-9),
            *(5e-324, 1e-308, 1e-45, 1e-38, 3.5e38, 1e308, float("inf"), -float("inf"), -1e-3),
            *(float("nan"), rng.randrange(2 ** rng.randrange(1, 80)), rng.uniform(-2, 2)),
            10 ** rng.uniform(-320, 300),
        ]
    )


def text(rng: random.Random) -> str:
    return rng.choice(
        [
            *(
                "",
                " ",
                "none",
                "auto",
                "true",
                "1e3",
                "0x10",
                "1_000",
                "٣",
                "½",
                "-",
                "--",
                "=",
                "~",
            ),
            *(
                "\x00",
                "\x1b[31m",
                "\r\n",
                "\u2028",
                "\ud800",
                "\ufeff",
                "é" * 300,
                "x" * 5000,
                "😀",
            ),
            *("../..", "/", "/dev/null", "/dev/zero", ".", "a/b/c", "%s%n", "{}", "$HOME", "'\"\\"),
            "".join(chr(rng.randrange(1, 0xD800)) for _ in range(rng.randrange(1, 30))),
        ]
    )


def anything(rng: random.Random, depth: int = 0) -> Any:
    """Some value of JSON."""
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind < 2:
        return number(rng)
    if kind < 4:
        return text(rng)
    if kind == 4:
        return rng.choice([None, True, False])
    if kind == 5:
        return [anything(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 6:
        return {text(rng): anything(rng, depth + 1) for _ in range(rng.randrange(4))}
    deep: Any = 1
    for _ in range(rng.choice([50, 900, 3000])):
        deep = [deep]
    return deep


def edge(rng: random.Random, setting: Setting) -> Any:
    """A value of the setting's own type, at or next to one of its bounds."""
    if setting.type is bool:
        return rng.choice([True, False])
    if setting.type is str:
        return rng.choice([*setting.choices, text(rng), setting.default])
    bounds = [setting.at_least, setting.more_than, setting.at_most, setting.less_than, 1]
    bound = rng.choice([bound for bound in bounds if bound is not None])
    if setting.type is int:
        return int(bound) + rng.choice([-1, 0, 1])
    beside = [math.nextafter(bound, toward) for toward in (-math.inf, math.inf)]
    return rng.choice([bound, *beside, -bound, bound * 0.9999999])


def json_text(value: Any) -> str:
    """JSON, by hand where it is deeper than Python writes."""
    try:
        return json.dumps(value, ensure_ascii=True)
    except RecursionError:
        return "[" * 5000 + "]" * 5000


# Bytes


def damage(rng: random.Random, content: bytes) -> bytes:
    """The content with a bit flipped, a piece cut, doubled, moved, zeroed or made up."""
    if not content:
        return b"\0"
    at = rng.randrange(len(content))
    end = min(len(content), at + 1 + rng.randrange(64))
    kind = rng.randrange(8)
    if kind < 3:
        changed = bytearray(content)
        changed[at] ^= 1 << rng.randrange(8)
        return bytes(changed)
    return (
        content[:at],
        content[:at] + content[end:],
        content[:end] + content[at:],
        content[:at] + bytes(end - at) + content[end:],
        content[:at] + rng.randbytes(end - at) + content[end:],
    )[kind - 3]


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# The kinds


# What would take more than a moment if it were done; everything else is done.
MODEST = {
    **{"tokens_per_batch": 4096, "gradient_accumulation_steps": 8, "max_steps": 10**5},
    **{"vocab_size": 2000, "num_threads": 4, "max_seq_length": 64, "dataloader_num_workers": 0},
}


@pytest.mark.parametrize("case", CASES)
def test_settings(place: Place, case: int) -> None:
    rng = random.Random(f"settings {case}")
    known = {setting.name: setting for setting in settings(PretrainConfig)}
    typed: dict[str, Any] = {}
    written: dict[str, Any] = {}
    for name in rng.sample(sorted(known), rng.randrange(1, 5)):
        if name in PATHS:
            value = rng.choice([text(rng), number(rng)])
        else:
            value = rng.choice([edge(rng, known[name]), edge(rng, known[name]), number(rng)])
        if rng.random() < 0.5:
            typed[name] = value
        else:
            written[name] = rng.choice([value, value, anything(rng)])
    # "auto" and the like would write beside the tests; none of these values is a folder to keep.
    typed.pop("out", None)
    written.pop("out", None)
    lines = [f"{name} = {toml(value)}" for name, value in written.items()]
    if rng.random() < 0.2:
        lines.append(f"{json_text(text(rng))} = {toml(anything(rng))}")
    content = "\n".join(lines).encode("utf-8", "replace") + b"\n"
    content = rng.choice([content] * 8 + [damage(rng, content), b"\xef\xbb\xbf" + content])
    content = rng.choice([content] * 9 + [content.decode("utf-8", "replace").encode("utf-16")])
    (place.path / "case.toml").write_bytes(content)
    out = place.fresh()
    small = {n: v for n, v in place.options().items() if n not in typed and n not in written}
    argv = [*flags({**small, **typed, "out": out}), f"--config={place.path / 'case.toml'}"]
    argv = [word for word in argv if "\0" not in word or rng.random() < 0.5]
    if run([*argv, "--print-config"]):
        assert run(argv) == 2 and not out.exists()
        return
    asked = printed(argv)
    if all((asked[name] or 0) <= most for name, most in MODEST.items()):
        run([*argv, "--stop-at-step=1"])


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json_text(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, float):
        return repr(value)
    return json_text(value)


def printed(argv: list[str]) -> dict[str, Any]:
    import tomllib

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert main(["pretrain", *argv, "--print-config"]) == 0
    found = tomllib.loads(shown.getvalue())
    return {name: None if value == "none" else value for name, value in found.items()}


@pytest.mark.parametrize("case", CASES)
def test_what_a_run_wrote(place: Place, case: int) -> None:
    """Checkpoints, config.toml and metrics.jsonl: what is damaged is refused or passed over."""
    rng = random.Random(f"run {case}")
    out = place.copy()
    files = [*files_of(out / "checkpoints"), out / "config.toml", out / "metrics.jsonl"]
    for _ in range(rng.choice([1, 1, 2, 4])):
        path, other = rng.sample(files, 2)
        kind = rng.randrange(10)
        if kind < 6:
            if path.exists():
                path.write_bytes(damage(rng, path.read_bytes()))
        elif kind == 6:
            path.unlink(missing_ok=True)
        elif kind == 7:
            path.write_bytes(other.read_bytes() if other.exists() else b"")
        elif kind == 8:
            copied = f"step-{rng.choice(['000000', '000009', '12345678901234567890', '³', '-1'])}"
            source = out / "checkpoints" / f"step-00000{rng.randrange(1, 4)}"
            shutil.copytree(source, out / "checkpoints" / copied, dirs_exist_ok=True)
        else:
            gone = path.parent if path.parent.name.startswith("step-") else path
            shutil.rmtree(gone) if gone.is_dir() else gone.unlink(missing_ok=True)
            path.parent.mkdir(exist_ok=True)
    status, _ = place.resumed(out)
    if status == 0:
        assert place.digest(out) == place.result


@pytest.mark.parametrize("case", CASES)
def test_a_state_with_the_right_digest(place: Place, case: int) -> None:
    """Whoever writes digests may lie in any way, and still meets no traceback."""
    rng = random.Random(f"state {case}")
    out = place.copy()
    path = out / "checkpoints/step-000003/state.json"
    state = json.loads(path.read_text())
    del state["sha256"]
    for _ in range(rng.choice([1, 1, 3])):
        change(rng, state)
    with contextlib.suppress(RecursionError):
        state["sha256"] = checkpoint._digest(state)
    path.write_text(json_text(state))
    place.resumed(out)


def change(rng: random.Random, value: Any) -> None:
    """Puts something else somewhere below a list or an object."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = rng.choice(keys)
        below = value[key]
        if isinstance(below, dict | list) and below and rng.random() < 0.8:
            value = below
            continue
        if type(below) in (int, float) and rng.random() < 0.5:
            value[key] = number(rng)
        elif rng.random() < 0.2:
            del value[key]
        else:
            value[key] = anything(rng)
        return


@pytest.mark.parametrize("case", CASES)
def test_config_json(place: Place, case: int) -> None:
    rng = random.Random(f"config.json {case}")
    sizes: dict[str, Any] = dict(SIZES)
    names = [*SIZES, "type_vocab_size", "pad_token_id", "layer_norm_eps", "initializer_range"]
    names += ["hidden_dropout_prob", "attention_probs_dropout_prob", "hidden_act"]
    for name in rng.sample(names, rng.choice([1, 1, 2, 3])):
        sizes[name] = rng.choice([number(rng), number(rng), number(rng), anything(rng)])
    if type(sizes["num_hidden_layers"]) is int and 20 < sizes["num_hidden_layers"] <= 1000:
        sizes["num_hidden_layers"] = 3  # only slow
    content = json_text(sizes).encode()
    content = rng.choice([content] * 5 + [damage(rng, content)])
    path = place.path / "case.json"
    path.write_bytes(content)
    run(flags({**place.options(), "model": path, "out": place.fresh()}))


@pytest.mark.parametrize("case", CASES)
def test_tokenizers(place: Place, case: int) -> None:
    rng = random.Random(f"tokenizer {case}")
    folder = place.path / "tokenizer"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place.begun / "tokenizer", folder)
    given = folder
    if rng.random() < 0.3:
        (folder / "tokenizer.json").unlink()
        given = rng.choice([folder, folder / "vocab.txt"])
    path = rng.choice(files_of(folder))
    content = path.read_bytes()
    if path.suffix == ".json" and rng.random() < 0.7:
        value = json.loads(content)
        for _ in range(rng.choice([1, 1, 3])):
            change(rng, value)
        content = json_text(value).encode()
    elif path.suffix == ".txt" and rng.random() < 0.5:
        lines = content.split(b"\n")
        lines.insert(rng.randrange(len(lines)), text(rng).encode("utf-8", "surrogatepass"))
        content = b"\n".join(lines)
    else:
        content = damage(rng, content)
    path.write_bytes(content)
    run(flags({**place.options(), "tokenizer": given, "out": place.fresh()}))
