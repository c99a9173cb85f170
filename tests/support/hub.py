"""A hub on this machine: what huggingface_hub asks of one over HTTP, with Git LFS in place of Xet.

Written after huggingface_hub 2.4's own requests. It keeps repositories in memory and records what it is
asked; it never looks into a file.
"""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

WRITER, READER = "hf_writer0123456789", "hf_reader0123456789"
"""Tokens: who has the first may write."""
LFS_BYTES = 20_000
"""Files from this size on go to the large files."""

Files = dict[str, bytes]


class Refused(Exception):
    """An answer other than 200, with the headers that tell the client why."""

    def __init__(self, status: int, code: str = "", message: str = "", content: bytes = b"{}") -> None:
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message}
        self.content = content


@dataclass
class Repo:
    """Commits are the whole content, by their id; branches name one."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Files) -> str:
        sha = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def resolve(self, revision: str) -> str:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise Refused(404, "RevisionNotFound")
        return sha


class Hub:
    """The server; use it as a context."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large: Files = {}
        self.asked: list[tuple[str, str]] = []
        self.messages: list[str] = []
        self.lock = threading.Lock()
        self.n_uploads_left = self.n_downloads_left = 10**9
        """After so many large files, or downloads, all are refused."""
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> "Hub":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def put(self, repo: str, files: Files, branch: str = "main", kind: str = "models") -> str:
        """Make a repository's branch hold these files alone; the commit."""
        return self.repos.setdefault((kind, repo), Repo()).commit(branch, files)

    def put_folder(self, repo: str, folder: Path, branch: str = "main") -> str:
        """As `put`, with what is below a folder."""
        files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
        return self.put(repo, files, branch)

    def files(self, repo: str, branch: str = "main", kind: str = "models") -> Files:
        """What a branch holds."""
        held = self.repos[kind, repo]
        return held.commits[held.branches[branch]]

    def downloaded(self) -> list[str]:
        """Paths of the files whose content was asked for, in order of the alphabet."""
        return sorted(path.split("/resolve/")[1].split("/", 1)[1] for verb, path in self.asked
                      if verb == "GET" and "/resolve/" in path)  # fmt: skip

    def environment(self, home: Path, token: str | None = WRITER) -> dict[str, str]:
        """What a process needs to take this for the hub."""
        told = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        told |= {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
        return told | ({"HF_TOKEN": token} if token else {})


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        split = urlsplit(self.path)
        self.hub.asked.append((self.command, split.path))
        try:
            content, headers = self._route(split.path.strip("/").split("/"))
            status = 200
        except Refused as refused:
            content, headers, status = refused.content, refused.headers, refused.status
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _route(self, parts: list[str]) -> tuple[bytes, dict[str, str]]:
        if parts[0] == "large":
            return self._put_large(parts[1])
        if parts[:3] == ["api", "repos", "create"]:
            return self._create()
        if parts[:2] == ["api", "validate-yaml"]:
            return b"{}", {}
        if parts[0] == "api":
            kind, repo, verb = parts[1], "/".join(parts[2:4]), parts[4] if len(parts) > 4 else "revision"
            rest = [unquote(part) for part in parts[5:]] or ["main"]
            return json.dumps(getattr(self, f"_{verb}")(kind, repo, rest)).encode(), {}
        kind = "datasets" if parts[0] == "datasets" else "models"
        parts = parts[1:] if kind == "datasets" else parts
        if parts[2:] == ["info", "lfs", "objects", "batch"]:
            return self._batch(kind, "/".join(parts[:2]).removesuffix(".git")), {}
        return self._file(kind, "/".join(parts[:2]), unquote(parts[3]), unquote("/".join(parts[4:])))

    def _repo(self, kind: str, repo: str, write: bool = False) -> Repo:
        held = self.hub.repos.get((kind, repo))
        if held is None or (held.private and self._token() is None):
            raise Refused(404 if self._token() else 401, "RepoNotFound", "Repository not found")
        if write:
            self._check_may_write()
        return held

    def _token(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        if token not in (None, WRITER, READER):
            raise Refused(401, message="Invalid credentials in Authorization header")
        return token

    def _check_may_write(self) -> None:
        if self._token() != WRITER:
            raise Refused(403 if self._token() else 401, message="You need a token with write access")

    def _create(self) -> tuple[bytes, dict[str, str]]:
        self._check_may_write()
        asked = json.loads(self.body)
        kind, repo = asked["type"] + "s", f"{asked['organization']}/{asked['name']}"
        prefix = "datasets/" if kind == "datasets" else ""
        told = json.dumps({"url": f"{self.hub.endpoint}/{prefix}{repo}"}).encode()
        if (kind, repo) in self.hub.repos:
            raise Refused(409, message="You already created this repo", content=told)
        made = self.hub.repos[kind, repo] = Repo(asked.get("private") or asked.get("visibility") == "private")
        made.commit("main", {".gitattributes": b""})
        return told, {}

    def _branch(self, kind: str, repo: str, rest: list[str]) -> dict[str, Any]:
        held = self._repo(kind, repo, write=True)
        if rest[0] in held.branches:
            raise Refused(409, message="Reference already exists")
        held.branches[rest[0]] = held.resolve(json.loads(self.body).get("startingPoint", "main"))
        return {}

    def _commits(self, kind: str, repo: str, rest: list[str]) -> list[dict[str, Any]]:
        """Newest first; those of all branches, as none is made but from another's first commit."""
        told = {"title": "", "message": "", "date": "2026-01-01T00:00:00.000Z", "authors": []}
        return [{"id": sha} | told for sha in reversed(self._repo(kind, repo).commits)]

    def _revision(self, kind: str, repo: str, rest: list[str]) -> dict[str, Any]:
        held = self._repo(kind, repo)
        sha = held.resolve(rest[0])
        names = [{"rfilename": name} for name in held.commits[sha]]
        return {"id": repo, "sha": sha, "private": held.private, "siblings": names, "tags": []}

    def _tree(self, kind: str, repo: str, rest: list[str]) -> list[dict[str, Any]]:
        held = self._repo(kind, repo)
        files = held.commits[held.resolve(rest[0])]
        return [
            {"type": "file", "path": name, "size": len(content), "oid": _git_id(content)}
            | ({"lfs": {"oid": _sha256(content), "size": len(content), "pointerSize": 134}} if large else {})
            for name, content in files.items()
            for large in [len(content) >= LFS_BYTES]
        ]

    def _preupload(self, kind: str, repo: str, rest: list[str]) -> dict[str, Any]:
        held = self._repo(kind, repo, write=True)
        there = held.commits[held.resolve(rest[0])]
        files = []
        for asked in json.loads(self.body)["files"]:
            name, large = asked["path"], asked["size"] >= LFS_BYTES
            told = {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if name in there:
                told["oid"] = (_sha256 if large else _git_id)(there[name])
            files.append(told)
        return {"files": files}

    def _batch(self, kind: str, repo: str) -> bytes:
        self._repo(kind, repo, write=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            told = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.large:
                href = f"{self.hub.endpoint}/large/{asked['oid']}?X-Amz-Signature=signature-of-the-address"
                told["actions"] = {"upload": {"href": href, "header": {}}}
            objects.append(told)
        return json.dumps({"transfer": "basic", "objects": objects}).encode()

    def _put_large(self, oid: str) -> tuple[bytes, dict[str, str]]:
        self._count("n_uploads_left")
        assert _sha256(self.body) == oid
        self.hub.large[oid] = self.body
        return b"", {}

    def _count(self, name: str) -> None:
        """One more upload or download; refused after the last."""
        with self.hub.lock:
            left = getattr(self.hub, name)
            setattr(self.hub, name, left - 1)
        if left <= 0:
            raise Refused(400)

    def _commit(self, kind: str, repo: str, rest: list[str]) -> dict[str, Any]:
        held = self._repo(kind, repo, write=True)
        files = dict(held.commits[held.resolve(rest[0])])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                raise AssertionError(entry)
        sha = held.commit(rest[0], files)
        return {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{sha}", "commitOid": sha, "success": True}

    def _file(self, kind: str, repo: str, revision: str, name: str) -> tuple[bytes, dict[str, str]]:
        held = self._repo(kind, repo)
        sha = held.resolve(revision)
        if name not in held.commits[sha]:
            raise Refused(404, "EntryNotFound")
        if self.command == "GET":
            self._count("n_downloads_left")
        content = held.commits[sha][name]
        tag = _sha256(content) if len(content) >= LFS_BYTES else _git_id(content)
        return content, {"ETag": f'"{tag}"', "X-Repo-Commit": sha, "Content-Type": "application/octet-stream"}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_id(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def take_for_the_hub(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make huggingface_hub, which reads its environment when imported, ask this one; with a fresh cache."""
    settings = {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }
    for name, value in settings.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", WRITER)


if __name__ == "__main__":  # to try things by hand
    with Hub() as served:
        print(json.dumps(served.environment(Path("hub-home"))), flush=True)
        threading.Event().wait()
