"""The pipelines of which something has to be known beforehand, and those that are refused."""

from __future__ import annotations

from typing import Any

from .layouts import Layout, LayoutError

SCALE_ARGUMENTS = ("true_cfg_scale", "guidance_scale")
# Scales of other guidance, and where that is off.
OTHER_SCALES = {"pag_scale": 0.0, "stg_scale": 0.0, "modality_scale": 1.0}
# Components that are guiders of diffusers.
GUIDERS = ("guider", "ocr_guider", "guider_2", "audio_guider")
# Where pipelines keep the networks of their loops: the first of these groups that is there.
NETWORKS = (("unet", "transformer", "transformer_2"), ("prior",), ("decoder",))

RENORM = ("guidance_rescale", "cfg_normalization")
# Layout -> the pipeline classes that have it. Subclasses take that of the closest base listed.
NAMES: dict[Layout, str] = {
    Layout(unlike=("skip_guidance_layers",)): """
        StableDiffusion3ControlNetInpaintingPipeline StableDiffusion3ControlNetPipeline
        StableDiffusion3Img2ImgPipeline StableDiffusion3InpaintPipeline StableDiffusion3Pipeline""",
    Layout(scale_offset=1.0, conflicts=RENORM): """
        ZImageImg2ImgPipeline ZImageInpaintPipeline ZImageOmniPipeline ZImagePipeline""",
    Layout(scale_offset=1.0, conflicts=RENORM, whole=True): """
        ZImageControlNetInpaintPipeline ZImageControlNetPipeline""",
    Layout(doubled=True): "DiTPipeline",
    Layout(channels=3): "LuminaPipeline",
    Layout(preconditioned=True): "StableDiffusionLatentUpscalePipeline",
    Layout(preconditioned=True, least_sigma=0.05): "PRXPixelPipeline",
    Layout(preconditioned=True, scale_offset=1.0): "Cosmos2TextToImagePipeline",
    Layout(scale_offset=1.0): "Kandinsky3Img2ImgPipeline Kandinsky3Pipeline Krea2Pipeline",
    Layout(scale_offset=1.0, given=2): """
        Cosmos2_5_PredictBasePipeline Cosmos2_5_TransferPipeline""",
    Layout(main=0): """
        StableDiffusionInstructPix2PixPipeline StableDiffusionXLInstructPix2PixPipeline""",
    Layout(frames=1, scale="max_guidance_scale"): "StableVideoDiffusionPipeline",
    Layout(scale="guidance_scale"): "ChromaInpaintPipeline",
    # Of its distilled models, which have no guider.
    Layout(scale="distilled_guidance_scale"): """
        HunyuanImagePipeline HunyuanImageRefinerPipeline""",
    Layout(denoisers=("transformer", "unconditional_transformer")): "Ideogram4Pipeline",
    Layout(inner="decoder_pipe"): """
        KandinskyCombinedPipeline KandinskyImg2ImgCombinedPipeline KandinskyInpaintCombinedPipeline
        KandinskyV22CombinedPipeline KandinskyV22Img2ImgCombinedPipeline
        KandinskyV22InpaintCombinedPipeline""",
    Layout(inner="decoder_pipe", scale="decoder_guidance_scale"): "StableCascadeCombinedPipeline",
    Layout(inner="generation_pipe"): "VisualClozePipeline",
    Layout(whole=True): "OmniGenPipeline QwenImage21Pipeline",
    Layout(unlike=("image",)): "GlmImagePipeline",
    Layout(last=1): "JoyImageEditPipeline",
    Layout(given=2): "WanImageToVideoPipeline",
    Layout(others="sound"): "LTX2ImageToVideoPipeline LTX2Pipeline",
    Layout(others="sound", unlike=("image",)): "Kandinsky6TI2VAPipeline",
    Layout(others="sound", given=1): """
        LTX25ModularPipeline LTX2ConditionPipeline LTX2HDRPipeline LTX2InContextPipeline
        LTX2ModularPipeline""",
    Layout(preconditioned=True, scale_offset=1.0, given=2): "Cosmos2VideoToWorldPipeline",
}
LAYOUTS = {name: layout for layout, names in NAMES.items() for name in names.split()}

# Pipelines that are not to be guided, with the reason.
REASONS: dict[str, str] = {
    "its scheduler is handed a denoised image that the pipeline has made up itself": """
        CosmosTextToWorldPipeline CosmosVideoToWorldPipeline""",
    "its own guidance is adaptive projected guidance": "AceStepPipeline",
    "its own guidance is CFG-Zero*": "HeliosPyramidPipeline",
    "a cache holds what its network computed for all rows, of every piece of a video": """
        AnyFlowFARPipeline""",
    "its network takes text, pictures and sound as one sequence": "Cosmos3OmniPipeline",
    "it blends given frames into what is stepped, after its network has seen it": """
        LTXI2VLongMultiPromptPipeline""",
    "each of its edits is cut out by a mask of its own": """
        LEditsPPPipelineStableDiffusion LEditsPPPipelineStableDiffusionXL""",
    "its network does not run in torch": """
        OnnxStableDiffusionImg2ImgPipeline OnnxStableDiffusionInpaintPipeline
        OnnxStableDiffusionPipeline OnnxStableDiffusionUpscalePipeline
        StableDiffusionOnnxPipeline""",
    "every frame has a noise level and a scheduler of its own": """
        SkyReelsV2DiffusionForcingImageToVideoPipeline SkyReelsV2DiffusionForcingPipeline
        SkyReelsV2DiffusionForcingVideoToVideoPipeline""",
}
REFUSED = {name: reason for reason, names in REASONS.items() for name in names.split()}


def layout_of(pipeline_class: type) -> Layout:
    """What is known beforehand of a pipeline class, or of the closest base of which something is.

    Raises:
        LayoutError: the class is refused; the message says why.
    """
    for base in pipeline_class.__mro__:
        if base.__name__ in REFUSED:
            raise LayoutError(f"{base.__name__} cannot be guided: {REFUSED[base.__name__]}")
        if base.__name__ in LAYOUTS:
            return LAYOUTS[base.__name__]
    return Layout()


def denoisers_of(pipe: Any, layout: Layout) -> tuple[str, ...]:
    """Attributes of a pipeline that hold the networks of its loop.

    Raises:
        LayoutError: none is found.
    """
    for names in (layout.denoisers,) if layout.denoisers else NETWORKS:
        found = tuple(name for name in names if getattr(pipe, name, None) is not None)
        if found:
            return found
    raise LayoutError(f"no network is found that the loop of {type(pipe).__name__} evaluates")


def guiders_of(pipe: Any) -> list[str]:
    """Names of the components of a pipeline that are guiders, the main one first."""
    known = getattr(pipe, "_component_specs", None) or getattr(pipe, "config", {})
    return [name for name in GUIDERS if name in known]
