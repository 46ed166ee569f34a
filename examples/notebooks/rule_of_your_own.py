# %% [markdown]
# # A rule of your own
#
# You have an idea how guidance should combine its two predictions. Here it becomes a class of ten
# lines, and then a name that works in every pipeline, with every policy, in saved files and in
# reports.
#
# **Install:** `pip install "pilotage[emoji]" matplotlib`. The notebook needs no GPU: it draws
# with the *embedded model*, a small one that makes 64 × 64 emoji and that `[emoji]` installs. For
# **your own model**, replace `load_embedded()` with
# `guided(AutoPipelineForText2Image.from_pretrained("your/model").to("cuda"))` (`guided` is in
# `pilotage`, the rest in diffusers).

# %%
import torch
from diffusers.utils import make_image_grid
from IPython.display import display

from pilotage.eval.embedded import load_embedded

pipe = load_embedded()
pipe.set_progress_bar_config(disable=True)
prompts = [
    "twemoji style red apple",
    "noto style penguin",
    "fluent style cactus",
    "blob style cat face",
]


def draw(guidance, scale=12, count=4, **options):
    return pipe(
        prompts[:count],
        guidance=guidance,
        guidance_scale=scale,
        num_inference_steps=20,
        generator=[torch.Generator().manual_seed(seed) for seed in range(count)],
        **options,
    ).images


def show(images):
    display(make_image_grid(images, rows=1, cols=len(images), resize=144))


show(draw("cfg"))

# %% [markdown]
# That is plain guidance at a scale of 12: too much. Perhaps the strength is needed late, for
# details, and does its harm early. The idea: let it rise over the run.
#
# ## The rule
#
# A rule is a frozen dataclass of its settings with one method, `combine`. It gets the predictions,
# the step, the scale w, and what it returned as its state at the last step; it returns the guided
# prediction and the next state. This one has no state.

# %%
from dataclasses import dataclass

from pilotage.guidance import Rule, register


@register
@dataclass(frozen=True)
class Ramp(Rule):
    """CFG whose strength rises over the run."""

    name = "ramp"
    power: float = 1.0

    def combine(self, predictions, step, w, state):
        cond, uncond = predictions.pair(self.space)
        share = ((step.index + 1) / step.total) ** self.power
        return cond + share * (w - 1) * (cond - uncond), None


show(draw("ramp"))

# %% [markdown]
# The same noise and scale, but less burnt: the steps that decide colours and large shapes were
# guided less. `self.space` says what the predictions are (here denoised images), so the rule is
# the same for models that predict noise, velocity or flow.
#
# ## Does it do what you meant?
#
# The record of a run tells. `scale factor` is the size of the update in units of plain CFG's. With
# a power of 1 it should rise to 1 in a straight line, with others along a curve:

# %%
import matplotlib.pyplot as plt

plt.figure(figsize=(6, 2.5))
for power in (0.5, 1, 3):
    draw(Ramp(power=power), count=1, detailed_trace=True)
    steps = pipe.guidance_trace.steps
    plt.plot(
        [one.index for one in steps],
        [one.scale_factor.item() for one in steps],
        label=f"power {power}",
    )
plt.xlabel("step")
plt.ylabel("scale factor")
plt.legend()
plt.show()

# %% [markdown]
# Every rule makes two promises, which are quick to test without a network: at w = 1 there is no
# guidance, and no sample influences another one of its batch.

# %%
from pilotage.guidance import Predictions, Step

step = Step(5, total=20)
cond, uncond = torch.randn(2, 3, 4, 8, 8)  # three samples in each branch


def combined(rows, w):
    predictions = Predictions({"cond": cond[rows], "uncond": uncond[rows]}, step)
    guided, _ = Ramp().combine(predictions, step, w, None)
    return guided


print("w = 1 is no guidance:", torch.equal(combined(slice(3), 1.0), cond))
alone, together = combined(slice(1), 5.0), combined(slice(3), 5.0)[:1]
print("alone and in a batch the same:", torch.equal(alone, together))

# %% [markdown]
# ## With policies, in files
#
# Your rule is a name now. `"ramp+ag"` drops the unconditional prediction once the two agree,
# `"ramp+forecast"` skips steps; neither needed a line from you.

# %%
from pilotage.guidance import Guidance, load_guidance, save_guidance

for name in ("ramp", "ramp+ag", "ramp+forecast"):
    images = draw(name)
    print(f"{name:14} evaluations of every picture: {pipe.guidance_trace.nfe}")
show(images)

save_guidance("mine.json", Guidance(Ramp(power=2.0)))
print(load_guidance("mine.json"))

# %% [markdown]
# ## A policy of your own
#
# Which steps are guided at all is a policy. If that is known beforehand, no class is needed: write
# a table. Here every second step is guided, and then none of the last ten: 25 evaluations instead
# of 40.

# %%
from pilotage.guidance import Schedule

register(lambda: Schedule(("both", "cond") * 5 + ("cond",) * 10), name="half")
images = draw("ramp+half")
print(pipe.guidance_trace.nfe)
show(images)

# %% [markdown]
# **Next:** what a rule may read and has to promise, policies that decide by what they measure, and
# how a package makes its names known to the command line: [write a rule or a
# policy](../../docs/how-to/own-rules.md).
