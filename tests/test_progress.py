"""How far it is: a bar on a terminal, plain lines in a log."""

import io
import sys

import pytest

from beitzoo import progress
from beitzoo.progress import watch


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 10.0, 31.0, 40.0, 62.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert list(watch("abcd", "image", 5000)) == list("abcd")
    assert capsys.readouterr().err == "2 of 5,000 images, 0.1 per second\n4 of 5,000 images, 0.1 per second\n"


def test_a_short_run_leaves_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(watch("abcd", "image")) == list("abcd")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("bar", [True, False])
def test_a_terminal_gets_a_bar_unless_the_rows_are_on_it(bar: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(watch("abcd", "image", 4, bar=bar)) == list("abcd")
    assert ("4/4" in terminal.getvalue()) == bar
    assert bool(terminal.getvalue()) == bar
