"""A file from the hub is the file, or an error that says what was wanted, from where, and why not."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session

import beitzoo
from beitzoo import DownloadError
from beitzoo.weights import hub
from beitzoo.zoo.config import HubFile, LocalFile, PackageFile, ReleaseFile

CONTENT = b"weights" * 1000
COMMIT = "c" * 40


class FakeHub(ThreadingHTTPServer):
    """Serves one repository, as the hub does.

    `served` is what goes out for every file that is not in `files`, and `etag` what it is said to be.
    """

    daemon_threads = True
    served: bytes | None = CONTENT
    etag = hashlib.sha256(CONTENT).hexdigest()
    status = 200
    files: ClassVar[dict[str, bytes]] = {}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(self._content() or b"")

    def _content(self) -> bytes | None:
        return self.server.files.get(Path(self.path).name, self.server.served)

    def _answer(self, body: bytes) -> None:
        known, content = self.path.startswith("/owner/name/resolve/"), self._content()
        found = known and content is not None
        size = str(len(content) if content is not None and found else 0)
        own = Path(self.path).name in self.server.files
        etag = hashlib.sha256(content or b"").hexdigest() if own else self.server.etag
        self.send_response(self.server.status if found else 404)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Linked-Etag", f'"{etag}"')
        self.send_header("X-Linked-Size", size)
        self.send_header("Content-Length", size)
        if not found:
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
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


@pytest.mark.parametrize("form", ["timm", "transformers"])
def test_a_repository_is_a_model(form: str, fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = beitzoo.create_model("test_beit", num_classes=3)
    save = beitzoo.save_pretrained if form == "timm" else beitzoo.save_transformers
    save(model, tmp_path / "repo")
    monkeypatch.setattr(FakeHub, "files", {p.name: p.read_bytes() for p in (tmp_path / "repo").iterdir()})
    fake_hub.served = None
    for name in ("hf-hub:owner/name", f"hf-hub:owner/name@{COMMIT}"):
        again = beitzoo.create_model(name, pretrained=True, cache_dir=tmp_path / "cache")
        assert torch.equal(again.head.weight, model.head.weight)
    with pytest.raises(DownloadError, match=r"owner/other/config.json"):
        beitzoo.create_model("hf-hub:owner/other", cache_dir=tmp_path / "cache")


def test_a_release_file_is_downloaded_once_and_reported_as_unverified(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    address = f"http://127.0.0.1:{fake_hub.server_port}/owner/name/resolve/main/w.pth"
    monkeypatch.setattr(ReleaseFile, "url", address)
    source = ReleaseFile("v1.0", "w.pth")
    path = hub.fetch([source], tmp_path)
    assert path == tmp_path / "v1.0" / "w.pth"
    assert path.read_bytes() == CONTENT
    assert "w.pth is unverified" in caplog.text
    fake_hub.status = 500
    assert hub.fetch([source], tmp_path) == path
    with pytest.raises(DownloadError, match=f"Could not get {address}: .*500"):
        hub.fetch([ReleaseFile("v1.0", "other.pth")], tmp_path)
    assert [p.name for p in (tmp_path / "v1.0").iterdir()] == ["w.pth"]


def test_a_damaged_package_file_is_refused() -> None:
    with pytest.raises(DownloadError, match="Reinstall beitzoo"):
        hub.fetch([PackageFile("py.typed", "0" * 64)])
    with pytest.raises(DownloadError, match=r"Cannot read .*absent"):
        hub.fetch([PackageFile("absent", "0" * 64)])
