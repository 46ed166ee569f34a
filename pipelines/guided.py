"""``guided(pipe)`` and the drop-in classes: diffusers pipelines that take ``guidance=``."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines.modular_pipeline import ModularPipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..guidance import Guidance, Policy, Rule, SampleScales, Trace, load_guidance
from .doors import check_reader, custom_class
from .families import resolve_for
from .fitting.fitted import check_identity
from .seam.batched import BatchingDriver
from .seam.driver import Driver
from .seam.exchange import connected
from .seam.layouts import Layout, LayoutError
from .seam.noise_levels import check_guidance
from .seam.parallel import ParallelDriver
from .seam.patch import aside, attached, one_at_a_time, unwrapped
from .seam.patterns import Pattern
from .seam.plain import PlainDriver
from .seam.support import (
    GUIDERS,
    OTHER_SCALES,
    SCALE_ARGUMENTS,
    denoisers_of,
    guiders_of,
    layout_of,
)

GuidanceLike = str | Rule | Policy | Guidance

# Set while from_pipe() builds a pipeline whose modules are to stay as they are.
_KEEP_DTYPE: contextvars.ContextVar[bool] = contextvars.ContextVar("keep_dtype", default=False)

CALL_DOCUMENTATION = """
        guidance (`str`, rule, policy or `Guidance`, *optional*):
            How to guide: a name ("cfg", "apg", "ag", "apg+ag"), a configured object such as
            `APG(eta=0.5) | AdaptiveGuidance(0.999)`, or None for the stock pipeline. Afterwards
            `guidance_trace` of the pipeline tells what was evaluated. With it, the guidance scale
            may be a list or tensor with one scale for every sample.
        detailed_trace (`bool`, *optional*, defaults to `False`):
            Record cosines and norms of the predictions at every step in `guidance_trace`.
        parallel (`str`, *optional*):
            "branches": the processes of `accelerate launch` or `torchrun`, which all make this
            call, share out the branches of every step; all of them get the result.
        batch_branches (`bool`, *optional*, defaults to `False`):
            Evaluate the branches of a step in one call of the network where the pipeline calls it
            once for each.
