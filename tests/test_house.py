"""What three packages have in common: arrows without circles, annotations, a test file per module, one version."""

import ast
import importlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


REPOSITORY = Path(__file__).parents[1]
PACKAGES = ["peft_bias_steer", "hf_hierarchical_sae", "hf_based_kernel"]
# Whose functions are annotated.
ANNOTATED = ("peft_bias_steer", "hf_hierarchical_sae", "hf_based_kernel")


def module_files(package: str) -> dict[str, Path]:
    """The package's modules by their dotted names, without what a build left there."""
    files = [path for path in sorted((REPOSITORY / package).rglob("*.py")) if "build" not in path.parts]
    return {".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path for path in files}


MODULES = {name: path for package in PACKAGES for name, path in module_files(package).items()}


def relative_imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules among the known ones that this one imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = name.split(".")[: -node.level] + (node.module.split(".") if node.module else [])
            base = ".".join(parts)
            found |= {
                target for target in (base, *(f"{base}.{alias.name}" for alias in node.names)) if target in known
            }
    return found


def find_circle(arrows: dict[str, set[str]]) -> list[str]:
    """One circle among the arrows, or nothing."""
    finished: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in finished:
            return []
        for target in sorted(arrows[name]):
            if circle := visit(target, [*path, name]):
                return circle
        finished.add(name)
        return []

    return next((circle for name in arrows if (circle := visit(name, []))), [])


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_of_a_package_form_no_circle(package):
    modules = module_files(package)
    arrows = {name: relative_imports(name, path, modules) for name, path in modules.items()}

    assert sum(map(len, arrows.values())) > 3
    assert not find_circle(arrows)


def test_a_circle_is_found():
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


def unannotated(tree: ast.AST) -> Iterator[str]:
    """Functions with an argument or, `__init__` apart, a result that is not annotated; Triton kernels do not count."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        bare = [one.arg for one in arguments if one.annotation is None and one.arg not in ("self", "cls")]
        if bare or (node.returns is None and node.name != "__init__"):
            yield f"{node.name}({', '.join(bare)})"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith(ANNOTATED)])
def test_every_function_is_annotated(name):
    bare = list(unannotated(ast.parse(MODULES[name].read_text())))

    assert not bare


def test_a_function_without_annotations_is_found():
    code = (
        "def f(self, x: int, y): ...\n@triton.jit\ndef kernel(x): ...\nclass A:\n    def __init__(self, x: int): ..."
    )

    assert list(unannotated(ast.parse(code))) == ["f(y)"]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_has_its_test_file(package):
    modules = {name.rpartition(".")[2] for name in module_files(package)} - {"__init__"}
    tested = {path.stem.removeprefix("test_") for path in (REPOSITORY / "tests" / package).rglob("test_*.py")}

    assert not modules - tested


def test_version_is_one_number_everywhere():
    files = ["CITATION.cff", *(f"{package}/__init__.py" for package in PACKAGES)]
    versions = {
        file: re.search(r"^(?:version: |__version__ = )\"?([^\"\s]+)", (REPOSITORY / file).read_text(), re.MULTILINE)[
            1
        ]
        for file in files
    }
    versions["pyproject.toml"] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    versions["CHANGELOG.md"] = re.search(r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)[1]

    assert len(set(versions.values())) == 1, versions


@pytest.mark.parametrize("package", PACKAGES)
def test_no_name_of_a_package_hides_a_module(package):
    exported = vars(importlib.import_module(package))
    names = {name.removeprefix(f"{package}.") for name in module_files(package)}
    hiding = {name for name in names if not isinstance(exported.get(name, re), ModuleType)}

    assert not hiding


@pytest.mark.parametrize(
    "page", ["Makefile", "*.md", "docs/**/*.md", "examples/*.md", *(f"{name}/*.md" for name in PACKAGES)]
)
def test_scripts_that_pages_name_exist(page):
    texts = [path.read_text() for path in REPOSITORY.glob(page)]
    named = {path for text in texts for path in re.findall(r"\b(?:examples|tests)/[\w/]+\.\w+", text)}

    assert texts
    assert [path for path in named if not (REPOSITORY / path).exists()] == []
