"""The run: inputs checked, a search advanced on a loss, checkpoints, previews and the token."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from .files import text_encoders
from .inputs import (
    TEMPLATES,
    Images,
    Source,
    TokenData,
    check_templates,
    extended,
    initial_vector,
    known_word,
    read_sources,
    starting_point,
)
from .loss import DiffusionTokenLoss, TokenLoss, injected
from .output import (
    CHECKPOINT,
    LearnedToken,
    Previews,
    attempt,
    save_result,
    try_folder,
    write_losses,
)
from .progress import Progress
from .recipes import Recipe, recipe
from .schedule import PREVIEW_STEPS, Schedule, duration, seconds_a_pass, word_steps
from .training import TokenTrainer

CHECKPOINT_SECONDS = 60
PATIENCE = 5  # held-out losses: a quarter of a run that has twenty
LONG = 1800  # seconds from which a shorter run is offered


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
        ValueError: the pipeline is of another family, its weights are not in memory (sequential
            offloading), or `max_rows` is given for a `loss` that would not heed it.
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
        images: Images,
        placeholder: str,
        initializer: str | Path | Tensor,
        *,
        preset: str | Recipe = "ours",
        minutes: float | None = None,
        vectors: int | None = None,
        prompts: Sequence[str] | None = None,
        templates: Sequence[str] = TEMPLATES,
        held_out: Images | None = None,
        held_out_prompts: Sequence[str] | None = None,
        held_out_rows: int = 32,
        evaluate_every: int | None = None,
        patience: int | None = None,
        seed: int = 0,
        output: str | Path | None = None,
        checkpoint_every: int | None = None,
        resume: bool = True,
        preview_every: int | None = None,
        preview_prompt: str = "{}",
        preview_options: dict[str, Any] | None = None,
        points_per_call: int = 0,
        callback: Callable[[TokenTrainer], None] | None = None,
        before: Callable[[float], object] | None = None,
        progress: bool = True,
        **settings: Any,
    ) -> LearnedToken:
        """Learn the embeddings of `placeholder`.

        Args:
            images: A folder, or pictures and paths. A text file beside a picture (x.png: x.txt) is
                its prompt, with the placeholder or {} in it.
            placeholder: The new word, such as "<my-cat>".
            initializer: A known word of one token; a token file (.safetensors) or embeddings
                (m, d) to continue from, which are then not compared with known words.
            preset: "ours", "zoodip" or a `Recipe`.
            minutes: Take as many steps as fit into this time, by a measured step, held-out losses
                and previews included; instead of `steps`.
            vectors: m, embeddings of the word; None is those of `initializer`.
            prompts: A prompt with {} for each picture; None takes the captions beside the
                pictures, or draws from `templates`.
            templates: Prompts with {}.
            held_out: Pictures for the held-out loss, as `images`; None takes `images` with other
                timesteps and noise.
            held_out_prompts: As `prompts`, for `held_out`.
            held_out_rows: Rows of the held-out loss, over all timesteps; 0 switches it off.
            evaluate_every: Steps between held-out losses; None is a twentieth of the run, and more
                where that would take more than a quarter of the steps' forward passes.
            patience: Stop after this many held-out losses without improvement; 0 never does. None
                is 5, and 0 where `evaluate_every` is given.
            seed: Of everything that is drawn.
            output: Folder for token, checkpoint, losses, curve and previews; None writes nothing.
                It is made and tried before the work. A run that is interrupted or fails writes the
                best token so far and a checkpoint there.
            checkpoint_every: Steps between checkpoints; None writes one at the first step that
                ends a minute or more after the last one.
            resume: Continue from a checkpoint in `output`.
            preview_every: Steps between pictures of the best token so far; 0 is never, None is a
                quarter of the run where there is an `output`.
            preview_prompt: Their prompt, with {}.
            preview_options: More arguments of the pipeline's call; 20 sampling steps by default.
            points_per_call: See `TokenTrainer`.
            callback: Called with the trainer after each step.
            before: Called with the seconds that the run will take, once a step has been measured;
                what it raises ends the run.
            progress: Show how long it will take (by a step's forward passes more), a line for
                each held-out loss, and a bar.
            **settings: Fields of `Recipe` that differ from the preset.

        Raises:
            ValueError: an input is unusable (nothing has been computed then), or the time is too
                short.
            FileNotFoundError: the folder of images or the token file does not exist.
            OSError: the output folder cannot be written to.
            FloatingPointError: more than a quarter of the rows overflow in the network.
        """
        began = time.monotonic()
        start = starting_point(initializer)
        if isinstance(start, Tensor) and settings.get("words") is None:
            settings["words"] = 0
        plan = recipe(preset, **settings)
        if minutes is not None:
            if not (math.isfinite(minutes) and minutes > 0):
                raise ValueError(f"minutes must be a positive number, got {minutes}")
            if settings.get("steps") is not None:
                raise ValueError("steps and minutes exclude each other: give one of them")
        if vectors is None:
            vectors = len(start) if isinstance(start, Tensor) else 1
        for name, value, least in [
            ("vectors", vectors, 1),
            ("held_out_rows", held_out_rows, 0),
            ("evaluate_every", evaluate_every, 1),
            ("patience", patience, 0),
            ("checkpoint_every", checkpoint_every, 1),
            ("preview_every", preview_every, 0),
        ]:
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if preview_every and output is None:
            raise ValueError("previews need an output folder")
        if held_out_prompts is not None and held_out is None:
            raise ValueError("held_out_prompts need held_out images")
        if patience and not held_out_rows:
            raise ValueError("patience needs a held-out loss: held_out_rows is 0")
        if patience is None:
            patience = PATIENCE if held_out_rows and evaluate_every is None else 0
        unknown = {*(preview_options or ())} - {*inspect.signature(self.pipe.__call__).parameters}
        if unknown:
            name = type(self.pipe).__name__
            raise ValueError(f"preview_options: {name} takes no {', '.join(sorted(unknown))}")
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
        check_templates([preview_prompt])
        pictures = [(images, prompts)]
        if held_out is not None:
            pictures.append((held_out, held_out_prompts))
        tokenizers = list(self.tokenizers.values())
        sources, names = read_sources(
            tokenizers, self.picture_size, pictures, templates, placeholder, vectors
        )
        initial = self.initial_embeddings(start, vectors)

        if getattr(self.pipe.unet.config, "precision", "") == "int8":
            warnings.warn(
                "the UNet is a graph with int8 activations, whose rounding hides what tells near "
                "tokens apart: the comparison of known words works, the descent hardly does. Learn "
                "on a graph in fp32 or fp16, or with int8 weights alone (quantize)",
                stacklevel=2,
            )
        trainer = self._trainer(plan, initial, sources, placeholder, seed, points_per_call)
        trainer.settings["held_out_rows"] = held_out_rows
        main = trainer.process.is_main_process
        writes = folder if main else None
        if folder is not None:
            self._continue(trainer, folder, resume)
        # Encoding the pictures is work: it comes after everything that can be refused.
        shown = progress and main
        data, *others = [
            TokenData(self.networks, source, plan, seed, own, shown)
            for source, own in zip(sources, names, strict=True)
        ]
        judged = [data, *others][-1].held_out(held_out_rows) if held_out_rows else None

        options = {"num_inference_steps": PREVIEW_STEPS} | (preview_options or {})
        schedule = Schedule(
            plan.batch * plan.evaluations,
            held_out_rows,
            2 * options["num_inference_steps"] if folder and preview_every != 0 else 0,
            evaluate_every,
            preview_every or None,
        )
        text = ""
        if minutes is not None or ((progress or before) and trainer.step < plan.steps):
            plan, text, seconds = self._timed(trainer, data, plan, schedule, minutes)
            if before is not None:
                before(seconds)
        evaluates = schedule.evaluation_interval(plan.steps)
        pictures_every = schedule.preview_interval(plan.steps)
        view = Progress(trainer, plan.steps, writes, shown)
        view.say(text)

        def draw() -> Image.Image:
            # The same noise each time.
            noise = {"generator": torch.Generator().manual_seed(0)}
            vectors = trainer.best if held_out_rows else trainer.vectors
            with self.speaking(placeholder, vectors) as pipe:
                return pipe(preview_prompt.format(placeholder), **(noise | options)).images[0]

        previews = None
        if writes is not None and preview_every != 0:
            previews = Previews(draw, writes, fresh=trainer.step == 0)
        saved = time.monotonic()

        def due(interval: int) -> bool:
            return trainer.step % interval == 0 or trainer.step == plan.steps

        def look() -> None:
            """What is due between two steps; after a resume, what was lost with a kill."""
            nonlocal saved
            done = trainer.evaluations and trainer.evaluations[-1][0] == trainer.step
            if judged is not None and due(evaluates) and not done:
                view.phase("held-out loss")
                trainer.evaluate_held_out(judged)
                view.evaluated()
            if writes is None or not trainer.step:
                return
            minute = time.monotonic() - saved >= CHECKPOINT_SECONDS
            if due(checkpoint_every) if checkpoint_every else minute:
                attempt("the checkpoint", lambda: trainer.save(writes / CHECKPOINT))
                saved = time.monotonic()
            if previews is not None and (due(pictures_every) or trainer.stalled(patience)):
                view.phase("preview")
                previews.write(trainer.best_step if held_out_rows else trainer.step)
                view.phase()

        try:
            look()
            while trainer.step < plan.steps and not trainer.stalled(patience):
                comparing = trainer.comparing_words
                trainer.advance(data.batch(trainer.step))
                view.advanced(comparing)
                look()
                if callback is not None:
                    callback(trainer)
        except BaseException:
            kept = "" if folder is None else f"; the same call goes on from there, from {folder}"
            view.say(f"stopped after step {trainer.step}{kept}")
            raise
        finally:
            view.bar.close()
            token = LearnedToken(
                placeholder,
                trainer.best if held_out_rows else trainer.vectors,
                self.networks.widths,
                trainer.step,
                trainer.forwards,
                trainer.losses,
                trainer.evaluations,
                time.monotonic() - began,
                trainer.learned,
            )
            if writes is not None and trainer.step:
                if trainer.between_steps:
                    attempt("the checkpoint", lambda: trainer.save(writes / CHECKPOINT))
                write_losses(trainer, writes)
                save_result(token, writes)
        if main and not token.learned:
            warnings.warn(
                f"nothing was learned in {token.steps} steps: no held-out loss is below the first "
                "one; the vectors are the initial ones, and no token is written",
                stacklevel=2,
            )
        return token

    def _trainer(
        self,
        plan: Recipe,
        initial: Tensor,
        sources: list[Source],
        placeholder: str,
        seed: int,
        points_per_call: int,
    ) -> TokenTrainer:
        """The search with its loss, and what a checkpoint of it depends on, but for the loss."""
        tables = [table.weight.detach() for table in self.networks.tables]
        width, tokenizer = self.networks.widths[0], self.pipe.tokenizer
        return TokenTrainer(
            self.loss,
            plan.build(initial, tables, seed),
            (len(initial), initial.shape[1]),
            points_per_call,
            {
                "format": 3,  # of the state
                "recipe": asdict(plan) | {"steps": None},
                "seed": seed,
                "placeholder": placeholder,
                "inputs": _digest(initial, *(x for s in sources for x in (s[0], *s[1]))),
                "pipeline": type(self.pipe).__name__,
            },
            self._remedy(),
            lambda vector: known_word(tokenizer, tables[0], vector[:width]),
        )

    def _continue(self, trainer: TokenTrainer, folder: Path, resume: bool) -> None:
        """Try the folder; continue from its checkpoint if there is one and it shall be."""
        if trainer.process.is_main_process:
            try_folder(folder)
        trainer.settings |= getattr(self.loss, "identity", {"loss": type(self.loss).__name__})
        if resume and (folder / CHECKPOINT).exists():
            trainer.load(folder / CHECKPOINT)
        steps = torch.zeros(trainer.process.num_processes, dtype=torch.int64)
        steps[trainer.process.process_index] = trainer.step
        if len(found := set(trainer.shared(steps).tolist())) > 1:
            raise ValueError(
                f"the processes' checkpoints are of steps {sorted(found)}: {folder} must be one "
                "folder for all of them"
            )

    def _remedy(self) -> str:
        """What to do about losses that are not finite."""
        if self.pipe.unet.dtype == torch.float16:
            return "Half precision overflows: load the pipeline in bfloat16 (--dtype bf16)"
        return "If losses were finite before, the token has gone astray: lower the rate"

    def _timed(
        self,
        trainer: TokenTrainer,
        data: TokenData,
        plan: Recipe,
        schedule: Schedule,
        minutes: float | None,
    ) -> tuple[Recipe, str, float]:
        """The plan, with the steps that fit into the time, if one is given; text; seconds."""
        second = seconds_a_pass(trainer, trainer.search.ask(), data.batch(trainer.step))
        speed = f"{schedule.rows} forward passes of {second:.2g} s each"
        if minutes is not None:
            steps = schedule.steps_within(60 * minutes, second)
            least = word_steps(trainer.search) + 1
            if steps < least:
                needed = math.ceil(schedule.forwards(least) * second / 60)
                raise ValueError(
                    f"{minutes:g} minutes are {steps} steps of {speed}, and a run takes {least} "
                    f"at least: give {needed} minutes, fewer held-out rows or no previews"
                )
            plan = replace(plan, steps=trainer.step + steps)
        left = plan.steps - trainer.step
        total = schedule.forwards(left) * second
        text = f"{left} steps of {speed}, with held-out losses and previews about {duration(total)}"
        if minutes is None and total > LONG:
            offered = max(10, round(total / 60 / 8))
            text += (
                f"; minutes={offered} (--minutes {offered}) would be "
                f"{schedule.steps_within(60 * offered, second)} steps"
            )
        return plan, text, total

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

    @property
    def picture_size(self) -> int:
        """Side of the UNet's pictures, in pixels."""
        sides = self.pipe.unet.config.sample_size
        sides = set(sides) if isinstance(sides, (list, tuple)) else {sides}
        if len(sides) != 1:
            raise ValueError(f"the UNet's pictures are not square: sample_size is {sorted(sides)}")
        return int(sides.pop()) * self.networks.pixels_per_latent


def _digest(*tensors: Tensor) -> str:
    """SHA-256 of tensors; 64 hex digits."""
    content = {str(i): tensor.contiguous() for i, tensor in enumerate(tensors)}
    return hashlib.sha256(safetensors.torch.save(content)).hexdigest()
