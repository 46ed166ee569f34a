"""Pipelines that nobody knows, with loops of their own; and a rule that looks on."""

import contextlib
import functools
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import diffusers as df
import torch
from diffusers.models.attention_processor import AttnProcessor

from pilotage.guidance import Rule

from ... import components as c
from ...families import FAMILIES
from ...families.base import UNET, Family, ddim
from ...families.stable_diffusion import sd


@dataclass(frozen=True)
class Watching(Rule):
    """Plain guidance in the manner of a rule, which notes every scale that it is given."""

    name: ClassVar[str] = "watching"

    seen: list = field(default_factory=list, compare=False)

    def combine(self, predictions, step, w, state):
        """See `Rule`."""
        cond, uncond = predictions.pair("native")
        self.seen.append(torch.as_tensor(w).clone())
        return uncond + torch.as_tensor(w).to(cond.dtype) * (cond - uncond), None

    @property
    def scales(self):
        """Scale of every step, as numbers."""
        return [float(w) for w in self.seen]


class HomemadePipeline(df.StableDiffusionPipeline):
    """A loop of its own; the subclasses say how a step evaluates its branches and mixes them."""

    @torch.no_grad()
    def __call__(
        self,
        prompt,
        negative_prompt=None,
        guidance_scale=5.0,
        num_inference_steps=3,
        height=None,
        width=None,
        generator=None,
        output_type="latent",
    ):
        batch = len(prompt)
        empty = [""] * batch if negative_prompt is None else negative_prompt
        cond, uncond = self.encode_prompt(prompt, "cpu", 1, True, empty)
        self.scheduler.set_timesteps(num_inference_steps)
        shape = (batch, self.unet.config.in_channels, height // 2, width // 2)
        latents = self.prepare_latents(
            *shape[:2], height, width, cond.dtype, torch.device("cpu"), generator
        )
        for t in self.scheduler.timesteps:
            x = self.scheduler.scale_model_input(latents, t)
            output = self.predicted(x, t, cond, uncond, guidance_scale)
            latents = self.scheduler.step(output, t, latents).prev_sample
        return (latents,)

    def network(self, x, t, text):
        """One call of the network."""
        return self.unet(x, t, encoder_hidden_states=text, return_dict=False)[0]


class ForwardPipeline(HomemadePipeline):
    """One call, the conditional branch first."""

    def predicted(self, x, t, cond, uncond, scale):
        """See the base."""
        c, u = self.network(torch.cat([x, x]), t, torch.cat([cond, uncond])).chunk(2)
        return u + scale * (c - u)


class NegatedPipeline(HomemadePipeline):
    """The network's output is negated before the scheduler steps it."""

    def predicted(self, x, t, cond, uncond, scale):
        """See the base."""
        u, c = self.network(torch.cat([x, x]), t, torch.cat([uncond, cond])).chunk(2)
        return -(u + scale * (c - u))


class OffsetPipeline(HomemadePipeline):
    """Its scale is w - 1."""

    def predicted(self, x, t, cond, uncond, scale):
        """See the base."""
        u, c = self.network(torch.cat([x, x]), t, torch.cat([uncond, cond])).chunk(2)
        return c + scale * (c - u)


class LateCondPipeline(HomemadePipeline):
    """Two calls, the unconditional branch first."""

    def predicted(self, x, t, cond, uncond, scale):
        """See the base."""
        u = self.network(x, t, uncond)
        c = self.network(x, t, cond)
        return torch.lerp(u, c, scale)


class NegatedOffsetPipeline(HomemadePipeline):
    """All of it at once."""

    def predicted(self, x, t, cond, uncond, scale):
        """See the base."""
        u = self.network(x, t, uncond)
        c = self.network(x, t, cond)
        return scale * u - (1 + scale) * c


def own_family(cls, layout, **settings):
    """A family of one of these classes."""

    def build():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe = cls(**sd(ddim()))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return Family(
        name=cls.__name__,
        cls=cls.__name__,
        build=build,
        call=partial(c.text_call, guidance_scale=5.0),
        scale_name="guidance_scale",
        layout=layout,
        denoisers=UNET,
        negative=True,
        **settings,
    )


OWN = {
    "forward": own_family(ForwardPipeline, "batch: cond uncond"),
    "negated": own_family(NegatedPipeline, "batch: uncond cond", negated=True),
    "offset": own_family(OffsetPipeline, "batch: uncond cond", w=lambda scale: scale + 1),
    "late_cond": own_family(LateCondPipeline, "calls: uncond cond"),
    "negated_offset": own_family(
        NegatedOffsetPipeline, "calls: uncond cond", w=lambda scale: scale + 1, negated=True
    ),
}


class SoftenedPipeline(df.StableDiffusionPipeline):
    """Rescales its combination, under a name of its own."""

    def __call__(self, prompt, guidance_scale=7.5, softened=0.0, **kwargs):
        """See the base."""
        kwargs = {"guidance_rescale": softened} | kwargs
        return super().__call__(prompt, guidance_scale=guidance_scale, **kwargs)


class BackwardsPipeline(df.StableDiffusionPipeline):
    """Passes on whatever it is given."""

    def __call__(self, prompt, **kwargs):
        """See the base."""
        return super().__call__([text[::-1] for text in prompt], **kwargs)


@contextlib.contextmanager
def recorded(pipe, steps, network="unet"):
    """Notes every step: what its network returned in each call, and what its scheduler is given."""
    outputs, scheduler = [], pipe.scheduler
    stock = scheduler.step

    def note(module, args, output):
        outputs.append((output if isinstance(output, torch.Tensor) else output[0]).clone())

    @functools.wraps(stock)
    def step(model_output, *args, **kwargs):
        steps.append((list(outputs), model_output.clone()))
        outputs.clear()
        return stock(model_output, *args, **kwargs)

    handle = getattr(pipe, network).register_forward_hook(note)
    scheduler.step = step
    try:
        yield
    finally:
        handle.remove()
        del scheduler.step


def stock_like(cls, name):
    """A pipeline of a class derived from a family's, with its components."""
    parts = FAMILIES[name].build()
    extra = {k: v for k, v in parts.config.items() if k.startswith("requires")}
    pipe = cls(**parts.components, **extra)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Bank:
    """An attention processor that remembers what it reads in one pass, and reads it again."""

    def __init__(self, pipe):
        self.pipe, self.kept, self.stock = pipe, None, AttnProcessor()

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        """Attend to oneself; in the second pass to the reference as well."""
        if self.pipe.writes:
            self.kept = hidden_states
            return self.stock(attn, hidden_states, **kwargs)
        both = torch.cat([hidden_states, self.kept], dim=1)
        return self.stock(attn, hidden_states, encoder_hidden_states=both, **kwargs)


class ReferencePipeline(HomemadePipeline):
    """As diffusers' community pipelines with a reference picture: the network runs twice a step.

    A pass over the noised reference, which writes, and one over the latents, which reads.
    """

    def predicted(self, x, t, cond, uncond, scale):
        """See the base."""
        text = torch.cat([uncond, cond])
        generator = torch.Generator().manual_seed(7)
        noise = torch.randn(x.shape[1:], generator=generator).expand_as(x)
        reference = self.scheduler.add_noise(0.5 * noise.flip(-1), noise, t.reshape(1))
        own = dict(self.unet.attn_processors)
        banks = [name for name in own if name.endswith("attn1.processor")]
        self.writes = True
        self.unet.set_attn_processor(own | {name: Bank(self) for name in banks})
        self.network(torch.cat([reference, reference]), t, text)
        self.writes = False
        u, c = self.network(torch.cat([x, x]), t, text).chunk(2)
        self.unet.set_attn_processor(own)
        return u + scale * (c - u)
