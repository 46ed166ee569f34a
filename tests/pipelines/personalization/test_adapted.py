"""Pipelines that are not as they were loaded: offloaded, or with LoRA."""

import pytest
import torch
from peft import LoraConfig

from pilotage.pipelines.personalization import DiffusionTokenLoss, Personalizer

from .tiny import SMALL, WORD, build, fit


def model_offload(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def group_offload(pipe):
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("offload", [model_offload, group_offload])
def test_an_offloaded_pipeline_learns_the_same(family, offload, tmp_path):
    options = {"steps": 3, "preview_every": 3, "preview_options": SMALL}
    plain, pipe = build(family), build(family)
    expected = fit(plain, output=tmp_path / "a", **options)
    offload(pipe)
    token = fit(pipe, output=tmp_path / "b", **options)
    assert (token.losses, token.evaluations) == (expected.losses, expected.evaluations)
    drawn = [list((tmp_path / n / "previews").iterdir())[0].read_bytes() for n in "ab"]
    assert drawn[0] == drawn[1]


def test_tensors_go_where_an_offloaded_network_runs():
    """Not to where it lies between calls."""
    pipe = build()
    pipe.enable_model_cpu_offload(device="cuda")  # nothing is moved there yet
    loss = DiffusionTokenLoss(pipe)
    assert pipe.unet.device == torch.device("cpu") and loss.device.type == "cuda"


def test_sequential_offloading_is_refused():
    pipe = build()
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match=r"not in memory .*use|not in memory .*enable_model_cpu"):
        Personalizer(pipe)


def with_lora(**settings):
    pipe = build()
    for network, module in ((pipe.unet, "to_q"), (pipe.text_encoder, "q_proj")):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=[module], init_lora_weights=False, **settings)
        network.add_adapter(config)
    return pipe


def test_a_pipeline_with_lora_learns_on_its_own_loss(tmp_path):
    """The LoRA counts: as in a pipeline whose weights hold it; without it, the loss is another."""
    pipe, fused = with_lora(), with_lora()
    fused.unet.fuse_lora()
    for module in fused.text_encoder.modules():
        if hasattr(module, "merge") and hasattr(module, "active_adapters"):
            module.merge()
    token = fit(pipe, output=tmp_path, steps=3)
    assert token.losses == pytest.approx(fit(fused, steps=3).losses, rel=1e-4)
    assert token.losses != pytest.approx(fit(build(), steps=3).losses, rel=1e-4)
    assert not pipe.text_encoder.get_input_embeddings()._forward_hooks
    assert WORD not in pipe.tokenizer.get_vocab()
    assert fit(pipe, output=tmp_path, steps=4).steps == 4
    pipe.unet.disable_adapters()
    with pytest.raises(ValueError, match=r"other settings \(adapters\)"):
        fit(pipe, output=tmp_path, steps=5)
    pipe.unet.enable_adapters()
    for module in pipe.unet.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.5)
    with pytest.raises(ValueError, match=r"other settings \(adapters\)"):
        fit(pipe, output=tmp_path, steps=5)
