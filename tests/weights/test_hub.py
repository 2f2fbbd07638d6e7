"""A file from the hub is the file, or an error that says what was wanted, from where, and what to do."""

import hashlib
import itertools
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from fake_hub import FakeHub, etag_of
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.utils import close_session
from oracles import randomise, relative_error

import beitzoo
from beitzoo import DownloadError
from beitzoo.weights import checksums, hub, sources
from beitzoo.weights.checksums import AbsentError
from beitzoo.zoo.checkpoints import HubFile, LocalFile, PackageFile, ReleaseFile

WEIGHTS = bytes(range(256)) * 250
NEWER = WEIGHTS[::-1]
FILES = {"model.safetensors": WEIGHTS, "config.json": b'{"some": "json"}'}
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
FOREVER = 10**6
SOURCE = HubFile("owner/name")


@pytest.fixture
def served(fake_hub: FakeHub) -> FakeHub:
    fake_hub.repository().commit(FILES)
    return fake_hub


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait long for silent hosts; for tests in which nothing depends on a host that answers late."""
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.15)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.15)


# kind, method, times, argument, and whether a hub that is well otherwise still gives the file on the first call
FAULTS = [
    ("drop", "HEAD", 1, "", True),
    ("drop", "HEAD", FOREVER, "", False),
    ("stall", "HEAD", 1, "", True),
    ("stall", "HEAD", FOREVER, "", False),
    ("status", "HEAD", 1, "500", True),
    ("status", "HEAD", 2, "503", True),
    ("status", "HEAD", 1, "429", True),
    ("status", "HEAD", 1, "403", True),
    ("status", "HEAD", FOREVER, "500", False),
    ("status", "HEAD", FOREVER, "403", False),
    ("status", "HEAD", FOREVER, "401", False),
    ("status", "HEAD", FOREVER, "401 RepoNotFound", False),
    ("status", "HEAD", FOREVER, "403 GatedRepo", False),
    ("status", "HEAD", FOREVER, "404", False),
    ("status", "HEAD", FOREVER, "404 EntryNotFound", False),
    ("status", "HEAD", FOREVER, "404 RevisionNotFound", False),
    ("html", "HEAD", 1, "", True),
    ("html", "HEAD", FOREVER, "", False),
    ("no_commit", "HEAD", 1, "", True),
    ("no_commit", "HEAD", FOREVER, "", False),
    ("no_etag", "HEAD", FOREVER, "", False),
    ("etag", "HEAD", 1, "0" * 64, True),
    ("etag", "HEAD", FOREVER, "0" * 64, False),
    ("etag", "HEAD", FOREVER, "0" * 40, False),
    ("etag", "HEAD", FOREVER, "../../../../escaped", False),
    ("drop", "GET", 1, "", True),
    ("drop", "GET", FOREVER, "", False),
    ("cut", "GET", 1, "", True),
    ("cut", "GET", 3, "", True),
    ("cut_and_stall", "GET", 1, "", True),
    ("stall", "GET", 1, "", True),
    ("stall", "GET", FOREVER, "", False),
    ("flip", "GET", 1, "", True),
    ("flip", "GET", 2, "", True),
    ("flip", "GET", FOREVER, "", False),
    ("short", "GET", 1, "", True),
    ("short", "GET", FOREVER, "", False),
    ("long", "GET", 1, "", True),
    ("gzip", "GET", FOREVER, "", True),
    ("html", "GET", 1, "", True),
    ("html", "GET", FOREVER, "", False),
    ("status", "GET", 1, "500", True),
    ("status", "GET", 2, "503", True),
    ("status", "GET", 1, "403", True),
    ("status", "GET", 1, "429", True),
    ("status", "GET", FOREVER, "500", False),
    ("status", "GET", FOREVER, "403", False),
]


STATES = [("cold", "branch"), ("cold", "commit"), ("warm", "branch"), ("stale", "branch")]


def _matrix() -> Iterator[Any]:
    """Pair every fault with every state of the cache; by default each fault meets one state, in turn."""
    for number, fault in enumerate(FAULTS):
        for place, state in enumerate(STATES):
            marks = () if place == number % len(STATES) else pytest.mark.slow
            yield pytest.param(*fault, *state, marks=marks)


@pytest.mark.parametrize(("kind", "method", "times", "argument", "heals", "cache", "by"), list(_matrix()))
def test_a_fault_gives_the_right_file_or_a_clear_error(
    kind: str,
    method: str,
    times: int,
    argument: str,
    heals: bool,
    cache: str,
    by: str,
    served: FakeHub,
    request: pytest.FixtureRequest,
) -> None:
    if "stall" in kind:
        request.getfixturevalue("impatient")
    commit = served.repository().refs["main"]
    if cache != "cold":
        sources.fetch([SOURCE])
    allowed = {WEIGHTS}
    if cache == "stale":
        served.repository().commit({"model.safetensors": NEWER})
        allowed = {WEIGHTS, NEWER}
    fault = served.fault(kind, method, "model.safetensors", times, argument)
    source = HubFile("owner/name", revision=commit if by == "commit" else None)
    started = time.monotonic()
    try:
        assert sources.fetch([source]).read_bytes() in allowed
        accepted = True
    except DownloadError as error:
        accepted = False
        assert "owner/name/model.safetensors" in str(error)
        assert served.address in str(error)
    assert time.monotonic() - started < 8
    assert (fault.met > 0) == (cache != "warm" or method == "HEAD")
    if cache == "cold":
        assert accepted == heals
    if cache == "warm":
        assert accepted == (argument not in ("404 EntryNotFound", "404 RevisionNotFound"))
    served.faults.clear()
    assert sources.fetch([source]).read_bytes() == (NEWER if cache == "stale" else WEIGHTS)
    assert not list(Path(constants.HF_HOME).parent.rglob("*escaped*"))


def test_requests_of_a_first_and_of_later_loads(served: FakeHub) -> None:
    path = sources.fetch([SOURCE])
    assert path.read_bytes() == WEIGHTS
    assert len(served.asked("GET")) == 1
    served.requests.clear()
    assert sources.fetch([SOURCE]) == path
    assert [method for method, *_ in served.requests] == ["HEAD"]
    served.requests.clear()
    assert sources.fetch([HubFile("owner/name", revision=hub.commit_of(path))]) == path
    assert served.requests == []


def test_a_verified_file_is_not_hashed_again(served: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    hash_content = checksums.content_hash
    monkeypatch.setattr(
        checksums, "content_hash", lambda path, like: (hashed.append(path), hash_content(path, like))[1]
    )
    path = sources.fetch([SOURCE])
    assert len(hashed) == 1
    sources.fetch([SOURCE])
    assert len(hashed) == 1
    blob = path.resolve()
    os.utime(blob, ns=(1, 1))
    sources.fetch([SOURCE])
    assert len(hashed) == 2
    for record in (Path(constants.HF_HOME) / "beitzoo" / "checksums").iterdir():
        record.write_text('{"half')
    sources.fetch([SOURCE])
    assert len(hashed) == 3


def test_a_file_that_rots_in_the_cache_is_fetched_again_or_offline_refused(
    served: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sources.fetch([SOURCE])
    for by in (SOURCE, HubFile("owner/name", revision=hub.commit_of(path))):
        path.resolve().write_bytes(b"X" + WEIGHTS[1:])
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(DownloadError, match=r"is damaged: its hash is .* could not be fetched again: .*offline"):
            sources.fetch([by])
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert sources.fetch([by]).read_bytes() == WEIGHTS


def test_content_that_stays_wrong_is_not_left_for_others(served: FakeHub) -> None:
    served.fault("flip", times=FOREVER)
    with pytest.raises(DownloadError, match=f"is damaged: .* expected {SHA256}.* its host, or the way to it"):
        sources.fetch([SOURCE])
    assert sources.find_local(SOURCE) is None
    assert not [path for path in Path(constants.HF_HUB_CACHE).rglob("blobs/*") if path.is_file()]


def test_the_tables_hash_comes_before_the_hubs_word(served: FakeHub) -> None:
    assert sources.fetch([HubFile("owner/name", sha256=SHA256)]).read_bytes() == WEIGHTS
    served.requests.clear()
    with pytest.raises(DownloadError, match=f"its hash there is {SHA256}, not {'0' * 64}, so it was replaced. Update"):
        sources.fetch([HubFile("owner/name", sha256="0" * 64)], Path(constants.HF_HOME) / "other")
    assert served.asked("GET") == []


def test_offline_nothing_is_asked(served: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sources.fetch([SOURCE])
    with pytest.raises(AbsentError):
        sources.fetch([HubFile("owner/name", "preprocessor_config.json")])
    served.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert sources.fetch([SOURCE]) == path
    with pytest.raises(AbsentError, match="the hub said so when it was last asked"):
        sources.fetch([HubFile("owner/name", "preprocessor_config.json")])
    with pytest.raises(DownloadError, match=r"other.bin at revision main is not in the cache .*'beitzoo download"):
        sources.fetch([HubFile("owner/name", "other.bin")])
    with pytest.raises(DownloadError, match=r"https://github.com/.*/v1.0/w.pth is not in .*offline"):
        sources.fetch([ReleaseFile("v1.0", "w.pth")])
    assert served.requests == []


def test_without_a_server_the_cache_is_used_and_said(served: FakeHub, caplog: pytest.LogCaptureFixture) -> None:
    path = sources.fetch([SOURCE])
    served.stop()
    close_session()
    with caplog.at_level(logging.WARNING, "beitzoo"):
        assert sources.fetch([SOURCE]) == path
    assert "Used the cached copy of owner/name/model.safetensors at revision main" in caplog.text
    with pytest.raises(DownloadError, match=r"config.json at revision main from http.*Check the connection"):
        sources.fetch([HubFile("owner/name", "config.json")])


def test_a_token_goes_to_the_hub_and_not_to_the_content_host(
    served: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content_host = FakeHub()
    content_host.files[SHA256] = WEIGHTS
    served.content_host = content_host.address
    served.repository().token = "hf_secret"
    with pytest.raises(DownloadError, match=r"or it is private.*HF_TOKEN"):
        sources.fetch([SOURCE])
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert sources.fetch([SOURCE], tmp_path / "cache").read_bytes() == WEIGHTS
    assert [headers.get("authorization") for _, _, headers in content_host.requests] == [None]
    assert served.requests[-1][2]["authorization"] == "Bearer hf_secret"
    content_host.stop()


def test_no_pickle_is_taken_because_safetensors_were_refused(served: FakeHub) -> None:
    pickle = HubFile("owner/name", "pytorch_model.bin")
    served.repository().commit({**FILES, "pytorch_model.bin": b"pickle"})
    served.fault("status", "HEAD", "model.safetensors", FOREVER, "403")
    with pytest.raises(DownloadError, match=r"model.safetensors.*access is refused \(403\)"):
        sources.fetch([SOURCE, pickle])
    assert not [path for path in served.asked("HEAD") if path.endswith(".bin")]
    served.faults.clear()
    served.fault("status", "HEAD", "model.safetensors", FOREVER, "404 EntryNotFound")
    assert sources.fetch([SOURCE, pickle]).read_bytes() == b"pickle"


def test_the_next_source_is_tried_and_the_reason_logged(
    served: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    local = tmp_path / "mine.safetensors"
    local.write_bytes(b"mine")
    assert sources.fetch([HubFile("owner/other"), LocalFile(local)]) == local
    assert "owner/other/model.safetensors at revision main" in caplog.text
    assert f"Used {local} instead" in caplog.text
    with pytest.raises(DownloadError, match=r"(?s)owner/other.*There is no file .*nothing"):
        sources.fetch([HubFile("owner/other"), LocalFile(tmp_path / "nothing")])


@pytest.mark.parametrize(
    ("source", "fault", "message"),
    [
        (HubFile("owner/name", revision="v9"), None, "no such revision"),
        (HubFile("owner/name", "tf_model.h5"), None, "no such file"),
        (HubFile("owner/nobody"), None, "Check the name; if private, log in"),
        (HubFile("a/b/c"), None, "Names are 'owner/name'"),
        (SOURCE, "403 GatedRepo", "Ask at .*/owner/name, then log in"),
        (SOURCE, "401", "Check your token"),
    ],
)
def test_what_will_not_heal_is_said_at_once(source: HubFile, fault: str | None, message: str, served: FakeHub) -> None:
    if fault:
        served.fault("status", "HEAD", times=FOREVER, argument=fault)
    with pytest.raises(DownloadError, match=message):
        sources.fetch([source])
    assert len(served.requests) <= 2


def test_an_error_of_the_xet_transfer_is_ours(served: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def transfer(*args: object, **kwargs: object) -> str:
        raise RuntimeError("Task error: File reconstruction error\nlong story")

    monkeypatch.setattr(hub, "hf_hub_download", transfer)
    with pytest.raises(DownloadError, match=r"File reconstruction error\. HF_HUB_DISABLE_XET=1 .* plain HTTP"):
        sources.fetch([SOURCE])


def test_a_file_that_changes_while_it_is_hashed_is_not_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w"
    path.write_bytes(WEIGHTS)
    hash_content = checksums.content_hash

    def hash_then_change(file: Path, like: str) -> str:
        content = hash_content(file, like)
        path.write_bytes(NEWER)
        return content

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksums, "content_hash", hash_then_change)
        checksums.verify_checksum(path, SHA256, tmp_path / "records")
    with pytest.raises(checksums.DamagedError):
        checksums.verify_checksum(path, SHA256, tmp_path / "records")


def test_nothing_is_not_verified(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        hub._verify(SOURCE, tmp_path / "nothing", tmp_path)


def test_a_home_that_cannot_be_written_is_only_slower(served: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HOME", "/proc/nowhere")
    path = sources.fetch([SOURCE])
    path.resolve().write_bytes(b"X" + WEIGHTS[1:])
    assert sources.fetch([SOURCE]).read_bytes() == WEIGHTS


def test_a_copy_from_another_library_is_verified_by_what_the_hub_says_now(
    served: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda cache_dir=None: False)
    served.fault("flip")
    assert Path(hf_hub_download("owner/name", "model.safetensors")).read_bytes() != WEIGHTS
    assert sources.fetch([SOURCE]).read_bytes() == WEIGHTS


def test_a_cache_without_links_is_verified_by_what_the_hub_said(
    served: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda cache_dir=None: False)
    path = sources.fetch([SOURCE])
    assert not path.is_symlink()
    assert sources.verify(SOURCE).state == "verified"
    path.write_bytes(b"X" + WEIGHTS[1:])
    assert sources.verify(SOURCE).state == "damaged"
    assert sources.fetch([SOURCE]).read_bytes() == WEIGHTS


def test_a_shared_store_behind_the_cache_does_not_name_the_hash(served: FakeHub) -> None:
    path = sources.fetch([SOURCE])
    blob, store = path.resolve(), Path(constants.HF_HUB_CACHE) / "blobs" / "aa" / ("a" * 64)
    store.parent.mkdir(parents=True)
    blob.rename(store)
    blob.symlink_to(store)
    assert sources.fetch([SOURCE]).resolve() == store
    store.write_bytes(b"X" + WEIGHTS[1:])
    assert sources.fetch([SOURCE]).read_bytes() == WEIGHTS


def test_all_files_of_one_load_are_of_one_commit(fake_hub: FakeHub, tmp_path: Path) -> None:
    old, new = (randomise(beitzoo.create_model("test_beit", num_classes=n)) for n in (3, 5))
    for model, folder in ((old, "old"), (new, "new")):
        beitzoo.save_pretrained(model, tmp_path / folder)
    fake_hub.serve_folder(tmp_path / "old")
    fetch = hub.fetch

    def fetch_then_push(source: HubFile, cache_dir: Path | None = None) -> Path:
        path = fetch(source, cache_dir)
        fake_hub.serve_folder(tmp_path / "new")
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "fetch", fetch_then_push)
        loaded = beitzoo.create_model("hf-hub:owner/name", pretrained=True)
    assert torch.equal(loaded.head.weight, old.head.weight)
    assert torch.equal(beitzoo.create_model("hf-hub:owner/name", pretrained=True).head.weight, new.head.weight)


@pytest.mark.parametrize("form", ["timm", "transformers"])
def test_a_repository_is_a_model(form: str, fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = beitzoo.create_model("test_beit", num_classes=3)
    save = beitzoo.save_pretrained if form == "timm" else beitzoo.save_transformers
    save(model, tmp_path / "repo")
    commit = fake_hub.serve_folder(tmp_path / "repo")
    for name, offline in itertools.product(("hf-hub:owner/name", f"hf-hub:owner/name@{commit}"), (False, True)):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        again = beitzoo.create_model(name, pretrained=True, cache_dir=tmp_path / "cache")
        assert torch.equal(again.head.weight, model.head.weight)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(DownloadError, match=r"owner/other/config.json"):
        beitzoo.create_model("hf-hub:owner/other", cache_dir=tmp_path / "cache")


def test_a_transformers_repository_need_not_say_how_images_are_prepared(fake_hub: FakeHub, tmp_path: Path) -> None:
    beitzoo.save_transformers(beitzoo.create_model("test_beit", num_classes=3), tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    fake_hub.serve_folder(tmp_path)
    model = beitzoo.create_model("hf-hub:owner/name", pretrained=True)
    assert beitzoo.resolve_data_config(model)["crop_mode"] == "squash"
    fake_hub.fault("status", "HEAD", "preprocessor_config.json", FOREVER, "503")
    with pytest.raises(DownloadError, match=r"preprocessor_config.json"):
        beitzoo.create_model("hf-hub:owner/name", pretrained=True, cache_dir=tmp_path / "cache")


@pytest.mark.slow
def test_a_base_model_of_true_size(fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = randomise(timm.create_model("beit_base_patch16_224")).eval()
    timm.models.save_for_hf(theirs, tmp_path, safe_serialization=True)
    fake_hub.serve_folder(tmp_path)
    x = torch.randn(1, 3, 224, 224)
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        ours = beitzoo.create_model("hf-hub:owner/name", pretrained=True).eval()
        with torch.inference_mode():
            assert relative_error(ours(x), theirs(x)) < 1e-5
    sha256 = etag_of("model.safetensors", (tmp_path / "model.safetensors").read_bytes())
    verdict = sources.verify(HubFile("owner/name"))
    assert (verdict.state, verdict.detail) == ("verified", sha256)


RELEASE = ReleaseFile("v1.0", "w.pth")


@pytest.fixture
def release(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    monkeypatch.setattr(ReleaseFile, "url", property(lambda self: f"{fake_hub.address}/files/{self.filename}"))
    fake_hub.files["w.pth"] = WEIGHTS
    return fake_hub


def test_a_release_file_is_downloaded_once_and_reported_as_unverified(
    release: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = sources.fetch([RELEASE], tmp_path)
    assert path == tmp_path / "beitzoo" / "v1.0" / "w.pth"
    assert path.read_bytes() == WEIGHTS
    assert "w.pth is unverified: nobody states its hash" in caplog.text
    assert sources.verify(RELEASE, tmp_path).state == "unverified"
    release.stop()
    assert sources.fetch([RELEASE], tmp_path) == path
    path.write_bytes(b"X" + WEIGHTS[1:])
    assert sources.verify(RELEASE, tmp_path).state == "damaged"
    with pytest.raises(DownloadError, match=r"w.pth is damaged: .* Delete it and try again"):
        sources.fetch([RELEASE], tmp_path)


@pytest.mark.parametrize(
    ("kind", "times", "argument", "heals"),
    [
        ("drop", 1, "", True),
        ("cut", 1, "", True),
        ("cut", 2, "", True),
        ("cut_and_stall", 1, "", True),
        ("stall", 1, "", True),
        ("status", 2, "503", True),
        ("drop", FOREVER, "", False),
        ("cut", FOREVER, "", False),
        ("stall", FOREVER, "", False),
        ("html", FOREVER, "", False),
        ("status", FOREVER, "500", False),
        ("status", FOREVER, "403", False),
        ("status", FOREVER, "404", False),
    ],
)
def test_a_fault_of_a_release_host(
    kind: str,
    times: int,
    argument: str,
    heals: bool,
    release: FakeHub,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if "stall" in kind:
        request.getfixturevalue("impatient")
    release.fault(kind, "GET", "w.pth", times, argument)
    if heals:
        assert sources.fetch([RELEASE], tmp_path).read_bytes() == WEIGHTS
    else:
        with pytest.raises(DownloadError, match=rf"Could not get {release.address}/files/w.pth into "):
            sources.fetch([RELEASE], tmp_path)
        release.faults.clear()
        assert sources.fetch([RELEASE], tmp_path).read_bytes() == WEIGHTS
    left = {p.name for p in (tmp_path / "beitzoo" / "v1.0").iterdir() if p.suffix != ".lock"}
    assert left == {"w.pth"}


def test_a_download_that_was_killed_is_gone_on_with(release: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "beitzoo" / "v1.0"
    folder.mkdir(parents=True)
    (folder / ".w.pth.part").write_bytes(WEIGHTS[:1000])
    (folder / ".w.pth.etag").write_text(f'"{SHA256}"')
    assert sources.fetch([RELEASE], tmp_path).read_bytes() == WEIGHTS
    assert [headers.get("range") for _, _, headers in release.requests] == ["bytes=1000-"]


def test_a_release_without_a_record_gets_one_when_it_is_used(release: FakeHub, tmp_path: Path) -> None:
    path = tmp_path / "beitzoo" / "v1.0" / "w.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(WEIGHTS)
    assert sources.fetch([RELEASE], tmp_path) == path
    path.write_bytes(b"rot")
    with pytest.raises(DownloadError, match="is damaged"):
        sources.fetch([RELEASE], tmp_path)


def test_a_cut_release_is_resumed_only_with_the_same_content(release: FakeHub, tmp_path: Path) -> None:
    release.fault("cut", "GET", "w.pth")
    sources.fetch([RELEASE], tmp_path)
    assert [headers.get("range") for _, _, headers in release.requests] == [None, f"bytes={len(WEIGHTS) // 2}-"]
    assert release.requests[1][2]["if-range"] == f'"{SHA256}"'


def test_offline_a_release_says_where_to_get_it(release: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match=r"^http://\S+ is not in \S+, and the hub client is offline [^:]*$"):
        sources.fetch([RELEASE])


def test_a_damaged_package_file_is_refused() -> None:
    with pytest.raises(DownloadError, match="Reinstall beitzoo"):
        sources.fetch([PackageFile("py.typed", "0" * 64)])
    with pytest.raises(DownloadError, match=r"No such file.*absent"):
        sources.fetch([PackageFile("absent", "0" * 64)])


# The hub's part alone: these processes need no PyTorch.
PROCESS = """
import sys, types
from pathlib import Path
package = types.ModuleType("beitzoo")
package.__path__ = [sys.argv[1]]
sys.modules["beitzoo"] = package
from beitzoo.weights import sources
from beitzoo.zoo.checkpoints import HubFile
print(len(sources.fetch([HubFile("owner/name")]).read_bytes()))
"""


def start(hub: FakeHub, home: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_DOWNLOAD_TIMEOUT": "2"}
    package = Path(beitzoo.__file__).parent
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(package)], env=environment, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("cache", ["cold", "rotten"])
def test_eight_processes_at_once(cache: str, served: FakeHub, tmp_path: Path) -> None:
    if cache == "rotten":
        assert start(served, tmp_path).communicate(timeout=60)[0].strip() == str(len(WEIGHTS))
        (blob,) = tmp_path.rglob("blobs/*")
        blob.write_bytes(b"X" + WEIGHTS[1:])
    served.fault("flip")
    served.fault("slow", "GET", times=FOREVER)
    processes = [start(served, tmp_path) for _ in range(8)]
    answers = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert answers == [str(len(WEIGHTS))] * 8
    (blob,) = [path for path in tmp_path.rglob("blobs/*") if path.is_file()]
    assert blob.read_bytes() == WEIGHTS


def test_a_download_that_is_killed_leaves_nothing_that_loads(served: FakeHub, tmp_path: Path) -> None:
    stalled = served.fault("cut_and_stall")
    process = start(served, tmp_path)
    while not stalled.met:
        assert process.poll() is None
        served.stopping.wait(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert sources.find_local(SOURCE, tmp_path / "hub") is None
    assert start(served, tmp_path).communicate(timeout=60)[0].strip() == str(len(WEIGHTS))
