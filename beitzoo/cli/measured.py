"""What the commands that measure models share: where rows go, and what is said of what was measured."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from beitzoo.cli.records import Running

if TYPE_CHECKING:
    from beitzoo.evaluation.subjects import Evaluation
    from beitzoo.results import Row

# Unreadable images that are listed for one model.
_MOST_LISTED = 20


@dataclass(frozen=True)
class Output:
    """Where rows go, and how models are run.

    Attributes:
        results_file: Receives a row per model.
        as_json: Print rows as JSON, not for people.
        running: The weights and where they run.
        retry_failed: Measure again what failed before.
    """

    results_file: Path | None
    as_json: bool
    running: Running
    retry_failed: bool = False


def is_clean(row: "Row") -> bool:
    """Tell whether a row was measured, and on all its images."""
    return not row.get("error") and not int(row.get("failures") or 0)


def comment(evaluations: "Sequence[Evaluation]") -> None:
    """Say on stderr what was measured, and which images could not be; each once for all models."""
    for note in dict.fromkeys(note for evaluation in evaluations for note in evaluation.notes):
        print(note, file=sys.stderr)
    list_failures([failure for evaluation in evaluations for failure in evaluation.failures])


def list_failures(failures: Sequence[tuple[str, str]]) -> None:
    """Say on stderr which images were not counted, and why; each once."""
    failures = list(dict.fromkeys(failures))
    for image, reason in failures[:_MOST_LISTED]:
        print(f"Not counted: {image}: {reason}", file=sys.stderr)
    if len(failures) > _MOST_LISTED:
        print(f"Not counted: {len(failures) - _MOST_LISTED:,} more", file=sys.stderr)
