"""Questions about the two tables: split a name, look it up, list, filter, suggest the closest."""

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

from beitzoo.errors import UserError, closest
from beitzoo.zoo.architectures import ARCHITECTURES
from beitzoo.zoo.checkpoints import Classify, Head, HubFile, PretrainedConfig
from beitzoo.zoo.networks import BeitConfig, override
from beitzoo.zoo.pretrained import PRETRAINED

DEFAULT_MODEL = "beit_nano_patch4_32.digits"

Patterns = str | Iterable[str]


class UnknownModelError(UserError, ValueError):
    """A name that is in neither table."""


@dataclass(frozen=True)
class Entry:
    """What the tables say about one name.

    Attributes:
        name: `architecture.tag`, or the architecture alone where it has no checkpoint.
        config: The network of the checkpoint.
        pretrained: Its row, or None where there is none.
    """

    name: str
    config: BeitConfig
    pretrained: PretrainedConfig | None


def split_name(name: str) -> tuple[str, str]:
    """Split `architecture.tag` at the first dot; the tag is empty if there is none."""
    architecture, _, tag = name.partition(".")
    return architecture, tag


def find(name: str, head: type[Head] | None = None) -> Entry:
    """Look up a model by its name, or by a repository on the hub that holds its weights.

    An architecture alone stands for its default checkpoint.

    Args:
        name: The name.
        head: Of the checkpoint that an architecture alone stands for: its first one with such a head, or none.

    Raises:
        UnknownModelError: No such architecture or no such tag; the closest names or all its tags are named.
    """
    architecture, tag = split_name(_repositories().get(name, name))
    if architecture not in ARCHITECTURES:
        raise UnknownModelError(
            f"There is no model {name!r}; {closest(architecture, ARCHITECTURES)} "
            "`beitzoo.list_models()` or `beitzoo list` shows all."
        )
    config = ARCHITECTURES[architecture]
    tags = _tags(architecture)
    if not tag and head is not None:
        tags = [tag for tag in tags if isinstance(PRETRAINED[f"{architecture}.{tag}"].head, head)]
    if not tag and not tags:
        return Entry(architecture, config, None)
    if tag and tag not in tags:
        has = f"it has {', '.join(tags)}" if tags else "it has none, its weights are only ever random"
        raise UnknownModelError(f"{architecture!r} has no checkpoint {tag!r}; {has}.")
    tag = tag or tags[0]
    row = replace(PRETRAINED[f"{architecture}.{tag}"], architecture=architecture, tag=tag)
    classes = row.head.num_classes if isinstance(row.head, Classify) else 0
    return Entry(f"{architecture}.{tag}", override(config, num_classes=classes, **row.overrides), row)


def architecture_of(config: BeitConfig) -> str | None:
    """Name the architecture that has the same shapes as this network, apart from its head, channels and pretraining."""
    same = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "hidden_dim")
    return next(
        (
            name
            for name, known in ARCHITECTURES.items()
            if all(getattr(config, field) == getattr(known, field) for field in same)
        ),
        None,
    )


def list_models(filter: Patterns = "", *, pretrained: bool = False, exclude_filters: Patterns = ()) -> list[str]:
    """List architectures, or with `pretrained` all checkpoints, in natural order.

    Args:
        filter: Glob, or several, of which one must match. A checkpoint also matches by its architecture.
        pretrained: List `architecture.tag` for everything with weights.
        exclude_filters: Globs of names to leave out.
    """
    names = PRETRAINED if pretrained else ARCHITECTURES
    unwanted = _patterns(exclude_filters)
    kept = [n for n in names if matches(n, filter) and not _matches_any(n, unwanted)]
    return sorted(kept, key=_natural)


def list_pretrained(filter: Patterns = "", *, exclude_filters: Patterns = ()) -> list[str]:
    """List the checkpoints, `architecture.tag`."""
    return list_models(filter, pretrained=True, exclude_filters=exclude_filters)


def is_model(name: str) -> bool:
    """Tell whether the name can be created: its architecture is known, and so is its tag if it has one."""
    try:
        find(name)
    except UnknownModelError:
        return False
    return True


def get_pretrained_cfg(name: str) -> PretrainedConfig | None:
    """Return the row of a checkpoint, or of an architecture's default one; None where there is none.

    Raises:
        UnknownModelError: The name is in neither table.
    """
    return find(name).pretrained


def matches(name: str, filter: Patterns) -> bool:
    """Tell whether a name, or its architecture, matches a glob, or one of several; without any it does."""
    wanted = _patterns(filter)
    return not wanted or _matches_any(name, wanted)


@cache
def _repositories() -> dict[str, str]:
    """Map each repository on the hub to the checkpoint that it holds."""
    sources = ((source, name) for name, row in PRETRAINED.items() for source in row.sources)
    return {source.repo_id: name for source, name in sources if isinstance(source, HubFile)}


def _tags(architecture: str) -> list[str]:
    return [tag for owner, tag in map(split_name, PRETRAINED) if owner == architecture]


def _patterns(patterns: Patterns) -> list[str]:
    return [p for p in ([patterns] if isinstance(patterns, str) else patterns) if p]


def _matches_any(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(n, p) for n in (name, split_name(name)[0]) for p in patterns)


def _natural(name: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
