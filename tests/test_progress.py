"""Progress bars: live on a terminal, a line now and then in a log."""

import io
import sys
import time

import pytest

from fastbert import progress
from fastbert.progress import progress_bar


def test_a_log_gets_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.1)
    began = time.perf_counter()
    with progress_bar(total=500, desc="work", unit="step") as bar:
        for _ in range(500):
            time.sleep(0.001)
            bar.set_postfix_str("loss 1.234")  # asks for a line at once
            bar.refresh()
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 3 + (time.perf_counter() - began) / 0.1
    assert all(line.startswith("work: ") and "\r" not in line for line in lines)
    assert "500/500" in lines[-1] and "loss 1.234" in lines[-1]


def test_what_takes_no_time_leaves_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress_bar(range(1000), desc="work")) == list(range(1000))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("work: 100%") and "1000/1000" in line
    with progress_bar(total=3, disable=True) as bar:  # as TQDM_DISABLE=1 does
        bar.set_postfix_str("loss")
        bar.update()
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_live_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", screen)
    for _ in progress_bar(range(3), desc="work"):
        pass
    assert screen.getvalue().count("\r") >= 2
