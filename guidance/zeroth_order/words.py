r"""Known words as starting points, compared on a few losses.

A descent of a few hundred losses does not get far from where it begins, and the word a user gives
is seldom the best beginning. Words of the vocabulary are compared with it by sequential halving:
all of them on one batch, the better ones on more. Every step evaluates the class word together with
a group of others on one batch, so that batches that are easy or hard for all words cancel; a word's
score is its mean difference to the class word. The mean of the best few words that are better than
the class word is less of an accident than the single best.

References:
    Karnin, Koren & Somekh, "Almost Optimal Exploration in Multi-Armed Bandits", ICML 2013
    (sequential halving).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .perturbations import generator

# Of each round: groups of words that go on to it (None is all), batches for each of them.
ROUNDS = ((None, 1), (2, 2), (1, 6))
MERGED = 3  # words in the result, at most


def candidate_words(tables: list[Tensor], centre: Tensor, count: int, seed: int) -> Tensor:
    """Words to compare: the half nearest to the class word by cosine, then others at random.

    Args:
        tables: Embeddings of the vocabulary for each text encoder, with shapes (V, width); a word
            has the same number in all of them.
        centre: Embedding of the class word, with shape (d,); d is the sum of the widths.
        count: Words, W.
        seed: Seed of the random ones.

    Returns:
        Shape (W, d), float32, on the CPU. The class word is not among them.

    Raises:
        ValueError: the vocabulary has fewer words.
    """
    size = min(len(table) for table in tables)
    if not 1 <= count < size:
        raise ValueError(f"cannot compare {count} words of a vocabulary of {size}")
    product, square = torch.zeros(size), torch.zeros(size)
    for table, part in zip(tables, centre.split([t.shape[1] for t in tables]), strict=True):
        known = table[:size].detach()
        product += (known @ part.to(known)).float().cpu()
        square += known.norm(dim=1).float().cpu() ** 2
    order = (product / square.sqrt().clamp(min=1e-12)).argsort(descending=True, stable=True)
    near, far = order[1 : 1 + count // 2], order[1 + count // 2 :]
    drawn = far[torch.randperm(len(far), generator=generator(seed, "words"))[: count - len(near)]]
    chosen = torch.cat([near, drawn])
    return torch.cat([table[chosen.to(table.device)].float().cpu() for table in tables], 1)


class WordSearch:
    """Sequential halving over words.

    Args:
        initial: The class word, with shape (d,).
        words: The others, with shape (W, d).
        group: Words of a step beside the class word.
    """

    def __init__(self, initial: Tensor, words: Tensor, group: int) -> None:
        self._initial, self._words = initial.detach().float().cpu(), words.float().cpu()
        self._group = group
        self._alive = torch.arange(len(words))
        self._sum = torch.zeros(len(words), dtype=torch.float64)
        self._counts = torch.zeros(len(words), dtype=torch.int64)
        self._round, self._place = 0, 0

    def _steps(self) -> list[Tensor]:
        """The words of each step of this round."""
        return list(self._alive.split(self._group)) * ROUNDS[self._round][1]

    def _ranked(self) -> Tensor:
        """The words of this round, best first; those without a loss yet come last."""
        score = (self._sum / self._counts).nan_to_num(nan=torch.inf)[self._alive]
        return self._alive[score.argsort(stable=True)]

    @property
    def done(self) -> bool:
        """Whether all rounds are over."""
        return self._round == len(ROUNDS)

    @property
    def value(self) -> Tensor:
        """Mean of the best words that are better than the class word; it itself if none is."""
        best = self._ranked()[:MERGED]
        best = best[self._sum[best] < 0]
        return self._words[best].mean(0) if len(best) else self._initial

    def ask(self) -> Tensor:
        """See `Search`; the class word comes first."""
        return torch.cat([self._initial[None], self._words[self._steps()[self._place]]])

    def tell(self, losses: Tensor) -> None:
        """See `Search`."""
        if not losses.isfinite().all():
            raise FloatingPointError(f"losses of known words are not finite: {losses}")
        steps = self._steps()
        words = steps[self._place]
        self._sum[words] += (losses[1:] - losses[0]).double()
        self._counts[words] += 1
        self._place += 1
        if self._place == len(steps):
            self._round, self._place = self._round + 1, 0
            groups = None if self.done else ROUNDS[self._round][0]
            if groups is not None:
                self._alive = self._ranked()[: groups * self._group]

    def state_dict(self) -> dict[str, Tensor]:
        """See `Search`."""
        return {
            "alive": self._alive,
            "sum": self._sum,
            "counts": self._counts,
            "at": torch.tensor([self._round, self._place]),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Search`."""
        self._alive, self._sum, self._counts = state["alive"], state["sum"], state["counts"]
        self._round, self._place = state["at"].tolist()
