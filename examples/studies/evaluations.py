"""Fewer evaluations, method beside method at equal cost: ``eval/results/evaluations.json``.

    python -m examples.emoji.data prepare && python -m examples.studies.evaluations

On the embedded model (DPM++ 2M, w = 7.5), and with one branch alone: the model at w = 1, and a
guidance-distilled copy of its network (`distilled`, trained first, 20 minutes). 94 held-out
(concept, style) pairs, one seed each. Every method is held against two pictures from the same
noise: that of its own full run, and that of a run of 200 steps. Baselines are CFG with fewer steps:
evenly spaced, at the very timesteps that the fitted schedule evaluates, at the best timesteps found
for it on the training prompts, and under other solvers; where a cost is no whole number of steps
they get the next step more. What is fitted or searched is so on 24 prompts of the training split
(ours and the baseline's timesteps get as many tries, BudCache's mask more). Differences are paired
over prompts; each family (ours against all rows of a cost, in one metric) has simultaneous
intervals. SSIM is over all pixels, the pictures mirrored at their borders.

Resumable: what is fitted and every row's values lie in ``cache/evaluations``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from examples.emoji import data as emoji
from examples.studies.distilled import distil
from examples.studies.linearag import training_prompts
from examples.studies.rivals import (
    SOLVERS,
    AdamsBashforth,
    AdaptiveDiffusion,
    Taylor,
    annealed,
    held_at,
    linear_predictors,
    spectrum_reuse,
)
from pilotage.eval.comparison.paired import differences
from pilotage.eval.embedded import load_embedded
from pilotage.eval.metrics.bootstrap import Resamples
from pilotage.eval.metrics.efficientnet import EfficientNetLite
from pilotage.eval.metrics.images import psnr, ssim, to_tensor
from pilotage.eval.record import write_figures, write_json
from pilotage.eval.tuning.policy_search import climb, place
from pilotage.eval.tuning.trials import Trials
from pilotage.guidance import (
    CFG,
    Guidance,
    HoldDifference,
    Interval,
    Schedule,
    forecast,
    gate,
    load_guidance,
    save_guidance,
)
from pilotage.guidance.fitting.record import Record
from pilotage.pipelines.fitting.on_policy import ScheduleFitter
from pilotage.pipelines.fitting.runs import Runs

FINE, BATCH = 200, 16
HELD_OUT, FIT_PROMPTS, ROUNDS, MASKS, RESAMPLES = 94, 24, 8, 40, 2000
FIT_SEED, MASK_SEED = 40_000, 41_000
EMBEDDED, DISTILLED = "embedded", "distilled"
COSTS = {  # network, guidance scale and steps of the full run -> network evaluations
    (EMBEDDED, 7.5, 20): (24, 18, 12, 10),
    (EMBEDDED, 7.5, 50): (33, 25, 16),
    (EMBEDDED, 1.0, 20): (12,),
    (DISTILLED, 1.0, 20): (12, 9, 6),
}
OURS = ("forecast", "placed", "placed, to 200 steps")
METRICS = ("ssim", "psnr", "feature_distance")


class Method(NamedTuple):
    """One row: what makes its pictures.

    Args:
        name: Of the row.
        guidance: For ``guidance=``.
        steps: Steps of the run.
        timesteps: Those of the run, if they are not the scheduler's own.
        scheduler: Class and settings, if it is not the model's own.
    """

    name: str
    guidance: Any = "cfg"
    steps: int = 20
    timesteps: tuple[int, ...] | None = None
    scheduler: tuple[str, dict[str, Any]] | None = None


class Study:
    """The pipeline, the prompts, and what is kept of the work.

    Args:
        archive: Of the emoji.
        work: Folder of what is kept.
        network: The embedded model's own, or the distilled one.
        scale: w; at 1 a step evaluates one branch.
    """

    def __init__(self, archive: Path, work: Path, network: str, scale: float) -> None:
        drawings = emoji.load(archive, everyday=True)
        held = [d.text for d in emoji.load(archive) if d.split == "pair"]
        self.held = held[:: len(held) // HELD_OUT][:HELD_OUT]
        self.fits = training_prompts(drawings, FIT_PROMPTS, first=5)
        self.pipe = load_embedded()
        self.training: dict[str, Any] | None = None
        if network == DISTILLED:
            captions = [d.text for d in drawings if d.split == "train"]
            self.training = distil(self.pipe, captions, self.held, work / "training")
        self.own, self.work, self.scale = self.pipe.scheduler, work, scale
        self.branches = 2 if scale > 1 else 1
        self.extractor = EfficientNetLite("efficientnet-lite0-native")
        work.mkdir(parents=True, exist_ok=True)

    def runs(self, steps: int, prompts: list[str] | None = None, seed: int = FIT_SEED) -> Trials:
        """Runs of some prompts, by default those that are fitted on."""
        chosen = prompts or self.fits
        return Trials(self.pipe, chosen, self.scale, steps, None, seed, BATCH, False)

    def pictures(self, method: Method, runs: Runs, **options: Any) -> tuple[Any, list[int]]:
        """What the method makes of some runs, and the evaluations of each."""
        made, nfe = [], []
        if method.scheduler:
            name, settings = method.scheduler
            kind = getattr(diffusers, name)
            self.pipe.scheduler = kind.from_config(self.own.config, **settings)
        try:
            for call in runs.calls():
                if method.timesteps:
                    del call["num_inference_steps"]
                    call["timesteps"] = list(method.timesteps)
                made.extend(self.pipe(guidance=method.guidance, **call | options).images)
                nfe += self.pipe.guidance_trace.nfe
        finally:
            self.pipe.scheduler = self.own
        return made, nfe

    def timesteps(self, steps: int) -> list[int]:
        """Of a run of so many steps."""
        self.own.set_timesteps(steps)
        return [int(t) for t in self.own.timesteps]

    def kept(self, name: str, of: Callable[[], Any]) -> Any:
        """What a file of `work` holds, made if there is none."""
        path = self.work / f"{name}.json"
        if not path.is_file():
            begun = time.monotonic()
            value = of()
            write_json(path, {"value": value, "minutes": (time.monotonic() - begun) / 60})
        return json.loads(path.read_text())["value"]

    @cache  # noqa: B019
    def reference(self, steps: int) -> tuple[Tensor, Tensor]:
        """Pictures of plain guidance of the held-out prompts, and their features."""
        path = self.work / f"reference-{steps}.pt.npy"
        if not path.is_file():
            pictures, _ = self.pictures(Method("cfg", steps=steps), self.runs(steps, self.held, 0))
            save_pictures(path, to_tensor(pictures))
        pictures = load_pictures(path)
        return pictures, self.extractor(pictures)

    def measured(self, method: Method, full: int) -> dict[str, Any]:
        """Evaluations and every metric of every held-out prompt."""
        return self.kept(f"row-{full}-{slug(method.name)}", partial(self._measured, method, full))

    def _measured(self, method: Method, full: int) -> dict[str, Any]:
        pictures, nfe = self.pictures(method, self.runs(method.steps, self.held, 0))
        made = to_tensor(pictures)
        features, found = self.extractor(made), {}
        for name, steps in (("own", full), ("200", FINE)):
            reference, wanted = self.reference(steps)
            found[f"ssim_{name}"] = ssim(made, reference).tolist()
            found[f"psnr_{name}"] = psnr(made, reference).clamp(max=100).tolist()
            cosine = torch.nn.functional.cosine_similarity(features, wanted)
            found[f"feature_distance_{name}"] = (1 - cosine).tolist()
        return found | {"nfe": nfe, "guidance": str(self.pipe.resolve_guidance(method.guidance))}


def slug(name: str) -> str:
    """A file's name."""
    return "".join(c if c.isalnum() else "-" for c in name)


