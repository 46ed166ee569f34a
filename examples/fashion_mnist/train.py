"""Train small denoisers on Fashion-MNIST.

Resumable (kill it, run the command again), with a time budget:

    python -m examples.fashion_mnist.train train plain --minutes 50
    python -m examples.fashion_mnist.train export plain

``plain`` is the network that denoisers computed from the data explain: no attention, no classes.
``classes`` takes a class, left out of every tenth picture, so that guidance can be measured where
there are enough real pictures for it. Both are a stock ``UNet2DModel`` with epsilon-prediction and
linear beta (Ho et al. 2020), without augmentation: the data set is the distribution. The data are
Debian's ``dataset-fashion-mnist``.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.utils import make_image_grid
from safetensors.torch import load_file
from torch import Tensor, nn

from examples.emoji.training import Training
from examples.fashion_mnist.data import CLASSES, MODELS, load_images
from examples.fashion_mnist.pipeline import ClassPipeline, to_blocks
from pilotage.guidance.files import write_json

LEARNING_RATE = 1e-3
WITHOUT_CLASS = 0.1  # share of pictures trained on without their class
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "clip_sample": False,
}
CARD = """---
license: apache-2.0
pipeline_tag: unconditional-image-generation
library_name: diffusers
---
# {title}

{text}

| | |
|---|---|
| data | Fashion-MNIST (Zalando, MIT), Debian package `dataset-fashion-mnist` |
| network | `UNet2DModel`, {parameters:.2f} M parameters |
| training | {step} steps of {batch} in {minutes} minutes of wall clock, on {machine} |
| final loss | {loss:.4f} (last 200 steps), held-out {held_out_loss:.4f} (test images, EMA) |
| weights | averaged (EMA), stored in fp16 |

