"""Train the embedded text-to-image model: a stock ``StableDiffusionPipeline`` for 64x64 emoji.

Two stages, each with its own time budget and each resumable (kill it, run the command again):

    python examples/emoji/train.py autoencoder --preset cpu --minutes 20
    python examples/emoji/train.py denoiser    --preset cpu --minutes 100
    python examples/emoji/train.py export      --preset cpu -o examples/emoji/model

``--preset gpu`` trains on the whole set (start it with ``accelerate launch`` for several devices);
``--preset cpu`` restricts the concepts to ``everyday.txt``. The data come from ``data.py prepare``.

The autoencoder maps 3x64x64 pictures to 4x16x16 latents; the denoiser predicts v
(Salimans & Ho 2022) under a cosine schedule rescaled to zero terminal SNR (Lin et al. 2024,
arXiv 2305.08891), with captions dropped for classifier-free guidance.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import data as emoji

MAX_TOKENS = 24
CAPTION_DROPOUT = 0.12
CROPS_UNTIL = 0.73  # of the autoencoder's clock
EMA_DECAY = 0.999
NOISE_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
}


@dataclass(frozen=True)
class Preset:
    """What differs between a run on two CPU cores and one on a GPU."""

    everyday: bool
    autoencoder_channels: tuple[int, ...]
    unet_channels: tuple[int, ...]
    unet_attention: tuple[bool, ...]
    autoencoder_batch: int
    crop: int
    batch: int
    learning_rate: float
    autoencoder_learning_rate: float


PRESETS = {
    "cpu": Preset(True, (16, 32, 96), (64, 128, 160), (False, True, False), 64, 32, 32, 6e-4, 2e-3),
    "gpu": Preset(
        False, (32, 64, 128), (96, 160, 160), (False, True, True), 128, 64, 512, 1e-3, 1e-3
    ),
}


# --- building blocks -------------------------------------------------------------------------


def build_autoencoder(preset: Preset) -> AutoencoderKL:
    """A convolutional AutoencoderKL, 64x64x3 to 16x16x4."""
    levels = len(preset.autoencoder_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=preset.autoencoder_channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=emoji.RESOLUTION,
        mid_block_add_attention=False,
    )


def build_tokenizer(captions: list[str], vocabulary: int = 2048) -> CLIPTokenizer:
    """A CLIP tokenizer (lower-cased byte-pair encoding) trained on the captions."""
    specials = ["<|startoftext|>", "<|endoftext|>"]
    empty = CLIPTokenizer(vocab={token: i for i, token in enumerate(specials)}, merges=[])
    trained = empty.train_new_from_iterator([captions], vocabulary)
    trained.model_max_length = MAX_TOKENS
    return trained


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A small CLIPTextModel of the tokenizer's vocabulary."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet(preset: Preset) -> UNet2DConditionModel:
    """A UNet2DConditionModel on 4x16x16 latents."""
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in preset.unet_attention]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(preset.unet_attention)]
    return UNet2DConditionModel(
        sample_size=emoji.RESOLUTION // 4,
        in_channels=4,
        out_channels=4,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        block_out_channels=preset.unet_channels,
        layers_per_block=1,
        cross_attention_dim=192,
        attention_head_dim=4,
        norm_num_groups=16,
    )


class Denoiser(nn.Module):
    """UNet and text encoder trained together."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """Predict v for latents (B, 4, 16, 16), timesteps (B,) and tokens (B, L)."""
        states = self.text_encoder(tokens).last_hidden_state
        return self.unet(x_t, t, encoder_hidden_states=states).sample


# --- one resumable training run --------------------------------------------------------------


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
        """Write weights, EMA, Adam's moments (safetensors) and the clock (JSON), then rename."""
        if not self.accelerator.is_main_process:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"model/{k}": v for k, v in self.bare.state_dict().items()}
        tensors |= {f"ema/{k}": v for k, v in self.ema.items()}
        for i, parameter in enumerate(self.bare.parameters()):
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"adam/{i}.{moment}"] = self.optimizer.state[parameter][moment]
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        older = list(self.folder.glob("state-*.safetensors"))
        newest = self.folder / f"state-{self.step}.safetensors"
        save_file(tensors, self.folder / "partial")
        os.replace(self.folder / "partial", newest)
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


