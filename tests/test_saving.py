"""What is saved can be read: the checks before anything is written, wrappers, full disks."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm
import torch
from oracles import randomise, relative_error
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel
from transformers import BeitForImageClassification, pipeline

import beitzoo
from beitzoo import Beit
from beitzoo.errors import FileAccessError, InvalidOptionError, InvalidValueError
from beitzoo.saving import save_pretrained, save_transformers, save_unilm
from beitzoo.training.objectives import ManyLabels
from beitzoo.training.sections import Finetune
from beitzoo.zoo.checkpoints import Classify

SAVERS = {"timm": save_pretrained, "transformers": save_transformers, "unilm": save_unilm}


@pytest.fixture
def model() -> Beit:
    return randomise(beitzoo.create_model("test_beit")).eval()


class Lora(nn.Module):
    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.a = nn.Linear(base_layer.in_features, base_layer.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.a(x)


def adapted(model: Beit) -> None:
    model.blocks[0].mlp.fc1 = Lora(model.blocks[0].mlp.fc1)


def pruned(model: Beit) -> None:
    prune.l1_unstructured(model.blocks[0].mlp.fc1, "weight", 0.5)


def parametrised(model: Beit) -> None:
    parametrizations.weight_norm(model.blocks[0].mlp.fc1)


def deep_head(model: Beit) -> None:
    model.head = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 4))


def head_without_bias(model: Beit) -> None:
    model.head = nn.Linear(64, 4, bias=False)


def without_norm(model: Beit) -> None:
    model.fc_norm = nn.Identity()


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (adapted, r"\+ blocks\.0\.mlp\.fc1\.base_layer\.weight(?s:.*)merge them into the linears"),
        (pruned, r"\+ blocks\.0\.mlp\.fc1\.weight_mask(?s:.*)prune\.remove"),
        (parametrised, r"parametrizations\.weight\.original0(?s:.*)remove_parametrizations"),
        (deep_head, r"\+ head\.0\.weight \(32, 64\)(?s:.*)reset_classifier"),
        (head_without_bias, r"- head\.bias(?s:.*)reset_classifier"),
        (without_norm, r"It has lost its norm"),
    ],
)
def test_a_changed_model_is_refused_before_anything_is_written(
    change: object, message: str, saver: str, model: Beit, tmp_path: Path
) -> None:
    change(model)  # type: ignore[operator]
    with pytest.raises(InvalidValueError, match=message):
        SAVERS[saver](model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("classes", [4, 0])
def test_the_class_count_of_a_head_replaced_by_hand_is_the_layers(classes: int, model: Beit, tmp_path: Path) -> None:
    model.head = nn.Linear(model.num_features, classes) if classes else nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    save_pretrained(model, tmp_path / "timm")
    again = beitzoo.create_model(str(tmp_path / "timm"), pretrained=True).eval()
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    assert again.num_classes == theirs.num_classes == classes
    assert torch.equal(again(x), model(x))
    assert relative_error(theirs(x), model(x)) < 1e-6
    save_unilm(model, tmp_path / "a.pth")
    assert torch.load(tmp_path / "a.pth")["model"].get("head.weight", torch.empty(0)).shape[0] == classes


def test_wrappers_are_taken_off(model: Beit, tmp_path: Path) -> None:
    compiled = torch.compile(model, backend="eager")
    wrapped = [compiled, nn.DataParallel(model), nn.DataParallel(compiled), ModelEmaV3(model), AveragedModel(model)]
    for number, wrapper in enumerate(wrapped):
        save_pretrained(wrapper, tmp_path / str(number))  # type: ignore[arg-type]
        again = beitzoo.create_model(str(tmp_path / str(number)), pretrained=True)
        assert torch.equal(again.head.weight, model.head.weight)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2)), "Got a Sequential; a Beit can be saved"),
        (lambda: beitzoo.create_model("test_beit", features_only=True), "Got a BeitFeatures"),
        (lambda: timm.create_model("vit_tiny_patch16_224", depth=1), "Got a VisionTransformer"),
    ],
    ids=["sequential", "features", "timm"],
)
def test_another_module_is_named(other: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError, match=message):
        save_pretrained(other(), tmp_path / "new")  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_precision_is_said_where_transformers_looks_for_it(dtype: torch.dtype, model: Beit, tmp_path: Path) -> None:
    save_transformers(model.to(dtype), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert "torch_dtype" not in config
    theirs = BeitForImageClassification.from_pretrained(tmp_path)
    assert theirs.dtype == dtype
    again = beitzoo.create_model(str(tmp_path), pretrained=True)
    assert {p.dtype for p in again.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("classes", "activation"), [(3, "softmax"), (3, "sigmoid"), (1, "sigmoid")], ids=["one", "several", "single"]
)
def test_the_activation_survives_every_folder(classes: int, activation: str, tmp_path: Path) -> None:
    model = randomise(beitzoo.create_model("test_beit", num_classes=classes))
    model.pretrained = beitzoo.PretrainedConfig(head=Classify(num_classes=classes, activation=activation))  # type: ignore[arg-type]
    for saver in (save_pretrained, save_transformers):
        saver(model, tmp_path / saver.__name__)
        again = beitzoo.create_model(str(tmp_path / saver.__name__), pretrained=True)
        assert again.pretrained.head.activation == activation
    config = json.loads((tmp_path / "save_transformers" / "config.json").read_text())
    assert ("problem_type" in config) == (activation == "sigmoid" and classes > 1)
    image = Path("beitzoo/assets/samples/chelsea.jpg")
    theirs = pipeline("image-classification", model=str(tmp_path / "save_transformers"))(str(image))
    pixels = beitzoo.create_transform(**beitzoo.resolve_data_config(again))(beitzoo.open_image(image))
    logits = again.eval()(pixels[None])[0]
    ours = logits.softmax(0) if activation == "softmax" else logits.sigmoid()
    for answer in theirs:
        index = int(answer["label"].removeprefix("LABEL_"))
        assert answer["score"] == pytest.approx(ours[index].item(), abs=0.02)  # one level of 255 in some pixels


def test_transformers_trains_several_labels_by_the_same_loss(tmp_path: Path) -> None:
    """A folder written here, and that folder written by transformers: same loss, and the activation comes back."""
    model = randomise(beitzoo.create_model("test_beit", num_classes=4)).eval()
    head = Classify(num_classes=4, labels=tuple("abcd"), activation="sigmoid")
    model.pretrained = beitzoo.PretrainedConfig(head=head)
    save_transformers(model, tmp_path / "ours")
    theirs = BeitForImageClassification.from_pretrained(tmp_path / "ours").eval()
    pixels, targets = torch.randn(3, *model.default_cfg["input_size"]), torch.tensor([[1.0, 0, 1, 0], [0] * 4, [1] * 4])
    with torch.no_grad():
        found = theirs(pixels, labels=targets)
        ours = ManyLabels(Finetune(labels="many"), targets.sum(0), len(targets)).loss(model(pixels), targets)
        assert ours.item() == pytest.approx(found.loss.item(), rel=1e-4)
        theirs.save_pretrained(tmp_path / "theirs")
        again = beitzoo.create_model(str(tmp_path / "theirs"), pretrained=True).eval()
        assert again.pretrained.head == head
        assert relative_error(again(pixels), found.logits) < 1e-4


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size, which fails like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("saver", SAVERS)
def test_a_full_disk_leaves_the_old_file_and_is_an_error_of_the_user(saver: str, model: Beit, tmp_path: Path) -> None:
    target = tmp_path / "saved"
    SAVERS[saver](model, target)
    weights = target if target.is_file() else target / "model.safetensors"
    before = {path.name: path.read_bytes() for path in weights.parent.iterdir()}
    with full_disk(100_000), pytest.raises(FileAccessError, match=f"Cannot write {weights}"):
        SAVERS[saver](randomise(model), target)
    assert {path.name: path.read_bytes() for path in weights.parent.iterdir()} == before


def test_a_folder_that_cannot_be_is_an_error_of_the_user(model: Beit, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileAccessError, match="Cannot write"):
        save_pretrained(model, tmp_path / "file" / "model")


def test_home_means_the_same_at_every_door(model: Beit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for saver in SAVERS.values():
        saver(model, "~/saved" if saver is not save_unilm else "~/saved.pth")
    assert {path.name for path in tmp_path.iterdir()} == {"saved", "saved.pth"}
    for path in ("~/saved", "~/saved.pth"):
        assert torch.equal(beitzoo.create_model("test_beit", checkpoint_path=path).head.weight, model.head.weight)
    assert beitzoo.create_model("local-dir:~/saved", cache_dir="~/cache").num_classes == 10


def test_tied_tensors_are_saved(model: Beit, tmp_path: Path) -> None:
    model.blocks[1].attn.relative_position_bias_table = model.blocks[0].attn.relative_position_bias_table
    save_pretrained(model, tmp_path)
    again = beitzoo.create_model(str(tmp_path), pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), model(x))
