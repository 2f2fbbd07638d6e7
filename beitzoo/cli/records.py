"""Options that several commands share: a record of them, and how a command takes it."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from beitzoo.inference.pipeline import Loading


@dataclass(frozen=True)
class Running:
    """How networks with weights are run over images.

    Attributes:
        checkpoint: Weights of the user's own.
        batch_size: Images per forward pass.
        workers: Threads that decode images.
        device: Where the networks run.
        optimized: Let the inference copy compute where that is faster.
    """

    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Weights of your own, a file; the model that is named then says of which network they are."),
    ] = None
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images per forward pass.")] = 16
    workers: Annotated[int, typer.Option(min=1, help="Threads that decode images.")] = 2
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu"
    optimized: Annotated[
        bool, typer.Option("--optimize/--no-optimize", help="On a CPU, let the optimized copy compute many images.")
    ] = True

    @property
    def loading(self) -> "Loading":
        """How the pipeline loads images."""
        from beitzoo.inference.pipeline import Loading

        return Loading(self.batch_size, self.workers)


def takes_records(command: Callable[..., None]) -> Callable[..., None]:
    """Turn each parameter of a command that is a record into options, one for each field of the record."""
    hints = get_type_hints(command, include_extras=True)
    records: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, record in records.items():
            given[name] = record(**{field.name: given.pop(field.name) for field in fields(record)})
        command(**given)

    del run.__wrapped__  # what reads the signature must not find the other
    parameters = []
    for parameter in inspect.signature(command).parameters.values():
        record = records.get(parameter.name)
        parameters += [parameter.replace(annotation=hints[parameter.name])] if record is None else _options(record)
    keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    run.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _options(record: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(record, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(field.name, kind, default=_default(field), annotation=hints[field.name])
        for field in fields(record)
    ]


def _default(field: Field[Any]) -> Any:
    return inspect.Parameter.empty if field.default is MISSING else field.default
