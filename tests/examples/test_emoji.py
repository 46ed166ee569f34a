"""The embedded model: its data, its training recipe, and what is shipped."""

import io
import json
import zipfile
from dataclasses import asdict
from functools import wraps
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors import safe_open

from examples.emoji import data, networks, train
from pilotage.eval.embedded import embedded_folder, load_embedded, load_pipeline
from pilotage.pipelines import GuidedMixin

EMOJI = Path(data.__file__).parent


def drawings():
    """Six flat pictures of three concepts in two styles."""
    made = []
    for i, concept in enumerate(("red apple", "fox", "key")):
        for style in ("noto", "flat"):
            split = "pair" if (concept, style) == ("key", "flat") else "train"
            name = f"{style}/{i}.webp"
            made.append(data.Drawing(name, style, concept, str(i), 4, split, ["nice", concept]))
    return made


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps one precision a process, which "auto" chooses by the processor."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "emoji.zip"
    with zipfile.ZipFile(path, "w") as out:
        for i, drawing in enumerate(drawings()):
            buffer = io.BytesIO()
            image = Image.new("RGB", (64, 64), (40 * i, 255 - 40 * i, 90))
            image.save(buffer, "WEBP", lossless=True)
            out.writestr(drawing.file_name, buffer.getvalue())
        lines = (json.dumps(asdict(d) | {"text": d.text}) for d in drawings())
        out.writestr("metadata.jsonl", "\n".join(lines))
    return path


def test_archive_round_trip(archive):
    loaded = data.load(archive)
    assert loaded == drawings()
    assert loaded[0].text == "noto style red apple"
    pictures = list(data.pictures(archive, loaded))
    assert [p.getpixel((3, 3))[0] for p in pictures] == [0, 40, 80, 120, 160, 200]
    assert {d.concept for d in data.load(archive, everyday=True)} <= {"red apple", "fox", "key"}


def test_missing_and_damaged_archives(tmp_path, archive):
    with pytest.raises(FileNotFoundError, match="examples.emoji.data prepare"):
        data.load(tmp_path / "none.zip")
    archive.write_bytes(archive.read_bytes()[:200])
    with pytest.raises(ValueError, match="damaged"):
        data.load(archive)


def test_splits_are_those_written_down():
    """The hash gives today what the model was trained with."""
    written = json.loads((EMOJI / "splits.json").read_text())
    assert len(written["concepts"]) >= 40
    for concept in written["concepts"]:
        assert data.split_of("noto", concept, subject=True) == "concept"
    for concept, style in written["pairs"]:
        assert data.split_of(style, concept, subject=False) == "pair"
    for concept, style in [("red apple", "twemoji"), ("fox", "noto")]:
        assert (data.split_of(style, concept, True) == "pair") == (
            [concept, style] in written["pairs"]
        )


def test_tokenizer_keeps_common_words_whole():
    captions = [d.text for d in drawings()] * 20
    tokenizer = networks.build_tokenizer(captions, vocabulary=600)
    ids = tokenizer("Noto style red apple").input_ids
    assert tokenizer.convert_ids_to_tokens(ids)[1:-1] == [
        "noto</w>",
        "style</w>",
        "red</w>",
        "apple</w>",
    ]


def test_recipe_trains_resumes_and_exports(archive, tmp_path, monkeypatch):
    """All stages in seconds: checkpoints continue where they stopped, the export is a pipeline."""
    tiny = networks.Preset(False, (16, 16, 16), (16, 32), (False, True), 4, 32, 4, 1e-3, 1e-3)
    monkeypatch.setitem(networks.PRESETS, "cpu", tiny)
    common = ["--archive", str(archive), "--work", str(tmp_path / "work")]
    short = ["--report-minutes", "0.01"]

    def state(stage):
        return json.loads((tmp_path / "work" / stage / "state.json").read_text())

    for stage in ("autoencoder", "denoiser"):
        train.main([stage, "--minutes", "0.005", *short, *common])
        first = state(stage)
        # However slow the machine is: a little longer than it took.
        limit = first["elapsed"] + 0.3
        train.main([stage, "--minutes", str(limit / 60), *short, *common])
        second = state(stage)
        assert second["step"] > first["step"] > 0
        assert second["elapsed"] >= limit > first["elapsed"] >= 0.3
        files = list((tmp_path / "work" / stage).glob("*.safetensors"))
        assert [f.name for f in files] == [f"state-{second['step']}.safetensors"]
    output = tmp_path / "model"
    train.main(["export", "-o", str(output), *common])
    assert "Not fully trained" in (output / "README.md").read_text()
    pipe = load_pipeline(output)
    trained = [d for d in data.load(archive) if d.split == "train"]
    latents = train.encode(pipe.vae, train.load_pixels(archive, trained))
    # Measured on what was trained on; the exported weights are rounded to half precision.
    assert (latents * pipe.vae.config.scaling_factor).std().item() == pytest.approx(1, rel=0.02)
    image = pipe("noto style fox", num_inference_steps=2, guidance="apg").images[0]
    assert image.size == (64, 64)


