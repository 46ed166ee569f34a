"""The rows a token is trained and judged on: pictures, prompts, timesteps and noise."""

from __future__ import annotations

import torch
from torch import Tensor

from ...guidance.zeroth_order import PartialUniformTimesteps, generator
from .loss import DiffusionTokenLoss, TokenBatch
from .recipes import Recipe


class TokenData:
    """The batches of a run: latents encoded once, then a fixed pool or fresh draws.

    Args:
        networks: Encodes the pictures and adds the noise.
        source: Pictures (N, 3, H, W), prompt ids, and whether prompts belong to pictures.
        plan: Its pool, batch and timesteps.
        seed: Of all draws.
    """

    def __init__(
        self,
        networks: DiffusionTokenLoss,
        source: tuple[Tensor, tuple[Tensor, ...], bool],
        plan: Recipe,
        seed: int,
    ) -> None:
        pixels, self.ids, self.paired = source
        self.networks, self.plan, self.seed = networks, plan, seed
        self.latents = networks.encode(pixels)
        self.pool = None
        if plan.pool:
            draw = generator(seed, "pool")
            times = plan.timesteps().stratified(plan.pool, draw)
            self.pool = _rows(networks, self.latents, self.ids, self.paired, times, draw, seed)

    def batch(self, step: int) -> TokenBatch:
        """The batch of a step.

        From the pool: every pass takes each row once; the rows of a batch lie equally far apart in
        timestep. Fresh: picture, prompt, timestep and noise follow from the seed and the step.
        """
        size = self.plan.batch
        if self.pool is None:
            draw = generator(self.seed, "fresh", step)
            times = self.plan.timesteps().sample(size, draw)
            key = (self.seed, "fresh", step)
            return _rows(self.networks, self.latents, self.ids, self.paired, times, draw, *key)
        stride = self.plan.pool // size
        turn, place = divmod(step, stride)
        order = torch.randperm(stride, generator=generator(self.seed, "order", turn))
        return self.pool.rows(int(order[place]) + stride * torch.arange(size))


def held_out_batch(
    networks: DiffusionTokenLoss,
    source: tuple[Tensor, tuple[Tensor, ...], bool],
    rows: int,
    seed: int,
) -> TokenBatch:
    """Fixed rows over all timesteps, their noise unlike that of training."""
    pixels, ids, paired = source
    draw = generator(seed, "held out")
    levels = len(networks.pipe.scheduler.alphas_cumprod)
    times = PartialUniformTimesteps(0, levels).stratified(rows, draw)
    return _rows(networks, networks.encode(pixels), ids, paired, times, draw, seed, "held out")


def _rows(
    networks: DiffusionTokenLoss,
    latents: Tensor,
    ids: tuple[Tensor, ...],
    paired: bool,
    times: Tensor,
    draw: torch.Generator,
    *key: int | str,
) -> TokenBatch:
    """Rows at the given timesteps: all pictures equally often, in random order."""
    count = len(times)
    order = torch.randperm(count, generator=draw)
    # Fewer rows than pictures: an independent draw, else the first pictures alone would be taken.
    pictures = order % len(latents)
    if count < len(latents):
        pictures = torch.randint(len(latents), (count,), generator=draw)
    texts = pictures if paired else torch.randint(len(ids[0]), (count,), generator=draw)
    chosen = tuple(i[texts] for i in ids)
    return networks.batch(latents[pictures.to(latents.device)], times, chosen, *key)
