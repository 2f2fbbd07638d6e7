"""Which labelled images probes are fitted on and measured on: options, and what they find."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from beitzoo.errors import check

if TYPE_CHECKING:
    from beitzoo.evaluation.probe_rows import LabelledData
    from beitzoo.images.image_set import ImageSet
    from beitzoo.images.splits import Split
    from beitzoo.inference.feature_files import FeatureTable
    from beitzoo.results import Row

# Where the data has no parts of its own: as of a recipe that says nothing else, so that fine-tuning and probes see the
# same images.
_TEST_FRACTION, _VAL_FRACTION = 1 / 3, 0.1


def _val_fraction(images: "ImageSet", train: Sequence[int] | None, has_test: bool) -> float:
    """Return the share of the images to fit on that choose a block: of few images, at least one of each class."""
    rest = len(images.images if train is None else train)
    rest -= 0 if has_test else round(rest * _TEST_FRACTION)
    return min(max(_VAL_FRACTION, len(images.names) / max(rest, 1)), 0.5)


@dataclass(frozen=True)
class Data:
    """Which labelled images probes are fitted on and measured on.

    Attributes:
        data: The data set.
        features: A file of features of labelled images, instead.
        test_data: Held-out images; else they are a part of the data set.
        split_seed: Draws the held-out images, where the data has no part for them.
        train_per_class: Images of each class to fit on.
        train_images: Images to fit on in all.
        label_seed: Draws those.
    """

    data: Annotated[
        str | None, typer.Option(help="'digits', class folders, or tables of images in the hub's form.")
    ] = None
    features: Annotated[
        Path | None,
        typer.Option(help="Instead of models and data: a file that embed or --keep-features wrote, with classes."),
    ] = None
    test_data: Annotated[
        Path | None,
        typer.Option(help="Images to measure on; else a part of the data, or a third drawn from it."),
    ] = None
    split_seed: Annotated[int, typer.Option(min=0, help="Draws the images to measure on, as in a recipe.")] = 0
    train_per_class: Annotated[int, typer.Option(min=0, help="Fit on only this many images of each class.")] = 0
    train_images: Annotated[int, typer.Option(min=0, help="Fit on only this many images in all.")] = 0
    label_seed: Annotated[int | None, typer.Option(min=0, help="Draws those; if not given, the split's seed does.")] = (
        None
    )

    def load(self) -> "LabelledData":
        """Find the images and split them, as a recipe would."""
        from beitzoo.evaluation.probe_rows import LabelledData
        from beitzoo.files import full_path
        from beitzoo.images.datasets import guess_source
        from beitzoo.training.data import load_images, split_images
        from beitzoo.training.sections import DataSection

        check(self.data is not None, "No images are given; name them with --data, or their features with --features.")
        path = None if self.data == "digits" else full_path(str(self.data))
        section = DataSection(
            source="digits" if path is None else guess_source(path),
            path=path,
            test_path=self.test_data,
            split_seed=self.split_seed,
            train_per_class=self.train_per_class,
            label_seed=self.label_seed,
        )
        images = load_images(section)
        images.one_label_each("a probe")
        parts = images.parts
        val_fraction = _val_fraction(images, parts.get("train"), has_test=len(parts) > ("train" in parts))
        split = split_images(images, section, test_fraction=_TEST_FRACTION, val_fraction=val_fraction)
        return LabelledData(images, self._few(split), {**self._asked(), "data_version": images.version})

    def load_features(self, path: Path) -> "tuple[LabelledData, FeatureTable]":
        """Read a file of features and split its images by the parts in it, or else as a recipe would."""
        from beitzoo.evaluation.probe_rows import LabelledData
        from beitzoo.images.image_set import ImageSet
        from beitzoo.images.splits import Split, choose_per_class, draw_split
        from beitzoo.inference.feature_files import read_features

        check(self.data is None and self.test_data is None, "--features has its images already; leave out --data.")
        table = read_features(path)
        names = table.description.names
        check(bool(names), f"The images of {path} have no classes; embed class folders, PLACE/CLASS/IMAGE.")
        twice = [image for image, times in Counter(table.paths).items() if times > 1]
        check(
            not twice,
            f"{path} has {len(twice):,} images more than once, such as {twice[:1]}: probes would be measured on what "
            "they were fitted on. Embed each once.",
        )
        images = ImageSet([Path(name) for name in table.paths], table.labels.tolist(), names)
        own = {part: [i for i, of in enumerate(table.parts) if of == part] for part in ("train", "validation", "test")}
        test, val = own["test"] or own["validation"], own["validation"] if own["test"] else []
        train = own["train"] if any(own.values()) else None
        val_fraction = 0 if val else _val_fraction(images, train, has_test=bool(test))
        drawn = draw_split(images, val_fraction, 0 if test else _TEST_FRACTION, self.split_seed, train)
        seed = self.split_seed if self.label_seed is None else self.label_seed
        few = self.train_per_class
        chosen = choose_per_class(images, drawn.train, few, seed) if few else drawn.train
        split = Split(chosen, val or drawn.val, test or drawn.test)
        return LabelledData(images, self._few(split), self._asked()), table

    def _asked(self) -> "Row":
        return {
            "data": str(self.features) if self.data is None else self.data,
            "test_data": None if self.test_data is None else str(self.test_data),
            "split_seed": self.split_seed,
            "train_per_class": self.train_per_class,
            "train_images": self.train_images,
            "label_seed": self.label_seed,
        }

    def _few(self, split: "Split") -> "Split":
        return replace(split, train=self._draw(split.train)) if self.train_images else split

    def _draw(self, indices: Sequence[int]) -> list[int]:
        seed = self.split_seed if self.label_seed is None else self.label_seed
        check(
            self.train_images <= len(indices),
            f"--train-images {self.train_images}, but there are {len(indices)} images to fit on; leave it out for all.",
        )
        return random.Random(seed).sample(list(indices), self.train_images)
