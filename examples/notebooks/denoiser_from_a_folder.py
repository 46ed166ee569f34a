# %% [markdown]
# # A denoiser from a folder
#
# The best denoiser of a set of pictures needs no training: it is a weighted mean of them, in
# closed form. Pilotage computes it, and variants of it, from a folder. You can denoise with it,
# draw new pictures with it under any scheduler of diffusers, and ask it which picture a pixel came
# from.
#
# **Install:** `pip install "pilotage[emoji]" matplotlib`. No GPU and no network are needed. For
# **your own pictures** set `folder` below to where they lie and leave out the cell that draws
# some: here the *embedded model*, a small one that makes 64 × 64 emoji and that `[emoji]`
# installs, fills the folder.

# %%
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from IPython.display import display
from PIL import Image

from pilotage.eval.embedded import load_embedded

folder = Path("faces")
folder.mkdir(exist_ok=True)
model = load_embedded()
model.set_progress_bar_config(disable=True)
styles = ["noto", "fluent", "blob", "twemoji", "flat", "emojione"]
animals = ["cat face", "tiger face", "panda", "bear", "koala"]
for number, animal in enumerate(animals):
    images = model(
        [f"{style} style {animal}" for style in styles],
        guidance="forecast",
        guidance_scale=3,
        num_inference_steps=12,
        generator=[torch.Generator().manual_seed(10 * number + i) for i in range(len(styles))],
    ).images
    for style, image in zip(styles, images, strict=True):
        image.save(folder / f"{animal} {style}.png")
files = sorted(folder.glob("*.png"))


def show(images, rows=1):
    display(make_image_grid(images, rows=rows, cols=len(images) // rows, resize=96))


show([Image.open(file) for file in files], rows=3)

# %% [markdown]
# ## Draw new pictures
#
# The pipeline is one of diffusers: the computed denoiser stands where a UNet would, under DDIM
# here. Three methods, from the same noise:
#
# - `optimal` is the exact answer for these pictures: whole pictures are compared with the noisy
#   one;
# - `wiener` is the best *linear* denoiser: it knows mean and covariance only;
# - `pspc` compares small crops, and averages them.

# %%
from pilotage.pipelines import AnalyticDenoisingPipeline

pipe = AnalyticDenoisingPipeline(images=folder, method="optimal")
pipe.set_progress_bar_config(disable=True)
for method in ("optimal", "wiener", "pspc"):
    print(method)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(8)]
    show(pipe(8, method=method, generator=seeds).images)

# %% [markdown]
# `optimal` gives the folder's own pictures back: the exact optimum only remembers. `wiener` mixes
# all of them into ghosts. `pspc` is the interesting one: every place is plausible, the whole is
# new, here a patchwork of faces.
# [How much of a trained network such denoisers explain](../../docs/results/analytic.md)
#
# ## Denoise a picture
#
# Take one picture out, add noise, and let the others explain it. Pixels are in [−1, 1]; σ is the
# standard deviation of the noise.

# %%
from diffusers.image_processor import VaeImageProcessor

from pilotage.guidance.analytic import DENOISERS, decode, load_images

pictures = decode(load_images(folder)[0])
left_out, others = pictures[:1], pictures[1:]
processor = VaeImageProcessor(vae_scale_factor=1)


def as_images(tensors):
    return processor.postprocess(torch.cat(tensors).clamp(-1, 1), output_type="pil")


denoisers = {name: DENOISERS[name](others) for name in ("optimal", "wiener", "pspc")}
noise = torch.randn(left_out.shape, generator=torch.Generator().manual_seed(0))
for sigma in (0.3, 1.0):
    noisy = left_out + sigma * noise
    row = {name: denoiser(noisy, sigma) for name, denoiser in denoisers.items()}
    errors = [f"{name} {(result - left_out).square().mean():.3f}" for name, result in row.items()]
    print(f"sigma {sigma}, mean squared error: noisy {sigma**2:.3f},", ", ".join(errors))
    show(as_images([left_out, noisy, *row.values()]))

# %% [markdown]
# From left to right: the picture, the noisy one, `optimal`, `wiener`, `pspc`. `optimal` can only
# answer with a picture that it has: at low noise its answer is further from the truth than the
# noisy picture itself. `pspc` puts the face together from pieces of others, and is nearest.
#
# ## Where does a pixel come from?
#
# With `return_info=True` a denoiser also names the picture that each pixel mostly came from. On
# the right every colour is a file:

# %%
# %matplotlib inline
import matplotlib.pyplot as plt

result, info = denoisers["pspc"](left_out + noise, 1.0, return_info=True)
sources = info.top[0, 0]
figure, axes = plt.subplots(1, 2, figsize=(6, 3))
axes[0].imshow(as_images([result])[0])
axes[1].imshow(sources, cmap="nipy_spectral")
for axis in axes:
    axis.axis("off")
plt.show()
counts = sources.flatten().bincount(minlength=len(others))
for place in counts.argsort(descending=True)[:3].tolist():
    print(f"{counts[place] / counts.sum():4.0%} from {files[place + 1].name}")

# %% [markdown]
# **Next:** [other methods, subfolders as classes, many pictures](../../docs/how-to/denoising.md) ·
# [equations, and when not](../../docs/methods/analytic-denoisers.md). The same in a shell:
# `pilotage denoise faces/`.
