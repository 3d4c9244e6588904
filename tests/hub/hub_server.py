"""A server that speaks the Hub's protocol, as far as huggingface_hub's client needs it: resolve with
redirects to a store on another host, error codes, and the API of create_repo and create_commit."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class FakeHub:
    """Holds repositories as commits of files. `store` is how file contents are served, test by test."""

    def __init__(self) -> None:
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}  # by repository, oldest first
        self.refused: dict[str, tuple[int, dict[str, str]]] = {}  # repository -> status and headers
        self.requests: list[tuple[str, str, dict[str, str]]] = []  # method, path, headers
        self.said_commit = ""  # in place of the true one
        self.sent = 0  # bytes of send_too_much
        self.token = ""  # without it, uploads are refused
        self.elsewhere: dict[str, str] = {}  # where a repository's contents are, in place of the store
        self.store: Callable[[Handler, bytes], None] = Handler.send_range
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, **more: str) -> dict[str, str]:
        """For a process whose Hub this is, without what is known of another."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        return kept | {"HF_ENDPOINT": self.url} | more

    def put(self, repo: str, files: dict[str, bytes]) -> str:
        """Adds a commit and returns its hash."""
        before = self.commits.setdefault(repo, [])
        files = (before[-1][1] if before else {}) | files
        whole = repr(
            (repo, len(before), sorted((k, hashlib.sha256(v).hexdigest()) for k, v in files.items()))
        )
        before.append((hashlib.sha1(whole.encode()).hexdigest(), files))
        return before[-1][0]

    def ranges(self) -> list[str]:
        """The parts of contents that were asked for."""
        return [
            h["range"] for method, path, h in self.requests if method == "GET" and path.startswith("/store/")
        ]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> FakeHub:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, ValueError):  # the client went away, or the test closed the connection
            self.close_connection = True

    def answer(self, status: int, body: bytes | dict = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def take(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, {k.lower(): v for k, v in self.headers.items()}))
        return path

    def do_GET(self) -> None:
        path = self.take()
        if stored := re.fullmatch(r"/store/(.+)/([0-9a-f]+)/(.+)", path):
            files = dict(self.hub.commits[stored[1]])[stored[2]]
            self.hub.store(self, files[stored[3]])
        elif resolve := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(resolve[1], resolve[2], resolve[3])
        elif "/api/" in path and (repo := path.split("/api/models/")[-1].split("/revision/")[0]):
            commits = self.hub.commits.get(repo)
            found = {"id": repo, "sha": commits[-1][0], "siblings": []} if commits else {}
            if found:
                self.answer(200, found)
            else:
                self.answer(404, X_Error_Code="RepoNotFound")
        else:
            self.answer(404)

    do_HEAD = do_GET

    def resolve(self, repo: str, revision: str, name: str) -> None:
        if repo in self.hub.refused:
            status, headers = self.hub.refused[repo]
            return self.answer(status, b"", **headers)
        if repo not in self.hub.commits:
            return self.answer(404, X_Error_Code="RepoNotFound")
        commits = self.hub.commits[repo]
        by_hash = dict(commits)
        if revision == "main" and commits:
            revision = commits[-1][0]
        if revision not in by_hash:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if name not in by_hash[revision]:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=revision)
        data = by_hash[revision][name]
        self.answer(
            302,
            Location=self.hub.elsewhere.get(repo, f"http://localhost:{self.hub.port}")
            + f"/store/{repo}/{revision}/{name}",
            X_Repo_Commit=self.hub.said_commit or revision,
            X_Linked_Size=str(len(data)),
            X_Linked_Etag=f'"{hashlib.sha256(data).hexdigest()}"',
        )

    def part(self, data: bytes) -> tuple[bytes, dict[str, str]]:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        assert match is not None, "our client asks for ranges"
        start, stop = int(match[1]), min(int(match[2]) + 1, len(data))
        return data[start:stop], {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}

    def send_range(self, data: bytes) -> None:
        part, headers = self.part(data)
        self.answer(206, part, **headers)

    def send_whole(self, data: bytes) -> None:
        """As a server that ignores ranges does."""
        self.answer(200, data)

    def send_wrong(self, data: bytes) -> None:
        self.send_range(bytes(b ^ 1 for b in data))

    def send_cut(self, data: bytes) -> None:
        """Breaks the connection in the middle of the part."""
        part, headers = self.part(data)
        self.send_response(206)
        for name, value in {"Content-Length": str(len(part)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(part[: len(part) // 2])
        self.wfile.flush()
        self.close_connection = True

    def send_packed(self, data: bytes, status: int = 206) -> None:
        """As a server that packs what must not be packed."""
        self.answer(status, bomb(), Content_Encoding="gzip", Content_Type="application/json")

    def send_packed_error(self, data: bytes) -> None:
        self.send_packed(data, 403)

    def send_too_much(self, data: bytes) -> None:
        """64 MiB, whatever was asked for."""
        self.send_response(206)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for _ in range(64):
            self.wfile.write(b"100000\r\n" + bytes(1 << 20) + b"\r\n")
            self.hub.sent += 1 << 20
        self.wfile.write(b"0\r\n\r\n")

    def send_drops(self, data: bytes) -> None:
        """A byte at a time, never silent for long."""
        part, headers = self.part(data)
        self.send_response(206)
        for name, value in {"Content-Length": str(len(part)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        for byte in part:
            self.wfile.write(bytes([byte]))
            time.sleep(0.05)

    def do_POST(self) -> None:
        path = self.take()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self.hub.token or self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self.answer(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            given = json.loads(body)
            repo = f"{given.get('organization') or 'me'}/{given['name']}"
            if repo in self.hub.commits:
                self.answer(409, {"error": "exists", "url": f"{self.hub.url}/{repo}"})
            else:
                self.hub.commits[repo] = []
                self.answer(200, {"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo})
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif commit := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            lines = [json.loads(line) for line in body.decode().splitlines()]
            parent = lines[0]["value"].get("parentCommit")
            heads = [c for c, _ in self.hub.commits[commit[1]]]
            if parent and parent != heads[-1]:
                return self.answer(412, {"error": "the branch has moved"})
            files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            done = self.hub.put(commit[1], files)
            url = f"{self.hub.url}/{commit[1]}/commit/{done}"
            self.answer(200, {"success": True, "commitOid": done, "commitUrl": url, "hookOutput": ""})
        else:
            self.answer(404)


@cache
def bomb() -> bytes:
    """Some kilobytes that become 64 MiB."""
    return gzip.compress(bytes(64 << 20))


def once(first: Callable[[Handler, bytes], None]) -> Callable[[Handler, bytes], None]:
    """Serves the first request for contents so, and the others well."""
    served: list[int] = []

    def serve(handler: Handler, data: bytes) -> None:
        served.append(1)
        (first if len(served) == 1 else Handler.send_range)(handler, data)

    return serve


def held(until: threading.Event, seconds: float = 60) -> Callable[[Handler, bytes], None]:
    """Serves nothing until the event is set."""

    def serve(handler: Handler, data: bytes) -> None:
        until.wait(seconds)
        handler.send_range(data)

    return serve


def trickling(seconds: float) -> Callable[[Handler, bytes], None]:
    """Serves, but each part takes its time."""

    def serve(handler: Handler, data: bytes) -> None:
        time.sleep(seconds)
        handler.send_range(data)

    return serve
