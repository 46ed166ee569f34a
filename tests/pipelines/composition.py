"""What guidance composes with: the rows of docs/how-to/composing.md, and what shows every cell.

    python -m tests.pipelines.composition

writes the table into the page. A cell is run by `test_composition.py`, or names the test that
does, or says "not tested".
"""

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import torch
from optimum.quanto import freeze, qint8
from optimum.quanto import quantize as quanto_quantize
from peft import LoraConfig
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)

from pilotage.guidance import APG, AdaptiveGuidance, Schedule
from pilotage.pipelines.quantization import quantize

from .. import components
from ..oracles.apg import PaperMomentum, paper_apg
from .quantization.test_quantize import gguf_unet
from .seam.test_faults import CACHES, CHOICES, RIGHT

ROOT = Path(__file__).resolve().parents[2]
PAGE = "docs/how-to/composing.md"
MARKED = re.compile(r"(<!-- table[^>]*-->\n).*?(\n<!-- end of table -->)", re.DOTALL)

SETTINGS = {"eta": 0.2, "r": 2.0, "beta": -0.5}
# Column -> its heading and the guidance that stands for it.
COLUMNS = {
    "apg": ("rules", APG(SETTINGS["eta"], SETTINGS["r"], SETTINGS["beta"], "l2", "native")),
    "ag": ("`ag`", AdaptiveGuidance(-1.0)),
    "interval": ("`interval`, schedules", Schedule(CHOICES["interval"])),
    "hold": ("estimates: `linear-ag`, `hold`, `gate`", Schedule(CHOICES["hold"])),
    "forecast": ("`forecast`", Schedule(CHOICES["forecast"])),
}
WORKS, REFUSED, UNTESTED = "works", "refused", "not tested"


@dataclass(frozen=True)
class Row:
    """Something that guidance may meet.

    Args:
        title: How the page names it.
        put_on: Puts it on a pipeline, where the cells are run here.
        part: It is part of the model: the oracle has it as well. Otherwise it must change nothing.
        family: The tiny pipeline.
        arguments: What the call is given besides.
        cells: Column -> what is not `otherwise`.
        otherwise: What the other cells say.
        shown: The tests that show the cells, "file::test", where they are not run here.
        rounds: Rounds activations, so that another order of the rows moves its results: agreement
            is asked for within a tenth of what the row itself changes.
    """

    title: str
    put_on: Callable[[Any], None] | None = None
    part: bool = False
    family: str = "sdxl"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    cells: Mapping[str, str] = field(default_factory=dict)
    otherwise: str = WORKS
    shown: tuple[str, ...] = ()
    rounds: bool = False

    def cell(self, column: str) -> str:
        return self.cells.get(column, self.otherwise)


def by_hand(network: nn.Module, column: str, w: float) -> None:
    """Do to the outputs of a network whose rows are (uncond, cond) what `column` means.

    Every row is evaluated at every step; what a policy leaves out is replaced afterwards.
    """
    stock, counted, made, both = network.forward, itertools.count(), [], []
    averages: list[PaperMomentum] = []

    def forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        output = stock(*args, **kwargs)[0]
        uncond, cond = output.chunk(2)
        choice = "apg" if column == "apg" else CHOICES[column][next(counted)]
        if choice == "apg":
            averages[:] = averages or [PaperMomentum(SETTINGS["beta"]) for _ in cond]
            rows = zip(cond, uncond, averages, strict=True)
            guided = [
                paper_apg(
                    c.double().numpy(), u.double().numpy(), w, a, SETTINGS["eta"], SETTINGS["r"]
                )
                for c, u, a in rows
            ]
            uncond = cond = torch.stack([torch.from_numpy(g) for g in guided]).to(output)
        elif choice == "both":
            both[:] = uncond, cond
        elif choice == "cond":
            uncond = cond
        elif choice == "estimate":
            uncond = cond - (both[1] - both[0])
        if choice == "forecast":
            uncond, cond = made
        made[:] = uncond, cond
        return (torch.cat([uncond, cond]),)

    network.forward = forward


def on_cpu(pipe: Any) -> None:
    """As ``enable_model_cpu_offload``, which asks for an accelerator."""
    hook = None
    for module in (pipe.text_encoder, pipe.unet, pipe.vae):
        _, hook = accelerate.cpu_offload_with_hook(module, "cpu", hook)