"""

if TYPE_CHECKING:  # what the mixin is mixed into: a pipeline class of diffusers
    _Stock = DiffusionPipeline
else:
    _Stock = object


class GuidedMixin(_Stock):
    """Adds ``guidance=`` to the call of a diffusers pipeline; everything else stays stock.

    Attributes:
        stock_class: The class of diffusers that it is mixed into.
        guidance_pattern: How it evaluates its branches and combines them, as far as that had to be
            learned by the last call with ``guidance=``.
    """

    stock_class: ClassVar[Any]
    scheduler: Any
    _guidance_trace: Trace | None = None
    guidance_pattern: Pattern | None = None

    @property
    def guidance_trace(self) -> Trace | None:
        """What the last call with ``guidance=`` evaluated; None before the first."""
        return self._guidance_trace

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """See the stock pipeline; a ``custom_pipeline`` comes back guided, too."""
        # diffusers finds the class that a folder names in the package of the one called.
        plain = cls.stock_class is DiffusionPipeline
        load = DiffusionPipeline.from_pretrained if plain else super().from_pretrained
        pipe = load(pretrained_model_name_or_path, **kwargs)
        return pipe if isinstance(pipe, GuidedMixin) else guided(pipe)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """See the stock pipeline; without a dtype asked for, the shared modules keep theirs.

        Stock ``from_pipe`` casts them to float32, in place and so for the first pipeline as well.
        """
        if kwargs.get("custom_pipeline") is not None:
            found: Any = guided_class(custom_class(kwargs))
            return found.from_pipe(pipeline, **kwargs)
        token = _KEEP_DTYPE.set("dtype" not in kwargs and "torch_dtype" not in kwargs)
        try:
            return super().from_pipe(pipeline, **kwargs)
        finally:
            _KEEP_DTYPE.reset(token)

    @property
    def components(self) -> dict[str, Any]:
        """See the stock pipeline; refused to ``from_pipe`` of a class that is not guided."""
        check_reader(self)
        return {name: unwrapped(value) for name, value in super().components.items()}

    def __getstate__(self) -> dict[str, Any]:
        """For copies: nothing of a guided call that the pipeline is in the middle of."""
        return {name: unwrapped(value) for name, value in vars(self).items()}

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """See the stock pipeline."""
        return self if _KEEP_DTYPE.get() else super().to(*args, **kwargs)

    def resolve_guidance(self, guidance: GuidanceLike) -> Guidance:
        """The settings a name stands for on this pipeline.

        A file ``guidance/NAME.json`` in the folder that the pipeline was loaded from comes first,
        then the presets of its model family, then the defaults.
        """
        if isinstance(guidance, str):
            own = guidance_folder(self)
            if own is not None and (own / f"{guidance}.json").is_file():
                return load_guidance(own / f"{guidance}.json")
        return resolve_for(self, guidance)

    def call_guided(
        self,
        stock_call: Callable[..., Any],
        *args: Any,
        guidance: GuidanceLike,
        detailed_trace: bool = False,
        parallel: str | None = None,
        batch_branches: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The stock pipeline's call under a guidance.

        Args:
            stock_call: ``__call__`` of the stock class, or what it wraps (without ``no_grad``, to
                differentiate through a run).
            args, kwargs: Its arguments.
            guidance, detailed_trace, parallel, batch_branches: As of the guided pipeline's call.
        """
        settings = self.resolve_guidance(guidance)
        asked = guidance if isinstance(guidance, str) else str(settings)
        settings, kwargs = scales_of_samples(self, settings, kwargs)
        layout = layout_of(type(self))
        options = _options(self, args, kwargs)
        scales = guider_scales(self)
        if not scales:
            name = scale_argument(type(self))
            scales = {name: options[name]}
        scale, *_ = [
            _checked_scale(type(self), settings, asked, layout, options, name, given)
            for name, given in scales.items()
        ]
        for identity in settings.policy.identities:
            check_identity(self, identity, options, scale + layout.scale_offset)
        loop = loop_of(self)
        eta = options.get("eta") or 0.0
        self._guidance_trace = None
        with one_at_a_time(loop), plain_guiders(self, settings):
            check_guidance(settings, loop.scheduler, detailed_trace, eta)
            plain = settings.is_plain and not detailed_trace
            driver = _driver(plain, parallel, batch_branches)(
                loop, settings, layout, asked, options, detailed_trace
            )
            try:
                with attached(loop, denoisers_of(loop, layout), driver, driver.step):
                    output = stock_call(self, *args, **kwargs)
                driver.finish()
            finally:
                self.guidance_pattern = driver.pattern
                if driver.run is not None:
                    self._guidance_trace = driver.run.trace
        return output


def _driver(plain: bool, parallel: str | None, batched: bool) -> Callable[..., Driver]:
    """What makes the driver of a call; `plain`: the pipeline's guidance is only counted."""
    if parallel is None:
        return BatchingDriver if batched else PlainDriver if plain else Driver
    if parallel != "branches":
        raise ValueError(f"parallel is 'branches' or None, got {parallel!r}")
    if batched:
        raise ValueError("batch_branches=True is for one process, parallel= for several")
    return functools.partial(ParallelDriver, connected())


def guidance_folder(pipe: Any) -> Path | None:
    """Where a pipeline loaded from a folder keeps its own settings; the folder may not exist."""
    loaded_from = getattr(pipe.config, "_name_or_path", None)
    return Path(loaded_from) / "guidance" if loaded_from and Path(loaded_from).is_dir() else None


def loop_of(pipe: Any) -> Any:
    """The pipeline whose loop a pipeline's call runs: itself, or one that it is made of."""
    inner = layout_of(type(pipe)).inner
    return getattr(pipe, inner) if inner else pipe


def _parameters(pipeline_class: type) -> dict[str, inspect.Parameter]:
    """Arguments of a pipeline's call, and of those of bases that ``**kwargs`` may be passed to."""
    found: dict[str, inspect.Parameter] = {}
    for base in pipeline_class.__mro__:
        call = vars(base).get("__call__")
        if call is None or issubclass(base, GuidedMixin):
            continue
        own = inspect.signature(call).parameters
        found = {**own, **found}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values()):
            break
    return found


