"""``kernel.c`` compiled by the system's C compiler when it is first needed, and loaded."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from ...files import atomic

SOURCE = Path(__file__).with_name("kernel.c")
FLAGS = ("-O3", "-shared", "-fPIC", "-march=x86-64-v4", "-mamx-tile", "-mamx-int8")
NEEDED = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "amx_tile", "amx_int8"}


class Unavailable(RuntimeError):
    """No integer products here; the message says what is missing."""


def processor_flags() -> set[str]:
    """What the processor can do, in Linux's words; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return set(next((line.split(":")[1] for line in lines if line.startswith("flags")), "").split())


def cache_folder() -> Path:
    """Where compiled code is kept.

    Raises:
        Unavailable: the user has no home.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pilotage"
    except RuntimeError as error:
        raise Unavailable(f"nowhere to keep compiled code, set XDG_CACHE_HOME: {error}") from None


def compile_library(source: Path = SOURCE, flags: tuple[str, ...] = FLAGS) -> Path:
    """Compile a source unless that is done already; the file.

    It is named after what it is made of and after what it holds: a damaged one is not loaded.

    Raises:
        Unavailable: no C compiler, one that does not know the instructions, or nowhere to write.
    """
    text, kind = source.read_bytes(), source.parent.name
    folder, name = cache_folder(), f"{kind}-{_digest(text + ' '.join(flags).encode())}"
    for path in folder.glob(f"{name}-*.so"):
        if path.stem == f"{name}-{_digest(path.read_bytes())}":
            return path
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        raise Unavailable("no C compiler (cc, gcc or clang) on the path")
    try:
        with tempfile.TemporaryDirectory() as build:
            made = Path(build) / f"{kind}.so"
            command = [*compiler.split(), *flags, str(source), "-o", str(made), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            code = made.read_bytes()
        path = folder / f"{name}-{_digest(code)}.so"
        with atomic(path) as partial:
            partial.write_bytes(code)
    except OSError as error:
        raise Unavailable(f"cannot compile into {folder}: {error}") from None
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{compiler} cannot compile {source.name}: {error.stderr}") from None
    return path


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why it is missing."""
    lacking = NEEDED - processor_flags()
    if platform.machine() != "x86_64" or lacking:
        return None, f"not Linux on a processor with AMX (without {', '.join(sorted(lacking))})"
    try:
        library = ctypes.CDLL(str(compile_library()))
    except (Unavailable, OSError) as error:
        return None, str(error)
    if not library.permit_tiles():
        return None, "the system does not let processes use AMX tiles"
    pointer, number = ctypes.c_void_p, ctypes.c_long
    library.posterior.argtypes = [pointer, number, number, pointer, pointer, pointer, pointer]
    library.posterior.argtypes += [number] * 3 + [ctypes.c_int] + [number] * 2
    return library, ""


def missing() -> str:
    """Why there are no integer products on this machine; empty if there are."""
    return load()[1]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
