"""Every spelling of a name, and a file of another network told by its shapes."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from oracles import randomise

import beitzoo
from beitzoo import Beit, CheckpointError, UnknownModelError
from beitzoo.errors import MissingFileError
from beitzoo.factory import look_up
from beitzoo.weights import layouts
from beitzoo.weights.identify import Shapes, explain, identify, shapes_of
from beitzoo.zoo.architectures import ARCHITECTURES
from beitzoo.zoo.checkpoints import Classify, HubFile, LocalFile, Mim
from beitzoo.zoo.pretrained import PRETRAINED
from beitzoo.zoo.registry import find


@pytest.fixture
def model() -> Beit:
    return randomise(beitzoo.create_model("test_beit", num_classes=3)).eval()


@pytest.fixture
def run(model: Beit, tmp_path: Path) -> Path:
    """The folder of a run with its best checkpoint."""
    beitzoo.save_pretrained(model, tmp_path / "run" / "best")
    return tmp_path / "run"


def test_a_path_needs_no_prefix(model: Beit, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(run.parent))
    monkeypatch.chdir(run.parent)
    best = run / "best"
    for name in (f"local-dir:{best}", f"local-dir:{run}", str(best), str(run), "run", "~/run", "./run/best"):
        again = beitzoo.create_model(name, pretrained=True)
        assert torch.equal(again.head.weight, model.head.weight), name
    weights = best / "model.safetensors"
    assert look_up(str(weights)).pretrained.sources == (LocalFile(weights),)
    assert look_up(str(weights)).pretrained.data == look_up(str(best)).pretrained.data
    for path in (weights, best, run, "~/run"):
        again = beitzoo.create_model("test_beit", checkpoint_path=path)
        assert torch.equal(again.head.weight, model.head.weight), path


def test_a_name_of_the_table_comes_before_a_folder_of_that_name(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run.rename(tmp_path / "test_beit")
    assert look_up("test_beit").config.num_classes == 10
    assert look_up("local-dir:test_beit").config.num_classes == 3


def test_repositories_of_the_table_are_names() -> None:
    assert look_up("microsoft/beit-base-patch16-224") == find("beit_base_patch16_224.in22k_ft_in22k_in1k")
    assert beitzoo.is_model("timm/beitv2_large_patch16_224.in1k_ft_in1k")
    repositories = {
        (source.repo_id, name)
        for name, row in PRETRAINED.items()
        for source in row.sources
        if isinstance(source, HubFile)
    }
    assert all(find(repository).name == name for repository, name in repositories)
    assert len({repository for repository, _ in repositories}) == len(repositories)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("runs/best", UnknownModelError, "no file or folder 'runs/best'.* 'hf-hub:runs/best'"),
        ("~/nowhere", UnknownModelError, "no file or folder '~/nowhere'"),
        ("beit_base_patch16_24", UnknownModelError, "did you mean 'beit_base_patch16_224'"),
        ("local-dir:nowhere", MissingFileError, r"There is no nowhere/config\.json"),
    ],
)
def test_what_is_nowhere_is_said(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        beitzoo.create_model(name)


def test_a_checkpoint_file_is_a_name_where_its_shapes_tell_the_network(
    model: Beit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "mine.pth"
    beitzoo.save_unilm(model, path)
    with caplog.at_level(logging.WARNING):
        again = beitzoo.create_model(str(path), pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(x), model(x))
    assert again.pretrained_cfg["architecture"] == "test_beit"
    assert "says nothing about its images: they are prepared as for test_beit" in caplog.text
    beitzoo.save_unilm(randomise(beitzoo.create_model("test_beit", img_size=(48, 64))), path)
    with pytest.raises(CheckpointError, match=r"mine\.pth: its shapes do not tell"):
        beitzoo.create_model(str(path))


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "beit_large_patch16_384", "beit_nano_patch4_32"])
def test_networks_are_told_by_their_shapes(name: str) -> None:
    config = ARCHITECTURES[name]
    with torch.device("meta"):
        found = identify(shapes_of(Beit(config).state_dict()))
    assert found is not None
    assert found[1] == Classify(num_classes=config.num_classes)
    with torch.device("meta"):
        assert shapes_of(Beit(found[0]).state_dict()) == shapes_of(Beit(config).state_dict())


def test_a_pretrained_network_is_told_by_its_shapes() -> None:
    entry = find("beit_base_patch16_224.mim_in22k")
    with torch.device("meta"):
        shapes = shapes_of(Beit(entry.config).state_dict()) | {"lm_head.weight": (8192, 768), "lm_head.bias": (8192,)}
    found = identify(shapes)
    assert found is not None
    assert found[1] == Mim()
    assert found[0].use_shared_rel_pos_bias
    assert found[0].use_mask_token
    assert not found[0].norm_after_pooling


def shapes_at(name: str, **fields: object) -> dict[str, tuple[int, ...]]:
    return shapes_of(beitzoo.create_model(name, device="meta", **fields).state_dict())


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (lambda: shapes_at("beit_large_patch16_224"), "It is a BEiT large at 224: beit_large_patch16_224."),
        (lambda: shapes_at("beit_base_patch16_384"), "It is the same network at 384: give img_size=384."),
        (
            lambda: shapes_at("test_beit"),
            "It is a BEiT at 64: test_beit.",
        ),
        (
            lambda: shapes_at("beit_base_patch16_224", depth=11),
            "It is a BEiT base at 224: patch_size=16, embed_dim=768, depth=11, num_heads=12, mlp_ratio=4.",
        ),
        (lambda: shapes_at("beit_base_patch16_224", num_classes=3), ""),
    ],
    ids=["large", "size", "test", "depth", "head"],
)
def test_a_file_of_another_network_is_told(shapes: Callable[[], Shapes], message: str) -> None:
    assert explain(shapes(), ARCHITECTURES["beit_base_patch16_224"]) == message


def test_the_error_of_a_load_says_which_network_the_file_is_of(tmp_path: Path) -> None:
    beitzoo.save_unilm(beitzoo.create_model("test_beit", img_size=96), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"It is the same network at 96: give img_size=96\.$"):
        beitzoo.create_model("test_beit", checkpoint_path=tmp_path / "a.pth")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match="It is a ViT: its keys have a bias, and it has no relative positions"):
        beitzoo.create_model("test_beit", checkpoint_path=tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match="do not tell which network"):
        beitzoo.create_model(str(tmp_path / "vit.pth"))


def test_layouts_of_named_files_are_seen(model: Beit, tmp_path: Path) -> None:
    torch.save(layouts.to_transformers(model.state_dict(), "beit."), tmp_path / "hf.bin")
    assert look_up(str(tmp_path / "hf.bin")).config.norm_eps == 1e-12
    assert beitzoo.create_model(str(tmp_path / "hf.bin"), pretrained=True).num_classes == 3
