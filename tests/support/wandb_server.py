"""A stand-in for wandb's server: it remembers each run's history and summary, as the client sends them."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Stored:
    """A run on the server."""

    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By the line's number."""
    summary: dict[str, Any] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)


@contextmanager
def server() -> Iterator[tuple[str, dict[str, Stored]]]:
    """Its address, and the runs by id."""
    runs: dict[str, Stored] = {}
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                stream = re.search(r"/([^/]+)/file_stream", self.path)
                answer = _take(runs[stream[1]], request) if stream else {"data": _answer(runs, request)}
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}", runs
    finally:
        httpd.shutdown()
        httpd.server_close()


def _take(run: Stored, request: dict[str, Any]) -> dict[str, Any]:
    """Lines of files, each piece with the place of its first line."""
    for name, piece in (request.get("files") or {}).items():
        rows = map(json.loads, piece["content"])
        if name == "wandb-history.jsonl":
            run.history |= dict(enumerate(rows, piece["offset"]))
        elif name == "wandb-summary.json":
            run.summary = list(rows)[-1]
    if request.get("complete"):
        run.exit_codes.append(request["exitcode"])
    return {}


def _answer(runs: dict[str, Stored], request: dict[str, Any]) -> dict[str, Any]:
    """What the few queries that a run makes are told."""
    query = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
    name = (request.get("variables") or {}).get("name")
    entity = {"id": "e", "name": "me"}
    if query is None:
        return {}
    if query[1] == "Viewer":
        return {
            "viewer": {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        }
    if query[1] == "RunResumeStatus":
        bucket = _bucket(name, runs[name]) if name in runs else None
        return {"model": {"id": "m", "name": "p", "entity": entity, "bucket": bucket}}
    if query[1] == "UpsertBucket":
        new, run = name not in runs, runs.setdefault(name, Stored())
        project = {"id": "p", "name": "p", "entity": entity}
        bucket = _bucket(name, run) | {"project": project}
        return {"upsertBucket": {"bucket": bucket, "inserted": new}}
    if query[1] == "CreateRunFiles":
        return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}
    return {}


def _bucket(name: str, run: Stored) -> dict[str, Any]:
    tail = [json.dumps(run.history[max(run.history)])] if run.history else []
    return {
        "id": "b", "name": name, "displayName": name, "summaryMetrics": json.dumps(run.summary),
        "historyLineCount": len(run.history), "historyTail": json.dumps(tail), "eventsLineCount": 0,
        "eventsTail": "[]", "logLineCount": 0, "config": "{}", "wandbConfig": '{"t": {}}', "tags": [],
    }  # fmt: skip
