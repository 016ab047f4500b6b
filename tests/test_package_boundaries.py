"""What keeps the three packages separate and their remote code loadable, checked in their source text."""

import ast
import re
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_import_files


REPOSITORY = Path(__file__).parents[1]
PACKAGES = ["peft_bias_steer", "hf_hierarchical_sae", "hf_based_kernel"]
REMOTE_CODE = {
    "hf_hierarchical_sae": "modeling_hierarchical_sae.py",
    "hf_based_kernel": "modeling_rebased.py",
}
MODULES = [
    path for package in PACKAGES for path in sorted((REPOSITORY / package).rglob("*.py")) if "build" not in path.parts
]
TRIED_IMPORT = (ast.Try, ast.FunctionDef, ast.AsyncFunctionDef)


def modules(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(REPOSITORY)))


def package_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).parts[0]


def imported_names(node: ast.AST) -> list[str]:
    """Top-level names of the absolute imports in `node`."""
    names = []
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            names += [alias.name.partition(".")[0] for alias in child.names]
        elif isinstance(child, ast.ImportFrom) and child.level == 0:
            names.append(str(child.module).partition(".")[0])
    return names


def is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not node.orelse


def declared(package: str) -> set[str]:
    lines = (REPOSITORY / package / "requirements.txt").read_text().split()
    return {re.split(r"[<>=!~;\[]", line)[0].replace("-", "_") for line in lines}


@modules(MODULES)
def test_packages_never_import_one_another(path):
    others = set(PACKAGES) - {package_of(path)}

    assert not others & set(imported_names(ast.parse(path.read_text())))


@modules(MODULES)
def test_what_is_imported_at_import_time_is_a_declared_dependency(path):
    unguarded = [
        node
        for node in ast.parse(path.read_text()).body
        if not isinstance(node, (*TRIED_IMPORT, ast.ClassDef)) and not is_for_type_checkers(node)
    ]
    names = {name for node in unguarded for name in imported_names(node)}

    assert names <= declared(package_of(path)) | set(sys.stdlib_module_names)


@modules(MODULES)
def test_triton_is_imported_only_in_triton_modules_and_guarded(path):
    tree = ast.parse(path.read_text())
    is_triton_module = path.name.endswith("_triton.py")
    guarded = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.Try) and is_triton_module
        for node in ast.walk(outer)
    }
    bare = [
        node for node in ast.walk(tree) if id(node) not in guarded and isinstance(node, ast.Import | ast.ImportFrom)
    ]

    assert "triton" not in [name for node in bare for name in imported_names(node)]


@modules([path for path in MODULES if package_of(path) in REMOTE_CODE and path.name != "__init__.py"])
def test_relative_imports_have_the_one_form_that_remote_code_can_load(path):
    text = path.read_text()
    relative = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.level]

    assert package_of(path) not in imported_names(ast.parse(text)), "imports its own package by its absolute name"
    assert all(node.level == 1 and node.module and "." not in node.module for node in relative)
    assert all((path.parent / f"{node.module}.py").exists() for node in relative)
    # transformers finds relative imports by a regular expression that also matches docstrings.
    assert len(re.findall(r"^\s*(?:from|import)\s+\.", text, flags=re.MULTILINE)) == len(relative)


@pytest.mark.parametrize("package", REMOTE_CODE)
def test_everything_that_remote_code_reaches_is_a_flat_sibling_with_declared_imports(package):
    modeling = REPOSITORY / package / REMOTE_CODE[package]
    reached = [modeling, *map(Path, get_relative_import_files(modeling))]

    assert {path.parent for path in reached} == {modeling.parent}
    for path in reached:
        third_party = set(get_imports(path)) - set(sys.stdlib_module_names)
        assert third_party <= declared(package), path.name
