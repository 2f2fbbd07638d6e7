"""What counts as right: folders by synset and number, the classes of ImageNet-A and -R, ReaL labels."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data.real_labels import RealLabelsImagenet
from torch import Tensor

import beitzoo
from beitzoo import Beit
from beitzoo.errors import InvalidValueError
from beitzoo.evaluation.evaluate import Judging, evaluate, load_data
from beitzoo.evaluation.looks import Looks, answer
from beitzoo.evaluation.subjects import Subject
from beitzoo.evaluation.truth import Labelling, truth_of
from beitzoo.images.image_set import ImageSet
from beitzoo.inference.pipeline import Failure, Loading, run_jobs
from beitzoo.zoo.checkpoints import Classify

SYNSETS = timm.data.ImageNetInfo("imagenet-1k").label_names()
INFO = Path(timm.data.__file__).parent / "_info"


@pytest.fixture(scope="module")
def model() -> Beit:
    """A network of ImageNet-1k whose answers differ from image to image."""
    torch.manual_seed(0)
    network = beitzoo.create_model("test_beit", num_classes=1000)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    network.pretrained = replace(network.pretrained, head=Classify(num_classes=1000, labels="imagenet-1k"))
    return network.eval()


def pictures(count: int) -> list[Image.Image]:
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (40, 50, 3), dtype=np.uint8)).resize((90, 70)) for _ in range(count)]


def logits_of(model: Beit, images: Sequence[Image.Image]) -> Tensor:
    transform = beitzoo.create_transform(**beitzoo.resolve_data_config(model))
    with torch.no_grad():
        return torch.cat([model(transform(image)[None]) for image in images])


@pytest.mark.parametrize("name", ["a", "r"])
def test_only_the_200_classes_compete_as_by_timms_valid_labels(name: str, model: Beit, tmp_path: Path) -> None:
    """timm takes these outputs (`--valid-labels`) and numbers the folders in order of their synsets."""
    valid = list(map(int, (INFO / f"imagenet_{name}_indices.txt").read_text().split()))
    folders = sorted(SYNSETS[index] for index in valid)
    images = pictures(40)
    labels = [random.Random(place).randrange(200) for place in range(40)]
    logits = logits_of(model, images)[:, valid]
    labels[:20] = logits[:20].argmax(1).tolist()  # some must be right
    data = ImageSet(images, labels, tuple(folders), tmp_path)
    found = evaluate(Subject(model, "test_beit"), data, "data")
    expected = timm.utils.accuracy(logits, torch.tensor(labels), topk=(1, 5))
    assert [found.row["top1"], found.row["top5"]] == [round(value.item(), 3) for value in expected]
    assert found.row["outputs"] == "data"
    assert f"those of ImageNet-{name.upper()}; only their outputs compete." in found.notes[0]
    everything = evaluate(Subject(model, "test_beit"), data, "data", Judging(labelling=Labelling("all"))).row
    right = logits_of(model, images).argmax(1) == torch.tensor([valid[label] for label in labels])
    assert (everything["outputs"], everything["top1"]) == ("all", round(100 * right.double().mean().item(), 3))


def test_folders_of_imagenet_v2_are_numbers(model: Beit, tmp_path: Path) -> None:
    names = tuple(sorted(map(str, range(1000))))  # "10" before "2", as folders are listed
    data = ImageSet(pictures(1), list(range(1000)), names, tmp_path)
    truth = truth_of(model, "test_beit", data, range(1000), Labelling())
    assert [truth.right[place] for place in range(1000)] == [(int(name),) for name in names]
    assert (truth.competing, truth.notes) == (None, [])
    beyond = ImageSet([], [], (*names, "1000"), tmp_path)
    with pytest.raises(InvalidValueError, match=r"not trained on 1001 of the 1001 classes of the data \(0, 1, 10"):
        truth_of(model, "test_beit", beyond, [], Labelling())


def write_validation_images(root: Path, numbers: Sequence[int]) -> None:
    for number, image in zip(numbers, pictures(len(numbers)), strict=True):
        image.save(root / f"ILSVRC2012_val_{number:08d}.png")


def test_accuracy_on_real_labels_is_timms(model: Beit, tmp_path: Path) -> None:
    """Against `RealLabelsImagenet`: an image without label, several labels, the likeliest, the third, a wrong one."""
    (tmp_path / "images").mkdir()
    write_validation_images(tmp_path / "images", range(1, 11))
    logits = logits_of(model, [Image.open(path).convert("RGB") for path in sorted((tmp_path / "images").iterdir())])
    ranked = logits.argsort(1, descending=True).tolist()
    labels = [[], *([row[900], row[0]] for row in ranked[1:4]), *([row[2]] for row in ranked[4:8])]
    labels += [[row[500]] for row in ranked[8:]]
    file = tmp_path / "real.json"
    file.write_text(json.dumps(labels))
    theirs = RealLabelsImagenet([f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 11)], str(file))
    theirs.add_result(logits)
    data = load_data(str(tmp_path / "images"), str(file))
    found = evaluate(Subject(model, "test_beit"), data, "val", Judging(labelling=Labelling(real_labels=str(file))))
    row = found.row
    assert (row["top1"], row["top5"]) == tuple(round(theirs.get_accuracy(k), 3) for k in (1, 5)) == (33.333, 77.778)
    assert (row["count"], row["real_labels"], found.answers) == (9, str(file), [])
    assert "1 of 10 images have no ReaL label, and do not count." in found.notes


def test_the_list_of_timm_is_there(model: Beit, tmp_path: Path) -> None:
    write_validation_images(tmp_path, [4, 50_000])
    data, theirs = load_data(str(tmp_path), "timm"), RealLabelsImagenet([""] * 50_000).real_labels
    right = truth_of(model, "test_beit", data, [0, 1], Labelling(real_labels="timm")).right
    names = ("ILSVRC2012_val_00000004.JPEG", "ILSVRC2012_val_00050000.JPEG")
    assert right == {place: tuple(theirs[name]) for place, name in enumerate(names) if theirs[name]}


def test_real_labels_of_a_file(model: Beit, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    write_validation_images(tmp_path / "images", [1, 2])
    data = load_data(str(tmp_path / "images"), "real.json")
    (tmp_path / "real.json").write_text(json.dumps([[3, 5], [7]]))
    labelling = Labelling(real_labels=str(tmp_path / "real.json"))
    assert truth_of(model, "test_beit", data, [0, 1], labelling).right == {0: (3, 5), 1: (7,)}
    (tmp_path / "real.json").write_text(json.dumps([[3, 5]]))
    with pytest.raises(InvalidValueError, match=r"val_00000002\.png is none of the 1 validation images that ReaL"):
        truth_of(model, "test_beit", data, [0, 1], labelling)
    for wrong in ("{", "[[1000]]", "[3]", '{"a": 1}'):
        (tmp_path / "real.json").write_text(wrong)
        with pytest.raises(InvalidValueError, match=r"has no ReaL labels .* Give real.json of google-research"):
            truth_of(model, "test_beit", data, [0], labelling)


def test_unilms_crop_is_that_of_its_code(model: Beit) -> None:
    """`build_transform` of `beit/datasets.py`, by torchvision."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

    image = pictures(1)[0].resize((500, 410))
    for size in (224, 384):
        config = {**beitzoo.resolve_data_config(model), "input_size": (3, size, size)}
        crop_pct = 224 / 256 if size < 384 else 1.0
        theirs = Compose(
            [
                Resize(int(size / crop_pct), interpolation=InterpolationMode.BICUBIC),
                CenterCrop(size),
                ToTensor(),
                Normalize(torch.tensor(config["mean"]), torch.tensor(config["std"])),
            ]
        )
        (ours,) = Looks("unilm", sizes=(size,)).data_configs(model)
        assert torch.equal(beitzoo.create_transform(**ours)(image), theirs(image))


