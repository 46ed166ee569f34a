"""Patches of ComfyUI's models: wrappers of a sampler's call and of its evaluations.

The state of a run lives in the options of one sampler's call, and nowhere else: an interrupted run
leaves nothing behind, and several at once do not meet.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...guidance import CFG, Guidance, Policy, Rule, Trace
from ..families import resolve_in
from .rehearsal import POST, rehearse
from .run import SamplerRun, SamplingError

KEY = "pilotage"
FAMILIES = {"SDXL": "sdxl", "SD20": "sd2", "SD21UnclipL": "sd2", "SD21UnclipH": "sd2"}


def guided(
    model: Any,
    guidance: str | Rule | Policy | Guidance,
    family: str | None = None,
    checked: bool = False,
) -> Any:
    """A clone of a ComfyUI model (``ModelPatcher``) that samples with a guidance.

    It takes the place of one that the model may have had, and acts on what nodes *before* it have
    made of the predictions (PerturbedAttentionGuidance, RescaleCFG); nodes after it act on what it
    made.

    Args:
        model: The model, which stays as it is.
        guidance: A name ("apg+ag"), a rule, a policy, or both.
        family: Whose presets names stand for; None: the family of the model, see `model_family`.
        checked: The policy was fitted on this very model, sampler, number of steps and negative
            prompt, which cannot be compared with what its file says of a diffusers pipeline.

    Raises:
        ValueError: unknown name, or fitted settings that nobody has `checked`.
        TypeError: `guidance` is none of these, or `model` is no ComfyUI model.
    """
    if not hasattr(model, "add_wrapper_with_key"):
        raise TypeError(f"expected a model of ComfyUI (tested with 0.3.64), got {type(model)}")
    found = resolve_in(family or model_family(model), guidance)
    if not checked:
        _refuse_fitted(found)
    clone = model.clone()
    patch = _Patch(found, position=len(clone.model_options.get(POST, [])))
    wrappers: dict[str, Callable[..., Any]] = {
        "sampler_sample": patch.around_run,
        "predict_noise": patch.around_evaluation,
    }
    for kind, wrapper in wrappers.items():
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    clone.set_attachments(KEY, patch)
    return clone


def with_rule(model: Any, rule: Rule) -> Any:
    """`guided` with another rule and the policy that the model has."""
    return guided(model, Guidance(rule, guidance_of(model).policy), checked=True)


def with_policy(model: Any, policy: Policy) -> Any:
    """`guided` with another policy and the rule that the model has."""
    return guided(model, Guidance(guidance_of(model).rule, policy))


def guidance_of(model: Any) -> Guidance:
    """The guidance of a model; classifier-free guidance if it is not patched."""
    patch = model.attachments.get(KEY)
    return Guidance(CFG()) if patch is None else patch.guidance


def trace_of(model: Any) -> Trace:
    """What the last run of a guided model, or of one made from it, has evaluated.

    Raises:
        ValueError: the model is not guided, or has not sampled yet.
    """
    patch = model.attachments.get(KEY)
    if patch is None or patch.trace is None:
        what = "is not patched by Pilotage" if patch is None else "has not sampled yet"
        raise ValueError(f"this model {what}: there is nothing to show")
    return patch.trace


def model_family(model: Any) -> str | None:
    """Name of the model's family in ``pilotage.guidance.PRESETS``, or None."""
    kinds = type(getattr(model.model, "model_config", None)).__mro__
    return next((FAMILIES[kind.__name__] for kind in kinds if kind.__name__ in FAMILIES), None)


def _refuse_fitted(guidance: Guidance) -> None:
    for identity in guidance.policy.identities:
        names = ("scheduler", "num_inference_steps", "guidance_scale", "negative_prompt")
        fitted = ", ".join(f"{name} {identity[name]}" for name in names if name in identity)
        raise ValueError(
            f"'{guidance}' was fitted on one model ({fitted}), which ComfyUI's cannot be compared "
            "with: see that checkpoint, sampler, steps and negative prompt are the same, and say "
            "so (checked)"
        )


@dataclass
class _Patch:
    """What a patched model and its clones share.

    Args:
        guidance: Rule and policy.
        position: How many functions stand before Pilotage's in ``sampler_post_cfg_function``.
        trace: Of the last run.
    """

    guidance: Guidance
    position: int
    trace: Trace | None = None

    def around_run(
        self,
        executor: Any,
        guider: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Any:
        """ComfyUI's wrapper of ``sampler.sample``."""
        rest = (latent_image, denoise_mask, disable_pbar)
        if self.guidance.is_plain:
            return executor(guider, sigmas, extra_args, callback, noise, *rest)
        sampler, options = executor.class_obj, extra_args["model_options"]
        if getattr(guider, "cfg", None) == 1 and not self.guidance.policy_alone:
            warnings.warn(
                f"cfg = 1 switches guidance off: '{self.guidance}' has nothing to act on",
                stacklevel=2,
            )
        rehearsal = rehearse(sampler, guider, sigmas, extra_args, noise, latent_image)
        if not rehearsal.total:
            return executor(guider, sigmas, extra_args, callback, noise, *rest)
        run = options[KEY] = SamplerRun(self.guidance, self.position, guider, rehearsal, noise)
        self.trace = run.trace
        result = executor(guider, sigmas, extra_args, callback, noise, *rest)
        run.run.finish()
        return result

    def around_evaluation(
        self,
        executor: Any,
        x: Tensor,
        timestep: Tensor,
        model_options: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """ComfyUI's wrapper of ``guider.predict_noise``."""
        options = model_options or {}
        if self.guidance.is_plain:
            return executor(x, timestep, options, seed)
        run = options.get(KEY)
        if not isinstance(run, SamplerRun):
            raise SamplingError(
                f"the model was evaluated outside of a sampler's run, where '{self.guidance}' "
                "cannot act: the sampler has to hand on the model options it is given"
            )
        return run.evaluate(executor, x, timestep, options, seed)
