"""What a picture looks like while it is made: latents decoded now and then."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

SHARE = 0.25  # of the time, at most, goes into previews


class Previews:
    """Steps of a run through diffusers' ``callback_on_step_end``, with previews.

    A preview shows the latents of a step, noise included. There is none for pipelines whose latents
    are no pictures to the VAE (packed in tokens, videos), or whose VAE overflows in half precision.

    Args:
        pipe: The pipeline.
        tell: Called with steps done, all steps, and the preview or None.
    """

    def __init__(self, pipe: Any, tell: Callable[[int, int, Image.Image | None], Any]) -> None:
        self.pipe, self.tell = pipe, tell
        self._began, self._spent = time.monotonic(), 0.0
        vae: Any = getattr(pipe, "vae", None)
        fp16 = getattr(vae, "dtype", None) == torch.float16
        self._can = hasattr(vae, "decode") and not (fp16 and vae.config.get("force_upcast"))

    def options(self, total: int) -> dict[str, Any]:
        """Arguments of the pipeline's call, as far as it takes them."""
        if "callback_on_step_end" not in inspect.signature(type(self.pipe).__call__).parameters:
            return {}

        def callback(pipe: Any, step: int, timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
            self.tell(step + 1, total, self._draw(kept.get("latents")))
            return {}

        return {"callback_on_step_end": callback}

    @torch.no_grad()
    def _draw(self, latents: Any) -> Image.Image | None:
        now = time.monotonic()
        late = self._spent > SHARE * (now - self._began)
        if latents is None or latents.ndim != 4 or not self._can or late:
            return None
        vae = self.pipe.vae
        scaled = latents[:1].to(vae.dtype) / vae.config.scaling_factor
        shift = vae.config.get("shift_factor")
        decoded = vae.decode(scaled + (shift or 0.0), return_dict=False)[0]
        image = self.pipe.image_processor.postprocess(decoded, output_type="pil")[0]
        self._spent += time.monotonic() - now
        return image
