"""Files outside docs/ that pages link to become pages of the site, so that one set of links serves both readers."""

import json
import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


REPOSITORY = Path(__file__).parents[2]
IMAGES = (".png", ".svg")
LINKING = (".md", ".ipynb")
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#])")


def place_on_site(path: str) -> str:
    """Where a file of the repository stands among the sources of the site; code is shown on a page of its own."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return path if path.endswith((".md", *IMAGES)) else f"{path}.md"


def as_page(path: str) -> str:
    """A file as Markdown: itself, the cells and outputs of a notebook, or its code."""
    text = (REPOSITORY / path).read_text()
    if path.endswith(".md"):
        return text
    if path.endswith(".ipynb"):
        return "\n\n".join(as_cell(cell) for cell in json.loads(text)["cells"])
    return f"# {path}\n\n```{Path(path).suffix[1:]}\n{text}```\n"


def as_cell(cell: dict) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    shown = [f"```python\n{source}\n```"]
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if "image/png" in data:
            shown.append(f"![](data:image/png;base64,{''.join(data['image/png']).strip()})")
        elif text := "".join(output.get("text", data.get("text/plain", ""))):
            shown.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(shown)


def linked_files(path: str) -> dict[str, str]:
    """The relative links in a page or notebook of the repository that lead to a file, and this file's path."""
    links = {
        link: os.path.normpath(Path(path).parent / link) for link in LINK.findall((REPOSITORY / path).read_text())
    }
    return {link: target for link, target in links.items() if (REPOSITORY / target).is_file()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = ["README.md", *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    for path in pages:
        if path.endswith(LINKING):
            pages += [target for target in linked_files(path).values() if target not in pages]
    for path in pages:
        if not path.startswith("docs/"):
            source = {"abs_src_path": REPOSITORY / path} if path.endswith(IMAGES) else {"content": as_page(path)}
            files.append(File.generated(config, place_on_site(path), **source))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """The page with its links to files of the repository turned into links to their pages."""
    place = page.file.src_uri
    path = place.replace(".ipynb.md", ".ipynb") if page.file.generated_by else f"docs/{place}"
    if not (REPOSITORY / path).is_file():
        return markdown
    targets = linked_files(path)
    folder = Path(place).parent

    def rewrite(link: re.Match) -> str:
        target = targets.get(link[0])
        return os.path.relpath(place_on_site(target), folder) if target else link[0]

    return LINK.sub(rewrite, markdown)
