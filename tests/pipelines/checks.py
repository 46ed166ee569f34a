"""What the seam must show of every family, as functions that tests and the report share."""

import functools
from dataclasses import replace

import numpy as np
import torch

from pilotage.guidance import APG, AdaptiveGuidance, Schedule
from pilotage.pipelines import LAYOUTS, guided

from ..families import FAMILIES
from ..oracles.apg import PaperMomentum, paper_apg
from ..oracles.x0 import own_prediction, own_x0

# Families that give the guided prediction the conditional one's norm: none can be forecast.
NORM_MATCHED = ["qwen_image", "lumina2"]
COVERED = [name for name, family in FAMILIES.items() if family.cls in LAYOUTS]


def latents(pipe, name, batch=3, negative=None, **extra):
    if negative is None:  # true CFG means a second branch only where there is a negative prompt
        negative = FAMILIES[name].scale_name == "true_cfg_scale"
    return pipe(**(FAMILIES[name].call(batch, negative) | extra))[0]


def equal(a, b):
    return torch.equal(torch.as_tensor(np.asarray(a)), torch.as_tensor(np.asarray(b)))


class Rows:
    """Counts the rows that reach a pipeline's denoisers."""

    def __init__(self, pipe, name):
        self.calls = []
        networks = [getattr(pipe, denoiser) for denoiser in FAMILIES[name].denoisers]
        self.handles = [
            network.register_forward_pre_hook(self._count, with_kwargs=True) for network in networks
        ]

    def _count(self, module, args, kwargs):
        self.calls.append(len(args[0] if args else next(iter(kwargs.values()))))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def cfg_bit_equal(name):
    """Whether guidance="cfg" and guidance=None give the stock pipeline's output exactly."""
    pipe = FAMILIES[name].build()
    for batch in (1, 3):
        for negative in {False, FAMILIES[name].negative}:
            pipe.__class__ = getattr(type(pipe), "stock_class", type(pipe))
            stock = latents(pipe, name, batch, negative)
            guided(pipe)
            for guidance in ("cfg", None):
                if not equal(stock, latents(pipe, name, batch, negative, guidance=guidance)):
                    return False
    return True


def parting_policy(pipe, name, **extra):
    """A policy under which the samples of a batch stop at different steps, if there is one."""
    latents(pipe, name, guidance=AdaptiveGuidance(1.5), **extra)
    gammas = sorted(g for step in pipe.guidance_trace.steps for g in step.gamma.tolist())
    for low, high in zip(gammas, gammas[1:], strict=False):
        policy = AdaptiveGuidance((low + high) / 2)
        latents(pipe, name, guidance=policy, **extra)
        if len(set(pipe.guidance_trace.nfe)) > 1:
            return policy
    return None


def ag_rows_ok(name):
    """Whether the rows counted at the network are 2 * (guided steps) + (the rest), per sample."""
    pipe = guided(FAMILIES[name].build())
    never, at_once = AdaptiveGuidance(1.5), AdaptiveGuidance(-1.0)
    for policy in (never, at_once, parting_policy(pipe, name)):
        if policy is None:
            return False
        with Rows(pipe, name) as rows:
            latents(pipe, name, guidance=policy)
        trace = pipe.guidance_trace
        steps = len(trace.steps)
        guided_steps = [sum(row in step.rows for step in trace.steps) for row in range(3)]
        if trace.nfe != [2 * k + (steps - k) for k in guided_steps]:
            return False
        if sum(rows.calls) != sum(trace.nfe):
            return False
        if policy is never and guided_steps != [steps] * 3:
            return False
        if policy is at_once and guided_steps != [1] * 3:
            return False
    return True


def held_outputs(pipe, choices):
    """Make a stock pipeline's scheduler take, at forecast steps, the output of the last other."""
    stock, index, last = pipe.scheduler.step, -1, None

    @functools.wraps(stock)
    def step(model_output, *args, **kwargs):
        nonlocal index, last
        index += 1
        last = last if choices[index] == "forecast" else model_output
        return stock(last, *args, **kwargs)

    pipe.scheduler.step = step


def forecast_error(name):
    """Difference between a schedule that holds outputs and a scheduler that does.

    Every other step evaluates nothing; the rows counted at the network must say so. In units of
    what holding changes.
    """
    pipe = guided(FAMILIES[name].build())
    plain = latents(pipe, name, guidance="cfg")
    total = len(pipe.guidance_trace.steps)
    choices = tuple("forecast" if i % 2 else "both" for i in range(total))
    with Rows(pipe, name) as rows:
        ours = latents(pipe, name, guidance=Schedule(choices))
    nfe = 2 * choices.count("both")
    assert pipe.guidance_trace.nfe == [nfe] * 3 and sum(rows.calls) == 3 * nfe
    stock = FAMILIES[name].build()
    held_outputs(stock, choices)
    values = (ours, latents(stock, name), plain)
    ours, expected, plain = (torch.as_tensor(np.asarray(v)).double() for v in values)
    return ((ours - expected).norm() / (plain - expected).norm()).item()


