r"""CMA-ES: a search distribution N(m, sigma^2 C) that learns the shape of the loss from ranks.

Weighted recombination of the better half, cumulative step-size adaptation, rank-one and rank-mu
updates of the covariance; all constants are Hansen's defaults. Only the order of the losses counts.

References:
    Hansen, "The CMA Evolution Strategy: A Tutorial", https://arxiv.org/abs/1604.00772
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .perturbations import perturbations


class CMAES:
    """An evolution strategy in a few dozen dimensions, in float64 on the CPU.

    Args:
        mean: Where to begin, with shape (d,).
        sigma: Standard deviation of the first generation, in units of `mean`.
        population: Points of a generation, at least 4; 0 means 4 + floor(3 ln d).
        seed: The points of a generation follow from (seed, generation, index).

    Raises:
        ValueError: sigma is not positive, or the population is too small.
    """

    def __init__(self, mean: Tensor, sigma: float, population: int = 0, seed: int = 0) -> None:
        size = mean.numel()
        self.population = population or 4 + int(3 * math.log(size))
        if self.population < 4:
            raise ValueError(f"CMAES: the population must be at least 4, got {population}")
        if not sigma > 0:
            raise ValueError(f"CMAES: sigma must be positive, got {sigma}")
        self.seed = seed
        half = self.population // 2
        ranks = torch.arange(1, half + 1, dtype=torch.float64)
        weights = math.log((self.population + 1) / 2) - ranks.log()
        self.weights = weights / weights.sum()
        self.effective = 1 / self.weights.square().sum().item()
        e, d = self.effective, size
        self.c_path = (4 + e / d) / (d + 4 + 2 * e / d)
        self.c_sigma = (e + 2) / (d + e + 5)
        self.c_one = 2 / ((d + 1.3) ** 2 + e)
        self.c_mu = min(1 - self.c_one, 2 * (e - 2 + 1 / e) / ((d + 2) ** 2 + e))
        self.damping = 1 + 2 * max(0.0, math.sqrt((e - 1) / (d + 1)) - 1) + self.c_sigma
        self.expected = math.sqrt(d) * (1 - 1 / (4 * d) + 1 / (21 * d * d))
        zeros = torch.zeros(size, dtype=torch.float64)
        self.state = {
            "mean": mean.detach().double().cpu().flatten().clone(),
            "sigma": torch.tensor(float(sigma), dtype=torch.float64),
            "covariance": torch.eye(size, dtype=torch.float64),
            "path_c": zeros.clone(),
            "path_sigma": zeros.clone(),
            "generation": torch.tensor(0),
        }

    @property
    def mean(self) -> Tensor:
        """The centre of the search, with shape (d,), float64."""
        return self.state["mean"]

    def _root(self) -> tuple[Tensor, Tensor]:
        """C^(1/2) and C^(-1/2)."""
        values, vectors = torch.linalg.eigh(self.state["covariance"])
        scale = values.clamp(min=1e-20).sqrt()
        return vectors * scale @ vectors.T, vectors / scale @ vectors.T

    def _steps(self, root: Tensor) -> Tensor:
        generation = int(self.state["generation"])
        draws = perturbations(len(self.mean), self.seed, generation, range(self.population))
        return draws.double() @ root

    def ask(self) -> Tensor:
        """The points of this generation, with shape (population, d), float64."""
        return self.mean + self.state["sigma"] * self._steps(self._root()[0])

    def tell(self, losses: Tensor) -> None:
        """Move and reshape the distribution; `losses` belong to the points of `ask`."""
        if losses.shape != (self.population,):
            raise ValueError(f"expected {self.population} losses, got {tuple(losses.shape)}")
        s = self.state
        root, inverse = self._root()
        order = losses.double().cpu().argsort(stable=True)[: len(self.weights)]
        best = self._steps(root)[order]
        move = self.weights @ best
        c, generation = self.c_sigma, int(s["generation"]) + 1
        path = (1 - c) * s["path_sigma"]
        path = path + math.sqrt(c * (2 - c) * self.effective) * (inverse @ move)
        length = path.norm().item() / self.expected
        stalled = length / math.sqrt(1 - (1 - c) ** (2 * generation))
        going = float(stalled < 1.4 + 2 / (len(move) + 1))
        a = self.c_path
        path_c = (1 - a) * s["path_c"] + going * math.sqrt(a * (2 - a) * self.effective) * move
        lost = (1 - going) * a * (2 - a)
        covariance = (1 - self.c_one - self.c_mu + self.c_one * lost) * s["covariance"]
        covariance = covariance + self.c_one * path_c.outer(path_c)
        covariance = covariance + self.c_mu * (best.T * self.weights) @ best
        growth = math.exp(min(1.0, c / self.damping * (length - 1)))
        self.state = {
            "mean": s["mean"] + s["sigma"] * move,
            "sigma": s["sigma"] * growth,
            "covariance": (covariance + covariance.T) / 2,
            "path_c": path_c,
            "path_sigma": path,
            "generation": torch.tensor(generation),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The distribution and its paths, as tensors."""
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict`."""
        self.state = dict(state)
