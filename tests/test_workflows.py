"""What GitHub reads: each file is YAML, and workflows run targets that the Makefile has, on the Pythons of the packages."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml


REPOSITORY = Path(__file__).parents[1]
WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))


def jobs(workflow: Path) -> dict[str, dict]:
    return yaml.safe_load(workflow.read_text())["jobs"]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_commands_of_a_workflow_are_targets_of_the_makefile(workflow):
    commands = []
    for job in jobs(workflow).values():
        text = "\n".join(step.get("run", "") for step in job["steps"])
        for name, values in job.get("strategy", {}).get("matrix", {}).items():
            text = "\n".join(text.replace(f"${{{{ matrix.{name} }}}}", value) for value in values)
        commands += re.findall(r"\bmake ([\w-]+)", text)

    assert commands
    for target in commands:
        subprocess.run(["make", "-n", target], cwd=REPOSITORY, check=True, capture_output=True)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_write_only_where_a_job_asks_for_it(workflow):
    assert yaml.safe_load(workflow.read_text())["permissions"] == {"contents": "read"}
    assert all(job["timeout-minutes"] <= 90 for job in jobs(workflow).values())


def test_tests_run_from_the_lowest_python_that_the_packages_ask_for():
    pythons = jobs(REPOSITORY / ".github/workflows/ci.yml")["test"]["strategy"]["matrix"]["python"]
    asked = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["requires-python"]

    assert asked == f">={pythons[0]}"


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_every_field_of_a_form_has_a_label(form):
    content = yaml.safe_load(form.read_text())

    assert content["name"] and content["description"]
    assert all(field["attributes"]["label"] for field in content["body"])


def test_hooks_run_what_make_quality_runs():
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    quality = subprocess.run(["make", "-n", "-B", "quality"], cwd=REPOSITORY, capture_output=True, text=True).stdout

    assert all(" ".join(hook["entry"].split()[:2]) in quality for hook in hooks)
