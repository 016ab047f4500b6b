"""What is at a path is the old file or the whole new one: after an error, on a full disk, and when the writer is killed."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from peft_bias_steer.whole_files import whole_file, whole_folder


KILLED = """
import os, signal
from peft_bias_steer.whole_files import {name}
with {name}({path!r}) as unfinished:
    target = unfinished / "weights" if {name!r} == "whole_folder" else unfinished
    target.write_text("half of")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def kill_while_writing(name: str, path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED.format(name=name, path=str(path))], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_file_takes_its_name_when_it_is_whole(tmp_path):
    (tmp_path / "v").write_text("old")

    with whole_file(tmp_path / "v") as unfinished:
        unfinished.write_text("new")
        assert (tmp_path / "v").read_text() == "old"

    assert (tmp_path / "v").read_text() == "new" and names(tmp_path) == ["v"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_file_and_nothing_beside_it(error, tmp_path):
    (tmp_path / "v").write_text("old")
    (tmp_path / "empty").mkdir()

    with pytest.raises(type(error)), whole_file(tmp_path / "v") as unfinished:
        unfinished.write_text("half of")
        raise error
    with pytest.raises(type(error)), whole_folder(tmp_path / "empty") as unfinished:
        (unfinished / "weights").write_text("half of")
        raise error

    assert (tmp_path / "v").read_text() == "old"
    assert names(tmp_path) == ["empty", "v"] and not names(tmp_path / "empty")


@pytest.mark.slow
def test_a_killed_writer_leaves_the_old_file_and_the_next_one_tidies_up(tmp_path):
    (tmp_path / "v").write_text("old")

    kill_while_writing("whole_file", tmp_path / "v")
    kill_while_writing("whole_folder", tmp_path / "out")

    assert (tmp_path / "v").read_text() == "old" and not (tmp_path / "out").exists()
    with whole_file(tmp_path / "v") as unfinished:
        unfinished.write_text("new")
    with whole_folder(tmp_path / "out") as unfinished:
        (unfinished / "config").write_text("new")
    assert names(tmp_path) == ["out", "v"] and names(tmp_path / "out") == ["config"]


def test_links_are_followed_and_pipes_written_to(tmp_path):
    (tmp_path / "v").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "v")
    with whole_file(tmp_path / "link") as unfinished:
        unfinished.write_text("new")

    assert (tmp_path / "link").is_symlink() and (tmp_path / "v").read_text() == "new"
    with whole_file(os.devnull) as unfinished:
        assert unfinished == Path(os.devnull)


def test_what_is_no_place_for_it_is_refused(tmp_path):
    (tmp_path / "v").write_text("old")

    with pytest.raises(IsADirectoryError, match="expected a file to write, got the folder"), whole_file(tmp_path):
        pass
    nowhere = tmp_path / "no" / "v"
    with pytest.raises(FileNotFoundError, match="folder that exists, got .*v: make its folder"), whole_file(nowhere):
        pass
    for path in (tmp_path, tmp_path / "v"):
        with pytest.raises(ValueError, match="must be empty or not exist"), whole_folder(path):
            pass
    assert names(tmp_path) == ["v"]
