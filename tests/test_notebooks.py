"""Every notebook runs from top to bottom, here with little of everything, and shows what it printed at its own size."""

import re

import nbformat
import pytest

from tests.notebook_runner import NOTEBOOKS, run_notebook, without_warnings


SMALL = {
    "peft_bias_steer": {
        "LAYER": 1,
        "NEW_TOKENS": 4,
        "STEPS": 2,
        "PROMPTS": 2,
        "SAMPLES": 2,
        "HELD_OUT": 4,
        "SCALES": [0, 1],
    },
    "hf_hierarchical_sae": {
        "LAYER": 1,
        "TOKENS": 600,
        "HELD_OUT": 200,
        "LATENTS": 64,
        "K": 8,
        "STEPS": 10,
        "BATCH": 64,
    },
    "hf_based_kernel": {"STEPS": 10, "BATCH": 8, "TESTED": 8, "REPLACED": [1], "WINDOW": 8, "CONTEXTS": [16, 32]},
}
notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def kinds_of_outputs(notebook):
    """What each cell shows: text, a picture, or both."""
    return [
        sorted({mime for output in cell.outputs for mime in output.get("data", {output.output_type: ""})})
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.slow
@notebooks
def test_notebook_runs_and_shows_what_the_kept_outputs_do(path, tiny_language_model, tmp_path):
    done = without_warnings(run_notebook(path, tmp_path, MODEL=tiny_language_model, **SMALL[path.stem]))

    assert sum(map(bool, kinds_of_outputs(done))) >= 4
    assert kinds_of_outputs(done) == kinds_of_outputs(nbformat.read(path, as_version=4))


@notebooks
def test_kept_outputs_are_whole_small_and_of_no_machine(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = "".join(str(cell.outputs) for cell in code)

    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert path.stat().st_size < 100_000
    assert not re.findall(r"(?<![\w.])/(?:home|root|tmp|work|usr|opt)/\S*|site-packages|Traceback", shown)
    assert not [cell for cell in code if cell.metadata.keys() - {"tags"}]


@notebooks
def test_it_begins_with_its_title_and_parts_have_headings_below_it(path):
    first, *others = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]

    assert first.startswith("# ") and not any(text.startswith(("# ", " ")) for text in others)
    assert sum(text.startswith("## ") for text in others) >= 4