def test_training_resumes_weights_and_moments(tmp_path):
    """A checkpoint holds what the optimizer needs: saved and loaded runs take the same step."""
    import argparse

    from examples.emoji.training import Training

    args = argparse.Namespace(precision="no", work=tmp_path, minutes=1.0)

    def start():
        torch.manual_seed(0)
        return Training("line", torch.nn.Linear(3, 1), args, 1e-2)

    def advance(run, steps):
        for _ in range(steps):
            x = torch.randn(8, 3, generator=run.generator())
            run.update((run.model(x) - x.sum(1, keepdim=True)).square().mean())

    run = start()
    advance(run, 5)
    run.save()
    resumed = start()
    assert resumed.step == 5
    advance(run, 3)
    advance(resumed, 3)
    for name, value in run.bare.state_dict().items():
        assert torch.equal(value, resumed.bare.state_dict()[name])
        assert torch.equal(run.ema[name], resumed.ema[name])


def test_embedded_model_is_small_half_precision_safetensors():
    folder = embedded_folder()
    files = [f for f in folder.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 25e6
    weights = [f for f in files if f.suffix == ".safetensors"]
    assert weights and max(f.stat().st_size for f in weights) <= 15e6
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
    for path in weights:
        with safe_open(path, "pt") as tensors:
            dtypes = {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
        assert dtypes <= {"F16", "I64"}
    record = json.loads((folder / "training.json").read_text())
    assert record["stages"]["denoiser"]["held_out_loss"] > 0


@pytest.mark.parametrize("batch", [1, 3])
def test_cfg_on_the_embedded_model_is_the_stock_pipeline(batch):
    from diffusers import StableDiffusionPipeline

    stock = StableDiffusionPipeline.from_pretrained(embedded_folder(), torch_dtype=torch.float32)
    ours = load_embedded()
    assert not isinstance(stock, GuidedMixin) and isinstance(ours, GuidedMixin)
    images = []
    for pipe, extra in ((stock, {}), (ours, {"guidance": "cfg"}), (ours, {})):
        pipe.set_progress_bar_config(disable=True)
        call = {
            "prompt": ["noto style fox", "flat style key", "twemoji style pizza"][:batch],
            "num_inference_steps": 4,
            "generator": [torch.Generator().manual_seed(i) for i in range(batch)],
            "output_type": "pt",
        }
        images.append(pipe(**call, **extra).images)
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


def test_embedded_model_follows_the_prompt_and_saturates():
    """Colours named by prompts appear; saturation rises with the scale of CFG, less with APG's."""
    from pilotage.eval.metrics.images import saturation, to_tensor

    pipe = load_embedded()
    pipe.set_progress_bar_config(disable=True)
    prompts = ["twemoji style green heart", "twemoji style blue heart", "twemoji style red heart"]

    def pictures(guidance, scale):
        return to_tensor(
            pipe(
                prompts,
                guidance=guidance,
                guidance_scale=scale,
                num_inference_steps=10,
                generator=[torch.Generator().manual_seed(i) for i in range(3)],
            ).images
        )

    low, high, projected = pictures("cfg", 3.0), pictures("cfg", 15.0), pictures("apg", 15.0)
    ink = 1 - low.flatten(2).mean(2)  # how much of each colour is missing from white
    assert [int(np.argmin(row)) for row in ink.numpy()] == [1, 2, 0]
    assert saturation(high).mean() > saturation(low).mean()
    assert saturation(projected).mean() < saturation(high).mean()


def test_settings_shipped_with_the_model_belong_to_it(monkeypatch):
    """Every file is a name, was fitted on these weights, and costs what it says."""
    pipe = load_embedded()
    pipe.set_progress_bar_config(disable=True)
    forward = pipe.unet.forward

    @wraps(forward)
    def quick(x, timestep, encoder_hidden_states, **_):
        """The weights are what counts here, not what they compute: something of the text."""
        return (0.5 * x + encoder_hidden_states.mean((1, 2)).view(-1, 1, 1, 1),)

    monkeypatch.setattr(pipe.unet, "forward", quick)
    files = sorted((embedded_folder() / "guidance").glob("*.json"))
    assert {"linear-ag", "searched"} <= {path.stem for path in files}
    for path in files:
        pipe("noto style fox", guidance=path.stem, num_inference_steps=20, output_type="latent")
        policy = pipe.resolve_guidance(path.stem).policy
        assert policy.identities
        assert pipe.guidance_trace.nfe == [policy.nfe(20)]
