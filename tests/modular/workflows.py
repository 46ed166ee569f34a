"""Every modular pipeline of diffusers with a place for a guider, in each of its workflows.

`MODULAR[name].build()` gives one of them with random weights; its call returns, in a tuple, what is
compared: latents. Those workflows are apart because each is put together of other blocks.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers as df
import torch
import transformers as tr
from diffusers.models.transformers import transformer_cosmos
from diffusers.modular_pipelines.modular_pipeline import ModularPipeline
from diffusers.modular_pipelines.wan import encoders

from pilotage.pipelines.seam.support import guiders_of

from .. import components as c
from ..families import (
    controlnets,
    flux,
    flux_like,
    images,
    language,
    ltx2,
    qwen,
    stable_diffusion,
    videos,
    wan,
    worlds,
)
from ..families.base import PARTIAL, SPEC, TRANSFORMER, UNET, Family, flow

SCALE = 6.0
MODULAR: dict[str, Family] = {}


def workflow(
    name: str,
    parts: Callable[[], dict],
    call: Callable[..., dict] = c.text_call,
    blocks: str = "AutoBlocks",
    denoisers: tuple[str, ...] = TRANSFORMER,
    scales: tuple[str, ...] = ("guider",),
    output: str = "latents",
    without: tuple[str, ...] = ("decode",),
    **extra: Any,
) -> None:
    """Registers a modular pipeline in one of its workflows.

    Args:
        name: Name of its class without "ModularPipeline", and the workflow.
        parts: Makes its components.
        call: (batch, negative prompts?) -> the arguments of a call.
        blocks: How the name of its blocks ends.
        denoisers: Components that hold the networks of the loop.
        scales: Components that are guiders.
        output: What of the pipeline's state is compared.
        without: Blocks that are left out.
        extra: Fields of `Family`, and what goes to `call`.
    """
    family, _, _ = name.partition(" ")
    spec = {key: extra.pop(key) for key in SPEC if key in extra}
    extra |= {f"{guider}.guidance_scale": SCALE - i for i, guider in enumerate(scales)}
    MODULAR[name] = Family(
        name,
        family + "ModularPipeline",
        functools.partial(_build, family + blocks, parts, output, without),
        functools.partial(call, output_type=None, guidance_scale=None, **extra),
        f"{scales[0]}.guidance_scale",
        "calls: cond uncond",
        denoisers,
        True,
        **spec,
    )


def _build(blocks: str, parts: Callable[[], dict], output: str, without: tuple[str, ...]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        components = parts()
    built = getattr(df, blocks)()
    for block in without:
        built.sub_blocks.pop(block)
    quiet(built)
    pipe = built.init_pipeline()
    pipe.update_components(**{k: v for k, v in components.items() if k in pipe.components})
    pipe.update_components(**{name: stock_guider(pipe) for name in guiders_of(pipe)})
    pipe.__class__ = ending_in(type(pipe), output)
    return pipe


class OfTwoBranches(df.ClassifierFreeGuidance):
    """diffusers' guider with what LTX-2's blocks ask beside."""

    spatio_temporal_guidance_blocks = None

    def active_predictions(self) -> list[str]:
        return self._input_predictions[: self.num_conditions]


def stock_guider(pipe: Any) -> Any:
    """diffusers' own guider for a pipeline."""
    kind = OfTwoBranches if "audio_guider" in guiders_of(pipe) else df.ClassifierFreeGuidance
    return kind(SCALE)


@functools.cache
def ending_in(cls: type[ModularPipeline], output: str) -> type[ModularPipeline]:
    """A class whose call returns what is compared, in a tuple, as ordinary pipelines do."""

    def call(self: Any, **kwargs: Any) -> tuple:
        found = cls.__call__(self, **kwargs, output=output)
        return (torch.cat(found, 2) if isinstance(found, list) else found,)

    return type(cls.__name__, (cls,), {"__call__": call})


def quiet(blocks: Any) -> None:
    """Switches the progress bars of all loops off; a modular pipeline only reaches the top ones."""
    for block in getattr(blocks, "sub_blocks", {}).values():
        quiet(block)
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(disable=True)


