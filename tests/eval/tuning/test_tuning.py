"""Calibration, policy search and the trace's plot, on the embedded model."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pilotage.eval.cli import main
from pilotage.eval.embedded import load_embedded
from pilotage.eval.tuning.calibration import SLACK, agreement, calibrate, cost_curve
from pilotage.eval.tuning.commands import name_it
from pilotage.eval.tuning.policy_search import search
from pilotage.eval.tuning.relaxed_search import ScaledSteps, relaxed_search, schedules
from pilotage.eval.tuning.store import Candidate, pareto
from pilotage.eval.tuning.trials import Trials
from pilotage.guidance import (
    APG,
    AdaptiveGuidance,
    Coefficients,
    HoldDifference,
    Schedule,
    load_guidance,
)
from pilotage.pipelines import guided
from pilotage.pipelines.guided import guidance_folder

from ...families import FAMILIES

PROMPTS = ["noto style fox", "twemoji style red apple", "fluent style cactus"]
STEPS = 4
SETTINGS = {"num_inference_steps": STEPS, "progress": False}


@pytest.fixture(scope="module")
def pipe():
    """Tiny, with random weights, but with text, noise levels and a differentiable solver."""
    pipe = guided(FAMILIES["sdxl"].build())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def embedded():
    """The model on which qualities mean something."""
    pipe = load_embedded()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def trials(pipe):
    return Trials(pipe, PROMPTS, num_inference_steps=STEPS)


@pytest.mark.parametrize("then", ["cond", "forecast"])
def test_costs_are_known_before_any_run(trials, then):
    """The curve from plain guidance against real runs of Adaptive Guidance."""
    for space, gamma in agreement(trials).items():
        curve = cost_curve(gamma, then=then)
        assert [cost for _, cost in curve] == sorted(cost for _, cost in curve)
        for threshold, cost in curve[:: max(1, len(curve) // 3)]:
            _, nfe = trials.run(AdaptiveGuidance(threshold, space, then=then))
            assert sum(nfe) / len(nfe) == pytest.approx(cost)


def test_a_lag_costs_one_more_each():
    gamma = torch.tensor([[0.1, 0.9], [0.5, 0.2], [0.4, 0.95]], dtype=torch.float64)
    thresholds = pytest.approx([0.1 - SLACK, 0.5 - SLACK, 0.9 - SLACK, 0.95 - SLACK], rel=1e-12)
    for lag, costs in ((0, (4.0, 4.5, 5.0, 6.0)), (1, (5.0, 5.5, 5.5, 6.0))):
        found = tuple(zip(*cost_curve(gamma, lag=lag), strict=True))
        assert found[0] == thresholds and found[1] == costs


@pytest.mark.parametrize("off", [0.4e-9, -0.4e-9, -0.9 * SLACK])
def test_costs_do_not_hang_on_the_last_digits_of_a_cosine(off):
    """Adaptive Guidance at every threshold, replayed on cosines that are a little off."""
    gamma = torch.rand(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    twin = gamma[0, 1].item()
    gamma[1, 0] = twin + 1e-9  # nearer than the slack: the threshold lies between them
    for threshold, cost in cost_curve(gamma):
        if abs(off) > 0.5e-9 and abs(threshold - twin) < 2 * SLACK:
            continue
        stopped = (gamma + off >= threshold).double().cummax(0).values
        guided = (1 - stopped).sum(0).add(1).clamp(max=len(gamma))
        assert (len(gamma) + guided).mean().item() == pytest.approx(cost, rel=1e-12)


def test_calibration_to_a_cost_and_to_a_quality(embedded, tmp_path):
    trials = Trials(embedded, PROMPTS[:2], **SETTINGS)
    found = calibrate(trials, target_nfe=6)
    for space, gamma in agreement(trials).items():
        nearest = min(abs(cost - 6) for _, cost in cost_curve(gamma))
        assert abs(found.proofs[space][1] - 6) == pytest.approx(nearest)
    assert found.best.quality == max(quality for _, _, quality in found.proofs.values())
    path = tmp_path / "ag.json"
    found.save(path)
    assert load_guidance(path) == found.guidance
    images, nfe = trials.run(load_guidance(path))
    assert sum(nfe) / len(nfe) == pytest.approx(found.best.nfe)

    aim = found.best.quality
    again = calibrate(trials, target_ssim=aim - 1e-6)
    assert again.best.quality >= aim - 1e-6
    assert again.best.nfe <= found.best.nfe + 1e-9


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({}, "needs a target"),
        ({"target_nfe": 7, "target_ssim": 0.9}, "one of them"),
        ({"target_ssim": 1.2}, "between 0 and 1"),
        ({"target_nfe": 30}, "no threshold costs 30"),
    ],
)
def test_impossible_targets(pipe, targets, message):
    with pytest.raises(ValueError, match=message):
        calibrate(Trials(pipe, PROMPTS[:1], **SETTINGS), **targets)


def test_the_front_is_what_nothing_beats():
    chance = torch.Generator().manual_seed(0)
    values = torch.rand(30, 2, generator=chance).tolist()
    some = [Candidate(Schedule(("both",)), round(10 * n), q) for n, q in values]
    front = pareto(some)
    for candidate in some:
        beaten = any(
            o.nfe <= candidate.nfe
            and o.quality >= candidate.quality
            and (o.nfe, o.quality) != (candidate.nfe, candidate.quality)
            for o in some
        )
        assert (candidate in front) is not beaten


def test_search_reaches_its_floor_at_the_cost_it_says(embedded, tmp_path):
    trials = Trials(embedded, PROMPTS[:2], **SETTINGS)
    found = search(trials, quality_floor=0.8, rounds=4)
    quality, nfe = trials.judge(found.guidance)
    assert quality == pytest.approx(found.best.quality) and quality >= 0.8
    assert nfe == found.best.nfe < 2 * STEPS
    cheaper = [c for c in found.front if c.nfe < found.best.nfe]
    assert all(c.quality < 0.8 for c in cheaper)
    for a, b in itertools.pairwise(found.front):
        assert a.nfe < b.nfe and a.quality < b.quality
    path = tmp_path / "schedule.json"
    found.save(path)
    embedded(PROMPTS[0], guidance=load_guidance(path), num_inference_steps=STEPS)
    with pytest.raises(ValueError, match="num_inference_steps was 4"):
        embedded(PROMPTS[0], guidance=load_guidance(path), num_inference_steps=STEPS + 1)


def test_a_relaxed_run_is_guidance_at_its_mean_scales_and_differentiable(pipe):
    """Constant scales give plain guidance; the gradient agrees with a difference quotient."""
    from pilotage.eval.tuning.relaxed_search import _differentiable, _latents

    trials = Trials(pipe, PROMPTS[:1], num_inference_steps=3)
    target = _latents(trials, 0, None)
    w = torch.full((3,), 7.5)
    wanted = {name: p.requires_grad for name, p in pipe.unet.named_parameters()}
    with _differentiable(pipe):
        w.requires_grad_(True)
        latents = _latents(trials, 0, ScaledSteps((w - 1) / 6.5))
        torch.testing.assert_close(latents, target, rtol=1e-5, atol=1e-5)
        loss = (latents - 1).square().mean()
        loss.backward()
    assert {name: p.requires_grad for name, p in pipe.unet.named_parameters()} == wanted
    assert not pipe.unet.is_gradient_checkpointing
    step = 0.05
    losses = []
    for sign in (1, -1):
        moved = w.detach() + sign * step * torch.tensor([0.0, 1.0, 0.0])
        with torch.no_grad():
            losses.append(
                (_latents(trials, 0, ScaledSteps((moved - 1) / 6.5)) - 1).square().mean().item()
            )
    assert w.grad[1].item() == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=0.02)


def test_relaxed_search_ranks_steps_and_tries_them(pipe):
    found = relaxed_search(Trials(pipe, PROMPTS[:2], **SETTINGS), quality_floor=0.7, iterations=3)
    assert found.tried == STEPS + 1, "and the full run"
    assert {c.nfe for c in found.front} <= set(range(STEPS + 1, 2 * STEPS + 1))
    assert found.best.quality >= 0.7


def test_schedules_of_a_relaxation():
    p = torch.tensor([[0.1, 0.6, 0.3], [0.8, 0.1, 0.1], [0.3, 0.0, 0.7]])
    found = schedules(p, torch.tensor([1.0, 3.0, 5.0]), w=3.0)
    assert [s.choices for s in found] == [
        ("both", "cond", "cond"),
        ("both", "cond", "both"),
        ("both", "both", "both"),
    ]
    assert found[0].factors == pytest.approx(((11 / 3 - 1) / 2, 1.5, 2.0), abs=1e-4)


@pytest.mark.parametrize("between", ["forecast", "estimate"])
def test_a_fitted_search_fits_every_schedule_it_tries(pipe, tmp_path, between):
    """What it says of its best is what that does; interrupted, it does not fit again."""
    path = tmp_path / "tried.json"
    options = {"quality_floor": 0.95, "fitted": True, "between": between}
    trials = Trials(pipe, PROMPTS, num_inference_steps=6, progress=False)
    found = search(trials, rounds=2, checkpoint=path, **options)
    for candidate in (found.front[0], found.best):
        quality, nfe = trials.judge(candidate.schedule)
        assert quality == pytest.approx(candidate.quality, abs=2e-3)
        assert nfe == candidate.nfe == candidate.schedule.nfe(6)
        assert set(candidate.schedule.choices) == {"both", between}
    assert len({c.schedule.fill for c in found.front}) == len(found.front)
    calls = []
    handle = pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        again = search(trials, rounds=2, checkpoint=path, **options)
    finally:
        handle.remove()
    assert len(calls) == 6, "to find the number of evaluations"
    assert again == found
    other = options | {"between": "estimate" if between == "forecast" else "forecast"}
    with pytest.raises(ValueError, match="its between differs"):
        search(trials, checkpoint=path, **other)
    with pytest.raises(ValueError, match="is for classifier-free guidance, got APG"):
        search(Trials(pipe, PROMPTS, rule=APG()), **options)
    with pytest.raises(ValueError, match="between is forecast or estimate"):
        search(trials, **options | {"between": "cond"})


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["pilotage", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code


@pytest.fixture(scope="module")
def common(pipe, tmp_path_factory):
    """The arguments that fit, calibrate and search share here."""
    folder = tmp_path_factory.mktemp("tuning")
    pipe.save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS[:2]))
    return [folder / "prompts.txt", "--steps", 3, "--model", folder / "model"]


def test_the_commands_fit_and_search(monkeypatch, tmp_path, capsys, common):
    linear, found = tmp_path / "linear.json", tmp_path / "found.json"
    assert run(monkeypatch, "fit", *common, "-o", linear) == 0
    assert "R² held out" in capsys.readouterr().out
    assert list((tmp_path / "linear.json.batches").iterdir())
    assert run(monkeypatch, "search", *common, "--floor", 0.5, "--rounds", 1, "-o", found) == 0
    assert "load_guidance" in capsys.readouterr().out
    assert load_guidance(found).policy.fill == HoldDifference()
    assert run(monkeypatch, "search", *common, "--fitted", "--rounds", 0, "-o", found) == 2
    assert "its fill differs" in capsys.readouterr().err
    found = tmp_path / "fitted.json"
    assert run(monkeypatch, "search", *common, "--fitted", "--rounds", 0, "-o", found) == 0
    assert isinstance(load_guidance(found).policy.fill, Coefficients)
    placed = [*common, "--nfe", 4, "--rounds", 2, "-o", tmp_path / "placed.json"]
    assert run(monkeypatch, "search", *placed, "--finer", 2) == 2
    assert "does not pass through the timesteps" in capsys.readouterr().err
    assert run(monkeypatch, "search", *placed) == 0
    policy = load_guidance(tmp_path / "placed.json").policy
    assert policy.nfe(3) == 4 and policy.space == "x0"


@pytest.mark.parametrize("then", ["estimate", "forecast"])
def test_the_command_fits_on_policy(monkeypatch, tmp_path, capsys, common, then):
    path = tmp_path / "fitted.json"
    options = ["--steps", 4, "--on-policy", "--then", then, "-o", path]
    assert run(monkeypatch, "fit", *common, *options) == 0
    shown = capsys.readouterr().out
    assert "distance" in shown and "held out" in shown
    policy = load_guidance(path).policy
    assert policy.choices.then == then and policy.nfe(4) == 5


@pytest.mark.parametrize("then", ["cond", "forecast"])
def test_the_command_calibrates(monkeypatch, tmp_path, capsys, common, then):
    path = tmp_path / "ag.json"
    options = ["--nfe", 5, "--then", then, "-o", path]
    assert run(monkeypatch, "calibrate", *common, *options) == 0
    assert "x0: threshold" in capsys.readouterr().out
    assert load_guidance(path).policy.then == then


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["fit", "--then", "forecast"], "--then forecast is fitted with --on-policy"),
        (["fit", "--then", "linear"], "unknown --then 'linear': known are estimate, cond"),
        (["fit", "--on-policy", "--scale", 3, "--scale", 5], "--on-policy fits one guidance scale"),
        (["search", "--between", "estimate"], "--between is for --fitted"),
        (["search", "--fitted", "--between", "cond"], "unknown --between 'cond': known are"),
        (["search", "--fitted", "--relaxed"], "--fitted makes its own estimates"),
        (["search", "--nfe", 6, "--floor", 0.5], "--nfe goes without --floor"),
        (["search", "--finer", 4], "--finer is for --nfe"),
        (
            ["calibrate", "--nfe", 6, "--then", "none"],
            "unknown --then 'none': known are cond",
        ),
        (["calibrate"], "--nfe or --ssim"),
        (["calibrate", "--nfe", 6, "--rule", "apg+ag"], "--rule is a rule alone"),
    ],
)
def test_what_contradicts_fails_before_anything_is_loaded(
    monkeypatch, tmp_path, capsys, command, message
):
    monkeypatch.setattr("pilotage.eval.embedded.load_embedded", not_to_be_loaded)
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    assert run(monkeypatch, command[0], "prompts.txt", *command[1:], "-o", "out.json") == 2
    assert message in capsys.readouterr().err


def not_to_be_loaded(*_arguments):
    raise AssertionError("loaded")


@pytest.mark.parametrize("command", ["fit", "search", ["calibrate", "--nfe", 6]])
def test_what_cannot_be_written_or_read_fails_before_anything_is_loaded(
    monkeypatch, tmp_path, capsys, command
):
    monkeypatch.setattr("pilotage.eval.embedded.load_embedded", not_to_be_loaded)
    prompts, folder = tmp_path / "prompts.txt", tmp_path / "folder.json"
    prompts.write_text("\n".join(PROMPTS))
    folder.mkdir()
    command = command if isinstance(command, list) else [command]
    for output in (tmp_path, tmp_path / "quick", tmp_path / "quick.v2"):
        assert run(monkeypatch, *command, prompts, "-o", output) == 2
        assert "--output is a file NAME.json, got" in capsys.readouterr().err
    assert run(monkeypatch, *command, prompts, "-o", folder) == 2
    assert "folder.json is a folder" in capsys.readouterr().err
    assert run(monkeypatch, *command, prompts, "-o", prompts / "below.json") == 2
    assert run(monkeypatch, *command, tmp_path, "-o", tmp_path / "x.json") == 2
    assert "Is a directory" in capsys.readouterr().err


def test_only_a_file_in_the_models_folder_is_a_name(embedded, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    named = guidance_folder(embedded) / "quick.v2.json"
    assert 'use it as guidance="quick.v2"' in name_it(named, embedded)
    hub = SimpleNamespace(config=SimpleNamespace(_name_or_path="some/model"))
    for path in (Path("guidance/quick.json"), tmp_path / "guidance" / "quick.json"):
        assert name_it(path, hub) == f'{path}: use it as guidance=load_guidance("{path}")'


def test_the_trace_plots_what_was_measured(pipe, tmp_path):
    options = {"num_inference_steps": STEPS, "guidance": "apg+ag"}
    pipe(PROMPTS[:2], **options)
    assert len(pipe.guidance_trace.plot().axes) == 2, "evaluations and gamma"
    pipe(PROMPTS[:2], **options | {"guidance": "forecast"})
    evaluated = pipe.guidance_trace.plot().axes[0].lines[0].get_ydata().tolist()
    assert evaluated == [0 if s.skipped else 2 for s in pipe.guidance_trace.steps]
    assert sum(evaluated) == pipe.guidance_trace.nfe[0] < 2 * STEPS
    pipe(PROMPTS[:2], **options, detailed_trace=True)
    trace = pipe.guidance_trace
    figure = trace.plot()
    assert [axis.get_ylabel() for axis in figure.axes] == [
        "evaluations",
        "gamma",
        "cond norm",
        "update norm",
        "scale factor",
        "parallel share",
    ]
    gamma = figure.axes[1].lines[0].get_ydata().tolist()
    assert gamma == pytest.approx([s.gamma[0].item() for s in trace.steps if 0 in s.rows])
    figure.savefig(tmp_path / "trace.png")


def test_an_interrupted_search_goes_on(pipe, tmp_path):
    """What was tried is not tried again; a file of another search is refused."""
    path = tmp_path / "tried.json"
    settings = {"num_inference_steps": 3, "progress": False}
    options = {"quality_floor": 0.8, "checkpoint": path}
    calls = []
    handle = pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        first = search(Trials(pipe, PROMPTS[:1], **settings), rounds=0, **options)
        tried, before = len(json.loads(path.read_text())["tried"]), len(calls)
        assert tried == first.tried
        again = search(Trials(pipe, PROMPTS[:1], **settings), rounds=2, **options)
        # To find the number of evaluations, the reference, and at most two new schedules.
        assert len(calls) - before <= 3 * (1 + 1 + 2) and again.tried <= first.tried + 2
        assert {c.schedule.choices for c in first.front} <= {
            tuple(choices) for choices, *_ in json.loads(path.read_text())["tried"]
        }
    finally:
        handle.remove()
    with pytest.raises(ValueError, match="its prompts differs"):
        search(Trials(pipe, PROMPTS[1:2], **settings), **options)
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match="is damaged"):
        search(Trials(pipe, PROMPTS[:1], **settings), **options)
