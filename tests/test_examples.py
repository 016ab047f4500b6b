"""What every example script promises: one file, its command in its docstring, declared dependencies, helpful --help."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).parents[1]
# What several examples import is no example itself.
SHARED = REPOSITORY / "examples" / "shared"
EXAMPLES = sorted(path for path in (REPOSITORY / "examples").rglob("*.py") if path.parent != SHARED)
PACKAGES = ["peft_bias_steer", "hf_hierarchical_sae", "hf_based_kernel"]
# Examples to copy that are longer still.
NOT_SHORT_YET = {"train_sae.py"}
examples = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(REPOSITORY / "examples")))


@examples
def test_example_states_its_dependencies_and_its_command(path):
    text = path.read_text()
    docstring = ast.get_docstring(ast.parse(text))

    assert text.startswith("# /// script\n# dependencies = [")
    assert str(path.relative_to(REPOSITORY)) in docstring


@examples
def test_example_imports_nothing_private(path):
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]

    assert all(node.level == 0 for node in imports), "an example is one file"
    assert not [alias.name for node in imports for alias in node.names if alias.name.startswith("_")]
    assert not [node.module for node in imports if "._" in str(node.module)]


@pytest.mark.parametrize("package", PACKAGES)
def test_what_users_copy_is_short(package):
    for path in (REPOSITORY / "examples" / package).glob("*.py"):
        text = path.read_text()
        is_short = len(text.splitlines()) <= 250 and text.count(".add_argument(") <= 15

        assert is_short or path.name in NOT_SHORT_YET, path.name


def test_readme_has_a_line_for_every_example():
    named = re.findall(r"^\| `(\S+\.py)` \|", (REPOSITORY / "examples" / "README.md").read_text(), flags=re.MULTILINE)

    assert sorted(named) == [str(path.relative_to(REPOSITORY / "examples")) for path in EXAMPLES]


@pytest.mark.slow
@examples
def test_help_explains_every_option(path):
    done = subprocess.run([sys.executable, path, "--help"], cwd=REPOSITORY, capture_output=True, text=True)
    text = path.read_text()
    options = [
        node.args[0].value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and any(keyword.arg == "help" for keyword in node.keywords)
        and isinstance(node.args[0], ast.Constant)
    ]

    assert done.returncode == 0, done.stderr
    assert options and all(option in done.stdout for option in options)
