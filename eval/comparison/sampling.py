"""Pictures for evaluation: prompts x seeds x settings, resumable, the same on any machine count.

* One generator a sample, seeded from (seed, index of the prompt): the same noise for every
  setting, whatever the batch.
* Samples are grouped into fixed chunks of `batch_size`, which are shared out among the processes
  of ``accelerate launch`` (on CPUs without MPI: ``torchrun``, over gloo): a picture is always
  computed beside the same others, so its bytes do not depend on the number of processes. Another
  batch size means the same samples and noise; convolutions then round differently, which moves a
  few pixels by one level of 255.
* A chunk is finished when its JSON file is there; everything is written under a temporary name,
  then renamed. Killed anywhere and run again, the folder ends up with the same pictures.
* Chunks are made in turn for all settings: an interrupted run has as many samples of each.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL.PngImagePlugin import PngInfo

from ...guidance import Guidance, Trace
from ...guidance.saved import to_dict
from ...pipelines.fitting.fitted import negative_argument, unconditional_text
from ...pipelines.fitting.identity import pipeline_identity
from ...pipelines.guided import GuidanceLike, scale_argument, scale_option
from ...pipelines.processes import processes
from ...pipelines.seam.noise_levels import (
    UnknownSchedulerError,
    check_scheduler,
    prediction_type_of,
)
from ..record import write_json

PLAN = "plan.json"


@dataclass(frozen=True)
class Setting:
    """One column of a comparison.

    Args:
        guidance: A name or a guidance object.
        scale: w; 1 means no guidance.
        steps: Sampling steps.
        method: What to call the guidance; default: the name, or the settings written out.
    """

    guidance: GuidanceLike
    scale: float
    steps: int = 20
    method: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.scale, bool) or not math.isfinite(self.scale) or self.scale <= 0:
            raise ValueError(f"the scale must be finite and > 0 (1 is none), got {self.scale}")
        if isinstance(self.steps, bool) or self.steps != int(self.steps) or self.steps < 1:
            raise ValueError(f"steps must be a whole number >= 1, got {self.steps}")
        if not self.method:
            object.__setattr__(self, "method", str(self.guidance))

    @property
    def label(self) -> str:
        """Method, scale and steps, e.g. ``apg w=7.5, 20 steps``."""
        return f"{self.method} w={self.scale:g}, {self.steps} steps"

    @property
    def slug(self) -> str:
        """The label as a folder name."""
        words = re.sub(r"[^a-z0-9.]+", "-", f"{self.method} w{self.scale:g} s{self.steps}".lower())
        digest = hashlib.sha256(self.method.encode()).hexdigest()[:6]
        plain = re.fullmatch(r"[a-z0-9+*]{1,24}", self.method)
        return words.strip("-.") if plain else f"{words[:40].strip('-.')}-{digest}"


@dataclass(frozen=True)
class Plan:
    """What to generate: every prompt with every seed under every setting.

    Args:
        prompts: Texts; their order is part of the plan.
        settings: Columns of the comparison, all different.
        seeds: Whole numbers; one sample of every prompt each.
        batch_size: Samples in one chunk, a call of the pipeline.
        options: Further arguments of the pipeline's call that JSON can hold.
    """

    prompts: Sequence[str]
    settings: Sequence[Setting]
    seeds: Sequence[int] = (0,)
    batch_size: int = 8
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("prompts", "settings", "seeds"):
            values = tuple(getattr(self, name))
            if not values:
                raise ValueError(f"a plan needs {name}, got none")
            object.__setattr__(self, name, values)
        if empty := [i for i, prompt in enumerate(self.prompts) if not str(prompt).strip()]:
            raise ValueError(f"prompts are empty at the positions {empty}, counted from 0")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"a seed occurs twice: {list(self.seeds)}")
        slugs = [setting.slug for setting in self.settings]
        if twice := {slug for slug in slugs if slugs.count(slug) > 1}:
            raise ValueError(f"a setting occurs twice: {', '.join(sorted(twice))}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    @property
    def samples(self) -> list[tuple[int, int]]:
        """(seed, index of the prompt) of every sample, seed by seed."""
        return [(seed, i) for seed in self.seeds for i in range(len(self.prompts))]

    @property
    def chunks(self) -> list[list[tuple[int, int]]]:
        """The samples in groups of `batch_size`."""
        samples = self.samples
        return [samples[i : i + self.batch_size] for i in range(0, len(samples), self.batch_size)]


@dataclass(frozen=True)
class Samples:
    """The finished samples of one setting, in the order of `Plan.samples`.

    Args:
        setting: How they were made.
        paths: PNG files.
        prompts: Text of each.
        nfe: Network evaluations of each.
        update: Norm of (guided - conditional) as denoised images of each, mean over all steps;
            None where the scheduler's noise levels are not known.
        seconds: Seconds a sample, mean over chunks; the first chunk of a process, in which
            libraries prepare themselves, counts only if there is no other.
    """

    setting: Setting
    paths: list[Path]
    prompts: list[str]
    nfe: list[int]
    update: list[float] | None
    seconds: float


def sample_seed(seed: int, prompt_index: int) -> int:
    """Seed of the generator of one sample: 63 bits of SHA-256 of the two numbers."""
    digest = hashlib.sha256(f"pilotage {seed} {prompt_index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def check_call(pipe: Any, plan: Plan) -> list[Guidance]:
    """The resolved guidance of every setting; raises what a call of the pipeline would.

    Raises:
        ValueError: the pipeline takes no prompt, an option is not an argument of its call, or a
            setting leaves nothing to guide.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    if "prompt" not in parameters or "guidance" not in parameters:
        raise ValueError(
            f"{type(pipe).__name__} cannot be compared: its call takes no prompt or no guidance "
            "(wrap it with pilotage.pipelines.guided)"
        )
    taken = {"prompt", "guidance", "detailed_trace", "num_inference_steps", "generator"}
    taken |= {"num_images_per_prompt", "output_type", "return_dict", scale_argument(type(pipe))}
    for name in plan.options:
        if name not in parameters or name in taken:
            raise ValueError(f"{name!r} cannot be an option of {type(pipe).__name__}'s call here")
    guidances = [pipe.resolve_guidance(setting.guidance) for setting in plan.settings]
    for setting, guidance in zip(plan.settings, guidances, strict=True):
        if setting.scale <= 1 and not guidance.is_plain:
            raise ValueError(f"{setting.label}: guidance needs a scale > 1")
        if guidance.needs_noise_level:
            check_scheduler(pipe.scheduler)
    return guidances


