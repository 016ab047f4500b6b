"""Files that are whole at any moment: written beside, put in place in one step, and nothing left behind by an error."""

import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike) -> Generator[Path, None, None]:
    """
    Inside, a new empty file beside `path`, of the same suffix. It takes the name at the end, once it is on disk; after
    an exception it is gone, and what was at `path` before is as it was.

    Args:
        path (`str` or `os.PathLike`): file to write; its folder is made if it is not there. A link is followed, and
            what is no plain file, such as a pipe, is written to as it is.

    Raises:
        `OSError`: If the folder cannot be written to, or `path` is a folder.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(f"expected a file to write, got the folder {path}")
    if path.exists() and not path.is_file():
        yield path
        return
    with _made(path.parent):
        unfinished = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")
        try:
            unfinished.touch(exist_ok=False)
            yield unfinished
            with open(unfinished, "rb+") as file:
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: str | os.PathLike) -> Generator[Path, None, None]:
    """
    Inside, a new empty folder in `folder`. At the end each of its files takes its place in `folder`, one by one in the
    order of their names; after an exception it is gone, and what was in `folder` before is as it was.

    Args:
        folder (`str` or `os.PathLike`): made if it is not there.
    """
    folder = Path(folder)
    with _made(folder):
        unfinished = folder / f".{secrets.token_hex(8)}"
        try:
            unfinished.mkdir()
            yield unfinished
            for file in sorted(unfinished.iterdir()):
                with open(file, "rb+") as content:
                    os.fsync(content.fileno())
            for file in sorted(unfinished.iterdir()):
                file.replace(folder / file.name)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def check_writable(path: str | os.PathLike) -> None:
    """
    Before there is anything to write: nothing is changed.

    Args:
        path (`str` or `os.PathLike`): file that [`whole_file`] is to write.

    Raises:
        `OSError`: If `path` is a folder, or its folder cannot be made or written to.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(f"expected a file to write, got the folder {path}")
    if path.exists() and not path.is_file():
        return
    there = next(place for place in path.parents if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"expected a folder to write {path.name} into, got the file {there}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"expected a folder that can be written to, got {there}")


@contextmanager
def _made(folder: Path) -> Generator[None, None, None]:
    """Inside, the folder is there; after an exception those that were made for it are gone, if they are empty."""
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with suppress(OSError):
            for place in new:
                place.rmdir()
        raise
