"""Train a small attention-free denoiser on Fashion-MNIST: the network the analytic ones explain.

Resumable (kill it, run the command again), with a time budget:

    python -m examples.fashion_mnist.train train --minutes 50
    python -m examples.fashion_mnist.train export -o examples/fashion_mnist/model

A stock ``UNet2DModel`` without attention, epsilon-prediction, linear beta (Ho et al. 2020), no
augmentation: the data set is the distribution. The data are Debian's ``dataset-fashion-mnist``.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from safetensors.torch import load_file
from torch import Tensor, nn

from examples.emoji.training import Training
from examples.fashion_mnist.data import MODEL, load_images
from pilotage.guidance.files import write_json

BATCH = 32
LEARNING_RATE = 1e-3
BLOCKS = (16, 48, 96)
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
# Fashion-MNIST, 28x28, without attention

A stock `DDPMPipeline` (`UNet2DModel`, {parameters:.2f} M parameters, no attention), trained to be
explained by denoisers computed from the same 60,000 pictures, not to make pictures for use.

| | |
|---|---|
| data | Fashion-MNIST (Zalando, MIT), Debian package `dataset-fashion-mnist` |
| training | {step} steps of {batch} in {minutes} minutes of wall clock, on {machine} |
| final loss | {loss:.4f} (last 200 steps), held-out {held_out_loss:.4f} (test images, EMA) |
| weights | averaged (EMA), stored in fp16 |

Epsilon-prediction, linear beta 1e-4 to 0.02 in 1000 steps, no augmentation, no clipping. Made by
`python -m examples.fashion_mnist.train` with torch {torch}. That is {epochs:.1f} passes over the
data: longer training would still lower the loss.
"""


def build_unet(blocks: tuple[int, ...] = BLOCKS) -> UNet2DModel:
    """The network: one residual block per level, convolutions only."""
    return UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        block_out_channels=blocks,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * len(blocks),
        up_block_types=("UpBlock2D",) * len(blocks),
        add_attention=False,
        norm_num_groups=8,
    )


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 [0, 255] to float [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1)


def train(args: argparse.Namespace) -> None:
    """Mean squared error on epsilon."""
    images, held = (load_images(split, args.data)[0] for split in ("train", "test"))
    torch.manual_seed(0)
    training = Training("unet", build_unet(), args, LEARNING_RATE)
    # On a CPU this network is a quarter faster without channels_last: its group norms dominate.
    training.bare.to(memory_format=torch.contiguous_format)
    device = training.accelerator.device
    images, held = images.to(device), to_unit(held[:1024]).to(device)
    noise_schedule = DDPMScheduler(**SCHEDULE)
    noise_schedule.alphas_cumprod = noise_schedule.alphas_cumprod.to(device)

    def loss_of(network: nn.Module, x0: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(x0.shape, generator=generator, device=device)
        t = torch.randint(1000, (len(x0),), generator=generator, device=device)
        x_t = noise_schedule.add_noise(x0, noise, t)
        return (network(x_t, t).sample.float() - noise).square().mean()

    def step_loss() -> Tensor:
        generator = training.generator()
        rows = torch.randint(len(images), (BATCH,), generator=generator, device=device)
        return loss_of(training.model, to_unit(images[rows]), generator)

    def report(run: Training) -> dict:
        network = averaged(run.ema).to(device)
        with torch.inference_mode():
            generator = torch.Generator(device).manual_seed(0)
            loss = loss_of(network, held, generator).item()
            if run.accelerator.is_main_process:
                sheet(network, args.work / "samples.png")
        return {"held_out_loss": loss, "batch": BATCH}

    training.run(step_loss, report, args.report_minutes)


def averaged(weights: dict[str, Tensor]) -> UNet2DModel:
    """The network with averaged weights, ready for inference."""
    network = build_unet()
    network.load_state_dict(weights)
    return network.eval()


def sheet(network: UNet2DModel, path: Path) -> None:
    """Sixteen samples, 20 DDIM steps, in two rows."""
    scheduler = DDIMScheduler(**SCHEDULE)
    scheduler.set_timesteps(20)
    device = network.device
    x_t = torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(0)).to(device)
    for t in scheduler.timesteps:
        x_t = scheduler.step(network(x_t, t).sample, t, x_t).prev_sample
    pictures = VaeImageProcessor(vae_scale_factor=1).postprocess(x_t.clamp(-1, 1).cpu())
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(pictures, 2, 8, resize=56).save(path)


def export(args: argparse.Namespace) -> None:
    """Write the pipeline in fp16 and how it was trained."""
    folder = args.work / "unet"
    if not (folder / "state.json").is_file():
        raise SystemExit(f"no checkpoint in {folder}: run the 'train' stage first")
    state = json.loads((folder / "state.json").read_text())
    tensors = load_file(folder / f"state-{state['step']}.safetensors")
    network = averaged({k[4:]: v for k, v in tensors.items() if k.startswith("ema/")})
    pipe = DDPMPipeline(network, DDPMScheduler(**SCHEDULE)).to(torch.float16)
    pipe.save_pretrained(args.output)
    record = state | {
        "minutes": round(state.pop("elapsed") / 60, 1),
        "parameters": sum(p.numel() for p in network.parameters()) / 1e6,
        "machine": args.machine or platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    write_json(args.output / "training.json", record)
    epochs = state["step"] * state["batch"] / 60_000
    (args.output / "README.md").write_text(CARD.format(**record, epochs=epochs))
    size = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(f"{size / 1e6:.1f} MB: {args.output}")


def main(argv: list[str] | None = None) -> None:
    """Command line of this file; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=["train", "export"])
    parser.add_argument("--minutes", type=float, default=50, help="time budget")
    parser.add_argument("--report-minutes", type=float, default=5, help="between checkpoints")
    parser.add_argument("--data", type=Path, help="folder of the four idx files")
    parser.add_argument("--work", type=Path, default=Path("cache/fashion"), help="checkpoints")
    parser.add_argument("--precision", choices=["auto", "bf16", "no"], default="auto")
    parser.add_argument("--machine", help="export: name of the machine, for the record")
    parser.add_argument("-o", "--output", type=Path, default=MODEL)
    args = parser.parse_args(argv)
    {"train": train, "export": export}[args.stage](args)


if __name__ == "__main__":
    main()
