"""The processes that share work (Accelerate), also where there is no accelerator."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """The processes that share the work; gloo connects them where there is no accelerator.

    Asked with the processor only, ``PartialState()`` would take each for the only one.
    """
    wish = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    return PartialState(cpu=wish or not torch.accelerator.is_available())
