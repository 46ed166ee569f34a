"""Guidance for modular pipelines: the same rules and policies as a guider component of diffusers.

    pipe.update_components(guider=Guider("apg", guidance_scale=15).bind(pipe))

A guider is told of a step, makes one set of conditions per pass, and combines the predictions. It
sees neither what its pipeline makes of that nor the noise level, which rules on denoised images
need. So it combines as plain guidance does, and where the scheduler of the bound pipeline is to
step, the guided prediction takes the place of that combination, as in every pipeline behind the
seam: what the blocks do in between is learned at the first guided step and looked at at every one.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import torch
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from diffusers.modular_pipelines.modular_pipeline import BlockState, ModularPipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from ..guidance import Guidance, Policy, Rule, Run, Trace, resolve
from ..guidance.device import on_host, row_index
from ..guidance.prediction import accumulate
from ..guidance.rules.cfg import cfg
from ..guidance.saved import from_dict, to_dict
from .families import resolve_for
from .guided import positive_scale
from .seam.driver import ROUNDING, Driver
from .seam.filling import Made, Wanted, made_of
from .seam.hooks import check_caches
from .seam.layouts import LayoutError
from .seam.learning import learn
from .seam.noise_levels import check_guidance, knows_levels, noise_level
from .seam.patch import attached
from .seam.patterns import PARTS, Norm, Part, Pattern, branches_of, normed, sample_of
from .seam.support import guiders_of, layout_of

NOT_THE_SCHEDULER = (
    "the scheduler of the pipeline this guider is bound to is not the one that runs: bind it to "
    "the pipeline it is a component of"
)

NO_SKIPPING = (
    "'{}' skips steps, which a modular pipeline cannot: use the ordinary pipeline, or a schedule "
    "without forecasts"
)


class Guider(BaseGuidance):
    r"""A guidance rule and policy as the ``guider`` component of a pipeline that has one.

    Args:
        guidance: A name ("cfg", "apg", "apg+ag"), a rule, a policy, or both
            (``APG() | AdaptiveGuidance()``); also what ``config["guidance"]`` holds.
        guidance_scale: w; 1 means no guidance, as for `ClassifierFreeGuidance` (whose
            ``use_original_formulation`` counts from 0 instead). May be set later.
        enabled: False leaves the conditional prediction alone.
        detailed_trace: Record cosines and norms of the predictions at every step.

    Everything but plain "cfg" has to know its pipeline: see `bind`. What `forward` returns is plain
    guidance; the guided prediction takes its place in the ``step`` of the pipeline's scheduler that
    follows. Such a pipeline evaluates whole batches, so the unconditional pass is left out once no
    sample wants it. Guidance lasts for every network evaluation, also of second-order schedulers.

    Raises:
        ValueError: unknown name or setting, or a scale at which there is nothing to guide.
        TypeError: `guidance` is none of the above.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]  # type: ignore[assignment]  # None there

    def __init__(
        self,
        guidance: str | Rule | Policy | Guidance | dict[str, Any] = "cfg",
        guidance_scale: float = 7.5,
        enabled: bool = True,
        detailed_trace: bool = False,
    ) -> None:
        super().__init__(enabled=enabled)
        self._given = from_dict(guidance) if isinstance(guidance, dict) else guidance
        self.guidance = resolve(self._given)
        self.detailed_trace = detailed_trace
        self.register_to_config(
            guidance=_to_config(self._given), enabled=enabled, detailed_trace=detailed_trace
        )
        self.guidance_scale = guidance_scale
        self._pipe: weakref.ref[DiffusionPipeline] | None = None
        self._shared = _Shared()
        self._run: Run | None = None  # of the step now begun, its passes and samples guided
        self._passes, self._follows = 0, False
        self._rows: list[int] = []

    @property
    def guidance_scale(self) -> float:
        """w; 1 means no guidance."""
        return self.config["guidance_scale"]

    @guidance_scale.setter
    def guidance_scale(self, scale: float) -> None:
        scale = positive_scale("guidance_scale", scale)
        if scale <= 1 and not self.guidance.is_plain:
            raise ValueError(
                f"guidance_scale={scale} switches guidance off, so that '{self.guidance}' has "
                "nothing to act on: use guidance_scale > 1, or disable()"
            )
        self.register_to_config(guidance_scale=scale)

    @property
    def guidance_trace(self) -> Trace | None:
        """What the last run did; None before the first. Its rows are the samples guided.

        Where a video is made piece by piece, every piece is a run. Whole batches are evaluated: see
        `passes` for what that cost.
        """
        return self._shared.trace

    @property
    def passes(self) -> int:
        """Passes of a batch through the network in the last run, 1 or 2 a step."""
        return self._shared.passes

    def bind(self, pipe: Any) -> Guider:
        """Tell the guider its pipeline, whose scheduler and model family it needs.

        Args:
            pipe: The pipeline that this guider is, or will be, a component of. Its scheduler may be
                exchanged at any time. Only a weak reference is kept.

        Returns:
            The guider itself.

        Raises:
            LayoutError: the pipeline has no guider among its components.
        """
        if not guiders_of(pipe):
            instead = "" if isinstance(pipe, ModularPipeline) else ": use pilotage.pipelines.guided"
            raise LayoutError(f"{type(pipe).__name__} has no guider among its components{instead}")
        self._pipe = weakref.ref(pipe)
        self.guidance = resolve_for(pipe, self._given)
        if self.guidance.rule.needs_next_level:
            raise ValueError(
                f"'{self.guidance.rule}' needs a solver without added noise, which a guider cannot "
                "check: use it with guided(pipeline)"
            )
        if self.guidance.policy.identities:
            raise ValueError(
                f"'{self.guidance}' was fitted for one model, scheduler and negative prompt, which "
                "a guider cannot check: use it with guided(pipeline)"
            )
        return self

    def partner(self, guidance_scale: float) -> Guider:
        """A guider of another scale that takes part in the same runs.

        For the second network of Wan 2.2: ``update_components(guider=g, guider_2=g.partner(3.0))``;
        or for the sound of LTX-2: ``update_components(guider=g, audio_guider=g.partner(7.0))``,
        which is guided plainly at the steps and for the samples at which the video is guided.
        """
        partner = self.new(guidance_scale=guidance_scale)
        partner._shared = self._shared
        return partner

    def new(self, **kwargs: Any) -> Guider:
        """A copy for other runs, bound to the same pipeline; `kwargs` override its arguments."""
        settings = {name: self.config[name] for name in ("guidance_scale", "enabled")}
        settings |= {"guidance": self._given, "detailed_trace": self.detailed_trace}
        copy = type(self)(**(settings | kwargs))
        pipe = None if self._pipe is None else self._pipe()
        return copy if pipe is None else copy.bind(pipe)

    def save_config(self, *args: Any, **kwargs: Any) -> None:
        """See `ConfigMixin`; ValueError if the rule or policy could not be loaded again."""
        to_dict(self.guidance)
        super().save_config(*args, **kwargs)

    def prepare_inputs(self, data: Any) -> list[BlockState]:
        """Begin a step: the conditions of each pass, the conditional one first.

        Args:
            data: Name -> tensor for every pass, or tuple (conditional, unconditional).
        """
        return self._begin_step(lambda *which: self._prepare_batch(data, *which))

    def prepare_inputs_from_block_state(
        self, data: BlockState, input_fields: dict[str, str | tuple[str, str]]
    ) -> list[BlockState]:
        """The same, from names of fields of a block state."""
        return self._begin_step(
            lambda *which: self._prepare_batch_from_block_state(input_fields, data, *which)
        )

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        """Before a pass: look at the network once a run."""
        super().prepare_models(denoiser)
        if self._shared.loop is not None:
            self._shared.loop.check_network(denoiser)

    def __call__(self, data: list[BlockState]) -> GuiderOutput:
        """End a step: combine the predictions of its passes."""
        return self.forward(
            **{getattr(d, self._identifier_key): d.as_dict()["noise_pred"] for d in data}
        )

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """End the step that `prepare_inputs` began.

        Args:
            pred_cond: Conditional prediction, with shape (B, \\*) (or that of the only sample).
            pred_uncond: Unconditional prediction, likewise; None if it was not wanted.

        Returns:
            What plain guidance makes of them, in their shape and the dtype of `pred_cond`, and its
            inputs. Samples that want no guidance have their conditional prediction.

        Raises:
            LayoutError: no step was begun, or the predictions do not fit it.
            NonFinitePredictionError: a prediction is NaN or infinite.
        """
        shared, run, passes = self._shared, self._run, self._passes
        self._run, self._passes = None, 0
        if run is None:
            raise LayoutError("a guider's predictions came before its prepare_inputs")
        preds = [pred for pred in (pred_cond, pred_uncond) if pred is not None]
        single = run.batch == 1 and len(pred_cond) != 1  # no axis of samples
        made = [pred[None] for pred in preds] if single else preds
        if len(made) != passes or any(len(pred) != run.batch for pred in made):
            raise LayoutError(
                f"expected {passes} predictions of {run.batch} samples, got shapes "
                f"{[tuple(pred.shape) for pred in preds]}"
            )
        cond, scale, rows = made[0], self.guidance_scale, self._rows
        if len(made) > 1 and len(rows) < run.batch:
            index = row_index(rows, cond.device)
            made[1] = cond.index_copy(0, index, made[1][index])
        elif not self._follows and shared.loop and any(d.estimates for d in run.decisions):
            made = [cond, *shared.loop.last_predictions[1:]]
        pred = cfg(cond, made[1], scale) if len(made) > 1 else cond
        if self._follows:
            pass
        elif shared.loop is not None:
            shared.hand_over(made, None if self.num_conditions == 1 else pred, scale)
        else:
            if self.num_conditions == 1:
                run.unguided(pred, pred)
            else:
                run.combine(cond, made[1], scale, cond, own=pred)
            shared.end_step()
        return GuiderOutput(
            pred=pred[0] if single else pred, pred_cond=pred_cond, pred_uncond=pred_uncond
        )

    @property
    def is_conditional(self) -> bool:
        """Whether the pass now prepared is the conditional one."""
        return self._count_prepared == 1

    @property
    def num_conditions(self) -> int:
        """2 if this guider guides at all: the conditions that text encoders have to provide.

        How many passes a step makes, the run decides in `prepare_inputs`.
        """
        return 2 if self._enabled and self.guidance_scale != 1 else 1

    @property
    def _is_free(self) -> bool:
        """Whether neither noise level nor network input are needed, hence no pipeline."""
        return self.guidance.is_plain and not self.detailed_trace

    def active_predictions(self) -> list[str]:
        """Names of the predictions that the step now begun combines (LTX-2 asks)."""
        return self._input_predictions[: self._passes]

    @property
    def spatio_temporal_guidance_blocks(self) -> None:
        """No blocks of the network are perturbed (LTX-2 asks, for its audio guider as well)."""
        pipe = None if self._pipe is None else self._pipe()
        if pipe is None:
            raise LayoutError("LTX-2 needs a guider that knows it: guider.bind(pipe)")
        if getattr(getattr(pipe, "audio_guider", None), "stg_scale", 0):
            raise LayoutError(
                "the audio guider wants spatio-temporal guidance, whose blocks a Guider does not "
                "name: give it stg_scale=0"
            )
        return None

    def _bound_pipe(self) -> DiffusionPipeline | None:
        pipe = None if self._pipe is None else self._pipe()
        if pipe is None and not self._is_free:
            raise LayoutError(
                f"'{self.guidance}' needs the scheduler of its pipeline: "
                "pipe.update_components(guider=guider.bind(pipe))"
            )
        return pipe

    def _begin_step(self, make_batch: Callable[[int, str], BlockState]) -> list[BlockState]:
        cond = make_batch(0, self._input_predictions[0])
        pipe, shared, step = self._bound_pipe(), self._shared, self._step
        if step is None:
            raise LayoutError("a guider's prepare_inputs came before set_state")
        shared.attached.close()  # if a step before was never taken
        leader = shared.leader
        # Of one step if they were told of the very same timestep.
        self._follows = leader not in (None, self) and leader._timestep is self._timestep
        if self._follows and shared.run is not None:
            return self._batches(shared.run, cond, make_batch)
        if step == 0 or (self._is_free and step != shared.next_step):
            scheduler = None if pipe is None else pipe.scheduler
            batch, device = _batch_of(cond)
            total = _evaluations(scheduler, self._timestep) or self._num_inference_steps
            decisions = self.guidance.policy.decisions(total) or ()
            if any(decision.skips for decision in decisions):
                raise ValueError(NO_SKIPPING.format(self.guidance))
            if self._is_free:
                run = Run(self.guidance, batch, total, on_host(device))
                shared.begin(run, scheduler)
            else:
                check_guidance(self.guidance, scheduler, self.detailed_trace, eta=0.0)
                asked = self._given if isinstance(self._given, str) else str(self.guidance)
                loop = _Loop(pipe, self.guidance, asked, self.detailed_trace)
                loop.run = loop.new_run(batch, total, device)
                shared.begin(loop.run, scheduler, loop)
        run, shared.leader = shared.begin_step(step), self
        if shared.loop is None:
            run.plan()
        else:
            shared.loop.begin(run, self._timestep)
        if run.skipped:
            raise ValueError(NO_SKIPPING.format(self.guidance))
        batches = self._batches(run, cond, make_batch)
        shared.passes += self._passes
        return batches

    def _batches(
        self, run: Run, cond: BlockState, make_batch: Callable[[int, str], BlockState]
    ) -> list[BlockState]:
        self._run, self._rows = run, run.rows
        self._passes = 2 if self._rows and self.num_conditions == 2 else 1
        return [cond, *(make_batch(1, name) for name in self.active_predictions()[1:])]


