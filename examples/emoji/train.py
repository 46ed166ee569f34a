"""Train the embedded text-to-image model: a stock ``StableDiffusionPipeline`` for 64x64 emoji.

Two stages, each with its own time budget and each resumable (kill it, run the command again):

    python -m examples.emoji.train autoencoder --preset cpu --minutes 20
    python -m examples.emoji.train denoiser    --preset cpu --minutes 100
    python -m examples.emoji.train export      --preset cpu -o examples/emoji/model

``--preset gpu`` trains on the whole set (start it with ``accelerate launch`` for several devices);
``--preset cpu`` restricts the concepts to ``everyday.txt``. The data are made by ``python -m
examples.emoji.data prepare``.

The autoencoder maps 3x64x64 pictures to 4x16x16 latents; the denoiser predicts v
(Salimans & Ho 2022) under a cosine schedule rescaled to zero terminal SNR (Lin et al. 2024,
arXiv 2305.08891), with captions dropped for classifier-free guidance.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from examples.emoji import data as emoji
from examples.emoji.card import model_card
from examples.emoji.networks import (
    MAX_TOKENS,
    NOISE_SCHEDULE,
    PRESETS,
    Denoiser,
    Preset,
    Reconstruction,
    assemble,
    build_autoencoder,
    build_text_encoder,
    build_tokenizer,
    build_unet,
)
from examples.emoji.training import Training
from pilotage.guidance.files import write_json

CAPTION_DROPOUT = 0.12
CROPS_UNTIL = 0.73  # of the autoencoder's clock


def load_pixels(archive: Path, drawings: list[emoji.Drawing]) -> Tensor:
    """Pictures as uint8 (N, 3, H, W)."""
    images = tqdm(emoji.pictures(archive, drawings), total=len(drawings), desc="decoding")
    stack = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in images]
    side = emoji.RESOLUTION
    return torch.stack(stack).view(-1, side, side, 3).permute(0, 3, 1, 2).contiguous()


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 [0, 255] to float [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1).contiguous(memory_format=torch.channels_last)


def train_autoencoder(args: argparse.Namespace, preset: Preset) -> None:
    """L1 on pixels and on their finite differences, plus a weak KL term."""
    drawings = emoji.load(args.archive)
    train = [d for d in drawings if d.split == "train"]
    held = [d for d in drawings if d.split != "train"][:256]
    torch.manual_seed(0)
    model = Reconstruction(build_autoencoder(preset))
    training = Training("autoencoder", model, args, preset.autoencoder_learning_rate)
    device = training.accelerator.device
    pixels = load_pixels(args.archive, train).to(device)
    held_pixels = load_pixels(args.archive, held).to(device)

    def batch(generator: torch.Generator) -> Tensor:
        # Crops are cheap and varied, but group norms must also see whole pictures.
        crop = preset.crop if training.progress < CROPS_UNTIL else emoji.RESOLUTION
        n = preset.autoencoder_batch * preset.crop**2 // crop**2
        rows = torch.randint(len(pixels), (n,), generator=generator, device=device)
        room = emoji.RESOLUTION - crop
        corner = torch.randint(room + 1, (2, n, 1), generator=generator, device=device)
        span = torch.arange(crop, device=device)
        y, x = (corner[0] + span)[:, None, :, None], (corner[1] + span)[:, None, None, :]
        channel = torch.arange(3, device=device)[None, :, None, None]
        return to_unit(pixels[rows[:, None, None, None], channel, y, x])

    def step_loss() -> Tensor:
        generator = training.generator()
        images = batch(generator)
        side = images.shape[-1] // 4
        noise = torch.randn(len(images), 4, side, side, generator=generator, device=device)
        decoded, divergence = training.model(images, noise)
        error = decoded.float() - images
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        return error.abs().mean() + 0.5 * edges + 1e-6 * divergence.mean()

    def report(run: Training) -> dict:
        model = ema_copy(run, Reconstruction(build_autoencoder(preset))).vae
        with torch.inference_mode():
            images = to_unit(held_pixels)
            decoded = torch.cat(
                [
                    model.decode(model.encode(part).latent_dist.mean).sample
                    for part in images.split(64)
                ]
            )
            mse = (decoded.clamp(-1, 1) - images).div(2).square().mean().item()
        columns = min(14, len(images))
        rows = zip(images.split(columns)[:2], decoded.split(columns)[:2], strict=True)
        sheet = torch.cat([part for pair in rows for part in pair])
        if run.accelerator.is_main_process:
            save_sheet(sheet, args.work / "autoencoder.png", columns)
        return {"held_out_psnr": -10 * math.log10(mse), "steps": run.step}

    training.run(step_loss, report, args.report_minutes)


def ema_copy(run: Training, model: nn.Module) -> nn.Module:
    """`model` with the averaged weights, ready for inference."""
    model.load_state_dict(run.ema)
    return model.to(run.accelerator.device, memory_format=torch.channels_last).eval()


def save_sheet(images: Tensor, path: Path, columns: int) -> None:
    """Pictures in [-1, 1], in a grid."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = VaeImageProcessor().postprocess(images.clamp(-1, 1).cpu())
    emoji.contact_sheet(pictures, columns).save(path)


