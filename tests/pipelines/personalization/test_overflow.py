"""Rows on which the network overflows: named, left out, and refused where they are too many."""

import copy
import json
import math
import warnings

import pytest
import torch
from safetensors.torch import load_file

from pilotage.pipelines.personalization import DiffusionTokenLoss, Personalizer, recipe
from pilotage.pipelines.personalization.inputs import TokenData, extended, load_images, prompt_ids
from pilotage.pipelines.personalization.training import TokenTrainer

from .tiny import PROMPTS, SHORT, WORD, build, fit, pictures, word


def rows_of(pipe, plan, held_out=0):
    """The batches of a run with SHORT's settings, made apart from it; or its held-out rows."""
    ids = prompt_ids(extended(pipe.tokenizer, WORD, 1), PROMPTS, WORD, 1)
    source = (load_images(pictures(), 16), (ids,), False)
    data = TokenData(DiffusionTokenLoss(pipe), source, plan, seed=0)
    return data.held_out(held_out) if held_out else data.batch


def overflowing(pipe, times, tokens=lambda embeddings: True, value=math.inf):
    """The pipeline's own loss, not finite where a row has one of these timesteps."""
    own = DiffusionTokenLoss(pipe)

    def loss(embeddings, batch):
        bad = any(t in times for t in batch.timesteps.tolist())
        return own(embeddings, batch) + (value if bad and tokens(embeddings) else 0)

    return loss


@pytest.fixture(scope="module")
def pipe():
    return build()


def test_held_out_rows_are_named_and_left_out_of_every_loss(pipe, tmp_path):
    """Of a run that goes on, too."""
    rows = rows_of(pipe, recipe("ours", pool=8), held_out=8)
    bad = [rows.timesteps[i].item() for i in (2, 5)]
    named = f"{rows.pictures[2]} at timestep {bad[0]}, {rows.pictures[5]} at timestep {bad[1]}"
    tokens = []
    with pytest.warns(UserWarning, match=named):
        token = fit(
            pipe,
            overflowing(pipe, bad),
            held_out_rows=8,
            callback=lambda trainer: tokens.append(trainer.vectors),
        )
    good = rows.rows(torch.tensor([0, 1, 3, 4, 6, 7]))
    starts = [Personalizer(pipe).initial_embeddings(word(pipe), 1), tokens[2], tokens[5]]
    with torch.no_grad():
        expected = [DiffusionTokenLoss(pipe)(start[None], good).item() for start in starts]
    assert [value for _, _, value in token.evaluations] == pytest.approx(expected, rel=1e-6)
    for steps in (4, 6):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parts = fit(
                pipe,
                overflowing(pipe, bad),
                held_out_rows=8,
                steps=steps,
                output=tmp_path,
                evaluate_every=2 if steps == 4 else 3,
            )
    assert parts.evaluations[-1] == token.evaluations[-1]


def test_what_is_learned_does_not_depend_on_a_held_out_row_that_overflows(pipe):
    rows = rows_of(pipe, recipe("ours", pool=8), held_out=4)
    with pytest.warns(UserWarning, match="left out"):
        token = fit(pipe, overflowing(pipe, [rows.timesteps[0].item()]), steps=12)
    values = [value for _, _, value in token.evaluations]
    assert all(map(math.isfinite, values)) and token.learned == (min(values) < values[0])
    clean = fit(pipe, steps=12)
    assert token.losses == clean.losses


def test_a_step_without_a_finite_row_asks_again_on_the_next(pipe, tmp_path):
    """As the same search that is never told of that step; also over a resume."""
    plan = recipe("ours", **{k: SHORT[k] for k in ("steps", "pool", "words")})
    batch = rows_of(pipe, plan)
    bad = batch(2).timesteps.item()
    search = plan.build(
        Personalizer(pipe).initial_embeddings(word(pipe), 1),
        [pipe.text_encoder.get_input_embeddings().weight.detach()],
        seed=0,
    )
    own = DiffusionTokenLoss(pipe)
    with torch.no_grad():
        for step in (0, 1, 3, 4, 5):
            search.tell(own(search.ask().view(-1, 1, 16), batch(step)))
    loss, options = overflowing(pipe, [bad]), {"held_out_rows": 0, "output": tmp_path}
    named = f"{batch(2).pictures[0]} at timestep {bad}"

    class Killed(Exception):
        pass

    def stop(trainer):
        if trainer.step == 3:
            raise Killed

    with pytest.warns(UserWarning, match=named), pytest.raises(Killed):
        fit(pipe, loss, callback=stop, **options)
    token = fit(pipe, loss, **options)
    assert [math.isnan(value) for value in token.losses] == [False, False, True, *[False] * 3]
    assert torch.equal(token.vectors.flatten(), search.value)
    saved = load_file(tmp_path / "learned_embeds.safetensors")[WORD]
    assert torch.equal(saved, token.vectors)


