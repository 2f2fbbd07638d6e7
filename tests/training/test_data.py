"""What a run sees is a pure function of seed, epoch and image."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from colours import write_colours
from PIL import Image

import beitzoo
from beitzoo.images.datasets import labelled_folder
from beitzoo.images.loading import Sample, load_batches
from beitzoo.training.data import LoadedImages, Order, load_images, training_transform
from beitzoo.training.processes import Processes
from beitzoo.training.recipe import RecipeError
from beitzoo.training.sections import AffineAugment, CropAugment, DataSection, TrainSection

CPU = torch.device("cpu")


def order(count: int, rank: int = 0, processes: int = 1, **train: object) -> Order:
    section = TrainSection.model_validate({"epochs": 3, "batch_size": 8, "lr": 1, **train})
    return Order(range(100, 100 + count), section, Processes(rank, processes, CPU))


def test_an_epoch_has_every_image_once_and_each_its_own_order() -> None:
    parts = list(order(32).parts(0))
    assert len(parts) == 3 * 4
    epochs = [[sample for part in parts[start : start + 4] for sample in part] for start in (0, 4, 8)]
    for number, samples in enumerate(epochs):
        assert {sample.epoch for sample in samples} == {number}
        assert sorted(sample.image for sample in samples) == list(range(100, 132))
    assert len({tuple(sample.image for sample in samples) for samples in epochs}) == 3
    assert parts != list(order(32, seed=1).parts(0))


def test_an_order_can_be_entered_at_any_update() -> None:
    parts = list(order(19).parts(0))
    assert [len(part) for part in parts] == [8] * 6  # three images of each epoch are left out
    for update in range(7):
        assert list(order(19).parts(update)) == parts[update:]


def test_an_update_is_the_same_images_however_it_is_shared() -> None:
    whole = list(order(32).parts(0))
    shared = [list(order(32, rank, 2, accumulation=2).parts(0)) for rank in (0, 1)]
    assert {len(part) for parts in shared for part in parts} == {2}
    for update, part in enumerate(whole):
        pieces = [piece for parts in shared for piece in parts[2 * update : 2 * update + 2]]
        assert [sample for piece in pieces for sample in piece] == part


def test_few_images_are_one_update() -> None:
    assert order(5).updates_per_epoch == 1
    assert [len(part) for part in order(5).parts(0)] == [5, 5, 5]
    assert [len(part) for part in order(5, 1, 2).parts(0)] == [3, 3, 3]


def test_augmentation_depends_on_epoch_and_image_alone(tmp_path: Path) -> None:
    images = labelled_folder(write_colours(tmp_path / "data", per_class=4))
    model = beitzoo.create_model("test_beit")
    augment = CropAugment(scale=(0.3, 1.0), re_prob=0.5, auto_augment="rand-m9-mstd0.5-inc1")
    size = (3, *model.config.img_size)
    dataset = LoadedImages(images, training_transform(model, augment), size, seed=3)
    parts = [[Sample(epoch, image) for image in range(4)] for epoch in (0, 1)]
    first, second = load_batches(dataset, parts, workers=0)
    assert not torch.equal(first.images, second.images)
    backwards = [[Sample(1, 3), Sample(0, 2)], [Sample(1, 0)]]
    a, b = load_batches(dataset, backwards, workers=2)
    assert torch.equal(a.images, torch.stack([second.images[3], first.images[2]]))
    assert torch.equal(b.images[0], second.images[0])
    other = LoadedImages(images, training_transform(model, augment), size, seed=4)
    assert not torch.equal(next(iter(load_batches(other, parts, workers=0))).images, first.images)


def test_loading_moves_no_generator(tmp_path: Path) -> None:
    """Stochastic depth draws from PyTorch's; a run that starts to load once more must not draw otherwise."""
    images = labelled_folder(write_colours(tmp_path / "data", per_class=2))
    model = beitzoo.create_model("test_beit")
    dataset = LoadedImages(images, training_transform(model, CropAugment()), (3, *model.config.img_size), seed=0)

    def drawn() -> tuple[float, float, float]:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        if loads:
            list(load_batches(dataset, [[Sample(0, 1)], [Sample(0, 2)]], workers=0))
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    loads = False
    expected = drawn()
    loads = True
    assert drawn() == expected


def test_unreadable_images_are_named_and_their_neighbours_stay(tmp_path: Path) -> None:
    images = labelled_folder(write_colours(tmp_path / "data", per_class=2))
    model = beitzoo.create_model("test_beit")
    dataset = LoadedImages(images, training_transform(model, CropAugment()), (3, *model.config.img_size), seed=0)
    whole, empty = load_batches(dataset, [[Sample(0, image) for image in range(6)], [Sample(0, 4)]], workers=0)
    assert whole.labels.tolist() == [0, 0, 1, 1, 2]
    assert [Path(path).name for path, _ in whole.unreadable] == ["0.png"]
    assert "not an image" in whole.unreadable[0][1]
    assert (tuple(empty.images.shape), len(empty.labels)) == ((0, *dataset.shape), 0)


def test_images_of_class_folders_are_turned_upright(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 3
    two = Image.new("L", (2, 1), 9)
    two.putpixel((1, 0), 200)
    two.save(tmp_path / "a" / "x.png", exif=exif)
    pixel = LoadedImages(labelled_folder(tmp_path), lambda image: torch.tensor(image.getpixel((0, 0))), (1, 1, 1), 0)
    (batch,) = load_batches(pixel, [[Sample(None, 0)]], workers=0)
    assert (batch.images.tolist(), batch.labels.tolist()) == ([200], [0])


def test_digits_are_sixteen_levels_of_ink() -> None:
    image = load_images(DataSection(source="digits")).images[0]
    assert isinstance(image, Image.Image)
    assert image.size == (8, 8)
    assert set(image.tobytes()) <= {round(level * 255 / 16) for level in range(17)}


def test_a_folder_without_a_path_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"data\.path is missing"):
        load_images(DataSection(source="folder"))


def test_crop_augmentation_passes_its_options_on() -> None:
    model = beitzoo.create_model("test_beit")
    transform = training_transform(model, CropAugment(hflip=0, re_prob=0.25, auto_augment="rand-m9-mstd0.5-inc1"))
    text = repr(transform)
    assert "RandAugment" in text
    assert "RandomErasing(p=0.25" in text
    assert "HorizontalFlip" not in text


def test_affine_augmentation_without_range_is_the_evaluation_transform() -> None:
    model = beitzoo.create_model("beit_nano_patch4_32")
    image = load_images(DataSection(source="digits")).images[3]
    plain = beitzoo.create_transform(**beitzoo.resolve_data_config(model))(image)
    assert torch.equal(training_transform(model, AffineAugment(kind="affine"))(image), plain)
    assert not torch.equal(training_transform(model, AffineAugment(kind="affine", rotate=30))(image), plain)
