"""Caches within a network, and what they can stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ...guidance import Always, Decision, Guidance
from .layouts import LayoutError
from .patterns import Pattern

# How the names of diffusers' hooks begin that reuse what a network computed at an earlier step:
# those that do so by comparing, and those that count steps, and so are out of step as soon as a
# branch is left out that they will see again.
COMPARING = ("fbc_", "text_kv_cache")
COUNTING = (
    "faster_cache",
    "mag_cache",
    "pyramid_attention_broadcast",
    "sea_cache",
    "taylorseer_cache",
)


def caches_of(network: Any) -> list[str]:
    """Names of the hooks of caches that are at work in a network, however they were put on."""
    modules = network.modules() if isinstance(network, nn.Module) else ()
    registries = [getattr(module, "_diffusers_hook", None) for module in modules]
    names = {name for registry in registries if registry is not None for name in registry.hooks}
    return sorted(name for name in names if name.startswith(COMPARING + COUNTING))


def check_caches(
    network: Any,
    guidance: Guidance,
    asked: str,
    pattern: Pattern | None,
    batch: int,
    decisions: Sequence[Decision] | None,
) -> None:
    """Refuse policies that leave out what a cache in the network needs.

    A cache that holds whole batches needs every row at every step; one that counts steps needs
    every call of a branch that it will see again.

    Raises:
        LayoutError: so it is.
    """
    if isinstance(guidance.policy, Always):
        return
    caches = caches_of(network)
    if not caches and not getattr(network, "is_cache_enabled", False):
        return
    batched = pattern is None or max(pattern.calls) > 1
    rows = batched or (batch > 1 and guidance.policy.needs_gamma)
    counts = any(name.startswith(COUNTING) for name in caches)
    comes_back = decisions is None or any(d.skips or d.estimates for d in decisions)
    comes_back = comes_back or not guidance.policy.needs_gamma
    if rows or (comes_back and counts):
        needs = "every row" if rows else "every call"
        raise LayoutError(
            f"a cache is enabled in the network ({', '.join(caches) or 'enable_cache'}), which "
            f"needs {needs} at every step: disable it, or leave out '{asked}'"
        )