def generate(
    pipe: Any,
    plan: Plan,
    folder: Path | str,
    progress: bool = True,
    on_chunk: Callable[[int, int], None] | None = None,
) -> list[Samples]:
    """Make what is missing of a plan in `folder`.

    Under ``accelerate launch`` every process takes its share of the chunks and returns when all
    are finished.

    Args:
        pipe: A guided pipeline, on its device.
        plan: What to generate.
        folder: Where the pictures go; may hold an interrupted run of the same plan, or of one with
            other settings.
        progress: Show a bar (main process only).
        on_chunk: Called with (finished, all) chunks of this process after each.

    Returns:
        The samples of every setting, in the plan's order.

    Raises:
        ValueError: the folder holds another plan (the message names what differs).
    """
    from tqdm import tqdm

    state = processes()
    folder = Path(folder)
    plan, guidances, identity = prepare(pipe, plan, folder)
    state.wait_for_everyone()
    if state.is_main_process:
        write_json(folder / PLAN, identity)
    work = [
        (number, chunk, setting, guidance)
        for number, chunk in enumerate(plan.chunks)
        if number % state.num_processes == state.process_index
        for setting, guidance in zip(plan.settings, guidances, strict=True)
    ]
    todo = [item for item in work if not _finished(folder, item[2], item[0], item[1])]
    bar = tqdm(total=len(work), initial=len(work) - len(todo), unit="chunk", desc="pictures")
    bar.disable = bar.disable or not (progress and state.is_main_process)
    maker = _Maker(pipe, plan, folder)
    with bar:
        for done, item in enumerate(todo, len(work) - len(todo) + 1):
            maker.make(*item)
            bar.update()
            if on_chunk is not None:
                on_chunk(done, len(work))
    state.wait_for_everyone()
    return [read_samples(plan, setting, folder) for setting in plan.settings]


