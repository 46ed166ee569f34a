"""The trace of a run as a picture of ComfyUI's."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...guidance import Trace


def trace_picture(trace: Trace, dpi: int = 100) -> Tensor:
    """What a run evaluated, as ComfyUI's nodes hand on pictures.

    Args:
        trace: Of the run.
        dpi: Dots per inch; the picture is seven inches wide.

    Returns:
        Values from 0 to 1, with shape (1, height, width, 3), float32.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: the run has no steps.
    """
    figure = trace.plot()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    return torch.from_numpy(pixels).float()[None] / 255
