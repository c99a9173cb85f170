"""The server of the page: on this machine alone, for its own page alone, and nothing is changed by it.

    GET  /                 the page
    GET  /latents/12       a latent, as HTML
    GET  /find?word=the    latents that fire on a word
    POST /read             text → its tokens, and the latents that fire on each
    POST /steer            text, latent, times, … → how the model goes on, without and with it

It listens at 127.0.0.1, where other users of the machine can ask as well. A page of another site, which the
reader has open too, can not: a request has to name this server as its host, so that no name that leads here
does, and one with a body has to come from its own page and be JSON, which a browser sends nowhere else
unasked.
"""

import json
import re
import traceback
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Annotated, Any
from urllib.parse import parse_qs, urlsplit

from pydantic import Field, ValidationError

from saemill.assess.report.visible import visible
from saemill.common.errors import ConfigError, SaemillError
from saemill.common.log import printable, say
from saemill.common.records import Count, Positive, R, Record, first_finding
from saemill.view.page import LivePage
from saemill.view.trial import Trial

HOST = "127.0.0.1"
MOST_BYTES = 1 << 20
"""Most bytes of a request's body."""
SECONDS = 60
"""Longest time that a connection waits for the next word of a request."""
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Reading(Record):
    """The question which latents fire on a text."""

    text: str


class Steering(Record):
    """The question how the model goes on with a latent added."""

    text: str
    latent: Count
    times: Annotated[float, Field(ge=-1000, le=1000)]
    """Amount in multiples of the latent's largest activation, or of 1 where it never fires."""
    n_tokens: Positive
    temperature: Annotated[float, Field(ge=0, le=100)]


class Server(ThreadingHTTPServer):
    """Serves a page and answers what it asks.

    Args:
        port: on this machine; 0 for any that is free.
        page: the page.
        latents: those that it asks for.
        trial: the model.

    Raises:
        ConfigError: the port is in use.
    """

    daemon_threads = True

    def __init__(self, port: int, page: str, latents: LivePage, trial: Trial) -> None:
        self.page, self.latents, self.trial = page, latents, trial
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise ConfigError(
                f"port {port} cannot be had ({error.strerror}); name another with --port, or 0 for any"
            ) from error
        names = (HOST, "localhost")
        self.hosts = {f"{name}:{self.server_port}" for name in names}
        """What requests may call it."""

    @property
    def address(self) -> str:
        """Address of the page."""
        return f"http://{HOST}:{self.server_port}/"

    def read(self, asked: Reading) -> dict[str, Any]:
        """Find the latents that fire on each token of a text."""
        tokens = [
            {"text": visible(one.text), "left_out": one.is_left_out, "latents": list(one.latents.items())}
            for one in self.trial.read(asked.text)
        ]
        return {"tokens": tokens}

    def steer(self, asked: Steering) -> dict[str, Any]:
        """Write on, as the model is and with a latent added."""
        amount = asked.times * (self.latents.largest(asked.latent) or 1.0)
        written = self.trial.go_on(asked.text, asked.latent, amount, asked.n_tokens, asked.temperature)
        return {"plain": written.plain, "steered": written.steered, "amount": amount}


class _Handler(BaseHTTPRequestHandler):
    """Answers one request after the other of a connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    timeout = SECONDS

    def do_GET(self) -> None:
        """Answer with the page, a latent, or the latents of a word."""
        if not self._is_for_us():
            return
        address = urlsplit(self.path)
        if address.path == "/":
            self._send(HTTPStatus.OK, self.server.page.encode(), "text/html; charset=utf-8")
        elif address.path == "/find":
            word = parse_qs(address.query).get("word", [""])[0]
            self._answer(lambda: {"latents": self.server.latents.find(word)})
        elif found := re.fullmatch(r"/latents/(\d{1,9})", address.path):
            self._answer(lambda: {"html": self.server.latents.latent(int(found[1]))})
        else:
            self._refuse(HTTPStatus.NOT_FOUND, f"there is no {address.path:.80}")

    def do_POST(self) -> None:
        """Answer what the model is asked."""
        body = self._body()
        if body is None or not self._is_for_us():
            return
        if self.headers.get("Content-Type", "").partition(";")[0].strip() != "application/json":
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send application/json")
        elif self.path == "/read":
            self._answer(lambda: self.server.read(_record(Reading, body)))
        elif self.path == "/steer":
            self._answer(lambda: self.server.steer(_record(Steering, body)))
        else:
            self._refuse(HTTPStatus.NOT_FOUND, f"there is no {self.path:.80}")

    def _is_for_us(self) -> bool:
        """Refuse requests that call this server by another name, or come from another site's page."""
        hosts, origin = self.server.hosts, self.headers.get("Origin")
        if self.headers.get("Host") not in hosts:
            self._refuse(HTTPStatus.FORBIDDEN, f"call this server {min(hosts)}")
        elif origin is not None and origin not in {f"http://{host}" for host in hosts}:
            self._refuse(HTTPStatus.FORBIDDEN, "only the page of this server may ask")
        else:
            return True
        return False

    def _body(self) -> bytes | None:
        """Read the body; refuse one that is too long, or of no known length."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            self.close_connection = True  # what comes next would be taken for a request
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"send {MOST_BYTES:,} bytes at most")
            return None
        return self.rfile.read(int(length))

    def _answer(self, work: Callable[[], dict[str, Any]]) -> None:
        """Send what a piece of work comes to, or in words why it failed."""
        try:
            answer = work()
        except SaemillError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        except Exception as error:
            say(f"{self.path:.80} failed: {''.join(traceback.format_exception(error))}")
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"failed: {type(error).__name__}: {error}")
        else:
            self._send(HTTPStatus.OK, json.dumps(answer, allow_nan=False).encode(), "application/json")

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self._send(status, json.dumps({"error": printable(why)}).encode(), "application/json")

    def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(ConnectionError):  # the reader has left meanwhile
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Leave the terminal to what the user needs to know."""


def _record(kind: type[R], body: bytes) -> R:
    """Read a question.

    Raises:
        ConfigError: it is none.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise ConfigError(f"the question {first_finding(error)}") from error
