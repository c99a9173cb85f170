"""The endpoint: each way to fail has its words, and what may pass is tried again."""

import socket
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from typing import Any

import pytest
from answering import Reply, Server, answering, completion

from saemill.explain import endpoint
from saemill.explain.endpoint import TRIES, Endpoint, EndpointError, Stopped, _retry_after

QUESTION: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "?"}]}
MAY_PASS = {429: "slow down", 503: "starting"}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_WAIT_SECONDS", 0.001)


def ask(server: Server, timeout_seconds: float = 30, url: str = "") -> dict[str, Any]:
    asked = Endpoint(url or server.url, None, None, timeout_seconds, threading.Event())
    try:
        return asked.ask(QUESTION)
    finally:
        asked.close()


def test_an_answer_is_what_the_server_says() -> None:
    """Oracle: the body of the answer, and of the question as it came."""
    body = {
        "choices": [{"message": {"content": "yes"}, "finish_reason": "length"}],
        "model": "x",
        "usage": {"a": 1},
    }
    with answering(lambda _: Reply(body)) as server:
        assert ask(server) == {"content": "yes", "finish_reason": "length", "model": "x", "usage": {"a": 1}}
        assert server.asked == [QUESTION]
        assert ask(server, url=f"{server.url}/")["content"] == "yes"


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply("bad key", 401), r"refuses \(401: bad key\); name the environment .* with --api-key-env"),
        (Reply({"error": "no model m"}, 404), r"is not there \(404: .*no model m.*\); does --url end as"),
        (Reply("<html>welcome</html>"), r"answers with no JSON: <html>welcome</html>; does --url end as"),
        (Reply({"object": "list"}), r"answers with no chat completion: .*object.*; name an OpenAI"),
        (Reply([1]), "answers with no chat completion"),
        (Reply("", 307, {"Location": "https://other/v1"}), "leads to https://other/v1; name that place"),
        (Reply({"error": "context too long"}, 400), r"refuses the question \(400: .*context too long"),
        (Reply("", 429, {"Retry-After": "3600"}), "answers 429; it asks to wait 3,600 seconds: .*are kept"),
    ],
)  # fmt: skip
def test_what_will_not_pass_is_asked_once(reply: Reply, words: str) -> None:
    """Oracle: the message, and one question."""
    with answering(lambda _: reply) as server:
        with pytest.raises(EndpointError, match=words):
            ask(server)
        assert len(server.asked) == 1


@pytest.mark.parametrize("status", MAY_PASS)
def test_what_may_pass_is_asked_again(status: int) -> None:
    """Oracle: the answer after two refusals; the number of questions; after too many the words."""
    replies: Iterator[Reply] = iter([Reply(MAY_PASS[status], status)] * 2 + [completion("at last")])
    with answering(lambda _: next(replies)) as server:
        assert ask(server)["content"] == "at last"
        assert len(server.asked) == 3
    with answering(lambda _: Reply(MAY_PASS[status], status)) as server:
        with pytest.raises(
            EndpointError, match=f"answers {status}: {MAY_PASS[status]}, {TRIES} times; answers so"
        ):
            ask(server)
        assert len(server.asked) == TRIES


def test_it_waits_as_long_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: Retry-After in seconds and as a date; without it twice as long each time."""
    waited: list[float] = []

    class Watched(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waited.append(timeout or 0)
            return False

    headers: Iterator[dict[str, str]] = iter([{"Retry-After": "7"}, {}, {}])
    with answering(
        lambda _: Reply("busy", 429, h) if (h := next(headers, None)) is not None else completion("")
    ) as server:
        Endpoint(server.url, None, None, 30, Watched()).ask(QUESTION)
    assert waited == [7, 0.002, 0.004]
    assert _retry_after(formatdate(time.time() + 50, usegmt=True)) == pytest.approx(50, abs=3)
    assert _retry_after("soon") is None


def test_a_server_that_is_not_there_is_told_at_once() -> None:
    """Oracle: a port on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(
        EndpointError, match=rf"nothing answers at {url}/chat/completions .*; start the server"
    ):
        ask(Server(url))


def test_a_server_that_hangs_is_told() -> None:
    """Oracle: an answer that never comes while the client waits."""
    over = threading.Event()
    with answering(lambda _: (over.wait(60), completion("too late"))[1]) as server:
        try:
            with pytest.raises(
                EndpointError, match=r"does not answer within 0\.05 seconds \(--timeout-seconds\), 6 times"
            ):
                ask(server, timeout_seconds=0.05)
        finally:
            over.set()


def test_a_stop_ends_the_tries() -> None:
    """Oracle: an event that is set while the server refuses."""
    stop = threading.Event()

    def refusing(_: Any) -> Reply:
        stop.set()
        return Reply("busy", 503)

    with answering(refusing) as server:
        with pytest.raises(Stopped):
            Endpoint(server.url, None, None, 30, stop).ask(QUESTION)
        assert len(server.asked) == 1
