"""From a name to a model, with weights and without, and out again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from oracles import randomise, relative_error
from PIL import Image

import beitzoo
from beitzoo import Beit, CheckpointError
from beitzoo.weights import adapt
from beitzoo.zoo.checkpoints import Classify, Mim, Segment


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Beit, str]:
    """A random model and the `local-dir:` name of the folder it was saved to."""
    model = beitzoo.create_model("test_beit").eval()
    randomise(model)
    beitzoo.save_pretrained(model, tmp_path / "saved")
    return model, f"local-dir:{tmp_path / 'saved'}"


def test_a_new_model_is_random_and_in_training_mode() -> None:
    first, second = beitzoo.create_model("test_beit"), beitzoo.create_model("test_beit")
    assert first.training
    assert not torch.equal(first.head.weight, second.head.weight)
    torch.manual_seed(0)
    assert torch.equal(first.head.weight, beitzoo.create_model("test_beit").head.weight)


def test_default_model_needs_no_name_and_no_network() -> None:
    model = beitzoo.create_model(pretrained=True)
    assert model.num_classes == 10
    assert model.pretrained == beitzoo.get_pretrained_cfg("beit_nano_patch4_32.digits")


def test_device_and_dtype() -> None:
    model = beitzoo.create_model("test_beit", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model = beitzoo.create_model("beit_large_patch16_512", device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_saved_model_comes_back_bit_equal(saved: tuple[Beit, str]) -> None:
    model, name = saved
    again = beitzoo.create_model(name, pretrained=True).eval()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x), again(x))
    assert not torch.equal(model(x), beitzoo.create_model(name).eval()(x))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_classes": 0},
        {"global_pool": "token"},
        {"img_size": (48, 80)},
        {"in_chans": 1, "init_values": 0.0},
        {"patch_size": 8, "use_abs_pos_emb": True, "use_shared_rel_pos_bias": True, "global_pool": ""},
    ],
    ids=str,
)
def test_timm_reads_what_we_save(options: dict[str, object], tmp_path: Path) -> None:
    model = beitzoo.create_model("test_beit", **options).eval()
    randomise(model)
    beitzoo.save_pretrained(model, tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    ours = beitzoo.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(3, model.config.in_chans, *model.config.img_size)
    assert torch.equal(ours(x), model(x))
    assert relative_error(theirs(x), model(x)) < 1e-6
    assert timm.data.resolve_model_data_config(theirs)["input_size"] == beitzoo.resolve_data_config(ours)["input_size"]


def test_we_read_what_timm_saves(tmp_path: Path) -> None:
    theirs = timm.create_model("beit_base_patch16_224", embed_dim=48, depth=2, num_heads=3, num_classes=5).eval()
    randomise(theirs)
    timm.models.save_for_hf(
        theirs, tmp_path, model_config={"label_names": ["a", "b", "c", "d", "e"]}, safe_serialization=True
    )
    ours = beitzoo.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 3, 224, 224)
    assert relative_error(ours(x), theirs(x)) < 1e-5
    assert ours.pretrained.head.labels == ("a", "b", "c", "d", "e")
    expected = timm.data.resolve_model_data_config(theirs)
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in expected.items()} == beitzoo.resolve_data_config(ours)


def test_a_loaded_model_is_fitted_to_what_was_asked(saved: tuple[Beit, str]) -> None:
    model, name = saved
    fitted = beitzoo.create_model(
        name, pretrained=True, img_size=(96, 64), in_chans=1, num_classes=3, global_pool="token", drop_path_rate=0.1
    )
    assert fitted(torch.randn(2, 1, 96, 64)).shape == (2, 3)
    assert torch.equal(fitted.fc_norm.weight, model.fc_norm.weight)
    assert torch.equal(fitted.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    assert fitted.blocks[-1].drop_path.rate == 0.1
    data = beitzoo.resolve_data_config(fitted)
    assert data["input_size"] == (1, 96, 64)
    assert data["mean"] == (0.5,)


def test_features_of_a_loaded_model(saved: tuple[Beit, str]) -> None:
    model, name = saved
    x = torch.randn(2, 3, 64, 64)
    features = beitzoo.create_model(name, pretrained=True, num_classes=0).eval()(x)
    assert torch.equal(features, model.forward_head(model.forward_features(x), pre_logits=True))


def test_checkpoint_path_replaces_the_weights(saved: tuple[Beit, str]) -> None:
    model, name = saved
    path = Path(name.removeprefix("local-dir:")) / "model.safetensors"
    loaded = beitzoo.create_model("test_beit", checkpoint_path=path)
    assert torch.equal(loaded.head.weight, model.head.weight)
    mine = beitzoo.create_model("test_beit", num_classes=3, img_size=48, in_chans=1)
    beitzoo.save_pretrained(mine, path.parent / "mine")
    own = path.parent / "mine" / "model.safetensors"
    again = beitzoo.create_model("test_beit", img_size=48, checkpoint_path=own)
    assert torch.equal(again.head.weight, mine.head.weight)
    assert torch.equal(
        again.blocks[0].attn.relative_position_bias_table, mine.blocks[0].attn.relative_position_bias_table
    )
    assert (
        beitzoo.create_model("test_beit", img_size=48, num_classes=5, in_chans=3, checkpoint_path=own).num_classes == 5
    )
    model.reset_classifier(0)
    beitzoo.save_unilm(model, path.parent / "backbone.pth")
    headless = beitzoo.create_model("test_beit", num_classes=4, checkpoint_path=path.parent / "backbone.pth")
    assert torch.equal(headless.cls_token, model.cls_token)
    assert headless.num_classes == 4
    with pytest.raises(CheckpointError, match=r"- head\.weight"):
        beitzoo.create_model("test_beit", checkpoint_path=path.parent / "backbone.pth")
    with pytest.raises(CheckpointError, match=r"blocks.2"):
        beitzoo.create_model("test_beit", checkpoint_path=path, depth=3)
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        beitzoo.create_model("test_beit", checkpoint_path=path.with_name("absent"))


def test_saving_over_the_folder_a_model_was_loaded_from(saved: tuple[Beit, str]) -> None:
    _, name = saved
    model = beitzoo.create_model(name, pretrained=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    optimizer.step()
    beitzoo.save_pretrained(model, name.removeprefix("local-dir:"))
    again = beitzoo.create_model(name, pretrained=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_random_only_architecture_says_so() -> None:
    with pytest.raises(beitzoo.UnknownModelError, match="'test_beit' has no pretrained weights"):
        beitzoo.create_model("test_beit", pretrained=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("not json", "is not the config of a timm model"),
        ("[]", "is not the config of a timm model"),
        ({"architecture": "resnet50", "pretrained_cfg": {}}, "'resnet50' is no BEiT"),
        ({"pretrained_cfg": {}}, "Field required"),
        ({"architecture": "test_beit", "pretrained_cfg": {}, "model_args": {"dept": 3}}, "'dept'.*'depth'"),
        ({"architecture": "test_beit", "pretrained_cfg": {}, "model_args": {"depth": 0}}, "depth=0"),
        ({"architecture": "test_beit", "pretrained_cfg": {}, "model_args": {"depth": "x"}}, "depth='x'"),
        ({"architecture": "test_beit", "pretrained_cfg": {"mean": [0.5], "std": [0.5]}}, "3 channels with 1 means"),
    ],
)
def test_a_folder_of_something_else_is_named(config: object, message: str, tmp_path: Path) -> None:
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json.*" + message):
        beitzoo.create_model(f"local-dir:{tmp_path}")


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        beitzoo.create_model(f"local-dir:{tmp_path}")


def test_timms_model_card_runs_with_one_word_changed() -> None:
    """Both halves of the card on the hub; weights are random here."""
    img = Image.open("beitzoo/assets/samples/chelsea.jpg")

    model = beitzoo.create_model("beit_base_patch16_224.in22k_ft_in22k_in1k", pretrained=False)
    model = model.eval()
    data_config = timm.data.resolve_model_data_config(model)
    transforms = timm.data.create_transform(**data_config, is_training=False)
    with torch.inference_mode():
        output = model(transforms(img).unsqueeze(0))
    top5_probabilities, top5_class_indices = torch.topk(output.softmax(dim=1) * 100, k=5)
    assert top5_probabilities.shape == top5_class_indices.shape == (1, 5)

    model = beitzoo.create_model("beit_base_patch16_224.in22k_ft_in22k_in1k", pretrained=False, num_classes=0)
    model = model.eval()
    data_config = timm.data.resolve_model_data_config(model)
    transforms = timm.data.create_transform(**data_config, is_training=False)
    with torch.inference_mode():
        output = model(transforms(img).unsqueeze(0))
        assert output.shape == (1, model.num_features)
        features = model.forward_features(transforms(img).unsqueeze(0))
        assert features.shape == (1, 197, 768)
        assert torch.equal(model.forward_head(features, pre_logits=True), output)


def test_a_random_model_claims_nothing_of_a_checkpoint_it_does_not_have() -> None:
    name = "beitv2_base_patch16_224.in1k_ft_in22k_in1k"
    model, row = beitzoo.create_model(name, device="meta"), beitzoo.get_pretrained_cfg(name)
    assert row is not None
    own = model.pretrained
    assert (own.license, own.paper, own.sources, own.tag, model.class_names) == (None, None, (), None, None)
    assert own.data == row.data
    assert own.head == Classify(num_classes=1000)
    assert own.architecture == "beitv2_base_patch16_224"


@pytest.fixture
def pretraining(tmp_path: Path) -> Path:
    """A small file in the form of a pretraining checkpoint."""
    small = {"embed_dim": 48, "num_heads": 3, "depth": 2}
    model = randomise(beitzoo.create_model("beit_base_patch16_224.mim_in22k", num_classes=0, **small))
    extra = {"lm_head.weight": torch.randn(8192, 48), "lm_head.bias": torch.randn(8192)}
    torch.save({"model": model.state_dict() | extra}, tmp_path / "mim.pth")
    return tmp_path / "mim.pth"


@pytest.mark.parametrize("classes", [0, 7])
def test_what_a_pretraining_row_becomes_says_what_it_is(classes: int, pretraining: Path, tmp_path: Path) -> None:
    small = {"embed_dim": 48, "num_heads": 3, "depth": 2, "num_classes": classes}
    model = beitzoo.create_model("beit_base_patch16_224.mim_in22k", checkpoint_path=pretraining, **small)
    assert model.pretrained.head == Classify(num_classes=classes)
    assert model.pretrained_cfg["num_classes"] == classes
    assert model.pretrained.license == "MIT"  # of the weights it starts from
    assert model.pretrained.paper == "https://arxiv.org/abs/2106.08254"
    beitzoo.save_pretrained(model, tmp_path / "saved")
    again = beitzoo.create_model(str(tmp_path / "saved"), pretrained=True)
    assert again.pretrained.license == "MIT"
    assert again.pretrained.head == Classify(num_classes=classes)


def test_a_head_of_another_size_has_no_labels(tmp_path: Path) -> None:
    beitzoo.save_pretrained(beitzoo.create_model("beit_nano_patch4_32", num_classes=4), tmp_path)
    path = tmp_path / "model.safetensors"
    assert beitzoo.create_model("beit_nano_patch4_32.digits", checkpoint_path=path).class_names is None
    same = beitzoo.create_model("beit_nano_patch4_32.digits", pretrained=True)
    assert same.class_names == tuple("0123456789")


def test_every_pair_of_heads_is_a_row_of_one_table() -> None:
    assert set(adapt.ADAPTATIONS) == {
        *((stored, wanted) for stored in (Classify, Mim) for wanted in (Classify, Mim)),
        *((stored, wanted) for stored in (Classify, Mim, Segment) for wanted in (None, Segment)),
    }


def test_few_files_are_opened_from_name_to_logits() -> None:
    """Those whose functions run, but for the ground floor's; the two tables of names are only read."""
    code = """
import sys, torch, beitzoo
from pathlib import Path
import beitzoo.factory
opened = set()
def note(frame, event, argument):
    path = Path(frame.f_code.co_filename)
    if "beitzoo" in path.parts and frame.f_code.co_name != "<module>" and not frame.f_code.co_filename.startswith("<"):
        opened.add("/".join(path.parts[-2:]))
sys.setprofile(note)
model = beitzoo.create_model(pretrained=True).eval()
with torch.no_grad():
    model(torch.zeros(1, 1, 32, 32))
sys.setprofile(None)
print(*sorted(opened - {"beitzoo/__init__.py", "beitzoo/errors.py", "beitzoo/files.py"}))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(result.stdout.split()) <= 13, result.stdout
