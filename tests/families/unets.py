"""Other UNets: Kandinsky, DeepFloyd IF, Stable Cascade; and the priors that go before them."""

import diffusers as df
import transformers as tr

from .. import components as c
from .base import NO_CHECKER, PARTIAL, UNET, family

BOTH = "batch: uncond cond"
PRIOR = ("prior",)
LATER = PARTIAL | {"first_step": 1}
PIXELS = {"output_type": "pt"}
UNSIZED = {"height": None, "width": None}


def first(channels: int):
    """Only these of the output are guided, though the input has more channels in common."""
    return lambda output, x: (slice(None), slice(channels))


def added_kv(**config) -> df.UNet2DConditionModel:
    """The blocks which Kandinsky 2 and DeepFloyd IF are made of, with learned variance."""
    blocks = {
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "attention_head_dim": 4,
        "resnet_time_scale_shift": "scale_shift",
        "out_channels": 8,
    }
    return c.unet(**(blocks | config))


def clip_vision(projection: bool = True) -> dict:
    config = tr.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    cls = tr.CLIPVisionModelWithProjection if projection else tr.CLIPVisionModel
    size = {"height": 16, "width": 16}
    processor = tr.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    return {"image_encoder": cls(config).eval(), "image_processor": processor}


# Calls: what they add to a batch, one thing per sample.


def with_picture(call):
    def pictured(batch: int, negative: bool, **extra) -> dict:
        image = c.per_sample(batch, 3, 16, 16, low=0.0)
        return call(batch, negative, **extra) | {"image": image}

    return pictured


def with_mask(call):
    def masked(batch: int, negative: bool, **extra) -> dict:
        mask = c.per_sample(batch, 1, 16, 16, seed=300, low=0.0) > 0.5
        return with_picture(call)(batch, negative, **extra) | {"mask_image": mask.float()}

    return masked


def with_hint(call):
    def hinted(batch: int, negative: bool, **extra) -> dict:
        return call(batch, negative, **extra) | {"hint": c.per_sample(batch, 3, 64, 64, seed=400)}

    return hinted


def prior_call(batch: int, negative: bool, **extra) -> dict:
    """Negative prompts get embeddings of their own, in the same batch."""
    call = c.text_call(batch, negative, **(UNSIZED | PIXELS | extra))
    return call | {"generator": c.generators(2 * batch if negative else batch)}


def emb2emb_call(batch: int, negative: bool, **extra) -> dict:
    return prior_call(batch, negative, **extra) | {"image": c.per_sample(batch, 16)}


def decoder21_call(batch: int, negative: bool, **extra) -> dict:
    unwanted = c.per_sample(batch, 16, seed=200)
    embeds = {"image_embeds": c.per_sample(batch, 16), "negative_image_embeds": unwanted}
    return c.text_call(batch, negative, **embeds, **PIXELS, **extra)


def combined_call(batch: int, negative: bool, **extra) -> dict:
    """No negative prompts: they double the prior's generators, and not the decoder's."""
    return c.text_call(
        batch, False, **({"prior_guidance_scale": 4.0, "prior_num_inference_steps": 3} | extra)
    )


# Kandinsky 2.2: an image embedding is all that its decoder sees.


def decoder22(unet: df.UNet2DConditionModel) -> dict:
    """Learned variance: the scheduler uses the conditional half's variance channels."""
    scheduler = df.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, clip_sample=False, variance_type="learned_range"
    )
    return {"unet": unet, "scheduler": scheduler, "movq": c.movq()}


def unet22(**config) -> df.UNet2DConditionModel:
    projected = {"encoder_hid_dim": 16, "encoder_hid_dim_type": "image_proj"}
    return added_kv(**({"addition_embed_type": "image"} | projected | config))


@family("kandinsky22", "KandinskyV22Pipeline", BOTH, UNET, c.image_embeds_call)
@family(
    "kandinsky22_img2img",
    "KandinskyV22Img2ImgPipeline",
    BOTH,
    UNET,
    with_picture(c.image_embeds_call),
    **LATER,
)
def kandinsky22() -> dict:
    return decoder22(unet22())


@family(
    "kandinsky22_inpaint",
    "KandinskyV22InpaintPipeline",
    BOTH,
    UNET,
    with_mask(c.image_embeds_call),
    part=first(4),
)
def kandinsky22_inpaint() -> dict:
    """It blends every sample with the first sample's picture, under the first one's mask."""
    return decoder22(unet22(in_channels=9))


