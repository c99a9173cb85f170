"""A server that speaks the chat completions of OpenAI's API: vLLM, llama.cpp, Ollama and many services do."""

import email.utils
import threading
import time
from collections.abc import Mapping
from typing import Any

import httpx2

from saemill.common.errors import SaemillError

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""States that may pass: the question is asked again."""
TRIES = 6
FIRST_WAIT_SECONDS = 1.0
"""Wait before the second try; it doubles with each one after that."""
MOST_WAIT_SECONDS = 300.0
"""Longest wait that a server may ask for; beyond that the command ends, to be given again later."""
KEPT = "answers so far are kept: the same command goes on"


class EndpointError(SaemillError, RuntimeError):
    """The endpoint does not answer as it should."""


class Stopped(Exception):
    """A question was given up since the command was asked to stop."""


class Endpoint:
    """A server that answers questions; threads may share it.

    Args:
        url: of the API, as `http://localhost:8000/v1`.
        key: sent as a bearer token; None for no key. It stands in no message and no file.
        key_variable: the environment variable that it came from, for messages.
        timeout_seconds: longest wait for an answer.
        stop: once it is set, no further try is made.
    """

    def __init__(
        self,
        url: str,
        key: str | None,
        key_variable: str | None,
        timeout_seconds: float,
        stop: threading.Event,
    ) -> None:
        self.url, self._key, self._key_variable = f"{url.rstrip('/')}/chat/completions", key, key_variable
        self._timeout_seconds, self._stop = timeout_seconds, stop
        self._answered = False
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._client = httpx2.Client(headers=headers, timeout=timeout_seconds)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Ask a question, several times where the server is busy or does not answer.

        Args:
            request: the body of a chat completion.

        Returns: `content`, the text of the answer, empty where there is none; `finish_reason`, `model` and
            `usage` as the server tells them.

        Raises:
            EndpointError: it does not answer, refuses, or answers something else; in words what to do.
            Stopped: the command was asked to stop.
        """
        problem = ""
        for number in range(TRIES):
            if self._stop.is_set():
                raise Stopped
            wait_seconds = FIRST_WAIT_SECONDS * 2**number
            try:
                response = self._client.post(self.url, json=dict(request))
            except httpx2.TransportError as error:
                problem = self._no_answer(error)
            else:
                self._answered = True
                if response.status_code not in AGAIN:
                    return self._answer(response)
                problem = f"{self.url} answers {response.status_code}{self._words(response)}"
                asked = _retry_after(response.headers.get("Retry-After"))
                wait_seconds = wait_seconds if asked is None else asked
                if wait_seconds > MOST_WAIT_SECONDS:
                    raise EndpointError(
                        f"{problem}; it asks to wait {wait_seconds:,.0f} seconds: give the same command "
                        f"then, and {KEPT}"
                    )
            if number + 1 < TRIES and self._stop.wait(wait_seconds):
                raise Stopped
        raise EndpointError(f"{problem}, {TRIES} times; {KEPT}, with a smaller --at-once if it is busy")

    def _no_answer(self, error: httpx2.TransportError) -> str:
        """Say why there is no answer.

        Raises:
            EndpointError: nothing ever answered there.
        """
        if isinstance(error, httpx2.TimeoutException) and not isinstance(error, httpx2.ConnectTimeout):
            return f"{self.url} does not answer within {self._timeout_seconds:g} seconds (--timeout-seconds)"
        if not self._answered and not isinstance(error, httpx2.RemoteProtocolError):
            raise EndpointError(
                f"nothing answers at {self.url} ({self._hidden(str(error)) or type(error).__name__}); start "
                "the server, or name another one with --url"
            ) from error
        return f"{self.url} does not answer ({self._hidden(str(error)) or type(error).__name__})"

    def _answer(self, response: httpx2.Response) -> dict[str, Any]:
        """Read an answer.

        Raises:
            EndpointError: the server refuses, or it is none.
        """
        status, words = response.status_code, self._words(response)
        if status in (401, 403):
            advice = (
                f"is the key in {self._key_variable} the right one?"
                if self._key
                else "name the environment variable that holds the key with --api-key-env"
            )
            raise EndpointError(f"{self.url} refuses ({status}{words}); {advice}")
        if status == 404:
            raise EndpointError(
                f"{self.url} is not there (404{words}); does --url end as the server's API does, mostly in "
                "/v1, and does the server have the --model?"
            )
        if response.is_redirect:
            to = response.headers.get("Location", "elsewhere")
            raise EndpointError(f"{self.url} leads to {self._hidden(to):.200}; name that place with --url")
        if status != 200:
            raise EndpointError(f"{self.url} refuses the question ({status}{words}); {KEPT}")
        try:
            body = response.json()
        except ValueError:
            raise EndpointError(
                f"{self.url} answers with no JSON{words}; does --url end as the server's API does, mostly in "
                "/v1?"
            ) from None
        return self._read(body, words)

    def _read(self, body: Any, words: str) -> dict[str, Any]:
        """Take what is kept from the body of an answer.

        Raises:
            EndpointError: it is no chat completion.
        """
        try:
            choice = body["choices"][0]
            content = choice["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise EndpointError(
                f"{self.url} answers with no chat completion{words}; name an OpenAI-compatible endpoint"
            ) from None
        told = {"finish_reason": choice.get("finish_reason"), **{n: body.get(n) for n in ("model", "usage")}}
        return {"content": self._hidden(content) if isinstance(content, str) else "", **told}

    def _words(self, response: httpx2.Response) -> str:
        """Quote the beginning of what the server says, after a colon; empty where it says nothing."""
        text = " ".join(self._hidden(response.text).split())
        return f": {text[:300]}" if text else ""

    def _hidden(self, text: str) -> str:
        """Return the text without the key, which a server may repeat."""
        return text.replace(self._key, "‹key›") if self._key else text


def _retry_after(value: str | None) -> float | None:
    """Read how long a server asks to wait, in seconds: a number, or a date of HTTP."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
