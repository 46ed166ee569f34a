"""The commands that find settings for a model: `pilotage fit`, `calibrate` and `search`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

import typer

from ..options import BatchSize, Device, Dtype, Model, Negative, Scale, Seed, Steps, check_target
from ..prompts import read_prompts
from ..terminal import Yes, is_quiet

if TYPE_CHECKING:
    from ...pipelines.fitting.runs import Runs

Known = TypeVar("Known", bound=str)

Prompts = Annotated[Path, typer.Argument(help="Text file, one prompt a line.")]
Output = Annotated[
    Path,
    typer.Option(
        "--output", "-o", help="NAME.json to write; in MODEL/guidance, NAME is then a guidance."
    ),
]
SCALES = [7.5]


def fit(
    prompts: Prompts,
    output: Output = Path("outputs/linear-ag.json"),
    scale: Annotated[
        list[float], typer.Option("--scale", "-w", help="Guidance scale; repeat for a range.")
    ] = SCALES,
    then: Annotated[
        str,
        typer.Option(help="Second half: 'estimate', 'cond' or (with --on-policy) 'forecast'."),
    ] = "estimate",
    ridge: Annotated[
        float | None,
        typer.Option(help="Relative to the regressors' square; default: 1e-3, --on-policy 1e-4."),
    ] = None,
    on_policy: Annotated[
        bool,
        typer.Option("--on-policy", help="Fit on runs of LinearAG itself, back to plain guidance."),
    ] = False,
    steps: Steps = 20,
    negative: Negative = None,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    yes: Yes = False,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Fit LinearAG's coefficients on trajectories of ordinary guidance; resumable.

    Finished batches are kept in the folder OUTPUT.batches: the same fit run again goes on there.

    With --on-policy, on runs of LinearAG itself: each estimate then makes up for earlier ones.
    These are made all at once, so that memory grows with the prompts and nothing is resumed, and
    hold for this pattern and --then only.
    """
    from ...guidance import hold, linear_ag
    from ...guidance.policies.schedule import Choice
    from ...pipelines.fitting.fit import fit
    from ...pipelines.fitting.on_policy import ScheduleFitter
    from ...pipelines.fitting.runs import Runs
    from ...pipelines.processes import processes

    second: Choice = one_of("--then", then, ("estimate", "cond", "forecast"))
    if second == "forecast" and not on_policy:
        raise ValueError("--then forecast is fitted with --on-policy")
    if on_policy and len(scale) > 1:
        raise ValueError("--on-policy fits one guidance scale")
    texts, pipe = load(prompts, output, model, device, dtype)
    own: dict[str, Any] = {} if ridge is None else {"ridge": ridge}
    runs = Runs(pipe, texts, scale[0], steps, negative, seed, batch_size, not is_quiet())
    folder = output.with_name(f"{output.name}.batches")
    kept = 0 if on_policy else batch_size * len(list(folder.glob("batch-*.json")))
    ask_for(runs, 2 * len(texts) if on_policy else max(len(texts) - kept, 0), yes)
    if on_policy:
        fitter = ScheduleFitter(runs, **own)
        found, _ = fitter.fit(hold(then=second).choices_for(fitter.total))
        shown = {"distance": "distance", "distance_held_out": "held out"}
    else:
        found = fit(runs, scales=scale, checkpoint=folder, **own)
        shown = {"r2_held_out": "R² held out", "r2_difference": "of the difference"}
    if processes().is_main_process:
        found.save(output, linear_ag(found.coefficients, then=second))
        typer.echo("step" + "".join(f"{title:>19}" for title in shown.values()))
        for step, values in enumerate(zip(*(found.figures[n] for n in shown), strict=True)):
            typer.echo(f"{step:4}" + "".join(f"{value:19.4f}" for value in values))
        typer.echo(name_it(output, pipe))


