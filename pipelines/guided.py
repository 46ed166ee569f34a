"""``guided(pipe)`` and the drop-in pipeline classes: diffusers pipelines that take ``guidance=``."""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any

from diffusers import DiffusionPipeline

from ..guidance import Guidance, Policy, Rule, Trace, resolve
from .families import model_family
from .layouts import LayoutError, layout_of
from .noise_levels import check_scheduler
from .seam import Seam, attached

GuidanceLike = str | Rule | Policy | Guidance

SCALE_ARGUMENTS = ("true_cfg_scale", "guidance_scale")
DENOISERS = ("unet", "transformer", "transformer_2", "prior", "decoder")

CALL_DOCUMENTATION = """
        guidance (`str`, rule, policy or `Guidance`, *optional*):
            How to guide: a name ("cfg", "apg", "ag", "apg+ag"), a configured object such as
            `APG(eta=0.5) | AdaptiveGuidance(0.999)`, or None for the stock pipeline. Afterwards
            `guidance_trace` of the pipeline tells what was evaluated.
        detailed_trace (`bool`, *optional*, defaults to `False`):
            Record cosines and norms of the predictions at every step in `guidance_trace`.
"""


class GuidedMixin:
    """Adds ``guidance=`` to the call of a diffusers pipeline; everything else stays stock."""

    _guidance_trace: Trace | None = None

    @property
    def guidance_trace(self) -> Trace | None:
        """What the last call with ``guidance=`` evaluated; None before the first."""
        return self._guidance_trace

    def resolve_guidance(self, guidance: GuidanceLike) -> Guidance:
        """The settings a name stands for on this pipeline (presets of its model family)."""
        return resolve(guidance, model_family(self))

    def __call__(
        self,
        *args: Any,
        guidance: GuidanceLike | None = None,
        detailed_trace: bool = False,
        **kwargs: Any,
    ) -> Any:
        """See the stock pipeline."""
        stock_call = super().__call__
        if guidance is None:
            return stock_call(*args, **kwargs)
        settings = self.resolve_guidance(guidance)
        layout = layout_of(type(self))
        scale = _checked_scale(self, settings, args, kwargs)
        if settings.needs_noise_level or detailed_trace:
            check_scheduler(self.scheduler)
        seam = Seam(self, settings, layout, scale, detailed_trace)
        self._guidance_trace = None
        try:
            with attached(self, DENOISERS, seam):
                output = stock_call(*args, **kwargs)
            if seam.run is not None:
                seam.run.finish()
        finally:
            if seam.run is not None:
                self._guidance_trace = seam.run.trace
        return output


def _checked_scale(
    pipe: Any, guidance: Guidance, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> float:
    """The guidance scale of a call.

    Raises:
        ValueError: it is not a finite positive number, or leaves nothing to guide.
    """
    signature = inspect.signature(type(pipe).stock_class.__call__)
    bound = signature.bind(pipe, *args, **kwargs)
    bound.apply_defaults()
    name = next(name for name in SCALE_ARGUMENTS if name in bound.arguments)
    scale = bound.arguments[name]
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise ValueError(f"{name} must be a number, got {scale!r}")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"{name} must be finite and > 0 (1 is no guidance), got {scale}")
    if scale <= 1 and not guidance.is_plain:
        raise ValueError(
            f"{name}={scale} switches guidance off, so that '{guidance}' has nothing to act on: "
            f"use {name} > 1, or guidance=None"
        )
    return float(scale)


def _check_guidable(pipeline_class: type) -> None:
    parameters = inspect.signature(pipeline_class.__call__).parameters
    if not any(name in parameters for name in SCALE_ARGUMENTS):
        raise LayoutError(
            f"{pipeline_class.__name__} has no classifier-free guidance: "
            f"its call takes none of {', '.join(SCALE_ARGUMENTS)}"
        )
    layout_of(pipeline_class)


@functools.cache
def guided_class(pipeline_class: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    """The guided subclass of a diffusers pipeline class, of the same name.

    Raises:
        LayoutError: the pipeline has no guidance, or its layout is not known.
    """
    if issubclass(pipeline_class, GuidedMixin):
        return pipeline_class
    _check_guidable(pipeline_class)
    stock_call = pipeline_class.__call__

    @functools.wraps(stock_call)
    def __call__(self, *args, **kwargs):
        return GuidedMixin.__call__(self, *args, **kwargs)

    signature = inspect.signature(stock_call)
    extra = [
        inspect.Parameter("guidance", inspect.Parameter.KEYWORD_ONLY, default=None),
        inspect.Parameter("detailed_trace", inspect.Parameter.KEYWORD_ONLY, default=False),
    ]
    parameters = list(signature.parameters.values())
    variadic = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    plain = [p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    __call__.__signature__ = signature.replace(parameters=[*plain, *extra, *variadic])
    __call__.__doc__ = f"{stock_call.__doc__ or ''}\n{CALL_DOCUMENTATION}"
    return type(
        pipeline_class.__name__,
        (GuidedMixin, pipeline_class),
        {
            "__call__": __call__,
            "__doc__": pipeline_class.__doc__,
            "__module__": "pilotage.pipelines",
            "__qualname__": pipeline_class.__name__,
            "stock_class": pipeline_class,
        },
    )


def guided(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Let a pipeline instance take ``guidance=``.

    Args:
        pipe: Any diffusers pipeline with classifier-free guidance.

    Returns:
        The same object. Without ``guidance=`` it goes on exactly as before.

    Raises:
        LayoutError: the pipeline has no guidance, or Pilotage does not know its branches.
    """
    pipe.__class__ = guided_class(type(pipe))
    return pipe
