"""Guidance as an argument of a modular pipeline: ``pipe(prompt=..., guidance="apg+ag")``."""

from diffusers.guiders import BaseGuidance
from diffusers.modular_pipelines import InputParam, ModularPipelineBlocks, PipelineState

from pilotage.pipelines import Guider


class PilotageGuidance(ModularPipelineBlocks):
    """Puts a `Guider` of Pilotage in the place of the guiders of its pipeline, at their scales.

    It has to be the first block: those that encode prompts ask the guider what to encode.
    """

    _requirements = {"pilotage": ">=0.2.0.dev0"}

    @property
    def description(self) -> str:
        """What the block does, for the pipeline's documentation."""
        return "Guides by a rule and a policy of Pilotage, at the scale of the pipeline's guider."

    @property
    def inputs(self) -> list[InputParam]:
        """The one argument that the block adds to a call."""
        text = "A rule, a policy or both ('apg', 'apg+ag'); by default the guider stays as it is."
        return [InputParam("guidance", type_hint=str, description=text)]

    def __call__(self, pipe, state: PipelineState) -> tuple:
        """Exchange the guiders; ValueError: an unknown name, or a pipeline without a guider."""
        name = self.get_block_state(state).guidance
        if name is None:
            return pipe, state
        guiders = {k: v for k, v in pipe.components.items() if isinstance(v, BaseGuidance)}
        if "guider" not in guiders:
            raise ValueError(f"{type(pipe).__name__} has no guider among its components")
        own = guiders.pop("guider")
        guider = Guider(name, scale(own), enabled=own._enabled).bind(pipe)
        others = {part: guider.partner(scale(other)) for part, other in guiders.items()}
        pipe.update_components(guider=guider, **others)
        return pipe, state


def scale(guider: BaseGuidance) -> float:
    """The scale w of a guider; in the original formulation it counts from 0."""
    return guider.guidance_scale + getattr(guider, "use_original_formulation", False)
