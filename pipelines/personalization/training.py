"""The training loop of a token: a search, a loss closure, one or several processes, checkpoints."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate.utils import reduce
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...guidance.files import atomic
from ...guidance.zeroth_order import GradientSearch, WordSearch
from ..processes import processes
from .loss import TokenBatch, TokenLoss

HELD_OUT_ROWS_PER_CALL = 8
# Rows whose loss is not finite are left out up to this share; of training rows, which come one by
# one, so many must have been left out before their share counts.
MOST_LEFT_OUT = 0.25
FEW_LEFT_OUT = 3


class TokenTrainer:
    """Steps of a search on a loss closure.

    Every process holds the same search. Each evaluates its share of a step's points, which it draws
    from the seed; only losses travel (a point is known by its index).

    A row (picture and timestep) on which the network overflows is left out with a warning: the
    step's loss is the mean over its other rows, and without any the search asks for the same points
    again at the next step. Held-out rows that are left out at the first token are left out for all
    later ones, so that held-out losses compare; a later token that overflows on another row has an
    infinite loss.

    Args:
        loss: (embeddings (K, m, d), batch) -> losses (K,), means over the batch's rows.
        search: From `Recipe.build`.
        shape: (m, d).
        points_per_call: Points of one call of the loss; 0 is all of a process. With a fixed number
            the calls are the same for any number of processes, and so is the token, bit for bit;
            else to rounding.
        settings: What a checkpoint must agree with to be continued, ready for JSON.
        remedy: What to do about rows that overflow, for the messages.
        word_of: The word of the vocabulary with an embedding (d,), for `leading`.
    """

    def __init__(
        self,
        loss: TokenLoss,
        search: GradientSearch,
        shape: tuple[int, int],
        points_per_call: int,
        settings: dict[str, Any],
        remedy: str = "",
        word_of: Callable[[Tensor], str] | None = None,
    ) -> None:
        self.loss, self.search, self.shape = loss, search, shape
        self.points_per_call, self.settings = points_per_call, settings
        self.remedy, self.word_of = remedy, word_of
        self.process = processes()
        self._world = self.process.num_processes
        self.between_steps = True  # else an exception has cut an update in two
        self.step = 0
        self.forwards = 0
        self.rows = 0  # of training, and how many of them were left out
        self.left_out = 0
        self.losses: list[float] = []
        self.evaluations: list[tuple[int, int, float]] = []
        self.best = self.vectors
        self.best_step = 0
        self.judged = torch.ones(0, dtype=torch.bool)  # held-out rows that are not left out
        self.words: dict[str, list[float]] = {}  # sum of differences to the class word, count

    @property
    def vectors(self) -> Tensor:
        """The search's result so far, with shape (m, d), float32, on the CPU."""
        return self.search.value.float().view(self.shape).clone()

    @property
    def comparing_words(self) -> bool:
        """Whether the next step compares known words."""
        return isinstance(self.search, WordSearch) and not self.search.done

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
        return self.shared(losses)

    def shared(self, values: Tensor) -> Tensor:
        """Element-wise sum over processes; each element is zero in all but one of them."""
        if self._world == 1:
            return values
        return reduce(values.to(self.process.device), reduction="sum").cpu()

    def advance(self, batch: TokenBatch) -> None:
        """One step, on rows that are the same in every process.

        Raises:
            FloatingPointError: too many rows overflow, or the update does.
        """
        points = self.search.ask()
        losses = self.evaluate(points, batch)
        self.rows += len(batch)
        self.forwards += len(points) * len(batch)
        if not losses.isfinite().all():
            losses = self._without_overflows(points, losses, batch)
        self.between_steps = False
        if losses.isfinite().all():
            if self.comparing_words:
                self._count_words(points, losses)
            self.search.tell(losses)
            if not self.search.value.isfinite().all():
                raise FloatingPointError(
                    f"the update of step {self.step} overflows: lower the rate"
                )
        self.step += 1
        self.losses.append(losses.double().mean().item())
        self.between_steps = True

    def _without_overflows(self, points: Tensor, losses: Tensor, batch: TokenBatch) -> Tensor:
        """Mean losses (K,) over the rows that are finite for all points; NaN without any."""
        rows = [batch.rows(slice(i, i + 1)) for i in range(len(batch))]
        if len(rows) == 1:
            each = losses[:, None]
        else:
            each = torch.stack([self.evaluate(points, row) for row in rows], 1)
            self.forwards += len(points) * len(batch)
        finite = each.isfinite().all(0)
        names = [name for name, good in zip(batch.names, finite, strict=True) if not good]
        self.left_out += len(names)
        enough = self.left_out > FEW_LEFT_OUT and self.left_out > MOST_LEFT_OUT * self.rows
        self._leave_out(names, f"{self.left_out} of {self.rows} rows", enough)
        return each[:, finite].mean(1)

    def _leave_out(self, names: list[str], share: str, refuse: bool) -> None:
        where = ", ".join(names[:5]) + ("" if len(names) <= 5 else f" and {len(names) - 5} more")
        if refuse:
            raise FloatingPointError(
                f"the losses of {share} are not finite, more than a quarter: {where}. {self.remedy}"
            )
        warnings.warn(f"left out, the loss is not finite: {where}. {self.remedy}", stacklevel=3)

    def _count_words(self, points: Tensor, losses: Tensor) -> None:
        if self.word_of is None:
            return
        for point, difference in zip(points[1:], (losses[1:] - losses[0]).tolist(), strict=True):
            entry = self.words.setdefault(self.word_of(point[: self.shape[1]]), [0.0, 0])
            entry[0] += difference
            entry[1] += 1

    def leading(self, count: int = 3) -> list[tuple[str, float]]:
        """Known words better than the class word, and by how much; those compared longest."""
        longest = max((n for _, n in self.words.values()), default=0)
        means = [(word, total / n) for word, (total, n) in self.words.items() if n == longest]
        return sorted((pair for pair in means if pair[1] < 0), key=lambda pair: pair[1])[:count]

    def evaluate_held_out(self, batch: TokenBatch) -> None:
        """Held-out loss of the result so far, kept in `evaluations`; the best token is in `best`.

        Rows are evaluated a few at a time, the parts shared out over the processes. They are not
        counted in `forwards`.

        Raises:
            FloatingPointError: at the first token, too many rows overflow.
        """
        token = self.vectors[None]
        if not self.evaluations:
            losses = self._row_losses(token, batch)
            self.judged = losses.isfinite()
            if not self.judged.all():
                bad = batch.rows(~self.judged)
                share = f"{len(bad)} of {len(batch)} held-out rows"
                self._leave_out(bad.names, share, len(bad) > MOST_LEFT_OUT * len(batch))
                losses = losses[self.judged]
        else:
            losses = self._row_losses(token, batch.rows(self.judged))
        value = losses.double().mean().item()
        if not math.isfinite(value):
            value = math.inf
            bad = batch.rows(self.judged).rows(~losses.isfinite())
            warnings.warn(
                f"the token of step {self.step} is not taken: its held-out loss is not finite, on "
                f"{bad.names[0]}",
                stacklevel=2,
            )
        if all(value < other for _, _, other in self.evaluations):
            self.best, self.best_step = token[0], self.step
        self.evaluations.append((self.step, self.forwards, value))

    @torch.no_grad()
    def _row_losses(self, token: Tensor, batch: TokenBatch) -> Tensor:
        """Losses (B,) whose mean is the batch's: rows of one call have their mean.

        Only the rows of a call that is not finite have one each.
        """
        size, losses = HELD_OUT_ROWS_PER_CALL, torch.zeros(len(batch))
        starts = range(0, len(batch), size)[self.process.process_index :: self._world]
        for start in starts:
            part = batch.rows(slice(start, start + size))
            values = self.loss(token, part).float().cpu().expand(len(part))
            if not values.isfinite().all() and len(part) > 1:
                rows = [part.rows(slice(i, i + 1)) for i in range(len(part))]
                values = torch.cat([self.loss(token, row).float().cpu() for row in rows])
            losses[start : start + size] = values
        return self.shared(losses)

    @property
    def learned(self) -> bool:
        """Whether a later token has a lower held-out loss than the first one.

        Without held-out losses: whether there was an update.
        """
        if self.evaluations:
            return self.best_step > 0
        return any(map(math.isfinite, self.losses))

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
            "judged": self.judged,
            "losses": torch.tensor(self.losses, dtype=torch.float64),
        }
        names = ("step", "forwards", "rows", "left_out", "best_step", "words", "evaluations")
        record = json.dumps({name: getattr(self, name) for name in (*names, "settings")})
        metadata = {"personalization": record, "sha256": _digest(record, state)}
        with atomic(path) as partial:
            safetensors.torch.save_file(state, partial, metadata=metadata)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint; ValueError if it is damaged or of other settings (named)."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            text = metadata.get("personalization", "")
            if metadata.get("sha256") != _digest(text, state):
                raise ValueError("its content does not match its checksum")
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(
                f"the checkpoint {path} is damaged ({error}): delete it to begin anew"
            ) from error
        record = json.loads(text)
        mine, other = json.loads(json.dumps(self.settings)), record.pop("settings")
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
        self.best, self.judged = state["best"], state["judged"]
        self.losses = state["losses"].tolist()
        for name, value in record.items():
            setattr(self, name, value)
        self.evaluations = [tuple(e) for e in record["evaluations"]]


def _digest(record: str, state: dict[str, Tensor]) -> str:
    """SHA-256 of a checkpoint's content; 64 hex digits."""
    return hashlib.sha256(record.encode() + safetensors.torch.save(state)).hexdigest()
