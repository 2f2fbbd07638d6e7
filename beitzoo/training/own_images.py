"""Fine-tuning on one's own images without a recipe: look at them, probe, choose a recipe, rehearse, train."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from beitzoo.factory import look_up
from beitzoo.files import full_path
from beitzoo.images.datasets import guess_source
from beitzoo.images.image_set import ImageSet
from beitzoo.images.splits import Split
from beitzoo.models.kernels import cpu_has
from beitzoo.training.choose import Rule, choose
from beitzoo.training.data import load_images, split_images
from beitzoo.training.first_probe import first_probe
from beitzoo.training.folder import BEST, RECIPE, RunError, check_folder, saved_states
from beitzoo.training.label_checks import check_labels
from beitzoo.training.processes import Processes
from beitzoo.training.recipe import Recipe, RecipeError, change_recipe, read_resolved, set_names
from beitzoo.training.rehearsal import Rehearsal, measure_update, rehearse
from beitzoo.training.sections import DataSection
from beitzoo.training.situation import find_situation
from beitzoo.training.tasks.finetune import describe_images, prepare
from beitzoo.training.tasks.finetune import finetune as train_by_recipe
from beitzoo.zoo.checkpoints import Segment

# Images of a class without which it cannot be in all three parts of a split.
_FEWEST = 3


@dataclass(frozen=True)
class Plan:
    """What fine-tuning of a model on some images would be.

    Attributes:
        recipe: The run.
        rules: Why it is so.
        images: All images.
        split: Which are for what.
    """

    recipe: Recipe
    rules: list[Rule]
    images: ImageSet
    split: Split

    def describe(self) -> list[str]:
        """Say in lines what was found, and what is chosen and why."""
        seed = self.recipe.data.split_seed
        return [
            *describe_images(self.images, self.split),
            *([] if self.images.parts else [f"These parts are drawn by chance, with data.split_seed {seed}."]),
            f"The recipe for {self.recipe.model.name}; --set changes a value:",
            *(f"  {rule.name} = {rule.value}: {rule.reason}" for rule in self.rules),
        ]


def finetune(
    model: str | Path,
    train: str | Path,
    val: str | Path | None = None,
    *,
    out: str | Path,
    settings: Sequence[str] = (),
    probe: bool = False,
) -> dict[str, Any]:
    """Fine-tune a model on one's own images by a recipe that fits both, and measure it once on held-out images.

    A run that was interrupted goes on if the arguments are the same.

    Args:
        model: As in `create_model`; its pretrained weights are used if it has some.
        train: The images: class folders (perhaps in folders `train`, `val` and `test`), a CSV with the columns `path`
            and `label`, or `labels` for any number of labels of each image, Parquet files, a folder of `save_to_disk`,
            tars; or `digits`.
        val: Held-out images of the same form, used once, at the end; the images by which the best model is chosen are
            drawn from `train`. Without it, both are parts of `train`, or drawn from it.
        out: Folder that receives the models `best` and `last`, the recipe with all its values, log and metrics.
        settings: `section.key=value`, each as `--set` of the command takes it, such as `train.epochs=5`.
        probe: First print what a probe on frozen features reaches.

    Returns:
        What `metrics.json` in the folder has.

    Raises:
        UserError: Something that can be corrected, such as one class only; nothing has been written then.
    """
    out = full_path(out)
    recipe = there = going_on(model, data_at(train, val), out, settings)
    if recipe is None:
        plan = make_plan(model, data_at(train, val), settings)
        recipe = plan.recipe
        if Processes.join().is_main:
            tell(plan, out, probe)
    return train_by_recipe(recipe, out, told=there is None)


def data_at(train: str | Path, held_out: str | Path | None = None) -> DataSection:
    """Say in a recipe's terms where images are, by the names of what lies there."""
    if str(train) == "digits":
        return DataSection(source="digits")
    test = None if held_out is None else Path(held_out)
    return DataSection(source=guess_source(full_path(train)), path=Path(train), test_path=test)


def going_on(model: str | Path, data: DataSection, out: Path, settings: Sequence[str]) -> Recipe | None:
    """Return the recipe of a run in a folder that is of this model and data; None if there is no run yet.

    Raises:
        RunError: It is another run.
    """
    if not (out / RECIPE).is_file() or not (saved_states(out) or (out / BEST).exists()):
        return None
    recipe = read_resolved(out / RECIPE)
    there = (recipe.model.name, recipe.data.source, recipe.data.path, recipe.data.test_path)
    asked = Recipe.model_validate({**recipe.model_dump(), "model": {"name": str(model)}, "data": data.model_dump()})
    if there != (asked.model.name, data.source, data.path, data.test_path):
        raise RunError(
            f"{out} holds a run of {there[0]} on {there[2] or there[1]}, not of {asked.model.name} on "
            f"{data.path or data.source}; choose another folder with --out."
        )
    check_folder(out, change_recipe(recipe, settings))
    return recipe


def resumed(out: Path) -> Recipe:
    """Return the recipe of the run in a folder.

    Raises:
        RunError: There is none to go on with.
    """
    out = full_path(out)
    if not (out / RECIPE).is_file():
        raise RunError(f"There is no run in {out} to go on with: it has no {RECIPE}. Leave out --resume to start one.")
    recipe = read_resolved(out / RECIPE)
    check_folder(out, recipe)
    return recipe


