"""Recipes: a run as validated records, TOML in, resolved JSON out. A misspelt key is an error, never a default."""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from beitzoo.errors import UserError, closest, describe_invalid
from beitzoo.files import full_path

Fraction = Annotated[float, Field(ge=0, lt=1)]
PartOfOne = Annotated[float, Field(gt=0, le=1)]
# `~` is the home folder, and a run that goes on elsewhere means the same files.
FullPath = Annotated[Path, AfterValidator(lambda path: full_path(path).absolute())]
# Arguments of `create_model` that the recipe says elsewhere, or that make something else than a classifier.
_NOT_OVERRIDES = {"model_name", "pretrained", "features_only", "checkpoint_path", "cache_dir", "device", "dtype"}


class RecipeError(UserError, ValueError):
    """A recipe that does not describe a run."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(_Section):
    """What is trained.

    Attributes:
        name: As in `create_model`.
        pretrained: Start from the weights of that name rather than from random ones.
        checkpoint: Start from this file of the same network instead.
        overrides: Fields of `BeitConfig`; the number of classes comes from the data.
    """

    name: str
    pretrained: bool = False
    checkpoint: FullPath | None = None
    overrides: dict[str, int | float | bool | str | list[int]] = {}

    @field_validator("overrides")
    @classmethod
    def _check_overrides(cls, overrides: dict[str, Any]) -> dict[str, Any]:
        if "num_classes" in overrides:
            raise ValueError("the number of classes comes from the data; leave num_classes out")
        for name in _NOT_OVERRIDES & overrides.keys():
            raise ValueError(f"{name} is no field of the network; leave it out")
        return overrides


class DataSection(_Section):
    """What it is trained and measured on.

    Attributes:
        source: `digits`, or `folder` for images in one subfolder per class.
        path: That folder.
        test_fraction: Share that is held out and used once, at the end; drawn evenly from all classes.
        val_fraction: Share of the rest by which the best checkpoint is chosen.
        split_seed: Draws both.
    """

    source: Literal["digits", "folder"]
    path: FullPath | None = None
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 1 / 3
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    split_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


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
    scale: tuple[PartOfOne, PartOfOne] = (0.08, 1.0)
    hflip: Fraction = 0.5
    color_jitter: Annotated[float, Field(ge=0)] = 0.4
    auto_augment: str = ""
    re_prob: Fraction = 0.0


class TrainSection(_Section):
    """How any task is trained.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images per update, of all processes together.
        accumulation: Passes into which each process splits its share of an update; memory is for one of them.
        lr: Peak learning rate of the head; see `layer_decay`.
        min_lr: Learning rate at the end of the cosine.
        warmup_epochs: Linear rise from 0 to `lr`.
        weight_decay: Of matrices; vectors, tokens and bias tables are not decayed.
        betas: Of AdamW.
        layer_decay: Factor on the learning rate per layer, from the head down.
        clip_grad: Largest norm of the gradient; 0 does not clip.
        bias_lr_scale: Factor on the learning rate of the relative position bias tables. Without absolute
            positions a network that starts at zero tables sees a bag of patches until they have grown; 1 is
            right for weights that have.
        ema_decay: Of the moving average of the weights, which is then what is validated and saved; 0 for none.
        precision: Of the forward pass.
        seed: Of weights, order, augmentation and stochastic depth.
    """

    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    accumulation: Annotated[int, Field(ge=1)] = 1
    lr: Annotated[float, Field(gt=0)]
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    clip_grad: Annotated[float, Field(ge=0)] = 0.0
    bias_lr_scale: Annotated[float, Field(gt=0)] = 1.0
    ema_decay: Fraction = 0.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: int = 0


class RunSection(_Section):
    """How the work is done. It changes nothing in the result, and may be another when a run goes on.

    Attributes:
        workers: Processes that load images, for each that trains; 0 loads them in the training process.
        log_updates: Updates between two lines of the log.
        save_epochs: Epochs between two saved states, from which an interrupted run goes on.
        save_updates: Updates between two saved states, besides those at the end of epochs; 0 for none.
    """

    workers: Annotated[int, Field(ge=0)] = 0
    log_updates: Annotated[int, Field(ge=1)] = 10
    save_epochs: Annotated[int, Field(ge=1)] = 1
    save_updates: Annotated[int, Field(ge=0)] = 0


class Finetune(_Section):
    """The task of training a classifier.

    Attributes:
        kind: Names this task.
        augment: What is done to training images.
        label_smoothing: Share of the target that is spread over all classes.
        bias_init_std: Spread of the relative position bias tables before the first update; 0 leaves them as they are.
    """

    kind: Literal["finetune"] = "finetune"
    augment: Annotated[AffineAugment | CropAugment, Field(discriminator="kind")] = CropAugment()
    label_smoothing: Fraction = 0.0
    bias_init_std: Annotated[float, Field(ge=0)] = 0.0


class Recipe(_Section):
    """A run: the sections that all tasks have, and that of the task."""

    model: ModelSection
    data: DataSection
    train: TrainSection
    run: RunSection = RunSection()
    task: Finetune = Finetune()

    def starting_from(self, checkpoint: Path) -> "Recipe":
        """Return the same run from the weights of a file."""
        model = {**self.model.model_dump(), "checkpoint": checkpoint}
        return self.model_copy(update={"model": ModelSection.model_validate(model)})

    def first_difference(self, other: "Recipe") -> str | None:
        """Name the first value that differs, as `section.key`, except for those that change nothing in the result."""
        ours, theirs = (_values(recipe.model_dump(mode="json", exclude={"run"})) for recipe in (self, other))
        for name in [*ours, *theirs]:
            if ours.get(name) != theirs.get(name):
                return f"{name} is {theirs.get(name)!r} there and {ours.get(name)!r} here"
        return None


def load_recipe(name: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe and change some of its values.

    Args:
        name: A TOML file with the sections of `Recipe`, or the name of one that comes with beitzoo, such as `digits`.
        settings: `section.key=value`, the value in TOML; a word that is not TOML is taken as a string.

    Raises:
        RecipeError: Names the file and the first thing in it that is wrong.
    """
    path = find_recipe(name)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        for setting in settings:
            _set(document, setting)
        return Recipe.model_validate(document)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror or error}. Check its permissions.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not TOML: {error}.") from error
    except ValidationError as error:
        raise RecipeError(f"{path}: {describe_invalid(error)}.") from error


def find_recipe(name: str | Path) -> Path:
    """Find a recipe by its path, or else by its name among those that come with beitzoo.

    Raises:
        RecipeError: There is neither; the closest are named.
    """
    path = full_path(name)
    if path.is_file():
        return path
    packaged = {recipe.stem: recipe for recipe in sorted(_packaged_folder().rglob("*.toml"))}
    if str(name) not in packaged:
        raise RecipeError(
            f"There is no recipe {name}: no such file, and of the packaged ones {closest(str(name), packaged)}"
        )
    return packaged[str(name)]


def read_resolved(path: Path) -> Recipe:
    """Read what `dump_recipe` wrote.

    Raises:
        RecipeError: The file is damaged, or of another version.
    """
    try:
        return Recipe.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise RecipeError(
            f"{path} is not the recipe of a run: {describe_invalid(error)}. Choose another folder."
        ) from error


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe with every default spelt out, as JSON."""
    return json.dumps(recipe.model_dump(mode="json"), indent=2) + "\n"


def _packaged_folder() -> Path:
    """Return the folder of recipes: in the package where it is installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def _values(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return all values of nested sections under their dotted names."""
    values: dict[str, Any] = {}
    for key, value in section.items():
        values |= _values(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return values


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
