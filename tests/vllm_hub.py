"""A stand-in of the Hugging Face Hub: its HTTP API as far as its clients ask, over local directories, and a record.

What it answers was taken from the requests of ``huggingface_hub`` 2.4, which believes it without being told anything
but ``HF_ENDPOINT``. Models only, one branch (``main``), no large-file redirection, no authentication.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

BRANCH = "main"
WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
_CHUNK = 1 << 20
_RESOLVE = re.compile(r"/(?P<model>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_API = re.compile(
    r"/api/models/(?P<model>[^/]+/[^/]+)"
    r"(?:/(?P<what>revision|tree|paths-info|refs)(?:/(?P<revision>[^/]+))?(?P<rest>/.*)?)?"
)
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked, and what was sent.

    Attributes:
        method: of HTTP.
        path: without the query.
        file: in the repository, where a file was asked for.
        status: of the answer.
        nbytes: of the answer's body that were really sent.
    """

    method: str
    path: str
    file: str
    status: int
    nbytes: int

    @property
    def of_weights(self) -> bool:
        """Whether a weight file's content was sent, or part of it."""
        return self.method == "GET" and self.file.endswith(WEIGHTS)


@dataclass(frozen=True)
class Blob:
    """A file of a commit."""

    path: Path
    size: int
    sha1: str

    @classmethod
    def of(cls, path: Path) -> Blob:
        with path.open("rb") as file:
            return cls(path, path.stat().st_size, hashlib.file_digest(file, "sha1").hexdigest())


@dataclass(frozen=True)
class Commit:
    """The files of a directory, as they were when it was published."""

    sha: str
    files: Mapping[str, Blob]

    @classmethod
    def of(cls, directory: Path) -> Commit:
        files = {path.name: Blob.of(path) for path in sorted(directory.iterdir()) if path.is_file()}
        told = json.dumps({name: blob.sha1 for name, blob in files.items()})
        return cls(hashlib.sha1(told.encode(), usedforsecurity=False).hexdigest(), files)

    @property
    def weights(self) -> int:
        """Bytes of its weight files."""
        return sum(blob.size for name, blob in self.files.items() if name.endswith(WEIGHTS))


