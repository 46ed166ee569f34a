# %% [markdown]
# # Fewer evaluations on your model
#
# With guidance every step evaluates the network twice. Three policies leave some of that out. Each
# is held here against the obvious alternative: plain guidance with fewer steps, at the same number
# of evaluations.
#
# **Install:** `pip install "pilotage[emoji,eval]"`. The notebook needs no GPU: it draws with the
# *embedded model*, a small one that makes 64 × 64 emoji and that `[emoji]` installs. For **your
# own model**, replace `load_embedded()` with
# `guided(AutoPipelineForText2Image.from_pretrained("your/model").to("cuda"))` (`guided` is in
# `pilotage`, the rest in diffusers) and take prompts that suit it.

# %%
import torch
from diffusers.utils import make_image_grid
from IPython.display import display

from pilotage.eval.embedded import load_embedded
from pilotage.eval.metrics.images import ssim, to_tensor

pipe = load_embedded()
pipe.set_progress_bar_config(disable=True)
prompts = [
    "noto style penguin",
    "fluent style cactus",
    "blob style cat face",
    "flat style police car",
]


def draw(guidance, steps=20, **options):
    images = pipe(
        prompts,
        guidance=guidance,
        guidance_scale=7.5,
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))],
        **options,
    ).images
    nfe = pipe.guidance_trace.nfe  # network evaluations of every picture
    return images, sum(nfe) / len(nfe)


def show(images):
    display(make_image_grid(images, rows=1, cols=len(images), resize=128))


full, cost = draw("cfg")
print(f"CFG, 20 steps: {cost:g} evaluations a picture")
show(full)

# %% [markdown]
# ## Four ways to save
#
# - `"ag"` drops the unconditional prediction once it agrees with the conditional one;
# - `"linear-ag"` estimates it from earlier predictions, with coefficients fitted to this very
#   model (for yours: `pilotage fit`, see the end);
# - `"forecast"` evaluates everything at first, then nothing at every other step, and takes the
#   last guided prediction once more;
# - CFG with fewer steps.
#
# SSIM tells how similar a picture is to the one of the full run; 1 is the same picture.

# %%
reference = to_tensor(full)
settings = [("ag", 20), ("cfg", 15), ("linear-ag", 20), ("cfg", 12), ("forecast", 20)]
drawn = {}
for guidance, steps in settings:
    images, cost = draw(guidance, steps)
    drawn[guidance, steps] = images
    similarity = ssim(to_tensor(images), reference).mean()
    print(f"{guidance:10} {steps} steps: {cost:4.1f} evaluations, SSIM {similarity:.3f}")

# %% [markdown]
# Read the rows in pairs of equal cost. `ag` costs about as much as 15 steps of CFG, and those are
# nearer to the full run: on this model, leaving guidance out at the end changes more than making
# larger steps. `linear-ag` is behind 12 steps in the same way. `forecast` costs what 12 steps cost
# and is ahead of them: it keeps the first steps, which decide what the picture will be, and keeps
# guidance to the end. [Hundreds of pictures](../../docs/results/fewer-evaluations.md) say the
# same, and where it does not hold.
#
# Full run, `forecast` and 12 steps of CFG, a row each:

# %%
show(full)
show(drawn["forecast", 20])
show(drawn["cfg", 12])

# %% [markdown]
# ## See what was evaluated
#
# `guidance_trace` records a run step by step. With `forecast` the first fifth of the run makes
# both evaluations at every step, then two and none take turns:

# %%
# %matplotlib inline
pipe.guidance_trace.plot()

# %% [markdown]
# ## How far can you go?
#
# `forecast` has two settings: the share of the run that is evaluated in full, and how many steps
# share one evaluation after it. Your model and scheduler decide how far you can go, so look:

# %%
from pilotage.guidance import forecast

for first, period in [(0.4, 2), (0.2, 4)]:
    images, cost = draw(forecast(first=first, period=period))
    plain, _ = draw("cfg", steps=round(cost / 2))
    similarity, beside = (ssim(to_tensor(one), reference).mean() for one in (images, plain))
    print(f"first={first}, period={period}: {cost:g} evaluations, SSIM {similarity:.3f}")
    print(f"CFG at the same cost: SSIM {beside:.3f}")
show(images)

# %% [markdown]
# The pictures are those of the cheaper one. SSIM is not everything: skipped steps can leave a
# little grain where fewer steps would give a clean but different picture.
#
# ## Settings that belong to a model
#
# A threshold for `ag`, coefficients for `linear-ag` or a schedule are found once for a model,
# scheduler and number of steps. `calibrate` finds the threshold for a wanted cost, on a few
# prompts. `then="forecast"` is our variant of Adaptive Guidance: after the stop, skipped and
# guided steps in turn.

# %%
from pilotage.eval.tuning.calibration import calibrate
from pilotage.eval.tuning.trials import Trials

found = calibrate(Trials(pipe, prompts, progress=False), target_nfe=28, then="forecast")
print(found.guidance)
print(f"{found.best.nfe:.1f} evaluations, SSIM {found.best.quality:.3f}")
found.save("ag-28.json")  # in your model's folder guidance/ it is a name: guidance="ag-28"

# %% [markdown]
# Use about 30 prompts in earnest. The same in a shell, and the two other fits:
#
# ```sh
# m=my-model
# pilotage calibrate prompts.txt --model $m --nfe 28 --then forecast -o $m/guidance/ag-28.json
# pilotage fit prompts.txt --model $m -o $m/guidance/linear-ag.json
# pilotage search prompts.txt --model $m --floor 0.95 --fitted -o $m/guidance/quick.json
# ```
#
# [Find cheaper settings for your model](../../docs/how-to/tuning.md)
