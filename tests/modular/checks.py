"""What a `Guider` must show of every pipeline that has a place for one, as functions.

    python -m tests.modular.checks  # all of them, in about seven minutes; prints what was found

With "cfg" it guides as diffusers' own guider does, bit for bit; with APG as the paper's algorithm
in float64 does within the stock pipeline; with Adaptive Guidance in as many passes as it promises.
"""

import functools
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import diffusers as df
import torch
from diffusers.modular_pipelines.modular_pipeline import ModularPipeline
from tqdm import tqdm

from pilotage.guidance import APG, CFG, AdaptiveGuidance, Policy, Rule
from pilotage.pipelines import LayoutError, UnknownSchedulerError
from pilotage.pipelines.guiders import Guider
from pilotage.pipelines.seam.support import guiders_of

from ..families import FAMILIES, Family
from ..pipelines.checks import PaperGuidance, equal, run
from .workflows import MODULAR, SCALE, stock_guider

LIMIT = 1e-4  # of the relative error of APG


def refiner() -> Family:
    """HunyuanImage's refiner with a guider, which its published model goes without."""
    family = FAMILIES["hunyuan_image_refiner"]

    def build() -> Any:
        pipe = family.build()
        pipe.guider = df.ClassifierFreeGuidance()
        return pipe

    name = "guider.guidance_scale"
    return replace(family, build=build, scale_name=name, layout="calls: cond uncond")


# The ordinary pipelines whose scale is that of a guider.
ORDINARY: dict[str, Family] = {
    "HunyuanImagePipeline": FAMILIES["hunyuan_image"],
    "HunyuanImageRefinerPipeline": refiner(),
    "HunyuanVideo15Pipeline": FAMILIES["hunyuan15"],
    "HunyuanVideo15ImageToVideoPipeline": FAMILIES["hunyuan15_image"],
    "MotifVideoPipeline": FAMILIES["motif_video"],
    "MotifVideoImage2VideoPipeline": FAMILIES["motif_video_image"],
}
TAKERS = MODULAR | ORDINARY


def use(pipe: Any, guider: Any) -> Any:
    """Makes `guider` the guider of `pipe`, and ones like it of what else it guides."""
    parts = {}
    for name in guiders_of(pipe):
        own = isinstance(guider, Guider)
        parts[name] = guider.partner(SCALE) if own and parts else guider.new() if parts else guider
    if isinstance(pipe, ModularPipeline):
        pipe.update_components(**parts)
    else:
        for name, part in parts.items():
            setattr(pipe, name, part)
    return guider


def call(name: str, batch: int | None = None) -> dict:
    """The arguments of a call, those with a dot being scales of guiders."""
    family = TAKERS[name]
    scale = {family.scale_name: SCALE}
    return family.call(batch or family.max_batch, True) | scale


def stock(name: str, pipe: Any, batch: int | None = None) -> torch.Tensor:
    """What a pipeline returns with diffusers' own guider."""
    use(pipe, stock_guider(pipe))
    return run(pipe, call(name, batch))[0]


def guided_by(name: str, guidance: str | Rule | Policy, pipe: Any = None) -> torch.Tensor:
    """What a pipeline returns with ours."""
    pipe = TAKERS[name].build() if pipe is None else pipe
    use(pipe, Guider(guidance, SCALE).bind(pipe))
    return run(pipe, call(name))[0]


def cfg_bit_equal(name: str) -> bool:
    """Whether "cfg" is diffusers' own guider, for one sample and several."""
    pipe = TAKERS[name].build()
    for batch in {1, TAKERS[name].max_batch}:
        expected = stock(name, pipe, batch)
        use(pipe, Guider("cfg", SCALE).bind(pipe))
        if not equal(run(pipe, call(name, batch))[0], expected):
            return False
    return True