def resting_rows_ok(name):
    """Whether samples that rest, each at its own pace, reach no network and count as they cost."""
    pipe = guided(FAMILIES[name].build())
    parting = parting_policy(pipe, name)
    latents(pipe, name, guidance=parting)
    steps = len(pipe.guidance_trace.steps)
    guided_steps = [n - steps for n in pipe.guidance_trace.nfe]
    with Rows(pipe, name) as rows:
        latents(pipe, name, guidance=replace(parting, then="forecast"))
    expected = [2 * k + (steps - k) // 2 * 2 for k in guided_steps]
    return pipe.guidance_trace.nfe == expected and sum(rows.calls) == sum(expected)


# What the pipelines' sources say, read apart from Pilotage's layouts.
NEGATED = {"lumina", "lumina2", "z_image"}
COND_FIRST = {"dit", "lumina", "z_image", "stable_cascade"}
SCALE_IS_W_MINUS_1 = {"kandinsky3", "z_image"}
GUIDED_CHANNELS = {"lumina": 3}
FIRST_STEP = {"sd_img2img": 1, "sdxl_img2img": 1}


class PaperGuidance:
    """Makes a stock pipeline follow Algorithm 1, by hooks that replace what its denoisers return.

    Denoised images come from the scheduler's own code, the algorithm runs in float64.
    """

    eta, r, beta = 0.2, 2.0, -0.6

    def __init__(self, pipe, name, scale):
        self.pipe, self.name = pipe, name
        self.w = scale + (name in SCALE_IS_W_MINUS_1)
        self.sign = -1 if name in NEGATED else 1
        self.index, self.first, self.averages = FIRST_STEP.get(name, 0), None, None
        two_calls = FAMILIES[name].layout.startswith("two_calls")
        hook = self.two_calls if two_calls else self.batched
        for denoiser in FAMILIES[name].denoisers:
            getattr(pipe, denoiser).register_forward_hook(hook, with_kwargs=True)

    def guide(self, x, cond, uncond):
        """The guided network output of one step; channels that are not guided stay cond's."""
        channels = min(x.shape[1], cond.shape[1], GUIDED_CHANNELS.get(self.name, x.shape[1]))
        x, rest = x[:, :channels].double(), cond[:, channels:].double()
        self.averages = self.averages or [PaperMomentum(self.beta) for _ in x]
        c, u = (
            own_x0(self.pipe.scheduler, self.index, self.sign * pred[:, :channels], x).numpy()
            for pred in (cond, uncond)
        )
        rows = [
            paper_apg(c[i], u[i], self.w, average, self.eta, self.r)
            for i, average in enumerate(self.averages)
        ]
        guided = torch.from_numpy(np.stack(rows))
        pred = self.sign * own_prediction(self.pipe.scheduler, self.index, guided, x)
        self.index += 1
        return torch.cat([pred, rest], 1)

    def batched(self, module, args, kwargs, output):
        x = args[0] if args else next(iter(kwargs.values()))
        out = output if isinstance(output, torch.Tensor) else output[0]
        listed = isinstance(x, list)
        x, out = (torch.stack(list(v)) if listed else v for v in (x, out))
        cond, uncond = out.chunk(2)[:: 1 if self.name in COND_FIRST else -1]
        guided = self.guide(x.chunk(2)[0], cond, uncond).to(out.dtype)
        both = torch.cat([guided, guided])
        both = list(both) if listed else both
        if isinstance(output, torch.Tensor):
            return both
        return (both,) if isinstance(output, tuple) else type(output)(sample=both)

    def two_calls(self, module, args, kwargs, output):
        if self.first is None:
            self.first = (next(iter(kwargs.values())), output[0])
            return output
        x, cond = self.first
        self.first = None
        guided = self.guide(x, cond, output[0])
        # The unconditional prediction u for which u + w (c - u) is the guided one.
        return (((guided - self.w * cond.double()) / (1 - self.w)).to(cond.dtype),)


def apg_error(name):
    """Relative difference between the guided pipeline and the stock one led by the paper."""
    family, scale = FAMILIES[name], 6.0
    extra = {family.scale_name: scale}
    rule = APG(
        eta=PaperGuidance.eta,
        norm_threshold=PaperGuidance.r,
        momentum=PaperGuidance.beta,
        threshold_unit="l2",
    )
    ours = latents(guided(family.build()), name, guidance=rule, **extra)
    stock = family.build()
    PaperGuidance(stock, name, scale)
    expected = latents(stock, name, **extra)
    ours, expected, plain = (
        torch.as_tensor(np.asarray(v)).double()
        for v in (ours, expected, latents(family.build(), name, **extra))
    )
    assert (plain - expected).norm() / expected.norm() > 1e-3, "APG must change something"
    return ((ours - expected).norm() / expected.norm()).item()
