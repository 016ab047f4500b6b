"""Run notebooks from top to bottom. As a program: those of examples/notebooks, with what they print kept in the files."""

import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient


NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.ipynb"))


def run_notebook(path: Path, folder: Path, **parameters: Any) -> nbformat.NotebookNode:
    """The notebook with its outputs, run in `folder`, with other values for what its cell of parameters sets."""
    notebook = nbformat.read(path, as_version=4)
    if parameters:
        (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    client = NotebookClient(
        notebook,
        timeout=1800,
        kernel_name="python3",
        coalesce_streams=True,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    return client.execute()


def without_warnings(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The same without what libraries wrote to stderr, where paths of this machine are."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def main() -> None:
    for path in NOTEBOOKS:
        if not sys.argv[1:] or path.stem in sys.argv[1:]:
            notebook = without_warnings(run_notebook(path, path.parent))
            path.write_text(nbformat.writes(notebook, indent=1, ensure_ascii=False) + "\n")
            print(path.name)


if __name__ == "__main__":
    main()
