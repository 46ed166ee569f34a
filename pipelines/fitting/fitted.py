"""For which runs fitted settings hold: coefficients belong to what they were fitted on."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn

from .identity import network_hash, pipeline_identity

# What neither branch's prediction depends on.
WITHOUT_EFFECT = ("vae", "safety_checker", "feature_extractor")
OTHER_ENCODERS = ("negative_prompt_2", "negative_prompt_3", "negative_prompt_4")
# Arguments by which a run has other steps, or another unconditional branch, than those fitted on.
NOT_FITTED = ("timesteps", "sigmas", "negative_prompt_embeds", "strength", "denoising_end")

_HASHES: weakref.WeakKeyDictionary[nn.Module, tuple[int, str]] = weakref.WeakKeyDictionary()


def unconditional_text(pipe: Any, negative_prompt: str | None) -> str | None:
    """What the unconditional branch is made of: no negative prompt is an empty one for most.

    Returns:
        A text; None: pipelines such as SDXL put zeros in the place of no negative prompt.
    """
    zeros = pipe.config.get("force_zeros_for_empty_prompt", False)
    return "" if negative_prompt is None and not zeros else negative_prompt


def negative_argument(pipe: Any, negative_prompt: str | None, count: int) -> dict[str, Any]:
    """The argument with which a call of `count` prompts evaluates both branches."""
    text = unconditional_text(pipe, negative_prompt)
    return {} if text is None else {"negative_prompt": [text] * count}


def run_identity(
    pipe: Any,
    num_inference_steps: int | None,
    scales: tuple[float, float],
    negative_prompt: str | None,
) -> dict[str, Any]:
    """What a run is, as far as its predictions depend on it; ready for JSON.

    Args:
        pipe: The pipeline.
        num_inference_steps: Steps asked for; None where the call has no such argument.
        scales: Lowest and highest guidance scale.
        negative_prompt: Prompt of the unconditional branch; None: as of a call without one.

    Returns:
        ``networks`` (SHA-256 of configuration and weights of each), ``scheduler``,
        ``scheduler_config``, ``prediction_type``, ``num_inference_steps``, ``guidance_scale``
        (range), ``negative_prompt`` (see `unconditional_text`). No version: files of one hold in
        another.

    Raises:
        ValueError: weights are not in memory (sequential offloading).
    """
    whole = pipeline_identity(pipe, _hash_once)
    networks = {k: v for k, v in whole["networks"].items() if k not in WITHOUT_EFFECT}
    kept = ("scheduler", "scheduler_config", "prediction_type")
    return {
        "networks": networks,
        **{name: whole[name] for name in kept},
        "num_inference_steps": num_inference_steps,
        "guidance_scale": list(scales),
        "negative_prompt": unconditional_text(pipe, negative_prompt),
    }


def check_identity(
    pipe: Any, identity: Mapping[str, Any], arguments: Mapping[str, Any], scale: float
) -> None:
    """Refuse settings that were fitted on something else than the call at hand.

    Args:
        pipe: The pipeline called.
        identity: What `run_identity` said when they were fitted. (Version 0.1 also kept its own
            version there, which is not looked at.)
        arguments: All arguments of the call, by name.
        scale: w of the call.

    Raises:
        ValueError: a field differs; the message names it with both values.
    """
    for name in NOT_FITTED:
        if arguments.get(name) is not None:
            raise ValueError(f"fitted settings cannot be used together with {name}=")
    asked = arguments.get("negative_prompt")
    negatives = {unconditional_text(pipe, text) for text in _listed(asked)}
    if len(negatives) != 1:
        raise ValueError(f"fitted settings are for one negative prompt, got {asked}")
    negative = negatives.pop()
    for name in OTHER_ENCODERS:
        for text in _listed(arguments.get(name) or negative):
            if text != negative:
                raise _differs(name, repr(identity["negative_prompt"]), repr(text))
    low, high = identity["guidance_scale"]
    if not low <= scale <= high:
        raise _differs("guidance_scale", f"{low:g} to {high:g}", f"{scale:g}")
    here = run_identity(pipe, arguments.get("num_inference_steps"), (low, high), negative)
    for name, value in here.items():
        fitted = identity.get(name)
        if isinstance(value, Mapping) and isinstance(fitted, Mapping):
            for key in sorted({*value, *fitted}):
                if value.get(key) != fitted.get(key):
                    raise _differs(f"{name}.{key}", fitted.get(key), value.get(key))
        elif value != fitted:
            raise _differs(name, repr(fitted), repr(value))


def _differs(name: str, fitted: Any, here: Any) -> ValueError:
    return ValueError(
        f"these settings were fitted on something else: {name} was {fitted}, here it is {here}. "
        "Fit them anew for this run, or change it back"
    )


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _hash_once(network: nn.Module, name: str) -> str:
    """`network_hash`, not computed again while the weights stay as they are."""
    state = hash(
        tuple(
            (key, value.data_ptr(), value._version) for key, value in network.state_dict().items()
        )
    )
    known = _HASHES.get(network)
    if known is None or known[0] != state:
        known = (state, network_hash(network, name))
        _HASHES[network] = known
    return known[1]
