"""Files of figures: what was measured, by which command, on what, when."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from ..guidance.files import write_json as write_json

PACKAGES = ("pilotage", "torch", "diffusers", "transformers", "accelerate", "numpy")


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
    """Installed versions of the packages that figures depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


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