@pytest.mark.parametrize("points", [slice(0, 8), slice(3, 4)])
def test_a_step_takes_the_mean_over_its_finite_rows(pipe, points):
    """Over the same rows for all points, also if only one of them overflows there."""
    plan = recipe("ours", batch=4, pool=8, words=0)
    batch = rows_of(pipe, plan)(0)
    bad = batch.timesteps[1].item()
    start = Personalizer(pipe).initial_embeddings(word(pipe), 1)
    search = plan.build(start, [torch.ones(1, 16)], seed=0)
    own = DiffusionTokenLoss(pipe)

    def loss(embeddings, batch):
        losses = own(embeddings, batch)
        if bad in batch.timesteps.tolist():
            losses[points] = math.nan
        return losses

    trainer = TokenTrainer(loss, search, (1, 16), 0, {})
    asked = search.ask().view(-1, 1, 16)
    with pytest.warns(UserWarning, match=f"{batch.pictures[1]} at timestep {bad}"):
        trainer.advance(batch)
    with torch.no_grad():
        expected = own(asked, batch.rows(torch.tensor([0, 2, 3]))).mean()
    assert trainer.losses == pytest.approx([expected.item()], rel=1e-6)
    assert (trainer.rows, trainer.left_out, trainer.forwards) == (4, 1, 2 * 8 * 4)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_later_token_that_overflows_is_not_the_best(pipe, tmp_path, value):
    start = Personalizer(pipe).initial_embeddings(word(pipe), 1)[None]
    moved = lambda embeddings: len(embeddings) == 1 and not torch.equal(embeddings, start)  # noqa: E731
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        token = fit(pipe, overflowing(pipe, range(1000), moved, value), output=tmp_path)
    said = "".join(str(warning.message) for warning in caught)
    assert all(f"the token of step {step} is not taken" in said for step in (3, 6))
    assert [value for _, _, value in token.evaluations][1:] == [math.inf] * 2
    assert not token.learned and torch.equal(token.vectors, start[0])
    assert not (tmp_path / "learned_embeds.safetensors").exists()

    for name in ("personalization.json", "losses.jsonl"):  # JSON knows neither
        text = (tmp_path / name).read_text()
        assert "Infinity" not in text and "NaN" not in text
    record = json.loads((tmp_path / "personalization.json").read_text())
    assert record["learned"] is False and record["evaluations"][-1] == [6, 48, None]


def test_more_than_a_quarter_is_refused(pipe, tmp_path):
    with pytest.raises(FloatingPointError, match=r"losses of 4 of 4 held-out rows .* more than a"):
        fit(pipe, overflowing(pipe, range(1000)), output=tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".safetensors"]
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(FloatingPointError, match=r"losses of 4 of 4 rows .* lower the rate"),
    ):
        fit(pipe, overflowing(pipe, range(1000)), held_out_rows=0, steps=20)


def test_half_precision_that_overflows_says_what_to_change():
    """A real overflow, above 65504, and the same network in bfloat16."""
    pipe = build()
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(1e6)
    with pytest.raises(FloatingPointError, match=r"image \d at timestep \d+.*--dtype bf16"):
        fit(pipe.to(torch.float16), steps=1)
    pipe = build()
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(1e6)
    token = fit(pipe.to(torch.bfloat16), steps=1)
    assert all(math.isfinite(value) for _, _, value in token.evaluations)


def test_pictures_are_encoded_in_single_precision():
    """Also by a network in half precision, which stays so; what is not finite is named."""
    pipe = build().to(torch.float16)
    pixels = load_images(pictures(), 16)
    latents = DiffusionTokenLoss(pipe).encode(pixels)
    assert pipe.vae.dtype == torch.float16
    vae = copy.deepcopy(pipe.vae).float()
    with torch.no_grad():
        means = [vae.encode(2 * row[None] - 1).latent_dist.mean for row in pixels]
    assert torch.equal(latents, torch.cat(means) * vae.config.scaling_factor)
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="the autoencoder gives no finite latents for image 0"):
        fit(pipe)


def test_an_update_that_overflows_keeps_the_checkpoint_before_it(pipe, tmp_path):
    """Losses that are finite, and a step that is not."""
    calls = 0

    def loss(embeddings, batch):
        nonlocal calls
        calls += 1
        steep = 3e38 * torch.linspace(-1, 1, len(embeddings))
        return steep if calls == 4 else embeddings.square().sum((1, 2))

    options = {"held_out_rows": 0, "output": tmp_path, "checkpoint_every": 1, "mu": 1e-30}
    with pytest.raises(FloatingPointError, match="step 3's update overflows|the update of step 3"):
        fit(pipe, loss, **options)
    state = load_file(tmp_path / "checkpoint.safetensors")
    assert state["losses"].shape == (3,) and state["search.iterate"].isfinite().all()
