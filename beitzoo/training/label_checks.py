"""Whether labelled images fit what a recipe wants to learn of them: one class of each, or any number of labels."""

from typing import Literal

from beitzoo.errors import some_of
from beitzoo.images.image_set import ImageSet
from beitzoo.images.splits import Split
from beitzoo.training.recipe import RecipeError


def check_labels(images: ImageSet, labels: Literal["one", "many"]) -> None:
    """Refuse images that have no classes, or too few, or not as many each as `task.labels` says.

    Raises:
        RecipeError: Says what they have, and what to do.
    """
    if not images.has_classes:
        raise RecipeError("The images have no classes; a classifier needs images of at least two.")
    if labels == "many":
        _check_many(images)
        return
    if images.label_sets is not None:
        raise RecipeError(
            "The images may have several labels each, and task.labels is 'one'. Set task.labels to 'many', or give "
            "images with one class each: class folders, or a CSV with a column `label`."
        )
    if len(images.names) < 2:
        raise RecipeError(f"There is one class only, {images.names[0]}; a classifier needs at least two class folders.")


def _check_many(images: ImageSet) -> None:
    sets = images.label_sets
    if sets is None:
        raise RecipeError(
            "The images have one class each, and task.labels is 'many'. Leave it out, or give images with several "
            "labels: a CSV with a column `labels`, such as cat;dog, or with a column of 0 and 1 for each class."
        )
    if not images.names:
        raise RecipeError("No image has a label; write some in the column `labels` of the CSV.")
    if len(images.names) > 1 and all(len(own) == 1 for own in sets):
        raise RecipeError(
            "Each image has exactly one label, and task.labels is 'many'. If labels are separated by something else "
            "than ; or |, write one of these; if an image has one class, set task.labels to 'one' and name the column "
            "of the CSV `label`."
        )


def check_parts(images: ImageSet, split: Split) -> None:
    """Refuse a split of images with several labels by which some class cannot be learned, or nothing measured.

    Raises:
        RecipeError: Says of which class there is no image, and what to do.
    """
    trained, advice = images.class_sizes(split.train), "or say which images are for what in a column `part`"
    unseen = [name for label, name in enumerate(images.names) if not trained[label]]
    if unseen:
        raise RecipeError(
            f"Labels that no image to train on has: {some_of(unseen)}. Add images that have them, leave these labels "
            f"out, draw another split with data.split_seed, {advice}."
        )
    for part, purpose in ((split.val, "to choose by"), (split.test, "held out")):
        if not images.class_sizes(part):
            raise RecipeError(
                f"None of {len(part):,} images {purpose} has a label, so nothing can be measured by them. Raise "
                f"data.val_fraction and data.test_fraction, draw another split with data.split_seed, {advice}."
            )


def describe_rare_labels(images: ImageSet, split: Split) -> list[str]:
    """Say which labels the mean average precision leaves out, as no image to choose by or held out has them."""
    if images.label_sets is None:
        return []
    drawn = [] if images.parts else ["They are drawn evenly from all images, without a look at their labels."]
    for part, purpose in ((split.val, "to choose by"), (split.test, "held out")):
        counts = images.class_sizes(part)
        absent = [name for label, name in enumerate(images.names) if not counts[label]]
        if absent:
            drawn.append(
                f"No image {purpose} has {some_of(absent)}: the mean average precision there is of the others."
            )
    return drawn
