"""An example as a module, for the tests of it."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


EXAMPLES = Path(__file__).parents[1] / "examples"


def load_example(path: str) -> ModuleType:
    """The example at this path under examples/, freshly loaded and known by its name to those that import it."""
    file = EXAMPLES / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


class Killed(BaseException):
    """What no example catches."""


def kill_while_writing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a text written under this name, or beside it under a longer one, end in its middle, and what writes it with it."""
    write_text = Path.write_text

    def write_half(path: Path, text: str, *args: Any, **kwargs: Any) -> int:
        if name not in path.name:
            return write_text(path, text, *args, **kwargs)
        write_text(path, text[: len(text) // 2], *args, **kwargs)
        raise Killed

    monkeypatch.setattr(Path, "write_text", write_half)
