"""The examples of docs/: each block of Python runs, after those above it on its page.

A page's blocks share their names and an empty folder with a `corpus.txt`. A line `<!-- not run:
REASON -->` above a block leaves it out, for one of the reasons below.
"""

import random
import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parent.parent / "docs"
REASONS = ("needs a GPU", "downloads a model", "downloads data", "needs the package openai")
_BLOCK = re.compile(r"(?:^<!-- not run: (.*) -->\n+)?^```python\n(.*?)^```$", re.M | re.S)
TEXT = "a student of this city reads the long book while her friends play a good game"


def blocks(page: Path) -> list[tuple[int, str, str]]:
    """(line, code, why it is not run) of each block of Python."""
    text = page.read_text("utf-8")
    found = [
        (text[: one.start(2)].count("\n"), one[2], one[1] or "") for one in _BLOCK.finditer(text)
    ]
    assert len(found) == text.count("```python"), f"{page.name}: a block that is not seen"
    assert sum(bool(why) for *_, why in found) == text.count("<!-- not run")
    return found


@pytest.mark.parametrize("page", sorted(DOCS.glob("**/*.md")), ids=lambda page: page.name)
def test_every_example_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None
) -> None:
    rng = random.Random(0)
    documents = [
        "\n".join(" ".join(rng.choices(TEXT.split(), k=9)).capitalize() + "." for _ in range(6))
        for _ in range(60)
    ]
    (tmp_path / "corpus.txt").write_text("\n\n".join(documents) + "\n")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "docs"}
    for line, code, why in blocks(page):
        if why:
            assert why in REASONS, f"{page.name}:{line}: {why!r} is no reason"
            continue
        exec(compile("\n" * line + code, str(page), "exec"), names)


def test_there_are_examples() -> None:
    assert len(blocks(DOCS / "python.md")) >= 5


def test_what_is_not_run_says_why(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- not run: needs a GPU -->\n```python\na\n```\nb\n\n```python\nc\n```\n")
    assert blocks(page) == [(2, "a\n", "needs a GPU"), (7, "c\n", "")]
