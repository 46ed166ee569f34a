"""Guidance at matched strength: the scale at which a setting guides as strongly as plain CFG at w.

Methods change how much a nominal scale does, and most of what they seem to win at equal scales is
that they guide more or less strongly (https://arxiv.org/abs/2602.22570). So each is given the scale
at which it moves the denoised image as far as classifier-free guidance at w does: the norm of
(guided - conditional), mean over all steps of its own runs and over a few prompts. What a rule adds
of its own (momentum, say) counts as guidance, too. Found by Brent's method on the logarithms of
w - 1 and of the norm, between which the relation is nearly a line.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import brentq
from tqdm import tqdm

from ...guidance.files import fingerprint, write_json
from ...guidance.saved import to_dict
from ...pipelines.fitting.fitted import negative_argument, unconditional_text
from ...pipelines.fitting.identity import pipeline_identity
from ...pipelines.guided import scale_option
from ...pipelines.processes import processes
from .cost import update_norms
from .plan import BASELINE, Plan, Setting, sample_seed

PROMPTS = 8  # of the plan, on which strengths are measured
TOLERANCE = 0.005  # of the strength, relative
WEAKEST, STRONGEST = 1e-2, 1e3  # values of w - 1 that are tried


def matched_scale(strength: Callable[[float], float], target: float, guess: float) -> float | None:
    """The scale at which a setting has a wanted strength.

    Args:
        strength: Guidance scale w > 1 -> how far a setting moves the denoised image.
        target: The wanted strength, > 0.
        guess: Where to begin, > 1.

    Returns:
        w; None if there is none between 1.01 and 1001: the setting moves more or less at any scale.
    """
    known: dict[float, float] = {}

    def excess(x: float) -> float:
        if x not in known:
            found = math.log(max(strength(1 + math.exp(x)), 1e-12) / target)
            known[x] = 0.0 if abs(found) < TOLERANCE else found
        return known[x]

    low, high = math.log(WEAKEST), math.log(STRONGEST)
    x, stride = min(max(math.log(guess - 1), low), high), 0.0
    while side := excess(x):
        # What would do if the strength were proportional to w - 1, and more, to go past it.
        stride = max(1.2 * abs(side), 2 * stride)
        after = min(max(x - math.copysign(stride, side), low), high)
        if after == x:
            return None
        if excess(after) * side <= 0:
            return 1 + math.exp(brentq(excess, x, after, xtol=TOLERANCE / 10))
        x = after
    return 1 + math.exp(x)


def matched_settings(pipe: Any, plan: Plan, path: Path, progress: bool = True) -> list[Setting]:
    """Every setting of a plan once more, as strong as classifier-free guidance at its scale.

    Plain ones, those that were fitted for one scale, and those that are as strong at no scale, are
    left out.

    Args:
        pipe: A guided pipeline, on its device.
        plan: What is compared; the first prompts of it are measured, with the noise of their first
            seed.
        path: JSON file of what was measured: a search that was interrupted goes on with it.
        progress: Show a bar.

    Raises:
        ValueError: the scheduler's noise levels are not known, or the file is of something else.
    """
    state = processes()
    wanted = [
        s
        for s in plan.settings
        if s.scale > 1
        and s.method != BASELINE
        and not pipe.resolve_guidance(s.guidance).policy.identities
    ]
    if state.is_main_process:
        meter = _Meter(pipe, plan, path)
        for setting in tqdm(wanted, "strength", unit="setting", disable=not progress):
            meter.match(setting)
    state.wait_for_everyone()
    found = json.loads(path.read_text())["scales"] if wanted else {}
    taken = {(s.method, s.scale, s.steps) for s in plan.settings}
    settings = []
    for setting in wanted:
        scale = found[setting.label]
        if scale is not None and (setting.method, scale, setting.steps) not in taken:
            taken.add((setting.method, scale, setting.steps))
            settings.append(
                Setting(setting.guidance, scale, setting.steps, setting.method, setting.scale)
            )
    return settings


class _Meter:
    """How strongly settings guide, measured once each and kept in a file."""

    def __init__(self, pipe: Any, plan: Plan, path: Path) -> None:
        self.pipe, self.plan, self.path = pipe, plan, path
        self.prompts, self.seeds = list(plan.prompts[:PROMPTS]), plan.seeds[:1]
        self.options = {k: v for k, v in plan.options.items() if k != "negative_prompt"}
        self.negative = unconditional_text(pipe, plan.options.get("negative_prompt"))
        pipe.set_progress_bar_config(disable=True)
        self.identity = json.loads(
            json.dumps(
                {
                    **pipeline_identity(pipe),
                    "prompts": self.prompts,
                    "seeds": list(self.seeds),
                    "options": self.options | {"negative_prompt": self.negative},
                }
            )
        )
        self.measured: dict[str, float] = {}
        self.scales: dict[str, float | None] = {}
        self.ratios: dict[tuple[str, int], float] = {}
        if path.is_file():
            kept = json.loads(path.read_text())
            if kept["identity"] != self.identity:
                raise ValueError(
                    f"{path} holds strengths of another pipeline or other prompts: name another "
                    "folder, or remove the file"
                )
            self.measured, self.scales = kept["strengths"], kept["scales"]

    def match(self, setting: Setting) -> None:
        """Find the scale at which a setting is as strong as plain guidance at its scale."""
        own = setting.method, setting.steps
        if setting.label not in self.scales:
            target = self.strength(Setting(BASELINE, setting.scale, setting.steps), setting.scale)
            guess = 1 + self.ratios.get(own, 1.0) * (setting.scale - 1)
            found = matched_scale(lambda w: self.strength(setting, w), target, guess)
            self.scales[setting.label] = None if found is None else float(f"{found:.5g}")
            self._write()
        scale = self.scales[setting.label]
        if scale is not None:  # the next search of this method begins at the same ratio
            self.ratios[own] = (scale - 1) / (setting.scale - 1)

    def strength(self, setting: Setting, scale: float) -> float:
        """Mean norm of (guided - conditional) as denoised images of a setting at another scale."""
        scale = float(f"{scale:.5g}")
        guidance = self.pipe.resolve_guidance(setting.guidance)
        key = f"{fingerprint(to_dict(guidance))[:16]} w={scale:g} s={setting.steps}"
        if key not in self.measured:
            norms: list[float] = []
            for chunk in Plan(self.prompts, [setting], self.seeds, self.plan.batch_size).chunks:
                self.pipe(
                    prompt=[self.prompts[i] for _, i in chunk],
                    guidance=guidance,
                    detailed_trace=True,
                    num_inference_steps=setting.steps,
                    generator=[torch.Generator().manual_seed(sample_seed(*one)) for one in chunk],
                    output_type="latent",
                    **scale_option(self.pipe, scale),
                    **self.options,
                    **negative_argument(self.pipe, self.negative, len(chunk)),
                )
                found = update_norms(self.pipe.guidance_trace, guidance, self.pipe.scheduler)
                if found is None:
                    raise ValueError(
                        f"the strength of '{setting.method}' cannot be measured: the noise levels "
                        f"of {type(self.pipe.scheduler).__name__} give no denoised image"
                    )
                norms += found
            self.measured[key] = statistics.fmean(norms)
            self._write()
        return self.measured[key]

    def _write(self) -> None:
        content = {"strengths": self.measured, "scales": self.scales}
        write_json(self.path, {"identity": self.identity, **content})


def at_equal_strength(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a comparison's rows, the second table: what was matched, and what it is matched to."""
    targets = {row["matched_to"] for row in rows if row["matched_to"] is not None}
    plain = [row for row in rows if row["method"] == BASELINE and row["w"] in targets]
    matched = [row for row in rows if row["matched_to"] is not None]
    plain = [row for row in plain if row["kind"] != "equal nfe"]
    return sorted([*plain, *matched], key=lambda row: row["matched_to"] or row["w"])