def make_plan(model: str | Path, data: DataSection, settings: Sequence[str] = ()) -> Plan:
    """Look at a model and images, and choose a recipe; all processes get that of the first.

    Raises:
        RecipeError: The images cannot be trained on; says why.
        UnknownModelError: There is no such model.
    """
    entry = look_up(model)
    if entry.pretrained is not None and isinstance(entry.pretrained.head, Segment):
        raise RecipeError(f"{model} is a segmentation model; give it a recipe, such as camvid.")
    images = load_images(data)
    _check_classes(images)
    processes = Processes.join()
    names = set_names(settings)
    adapters = any(name == "task.lora" or name.startswith("task.lora.") for name in names)
    recipe, rules = choose(str(model), data, replace(find_situation(entry, images, processes), adapters=adapters))
    recipe = change_recipe(recipe, settings)
    if not any("warmup" in name for name in names):
        recipe, rules = _warmed_up(recipe, rules)
    if "train.precision" not in names:
        precision, reason = _faster_precision(recipe, processes)
        recipe = change_recipe(recipe, [f"train.precision={precision}"])
        rules.append(Rule("train.precision", precision, reason))
    recipe = processes.gather(recipe)[0]
    split = split_images(images, recipe.data, test_fraction=1 / 3, val_fraction=0.1)
    return Plan(recipe, _as_set(rules, recipe, names), images, split)


def _warmed_up(recipe: Recipe, rules: list[Rule]) -> tuple[Recipe, list[Rule]]:
    """Let a tenth of a run be its warm-up, also if a person set its length."""
    train = recipe.train
    if train.epochs is not None:
        warmup = round(train.epochs / 10, 2)
        rules = [replace(rule, value=warmup) if rule.name == "train.warmup_epochs" else rule for rule in rules]
        return change_recipe(recipe, [f"train.warmup_epochs={warmup}"]), rules
    assert train.updates is not None
    updates = round(train.updates / 10)
    kept = [rule for rule in rules if rule.name not in ("train.epochs", "train.warmup_epochs")]
    rules = [*kept, Rule("train.warmup_updates", updates, "a tenth of the run")]
    return change_recipe(recipe, ["train.warmup_epochs=0", f"train.warmup_updates={updates}"]), rules


def tell(plan: Plan, out: Path, probe: bool) -> Rehearsal:
    """Print on stderr which recipe was chosen, what a probe reaches and what the run will cost."""
    for line in plan.describe():
        print(line, file=sys.stderr)
    if probe:
        print(first_probe(plan.recipe.model, plan.images, plan.split), file=sys.stderr)
    rehearsal = rehearse(plan.recipe, prepare, out)
    print(rehearsal.describe(), file=sys.stderr, flush=True)
    return rehearsal


def _check_classes(images: ImageSet) -> None:
    check_labels(images, "one" if images.label_sets is None else "many")
    sizes = _sizes(images)
    few = [f"{name} ({sizes[name]})" for name in images.names if sizes[name] < (1 if images.parts else _FEWEST)]
    if few:
        raise RecipeError(
            f"Classes with too few images: {', '.join(few[:5])}{', ...' * (len(few) > 5)}. A class needs at "
            f"least {_FEWEST}, to train, to choose and to measure; add images, or move these classes away."
        )


def _sizes(images: ImageSet) -> Counter[str]:
    """Count the images of each class; where there are parts, of those to train on."""
    return Counter({images.names[label]: size for label, size in images.class_sizes(images.parts.get("train")).items()})


def _faster_precision(recipe: Recipe, processes: Processes) -> tuple[Literal["fp32", "bf16"], str]:
    """Return bf16 where it is known to be faster: on GPUs that have it, and on CPUs that have it by measuring."""
    device = processes.device
    if device.type == "cuda":
        has = torch.cuda.is_bf16_supported(False)
        return ("bf16", "this GPU has it") if has else ("fp32", "this GPU has no bfloat16")
    if device.type != "cpu" or not (cpu_has("avx512_bf16") or cpu_has("amx_tile")):
        return "fp32", "this processor has no bfloat16"
    few = min(recipe.train.batch_size, 8)
    small = change_recipe(recipe, [f"train.batch_size={few}", "train.accumulation=1", "train.grad_checkpointing=false"])
    fp32, bf16 = (_seconds(change_recipe(small, [f"train.precision={one}"])) for one in ("fp32", "bf16"))
    ratio = fp32 / bf16
    how = f"bf16 was measured {ratio:.2f} times as fast here"
    return ("bf16", how) if ratio > 1.1 else ("fp32", how)


def _seconds(recipe: Recipe) -> float:
    return measure_update(recipe, prepare).computing


def _as_set(rules: list[Rule], recipe: Recipe, names: Sequence[str]) -> list[Rule]:
    """Return the rules with what a person set instead."""
    document = recipe.model_dump(mode="json")
    kept = [rule for rule in rules if rule.name not in names]
    return [*kept, *(Rule(name, _value(document, name), "as set") for name in dict.fromkeys(names))]


def _value(document: dict[str, Any], name: str) -> Any:
    for key in name.split("."):
        document = document[key]
    return document
