"""A small server that speaks the hub's HTTP interface: repositories with revisions, gates, tokens and faults."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

READER, GRANTED, WRITER = "hf_reader", "hf_granted", "hf_writer"
"""Tokens of the user "me": one may read what is private, one also what is gated, one also write."""
LARGE = (".safetensors", ".parquet", ".bin")
"""Files that lie on another host, to which a request is redirected without its token."""

Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Repository:
    """One repository; `refs` name commits, `commits` hold files."""

    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: Mapping[str, str | bytes], *refs: str) -> str:
        """Another commit, which these branches and tags stand for."""
        name = hashlib.sha1(repr((sorted(files.items()), len(self.commits))).encode()).hexdigest()
        self.commits[name] = {path: value.encode() if isinstance(value, str) else value for path, value in files.items()}
        self.refs |= dict.fromkeys(refs, name)
        return name


class Hub(ThreadingHTTPServer):
    """`fault` may answer a request by a status, or by "cut": its body breaks off in the middle."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[str] = []
        self.uploads: dict[str, bytes] = {}  # SHA-256 → a large file that waits for its commit
        self.fault: Callable[[str], int | str | None] = lambda request: None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, kind: str, name: str, files: Mapping[str, str | bytes] | Path, **flags: bool) -> Repository:
        """A repository whose branch main has the files of a folder, or these."""
        if isinstance(files, Path):
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*") if path.is_file()}
        repository = self.repositories[kind, name] = Repository(**flags)
        repository.commit(files, "main")
        return repository


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        self.server.requests.append(request := f"{self.command} {unquote(address.path)}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        fault = self.server.fault(request)
        status, headers, content = (fault, {}, b"") if isinstance(fault, int) else self.answer(address.path, body)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
        self.close_connection = fault == "cut"

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self, address: str, body: bytes) -> Answer:
        first, *rest = [unquote(part) for part in address.strip("/").split("/")]
        if (written := self.write(first, rest, body)) is not None:
            return written
        if first == "cdn":
            assert self.headers.get("Authorization") is None
            kind, owner, name, commit, *path = rest
            return self.content(self.server.repositories[kind, f"{owner}/{name}"].commits[commit]["/".join(path)])
        is_api = first == "api"
        parts = rest if is_api else [first, *rest]
        if len(parts) < 3:
            return error(404, "", "Not found")
        kind = "dataset" if parts[0] == "datasets" else "model"
        owner, name, *parts = parts[1:] if is_api or kind == "dataset" else parts
        repository = self.server.repositories.get((kind, f"{owner}/{name}"))
        if refused := self.refuse(repository, is_file=not is_api and parts[-1] not in (".gitattributes", "README.md")):
            return refused
        assert repository is not None
        action, revision, *path = [*parts, *("revision", "main")[len(parts) :]]
        if action == "refs":
            return found({"branches": [ref(*pair) for pair in repository.refs.items()], "tags": [], "converts": []})
        commit = revision if revision in repository.commits else repository.refs.get(revision)
        if commit is None:
            return error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repository.commits[commit]
        if action == "resolve":
            return self.file(kind, f"{owner}/{name}", commit, files, "/".join(path))
        if action == "tree":
            return found(list(tree(files, "/".join(path), "recursive=true" in self.path.lower())))
        if action == "paths-info":
            form = parse_qs(body.decode())
            asked = form.get("paths") or json.loads(body)["paths"]
            return found([entry for entry in tree(files, "", True) if entry["path"] in asked])
        siblings = [{"rfilename": path, "size": len(content), "blobId": "0"} for path, content in files.items()]
        about = {"private": repository.private, "gated": "auto" if repository.gated else False, "tags": [], "downloads": 0}
        return found({"id": f"{owner}/{name}", "sha": commit, "siblings": siblings, **about})

    def write(self, first: str, rest: list[str], body: bytes) -> Answer | None:
        """What only a writer may ask for; None for another request. A hub may well repeat the token in what it says."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        what = rest[-1] if rest[-1:] in (["whoami-v2"], ["validate-yaml"], ["create"], ["batch"]) else "".join(rest[3:4])
        if first == "storage":
            assert not token and hashlib.sha256(body).hexdigest() == rest[0]
            self.server.uploads[rest[0]] = body
            return found({})
        if what not in ("whoami-v2", "validate-yaml", "create", "preupload", "batch", "commit"):
            return None
        if token not in (READER, GRANTED, WRITER):
            return error(401, "", f"Invalid credentials: {token}")
        if what == "whoami-v2":
            return found({"type": "user", "name": "me", "orgs": []})
        if token != WRITER:
            return error(403, "", f"{token} may not write")
        if what == "validate-yaml":
            return found({"errors": [], "warnings": []})
        if what == "create":
            asked = json.loads(body)
            name = f"{asked['organization'] or 'me'}/{asked['name']}"
            if not name.startswith("me/"):
                return error(404, "", f"no organisation of {token}")
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            taken = ("model", name) in self.server.repositories
            if not taken:
                self.server.add("model", name, {".gitattributes": ""}, private=private)
            return 409 if taken else 200, {}, json.dumps({"url": f"{self.server.endpoint}/{name}"}).encode()
        if what == "preupload":
            files = [file["path"] for file in json.loads(body)["files"]]
            mode = {False: "regular", True: "lfs"}
            return found({"files": [{"path": p, "uploadMode": mode[p.endswith(LARGE)], "shouldIgnore": False} for p in files]})
        if what == "batch":
            objects = [{key: own[key] for key in ("oid", "size")} for own in json.loads(body)["objects"]]
            place = f"http://localhost:{self.server.server_port}/storage"
            actions = [{"actions": {"upload": {"href": f"{place}/{own['oid']}", "header": {}}}} for own in objects]
            return found({"transfer": "basic", "objects": [own | act for own, act in zip(objects, actions, strict=True)]})
        repository = self.server.repositories["model", "/".join(rest[1:3])]
        files = dict(repository.commits[repository.refs["main"]])
        for line in map(json.loads, body.splitlines()):
            own = line["value"]
            if line["key"] == "file":
                files[own["path"]] = base64.b64decode(own["content"])
            elif line["key"] == "lfsFile":
                files[own["path"]] = self.server.uploads[own["oid"]]
            elif line["key"] == "deletedFile":
                del files[own["path"]]
        commit = repository.commit(files, "main")
        return found({"success": True, "commitOid": commit, "commitUrl": f"{self.server.endpoint}/x/y/commit/{commit}"})

    def refuse(self, repository: Repository | None, is_file: bool) -> Answer | None:
        """What a token may not see is not there; who has none is asked for one."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in (READER, GRANTED, WRITER):
            return error(401, "", "Invalid credentials in Authorization header")
        if repository is None or (repository.private and not token):
            return error(404 if token else 401, "RepoNotFound", "Repository not found")
        if repository.gated and is_file and token != GRANTED:
            return error(403 if token else 401, "GatedRepo", "Access to this repository is restricted")
        return None

    def file(self, kind: str, name: str, commit: str, files: dict[str, bytes], path: str) -> Answer:
        if path not in files:
            status, headers, content = error(404, "EntryNotFound", "Entry not found")
            return status, {**headers, "X-Repo-Commit": commit}, content
        etag, size = f'"{hashlib.sha256(files[path]).hexdigest()}"', str(len(files[path]))
        if not path.endswith(LARGE):
            status, headers, content = self.content(files[path])
            return status, {**headers, "X-Repo-Commit": commit, "ETag": etag}, content
        location = f"http://localhost:{self.server.server_port}/cdn/{kind}/{name}/{commit}/{path}"
        linked = {"X-Repo-Commit": commit, "X-Linked-Etag": etag, "X-Linked-Size": size, "Location": location}
        return 302, linked, b""

    def content(self, content: bytes) -> Answer:
        """The whole file, or from the byte on at which an earlier request broke off."""
        if not (asked := self.headers.get("Range")):
            return 200, {"Content-Length": str(len(content))}, content
        start, _, end = asked.removeprefix("bytes=").partition("-")
        part = content[int(start) : int(end) + 1 if end else None]
        return 206, {"Content-Range": f"bytes {start}-{int(start) + len(part) - 1}/{len(content)}"}, part


def tree(files: dict[str, bytes], below: str, recursive: bool) -> Iterator[dict[str, Any]]:
    folders = set()
    for path, content in files.items():
        if not path.startswith(below and f"{below}/"):
            continue
        inner = path.removeprefix(below).strip("/").split("/")
        folders |= {
            "/".join([*filter(None, [below]), *inner[:depth]]) for depth in range(1, len(inner))[: None if recursive else 1]
        }
        if recursive or len(inner) == 1:
            yield {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    for folder in sorted(folders):
        yield {"type": "directory", "path": folder, "oid": hashlib.sha1(folder.encode()).hexdigest()}


def ref(name: str, commit: str) -> dict[str, str]:
    return {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}


def found(value: Any) -> Answer:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def error(status: int, code: str, message: str) -> Answer:
    return status, {"X-Error-Code": code, "X-Error-Message": message}, json.dumps({"error": message}).encode()


@contextmanager
def serve() -> Iterator[Hub]:
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield hub
        hub.shutdown()
