"""The training loop of a token: a search, a loss closure, one or several processes, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...guidance.files import atomic
from ...guidance.zeroth_order import GradientSearch
from ..processes import processes
from .loss import TokenBatch, TokenLoss

HELD_OUT_ROWS_PER_CALL = 8


class TokenTrainer:
    """Steps of a search on a loss closure.

    Every process holds the same search. Each evaluates its share of a step's points, which it draws
    from the seed; only losses travel (a point is known by its index).

    Args:
        loss: (embeddings (K, m, d), batch) -> losses (K,).
        search: From `Recipe.build`.
        shape: (m, d).
        points_per_call: Points of one call of the loss; 0 is all of a process. With a fixed number
            the calls are the same for any number of processes, and so is the token, bit for bit;
            else to rounding.
        settings: What a checkpoint must agree with to be continued, ready for JSON.
    """

    def __init__(
        self,
        loss: TokenLoss,
        search: GradientSearch,
        shape: tuple[int, int],
        points_per_call: int,
        settings: dict[str, Any],
    ) -> None:
        self.loss, self.search, self.shape = loss, search, shape
        self.points_per_call, self.settings = points_per_call, settings
        self.process = processes()
        self._world = self.process.num_processes
        self.between_steps = True  # else an exception has cut an update in two
        self.step = 0
        self.forwards = 0
        self.losses: list[float] = []
        self.evaluations: list[tuple[int, int, float]] = []
        self.best = self.vectors

    @property
    def vectors(self) -> Tensor:
        """The search's result so far, with shape (m, d), float32, on the CPU."""
        return self.search.value.float().view(self.shape).clone()

    @torch.no_grad()
    def evaluate(self, points: Tensor, batch: TokenBatch) -> Tensor:
        """Losses (K,) of points (K, m * d), shared out over the processes; float32, on the CPU."""
        size = self.points_per_call or -(-len(points) // self._world)
        starts = range(0, len(points), size)[self.process.process_index :: self._world]
        losses = torch.zeros(len(points))
        for start in starts:
            part = points[start : start + size]
            values = self.loss(part.view(-1, *self.shape), batch)
            losses[start : start + size] = values.float().cpu()
        return self._sum(losses)

    def _sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over processes; each element is zero in all but one of them."""
        if self._world == 1:
            return values
        return reduce(values.to(self.process.device), reduction="sum").cpu()

    def advance(self, batch: TokenBatch) -> None:
        """One step, on rows that are the same in every process."""
        points = self.search.ask()
        losses = self.evaluate(points, batch)
        self.between_steps = False
        self.search.tell(losses)
        self.step += 1
        self.forwards += len(points) * len(batch)
        self.losses.append(losses.double().mean().item())
        self.between_steps = True

    @torch.no_grad()
    def evaluate_held_out(self, batch: TokenBatch) -> None:
        """Held-out loss of the result so far, kept in `evaluations`; the best token is in `best`.

        Rows are evaluated a few at a time, the parts shared out over the processes. They are not
        counted in `forwards`.
        """
        rows, token = HELD_OUT_ROWS_PER_CALL, self.vectors[None]
        sums = torch.zeros(-(-len(batch) // rows))
        for i in range(self.process.process_index, len(sums), self._world):
            part = batch.rows(slice(i * rows, (i + 1) * rows))
            sums[i] = self.loss(token, part).float().cpu()[0] * len(part)
        value = self._sum(sums).double().sum().item() / len(batch)
        if all(value < other for _, _, other in self.evaluations):
            self.best = token[0]
        self.evaluations.append((self.step, self.forwards, value))

    def stalled(self, patience: int) -> bool:
        """Whether the last `patience` held-out losses were no better than the best before them."""
        values = [value for _, _, value in self.evaluations]
        if not patience or len(values) <= patience:
            return False
        return min(values[-patience:]) >= min(values[:-patience])

    def save(self, path: Path) -> None:
        """Write a checkpoint (safetensors, its header has the JSON), whole or not at all."""
        state = {
            **{f"search.{name}": value.clone() for name, value in self.search.state.items()},
            "best": self.best.clone(),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
        }
        record = {
            "step": self.step,
            "forwards": self.forwards,
            "evaluations": self.evaluations,
            "settings": self.settings,
        }
        with atomic(path) as partial:
            save_file(state, partial, metadata={"personalization": json.dumps(record)})

    def load(self, path: Path) -> None:
        """Continue from a checkpoint; ValueError if it is damaged or of other settings (named)."""
        try:
            with safe_open(path, "pt") as file:
                record = json.loads((file.metadata() or {})["personalization"])
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(
                f"the checkpoint {path} is damaged ({error}): delete it to begin anew"
            ) from error
        mine, other = json.loads(json.dumps(self.settings)), record["settings"]
        differing = sorted(n for n in {*mine, *other} if mine.get(n) != other.get(n))
        if differing:
            raise ValueError(
                f"the checkpoint {path} was made with other settings ({', '.join(differing)}) or "
                "by another version: use the same ones, another output folder, or delete it to "
                "begin anew"
            )
        self.search.state |= {
            k.removeprefix("search."): v for k, v in state.items() if k.startswith("search.")
        }
        self.best, self.losses = state["best"], state["losses"].tolist()
        self.step, self.forwards = record["step"], record["forwards"]
        self.evaluations = [tuple(e) for e in record["evaluations"]]
