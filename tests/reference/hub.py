"""A stand-in for the hub's HTTP interface, serving the datasets of a local mirror from this machine.

Only what `datasets` and `huggingface_hub` ask for when they read a dataset: its commit, its files, their bytes.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


class Handler(BaseHTTPRequestHandler):
    """Args: `folders`, hub id -> folder of its files; `commits`, hub id -> the commit that it has."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *args, folders: dict[str, Path], commits: dict[str, str], **kwargs) -> None:
        self.folders, self.commits = folders, commits
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "datasets"] and len(parts) >= 4:
            self._api("/".join(parts[2:4]), parts[4:])
        elif parts[0] == "datasets" and "resolve" in parts:
            self._file("/".join(parts[1:3]), parts[4], "/".join(parts[5:]))
        else:
            self._missing("RepoNotFound")

    do_HEAD = do_POST = do_GET

    def _api(self, hub_id: str, rest: list[str]) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if hub_id not in self.folders:
            self._missing("RepoNotFound")
        elif not rest or rest[0] == "revision":
            if rest and rest[1] not in (self.commits[hub_id], "main"):
                return self._missing("RevisionNotFound")
            files = [{"rfilename": name} for name in self._names(hub_id)]
            self._json({"id": hub_id, "sha": self.commits[hub_id], "private": False, "tags": [], "siblings": files})
        elif rest[0] == "paths-info":
            text = body.decode()
            paths = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]
            self._json([entry for path in paths for entry in self._entries(hub_id, path, itself=True)])
        elif rest[0] == "tree":
            self._json(self._entries(hub_id, "/".join(rest[2:]), itself=False))
        return None

    def _names(self, hub_id: str) -> list[str]:
        folder = self.folders[hub_id]
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    def _entries(self, hub_id: str, path: str, *, itself: bool) -> list[dict]:
        wanted = self.folders[hub_id] / path
        found = [wanted] if itself and wanted.exists() else []
        if not itself and wanted.is_dir():
            recursive = "recursive=True" in self.path or "recursive=true" in self.path
            found = sorted(wanted.rglob("*") if recursive else wanted.iterdir())
        entries = []
        for entry in found:
            name = entry.relative_to(self.folders[hub_id]).as_posix()
            if entry.is_dir():
                entries.append({"type": "directory", "oid": "0" * 40, "size": 0, "path": name})
            else:
                oid = hashlib.sha1(entry.read_bytes()).hexdigest()
                entries.append({"type": "file", "oid": oid, "size": entry.stat().st_size, "path": name})
        return entries

    def _file(self, hub_id: str, revision: str, name: str) -> None:
        path = self.folders.get(hub_id, Path("/nowhere")) / name
        if not path.is_file():
            return self._missing("EntryNotFound")
        content = path.read_bytes()
        start, status = 0, 200
        if asked := self.headers.get("Range"):
            start, _, end = asked.removeprefix("bytes=").partition("-")
            start, status = int(start), 206
            content = content[start : int(end) + 1] if end else content[start:]
        self.send_response(status)
        self.send_header("ETag", f'"{hashlib.sha1(path.read_bytes()).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commits[hub_id])
        self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(content) - 1}/{path.stat().st_size}")
        self._send(content)

    def _missing(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self._send(b"")

    def _json(self, value: object) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self._send(json.dumps(value).encode())

    def _send(self, content: bytes) -> None:
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


@contextmanager
def serving(folders: dict[str, Path], commits: dict[str, str]) -> Iterator[str]:
    """Inside, a hub at the address that is given."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, folders=folders, commits=commits))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
