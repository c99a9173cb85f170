"""A server on this machine that answers chat completions as a test wants."""

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What the server sends back."""

    body: Any
    """Text, or what is written as JSON."""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Server:
    """A server, and what it was asked."""

    url: str
    asked: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of the questions, in the order in which they came."""
    headers: list[dict[str, str]] = field(default_factory=list)


def completion(content: Any) -> Reply:
    """An answer as OpenAI's API gives it."""
    return Reply(
        {"choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}]}
    )


@contextmanager
def answering(reply: Callable[[dict[str, Any]], Reply]) -> Iterator[Server]:
    """Serve at `/v1/chat/completions`; `reply` makes the answer to a question."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append(body)
            server.headers.append(dict(self.headers.items()))
            made = reply(body) if self.path == "/v1/chat/completions" else Reply("no such page", 404)
            content = (made.body if isinstance(made.body, str) else json.dumps(made.body)).encode()
            self.send_response(made.status)
            for name, value in {"Content-Length": str(len(content)), **made.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{httpd.server_port}/v1")
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        httpd.shutdown()
        httpd.server_close()


def is_judgement(body: dict[str, Any]) -> bool:
    """Whether a question is to judge contexts, and not to explain them."""
    return str(body["messages"][1]["content"]).startswith("The latent: ")


def finds_the_word(body: dict[str, Any]) -> Reply:
    """Answer as someone who knows that every latent fires on one word: that which is marked most often; and
    who finds it in texts."""
    text = str(body["messages"][1]["content"])
    if not is_judgement(body):
        (word, _), *_ = Counter(marked.strip() for marked in re.findall("<<(.*?)>>", text)).most_common(1)
        return completion(f"the word '{word}'")
    about, *texts = text.split("\n\n")
    word = about.split("'")[1]
    said = [int(word in re.split(r"\s+", numbered)) for numbered in texts]
    return completion(f"Here you are:\n```json\n{json.dumps(said)}\n```")