class _Loop(Driver):
    """The seam behind a guider, whose passes are the conditional branch and the other.

    Their combination is known: what the blocks hand the scheduler is compared with it.

    Attributes:
        own: What plain guidance made of this step's branches at `w`; None: the guider of this
            step does not guide.
        denoised: The part of the predictions that is guided, if the blocks convert them to denoised
            images before the guider has them, and back afterwards; None if they do not.
        share: Of x_t in such a conversion.
        stepped: What the scheduler steps, as far as it may be guided.
        checked_network: The network last seen.
    """

    def __init__(self, pipe: Any, guidance: Guidance, asked: str, detailed: bool) -> None:
        layout = replace(layout_of(type(pipe)), main=0)
        super().__init__(pipe, guidance, layout, asked, {}, detailed)
        self.pattern, self.checked_network = None, None
        self.w = self.share = 1.0
        self.own: Made | None = None
        self.denoised: Part | None = None
        self.stepped = self.sample

    @property
    def last_predictions(self) -> list[Tensor]:
        """What the branches of the step before were given."""
        return [made.prediction for made in self.last]

    def begin(self, run: Run, timestep: Tensor) -> None:
        """Plan a step of the run."""
        run.plan(None, *self.levels(timestep))
        every, estimates = list(range(run.batch)), any(d.estimates for d in run.decisions)
        if estimates:
            self.check_others()
        self.wanted = Wanted(Pattern((1, 1)), run.batch, every, run.rows, estimates, run.decisions)

    def check_network(self, network: Any) -> None:
        """Refuse caches within the network that this guidance would mislead."""
        run = self.run
        if run is not None and network is not self.checked_network:
            decisions = self.guidance.policy.decisions(run.total)
            check_caches([network], self.guidance, self.asked, Pattern((1, 1)), 1, decisions)
            self.checked_network = network

    def end_step(self, made: list[Made], mixed: Tensor, sample: Tensor) -> Tensor:
        """What the scheduler is to step instead of `mixed`."""
        run, part = self.run, self.part_of(mixed, sample)
        assert run is not None
        if len(part) != run.batch:
            raise LayoutError(self.irregular(f"steps {len(part)} samples of {run.batch}"))
        self.stepped = part
        if self.own is not None and len(made) == 2:
            if self.pattern is None or self.pattern.alike:
                self.pattern = self.learned_of_blocks(made, part, sample)
            return super().end_step(self.native(made), mixed, sample)
        x_t = self.network_input(sample, part)
        if self.own is None:
            run.unguided(part, x_t)
        else:
            run.combine(part, None, 1.0, x_t)
        return mixed

    def learned(
        self, made: list[Made], calls: tuple[int, ...], part: Tensor, sample: Tensor
    ) -> Pattern:
        """What `end_step` has learned of the predictions as the blocks have them."""
        assert self.pattern is not None
        return self.pattern

    def learned_of_blocks(self, made: list[Made], part: Tensor, sample: Tensor) -> Pattern:
        """What the blocks make of a combination."""
        assert self.own is not None
        calls = (1, 1)
        cond, own = (accumulate(m.prediction) for m in (made[0], self.own))
        eps = torch.finfo(made[0].prediction.dtype).eps
        if bool((own - cond).norm() <= ROUNDING * eps * cond.norm()):
            return Pattern(calls, None, alike=True)  # whatever is made of them, they say nothing
        forms: tuple[Part | None, ...] = (None, *PARTS) if knows_levels(self.scheduler) else (None,)
        for self.denoised in forms:
            seen = [m.prediction for m in self.native([made[0], self.own])]
            for which in PARTS:
                pair = branches_of(seen, Pattern(calls, part=which), part)
                if pair is None:
                    continue
                for norm, sign in itertools.product(get_args(Norm), (1, -1)):
                    cond, own = (sign * branch for branch in pair)
                    if self.left_over(cond, own, part, norm) <= ROUNDING:
                        return Pattern(calls, sign=sign, part=which, norm=norm)
        x_t, plain = self.network_input(sample, part), None
        for self.denoised in forms:  # only some places are guided, or there is a reason
            seen = [m.prediction for m in self.native(made)]
            found = learn(seen, part, calls, self.layout, x_t, None)
            if found is None and self.denoised is None:
                return Pattern(calls, None, alike=True)
            if found is not None and not found.reason:
                return found
            plain = plain or found
        self.denoised = None
        return plain or Pattern(calls, None, alike=True)

    def left_over(self, cond: Tensor, own: Tensor, stepped: Tensor, norm: Norm) -> float | Tensor:
        """How far what is stepped is from the combination, in units of rounding.

        Args:
            cond, own: The conditional prediction and the combination, each with shape (B, \\*).
            stepped: What reached the scheduler, with shape (B, \\*).
            norm: What becomes of the norms of tokens.
        """
        assert self.own is not None
        eps = max(torch.finfo(t.dtype).eps for t in (self.own.prediction, stepped))
        expected, found = (accumulate(sample_of(t)) for t in (normed(own, cond, norm), stepped))
        size = found.norm()
        if self.denoised is not None:  # a difference of what may be much larger
            size = size + self.share * accumulate(sample_of(self.sample)).norm()
        left = (found - expected).norm() / (eps * size)
        return float(left) if on_host(left.device) else left

    def pair(
        self, run: Run, pattern: Pattern, branches: list[Tensor], part: Tensor
    ) -> tuple[Tensor, Tensor, float | Tensor]:
        """Both predictions as the scheduler steps them, with shape (B, \\*), and the scale."""
        assert self.own is not None
        cond, uncond = branches
        own = [m.prediction for m in self.native([self.own])]
        seen = branches_of(own, replace(pattern, calls=(1,)), self.stepped)
        if seen is not None and not pattern.reason:
            left = self.left_over(cond, pattern.sign * seen[0], part, pattern.norm)
            self.look(run, self.w, left)
        return cond, uncond, self.w

    def native(self, made: list[Made]) -> list[Made]:
        """Predictions as the scheduler has them, each with shape (B, \\*)."""
        if self.denoised is None:
            return made
        calls = Pattern((1,) * len(made), part=self.denoised)
        branches = branches_of([m.prediction for m in made], calls, self.stepped)
        if branches is None:
            return made
        level = noise_level(self.scheduler, self.scheduler_timestep)
        of_x, of_prediction = map(float, level.coefficients())
        self.share = abs(of_x / of_prediction)
        x_t = self.network_input(self.sample, self.stepped)
        found = [level.from_x0(branch, x_t).to(self.stepped.dtype) for branch in branches]
        return [made_of(len(branch), branch) for branch in found]