def sdxl(controlnet: Any = None, adapter: bool = False, **config: Any) -> dict:
    """Stable Diffusion XL, with what its workflows add to it."""
    parts = stable_diffusion.sdxl(**config)
    if controlnet is not None:
        parts["controlnet"] = controlnet()
    if adapter:
        parts["unet"]._load_ip_adapter_weights([c.ip_adapter(parts["unet"])])
        parts["image_encoder"] = c.clip_vision()
    return parts


def sdxl_call(
    batch: int, negative: bool, task: str, control: bool, adapter: bool, **extra: Any
) -> dict:
    calls = {"image2image": c.picture_call, "inpainting": c.inpaint_call}
    call = calls.get(task, c.text_call)(batch, negative, **extra)
    if control:
        call["control_image"] = c.per_sample(batch, 3, 16, 16, seed=500, low=0.0)
    if adapter:
        call["ip_adapter_image"] = c.per_sample(batch, 3, 16, 16, seed=600)
    return call


def sdxl_workflows() -> None:
    """Each task, alone or with a ControlNet of either kind, each with and without pictures."""
    controls: dict[str, Any] = {
        "": None,
        "controlnet_": lambda: c.controlnet(**c.SDXL),
        "controlnet_union_": controlnets.union,
    }
    for adapter in ("", "ip_adapter_"):
        for control, network in controls.items():
            for task in ("text2image", "image2image", "inpainting"):
                later = {} if task == "text2image" else {"first_step": 1, **PARTIAL}
                later |= {"control_mode": [1]} if "union" in control else {}
                channels = 9 if task == "inpainting" and not control else 4
                workflow(
                    f"StableDiffusionXL {adapter}{control}{task}",
                    functools.partial(sdxl, network, bool(adapter), channels=channels),
                    functools.partial(
                        sdxl_call, task=task, control=bool(control), adapter=bool(adapter)
                    ),
                    denoisers=UNET,
                    **later,
                )


def qwen_workflows() -> None:
    """Each task, alone or with a ControlNet."""
    pictures = {"text2image": {}, "image2image": {"image": 3}}
    pictures["inpainting"] = {"image": 3, "mask_image": 1}
    for control in ("", "controlnet_"):
        for task, given in pictures.items():
            given = given | ({"control_image": 3} if control else {})
            later = {} if task == "text2image" else {"first_step": 1, **qwen.LATE}
            workflow(
                f"QwenImage {control}{task}",
                qwen.qwen_image_controlnet if control else qwen.qwen_image,
                qwen.big(c.text_call, **given),
                norm_matched=True,
                height=32,
                width=32,
                **later,
            )


sdxl_workflows()
qwen_workflows()
SD3_LATER = {"first_step": 1, "strength": 0.75, "num_inference_steps": 4}
workflow("StableDiffusion3 text2image", images.sd3)
workflow("StableDiffusion3 image2image", images.sd3, c.picture_call, **SD3_LATER)
Z = {"negated": True, "max_sequence_length": 128}
workflow("ZImage text2image", qwen.z_image, **Z)
workflow("ZImage image2image", qwen.z_image, c.picture_call, first_step=1, **qwen.LATE, **Z)
EDIT = {"norm_matched": True, "max_sequence_length": 1024}
EDIT["part"] = qwen.leading_tokens(16)
TALL = {"height": 4096, "width": 256}
workflow("QwenImageEdit image_conditioned", qwen.qwen_image_edit, qwen.edit_call, **EDIT, **TALL)
workflow(
    "QwenImageEdit image_conditioned_inpainting",
    qwen.qwen_image_edit,
    qwen.edit_inpaint_call,
    first_step=1,
    **qwen.LATE,
    **EDIT,
    **TALL,
)
workflow("QwenImageEditPlus", qwen.qwen_image_edit, qwen.edit_call, max_batch=1, **EDIT, **TALL)


def krea2() -> dict:
    """Its blocks read twelve layers of the language model, wherever they are."""
    parts = flux_like.krea2()
    network = parts["transformer"]
    with torch.random.fork_rng(devices=[]):
        network = type(network).from_config(dict(network.config) | {"num_text_layers": 12})
    parts["transformer"] = c.amplify(c.wake(network), ("to_v", "to_out", "time_mod_proj"), 4.0)
    parts["text_encoder"] = flux_like.qwen3_vl(tr.Qwen3VLModel, layers=35)
    return parts


