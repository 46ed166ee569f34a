# %% [markdown]
# # First picture
#
# You have a diffusers pipeline. Pilotage gives its call one more argument, `guidance=`. Here you
# draw the same prompts with plain classifier-free guidance (CFG), with a rule that stays calm at
# high scales, and with a policy that leaves network evaluations out.
#
# **Install:** `pip install "pilotage[emoji]" matplotlib`. The notebook needs no GPU: it draws
# with the *embedded model*, a small one that makes 64 × 64 emoji and that `[emoji]` installs. For
# **your own model**, replace `load_embedded()` below with
#
# ```python
# from diffusers import AutoPipelineForText2Image
# from pilotage import guided
#
# pipe = guided(AutoPipelineForText2Image.from_pretrained("your/model").to("cuda"))
# ```
#
# and write prompts that suit it. Nothing else changes.

# %%
import torch
from diffusers.utils import make_image_grid
from IPython.display import display

from pilotage.eval.embedded import load_embedded

pipe = load_embedded()  # a stock StableDiffusionPipeline that takes guidance=
pipe.set_progress_bar_config(disable=True)
print(type(pipe).__name__)

# %% [markdown]
# ## Draw
#
# The call is the one you know. Without `guidance=` it is the stock pipeline; `guidance="cfg"`
# gives the same pictures, bit for bit, and keeps a record of what was evaluated. Every prompt has
# its own seed, so that all settings below begin with the same noise.

# %%
prompts = [
    "twemoji style red apple",
    "noto style penguin",
    "fluent style cactus",
    "flat style police car",
]


def draw(guidance, scale, **options):
    return pipe(
        prompts,
        guidance=guidance,
        guidance_scale=scale,
        num_inference_steps=20,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))],
        **options,
    ).images


def show(images):
    display(make_image_grid(images, rows=1, cols=len(images), resize=144))


calm = draw("cfg", 3)
show(calm)

# %% [markdown]
# ## Turn the scale up
#
# A higher scale holds a picture closer to its prompt. Plain CFG pays for that: colours burn out
# and edges turn black. APG (adaptive projected guidance) takes out the part of the update that
# does this. First row: CFG at 15. Second row: APG at 15, from the same noise.

# %%
burnt = draw("cfg", 15)
show(burnt)
clean = draw("apg", 15)
show(clean)

# %% [markdown]
# What the eye sees can be counted. Contrast is the spread of brightness in a picture:

# %%
from pilotage.eval.metrics.images import contrast, to_tensor

for title, images in {"CFG at 3": calm, "CFG at 15": burnt, "APG at 15": clean}.items():
    print(f"{title:10} contrast {contrast(to_tensor(images)).mean():.3f}")

# %% [markdown]
# CFG at 15 has more contrast than CFG at 3, and APG at 15 does not follow it there. Four pictures
# are a look, not a measurement: the notebook *Which guidance* shows how to compare settings, and
# the [results](../../docs/results/scale.md) have hundreds of pictures.
#
# ## Fewer evaluations
#
# Guidance costs two network evaluations a step. Adaptive Guidance, `"ag"`, watches the two
# predictions of every picture and drops the second one for good once they agree. A rule and a
# policy combine with a plus sign.

# %%
full = draw("apg", 7.5)
print("apg   ", pipe.guidance_trace.nfe)
show(full)
shorter = draw("apg+ag", 7.5)
print("apg+ag", pipe.guidance_trace.nfe)
show(shorter)

# %% [markdown]
# The numbers are network evaluations, one for each picture: a full run has 2 × 20 = 40, and each
# picture stops when *it* is ready. The pictures change a little, because the end of the run is no
# longer guided.
#
# The record of the last run can be plotted. `gamma` is the cosine of the two predictions, a faint
# line for each picture: a line ends where the policy found it close enough to 1. (With
# `detailed_trace=True` in the call, norms are recorded as well.)

# %%
# %matplotlib inline
pipe.guidance_trace.plot()

# %% [markdown]
# ## Keep a setting
#
# Names are short for objects with settings. An object can be saved, and a file in a model's
# `guidance/` folder is a name: `guidance="calm"` finds `guidance/calm.json` beside the weights.

# %%
from pilotage.guidance import APG, AdaptiveGuidance, load_guidance, save_guidance

save_guidance("calm.json", APG(eta=0.2) | AdaptiveGuidance(0.99))
again = load_guidance("calm.json")
print(again)
show(draw(again, 10))

# %% [markdown]
# **Next:** [all methods, and when not to use them](../../docs/methods/index.md) · [pipelines that
# are supported](../../docs/pipelines.md)