@family(
    "kandinsky22_controlnet",
    "KandinskyV22ControlnetPipeline",
    BOTH,
    UNET,
    with_hint(c.image_embeds_call),
    **PIXELS,
)
@family(
    "kandinsky22_controlnet_img2img",
    "KandinskyV22ControlnetImg2ImgPipeline",
    BOTH,
    UNET,
    with_hint(with_picture(c.image_embeds_call)),
    **PIXELS,
    **LATER,
)
def kandinsky22_controlnet() -> dict:
    """The network itself adds the hint to its input, as four more channels."""
    return decoder22(unet22(addition_embed_type="image_hint", in_channels=8))


@family("kandinsky_prior", "KandinskyPriorPipeline", BOTH, PRIOR, prior_call)
@family("kandinsky22_prior", "KandinskyV22PriorPipeline", BOTH, PRIOR, prior_call)
@family(
    "kandinsky22_prior_emb2emb",
    "KandinskyV22PriorEmb2EmbPipeline",
    BOTH,
    PRIOR,
    emb2emb_call,
    **LATER,
)
def kandinsky_prior() -> dict:
    """From a text to the embedding of a picture it fits, one vector per sample."""
    network = df.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, embedding_dim=16, num_layers=1
    )
    network = c.amplify(c.wake(network), ("attn1.to_v", "attn1.to_out.0.weight"), 4.0)
    network.clip_std.data.fill_(1.0)
    scheduler = df.UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0)
    text = c.texts(c.clip(projection=True))
    return {"prior": network, "scheduler": scheduler, **clip_vision(), **text}


def with_prior(decoder: dict) -> dict:
    """Both in one pipeline, each with a loop, a scheduler and a scale of its own."""
    return decoder | {f"prior_{name}": part for name, part in kandinsky_prior().items()}


@family(
    "kandinsky22_combined",
    "KandinskyV22CombinedPipeline",
    BOTH,
    UNET,
    combined_call,
    negative=False,
)
@family(
    "kandinsky22_combined_prior",
    "KandinskyV22CombinedPipeline",
    BOTH,
    ("prior_prior",),
    combined_call,
    scale_name="prior_guidance_scale",
    negative=False,
    scheduler="prior_scheduler",
)
@family(
    "kandinsky22_img2img_combined",
    "KandinskyV22Img2ImgCombinedPipeline",
    BOTH,
    UNET,
    with_picture(combined_call),
    negative=False,
    **LATER,
)
def kandinsky22_combined() -> dict:
    return with_prior(kandinsky22())


@family(
    "kandinsky22_inpaint_combined",
    "KandinskyV22InpaintCombinedPipeline",
    BOTH,
    UNET,
    with_mask(combined_call),
    negative=False,
    part=first(4),
)
def kandinsky22_inpaint_combined() -> dict:
    return with_prior(kandinsky22_inpaint())


# Kandinsky 2.1: its decoder reads the text as well.


def multilingual_clip() -> tuple:
    from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

    config = MCLIPConfig(
        transformerDimSize=c.WIDTH,
        imageDimSize=16,
        vocab_size=c.VOCAB,
        hidden_size=c.WIDTH,
        intermediate_size=c.WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=80,
    )
    return MultilingualCLIP(config).eval(), c.xlm_roberta_tokenizer()


def decoder21(**config) -> dict:
    """Learned variance, which this scheduler has no use for: it is dropped after guidance."""
    unet = added_kv(
        addition_embed_type="text_image",
        encoder_hid_dim=c.WIDTH,
        encoder_hid_dim_type="text_image_proj",
        **config,
    )
    scheduler = df.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False
    )
    text = c.texts(multilingual_clip())
    return {**text, "unet": unet, "scheduler": scheduler, "movq": c.movq()}


@family("kandinsky", "KandinskyPipeline", BOTH, UNET, decoder21_call)
@family(
    "kandinsky_img2img",
    "KandinskyImg2ImgPipeline",
    BOTH,
    UNET,
    with_picture(decoder21_call),
    **LATER,
)
def kandinsky() -> dict:
    return decoder21()


@family(
    "kandinsky_inpaint",
    "KandinskyInpaintPipeline",
    BOTH,
    UNET,
    with_mask(decoder21_call),
    part=first(4),
)
def kandinsky_inpaint() -> dict:
    return decoder21(in_channels=9)


