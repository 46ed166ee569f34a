"""Which layout each pipeline class has."""

from __future__ import annotations

from .batched import BatchedDriver
from .driver import Driver
from .in_turn import InTurnDriver
from .layouts import Batched, Layout, LayoutError, TwoCalls

UNCOND_COND = Batched()
TWO_CALLS = TwoCalls()
SD3 = Batched(conflicts=("guidance_rescale", "skip_guidance_layers"))
QWEN_IMAGE = TwoCalls(matches_norm=True)

# Pipeline class -> layout. A family is added here (and to tests/families.py), never by copying its
# loop. Subclasses take the layout of the closest base listed. Variants that tests/families.py lacks
# have the loop of a class that it has; pipelines/SUPPORT.md tells which are which.
LAYOUTS: dict[str, Layout] = {
    "AnalyticDenoisingPipeline": UNCOND_COND,
    "AuraFlowPipeline": UNCOND_COND,
    "ChromaImg2ImgPipeline": TWO_CALLS,
    "ChromaInpaintPipeline": TWO_CALLS,
    "ChromaPipeline": TWO_CALLS,
    "CogVideoXPipeline": Batched(conflicts=("guidance_rescale", "use_dynamic_cfg")),
    "CogVideoXVideoToVideoPipeline": Batched(conflicts=("guidance_rescale", "use_dynamic_cfg")),
    "CogView3PlusPipeline": UNCOND_COND,
    "CogView4Pipeline": TWO_CALLS,
    "DiTPipeline": Batched(cond_first=True),
    "FluxControlNetPipeline": TWO_CALLS,
    "FluxImg2ImgPipeline": TWO_CALLS,
    "FluxInpaintPipeline": TWO_CALLS,
    "FluxPipeline": TWO_CALLS,
    "HunyuanDiTControlNetPipeline": UNCOND_COND,
    "HunyuanDiTPipeline": UNCOND_COND,
    "HunyuanVideoPipeline": TWO_CALLS,
    "Kandinsky3Img2ImgPipeline": Batched(scale_offset=1.0),
    "Kandinsky3Pipeline": Batched(scale_offset=1.0),
    "KandinskyV22ControlnetImg2ImgPipeline": UNCOND_COND,
    "KandinskyV22ControlnetPipeline": UNCOND_COND,
    "KandinskyV22Img2ImgPipeline": UNCOND_COND,
    "KandinskyV22InpaintPipeline": UNCOND_COND,
    "KandinskyV22Pipeline": UNCOND_COND,
    "LTXPipeline": UNCOND_COND,
    "Lumina2Pipeline": TwoCalls(sign=-1, matches_norm=True, norm_option="cfg_normalization"),
    "LuminaPipeline": Batched(cond_first=True, channels=3, sign=-1),
    "MochiPipeline": UNCOND_COND,
    "PixArtAlphaPipeline": UNCOND_COND,
    "PixArtSigmaPipeline": UNCOND_COND,
    "QwenImageControlNetPipeline": QWEN_IMAGE,
    "QwenImageImg2ImgPipeline": QWEN_IMAGE,
    "QwenImageInpaintPipeline": QWEN_IMAGE,
    "QwenImagePipeline": QWEN_IMAGE,
    "SanaControlNetPipeline": UNCOND_COND,
    "SanaPipeline": UNCOND_COND,
    "StableCascadeDecoderPipeline": Batched(denoisers=("decoder",), cond_first=True),
    "StableDiffusion3ControlNetInpaintingPipeline": SD3,
    "StableDiffusion3ControlNetPipeline": SD3,
    "StableDiffusion3Img2ImgPipeline": SD3,
    "StableDiffusion3InpaintPipeline": SD3,
    "StableDiffusion3Pipeline": SD3,
    "StableDiffusionAdapterPipeline": UNCOND_COND,
    "StableDiffusionControlNetImg2ImgPipeline": UNCOND_COND,
    "StableDiffusionControlNetInpaintPipeline": UNCOND_COND,
    "StableDiffusionControlNetPipeline": UNCOND_COND,
    "StableDiffusionDepth2ImgPipeline": UNCOND_COND,
    "StableDiffusionImageVariationPipeline": UNCOND_COND,
    "StableDiffusionImg2ImgPipeline": UNCOND_COND,
    "StableDiffusionInpaintPipeline": UNCOND_COND,
    "StableDiffusionLDM3DPipeline": UNCOND_COND,
    "StableDiffusionPipeline": UNCOND_COND,
    "StableDiffusionUpscalePipeline": UNCOND_COND,
    "StableDiffusionXLAdapterPipeline": UNCOND_COND,
    "StableDiffusionXLControlNetImg2ImgPipeline": UNCOND_COND,
    "StableDiffusionXLControlNetInpaintPipeline": UNCOND_COND,
    "StableDiffusionXLControlNetPipeline": UNCOND_COND,
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": UNCOND_COND,
    "StableDiffusionXLControlNetUnionInpaintPipeline": UNCOND_COND,
    "StableDiffusionXLControlNetUnionPipeline": UNCOND_COND,
    "StableDiffusionXLImg2ImgPipeline": UNCOND_COND,
    "StableDiffusionXLInpaintPipeline": UNCOND_COND,
    "StableDiffusionXLPipeline": UNCOND_COND,
    "StableUnCLIPImg2ImgPipeline": UNCOND_COND,
    "StableUnCLIPPipeline": UNCOND_COND,
    "WanPipeline": TwoCalls(denoisers=("transformer", "transformer_2")),
    "ZImagePipeline": Batched(
        cond_first=True, listed=True, scale_offset=1.0, sign=-1, conflicts=("cfg_normalization",)
    ),
}

THREE_BRANCHES = "it evaluates a third branch, which two-branch rules have no place for"
# Pipelines that derive from a supported class, or look like one, and are not to be guided.
REFUSED: dict[str, str] = {
    "StableDiffusionInstructPix2PixPipeline": THREE_BRANCHES,
    "StableDiffusionXLInstructPix2PixPipeline": THREE_BRANCHES,
}


DRIVERS: dict[type[Layout], type[Driver]] = {Batched: BatchedDriver, TwoCalls: InTurnDriver}


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
