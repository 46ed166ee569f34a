"""Generation for evaluation: independent of interruptions, batches and processes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from pilotage.eval.comparison import sampling
from pilotage.eval.comparison.cost import evaluations, steps_for_nfe, update_norms
from pilotage.eval.comparison.plan import Plan, Setting, sample_seed
from pilotage.eval.comparison.sampling import generate
from pilotage.eval.embedded import load_embedded
from pilotage.guidance import APG, AdaptiveGuidance, Gram, fit_coefficients, forecast, linear_ag
from pilotage.guidance.files import write_json
from pilotage.pipelines import guided
from pilotage.pipelines.fitting.identity import pipeline_identity
from pilotage.pipelines.quantization.quantize import quantize

from ...families import FAMILIES
from ...families.base import flow

PROMPTS = ["noto style fox", "flat style key", "twemoji style red apple"]
SETTINGS = [Setting("cfg", 5.0, 2), Setting("apg", 5.0, 2)]


@pytest.fixture(scope="module")
def pipe():
    return load_embedded()


def plan(**changes):
    return Plan(
        **{"prompts": PROMPTS, "settings": SETTINGS, "seeds": (0, 7), "batch_size": 2} | changes
    )


def pictures(folder):
    """Bytes of every PNG below a folder, by relative path; half-written ones are hidden."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("[!.]*.png"))}


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


class Killed(Exception):
    pass


def stop_after(monkeypatch, count):
    """Kill the run when `count` chunks more are finished; those that were, as they come."""
    finished = []

    def write(path, content):
        write_json(path, content)
        if path.name.startswith("chunk"):
            finished.append(path)
            if len(finished) == count:
                raise Killed

    monkeypatch.setattr(sampling, "write_json", write)
    return finished


def test_an_interrupted_run_ends_with_the_same_pictures(monkeypatch, pipe, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    generate(pipe, plan(), whole, progress=False)
    stop_after(monkeypatch, 2)
    with pytest.raises(Killed):
        generate(pipe, plan(), parts, progress=False)
    made = pictures(parts)
    per_setting = [sum(name.startswith(s.slug) for name in made) for s in SETTINGS]
    assert per_setting == [2, 2]
    # Killed while writing: a picture without its chunk's record, and a picture half written.
    (parts / SETTINGS[0].slug / "chunk-00000.json").unlink()
    (parts / SETTINGS[1].slug / ".000000-00002-x.partial.png").write_bytes(b"\x89PNG")
    finished = stop_after(monkeypatch, 6)
    generate(pipe, plan(), parts, progress=False)
    assert len(finished) == 5
    assert pictures(parts) == pictures(whole) and len(pictures(whole)) == 12
    stop_after(monkeypatch, 1)
    generate(pipe, plan(), parts, progress=False)  # nothing is left to do


def test_pictures_do_not_depend_on_the_batch_size(pipe, tmp_path):
    """The same samples from the same noise; convolutions of another batch round differently."""
    for size in (1, 6):
        few = plan(batch_size=size, settings=SETTINGS[1:])
        generate(pipe, few, tmp_path / str(size), progress=False)
    names = sorted(pictures(tmp_path / "1"))
    assert names == sorted(pictures(tmp_path / "6"))
    for name in names:
        assert abs(pixels(tmp_path / "1" / name) - pixels(tmp_path / "6" / name)).max() <= 1


def test_samples_are_what_the_pipeline_makes(pipe, tmp_path):
    seed, i = 7, 1
    setting = Setting(APG(eta=0.5) | AdaptiveGuidance(0.9), 6.0, 4, method="mine")
    alone = plan(settings=[setting], batch_size=1, prompts=PROMPTS[:2], seeds=(seed,))
    (samples,) = generate(pipe, alone, tmp_path, progress=False)
    index = alone.samples.index((seed, i))
    direct = pipe(
        samples.prompts[index],
        guidance=setting.guidance,
        guidance_scale=6.0,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(sample_seed(seed, i)),
    ).images[0]
    image = Image.open(samples.paths[index])
    assert np.array_equal(np.asarray(direct), np.asarray(image))
    assert json.loads(image.text["pilotage"])["prompt"] == PROMPTS[i]
    assert pipe.guidance_trace.nfe == [samples.nfe[index]]
    assert samples.seconds > 0


def test_update_norm_is_that_of_denoised_images(pipe, tmp_path):
    """CFG acts on raw predictions, APG without its settings is CFG on denoised images."""
    same = Setting(APG(eta=1.0, momentum=0.0, norm_threshold=0.0), 5.0, 3, method="same")
    one, two = generate(
        pipe, plan(settings=[Setting("cfg", 5.0, 3), same], seeds=(0,)), tmp_path, progress=False
    )
    assert one.update == pytest.approx(two.update, rel=1e-3) and min(one.update) > 0


@pytest.mark.parametrize("policy", [forecast(first=0), AdaptiveGuidance(-1.0, then="forecast")])
def test_skipped_steps_do_not_count_towards_the_mean_update(pipe, policy):
    guidance = APG() | policy
    pipe(PROMPTS, guidance=guidance, num_inference_steps=4, detailed_trace=True)
    first, rest, second, last = pipe.guidance_trace.steps
    assert [len(step.skipped) for step in pipe.guidance_trace.steps] == [0, 3, 0, 3]
    assert rest.update_norm is last.update_norm is None
    expected = (first.update_norm + second.update_norm) / 2
    found = update_norms(pipe.guidance_trace, guidance, pipe.scheduler)
    assert found == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompts": PROMPTS[:2]}, "prompts"),
        ({"seeds": (0, 8)}, "seeds"),
        ({"batch_size": 3}, "batch_size"),
        ({"options": {"negative_prompt": "grey"}}, "options"),
    ],
)
def test_another_plan_is_refused(monkeypatch, pipe, tmp_path, changes, field):
    stop_after(monkeypatch, 1)
    with pytest.raises(Killed):
        generate(pipe, plan(), tmp_path, progress=False)
    before = pictures(tmp_path)
    with pytest.raises(ValueError, match=f"holds another plan: its {field} is"):
        generate(pipe, plan(**changes), tmp_path, progress=False)
    assert pictures(tmp_path) == before


