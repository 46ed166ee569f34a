"""One run of a ComfyUI sampler: a `pilotage.guidance.Run` and where it meets ComfyUI's functions.

An evaluation of ComfyUI is: the branches (``sampler_calc_cond_batch_function``), their combination
(``sampler_cfg_function``, else classifier-free guidance), then a list of functions that may change
the result (``sampler_post_cfg_function``). The first of these is taken by this evaluation, and one
is put into the list, where the Pilotage node stands among the others. The combination is left
alone: ComfyUI has one place for it, which other nodes take, and hands it on as x - (x - D), which
rounds D as coarsely as x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ...guidance import Guidance, NoiseLevel, Run, Trace
from ...guidance.device import on_host, row_index
from .branches import CALC, Branches
from .levels import Levels
from .rehearsal import POST, Rehearsal

CFG_FUNCTION = "sampler_cfg_function"
OWN_BRANCHES = (
    "{} evaluates the branches of its own accord, where '{}' cannot act: use KSampler, or "
    "SamplerCustom with CFGGuider or BasicGuider"
)


class SamplingError(RuntimeError):
    """A guidance cannot act within a sampler or guider of ComfyUI."""


class SamplerRun:
    """The state of one call of a sampler; made when it begins, dropped when it ends or fails.

    Args:
        guidance: Rule and policy.
        position: How many functions stand before Pilotage's in ``sampler_post_cfg_function``.
        guider: ComfyUI's guider, whose model samples.
        rehearsal: What the sampler is going to evaluate.
        noise: Of the run, with shape (B, \\*).

    Raises:
        SamplingError: the guidance does not fit the sampler.
        ValueError: it does not fit the model, or the number of evaluations.
    """

    def __init__(
        self, guidance: Guidance, position: int, guider: Any, rehearsal: Rehearsal, noise: Tensor
    ) -> None:
        self.guidance, self.position = guidance, position
        self.guider, self.rehearsal = guider, rehearsal
        self.total, self.depends = rehearsal.total, _depends_on_length(guidance)
        self.combines = self._check()
        self.levels = Levels(guider.inner_model.model_sampling, guidance, noise.device)
        self.run = Run(guidance, len(noise), self.total, on_host(noise.device))

    @property
    def trace(self) -> Trace:
        """What has been evaluated so far."""
        return self.run.trace

    def evaluate(
        self,
        stock: Callable[..., Tensor],
        x: Tensor,
        timestep: Tensor,
        options: dict[str, Any],
        seed: int | None,
    ) -> Tensor:
        """The guided denoised image, with shape (B, \\*).

        Args:
            stock: ComfyUI's own evaluation.
            x: The sampler's latents, with shape (B, \\*).
            timestep: ComfyUI's sigma of every sample, with shape (B,).
            options, seed: What the sampler hands on.
        """
        step = self._begin(x, timestep)
        if self.run.all_skipped:
            return step.reused.to(x.dtype)
        others = list(options.get(POST, []))
        position = min(self.position, len(others))
        combines = self.combines or self.guidance.combines(self.run.decisions)
        step.whole = combines and (position > 0 or CFG_FUNCTION in options)
        step.before = options.get(CALC)
        own = {CALC: step.branches, POST: [*others[:position], step.combine, *others[position:]]}
        denoised = stock(x, timestep, {**options, **own}, seed)
        if not step.done:
            raise SamplingError(OWN_BRANCHES.format(type(self.guider).__name__, self.guidance))
        return step.end(denoised)

    def _begin(self, x: Tensor, timestep: Tensor) -> Evaluation:
        index, sigmas = self.run.step.index + 1, self.rehearsal.sigmas
        sigma = float(timestep.flatten()[0])
        planned = sigmas[index] if index < len(sigmas) else math.inf
        if self.depends and not math.isclose(sigma, planned, rel_tol=1e-4):
            raise SamplingError(
                f"evaluation {index} of the sampler is at sigma {sigma:.4g}, a rehearsal had "
                f"{planned:.4g}: '{self.guidance}' needs a sampler whose steps are known beforehand"
            )
        later = (*sigmas[1:], self.rehearsal.last)[index] if index < len(sigmas) else sigma
        level, x_t = self.levels.level(sigma), self.levels.network_input(x, timestep)
        self.run.plan(x_t, level, self.levels.level(later))
        reused = level.to_x0(self.run.reused(x_t), x_t) if self.run.skipped else x
        return Evaluation(self.run, level, x_t, reused)

    def _check(self) -> bool:
        """Refuse what does not go with this sampler, before its first evaluation.

        Returns:
            Whether predictions may be combined otherwise than ComfyUI does it.
        """
        guidance, rehearsal = self.guidance, self.rehearsal
        if self.depends and rehearsal.unknown:
            raise SamplingError(
                f"'{guidance}' needs the number of evaluations, and that of this sampler is not "
                f"known beforehand: {rehearsal.unknown}"
            )
        decisions = guidance.policy.decisions(self.total) or ()
        if rehearsal.reads_uncond and any(d.skips for d in decisions):
            raise SamplingError(
                f"'{guidance}' skips evaluations, and this sampler (CFG++) reads the unconditional "
                "prediction of every one: use another sampler, or a policy without skipped steps"
            )
        if guidance.rule.needs_next_level and not rehearsal.is_euler:
            raise SamplingError(
                f"'{guidance.rule}' is for Euler steps without added noise, and this sampler makes "
                "others: use euler or ddim"
            )
        return guidance.combines(decisions)


class Evaluation:
    """One evaluation, from the plan to the guided image.

    Args:
        run: Whose step has been planned.
        level: Noise level of the network's input.
        x_t: The network's input, with shape (B, \\*).
        reused: Denoised images of skipped samples, with shape (B, \\*).

    Attributes:
        whole: Whether the rule acts on the whole update that other nodes have made so far, and
            not on the two branches.
        before: Another node's ``sampler_calc_cond_batch_function``.
        done: Whether the predictions have been combined.
    """

    def __init__(self, run: Run, level: NoiseLevel, x_t: Tensor, reused: Tensor) -> None:
        self.run, self.level, self.x_t, self.reused = run, level, x_t, reused
        self.whole, self.done, self.guides = False, False, False
        self.before: Any = None
        self.evaluated = False
        self.both: list[int] = []  # samples whose unconditional branch has been evaluated

    def branches(self, args: Mapping[str, Any]) -> list[Tensor]:
        """ComfyUI's branches, each with shape (B, \\*), as far as they are wanted.

        The unconditional one of samples that do not want it is the conditional one.
        """
        run, branches = self.run, Branches(args, self.before)
        self.evaluated, self.guides = True, branches.guides
        if not self.guides:
            return self._with_reused(branches.evaluate([True] + [False] * (len(args["conds"]) - 1)))
        self.both = run.rows
        if len(run.rows) == run.batch:
            return branches.evaluate([True, True])
        if not run.rows and not run.skipped:
            cond, _ = branches.evaluate([True, False])
            return [cond, cond]
        if not branches.divisible:
            self.both = run.every
            cond, uncond = self._with_reused(branches.evaluate([True, True]))
            index = row_index(run.rows, cond.device)
            return [cond, cond.index_copy(0, index, uncond[index])]
        active = [row for row in run.every if row not in run.skipped]
        cond, _ = branches.evaluate([True, False], active if run.skipped else None)
        if run.skipped:
            cond = self.reused.to(cond.dtype).index_copy(0, row_index(active, cond.device), cond)
        if not run.rows:
            return [cond, cond]
        _, uncond = branches.evaluate([False, True], run.rows)
        return [cond, cond.index_copy(0, row_index(run.rows, cond.device), uncond)]

    def combine(self, args: Mapping[str, Any]) -> Tensor:
        """Take the place of what has been made of the branches so far, with shape (B, \\*)."""
        denoised, w, run = args["denoised"], args["cond_scale"], self.run
        if not self.evaluated:  # by a guider that goes other ways
            return denoised
        self.done = True
        self.guides = self.guides and not math.isclose(w, 1)
        if not self.guides:
            return denoised
        cond, uncond = args["cond_denoised"], args["uncond_denoised"]
        if self.whole:  # the other nodes' update as that of one unconditional prediction
            uncond = cond - (denoised - cond) / (w - 1)
        index = row_index(run.rows, cond.device) if len(run.rows) < run.batch else None
        wanted = uncond if index is None else uncond[index]
        own, guided_rows = self._native(denoised), run.now.guided
        guided = run.combine(
            self._native(cond),
            self._native(wanted, index) if run.rows else None,
            w,
            self.x_t,
            own=own,
        )
        if guided is own or not guided_rows:
            return denoised
        result = self.level.to_x0(guided, self.x_t).to(denoised.dtype)
        if len(guided_rows) == run.batch:
            return result
        rows = row_index(guided_rows, result.device)
        return denoised.index_copy(0, rows, result[rows])

    def end(self, denoised: Tensor) -> Tensor:
        """The end of the evaluation: what later ones reuse is what all nodes made of it together.

        Args:
            denoised: ComfyUI's result, with shape (B, \\*).
        """
        run = self.run
        (denoised,) = self._with_reused([denoised])
        if not self.guides:
            run.unguided(self._native(denoised), self.x_t)
        elif ("guided", run.step.index) in run.kept:
            in_x0 = run.guidance.policy.space == "x0"
            kept = denoised.clone() if in_x0 else self._native(denoised)
            run.kept["guided", run.step.index] = kept
        record = run.trace.steps[-1]
        record.unused = [row for row in self.both if row not in record.rows]
        return denoised

    def _native(self, denoised: Tensor, index: Tensor | None = None) -> Tensor:
        """The network's output behind a denoised image, of the samples `index` or all."""
        x_t = self.x_t if index is None else self.x_t[index]
        return self.level.from_x0(denoised, x_t)

    def _with_reused(self, images: list[Tensor]) -> list[Tensor]:
        """Denoised images, those of skipped samples replaced by what is reused."""
        if not self.run.skipped:
            return images
        index = row_index(self.run.skipped, self.reused.device)
        return [i.index_copy(0, index, self.reused[index].to(i.dtype)) for i in images]


def _depends_on_length(guidance: Guidance) -> bool:
    """Whether what is evaluated depends on how many evaluations a run makes."""
    choices = []
    for total in (20, 21):
        try:
            choices.append(guidance.policy.decisions(total))
        except ValueError:  # made for another number
            return True
    return choices[0] is None or choices[0] != choices[1]
