"""The loss of a token: the denoising error of a pipeline whose prompts contain it.

Any callable ``loss(embeddings, batch) -> losses`` can be personalized; `DiffusionTokenLoss` is the
one for Stable Diffusion 1, 2 and XL. All K embeddings of a call share the images, timesteps and
noise of the batch (common random numbers) and go through each network in one call of K * B rows.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ...guidance.files import fingerprint
from ...guidance.zeroth_order import generator
from ..fitting.identity import network_hash
from ..seam.noise_levels import prediction_type_of
from .files import text_encoders


@dataclass(frozen=True)
class TokenBatch:
    """What the K losses of a step have in common.

    Args:
        noisy: x_t, with shape (B, C, H, W), float32.
        timesteps: t, with shape (B,), int64.
        targets: What the network should predict, with the shape of `noisy`, float32.
        ids: Prompts as token ids for each text encoder, with shape (B, L), int64. Ids from the
            size of the vocabulary on stand for the learned vectors, the first one first.
        pictures: What messages call the picture of each row; B names or none.
    """

    noisy: Tensor
    timesteps: Tensor
    targets: Tensor
    ids: tuple[Tensor, ...]
    pictures: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.noisy)

    def rows(self, chosen: slice | Tensor) -> TokenBatch:
        """The rows of a slice, of a mask (B,), or with these indices in their order."""
        ids = tuple(x[chosen] for x in self.ids)
        names = self.pictures and tuple(
            self.pictures[i] for i in torch.arange(len(self))[chosen].tolist()
        )
        noisy, timesteps, targets = self.noisy, self.timesteps, self.targets
        return TokenBatch(noisy[chosen], timesteps[chosen], targets[chosen], ids, names)

    @property
    def names(self) -> list[str]:
        """What messages call the rows: picture and timestep."""
        pictures = self.pictures or [f"row {i}" for i in range(len(self))]
        times = self.timesteps.tolist()
        return [f"{name} at timestep {t}" for name, t in zip(pictures, times, strict=True)]


# (K, m, d) embeddings of m vectors, and what they have in common -> (K,) losses, float32.
TokenLoss = Callable[[Tensor, TokenBatch], Tensor]


@contextlib.contextmanager
def injected(table: nn.Module, vocabulary: int, vectors: Tensor) -> Iterator[None]:
    """Within this context ids from `vocabulary` on are looked up in `vectors`.

    Args:
        table: The text encoder's input embedding; it is not copied or changed.
        vocabulary: Ids below are the table's own.
        vectors: With shape (K, m, d). A call of the table with R rows of ids belongs to the K
            embeddings in K equal, consecutive parts.
    """
    asked: list[Tensor] = []

    def before(_module: nn.Module, args: tuple) -> tuple:
        asked.append(args[0])
        return (args[0].where(args[0] < vocabulary, 0), *args[1:])

    def after(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        ids = asked.pop()
        per_row = vectors.repeat_interleave(len(ids) // len(vectors), dim=0)
        place = (ids - vocabulary).clamp(min=0)
        index = place[..., None].expand(*place.shape, vectors.shape[-1])
        own = per_row.to(output).gather(1, index)
        return torch.where((ids >= vocabulary)[..., None], own, output)

    handles = [table.register_forward_pre_hook(before), table.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adapters(network: nn.Module) -> str | None:
    """A fingerprint of which LoRA adapters act how strongly (weights apart); None without any."""
    found = {
        name: [sorted(layer.active_adapters), layer.disable_adapters, layer.scaling]
        for name, layer in network.named_modules()
        if hasattr(layer, "scaling") and hasattr(layer, "active_adapters")
    }
    return fingerprint(found) if found else None


class DiffusionTokenLoss:
    """Mean squared error of the denoiser's prediction, for K tokens in one call of each network.

    Args:
        pipe: A pipeline of the Stable Diffusion 1, 2 or XL family, quantized or not.
        max_rows: Most rows (tokens times pictures) of one network call; 0 is no limit. What has
            more is evaluated in several calls, also the pictures of one token.

    What does not depend on the token (the timestep embedding, the layers before the first
    cross-attention) is computed for every row: sharing it would need the UNet's inside.

    Raises:
        ValueError: the pipeline is of another family, its scheduler's noise levels are not known,
            or weights are not in memory (sequential offloading; whole models may be offloaded).
    """

    def __init__(self, pipe: Any, max_rows: int = 0) -> None:
        parts = text_encoders(pipe)
        self.encoders = {f"text_encoder{suffix}": encoder for suffix, encoder, _ in parts}
        self.xl = len(parts) == 2
        missing = [n for n in ("unet", "vae", "scheduler", "tokenizer") if not hasattr(pipe, n)]
        known = all(hasattr(e, "get_input_embeddings") for e in self.encoders.values())
        if missing or not parts or not known or hasattr(pipe, "text_encoder_3"):
            raise ValueError(
                f"{type(pipe).__name__} cannot be personalized: expected a pipeline of the Stable "
                "Diffusion 1, 2 or XL family (unet, vae, one or two CLIP text encoders)"
            )
        if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
            raise ValueError(
                f"the UNet of {type(pipe).__name__} takes {pipe.unet.config.in_channels} channels, "
                f"not the {pipe.vae.config.latent_channels} of the latents: use a text-to-image "
                "pipeline"
            )
        self.pipe, self.max_rows = pipe, max_rows
        self.tables = [encoder.get_input_embeddings() for encoder in self.encoders.values()]
        self.widths = tuple(table.weight.shape[1] for table in self.tables)
        self.vocabularies = tuple(len(tokenizer) for _, _, tokenizer in parts)
        self.pixels_per_latent = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        self.prediction = prediction_type_of(pipe.scheduler)
        if self.prediction == "flow" or not hasattr(pipe.scheduler, "alphas_cumprod"):
            raise ValueError(f"{type(pipe.scheduler).__name__} has no table of noise levels")
        for name, network in {**self.encoders, "vae": pipe.vae, "unet": pipe.unet}.items():
            weights = network.parameters() if isinstance(network, nn.Module) else ()
            if any(parameter.is_meta for parameter in weights):
                raise ValueError(
                    f"weights of {name} are not in memory (sequential offloading): load the "
                    "pipeline without it; enable_model_cpu_offload(), int8 weights and max_rows=2 "
                    "save memory as well"
                )

    @property
    def identity(self) -> dict[str, Any]:
        """What losses depend on beside token and batch, for JSON; ValueError for meta weights."""
        parts = {"unet": self.pipe.unet, "vae": self.pipe.vae, **self.encoders}
        hashes = {name: network_hash(part, name) for name, part in parts.items()}
        dtype = str(self.pipe.unet.dtype).removeprefix("torch.")
        adapters = {name: settings for name, part in parts.items() if (settings := _adapters(part))}
        levels = self.pipe.scheduler.alphas_cumprod.cpu().numpy().tobytes()
        digest = hashlib.sha256(levels).hexdigest()
        found = {"dtype": dtype, "prediction_type": self.prediction, "noise levels": digest}
        return {**hashes, **found} | ({"adapters": adapters} if adapters else {})

    @property
    def device(self) -> torch.device:
        """Where the networks run, also if they lie elsewhere between calls (offloading)."""
        return getattr(self.pipe, "_execution_device", self.pipe.unet.device)

    @torch.no_grad()
    def encode(self, images: Tensor, progress: bool = False) -> Tensor:
        """Scaled latents, with shape (N, C, h, w), float32, of pictures (N, 3, H, W) in [0, 1].

        Each picture is encoded once, alone; the mean of the autoencoder's distribution is taken.
        `progress` shows a bar.
        """
        vae, rows = self.pipe.vae, []
        mean, std = (vae.config.get(f"latents_{name}") for name in ("mean", "std"))
        upcast = vae.dtype == torch.float16  # in which some autoencoders (SDXL's) overflow
        if upcast:
            vae.to(torch.float32)
        for image in tqdm(images, "encoding", unit="picture", disable=not progress):
            pixels = (2 * image[None] - 1).to(self.device, vae.dtype)
            rows.append(vae.encode(pixels).latent_dist.mean.float())
        if upcast:
            vae.to(torch.float16)
        latents = torch.cat(rows)
        if self.xl and mean is not None and std is not None:  # as StableDiffusionXLPipeline decodes
            mean, std = (torch.tensor(v).view(1, -1, 1, 1).to(latents) for v in (mean, std))
            return (latents - mean) * vae.config.scaling_factor / std
        return (latents - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor

    def batch(
        self,
        latents: Tensor,
        timesteps: Tensor,
        ids: tuple[Tensor, ...],
        *key: int | str,
        pictures: tuple[str, ...] = (),
    ) -> TokenBatch:
        """Noised latents (B, C, h, w) at timesteps (B,); row i takes its noise from (key, i)."""
        noise = torch.stack(
            [torch.randn(x.shape, generator=generator(*key, i)) for i, x in enumerate(latents)]
        ).to(latents)
        square = self.pipe.scheduler.alphas_cumprod.to(latents)[timesteps.to(latents.device)]
        alpha, sigma = (s.sqrt().view(-1, 1, 1, 1) for s in (square, 1 - square))
        targets = {
            "epsilon": noise,
            "v_prediction": alpha * noise - sigma * latents,
            "sample": latents,
        }
        noisy, device = alpha * latents + sigma * noise, latents.device
        ids = tuple(i.to(device) for i in ids)
        target = targets[self.prediction]
        return TokenBatch(noisy, timesteps.to(device), target, ids, pictures)

    def conditions(
        self, embeddings: Tensor, ids: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states (K * B, L, D) and, for XL, pooled states, for K tokens and B prompts."""
        count, hidden, pooled = len(embeddings), [], None
        parts = embeddings.to(self.device).split(self.widths, dim=-1)
        for encoder, table, size, vectors, one in zip(
            self.encoders.values(), self.tables, self.vocabularies, parts, ids, strict=True
        ):
            rows = one.repeat(count, 1)
            mask = None
            if not self.xl and getattr(encoder.config, "use_attention_mask", False):
                # The tokenizer's: everything behind the first end of the text is padding.
                ends = rows == self.pipe.tokenizer.eos_token_id
                mask = (ends.cumsum(1) - ends.long() == 0).long()
            with injected(table, size, vectors):
                out = encoder(rows, attention_mask=mask, output_hidden_states=self.xl)
            hidden.append(out.hidden_states[-2] if self.xl else out[0])
            pooled = out[0] if self.xl else None
        return torch.cat(hidden, dim=-1), pooled

    def __call__(self, embeddings: Tensor, batch: TokenBatch) -> Tensor:
        """Losses (K,), float32, of embeddings (K, m, d); d is the sum of the encoders' widths.

        Gradients flow to the embeddings where they are asked for (they are not, here).

        Raises:
            ValueError: the embeddings have another width.
        """
        if embeddings.ndim != 3 or embeddings.shape[-1] != sum(self.widths):
            raise ValueError(
                f"expected embeddings (K, m, {sum(self.widths)}), got {tuple(embeddings.shape)}"
            )
        if not self.max_rows:
            return self._losses(embeddings, batch)
        pictures = min(self.max_rows, len(batch))
        losses = torch.zeros(len(embeddings), device=self.device)
        for start in range(0, len(batch), pictures):
            rows = batch.rows(slice(start, start + pictures))
            tokens = embeddings.split(self.max_rows // len(rows))
            parts = [self._losses(part, rows) for part in tokens]
            losses = losses + torch.cat(parts) * (len(rows) / len(batch))
        return losses

    def _losses(self, embeddings: Tensor, batch: TokenBatch) -> Tensor:
        error = (
            self.predict(embeddings, batch).float().unflatten(0, (len(embeddings), -1))
            - batch.targets
        )
        return error.square().flatten(1).mean(1)

    def predict(self, embeddings: Tensor, batch: TokenBatch) -> Tensor:
        """The denoiser's output (K * B, C, H, W) for K tokens and B pictures, in one call."""
        unet, count = self.pipe.unet, len(embeddings)
        hidden, pooled = self.conditions(embeddings, batch.ids)
        noisy = batch.noisy.to(unet.dtype).repeat(count, 1, 1, 1)
        added = None
        if pooled is not None:
            height, width = (side * self.pixels_per_latent for side in batch.noisy.shape[-2:])
            sizes = torch.tensor([height, width, 0, 0, height, width])
            sizes = sizes.to(pooled).repeat(len(noisy), 1)
            added = {"text_embeds": pooled.to(unet.dtype), "time_ids": sizes}
        return unet(
            noisy,
            batch.timesteps.repeat(count),
            encoder_hidden_states=hidden.to(unet.dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
