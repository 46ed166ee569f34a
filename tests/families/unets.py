"""Other UNets: Kandinsky, DeepFloyd IF, Stable Cascade."""

import diffusers as df

from .. import components as c
from .base import UNET, family


@family("kandinsky22", "KandinskyV22Pipeline", "batch: uncond cond", UNET, c.image_embeds_call)
def kandinsky22() -> dict:
    """Learned variance: the scheduler uses the conditional half's variance channels."""
    unet = c.unet(
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        encoder_hid_dim=16,
        encoder_hid_dim_type="image_proj",
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
    )
    scheduler = df.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, clip_sample=False, variance_type="learned_range"
    )
    return {"unet": unet, "scheduler": scheduler, "movq": c.movq()}


@family(
    "kandinsky3",
    "Kandinsky3Pipeline",
    "batch: uncond cond",
    UNET,
    height=64,
    width=64,
    w=lambda scale: scale + 1,
)
def kandinsky3() -> dict:
    """Its guidance line is (w + 1) * cond - w * uncond: its scale is one less than the others'."""
    unet = df.Kandinsky3UNet(
        time_embedding_dim=8,
        groups=2,
        attention_head_dim=4,
        layers_per_block=2,
        block_out_channels=(8, 16),
        cross_attention_dim=8,
        encoder_hid_dim=c.WIDTH,
    )
    return {
        **c.texts(c.t5()),
        "unet": c.wake(unet),
        "scheduler": df.DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False),
        "movq": c.movq(),
    }


@family(
    "stable_cascade",
    "StableCascadeDecoderPipeline",
    "batch: cond uncond",
    ("decoder",),
    c.cascade_call,
)
def stable_cascade() -> dict:
    block = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
    decoder = df.StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=8,
        conditioning_dim=16,
        block_out_channels=(8, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        block_types_per_layer=(block, block),
        clip_text_pooled_in_channels=16,
        effnet_in_channels=4,
        timestep_conditioning_type=("sca",),
    )
    return {
        **c.texts(c.clip(projection=True)),
        "vqgan": c.paella(),
        "decoder": c.wake(decoder),
        "scheduler": df.DDPMWuerstchenScheduler(),
        "latent_dim_scale": 4.0,
    }
