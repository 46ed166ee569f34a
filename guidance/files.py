"""Files that are whole or not there: written under a temporary name, then renamed; fingerprints."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path` to write to, which takes its place at the end.

    If the block raises, `path` stays as it was and the temporary file is removed. The temporary
    name keeps the suffix, which image and array writers go by. Missing folders are made.

    Raises:
        OSError: the folder cannot be written to, or `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected a file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(f".partial{path.suffix}", f".{path.stem}-", path.parent)
    except OSError as error:
        raise type(error)(
            error.errno, f"cannot be written ({error.strerror})", str(path)
        ) from error
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        # mkstemp makes files that only their owner can read.
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)
        os.replace(partial, path)
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
