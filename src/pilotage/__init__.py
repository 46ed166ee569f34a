"""Pilotage: guidance for diffusion sampling, for diffusers pipelines.

    from pilotage import guided

    pipe = guided(any_diffusers_pipeline)
    pipe(prompt, guidance="apg", guidance_scale=15)

`guided` lets a pipeline take ``guidance=``; `info` tells versions and the names that it knows. The
rooms are `pilotage.guidance` (the mathematics, on tensors), `pilotage.pipelines` (what touches
diffusers) and `pilotage.eval` (metrics, comparisons and the command line).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .eval.record import info as info
    from .pipelines.guided import guided as guided

__version__ = "0.2.0.dev0"
__all__ = ["__version__", "guided", "info"]


def __getattr__(name: str) -> Any:
    # Loaded when first used: ``import pilotage`` alone loads neither torch nor diffusers.
    if name == "guided":
        from .pipelines.guided import guided

        return guided
    if name == "info":
        from .eval.record import info

        return info
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