@family(
    "kandinsky_combined",
    "KandinskyCombinedPipeline",
    BOTH,
    UNET,
    combined_call,
    negative=False,
    **PIXELS,
)
@family(
    "kandinsky_img2img_combined",
    "KandinskyImg2ImgCombinedPipeline",
    BOTH,
    UNET,
    with_picture(combined_call),
    negative=False,
    **PIXELS,
    **LATER,
)
def kandinsky_combined() -> dict:
    return with_prior(kandinsky())


@family(
    "kandinsky_inpaint_combined",
    "KandinskyInpaintCombinedPipeline",
    BOTH,
    UNET,
    with_mask(combined_call),
    negative=False,
    part=first(4),
    **PIXELS,
)
def kandinsky_inpaint_combined() -> dict:
    return with_prior(kandinsky_inpaint())


# Kandinsky 3


def one_more(scale: float) -> float:
    return scale + 1


@family("kandinsky3", "Kandinsky3Pipeline", BOTH, UNET, height=64, width=64, w=one_more)
@family(
    "kandinsky3_img2img",
    "Kandinsky3Img2ImgPipeline",
    BOTH,
    UNET,
    with_picture(c.text_call),
    w=one_more,
    **UNSIZED,
    **LATER,
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


# DeepFloyd IF: pixels.


def pixel_call(batch: int, negative: bool, **extra) -> dict:
    return c.text_call(batch, negative, **({"clean_caption": False} | PIXELS | extra))


def edit_call(batch: int, negative: bool, **extra) -> dict:
    image = c.per_sample(batch, 3, 16, 16, low=-1.0)
    return pixel_call(batch, negative, **UNSIZED, **extra) | {"image": image}


def upscale_call(batch: int, negative: bool, **extra) -> dict:
    image = c.per_sample(batch, 3, 8, 8, seed=500, low=-1.0)
    return pixel_call(batch, negative, **extra) | {"image": image}


def upscale_edit_call(batch: int, negative: bool, **extra) -> dict:
    original = edit_call(batch, negative, **extra)
    small = {"image": c.per_sample(batch, 3, 8, 8, seed=500, low=-1.0)}
    return original | {"original_image": original["image"]} | small


def masked_edit_call(call):
    def masked(batch: int, negative: bool, **extra) -> dict:
        mask = c.per_sample(batch, 1, 16, 16, seed=300, low=0.0) > 0.5
        return call(batch, negative, **extra) | {"mask_image": mask.float()}

    return masked


def deepfloyd(**config) -> dict:
    """Learned variance, put back after guidance; the scheduler clips by dynamic thresholding."""
    unet = added_kv(
        out_channels=6,
        encoder_hid_dim=c.WIDTH,
        cross_attention_dim=32,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        act_fn="gelu",
        **config,
    )
    scheduler = df.DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=1.5,
        variance_type="learned_range",
    )
    parts = {"unet": unet, "scheduler": scheduler, "watermarker": None}
    return {**c.texts(c.t5()), **parts, **NO_CHECKER}


@family("if", "IFPipeline", BOTH, UNET, pixel_call)
@family("if_img2img", "IFImg2ImgPipeline", BOTH, UNET, edit_call, **LATER)
@family("if_inpaint", "IFInpaintingPipeline", BOTH, UNET, masked_edit_call(edit_call), **LATER)
def deepfloyd_if() -> dict:
    return deepfloyd(in_channels=3)


@family("if_upscale", "IFSuperResolutionPipeline", BOTH, UNET, upscale_call, part=first(3))
@family(
    "if_img2img_upscale",
    "IFImg2ImgSuperResolutionPipeline",
    BOTH,
    UNET,
    upscale_edit_call,
    part=first(3),
    **LATER,
)
@family(
    "if_inpaint_upscale",
    "IFInpaintingSuperResolutionPipeline",
    BOTH,
    UNET,
    masked_edit_call(upscale_edit_call),
    part=first(3),
    **LATER,
)
def deepfloyd_upscale() -> dict:
    """The noised small picture makes up the input's last three channels."""
    noising = df.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    parts = deepfloyd(in_channels=6, class_embed_type="timestep")
    return parts | {"image_noising_scheduler": noising}


# Stable Cascade

CASCADE_BLOCK = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")


def cascade_unet(**config) -> df.StableCascadeUNet:
    network = df.StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=8,
        conditioning_dim=16,
        block_out_channels=(8, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        block_types_per_layer=(CASCADE_BLOCK, CASCADE_BLOCK),
        clip_text_pooled_in_channels=16,
        **config,
    )
    return c.wake(network)