def write_json(path: Path, value: dict) -> None:
    """Write JSON under a temporary name, then rename."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, path)


def load_pixels(archive: Path, drawings: list[emoji.Drawing]) -> Tensor:
    """Pictures as uint8 (N, 3, H, W)."""
    images = tqdm(emoji.pictures(archive, drawings), total=len(drawings), desc="decoding")
    stack = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in images]
    side = emoji.RESOLUTION
    return torch.stack(stack).view(-1, side, side, 3).permute(0, 3, 1, 2).contiguous()


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 [0, 255] to float [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1).contiguous(memory_format=torch.channels_last)


# --- stage 1: the autoencoder ----------------------------------------------------------------


def train_autoencoder(args: argparse.Namespace, preset: Preset) -> None:
    """L1 on pixels and on their finite differences, plus a weak KL term."""
    drawings = emoji.load(args.archive)
    train = [d for d in drawings if d.split == "train"]
    held = [d for d in drawings if d.split != "train"][:256]
    torch.manual_seed(0)
    training = Training(
        "autoencoder", build_autoencoder(preset), args, preset.autoencoder_learning_rate
    )
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
        posterior = training.bare.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, device=device)
        decoded = training.bare.decode(posterior.mean + posterior.std * noise).sample.float()
        error = decoded - images
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        return error.abs().mean() + 0.5 * edges + 1e-6 * posterior.kl().mean()

    def report(run: Training) -> dict:
        model = ema_copy(run, build_autoencoder(preset))
        with torch.inference_mode():
            images = to_unit(held_pixels)
            decoded = torch.cat(
                [
                    model.decode(model.encode(part).latent_dist.mean).sample
                    for part in images.split(64)
                ]
            )
            mse = (decoded.clamp(-1, 1) - images).div(2).square().mean().item()
        sheet = torch.cat(
            [images[:28].unflatten(0, (2, 14)), decoded[:28].unflatten(0, (2, 14))], 1
        )
        save_sheet(sheet.flatten(0, 1), args.work / "autoencoder.png")
        return {"held_out_psnr": -10 * math.log10(mse), "steps": run.step}

    training.run(step_loss, report, args.report_minutes)


def ema_copy(run: Training, model: nn.Module) -> nn.Module:
    """`model` with the averaged weights, ready for inference."""
    model.load_state_dict(run.ema)
    return model.to(run.accelerator.device, memory_format=torch.channels_last).eval()


def save_sheet(images: Tensor, path: Path) -> None:
    """Pictures in [-1, 1], 14 to a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = VaeImageProcessor().postprocess(images.clamp(-1, 1).cpu())
    emoji.contact_sheet(pictures, 14).save(path)


# --- stage 2: the denoiser -------------------------------------------------------------------


def trained_autoencoder(args: argparse.Namespace, preset: Preset) -> AutoencoderKL:
    """The autoencoder of stage 1 (averaged weights)."""
    folder = args.work / "autoencoder"
    if not (folder / "state.json").is_file():
        raise SystemExit(f"no autoencoder in {folder}: run the 'autoencoder' stage first")
    step = json.loads((folder / "state.json").read_text())["step"]
    tensors = load_file(folder / f"state-{step}.safetensors")
    model = build_autoencoder(preset)
    model.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("ema/")})
    return model.eval()


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


def assemble(
    autoencoder: AutoencoderKL, network: Denoiser, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """A stock pipeline of the trained parts, with DPM++ 2M."""
    scheduler = DPMSolverMultistepScheduler(
        **NOISE_SCHEDULE, timestep_spacing="trailing", steps_offset=1
    )
    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=network.text_encoder,
        tokenizer=tokenizer,
        unet=network.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


# --- export ----------------------------------------------------------------------------------


def export(args: argparse.Namespace, preset: Preset) -> None:
    """Write the pipeline in fp16 (shards of at most 14 MB) and what it was trained on."""
    pipe = StableDiffusionPipeline.from_pretrained(args.work / "pipeline", safety_checker=None)
    pipe.to(torch.float16).save_pretrained(args.output, max_shard_size="14MB")
    drawings = [d for d in emoji.load(args.archive, preset.everyday) if d.split == "train"]
    stages = {}
    for stage in ("autoencoder", "denoiser"):
        state = json.loads((args.work / stage / "state.json").read_text())
        stages[stage] = {**state, "minutes": round(state.pop("elapsed") / 60, 1)}
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