def apg_error(name: str) -> float:
    """Relative difference from the stock pipeline led by the paper's algorithm in float64."""
    eta, r, beta = 0.2, 2.0, -0.6
    rule = APG(eta=eta, norm_threshold=r, momentum=beta, threshold_unit="l2")
    found, plain = guided_by(name, rule), stock(name, TAKERS[name].build())
    with silence():  # the oracle ends calls by exceptions, which modular pipelines log
        paper = PaperGuidance(TAKERS[name], lambda: call(name), eta, r, beta).run()
    ours, theirs, expected = (torch.as_tensor(v).double() for v in (found, plain, paper[0]))
    assert (theirs - expected).norm() / expected.norm() > 1e-3, "APG must change something"
    return ((ours - expected).norm() / expected.norm()).item()


class Pieces(Guider):
    """Counts the runs: some pipelines make a video piece by piece, or from coarse to fine."""

    runs = 0

    def set_state(self, step: int, num_inference_steps: int, timestep: torch.Tensor) -> None:
        super().set_state(step, num_inference_steps, timestep)
        self.runs += step == 0


def passes_ok(name: str) -> bool:
    """Whether the network is asked as often as Adaptive Guidance promises."""
    for threshold, guided_steps in ((-1.0, 1), (1.5, None)):
        pipe, asked = TAKERS[name].build(), []
        for denoiser in TAKERS[name].denoisers:
            count = functools.partial(_count, asked, TAKERS[name].steps)
            getattr(pipe, denoiser).register_forward_pre_hook(count, with_kwargs=True)
        guider = use(pipe, Pieces(CFG() | AdaptiveGuidance(threshold), SCALE).bind(pipe))
        run(pipe, call(name))
        ran = [g for g in map(pipe.__dict__.get, guiders_of(pipe)) if getattr(g, "runs", 0)]
        steps = len(guider.guidance_trace.steps)
        if guider.passes != steps + (guided_steps or steps):
            return False
        if len(asked) != max(g.runs for g in ran) * guider.passes:
            return False
    return True


def _count(asked: list, steps: Callable, module: Any, args: tuple, kwargs: dict) -> None:
    if steps(kwargs):
        asked.append(module)


@contextmanager
def silence() -> Iterator[None]:
    """Keeps diffusers' logger quiet, errors included."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def with_slot() -> list[str]:
    """Every modular pipeline of diffusers with a place for a guider, in each of its workflows."""
    found = []
    for name in sorted(n for n in dir(df) if re.fullmatch(r"\w+ModularPipeline", n)):
        with silence():
            pipe = getattr(df, name)()
        if guiders_of(pipe):
            workflows = getattr(pipe.blocks, "_workflow_map", None) or [""]
            found += [f"{name} {workflow}".strip() for workflow in workflows]
    return found


def report_name(name: str) -> str:
    """An entry of `MODULAR` by the full name of its class."""
    family, _, workflow = name.partition(" ")
    return f"{family}ModularPipeline {workflow}".strip()


def modular_names() -> list[str]:
    """Modular pipelines with a place for a guider, and their workflows."""
    return sorted({*with_slot(), *map(report_name, MODULAR)})


def modular_entry(full: str) -> dict:
    """Whether our guider guides one of `modular_names`, and if not, why.

    "state" is "works", "refused" (a reason is given, and plain "cfg" works) or "unknown".
    """
    entries = {report_name(name): name for name in MODULAR}
    return _entry(entries[full]) if full in entries else _unknown("it has no tiny one")


def _unknown(reason: str) -> dict:
    return {"ok": False, "state": "unknown", "reason": reason}


def _entry(name: str) -> dict:
    try:
        if not cfg_bit_equal(name):
            return _unknown("'cfg' is not what diffusers' guider gives")
        try:
            error, counted = apg_error(name), passes_ok(name)
        except (LayoutError, UnknownSchedulerError) as refusal:
            return {"ok": False, "state": "refused", "reason": str(refusal)}
    except Exception as error:
        return _unknown(f"{type(error).__name__}: {error}")
    if error > LIMIT or not counted:
        return _unknown(f"APG is off by {error:.2g}, passes as promised: {counted}")
    return {"ok": True, "state": "works", "reason": "", "apg_error": error}


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    df.logging.set_verbosity_error()
    found = {full: modular_entry(full) for full in tqdm(modular_names(), unit="workflow")}
    print(json.dumps(found, indent=1))
