"""One sentence from a long validation error."""

from pydantic import ValidationError


def describe(error: ValidationError) -> str:
    """Name the first thing that is wrong, and where."""
    first = error.errors(include_input=False, include_url=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the document'}: {first['msg']}"
