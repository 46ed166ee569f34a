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


class PaperGuidance:
    """Makes a stock pipeline follow Algorithm 1, by hooks that replace what its denoisers return.

    Where the branches are, and what is guided of them, the family says. Denoised images come from
    the scheduler's own code, the algorithm runs in float64. The defaults are the paper's way of
    writing plain classifier-free guidance.
    """

    def __init__(self, pipe, family, call, eta=1.0, r=0.0, beta=0.0):
        self.pipe, self.family, self.call = pipe, family, call
        self.settings = eta, r, beta
        how, names = family.layout.split(": ")
        self.names = names.split()
        self.sign = -1 if family.negated else 1
        self.index, self.averages, self.seen = family.first_step, None, []
        hook = {"batch": self.batched, "calls": self.in_turn}[how]
        for denoiser in family.denoisers:
            getattr(pipe, denoiser).register_forward_hook(hook, with_kwargs=True)

    def mix(self, branches):
        """What the pipeline makes of its branches, and the weight of the conditional one."""
        if self.family.mix is not None:
            return self.family.mix(branches, self.call)
        w = self.family.w(self.call[self.family.scale_name])
        return branches["uncond"] + w * (branches["cond"] - branches["uncond"]), w

    def guide(self, x, outputs):
        """The guided network output of one step; what is not guided stays the conditional one's."""
        branches = dict(zip(self.names, outputs, strict=True))
        part = self.family.part(branches["cond"], x)
        guided = branches["cond"].double()
        x = x[part].double()
        branches = {name: output[part].double() for name, output in branches.items()}
        mixed, w = self.mix(branches)
        # All that is added to cond, written as guidance away from one other prediction.
        away = branches["cond"] - (mixed - branches["cond"]) / (w - 1)
        eta, r, beta = self.settings
        self.averages = self.averages or [PaperMomentum(beta) for _ in x]
        c, u = (
            own_x0(self.pipe.scheduler, self.index, self.sign * pred, x).numpy()
            for pred in (branches["cond"], away)
        )
        w = w if isinstance(w, (int, float)) else np.asarray(w)
        rows = [
            paper_apg(c[i], u[i], w, average, eta, r) for i, average in enumerate(self.averages)
        ]
        x0 = torch.from_numpy(np.stack(rows))
        guided[part] = self.sign * own_prediction(self.pipe.scheduler, self.index, x0, x)
        self.index += 1
        return guided

    def matched(self, guided, cond, x):
        """The guided output with the norm of the conditional one, where the pipeline sees to it."""
        if self.family.norm_matched:
            part, axis = self.family.part(cond, x), self.family.norm_axis
            norms = (v[part].double().norm(dim=axis, keepdim=True) for v in (cond, guided))
            guided[part] *= next(norms) / next(norms)
        part = self.family.part(cond, x)
        self.last = guided[part], x[part], part
        return guided.to(cond.dtype)

    def batched(self, module, args, kwargs, output):
        x = args[0] if args else next(iter(kwargs.values()))
        out = output if isinstance(output, torch.Tensor) else output[0]
        listed = isinstance(x, list)
        if listed:  # a sample may come with pictures in front of it
            x = torch.stack([row[-1] if isinstance(row, list) else row for row in x])
            out = torch.stack(list(out))
        count = len(self.names)
        x, branches = x.chunk(count)[0], out.chunk(count)
        cond = branches[self.names.index("cond")]
        guided = self.matched(self.guide(x, branches), cond, x)
        all_equal = torch.cat([guided] * count)
        all_equal = list(all_equal) if listed else all_equal
        if isinstance(output, torch.Tensor):
            return all_equal
        rest = tuple(output[1:]) if isinstance(output, tuple) else None
        return type(output)(sample=all_equal) if rest is None else (all_equal, *rest)

    def in_turn(self, module, args, kwargs, output):
        if self.family.aside is not None and self.family.aside(kwargs):
            return output
        first = output if isinstance(output, torch.Tensor) else output[0]
        self.seen.append(first)
        if len(self.seen) < len(self.names):
            return output
        outputs, self.seen = self.seen, []
        x = args[0] if args else next(iter(kwargs.values()))
        guided = self.guide(x, outputs)
        # The last prediction with which the pipeline's own mix, affine in it, is the guided one.
        branches = {n: out.double() for n, out in zip(self.names, outputs, strict=True)}
        zero, _ = self.mix(branches | {self.names[-1]: torch.zeros_like(guided)})
        one, _ = self.mix(branches | {self.names[-1]: torch.ones_like(guided)})
        last = ((guided - zero) / (one - zero)).to(first.dtype)
        return last if isinstance(output, torch.Tensor) else (last, *output[1:])


