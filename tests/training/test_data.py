"""What a run sees is a pure function of seed, epoch and image."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from colours import write_colours
from PIL import Image

import beitzoo
from beitzoo.errors import InvalidValueError
from beitzoo.images.datasets import find_images, labelled_folder
from beitzoo.images.image_set import ImageSet, with_held_out
from beitzoo.images.loading import Sample, load_batches
from beitzoo.images.splits import Split
from beitzoo.training.data import LoadedImages, Order, load_images, split_images, training_transform
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


def test_images_of_a_test_path_are_held_out(tmp_path: Path) -> None:
    write_colours(tmp_path / "train", per_class=4)
    write_colours(tmp_path / "test", per_class=2)
    data = DataSection(source="folder", path=tmp_path / "train", test_path=tmp_path / "test", val_fraction=0.25)
    images = load_images(data)
    count = len(load_images(data.model_copy(update={"test_path": None})).images)
    split = split_images(images, data, test_fraction=1 / 3, val_fraction=0.5)
    assert split.test == list(range(count, len(images.images)))
    assert sorted(split.train + split.val) == list(range(count))
    assert len(split.val) == count // 4
    held_out, trained = images.images[split.test[-1]], images.images[0]
    assert isinstance(held_out, Path)
    assert isinstance(trained, Path)
    assert images.identity(split.test[-1])[0] == f"held out:{held_out.relative_to(tmp_path / 'test')}"
    assert images.identity(0)[0] == str(trained.relative_to(tmp_path / "train"))
    assert images.labels is not None
    assert images.names[images.labels[split.test[-1]]] == held_out.parent.name
    with pytest.raises(RecipeError, match=r"data.test_fraction is 0.5, but the images come in parts"):
        split_images(images, data.model_copy(update={"test_fraction": 0.5}), 0, 0)


def test_images_to_train_on_are_not_held_out_as_well(tmp_path: Path) -> None:
    path = write_colours(tmp_path / "train", per_class=4)
    with pytest.raises(RecipeError, match="would be both trained on and held out"):
        load_images(DataSection(source="folder", path=path, test_path=path))
    other = write_colours(tmp_path / "other", per_class=2)
    next(other.iterdir()).rename(other / "mauve")
    with pytest.raises(RecipeError, match=r"mauve is a class of .*other, but none of .*train"):
        load_images(DataSection(source="folder", path=path, test_path=other))
    flat, classes = find_images("images", path), find_images("folder", other)
    with pytest.raises(InvalidValueError, match=r"Only one of .* has classes"):
        with_held_out(flat, classes)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"train": range(6), "test": range(6, 8)}, Split([0, 1, 2, 3, 4, 5], [], [6, 7])),
        ({"train": range(6), "validation": range(6, 8)}, Split([0, 1, 2, 3, 4, 5], [], [6, 7])),
        ({"train": range(4), "validation": range(4, 6), "test": range(6, 8)}, Split([0, 1, 2, 3], [4, 5], [6, 7])),
        ({}, Split([0, 1, 2, 3, 4, 5, 6, 7], [], [])),
    ],
)
def test_parts_that_images_come_in_are_kept(parts: dict[str, range], expected: Split) -> None:
    images = ImageSet([Image.new("L", (1, 1))] * 8, None, (), parts=parts)
    assert split_images(images, DataSection(source="images"), 0, 0) == expected


def test_few_images_of_each_class_leave_what_is_held_out_as_it_is() -> None:
    images = load_images(DataSection(source="digits"))
    whole, few = (
        split_images(images, DataSection(source="digits", train_per_class=count), 1 / 3, 0.1) for count in (0, 3)
    )
    assert (few.val, few.test) == (whole.val, whole.test)
    assert len(few.train) == 30
    assert set(few.train) < set(whole.train)


def test_digits_are_in_no_place(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"leave out data\.path"):
        load_images(DataSection(source="digits", path=tmp_path))


def test_a_seed_of_its_own_draws_few_labels_while_the_held_out_images_stay() -> None:
    images = load_images(DataSection(source="digits"))
    splits = [
        split_images(images, DataSection(source="digits", train_per_class=3, label_seed=seed), 1 / 3, 0.1)
        for seed in (None, 0, 1)
    ]
    first, same, other = splits
    assert first == same  # the seed of the split, where there is no other
    assert (other.val, other.test) == (first.val, first.test)
    assert set(other.train) != set(first.train)
    assert images.labels is not None
    assert sorted(images.labels[index] for index in other.train) == sorted([*range(10)] * 3)
