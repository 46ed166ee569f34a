"""The personalizer on tiny pipelines: its loss, its inputs, its runs."""

import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pilotage.eval.embedded import load_embedded
from pilotage.pipelines.personalization import (
    PRESETS,
    DiffusionTokenLoss,
    Personalizer,
    add_token,
    recipe,
)
from pilotage.pipelines.personalization.inputs import (
    TokenData,
    extended,
    load_images,
    prompt_ids,
    stratified_timesteps,
)
from pilotage.pipelines.personalization.schedule import seconds_a_pass
from pilotage.pipelines.processes import processes
from pilotage.pipelines.quantization import quantize

from .tiny import PROMPTS, SHORT, SMALL, WORD, build, pictures, word

ROOT = Path(__file__).resolve().parents[3]


def data(personalizer, vectors=1, rows=3, plan=None):
    """A batch and its prompts, as `fit` makes them."""
    copies = [extended(t, WORD, vectors) for t in personalizer.tokenizers.values()]
    ids = tuple(prompt_ids(t, PROMPTS, WORD, vectors) for t in copies)
    source = (load_images(pictures(), 16), ids, False)
    plan = plan or recipe("zoodip", batch=rows)
    return TokenData(personalizer.networks, source, plan, seed=0).batch(0)


def test_timesteps_are_from_their_window():
    draw = torch.Generator().manual_seed(0)
    strata = stratified_timesteps(500, 900, 50, draw)
    assert strata.dtype == torch.int64
    assert torch.equal((strata - 500) // 8, torch.arange(50))
    pooled = torch.cat([stratified_timesteps(500, 900, 400, draw) for _ in range(3)])
    assert pooled.bincount()[500:].eq(3).all()
    plan = recipe("zoodip", batch=200, timesteps_low=500, timesteps_high=503)
    personalizer = Personalizer(build())
    fresh = data(personalizer, plan=plan).timesteps
    assert fresh.bincount()[500:].gt(40).all() and fresh.max() == 502


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_all_tokens_in_one_call_are_as_one_by_one(family):
    personalizer = Personalizer(build(family))
    loss = personalizer.networks
    batch = data(personalizer, vectors=2)
    points = 0.1 * torch.randn(5, 2, sum(loss.widths), generator=torch.Generator().manual_seed(0))
    calls = []
    handle = loss.pipe.unet.register_forward_pre_hook(lambda _m, args: calls.append(len(args[0])))
    with torch.no_grad():
        together = loss(points, batch)
        assert calls == [5 * 3]
        alone = torch.cat([loss(point[None], batch) for point in points])
        loss.max_rows = 7
        calls.clear()
        parts = loss(points, batch)
        assert calls == [6, 6, 3]
        loss.max_rows = 2
        calls.clear()
        torch.testing.assert_close(loss(points, batch), together, rtol=1e-5, atol=1e-7)
        assert calls == [2] * 5 + [2, 2, 1]
    handle.remove()
    assert together.std() > 1e-5
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(together, parts, rtol=1e-5, atol=1e-7)


def test_no_call_of_a_run_has_more_rows_than_allowed():
    pipe, calls = build(), []
    pipe.unet.register_forward_pre_hook(lambda _m, args: calls.append(len(args[0])))
    options = SHORT | {"batch": 4, "held_out_rows": 9, "steps": 2}
    Personalizer(pipe, max_rows=3).fit(pictures(), WORD, word(pipe), **options)
    assert max(calls) == 3


@pytest.mark.parametrize(("family", "masked"), [("sd", False), ("sd", True), ("sdxl", False)])
def test_conditions_are_those_of_the_stock_pipeline(family, masked):
    """The injection against the word in tokenizer and table, as diffusers puts it there."""
    personalizer, stock = Personalizer(build(family)), build(family)
    for pipe in (personalizer.pipe, stock):
        pipe.text_encoder.config.use_attention_mask = masked
    widths = personalizer.networks.widths
    vectors = 0.3 * torch.randn(2, sum(widths), generator=torch.Generator().manual_seed(1))
    copies = [extended(t, WORD, 2) for t in personalizer.tokenizers.values()]
    ids = tuple(prompt_ids(t, PROMPTS, WORD, 2) for t in copies)
    for suffix, part in zip(("", "_2"), vectors.split(widths, dim=1), strict=False):
        stock.load_textual_inversion(
            part,
            token=WORD,
            tokenizer=getattr(stock, f"tokenizer{suffix}"),
            text_encoder=getattr(stock, f"text_encoder{suffix}"),
        )
    call = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    with torch.no_grad():
        hidden, pooled = personalizer.networks.conditions(vectors[None], ids)
        encoded = stock.encode_prompt([p.format(WORD) for p in PROMPTS], **call)
    assert torch.equal(hidden, encoded[0])
    if family == "sdxl":
        assert torch.equal(pooled, encoded[2])
    with torch.no_grad():
        other = personalizer.networks.conditions(vectors.flip(0)[None], ids)[0]
    assert not torch.allclose(hidden, other)


def test_loss_is_the_training_loss_of_the_stock_networks():
    """One row by hand: the scheduler's own noising, the UNet on the stock encoder's output."""
    personalizer, stock = Personalizer(build()), build()
    batch = data(personalizer, rows=1)
    vector = 0.3 * torch.randn(1, 1, 16)
    stock.load_textual_inversion(vector[0, 0], token=WORD)
    with torch.no_grad():
        value = personalizer.networks(vector, batch)
        hidden = stock.text_encoder(batch.ids[0])[0]
        predicted = stock.unet(batch.noisy, batch.timesteps, hidden).sample
    latents = personalizer.networks.encode(load_images(pictures(), 16))
    noise = batch.targets.expand_as(latents)
    noisy = stock.scheduler.add_noise(latents, noise, batch.timesteps.expand(len(latents)))
    assert (noisy - batch.noisy).flatten(1).abs().amax(1).min() < 1e-6
    expected = (predicted - batch.targets).square().mean()
    torch.testing.assert_close(value[0], expected, rtol=1e-6, atol=0)


def test_defaults_of_zoodip_are_the_published_ones():
    zoodip = PRESETS["zoodip"]
    published = {
        "steps": 30_000,
        "batch": 1,
        "directions": 2,
        "mu": 1e-3,
        "rate": 5e-3,
        "subspace_tau": 128,
        "subspace_nu": 1e-3,
        "timesteps_low": 500,
        "timesteps_high": 900,
        "pool": 0,
        "average": -1.0,
        "relative": False,
    }
    made = dataclasses.asdict(zoodip)
    assert {name: made[name] for name in published} == published
    search = zoodip.build(torch.ones(1, 16), [torch.ones(5, 16)], 0)
    assert len(search.ask()) == 3
    assert search.settings == zoodip and zoodip.betas == (0.9, 0.999)


@pytest.mark.parametrize("preset", ["ours", "zoodip"])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_fit(family, preset, tmp_path):
    pipe = build(family)
    before = {n: p.clone() for n, p in pipe.text_encoder.named_parameters()}
    tokenizer = pipe.tokenizer
    options = SHORT if preset == "ours" else SHORT | {"pool": None}
    seen = []
    token = Personalizer(pipe).fit(
        pictures(),
        WORD,
        word(pipe),
        preset=preset,
        output=tmp_path,
        vectors=2,
        callback=lambda trainer: seen.append(trainer.step),
        preview_prompt=PROMPTS[0],
        preview_options=SMALL,
        **(options | {"preview_every": 3}),
    )
    assert seen == [1, 2, 3, 4, 5, 6] and token.steps == 6
    plan = recipe(preset)
    assert token.forwards == 6 * plan.evaluations * plan.batch
    assert [e[0] for e in token.evaluations] == [0, 3, 6]
    best = min(token.evaluations, key=lambda e: e[2])
    assert (best[0] == 0) == torch.equal(token.vectors[0], token.vectors[1])
    assert token.vectors.shape == (2, sum(token.widths)) and token.vectors.isfinite().all()
    # The pipeline is as it was.
    assert pipe.tokenizer is tokenizer and WORD not in tokenizer.get_vocab()
    for name, parameter in pipe.text_encoder.named_parameters():
        assert torch.equal(parameter, before[name])
    assert not pipe.text_encoder.get_input_embeddings()._forward_hooks
    # Pictures of the best token so far, after three steps and after six, each token once.
    bests = {min(token.evaluations[:count], key=lambda e: e[2])[0] for count in (2, 3)}
    names = {p.name for p in (tmp_path / "previews").iterdir()}
    assert names == {f"step-{step:06d}.png" for step in bests}
    assert token.learned == (best[0] > 0) == (tmp_path / "learned_embeds.safetensors").exists()
    if not token.learned:
        return
    saved = load_file(tmp_path / "learned_embeds.safetensors")
    keys = {"sd": [WORD], "sdxl": ["clip_l", "clip_g"]}[family]
    for key, part in zip(keys, token.parts, strict=True):
        assert torch.equal(saved[key].view(part.shape), part)


def test_the_loss_falls_on_the_embedded_model():
    """After the fifteen steps of known words, and by the descent from there."""
    pipe = load_embedded()
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste("red", (12, 12, 52, 52))
    token = Personalizer(pipe).fit(
        [picture],
        WORD,
        "star",
        templates=["noto style {}"],
        steps=22,
        evaluate_every=15,
        held_out_rows=8,
        progress=False,
    )
    first, words, last = (value for _, _, value in token.evaluations)
    assert last < words < first


def test_any_closure_will_do():
    """A loss of the user's: no network is called, the token goes where the loss is least."""
    pipe = build()
    target = 0.1 * torch.randn(16, generator=torch.Generator().manual_seed(3))

    def loss(embeddings, _batch):
        return (embeddings[:, 0] - target).square().sum(1)

    settings = {"steps": 150, "relative": False, "rate": 0.02, "mu": 0.05}
    options = SHORT | settings | {"evaluate_every": 50}
    token = Personalizer(pipe, loss=loss).fit(pictures(), WORD, word(pipe), **options)
    assert token.evaluations[-1][2] < 0.1 * token.evaluations[0][2]


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_known_words_are_tried_first(family):
    """The loss is the distance to a known word.

    A run begins at the mean of the three words that are nearest to it and the given one.
    """
    pipe = build(family)
    personalizer = Personalizer(pipe)
    tables = [table.weight.detach() for table in personalizer.networks.tables]
    size = min(len(table) for table in tables)
    both = torch.cat([table[:size] for table in tables], 1)
    start = personalizer.initial_embeddings(word(pipe), 1)[0]
    target = both[(both - start).norm(dim=1).argsort()[5]]
    nearest = both[(both - target).norm(dim=1).argsort()[:3]]

    def loss(embeddings, _batch):
        return (embeddings - target).square().sum(2).mean(1)

    groups = -(-(size - 1) // 7)
    options = SHORT | {"words": size, "steps": groups + 2 * 2 + 6, "vectors": 2}
    options |= {"evaluate_every": 1000}
    token = Personalizer(pipe, loss=loss).fit(pictures(), WORD, word(pipe), **options)
    expected = torch.cat([start[None], nearest]).mean(0)
    torch.testing.assert_close(token.vectors, expected.repeat(2, 1))
    assert token.forwards == (size - 1) + groups + (2 * 2 + 6) * 8


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_learned_word_in_a_stock_pipeline(family, tmp_path):
    """The file in a stock pipeline draws what the personalizer's pipeline draws, bit for bit."""
    pipe, stock = build(family), build(family)
    personalizer = Personalizer(pipe)
    options = SHORT | {"steps": 2, "held_out_rows": 0, "vectors": 2, "output": tmp_path}
    token = personalizer.fit(pictures(), WORD, word(pipe), **options)
    add_token(stock, tmp_path / "learned_embeds.safetensors", WORD)

    def draw(pipeline, text):
        noise = torch.Generator().manual_seed(0)
        size = {"height": 16, "width": 16, "num_inference_steps": 2, "generator": noise}
        return pipeline(text, output_type="pt", **size).images

    with personalizer.speaking(WORD, token.vectors) as speaking:
        drawn = draw(speaking, f"a {WORD} on a green hill")
    assert torch.equal(drawn, draw(stock, f"a {WORD} on a green hill"))
    assert not torch.equal(drawn, draw(stock, "a cat on a green hill"))


def test_an_int8_pipeline_learns():
    pipe = build()
    quantize(pipe, backend="pilotage")
    token = Personalizer(pipe).fit(pictures(), WORD, word(pipe), **SHORT)
    assert token.steps == 6 and token.vectors.isfinite().all()


def test_early_stop():
    pipe = build()
    flat = Personalizer(pipe, loss=lambda embeddings, _batch: torch.ones(len(embeddings)))
    options = SHORT | {"steps": 50, "evaluate_every": 2, "patience": 3}
    token = flat.fit(pictures(), WORD, word(pipe), **options)
    assert token.steps == 6


def test_latents_are_what_the_stock_pipeline_decodes():
    pipe = build("sdxl")
    pipe.vae.register_to_config(
        latents_mean=[0.5, -1.0, 2.0, 0.0], latents_std=[2.0, 1.0, 0.5, 3.0]
    )
    decoded = []
    pipe.vae.decode = lambda latents, **_: decoded.append(latents) or (torch.zeros(1, 3, 16, 16),)
    pixels = load_images(pictures(1), 16)
    latents = Personalizer(pipe).networks.encode(pixels)
    stop = {"num_inference_steps": 1, "callback_on_step_end": lambda *_: {"latents": latents}}
    pipe("a cat", height=16, width=16, **stop)
    with torch.no_grad():
        raw = pipe.vae.encode(2 * pixels - 1).latent_dist.mean
    torch.testing.assert_close(decoded[0], raw, rtol=1e-5, atol=1e-5)


class Killed(Exception):
    pass


@pytest.mark.parametrize(("preset", "words"), [("ours", 0), ("ours", 2), ("zoodip", 0)])
def test_continues_exactly_after_an_error_and_after_a_kill(preset, words, tmp_path):
    def run(folder, callback=None):
        pipe = build()
        options = SHORT | {"steps": 9, "words": words}
        if preset == "zoodip":
            options |= {"pool": None, "subspace_tau": 3}
        return Personalizer(pipe).fit(
            pictures(),
            WORD,
            word(pipe),
            preset=preset,
            output=folder,
            checkpoint_every=2,
            callback=callback,
            **options,
        )

    def fail(trainer):
        if trainer.step == 5:  # what a killed process leaves is what lies there now
            shutil.copytree(tmp_path / "failed", tmp_path / "killed")
            raise Killed

    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "failed", fail)
    names = ("learned_embeds.safetensors", "personalization.json", "losses.jsonl", "curve.png")
    failed = tmp_path / "failed"
    best = load_file(failed / "checkpoint.safetensors")["best"]
    if (failed / names[0]).exists():
        assert torch.equal(load_file(failed / names[0])[WORD], best)
    for folder, left in (("failed", [6, 7, 8, 9]), ("killed", [5, 6, 7, 8, 9])):
        steps = []
        parts = run(tmp_path / folder, lambda trainer, seen=steps: seen.append(trainer.step))
        assert steps == left
        assert torch.equal(whole.vectors, parts.vectors)
        assert (whole.losses, whole.evaluations) == (parts.losses, parts.evaluations)
        assert whole.forwards == parts.forwards
        for name in names:
            one, other = tmp_path / "whole" / name, tmp_path / folder / name
            assert one.exists() == other.exists() == (whole.learned or name != names[0])
            assert not one.exists() or one.read_bytes() == other.read_bytes()


def test_a_checkpoint_of_other_settings(tmp_path):
    pipe = build()

    def run(**changes):
        options = SHORT | {"output": tmp_path, "checkpoint_every": 2} | changes
        return Personalizer(pipe).fit(pictures(), WORD, word(pipe), **options)

    run()
    with pytest.raises(ValueError, match=r"other settings \(recipe, seed\)"):
        run(seed=1, mu=0.2)
    assert run(steps=7).steps == 7
    with torch.no_grad():
        pipe.unet.conv_in.bias.add_(0.1)
    with pytest.raises(ValueError, match=r"other settings \(unet\)"):
        run(steps=8)
    quantize(pipe, backend="pilotage")
    with pytest.raises(ValueError, match=r"other settings \(text_encoder, unet, vae\)"):
        run(steps=8)


@pytest.fixture(scope="module")
def shared():
    return build()


def forbidden(*_args, **_kwargs):
    raise AssertionError("work began before the inputs were checked")


def deep_image(folder, mode):
    path = folder / f"{mode[0]}.tiff"
    Image.new(mode, (16, 16)).save(path)
    return [path]


def broken_image(folder):
    path = folder / "broken.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    return [pictures(1)[0], path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, f: {"images": []}, "no images"),
        (lambda p, f: {"images": f}, "no images"),
        (lambda p, f: {"images": broken_image(f)}, "broken.png cannot be read"),
        (lambda p, f: {"images": [f / "gone.png"]}, "gone.png cannot be read"),
        (lambda p, f: {"images": deep_image(f, "I;16")}, "I.tiff cannot be read.*mode 'I;16'"),
        (lambda p, f: {"images": deep_image(f, "F")}, "F.tiff cannot be read.*mode 'F'"),
        (lambda p, f: {"placeholder": word(p)}, "already in the vocabulary"),
        (lambda p, f: {"placeholder": "<|endoftext|>"}, "already in the vocabulary"),
        (lambda p, f: {"placeholder": "endof"}, r"inside another word, '<\|endoftext\|>'"),
        (
            lambda p, f: {"placeholder": "oriz", "templates": ["{} on the horizon"]},
            "inside another word, 'horizon'",
        ),
        (
            lambda p, f: {"placeholder": "oriz", "prompts": ["{} on the horizon"] * 3},
            "inside another word, 'horizon'",
        ),
        (lambda p, f: {"placeholder": "two words"}, "one word"),
        (lambda p, f: {"placeholder": ""}, "one word"),
        (lambda p, f: {"placeholder": "clip_l"}, "none of clip_l"),
        (lambda p, f: {"placeholder": "<My-Cat>", "vectors": 2}, "call it '<my-cat>'"),
        (lambda p, f: {"initializer": "lighthouse"}, r"is \d+ tokens"),
        (lambda p, f: {"initializer": torch.zeros(1, 24)}, r"shape \(1, 16\).*got \(1, 24\)"),
        (lambda p, f: {"templates": ["a cat"]}, "exactly one {}"),
        (lambda p, f: {"templates": ["a {x} of {}"]}, "no other braces"),
        (lambda p, f: {"templates": ["a } of {}"]}, "no other braces"),
        (lambda p, f: {"preview_prompt": "a {style} of {}"}, "no other braces"),
        (lambda p, f: {"templates": []}, "no prompt templates"),
        (lambda p, f: {"templates": ["a " * 80 + "{}"]}, "does not fit into 77 tokens"),
        (lambda p, f: {"prompts": ["a {}"]}, "3 images and 1 prompts"),
        (lambda p, f: {"minutes": 0.0}, "minutes must be a positive number"),
        (lambda p, f: {"minutes": 1.0}, "steps and minutes exclude each other"),
        (lambda p, f: {"evaluate_every": 0}, "at least 1"),
        (lambda p, f: {"preview_options": {"stepz": 3}}, "StableDiffusionPipeline takes no stepz"),
        (lambda p, f: {"initializer": torch.zeros(2, 16), "vectors": 1}, r"got \(2, 16\)"),
        (lambda p, f: {"preset": "mine"}, "unknown preset 'mine'"),
        (lambda p, f: {"stepz": 3}, "unknown setting 'stepz'"),
        (lambda p, f: {"steps": 0}, "steps must be at least 1"),
        (lambda p, f: {"vectors": 0}, "vectors must be at least 1"),
        (lambda p, f: {"mu": -1.0}, "mu must be a positive number"),
        (lambda p, f: {"timesteps_high": 500}, "0 <= low < high, got low=500, high=500"),
        (lambda p, f: {"timesteps_low": -1}, "0 <= low < high"),
        (lambda p, f: {"batch": 3}, "multiple of the batch"),
        (lambda p, f: {"pool": -4}, "pool must be at least 0"),
        (lambda p, f: {"held_out_rows": -1}, "at least 0"),
        (lambda p, f: {"checkpoint_every": 0}, "at least 1"),
        (lambda p, f: {"output": Path(__file__)}, "is not a folder"),
        (lambda p, f: {"subspace_nu": 0.1}, "subspace_nu has no effect"),
        (lambda p, f: {"preview_every": 2}, "previews need an output folder"),
        (lambda p, f: {"held_out_prompts": ["a {}"]}, "need held_out images"),
        (lambda p, f: {"patience": 2, "held_out_rows": 0}, "patience needs a held-out loss"),
    ],
)
def test_bad_input_before_any_work(change, message, tmp_path, monkeypatch, shared):
    pipe = shared
    options = SHORT | {"images": pictures(), "placeholder": WORD, "initializer": word(pipe)}
    personalizer = Personalizer(pipe)
    monkeypatch.setattr(pipe.vae, "encode", forbidden)
    monkeypatch.setattr(pipe.unet, "forward", forbidden)
    with pytest.raises(ValueError, match=message):
        personalizer.fit(**(options | change(pipe, tmp_path)))


