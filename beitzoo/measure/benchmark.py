"""The command benchmark: timm's flags, read into records. argparse reads them, as in timm: flags with many values."""

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import Field, fields
from types import UnionType
from typing import Annotated, Any, Literal, Never, Union, get_args, get_origin, get_type_hints

from beitzoo.errors import InvalidOptionError, UserError, check, closest
from beitzoo.measure.names import names_for, words_asked_for
from beitzoo.measure.options import DATA_MODEL, BenchmarkOptions, Flag, SweepOptions, usable_device
from beitzoo.results import Row, Table, environment
from beitzoo.zoo.registry import list_models

# What is slow to import is imported by the function that needs it: a help text must not wait for PyTorch.

_DESCRIPTION = "Time models with random weights; print their rows, and append them to a file if asked to."


def main(arguments: Sequence[str]) -> int:
    """Measure what the flags ask for, print the rows, and return the exit code: 1 if some of them failed.

    Raises:
        UserError: What was asked for is impossible; nothing was measured.
    """
    rows = run(read_flags(arguments))
    print_rows(rows)
    return int(any(row.get("error") for row in rows))


def read_flags(arguments: Sequence[str]) -> SweepOptions:
    """Read the flags of a command line."""
    parser = _Parser(prog="beitzoo benchmark", usage="%(prog)s [FLAGS]", description=_DESCRIPTION, allow_abbrev=False)
    for record in (SweepOptions, BenchmarkOptions):
        hints = get_type_hints(record, include_extras=True)
        for one in fields(record):
            if get_origin(hints[one.name]) is Annotated:
                _add_flag(parser, one, *get_args(hints[one.name]))
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = [name for action in parser._actions for name in action.option_strings]
        raise InvalidOptionError(f"There is no flag {unknown[0]!r}; {closest(unknown[0], flags)}")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(namespace).items()}
    of_run: dict[str, Any] = {one.name: given.pop(one.name) for one in fields(SweepOptions) if one.name in given}
    return SweepOptions(**of_run, rows=given)


def run(options: SweepOptions) -> list[Row]:
    """Measure the rows that were asked for and that are not in the file yet; return all of them.

    Raises:
        UserError: What was asked for is impossible; nothing was measured.
    """
    from beitzoo.measure.peers import check_names
    from beitzoo.measure.sweep import experiment_of, sweep

    peers: list[str | None] = [*options.compare.split(",")] if options.compare else [None]
    check_names([name for name in (*peers, options.rows.get("subject")) if name is not None])
    jobs = options.jobs(_models(options), peers)
    kind = experiment_of(jobs[0])
    table = Table(options.results_file, kind.columns, kind.key, options.results_format)
    table.check()
    with _progress_shown():
        return list(sweep(jobs, environment(usable_device(jobs[0].device)), table, options.retry_failed))


def print_rows(rows: Sequence[Row]) -> None:
    """Print rows as timm does: JSON after `--result`, fastest first and without what is empty."""
    fastest_first = sorted(rows, key=_rate, reverse=True)
    filled = [{name: value for name, value in row.items() if value not in (None, "")} for row in fastest_first]
    print(f"--result\n{json.dumps(filled[0] if len(filled) == 1 else filled, indent=2)}")
    failed = sum("error" in row for row in filled)
    if failed:
        print(f"{failed} of {len(rows)} rows failed; each says why in its column error.", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """Raise what is wrong with a command line, instead of ending the program."""

    def error(self, message: str) -> Never:
        raise InvalidOptionError(f"{message[0].upper()}{message[1:]}; `beitzoo benchmark --help` lists the flags.")


def _add_flag(parser: argparse.ArgumentParser, one: Field[Any], kind: Any, flag: Flag) -> None:
    """Add a flag for a field; where it is not given, the record's default stands."""
    default = "" if one.default in (None, False, True, ()) else f" Default: {one.default}."
    parser.add_argument(
        *(flag.names or (f"--{one.name.replace('_', '-')}",)),
        help=f"{flag.help}{default}".replace("%", "%%"),
        default=argparse.SUPPRESS,
        **(flag.reads or _read_as(kind)),
    )


def _read_as(hint: Any) -> dict[str, Any]:
    """Say how argparse reads a value of this type."""
    if get_origin(hint) in (UnionType, Union):
        (hint,) = (one for one in get_args(hint) if one is not type(None))
    if hint is bool:
        return {"action": "store_true"}
    if get_origin(hint) is Literal:
        return {"type": str}  # the record checks it, for Python as well
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        return {"type": kinds[0], "action": "append"} if kinds[-1] is ... else {"type": kinds[0], "nargs": len(kinds)}
    return {"type": hint}


def _models(options: SweepOptions) -> list[str]:
    """Return the models that were asked for, by name, glob or file, each once and in order."""
    if options.rows.get("bench") == "data":
        check(not options.model, f"--bench data uses the transform of {DATA_MODEL}; leave out --model.")
        return [DATA_MODEL]
    words = words_asked_for(options.model, options.model_list)
    check(
        bool(words),
        "There is no model to time; give --model NAME, a glob such as 'beit_*', or --model-list FILE.",
    )
    return list(dict.fromkeys(name for word in words for name in _matching(word)))


def _matching(word: str) -> list[str]:
    """Return the names that a word stands for; a glob with a dot is one of checkpoints."""
    return list_models() if word == "all" else names_for(word, pretrained="." in word)


def _rate(row: Row) -> float:
    # Rows of a CSV are text.
    for name in ("train_samples_per_sec", "infer_samples_per_sec", "samples_per_sec", "infer_gmacs"):
        if row.get(name):
            return float(row[name] or 0)
    return 0.0


@contextmanager
def _progress_shown() -> Iterator[None]:
    """Write our own messages to stderr; those of libraries stay where they are."""
    logger, handler = logging.getLogger("beitzoo"), logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
