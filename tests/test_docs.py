"""The documentation site, built as `make docs` builds it: warnings, broken links among them, are errors."""

import ast
import html
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).parents[1]
PACKAGES = ["peft_bias_steer", "hf_hierarchical_sae", "hf_based_kernel"]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[Path, str]:
    """The site's pages by their paths."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr
    return {page.relative_to(folder): page.read_text() for page in folder.rglob("*.html")}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_its_place_in_the_api(site, package):
    page = site[Path("reference", f"{package}.html")]
    source = (REPOSITORY / package / "__init__.py").read_text()
    names = ast.literal_eval(re.search(r"(?s)^__all__ = (\[.*?\])", source, re.MULTILINE)[1])

    assert len(names) > 5
    assert [name for name in names if f'id="{package}.{name}"' not in page] == []


def test_every_page_of_docs_is_in_the_navigation(site):
    pages = {path.relative_to(REPOSITORY / "docs") for path in (REPOSITORY / "docs").rglob("*.md")}
    menus = set(re.findall(r'href="([^"]+)" class="md-nav__link', site[Path("for_rl.html")]))

    assert {str(page.with_suffix(".html")) for page in pages} <= menus | {"./for_rl.html"}


def test_every_link_leads_to_a_page_and_to_a_place_on_it(site):
    places = {page: set(re.findall(r' id="([^"]+)"', text)) | {""} for page, text in site.items()}
    links = {
        (page, Path(os.path.normpath(page.parent / target if target else page)), place)
        for page, text in site.items()
        for target, _, place in (link.partition("#") for link in re.findall(r'<a href="(?!/)([^":]*)"', text))
    }

    assert len(links) > 500
    assert {link for link in links if link[1].suffix == ".html" and link[2] not in places.get(link[1], ())} == set()


def test_nothing_comes_from_elsewhere(site):
    loaded = re.compile(r"<(?:script|img|iframe)[^>]+src=\"?(?:https?:)?//|<link[^>]+href=\"?(?:https?:)?//")

    assert [page for page, text in site.items() if loaded.search(text)] == []


def test_no_markdown_is_left_on_a_page(site):
    for page, text in site.items():
        article = re.sub(r"(?s)<(pre|code)\b.*?</\1>", "", text[text.find("<article") : text.find("</article>")])
        words = html.unescape(re.sub(r"<[^>]+>", "", article))

        assert re.findall(r".*(?:\*\*[^ ]|\]\(|`|\$\$|^- |^\|).*", words, flags=re.MULTILINE) == [], page


def test_parameters_and_shapes_are_lists_and_classes_are_links(site):
    page = site[Path("reference/hf_based_kernel.html")]

    assert "<li><code>q</code>: (batch, seq, num_heads, feature_dim)</li>" in page
    assert "<li><strong><code>scale</code></strong> (<code>float</code>, <em>optional</em>): Factor of every" in page
    assert re.search(
        r'Configuration of a <a [^>]*href="#hf_based_kernel.RebasedModel"><code>RebasedModel</code>', page
    )


def test_a_notebook_is_shown_with_its_outputs():
    as_cell = runpy.run_path(str(REPOSITORY / "docs" / "hooks" / "repository_pages.py"))["as_cell"]
    outputs = [{"text": ["2\n", "3\n"]}, {"data": {"text/plain": ["<Figure>"], "image/png": "iVBO\n"}}]

    assert as_cell({"cell_type": "markdown", "source": ["# Title\n", "text"]}) == "# Title\ntext"
    assert as_cell({"cell_type": "code", "source": ["print(2)\n", "print(3)"], "outputs": outputs}) == (
        "```python\nprint(2)\nprint(3)\n```\n\n```text\n2\n3\n```\n\n![](data:image/png;base64,iVBO)"
    )
