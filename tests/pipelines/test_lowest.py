"""A tiny Stable Diffusion without text encoders, also for the lowest versions of libraries."""

import diffusers as df
import pytest
import torch

from pilotage.pipelines import guided

SCHEDULERS = [df.DDIMScheduler, df.DPMSolverMultistepScheduler, df.EulerDiscreteScheduler]
BATCH, STEPS = 3, 5


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    unet = df.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        cross_attention_dim=16,
        **blocks,
    )
    names = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    pipe = guided(
        df.StableDiffusionPipeline(
            unet=unet,
            scheduler=df.DDIMScheduler(),
            requires_safety_checker=False,
            **dict.fromkeys(names),
        )
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe, guidance):
    texts = torch.randn(2, BATCH, 4, 16, generator=torch.Generator().manual_seed(0))
    return pipe(
        prompt_embeds=texts[0],
        negative_prompt_embeds=texts[1],
        generator=[torch.Generator().manual_seed(i) for i in range(BATCH)],
        num_inference_steps=STEPS,
        guidance_scale=7.5,
        height=64,
        width=64,
        output_type="latent",
        guidance=guidance,
    ).images


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_plain_guidance_is_the_stock_pipelines(pipe, kind):
    pipe.scheduler = kind()
    stock = latents(pipe, None)
    assert torch.equal(stock, latents(pipe, "cfg"))
    assert pipe.guidance_trace.nfe == [2 * STEPS] * BATCH
    apg = latents(pipe, "apg")
    assert torch.isfinite(apg).all() and not torch.equal(stock, apg)


def test_what_is_evaluated(pipe):
    rows = []
    handle = pipe.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    for guidance in ("apg+ag", "forecast", "apg+forecast"):
        rows.clear()
        latents(pipe, guidance)
        assert sum(rows) == sum(pipe.guidance_trace.nfe)
    handle.remove()
    assert pipe.guidance_trace.nfe == [6] * BATCH