def test_a_scheduler_with_fewer_noise_levels():
    pipe = build()
    pipe.scheduler = type(pipe.scheduler)(num_train_timesteps=100)
    with pytest.raises(ValueError, match="ends at 900, and PNDMScheduler has 100"):
        Personalizer(pipe).fit(pictures(), WORD, word(pipe), **SHORT)
    window = {"timesteps_low": 50, "timesteps_high": 90}
    token = Personalizer(pipe).fit(pictures(), WORD, word(pipe), **(SHORT | window))
    assert token.vectors.isfinite().all()


def test_an_option_that_would_be_ignored(shared):
    with pytest.raises(ValueError, match="max_rows belongs to"):
        Personalizer(shared, loss=forbidden, max_rows=2)


def test_a_missing_folder():
    pipe = build()
    with pytest.raises(FileNotFoundError, match="gone"):
        Personalizer(pipe).fit("gone", WORD, word(pipe), **SHORT)


@pytest.mark.parametrize("family", ["sd3", "sdxl_inpaint", "dit"])
def test_other_families_are_refused(family):
    with pytest.raises(ValueError, match="text-to-image|cannot be personalized"):
        DiffusionTokenLoss(build(family))


def main(folder):
    """A run with fixed calls, two of them a step; each process evaluates its share."""
    torch.set_num_threads(1)
    pipe, world = build(), int(os.environ.get("WORLD_SIZE", 1))
    rows = []
    pipe.unet.register_forward_pre_hook(lambda _m, args: rows.append(len(args[0])))
    options = SHORT | {"output": folder, "directions": 3, "points_per_call": 2}
    options |= {"words": 2, "steps": 11}  # nine steps of known words, two of the descent
    kept = []
    token = Personalizer(pipe).fit(pictures(), WORD, word(pipe), callback=kept.append, **options)
    assert processes().num_processes == world
    everything = token.forwards + len(token.evaluations) * SHORT["held_out_rows"]
    assert (sum(rows) < everything) == (world > 1)
    # A measured time is one for all of them.
    times, trainer = torch.zeros(world), kept[-1]
    times[processes().process_index] = seconds_a_pass(
        trainer, trainer.search.ask(), data(Personalizer(pipe))
    )
    assert len(set(trainer.shared(times).tolist())) == 1 and times.sum() > 0
    if world > 1:  # each with a folder of its own: only the first one's has the checkpoint
        own = folder if processes().is_main_process else folder / "other"
        with pytest.raises(ValueError, match=r"checkpoints are of steps \[0, 11\]"):
            Personalizer(pipe).fit(pictures(), WORD, word(pipe), **(options | {"output": own}))


def one_of(count, rank, port, folder):
    """`main` as one of `count` processes that share the work."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    main(folder)


def several(count, folder):
    """Fork `count` processes that share the work; the first to fail ends the others.

    Only a process without threads may fork: not the one that runs the tests.
    """
    context = multiprocessing.get_context("fork")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    running = [
        context.Process(target=one_of, args=(count, rank, port, folder), daemon=True)
        for rank in range(count)
    ]
    for process in running:
        process.start()
    while running:
        multiprocessing.connection.wait([process.sentinel for process in running])
        if any(process.exitcode for process in running):
            sys.exit("a process failed")
        running = [process for process in running if process.exitcode is None]


def test_processes_agree(tmp_path):
    """Of three processes one has nothing to do."""
    main(tmp_path / "1")
    command = [sys.executable, "-m", __name__, "3", str(tmp_path / "3")]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    one, three = (load_file(tmp_path / n / "checkpoint.safetensors") for n in "13")
    assert set(one) == set(three)
    for name, tensor in one.items():
        assert torch.equal(tensor, three[name]), name


if __name__ == "__main__":
    several(int(sys.argv[1]), Path(sys.argv[2]))
