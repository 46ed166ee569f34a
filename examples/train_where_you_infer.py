"""A new word learned on the runtime that draws: int8 graphs on ONNX Runtime or OpenVINO.

    pip install -c constraints.txt -e ".[openvino]"
    python examples/train_where_you_infer.py --backend openvino

The embedded model draws four pictures that stand for yours; its networks are exported as int8
graphs calibrated on them; a word is learned from the pictures by forward passes of those graphs,
and drawn by them. `pilotage export` and `pilotage personalize --backend` do the same from a shell.

What an int8 run learns comes from the comparison of known words: losses of near tokens drown in the
rounding of activations (figures in docs/how-to/runtimes.md).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from pilotage.eval.embedded import load_embedded
from pilotage.pipelines.personalization import Personalizer, calibrate
from pilotage.pipelines.runtimes import RUNTIMES, export_onnx, on_runtime, quantize_onnx, recorded

SUBJECT = "twemoji style red apple"
WORD, INITIALIZER = "<my-apple>", "fruit"


def main() -> None:
    """Draw, export, calibrate, learn, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=list(RUNTIMES), default="onnxruntime")
    parser.add_argument("--steps", type=int, default=60, help="of the search")
    parser.add_argument("-o", "--output", type=Path, default=Path("outputs/train_where_you_infer"))
    args = parser.parse_args()

    pipe = load_embedded()
    pipe.set_progress_bar_config(disable=True)
    noise = [torch.Generator().manual_seed(seed) for seed in range(4)]
    pictures = pipe([SUBJECT] * 4, guidance="apg", num_inference_steps=20, generator=noise).images

    with tempfile.TemporaryDirectory() as scratch:
        export_onnx(pipe, scratch)
        on_runtime(pipe, scratch, args.backend)
        with recorded(pipe) as inputs:
            calibrate(Personalizer(pipe), pictures)
        quantize_onnx(scratch, args.output / "graphs", inputs)

    pipe = on_runtime(load_embedded(), args.output / "graphs", args.backend)
    pipe.set_progress_bar_config(disable=True)
    personalizer = Personalizer(pipe)
    token = personalizer.fit(
        pictures,
        WORD,
        INITIALIZER,
        templates=["twemoji style {}"],
        steps=args.steps,
        output=args.output,
    )
    losses = [loss for _, _, loss in token.evaluations]
    with personalizer.speaking(WORD, token.vectors):
        generator = torch.Generator().manual_seed(0)
        picture = pipe(f"twemoji style {WORD}", guidance="apg", generator=generator).images[0]
    picture.save(args.output / "picture.png")
    print(f"{args.backend}: held-out loss {losses[0]:.4f} -> {min(losses):.4f}")
    print(args.output / "picture.png")


if __name__ == "__main__":
    main()
