"""Files that are whole or not there: written under a temporary name, then renamed; fingerprints."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def is_written_to(path: Path | str) -> bool:
    """Whether `path` is what data flows into and no file that can be replaced.

    That is a device, a pipe or a socket, or a name of an open file such as ``/dev/stdout``.
    """
    hop = Path(path)
    for _ in range(40):  # as many links as Linux follows
        hop = Path(os.path.realpath(hop.parent), hop.name)
        if hop.is_relative_to("/proc"):
            return True
        if not hop.is_symlink():
            break
        hop = hop.parent / os.readlink(hop)
    return hop.exists() and not (hop.is_file() or hop.is_dir())


@contextlib.contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """A temporary path to write to, whose content takes the place of `path` at the end.

    It lies beside `path`; links are followed. If the block raises, `path` stays as it was and the
    temporary file is removed. The temporary name keeps the suffix, which image and array writers go
    by. Missing folders are made. What is no plain file (see `is_written_to`) is never replaced: the
    content is written to it at the end.

    Raises:
        OSError: the folder cannot be written to, or `path` is a folder.
    """
    path, through = Path(path), is_written_to(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected a file to write")
    place = Path(tempfile.gettempdir(), path.name) if through else Path(os.path.realpath(path))
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(f".partial{place.suffix}", f".{place.stem}-", place.parent)
    except OSError as error:
        raise type(error)(
            error.errno, f"cannot be written ({error.strerror})", str(path)
        ) from error
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        if through:
            # Appending: what a file behind an open descriptor already holds is kept.
            with partial.open("rb") as content, path.open("ab") as target:
                shutil.copyfileobj(content, target)
            return
        # mkstemp makes files that only their owner can read.
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)
        os.replace(partial, place)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write a text file (UTF-8), whole or not at all; see `atomic`."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path | str, content: Any) -> None:
    """Write a JSON file, whole or not at all; see `atomic`.

    Raises:
        ValueError: a number is NaN or infinite, which JSON does not know.
    """
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def fingerprint(content: Any) -> str:
    """SHA-256 of something that JSON can hold, independent of the order of keys; 64 hex digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