def anima() -> dict:
    """Cosmos' network; another one makes its text of two encoders' tokens."""
    worlds.do_without_torchvision(transformer_cosmos)
    conditioner = df.AnimaTextConditioner(
        source_dim=c.WIDTH,
        target_dim=c.WIDTH,
        model_dim=c.WIDTH,
        num_layers=1,
        num_attention_heads=2,
        target_vocab_size=c.VOCAB,
        min_sequence_length=16,
    )
    encoder, tokenizer = c.language_model(tr.Qwen3Model, tr.Qwen3Config, c.qwen_tokenizer())
    return {
        "text_encoder": encoder,
        "tokenizer": tokenizer,
        "t5_tokenizer": c.t5_tokenizer(),
        "text_conditioner": c.wake(conditioner),
        "vae": c.qwen_vae(),
        "transformer": worlds.cosmos_transformer(4, concat_padding_mask=True),
        "scheduler": flow(shift=3.0),
    }


def flux3() -> dict:
    """One prompt, of which several pictures may be made."""
    transformer = df.Flux3Transformer2DModel(
        in_channels=16,
        cond_in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * c.WIDTH,
        timestep_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    parts = qwen.seeing(language.qwen3_vl(), tr.Qwen3VLProcessor)
    return {
        "text_encoder": parts["text_encoder"],
        "tokenizer": parts["processor"],
        "vae": flux.flux2_vae(4),
        "transformer": flux.loud(transformer),
        "scheduler": flow(shift=6.93),
    }


def flux3_call(batch: int, negative: bool, **extra: Any) -> dict:
    call = c.text_call(batch, negative, num_images_per_prompt=batch, **extra)
    return call | {name: call[name][0] for name in ("prompt", "negative_prompt")}


workflow(
    "QwenImageLayered",
    qwen.qwen_image_layered,
    qwen.layered_call,
    max_batch=1,
    norm_matched=True,
    max_sequence_length=512,
    part=qwen.leading_tokens(40),
)
QWEN_21 = {n: language.QWEN_21[n] for n in ("part", "height", "width", "output_resolution")}
workflow("QwenImage21 text2image", language.qwen_image_21, language.level_call, **QWEN_21)
workflow(
    "QwenImage21 image_conditioned",
    language.qwen_image_21,
    language.qwen_21_edit_call,
    **QWEN_21,
)
workflow("Krea2 text2image", krea2, height=32, width=32)
workflow("ErnieImage text2image", language.ernie_image)
workflow("Flux2KleinBase text2image", flux.klein_parts, **flux.LAYERS)
workflow(
    "Flux2KleinBase image_conditioned",
    flux.small_klein_parts,
    flux.reference_call,
    part=flux.first_half,
    **flux.LAYERS,
)
workflow("Anima text2image", anima, max_sequence_length=16)
workflow("Anima img2img", anima, c.picture_call, first_step=1, max_sequence_length=16, **qwen.LATE)
FLUX3: dict = {
    "without": ("prompt_upsampler", "decode"),
    "text_encoder_out_layers": (0, 1, 2),
    "height": 64,
    "width": 64,
}
workflow("Flux3 text2image", flux3, flux3_call, **FLUX3)
workflow("Flux3 image_conditioned", flux3, flux3_call, image=flux.picture(), **FLUX3)


LTX = {"height": 32, "width": 32, "num_frames": 9}
workflow("LTX text2video", videos.ltx, max_sequence_length=16, **LTX)
workflow(
    "LTX image2video",
    videos.ltx,
    videos.first_picture,
    part=videos.free_tokens(64),
    max_sequence_length=16,
    **LTX,
)


def in_embeds(batch: int, negative: bool, steps: int = c.STEPS, **extra: Any) -> dict:
    """Wan's modular text encoders need ftfy, which may be missing: texts as embeddings."""
    call = c.text_call(batch, False, prompt=None, **extra)
    for i, name in enumerate(("prompt_embeds", "negative_prompt_embeds")):
        call[name] = c.per_sample(batch, 16, c.WIDTH, seed=700 + 10 * i)
    return call


def pictures(call: Callable[..., dict], **given: Any) -> Callable[..., dict]:
    """A call with pictures or videos made of the seeds given."""

    def made(batch: int, negative: bool, **extra: Any) -> dict:
        photos = {name: [c.photo(s) for s in seeds] for name, seeds in given.items()}
        single = {name: seen[0] if len(seen) == 1 else seen for name, seen in photos.items()}
        # One generator: those pipelines want as many as there are pictures.
        return call(batch, negative, **extra) | single | {"generator": c.generators(1)[0]}

    return made


def first_and_last() -> dict:
    """Two pictures, that is twice as many tokens for the attention.

    All that it needs of torchvision is to crop the second to the size of the first, which it has.
    """
    if not hasattr(encoders, "transforms"):
        crop = SimpleNamespace(center_crop=lambda image, size: image)
        encoders.transforms = SimpleNamespace(functional=crop)
    network = wan.wan_transformer(0, in_channels=36, image_dim=16, pos_embed_seq_len=10)
    return wan.wan_i2v() | {"transformer": network}


WAN: dict = {"height": 32, "width": 32, "num_frames": 9, "without": ("text_encoder", "decode")}
BOTH: dict = {"denoisers": wan.PAIR, "scales": ("guider", "guider_2")}
BOTH["scale_at"] = lambda call, t: call[f"guider{'' if t >= 875 else '_2'}.guidance_scale"]
workflow("Wan", wan.wan, in_embeds, "Blocks", **WAN)
workflow("Wan22", wan.wan2, in_embeds, "Blocks", **WAN, **BOTH)
workflow(
    "WanImage2Video image2video", wan.wan_i2v, pictures(in_embeds, image=[0]), max_batch=1, **WAN
)
workflow(
    "WanImage2Video flf2v",
    first_and_last,
    pictures(in_embeds, image=[0], last_image=[1]),
    max_batch=1,
    **WAN,
)
workflow(
    "Wan22Image2Video",
    wan.wan2_i2v,
    pictures(in_embeds, image=[0]),
    "Blocks",
    **WAN,
    **BOTH,
)


def vace_call(batch: int, negative: bool, **extra: Any) -> dict:
    call = in_embeds(batch, negative, **extra)
    return call | {"generator": call["generator"][0]}


def wan22_vace() -> dict:
    network = functools.partial(
        wan.wan_like, df.WanVACETransformer3DModel, vace_layers=[0, 1], vace_in_channels=96
    )
    return wan.wan(transformer=network(0), transformer_2=network(1))


workflow("Wan22Vace", wan22_vace, vace_call, "Blocks", max_batch=1, **WAN, **BOTH)
HUNYUAN15: dict = {"without": ("text_encoder", "decode"), "num_frames": 9}
workflow(
    "HunyuanVideo15 text2video",
    videos.hunyuan15,
    videos.hunyuan15_call,
    height=32,
    width=32,
    **HUNYUAN15,
)
workflow(
    "HunyuanVideo15 image2video",
    videos.hunyuan15_image,
    videos.hunyuan15_call,
    picture=True,
    height=None,
    width=None,
    **HUNYUAN15,
)


def helios(cls: type = df.HeliosScheduler, **config: Any) -> dict:
    parts = wan.helios()
    return parts | ({"scheduler": cls(use_dynamic_shifting=True, **config)} if config else {})


def helios_workflows() -> None:
    """Piece after piece; then the same from coarse to fine; then with few steps."""
    stages = {"stages": 2, "stage_range": [0, 0.5, 1], "gamma": 0.3}
    makers = {
        "Helios": helios,
        "HeliosPyramid": functools.partial(helios, **stages),
        "HeliosPyramidDistilled": functools.partial(helios, df.HeliosDMDScheduler, **stages),
    }
    for name, parts in makers.items():
        few = name != "Helios"
        size = 64 if few else 32
        extra = {"pyramid_num_inference_steps_list": [2, 2]} if few else {}
        extra |= {"is_amplify_first_chunk": False} if "Distilled" in name else {}
        extra |= {"num_latent_frames_per_chunk": 3 if few else 2, "history_sizes": [4, 2, 1]}
        given: dict = {"text2video": {}, "image2video": {"image": [0]}}
        given["video2video"] = {"video": range(9)}
        for task, seeds in given.items():
            workflow(
                f"{name} {task}",
                parts,
                pictures(in_embeds, **seeds),
                output="latent_chunks",
                **(WAN | {"height": size, "width": size} | extra),
            )


helios_workflows()


def ltx2_workflows() -> None:
    """2.5 differs in how it decodes. The sound has the same guidance, at a scale of its own."""
    common: dict = {"scales": ("guider", "audio_guider"), "frame_rate": 24.0, **WAN}
    common["without"] = ("prompt_enhancer", "duration", "decode")
    reference = {"kind": "pipeline_ltx2_ic_lora.LTX2ReferenceCondition", "frames": True}
    calls: dict[str, tuple] = {
        "text2video": (c.text_call, {}),
        "image2video": (ltx2.picture_as_it_is, {"part": videos.free_tokens(ltx2.FRAME)}),
        "condition": (ltx2.frames_call, {"part": ltx2.later_frames}),
        "in_context": (ltx2.reference_call, {"part": ltx2.later_frames, **reference}),
    }
    for name in ("LTX2", "LTX25"):
        for task, (call, extra) in calls.items():
            workflow(f"{name} {task}", ltx2.ltx2, call, **common, **extra)


ltx2_workflows()


def music3() -> dict:
    """The tones in between, which a language model makes, are given."""
    transformer = df.MiniMaxMusic3Transformer1DModel(
        in_channels=4,
        condition_dim=16,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        ff_inner_dim=32,
        rotary_dim=4,
        fourier_embedding_dim=16,
    )
    encoder = df.MiniMaxMusic3ConditionEncoder(
        condition_hidden_dim=8, num_condition_layers=2, out_dim=16
    )
    return {
        "condition_encoder": c.wake(encoder),
        "transformer": c.wake(transformer),
        "scheduler": flow(num_train_timesteps=1, invert_sigmas=True),
    }


def music_call(batch: int, negative: bool, **extra: Any) -> dict:
    """Long enough for two pieces, of which the second begins with the end of the first."""
    generator = torch.Generator().manual_seed(0)
    return {"frame_hiddens": c.noise(1, 250, 16), "generator": generator, **extra}


workflow(
    "MiniMaxMusic3",
    music3,
    music_call,
    "Blocks",
    output="latent_chunks",
    without=("semantic_generator", "decode"),
    max_batch=1,
    num_inference_steps=c.STEPS,
)


def animate2() -> dict:
    """Its attention compares frames with those of the driving video, which it has cached."""
    transformer = df.WanAnimate2Transformer3DModel(
        text_len=16,
        in_dim=36,
        dim=24,
        ffn_dim=32,
        freq_dim=32,
        text_dim=c.WIDTH,
        num_heads=2,
        num_layers=2,
        use_img_emb=False,
    )
    transformer = c.amplify(c.wake(transformer), ("text_embedding", "cross_attn"), 2.0)
    parts = {"image_encoder": c.clip_vision(224), "scheduler": flow(shift=5.0)}
    return wan.wan(transformer=transformer, **parts)


def animate2_call(batch: int, negative: bool, **extra: Any) -> dict:
    call = c.text_call(batch, negative, **extra)
    call = {name: v[0] if isinstance(v, list) else v for name, v in call.items()}
    return call | {"image": c.photo(0), "driving_video": [c.photo(s) for s in range(1, 10)]}


for _name in ("WanAnimate2", "WanAnimate2Distilled"):
    workflow(
        _name,
        animate2,
        animate2_call,
        "Blocks",
        output="segment_frames",
        without=("decode",),
        max_batch=1,
        steps=lambda kwargs: kwargs["kv_cache_mode"] == "cached",
        height=32,
        width=32,
        segment_frame_length=9,
        max_sequence_length=16,
    )