@family(
    "stable_cascade",
    "StableCascadeDecoderPipeline",
    "batch: cond uncond",
    ("decoder",),
    c.cascade_call,
)
def stable_cascade() -> dict:
    return {
        **c.texts(c.clip(projection=True)),
        "vqgan": c.paella(),
        "decoder": cascade_unet(effnet_in_channels=4, timestep_conditioning_type=("sca",)),
        "scheduler": df.DDPMWuerstchenScheduler(),
        "latent_dim_scale": 4.0,
    }


@family(
    "stable_cascade_prior",
    "StableCascadePriorPipeline",
    "batch: cond uncond",
    PRIOR,
)
def stable_cascade_prior() -> dict:
    network = cascade_unet(
        clip_text_in_channels=16, clip_image_in_channels=16, switch_level=(False,)
    )
    c.amplify(network, ("clip_txt", "kv_mapper"), 3.0)
    return {
        **c.texts(c.clip(projection=True)),
        "prior": network,
        "scheduler": df.DDPMWuerstchenScheduler(),
        "resolution_multiple": 2.0,
    }


CASCADE = {"height": 128, "width": 128, "prior_num_inference_steps": 3, "guidance_scale": None}


@family(
    "stable_cascade_combined",
    "StableCascadeCombinedPipeline",
    "batch: cond uncond",
    ("decoder",),
    scale_name="decoder_guidance_scale",
    decoder_guidance_scale=4.0,
    **CASCADE,
)
@family(
    "stable_cascade_combined_prior",
    "StableCascadeCombinedPipeline",
    "batch: cond uncond",
    ("prior_prior",),
    scale_name="prior_guidance_scale",
    scheduler="prior_scheduler",
    prior_guidance_scale=4.0,
    **CASCADE,
)
def stable_cascade_combined() -> dict:
    """As published its decoder is not guided: its scale is 0 unless the call says otherwise."""
    decoder, prior = stable_cascade(), stable_cascade_prior()
    c.amplify(decoder["decoder"], ("effnet_mapper",), 4.0)
    del decoder["latent_dim_scale"], prior["resolution_multiple"]
    return decoder | {f"prior_{name}": part for name, part in prior.items()}


# Shap-E: a row of vectors that stands for the weights of a radiance field.


def shap_e_call(batch: int, negative: bool, **extra) -> dict:
    return c.text_call(batch, False, **UNSIZED, **extra)


def shap_e_image_call(batch: int, negative: bool, **extra) -> dict:
    image = c.per_sample(batch, 3, 16, 16)
    return shap_e_call(batch, negative, prompt=None, **extra) | {"image": image}


def shap_e_parts(**config) -> dict:
    """The network's output is twice as wide as its input; the second half goes unused."""
    from diffusers.pipelines.shap_e.renderer import ShapERenderer

    network = df.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        embedding_dim=16,
        clip_embed_dim=32,
        embedding_proj_dim=16,
        num_embeddings=8,
        num_layers=1,
        time_embed_act_fn="gelu",
        norm_in_type="layer",
        encoder_hid_proj_type=None,
        added_emb_type=None,
        **config,
    )
    scheduler = df.HeunDiscreteScheduler(
        beta_schedule="exp",
        num_train_timesteps=1024,
        prediction_type="sample",
        use_karras_sigmas=True,
        clip_sample=True,
    )
    renderer = ShapERenderer(
        param_shapes=((8, 93), (8, 8), (8, 8), (8, 8)), d_latent=16, d_hidden=8, n_hidden_layers=6
    )
    network = c.amplify(c.wake(network), ("attn1.to_v", "attn1.to_out.0.weight"), 4.0)
    return {"prior": network, "scheduler": scheduler, "shap_e_renderer": renderer}


def inner_half(output, x):
    return slice(None), slice(None), slice(x.shape[-1])


@family("shap_e", "ShapEPipeline", BOTH, PRIOR, shap_e_call, negative=False, part=inner_half)
def shap_e() -> dict:
    return shap_e_parts(additional_embeddings=0) | c.texts(c.clip(projection=True))


@family(
    "shap_e_img2img",
    "ShapEImg2ImgPipeline",
    BOTH,
    PRIOR,
    shap_e_image_call,
    negative=False,
    part=inner_half,
)
def shap_e_img2img() -> dict:
    """Zeros stand for the unconditional branch's picture."""
    parts = shap_e_parts(additional_embeddings=0, embedding_proj_norm_type="layer")
    return parts | clip_vision(projection=False)
