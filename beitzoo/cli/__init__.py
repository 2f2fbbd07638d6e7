"""The command line: `beitzoo COMMAND`. One file per group of commands; PyTorch is imported by those that compute."""

import codecs
import errno
import io
import logging
import os
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from beitzoo import __version__
from beitzoo.cli import (
    collect,
    embed,
    evaluate,
    finetune,
    measure,
    models,
    predict,
    pretrain,
    probe,
    reconstruct,
    replay,
    segment,
    tokenize,
    train_tokenizer,
)
from beitzoo.errors import UserError, is_out_of_memory

# What a shell reports for a program that was ended by SIGPIPE, as `head` does once it has read enough.
_CLOSED_PIPE = 128 + 13


class _Commands(TyperGroup):
    """The group of all commands: turns a `UserError` of any of them into a message and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            try:
                return super().invoke(ctx)
            finally:
                sys.stdout.flush()  # what cannot be written is found here, not while Python exits
        except BrokenPipeError:
            _discard_stdout()
            raise typer.Exit(_CLOSED_PIPE) from None
        except Exception as error:
            message = _message(error)
            if message is None or ctx.params["debug"]:
                raise
        print(f"Error: {message}", file=sys.stderr)
        raise typer.Exit(2)


def _message(error: Exception) -> str | None:
    """Say what the user can do about an error; None if it is a fault of beitzoo."""
    if isinstance(error, UserError):
        return str(error)
    if is_out_of_memory(error):
        return "There is not enough memory. Choose a smaller model, image size or batch, or close other programs."
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        _discard_stdout()
        return f"The output cannot be written: {error.strerror}. Free some space, or write elsewhere."
    return None


app = typer.Typer(cls=_Commands, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
app.command("list")(models.list_)
app.command()(models.info)
app.command()(models.download)
app.command()(models.verify)
app.command()(models.convert_tokenizer)
app.command("predict")(predict.predict_)
app.command()(segment.segment)
app.command()(embed.embed)
app.command()(evaluate.evaluate)
app.command()(probe.probe)
app.command()(reconstruct.reconstruct)
app.command()(finetune.finetune)
app.command()(pretrain.pretrain)
app.command()(train_tokenizer.train_tokenizer)
app.command()(replay.replay)
app.command()(tokenize.tokenize)
app.command()(collect.collect)
app.command(context_settings=measure.PASS_ON)(measure.benchmark)
app.command()(measure.report)


def main() -> None:
    """Run a command; what the user got wrong is one message and exit code 2, not a traceback."""
    _silence_libraries()
    # Read when PyTorch is imported: large tensors in huge pages, where the system leaves that to programs.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    _accept_any_file_name(sys.stdout, sys.stderr)
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


def _discard_stdout() -> None:
    """Redirect stdout to nowhere, so that Python does not report the closed pipe again when it exits."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _silence_libraries() -> None:
    """Keep warnings and logs of libraries off stderr, unless the environment or `python -W` asks for them."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if logging.lastResort is not None:  # what prints a record that nobody handles
        logging.lastResort.addFilter(logging.Filter("beitzoo"))
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _accept_any_file_name(*streams: object) -> None:
    """Let text streams write every file name, whatever their encoding."""
    codecs.register_error("any-file-name", _encode_any)
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="any-file-name")


def _encode_any(error: UnicodeError) -> tuple[str | bytes, int]:
    """Encode one character: a byte of a name that is not text stays that byte, all else becomes an escape."""
    assert isinstance(error, UnicodeEncodeError)
    error.end = error.start + 1
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return codecs.lookup_error("backslashreplace")(error)
