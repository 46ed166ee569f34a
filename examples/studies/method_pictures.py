"""Before and after, method by method: the pictures of docs/methods, from the embedded model.

    python -m examples.studies.method_pictures [NAME ...]

Every picture has the same prompts and the same noise twice: above by CFG (or what else the method
is to be compared with), below by the method. Written are ``docs/pictures/methods/NAME.webp``,
``eval/results/method_pictures.json``, and the caption in the method's page.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import EulerDiscreteScheduler
from PIL import Image
from tqdm import tqdm

from pilotage.eval.embedded import embedded_folder, load_embedded
from pilotage.eval.metrics.images import saturation, ssim, to_tensor
from pilotage.eval.record import figures_context, write_json
from pilotage.guidance import Guidance, load_guidance, resolve
from pilotage.guidance.files import atomic, write_text

PROMPTS = (
    "twemoji style red apple",
    "noto style penguin",
    "fluent style cactus",
    "emojione style birthday cake",
)
STEPS, CELL, GAP = 20, 112, 2
PAGES, PICTURES = Path("docs/methods"), Path("docs/pictures/methods")
RESULTS = Path("eval/results/method_pictures.json")
MARKED = re.compile(r"<!-- picture.*?<!-- end of picture -->\n\n", re.DOTALL)


@dataclass(frozen=True)
class Shown:
    """What a picture shows.

    Args:
        guidance: A name with settings, or a file of the embedded model.
        scale: Its guidance scale.
        note: What is to be seen, or that nothing is: written after looking at the picture.
        beside: Guidance of the upper row.
        beside_scale: Its guidance scale; None: the same.
        euler: Whether both are drawn with Euler steps instead of the model's DPM++ 2M.
    """

    guidance: str
    scale: float
    note: str
    beside: str = "cfg"
    beside_scale: float | None = None
    euler: bool = False

    @property
    def upper(self) -> tuple[str, float]:
        """Guidance and scale of the upper row."""
        return self.beside, self.scale if self.beside_scale is None else self.beside_scale


SHOWN = {
    "cfg": Shown(
        "cfg",
        7.5,
        "Without guidance the things are pale and soft; with it they are what the prompt "
        "says, and more saturated.",
        beside_scale=1.0,
    ),
    "apg": Shown(
        "apg",
        15,
        "Here APG is less burnt: the cake's colours are softer and the penguin is round "
        "again. The apple's red is mottled instead.",
    ),
    "rescale": Shown(
        "rescale", 15, "The apple is paler, but specks appear on the white around the others."
    ),
    "cfg-zero-star": Shown(
        "cfg-zero*(zero_steps=0)",
        15,
        "The cake loses most of its blue and yellow; of the others little changes.",
    ),
    "tcfg": Shown("tcfg", 15, "The penguin keeps more of its belly; of the others little changes."),
    "magnitude": Shown(
        "magnitude",
        15,
        "Nothing is burnt any more: the pictures look like those of a much lower scale.",
    ),
    "fdg": Shown(
        "fdg", 15, "With the defaults (made for SDXL) hardly anything is to be seen at this scale."
    ),
    "cfg-plus-plus": Shown(
        "cfg-pp", 7.5, "The apple gets its leaf back, and all colours are calmer.", euler=True
    ),
    "momentum": Shown("momentum", 3, "Hardly anything is to be seen.", euler=True),
    "higs": Shown(
        "higs",
        3,
        "Outlines and shading become a little stronger; no more is to be seen.",
        euler=True,
    ),
    "tag": Shown("tag", 3, "Colours become a little fuller; no more is to be seen.", euler=True),
    "ag": Shown(
        "ag",
        7.5,
        "The pictures change where guidance ends early: the apple's leaf, the penguin's wing.",
    ),
    "interval": Shown(
        "interval(start_step=2, stop_step=12)",
        15,
        "The penguin is whole again, and a quarter of the evaluations is saved; the cake is "
        "as burnt as before.",
    ),
    "linear-ag": Shown(
        "linear-ag.json",
        7.5,
        "The pictures are others of the same kind: the apple's leaf, the penguin's outline.",
    ),
    "forecast": Shown(
        "forecast",
        7.5,
        "That is the point: the same pictures, with three fifths of the evaluations.",
    ),
    "scales": Shown(
        "scale-linear",
        15,
        "A scale that rises to twice its mean at the end leaves grain: the apple is mottled, "
        "specks lie around the others.",
    ),
    "schedules": Shown(
        "searched.json",
        7.5,
        "The same pictures with a little grain, for three tenths of the evaluations.",
    ),
}


def named(guidance: str) -> Guidance:
    """Guidance by a name with settings, or of a file beside the embedded model."""
    if guidance.endswith(".json"):
        return load_guidance(embedded_folder() / "guidance" / guidance)
    return resolve(guidance)


def drawn(pipe: Any, guidance: str, scale: float) -> tuple[list[Image.Image], float]:
    """Pictures of all prompts, and the evaluations that one cost."""
    images = pipe(
        list(PROMPTS),
        guidance=named(guidance),
        guidance_scale=scale,
        num_inference_steps=STEPS,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))],
    ).images
    nfe = pipe.guidance_trace.nfe
    return images, sum(nfe) / len(nfe)


def sheet(rows: list[list[Image.Image]]) -> Image.Image:
    """Rows of pictures, enlarged."""
    pitch = CELL + GAP
    result = Image.new("RGB", (len(rows[0]) * pitch - GAP, len(rows) * pitch - GAP), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            enlarged = image.resize((CELL, CELL), Image.Resampling.LANCZOS)
            result.paste(enlarged, (x * pitch, y * pitch))
    return result


def caption(name: str, made: dict[str, Any]) -> str:
    """What stands in the page: the picture, and what it shows."""
    shown = SHOWN[name]
    (upper, w), solver = shown.upper, "Euler" if shown.euler else "DPM++ 2M"
    return "\n".join(
        [
            "<!-- picture, written by python -m examples.studies.method_pictures -->",
            "",
            f"![Above {upper} at w = {w:g}, below {shown.guidance} at w = {shown.scale:g}]"
            f"(../pictures/methods/{name}.webp)",
            "",
            f"*Above `{upper}` at w = {w:g}, below `{shown.guidance}` at w = {shown.scale:g}, from "
            f"the same noise ({solver}, {STEPS}",
            f"steps): {made['beside_nfe']:.4g} and {made['nfe']:.4g} evaluations a picture, "
            f"saturation {made['beside_saturation']:.3f} and {made['saturation']:.3f}, SSIM",
            f"{made['ssim']:.3f} to each other. {shown.note}*",
            "",
            "<!-- end of picture -->",
            "",
            "",
        ]
    )


def with_caption(name: str, made: dict[str, Any], root: Path = Path()) -> str:
    """The page of a method with its picture, before its source."""
    text = MARKED.sub("", (root / PAGES / f"{name}.md").read_text(encoding="utf-8"))
    before, mark, after = text.rpartition("**Source.**")
    return before + caption(name, made) + mark + after


def main(
    names: Annotated[
        list[str] | None, typer.Argument(help="Methods; all, if none is named.")
    ] = None,
) -> None:
    """Draw, save, and write the captions."""
    stored = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"methods": {}}
    PICTURES.mkdir(parents=True, exist_ok=True)
    pipe, seen = load_embedded(), {}
    pipe.set_progress_bar_config(disable=True)
    solver = pipe.scheduler
    for name in tqdm(names or SHOWN):
        shown, rows, nfe = SHOWN[name], [], []
        pipe.scheduler = solver
        if shown.euler:
            pipe.scheduler = EulerDiscreteScheduler.from_config(solver.config)
        for asked in (shown.upper, (shown.guidance, shown.scale)):
            key = (*asked, shown.euler)
            if key not in seen:
                seen[key] = drawn(pipe, *asked)
            rows.append(seen[key][0])
            nfe.append(seen[key][1])
        with atomic(PICTURES / f"{name}.webp") as partial:
            sheet(rows).save(partial, "webp", quality=80, method=6)
        above, below = (to_tensor(row) for row in rows)
        stored["methods"][name] = {
            "guidance": str(named(shown.guidance)),
            "scale": shown.scale,
            "beside": str(named(shown.upper[0])),
            "beside_scale": shown.upper[1],
            "scheduler": type(pipe.scheduler).__name__,
            "nfe": nfe[1],
            "beside_nfe": nfe[0],
            "saturation": saturation(below).mean().item(),
            "beside_saturation": saturation(above).mean().item(),
            "ssim": ssim(below, above).mean().item(),
        }
        write_text(PAGES / f"{name}.md", with_caption(name, stored["methods"][name]))
    stored |= {"prompts": PROMPTS, "seeds": len(PROMPTS), "steps": STEPS}
    write_json(RESULTS, stored | {"context": figures_context()})


if __name__ == "__main__":
    typer.run(main)