Epsilon-prediction, linear beta 1e-4 to 0.02 in 1000 steps, no augmentation, no clipping. Made by
`python -m examples.fashion_mnist.train` with torch {torch}. That is {epochs:.1f} passes over the
data: longer training would still lower the loss.
"""


@dataclass(frozen=True)
class Network:
    """What differs between the networks.

    Args:
        build: Makes it, untrained.
        batch: Pictures a training step.
        pipeline: The pipeline it is sampled with.
        order: Values of pictures (N, 1, 28, 28) as the network takes them.
        title: First line of its card.
        text: What it is for.
    """

    build: Callable[[], UNet2DModel]
    batch: int
    pipeline: type[DiffusionPipeline]
    order: Callable[[Tensor], Tensor]
    title: str
    text: str


def build_plain() -> UNet2DModel:
    """One residual block per level, convolutions only; 28 x 28 pixels."""
    return _unet(28, 1, (16, 48, 96))


def build_classes() -> UNet2DModel:
    """Two levels of 14 x 14 and 7 x 7 with attention between them; the last class is none."""
    return _unet(14, 4, (32, 72), add_attention=True, num_class_embeds=len(CLASSES) + 1)


def _unet(side: int, channels: int, blocks: tuple[int, ...], **options) -> UNet2DModel:
    return UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=blocks,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * len(blocks),
        up_block_types=("UpBlock2D",) * len(blocks),
        norm_num_groups=8,
        **({"add_attention": False} | options),
    )


NETWORKS = {
    "plain": Network(
        build_plain,
        32,
        DDPMPipeline,
        lambda pictures: pictures,
        "Fashion-MNIST, 28x28, without attention",
        "A stock `DDPMPipeline`, trained to be explained by denoisers computed from the same\n"
        "60,000 pictures, not to make pictures for use.",
    ),
    "classes": Network(
        build_classes,
        64,
        ClassPipeline,
        to_blocks,
        "Fashion-MNIST, 28x28, class-conditional",
        "For measuring guidance against 70,000 real pictures: classes, left out of every tenth\n"
        "picture. Squares of 2x2 pixels are channels (`examples/fashion_mnist/pipeline.py`).",
    ),
}


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 [0, 255] to float [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1)


def train(args: argparse.Namespace) -> None:
    """Mean squared error on epsilon."""
    kind = NETWORKS[args.network]
    (images, labels), (held, held_labels) = (load_images(s, args.data) for s in ("train", "test"))
    torch.manual_seed(0)
    training = Training(args.network, kind.build(), args, LEARNING_RATE)
    # On a CPU these networks are a quarter faster without channels_last: group norms dominate.
    training.bare.to(memory_format=torch.contiguous_format)
    device = training.accelerator.device
    images, labels = images.to(device), labels.to(device)
    held, held_labels = to_unit(held[:1024]).to(device), held_labels[:1024].to(device)
    noise_schedule = DDPMScheduler(**SCHEDULE)
    noise_schedule.alphas_cumprod = noise_schedule.alphas_cumprod.to(device)

    def loss_of(
        network: nn.Module, x0: Tensor, classes: Tensor, generator: torch.Generator
    ) -> Tensor:
        x0 = kind.order(x0)
        noise = torch.randn(x0.shape, generator=generator, device=device)
        t = torch.randint(1000, (len(x0),), generator=generator, device=device)
        x_t = noise_schedule.add_noise(x0, noise, t)
        given = {}
        if (embeds := training.bare.config["num_class_embeds"]) is not None:
            dropped = torch.rand(len(x0), generator=generator, device=device) < WITHOUT_CLASS
            given = {"class_labels": classes.masked_fill(dropped, embeds - 1)}
        return (network(x_t, t, **given).sample.float() - noise).square().mean()

    def step_loss() -> Tensor:
        generator = training.generator()
        rows = torch.randint(len(images), (kind.batch,), generator=generator, device=device)
        return loss_of(training.model, to_unit(images[rows]), labels[rows], generator)

    def report(run: Training) -> dict:
        network = averaged(kind, run.ema).to(device)
        with torch.inference_mode():
            generator = torch.Generator(device).manual_seed(0)
            loss = loss_of(network, held, held_labels, generator).item()
            if run.accelerator.is_main_process:
                sheet(kind, network, args.work / args.network / "samples.png")
        return {"held_out_loss": loss, "batch": kind.batch}

    training.run(step_loss, report, args.report_minutes)


def averaged(kind: Network, weights: dict[str, Tensor]) -> UNet2DModel:
    """The network with averaged weights, ready for inference."""
    network = kind.build()
    network.load_state_dict(weights)
    return network.eval()


def sheet(kind: Network, network: UNet2DModel, path: Path) -> None:
    """Twenty samples, 20 DDIM steps, in two rows; with classes two of each at w = 2."""
    pipe = kind.pipeline(network, DDIMScheduler(**SCHEDULE))
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    if kind.pipeline is ClassPipeline:
        found = pipe([*range(len(CLASSES))] * 2, guidance_scale=2.0, generator=generator)
    else:
        found = pipe(batch_size=20, num_inference_steps=20, generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(found.images, 2, 10, resize=56).save(path)


def export(args: argparse.Namespace) -> None:
    """Write the pipeline in fp16 and how it was trained."""
    kind, folder = NETWORKS[args.network], args.work / args.network
    if not (folder / "state.json").is_file():
        raise SystemExit(f"no checkpoint in {folder}: run the 'train' stage first")
    state = json.loads((folder / "state.json").read_text())
    tensors = load_file(folder / f"state-{state['step']}.safetensors")
    network = averaged(kind, {k[4:]: v for k, v in tensors.items() if k.startswith("ema/")})
    output = args.output or MODELS[args.network]
    kind.pipeline(network, DDPMScheduler(**SCHEDULE)).to(torch.float16).save_pretrained(output)
    record = state | {
        "minutes": round(state.pop("elapsed") / 60, 1),
        "parameters": sum(p.numel() for p in network.parameters()) / 1e6,
        "machine": args.machine or platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    write_json(output / "training.json", record)
    card = record | {"epochs": state["step"] * state["batch"] / 60_000}
    (output / "README.md").write_text(CARD.format(title=kind.title, text=kind.text, **card))
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"{size / 1e6:.1f} MB: {output}")


def main(argv: list[str] | None = None) -> None:
    """Command line of this file; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=["train", "export"])
    parser.add_argument("network", choices=sorted(NETWORKS))
    parser.add_argument("--minutes", type=float, default=50, help="time budget")
    parser.add_argument("--report-minutes", type=float, default=5, help="between checkpoints")
    parser.add_argument("--data", type=Path, help="folder of the four idx files")
    parser.add_argument("--work", type=Path, default=Path("cache/fashion"), help="checkpoints")
    parser.add_argument("--precision", choices=["auto", "bf16", "no"], default="auto")
    parser.add_argument("--machine", help="export: name of the machine, for the record")
    parser.add_argument("-o", "--output", type=Path, help="export: folder to write")
    args = parser.parse_args(argv)
    {"train": train, "export": export}[args.stage](args)


if __name__ == "__main__":
    main()
