"""What a policy search does: floors, interruptions, files of what was tried."""

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch

from pilotage.eval.metrics.images import ssim, to_tensor
from pilotage.eval.tuning import calibration, policy_search
from pilotage.eval.tuning.calibration import agreement, calibrate
from pilotage.eval.tuning.policy_search import climb, place, search, spread
from pilotage.eval.tuning.relaxed_search import relaxed_search
from pilotage.eval.tuning.store import Candidate, TrialLog, pareto
from pilotage.eval.tuning.trials import Trials
from pilotage.guidance import APG, CFG, Coefficients, Guidance, Schedule
from pilotage.pipelines import guided
from pilotage.pipelines.fitting.on_policy import ScheduleFitter

from ...families import FAMILIES

PROMPTS = ["noto style fox", "twemoji style red apple"]
SETTINGS = {"num_inference_steps": 4, "progress": False}
T, ROUNDS = 12, 18


@pytest.fixture(scope="module")
def pipe():
    """Tiny, with random weights, but with text, noise levels and a differentiable solver."""
    pipe = guided(FAMILIES["sdxl"].build())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def equal(images, reference):
    """The strictest quality."""
    return (images == reference).flatten(1).all(1).double()


class Stopped(Exception):
    pass


def measured(schedule):
    """A candidate as if of a network: better for even evaluations, each with a quirk."""
    real = [i for i, choice in enumerate(schedule.choices) if choice == "both"]
    gaps = [b - a for a, b in zip(real, [*real[1:], T], strict=True)]
    digest = hashlib.sha256(f"{schedule.choices} {schedule.factors}".encode()).digest()
    loss = sum(gap**2 / (1 + 0.3 * i) for gap, i in zip(gaps, real, strict=True)) - 12 / 3
    quality = 1.0 if len(real) == T else 0.99 - 0.004 * loss - 0.02 * digest[0] / 255
    return Candidate(schedule, float(schedule.nfe(T)), max(quality, 0.0))


def fitted(log, floor):
    policy_search._move(log, T, floor, ROUNDS, "forecast")


def evolved(log, floor):
    policy_search._remove_greedily(log, T)
    policy_search._evolve(log, floor, ROUNDS)


def log_of(between, path, measure):
    plain = Guidance(CFG())
    trials = SimpleNamespace(prompts=["a fox"], rule=None, seed=0, identity=dict, plain=plain)
    return TrialLog(trials, SimpleNamespace(update=lambda: None), path, between, measure)


def searched(kind, path, floor, stop=None):
    """A search up to so many measurements: what it knows, and how many it made."""
    made = []

    def measure(schedule):
        if len(made) == stop:
            raise Stopped
        made.append(schedule)
        if kind is evolved:
            return measured(schedule)
        rows = [[1.0] * t for t in range(T)]
        fit = Coefficients([[1.0, *row] for row in rows], rows, guided=rows, identity={})
        return measured(Schedule(schedule.choices, fill=fit))

    log = log_of(None if kind is evolved else "forecast", path, measure)
    try:
        kind(log, floor)
    except Stopped:
        assert stop is not None
    return log, len(made)


@pytest.mark.parametrize("kind", [fitted, evolved])
def test_a_search_interrupted_anywhere_ends_as_if_it_had_not_been(tmp_path, kind):
    whole, count = searched(kind, tmp_path / "whole.json", 0.9)
    for stop in range(1, count, 3):
        path = tmp_path / f"{stop}.json"
        searched(kind, path, 0.9, stop)
        resumed, rest = searched(kind, path, 0.9)
        assert resumed.known == whole.known and rest == count - stop


@pytest.mark.parametrize("kind", [fitted, evolved])
def test_another_floor_has_rounds_of_its_own(tmp_path, kind):
    path = tmp_path / "tried.json"
    first, _ = searched(kind, path, 0.8)
    second, more = searched(kind, path, 0.95)
    fresh, count = searched(kind, tmp_path / "fresh.json", 0.95)
    assert second.asked == fresh.asked and 0 < more < count
    assert second.known.keys() == first.known.keys() | fresh.known.keys()


@pytest.mark.parametrize("floor", [0.5, 0.9, 0.97, 0.999])
def test_a_fitted_search_reaches_any_floor(tmp_path, floor):
    found, _ = searched(fitted, tmp_path / "tried.json", floor)
    best = next(c for c in pareto(found.known.values()) if c.quality >= floor)
    assert best.nfe == 2 * T or floor < 0.999


@pytest.mark.parametrize("rounds", [1, 4, 200])
def test_climbing_ends_where_no_move_helps(rounds):
    """Or after as many tries; places are asked for once each."""
    asked = []

    def judge(places):
        asked.append(places)
        return measured(Schedule(policy_search._both_at(places, T, "forecast"))).quality

    quality, best = climb(T, 5, rounds, judge)
    assert len(asked) == len(set(asked)) <= rounds and best in asked
    assert all(len(places) == 5 and places[0] == 0 for places in asked)
    assert quality == max(map(judge, list(asked)))
    if rounds == 200:
        for k in range(1, 5):
            for moved in ((*best[:k], best[k] + d, *best[k + 1 :]) for d in (-1, 1)):
                if len(set(moved)) == 5 and 0 < moved[k] < T:
                    assert judge(moved) <= quality


