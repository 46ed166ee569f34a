"""What a token is learned from: pictures, a class word, prompts, all checked; rows made of them."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...guidance.images import SUFFIXES, flattened, listing, read_image, to_tensor
from ...guidance.zeroth_order import generator
from .files import check_name, check_spelling, load_token, token_names
from .loss import DiffusionTokenLoss, TokenBatch
from .recipes import Recipe

# Pictures (N, 3, H, W), prompts as ids for each text encoder, whether prompts belong to pictures.
Source = tuple[Tensor, tuple[Tensor, ...], bool]

Images = str | Path | Iterable[str | Path | Image.Image]

TEMPLATES = (
    "a photo of {}",
    "a picture of {}",
    "a close-up of {}",
    "a rendering of {}",
    "a good photo of {}",
    "{} on a plain background",
)


def list_images(images: Images) -> list[str | Path | Image.Image]:
    """The pictures of a folder in the order of their names, or those of a list.

    Raises:
        ValueError: there is none.
        FileNotFoundError: the folder does not exist.
    """
    source = "the list of images"
    if isinstance(images, (str, Path)):
        source = str(images)
        if not Path(images).is_dir():
            raise FileNotFoundError(f"{images} is not a folder of images")
        images = listing(images).files
    elif isinstance(images, Image.Image):
        images = [images]
    if not (listed := list(images)):
        raise ValueError(f"no images: {source} is empty (known are {', '.join(SUFFIXES)})")
    return listed


def picture_names(images: Sequence[str | Path | Image.Image]) -> tuple[str, ...]:
    """What messages call the pictures: their files' names, or their places in the list."""
    return tuple(
        f"image {i}" if isinstance(image, Image.Image) else Path(image).name
        for i, image in enumerate(images)
    )


def load_images(images: Images, size: int) -> Tensor:
    """Pictures as float32 (N, 3, size, size) in [0, 1]: cropped to a square, transparency on white.

    Raises:
        ValueError: there is no picture, or one cannot be read (the message names it).
        FileNotFoundError: the folder does not exist.
    """
    return torch.stack([_pixels(x, i, size) for i, x in enumerate(list_images(images))])


def captions(
    images: Sequence[str | Path | Image.Image], placeholder: str
) -> tuple[str, ...] | None:
    """Prompts with {} from the text files beside pictures (x.png: x.txt); None if there are none.

    A caption contains the word, or {} in its place.

    Raises:
        ValueError: one picture has a caption and another none, or a caption does not contain the
            word once.
    """
    files = [None if isinstance(x, Image.Image) else Path(x).with_suffix(".txt") for x in images]
    there = [file is not None and file.is_file() for file in files]
    if not any(there):
        return None
    if not all(there):
        missing = picture_names(images)[there.index(False)]
        raise ValueError(
            f"{missing} has no caption (.txt) beside it, and others have: give one to each"
        )
    found = []
    for file in filter(None, files):
        try:
            text = file.read_text(encoding="utf-8").strip().replace(placeholder, "{}")
            check_templates([text])
        except ValueError as error:
            raise ValueError(f"the caption {file}: {error}, or {placeholder} once") from error
        found.append(text)
    return tuple(found)


def _pixels(image: str | Path | Image.Image, index: int, size: int) -> Tensor:
    name = f"image {index}" if isinstance(image, Image.Image) else str(image)
    try:
        square = flattened(read_image(image), size=size)
    except ValueError as error:
        raise ValueError(f"{name} cannot be read as an image: {error}") from error
    return to_tensor(square).float() / 255


def check_placeholder(
    tokenizer: Any, placeholder: str, texts: Sequence[str] = (), vectors: int = 1
) -> None:
    """Raise ValueError unless `placeholder` is a new word that no other word contains.

    Tokenizers look for added tokens inside words: "cat" as a placeholder would also replace a part
    of "concatenate".
    """
    check_name(placeholder)
    check_spelling(tokenizer, placeholder, vectors)
    words = {word.removesuffix("</w>") for word in tokenizer.get_vocab()}
    hint = f"choose another, for instance '<my-{placeholder.strip('<>')}>'"
    written = placeholder.lower()
    if placeholder in words or written in words:
        raise ValueError(f"the placeholder {placeholder!r} is already in the vocabulary: {hint}")
    inside = [word for word in words if written in word.lower()]
    inside += [word for text in texts for word in text.split() if written in word.lower()]
    if inside:
        raise ValueError(
            f"the placeholder {placeholder!r} is inside another word, {sorted(inside)[0]!r}: {hint}"
        )
    parts = [word for word in tokenizer.get_added_vocab() if word in placeholder]
    if parts:
        raise ValueError(f"the placeholder {placeholder!r} contains the token {parts[0]!r}: {hint}")