class _Shared:
    """The run that a guider and its partners share, and how far it is."""

    def __init__(self) -> None:
        self.run: Run | None = None
        self.loop: _Loop | None = None  # None: plain guidance
        self.leader: Guider | None = None  # whose the step now begun is
        self.trace: Trace | None = None
        self.scheduler: Any = None
        self.passes = self.next_step = 0
        self.attached = contextlib.ExitStack()  # until the scheduler steps

    def begin(self, run: Run, scheduler: Any, loop: _Loop | None = None) -> None:
        """Drop what is left of an earlier run; without `scheduler`, there may be more steps."""
        self.attached.close()
        self.run, self.loop, self.trace, self.scheduler = run, loop, run.trace, scheduler
        self.passes, self.next_step, self.leader = 0, 0, None

    def begin_step(self, step: int) -> Run:
        """The run, once it is sure that a step follows the last one and that was guided."""
        if self.run is None or step != self.next_step:
            raise LayoutError(
                f"step {step} came where step {self.next_step if self.run else 0} was expected: a "
                "run begins at step 0 and visits every step once. The second guider of a pipeline "
                "has to be a partner of the first: guider_2=guider.partner(guidance_scale)"
            )
        if self.loop is not None and self.loop.made:  # the last step went past it
            raise LayoutError(NOT_THE_SCHEDULER)
        self.next_step = step + 1
        return self.run

    def hand_over(self, made: list[Tensor], own: Tensor | None, scale: float) -> None:
        """Have the step that the scheduler takes next guided.

        Args:
            made: The predictions of the passes, each with shape (B, \\*).
            own: What plain guidance at `scale` makes of them, with shape (B, \\*); None: the step
                is not to be guided.
            scale: w.
        """
        loop = self.loop
        assert loop is not None
        loop.made = [made_of(len(pred), pred) for pred in made]
        loop.own, loop.w = None if own is None else made_of(len(own), own), scale
        self.attached.enter_context(attached(loop.pipe, (), loop, self.step))

    def step(self, stock: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Take the place of ``scheduler.step(*args, **kwargs)``, once."""
        self.attached.close()
        assert self.loop is not None
        result = self.loop.step(stock, args, kwargs)
        self.end_step()
        return result

    def end_step(self) -> None:
        """Finish and drop the run after its last step.

        Without a scheduler there may be more to come, but such a run holds nothing to get rid of.
        """
        self.leader = None
        if self.run is not None and self.next_step >= self.run.total:
            self.run.finish() if self.loop is None else self.loop.finish()
            self.loop = None
            self.run = None if self.scheduler is not None else self.run


def _evaluations(scheduler: Any, timestep: Tensor) -> int | None:
    """Number of network evaluations from the first one, at `timestep`, to the last."""
    if scheduler is None:
        return None
    places = (scheduler.timesteps == timestep).nonzero()
    if len(places) == 0:
        raise LayoutError(NOT_THE_SCHEDULER)
    start = getattr(scheduler, "begin_index", None)
    return len(scheduler.timesteps) - (int(places[0]) if start is None else start)


def _batch_of(batch: BlockState) -> tuple[int, torch.device]:
    """Number of samples in the conditions of a pass, and their device."""
    for value in batch.as_dict().values():
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, Tensor) and (first is not value or first.ndim > 0):
            return len(value), first.device
    raise LayoutError("a guider got no conditions to make batches of")


def _to_config(guidance: str | Rule | Policy | Guidance) -> str | dict[str, Any]:
    """A name as it is, objects as dictionaries ready for JSON, or written out if unregistered."""
    if isinstance(guidance, str):
        return guidance
    try:
        return to_dict(resolve(guidance))
    except ValueError:  # `save_config` refuses it
        return str(resolve(guidance))
