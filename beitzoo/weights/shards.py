"""The index of sharded safetensors: transformers spreads the tensors of a large model over several files."""

import json
from pathlib import Path, PurePath

from beitzoo.errors import InvalidValueError

INDEX_SUFFIX = ".safetensors.index.json"
_LONGEST = 16 * 2**20


def shards(index: Path) -> list[str]:
    """Name the files that an index says the tensors are in; they lie beside it.

    Raises:
        InvalidValueError: It is no such index, or names a file elsewhere.
    """
    try:
        if index.stat().st_size > _LONGEST:
            raise ValueError("it is too long")
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if not names or not all(name == PurePath(name).name for name in names):
            raise ValueError("its files are not beside it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidValueError(f"it is not an index of sharded safetensors: {error!r}.") from error
    return names
