"""Files are whole or not there; what is no plain file is written to, never replaced."""

import os
import stat
import subprocess
import sys
import threading

import pytest

from pilotage.guidance import files
from pilotage.guidance.files import atomic, write_json, write_text


def test_a_file_is_replaced_whole_or_stays(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    write_text(path, "one")
    with pytest.raises(RuntimeError), atomic(path) as partial:
        partial.write_text("half")
        assert partial.suffix == ".txt" and path.read_text() == "one"
        raise RuntimeError
    assert path.read_text() == "one" and list(path.parent.iterdir()) == [path]
    write_text(path, "two")
    assert path.read_text() == "two" and list(path.parent.iterdir()) == [path]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    with pytest.raises(IsADirectoryError, match="is a folder"), atomic(tmp_path):
        pass
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, float("nan"))
    assert path.read_text() == "two"


@pytest.mark.parametrize("there", [True, False])
def test_links_are_followed(tmp_path, there):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    target, middle, link = folder / "a.txt", folder / "middle", tmp_path / "link.txt"
    if there:
        target.write_text("old")
    middle.symlink_to("a.txt")
    link.symlink_to("elsewhere/middle")
    write_text(link, "new")
    assert link.is_symlink() and middle.is_symlink() and target.read_text() == "new"
    assert sorted(folder.iterdir()) == [target, middle]


def test_a_pipe_is_written_to(tmp_path):
    path, read = tmp_path / "pipe.json", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: read.append(path.read_text()))
    reader.start()
    write_text(path, "through")
    reader.join()
    assert read == ["through"] and path.is_fifo() and list(tmp_path.iterdir()) == [path]


def test_nothing_goes_through_a_pipe_if_the_writer_fails(tmp_path):
    path = tmp_path / "pipe.json"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(RuntimeError), atomic(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert os.read(reader, 10) == b"" and path.is_fifo()
    os.close(reader)


def test_a_device_is_written_to():
    """The far end of a terminal, which nobody could replace if this failed."""
    near, far = os.openpty()
    write_text(os.ttyname(far), "through\n")
    assert os.read(near, 20).split() == [b"through"]
    os.close(near)
    os.close(far)


CODE = """
import runpy  # of the file alone: the package would import torch
write_text = runpy.run_path("{module}")["write_text"]
print("before", flush=True)
write_text("{path}", "written\\n")
print("after")
"""


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
def test_the_standard_output_is_written_to(tmp_path, name):
    """A pipe, or the file that the shell opened, which keeps what it holds."""
    if name == "link":
        name = tmp_path / "link"
        name.symlink_to("/dev/stdout")
    command = [sys.executable, "-c", CODE.format(module=files.__file__, path=name)]
    piped = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert piped == "before\nwritten\nafter\n"
    path = tmp_path / "out.txt"
    with path.open("a") as out:
        subprocess.run(command, stdout=out, check=True)
    assert path.read_text() == piped