class Rehearsed(PaperGuidance):
    """The same for pipelines that call once per branch, with no use of their own mix.

    Every call of a step returns the guided prediction. What the later branches say of the same
    latents is known from a rehearsal, the stock pipeline's run.
    """

    def __init__(self, pipe, family, call, rehearsal):
        super().__init__(pipe, family, call)
        self.rehearsed, self.calls = rehearsal, 0

    def in_turn(self, module, args, kwargs, output):
        if self.family.aside is not None and self.family.aside(kwargs):
            return output
        count = len(self.names)
        if self.calls % count == 0:
            outputs = self.rehearsed[self.calls : self.calls + count]
            x = args[0] if args else next(iter(kwargs.values()))
            cond = outputs[self.names.index("cond")]
            self.guided = self.matched(self.guide(x, outputs), cond, x)
        self.calls += 1
        return self.guided if isinstance(output, torch.Tensor) else (self.guided, *output[1:])


def rehearsal(family, call):
    """What the networks of a stock pipeline return in a call, in order."""
    pipe, outputs = family.build(), []

    def listen(module, args, kwargs, output):
        if family.aside is None or not family.aside(kwargs):
            outputs.append(output if isinstance(output, torch.Tensor) else output[0])

    for denoiser in family.denoisers:
        getattr(pipe, denoiser).register_forward_hook(listen, with_kwargs=True)
    pipe(**call)
    return outputs


def paper_call(name, batch=None, **extra):
    """A family's call at scale 6."""
    family = FAMILIES[name]
    batch = batch or family.max_batch
    negative = family.scale_name == "true_cfg_scale"
    return family.call(batch, negative) | {family.scale_name: 6.0} | extra


def oracle_error(name):
    """Relative difference between the stock pipeline and one led by the oracle's plain guidance.

    Whether what a family says of its pipeline is right: it says nothing of Pilotage.
    """
    family = FAMILIES[name]
    stock, (led, _) = family.build(), led_by_oracle(family, lambda: paper_call(name))
    results = (pipe(**paper_call(name))[0] for pipe in (stock, led))
    expected, found = (torch.as_tensor(np.asarray(result)).double() for result in results)
    return ((found - expected).norm() / expected.norm()).item()


def led_by_oracle(family, call):
    """A pipeline that the oracle's plain guidance leads, and the oracle."""
    pipe = family.build()
    if family.layout.startswith("calls"):
        return pipe, Rehearsed(pipe, family, call(), rehearsal(family, call()))
    return pipe, PaperGuidance(pipe, family, call())


def step_error(name):
    """How far what the scheduler is given is from what the family says is guided, and of which x.

    Plain guidance comes out the same whatever the sign of the prediction, its part or its step:
    this looks at them. As one minus a cosine; infinite for another step.
    """
    family = FAMILIES[name]
    pipe, oracle = led_by_oracle(family, lambda: paper_call(name))
    scheduler, errors = pipe.scheduler, []

    class Watched(type(scheduler)):
        def step(self, model_output, timestep, sample, *args, **kwargs):
            if self is scheduler:  # and no copy of the oracle's
                *pair, part = oracle.last
                expected = oracle.sign * pair[0], pair[1]
                for given, value in zip((model_output, sample), expected, strict=True):
                    given = given[: len(value)]  # DiT steps doubled latents
                    given = given if given.numel() == value.numel() else given[part]
                    errors.append(1 - _cosine(given, value))
                t = torch.as_tensor(timestep).flatten()[0]
                errors.append(0.0 if t == scheduler.timesteps[oracle.index - 1] else float("inf"))
            return super().step(model_output, timestep, sample, *args, **kwargs)

    Watched.__name__ = type(scheduler).__name__
    scheduler.__class__ = Watched
    pipe(**paper_call(name))
    return max(errors)


def _cosine(a, b):
    a, b = (v.double().flatten() for v in (a, b))
    return (a @ b / (a.norm() * b.norm())).item()


def apg_error(name):
    """Relative difference between the guided pipeline and the stock one led by the paper."""
    family = FAMILIES[name]
    eta, r, beta = 0.2, 2.0, -0.6
    rule = APG(eta=eta, norm_threshold=r, momentum=beta, threshold_unit="l2")
    ours = guided(family.build())(**paper_call(name), guidance=rule)[0]
    stock = family.build()
    PaperGuidance(stock, family, paper_call(name), eta, r, beta)
    values = (ours, stock(**paper_call(name))[0], family.build()(**paper_call(name))[0])
    ours, expected, plain = (torch.as_tensor(np.asarray(v)).double() for v in values)
    assert (plain - expected).norm() / expected.norm() > 1e-3, "APG must change something"
    return ((ours - expected).norm() / expected.norm()).item()
