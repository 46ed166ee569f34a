"""Guidance beside a network: its share of a forward, its cost in a loop, its host syncs."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from examples.studies.apg_providers import our_apg
from examples.studies.timing import time_operation
from pilotage.eval.embedded import load_embedded
from pilotage.guidance.ops import network_step
from pilotage.pipelines import FusedDPMSolverMultistepScheduler, FusedEulerScheduler

SDXL_UNET = {  # the published configuration of SDXL's UNet; the weights here are random
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
STEPS = 10


class Loop:
    """A network with random weights in an Euler loop, both branches in one batch.

    Args:
        config: Of a `UNet2DConditionModel` with SDXL's kind of conditioning.
        device, dtype: Where and in what the network runs.
    """

    def __init__(self, config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
        with device:
            torch.manual_seed(0)
            self.network = UNet2DConditionModel(**config).to(dtype).eval()
            size = config["sample_size"]
            pooled = config["projection_class_embeddings_input_dim"]
            pooled -= 6 * config["addition_time_embed_dim"]
            self.sample = torch.randn(1, 4, size, size, dtype=dtype)
            self.text = torch.randn(2, 77, config["cross_attention_dim"], dtype=dtype)
            self.added = {
                "text_embeds": torch.randn(2, pooled, dtype=dtype),
                "time_ids": torch.zeros(2, 6, dtype=dtype),
            }
            self.buffer = torch.randn(1, 4, size, size)
        self.scheduler = FusedEulerScheduler()
        self.scheduler.set_timesteps(STEPS, device)
        self.impl = "fused" if device.type == "cuda" else "reference"

    def predict(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Both branches' predictions, with shape (2, 4, H, W)."""
        return self.network(
            torch.cat([sample, sample]), timestep, self.text, added_cond_kwargs=self.added
        ).sample

    def guide(self, prediction: Tensor) -> Tensor:
        """The guided prediction; the buffer goes on."""
        uncond, cond = prediction.chunk(2)
        guided_prediction, self.buffer = our_apg(cond, uncond, self.buffer, self.impl)
        return guided_prediction

    def run(self, guidance: bool) -> Tensor:
        """A whole run; without guidance the conditional prediction alone leads it."""
        self.scheduler._step_index = None
        sample = self.sample
        for timestep in self.scheduler.timesteps:
            scaled = self.scheduler.scale_model_input(sample, timestep)
            prediction = self.predict(scaled, timestep)
            prediction = self.guide(prediction) if guidance else prediction[1:]
            sample = self.scheduler.step(prediction, timestep, sample, return_dict=False)[0]
        return sample


@torch.no_grad()
def loop_figures(
    config: dict[str, Any], device: torch.device, dtype: torch.dtype, budget: float = 2.0
) -> dict[str, float]:
    """Share of guidance and solver step of a forward, and milliseconds per step in a loop."""
    loop = Loop(config, device, dtype)
    timestep = loop.scheduler.timesteps[0]
    prediction = loop.predict(loop.sample, timestep)
    step = loop.scheduler.solver_row(1, loop.sample.device)

    def guide_and_step() -> None:
        uncond, cond = prediction.chunk(2)
        guided, _ = our_apg(cond, uncond, loop.buffer, loop.impl)
        network_step(
            loop.sample, guided, None, step, want_denoised=False, dtype=dtype, impl=loop.impl
        )

    forward = time_operation(lambda: loop.predict(loop.sample, timestep), device, budget)
    ours = time_operation(guide_and_step, device, budget / 10)
    bare, with_guidance = (
        time_operation(lambda g=guidance: loop.run(g), device, budget) for guidance in (False, True)
    )
    return {
        "share_of_unet_forward": ours.median / forward.median,
        "unet_forward_ms": forward.median,
        "guidance_and_solver_ms": ours.median,
        "overhead_per_step_ms": (with_guidance.median - bare.median) / STEPS,
    }


def syncs_in_run(pipe: Any, steps: int, **call: Any) -> int:
    """Times a call of a pipeline makes the host wait for CUDA, as PyTorch's debug mode counts."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            pipe("noto style fox", num_inference_steps=steps, output_type="latent", **call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in found)


def syncs_per_step(guidance: str) -> float:
    """Host syncs that one more step of the embedded model costs on CUDA, under `guidance`."""
    pipe = fused_embedded()
    call = {"guidance": guidance, "guidance_scale": 7.5}
    syncs_in_run(pipe, 2, **call)  # what happens once, at the first call
    few, many = (syncs_in_run(pipe, steps, **call) for steps in (5, 15))
    return (many - few) / 10


def fused_embedded(device: torch.device | str = "cuda") -> Any:
    """The embedded model with a fused scheduler."""
    pipe = load_embedded().to(device)
    pipe.scheduler = FusedDPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def network_figures(device: torch.device) -> dict[str, float]:
    """All of it on CUDA, in float16."""
    return loop_figures(SDXL_UNET, device, torch.float16) | {
        "syncs_per_step": syncs_per_step("apg")
    }
