"""One resumable training run: optimizer, averaged weights, clock and checkpoint."""

from __future__ import annotations

import argparse
import json
import math
import time

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from pilotage.guidance.files import atomic, write_json

EMA_DECAY = 0.999


class Training:
    """Optimizer, EMA, clock and checkpoint of one stage.

    The learning rate follows the clock: a short warm-up, then a half cosine to zero at the end of
    `minutes`. Random numbers are a function of the step, so a resumed run draws what the
    uninterrupted one would have drawn.
    """

    def __init__(self, name: str, model: nn.Module, args: argparse.Namespace, rate: float):
        self.accelerator = Accelerator(mixed_precision=mixed_precision(args.precision))
        self.folder = args.work / name
        self.limit = args.minutes * 60
        self.rate, self.step, self.elapsed = rate, 0, 0.0
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01, foreach=True
        )
        device = self.accelerator.device
        self.ema = {k: v.detach().clone().to(device) for k, v in model.state_dict().items()}
        self.bare = model.to(device, memory_format=torch.channels_last)
        self._resume()
        self.model, self.optimizer = self.accelerator.prepare(self.bare, self.optimizer)
        self.losses: list[Tensor] = []

    def _resume(self) -> None:
        if not (self.folder / "state.json").is_file():
            return
        state = json.loads((self.folder / "state.json").read_text())
        tensors = load_file(self.folder / f"state-{state['step']}.safetensors")
        weights, moments = {}, {}
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            {"model": weights, "ema": self.ema, "adam": moments}[kind][name] = value
        self.bare.load_state_dict(weights)
        self.ema = {k: v.to(self.accelerator.device) for k, v in self.ema.items()}
        for i, parameter in enumerate(self.bare.parameters()):
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(state["step"])),
                "exp_avg": moments[f"{i}.exp_avg"].to(parameter),
                "exp_avg_sq": moments[f"{i}.exp_avg_sq"].to(parameter),
            }
        self.step, self.elapsed = state["step"], state["elapsed"]

    def save(self, **record) -> None:
        """Write weights, EMA, Adam's moments (safetensors), then the clock (JSON)."""
        if not self.accelerator.is_main_process:
            return
        tensors = {f"model/{k}": v for k, v in self.bare.state_dict().items()}
        tensors |= {f"ema/{k}": v for k, v in self.ema.items()}
        for i, parameter in enumerate(self.bare.parameters()):
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"adam/{i}.{moment}"] = self.optimizer.state[parameter][moment]
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        older = list(self.folder.glob("state-*.safetensors"))
        newest = self.folder / f"state-{self.step}.safetensors"
        with atomic(newest) as partial:
            save_file(tensors, partial)
        write_json(
            self.folder / "state.json", {"step": self.step, "elapsed": self.elapsed, **record}
        )
        for path in older:
            if path != newest:
                path.unlink()

    def generator(self) -> torch.Generator:
        """The random numbers of the current step and process."""
        rank = self.accelerator.process_index
        seed = (self.step * 64 + rank) * 2 + 1
        return torch.Generator(self.accelerator.device).manual_seed(seed)

    @property
    def progress(self) -> float:
        """Share of the clock that has run out, 0 to 1."""
        return min(1.0, self.elapsed / self.limit)

    def update(self, loss: Tensor) -> None:
        """One optimizer step at the learning rate of the clock, then the EMA."""
        warm = min(1.0, (self.step + 1) / 200)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * warm * 0.5 * (1 + math.cos(math.pi * self.progress)) + 1e-7
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        state = self.bare.state_dict()
        names = [k for k in self.ema if self.ema[k].is_floating_point()]
        with torch.no_grad():
            torch._foreach_lerp_(
                [self.ema[k] for k in names], [state[k].to(self.ema[k]) for k in names], 1 - decay
            )
        self.losses = [*self.losses[-199:], loss.detach()]

    def loss(self) -> float:
        """Mean training loss of the last 200 steps."""
        return torch.stack(self.losses).mean().item()

    def run(self, step_loss, report, every: float) -> None:
        """Train until the clock runs out; `report(self)` after each checkpoint.

        Args:
            step_loss: () -> loss of the current step.
            report: what to record beside a checkpoint; returns a JSON-able dict.
            every: minutes between checkpoints.
        """
        bar = tqdm(
            total=round(self.limit),
            initial=round(self.elapsed),
            unit="s",
            disable=not self.accelerator.is_main_process,
            mininterval=5,
        )
        clock, saved = time.monotonic(), self.elapsed
        while self.elapsed < self.limit:
            self.update(step_loss())
            now = time.monotonic()
            self.elapsed, clock = self.elapsed + now - clock, now
            if self.step % 20 == 0:
                bar.set_postfix(step=self.step, loss=f"{self.loss():.4f}")
                bar.update(round(self.elapsed) - bar.n)
            if self.elapsed - saved > every * 60 or self.elapsed >= self.limit:
                if not math.isfinite(self.loss()):
                    raise FloatingPointError(f"the loss is not finite at step {self.step}")
                self.save(loss=self.loss(), **report(self))
                saved, clock = self.elapsed, time.monotonic()
        bar.close()


def mixed_precision(wish: str) -> str:
    """bf16 where the hardware computes in it, else full precision ("no")."""
    if wish != "auto":
        return wish
    if torch.cuda.is_available():
        return "bf16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "no"
