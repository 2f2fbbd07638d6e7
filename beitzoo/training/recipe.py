"""A run as validated records: TOML in, resolved JSON out. A misspelt key is an error, never a default."""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from beitzoo.errors import UserError, describe_invalid

Fraction = Annotated[float, Field(ge=0, lt=1)]


class RecipeError(UserError, ValueError):
    """A recipe that does not describe a run."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(_Section):
    """What is trained.

    Attributes:
        name: As in `create_model`.
        pretrained: Start from the weights of that name rather than from random ones.
        overrides: Fields of `BeitConfig`; the number of classes comes from the data.
    """

    name: str
    pretrained: bool = False
    overrides: dict[str, int | float | bool | str | list[int]] = {}

    @field_validator("overrides")
    @classmethod
    def _leave_classes_to_the_data(cls, overrides: dict[str, Any]) -> dict[str, Any]:
        if "num_classes" in overrides:
            raise ValueError("the number of classes comes from the data; leave num_classes out")
        return overrides


class DataSection(_Section):
    """What it is trained and measured on.

    Attributes:
        source: `digits`, or `folder` for images in one subfolder per class.
        path: That folder.
        test_fraction: Share that is held out and used once, at the end; drawn evenly from all classes.
        val_fraction: Share of the rest by which the best checkpoint is chosen.
        split_seed: Draws both.
        workers: Processes that load images; 0 loads them in the training process.
    """

    source: Literal["digits", "folder"]
    path: Path | None = None
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 1 / 3
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    split_seed: int = 0
    workers: Annotated[int, Field(ge=0)] = 0


class AffineAugment(_Section):
    """Small random shifts, turns and stretches of the whole image, for data that cropping would destroy.

    Attributes:
        kind: Names this kind.
        rotate: Largest turn, degrees.
        translate: Largest shift, as a share of the side.
        scale: Largest change of size, as a share.
        shear: Largest shear, degrees.
    """

    kind: Literal["affine"]
    rotate: float = 0.0
    translate: Fraction = 0.0
    scale: Fraction = 0.0
    shear: float = 0.0


class CropAugment(_Section):
    """timm's training transform: random resized crops, flips, colour, RandAugment, erasing.

    Attributes:
        kind: Names this kind.
        scale: Range of the crop's area, as shares of the image.
        hflip: Probability of a horizontal flip.
        color_jitter: Strength of random brightness, contrast and saturation.
        auto_augment: timm's policy string, such as `rand-m9-mstd0.5-inc1`; empty for none.
        re_prob: Probability of random erasing.
    """

    kind: Literal["crop"] = "crop"
    scale: tuple[float, float] = (0.08, 1.0)
    hflip: Fraction = 0.5
    color_jitter: Annotated[float, Field(ge=0)] = 0.4
    auto_augment: str = ""
    re_prob: Fraction = 0.0


class TrainSection(_Section):
    """How it is trained.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images per update.
        lr: Peak learning rate of the head; see `layer_decay`.
        min_lr: Learning rate at the end of the cosine.
        warmup_epochs: Linear rise from 0 to `lr`.
        weight_decay: Of matrices; vectors, tokens and bias tables are not decayed.
        betas: Of AdamW.
        layer_decay: Factor on the learning rate per layer, from the head down.
        clip_grad: Largest norm of the gradient; 0 does not clip.
        label_smoothing: Share of the target that is spread over all classes.
        bias_lr_scale: Factor on the learning rate of the relative position bias tables. Without absolute
            positions a network that starts at zero tables sees a bag of patches until they have grown; 1 is
            right for weights that have.
        bias_init_std: Spread of those tables before the first update; 0 leaves them as they are.
        precision: Of the forward pass.
        seed: Of weights, order and augmentation.
    """

    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    lr: Annotated[float, Field(gt=0)]
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    clip_grad: Annotated[float, Field(ge=0)] = 0.0
    label_smoothing: Fraction = 0.0
    bias_lr_scale: Annotated[float, Field(gt=0)] = 1.0
    bias_init_std: Annotated[float, Field(ge=0)] = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0


class Recipe(_Section):
    """A fine-tuning run."""

    model: ModelSection
    data: DataSection
    augment: Annotated[AffineAugment | CropAugment, Field(discriminator="kind")] = CropAugment()
    train: TrainSection


def load_recipe(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe and change some of its values.

    Args:
        path: A TOML file with the sections of `Recipe`.
        settings: `section.key=value`, the value in TOML; a word that is not TOML is taken as a string.

    Raises:
        RecipeError: Names the file and the first thing in it that is wrong.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        for setting in settings:
            _set(document, setting)
        return Recipe.model_validate(document)
    except FileNotFoundError as error:
        raise RecipeError(f"There is no recipe {path}; those of the repository are in configs/.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not TOML: {error}.") from error
    except ValidationError as error:
        raise RecipeError(f"{path}: {describe_invalid(error)}.") from error


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe with every default spelt out, as JSON."""
    return json.dumps(recipe.model_dump(mode="json"), indent=2) + "\n"


def _set(document: dict[str, Any], setting: str) -> None:
    name, equals, value = setting.partition("=")
    *sections, key = name.strip().split(".")
    if not equals or not sections:
        raise RecipeError(f"{setting!r} sets nothing; write section.key=value, such as train.lr=1e-3.")
    for section in sections:
        document = document.setdefault(section, {})
        if not isinstance(document, dict):
            raise RecipeError(f"{setting!r}: {section} is a value, not a section.")
    try:
        document[key] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        document[key] = value.strip()
