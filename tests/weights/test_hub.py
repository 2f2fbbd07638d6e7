"""A file from the hub is the file, or an error that says what was wanted, from where, and why not."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from beitzoo import DownloadError
from beitzoo.weights import hub
from beitzoo.zoo.config import HubFile, LocalFile, PackageFile

CONTENT = b"weights" * 1000
COMMIT = "c" * 40


class FakeHub(ThreadingHTTPServer):
    """Serves one file of one repository, as the hub does; `served` is what goes out, `etag` what it is said to be."""

    daemon_threads = True
    served = CONTENT
    etag = hashlib.sha256(CONTENT).hexdigest()
    status = 200


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(self.server.served)

    def _answer(self, body: bytes) -> None:
        found = self.path.startswith("/owner/name/resolve/")
        self.send_response(self.server.status if found else 404)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Linked-Etag", f'"{self.server.etag}"')
        self.send_header("X-Linked-Size", str(len(self.server.served)))
        self.send_header("Content-Length", str(len(self.server.served) if found else 0))
        if not found:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if found:
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    server = FakeHub(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    yield server
    close_session()
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_download_is_proven_and_then_cached(fake_hub: FakeHub, tmp_path: Path) -> None:
    source = HubFile("owner/name", revision=COMMIT, sha256=fake_hub.etag)
    path = hub.fetch([source], tmp_path)
    assert path.read_bytes() == CONTENT
    fake_hub.status = 500
    assert hub.fetch([source], tmp_path) == path


def test_content_that_is_not_what_the_hub_says_is_refused(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.served = b"X" + CONTENT[1:]
    with pytest.raises(DownloadError, match=f"is damaged: its hash is [0-9a-f]{{64}}, expected {fake_hub.etag}"):
        hub.fetch([HubFile("owner/name")], tmp_path)


def test_content_that_is_not_what_the_row_says_is_refused(fake_hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="expected " + "0" * 64):
        hub.fetch([HubFile("owner/name", sha256="0" * 64)], tmp_path)


def test_a_small_file_is_proven_by_its_git_hash(fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.served = b"{}"
    fake_hub.etag = "9e26dfeeb6e641a33dae4961196235bdb965b21b"  # git hash-object of {}
    assert hub.fetch([HubFile("owner/name", "config.json")], tmp_path).read_bytes() == b"{}"


def test_an_unknown_repository_says_what_was_wanted_and_from_where(fake_hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"owner/other/model.safetensors at revision main from http://127.0.0.1"):
        hub.fetch([HubFile("owner/other")], tmp_path)


def test_the_next_source_is_tried(fake_hub: FakeHub, tmp_path: Path) -> None:
    local = tmp_path / "mine.safetensors"
    local.write_bytes(b"mine")
    assert hub.fetch([HubFile("owner/other"), LocalFile(local)], tmp_path) == local
    with pytest.raises(DownloadError, match=r"(?s)owner/other.*There is no file .*nothing"):
        hub.fetch([HubFile("owner/other"), LocalFile(tmp_path / "nothing")], tmp_path)


def test_a_damaged_package_file_is_refused() -> None:
    with pytest.raises(DownloadError, match="Reinstall beitzoo"):
        hub.fetch([PackageFile("py.typed", "0" * 64)])
    with pytest.raises(DownloadError, match=r"Cannot read .*absent"):
        hub.fetch([PackageFile("absent", "0" * 64)])
