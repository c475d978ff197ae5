"""A hub on loopback that huggingface_hub's own client talks to: listings, redirects to a store, ranges, tokens, gated
and private repositories, uploads; and faults to order (cut connections, other contents)."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

LARGE = (".safetensors", ".bin", ".npz", ".ckpt", ".pt", ".png")  # kept in the store, as with Git LFS
TOKEN = "hf_good"


@dataclass
class Repo:
    """commits: by hash the files of each, the newest last. gated: needs TOKEN. private: not there without TOKEN."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: Mapping[str, bytes]) -> str:
        name = hashlib.sha1(repr(sorted(files)).encode() + str(len(self.commits)).encode()).hexdigest()
        self.commits[name] = dict(files)
        return name

    def resolve(self, revision: str) -> str | None:
        newest = next(reversed(self.commits), None)
        return newest if revision == "main" else self.tags.get(revision, revision if revision in self.commits else None)


@dataclass
class Hub:
    """cuts: how often the store still breaks off in the middle of a file; damaged: files whose content is another;
    down: the status of every answer; requests: what was asked for, as 'GET /path' with the range, if any."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    store: dict[str, bytes] = field(default_factory=dict)
    cuts: int = 0
    damaged: set[str] = field(default_factory=set)
    down: int | None = None
    requests: list[str] = field(default_factory=list)
    leaked: bool = False  # the store was sent a token

    def add(self, name: str, source: Path | Mapping[str, bytes], *, gated: bool = False, private: bool = False) -> str:
        """A commit of a folder's files, or of these; returns its hash."""
        if isinstance(source, Path):
            source = {p.relative_to(source).as_posix(): p.read_bytes() for p in source.rglob("*") if p.is_file()}
        for content in source.values():
            self.store[hashlib.sha256(content).hexdigest()] = content
        return self.repos.setdefault(name, Repo(gated=gated, private=private)).commit(source)

    def downloads(self) -> list[str]:
        """The files whose content was asked for, in order."""
        found = (re.match(r"GET /[^/]+/[^/]+/resolve/\w+/(.+?)(?: |$)", line) for line in self.requests)
        return [match[1] for match in found if match]


def listing(files: Mapping[str, bytes]) -> list[dict]:
    rows = []
    for path, content in files.items():
        row: dict = {"rfilename": path, "size": len(content), "blobId": git_hash(content)}
        if path.endswith(LARGE):
            row["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        rows.append(row)
    return rows


def git_hash(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None: ...

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, text: str = "") -> None:
        self.answer(status, b"", X_Error_Code=code, X_Error_Message=text or code)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def allowed(self, repo: Repo | None, *, content: bool) -> bool:
        """Whether this request may see the repository; a gated one shows its listing to everybody."""
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or (repo.private and not known):
            self.refuse(401, "RepoNotFound", "Invalid username or password.")
        elif repo.gated and not known and content:
            self.refuse(403 if self.headers.get("Authorization") else 401, "GatedRepo", "Access is restricted.")
        else:
            return True
        return False

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        span = self.headers.get("Range")
        self.hub.requests.append(f"{self.command} {path}{f' {span}' if span else ''}")
        if self.hub.down is not None:
            self.answer(self.hub.down)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self.describe(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(*match.groups())
        elif match := re.fullmatch(r"/store/(\w+)", path):
            self.send(self.hub.store[match[1]])
        else:
            self.answer(404)

    def describe(self, name: str, revision: str) -> None:
        repo = self.hub.repos.get(name)
        if repo is None or not self.allowed(repo, content=False):
            if repo is None:
                self.allowed(None, content=False)
            return
        if (commit := repo.resolve(revision)) is None:
            return self.refuse(404, "RevisionNotFound")
        info = {"id": name, "sha": commit, "siblings": listing(repo.commits[commit]), "gated": repo.gated}
        self.answer(200, json.dumps(info).encode(), Content_Type="application/json")

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.hub.repos.get(name)
        if not self.allowed(repo, content=True) or repo is None:
            return
        if (commit := repo.resolve(revision)) is None:
            return self.refuse(404, "RevisionNotFound")
        content = repo.commits[commit].get(path)
        if content is None:
            return self.refuse(404, "EntryNotFound")
        if not path.endswith(LARGE):
            return self.answer(200, content, X_Repo_Commit=commit, ETag=f'"{git_hash(content)}"')
        key = hashlib.sha256(content).hexdigest()
        if path in self.hub.damaged:
            self.hub.store["damaged"] = bytes(len(content))
        place = "damaged" if path in self.hub.damaged else key
        self.answer(
            302,
            # Another host, as the hub's store is: the client must not send it the token.
            Location=f"{self.hub.url.replace('127.0.0.1', 'localhost')}/store/{place}",
            X_Repo_Commit=commit,
            X_Linked_Etag=f'"{key}"',
            X_Linked_Size=str(len(content)),
        )

    def send(self, content: bytes) -> None:
        """A file of the store or a range of it; it breaks off in the middle while `cuts` are left."""
        self.hub.leaked |= self.headers.get("Authorization") is not None
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start = int(match[1]) if match else 0
        rest = content[start : int(match[2]) + 1 if match and match[2] else None]
        self.send_response(206 if match else 200)
        self.send_header("Content-Length", str(len(rest)))
        if match:
            self.send_header("Content-Range", f"bytes {start}-{start + len(rest) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cuts > 0:
            self.hub.cuts -= 1
            self.wfile.write(rest[: len(rest) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.wfile.write(rest)

    # Uploads

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self.body()
        self.hub.requests.append(f"POST {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "", "Invalid username or password.")
        if path == "/api/repos/create":
            wish = json.loads(body)
            name = wish["name"] if "/" in wish["name"] else f"{wish.get('organization') or 'me'}/{wish['name']}"
            self.hub.repos.setdefault(name, Repo(private=wish.get("private") or wish.get("visibility") == "private"))
            return self.json({"url": f"{self.hub.url}/{name}", "name": name})
        if path == "/api/validate-yaml":  # of a model card
            return self.json({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/(.+)/preupload/(.+)", path):
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular"}
                for f in json.loads(body)["files"]
            ]
            return self.json({"files": [{**f, "shouldIgnore": False} for f in files]})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.hub.url}/upload/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self.json({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/(.+)/commit/(.+)", path):
            return self.commit(match[1], body)
        self.answer(404)

    def do_PUT(self) -> None:
        content = self.body()
        self.hub.store[hashlib.sha256(content).hexdigest()] = content
        self.answer(200)

    def commit(self, name: str, body: bytes) -> None:
        repo = self.hub.repos[name]
        newest = repo.resolve("main")
        files = dict(repo.commits[newest]) if newest else {}
        for line in (json.loads(row) for row in body.splitlines() if row.strip()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.store[value["oid"]]
        commit = repo.commit(files)
        self.json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit, "hookOutput": ""})

    def json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")


@contextmanager
def serve() -> Iterator[Hub]:
    """An empty hub on a free port of loopback."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def hub_process() -> Iterator[Hub]:
    with serve() as hub:
        yield hub


@pytest.fixture
def hub(hub_process, tmp_path_factory, monkeypatch) -> Hub:
    """An empty hub, which HF_ENDPOINT names, and an empty cache."""

    from huggingface_hub import constants

    for held in (hub_process.repos, hub_process.damaged, hub_process.requests):
        held.clear()
    hub_process.cuts, hub_process.down, hub_process.leaked = 0, None, False
    monkeypatch.setenv("HF_ENDPOINT", hub_process.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between two tries
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # uploads to its own servers
    return hub_process
