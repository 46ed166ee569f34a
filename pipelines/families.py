"""Which model family a pipeline belongs to, and what names of guidance settings stand for on it."""

from __future__ import annotations

from typing import Any

from ..guidance import Guidance, Interval, Policy, Rule, resolve


def model_family(pipe: Any) -> str | None:
    """Name of the family in ``pilotage.guidance.PRESETS``, or None.

    Recognised by the pipeline's class and the shape of its network, never by a path.
    """
    name = type(pipe).__name__
    if name.startswith("StableDiffusionXL"):
        return "sdxl"
    if name == "DiTPipeline":
        return "dit"
    if name == "WanPipeline":
        return "wan"
    if name.startswith("StableDiffusion3"):  # the networks of 3.5 normalize queries and keys
        return "sd3.5" if pipe.transformer.config.get("qk_norm") else "sd3"
    if name.startswith("StableDiffusion") and getattr(pipe, "unet", None) is not None:
        config = pipe.unet.config
        if config.cross_attention_dim == 1024:
            return "sd2"
        if (config.cross_attention_dim, config.sample_size) == (192, 16):
            return "emoji"  # the embedded model
    return None


def resolve_for(pipe: Any, guidance: str | Rule | Policy | Guidance) -> Guidance:
    """What `guidance` means on a pipeline, see `resolve`; ValueError for one without meaning."""
    return resolve_in(model_family(pipe), guidance)


def resolve_in(family: str | None, guidance: str | Rule | Policy | Guidance) -> Guidance:
    """What `guidance` means on a model of a family; ValueError for a name without meaning."""
    found = resolve(guidance, family)
    if isinstance(guidance, str) and found.policy == Interval():
        raise ValueError(
            "'interval' has no known window for this model: pass Interval(start_step, stop_step) "
            "or Interval(noise_low=..., noise_high=...)"
        )
    return found
