r"""The fused schedulers beside the stock ones, over all their options: ``schedulers.json``.

    python -m examples.studies.schedulers --draws 5000

A draw is a scheduler, a set of options, a dtype and a number of steps. Its reference is the stock
scheduler's own code in float64, from the same float32 tables: every float32 that this code asks for
is a float64 (`InDouble`). Along the reference's samples the stock scheduler and the fused one take
every step from the same sample, prediction and noise. The error of a step is

.. math:: \frac{\lVert x - x^{64} \rVert}{\lVert x^{64} \rVert},

that of a draw the largest of its steps, also of the denoised images where a scheduler reports them.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pilotage.eval.record import write_figures
from pilotage.pipelines import (
    FusedDDIMScheduler,
    FusedDPMSolverMultistepScheduler,
    FusedEulerScheduler,
    FusedFlowMatchEulerScheduler,
    noise_level,
)
from pilotage.pipelines.seam.noise_levels import EXPLODING, scheduler_name

OUTPUT = Path("eval/results/schedulers.json")
SLACK = 1e-6
SHAPE = (2, 3, 6, 5)
SCHEDULERS: tuple[Any, ...] = (
    FusedDDIMScheduler,
    FusedDPMSolverMultistepScheduler,
    FusedEulerScheduler,
    FusedFlowMatchEulerScheduler,
)


class InDouble(TorchFunctionMode):
    """Code within computes in float64 where it asks for float32; its noise keeps its numbers.

    Args:
        noise: The dtype that noise is drawn in.
    """

    def __init__(self, noise: torch.dtype) -> None:
        super().__init__()
        self.noise = noise

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call `func` with float64 in the place of float32."""
        wide = {torch.float32: torch.float64}
        args = tuple(wide.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        kwargs = dict(kwargs or {})
        if func is torch.randn:
            asked = kwargs.get("dtype")
            drawn = torch.float32 if asked is torch.float32 else self.noise
            return func(*args, **kwargs | {"dtype": drawn}).double()
        if isinstance(kwargs.get("dtype"), torch.dtype):
            kwargs["dtype"] = wide.get(kwargs["dtype"], kwargs["dtype"])
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Draw:
    """One comparison.

    Args:
        number: Its seed.
        scheduler: A fused scheduler's class.
        settings: Of the scheduler.
        given: Arguments of ``set_timesteps``.
        taken: Arguments of ``step``.
        dtype: Of samples and predictions.
        begin: Step to begin at.
        wild: Whether predictions are noise, and not those of a network that knows the picture.
    """

    number: int
    scheduler: Any
    settings: dict[str, Any]
    given: dict[str, Any]
    taken: dict[str, Any]
    dtype: torch.dtype
    begin: int
    wild: bool

    def __str__(self) -> str:
        options = {**self.settings, **self.given, **self.taken}
        words = [f"{name}={value}" for name, value in options.items()]
        return f"{self.number}: {self.scheduler.__qualname__} {self.dtype} {' '.join(words)}"


def draw(number: int) -> Draw:
    """The draw of a number; the schedulers come in turn."""
    dice = random.Random(number)
    scheduler = SCHEDULERS[number % len(SCHEDULERS)]
    maybe, of = lambda share: dice.random() < share, dice.choice
    steps = of((1, 2, 3, 5, 8, 14, 15, 20))
    given: dict[str, Any] = {"num_inference_steps": steps}
    taken: dict[str, Any] = {}
    if scheduler is FusedFlowMatchEulerScheduler:
        settings: dict[str, Any] = {
            "shift": of((0.5, 1.0, 3.0, 7.0)),
            "shift_terminal": of((None, None, 0.02, 0.3)) if steps > 1 else None,
            "invert_sigmas": maybe(0.2),
            "stochastic_sampling": maybe(0.2),
            "use_dynamic_shifting": maybe(0.3),
            "time_shift_type": of(("exponential", "linear")),
        }
        if settings["use_dynamic_shifting"]:
            given["mu"] = dice.uniform(0.3, 2.0)
        if maybe(0.2):
            given["sigmas"] = sorted((dice.uniform(0.01, 1) for _ in range(steps)), reverse=True)
    else:
        settings = {
            "num_train_timesteps": of((1000, 1000, 1000, 250)),
            "prediction_type": of(("epsilon", "v_prediction", "sample")),
            "timestep_spacing": of(("leading", "trailing", "linspace")),
            "steps_offset": of((0, 1)),
            "rescale_betas_zero_snr": maybe(0.3),
        }
        schedule = of(("linear", "scaled_linear", "squaredcos_cap_v2", "trained"))
        low, high = of(((1e-4, 0.02), (0.00085, 0.012), (dice.uniform(1e-5, 1e-3), 0.05)))
        if schedule == "trained":
            count = settings["num_train_timesteps"]
            settings["trained_betas"] = [
                low + (high - low) * (i / count) ** 2 for i in range(count)
            ]
        else:
            settings |= {"beta_schedule": schedule, "beta_start": low, "beta_end": high}
    if scheduler is FusedDDIMScheduler:
        settings |= {
            "clip_sample": maybe(0.4),
            "clip_sample_range": of((0.5, 1.0, 2.0)),
            "set_alpha_to_one": maybe(0.6),
            "thresholding": maybe(0.2),
            "dynamic_thresholding_ratio": of((0.9, 0.995)),
            "sample_max_value": of((1.0, 1.5, 4.0)),
        }
        taken = {"eta": of((0.0, 0.0, 0.0, 0.3, 1.0)), "use_clipped_model_output": maybe(0.2)}
    elif scheduler is FusedEulerScheduler:
        settings |= {
            "interpolation_type": of(("linear", "linear", "log_linear")),
            "timestep_type": of(("discrete", "discrete", "continuous")),
            "final_sigmas_type": of(("zero", "sigma_min")),
            "sigma_min": of((None, None, 0.01)),
            "sigma_max": of((None, None, 20.0)),
        }
        if maybe(0.2):
            taken = {"s_churn": of((0.1, 5.0)), "s_noise": of((1.0, 1.01)), "s_tmin": 0.05}
    elif scheduler is FusedDPMSolverMultistepScheduler:
        settings |= {
            "solver_order": of((1, 2, 2, 3)),
            "solver_type": of(("midpoint", "heun")),
            "algorithm_type": of(("dpmsolver++", "dpmsolver++", "sde-dpmsolver++"))
            if maybe(0.8)
            else of(("dpmsolver", "sde-dpmsolver")),
            "lower_order_final": maybe(0.6),
            "euler_at_final": maybe(0.3),
            "final_sigmas_type": of(("zero", "sigma_min")),
            "lambda_min_clipped": of((-math.inf, -5.1)),
            "variance_type": of((None, None, "learned_range")),
            "thresholding": maybe(0.15),
            "sample_max_value": of((1.0, 1.5, 4.0)),
        }
        if maybe(0.3):
            settings |= {"use_flow_sigmas": True, "flow_shift": of((1.0, 3.0))}
            settings["prediction_type"] = of(("flow_prediction", settings["prediction_type"]))
            if maybe(0.3):
                settings["use_dynamic_shifting"], given["mu"] = True, dice.uniform(0.3, 2.0)
        elif maybe(0.05):
            settings["prediction_type"] = "flow_prediction"
    spacing = ["karras", "exponential", "beta"]
    if scheduler is not FusedDDIMScheduler and maybe(0.4):
        settings[f"use_{of(spacing)}_sigmas"] = True
    elif scheduler is FusedDPMSolverMultistepScheduler and maybe(0.2):
        settings["use_lu_lambdas"] = True
    elif (
        scheduler is FusedDPMSolverMultistepScheduler
        and not settings.get("use_flow_sigmas")  # there stock takes a number of steps only
        and maybe(0.2)
    ):
        count = settings["num_train_timesteps"]
        given = {"timesteps": sorted(dice.sample(range(count), steps), reverse=True)}
    elif scheduler is FusedEulerScheduler and settings["timestep_type"] == "discrete":
        if maybe(0.2):
            sigmas = sorted((dice.uniform(0.02, 20) for _ in range(steps)), reverse=True)
            given = {"sigmas": [*sigmas, 0.0]}
        elif maybe(0.2):
            count = settings["num_train_timesteps"]
            given = {"timesteps": sorted(dice.sample(range(count), steps), reverse=True)}
    dtype = of(
        (torch.float32, torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64)
    )
    begin = dice.randrange(steps) if maybe(0.2) else 0
    return Draw(number, scheduler, settings, given, taken, dtype, begin, maybe(0.5))


class RefusedError(ValueError):
    """Options that the stock scheduler (args: False) or the fused one (True) refuses."""


def build(case: Draw) -> list[Any]:
    """Reference, stock and fused scheduler.

    Raises:
        RefusedError: one of them refuses the options.
    """
    made: list[Any] = []
    stock = case.scheduler.stock_class
    for cls in (stock, stock, case.scheduler):
        try:
            scheduler = cls(**case.settings)
            scheduler.set_timesteps(**case.given)
        except ValueError as error:
            raise RefusedError(cls is case.scheduler) from error
        made.append(scheduler)
    for name in ("sigmas", "alphas_cumprod", "final_alpha_cumprod"):
        table = getattr(made[0], name, None)
        if table is not None:
            setattr(made[0], name, table.double())
    return made


def prediction(case: Draw, scheduler: Any, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """What a network says of a sample (float64): of unit size, or true to a picture."""
    if case.wild:
        return noise
    picture = torch.tanh(x) * 0.6 + 0.1 * noise
    level = noise_level(scheduler, t)
    found = level.from_x0(picture, x * level.alpha if scheduler_name(scheduler) in EXPLODING else x)
    return found if found.isfinite().all() else noise


@dataclass
class Errors:
    """What a draw found.

    Args:
        worst: Largest error of ours less stock's, over steps and what they return.
        lost: Whether something of ours is not finite where stock's is.
    """

    worst: float = -math.inf
    lost: bool = False

    def compare(self, exact: Tensor, stock: Tensor, ours: Tensor) -> None:
        """Take in one tensor of a step."""
        good = exact.isfinite() & stock.isfinite()
        self.lost |= not bool(ours[good].isfinite().all())
        size = exact[good].norm() or 1.0
        theirs, own = (float((t[good].double() - exact[good]).norm() / size) for t in (stock, ours))
        self.worst = max(self.worst, own - theirs)


def errors(case: Draw) -> Errors:
    """The errors of a draw; RefusedError if it cannot be made."""
    made = build(case)
    found, source = Errors(), torch.Generator().manual_seed(case.number)
    noise = lambda: torch.randn(SHAPE, generator=source, dtype=torch.float64)  # noqa: E731
    exact = made[0]
    size = exact.sigmas[case.begin] if scheduler_name(exact) in EXPLODING else 1.0
    x = noise() * float(size)
    own = [torch.Generator().manual_seed(case.number) for _ in made]
    for scheduler in made:
        if hasattr(scheduler, "set_begin_index"):  # without one, equal timesteps are ambiguous
            scheduler.set_begin_index(case.begin)
    for index in range(case.begin, len(exact.timesteps)):
        t = exact.timesteps[index]
        x = x.to(case.dtype)
        if not x.isfinite().all():  # float16 ends at 65504
            break
        pred = prediction(case, exact, x.double(), t, noise()).to(case.dtype)
        if case.settings.get("variance_type") and case.settings["prediction_type"] == "epsilon":
            pred = torch.cat([pred, pred], 1)
        given = []
        for scheduler, generator in zip(made, own, strict=True):
            t, wide = scheduler.timesteps[index], scheduler is exact
            with InDouble(case.dtype) if wide else contextlib.nullcontext():
                inputs = (pred.double(), t, x.double()) if wide else (pred, t, x)
                scaled = scale(scheduler, inputs[2], t)
                options = case.taken | {"generator": generator, "return_dict": False}
                given.append((*scheduler.step(*inputs, **options), *scaled))
        for three in zip(*given, strict=True):
            found.compare(*three)
        x = given[0][0]
    return found


def scale(scheduler: Any, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """The network's input, where the scheduler makes it."""
    return (scheduler.scale_model_input(x, t),) if hasattr(scheduler, "scale_model_input") else ()


def compare(count: int, first: int = 0) -> dict[str, Any]:
    """The figures of `count` comparisons.

    Returns:
        ``draws``: comparisons made. ``worst_error``: largest excess of the fused scheduler's error
        over the stock one's. ``above_slack``: draws in which it is more than `SLACK`.
        ``non_finite``: draws in which something fused is not finite where stock is.
        ``refused``: draws refused by the fused scheduler alone;
        ``refused_by_stock``: by the stock one. ``faults``: the draws counted in the two.
    """
    compared: Counter[str] = Counter()
    refused, worst, lost, faults = Counter(), -math.inf, 0, []
    for number in range(first, first + count):
        case = draw(number)
        try:
            found = errors(case)
        except RefusedError as error:
            refused[error.args[0]] += 1
            continue
        compared[case.scheduler.__qualname__] += 1
        worst, lost = max(worst, found.worst), lost + found.lost
        if found.lost or not found.worst <= SLACK:
            faults.append({"draw": str(case), "excess": found.worst, "non_finite": found.lost})
    return {
        "draws": sum(compared.values()),
        "worst_error": worst,
        "slack": SLACK,
        "above_slack": sum(not fault["excess"] <= SLACK for fault in faults),
        "non_finite": lost,
        "by_scheduler": dict(compared),
        "refused": refused[True],
        "refused_by_stock": refused[False],
        "faults": faults,
    }


def main() -> None:
    """Make the comparisons and write `OUTPUT`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=5000, help="options drawn")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    diffusers.logging.set_verbosity_error()
    figures = compare(args.draws)
    write_figures(args.output, figures)
    print({name: value for name, value in figures.items() if name != "faults"})
    for fault in figures["faults"]:
        print(fault)


if __name__ == "__main__":
    main()