def test_several_looks_are_the_mean_of_probabilities(model: Beit) -> None:
    """Slowly: each size by a model that was set to it, each image and its mirror image alone."""
    image, looks = pictures(1)[0], Looks(sizes=(32, 48), flip=True)
    seen = []
    for size in looks.sizes:
        transform = beitzoo.create_transform(**{**beitzoo.resolve_data_config(model), "input_size": (3, size, size)})
        other = beitzoo.create_model("test_beit", num_classes=1000)
        other.load_state_dict(model.state_dict())
        other.set_input_size((size, size))
        pixels = transform(image)[None]
        with torch.no_grad():
            seen += [other.eval()(one)[0].softmax(0) for one in (pixels, pixels.flip(3))]
    expected = torch.stack(seen).mean(0)
    ((_, outcomes),) = run_jobs([image], looks.jobs(model, "test_beit"), Loading())
    views = [outcome for outcome in outcomes if not isinstance(outcome, Failure)]
    logits, probabilities = answer(model, views, None)
    assert [tuple(view.shape) for view in views] == [(2, 1000), (2, 1000)]
    torch.testing.assert_close(probabilities, expected, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(logits.softmax(0), expected, rtol=1e-5, atol=1e-8)
    assert (seen[0] - seen[3]).abs().max() > 1e-3
    competing = torch.tensor([3, 5, 900])
    chosen = [view[:, competing].softmax(1) for view in views]
    torch.testing.assert_close(answer(model, views, competing)[1], torch.cat(chosen).mean(0))


def test_sizes_that_cannot_be_had_are_refused(model: Beit) -> None:
    with pytest.raises(InvalidValueError, match=r"Images of 50 pixels cannot be cut into patches of"):
        Looks(sizes=(50,)).data_configs(model)
    with pytest.raises(InvalidValueError, match="they can be different numbers of pixels, such as 224,256"):
        Looks(sizes=(32, 32))
