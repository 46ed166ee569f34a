"""Which layout each pipeline class has."""

from __future__ import annotations

from .batched import BatchedDriver
from .driver import Driver
from .in_turn import InTurnDriver
from .layouts import Batched, Layout, LayoutError, TwoCalls

# Layout -> the pipeline classes that have it. A family is added here (and to tests/families.py),
# never by copying its loop. Subclasses take the layout of the closest base listed. Variants that
# tests/families.py lacks have the loop of a class that it has; pipelines/SUPPORT.md tells which
# are which.
NAMES: dict[Layout, str] = {
    Batched(): """
        AnalyticDenoisingPipeline AuraFlowPipeline CogView3PlusPipeline LTXPipeline MochiPipeline
        HunyuanDiTControlNetPipeline HunyuanDiTPipeline
        KandinskyV22ControlnetImg2ImgPipeline KandinskyV22ControlnetPipeline
        KandinskyV22Img2ImgPipeline KandinskyV22InpaintPipeline KandinskyV22Pipeline
        PixArtAlphaPipeline PixArtSigmaPipeline SanaControlNetPipeline SanaPipeline
        StableDiffusionAdapterPipeline StableDiffusionControlNetImg2ImgPipeline
        StableDiffusionControlNetInpaintPipeline StableDiffusionControlNetPipeline
        StableDiffusionDepth2ImgPipeline StableDiffusionImageVariationPipeline
        StableDiffusionImg2ImgPipeline StableDiffusionInpaintPipeline StableDiffusionLDM3DPipeline
        StableDiffusionPipeline StableDiffusionUpscalePipeline
        StableDiffusionXLAdapterPipeline StableDiffusionXLControlNetImg2ImgPipeline
        StableDiffusionXLControlNetInpaintPipeline StableDiffusionXLControlNetPipeline
        StableDiffusionXLControlNetUnionImg2ImgPipeline StableDiffusionXLControlNetUnionPipeline
        StableDiffusionXLControlNetUnionInpaintPipeline StableDiffusionXLImg2ImgPipeline
        StableDiffusionXLInpaintPipeline StableDiffusionXLPipeline
        StableUnCLIPImg2ImgPipeline StableUnCLIPPipeline""",
    Batched(conflicts=("guidance_rescale", "use_dynamic_cfg")): """
        CogVideoXPipeline CogVideoXVideoToVideoPipeline""",
    Batched(conflicts=("guidance_rescale", "skip_guidance_layers")): """
        StableDiffusion3ControlNetInpaintingPipeline StableDiffusion3ControlNetPipeline
        StableDiffusion3Img2ImgPipeline StableDiffusion3InpaintPipeline StableDiffusion3Pipeline""",
    Batched(scale_offset=1.0): "Kandinsky3Img2ImgPipeline Kandinsky3Pipeline",
    Batched(cond_first=True): "DiTPipeline",
    Batched(cond_first=True, channels=3, sign=-1): "LuminaPipeline",
    Batched(denoisers=("decoder",), cond_first=True): "StableCascadeDecoderPipeline",
    Batched(
        cond_first=True, listed=True, scale_offset=1.0, sign=-1, conflicts=("cfg_normalization",)
    ): "ZImagePipeline",
    TwoCalls(): """
        ChromaImg2ImgPipeline ChromaInpaintPipeline ChromaPipeline CogView4Pipeline
        FluxControlNetPipeline FluxImg2ImgPipeline FluxInpaintPipeline FluxPipeline
        HunyuanVideoPipeline""",
    TwoCalls(denoisers=("transformer", "transformer_2")): "WanPipeline",
    TwoCalls(matches_norm=True): """
        QwenImageControlNetPipeline QwenImageImg2ImgPipeline QwenImageInpaintPipeline
        QwenImagePipeline""",
    TwoCalls(sign=-1, matches_norm=True, norm_option="cfg_normalization"): "Lumina2Pipeline",
}
LAYOUTS = {name: layout for layout, names in NAMES.items() for name in names.split()}

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
