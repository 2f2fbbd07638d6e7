"""The public names: what `import beitzoo` offers, and what it costs."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import beitzoo


def test_importing_beitzoo_imports_nothing_and_making_a_model_only_what_every_model_needs() -> None:
    code = "import beitzoo, sys; print(*sys.modules); beitzoo.create_model; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    at_first, with_models = (line.split() for line in result.stdout.splitlines())
    assert [name for name in at_first if name.startswith("beitzoo")] == ["beitzoo"]
    assert {"torch", "numpy"}.isdisjoint(at_first)
    rare = {"timm", "torchvision", "PIL", "sklearn", "pydantic", "huggingface_hub", "typer", "transformers"}
    rare |= {"torch._dynamo", "sympy"}  # seconds
    assert "torch" in with_models
    assert rare.isdisjoint(with_models)


def test_public_names_are_those_that_type_checkers_see() -> None:
    tree = ast.parse(Path("beitzoo/__init__.py").read_text(encoding="utf-8"))
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in typed.body if isinstance(node, ast.ImportFrom)]
    homes = {name.asname: node.module for node in imports for name in node.names}
    assert homes == beitzoo._HOMES
    assert beitzoo.__all__ == sorted(homes)
    for name, home in beitzoo._HOMES.items():
        assert getattr(beitzoo, name) is getattr(importlib.import_module(home), name)
    assert {*beitzoo.__all__, "__version__"} <= {*dir(beitzoo)}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'beitzoo' has no attribute 'creat_model'"):
        beitzoo.creat_model  # noqa: B018
    assert not hasattr(beitzoo, "models_")