def _options(pipe: GuidedMixin, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name, defaults included."""
    bound = inspect.signature(pipe.stock_class.__call__).bind(pipe, *args, **kwargs)
    parameters = _parameters(type(pipe)).items()
    defaults = {name: p.default for name, p in parameters if p.default is not p.empty}
    given = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    return defaults | given


def scale_argument(pipeline_class: type) -> str:
    """Name of the argument of a pipeline's call for the guidance scale, else LayoutError."""
    parameters = _parameters(pipeline_class)
    known = layout_of(pipeline_class).scale
    found = [name for name in ((known,) if known else SCALE_ARGUMENTS) if name in parameters]
    if not found:
        parts = [name for name in GUIDERS if name in inspect.signature(pipeline_class).parameters]
        if parts:
            raise LayoutError(
                f"the call of {pipeline_class.__name__} takes no scale: set "
                f"pipe.{parts[0]}.guidance_scale"
            )
        raise LayoutError(
            f"{pipeline_class.__name__} has no classifier-free guidance: its call takes none of "
            f"{', '.join(SCALE_ARGUMENTS)}"
        )
    return found[0]


def scales_of_samples(
    pipe: Any, guidance: Guidance, kwargs: dict[str, Any]
) -> tuple[Guidance, dict[str, Any]]:
    """The guidance and the arguments of a call that has a scale for every sample.

    The pipeline is given the highest one, and the policy every sample's share of it.

    Raises:
        ValueError: a scale is below no guidance, or all of them are none.
    """
    known = layout_of(type(pipe)).scale
    named = [name for name in ((known,) if known else SCALE_ARGUMENTS) if name in kwargs]
    values = kwargs[named[0]] if named else None
    if isinstance(values, torch.Tensor) and values.ndim:
        values = values.flatten().tolist()
    if not isinstance(values, (list, tuple)) or named[0] != scale_argument(type(pipe)):
        return guidance, kwargs
    name, offset = named[0], layout_of(type(pipe)).scale_offset
    strengths = [finite_number(name, value) + offset - 1 for value in values]
    if not strengths or min(strengths) < 0 or max(strengths) == 0:
        raise ValueError(
            f"{name} as a list has a scale >= {1 - offset:g} (no guidance) for every sample and at "
            f"least one above; got {list(values)}"
        )
    highest = max(strengths)
    policy = SampleScales(tuple(s / highest for s in strengths), guidance.policy)
    return Guidance(guidance.rule, policy), kwargs | {name: highest + 1 - offset}


def scale_option(pipe: DiffusionPipeline, guidance_scale: float) -> dict[str, float]:
    """The argument with which a call guides at w = `guidance_scale`; 1 is no guidance."""
    pipeline_class = type(pipe)
    offset = layout_of(pipeline_class).scale_offset
    return {scale_argument(pipeline_class): guidance_scale - offset}


def guider_scales(pipe: Any) -> dict[str, float]:
    """The scales of a pipeline's guiders, with which w = 1 is no guidance, by where they are."""
    guiders = {name: getattr(pipe, name) for name in guiders_of(pipe)}
    return {
        f"{name}.guidance_scale": guider.guidance_scale + _offset(guider)
        for name, guider in guiders.items()
        if guider is not None
    }


def _offset(guider: Any) -> float:
    """What the scale of a guider lacks to w."""
    return float(getattr(guider, "use_original_formulation", False))


@contextlib.contextmanager
def plain_guiders(pipe: Any, guidance: Guidance) -> Iterator[None]:
    """Exchange a pipeline's guiders for plain guidance at their scales, which `guidance` acts on.

    Those that are switched off, and plain `guidance`, leave them alone. At the end what is still
    ours is taken away again.
    """
    own, exchanged = pipe.__dict__, {}
    for name in () if guidance.is_plain else guiders_of(pipe):
        guider = own[name]
        if guider is not None and guider._enabled:
            scale = guider.guidance_scale + _offset(guider)
            exchanged[name] = guider, ClassifierFreeGuidance(guidance_scale=scale)
    own.update({name: plain for name, (_, plain) in exchanged.items()})
    try:
        yield
    finally:
        for name, (guider, plain) in exchanged.items():
            if own.get(name) is plain:
                own[name] = guider


def _checked_scale(
    pipeline_class: type,
    guidance: Guidance,
    asked: str,
    layout: Layout,
    options: dict[str, Any],
    name: str,
    given: Any,
) -> float:
    """The scale of a call, if it and the other options leave the guidance something to do."""
    if guidance.is_plain:  # whatever the stock pipeline makes of it
        return given
    if guidance.policy_alone:
        return finite_number(name, given)
    scale = positive_scale(name, given, layout.scale_offset)
    if not guidance.keeps_combination:
        layout.check_options(options, asked, combines=True)
    if any(options[key] > off for key, off in OTHER_SCALES.items() if options.get(key)):
        return scale
    nothing = f"so that '{asked}' has nothing to act on: use"
    if scale + layout.scale_offset <= 1:
        raise ValueError(
            f"{name}={scale} switches guidance off, {nothing} {name} > 1, or guidance=None"
        )
    negatives = [options.get(key) for key in ("negative_prompt", "negative_prompt_embeds")]
    if name == "true_cfg_scale" and all(value is None for value in negatives):
        raise ValueError(
            f"without a negative prompt {pipeline_class.__name__} evaluates one branch, {nothing} "
            "negative_prompt='', or guidance=None"
        )
    return scale


def positive_scale(name: str, scale: Any, offset: float = 0.0) -> float:
    """A guidance scale as a number; ValueError unless it is finite and w = scale + offset > 0."""
    number = finite_number(name, scale)
    if number + offset <= 0:
        raise ValueError(
            f"{name} must be > {0 - offset:g} ({1 - offset:g} is no guidance), got {scale}"
        )
    return number


def finite_number(name: str, value: Any) -> float:
    """An argument as a number; ValueError unless it is one, and finite."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


@functools.cache
def guided_class(pipeline_class: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    """The guided subclass of a diffusers pipeline class, of the same name."""
    if issubclass(pipeline_class, GuidedMixin):
        return pipeline_class
    stock_call: Any = pipeline_class.__call__

    @functools.wraps(stock_call)
    def call(
        self: GuidedMixin,
        *args: Any,
        guidance: GuidanceLike | None = None,
        detailed_trace: bool = False,
        parallel: str | None = None,
        batch_branches: bool = False,
        **kwargs: Any,
    ) -> Any:
        if guidance is None:
            if parallel or batch_branches:
                raise ValueError(
                    "parallel= and batch_branches= need guidance=: 'cfg' is the pipeline's own"
                )
            with aside(loop_of(self)):
                return stock_call(self, *args, **kwargs)
        return self.call_guided(
            stock_call,
            *args,
            guidance=guidance,
            detailed_trace=detailed_trace,
            parallel=parallel,
            batch_branches=batch_branches,
            **kwargs,
        )

    signature = inspect.signature(stock_call)
    ours = {"guidance": None, "detailed_trace": False, "parallel": None, "batch_branches": False}
    extra = [
        inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=v) for n, v in ours.items()
    ]
    parameters = sorted([*signature.parameters.values(), *extra], key=lambda p: p.kind)
    # mypy does not know that functions may have a signature of their own.
    vars(call)["__signature__"] = signature.replace(parameters=parameters)
    call.__doc__ = f"{stock_call.__doc__ or ''}\n{CALL_DOCUMENTATION}"
    return type(
        pipeline_class.__name__,
        (GuidedMixin, pipeline_class),
        {
            "__call__": call,
            "__doc__": pipeline_class.__doc__,
            "__module__": "pilotage.pipelines",
            "__qualname__": pipeline_class.__name__,
            "stock_class": pipeline_class,
        },
    )


def guided(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Let a pipeline instance take ``guidance=``.

    Where the scale is that of a guider among its components, it is taken from there, and for
    anything but plain "cfg" the guider makes way for plain guidance at its scale meanwhile.
    Modular pipelines take a `Guider` component instead.

    Args:
        pipe: Any diffusers pipeline with classifier-free guidance.

    Returns:
        The same object. Without ``guidance=`` it goes on exactly as before.

    Raises:
        LayoutError: the pipeline has no guidance, or Pilotage does not know its branches.
    """
    if isinstance(pipe, ModularPipeline):
        raise LayoutError(
            "modular pipelines are guided by a component: "
            'pipe.update_components(guider=Guider("apg", guidance_scale=7.5).bind(pipe))'
        )
    cls: Any = type(pipe)
    if not guiders_of(pipe):
        scale_argument(cls)
    layout_of(cls)
    pipe.__class__ = guided_class(cls)
    return pipe
