"""The model card, from the record of a training run."""

from __future__ import annotations

CARD = """---
license: apache-2.0
pipeline_tag: text-to-image
library_name: diffusers
---
# Emoji, 64x64: the embedded model of Pilotage

A stock `StableDiffusionPipeline` that draws an emoji from a prompt of the form
"<style> style <name>", such as "twemoji style red apple". Styles: {styles}.
It exists to measure guidance on something real and small, not to make pictures for use.

{completeness}

| | |
|---|---|
| denoiser trained on | {pictures} pictures of {concepts} concepts (licences: `NOTICE.md`) |
| autoencoder trained on | the training split of all concepts |
| held out | concepts and (concept, style) pairs of `examples/emoji/splits.json` |
| parameters | UNet {unet:.1f} M, text encoder {text_encoder:.1f} M, autoencoder {vae:.1f} M |
| autoencoder | {a_steps} steps in {a_minutes} minutes |
| … its losses | final {a_loss:.4f}, held-out PSNR {psnr:.1f} dB |
| denoiser | {d_steps} steps of {batch} in {d_minutes} minutes |
| … its losses | final {d_loss:.4f}, held-out pairs {h_loss:.4f} |
| machine | {machine}, torch {torch} |

v-prediction, cosine schedule rescaled to zero terminal SNR, EMA weights in fp16. Made by
`python -m examples.emoji.train`; `training.json` has every setting.

`guidance/` holds settings fitted to these very weights and refused by others. After another
training, `tune`, `spine`, `linearag` and `evaluate` of `examples/studies` make them and all figures
anew, each by `python -m examples.studies.NAME`.
"""
FULLY_TRAINED = "**Fully trained**: on the whole set, with an accelerator."
NOT_FULLY_TRAINED = """**Not fully trained**: this is the run for a machine without an
accelerator, on everyday concepts only (`examples/emoji/everyday.txt`). Other concepts give blobs.
The full run is the same recipe with `--preset gpu`, on one GPU:

    python -m examples.emoji.data prepare
    python -m examples.emoji.train autoencoder --preset gpu --minutes 5
    python -m examples.emoji.train denoiser --preset gpu --minutes 20
    python -m examples.emoji.train export --preset gpu"""


def model_card(record: dict) -> str:
    """The model card in Markdown, from what `export` recorded."""
    autoencoder, denoiser = record["stages"]["autoencoder"], record["stages"]["denoiser"]
    return CARD.format(
        styles=", ".join(record["styles"]),
        completeness=FULLY_TRAINED if record["preset"] == "gpu" else NOT_FULLY_TRAINED,
        pictures=record["pictures"],
        concepts=record["concepts"],
        **{name: count / 1e6 for name, count in record["parameters"].items()},
        a_steps=autoencoder["step"],
        a_minutes=autoencoder["minutes"],
        a_loss=autoencoder["loss"],
        psnr=autoencoder["held_out_psnr"],
        d_steps=denoiser["step"],
        d_minutes=denoiser["minutes"],
        d_loss=denoiser["loss"],
        h_loss=denoiser["held_out_loss"],
        batch=denoiser["batch"],
        machine=record["machine"],
        torch=record["torch"],
    )
