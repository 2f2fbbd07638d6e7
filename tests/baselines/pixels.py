"""Classifiers of scikit-learn on the pixels of a recipe's images, with its split: what a network is compared with.

`python tests/baselines/pixels.py RECIPE --results-file FILE --set ...` fits each to the training images and measures it
on the held-out ones. The validation images are left out, as a network is not fitted to them either. The row of each is
one of `beitzoo collect`, whose `start` says that it started from pixels.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from beitzoo.images.files import as_image
from beitzoo.images.image_set import ImageSet
from beitzoo.results import Row, Table, environment
from beitzoo.training.collect import COLUMNS, KEY
from beitzoo.training.data import load_images, split_images
from beitzoo.training.recipe import load_recipe

SIDE = 32  # pixels, of the images that are compared
VARIANCE = 0.95  # share of it that is in the principal components before a linear classifier


def classifiers(seed: int) -> dict[str, ClassifierMixin]:
    """Return what is fitted, by the names that rows give them; settings were not searched for."""
    linear = make_pipeline(PCA(VARIANCE), StandardScaler(), LogisticRegression(max_iter=2000))
    return {
        f"PCA({VARIANCE}), LogisticRegression": linear,
        "SVC(C=10)": SVC(C=10),
        "RandomForestClassifier(500)": RandomForestClassifier(500, random_state=seed),
        "KNeighborsClassifier(1)": KNeighborsClassifier(1),
    }


def pixels_of(images: ImageSet, indices: Sequence[int], channels: int) -> NDArray[np.float32]:
    """Return images as rows of pixels in [0, 1]; a smaller image stays as it is, a larger one is made small."""
    rows = []
    for index in indices:
        image = as_image(images.images[index], channels)
        if max(image.size) > SIDE:
            image = image.resize((SIDE, SIDE), reducing_gap=3.0)
        rows.append(np.asarray(image, np.float32).ravel() / 255)
    return np.stack(rows)


def measure(recipe_name: str, settings: Sequence[str]) -> Iterator[Row]:
    """Fit one classifier after the other to the images of a recipe; yield their rows."""
    recipe = load_recipe(recipe_name, settings, kind="finetune")
    images = load_images(recipe.data)
    assert images.labels is not None
    split = split_images(images, recipe.data, test_fraction=1 / 3, val_fraction=0.1)
    labels = np.asarray(images.labels)
    channels = 1 if recipe.data.source == "digits" else 3
    train, test = (pixels_of(images, part, channels) for part in (split.train, split.test))
    data = recipe.data.source if recipe.data.path is None else recipe.data.path.name
    few = f"-{recipe.data.train_per_class}" * bool(recipe.data.train_per_class)
    for name, classifier in classifiers(recipe.train.seed).items():
        started = time.process_time()
        answers = classifier.fit(train, labels[split.train]).predict(test)
        seconds = time.process_time() - started
        yield {
            "run": f"pixels/{data}{few}-{recipe.train.seed} {name}",
            "task": "baseline",
            "model": name,
            "start": "pixels",
            "data": data,
            "train_per_class": recipe.data.train_per_class,
            "train_images": len(split.train),
            "seed": recipe.train.seed,
            "split_seed": recipe.data.split_seed,
            "label_seed": recipe.data.label_seed,
            "top1": round(100 * float((answers == labels[split.test]).mean()), 5),
            "count": len(split.test),
            "train_seconds": round(seconds, 3),
            **environment(torch.device("cpu")),
        }


def main(arguments: list[str] | None = None) -> list[Row]:
    """Measure by a recipe; print the rows, and keep them if a file is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="section.key=value")
    parser.add_argument("--results-file", type=Path)
    options = parser.parse_args(arguments)
    kept = Table(options.results_file, COLUMNS, KEY)
    kept.check()
    rows = []
    for row in measure(options.recipe, options.settings):
        rows.append(kept.replace(row))
        print(f"{row['run']}: {row['top1']:.2f} of {row['count']}, {row['train_seconds']:.0f} s", flush=True)
    return rows


if __name__ == "__main__":
    main()