def layer_by_layer(pipe: Any) -> None:
    """As ``enable_sequential_cpu_offload``."""
    accelerate.cpu_offload(pipe.unet, "cpu", offload_buffers=True)


def in_groups(pipe: Any) -> None:
    cpu = torch.device("cpu")
    pipe.unet.enable_group_offload(cpu, cpu, offload_type="leaf_level")


def by_quanto(pipe: Any) -> None:
    linear = [name for name, m in pipe.unet.named_modules() if isinstance(m, nn.Linear)]
    quanto_quantize(pipe.unet, weights=qint8, include=linear)
    freeze(pipe.unet)


def by_gguf(pipe: Any) -> None:
    pipe.unet = gguf_unet(pipe.unet, None)


def with_lora(pipe: Any) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"])
    pipe.unet.add_adapter(config)


def with_ip_adapter(pipe: Any) -> None:
    pipe.unet._load_ip_adapter_weights([components.ip_adapter(pipe.unet)])


def picture_embeds() -> list[torch.Tensor]:
    """Of (uncond, cond) for two samples."""
    return [torch.randn(4, 1, 16, generator=torch.Generator().manual_seed(1))]


class CountsCalls:
    """A cache as cache-dit's for networks with a call a branch: even calls are taken for the first.

    It knows no branches: it counts calls, and reuses after the first step. (Of version 1.5.3, on
    tiny Wan and Qwen-Image pipelines: after the stop of Adaptive Guidance every other conditional
    call was served from what was kept of the unconditional branch.)
    """

    def __init__(self, network: nn.Module) -> None:
        self.network, self.block = network, network.blocks[-1]
        self.kept: list[torch.Tensor] = []
        self.calls = 0

    def put_on(self) -> None:
        stock = self.block.forward
        self.network._is_cached = True  # cache-dit's mark

        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.calls += 1
            if len(self.kept) < 2:
                self.kept.append(stock(hidden_states, *args, **kwargs) - hidden_states)
                return hidden_states + self.kept[-1]
            return hidden_states + self.kept[(self.calls - 1) % 2]

        self.block.forward = forward


class CountsSteps:
    """A cache as DeepCache's: the middle of a UNet is computed at every other step of the run.

    It counts steps of the scheduler, also those that a policy skips.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.block = pipe, pipe.unet.mid_block
        self.computed: list[int] = []

    def put_on(self) -> None:
        stock, kept = self.block.forward, []

        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            index = self.pipe.scheduler.step_index or 0
            if index % 2 == 0:
                kept[:] = [stock(hidden_states, *args, **kwargs)]
                self.computed.append(index)
            return kept[0]

        forward.__module__ = "DeepCache.extension.deepcache"
        self.block.forward = forward


FAULTS = "tests/pipelines/seam/test_faults.py"
FEATURES = "tests/pipelines/seam/test_features.py"
PARALLEL = "tests/pipelines/seam/test_parallel.py"
BATCHED = "tests/pipelines/seam/test_batched.py"
RUNTIMES = "tests/pipelines/runtimes/test_runtimes.py"
HERE = "tests/pipelines/test_composition.py"


def cache_rows() -> list[Row]:
    """diffusers' caches, from what the tests of the seam list as right; the rest is refused."""
    rows = []
    for cache in CACHES:
        calls = {column: WORKS for column in COLUMNS if (cache, column) in RIGHT} | {"apg": WORKS}
        if "ag" in calls:
            calls["ag"] = "works with one picture a call, else refused"
        batch = {"apg": WORKS}
        if cache in ("FirstBlockCache", "TextKVCache"):
            batch["forecast"] = WORKS
        for how, cells in (("a call a branch", calls), ("branches in one call", batch)):
            test = "two_calls" if cells is calls else "one_call"
            shown = (f"{FAULTS}::test_caches_on_pipelines_with_{test}",)
            title = f"diffusers' `{cache}`, {how}"
            rows.append(Row(title, cells=cells, otherwise=REFUSED, shown=shown))
    return rows