def trained_autoencoder(args: argparse.Namespace, preset: Preset) -> AutoencoderKL:
    """The autoencoder of stage 1 (averaged weights)."""
    folder = args.work / "autoencoder"
    if not (folder / "state.json").is_file():
        raise SystemExit(f"no autoencoder in {folder}: run the 'autoencoder' stage first")
    step = json.loads((folder / "state.json").read_text())["step"]
    tensors = load_file(folder / f"state-{step}.safetensors")
    model = Reconstruction(build_autoencoder(preset))
    weights = {k.removeprefix("ema/"): v for k, v in tensors.items() if k.startswith("ema/")}
    model.load_state_dict(weights)
    return model.vae.eval()


@torch.inference_mode()
def encode(model: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Posterior means of uint8 pictures, (N, 4, 16, 16)."""
    device = next(model.parameters()).device
    return torch.cat(
        [model.encode(to_unit(part.to(device))).latent_dist.mean for part in pixels.split(64)]
    )


def random_caption(drawing: emoji.Drawing, rng: random.Random) -> str:
    """The caption with zero to three tags, or nothing (for the unconditional branch)."""
    if rng.random() < CAPTION_DROPOUT:
        return ""
    count = rng.choice((0, 0, 1, 2, 3))
    return emoji.caption(
        drawing.style, drawing.concept, rng.sample(drawing.tags, min(count, len(drawing.tags)))
    )


def train_denoiser(args: argparse.Namespace, preset: Preset) -> None:
    """v-prediction on cached latents, text encoder trained along."""
    drawings = emoji.load(args.archive, preset.everyday)
    train = [d for d in drawings if d.split == "train"]
    held = [d for d in drawings if d.split == "pair"]
    captions = [emoji.caption(d.style, d.concept, d.tags) for d in emoji.load(args.archive)]
    tokenizer = build_tokenizer(captions)
    torch.manual_seed(0)
    model = Denoiser(build_unet(preset), build_text_encoder(tokenizer))
    training = Training("denoiser", model, args, preset.learning_rate)
    device = training.accelerator.device

    autoencoder = trained_autoencoder(args, preset).to(device, memory_format=torch.channels_last)
    latents = encode(autoencoder, load_pixels(args.archive, train))
    scale = 1 / latents.std().item()
    latents = latents * scale
    held_latents = encode(autoencoder, load_pixels(args.archive, held)) * scale
    autoencoder.register_to_config(scaling_factor=scale)
    noise_schedule = DDPMScheduler(**NOISE_SCHEDULE)
    noise_schedule.alphas_cumprod = noise_schedule.alphas_cumprod.to(device)

    def tokenize(texts: list[str]) -> Tensor:
        tokens = tokenizer(
            texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        )
        return tokens.input_ids.to(device)

    def loss_of(network, x0: Tensor, tokens: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(x0.shape, generator=generator, device=device)
        t = torch.randint(1000, (len(x0),), generator=generator, device=device)
        x_t = noise_schedule.add_noise(x0, noise, t).contiguous(memory_format=torch.channels_last)
        target = noise_schedule.get_velocity(x0, noise, t)
        return (network(x_t, t, tokens).float() - target).square().mean()

    def step_loss() -> Tensor:
        generator = training.generator()
        rows = torch.randint(len(train), (preset.batch,), generator=generator, device=device)
        rng = random.Random(generator.initial_seed())
        texts = [random_caption(train[row], rng) for row in rows.tolist()]
        return loss_of(training.model, latents[rows], tokenize(texts), generator)

    def report(run: Training) -> dict:
        network = ema_copy(run, Denoiser(build_unet(preset), build_text_encoder(tokenizer)))
        pipe = assemble(autoencoder, network, tokenizer)
        with torch.inference_mode():
            generator = torch.Generator(device).manual_seed(0)
            tokens = tokenize([d.text for d in held])
            losses = [loss_of(network, held_latents, tokens, generator).item() for _ in range(4)]
        if run.accelerator.is_main_process:
            picks = held[:: max(1, len(held) // 28)][:28]
            pipe.set_progress_bar_config(disable=True)
            images = pipe(
                [d.text for d in picks],
                guidance_scale=4.0,
                num_inference_steps=20,
                generator=torch.Generator().manual_seed(0),
                output_type="pil",
            ).images
            sheet = emoji.contact_sheet(images, 14, [d.text.replace(" style", "") for d in picks])
            sheet.save(args.work / "denoiser.png")
        return {
            "held_out_loss": sum(losses) / len(losses),
            "steps": run.step,
            "batch": preset.batch,
        }

    training.run(step_loss, report, args.report_minutes)
    if training.accelerator.is_main_process:
        network = ema_copy(training, Denoiser(build_unet(preset), build_text_encoder(tokenizer)))
        assemble(autoencoder, network, tokenizer).save_pretrained(args.work / "pipeline")


def export(args: argparse.Namespace, preset: Preset) -> None:
    """Write the pipeline in fp16 (shards of at most 14 MB) and what it was trained on."""
    pipe = StableDiffusionPipeline.from_pretrained(args.work / "pipeline", safety_checker=None)
    pipe.to(torch.float16).save_pretrained(args.output, max_shard_size="14MB")
    drawings = [d for d in emoji.load(args.archive, preset.everyday) if d.split == "train"]
    stages = {}
    for stage in ("autoencoder", "denoiser"):
        state = json.loads((args.work / stage / "state.json").read_text())
        stages[stage] = state | {"minutes": round(state.pop("elapsed") / 60, 1)}
    card = {
        "preset": args.preset,
        "settings": asdict(preset),
        "pictures": len(drawings),
        "concepts": len({d.concept for d in drawings}),
        "styles": sorted({d.style for d in drawings}),
        "stages": stages,
        "parameters": {
            name: sum(p.numel() for p in getattr(pipe, name).parameters())
            for name in ("vae", "text_encoder", "unet")
        },
        "machine": args.machine or platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    write_json(args.output / "training.json", card)
    (args.output / "README.md").write_text(model_card(card))
    size = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(f"{size / 1e6:.1f} MB: {args.output}")


def main(argv: list[str] | None = None) -> None:
    """Command line of this file; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=["autoencoder", "denoiser", "export"])
    parser.add_argument("--preset", choices=list(PRESETS), default="cpu")
    parser.add_argument("--minutes", type=float, default=20, help="time budget of the stage")
    parser.add_argument("--report-minutes", type=float, default=5, help="between checkpoints")
    parser.add_argument("--archive", type=Path, default=emoji.DEFAULT_ARCHIVE)
    parser.add_argument("--work", type=Path, default=Path("cache/emoji"), help="checkpoints")
    parser.add_argument("--precision", choices=["auto", "bf16", "no"], default="auto")
    parser.add_argument("--machine", help="export: name of the machine, for the record")
    parser.add_argument("-o", "--output", type=Path, default=Path("examples/emoji/model"))
    args = parser.parse_args(argv)
    stages = {"autoencoder": train_autoencoder, "denoiser": train_denoiser, "export": export}
    stages[args.stage](args, PRESETS[args.preset])


if __name__ == "__main__":
    main()
