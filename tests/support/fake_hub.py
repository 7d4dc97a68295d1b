"""A local server with the part of the Hugging Face hub's protocol that downloads use.

As on the hub, large files are redirected to another host (another name of this one), a renamed
repository answers 307, a private one 401 with X-Error-Code RepoNotFound, and a gated one lists its
files but refuses them. It records every request, and can stall, disconnect, damage a file or fail.
"""

import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_LARGE = (".safetensors", ".bin", ".h5", ".msgpack", ".onnx")  # what the hub keeps in LFS
_API = re.compile(
    r"/api/models/(?P<repo>[^/]+(?:/[^/]+)?)/(?P<kind>revision|tree)/(?P<revision>[^/]+)"
    r"|/api/models/(?P<bare>[^/]+(?:/[^/]+)?)"
)
_RESOLVE = re.compile(r"/(?P<repo>[^/]+(?:/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_STORE = re.compile(r"/store/(?P<repo>[^/]+/[^/]+)/(?P<file>.+)")


@dataclass(frozen=True)
class FakeRepo:
    """A repository with the branch main and one commit."""

    name: str
    files: Mapping[str, bytes]
    commit: str = COMMIT
    gated: bool = False


@dataclass(frozen=True)
class Seen:
    """A recorded request."""

    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class Trouble:
    """A fault while one file is sent.

    `kind` is "stall", "cut" or "reset", after `after_bytes`, or "damage", a changed byte. It
    happens once, or every time if it `repeats`.
    """

    kind: str
    after_bytes: int = 0
    repeats: bool = False
    reached: threading.Event = field(default_factory=threading.Event)


class FakeHub:
    """The server, as a context manager; `url` is its HF_ENDPOINT."""

    def __init__(self) -> None:
        self.repos: dict[str, FakeRepo] = {}
        self.moved: dict[str, str] = {}
        self.trouble: dict[str, Trouble] = {}
        self.status: HTTPStatus | None = None
        self.error = b'{"error": "out of order"}'
        """Sent with `status`."""
        self.body: bytes | None = None
        self.listing: bytes | None = None
        """Sent as the list of files."""
        self.endless: set[str] = set()
        """Files that have no end; "list" is the list of files."""
        self.endless_bytes = 0
        self.seen: list[Seen] = []
        self.closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )

    def __enter__(self) -> "FakeHub":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def port(self) -> int:
        """Return its port."""
        return self._server.server_port

    @property
    def url(self) -> str:
        """Return its URL."""
        return f"http://127.0.0.1:{self.port}"

    def add(self, name: str, files: Mapping[str, bytes], **options: Any) -> FakeRepo:
        """Publish a repository, or a new state of it."""
        self.repos[name] = FakeRepo(name, dict(files), **options)
        return self.repos[name]

    def fetched(self) -> list[str]:
        """Return the names of the sent files, in order."""
        matches = [
            (seen, _STORE.fullmatch(seen.path) or _RESOLVE.fullmatch(seen.path))
            for seen in self.seen
            if seen.method == "GET"
        ]
        return [
            match["file"]
            for seen, match in matches
            if match and not (seen.path.endswith(_LARGE) and "/resolve/" in seen.path)
        ]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a client may keep its connection open
    hub: FakeHub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> FakeHub:
        return cast("_Server", self.server).hub

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Stay silent."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.seen.append(
            Seen(self.command, path, self.headers.get("Range"), self.headers.get("Authorization"))
        )
        if self.hub.status is not None:
            self._send(self.hub.status, self.hub.error)
        elif self.hub.body is not None:
            self._send(HTTPStatus.OK, self.hub.body)
        elif match := _STORE.fullmatch(path):
            self._send_file(self.hub.repos[match["repo"]], match["file"])
        elif match := _API.fullmatch(path):
            self._answer_api(
                match["repo"] or match["bare"],
                match["kind"],
                match["revision"] or "main",
                parse_qs(url.query),
            )
        elif match := _RESOLVE.fullmatch(path):
            self._answer_resolve(match["repo"], match["revision"], match["file"])
        else:
            self._send_error(HTTPStatus.NOT_FOUND, "EntryNotFound", "no such page")

    def _find(self, name: str, revision: str) -> FakeRepo | None:
        """Return the repository at the revision, or send an error and return None."""
        if name in self.hub.moved:
            there = self.path.replace(f"/{name}", f"/{self.hub.moved[name]}", 1)
            self._send(HTTPStatus.TEMPORARY_REDIRECT, b"", {"Location": there})
        elif name not in self.hub.repos:
            self._send_error(
                HTTPStatus.UNAUTHORIZED, "RepoNotFound", "Invalid username or password."
            )
        elif revision not in ("main", self.hub.repos[name].commit):
            self._send_error(
                HTTPStatus.NOT_FOUND, "RevisionNotFound", f"Invalid rev id: {revision}"
            )
        else:
            return self.hub.repos[name]
        return None

    def _answer_api(
        self, name: str, kind: str | None, revision: str, query: Mapping[str, list[str]]
    ) -> None:
        repo = self._find(name, revision)
        if repo is None:
            return
        if "list" in self.hub.endless:
            self._send_without_end(b'{"siblings": [')
            return
        if self.hub.listing is not None:
            self._send(HTTPStatus.OK, self.hub.listing)
            return
        if kind == "tree":
            answer: Any = [_tree_entry(file, content) for file, content in repo.files.items()]
        else:
            siblings = [
                _sibling(file, content, blobs="blobs" in query)
                for file, content in repo.files.items()
            ]
            answer = {
                "_id": "0",
                "id": repo.name,
                "modelId": repo.name,
                "sha": repo.commit,
                "private": False,
                "siblings": siblings,
            }
        self._send(HTTPStatus.OK, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _answer_resolve(self, name: str, revision: str, file: str) -> None:
        repo = self._find(name, revision)
        if repo is None:
            return
        if repo.gated and not self.headers.get("Authorization"):
            self._send_error(
                HTTPStatus.UNAUTHORIZED, "GatedRepo", f"Access to model {name} is restricted."
            )
        elif file not in repo.files:
            self._send_error(HTTPStatus.NOT_FOUND, "EntryNotFound", "Entry not found")
        elif file.endswith(_LARGE):
            content = repo.files[file]
            linked = {
                "X-Linked-Size": str(len(content)),
                "X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            }
            there = f"http://localhost:{self.hub.port}/store/{repo.name}/{file}"
            self._send(
                HTTPStatus.FOUND, b"", {"Location": there, "X-Repo-Commit": repo.commit, **linked}
            )
        else:
            self._send_file(repo, file)

    def _send_file(self, repo: FakeRepo, file: str) -> None:
        if file in self.hub.endless:
            self._send_without_end(repo.files[file])
            return
        content = repo.files[file]
        headers = {
            "ETag": f'"{_git_sha1(content)}"',
            "X-Repo-Commit": repo.commit,
            "Accept-Ranges": "bytes",
        }
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        first = int(start[1]) if start else 0
        if start:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        self._send(
            HTTPStatus.PARTIAL_CONTENT if start else HTTPStatus.OK,
            content[first:],
            headers,
            self.hub.trouble.get(file),
        )

    def _send_without_end(self, start: bytes) -> None:
        """Send until the client disconnects; count the bytes."""
        self.send_response(HTTPStatus.OK)
        self.send_header("Connection", "close")
        self.end_headers()
        part, block = start, b" " * (1 << 16)
        while not self.hub.closing.is_set():
            try:
                self.wfile.write(part)
            except OSError:
                break
            self.hub.endless_bytes += len(part)
            part = block
        self.close_connection = True

    def _send_error(self, status: HTTPStatus, code: str, message: str) -> None:
        self._send(
            status,
            json.dumps({"error": message}).encode(),
            {"X-Error-Code": code, "X-Error-Message": message},
        )

    def _send(
        self,
        status: HTTPStatus,
        body: bytes,
        headers: Mapping[str, str] | None = None,
        trouble: Trouble | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if trouble is None or (trouble.reached.is_set() and not trouble.repeats):
            self.wfile.write(body)
            return
        self.wfile.write(
            _damaged(body) if trouble.kind == "damage" else body[: trouble.after_bytes]
        )
        trouble.reached.set()
        if trouble.kind == "stall":
            self.hub.closing.wait()
        elif trouble.kind == "reset":
            time.sleep(0.2)  # a reset overtakes what the client has not read yet
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection = True


def _sibling(file: str, content: bytes, *, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": file}
    sibling: dict[str, Any] = {
        "rfilename": file,
        "size": len(content),
        "blobId": _git_sha1(content),
    }
    if file.endswith(_LARGE):
        sibling["lfs"] = {
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "pointerSize": 134,
        }
    return sibling


def _tree_entry(file: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": "file",
        "path": file,
        "size": len(content),
        "oid": _git_sha1(content),
    }
    if file.endswith(_LARGE):
        entry["lfs"] = {
            "size": len(content),
            "oid": hashlib.sha256(content).hexdigest(),
            "pointerSize": 134,
        }
    return entry


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _damaged(body: bytes) -> bytes:
    return body[:-1] + bytes([body[-1] ^ 1])
