"""Each package is built, installed alone, and imported from outside the repository."""

import subprocess
import sys
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name


REPOSITORY = Path(__file__).parents[1]
PACKAGES = ["peft_bias_steer", "hf_hierarchical_sae", "hf_based_kernel"]


def run(*command, cwd):
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=PACKAGES)
def built(request, tmp_path_factory) -> tuple[str, Path]:
    """Name of a package and its wheel, which was built from its sdist."""
    folder = tmp_path_factory.mktemp(request.param)
    run("-m", "build", "--no-isolation", "--outdir", folder, REPOSITORY / request.param, cwd=folder)
    return request.param, next(folder.glob("*.whl"))


@pytest.mark.slow
def test_wheel_holds_its_own_package_and_nothing_else(built):
    package, wheel = built
    names = zipfile.ZipFile(wheel).namelist()
    files = [path for kind in ("*.py", "*.html", "py.typed") for path in (REPOSITORY / package).rglob(kind)]
    source = {str(path.relative_to(REPOSITORY)) for path in files if "build" not in path.parts}

    assert {name for name in names if name.startswith(f"{package}/")} == source
    top_level = {name.split("/")[0] for name in names}
    assert top_level == {package, next(name for name in top_level if name.endswith(".dist-info"))}
    assert any(name.endswith("/licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_wheel_needs_only_what_its_requirements_file_says(built):
    package, wheel = built
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(next(name for name in archive.namelist() if name.endswith("METADATA"))).decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]

    expected = (REPOSITORY / package / "requirements.txt").read_text().split()
    assert sorted(line.partition(": ")[2] for line in required) == sorted(expected)


@pytest.mark.slow
def test_wheel_installed_alone_is_imported_from_outside_the_repository(built, tmp_path, run_isolated):
    package, wheel = built
    site = tmp_path / "site"
    run("-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    version = next(site.glob("*.dist-info")).name.split("-")[1].removesuffix(".dist")

    code = f"import sys; sys.path.insert(0, {str(site)!r}); import {package}; print({package}.__file__, {package}.__version__)"
    location, found_version = run_isolated(code, visible=[package]).split()

    assert Path(location).is_relative_to(site)
    assert version.startswith(found_version)


@pytest.mark.pinned
def test_pins_are_for_every_python_3_11():
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()[1:]
    pinned = {canonicalize_name(line.partition("==")[0]) for line in lines}
    asked = {d.name: d.metadata["Requires-Python"] for d in distributions() if canonicalize_name(d.name) in pinned}

    # Debian 12 has 3.11.2, which pip takes at its word.
    too_new = {name: python for name, python in asked.items() if python and "3.11.0" not in SpecifierSet(python)}
    assert len(asked) > 200 and not too_new, f"pin older versions in constraints.txt: {too_new}"
