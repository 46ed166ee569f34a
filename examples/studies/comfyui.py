r"""Guidance within the real ComfyUI: every sampler and rule against float64: ``comfyui.json``.

    PILOTAGE_COMFYUI=/path/to/ComfyUI python -m examples.studies.comfyui

in the environment that ComfyUI runs in, with Pilotage and pytest installed. The model is of Stable
Diffusion 1.5's form, tiny, with random weights; the calls are those of ComfyUI's KSampler. At every
evaluation the denoised image that the sampler is given is compared with what the rule makes, in
float64, of the two branches that ComfyUI computed; errors are the largest deviation divided by the
largest value of the image. APG is compared with Algorithm 1 of its paper, CFG rescale with its
formula, the other rules with their own code in float64.
"""

from __future__ import annotations

import argparse
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pilotage.eval.record import write_figures
from pilotage.guidance import APG, AdaptiveGuidance, NoiseLevel, Policy, Predictions, Rule
from pilotage.guidance.base import Step
from pilotage.pipelines.comfyui import guided, make, methods, trace_of
from tests.pipelines.comfyui import oracles
from tests.pipelines.comfyui.backends import ComfyUI
from tests.pipelines.comfyui.conftest import Recorder

OUTPUT = Path("eval/results/comfyui.json")
TESTS = "tests/pipelines/comfyui"
W = 7.5
# The paper's momentum, and a threshold that is reached at some of the steps of these models.
PAPER = APG(eta=0.0, norm_threshold=0.5, momentum=-0.5, threshold_unit="l2")


class Outcomes:
    """What became of every test, for pytest."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the outcome of the test itself, and of a setup that failed."""
        if report.when == "call" or report.failed:
            name = report.nodeid.removeprefix(f"{TESTS}/").replace("[comfyui]", "")
            self.found[name.replace("comfyui-", "")] = report.outcome


def error(results: list[Tensor], expected: list[Tensor]) -> float:
    """The largest deviation of a run's images, in units of the largest value of each."""
    pairs = zip(results, expected, strict=True)
    return max(float((r.double() - e).abs().max() / e.abs().max()) for r, e in pairs)


def samplers(comfy: ComfyUI, steps: int) -> dict[str, dict[str, Any]]:
    """Every sampler of KSampler with APG: evaluations, and the error of Algorithm 1."""
    model, found = comfy.model(), {}
    for sampler in comfy.samplers:
        record = Recorder()
        run = record(guided(model, PAPER))
        comfy.sample(run, sampler, steps=steps, cfg=W, batch=2)
        sigmas = [float(step["sigma"][0]) for step in record.steps]
        found[sampler] = {
            "evaluations": len(record.steps),
            "max_error": error(record.results(), oracles.apg(record.pairs(), W)),
            "noise_rises": any(a < b for a, b in zip(sigmas, sigmas[1:], strict=False)),
        }
    return found


def in_double(rule: Rule, steps: list[dict[str, Any]], kind: str, last: float) -> list[Tensor]:
    """What a rule makes of recorded branches in float64, by conversions of the oracles."""
    state, found = None, []
    sigmas = [float(step["sigma"][0]) for step in steps] + [last]
    for i, step in enumerate(steps):
        level, later = (_level(sigma, kind) for sigma in sigmas[i : i + 2])
        x, sigma = step["input"].double(), step["sigma"]
        native = {
            name: oracles.output(step[f"{name}_denoised"].double(), x, sigma, kind)
            for name in ("cond", "uncond")
        }
        x_t = x if kind == "flow" else x * level.alpha
        now = Step(i, len(steps), level, later, x_t)
        predictions = Predictions(native, now)
        guided, state = rule.combine(predictions, now, W, state)
        found.append(guided if rule.space == "x0" else level.to_x0(guided, x_t))
    return found


def _level(sigma: float, kind: str) -> NoiseLevel:
    if kind == "flow":
        return NoiseLevel(1 - sigma, sigma, "flow")
    alpha = (1 + sigma**2) ** -0.5
    return NoiseLevel(alpha, sigma * alpha, "epsilon")


def rules(comfy: ComfyUI, steps: int) -> dict[str, float]:
    """Every rule, as it is set by default, with Euler: its error."""
    found = {}
    for name, maker in methods("rule").items():
        rule = make(maker, {})
        kind = "flow" if rule.needs_flow else "epsilon"
        record = Recorder()
        comfy.sample(record(guided(comfy.model(kind=kind), rule)), steps=steps, cfg=W, batch=2)
        found[name] = error(record.results(), in_double(rule, record.steps, kind, 0.0))
    return found


def evaluations(comfy: ComfyUI, guidance: str | Policy, batch: int = 1) -> int | list[int]:
    """Network evaluations of 20 steps of DPM++ 2M: one sample's, or those of every sample.

    Raises:
        RuntimeError: the network evaluated another number of rows than the trace has.
    """
    model = comfy.model()
    run = guided(model, guidance)
    with comfy.counting(model) as rows:
        comfy.sample(run, "dpmpp_2m", steps=20, cfg=W, batch=batch)
    nfe = trace_of(run).nfe
    if sum(nfe) != sum(rows):
        raise RuntimeError(f"the trace has {nfe} evaluations, the network made {sum(rows)}")
    return nfe if batch > 1 else nfe[0]


def main() -> None:
    """Measure everything and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12, help="of every run of a sampler")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    outcomes, comfy = Outcomes(), ComfyUI()
    options = ["-q", "-p", "no:cacheprovider", "-m", "comfyui", "--tb=short", TESTS]
    pytest.main(options, plugins=[outcomes])
    commit = subprocess.run(
        ["git", "-C", comfy.place, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    by_sampler, by_rule = samplers(comfy, arguments.steps), rules(comfy, arguments.steps)
    errors = [*(s["max_error"] for s in by_sampler.values()), *by_rule.values()]
    write_figures(
        OUTPUT,
        {
            "comfyui": {"version": comfy.version, "commit": commit.stdout.strip()},
            "torch": torch.__version__,
            "scale": W,
            "steps": arguments.steps,
            "samplers": by_sampler,
            "rules": by_rule,
            "max_error": max(errors),
            "ag_evaluations": evaluations(comfy, AdaptiveGuidance(0.99)),
            "ag_evaluations_of_three": evaluations(comfy, AdaptiveGuidance(0.99), batch=3),
            "forecast_evaluations": evaluations(comfy, "apg+forecast"),
            "hold_evaluations": evaluations(comfy, "hold"),
            "full_evaluations": evaluations(comfy, AdaptiveGuidance(2.0)),
            "state_cases": outcomes.found,
        },
    )


if __name__ == "__main__":
    main()