def initial_vector(tokenizer: Any, table: Tensor, initializer: str) -> Tensor:
    """Embedding (d,) of a class word, float32, on the CPU; ValueError unless it is one token."""
    pieces = tokenizer.tokenize(initializer)
    if len(pieces) != 1:
        raise ValueError(
            f"the initializer {initializer!r} is {len(pieces)} tokens ({', '.join(pieces)}): "
            "choose a word that is one token"
        )
    index = tokenizer.convert_tokens_to_ids(pieces[0])
    if index == tokenizer.unk_token_id:
        raise ValueError(f"the initializer {initializer!r} is not in the vocabulary")
    return table[index].detach().float().cpu().clone()


def known_word(tokenizer: Any, table: Tensor, vector: Tensor) -> str:
    """The word of the vocabulary that has this embedding (d,); "wor…" if it is a piece of one.

    Raises:
        LookupError: there is none.
    """
    wanted = vector.to(table.device)
    for index in (table[:, 0].float() == wanted[0]).nonzero().flatten().tolist():
        if torch.equal(table[index].float(), wanted):
            piece = tokenizer.convert_ids_to_tokens(index)
            if piece is None:  # tables may be longer than the vocabulary
                return f"[row {index}]"
            return piece.removesuffix("</w>") if piece.endswith("</w>") else f"{piece}…"
    raise LookupError("no word of the vocabulary has this embedding")


def starting_point(initializer: str | Path | Tensor) -> str | Tensor:
    """Where a run begins: a class word, or embeddings, also those of a token file."""
    if isinstance(initializer, Tensor):
        return initializer
    if isinstance(initializer, str) and not initializer.endswith(".safetensors"):
        return initializer
    return torch.cat([part.float() for part in load_token(initializer)[1]], 1)


def check_templates(templates: Sequence[str]) -> None:
    """Raise ValueError unless there are templates and each has exactly one {}."""
    if not templates:
        raise ValueError("no prompt templates")
    for template in templates:
        if re.fullmatch(r"[^{}]*\{\}[^{}]*", template) is None:
            raise ValueError(
                f"a prompt template needs exactly one {{}} and no other braces, got {template!r}"
            )


def extended(tokenizer: Any, placeholder: str, vectors: int) -> Any:
    """A copy of the tokenizer in which the names of the vectors are tokens."""
    result = copy.deepcopy(tokenizer)
    result.add_tokens(token_names(placeholder, vectors))
    return result