@dataclass
class Hub:
    """Models by name, each with its commits, the last of which is ``main``. Thread-safe as far as tests go.

    Attributes:
        endpoint: for ``HF_ENDPOINT``.
        hangs_up_on: connections on which a question with this text comes are closed without an answer.
    """

    endpoint: str
    hangs_up_on: str | None = None
    models: dict[str, list[Commit]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)

    def push(self, model: str, directory: Path) -> Commit:
        """``main`` of ``model`` is now what ``directory`` holds; earlier commits stay."""
        commit = Commit.of(directory)
        self.models.setdefault(model, []).append(commit)
        return commit

    def asked(self) -> list[Request]:
        """What was asked since the last call."""
        asked, self.requests = self.requests, []
        return asked

    def commit(self, model: str, revision: str) -> Commit | None:
        """The commit that a branch's name or a commit's says."""
        commits = self.models.get(model, [])
        if revision == BRANCH:
            return commits[-1] if commits else None
        return next((commit for commit in commits if commit.sha == revision), None)


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    """A running one, empty, on a free port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        made = Hub(f"http://127.0.0.1:{server.server_port}")
        server.RequestHandlerClass = type("Handler", (_Handler,), {"hub": made})
        thread = threading.Thread(target=server.serve_forever, name="hub", daemon=True)
        thread.start()
        try:
            yield made
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Files, and what is known of a model."""
        path = unquote(urlsplit(self.path).path)
        if self.hub.hangs_up_on and self.hub.hangs_up_on in self.path:
            self.close_connection = True
        elif match := _RESOLVE.fullmatch(path):
            self._resolve(match["model"], match["revision"], match["file"])
        elif match := _API.fullmatch(path):
            self._api(match["model"], match["what"] or "revision", match["revision"] or BRANCH, match["rest"] or "")
        else:
            self._refuse("EntryNotFound")

    def do_HEAD(self) -> None:
        """The same without bodies."""
        self.do_GET()

    def do_POST(self) -> None:
        """``paths-info``, the one question that is not put with GET."""
        self._body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.do_GET()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (the base class names it)
        """Nothing on standard error: the record is in ``Hub.requests``."""

    def _api(self, model: str, what: str, revision: str, rest: str) -> None:
        commit = self.hub.commit(model, revision)
        if commit is None:
            self._refuse("RevisionNotFound" if model in self.hub.models else "RepoNotFound")
        elif what == "refs":
            main = {"name": BRANCH, "ref": f"refs/heads/{BRANCH}", "targetCommit": self.hub.models[model][-1].sha}
            self._json({"branches": [main], "tags": [], "converts": []})
        elif what == "revision":
            query = parse_qs(urlsplit(self.path).query)
            self._json(_described(model, commit, with_sizes="blobs" in query))
        elif what == "paths-info":
            wanted = set(parse_qs(self._body.decode()).get("paths", []))
            self._json([_entry(name, blob) for name, blob in commit.files.items() if name in wanted])
        elif rest.strip("/"):
            self._refuse("EntryNotFound")  # there are no folders
        else:
            self._json([_entry(name, blob) for name, blob in commit.files.items()])

    def _resolve(self, model: str, revision: str, name: str) -> None:
        commit = self.hub.commit(model, revision)
        if commit is None:
            self._refuse("RevisionNotFound" if model in self.hub.models else "RepoNotFound")
        elif (blob := commit.files.get(name)) is None:
            self._refuse("EntryNotFound", name, {"X-Repo-Commit": commit.sha})
        else:
            self._file(name, blob, commit.sha)

    def _file(self, name: str, blob: Blob, sha: str) -> None:
        first, last = 0, blob.size - 1
        if asked := _RANGE.fullmatch(self.headers["Range"] or ""):
            first, last = int(asked[1]), min(int(asked[2] or last), last)
        headers = {
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
            "ETag": f'"{blob.sha1}"',
            "X-Repo-Commit": sha,
        }
        if asked:
            headers["Content-Range"] = f"bytes {first}-{last}/{blob.size}"
        status = HTTPStatus.PARTIAL_CONTENT if asked else HTTPStatus.OK
        self._answer(status, last - first + 1, headers)
        self._record(name, status, self._send(blob.path, first, last + 1))

    def _send(self, path: Path, first: int, end: int) -> int:
        """Bytes ``first`` to ``end`` as far as the client takes them; how many."""
        sent = 0
        if self.command == "HEAD":
            return sent
        with path.open("rb") as file, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            file.seek(first)
            while first + sent < end:
                sent += self.wfile.write(file.read(min(_CHUNK, end - first - sent)))
        return sent

    def _json(self, told: Any) -> None:
        body = json.dumps(told).encode()
        self._answer(HTTPStatus.OK, len(body), {"Content-Type": "application/json"})
        if self.command != "HEAD":
            self.wfile.write(body)
        self._record("", HTTPStatus.OK, len(body))

    def _refuse(self, code: str, file: str = "", headers: Mapping[str, str] | None = None) -> None:
        self._answer(HTTPStatus.NOT_FOUND, 0, {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})
        self._record(file, HTTPStatus.NOT_FOUND, 0)

    def _answer(self, status: HTTPStatus, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def _record(self, file: str, status: HTTPStatus, nbytes: int) -> None:
        path = unquote(urlsplit(self.path).path)
        made = Request(method=self.command, path=path, file=file, status=int(status), nbytes=nbytes)
        self.hub.requests.append(made)


def _described(model: str, commit: Commit, *, with_sizes: bool) -> dict[str, Any]:
    siblings = [
        {"rfilename": name, **({"size": blob.size, "blobId": blob.sha1} if with_sizes else {})}
        for name, blob in commit.files.items()
    ]
    return {
        "_id": commit.sha[:24],
        "id": model,
        "modelId": model,
        "sha": commit.sha,
        "siblings": siblings,
        "private": False,
        "gated": False,
        "disabled": False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
    }


def _entry(name: str, blob: Blob) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": blob.size, "oid": blob.sha1}
