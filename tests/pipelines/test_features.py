"""Guidance beside the other features of diffusers: each as it is without."""

import copy

import accelerate
import diffusers
import pytest
import torch

import pilotage.pipelines
from pilotage.guidance import APG, CFGZeroStar
from pilotage.pipelines import LayoutError, guided

from ..families import FAMILIES
from .checks import Rows, equal, latents


def test_from_pipe_keeps_dtypes():
    stock = FAMILIES["sd"].build().to(torch.bfloat16)
    cls = pilotage.pipelines.StableDiffusionImg2ImgPipeline
    other = cls.from_pipe(stock)
    assert isinstance(other, cls)
    assert stock.unet.dtype == stock.vae.dtype == other.unet.dtype == torch.bfloat16
    assert other.unet is stock.unet
    assert cls.from_pipe(stock, torch_dtype=torch.float32).unet.dtype == torch.float32


def test_from_pipe_does_not_disturb_to_afterwards():
    pipe = pilotage.pipelines.StableDiffusionPipeline.from_pipe(FAMILIES["sd"].build())
    assert pipe.to(torch.float64).unet.dtype == torch.float64


def test_custom_pipeline(tmp_path):
    guided(FAMILIES["sd"].build()).save_pretrained(tmp_path / "model")
    (tmp_path / "custom").mkdir()
    (tmp_path / "custom" / "pipeline.py").write_text(
        "from diffusers import StableDiffusionPipeline\n\n\n"
        "class ShoutingPipeline(StableDiffusionPipeline):\n"
        "    def encode_prompt(self, prompt, *args, **kwargs):\n"
        "        loud = [p.upper() + '!' for p in prompt] if isinstance(prompt, list) else prompt\n"
        "        return super().encode_prompt(loud, *args, **kwargs)\n"
    )
    pipe = pilotage.pipelines.StableDiffusionPipeline.from_pretrained(
        tmp_path / "model", custom_pipeline=str(tmp_path / "custom"), trust_remote_code=True
    )
    assert type(pipe).__name__ == "ShoutingPipeline"
    pipe.set_progress_bar_config(disable=True)
    assert equal(latents(pipe, "sd"), latents(pipe, "sd", guidance="cfg"))
    assert not equal(latents(pipe, "sd"), latents(pipe, "sd", guidance="apg"))


def test_compiled_denoiser():
    pipe = guided(FAMILIES["sd"].build())
    expected = latents(pipe, "sd", guidance="apg+ag")
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    torch.testing.assert_close(
        latents(pipe, "sd", guidance="apg+ag"), expected, rtol=1e-4, atol=1e-4
    )


def test_offloaded_modules():
    """Accelerate's hooks on the modules, as enable_model_cpu_offload sets them."""
    pipe = guided(FAMILIES["sd"].build())
    expected = latents(pipe, "sd", guidance="apg")
    hook = None
    for module in (pipe.text_encoder, pipe.unet, pipe.vae):
        _, hook = accelerate.cpu_offload_with_hook(module, "cpu", hook)
    assert equal(latents(pipe, "sd", guidance="apg"), expected)
    assert equal(latents(pipe, "sd", guidance="cfg"), latents(pipe, "sd"))


def test_lora():
    from peft import LoraConfig

    pipe = guided(FAMILIES["sd"].build())
    plain = latents(pipe, "sd", guidance="apg")
    torch.manual_seed(0)
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"])
    pipe.unet.add_adapter(config)
    with_lora = latents(pipe, "sd", guidance="apg")
    assert not equal(plain, with_lora)
    assert equal(latents(pipe, "sd", guidance="cfg"), latents(pipe, "sd"))
    off = {"cross_attention_kwargs": {"scale": 0.0}}
    assert equal(latents(pipe, "sd", guidance="cfg", **off), latents(pipe, "sd", **off))
    torch.testing.assert_close(latents(pipe, "sd", guidance="apg", **off), plain)


