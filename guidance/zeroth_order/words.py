r"""Known words as starting points, compared on a few losses.

A descent of a few hundred losses does not get far from where it begins, and the word a user gives
is seldom the best beginning. Words of the vocabulary are compared with it by sequential halving:
all of them on one batch, the better ones on more. Every step evaluates the class word together with
a group of others on one batch, so that batches that are easy or hard for all words cancel; a word's
score is its mean difference to the class word. The mean of the class word and the best few words
that are better than it is less of an accident than the single best, and keeps something of what
the user said.

References:
    Karnin, Koren & Somekh, "Almost Optimal Exploration in Multi-Armed Bandits", ICML 2013
    (sequential halving).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .estimates import generator
from .search import Descent, GradientSearch

# Of each round: groups of words that go on to it (None is all), batches for each of them.
ROUNDS = ((None, 1), (2, 2), (1, 6))
MERGED = 3  # words in the result, at most, beside the class word


def candidate_words(tables: list[Tensor], centre: Tensor, count: int, seed: int) -> Tensor:
    """Words to compare: the half nearest to the class word by cosine, then others at random.

    Args:
        tables: Embeddings of the vocabulary for each text encoder, with shapes (V, width); a word
            has the same number in all of them.
        centre: Embedding of the class word, with shape (d,); d is the sum of the widths.
        count: Words, W; of a smaller vocabulary all but the class word.
        seed: Seed of the random ones.

    Returns:
        Shape (W, d), float32, on the CPU. The class word is not among them.
    """
    size = min(len(table) for table in tables)
    count = min(count, size - 1)
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


class WordSearch(GradientSearch):
    """Sequential halving over words, then a descent from the best of them.

    A step of the comparison takes as many points as one of the descent.

    Args:
        initial: The class word, with shape (d,).
        words: The others, with shape (W, d).
        settings, seed: Of the descent.
    """

    def __init__(self, initial: Tensor, words: Tensor, settings: Descent, seed: int = 0) -> None:
        super().__init__(initial, settings, seed)
        self._initial, self._words = self.state["iterate"], words.float().cpu()
        self.state |= {
            "alive": torch.arange(len(words)),
            "sum": torch.zeros(len(words), dtype=torch.float64),
            "evaluated": torch.zeros(len(words), dtype=torch.int64),
            "round": torch.tensor(0),
            "place": torch.tensor(0),
        }

    def _steps(self) -> list[Tensor]:
        """The words of each step of this round."""
        groups = self.state["alive"].split(self.settings.directions)
        return list(groups) * ROUNDS[self.state["round"]][1]

    def _ranked(self) -> Tensor:
        """The words of this round, best first; those without a loss yet come last."""
        score = (self.state["sum"] / self.state["evaluated"]).nan_to_num(nan=torch.inf)
        return self.state["alive"][score[self.state["alive"]].argsort(stable=True)]

    @property
    def done(self) -> bool:
        """Whether all rounds are over, and the descent goes on."""
        return int(self.state["round"]) == len(ROUNDS)

    @property
    def value(self) -> Tensor:
        """Mean of the class word and the best of those that beat it; later the descent's."""
        if self.done:
            return super().value
        best = self._ranked()[:MERGED]
        best = best[self.state["sum"][best] < 0]
        return torch.cat([self._initial[None], self._words[best]]).mean(0)

    def ask(self) -> Tensor:
        """The points of the next step, with shape (K, d), float32; the class word comes first."""
        if self.done:
            return super().ask()
        words = self._steps()[self.state["place"]]
        return torch.cat([self._initial[None], self._words[words]])

    def tell(self, losses: Tensor) -> None:
        """Take the step; `losses`, with shape (K,), belong to the points of `ask`.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        if self.done:
            super().tell(losses)
            return
        if not losses.isfinite().all():
            raise FloatingPointError(f"losses of known words are not finite: {losses}")
        state, steps = self.state, self._steps()
        words = steps[state["place"]]
        state["sum"][words] += (losses[1:] - losses[0]).double()
        state["evaluated"][words] += 1
        state["place"] = (state["place"] + 1) % len(steps)
        if state["place"] > 0:
            return
        best = self.value
        state["round"] = state["round"] + 1
        if self.done:
            state["iterate"] = best
        elif (groups := ROUNDS[state["round"]][0]) is not None:
            state["alive"] = self._ranked()[: groups * self.settings.directions]
