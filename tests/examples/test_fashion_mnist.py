"""The recipe of the small networks, and what is shipped of them."""

import dataclasses
import json

import pytest
import torch
from diffusers import DDIMScheduler

from examples.fashion_mnist import data as fashion_mnist
from examples.fashion_mnist import train
from examples.fashion_mnist.pipeline import ClassPipeline, to_blocks


@pytest.mark.parametrize("name", sorted(train.NETWORKS))
def test_train_resume_and_export(name, tmp_path, monkeypatch):
    images = torch.randint(0, 256, (40, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 10
    monkeypatch.setattr(train, "load_images", lambda *_: (images.to(torch.uint8), labels))
    monkeypatch.setattr(train, "sheet", lambda *_: None)
    kind = dataclasses.replace(train.NETWORKS[name], batch=4)
    monkeypatch.setitem(train.NETWORKS, name, kind)
    work, out = str(tmp_path / "work"), tmp_path / "model"
    call = ["train", name, "--work", work, "--precision", "no", "--minutes"]
    train.main([*call, "0.0001"])
    first = json.loads((tmp_path / "work" / name / "state.json").read_text())
    train.main([*call, str(first["elapsed"] / 60 + 0.0001)])
    state = json.loads((tmp_path / "work" / name / "state.json").read_text())
    assert state["step"] > first["step"] and state["elapsed"] > first["elapsed"]
    train.main(["export", name, "--work", work, "-o", str(out)])
    monkeypatch.setitem(fashion_mnist.MODELS, name, out)
    pipe = {"plain": fashion_mnist.load_unet, "classes": fashion_mnist.load_classes}[name]()
    assert pipe.scheduler.config.beta_schedule == "linear" and not pipe.scheduler.config.clip_sample
    weights = out / "unet" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size < 6e6
    attends = any("Attention" in type(module).__name__ for module in pipe.unet.modules())
    assert attends == (name == "classes")
    assert "steps of" in (out / "README.md").read_text()


def test_the_class_network_has_at_most_a_million_parameters():
    assert sum(p.numel() for p in train.build_classes().parameters()) <= 1e6


def test_class_pipeline_is_cfg_in_pixels():
    """Against a loop written out over pixels, not over the blocks the network takes."""
    torch.manual_seed(0)
    network = train.build_classes().eval()
    pipe = ClassPipeline(network, DDIMScheduler(**train.SCHEDULE))
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 4, "output_type": "pt"}
    found = pipe([3, 7], guidance_scale=2.5, generator=torch.Generator().manual_seed(1), **call)

    noise = torch.randn(2, 4, 14, 14, generator=torch.Generator().manual_seed(1))
    x = torch.empty(2, 1, 28, 28)
    for i in range(4):
        x[:, 0, i // 2 :: 2, i % 2 :: 2] = noise[:, i]
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    with torch.no_grad():
        for t in (750, 500, 250, 0):
            cond = network(to_blocks(x), t, torch.tensor([3, 7])).sample
            uncond = network(to_blocks(x), t, torch.tensor([10, 10])).sample
            eps = torch.nn.functional.pixel_shuffle(uncond + 2.5 * (cond - uncond), 2)
            x0 = (x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()
            last = abar[t - 250] if t else torch.ones(())
            x = last.sqrt() * x0 + (1 - last).sqrt() * eps
    torch.testing.assert_close(found.images, (x.clamp(-1, 1) + 1) / 2, atol=2e-5, rtol=0)


@pytest.mark.parametrize("labels", [[10], [-1], []])
def test_class_pipeline_refuses_unknown_classes(labels):
    pipe = ClassPipeline(train.build_classes(), DDIMScheduler(**train.SCHEDULE))
    with pytest.raises(ValueError, match="class labels of 0 to 9"):
        pipe(labels)


def test_class_pipeline_tells_its_state_after_every_step():
    torch.manual_seed(0)
    pipe = ClassPipeline(train.build_classes().eval(), DDIMScheduler(**train.SCHEDULE))
    pipe.set_progress_bar_config(disable=True)
    call = {"class_labels": [3, 7], "num_inference_steps": 3, "output_type": "pt"}
    seen = []

    def told(own, index, timestep, tensors):
        assert own is pipe and timestep == pipe.scheduler.timesteps[index]
        seen.append(tensors["latents"])
        return {"latents": torch.zeros(2, 4, 14, 14)} if index == 2 else {}

    def images(callback):
        generator = torch.Generator().manual_seed(1)
        return pipe(generator=generator, callback_on_step_end=callback, **call).images

    plain = images(None)
    assert (images(told) == 0.5).all() and len(seen) == 3
    last = torch.nn.functional.pixel_shuffle(seen[2], 2).clamp(-1, 1)
    torch.testing.assert_close(plain, last / 2 + 0.5)
    with pytest.raises(ValueError, match="gets latents"):
        pipe(callback_on_step_end=told, callback_on_step_end_tensor_inputs=["noise"], **call)
