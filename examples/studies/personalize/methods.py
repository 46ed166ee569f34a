"""How a token is learned and judged in ``python -m examples.studies.personalize``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from examples.studies.personalize.subjects import WORD, Subject
from pilotage.eval.metrics.images import to_tensor
from pilotage.pipelines.personalization.inputs import TokenData
from pilotage.pipelines.personalization.personalizer import Personalizer
from pilotage.pipelines.personalization.recipes import Recipe, recipe

HELD_OUT_ROWS = 16
UNSEEN_ROWS = 128
BATCH = 4  # of backpropagation
EVALUATIONS = 15
NOISES = 2  # pictures of a prompt
SAMPLING_STEPS = 10
GUIDANCE_SCALE = 3.0
SCRIPT_EPSILON = 1e-3


def script(rate: float, steps: int, width: int) -> Recipe:
    """ZOODiP with what its published script does and its text does not say, at a rate.

    The script's Adam has an epsilon of 1e-3, and divides estimates by sqrt((d + n - 1) / n).

    Args:
        rate: The script's is 1e-2, the text's 5e-3.
        steps: Of the run.
        width: d, elements of the token.
    """
    count = recipe("zoodip").directions
    epsilon = SCRIPT_EPSILON * math.sqrt((width + count - 1) / count)
    return recipe("zoodip", rate=rate, epsilon=epsilon, steps=steps)


def zeroth_order(
    personalizer: Personalizer, subject: Subject, plan: Recipe, seed: int = 0
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The token that was best at the looks at held-out rows, the last one, and what it took.

    All recipes are looked at equally often. What is kept flatters methods that move about a lot,
    which is why the last one is judged as well.
    """
    last = []
    token = personalizer.fit(
        subject.pictures[subject.train],
        WORD,
        subject.word,
        preset=plan,
        prompts=subject.prompts[subject.train],
        held_out=subject.pictures[subject.held_out],
        held_out_prompts=subject.prompts[subject.held_out],
        held_out_rows=HELD_OUT_ROWS,
        evaluate_every=max(1, plan.steps // EVALUATIONS),
        seed=seed,
        progress=False,
        callback=lambda trainer: (
            last.append(trainer.vectors) if trainer.step == plan.steps else None
        ),
    )
    return token.vectors, last[0], _record(token.evaluations)


@torch.no_grad()
def together(
    personalizer: Personalizer, subject: Subject, plans: Sequence[Recipe]
) -> list[tuple[Tensor, Tensor, dict[str, Any]]]:
    """`zeroth_order` of several recipes, equal to it but for rounding.

    Recipes that differ in nothing that batches depend on see the same rows at every step: all
    their points go through the network in one call, which takes less time than one call each.
    """
    networks, first, count = personalizer.networks, plans[0], len(plans)
    data = TokenData(networks, subject.data(personalizer.pipe, subject.train), first, seed=0)
    held = subject.data(personalizer.pipe, subject.held_out)
    judge = TokenData(networks, held, first, seed=0).held_out(HELD_OUT_ROWS)
    parts = [judge.rows(slice(i, i + 4)) for i in range(0, HELD_OUT_ROWS, 4)]
    initial = personalizer.initial_embeddings(subject.word, 1)
    tables = [table.weight for table in networks.tables]
    searches = [plan.build(initial, tables, seed=0) for plan in plans]
    best, least = initial.repeat(count, 1), torch.full((count,), torch.inf)
    evaluations: list[list[tuple[int, int, float]]] = [[] for _ in plans]
    for step in range(first.steps + 1):
        if step % max(1, first.steps // EVALUATIONS) == 0 or step == first.steps:
            values = torch.stack([search.value for search in searches])
            losses = torch.stack([networks(values[:, None], part) for part in parts]).mean(0)
            best = values.where((losses < least)[:, None], best)
            least = least.minimum(losses)
            for plan, own, loss in zip(plans, evaluations, losses.tolist(), strict=True):
                own.append((step, step * plan.evaluations * plan.batch, loss))
        if step < first.steps:
            points = [search.ask() for search in searches]
            losses = networks(torch.cat(points)[:, None], data.batch(step))
            sizes = [len(part) for part in points]
            for search, own_losses in zip(searches, losses.split(sizes), strict=True):
                search.tell(own_losses)
    return [
        (kept[None].clone(), search.value[None].clone(), _record(own))
        for kept, search, own in zip(best, searches, evaluations, strict=True)
    ]


def _record(evaluations: list[tuple[int, int, float]]) -> dict[str, Any]:
    """What a run took: rows of its steps, rows of its looks, and the looks."""
    looks = len(evaluations) * HELD_OUT_ROWS
    return {"forwards": evaluations[-1][1], "looks": looks, "evaluations": evaluations}


def backprop(
    personalizer: Personalizer, subject: Subject, steps: int, rate: float = 5e-3
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Exact textual inversion: Adam on the gradient; returns as `zeroth_order`."""
    networks = personalizer.networks
    source = subject.data(personalizer.pipe, subject.train)
    plan = recipe(
        "ours", batch=BATCH, pool=BATCH * 12, timesteps_low=0, timesteps_high=1000, steps=steps
    )
    data = TokenData(networks, source, plan, seed=0)
    held = subject.data(personalizer.pipe, subject.held_out)
    judge = TokenData(networks, held, plan, seed=0).held_out(HELD_OUT_ROWS)
    token = personalizer.initial_embeddings(subject.word, 1).requires_grad_()
    optimizer = torch.optim.Adam([token], lr=rate)
    best, least, evaluations = token.detach().clone(), float("inf"), []
    for step in range(steps + 1):
        if step % max(1, steps // EVALUATIONS) == 0 or step == steps:
            with torch.no_grad():
                value = networks(token.detach()[None], judge).item()
            evaluations.append((step, step * BATCH, value))
            if value < least:
                best, least = token.detach().clone(), value
        if step < steps:
            optimizer.zero_grad()
            networks(token[None], data.batch(step)).sum().backward()
            optimizer.step()
    return best, token.detach(), _record(evaluations)


class Judge:
    """Held-out losses on rows that no method has seen, on the network in full precision."""

    def __init__(self, personalizer: Personalizer, subject: Subject) -> None:
        self.personalizer, self.subject = personalizer, subject
        held = subject.data(personalizer.pipe, subject.held_out)
        data = TokenData(personalizer.networks, held, recipe("ours"), seed=1)
        self.rows = data.held_out(UNSEEN_ROWS)

    @torch.no_grad()
    def loss(self, token: Tensor) -> float:
        """Mean squared error over all rows."""
        return self.personalizer.networks(token[None], self.rows).item()

    @torch.no_grad()
    def pictures(self, token: Tensor | None, name: str = "") -> Tensor:
        """Pictures (N * NOISES, 3, 64, 64) of all N prompts, one noise after the other.

        Args:
            token: With shape (1, d); None draws a name instead.
            name: In words of the model.
        """
        count, word = len(self.subject.prompts), name if token is None else WORD
        known = self.personalizer.initial_embeddings(self.subject.word, 1)
        with self.personalizer.speaking(WORD, known if token is None else token) as pipe:
            images = pipe(
                [prompt.format(word) for prompt in self.subject.prompts] * NOISES,
                guidance="cfg",
                guidance_scale=GUIDANCE_SCALE,
                num_inference_steps=SAMPLING_STEPS,
                generator=[torch.Generator().manual_seed(i) for i in range(count * NOISES)],
            ).images
        return to_tensor(images)
