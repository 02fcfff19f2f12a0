"""Test support: a model hub on this machine that speaks what huggingface_hub asks for, and misbehaves as a test says."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

#: These are stored as the hub stores large files: named by their SHA-256, and given by another host where there is one.
_LARGE = (".safetensors", ".bin")
_PIECE = 1 << 12


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    #: The first byte that it wants.
    begin: int


class LoopbackHub:
    """Use as a context manager. `redirects`: large files come from another port, as from the real hub's network."""

    def __init__(self, *, redirects: bool = False) -> None:
        self._models: dict[str, tuple[str, dict[str, bytes]]] = {}
        self._servers = [_Server(self) for _ in range(2 if redirects else 1)]
        self.requests: list[Request] = []
        #: Models that want a token for their files, but not to be described.
        self.gated: set[str] = set()
        #: Models of which nothing is told without a token.
        self.private: set[str] = set()
        #: Each body of a large file is cut after so many bytes, in turn, and then none.
        self.breaks: list[int] = []
        #: The same files, but a byte is another: so many times.
        self.damages = 0
        #: Large files end here, and their length is said to be this.
        self.truncated_at: int | None = None
        #: Every answer has this status.
        self.broken_with: int | None = None
        self._holds_at: int | None = None
        self._released = threading.Event()
        #: Set while a body is held.
        self.held = threading.Event()

    @property
    def url(self) -> str:
        return self._servers[0].url

    @property
    def files_url(self) -> str:
        """Where large files come from."""
        return self._servers[-1].url

    def environment(self, home: Path) -> dict[str, str]:
        """Of processes that shall use this hub, and keep what they fetch in `home`."""
        return {
            "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "NO_PROXY": "127.0.0.1",
            "HF_HUB_OFFLINE": "0", "HF_TOKEN": "",
        }  # fmt: skip

    def add(self, name: str, files: Mapping[str, bytes] | Path) -> str:
        """The commit. A directory is taken with all of its files."""
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in files.iterdir()}
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self._models[name] = commit, dict(files)
        return commit

    def hold_after(self, size: int) -> None:
        """Send so many bytes of each body of a large file, and the rest once released."""
        self._holds_at = size
        self._released.clear()
        self.held.clear()

    def release(self) -> None:
        self._holds_at = None
        self._released.set()

    def begins(self, file: str) -> list[int]:
        """From which byte on each GET of this file wanted it."""
        return [each.begin for each in self.requests if each.method == "GET" and each.path.endswith(file)]

    def __enter__(self) -> Self:
        for server in self._servers:
            server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()
        for server in self._servers:
            server.stop()

    # What the handler asks

    def model(self, name: str) -> tuple[str, dict[str, bytes]] | None:
        return self._models.get(name)

    def large_file(self, checksum: str) -> bytes | None:
        for _, files in self._models.values():
            for name, content in files.items():
                if name.endswith(_LARGE) and hashlib.sha256(content).hexdigest() == checksum:
                    return content
        return None

    def wait(self, sent: int) -> None:
        if self._holds_at is not None and sent >= self._holds_at:
            self.held.set()
            self._released.wait()


class _Server:
    def __init__(self, hub: LoopbackHub) -> None:
        handler = type("Handler", (_Handler,), {"hub": hub})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.hub.requests.append(Request(self.command, path, begin))
        if self.hub.broken_with is not None:
            self._refuse(self.hub.broken_with, "")
        elif path.startswith("/large/"):
            content = self.hub.large_file(path.removeprefix("/large/"))
            assert content is not None
            self._send_large(content, begin, {})
        elif path.startswith("/api/models/"):
            self._describe(path.removeprefix("/api/models/"))
        else:
            name, _, rest = path[1:].partition("/resolve/")
            self._resolve(name, rest.partition("/")[2], begin)

    def _describe(self, path: str) -> None:
        """What a revision is, and which files it has."""
        name, _, revision = path.partition("/revision/")
        model = self.hub.model(name)
        if model is None or (name in self.hub.private and not self.headers.get("Authorization")):
            self._refuse(401 if name in self.hub.private else 404, "RepoNotFound")
            return
        commit, files = model
        if revision not in ("", "main", commit):
            self._refuse(404, "RevisionNotFound")
            return
        siblings = [_entry(file, content) for file, content in files.items()]
        self._send(json.dumps({"id": name, "modelId": name, "sha": commit, "siblings": siblings}).encode(), {})

    def _resolve(self, name: str, file: str, begin: int) -> None:
        model = self.hub.model(name)
        if model is None or file not in model[1]:
            self._refuse(404, "EntryNotFound" if model else "RepoNotFound")
            return
        if name in self.hub.gated and not self.headers.get("Authorization"):
            self._refuse(401, "GatedRepo")
            return
        commit, content = model[0], model[1][file]
        entry = _entry(file, content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry["blobId"]}"', "Accept-Ranges": "bytes"}
        if not file.endswith(_LARGE):
            self._send(content, headers)
            return
        checksum = hashlib.sha256(content).hexdigest()
        headers |= {"X-Linked-ETag": f'"{checksum}"', "X-Linked-Size": str(len(content))}
        if self.hub.files_url != self.hub.url:
            self._send(b"", {**headers, "Location": f"{self.hub.files_url}/large/{checksum}"}, status=302)
        else:
            self._send_large(content, begin, headers)

    def _send_large(self, content: bytes, begin: int, headers: Mapping[str, str]) -> None:
        if self.hub.truncated_at is not None:
            content = content[: self.hub.truncated_at]
        if begin and begin >= len(content):
            self._refuse(416, "")
            return
        if self.hub.damages and self.command == "GET":
            self.hub.damages -= 1
            content = bytes([content[0] ^ 1]) + content[1:]
        rest = content[begin:]
        if begin:
            headers = {**headers, "Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"}
        self._send(rest, headers, status=206 if begin else 200, large=True)

    def _refuse(self, status: int, code: str) -> None:
        self._send(b"{}", {"X-Error-Code": code} if code else {}, status=status)

    def _send(self, body: bytes, headers: Mapping[str, str], *, status: int = 200, large: bool = False) -> None:
        self.send_response(status)
        for header, value in {"Content-Length": str(len(body)), "Connection": "close", **headers}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        most = self.hub.breaks.pop(0) if large and self.hub.breaks else len(body)
        sent = 0
        try:
            while sent < min(most, len(body)):
                if large:
                    self.hub.wait(sent)
                sent += self.wfile.write(body[sent : min(sent + _PIECE, most)])
        except (BrokenPipeError, ConnectionResetError):
            pass  # the other side was killed


def _entry(name: str, content: bytes) -> dict[str, object]:
    git = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    entry: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": git}
    if name.endswith(_LARGE):
        lfs = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        entry |= {"blobId": hashlib.sha1(name.encode()).hexdigest(), "lfs": lfs}
    return entry
