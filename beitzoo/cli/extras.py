"""Optional dependencies: which extra of the package a command needs."""

import importlib.util

from beitzoo.errors import check


def require(extra: str, *modules: str) -> None:
    """Say which extra to install before a command fails half-way for want of it."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    check(not missing, f"This command needs {', '.join(missing)}; install it with: pip install 'beitzoo[{extra}]'")
