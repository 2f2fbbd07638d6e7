"""A hub on 127.0.0.1 that keeps the protocol as far as its client needs to read, and breaks it when told to."""

import contextlib
import gzip
import hashlib
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

LARGE = (".safetensors", ".bin", ".pth")  # kept by sha256; everything else by git's hash


def etag_of(name: str, content: bytes) -> str:
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Fault:
    """What goes wrong in answers to `method` requests whose path ends in `path`, for so many `times`."""

    kind: str
    method: str = "GET"
    path: str = ""
    times: int = 1
    argument: str = ""
    met: int = 0

    def meets(self, method: str, path: str) -> bool:
        if self.met == self.times or method != self.method or not path.endswith(self.path):
            return False
        self.met += 1
        return True


@dataclass
class Repository:
    """Commits, which never change, and the names that point at them."""

    commits: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None

    def commit(self, files: Mapping[str, bytes], ref: str = "main") -> str:
        commit = hashlib.sha1(f"{len(self.commits)}{ref}".encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.refs[ref] = commit
        return commit


class FakeHub(ThreadingHTTPServer):
    """Serves repositories at /owner/name/resolve/..., and plain files at /files/...; records every request."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.files: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.content_host: str | None = None  # large files are redirected to /files/SHA256 there
        self.stopping = threading.Event()
        self._connections: set[socket.socket] = set()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def repository(self, name: str = "owner/name") -> Repository:
        return self.repositories.setdefault(name, Repository())

    def serve_folder(self, folder: Path, name: str = "owner/name") -> str:
        return self.repository(name).commit({path.name: path.read_bytes() for path in folder.iterdir()})

    def fault(self, kind: str, method: str = "GET", path: str = "", times: int = 1, argument: str = "") -> Fault:
        self.faults.append(Fault(kind, method, path, times, argument))
        return self.faults[-1]

    def asked(self, method: str) -> list[str]:
        return [path for made, path, _ in self.requests if made == method]

    def stop(self) -> None:
        """Go away at once; a connection that is kept alive would go on being served."""
        self.stopping.set()
        self.shutdown()
        self.server_close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def process_request(self, request: socket.socket, client_address: tuple[str, int]) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that hang up are part of the play


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    server: FakeHub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        self.server.requests.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        fault = next((f for f in self.server.faults if f.meets(self.command, self.path)), Fault(""))
        if fault.kind == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif fault.kind == "stall":
            self.server.stopping.wait(30)
            self.close_connection = True
        elif fault.kind == "status":
            code, _, error = fault.argument.partition(" ")
            self._answer(int(code), {"X-Error-Code": error} if error else {}, b"trouble", fault)
        elif fault.kind == "html":
            self._answer(200, {"Content-Type": "text/html"}, b"<html>Please log in</html>", fault)
        elif self.path.startswith("/files/"):
            self._plain(self.path.removeprefix("/files/"), fault)
        else:
            self._resolve(fault)

    def _plain(self, name: str, fault: Fault) -> None:
        content = self.server.files.get(name)
        if content is None:
            self._answer(404, {}, b"", fault)
        else:
            self._content(content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'}, fault)

    def _resolve(self, fault: Fault) -> None:
        repo_id, _, rest = self.path.strip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        repository = self.server.repositories.get(repo_id)
        allowed = repository and repository.token in (None, (self.headers["authorization"] or "")[len("Bearer ") :])
        if repository is None or not allowed:
            return self._answer(401, {"X-Error-Code": "RepoNotFound"}, b"", fault)
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            return self._answer(404, {"X-Error-Code": "RevisionNotFound"}, b"", fault)
        content = repository.commits[commit].get(name)
        if content is None:
            return self._answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b"", fault)
        etag = fault.argument if fault.kind == "etag" else etag_of(name, content)
        headers = {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        for missing in {"no_commit": ("X-Repo-Commit",), "no_etag": ("X-Linked-Etag",)}.get(fault.kind, ()):
            del headers[missing]
        if self.server.content_host and name.endswith(LARGE):
            target = f"{self.server.content_host}/files/{etag_of(name, content)}"
            return self._answer(302, headers | {"Location": target}, b"", fault)
        self._content(content, headers, fault)

    def _content(self, content: bytes, headers: dict[str, str], fault: Fault) -> None:
        start = int((self.headers["range"] or "bytes=0-")[len("bytes=") :].split("-")[0])
        if fault.kind == "ignore_range":
            start = 0
        body = content[start:]
        if fault.kind == "flip":
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        if fault.kind in ("short", "long"):
            body = body[:-7] if fault.kind == "short" else body + b"1234567"
        if fault.kind == "gzip":
            body, headers = gzip.compress(body), headers | {"Content-Encoding": "gzip"}
        if start:
            headers = headers | {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        self._answer(206 if start else 200, headers, body, fault)

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes, fault: Fault) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = len(body) // 2 if fault.kind in ("cut", "cut_and_stall") else len(body)
        step = 4096 if fault.kind == "slow" else len(body) or 1
        for at in range(0, cut, step):
            self.wfile.write(body[at : min(at + step, cut)])
            if fault.kind == "slow":
                time.sleep(0.01)
        if fault.kind == "cut_and_stall":
            self.server.stopping.wait(30)
        if cut < len(body):
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