def prepare(
    pipe: Any, plan: Plan, folder: Path | str
) -> tuple[Plan, list[Guidance], dict[str, Any]]:
    """What `generate` begins with, and all it may refuse; writes nothing.

    Returns:
        The plan, its options saying what the unconditional branch is made of; the resolved
        guidance of every setting; and the content of the folder's ``plan.json``.

    Raises:
        ValueError: see `check_call`; or the folder holds another plan.
    """
    guidances = check_call(pipe, plan)
    negative = unconditional_text(pipe, plan.options.get("negative_prompt"))
    plan = replace(plan, options=plan.options | {"negative_prompt": negative})
    return plan, guidances, _joined(Path(folder) / PLAN, plan_identity(pipe, plan, guidances))


def plan_identity(pipe: Any, plan: Plan, guidances: Sequence[Guidance]) -> dict[str, Any]:
    """Everything the pictures depend on, ready for JSON."""
    return {
        **pipeline_identity(pipe),
        "torch": str(torch.__version__),
        "device": pipe.device.type,
        "prompts": list(plan.prompts),
        "seeds": list(plan.seeds),
        "batch_size": plan.batch_size,
        "options": plan.options,
        "settings": [
            {
                "method": s.method,
                "guidance": str(g),
                # What a name or a short text leaves out: coefficients, say.
                "digest": hashlib.sha256(json.dumps(to_dict(g)).encode()).hexdigest()[:16],
                "scale": s.scale,
                "steps": s.steps,
            }
            for s, g in zip(plan.settings, guidances, strict=True)
        ],
    }


def read_samples(plan: Plan, setting: Setting, folder: Path | str) -> Samples:
    """The finished samples of one setting.

    Raises:
        FileNotFoundError: a chunk is not finished.
    """
    records = []
    for number, chunk in enumerate(plan.chunks):
        path = _record_path(Path(folder), setting, number)
        if not _finished(Path(folder), setting, number, chunk):
            raise FileNotFoundError(f"{path} is missing or incomplete: generate the plan first")
        records.append(json.loads(path.read_text()))
    warm = [r for r in records if not r["first"]] or records
    updates = [r["update"] for r in records]
    return Samples(
        setting,
        [_picture_path(Path(folder), setting, *sample) for sample in plan.samples],
        [plan.prompts[i] for _, i in plan.samples],
        [n for r in records for n in r["nfe"]],
        None if None in updates else [u for update in updates for u in update],
        sum(r["seconds"] for r in warm) / sum(len(r["nfe"]) for r in warm),
    )


class _Maker:
    """Makes chunks; remembers whether it has made one before."""

    def __init__(self, pipe: Any, plan: Plan, folder: Path) -> None:
        self.pipe, self.plan, self.folder, self.first = pipe, plan, folder, True
        pipe.set_progress_bar_config(disable=True)
        try:
            check_scheduler(pipe.scheduler)
            self.detailed = True
        except UnknownSchedulerError:
            self.detailed = False

    def make(
        self, number: int, chunk: list[tuple[int, int]], setting: Setting, guidance: Guidance
    ) -> None:
        """Generate one chunk and write it, its record last."""
        negative = self.plan.options["negative_prompt"]
        options = self.plan.options | negative_argument(self.pipe, negative, len(chunk))
        scale = scale_option(self.pipe, setting.scale)
        begin = time.perf_counter()
        images = self.pipe(
            prompt=[self.plan.prompts[i] for _, i in chunk],
            guidance=guidance,
            detailed_trace=self.detailed,
            num_inference_steps=setting.steps,
            generator=[torch.Generator().manual_seed(sample_seed(*sample)) for sample in chunk],
            **scale,
            **options,
        ).images
        seconds = time.perf_counter() - begin  # the pictures are on the host: nothing is pending
        trace = self.pipe.guidance_trace
        for (seed, i), image, nfe in zip(chunk, images, trace.nfe, strict=True):
            info = PngInfo()
            made = {"prompt": self.plan.prompts[i], "seed": seed, "guidance": str(guidance)}
            made |= scale | {"steps": setting.steps, "nfe": nfe}
            info.add_text("pilotage", json.dumps(made))
            path = _picture_path(self.folder, setting, seed, i)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.partial")
            image.save(partial, "PNG", pnginfo=info)
            os.replace(partial, path)
        record = {
            "samples": [list(sample) for sample in chunk],
            "nfe": trace.nfe,
            "update": update_norms(trace, guidance, self.pipe.scheduler) if self.detailed else None,
            "seconds": round(seconds, 6),
            "first": self.first,
        }
        write_json(_record_path(self.folder, setting, number), record)
        self.first = False


