"""Recipes: a run as validated records, TOML in and out. A misspelt key is an error, never a default."""

import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from beitzoo.errors import UserError, closest, describe_invalid
from beitzoo.files import full_path, read_text
from beitzoo.training.pretrain_sections import Pretrain, TrainTokenizer
from beitzoo.training.sections import DataSection, Finetune, ModelSection, RunSection, Section, TrainSection
from beitzoo.training.segment_sections import TrainSegmenter

# The command that runs each kind of task.
_COMMANDS = {
    "finetune": "`beitzoo finetune`",
    "segment": "`beitzoo finetune`",
    "pretrain": "`beitzoo pretrain`",
    "tokenizer": "`beitzoo train-tokenizer`",
}

_EPOCHS, _UPDATES = "epochs", "updates"  # of `train`: a recipe gives one of them


class RecipeError(UserError, ValueError):
    """A recipe that does not describe a run."""


class Recipe(Section):
    """A run: the sections that all tasks have, and that of the task."""

    model: ModelSection
    data: DataSection
    train: TrainSection
    run: RunSection = RunSection()
    task: Annotated[Finetune | Pretrain | TrainSegmenter | TrainTokenizer, Field(discriminator="kind")] = Finetune()

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


def load_recipe(name: str | Path, settings: Sequence[str] = (), kind: str = "finetune") -> Recipe:
    """Read a recipe and change some of its values.

    Args:
        name: A TOML file with the sections of `Recipe`, or the name of one that comes with beitzoo, such as `digits`.
        settings: `section.key=value`, the value in TOML; a word that is not TOML is taken as a string.
        kind: The task, which is also the folder of the recipes that come with beitzoo; or another one that the same
            command runs.

    Raises:
        RecipeError: Names the file and the first thing in it that is wrong, or the recipe is for another task.
    """
    path = find_recipe(name, kind)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        _set_all(document, settings)
        task = document.setdefault("task", {})
        if isinstance(task, dict) and task.setdefault("kind", kind) not in _kinds_beside(kind):
            raise RecipeError(
                f"{path} is a recipe for {_COMMANDS.get(str(task['kind']), repr(task['kind']))}, not {_COMMANDS[kind]}."
            )
        return Recipe.model_validate(document)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror or error}. Check its permissions.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not TOML: {error}.") from error
    except ValidationError as error:
        raise RecipeError(f"{path}: {_ended(describe_invalid(error, document))}") from error


def find_recipe(name: str | Path, kind: str) -> Path:
    """Find a recipe by its path, or else by its name among those for a task that come with beitzoo.

    Raises:
        RecipeError: There is neither; the closest are named.
    """
    path = full_path(name)
    if path.is_file():
        return path
    folders = [_packaged_folder() / one for one in _kinds_beside(kind)]
    packaged = {recipe.stem: recipe for folder in folders for recipe in sorted(folder.glob("*.toml"))}
    if str(name) not in packaged:
        raise RecipeError(
            f"There is no recipe {name}: no such file, and of the packaged ones {closest(str(name), packaged)}"
        )
    return packaged[str(name)]


def change_recipe(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """Return a recipe with some values changed, as `load_recipe` changes them.

    Raises:
        RecipeError: Names the first setting that is wrong.
    """
    document = _document(recipe)
    try:
        _set_all(document, settings)
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise RecipeError(_ended(describe_invalid(error, document))) from error


def read_resolved(path: Path) -> Recipe:
    """Read what `dump_recipe` wrote.

    Raises:
        RecipeError: The file is damaged, or of another version.
    """
    document = None
    try:
        document = tomllib.loads(read_text(path))
        return Recipe.model_validate(document)
    except ValueError as error:  # of TOML or of pydantic
        reason = describe_invalid(error, document) if isinstance(error, ValidationError) else f"not TOML ({error})"
        raise RecipeError(f"{path} is not the recipe of a run: {reason}. Choose another folder.") from error


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe with every default spelt out, as TOML that `load_recipe` reads.

    TOML has no null: what is None, as it is by default, is left out.
    """
    return "\n".join(_tables(_document(recipe), ())).lstrip() + "\n"


def _document(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude_none=True)


def _tables(table: dict[str, Any], name: tuple[str, ...]) -> Iterator[str]:
    """Yield the lines of a TOML table, its values before the tables in it."""
    if name:
        yield f"\n[{'.'.join(map(_key, name))}]"
    yield from (f"{_key(key)} = {_value(value)}" for key, value in table.items() if not isinstance(value, dict))
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _tables(value, (*name, key))


def _ended(sentence: str) -> str:
    return sentence if sentence.endswith((".", "?")) else f"{sentence}."


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    # Strings of JSON are strings of TOML, but for one character that TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") if isinstance(value, str) else repr(value)


def _kinds_beside(kind: str) -> list[str]:
    """Return the tasks that the command for one of them runs."""
    return [other for other, command in _COMMANDS.items() if command == _COMMANDS[kind]]


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


def set_names(settings: Iterable[str]) -> list[str]:
    """Return the dotted names of the values that settings change."""
    return [setting.partition("=")[0].strip() for setting in settings]


def _set_all(document: dict[str, Any], settings: Sequence[str]) -> None:
    """Change a document; of two values that exclude each other, the one that is set replaces the other."""
    names = set_names(settings)
    train = document.get("train")
    for name, other in ((_EPOCHS, _UPDATES), (_UPDATES, _EPOCHS)):
        if f"train.{name}" in names and f"train.{other}" not in names and isinstance(train, dict):
            train.pop(other, None)
    for setting in settings:
        _set(document, setting)


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
