"""A stand-in for a Hugging Face hub on loopback, with the faults of real ones and of networks.

It serves what huggingface_hub asks for, as the hub does: a repository's listing with hashes,
and files, the large ones by a redirect to another host (here localhost for 127.0.0.1).

    with Hub() as hub:
        commit = hub.publish("owner/name", {"model.safetensors": b"..."})
        hub.cut_at = 1000  # every answer ends after byte 1000 of the file
        ...                # a process with HF_ENDPOINT=hub.url
        hub.requests       # what was asked: ("GET", "/cdn/...", "bytes=1000-")

It takes uploads as well, from whoever sends the token of `writers`: small files within a commit,
large ones beforehand, by LFS. A commit is made whole or not at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".ckpt", ".pt", ".safetensors", ".bin")  # what the hub keeps out of git


@dataclass
class Repository:
    """Files by commit, and commits by branch; a gated one shows its listing alone."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False


def hash_of(name: str, content: bytes) -> str:
    """Name content as the hub does: large files by sha256, small ones as git does."""
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """A hub that listens while its context lasts; the attributes below switch faults on."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, str]] = []  # method, path, range
        self.headers: list[dict[str, str]] = []
        self.cut_at: int | None = None  # the connection ends at this byte of a large file
        self.cuts = -1  # how often it does so; -1: always
        self.flip_at: int | None = None  # this byte of a large file arrives wrong
        self.claimed_size: int | None = None  # what is said to be a large file's size
        self.status = 0  # the answer to whoever asks for a file
        self.api_status = 0  # the answer to whoever asks for a listing
        self.writers = {"hf_writer"}  # tokens that may write
        self.readers = {"hf_reader"}  # tokens that may only read
        self.uploads: dict[str, bytes] = {}  # large files by sha256, before a commit names them
        self.cards: list[str] = []  # model cards that were given to be checked
        self.cut_upload = False  # the connection ends in the middle of every large file
        self.on_commit: Callable[[], object] = lambda: None  # happens before each commit
        self.on_listing: Callable[[], object] = lambda: None  # happens after each listing
        self._server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self})
        )
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def publish(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Commit files to a branch; return the commit."""
        commit = hashlib.sha1(f"{branch} {sorted(files.items())}".encode()).hexdigest()
        repository = self.repositories.setdefault(repo, Repository())
        repository.commits[commit] = files
        repository.branches[branch] = commit
        return commit

    def find(self, sha256: str) -> bytes:
        """Return the large file of that hash."""
        for repository in self.repositories.values():
            for files in repository.commits.values():
                for content in files.values():
                    if hashlib.sha256(content).hexdigest() == sha256:
                        return content
        raise KeyError(sha256)

    @property
    def downloads(self) -> list[str]:
        """The paths from which content was asked for."""
        return [
            path for method, path, _ in self.requests if method == "GET" and "/api/" not in path
        ]

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self._remember(path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._list(match[1], unquote(match[2] or "main"))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], unquote(match[2]), unquote(match[3]))
        elif match := re.fullmatch(r"/cdn/([0-9a-f]{64})", path):
            self._send_large(self.hub.find(match[1]))
        else:
            self._answer(404)

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        self._remember(path)
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        if path == "/api/validate-yaml":
            self.hub.cards.append(json.loads(body)["content"])
            self._answer(200, b'{"errors": [], "warnings": []}')
        elif not self._may_write():
            return
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            if self._files(match[1], "main") is not None:
                files = [one["path"] for one in json.loads(body)["files"]]
                modes = [
                    {
                        "path": name,
                        "uploadMode": "lfs" if name.endswith(LARGE) else "regular",
                        "shouldIgnore": False,
                    }
                    for name in files
                ]
                self._answer(200, json.dumps({"files": modes}).encode())
        elif re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            answer = {"transfer": "basic", "objects": objects}
            self._answer(200, json.dumps(answer).encode())
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self.hub.on_commit()
            self._commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self._answer(404)

    def do_PUT(self) -> None:
        path = urlsplit(self.path).path
        self._remember(path)
        size = int(self.headers["Content-Length"])
        if self.hub.cut_upload:
            self.rfile.read(size // 2)
            self.close_connection = True
            return
        content = self.rfile.read(size)
        oid = path.removeprefix("/lfs/")
        if hashlib.sha256(content).hexdigest() != oid:
            self._answer(400)
            return
        self.hub.uploads[oid] = content
        self._answer(200)

    def _remember(self, path: str) -> None:
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        self.hub.headers.append({name.lower(): value for name, value in self.headers.items()})

    def _may_write(self) -> bool:
        """Whether the token may write; if not, the answer is given."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token in self.hub.writers:
            return True
        if token in self.hub.readers:
            self._answer(403, headers={"X-Error-Message": "You don't have the rights"})
        else:
            message = "Invalid credentials in Authorization header"
            self._answer(401, headers={"X-Error-Message": message})
        return False

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization']}/{asked['name']}"
        url = json.dumps({"url": f"{self.hub.url}/{repo}"}).encode()
        if repo in self.hub.repositories:
            self._answer(409, url)
            return
        self.hub.publish(repo, {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.hub.repositories[repo].private = asked.get("visibility") == "private" or bool(
            asked.get("private")
        )
        self._answer(200, url)

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        found = self._files(repo, "main")
        if found is None:
            return
        parent, files = found
        files = dict(files)
        if lines[0]["value"].get("parentCommit", parent) != parent:
            self._answer(412, b'{"error": "A commit has happened since. Please refresh."}')
            return
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        commit = self.hub.publish(repo, files)
        answer = {"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit}
        self._answer(200, json.dumps({"success": True, **answer}).encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, headers={"X-Error-Code": code, "X-Error-Message": code})

    def _files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Find a revision's commit and files; None, and the answer is given, where none are."""
        repository = self.hub.repositories.get(repo)
        if repository is None:
            self._refuse(401, "RepoNotFound")  # so the hub answers whoever is not logged in
            return None
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            self._refuse(404, "RevisionNotFound")
            return None
        return commit, repository.commits[commit]

    def _list(self, repo: str, revision: str) -> None:
        if self.hub.api_status:
            self._answer(self.hub.api_status, b"<html>\nout of order\n</html>")
            return
        found = self._files(repo, revision)
        if found is None:
            return
        commit, files = found
        siblings = []
        for name, content in files.items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(content)}
            entry["blobId"] = hash_of("", content)
            if name.endswith(LARGE):
                sha256 = hash_of(name, content)
                entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        body = {"_id": "0", "id": repo, "modelId": repo, "sha": commit, "siblings": siblings}
        self._answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        self.hub.on_listing()

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        found = self._files(repo, revision)
        if found is None:
            return
        if self.hub.repositories[repo].gated:
            self._refuse(403, "GatedRepo")
            return
        if self.hub.status:
            self._refuse(self.hub.status, "EntryNotFound" if self.hub.status == 404 else "")
            return
        commit, files = found
        if name not in files:
            self._refuse(404, "EntryNotFound")
            return
        content = files[name]
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not name.endswith(LARGE):
            self._answer(200, content, {**headers, "ETag": f'"{hash_of(name, content)}"'})
            return
        sha256, size = hash_of(name, content), self.hub.claimed_size or len(content)
        headers |= {"X-Linked-ETag": f'"{sha256}"', "X-Linked-Size": str(size)}
        location = f"http://localhost:{self.hub.port}/cdn/{sha256}"
        self._answer(302, headers={**headers, "ETag": '"a pointer"', "Location": location})

    def _send_large(self, content: bytes) -> None:
        """Send a large file, from where it is asked for, with the faults that are on."""
        hub, start = self.hub, 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(match[1])
        if (at := hub.flip_at) is not None:
            content = content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]
        body = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Accept-Ranges", "bytes")
        if start:
            whole = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.send_header("Content-Range", whole)
        self.end_headers()
        if hub.cut_at is not None and hub.cuts:
            hub.cuts -= 1
            body = body[: max(0, hub.cut_at - start)]
            self.close_connection = True
        self.wfile.write(body)
