"""Measure CFG, APG and AG on the embedded model over held-out prompts: ``eval/results/spine.json``.

    python -m examples.emoji.data prepare && python -m examples.studies.spine

Prompts are the (concept, style) pairs that were held out of training; their real pictures are the
reference. DPM++ 2M with 20 steps, one seed a prompt, the same noise for every setting.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from examples.emoji import data as emoji
from examples.studies.timing import evaluations_of, seconds_in_turn
from pilotage.eval.comparison.sampling import Setting
from pilotage.eval.embedded import embedded_folder, load_embedded
from pilotage.eval.metrics.efficientnet import EfficientNetLite
from pilotage.eval.metrics.images import contrast, saturation, ssim, to_tensor
from pilotage.eval.record import write_figures

STEPS = 20
BATCH = 8
SCALES = (3, 7.5, 15)
AG_SCALE = 7.5
TIMING_ROUNDS = 9


class Counter:
    """Counts the rows that reach a network."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.rows = 0
        network.register_forward_pre_hook(self._count)

    def _count(self, _module, args) -> None:
        self.rows += args[0].shape[0]


def generate(pipe, prompts: list[str], guidance: str, scale: float) -> tuple[Tensor, list[int]]:
    """Pictures (N, 3, 64, 64) in [0, 1] and network evaluations of each prompt."""
    images, nfe = [], []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        images += pipe(
            part,
            guidance=guidance,
            guidance_scale=scale,
            num_inference_steps=STEPS,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(part))],
        ).images
        nfe += pipe.guidance_trace.nfe
    return to_tensor(images), nfe


def retrieval(features: Tensor, gallery: Tensor, concepts: list[str]) -> float:
    """Share of pictures whose nearest real picture (cosine) shows the same concept."""
    features, gallery = (f / f.norm(dim=1, keepdim=True) for f in (features, gallery))
    nearest = (features @ gallery.T).argmax(1).tolist()
    hits = [concepts[i] == concepts[j] for i, j in enumerate(nearest)]
    return sum(hits) / len(hits)


def time_ratio(pipe, prompts: list[str]) -> tuple[float, float]:
    """Ratio AG / CFG of seconds (median of pairs) and of network evaluations, for one batch."""
    pair = [Setting(guidance, AG_SCALE, STEPS) for guidance in ("ag", "cfg")]
    seconds = seconds_in_turn(pipe, pair, prompts[:BATCH], TIMING_ROUNDS)
    ratios = [ag / cfg for ag, cfg in zip(*seconds.values(), strict=True)]
    ag, cfg = (evaluations_of(pipe, setting, prompts[:BATCH]) for setting in pair)
    return statistics.median(ratios), ag / cfg


def quickstart_seconds() -> float:
    """Wall time of the whole quickstart process."""
    script = Path(__file__).resolve().parents[1] / "quickstart.py"
    start = time.perf_counter()
    subprocess.run([sys.executable, str(script)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure(archive: Path) -> dict:
    """All figures of the spine."""
    everyday = emoji.load(archive, everyday=True)
    held = [d for d in everyday if d.split == "pair"]
    prompts, concepts = [d.text for d in held], [d.concept for d in held]
    real = to_tensor(emoji.pictures(archive, held))
    pipe = load_embedded()
    pipe.set_progress_bar_config(disable=True)
    counter = Counter(pipe.unet)

    images, nfe = {}, {}
    settings = [(name, w) for name in ("cfg", "apg") for w in SCALES] + [("ag", AG_SCALE)]
    for name, scale in tqdm(settings, unit="setting"):
        counter.rows = 0
        images[name, scale], nfe[name, scale] = generate(pipe, prompts, name, scale)
        if counter.rows != sum(nfe[name, scale]):
            raise RuntimeError(
                f"{name} {scale}: the trace says {sum(nfe[name, scale])} network evaluations, "
                f"{counter.rows} rows reached the UNet"
            )
    extractor = EfficientNetLite("efficientnet-lite0")
    gallery = extractor(real)
    guided = extractor(images["cfg", AG_SCALE])
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.randperm(len(held), generator=generator)
    seconds, rows = time_ratio(pipe, prompts)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds_one_thread, _ = time_ratio(pipe, prompts)
    torch.set_num_threads(threads)

    def table(statistic) -> dict:
        of_real = round(statistic(real).mean().item(), 4)
        columns = {"real": {f"{w:g}": of_real for w in SCALES}}
        for name in ("cfg", "apg"):
            columns[name] = {
                f"{w:g}": round(statistic(images[name, w]).mean().item(), 4) for w in SCALES
            }
        return columns

    ag_nfe = nfe["ag", AG_SCALE]
    size = sum(f.stat().st_size for f in embedded_folder().rglob("*") if f.is_file())
    return {
        "prompts": len(prompts),
        "steps": STEPS,
        "saturation": table(saturation),
        "contrast": table(contrast),
        "ag": {
            "guidance_scale": AG_SCALE,
            "setting": str(pipe.resolve_guidance("ag")),
            "nfe_mean": round(statistics.mean(ag_nfe), 3),
            "nfe_min": min(ag_nfe),
            "nfe_max": max(ag_nfe),
            "ssim_to_cfg": round(
                ssim(images["ag", AG_SCALE], images["cfg", AG_SCALE]).mean().item(), 4
            ),
            "time_ratio": round(seconds, 4),
            "time_ratio_one_thread": round(seconds_one_thread, 4),
            "nfe_ratio": round(rows, 4),
            "batch": BATCH,
        },
        "retrieval": {
            "guided": round(retrieval(guided, gallery, concepts), 4),
            "guided_apg": round(
                retrieval(extractor(images["apg", AG_SCALE]), gallery, concepts), 4
            ),
            "shuffled": round(retrieval(guided[shuffled], gallery, concepts), 4),
            "extractor": extractor.name,
        },
        "model": {"megabytes": round(size / 1e6, 2)},
        "quickstart_seconds": round(quickstart_seconds(), 1),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archive", type=Path, default=emoji.DEFAULT_ARCHIVE)
    parser.add_argument("-o", "--output", type=Path, default=Path("eval/results/spine.json"))
    args = parser.parse_args()
    figures = measure(args.archive)
    write_figures(args.output, figures)
    print(args.output.read_text())


if __name__ == "__main__":
    main()