def update_norms(trace: Trace, guidance: Guidance, scheduler: Any) -> list[float] | None:
    """Norm of (guided - conditional) as denoised images, mean over all steps, of each sample.

    Steps without guidance count as 0, those at which a sample rests do not count. None where the
    noise level is infinite and the network predicts noise: its denoised image does not exist there.

    Args:
        trace: A detailed trace.
        guidance: What made it.
        scheduler: The scheduler it was made with.
    """
    prediction = prediction_type_of(scheduler)
    totals = torch.zeros(trace.batch, dtype=torch.float64)
    counts = torch.full((trace.batch,), len(trace.steps))
    for step in trace.steps:
        counts[step.resting] -= 1
        if step.update_norm is None:
            continue
        factor = 1.0 if guidance.rule.space == "x0" else _to_x0_factor(step.noise, prediction)
        rows = list(range(trace.batch)) if step.estimated else step.rows
        totals[rows] += factor * step.update_norm.double().cpu()
    means = totals / counts
    return [round(value, 6) for value in means.tolist()] if means.isfinite().all() else None


def _to_x0_factor(noise: float, prediction: str) -> float:
    """|a_p| of `NoiseLevel.coefficients` from sigma / alpha: what differences are multiplied by."""
    match prediction:
        case "epsilon":
            return noise
        case "v_prediction":  # alpha^2 + sigma^2 = 1
            return (1 + noise**-2) ** -0.5 if noise > 0 else 0.0
        case "flow":  # alpha + sigma = 1
            return 1 / (1 + 1 / noise) if noise > 0 else 0.0
    return 1.0


def evaluations(scheduler: Any, steps: int) -> int:
    """Network evaluations of one branch in a run of `steps` steps (Heun's makes two a step)."""
    copy = type(scheduler).from_config(scheduler.config)
    dynamic = scheduler.config.get("use_dynamic_shifting", False)
    copy.set_timesteps(steps, **({"mu": 1.0} if dynamic else {}))
    return len(copy.timesteps)


def steps_for_nfe(scheduler: Any, nfe: float, at_most: int) -> int:
    """Steps of classifier-free guidance whose network evaluations come closest to `nfe`.

    A step costs two or more, so that the best possible match may be one evaluation off.

    Args:
        scheduler: The pipeline's.
        nfe: Mean network evaluations a sample.
        at_most: Largest number of steps to consider.
    """
    candidates = range(1, at_most + 1)
    return min(candidates, key=lambda n: (abs(2 * evaluations(scheduler, n) - nfe), n))


def mean_nfe(samples: Samples) -> float:
    """Mean network evaluations a sample."""
    return statistics.fmean(samples.nfe)


def _setting_folder(folder: Path, setting: Setting) -> Path:
    return folder / setting.slug


def _picture_path(folder: Path, setting: Setting, seed: int, prompt_index: int) -> Path:
    return _setting_folder(folder, setting) / f"{seed:06d}-{prompt_index:05d}.png"


def _record_path(folder: Path, setting: Setting, number: int) -> Path:
    return _setting_folder(folder, setting) / f"chunk-{number:05d}.json"


def _finished(folder: Path, setting: Setting, number: int, chunk: list[tuple[int, int]]) -> bool:
    if not _record_path(folder, setting, number).is_file():
        return False
    return all(_picture_path(folder, setting, *sample).is_file() for sample in chunk)


def _joined(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The plan of a folder with this one's settings; refuse a folder that holds another plan.

    Settings are apart, each in its own folder: others than these stay as they are.
    """
    wanted = json.loads(json.dumps(identity))
    if not path.is_file():
        return wanted
    try:
        found = json.loads(path.read_text())
        settings = {_slug(setting): setting for setting in found["settings"]}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): remove the folder or name another"
        ) from error
    for setting in wanted["settings"]:
        settings.setdefault(_slug(setting), setting)
    found["settings"] = [settings[_slug(setting)] for setting in wanted["settings"]]
    for name in wanted:
        if found.get(name) != wanted[name]:
            raise ValueError(
                f"{path.parent} holds another plan: its {name} is {_short(found.get(name))}, "
                f"here it is {_short(wanted[name])}; name another folder, or remove this one"
            )
    return wanted | {"settings": list(settings.values())}


def _slug(setting: dict[str, Any]) -> str:
    return Setting(setting["method"], setting["scale"], setting["steps"]).slug


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
