"""The commands as the tests call them, in this process."""

from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from beitzoo.cli import app

SAMPLES = Path("beitzoo/assets/samples")


def run(*arguments: str, **options: Any) -> Result:
    return CliRunner().invoke(app, arguments, **options)
