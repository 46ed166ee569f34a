"""What the seam must show of every family, as functions that tests and the report share."""

import functools
from dataclasses import replace

import numpy as np
import torch

from pilotage.guidance import APG, AdaptiveGuidance, Schedule
from pilotage.pipelines import guided

from ..families import FAMILIES
from ..oracles.apg import PaperMomentum, paper_apg
from ..oracles.x0 import own_prediction, own_x0

# Families that give the guided prediction the conditional one's norm: none can be forecast.
NORM_MATCHED = ["qwen_image", "lumina2"]
COVERED = [name for name, family in FAMILIES.items() if family.layout != "one"]


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
        branches = len(FAMILIES[name].layout.split()) - 1
        if trace.nfe != [branches * k + (steps - k) for k in guided_steps]:
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
    branches = len(FAMILIES[name].layout.split()) - 1
    nfe = branches * choices.count("both")
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
    branches = len(FAMILIES[name].layout.split()) - 1
    guided_steps = [(n - steps) // (branches - 1) for n in pipe.guidance_trace.nfe]
    with Rows(pipe, name) as rows:
        latents(pipe, name, guidance=replace(parting, then="forecast"))
    expected = [branches * (k + (steps - k) // 2) for k in guided_steps]
    return pipe.guidance_trace.nfe == expected and sum(rows.calls) == sum(expected)


class StepKnown(Exception):
    """All branches of a step were seen: the call starts anew, with what they make."""


class PaperGuidance:
    """Makes a stock pipeline follow Algorithm 1, by hooks that replace what its denoisers return.

    Every branch of a step returns the guided prediction, so that whatever the pipeline makes of
    its branches is that prediction: the oracle owes it nothing. Branches evaluated in turn are
    only known when the first has returned, so `run` then calls the pipeline again, up to the next
    step. Where the branches are, and what is guided of them, the family says. Denoised images come
    from the scheduler's own code, the algorithm runs in float64. The defaults are the paper's way
    of writing plain classifier-free guidance.
    """

    def __init__(self, family, call, eta=1.0, r=0.0, beta=0.0):
        """`call` makes the arguments of the pipeline's call, anew each time."""
        self.pipe, self.family, self.call = family.build(), family, call
        self.settings = eta, r, beta
        how, names = family.layout.split(": ")
        self.names = names.split()
        self.sign = -1 if family.negated else 1
        self.arguments = call()  # for the family's mix, which may keep in them what it must
        self.index, self.averages = family.first_step, None
        self.turn, self.seen, self.known = 0, [], []
        replace = {"batch": self.batched, "calls": self.in_turn}[how]

        def hook(module, args, kwargs, output):
            return replace(args, kwargs, output) if family.steps(kwargs) else output

        for denoiser in family.denoisers:
            getattr(self.pipe, denoiser).register_forward_hook(hook, with_kwargs=True)

    def run(self):
        """The latents that the led pipeline returns."""
        while True:
            self.turn = 0
            try:
                return self.pipe(**self.call())[0]
            except StepKnown:
                pass

    @property
    def scheduler(self):
        return getattr(self.pipe, self.family.scheduler)

    def mix(self, branches):
        """What the pipeline makes of its branches, and the weight of the conditional one."""
        call = self.arguments
        if self.family.mix is not None:
            return self.family.mix(branches, call)
        scale = call[self.family.scale_name]
        if self.family.scale_at is not None:
            scale = self.family.scale_at(call, float(self.scheduler.timesteps[self.index]))
        w = self.family.w(scale)
        return branches["uncond"] + w * (branches["cond"] - branches["uncond"]), w

    def guide(self, x, outputs, kwargs):
        """The guided network output of one step; what is not guided stays the conditional one's."""
        branches = dict(zip(self.names, outputs, strict=True))
        part = self.family.part(branches["cond"], x)
        guided = branches["cond"].double()
        x = x[part].double()
        branches = {name: output[part].double() for name, output in branches.items()}
        mixed, w = self.mix(branches)
        if self.family.mix is None:
            away = branches["uncond"]
        else:  # all that is added to cond, written as guidance away from one other prediction
            away = branches["cond"] - (mixed - branches["cond"]) / (w - 1)
        eta, r, beta = self.settings
        self.averages = self.averages or [PaperMomentum(beta) for _ in x]

        def denoised(prediction):
            if self.family.x0 is not None:
                return self.family.x0(self.scheduler, self.index, kwargs, prediction, x)
            return own_x0(self.scheduler, self.index, prediction, x)

        c, u = (denoised(self.sign * pred).numpy() for pred in (branches["cond"], away))
        w = w if isinstance(w, (int, float)) else np.asarray(w)
        rows = [
            paper_apg(c[i], u[i], w, average, eta, r) for i, average in enumerate(self.averages)
        ]
        prediction = self.sign * own_prediction(denoised, torch.from_numpy(np.stack(rows)))
        if self.family.norm_matched:
            norms = [v.norm(dim=-1, keepdim=True) for v in (branches["cond"], prediction)]
            ratio = norms[0] / norms[1]
            capped = self.family.norm_matched == "capped"
            prediction = prediction * (ratio.clamp(max=1) if capped else ratio)
        guided[part] = prediction
        self.index += 1
        # After one piece of a video the next starts, with the noisiest step. (Where every frame
        # has a noise level of its own there are more steps than timesteps; x0 is the family's.)
        if self.index == len(self.scheduler.timesteps) and self.family.x0 is None:
            self.index, self.averages = self.family.first_step, None
        return guided

    def noisy(self, args, kwargs):
        """What the network denoises."""
        if self.family.latents:
            return kwargs[self.family.latents]
        return args[0] if args else next(iter(kwargs.values()))

    def batched(self, args, kwargs, output):
        x = self.noisy(args, kwargs)
        out = output if isinstance(output, torch.Tensor) else output[0]
        listed = isinstance(x, list)
        x, out = (torch.stack(list(v)) if listed else v for v in (x, out))
        count = len(self.names)
        guided = self.guide(x.chunk(count)[0], out.chunk(count), kwargs).to(out.dtype)
        all_equal = torch.cat([guided] * count)
        return replaced(output, list(all_equal) if listed else all_equal)

    def in_turn(self, args, kwargs, output):
        step, turn = divmod(self.turn, len(self.names))
        self.turn += 1
        out = output if isinstance(output, torch.Tensor) else output[0]
        listed = isinstance(out, (list, tuple))
        if step == len(self.known):
            x = self.noisy(args, kwargs)
            x, out = (torch.stack(list(v)) if isinstance(v, (list, tuple)) else v for v in (x, out))
            self.seen.append(out)
            if turn + 1 < len(self.names):
                return output
            outputs, self.seen = self.seen, []
            self.known.append(self.guide(x, outputs, kwargs).to(out.dtype))
            raise StepKnown
        guided = self.known[step]
        if not listed:  # a branch may lack the tokens in front of those that are guided
            guided = guided[:, -out.shape[1] :]
        return replaced(output, list(guided) if listed else guided)


def replaced(output, value):
    """What a network returned, in the same wrapping, with another first value."""
    if isinstance(output, torch.Tensor):
        return value
    if isinstance(output, tuple):
        return (value, *output[1:])
    return type(output)(**(dict(output) | {next(iter(output)): value}))


def paper_call(name, batch=3, **extra):
    """A family's call at scale 6."""
    family = FAMILIES[name]
    batch = min(batch, family.max_batch)
    negative = family.scale_name == "true_cfg_scale"
    return family.call(batch, negative) | {family.scale_name: 6.0} | extra


def led(name, *settings):
    """Latents of the stock pipeline led by the oracle."""
    return PaperGuidance(FAMILIES[name], lambda: paper_call(name), *settings).run()


def oracle_error(name):
    """Relative difference between the stock pipeline and one led by the oracle's plain guidance.

    Whether what a family says of its pipeline is right: it says nothing of Pilotage.
    """
    results = FAMILIES[name].build()(**paper_call(name))[0], led(name)
    expected, found = (torch.as_tensor(np.asarray(result)).double() for result in results)
    return ((found - expected).norm() / expected.norm()).item()


def apg_error(name):
    """Relative difference between the guided pipeline and the stock one led by the paper."""
    family = FAMILIES[name]
    eta, r, beta = 0.2, 2.0, -0.6
    rule = APG(eta=eta, norm_threshold=r, momentum=beta, threshold_unit="l2")
    ours = guided(family.build())(**paper_call(name), guidance=rule)[0]
    values = (ours, led(name, eta, r, beta), family.build()(**paper_call(name))[0])
    ours, expected, plain = (torch.as_tensor(np.asarray(v)).double() for v in values)
    assert (plain - expected).norm() / expected.norm() > 1e-3, "APG must change something"
    return ((ours - expected).norm() / expected.norm()).item()
