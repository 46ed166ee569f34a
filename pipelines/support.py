"""Which layout each pipeline class has."""

from __future__ import annotations

from .layouts import Batched, Layout, LayoutError, TwoCalls

UNCOND_COND = Batched()

# Pipeline class -> layout. A family is added here (and to tests/families.py), never by copying its
# loop. Subclasses take the layout of the closest base listed.
LAYOUTS: dict[str, Layout] = {
    "AuraFlowPipeline": UNCOND_COND,
    "ChromaPipeline": TwoCalls(),
    "CogVideoXPipeline": Batched(conflicts=("guidance_rescale", "use_dynamic_cfg")),
    "CogView4Pipeline": TwoCalls(),
    "DiTPipeline": Batched(cond_first=True),
    "FluxPipeline": TwoCalls(),
    "HunyuanDiTPipeline": UNCOND_COND,
    "HunyuanVideoPipeline": TwoCalls(),
    "Kandinsky3Pipeline": Batched(scale_offset=1.0),
    "KandinskyV22Pipeline": UNCOND_COND,
    "LTXPipeline": UNCOND_COND,
    "Lumina2Pipeline": TwoCalls(sign=-1, matches_norm=True, norm_option="cfg_normalization"),
    "LuminaPipeline": Batched(cond_first=True, channels=3, sign=-1),
    "MochiPipeline": UNCOND_COND,
    "PixArtSigmaPipeline": UNCOND_COND,
    "QwenImagePipeline": TwoCalls(matches_norm=True),
    "SanaPipeline": UNCOND_COND,
    "StableCascadeDecoderPipeline": Batched(denoisers=("decoder",), cond_first=True),
    "StableDiffusion3Pipeline": Batched(conflicts=("guidance_rescale", "skip_guidance_layers")),
    "StableDiffusionControlNetPipeline": UNCOND_COND,
    "StableDiffusionImg2ImgPipeline": UNCOND_COND,
    "StableDiffusionInpaintPipeline": UNCOND_COND,
    "StableDiffusionPipeline": UNCOND_COND,
    "StableDiffusionXLControlNetPipeline": UNCOND_COND,
    "StableDiffusionXLImg2ImgPipeline": UNCOND_COND,
    "StableDiffusionXLInpaintPipeline": UNCOND_COND,
    "StableDiffusionXLPipeline": UNCOND_COND,
    "WanPipeline": TwoCalls(denoisers=("transformer", "transformer_2")),
    "ZImagePipeline": Batched(cond_first=True, listed=True, scale_offset=1.0, sign=-1),
}

THREE_BRANCHES = "it evaluates a third branch, which two-branch rules have no place for"
# Pipelines that derive from a supported class, or look like one, and are not to be guided.
REFUSED: dict[str, str] = {
    "StableDiffusionInstructPix2PixPipeline": THREE_BRANCHES,
    "StableDiffusionXLInstructPix2PixPipeline": THREE_BRANCHES,
}


def layout_of(pipeline_class: type) -> Layout:
    """The layout of a pipeline class, or of the closest base that has one.

    Raises:
        LayoutError: the class is refused, or not known; the message says why.
    """
    for base in pipeline_class.__mro__:
        if base.__name__ in REFUSED:
            raise LayoutError(f"{base.__name__} cannot be guided: {REFUSED[base.__name__]}")
        if base.__name__ == "PAGMixin":
            raise LayoutError(f"{pipeline_class.__name__} cannot be guided: {THREE_BRANCHES}")
        if base.__name__ in LAYOUTS:
            return LAYOUTS[base.__name__]
    raise LayoutError(
        f"where {pipeline_class.__name__} keeps its guidance branches is not known; "
        f"known are: {', '.join(sorted(LAYOUTS))}"
    )