def save_pictures(path: Path, pictures: Tensor) -> None:
    """Keep pictures as bytes, whole or not at all."""
    import numpy as np

    from pilotage.guidance.files import atomic

    with atomic(path) as partial_, open(partial_, "wb") as file:
        np.save(file, (pictures * 255).round().byte().numpy(), allow_pickle=False)


def load_pictures(path: Path) -> Tensor:
    """What `save_pictures` kept, in [0, 1]."""
    import numpy as np

    return torch.from_numpy(np.load(path, allow_pickle=False)).float() / 255


def methods(study: Study, full: int, nfe: int) -> Iterator[Method]:
    """The rows of one cost, ours first."""
    total, count = full, nfe // study.branches
    more = -(-nfe // study.branches)  # a baseline in whole steps gets the next step more
    first, period = study.kept(f"forecast-{full}-{nfe}", partial(best_forecast, study, full, nfe))
    yield Method("forecast", CFG() | forecast(first, period), full)
    places = study.kept(f"placed-{full}-{nfe}", partial(placed, study, full, nfe))
    for name, finer in (("placed", 1), ("placed, to 200 steps", FINE // full)):
        path = study.work / f"placed-{full}-{nfe}-{finer}.json"
        if not path.is_file():
            choices = held_at(places, total, HoldDifference()).choices_for(total)
            found, _ = fitter(study, full, finer).fit(choices)
            fill = found.coefficients
            policy = Schedule(held_at(places, total, fill).choices, fill=fill)
            save_guidance(path, Guidance(CFG(), policy), {})
        yield Method(name, load_guidance(path), full)
    yield Method("cfg, evenly spaced", steps=more)
    grid = study.timesteps(full)
    yield Method("cfg, same timesteps", steps=count, timesteps=tuple(grid[i] for i in places))
    best = study.kept(f"grid-{full}-{nfe}", partial(best_grid, study, full, more))
    yield Method("cfg, best timesteps", steps=more, timesteps=tuple(grid[i] for i in best))
    some = full == 20 and count in (12, 6)  # the costs at which all are run
    for name, scheduler in SOLVERS.items():
        if some or name == "UniPC":
            yield Method(f"cfg, {name}", steps=more, scheduler=scheduler)
    if full == 50:
        return
    yield Method("hold at the same steps", held_at(places, total, HoldDifference("x0")), full)
    mask = study.kept(f"mask-{full}-{nfe}", partial(budcache, study, full, count))
    yield Method("BudCache", held_at(mask, total, HoldDifference("native")), full)
    evenly = [i * total // count for i in range(count)]
    choices = held_at(evenly, total, HoldDifference()).choices_for(total)
    if study.branches > 1:
        fill = linear_predictors(outputs(study, full), choices)
        yield Method("L2P-like", Schedule(choices, fill=fill), full)
    if not some:
        return
    yield Method("Taylor, order 1", held_at(evenly, total, Taylor(1)), full)
    yield Method("Taylor, order 2", held_at(evenly, total, Taylor(2)), full)
    yield Method("Adams-Bashforth", held_at(evenly, total, AdamsBashforth()), full)
    delta = study.kept(f"delta-{full}-{nfe}", partial(calibrated, study, full, nfe))
    yield Method("AdaptiveDiffusion", AdaptiveDiffusion(delta, most=8), full)
    if count > full // 2 and study.branches > 1:
        share = (nfe - full) / full
        yield Method("gate", gate(first=share), full)
        yield Method("Step AG", Interval(stop_step=nfe - full), full)
        yield Method("FasterCache", spectrum_reuse(full), full)


@cache
def fitter(study: Study, full: int, finer: int) -> ScheduleFitter:
    """Fits to the full run, or to that of 200 steps."""
    return ScheduleFitter(study.runs(full), output_type="pil", finer=finer)


def placed(study: Study, full: int, nfe: int) -> list[int]:
    """Where `place` puts the evaluations of a schedule fitted to the run of 200 steps."""
    found = place(study.runs(full), nfe, fitter(study, full, FINE // full), rounds=ROUNDS)
    return [i for i, c in enumerate(found.best.schedule.choices) if c == "both"]


def best_forecast(study: Study, full: int, nfe: int) -> tuple[float, int]:
    """The settings of `forecast` of that cost with the best pictures, to the run of 200 steps."""
    runs, wanted = study.runs(full), to_tensor(fitter(study, full, FINE // full).pictures)
    found = {}
    count = nfe // study.branches
    for first in range(1, count):
        for period in range(1, full):
            if forecast(first / full, period).nfe(full) == 2 * count:
                found[first] = first / full, period
                break
    tried = list(found.values())[:: -(-len(found) // 5)]

    def judge(settings: tuple[float, int]) -> float:
        made = study.pictures(Method("", CFG() | forecast(*settings), full), runs)[0]
        return ssim(to_tensor(made), wanted).mean().item()

    return max(tried, key=judge)


def best_grid(study: Study, full: int, count: int) -> list[int]:
    """The best steps of the full run for CFG without the others, to the run of 200 steps."""
    grid, runs = study.timesteps(full), study.runs(full)
    wanted = to_tensor(fitter(study, full, FINE // full).pictures)

    def judge(places: tuple[int, ...]) -> float:
        method = Method("", steps=count, timesteps=tuple(grid[i] for i in places))
        return ssim(to_tensor(study.pictures(method, runs)[0]), wanted).mean().item()

    return list(climb(full, count, ROUNDS, judge)[1])


def budcache(study: Study, full: int, count: int) -> list[int]:
    """BudCache's mask: one prompt, the mean square of final latents to the full run."""
    runs = study.runs(full, study.fits[:1], MASK_SEED)
    latents = partial(study.pictures, runs=runs, output_type="latent")
    wanted = latents(Method("cfg", steps=full))[0][0]

    def loss(places: tuple[int, ...]) -> float:
        made = latents(Method("", held_at(places, full, HoldDifference("native")), full))[0][0]
        return (made - wanted).square().mean().item()

    return list(annealed(full, count, loss, MASKS))


@cache
def outputs(study: Study, full: int) -> Tensor:
    """Guided outputs of the full runs that are fitted on, with shape (T, N, \\*)."""
    found: list[Tensor] = []

    def keep(cond: Tensor, uncond: Tensor) -> None:
        found.append(uncond + study.scale * (cond - uncond))

    study.pictures(Method("", CFG() | Record(keep), full), study.runs(full), output_type="latent")
    return torch.cat(found, 1)


def calibrated(study: Study, full: int, nfe: int) -> float:
    """AdaptiveDiffusion's delta with which it costs `nfe` on average, by bisection."""
    low, high = 1e-4, 10.0
    for _ in range(7):
        delta = (low * high) ** 0.5
        method = Method("", AdaptiveDiffusion(delta, most=8), full)
        cost = study.pictures(method, study.runs(full), output_type="latent")[1]
        low, high = (delta, high) if sum(cost) / len(cost) > nfe else (low, delta)
    return high


def compared(rows: list[dict[str, Any]], whole: dict[str, list[float]]) -> None:
    """Put the paired differences of ours to every other row of a cost into the rows of ours.

    Those to the full run's own distance from 200 steps are a family of their own.
    """
    drawn = Resamples.of(range(HELD_OUT), RESAMPLES)
    for row in rows:
        row["against"] = {row_["method"]: {} for row_ in rows if row_["method"] not in OURS}
    for metric in (f"{m}_{r}" for m in METRICS for r in ("own", "200")):
        values = [torch.tensor(row["values"][metric], dtype=torch.float64) for row in rows]
        means, draws = [v.mean().item() for v in values], [drawn.means(v) for v in values]
        pairs = [
            (i, j)
            for i, a in enumerate(rows)
            for j, b in enumerate(rows)
            if a["method"] in OURS and b["method"] not in OURS
        ]
        for (i, j), one in zip(pairs, differences(means, draws, pairs, HELD_OUT), strict=True):
            rows[i]["against"][rows[j]["method"]][metric] = [
                round(x, 5) for x in (one.value, *(one.interval or (one.value, one.value)))
            ]
    ours = [i for i, row in enumerate(rows) if row["method"] in OURS]
    for metric in (f"{m}_200" for m in METRICS):
        listed = [*(row["values"][metric] for row in rows), whole[metric]]
        values = [torch.tensor(one, dtype=torch.float64) for one in listed]
        means, draws = [v.mean().item() for v in values], [drawn.means(v) for v in values]
        pairs = [(i, len(rows)) for i in ours]
        for i, one in zip(ours, differences(means, draws, pairs, HELD_OUT), strict=True):
            rows[i].setdefault("against_full_run", {})[metric] = [
                round(x, 5) for x in (one.value, *(one.interval or (one.value, one.value)))
            ]
    for row in rows:
        row.update({name: round(sum(v) / len(v), 5) for name, v in row.pop("values").items()})
        if row["method"] not in OURS:
            del row["against"]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """SSIM to the run of 200 steps over evaluations."""
    figure = Figure(figsize=(15, 4), layout="constrained")
    shown = ("placed, to 200 steps", "forecast", "cfg, evenly spaced", "cfg, best timesteps",
             "cfg, UniPC", "BudCache")  # fmt: skip
    axes = figure.subplots(1, len(COSTS))
    for ax, key in zip(axes, COSTS, strict=True):
        here = [
            r for r in rows if (r["network"], r["guidance_scale"], r["steps_of_full_run"]) == key
        ]
        for name in shown:
            of = [r for r in here if r["method"] == name]
            ax.plot([r["nfe"] for r in of], [r["ssim_200"] for r in of], "o-", label=name)
        whole = next(r for r in here if r["method"] == "cfg")
        ax.axhline(whole["ssim_200"], color="grey", linestyle=":", label="the full run")
        ax.set(xlabel="network evaluations", title=f"{key[0]}, w = {key[1]:g}, of {whole['nfe']}")
    axes[0].set_ylabel("SSIM to 200 steps")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Fit, measure, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archive", type=Path, default=emoji.DEFAULT_ARCHIVE)
    parser.add_argument("--work", type=Path, default=Path("cache/evaluations"))
    parser.add_argument("--plot", type=Path, default=Path("docs/pictures/evaluations.png"))
    parser.add_argument("-o", "--output", type=Path, default=Path("eval/results/evaluations.json"))
    args = parser.parse_args()
    rows = []
    costs = [(*key, nfe) for key, budgets in COSTS.items() for nfe in budgets]
    folders = {
        (EMBEDDED, 7.5): args.work,
        (EMBEDDED, 1.0): args.work / "one-branch",
        (DISTILLED, 1.0): args.work / "distilled",
    }
    studies = {key: Study(args.archive, folder, *key) for key, folder in folders.items()}
    for network, w, full, nfe in tqdm(costs, unit="cost"):
        family, study = [], studies[network, w]
        for method in methods(study, full, nfe):
            named = method._replace(name=f"{nfe}-{method.name}")
            values = study.measured(named, full)
            guidance, cost = values.pop("guidance"), values.pop("nfe")
            family.append(
                {
                    "method": method.name,
                    "network": network,
                    "guidance_scale": w,
                    "guidance": guidance if len(guidance) < 200 else guidance.split("(")[0],
                    "steps_of_full_run": full,
                    "steps": method.steps,
                    "budget": nfe,
                    "nfe": round(sum(cost) / len(cost), 3),
                    "values": values,
                }
            )
        compared(family, study.measured(Method("cfg", steps=full), full))
        rows += family
    for network, w, full in COSTS:
        study = studies[network, w]
        values = study.measured(Method("cfg", steps=full), full)
        means = {n: round(sum(v) / len(v), 5) for n, v in values.items() if n.endswith("_200")}
        cost = {"steps": full, "nfe": study.branches * full}
        row = {"method": "cfg", "network": network, "guidance_scale": w, "steps_of_full_run": full}
        rows.append(row | cost | means)
    guided = studies[EMBEDDED, 7.5].reference(20)[0]
    alike = ((n, studies[n, 1.0].reference(20)[0]) for n in (DISTILLED, EMBEDDED))
    figures = {"n": HELD_OUT, "fitted_on": FIT_PROMPTS, "rows": rows}
    figures[DISTILLED] = studies[DISTILLED, 1.0].training | {
        f"ssim_of_{name}_to_guided": round(ssim(own, guided).mean().item(), 4)
        for name, own in alike
    }
    write_figures(args.output, figures)
    draw(rows, args.plot)


if __name__ == "__main__":
    main()
