"""The branches of an evaluation, for the samples that want them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...guidance.device import row_index

CALC = "sampler_calc_cond_batch_function"
# What somebody else's patches may do per sample, so that samples cannot be left out of a batch.
WHOLE_OPTIONS = ("model_function_wrapper", "context_handler")
WHOLE_WRAPPERS = ("calc_cond_batch", "apply_model", "diffusion_model")
WHOLE_PATCHES = ("patches", "patches_replace")
WHOLE_CONDITIONS = ("control", "gligen", "hooks", "mask")
CONDITIONS = {"CONDRegular", "CONDNoiseShape", "CONDCrossAttn", "CONDList", "CONDConstant"}


@dataclass(frozen=True)
class Branches:
    """What ComfyUI evaluates at one step.

    Args:
        args: What its ``sampler_calc_cond_batch_function`` is given.
        before: The function of that name that another node has set, if any.

    Attributes:
        guides: Whether there is an unconditional branch. ComfyUI leaves it out at a scale of 1.
    """

    args: Mapping[str, Any]
    before: Any = None

    @property
    def guides(self) -> bool:
        """Whether there is an unconditional branch."""
        return len(self.args["conds"]) > 1 and self.args["conds"][1] is not None

    @property
    def divisible(self) -> bool:
        """Whether single samples can be evaluated: nothing here is known to hold one per sample."""
        options = self.args["model_options"]
        network = options.get("transformer_options", {})
        wrappers = network.get("wrappers", {})
        return not (
            self.before is not None
            or any(options.get(name) for name in WHOLE_OPTIONS)
            or any(network.get(name) for name in WHOLE_PATCHES)
            or any(any(wrappers.get(kind, {}).values()) for kind in WHOLE_WRAPPERS)
            or any(not _divisible(entry) for cond in self.args["conds"] for entry in cond or ())
        )

    def evaluate(self, wanted: Sequence[bool], rows: Sequence[int] | None = None) -> list[Tensor]:
        """Denoised images of every branch, each with shape (len(rows), \\*).

        Args:
            wanted: Which branches; those of others mean nothing.
            rows: The samples; None: all of them.
        """
        x, sigma = self.args["input"], self.args["sigma"]
        conds = [c if want else None for c, want in zip(self.args["conds"], wanted, strict=True)]
        if rows is not None:
            index = row_index(rows, x.device)
            x, sigma = x[index], sigma[index]
            conds = [None if c is None else [_of_rows(e, rows) for e in c] for c in conds]
        if self.before is not None:
            return list(self.before({**self.args, "conds": conds, "input": x, "sigma": sigma}))
        calculate = importlib.import_module("comfy.samplers").calc_cond_batch
        return list(calculate(self.args["model"], conds, x, sigma, self.args["model_options"]))


def _divisible(entry: Mapping[str, Any]) -> bool:
    conditions = entry.get("model_conds", {}).values()
    return not any(entry.get(name) is not None for name in WHOLE_CONDITIONS) and all(
        type(condition).__name__ in CONDITIONS for condition in conditions
    )


def _of_rows(entry: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """A condition for some samples. One for fewer samples than there are stands for all in turn."""
    conditions = {name: _picked(c, rows) for name, c in entry.get("model_conds", {}).items()}
    return {**entry, "model_conds": conditions}


def _picked(condition: Any, rows: Sequence[int]) -> Any:
    held = condition.cond
    if type(condition).__name__ == "CONDConstant":
        return condition
    if isinstance(held, Tensor):
        return type(condition)(_taken(held, rows))
    return type(condition)([_taken(tensor, rows) for tensor in held])


def _taken(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    if len(tensor) == 1:
        return tensor
    return tensor[row_index([row % len(tensor) for row in rows], tensor.device)]
