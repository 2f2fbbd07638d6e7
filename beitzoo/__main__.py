"""Make `python -m beitzoo` the command `beitzoo`."""

from beitzoo.cli import main

main()
