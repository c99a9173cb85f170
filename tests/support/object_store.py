"""An S3 server in a process of its own (moto's), and a proxy before it that fails on demand."""

import http.client
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from waiting import wait_until

BUCKET = "bucket"
OWNER = {
    "Authorization": "AWS4-HMAC-SHA256 Credential=id/20260101/us-east-1/s3/aws4_request, "
    "SignedHeaders=host, Signature=0"
}
"""Tells moto who asks; it compares no signature."""
Answer = tuple[int, bytes]
"""Status and body of an answer."""
Fault = Callable[[str, Answer], Answer | None]
"""Given a request's path and its answer, returns what is sent in its place; None cuts the connection."""
Loss = Callable[[str, str, bytes], bytes | None]
"""Given a request's method, path and body, returns the body that arrives; None cuts the connection before."""


class S3:
    """The server behind its proxy.

    Args:
        port: of the server.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.n_requests = 0
        self.calm()
        self.proxy = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self.proxy.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """What leads to the proxy."""
        return {
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.proxy.server_port}",
            "no_proxy": "127.0.0.1",
        }

    def empty(self) -> None:
        """Begin anew, with an empty bucket."""
        assert self.ask("POST", "/moto-api/reset", {})[0] == 200
        assert self.ask("PUT", f"/{BUCKET}", {})[0] == 200

    def calm(self) -> None:
        """End all faults."""
        self.fault: Fault = lambda _, answer: answer
        self.lose: Loss = lambda method, path, body: body
        self.cut_at: int | None = None
        """Bytes of a body after which the connection is cut; None for whole bodies."""
        self.watch: Callable[[str, str, dict[str, str]], None] = lambda method, path, headers: None
        """Told of each request: its method, its path and its headers, in lower case."""

    def ask(self, method: str, path: str, headers: dict[str, str], body: bytes | None = None) -> Any:
        """Ask the server itself. Returns: status, headers, body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.getheaders(), answer.read()

    def _handler(self) -> Any:
        s3 = self

        class Handler(BaseHTTPRequestHandler):
            def _forward(self) -> None:
                s3.n_requests += 1
                s3.watch(self.command, self.path, {k.lower(): v for k, v in self.headers.items()})
                sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                arrived = s3.lose(self.command, self.path, sent)
                if arrived is None:
                    self.close_connection = True
                    return
                request = {k: v for k, v in self.headers.items() if k.lower() != "content-length"}
                request["Content-Length"] = str(len(arrived))
                status, headers, body = s3.ask(self.command, self.path, request, arrived)
                answer = s3.fault(self.path, (status, body))
                if answer is None:
                    self.close_connection = True
                    return
                status, body = answer
                self.send_response(status)
                for name, value in headers:
                    if name.lower() not in (
                        "content-length",
                        "connection",
                        "transfer-encoding",
                        "date",
                        "server",
                    ):
                        self.send_header(name, value)
                n_bytes = dict(headers).get("Content-Length") if self.command == "HEAD" else len(body)
                self.send_header("Content-Length", str(n_bytes))
                self.send_header("Connection", "close")
                self.end_headers()
                with suppress(BrokenPipeError, ConnectionResetError):
                    self.wfile.write(body if s3.cut_at is None else body[: s3.cut_at])
                self.close_connection = True

            do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = _forward

            def log_message(self, *_: Any) -> None:
                pass

        return Handler

    def put(self, folder: Path, prefix: str) -> str:
        """Upload a folder's files. Returns: the address."""
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                self.put_file(f"{prefix}/{file.relative_to(folder).as_posix()}", file.read_bytes())
        return f"s3://{BUCKET}/{prefix}"

    def put_file(self, key: str, content: bytes) -> None:
        """Upload an object."""
        status, _, body = self.ask("PUT", f"/{BUCKET}/{key}", OWNER, content)
        assert status == 200, (status, body)

    def fetch(self, prefix: str, folder: Path) -> None:
        """Download all objects below a prefix into a folder."""
        _, _, body = self.ask("GET", f"/{BUCKET}?list-type=2&max-keys=9999&prefix={prefix}/", OWNER)
        for key in re.findall("<Key>(.*?)</Key>", body.decode()):
            file = folder / key.removeprefix(f"{prefix}/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(self.ask("GET", f"/{BUCKET}/{key}", OWNER)[2])

    def delete(self, key: str) -> None:
        """Remove an object."""
        assert self.ask("DELETE", f"/{BUCKET}/{key}", OWNER)[0] == 204


@contextmanager
def serving() -> Iterator[S3]:
    """Run the server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    s3 = S3(port)

    def answers() -> bool:
        assert process.poll() is None, "moto ended"
        with suppress(OSError):
            return s3.ask("GET", "/", OWNER)[0] == 200
        return False

    try:
        wait_until(answers)
        yield s3
    finally:
        s3.proxy.shutdown()
        process.kill()
        process.wait()