def prompt_ids(tokenizer: Any, prompts: Sequence[str], placeholder: str, vectors: int) -> Tensor:
    """Token ids (N, L) of prompts with {}; ValueError if the placeholder would be cut off.

    The tokenizer is an `extended` one.
    """
    names = token_names(placeholder, vectors)
    texts = [prompt.format(" ".join(names)) for prompt in prompts]
    ids = tokenizer(
        texts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    wanted = tokenizer.convert_tokens_to_ids(names)
    for prompt, row in zip(prompts, ids.tolist(), strict=True):
        if [i for i in row if i in wanted] != wanted:
            raise ValueError(
                f"the placeholder does not fit into {tokenizer.model_max_length} tokens: {prompt!r}"
            )
    return ids


def stratified_timesteps(low: int, high: int, count: int, draw: torch.Generator) -> Tensor:
    """One timestep from each of `count` equal parts of low, ..., high - 1, rising, int64."""
    places = (torch.arange(count) + torch.rand(count, generator=draw)) / count
    return low + (places * (high - low)).long().clamp(max=high - low - 1)


def read_sources(
    tokenizers: Sequence[Any],
    side: int,
    images: Sequence[tuple[Images, Sequence[str] | None]],
    templates: Sequence[str],
    placeholder: str,
    vectors: int,
) -> tuple[list[Source], list[tuple[str, ...]]]:
    """Pictures with their prompts, all checked, and what messages call the pictures.

    Args:
        tokenizers: The pipeline's, without the placeholder.
        side: To which pictures are brought, in pixels.
        images: Of the run and, if there are any, held-out ones, each with prompts of their own;
            without these, with captions beside the pictures, or with the templates.
        templates: Prompts with {}.
        placeholder: The new word.
        vectors: Its embeddings.

    Raises:
        ValueError: anything that cannot be used.
        FileNotFoundError: a folder does not exist.
    """
    check_templates(templates)
    listed = [list_images(pictures) for pictures, _ in images]
    given: list[Sequence[str] | None] = []
    for pictures, (_, prompts) in zip(listed, images, strict=True):
        if prompts is not None:
            check_templates(prompts)
            if len(prompts) != len(pictures):
                raise ValueError(
                    f"{len(pictures)} images and {len(prompts)} prompts: give one for each"
                )
        given.append(captions(pictures, placeholder) if prompts is None else prompts)
    if images[0][1] is None and None not in given and tuple(templates) != TEMPLATES:
        raise ValueError("the pictures have captions beside them, and templates are given")
    texts = [text for own in given for text in own or templates]
    for tokenizer in tokenizers:
        check_placeholder(tokenizer, placeholder, texts, vectors)
    copies = [extended(tokenizer, placeholder, vectors) for tokenizer in tokenizers]
    sources: list[Source] = []
    for pictures, own in zip(listed, given, strict=True):
        ids = tuple(prompt_ids(t, own or templates, placeholder, vectors) for t in copies)
        sources.append((load_images(pictures, side), ids, own is not None))
    return sources, [picture_names(pictures) for pictures in listed]


class TokenData:
    """Pictures, encoded once, and the batches that `plan` asks for; `seed` is of all draws.

    `names` are what messages call the pictures; `progress` shows a bar.
    """

    def __init__(
        self,
        networks: DiffusionTokenLoss,
        source: Source,
        plan: Recipe,
        seed: int,
        names: Sequence[str] = (),
        progress: bool = False,
    ) -> None:
        pixels, self.ids, self.paired = source
        self.names = names or [f"image {i}" for i in range(len(pixels))]
        self.networks, self.plan, self.seed = networks, plan, seed
        self.window = plan.timesteps_low, plan.timesteps_high
        self.latents = networks.encode(pixels, progress)
        if not (finite := self.latents.flatten(1).isfinite().all(1)).all():
            first = self.names[int(finite.int().argmin())]
            raise ValueError(f"the autoencoder gives no finite latents for {first}")

    @functools.cached_property
    def pool(self) -> TokenBatch:
        """All rows of the fixed pool."""
        draw = generator(self.seed, "pool")
        times = stratified_timesteps(*self.window, self.plan.pool, draw)
        return self._rows(times, draw, self.seed)

    def batch(self, step: int) -> TokenBatch:
        """The batch of a step.

        From the pool: every pass takes each row once; the rows of a batch lie equally far apart in
        timestep. Fresh: picture, prompt, timestep and noise follow from the seed and the step.
        """
        size, key = self.plan.batch, (self.seed, "fresh", step)
        if not self.plan.pool:
            draw = generator(*key)
            times = torch.randint(*self.window, (size,), generator=draw)
            return self._rows(times, draw, *key)
        stride = self.plan.pool // size
        turn, place = divmod(step, stride)
        order = torch.randperm(stride, generator=generator(self.seed, "order", turn))
        return self.pool.rows(int(order[place]) + stride * torch.arange(size))

    def held_out(self, rows: int) -> TokenBatch:
        """Fixed rows over all timesteps, their noise unlike that of training."""
        draw = generator(self.seed, "held out")
        levels = len(self.networks.pipe.scheduler.alphas_cumprod)
        times = stratified_timesteps(0, levels, rows, draw)
        return self._rows(times, draw, self.seed, "held out")

    def _rows(self, times: Tensor, draw: torch.Generator, *key: int | str) -> TokenBatch:
        """Rows at the given timesteps: all pictures equally often, in random order."""
        count, latents = len(times), self.latents
        order = torch.randperm(count, generator=draw)
        # Fewer rows than pictures: an independent draw, else the first ones alone would be taken.
        pictures = order % len(latents)
        if count < len(latents):
            pictures = torch.randint(len(latents), (count,), generator=draw)
        texts = pictures
        if not self.paired:
            texts = torch.randint(len(self.ids[0]), (count,), generator=draw)
        chosen = tuple(i[texts] for i in self.ids)
        names = tuple(self.names[i] for i in pictures.tolist())
        rows = latents[pictures.to(latents.device)]
        return self.networks.batch(rows, times, chosen, *key, pictures=names)
