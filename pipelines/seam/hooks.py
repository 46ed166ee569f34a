"""Caches within a network, and what they can stand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ...guidance import Always, Decision, Guidance
from .layouts import LayoutError
from .patterns import Pattern

# How the names of diffusers' hooks begin that reuse what a network computed at an earlier step ->
# the cache's own name: those that do so by comparing, and those that count steps, and so are out of
# step as soon as a branch is left out that they will see again.
COMPARING = {"fbc_": "FirstBlockCache", "text_kv_cache": "TextKVCache"}
COUNTING = {
    "faster_cache": "FasterCache",
    "mag_cache": "MagCache",
    "pyramid_attention_broadcast": "PyramidAttentionBroadcast",
    "sea_cache": "SeaCache",
    "taylorseer_cache": "TaylorSeerCache",
}
# Caches of other packages, which count calls or steps of the scheduler and know no branches.
FOREIGN = ("DeepCache", "cache-dit or ParaAttention")


def caches_of(network: Any) -> list[str]:
    """Names of the caches that are at work in a network, however they were put on."""
    modules = list(network.modules()) if isinstance(network, nn.Module) else []
    registries = [getattr(module, "_diffusers_hook", None) for module in modules]
    hooks = {name for registry in registries if registry is not None for name in registry.hooks}
    known = {**COMPARING, **COUNTING}.items()
    names = {name for start, name in known if any(hook.startswith(start) for hook in hooks)}
    own = [vars(module) for module in modules]
    if any(str(getattr(o.get("forward"), "__module__", "")).startswith("DeepCache.") for o in own):
        names.add("DeepCache")
    if any(o.get("_is_cached") for o in own):
        names.add("cache-dit or ParaAttention")
    if not names and getattr(network, "is_cache_enabled", False):
        names = {"unknown"}
    return sorted(names)


def check_caches(
    networks: Iterable[Any],
    guidance: Guidance,
    asked: str,
    pattern: Pattern | None,
    batch: int,
    decisions: Sequence[Decision] | None,
) -> None:
    """Refuse policies that leave out what a cache in one of the networks needs.

    A cache holds whole batches, so that it needs every row of a call, if any; one that counts steps
    needs every call of a branch that it will see again, and one of another package every call.

    Raises:
        LayoutError: so it is.
    """
    if isinstance(guidance.policy, Always):
        return
    caches = sorted({name for network in networks for name in caches_of(network)})
    if not caches:
        return
    alone = decisions is None or any(d.evaluate == ("cond",) for d in decisions)
    skips = decisions is None or any(d.skips or d.estimates for d in decisions)
    own_pace = guidance.policy.needs_gamma  # every sample's, and for good
    batched = pattern is None or max(pattern.calls) > 1
    rows = (batched and alone) or (batch > 1 and own_pace)
    calls = skips or (alone and not own_pace)
    foreign = (alone or skips) and not set(caches).isdisjoint(FOREIGN)
    if rows or foreign or (calls and not set(caches) <= set(COMPARING.values())):
        raise LayoutError(_needs(caches, "row" if rows else "call", f"'{asked}'"))


def check_no_caches(networks: Iterable[Any], wish: str) -> None:
    """Refuse caches where the rows of a call are shared out or put together.

    Raises:
        LayoutError: there is one; `wish` names the argument of the call.
    """
    if caches := sorted({name for network in networks for name in caches_of(network)}):
        raise LayoutError(_needs(caches, "row", wish))


def _needs(caches: Sequence[str], what: str, wish: str) -> str:
    return (
        f"a cache is enabled in the network ({', '.join(caches)}), which needs every {what} at "
        f"every step: disable it, or leave out {wish}"
    )
