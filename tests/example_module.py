"""An example as a module, for the tests of it."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


EXAMPLES = Path(__file__).parents[1] / "examples"


def load_example(path: str) -> ModuleType:
    """The example at this path under examples/, freshly loaded and known by its name to those that import it."""
    file = EXAMPLES / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module