def test_a_plan_may_gain_and_lose_settings(monkeypatch, pipe, tmp_path):
    """The pictures that are there are not made again."""
    generate(pipe, plan(settings=SETTINGS[:1]), tmp_path, progress=False)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    (made,) = generate(pipe, plan(settings=SETTINGS[1:]), tmp_path, progress=False)
    assert made.setting == SETTINGS[1]
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert len(after) == len(SETTINGS) * len(before) and before.items() <= after.items()
    stop_after(monkeypatch, 1)
    generate(pipe, plan(), tmp_path, progress=False)  # nothing is left to do
    written = json.loads((tmp_path / "plan.json").read_text())
    assert [setting["method"] for setting in written["settings"]] == ["cfg", "apg"]


def test_where_the_scale_has_another_name_both_branches_are_evaluated(tmp_path):
    pipe = guided(FAMILIES["flux"].build())
    settings = [Setting("cfg", 1.0, 1), Setting("cfg", 5.0, 1), Setting("apg", 5.0, 1)]
    found = generate(pipe, Plan(["a", "b"], settings), tmp_path, progress=False)
    assert [samples.nfe for samples in found] == [[1, 1], [2, 2], [2, 2]]
    assert not np.array_equal(pixels(found[0].paths[0]), pixels(found[1].paths[0]))
    assert json.loads(Image.open(found[1].paths[0]).text["pilotage"])["true_cfg_scale"] == 5


@pytest.mark.parametrize("negative", [None, "", "grey"])
def test_no_negative_prompt_is_not_an_empty_one_for_sdxl(tmp_path, negative):
    pipe = guided(FAMILIES["sdxl"].build())
    options = {} if negative is None else {"negative_prompt": negative}
    small = Plan(["a"], [Setting("cfg", 5.0, 2)], options=options)
    (samples,) = generate(pipe, small, tmp_path, progress=False)
    direct = pipe(
        "a",
        guidance_scale=5.0,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(sample_seed(0, 0)),
        **options,
    ).images[0]
    assert np.array_equal(np.asarray(direct), pixels(samples.paths[0]))


