"""Fitting LinearAG's coefficients on the embedded model, and refusing them elsewhere."""

import functools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler

from pilotage.eval.embedded import embedded_folder, load_embedded, load_pipeline
from pilotage.eval.tuning.trials import Trials
from pilotage.guidance import (
    CFG,
    Gram,
    Guidance,
    Schedule,
    fit_coefficients,
    linear_ag,
    load_guidance,
)
from pilotage.guidance.fitting.record import Record
from pilotage.pipelines import guided
from pilotage.pipelines.fitting.fit import fit
from pilotage.pipelines.fitting.fitted import run_identity
from pilotage.pipelines.fitting.on_policy import ScheduleFitter
from pilotage.pipelines.fitting.runs import Runs

from ...families import FAMILIES

PROMPTS = ["noto style fox", "twemoji style red apple", "fluent style cactus", "blob style penguin"]
PROMPTS += ["flat style rose", "emojione style key"]
STEPS = 4
OPTIONS = {"num_inference_steps": STEPS, "progress": False, "batch_size": 2}


@pytest.fixture(scope="module")
def pipe():
    pipe = load_embedded()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def found(pipe):
    return fit(Runs(pipe, PROMPTS, **OPTIONS))


def test_the_fit_is_least_squares_of_whole_trajectories(pipe, found):
    """All trajectories recorded at once, the fifth left out, one regression."""
    runs = []
    for i, prompt in enumerate(PROMPTS):
        generator = torch.Generator().manual_seed(i)
        record = Record(lambda cond, uncond: runs.append((cond, uncond)))
        pipe(prompt, guidance=record, num_inference_steps=STEPS, generator=generator)
    kept = [run for i, run in enumerate(runs) if i != 4]
    gram = Gram.of(*(torch.cat(parts, 1) for parts in zip(*kept, strict=True)))
    oracle = fit_coefficients(gram, target="difference", ridge=1e-3)
    for ours, theirs in zip(found.coefficients.uncond, oracle.uncond, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert (found.trajectories, found.held_out) == (5, 1)
    assert found.figures.keys() == {"r2", "r2_held_out", "r2_difference"}
    assert all(value <= 1 for values in found.figures.values() for value in values)


def test_a_repeated_fit_is_the_same_and_an_interrupted_one_goes_on(pipe, found, tmp_path):
    calls = []

    class Killed(Exception):
        pass

    def count(_network, _args):
        calls.append(1)
        if len(calls) == STEPS + 2:  # in the middle of the second batch
            raise Killed

    handle = pipe.unet.register_forward_pre_hook(count)
    try:
        with pytest.raises(Killed):
            fit(Runs(pipe, PROMPTS, **OPTIONS), checkpoint=tmp_path)
        assert len(list(tmp_path.iterdir())) == 1
        assert fit(Runs(pipe, PROMPTS, **OPTIONS), checkpoint=tmp_path) == found
    finally:
        handle.remove()
    assert len(calls) == STEPS + 2 + 3 * STEPS, "the finished batch is not made again"
    with pytest.raises(ValueError, match="its prompts differs"):
        fit(Runs(pipe, PROMPTS[::-1], **OPTIONS), checkpoint=tmp_path)
    file = sorted(tmp_path.iterdir())[0]
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        fit(Runs(pipe, PROMPTS, **OPTIONS), checkpoint=tmp_path)


WORKER = """
import json, sys
import torch
torch.set_num_threads(1)
from pilotage.eval.embedded import load_embedded
from pilotage.guidance import linear_ag
from pilotage.pipelines.fitting.fit import fit
from pilotage.pipelines.fitting.runs import Runs
from pilotage.pipelines.processes import processes
found = fit(Runs(load_embedded(), json.loads(sys.argv[1]), **json.loads(sys.argv[2])))
if processes().is_main_process:
    assert processes().num_processes == 2
    found.save(sys.argv[3], linear_ag(found.coefficients))
"""


def test_two_processes_find_the_same(found, tmp_path):
    script, path = tmp_path / "worker.py", tmp_path / "found.json"
    script.write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [json.dumps(PROMPTS), json.dumps(OPTIONS), str(path)]
    result = subprocess.run(
        [*launch, script, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert load_guidance(path).policy.fill == found.coefficients


def test_coefficients_belong_to_what_they_were_fitted_on(pipe, found):
    guidance = Guidance(CFG(), linear_ag(found.coefficients))
    call = {"prompt": PROMPTS[:1], "guidance": guidance, "num_inference_steps": STEPS}
    pipe(**call)
    assert pipe.guidance_trace.nfe == [STEPS + 1]
    for changed, field in (
        ({"num_inference_steps": STEPS + 1}, "num_inference_steps was 4, here it is 5"),
        ({"guidance_scale": 3.0}, "guidance_scale was 7.5 to 7.5, here it is 3"),
        ({"negative_prompt": "blurry"}, "negative_prompt was '', here it is 'blurry'"),
        ({"timesteps": [900, 100]}, "together with timesteps="),
    ):
        with pytest.raises(ValueError, match=field):
            pipe(**(call | changed))
    scheduler = pipe.scheduler
    try:
        pipe.scheduler = DDIMScheduler.from_config(scheduler.config)
        with pytest.raises(ValueError, match="scheduler was 'DPMSolverMultistepScheduler'"):
            pipe(**call)
        pipe.scheduler = type(scheduler).from_config(scheduler.config, solver_order=1)
        with pytest.raises(ValueError, match="scheduler_config.solver_order was 2, here it is 1"):
            pipe(**call)
    finally:
        pipe.scheduler = scheduler
    weight = pipe.unet.conv_in.weight
    with torch.no_grad():
        weight.mul_(2)
    try:
        with pytest.raises(ValueError, match="networks.unet was"):
            pipe(**call)
    finally:
        with torch.no_grad():
            weight.mul_(0.5)
    pipe(**call)


def test_files_of_another_version_hold(pipe, found):
    """Version 0.1 kept its own number in the identity; new fits do not, and nobody looks at it."""
    identity = found.coefficients.identity
    assert "pilotage" not in identity
    old = replace(found.coefficients, identity=identity | {"pilotage": "0.0"})
    call = {"num_inference_steps": STEPS, "output_type": "latent"}
    pipe(PROMPTS[:1], guidance=linear_ag(old), **call)
    with pytest.raises(ValueError, match="scheduler was 'X'"):
        pipe(
            PROMPTS[:1],
            guidance=linear_ag(replace(old, identity=identity | {"scheduler": "X"})),
            **call,
        )


@pytest.mark.parametrize("how", ["regressed", "on policy"])
def test_no_negative_prompt_is_not_an_empty_one_where_zeros_take_its_place(how):
    """SDXL: settings fitted with either belong to calls with that one."""
    pipe = guided(FAMILIES["sdxl"].build())
    assert pipe.config.force_zeros_for_empty_prompt

    def made(**negative):
        if how == "regressed":
            return fit(Runs(pipe, PROMPTS[:2], **OPTIONS, **negative)).coefficients
        fitter = ScheduleFitter(Runs(pipe, PROMPTS[:2], num_inference_steps=STEPS, **negative))
        return fitter.fit(("both", "both", "estimate", "estimate"))[0].coefficients

    def run(guidance, **negative):
        generator = torch.Generator().manual_seed(0)
        call = {"num_inference_steps": STEPS, "guidance_scale": 7.5, "output_type": "latent"}
        return pipe(PROMPTS[0], guidance=guidance, generator=generator, **call, **negative).images

    default, empty = made(), made(negative_prompt="")
    assert default.uncond != empty.uncond
    choices = ("both", "both", "estimate", "estimate")
    default, empty = (Schedule(choices, fill=c, identity=c.identity) for c in (default, empty))
    run(default)
    run(default, negative_prompt=None)
    run(empty, negative_prompt="", negative_prompt_2="")
    for guidance, negative, message in (
        (default, {"negative_prompt": ""}, "negative_prompt was None, here it is ''"),
        (empty, {}, "negative_prompt was '', here it is None"),
        (
            empty,
            {"negative_prompt": "", "negative_prompt_2": "ugly"},
            "negative_prompt_2 was '', here it is 'ugly'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(guidance, **negative)


def test_trials_run_what_a_call_without_a_negative_prompt_does(pipe):
    """On SDXL they name none, elsewhere an empty one, which two-branched calls may need."""
    sdxl = guided(FAMILIES["sdxl"].build())
    assert "negative_prompt" not in Trials(sdxl, PROMPTS[:2]).calls()[0]
    latents = {}
    for name, negative in (("none", {}), ("empty", {"negative_prompt": [""] * 2})):
        call = Trials(sdxl, PROMPTS[:2], num_inference_steps=2).calls()[0]
        latents[name] = sdxl(guidance="cfg", output_type="latent", **call | negative).images
    fitter = ScheduleFitter(Runs(sdxl, PROMPTS[:2], num_inference_steps=2))
    torch.testing.assert_close(fitter.pictures, latents["none"])
    assert not torch.allclose(latents["none"], latents["empty"])
    assert Trials(pipe, PROMPTS[:2]).calls()[0]["negative_prompt"] == ["", ""]
    assert run_identity(pipe, 4, (7.5, 7.5), None)["negative_prompt"] == ""
    assert run_identity(sdxl, 4, (7.5, 7.5), None)["negative_prompt"] is None


def test_w_is_the_same_where_a_pipeline_counts_from_0(monkeypatch):
    """Kandinsky 3 guides by c + s (c - u): w is s + 1."""
    pipe = guided(FAMILIES["kandinsky3"].build())
    options = {"guidance_scale": 5.0, "num_inference_steps": STEPS}
    assert Trials(pipe, PROMPTS[:2], **options).calls()[0]["guidance_scale"] == 4.0

    class Called(Exception):
        pass

    @functools.wraps(type(pipe).__call__)
    def call(_pipe, **arguments):
        raise Called(arguments["guidance_scale"])

    monkeypatch.setattr(type(pipe), "__call__", call)
    with pytest.raises(Called, match="^4.0$"):
        fit(Runs(pipe, PROMPTS[:2], **options))
    with pytest.raises(Called, match="^4.0$"):
        ScheduleFitter(Runs(pipe, PROMPTS[:2], **options))


def test_a_model_folder_may_hold_named_settings(found, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(embedded_folder(), folder)
    policy = linear_ag(found.coefficients, then="estimate")
    found.save(folder / "guidance" / "quick.json", policy)
    pipe = load_pipeline(folder)
    pipe(PROMPTS[0], guidance="quick", num_inference_steps=STEPS)
    assert pipe.guidance_trace.nfe == [STEPS + 1]
    assert str(pipe.resolve_guidance("quick")) == str(Guidance(CFG(), policy))
    with pytest.raises(ValueError, match="unknown guidance 'slow'"):
        pipe(PROMPTS[0], guidance="slow", num_inference_steps=STEPS)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": "a fox"}, "a list of prompts"),
        ({"prompts": ["a fox"]}, "a list of at least 2 prompts"),
        ({"guidance_scale": 1.0}, "needs a guidance_scale > 1"),
        ({"scales": [7.5, float("nan")]}, "finite and >= 1"),
        ({"scales": [7.5, 1.0]}, "needs a guidance_scale > 1"),
        ({"ridge": -1.0}, "ridge must be"),
        ({"batch_size": 0}, "batch_size must be"),
    ],
)
def test_bad_settings_fail_before_anything_runs(pipe, changed, message):
    with pytest.raises(ValueError, match=message):
        fitted = {
            name: changed.pop(name) for name in ("scales", "ridge", "target") if name in changed
        }
        fit(Runs(pipe, **({"prompts": PROMPTS} | OPTIONS | changed)), **fitted)
