"""The rows a token is trained and judged on: pictures, prompts, timesteps and noise."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...guidance.zeroth_order import generator
from .loss import DiffusionTokenLoss, TokenBatch
from .recipes import Recipe

Source = tuple[Tensor, tuple[Tensor, ...], bool]


def stratified_timesteps(low: int, high: int, count: int, draw: torch.Generator) -> Tensor:
    """One timestep from each of `count` equal parts of low, ..., high - 1, rising, int64."""
    places = (torch.arange(count) + torch.rand(count, generator=draw)) / count
    return low + (places * (high - low)).long().clamp(max=high - low - 1)


class TokenData:
    """Pictures, encoded once, and the batches made of them.

    Args:
        networks: Encodes the pictures and adds the noise.
        source: Pictures (N, 3, H, W), prompt ids, and whether prompts belong to pictures.
        plan: Its pool, batch and timesteps.
        seed: Of all draws.
    """

    def __init__(
        self, networks: DiffusionTokenLoss, source: Source, plan: Recipe, seed: int
    ) -> None:
        pixels, self.ids, self.paired = source
        self.networks, self.plan, self.seed = networks, plan, seed
        self.window = plan.timesteps_low, plan.timesteps_high
        self.latents = networks.encode(pixels)

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
        return self.networks.batch(latents[pictures.to(latents.device)], times, chosen, *key)