def test_evaluations_are_placed_for_a_cost(pipe, tmp_path):
    """What is said of the best is what it does; interrupted, nothing is fitted again."""
    trials = Trials(pipe, PROMPTS, num_inference_steps=6, progress=False)
    fitter = ScheduleFitter(trials, output_type="pil")
    options = {"rounds": 5, "checkpoint": tmp_path / "tried.json"}
    found = place(trials, 7, fitter, **options)
    assert found.best.nfe == 6 and found.tried == 5
    images, nfe = trials.run(found.guidance)
    assert nfe == [6] * len(PROMPTS)
    quality = ssim(images, to_tensor(fitter.pictures)).mean().item()
    assert quality == pytest.approx(found.best.quality, abs=2e-3)
    fitter.fit = None  # not to be called
    assert place(trials, 7, fitter, **options) == found
    with pytest.raises(ValueError, match="has 4 to 12 evaluations, got 3"):
        place(trials, 3, fitter)
    one = Trials(pipe, PROMPTS, guidance_scale=1.0, num_inference_steps=4, progress=False)
    assert place(one, 3, ScheduleFitter(one, output_type="pil"), rounds=2).best.nfe == 3
    with pytest.raises(ValueError, match="needs a guidance_scale > 1"):
        search(one)
    fitter.finer = 2
    with pytest.raises(ValueError, match="its finer differs"):
        place(trials, 6, fitter, **options)


def test_evaluations_are_spread_up_to_all():
    for total in (2, 3, 49):
        counts = [choices.count("both") for choices in spread(total, "forecast", total)]
        assert set(range(2, total + 1)) <= set(counts)
        assert max(counts) == total


@pytest.mark.parametrize("options", [{}, {"fitted": True}, {"fitted": True, "between": "estimate"}])
@pytest.mark.parametrize("steps", [2, 3])
def test_short_runs(pipe, options, steps):
    """The full run reaches a floor that only equal pictures reach."""
    trials = Trials(pipe, PROMPTS, num_inference_steps=steps, progress=False, quality=equal)
    found = search(trials, quality_floor=0.9999, rounds=4, **options)
    assert found.best.nfe == 2 * steps and found.best.quality == 1
    single = Trials(pipe, PROMPTS, num_inference_steps=1, progress=False)
    with pytest.raises(ValueError, match="at least 2 evaluations of each branch, 1 is what"):
        search(single, **options)


def test_a_floor_out_of_reach_is_said():
    """Only a quality that is low for equal pictures, too, leaves a floor out of reach."""
    log = log_of(None, None, lambda schedule: Candidate(schedule, 8.0, 0.5))
    log(Schedule(("both",) * 4))
    with pytest.raises(ValueError, match="reaches a quality of 0.9: the highest gives 0.5 at 8 ev"):
        log.conclude(0.9)


def test_a_search_of_version_01_goes_on(tmp_path):
    """Its file calls the fill a stand-in and keeps a version; that of another search is refused."""
    path = tmp_path / "tried.json"
    first, count = searched(evolved, path, 0.9)
    content = json.loads(path.read_text())
    content["plan"]["stand_in"] = content["plan"].pop("fill")
    content["plan"]["identity"]["pilotage"] = "0.1"
    path.write_text(json.dumps(content))
    again, more = searched(evolved, path, 0.9)
    assert again.known == first.known and more == 0 < count
    for changed in ({"stand_in": "of coefficients"}, {"identity": {"scheduler": "X"}}):
        path.write_text(json.dumps(content | {"plan": content["plan"] | changed}))
        with pytest.raises(ValueError, match="its (fill|identity) differs"):
            searched(evolved, path, 0.9)


def test_relaxed_search_reaches_any_floor(pipe):
    trials = Trials(pipe, PROMPTS[:1], quality=equal, **SETTINGS)
    found = relaxed_search(trials, quality_floor=0.9999, iterations=1)
    assert found.best.nfe == 8 and set(found.best.schedule.choices) == {"both"}


def test_a_relaxation_is_drawn_to_its_rule(pipe):
    from pilotage.eval.tuning.relaxed_search import _latents

    rule = APG(norm_threshold=1.0)
    trials = Trials(pipe, PROMPTS[:1], num_inference_steps=4, rule=rule)
    aim = _latents(trials, 0, None)
    expected = pipe(guidance=rule, output_type="latent", **trials.calls()[0]).images
    assert torch.equal(aim, expected)


def test_calibration_leaves_out_a_space_that_cannot_reach_the_quality(pipe, monkeypatch):
    """In one of two spaces all stop at once; the other is as it is."""
    trials = Trials(pipe, PROMPTS, **SETTINGS)
    gammas = agreement(trials)
    faked = {"x0": torch.full_like(gammas["native"], -1), "native": gammas["native"]}
    monkeypatch.setattr(calibration, "agreement", lambda trials: faked)
    highest = calibrate(trials, target_nfe=8).proofs["native"][2]
    found = calibrate(trials, target_ssim=highest - 1e-4)
    assert found.space == "native" and found.best.quality >= highest - 1e-4
    assert found.proofs["x0"][2] < highest - 1e-4
    faked["native"] = faked["x0"]
    with pytest.raises(ValueError, match="no threshold reaches a quality of .*: the highest"):
        calibrate(trials, target_ssim=highest - 1e-4)
