"""Shared fixtures: nothing reaches for a hub, and every test starts from the same random state."""

import dataclasses
import fcntl
import gc
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

# Triton reads TRITON_INTERPRET where the functions of its library are defined. tests/kernels need
# those interpreted; transformers' Trainer and PEFT, which other tests import, bring Triton along.
if "TRITON_INTERPRET" not in os.environ and importlib.util.find_spec("triton"):
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("triton.language")
    del os.environ["TRITON_INTERPRET"]

# A shell that runs the tests in the background has them ignore Ctrl-C, and their processes as well;
# nohup the end of a terminal.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

# More than 20 s of CPU time each, the longest first: two workers that take file by file end
# together.
LONGEST = (
    *("bench/gpu/test_main.py", "bench/test_host_packages.py", "bench/suites/test_step.py"),
    *("train/test_resume.py", "kernels/test_attention.py", "bench/test_benchmarks.py"),
    *("bench/profile/test_profile.py", "bench/gpu/test_launches.py", "data/test_pack.py"),
    *("bench/report/test_report.py", "kernels/test_properties.py", "train/test_recipes.py"),
    *("train/test_loop.py", "packaging/test_wheel.py", "bench/gpu/test_step.py"),
    *("bench/suites/test_kernels.py", "test_bad_input.py", "kernels/test_ops.py"),
    *("finetune/test_finetune_command.py", "finetune/test_glue.py", "finetune/test_predict.py"),
    *("finetune/test_demo.py", "finetune/test_loop.py", "serve/test_export.py"),
    *("serve/test_page.py", "serve/test_service.py", "serve/test_openapi.py"),
    *("bench/suites/test_serve.py", "serve/test_shutdown.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    rank = {tests / name: place for place, name in enumerate(LONGEST)}
    assert all(path.is_file() for path in rank)
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def pytest_collection_finish() -> None:
    """What imports and collection have made stays: the collector need not look at it again.

    That is a tenth of the time of a kernel in Triton's interpreter, which makes many objects.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def few_samples() -> Iterator[None]:
    """Runs plan 512 sequences to see how text falls, not 4,096: a third of the time of a small one.

    test_pack.py looks at the whole sample. A process of its own that is to give the same batches
    needs the same number.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastbert.data.pack.SAMPLE", 512)
        yield


@pytest.fixture
def undrawn(few_samples: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw no loss.png, which takes a quarter of a small one; test_loop.py looks at it."""
    monkeypatch.setattr("fastbert.train.report.draw_loss", lambda run: run / "loss.png")


@pytest.fixture(scope="session")
def save_bert() -> Callable[[Path, list[str], int], Path]:
    """Makes a folder of a little BERT for masked words: (where, its vocabulary, its positions)."""
    import transformers

    def save(path: Path, words: list[str], positions: int) -> Path:
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=positions,
        )  # fmt: skip
        model = transformers.BertForMaskedLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(path)
        ids = {word: index for index, word in enumerate(words)}
        transformers.BertTokenizer(vocab=ids).save_pretrained(path)
        return path

    return save


@dataclasses.dataclass(frozen=True)
class Installed:
    """An environment outside the tree that holds the wheel."""

    folder: Path

    @property
    def distributions(self) -> list[Path]:
        """The sdist, and the wheel that was built from it."""
        return sorted((self.folder / "dist").iterdir())

    @property
    def python(self) -> Path:
        return self.folder / "env" / "bin" / "python"

    @property
    def site(self) -> Path:
        """The environment's site-packages."""
        paths = {"base": str(self.folder / "env"), "platbase": str(self.folder / "env")}
        return Path(sysconfig.get_path("purelib", "venv", paths))

    @property
    def new(self) -> list[str]:
        """What the installation brought into site-packages."""
        return (self.folder / "new").read_text().split()


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Builds and installs the wheel once, whatever the number of test processes.

    The packages that it requires are those of this environment, ours left out: pip finds every
    requirement there, or fails.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    found = Installed(shared / "installed")
    with (shared / "installed.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (found.folder / "new").exists():
            _install(found)
    return found


def _install(found: Installed) -> None:
    def run(*command: str) -> None:
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    # What an earlier build has left in a tree would get into the next one.
    left = shutil.ignore_patterns(
        ".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "profile-*.json"
    )
    shutil.copytree(Path(__file__).parents[1], found.folder / "tree", ignore=left)
    run(
        *("build", "--no-isolation", "--outdir", str(found.folder / "dist")),
        str(found.folder / "tree"),
    )
    venv.create(found.folder / "env", symlinks=True)
    others = found.folder / "others"
    others.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(("fastbert", "__editable__")):
            (others / path.name).symlink_to(path)
    (found.site / "others.pth").write_text(f"{others}\n")
    before = set(os.listdir(found.site))
    (wheel,) = (found.folder / "dist").glob("*.whl")
    run(
        *("pip", "--python", str(found.python), "install", "--no-index", "--no-compile"),
        *("--disable-pip-version-check", str(wheel)),
    )
    (found.folder / "new").write_text("\n".join(set(os.listdir(found.site)) - before))
