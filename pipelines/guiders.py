"""Guidance for modular pipelines: the same rules and policies as a guider component of diffusers.

    pipe.update_components(guider=Guider("apg", guidance_scale=15).bind(pipe))

A guider is told of a step, makes one set of conditions per pass, and combines the predictions. It
sees neither the network's input nor the noise level, which rules on denoised images need: the input
is read where the denoiser is called, the noise level from the scheduler of the bound pipeline.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from diffusers.modular_pipelines.modular_pipeline import BlockState, ModularPipeline
from torch import Tensor

from ..guidance import Guidance, NoiseLevel, Policy, Rule, Run, Trace, resolve
from ..guidance.device import row_index
from ..guidance.rules.cfg import cfg
from ..guidance.saved import from_dict, to_dict
from .families import resolve_for
from .guided import positive_scale
from .seam.layouts import LayoutError
from .seam.noise_levels import check_guidance, noise_level

# Modular pipelines whose guider gets predictions in the scheduler's own convention (Z-Image negates
# its network's output before) of the latents alone -> the argument of the denoiser that holds them.
NETWORK_INPUTS: dict[str, str] = {
    "QwenImageModularPipeline": "hidden_states",
    "StableDiffusion3ModularPipeline": "hidden_states",
    "StableDiffusionXLModularPipeline": "sample",
    "Wan22Image2VideoModularPipeline": "hidden_states",
    "Wan22ModularPipeline": "hidden_states",
    "Wan22VaceModularPipeline": "hidden_states",
    "WanImage2VideoModularPipeline": "hidden_states",
    "WanModularPipeline": "hidden_states",
    "ZImageModularPipeline": "x",
}

NOT_THE_SCHEDULER = (
    "the scheduler of the pipeline this guider is bound to is not the one that runs: bind it to "
    "the pipeline it is a component of"
)

NO_SKIPPING = (
    "'{}' skips steps, which a modular pipeline cannot: use the ordinary pipeline, or a schedule "
    "without forecasts"
)


class Guider(BaseGuidance):
    r"""A guidance rule and policy as the ``guider`` component of a modular pipeline.

    Args:
        guidance: A name ("cfg", "apg", "apg+ag"), a rule, a policy, or both
            (``APG() | AdaptiveGuidance()``); also what ``config["guidance"]`` holds.
        guidance_scale: w; 1 means no guidance, as for `ClassifierFreeGuidance` (whose
            ``use_original_formulation`` counts from 0 instead). May be set later.
        enabled: False leaves the conditional prediction alone.
        detailed_trace: Record cosines and norms of the predictions at every step.

    Everything but plain "cfg" has to know its pipeline: see `bind`. A modular pipeline evaluates
    whole batches, so the unconditional pass is left out once no sample wants it. Guidance lasts for
    every network evaluation, also of second-order schedulers.

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
        self._pipe: weakref.ref[ModularPipeline] | None = None
        self._shared = _Shared()
        self._rows: list[int] | None = None
        self._level: NoiseLevel | None = None
        self._sample: Tensor | list[Tensor] | None = None

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

        Whole batches are evaluated: see `passes` for what that cost.
        """
        return self._shared.trace

    @property
    def passes(self) -> int:
        """Passes of a batch through the network in the last run, 1 or 2 a step."""
        steps = self._shared.trace.steps if self._shared.trace else []
        return sum(2 if step.rows else 1 for step in steps)

    def bind(self, pipe: ModularPipeline) -> Guider:
        """Tell the guider its pipeline, whose scheduler and model family it needs.

        Args:
            pipe: The modular pipeline that this guider is, or will be, a component of. Its
                scheduler may be exchanged at any time. Only a weak reference is kept.

        Returns:
            The guider itself.

        Raises:
            LayoutError: not a modular pipeline whose guider calls are known.
        """
        if not isinstance(pipe, ModularPipeline):
            raise LayoutError(
                f"{type(pipe).__name__} is not a modular pipeline: use pilotage.pipelines.guided"
            )
        known = _input_name(pipe) is not None
        if not (known or self._is_free):
            raise LayoutError(
                f"what {type(pipe).__name__} gives its guider is not known, so only 'cfg' works "
                f"there; known are: {', '.join(NETWORK_INPUTS)}"
            )
        self._pipe = weakref.ref(pipe) if known else None
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

        For the second network of Wan 2.2: ``update_components(guider=g, guider_2=g.partner(3.0))``.
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
        """Before a pass: arrange for the network's input to be read."""
        super().prepare_models(denoiser)
        if self._is_free or not self.is_conditional:
            return
        pipe = self._bound_pipe()
        name = None if pipe is None else _input_name(pipe)

        def read(network: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            handle.remove()
            self._sample = args[0] if args else kwargs[str(name)]

        handle = denoiser.register_forward_pre_hook(read, with_kwargs=True)

    def __call__(self, data: list[BlockState]) -> GuiderOutput:
        """End a step: combine the predictions of its passes."""
        return self.forward(
            **{getattr(d, self._identifier_key): d.as_dict()["noise_pred"] for d in data}
        )

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """The guided prediction of the step that `prepare_inputs` began.

        Args:
            pred_cond: Conditional prediction, with shape (B, \\*), as the scheduler expects it.
            pred_uncond: Unconditional prediction, with shape (B, \\*); None if it was not wanted.

        Returns:
            The guided prediction, with shape (B, \\*) and the dtype of `pred_cond`, and its inputs.

        Raises:
            LayoutError: no step was begun, or the predictions do not fit it.
            NonFinitePredictionError: a prediction is NaN or infinite.
        """
        run, rows = self._shared.run, self._rows
        if run is None or rows is None:
            raise LayoutError("a guider's predictions came before its prepare_inputs")
        if len(pred_cond) != run.batch or (pred_uncond is None) != (not rows):
            raise LayoutError(
                f"expected {2 if rows else 1} predictions of {run.batch} samples, got shapes "
                f"{[tuple(pred.shape) for pred in (pred_cond, pred_uncond) if pred is not None]}"
            )
        x_t = pred_cond if self._is_free else self._network_input(pred_cond)  # free: never read
        kept, own, scale = pred_uncond, None, self.guidance_scale
        if self.num_conditions == 1:
            run.unguided(pred_cond, x_t)
            pred = pred_cond
        else:
            if pred_uncond is not None and len(rows) < run.batch:
                kept = pred_uncond[row_index(rows, pred_uncond.device)]
            elif pred_uncond is not None:
                own = cfg(pred_cond, pred_uncond, scale)
            pred = run.combine(pred_cond, kept, scale, x_t, own=own)
        self._rows = self._level = self._sample = None
        self._shared.end_step()
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

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

    def _bound_pipe(self) -> ModularPipeline | None:
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
        scheduler = None if pipe is None else pipe.scheduler
        needs_level = self.guidance.needs_level or self.detailed_trace
        if step == 0 or (self._is_free and step != shared.next_step):
            if not self._is_free:
                check_guidance(self.guidance, scheduler, self.detailed_trace, eta=0.0)
            batch, on_cpu = _batch_of(cond)
            total = _evaluations(scheduler, self._timestep) or self._num_inference_steps
            decisions = self.guidance.policy.decisions(total) or ()
            if any(decision.skips for decision in decisions):
                raise ValueError(NO_SKIPPING.format(self.guidance))
            new = Run(self.guidance, batch, total, on_cpu, self.detailed_trace)
            shared.begin(new, exact=scheduler is not None)
        run = shared.begin_step(step, scheduler)
        self._level = noise_level(scheduler, self._timestep) if needs_level else None
        rows = run.plan(None, self._level)
        if run.skipped:
            raise ValueError(NO_SKIPPING.format(self.guidance))
        self._rows = rows if self.num_conditions == 2 else []
        return [cond, make_batch(1, self._input_predictions[1])] if self._rows else [cond]

    def _network_input(self, prediction: Tensor) -> Tensor:
        """x_t as the network saw it, in the shape of its prediction."""
        x_t = self._sample
        if isinstance(x_t, (list, tuple)):  # Z-Image: samples of one frame each
            x_t = torch.stack(tuple(x_t)).squeeze(2)
        if x_t is not None:
            x_t = x_t[:, : prediction.shape[1]]  # without masks and reference images
        if x_t is None or x_t.shape != prediction.shape:
            raise LayoutError(
                f"the network's input does not fit its prediction of shape "
                f"{tuple(prediction.shape)}: got {None if x_t is None else tuple(x_t.shape)}"
            )
        return x_t


class _Shared:
    """The run that a guider and its partners share, and how far it is."""

    def __init__(self) -> None:
        self.run: Run | None = None
        self.trace: Trace | None = None
        self.exact = False
        self.next_step = 0
        self.offset: int | None = None

    def begin(self, run: Run, exact: bool) -> None:
        """Drop what is left of an earlier run; `exact` if the new one knows its last step."""
        self.run, self.trace, self.exact = run, run.trace, exact
        self.next_step, self.offset = 0, None

    def begin_step(self, step: int, scheduler: Any) -> Run:
        """The run, once it is sure that a step follows the last one and `scheduler` keeps pace."""
        if self.run is None or step != self.next_step:
            raise LayoutError(
                f"step {step} came where step {self.next_step if self.run else 0} was expected: a "
                "run begins at step 0 and visits every step once. The second guider of a pipeline "
                "has to be a partner of the first: guider_2=guider.partner(guidance_scale)"
            )
        self.next_step = step + 1
        index = getattr(scheduler, "step_index", None)
        if index is not None and self.offset is None:
            self.offset = index - step
        keeps_pace = step == 0 if index is None else index - step == self.offset
        if hasattr(scheduler, "step_index") and not keeps_pace:
            raise LayoutError(NOT_THE_SCHEDULER)
        return self.run

    def end_step(self) -> None:
        """Finish and drop the run after its last step.

        Without a scheduler there may be more to come, but such a run holds nothing to get rid of.
        """
        if self.run is not None and self.next_step >= self.run.total:
            self.run.finish()
            self.run = None if self.exact else self.run


def _input_name(pipe: ModularPipeline) -> str | None:
    """The denoiser's argument with the latents, None if the pipeline is not known."""
    stock = next(base for base in type(pipe).__mro__ if base.__module__.startswith("diffusers."))
    return NETWORK_INPUTS.get(stock.__name__)


def _evaluations(scheduler: Any, timestep: Tensor) -> int | None:
    """Number of network evaluations from the first one, at `timestep`, to the last."""
    if scheduler is None:
        return None
    places = (scheduler.timesteps == timestep).nonzero()
    if len(places) == 0:
        raise LayoutError(NOT_THE_SCHEDULER)
    start = getattr(scheduler, "begin_index", None)
    return len(scheduler.timesteps) - (int(places[0]) if start is None else start)


def _batch_of(batch: BlockState) -> tuple[int, bool]:
    """Number of samples in the conditions of a pass, and whether they are on the CPU."""
    for value in batch.as_dict().values():
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, Tensor) and (first is not value or first.ndim > 0):
            return len(value), first.device.type == "cpu"
    raise LayoutError("a guider got no conditions to make batches of")


def _to_config(guidance: str | Rule | Policy | Guidance) -> str | dict[str, Any]:
    """A name as it is, objects as dictionaries ready for JSON, or written out if unregistered."""
    if isinstance(guidance, str):
        return guidance
    try:
        return to_dict(resolve(guidance))
    except ValueError:  # `save_config` refuses it
        return str(resolve(guidance))
