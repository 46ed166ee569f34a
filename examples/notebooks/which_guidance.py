# %% [markdown]
# # Which guidance?
#
# A handful of prompts, a few settings, one answer. You give Pilotage prompts and settings; it
# draws all of them from the same noise, measures what they cost and how near they come to pictures
# that you like, and recommends one if the pictures can tell.
#
# **Install:** `pip install "pilotage[emoji,eval]"`. The notebook needs no GPU: it draws with the
# *embedded model*, a small one that makes 64 × 64 emoji and that `[emoji]` installs. For **your
# own model**, replace `load_embedded()` with
# `guided(AutoPipelineForText2Image.from_pretrained("your/model").to("cuda"))` (`guided` is in
# `pilotage`, the rest in diffusers).

# %%
import json
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from IPython.display import Markdown, display
from PIL import Image

from pilotage.eval.embedded import load_embedded

pipe = load_embedded()
pipe.set_progress_bar_config(disable=True)
prompts = [
    "twemoji style red apple",
    "noto style penguin",
    "fluent style cactus",
    "blob style cat face",
    "flat style police car",
    "emojione style birthday cake",
    "twemoji style sunflower",
    "noto style hamburger",
]
print(len(prompts), "prompts")

# %% [markdown]
# ## Pictures that you like
#
# What is *good*? Pilotage has no taste of its own: name a folder of real pictures of what your
# prompts say (`reference = "photos/"`), and settings are judged by the Fréchet distance to them,
# the distance of FID.
#
# There are no real emoji at hand here. In their place we take the model's own pictures at a low
# scale with other seeds. So in this notebook *good* means: like mild guidance, with other noise.
# With your photographs it means something better.

# %%
reference = Path("reference")
reference.mkdir(exist_ok=True)
for seed in (100, 200, 300):
    images = pipe(
        prompts,
        guidance="cfg",
        guidance_scale=3,
        num_inference_steps=10,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))],
    ).images
    for i, image in enumerate(images):
        image.save(reference / f"{seed + i}.png")
display(make_image_grid(images, rows=1, cols=len(images), resize=96))

# %% [markdown]
# ## Compare
#
# Three settings at two scales. In a shell this is
#
# ```sh
# pilotage compare prompts.txt -g cfg -g apg -g ag -w 7.5 -w 15 \
#     --steps 10 --reference reference -o which
# ```
#
# `compare` adds CFG with fewer steps for every setting that is cheaper than CFG: a method that
# saves evaluations has to beat the obvious way to save them.

# %%
from pilotage.eval.comparison.comparison import compare, grid
from pilotage.eval.comparison.plan import Plan
from pilotage.eval.pictures import Pictures

plan = Plan(prompts, grid(["cfg", "apg", "ag"], [7.5, 15], [10]))
rows = compare(pipe, plan, "which", Pictures.of(reference), progress=False)
for row in rows:
    print(
        f"{row['label']:22} evaluations {row['nfe']:4.1f}  contrast {row['contrast']:.3f}"
        f"  Fréchet distance {row['fd']:.0f}"
    )

# %% [markdown]
# Distances of so few pictures are large and uncertain; only those of one table can be compared.
# Here are the pictures of the settings at 15, a row each:

# %%
for row in rows:
    if row["w"] == 15:
        print(row["label"])
        files = sorted(Path("which", row["folder"]).glob("*.png"))
        display(make_image_grid([Image.open(f) for f in files], rows=1, cols=len(files), resize=96))

# %% [markdown]
# ## Read the answer
#
# The folder `which` now holds `report.html`: open it for all pictures with a slider, figures and
# curves. Its first lines are in `cells.json` too:

# %%
answer = json.loads(Path("which/cells.json").read_text())["recommendation"]
display(Markdown("\n\n".join([f"**{answer['headline']}**", *answer["sentences"]])))
for line in ("python", "command"):
    print(answer[line] or "")

# %% [markdown]
# It names the *cheapest* setting that is not clearly worse than the best one. "Clearly" is strict:
# prompts are drawn again and again, and the difference has to survive that. Eight prompts can tell
# large differences only, and the text says how many would be needed for the rest:

# %%
print(f"beside {answer['setting']}:")
for one in answer["verdicts"]:
    print(f"{one['setting']:22} {one['verdict']}")

# %% [markdown]
# **For your model:** 32 prompts or more and some hundred real pictures. Compare at equal
# *strength* with `compare(..., matched=True)`: much of what methods seem to win at the same scale
# is only that they guide less. [How to read a comparison](../../docs/how-to/comparing.md)
