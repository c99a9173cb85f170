"""Progress: lines where stderr is no terminal, a bar where it is one."""

import io
import logging
import os
import re
import subprocess
import sys
import warnings

import pytest

from saemill.common import log

RATE = re.compile(r"[\d,]+ tokens/s")


def shown(text: str) -> list[str]:
    """The lines without their rates, which depend on the machine."""
    return [RATE.sub("RATE", line) for line in text.splitlines()]


def test_lines_tell_the_amount_and_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the amounts that are given; a line for each at no least time between two, and one at the
    end."""
    monkeypatch.setattr(log, "LINE_SECONDS", 0.0)
    with log.progress("cache [x]", 3000, "tokens", 1000) as advance:
        advance(1000)
        advance(1000)
    first, second, last = shown(capsys.readouterr().err)
    assert re.fullmatch(r"cache \[x\]: 2,000 of 3,000 tokens, RATE, \d+:\d\d left", first)
    assert second == last == "cache [x]: 3,000 of 3,000 tokens, RATE"


def test_lines_are_rare_and_need_no_total(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the one line at the end, since 10 seconds have not passed."""
    with log.progress("tokenize", None, "tokens") as advance:
        for _ in range(5):
            advance(7)
    assert shown(capsys.readouterr().err) == ["tokenize: 35 tokens, RATE"]


def test_a_process_that_is_not_to_speak_shows_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: an empty stderr."""
    monkeypatch.setattr(log, "speaks", False)
    with log.progress("cache", 10, "tokens") as advance:
        advance(10)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar() -> None:
    """Oracle: the amount and the unit in what a pseudo-terminal received, and no line of a log."""
    code = (
        "from saemill.common import log\n"
        "with log.progress('cache', 20, 'tokens') as advance:\n"
        "    [advance(10) for _ in range(2)]\n"
    )
    ours, theirs = os.openpty()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TERM": "xterm"}
    subprocess.run([sys.executable, "-c", code], stderr=theirs, env=environment, check=True)
    os.close(theirs)
    received = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # Linux says so at the end of a terminal that nobody writes to
            break
        if not piece:
            break
        received += piece
    os.close(ours)
    text = received.decode()
    assert "cache" in text
    assert "tokens/s" in text
    assert "━" in text
    assert "20 of 20" not in text


def test_what_other_packages_log_and_warn_is_printable(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Oracle: the texts by hand; a record's arguments are written out with it."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    factory = logging.getLogRecordFactory()
    try:
        log.tame_other_packages()
        logging.getLogger("other").error("of %s", "\x1b[31mred")
    finally:
        logging.setLogRecordFactory(factory)
    assert caplog.messages == ["of \\x1b[31mred"]
    assert "UserWarning: of \\x07" in warnings.formatwarning("of \a", UserWarning, "a.py", 1)


def test_a_notebook_gets_one_line_that_is_written_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the stream of an IPython kernel, known by its module; one line end, carriage returns before."""
    kernel = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    monkeypatch.setattr(sys, "stderr", kernel)
    monkeypatch.setattr(log, "NOTEBOOK_SECONDS", 0.0)
    with log.progress("cache", 20, "tokens") as advance:
        advance(10)
        advance(10)
    shown_over = kernel.getvalue().split("\r")
    assert [line.split(" tokens")[0] for line in shown_over] == [
        "",
        "cache: 10 of 20",
        *["cache: 20 of 20"] * 2,
    ]
    assert kernel.getvalue().count("\n") == 1
