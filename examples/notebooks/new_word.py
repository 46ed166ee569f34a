# %% [markdown]
# # A new word by forward passes
#
# Five pictures of one thing, and a model that does not know what you call it. Pilotage learns a
# word for it, a textual inversion, **without backpropagation**: it makes small changes to the word,
# and from how the loss answers it estimates where to go. So it works where there is no backward
# pass, with int8 weights or on ONNX Runtime, and, with `max_rows=2`, in about the memory of
# inference.
#
# **Install:** `pip install "pilotage[emoji]" matplotlib`. The notebook needs no GPU: it uses the
# *embedded model*, a small one that makes 64 × 64 emoji and that `[emoji]` installs. For **your
# own model**, replace `load_embedded()` with
# `guided(StableDiffusionPipeline.from_pretrained("your/model").to("cuda"))` (`guided` is in
# `pilotage`, the rest in diffusers): Stable Diffusion 1, 2 or XL.

# %%
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from IPython.display import display

from pilotage.eval.embedded import load_embedded

pipe = load_embedded()
pipe.set_progress_bar_config(disable=True)


def draw(prompts, first_seed):
    images = pipe(
        prompts,
        guidance="cfg",
        guidance_scale=4,
        num_inference_steps=15,
        generator=[torch.Generator().manual_seed(first_seed + i) for i in range(len(prompts))],
    ).images
    display(make_image_grid(images, rows=1, cols=len(images), resize=128))
    return images


# %% [markdown]
# ## The pictures
#
# Take your own: a folder with three to ten. A text file beside a picture is its prompt, with `{}`
# where the new word goes. Here the model draws the folder itself: penguins in five styles. The
# learning below is never told that they are penguins; it begins at *bird*, and the model's
# vocabulary has no single entry for a penguin that it could run into.

# %%
folder = Path("pictures")
folder.mkdir(exist_ok=True)
styles = ["twemoji", "noto", "fluent", "blob", "flat"]
for style, image in zip(
    styles, draw([f"{style} style penguin" for style in styles], 10), strict=True
):
    image.save(folder / f"{style}.png")
    (folder / f"{style}.txt").write_text(f"{style} style {{}}")

# %% [markdown]
# ## Learn
#
# 75 steps of eight forward passes (the default is 1,000 steps). First, 35 known words of the model
# are tried as beginnings. The held-out loss, on noise that the steps do not use, tells whether
# anything is learned.

# %%
from pilotage.pipelines import Personalizer

word = Personalizer(pipe).fit(
    folder,
    "<my-bird>",
    "bird",
    steps=75,
    output="word",
    resume=False,
    preview_every=0,
    progress=False,
)
print(f"learned: {word.learned}, {word.forwards} forward passes")
for step, _, loss in word.evaluations:
    print(f"step {step:3}: held-out loss {loss:.3f}")

# %% [markdown]
# The loss falls. Were no later one below the first, `learned` would be False, and no file written.
#
# ## Use it
#
# `word/learned_embeds.safetensors` is an ordinary textual inversion: `add_token` loads it here,
# `pipe.load_textual_inversion` in diffusers without Pilotage. First row: *bird*, where the search
# began. Second row: the new word, same prompts, same noise. The first two styles are not among the
# pictures it learned from.

# %%
from pilotage.pipelines import add_token, remove_token

add_token(pipe, "word/learned_embeds.safetensors")
styles = ["emojione", "fxemoji", "twemoji", "blob", "flat"]
for name in ("bird", "<my-bird>"):
    print(name)
    draw([f"{style} style {name}" for style in styles], 100)

# %% [markdown]
# The birds have become penguins: upright, dark with a white belly. This was an easy case: the
# model can draw penguins, and only had to find where it keeps them. What a model cannot nearly
# draw, a word does not teach it, with exact gradients either:
# [figures](../../docs/results/personalization.md).

# %%
remove_token(pipe, "<my-bird>")
print("<my-bird>" in pipe.tokenizer.get_vocab())

# %% [markdown]
# In a shell, with int8 weights, previews and a curve, and a run that can be stopped and continued:
#
# ```sh
# pilotage personalize pictures/ --token "<my-bird>" --initializer bird --quantize int8 -o word
# pilotage generate "noto style <my-bird>" --token word/learned_embeds.safetensors
# ```
#
# Where there *is* a backward pass, use it: it needs fewer forward passes. [Learn a word from
# pictures](../../docs/how-to/personalizing.md)