# Heading -> rows.
TABLES: dict[str, list[Row]] = {
    "Memory and precision": [
        Row("attention slicing", lambda pipe: pipe.enable_attention_slicing(1)),
        Row("model offloading", on_cpu),
        Row("sequential offloading", layer_by_layer),
        Row("group offloading", in_groups),
        Row(
            "layerwise casting",
            lambda pipe: pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
            part=True,
        ),
        Row("`quantize` (int8)", lambda pipe: quantize(pipe.unet, backend="pilotage"), part=True),
        Row(
            "torchao int8 weights",
            lambda pipe: quantize_(pipe.unet, Int8WeightOnlyConfig()),
            part=True,
        ),
        Row(
            "torchao int8 weights and activations",
            lambda pipe: quantize_(pipe.unet, Int8DynamicActivationInt8WeightConfig()),
            part=True,
            rounds=True,
        ),
        Row("quanto int8 weights", by_quanto, part=True),
        Row("GGUF Q8_0", by_gguf, part=True),
        Row("torchao int4, quanto int4, bitsandbytes, other GGUF types", otherwise=UNTESTED),
    ],
    "Compiling and other runtimes": [
        Row(
            "`torch.compile`, its graphs run without Inductor",
            cells={"apg": WORKS, "ag": WORKS},
            otherwise=UNTESTED,
            shown=(f"{FEATURES}::test_compiled_denoiser",),
        ),
        Row("`torch.compile` with Inductor, `reduce-overhead`, `max-autotune`", otherwise=UNTESTED),
        Row(
            "ONNX Runtime, OpenVINO",
            cells={"apg": WORKS, "ag": WORKS},
            otherwise=UNTESTED,
            shown=(f"{RUNTIMES}::test_pictures_are_pytorchs",),
        ),
    ],
    "Parts of the model": [
        Row("LoRA", with_lora, part=True),
        Row(
            "IP-Adapter",
            with_ip_adapter,
            part=True,
            arguments={"ip_adapter_image_embeds": picture_embeds()},
        ),
        Row("ControlNet", lambda pipe: None, part=True, family="sd_controlnet"),
        Row("FreeU", lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4), part=True),
        Row(
            "one branch: LCM, distilled guidance",
            cells={"apg": "refused, but for rules of one branch", "forecast": WORKS},
            otherwise=REFUSED,
            shown=(
                f"{FEATURES}::test_one_branch_cannot_be_guided",
                f"{FEATURES}::test_steps_of_one_branch_can_be_skipped",
                "tests/pipelines/seam/test_steps.py::"
                "test_a_distilled_network_takes_rules_for_one_branch",
            ),
        ),
    ],
    "How branches are evaluated": [
        Row('`parallel="branches"`', shown=(f"{PARALLEL}::test_equals_branches_in_turn",)),
        Row(
            "`batch_branches=True`",
            cells={"apg": WORKS, "ag": WORKS},
            otherwise=UNTESTED,
            shown=(
                f"{BATCHED}::test_equals_calls_in_turn_to_rounding",
                f"{BATCHED}::test_what_adaptive_guidance_leaves_is_one_branch",
            ),
        ),
    ],
    "Caches within the network": [
        *cache_rows(),
        Row(
            'a cache of diffusers and `parallel="branches"`',
            otherwise=REFUSED,
            shown=(f"{PARALLEL}::test_mistakes_are_told_to_all",),
        ),
        Row(
            "a cache of diffusers and `batch_branches=True`",
            otherwise=REFUSED,
            shown=(f"{HERE}::test_first_block_cache_and_one_call_for_all_branches",),
        ),
        Row("`SeaCache`", otherwise=UNTESTED),
        Row(
            "DeepCache",
            cells={"apg": WORKS},
            otherwise=REFUSED,
            shown=(
                f"{FAULTS}::test_state_over_the_batch_that_nobody_announces",
                f"{HERE}::test_a_cache_that_counts_steps_of_the_scheduler",
            ),
        ),
        Row(
            "cache-dit",
            cells={"apg": WORKS},
            otherwise=REFUSED,
            shown=(f"{HERE}::test_a_cache_that_takes_turns",),
        ),
    ],
}


def tables() -> str:
    """The tables in Markdown."""
    heading = " | ".join(["", *(title for title, _ in COLUMNS.values())])
    lines = []
    for title, rows in TABLES.items():
        lines += ["", f"### {title}", "", f"|{heading} |", "|---" * (len(COLUMNS) + 1) + "|"]
        lines += [
            " | ".join([f"| {row.title}", *(row.cell(column) for column in COLUMNS)]) + " |"
            for row in rows
        ]
    return "\n".join(lines[1:])


def page() -> str:
    """The page with its tables."""
    text = (ROOT / PAGE).read_text()
    return MARKED.sub(lambda match: f"{match[1]}\n{tables()}\n{match[2]}", text)


if __name__ == "__main__":
    (ROOT / PAGE).write_text(page())
