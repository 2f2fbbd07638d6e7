"""From the data section of a recipe to loaders: which images, how they are split, how they are augmented."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from beitzoo.images.datasets import ImageSet, LabelledImages, collate, digits, labelled_folder
from beitzoo.images.transforms import Transform, create_transform, resolve_data_config
from beitzoo.models.beit import Beit
from beitzoo.training.recipe import AffineAugment, CropAugment, DataSection, Recipe, RecipeError


def load_images(data: DataSection) -> ImageSet:
    """Find the images of a recipe."""
    if data.source == "digits":
        return digits()
    if data.path is None:
        raise RecipeError("data.source is 'folder', but data.path is missing; name the folder of class folders.")
    return labelled_folder(data.path)


def training_loader(model: Beit, images: ImageSet, indices: list[int], recipe: Recipe) -> DataLoader[Any]:
    """Load images shuffled and augmented; an incomplete last batch is left out unless it is the only one."""
    dataset = LabelledImages(images, indices, training_transform(model, recipe.augment), model.config.in_chans)
    size = recipe.train.batch_size
    return DataLoader(
        dataset,
        size,
        shuffle=True,
        drop_last=len(dataset) > size,
        num_workers=recipe.data.workers,
        collate_fn=_collate(model),
    )


def evaluation_loader(model: Beit, images: ImageSet, indices: list[int], workers: int = 0) -> DataLoader[Any]:
    """Load images in order, prepared as the model expects them."""
    transform = create_transform(**resolve_data_config(model))
    dataset = LabelledImages(images, indices, transform, model.config.in_chans)
    return DataLoader(dataset, batch_size=64, num_workers=workers, collate_fn=_collate(model))


def training_transform(model: Beit, augment: AffineAugment | CropAugment) -> Transform:
    """Build the augmentation of a recipe, ending in the model's own size and normalisation."""
    config = resolve_data_config(model)
    if isinstance(augment, CropAugment):
        options = augment.model_dump(exclude={"kind"})
        return create_transform(is_training=True, **{**config, **options, "auto_augment": augment.auto_augment or None})
    affine = v2.RandomAffine(
        degrees=augment.rotate,
        translate=(augment.translate, augment.translate),
        scale=(1 - augment.scale, 1 + augment.scale),
        shear=(-augment.shear, augment.shear, -augment.shear, augment.shear),
        interpolation=v2.InterpolationMode.BILINEAR,
    )
    evaluation: Any = create_transform(**config)
    resize, *crop_and_normalise = evaluation.transforms
    return v2.Compose([resize, affine, *crop_and_normalise])


def _collate(model: Beit) -> Callable[[Sequence[tuple[Tensor, int] | None]], tuple[Tensor, Tensor]]:
    return functools.partial(collate, shape=(model.config.in_chans, *model.config.img_size))
