"""The run: inputs checked, a search advanced on a loss, checkpoints, previews and the token."""

from __future__ import annotations

import contextlib
import hashlib
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ...guidance.files import atomic, write_json
from .files import save_token, text_encoders
from .inputs import (
    TEMPLATES,
    Source,
    TokenData,
    check_placeholder,
    check_templates,
    extended,
    initial_vector,
    load_images,
    prompt_ids,
)
from .loss import DiffusionTokenLoss, TokenLoss, injected
from .recipes import Recipe, recipe
from .training import TokenTrainer

CHECKPOINT = "checkpoint.safetensors"
TOKEN = "learned_embeds.safetensors"


@dataclass(frozen=True)
class LearnedToken:
    """The result of a run.

    Args:
        placeholder: The new word.
        vectors: Its embeddings, with shape (m, d), float32; d is the sum of the text encoders'
            widths. Those of the lowest held-out loss.
        widths: The text encoders' embedding widths.
        steps: Steps taken.
        forwards: Rows that the steps put through the denoiser.
        losses: Mean loss of each step's points.
        evaluations: (step, forwards, held-out loss), the first one of the initial token.
        seconds: Wall time of this call.
    """

    placeholder: str
    vectors: Tensor
    widths: tuple[int, ...]
    steps: int
    forwards: int
    losses: list[float]
    evaluations: list[tuple[int, int, float]]
    seconds: float

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The vectors for each text encoder, with shapes (m, width)."""
        return self.vectors.split(self.widths, dim=1)


class Personalizer:
    """Learns words for a pipeline of the Stable Diffusion 1, 2 or XL family.

    Args:
        pipe: The pipeline, quantized or not; it is not changed.
        loss: Evaluates tokens; None is `DiffusionTokenLoss` on the pipeline's own networks.
            Any callable (embeddings (K, m, d), `TokenBatch`) -> losses (K,) does, for instance one
            that calls an exported network.
        max_rows: Most rows of one network call (see `DiffusionTokenLoss`); 0 is no limit. With 2 a
            run needs the memory of plain inference with guidance; without a limit all points of a
            step are one call, and the held-out loss takes 8 rows at a time.

    Raises:
        ValueError: the pipeline is of another family, or `max_rows` is given for a `loss` that
            would not heed it.
    """

    def __init__(self, pipe: Any, loss: TokenLoss | None = None, max_rows: int = 0) -> None:
        if loss is not None and max_rows:
            raise ValueError(
                "max_rows belongs to the pipeline's own loss, and another one is given"
            )
        self.pipe = pipe
        self.networks = (
            loss if isinstance(loss, DiffusionTokenLoss) else DiffusionTokenLoss(pipe, max_rows)
        )
        self.loss: TokenLoss = self.networks if loss is None else loss
        self.tokenizers = {
            f"tokenizer{suffix}": tokenizer for suffix, _, tokenizer in text_encoders(pipe)
        }

    def fit(
        self,
        images: str | Path | Iterable[str | Path | Image.Image],
        placeholder: str,
        initializer: str | Tensor,
        *,
        preset: str | Recipe = "ours",
        vectors: int = 1,
        prompts: Sequence[str] | None = None,
        templates: Sequence[str] = TEMPLATES,
        held_out: Iterable[str | Path | Image.Image] | None = None,
        held_out_prompts: Sequence[str] | None = None,
        held_out_rows: int = 32,
        evaluate_every: int | None = None,
        patience: int = 0,
        seed: int = 0,
        output: str | Path | None = None,
        checkpoint_every: int = 100,
        resume: bool = True,
        preview_every: int = 0,
        preview_prompt: str = "{}",
        preview_options: dict[str, Any] | None = None,
        points_per_call: int = 0,
        callback: Callable[[TokenTrainer], None] | None = None,
        progress: bool = True,
        **settings: Any,
    ) -> LearnedToken:
        """Learn the embeddings of `placeholder`.

        Args:
            images: A folder, or pictures and paths.
            placeholder: The new word, such as "<my-cat>".
            initializer: A known word of one token, or the initial embeddings (m, d).
            preset: "ours", "zoodip" or a `Recipe`.
            vectors: m, embeddings of the word.
            prompts: A prompt with {} for each picture; None draws from `templates`.
            templates: Prompts with {}.
            held_out: Pictures for the held-out loss; None takes `images` with other timesteps and
                noise.
            held_out_prompts: As `prompts`, for `held_out`.
            held_out_rows: Rows of the held-out loss, over all timesteps; 0 switches it off.
            evaluate_every: Steps between held-out losses; None is a twentieth of the run.
            patience: Stop after this many held-out losses without improvement; 0 never does.
            seed: Of everything that is drawn.
            output: Folder for the token, checkpoint and previews; None writes nothing. A run that
                is interrupted or fails writes the best token so far and a checkpoint there.
            checkpoint_every: Steps between checkpoints.
            resume: Continue from a checkpoint in `output`.
            preview_every: Steps between pictures of the word; 0 is never.
            preview_prompt: Their prompt, with {}.
            preview_options: More arguments of the pipeline's call.
            points_per_call: See `TokenTrainer`.
            callback: Called with the trainer after each step.
            progress: Show a bar with loss and remaining time.
            **settings: Fields of `Recipe` that differ from the preset.

        Raises:
            ValueError: an input is unusable (nothing has been computed then).
            FileNotFoundError: the folder of images does not exist.
        """
        began = time.monotonic()
        plan = recipe(preset, **settings)
        for name, value, least in [
            ("vectors", vectors, 1),
            ("held_out_rows", held_out_rows, 0),
            ("checkpoint_every", checkpoint_every, 1),
        ]:
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if preview_every and output is None:
            raise ValueError("previews need an output folder")
        if held_out_prompts is not None and held_out is None:
            raise ValueError("held_out_prompts need held_out images")
        if patience and not held_out_rows:
            raise ValueError("patience needs a held-out loss: held_out_rows is 0")
        levels = len(self.pipe.scheduler.alphas_cumprod)
        if plan.timesteps_high > levels:
            raise ValueError(
                f"the window of timesteps ends at {plan.timesteps_high}, and "
                f"{type(self.pipe.scheduler).__name__} has {levels}: pass timesteps_low, "
                "timesteps_high"
            )
        folder = None if output is None else Path(output)
        if folder is not None and folder.exists() and not folder.is_dir():
            raise ValueError(f"the output {folder} is not a folder")
        for texts in (templates, prompts, held_out_prompts, (preview_prompt,)):
            if texts is not None:
                check_templates(texts)
        texts = [*templates, *(prompts or ()), *(held_out_prompts or ())]
        for tokenizer in self.tokenizers.values():
            check_placeholder(tokenizer, placeholder, texts, vectors)
        initial = self.initial_embeddings(initializer, vectors)
        tokenizers = [extended(t, placeholder, vectors) for t in self.tokenizers.values()]
        pictures = load_images(images, self._side())
        sets = [(pictures, prompts)]
        if held_out is not None:
            sets.append((load_images(held_out, self._side()), held_out_prompts))
        sources: list[Source] = []
        for pixels, own in sets:
            if own is not None and len(own) != len(pixels):
                raise ValueError(f"{len(pixels)} images and {len(own)} prompts: give one for each")
            ids = tuple(prompt_ids(t, own or templates, placeholder, vectors) for t in tokenizers)
            sources.append((pixels, ids, own is not None))

        trainer = TokenTrainer(
            self.loss,
            plan.build(initial, [table.weight for table in self.networks.tables], seed),
            (vectors, sum(self.networks.widths)),
            points_per_call,
            {
                "format": 2,  # of the search's state
                "recipe": asdict(plan) | {"steps": None},
                "seed": seed,
                "placeholder": placeholder,
                "inputs": _digest(initial, *(x for s in sources for x in (s[0], *s[1]))),
                "pipeline": type(self.pipe).__name__,
                "held_out_rows": held_out_rows,
            },
        )
        if folder is not None:
            identity = {"loss": type(self.loss).__name__}
            trainer.settings |= getattr(self.loss, "identity", identity)
            if resume and (folder / CHECKPOINT).is_file():
                trainer.load(folder / CHECKPOINT)
        # Encoding the pictures is work: it comes after everything that can be refused.
        data = TokenData(self.networks, sources[0], plan, seed)
        judged = None
        if held_out_rows:
            other = data if held_out is None else TokenData(self.networks, sources[1], plan, seed)
            judged = other.held_out(held_out_rows)

        every = evaluate_every or max(1, plan.steps // 20)
        main = trainer.process.is_main_process
        writes = folder if main else None

        def due(interval: int) -> bool:
            return trainer.step % interval == 0 or trainer.step == plan.steps

        def evaluate() -> None:
            done = trainer.evaluations and trainer.evaluations[-1][0] == trainer.step
            if judged is not None and due(every) and not done:
                trainer.evaluate_held_out(judged)

        def preview(folder: Path) -> None:
            # The same noise each time.
            options = {"generator": torch.Generator().manual_seed(0), **(preview_options or {})}
            with self.speaking(placeholder, trainer.vectors) as pipe:
                image = pipe(preview_prompt.format(placeholder), **options).images[0]
            with atomic(folder / "previews" / f"step-{trainer.step:06d}.png") as partial:
                image.save(partial)

        try:
            evaluate()
            with tqdm(
                total=plan.steps,
                initial=trainer.step,
                unit="step",
                desc="personalize",
                disable=not (progress and main),
            ) as bar:
                while trainer.step < plan.steps and not trainer.stalled(patience):
                    trainer.advance(data.batch(trainer.step))
                    evaluate()
                    shown = {"loss": statistics.fmean(trainer.losses[-50:])}
                    if trainer.evaluations:
                        shown["held out"] = trainer.evaluations[-1][2]
                    bar.set_postfix(shown, refresh=False)
                    bar.update()
                    if folder is not None and due(checkpoint_every):
                        if main:
                            trainer.save(folder / CHECKPOINT)
                        trainer.process.wait_for_everyone()
                    if writes is not None and preview_every and trainer.step % preview_every == 0:
                        preview(writes)
                    if callback is not None:
                        callback(trainer)
        except BaseException:
            if writes is not None and trainer.step and trainer.between_steps:
                trainer.save(writes / CHECKPOINT)
            raise
        finally:
            token = LearnedToken(
                placeholder,
                trainer.best if held_out_rows else trainer.vectors,
                self.networks.widths,
                trainer.step,
                trainer.forwards,
                trainer.losses,
                trainer.evaluations,
                time.monotonic() - began,
            )
            if writes is not None and trainer.step:
                _save(token, writes)
        return token

    @contextlib.contextmanager
    def speaking(self, placeholder: str, vectors: Tensor) -> Iterator[Any]:
        """Within this context the pipeline knows the word with the embeddings (m, d).

        Prompts contain the word once; diffusers puts its further vectors behind it.
        """
        networks = self.networks
        parts = vectors.to(networks.device).split(networks.widths, dim=1)
        with contextlib.ExitStack() as stack:
            for table, size, part in zip(
                networks.tables, networks.vocabularies, parts, strict=True
            ):
                stack.enter_context(injected(table, size, part[None]))
            for name, tokenizer in self.tokenizers.items():
                setattr(self.pipe, name, extended(tokenizer, placeholder, len(vectors)))
                stack.callback(setattr, self.pipe, name, tokenizer)
            yield self.pipe

    def initial_embeddings(self, initializer: str | Tensor, vectors: int) -> Tensor:
        """Embeddings (m, d), float32, on the CPU, of a class word or as they are given.

        Raises:
            ValueError: the word is not one known token, or the embeddings have another shape.
        """
        width = sum(self.networks.widths)
        if isinstance(initializer, Tensor):
            if initializer.shape != (vectors, width):
                raise ValueError(
                    f"the initial embeddings must have shape ({vectors}, {width}) for "
                    f"{type(self.pipe).__name__}, got {tuple(initializer.shape)}"
                )
            return initializer.detach().float().cpu()
        pairs = zip(self.tokenizers.values(), self.networks.tables, strict=True)
        word = torch.cat([initial_vector(t, table.weight, initializer) for t, table in pairs])
        return word.repeat(vectors, 1)

    def _side(self) -> int:
        """Side of the UNet's pictures, in pixels."""
        sides = self.pipe.unet.config.sample_size
        sides = set(sides) if isinstance(sides, (list, tuple)) else {sides}
        if len(sides) != 1:
            raise ValueError(f"the UNet's pictures are not square: sample_size is {sorted(sides)}")
        return int(sides.pop()) * self.networks.pixels_per_latent


def _save(token: LearnedToken, folder: Path) -> None:
    """Write the token and, beside it, how it came about."""
    save_token(folder / TOKEN, token.parts, token.placeholder)
    losses = [(*at, loss if math.isfinite(loss) else None) for *at, loss in token.evaluations]
    record = {name: getattr(token, name) for name in ("placeholder", "steps", "forwards")}
    write_json(folder / "personalization.json", record | {"evaluations": losses})


def _digest(*tensors: Tensor) -> str:
    """SHA-256 of tensors; 64 hex digits."""
    content = {str(i): tensor.contiguous() for i, tensor in enumerate(tensors)}
    return hashlib.sha256(safetensors.torch.save(content)).hexdigest()
