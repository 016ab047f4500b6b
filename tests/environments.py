"""Environments beside this one, which `make test` makes for packages that its pins exclude."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest


def python_with(package: str, folder: str) -> str:
    """This Python, or the one of `folder`, which the variable of the Makefile may place elsewhere; skips without either."""
    variable = folder.removeprefix(".").replace("-", "_").upper()
    python = Path(__file__).parents[1] / os.environ.get(variable, folder) / "bin" / "python"
    if importlib.util.find_spec(package) is not None:
        return sys.executable
    if not python.exists():
        missing = f"needs {package} in {folder}, which `make test` makes"
        assert "CI" not in os.environ, missing
        pytest.skip(missing)
    return str(python)
