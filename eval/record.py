"""Files of figures: what was measured, by which command, on what, when; and what is installed."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..guidance import PRESETS, available
from ..guidance.files import write_json as write_json
from ..guidance.presets import LITERATURE

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "numpy")


def machine() -> dict[str, Any]:
    """Processor, cores, accelerator and Python of this machine."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":", 1)[1].strip() if names else processor
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Versions of this package and of the installed ones that figures depend on."""
    # Its own version is that of the code that runs: a checkout need not be installed, and another
    # version may be.
    top = __name__.partition(".")[0]
    own = {top: str(sys.modules[top].__version__)}
    return own | {name: importlib.metadata.version(name) for name in PACKAGES}


def info() -> dict[str, Any]:
    """Versions, machine, names for ``guidance=``, and presets.

    Returns:
        ``versions``: name -> version. ``machine``: see `machine`. ``guidance``: names.
        ``presets``: model family -> name -> settings, written out; the family "any (literature)"
        holds published settings for no model in particular.
    """
    families: dict[str, Mapping[str, object]] = {**PRESETS, "any (literature)": LITERATURE}
    return {
        "versions": versions(),
        "machine": machine(),
        "guidance": available(),
        "presets": {
            family: {name: str(settings) for name, settings in presets.items()}
            for family, presets in families.items()
        },
    }


def figures_context() -> dict[str, Any]:
    """Command line, date, machine and versions."""
    return {
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
    }


def write_figures(path: Path, figures: dict[str, Any]) -> None:
    """Write measured figures with command line, machine, versions and date beside them."""
    write_json(path, {**figures, "context": figures_context()})


def add_figures(path: Path, name: str, figures: dict[str, Any]) -> None:
    """Write figures under a name into a file of several, beside what else it holds."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, kept | {name: figures | {"context": figures_context()}})
