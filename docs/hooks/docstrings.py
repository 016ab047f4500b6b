"""Docstrings in Hugging Face's form, made Markdown: lists of parameters, and [`Class`] as a link where there is one."""

import re
import textwrap
from typing import Any

import griffe


TITLES = {"Args:": "Parameters", "Returns:": "Returns", "Raises:": "Raises", "Example:": "Example"}
ITEM = re.compile(r"`?([^`:(]+?)`?(?: \((.+?)\))?:(?: (.*))?")
SHAPES = re.compile(r"(?:^\w[\w ]*: \(.*\n)+", re.MULTILINE)
REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?:\(([\w.]+)\))?")


def as_list(text: str) -> str:
    """One item for each unindented line, "name (type): what it is", and the lines below it."""
    items = []
    for line in text.split("\n"):
        if not line or line.startswith(" "):
            items.append(line)
        elif match := ITEM.fullmatch(line):
            name, kind, meaning = match.groups(default="")
            items.append(f"- **`{name}`**{kind and f' ({kind})'}: {meaning}")
        else:
            raise ValueError(f"expected `name (type): meaning` in a docstring, got {line!r}")
    return "\n".join(items)


def list_shapes(text: str) -> str:
    """Lines such as "q: (batch, seq)" as a list."""
    return SHAPES.sub(lambda lines: "\n" + re.sub(r"^(.+?):", r"- `\1`:", lines[0], flags=re.MULTILINE) + "\n", text)


def as_markdown(docstring: str) -> str:
    """The docstring with its sections as lists under their titles."""
    parts = re.split(rf"^({'|'.join(TITLES)})\n((?:(?: .*)?\n|\Z)*)", docstring + "\n", flags=re.MULTILINE)
    text = list_shapes(parts[0])
    for title, body, rest in zip(parts[1::3], parts[2::3], parts[3::3]):
        body = textwrap.dedent(body).strip()
        body = as_list(body) if title in ("Args:", "Raises:") else body
        text += f"\n**{TITLES[title]}**\n\n{body}\n\n" + list_shapes(rest)
    return text.replace("```python\n>>>", "```pycon\n>>>")


class HuggingFaceDocstrings(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        public = {name: f"{pkg.path}.{name}" for name in pkg.exports or ()}

        def link(match: re.Match) -> str:
            short, name, path = match.groups()
            shown = f"`{name.rpartition('.')[2] if short else name}`"
            first, dot, rest = name.partition(".")
            target = path or (public[first] + dot + rest if first in public else None)
            return f"[{shown}][{target}]" if target else shown

        def visit(parent: griffe.Object) -> None:
            for member in parent.members.values():
                if member.is_alias:
                    continue
                if member.docstring:
                    member.docstring.value = REFERENCE.sub(link, as_markdown(member.docstring.value))
                visit(member)

        visit(pkg)
