"""Files that are whole at any moment: an error, a full disk and a kill leave what was there before."""

import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from hf_hierarchical_sae.whole_files import whole_file, whole_folder


@contextmanager
def full_disk(size):
    """No file grows above `size` bytes: what a full disk does to a writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_its_place_at_the_end(tmp_path):
    path = tmp_path / "new" / "page.html"
    with whole_file(path) as unfinished:
        assert unfinished.suffix == ".html" and unfinished.parent == path.parent
        unfinished.write_text("new")
        assert not path.exists()

    assert path.read_text() == "new" and names(path.parent) == ["page.html"]
    # as any file that is opened for writing, and not readable by its owner alone
    with open(tmp_path / "other", "w"):
        assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_nothing_behind_and_the_older_file_as_it_was(tmp_path, error):
    path = tmp_path / "page.html"
    path.write_text("older")
    for target in (path, tmp_path / "new" / "folder" / "page.html"):
        with pytest.raises(error), whole_file(target) as unfinished:
            unfinished.write_text("ne")
            raise error

    assert names(tmp_path) == ["page.html"] and path.read_text() == "older"


def test_a_full_disk_leaves_the_older_file(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("older")
    with pytest.raises(OSError, match="File too large"), full_disk(1000), whole_file(path) as unfinished:
        unfinished.write_text("new" * 1000)

    assert names(tmp_path) == ["page.html"] and path.read_text() == "older"


def test_a_kill_leaves_the_older_file(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("older")
    program = (
        "import os, signal, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from whole_files import whole_file\n"
        "with whole_file(sys.argv[2]) as unfinished:\n"
        "    unfinished.write_text('ne')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    package = os.path.dirname(sys.modules[whole_file.__module__].__file__)
    done = subprocess.run([sys.executable, "-c", program, package, path])

    assert done.returncode == -signal.SIGKILL and path.read_text() == "older"


def test_links_are_followed_and_what_is_no_file_stays_what_it_is(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "page.html")
    for target in (tmp_path / "link", "/dev/null"):
        with whole_file(target) as unfinished:
            unfinished.write_text("new")

    assert (tmp_path / "link").is_symlink() and (tmp_path / "page.html").read_text() == "new"
    assert not os.path.isfile("/dev/null")
    with pytest.raises(IsADirectoryError, match="expected a file to write, got the folder"), whole_file(tmp_path):
        pass


def test_the_files_of_a_folder_take_their_places_beside_those_that_are_there(tmp_path):
    folder = tmp_path / "new"
    with whole_folder(folder) as unfinished:
        (unfinished / "a").write_text("first")
        (unfinished / "b").write_text("second")
    with pytest.raises(ValueError), whole_folder(folder) as unfinished:
        (unfinished / "a").write_text("half")
        raise ValueError
    with whole_folder(folder) as unfinished:
        (unfinished / "b").write_text("third")
    with pytest.raises(ValueError), whole_folder(tmp_path / "other" / "folder"):
        raise ValueError

    assert names(folder) == ["a", "b"] and names(tmp_path) == ["new"]
    assert (folder / "a").read_text() == "first" and (folder / "b").read_text() == "third"
