"""Files and folders that are the old ones or the whole new ones at any moment, with nothing left beside them by an error."""

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike) -> Generator[Path]:
    """
    Inside, a name beside `path` to write to. The file takes its own name at the end, once it is on disk.

    After an exception it is gone; what a killed process left there is overwritten by the next one.

    Args:
        path (`str` or `os.PathLike`):
            File to write, whose folder exists. A link is followed; what is no plain file, such as a pipe, is written to
            as it is.

    Raises:
        IsADirectoryError: If `path` is a folder.
        FileNotFoundError: If its folder does not exist.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"expected a file to write, got the folder {path}: name a file in it")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"expected a file in a folder that exists, got {path}: make its folder")
    if target.exists() and not target.is_file():
        yield target
        return
    unfinished = _beside(target)
    try:
        yield unfinished
        _reach_disk(unfinished)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | os.PathLike) -> Generator[Path]:
    """
    Inside, a new empty folder beside `path`, whose place it takes at the end, once its files are on disk.

    After an exception it is gone; what a killed process left there is removed by the next one.

    Args:
        path (`str` or `os.PathLike`): Folder to write. It must be empty or not exist; its parents are made.

    Raises:
        ValueError: If `path` holds something, or is no folder.
    """
    target = check_empty_folder(path)
    unfinished = _beside(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir()
        yield unfinished
        for file in unfinished.rglob("*"):
            if file.is_file():
                _reach_disk(file)
        unfinished.replace(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_empty_folder(path: str | os.PathLike) -> Path:
    """
    The path of a folder that can be written without touching what is there.

    Raises:
        ValueError: If there is something.
        OSError: If it cannot be made.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"output_dir must be empty or not exist, but {path} holds something: choose another")
    check_writable(target.parent)
    return target


def check_writable(folder: str | os.PathLike) -> None:
    """
    Before there is anything to write: nothing is changed.

    Raises:
        OSError: If the folder cannot be made or written to, or is a file.
    """
    folder = Path(os.path.realpath(folder))
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"expected a folder to write into, got the file {there}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"expected a folder that can be written to, got {there}")


def _beside(target: Path) -> Path:
    return target.with_name(f"{target.name}.unfinished")


def _reach_disk(file: Path) -> None:
    with file.open("rb+") as content:
        os.fsync(content.fileno())