def test_settings_that_read_alike_are_another_plan(pipe, tmp_path):
    """Coefficients are not written out, but they are part of the plan."""
    steps = 3
    cond, uncond = torch.randn(2, steps, 2, 9, generator=torch.Generator().manual_seed(0))
    policies = [
        linear_ag(fit_coefficients(Gram.of(cond, uncond), ridge=ridge)) for ridge in (0.1, 0.2)
    ]
    assert str(policies[0]) == str(policies[1])
    first, second = (plan(settings=[Setting(p, 5.0, steps, "linear")]) for p in policies)
    generate(pipe, first, tmp_path, progress=False)
    generate(pipe, first, tmp_path, progress=False)
    with pytest.raises(ValueError, match="its settings is"):
        generate(pipe, second, tmp_path, progress=False)


def test_another_model_or_scheduler_is_refused(tmp_path):
    pipe = guided(FAMILIES["sd"].build())
    small = Plan(["a"], [Setting("cfg", 3.0, 2)])
    generate(pipe, small, tmp_path, progress=False)
    changed = guided(FAMILIES["sd"].build())
    with torch.no_grad():
        next(changed.unet.parameters()).view(-1)[0] += 1
    with pytest.raises(ValueError, match="its model is"):
        generate(changed, small, tmp_path, progress=False)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, beta_end=0.02)
    with pytest.raises(ValueError, match="its scheduler_config is"):
        generate(pipe, small, tmp_path, progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "needs prompts"),
        ({"prompts": ["a", " "]}, r"empty at the positions \[1\]"),
        ({"seeds": (1, 1)}, "seed occurs twice"),
        ({"settings": [SETTINGS[0]] * 2}, "setting occurs twice: cfg-w5-s2"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_plans_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": [Setting("agp", 3.0)]}, "unknown guidance 'agp'"),
        ({"settings": [Setting("apg", 1.0)]}, "needs a scale > 1"),
        ({"options": {"colour": "red"}}, "'colour' cannot be an option"),
        ({"options": {"generator": 1}}, "'generator' cannot be an option"),
    ],
)
def test_calls_that_would_fail_fail_at_once(pipe, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        generate(pipe, plan(**changes), tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()


def test_settings():
    with pytest.raises(ValueError, match="finite and > 0"):
        Setting("cfg", float("nan"))
    with pytest.raises(ValueError, match="whole number"):
        Setting("cfg", 3.0, 0)
    odd = [Setting("cfg", 3.0, method=name) for name in ("../a", "a/../b", "ä", "ö", "A", "a")]
    slugs = [setting.slug for setting in odd]
    assert len(set(slugs)) == len(slugs)
    assert not any("/" in slug or slug.startswith(".") for slug in slugs)


def test_seeds_of_samples_are_their_own():
    seeds = {sample_seed(seed, i) for seed in range(50) for i in range(50)}
    assert len(seeds) == 2500 and max(seeds) < 2**63


def test_identity_is_of_weights_and_settings_not_of_the_dtype():
    one, two = FAMILIES["sd"].build(), FAMILIES["sd"].build()
    two.to(torch.bfloat16)
    a, b = pipeline_identity(one), pipeline_identity(guided(one))
    assert a == b and a["prediction_type"] == "epsilon"
    rounded = pipeline_identity(two)
    assert rounded == pipeline_identity(two.to(torch.float32)) | {"dtype": "bfloat16"}
    assert rounded["model"] != a["model"]
    json.dumps(a, allow_nan=False)


@pytest.mark.parametrize("backend", ["torchao", "pilotage"])
def test_quantized_networks_have_an_identity(backend):
    one, two, full = (FAMILIES["sd"].build() for _ in range(3))
    for pipe in (one, two):
        quantize(pipe, backend=backend)
    assert pipeline_identity(one) == pipeline_identity(two)
    changed = {
        k
        for k, v in pipeline_identity(full)["networks"].items()
        if v != pipeline_identity(one)["networks"][k]
    }
    assert changed == {"unet", "vae", "text_encoder"}


def test_steps_at_equal_cost(pipe):
    for nfe in (4.0, 23.4, 30.1, 36.9):
        steps = steps_for_nfe(pipe.scheduler, nfe, at_most=20)
        assert abs(2 * steps - nfe) <= 1
    pndm = FAMILIES["sd"].build().scheduler  # asks for one evaluation more than it has steps
    assert evaluations(pndm, 10) == 11 and steps_for_nfe(pndm, 16.2, at_most=10) == 7
    assert evaluations(flow(use_dynamic_shifting=True), 6) == 6