def calibrate(
    prompts: Prompts,
    nfe: Annotated[float | None, typer.Option(help="Wanted evaluations a picture.")] = None,
    ssim: Annotated[float | None, typer.Option(help="Wanted SSIM to plain guidance.")] = None,
    rule: Annotated[str, typer.Option(help="How predictions combine: cfg, apg, ...")] = "cfg",
    then: Annotated[
        str,
        typer.Option(
            help="After the threshold: 'cond' (as in the paper), or 'forecast': skip every other "
            "step."
        ),
    ] = "cond",
    output: Output = Path("outputs/ag.json"),
    scale: Scale = 7.5,
    steps: Steps = 20,
    negative: Negative = None,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    yes: Yes = False,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Find Adaptive Guidance's threshold for a wanted cost (--nfe) or quality (--ssim)."""
    from ...guidance import Always, resolve
    from ...guidance.policies.adaptive import Then
    from .calibration import ROUNDS, calibrate, check_targets
    from .trials import Trials

    check_targets(nfe, ssim)
    follows: Then = one_of("--then", then, get_args(Then))
    if not isinstance(resolve(rule).policy, Always):
        raise ValueError(f"--rule is a rule alone, such as cfg or apg, got {rule!r}")
    texts, pipe = load(prompts, output, model, device, dtype)
    own = pipe.resolve_guidance(rule).rule
    trials = Trials(pipe, texts, scale, steps, negative, seed, batch_size, not is_quiet(), own)
    # One run that records, the reference, and those of one or two spaces, of bisection if need be.
    ask_for(trials, (2 + 2 * (1 if ssim is None else 1 + ROUNDS)) * len(texts), yes)
    found = calibrate(trials, target_nfe=nfe, target_ssim=ssim, then=follows)
    found.save(output)
    for space, (threshold, cost, quality) in found.proofs.items():
        typer.echo(f"{space}: threshold {threshold:.6g}, NFE {cost:.2f}, SSIM {quality:.4f}")
    typer.echo(f"{found.guidance}")
    typer.echo(name_it(output, pipe))


def search(
    prompts: Prompts,
    floor: Annotated[
        float | None, typer.Option(help="SSIM to plain guidance to be kept; default: 0.9.")
    ] = None,
    nfe: Annotated[
        int | None,
        typer.Option(help="Instead of --floor: the best schedule of so many evaluations, fitted."),
    ] = None,
    finer: Annotated[
        int,
        typer.Option(min=1, help="With --nfe: aim at a run of so many times as many steps."),
    ] = 1,
    fitted: Annotated[
        bool,
        typer.Option("--fitted", help="Fit to every schedule tried; 30 prompts or more."),
    ] = False,
    between: Annotated[
        str | None,
        typer.Option(
            help="With --fitted, steps between full evaluations: 'forecast' (default) evaluates "
            "nothing, 'estimate' the conditional branch."
        ),
    ] = None,
    relaxed: Annotated[
        bool, typer.Option("--relaxed", help="Gradient descent instead of greedy and evolution.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=0, help="Tries of evolution, or gradient steps.")] = 60,
    output: Output = Path("outputs/schedule.json"),
    scale: Scale = 7.5,
    steps: Steps = 20,
    negative: Negative = None,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    yes: Yes = False,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Find the cheapest schedule of evaluated, estimated and skipped steps above a quality.

    In what it prints, B evaluates both branches, e estimates the unconditional one, - lets the
    conditional one stand alone, and a dot skips the step.
    """
    from ...pipelines.fitting.on_policy import ScheduleFitter
    from .policy_search import check_nfe, place, search
    from .relaxed_search import relaxed_search
    from .store import Between
    from .trials import Trials

    if fitted and relaxed:
        raise ValueError("--fitted makes its own estimates: leave --relaxed out")
    if between is not None and not fitted:
        raise ValueError("--between is for --fitted")
    if nfe is not None and (floor is not None or fitted or relaxed):
        raise ValueError("--nfe goes without --floor, --fitted and --relaxed")
    if nfe is None and finer > 1:
        raise ValueError("--finer is for --nfe")
    other: Between = one_of("--between", between or "forecast", get_args(Between))
    texts, pipe = load(prompts, output, model, device, dtype)
    trials = Trials(pipe, texts, scale, steps, negative, seed, batch_size, not is_quiet())
    # See `policy_search.search`; a step with gradients costs four without.
    tried = rounds + (2 if fitted else 6) * steps
    relaxing = 4 * rounds * min(batch_size, len(texts)) + steps * len(texts)
    placing = round((1 + finer + rounds * (nfe or 0) / (trials.branches * steps)) * len(texts))
    ask_for(trials, placing if nfe else relaxing if relaxed else tried * len(texts), yes)
    kept, wanted = output.with_name(f"{output.name}.tried"), 0.9 if floor is None else floor
    if nfe is not None:
        check_nfe(trials, nfe)
        fitter = ScheduleFitter(trials, output_type="pil", finer=finer)
        found = place(trials, nfe, fitter, rounds=rounds, checkpoint=kept)
    elif relaxed:
        found = relaxed_search(trials, quality_floor=wanted, iterations=max(rounds, 1))
    else:
        found = search(
            trials,
            quality_floor=wanted,
            fitted=fitted,
            between=other,
            rounds=rounds,
            checkpoint=kept,
        )
    found.save(output)
    typer.echo("  NFE    SSIM")
    for candidate in found.front:
        mark = "*" if candidate is found.best else " "
        typer.echo(f"{mark}{candidate.nfe:4g}  {candidate.quality:.4f}  {candidate.schedule}")
    typer.echo(name_it(output, pipe))


def ask_for(runs: Runs, pictures: int, yes: bool) -> None:
    """Say how long so many pictures will take, and ask; see `estimate.ask`."""
    from ..estimate import ask

    ask(runs, pictures, pictures * runs.num_inference_steps, yes)


def load(
    prompts: Path, output: Path, model: str | None, device: str, dtype: str
) -> tuple[list[str], Any]:
    """The prompts of a file and the guided pipeline of a folder or hub name, on its device.

    Raises:
        ValueError: no prompts, an unknown device, or settings cannot be written to `output`.
    """

    from ..embedded import load_on

    texts = read_prompts(prompts)
    if output.suffix != ".json":
        raise ValueError(f"--output is a file NAME.json, got {output}")
    check_target(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    return texts, load_on(device, model, dtype)


def one_of(option: str, value: str, known: tuple[Known, ...]) -> Known:
    """The value of an option that takes a few words.

    Raises:
        ValueError: it is none of those known.
    """
    from ...guidance.names import unknown

    for word in known:
        if word == value:
            return word
    raise unknown(option, value, known)


def name_it(path: Path, pipe: Any) -> str:
    """How the settings just written to `path` are used."""
    from ...pipelines.guided import guidance_folder

    named = guidance_folder(pipe)
    if named is not None and path.resolve().parent == named.resolve():
        return f'{path}: use it as guidance="{path.stem}"'
    return f'{path}: use it as guidance=load_guidance("{path}")'