def ip_adapter(unet, tokens=4, width=16):
    """Random weights of an IP-Adapter for a UNet, in the layout its loader reads."""
    generator = torch.Generator().manual_seed(0)
    cross = unet.config.cross_attention_dim

    def draw(*shape):
        return torch.randn(*shape, generator=generator) * 0.3

    projections, key = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            hidden = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            projections[f"{key}.to_k_ip.weight"] = draw(hidden, cross)
            projections[f"{key}.to_v_ip.weight"] = draw(hidden, cross)
            key += 2
    image_projection = {
        "proj.weight": draw(tokens * cross, width),
        "proj.bias": draw(tokens * cross),
        "norm.weight": torch.ones(cross),
        "norm.bias": torch.zeros(cross),
    }
    return {"image_proj": image_projection, "ip_adapter": projections}


def test_ip_adapter_images_are_gathered():
    pipe = guided(FAMILIES["sd"].build())
    pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet)])
    embeds = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(1))  # uncond, cond
    extra = {"ip_adapter_image_embeds": [embeds]}
    assert equal(latents(pipe, "sd", **extra), latents(pipe, "sd", guidance="cfg", **extra))
    other = {"ip_adapter_image_embeds": [embeds.flip(0)]}
    assert not equal(latents(pipe, "sd", **extra), latents(pipe, "sd", **other))
    with Rows(pipe, "sd") as rows:
        latents(pipe, "sd", guidance="ag", **extra)
    steps = len(pipe.guidance_trace.steps)
    assert sum(rows.calls) == sum(pipe.guidance_trace.nfe) < 3 * 2 * steps


def test_empty_and_per_prompt_negatives():
    pipe = guided(FAMILIES["sdxl"].build())
    for negative in ("", ["", "a cat", "dark"], "blurry"):
        extra = {"negative_prompt": negative}
        call = FAMILIES["sdxl"].call(3, False)
        stock = pipe(**copy.copy(call) | extra)[0]
        call = FAMILIES["sdxl"].call(3, False)
        assert equal(stock, pipe(**call | extra, guidance="cfg")[0])


def test_heun_has_two_evaluations_a_step():
    pipe = guided(FAMILIES["sd"].build())
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    latents(pipe, "sd", guidance="apg", num_inference_steps=4)
    assert [step.index for step in pipe.guidance_trace.steps] == list(range(7))


@pytest.mark.parametrize("name", ["pix2pix", "sd_pag"])
def test_three_branches_are_refused(name):
    with pytest.raises(LayoutError, match="third branch"):
        guided(FAMILIES[name].build())


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("sd", "guidance_rescale", 0.7),
        ("sd3", "skip_guidance_layers", [0]),
        ("cogvideox", "use_dynamic_cfg", True),
    ],
)
def test_options_that_need_the_pipelines_own_combination(name, option, value):
    pipe = guided(FAMILIES[name].build())
    with pytest.raises(ValueError, match=f"{option} cannot be combined"):
        latents(pipe, name, guidance="apg", **{option: value})
    stock = latents(pipe, name, **{option: value})
    assert equal(stock, latents(pipe, name, guidance="cfg", **{option: value}))


def test_true_cfg_needs_a_negative_prompt():
    pipe = guided(FAMILIES["flux"].build())
    with pytest.raises(ValueError, match="without a negative prompt"):
        latents(pipe, "flux", negative=False, guidance="apg")


def test_zero_init_is_for_flow_models():
    with pytest.raises(ValueError, match="flow velocity"):
        latents(guided(FAMILIES["sd"].build()), "sd", guidance="cfg-zero*")
    pipe = guided(FAMILIES["sd3"].build())
    assert latents(pipe, "sd3", guidance=CFGZeroStar()).isfinite().all()


def test_second_scale_of_wan():
    """Wan's second transformer has a scale of its own, seen by the rules as well."""
    pipe = guided(FAMILIES["wan2"].build())
    neutral = APG(eta=1.0, norm_threshold=0.0, momentum=0.0)
    extra = {"guidance_scale": 3.0, "guidance_scale_2": 8.0}
    stock = latents(pipe, "wan2", **extra)
    torch.testing.assert_close(
        latents(pipe, "wan2", guidance=neutral, **extra), stock, rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(stock, latents(pipe, "wan2", guidance_scale=3.0), atol=1e-3)
