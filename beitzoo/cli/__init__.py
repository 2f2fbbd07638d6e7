"""The command line: `beitzoo COMMAND`. One file per group of commands; PyTorch is imported by those that compute."""

import codecs
import io
import logging
import os
import sys
import warnings
from typing import Annotated, Any, Never

import typer
from typer.core import TyperGroup

from beitzoo import __version__
from beitzoo.cli import evaluate, finetune, measure, models, predict
from beitzoo.errors import UserError

# What a shell reports for a program that was ended by SIGPIPE, as `head` does once it has read enough.
_CLOSED_PIPE = 128 + 13


class _Commands(TyperGroup):
    """The group of all commands, and the one place where their errors become messages."""

    def invoke(self, ctx: Any) -> Any:
        try:
            try:
                return super().invoke(ctx)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            _stop_writing()
            raise typer.Exit(_CLOSED_PIPE) from None
        except UserError as error:
            if ctx.params["debug"]:
                raise
            _fail(str(error))
        except MemoryError:
            if ctx.params["debug"]:
                raise
            _fail("There is not enough memory. Choose a smaller model, image size or batch, or close other programs.")


app = typer.Typer(cls=_Commands, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
app.command("list")(models.list_)
app.command()(models.info)
app.command()(models.download)
app.command()(models.verify)
app.command("predict")(predict.predict_)
app.command()(evaluate.evaluate)
app.command()(finetune.finetune)
app.command(context_settings=measure.PASS_ON)(measure.benchmark)
app.command()(measure.report)


def main() -> None:
    """Run a command; what the user got wrong is one message and exit code 2, not a traceback."""
    _quiet_libraries()
    _accept_any_file_name()
    app(prog_name="beitzoo")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"beitzoo {__version__}")
        raise typer.Exit


@app.callback()
def _all_commands(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from; before the command.")] = False,
) -> None:
    """BEiT: every checkpoint by name."""


def _fail(message: str) -> Never:
    print(f"Error: {message}", file=sys.stderr)
    raise typer.Exit(2) from None


def _stop_writing() -> None:
    """Send what is still buffered nowhere, so that Python does not complain about a closed pipe on its way out."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _quiet_libraries() -> None:
    """Leave stderr to our own words: no warnings or logs of libraries, unless the environment asks for them."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger().addHandler(logging.NullHandler())
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _accept_any_file_name() -> None:
    """Let stdout and stderr write file names that their encoding, or any encoding, cannot express."""
    codecs.register_error("any-file-name", _encode_any)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="any-file-name")


def _encode_any(error: UnicodeError) -> tuple[str | bytes, int]:
    """Write a byte that was no text as it came, and a character that the encoding lacks as an escape."""
    assert isinstance(error, UnicodeEncodeError)
    error.end = error.start + 1
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return codecs.lookup_error("backslashreplace")(error)
