"""A small Hugging Face Hub on loopback, for the real huggingface_hub client: HF_ENDPOINT=server.url.

It serves what fetching needs, as the Hub does it:

    GET /api/models/{id}[/revision/{r}]             what there is, and its commit
    GET /api/models/{id}/tree/{r}                   the files, with sizes and hashes
    HEAD, GET /{id}/resolve/{r}/{file}              ETag, X-Repo-Commit, ranges

and what publishing needs:

    GET /api/whoami-v2                              whose token it is
    POST /api/repos/create                          409 when it is there
    POST /api/validate-yaml                         the metadata of a card
    POST /api/models/{id}/branch/{b}                409 when it is there
    POST /api/models/{id}/preupload/{r}             how each file is to be uploaded
    POST /{id}.git/info/lfs/objects/batch           where to PUT the weights that are not there yet
    PUT /lfs/{sha256}                               a weight file
    POST /api/models/{id}/commit/{r}[?create_pr=1]  a commit, as lines of JSON

and refuses as the Hub does, with X-Error-Code. Repositories are plain objects that a test fills; `requests` keeps
every request that came.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import yaml

from tests.support.hub_contents import hash_of, is_lfs, part, size_of

PIECE = 1 << 18  # bytes that are sent at a time
RANGES = True  # whether Range requests are answered


@dataclass
class Repository:
    """`commits`: commit → its files, or where they lie; `refs`: branch or tag → commit. `members`: the tokens that may
    enter."""

    commits: dict[str, dict[str, bytes | Path]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    members: set[str] = field(default_factory=set)
    titles: dict[str, str] = field(default_factory=dict)  # commit → its message

    def commit(self, files: dict[str, bytes | Path], ref: str = "main") -> str:
        """Add a commit with `files`, and let `ref` name it."""
        digest = hashlib.sha1(repr((sorted(files.items()), ref, len(self.commits))).encode()).hexdigest()
        self.commits[digest] = files
        self.refs[ref] = digest
        return digest

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


@dataclass(frozen=True)
class Account:
    """Whose token it is, and what it may do: `role` is "read" or "write"; `orgs` maps organizations to such roles."""

    name: str
    role: str = "write"
    orgs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    token: str | None
    range: str | None
    body: bytes = b""
    query: str = ""


class Hub:
    """The server, running while its `with` block lasts."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.accounts: dict[str, Account] = {}  # by token
        self.objects: dict[str, bytes] = {}  # weight files that were uploaded, by SHA-256
        self.requests: list[Request] = []
        #: Answers every request whose path it returns a status for.
        self.fault: Callable[[Request], int | None] = lambda _: None
        #: Ends the connection after so many bytes of an answer for which it returns a number.
        self.cut: Callable[[Request], int | None] = lambda _: None
        #: Makes something else of a file's content.
        self.alter: Callable[[Request, bytes], bytes] = lambda _, content: content
        #: Makes something else of what is said about a repository, an account, or a commit: any JSON, or bytes.
        self.say: Callable[[Request, Any], Any] = lambda _, answer: answer
        #: Bytes of answers in a second, all together.
        self.rate: float | None = None
        self._line, self._free_at = threading.Lock(), 0.0
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def settings(self) -> dict[str, str]:
        """Environment variables with which the client asks this Hub, without a token of the user's."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": "",
                "NO_PROXY": "*"}  # fmt: skip

    def add(self, repo_id: str, folder: Path, **rules: Any) -> Repository:
        """A repository with the files of `folder` as its first commit."""
        repository = self.repositories[repo_id] = Repository(**rules)
        repository.commit({p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()})
        return repository

    def fetched(self) -> set[str]:
        """Names of the files that were downloaded."""
        paths = [unquote(r.path) for r in self.requests if r.method == "GET" and "/resolve/" in r.path]
        return {path.split("/resolve/")[1].split("/", 1)[1] for path in paths}

    def wait_for_the_line(self, nbytes: int) -> None:
        """Sleep as long as `nbytes` keep a line of this `rate` busy, behind what others send."""
        if self.rate:
            with self._line:
                # What a sleep took too long is made good, as a line's buffers do it.
                self._free_at = max(self._free_at, time.monotonic() - 0.1) + nbytes / self.rate
                until = self._free_at
            time.sleep(max(0.0, until - time.monotonic()))

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def at_first(status: int) -> Callable[[Request], int | None]:
    """A `fault`: every address answers `status` the first time."""
    seen: set[tuple[str, str]] = set()

    def fault(request: Request) -> int | None:
        asked = (request.method, request.path)
        if asked in seen:
            return None
        seen.add(asked)
        return status

    return fault


class Refusal(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", body: bytes = b"") -> None:
        self.status, self.code, self.message, self.body = status, code, message, body


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    # Group names are the arguments. A repository's id is `name` or `owner/name`.
    routes: ClassVar[list[tuple[str, str, str]]] = [
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/models/(?P<repo_id>[^/]+/[^/]+)/branch/(?P<branch>[^/]+)", "branch"),
        ("POST", r"/api/models/(?P<repo_id>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
        ("POST", r"/api/models/(?P<repo_id>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "push"),
        ("GET", r"/api/models/(?P<repo_id>[^/]+(/[^/]+)?)/tree/(?P<revision>[^/]+)(/(?P<folder>.*))?", "tree"),
        ("GET", r"/api/models/(?P<repo_id>[^/]+(/[^/]+)?)/revision/(?P<revision>[^/]+)", "info"),
        ("GET", r"/api/models/(?P<repo_id>[^/]+(/[^/]+)?)", "info"),
        ("HEAD|GET", r"/(?P<repo_id>[^/]+(/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", "file"),
    ]

    def answer(self) -> None:
        header = self.headers.get("Authorization") or ""
        token = header.removeprefix("Bearer ") or None
        url, body = urlsplit(self.path), self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = Request(self.command, url.path, token, self.headers.get("Range"), body, url.query)
        self.hub.requests.append(request)
        try:
            if status := self.hub.fault(request):
                raise Refusal(status)
            for methods, pattern, name in self.routes:
                if self.command in methods.split("|") and (match := re.fullmatch(pattern, request.path)):
                    arguments = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
                    getattr(self, name)(request, **arguments)
                    return
            raise Refusal(404)
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            self.send(refusal.status, refusal.body, {k: v for k, v in headers.items() if v})

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def repository(self, request: Request, repo_id: str) -> Repository:
        """Who may not enter a private repository is told that there is none."""
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and request.token not in repository.members):
            raise Refusal(401 if request.token is None else 404, "RepoNotFound", "Repository not found")
        return repository

    def commit(self, repository: Repository, revision: str) -> str:
        commit = repository.resolve(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def info(self, request: Request, repo_id: str, revision: str = "main") -> None:
        repository = self.repository(request, repo_id)
        commit = self.commit(repository, revision)
        files = [{"rfilename": name} for name in repository.commits[commit]]
        self.send_json(request, {
            "id": repo_id, "modelId": repo_id, "sha": commit, "private": repository.private,
            "gated": "manual" if repository.gated else False, "tags": [], "downloads": 0, "likes": 0, "siblings": files,
        })  # fmt: skip

    def tree(self, request: Request, repo_id: str, revision: str, folder: str = "") -> None:
        repository = self.repository(request, repo_id)
        files = repository.commits[self.commit(repository, revision)]
        entries = []
        for name, content in files.items():
            entry = {"type": "file", "path": name, "size": size_of(content), "oid": hash_of(name, content)}
            if is_lfs(name):
                entry["lfs"] = {"oid": hash_of(name, content), "size": size_of(content), "pointerSize": 130}
            entries.append(entry)
        self.send_json(request, [e for e in entries if str(e["path"]).startswith(folder)])

    def file(self, request: Request, repo_id: str, revision: str, file: str) -> None:
        repository = self.repository(request, repo_id)
        if repository.gated and request.token not in repository.members:
            raise Refusal(
                401 if request.token is None else 403, "GatedRepo", f"Access to model {repo_id} is restricted"
            )
        commit = self.commit(repository, revision)
        content = repository.commits[commit].get(file)
        if content is None:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        etag, size = hash_of(file, content), size_of(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if is_lfs(file):
            headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(size)}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", request.range or "") if RANGES else None
        begin, end = (int(match[1]), min(int(match[2] or size) + 1, size)) if match else (0, size)
        if match:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        body = b"" if self.command == "HEAD" else self.hub.alter(request, part(content, begin, end))
        self.send(206 if match else 200, body, {"Content-Length": str(end - begin), **headers}, request)

    def account(self, request: Request, owner: str | None = None) -> Account:
        """Whose token it is; 403 when they may not write to what `owner` has."""
        account = self.hub.accounts.get(request.token or "")
        if account is None:
            raise Refusal(401, message="Invalid username or password.")
        if owner is not None:
            role = account.role if owner == account.name else account.orgs.get(owner, "read")
            if "read" in (role, account.role):
                raise Refusal(403, message=f"You don't have the rights to write under the namespace {owner}.")
        return account

    def whoami(self, request: Request) -> None:
        account = self.account(request)
        orgs = [{"name": name, "roleInOrg": role} for name, role in account.orgs.items()]
        token = {"displayName": "a token", "role": account.role}
        self.send_json(request, {"type": "user", "name": account.name, "orgs": orgs, "auth": {"accessToken": token}})

    def create(self, request: Request) -> None:
        asked = json.loads(request.body)
        account = self.account(request)
        repo_id = f"{asked.get('organization') or account.name}/{asked['name']}"
        self.account(request, repo_id.split("/")[0])
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.hub.repositories:
            raise Refusal(409, message="You already created this model repo", body=json.dumps(answer).encode())
        private = asked.get("visibility") == "private" or asked.get("private", False)
        repository = self.hub.repositories[repo_id] = Repository(private=private, members={request.token or ""})
        repository.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self.send_json(request, answer)

    def validate(self, request: Request) -> None:
        """The metadata of a card, by what the Hub says about these fields."""
        block = re.match(r"---\n(.*?)\n---", json.loads(request.body)["content"], re.DOTALL)
        data = yaml.safe_load(block[1]) if block else {}

        def each(pattern: str) -> Callable[[Any], bool]:
            return lambda value: all(re.fullmatch(pattern, x) for x in ([value] if isinstance(value, str) else value))

        rules: dict[str, Callable[[Any], bool]] = {
            "base_model": each(r"[\w.-]+/[\w.-]+"),
            "base_model_relation": lambda x: x in ("finetune", "adapter", "merge", "quantized"),
            "language": each(r"[a-z]{2,3}"),
            "license": lambda x: isinstance(x, str) and x == x.lower(),
            "tags": lambda x: isinstance(x, list) and all(isinstance(tag, str) for tag in x),
            "pipeline_tag": lambda x: isinstance(x, str),
        }
        errors = [{"message": f'"{key}" is not valid'} for key in rules if key in data and not rules[key](data[key])]
        answer = {"errors": errors, "warnings": []}
        self.send(400 if errors else 200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def branch(self, request: Request, repo_id: str, branch: str) -> None:
        repository = self.repository(request, repo_id)
        self.account(request, repo_id.split("/")[0])
        if branch in repository.refs:
            raise Refusal(409, message="Reference already exists")
        repository.refs[branch] = repository.refs["main"]
        self.send_json(request, {})

    def preupload(self, request: Request, repo_id: str, revision: str) -> None:
        repository = self.repository(request, repo_id)
        self.account(request, None if "create_pr=1" in request.query else repo_id.split("/")[0])
        files = repository.commits[self.commit(repository, revision)]
        answers = []
        for file in json.loads(request.body)["files"]:
            path, there = file["path"], files.get(file["path"])
            lfs = is_lfs(path)
            oid = None if there is None else hash_of(path, there)
            mode = "lfs" if lfs else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send_json(request, {"files": answers})

    def lfs_batch(self, request: Request, repo_id: str) -> None:
        self.repository(request, repo_id)
        objects = json.loads(request.body)["objects"]
        for o in objects:
            if o["oid"] not in self.hub.objects:
                o["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}
        self.send_json(request, {"transfer": "basic", "objects": objects})

    def lfs_put(self, request: Request, oid: str) -> None:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Refusal(400, message="the content does not match its hash")
        self.hub.objects[oid] = request.body
        self.send_json(request, {})

    def push(self, request: Request, repo_id: str, revision: str) -> None:
        repository = self.repository(request, repo_id)
        pull_request = "create_pr=1" in request.query
        self.account(request, None if pull_request else repo_id.split("/")[0])
        head = self.commit(repository, revision)
        files = dict(repository.commits[head])
        lines = [json.loads(line) for line in request.body.splitlines()]
        if lines[0]["value"].get("parentCommit", head) != head:
            raise Refusal(412, message="the parent commit is not the head of the branch")
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = repository.commit(files, "refs/pr/1" if pull_request else revision)
        repository.titles[oid] = lines[0]["value"]["summary"]
        url = f"{self.hub.url}/{repo_id}"
        answer = {"commitOid": oid, "commitUrl": f"{url}/commit/{oid}"}
        self.send_json(request, {**answer, "pullRequestUrl": f"{url}/discussions/1"} if pull_request else answer)

    def send_json(self, request: Request, value: object) -> None:
        said = self.hub.say(request, value)
        body = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.send(200, body, {"Content-Type": "application/json"})

    def send(self, status: int, body: bytes, headers: dict[str, str], request: Request | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.hub.cut(request) if request else None
        if cut is not None:
            body, self.close_connection = body[:cut], True
        with contextlib.suppress(ConnectionError):  # the client may have gone
            for start in range(0, len(body), PIECE):
                self.hub.wait_for_the_line(len(body[start : start + PIECE]))
                self.wfile.write(body[start : start + PIECE])

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: `Hub.requests` keeps what came."""
