"""Pipelines that evaluate both branches in one batch."""

from __future__ import annotations

from typing import Any

import torch

from .calls import Call, prediction_of, with_prediction
from .driver import Driver
from .layouts import Batched, LayoutError


class BatchedDriver(Driver):
    """Both branches in one batch."""

    layout: Batched

    def evaluate(self, call: Call) -> Any:
        """Evaluate both branches of the wanted samples, else the conditional one alone."""
        if not self.begun:
            self.start(self._batch_of(call) if self.guided else call.rows, call)
        batch = self.run.batch
        if call.rows == batch:  # the pipeline itself has switched guidance off
            output = call()
            self.run.begin(call.sample, *self.levels(call))
            self.unguided(call, prediction_of(output, self.layout.listed))
            return output
        cond_start, uncond_start = (0, batch) if self.layout.cond_first else (batch, 0)
        x_t = call.sample[cond_start : cond_start + batch]
        rows = self.plan(call, x_t)
        if self.run.all_skipped:
            guided = self.reused(x_t)
            return with_prediction(self.example, torch.cat([guided, guided]), self.layout.listed)
        every = len(rows) == batch
        cond_rows = [cond_start + row for row in range(batch) if row not in self.run.skipped]
        uncond_rows = [uncond_start + row for row in rows]
        order = [*cond_rows, *uncond_rows] if self.layout.cond_first else [*uncond_rows, *cond_rows]
        output = call(None if every else order)
        self.remember(output)
        prediction = prediction_of(output, self.layout.listed)
        if self.layout.cond_first:
            cond, uncond = prediction[: len(cond_rows)], prediction[len(cond_rows) :]
        else:
            uncond, cond = prediction[: len(rows)], prediction[len(rows) :]
        cond = self.with_skipped(cond, x_t)
        pair = self.combine(rows, cond, uncond if rows else None, x_t)
        if every and pair[0] is cond and pair[1] is uncond:
            return output
        halves = pair if self.layout.cond_first else pair[::-1]
        return with_prediction(output, torch.cat(halves), self.layout.listed)

    def _batch_of(self, call: Call) -> int:
        """Number of samples in a call that holds every latent twice."""
        sample = call.sample
        first, second = sample.chunk(2) if len(sample) % 2 == 0 else (sample, None)
        if second is None or not torch.equal(first, second):
            raise LayoutError(
                "expected every latent twice in one batch (unconditional and conditional), got an "
                f"input of shape {tuple(sample.shape)} that is not so: this pipeline, or an option "
                "of this call, arranges its branches in a way that is not known"
            )
        return len(sample) // 2
