"""Models by name, by glob and by lists in files: what sweeps are asked for."""

from collections.abc import Sequence
from pathlib import Path

from beitzoo.files import read_text
from beitzoo.zoo.registry import UnknownModelError, list_models


def words_asked_for(given: Sequence[str], list_file: Path | None) -> list[str]:
    """Return names and globs as they were given, and those of a file: one a line, `#` begins a comment."""
    lines = read_text(list_file).splitlines() if list_file else []
    return [word for word in (*given, *(line.partition("#")[0].strip() for line in lines)) if word]


def names_for(word: str, pretrained: bool) -> list[str]:
    """Return the names that a word stands for: of a glob those that match it, else the word itself.

    Args:
        word: A name, a path or a glob.
        pretrained: A glob is one of checkpoints, not of architectures.

    Raises:
        UnknownModelError: No name matches the glob.
    """
    if not set("*?[") & set(word) or Path(word).exists():
        return [word]  # looked up where it is used
    names = list_models(word, pretrained=pretrained)
    if not names:
        raise UnknownModelError(f"No model's name is like {word!r}; `beitzoo list` shows all.")
    return names
