"""A small Hub on loopback for the real client: repositories, uploads by LFS, commits, downloads, and injected faults.

    with HubStandIn(token="secret") as hub:
        hub.add("toys/sd", folder)                  # a model that exists already
        hub.inject_fault(r"/commit/", 503, times=2) # a status, "hang", "drop", "cut" or seconds of delay
        ...                                         # clients with HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET=1
        hub.files["me/model"]["README.md"]          # what was committed

It has one user, "me", who may write everywhere with the token; everyone may read. What the client never requests is
missing: branches, pull requests, the Xet storage.
"""

import base64
import hashlib
import json
import re
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml


class HubStandIn:
    """The server, from `with` to its end. Attributes: `url`, `files` by repository and path, `requests` received."""

    def __init__(self, token: str):
        self.token = token
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, list[str]] = {}
        self.requests: list[tuple[str, str]] = []
        self.objects: dict[str, bytes] = {}
        self.read_only = False
        self._faults: list[list[Any]] = []
        self._lock = threading.Lock()
        self.closing = threading.Event()
        hub = self

        class Handler(_Handler):
            stand_in = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> "HubStandIn":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, repo_id: str, folder: str | Path, card: str = "") -> None:
        """A repository with the files of a folder, and `card` as its README."""
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
        self.files[repo_id] = files | ({"README.md": card.encode()} if card else {})
        self.commits[repo_id] = ["first"]

    def inject_fault(self, pattern: str, how: int | float | str, times: int = 10**9, method: str = "") -> None:
        """The next `times` requests of `method` (default: any) to a path that matches `pattern` fail."""
        self._faults.append([re.compile(pattern), how, times, method])

    def clear_faults(self) -> None:
        self._faults.clear()

    def fault(self, method: str, path: str) -> int | float | str | None:
        with self._lock:
            self.requests.append((method, path))
            for fault in self._faults:
                pattern, how, times, only = fault
                if times > 0 and pattern.search(path) and only in ("", method):
                    fault[2] -= 1
                    return how
        return None

    def sha(self, repo_id: str) -> str:
        return hashlib.sha1("\n".join(self.commits[repo_id]).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stand_in: HubStandIn

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, content: Any = b"", *, code: str = "", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _handle(self) -> None:
        hub = self.stand_in
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        fault = hub.fault(self.command, path)
        length = int(self.headers.get("Content-Length") or 0)
        if fault == "hang":
            hub.closing.wait(60)
        if fault in ("hang", "drop"):
            self.close_connection = True
            return
        if fault == "cut":
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        body = self._body(length)
        if isinstance(fault, int):
            return self._answer(fault, b"injected fault")
        if isinstance(fault, float):
            time.sleep(fault)
        authorised = self.headers.get("Authorization") == f"Bearer {hub.token}"
        writes = self.command in ("POST", "PUT") and not path.startswith("/storage/")
        if (writes or path.endswith("/auth-check/write")) and not authorised:
            return self._answer(401, {"error": "Invalid username or password."})
        if hub.read_only and (path == "/api/repos/create" or path.endswith("/auth-check/write")):
            return self._answer(403, {"error": "this token may only read"})
        for method, pattern, answer in self._ROUTES:
            if (found := re.fullmatch(pattern, path)) and self.command in method:
                return answer(self, body, **found.groupdict())
        self._answer(404, {"error": f"the stand-in knows no {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _body(self, length: int) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(length)
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
        exists = repo_id in self.stand_in.files
        if not exists:
            self.stand_in.files[repo_id] = {}
            self.stand_in.commits[repo_id] = ["first"]
        self._answer(409 if exists else 200, {"url": f"{self.stand_in.url}/{repo_id}", "id": repo_id})

    def _validate_yaml(self, body: bytes) -> None:
        """As the Hub does: the metadata must be YAML, with tags and a relation that it knows."""
        text = json.loads(body)["content"]
        try:
            head = yaml.safe_load(text.split("---")[1])
            known = {None, "adapter", "merge", "quantized", "finetune"}
            good = isinstance(head, dict) and head.get("base_model_relation") in known
            good = good and all(isinstance(tag, str) for tag in head.get("tags", []))
        except (yaml.YAMLError, IndexError):
            good = False
        errors = [] if good else [{"message": "the metadata is not valid"}]
        self._answer(200 if good else 400, {"errors": errors, "warnings": []})

    def _info(self, body: bytes, repo: str, revision: str = "main") -> None:
        files = self.stand_in.files.get(repo)
        if files is None:
            return self._answer(404, {"error": "Repository not found"}, code="RepoNotFound")
        text = files.get("README.md", b"").decode()
        sha = self.stand_in.sha(repo)
        card = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
        siblings = [{"rfilename": name} for name in files]
        self._answer(
            200,
            {"_id": "1", "id": repo, "sha": sha, "siblings": siblings, "cardData": card, "private": False, "tags": []},
        )

    def _auth_check(self, body: bytes, repo: str) -> None:
        self._answer(200 if repo in self.stand_in.files else 404, b"")

    def _tree(self, body: bytes, repo: str, revision: str) -> None:
        files = self.stand_in.files.get(repo)
        if files is None:
            return self._answer(404, {"error": "Repository not found"}, code="RepoNotFound")
        self._answer(
            200,
            [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ],
        )

    def _preupload(self, body: bytes, repo: str) -> None:
        files = [
            {"path": file["path"], "uploadMode": "lfs" if _is_large(file["path"]) else "regular", "shouldIgnore": False}
            for file in json.loads(body)["files"]
        ]
        self._answer(200, {"files": files})

    def _lfs_batch(self, body: bytes, repo: str) -> None:
        url = self.stand_in.url
        objects = []
        for asked in json.loads(body)["objects"]:
            actions = {
                "upload": {"href": f"{url}/storage/{asked['oid']}?signature=signed"},
                "verify": {"href": f"{url}/{repo}.git/info/lfs/objects/verify"},
            }
            objects.append(asked | ({} if asked["oid"] in self.stand_in.objects else {"actions": actions}))
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _store(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._answer(400, b"another sha256")
        self.stand_in.objects[oid] = body
        self._answer(200)

    def _verify(self, body: bytes, repo: str) -> None:
        asked = json.loads(body)
        stored = self.stand_in.objects.get(asked["oid"])
        self._answer(200 if stored is not None and len(stored) == asked["size"] else 404, {})

    def _commit(self, body: bytes, repo: str) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        changed = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif value["oid"] in self.stand_in.objects:
                changed[value["path"]] = self.stand_in.objects[value["oid"]]
            else:
                return self._answer(400, {"error": f"{value['path']} was never uploaded"})
        self.stand_in.files[repo] = self.stand_in.files[repo] | changed
        self.stand_in.commits[repo].append(lines[0]["value"]["summary"])
        sha = self.stand_in.sha(repo)
        self._answer(200, {"commitUrl": f"{self.stand_in.url}/{repo}/commit/{sha}", "commitOid": sha, "success": True})

    def _resolve(self, body: bytes, repo: str, revision: str, file: str) -> None:
        files = self.stand_in.files.get(repo)
        if files is None:
            return self._answer(404, code="RepoNotFound")
        sha = self.stand_in.sha(repo)
        if file not in files:
            return self._answer(404, code="EntryNotFound", X_Repo_Commit=sha)
        etag = hashlib.sha256(files[file]).hexdigest()
        self._answer(200, files[file], ETag=f'"{etag}"', X_Repo_Commit=sha)

    _REPO = r"(?P<repo>[^/]+/[^/]+)"
    _ROUTES = (
        ("POST", r"/api/repos/create", _create),
        ("POST", r"/api/validate-yaml", _validate_yaml),
        ("GET", rf"/api/models/{_REPO}", _info),
        ("GET", rf"/api/models/{_REPO}/revision/(?P<revision>[^/]+)", _info),
        ("GET", rf"/api/models/{_REPO}/auth-check/write", _auth_check),
        ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)", _tree),
        ("POST", rf"/api/models/{_REPO}/preupload/main", _preupload),
        ("POST", rf"/api/models/{_REPO}/commit/main", _commit),
        ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _lfs_batch),
        ("POST", rf"/{_REPO}\.git/info/lfs/objects/verify", _verify),
        ("PUT", r"/storage/(?P<oid>\w+)", _store),
        ("GET HEAD", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _resolve),
    )


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".png"))
