"""How well pictures show what their prompts say.

`CLIPAlignment` is the CLIP score of published figures (Hessel et al. 2021, arXiv:2104.08718, in
the form 100 max(cos, 0); figures compare for the same CLIP model only). `RidgeAlignment` needs no
hub: a linear map from image features to sentence vectors, fitted on captioned pictures. It is much
weaker than CLIP, knows only what it was fitted on, and its values compare with its own only.

    python -m pilotage.eval.metrics.alignment FOLDER --clip openai/clip-vit-base-patch16
    python -m pilotage.eval.metrics.alignment TRAINING --fit map.safetensors
    python -m pilotage.eval.metrics.alignment FOLDER --ridge map.safetensors
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from ..comparison.compare import read_prompts
from .bootstrap import interval
from .hub import describe, from_pretrained, pixel_values
from .options import Batch, Device, Json, Resize, check_target, report
from .pictures import batches, picture_files, prompt_of
from .ridge import RidgeAlignment

__all__ = ["CLIPAlignment", "RidgeAlignment", "rank_accuracy"]


class CLIPAlignment(nn.Module):
    """CLIP score.

    Args:
        model: Folder or hub name.

    Raises:
        FileNotFoundError, ValueError: see `hub.from_pretrained`.
    """

    def __init__(self, model: str) -> None:
        super().__init__()
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        self.name = f"clip:{model}"
        self.network = from_pretrained(CLIPModel, model).eval().requires_grad_(False)
        self.processor = from_pretrained(AutoImageProcessor, model)
        self.tokenizer = from_pretrained(AutoTokenizer, model)
        self.preprocessing = describe(self.processor)

    @torch.inference_mode()
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """100 max(cos, 0) of each picture and its prompt, shape (N,).

        Args:
            images: Pictures, with shape (N, 3, H, W), in [0, 1].
            prompts: N texts; more than the model's context is cut off, as for published figures.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures, but {len(prompts)} prompts")
        weights = self.network.logit_scale
        text = self.tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=self.network.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(weights.device)
        pixels = pixel_values(self.processor, images).to(weights.device, weights.dtype)
        out = self.network(**text, pixel_values=pixels)
        cosine = torch.cosine_similarity(out.image_embeds.float(), out.text_embeds.float())
        return 100 * cosine.clamp(min=0)


def rank_accuracy(similarity: Tensor, k: int = 1) -> float:
    """Share of rows whose own column is among the k most similar (retrieval at k).

    Ties count against: a column as similar as the own one ranks before it.

    Args:
        similarity: With shape (N, N); row i belongs to column i.
        k: Ranks that count as found.
    """
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1] or not len(similarity):
        raise ValueError(f"expected similarities (N, N), got shape {tuple(similarity.shape)}")
    if not similarity.isfinite().all():
        raise ValueError("similarities contain NaN or infinity")
    if not 1 <= k <= len(similarity):
        raise ValueError(f"k must be between 1 and {len(similarity)}, got {k}")
    before = (similarity >= similarity.diagonal()[:, None]).sum(1) - 1
    return float((before < k).double().mean())


def _prompts(files: Sequence[Path], source: Path | None) -> list[str]:
    if source is None:
        return [prompt_of(file) for file in files]
    lines = read_prompts(source)
    if len(lines) != len(files):
        raise ValueError(f"{source} has {len(lines)} prompts for {len(files)} pictures")
    return lines


app = typer.Typer(add_completion=False)


@app.command()
def command(
    folder: Annotated[Path, typer.Argument(help="Folder of pictures.")],
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text, a line a picture in the order of names; default: in the PNGs."),
    ] = None,
    clip: Annotated[str | None, typer.Option(help="CLIP folder or hub name.")] = None,
    ridge: Annotated[Path | None, typer.Option(help="A map made with --fit.")] = None,
    fit: Annotated[Path | None, typer.Option(help="Fit a map and write it here.")] = None,
    batch_size: Batch = 32,
    resize: Resize = None,
    device: Device = "cpu",
    json: Json = None,
) -> None:
    """Alignment of pictures and prompts: CLIP score, or the weaker offline ridge map."""
    if sum(option is not None for option in (clip, ridge, fit)) != 1:
        raise ValueError("name one of --clip, --ridge and --fit")
    if fit is not None:
        check_target(fit)
    files = picture_files(folder)
    texts = _prompts(files, prompts)
    if fit is not None:
        RidgeAlignment.fit(torch.cat(list(batches(files, batch_size, resize))), texts).save(fit)
        typer.echo(f"{fit}: fitted on {len(files)} pictures")
        return
    scorer: Any = CLIPAlignment(clip) if clip is not None else RidgeAlignment.load(ridge)
    scorer = scorer.to(device)
    scores, done = [], 0
    for pictures in batches(files, batch_size, resize):
        scores.append(scorer.score(pictures, texts[done : done + len(pictures)]).cpu())
        done += len(pictures)
    values = torch.cat(scores)
    found = {"alignment": float(values.mean()), "by": scorer.name, "n": len(values)}
    found["interval"] = list(interval(values)) if len(values) > 1 else None
    report(found, json)


if __name__ == "__main__":
    from ..cli import run

    run(app)
