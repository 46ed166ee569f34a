"""What the seam must show of every family, as functions that tests and the report share."""

import functools
import itertools
from dataclasses import replace

import numpy as np
import torch

from pilotage.guidance import APG, AdaptiveGuidance, Schedule
from pilotage.pipelines import LayoutError, guided
from pilotage.pipelines.seam.support import REFUSED

from ..families import FAMILIES
from ..oracles.apg import PaperMomentum, paper_apg
from ..oracles.x0 import own_prediction, own_x0

COVERED = [
    name
    for name, family in FAMILIES.items()
    if family.layout != "one" and family.scheduler == "scheduler" and family.cls not in REFUSED
]


def latents(pipe, name, batch=3, negative=None, **extra):
    if negative is None:  # true CFG means a second branch only where there is a negative prompt
        negative = FAMILIES[name].scale_name == "true_cfg_scale"
    batch = min(batch, FAMILIES[name].max_batch)
    return run(pipe, FAMILIES[name].call(batch, negative) | extra)[0]


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
    for batch in {1, FAMILIES[name].max_batch}:
        for negative in {False, FAMILIES[name].negative}:
            pipe.__class__ = getattr(type(pipe), "stock_class", type(pipe))
            stock = latents(pipe, name, batch, negative)
            guided(pipe)
            for guidance in ("cfg", None):
                if not equal(stock, latents(pipe, name, batch, negative, guidance=guidance)):
                    return False
    return True


def stopping_at(name, threshold):
    """Adaptive Guidance in the space that a family has."""
    return AdaptiveGuidance(threshold, space=FAMILIES[name].space)


def parting_policy(pipe, name, **extra):
    """A policy under which the samples of a batch stop at different steps, if there is one.

    As far as can be from where rounding decides.
    """
    latents(pipe, name, guidance=stopping_at(name, 1.5), **extra)
    gammas = sorted(g for step in pipe.guidance_trace.steps for g in step.gamma.tolist())
    gaps = sorted(itertools.pairwise(gammas), key=lambda gap: gap[0] - gap[1])
    for low, high in gaps:
        policy = stopping_at(name, (low + high) / 2)
        latents(pipe, name, guidance=policy, **extra)
        stops = len(set(guided_steps(pipe.guidance_trace)))
        if stops > 1 or (FAMILIES[name].max_batch == 1 and low < high):
            return policy
    return None


def guided_steps(trace):
    """How many steps of every sample were guided."""
    return [sum(row in step.rows for step in trace.steps) for row in range(trace.batch)]


def branches_of(name):
    """How many branches a family evaluates."""
    return len(FAMILIES[name].layout.replace("|", " ").split()) - 1


def ag_rows_ok(name):
    """Whether the rows counted at the network are all branches of the guided steps and the rest."""
    pipe = guided(FAMILIES[name].build())
    never, at_once = stopping_at(name, 1.5), stopping_at(name, -1.0)
    batch, branches = FAMILIES[name].max_batch, branches_of(name)
    for policy in (never, at_once, parting_policy(pipe, name)):
        if policy is None:
            return False
        with Rows(pipe, name) as rows:
            latents(pipe, name, guidance=policy)
        trace = pipe.guidance_trace
        steps, found = len(trace.steps), guided_steps(trace)
        evaluated = found
        if FAMILIES[name].whole:  # as long as one sample is guided, all are
            evaluated = [sum(bool(step.rows) for step in trace.steps)] * batch
        if trace.nfe != [branches * k + (steps - k) for k in evaluated]:
            return False
        if sum(rows.calls) != sum(trace.nfe):
            return False
        if policy is never and found != [steps] * batch:
            return False
        pieces = steps // (1 + max(step.index for step in trace.steps))
        if policy is at_once and found != [pieces] * batch:
            return False
    return True


def held_outputs(pipe, name, choices):
    """Make a stock pipeline's scheduler take, at forecast steps, the output of the last other."""
    scheduler = getattr(pipe, FAMILIES[name].scheduler)
    stock, index, last = scheduler.step, -1, None

    @functools.wraps(stock)
    def step(model_output, *args, **kwargs):
        nonlocal index, last
        index += 1
        last = last if choices[index % len(choices)] == "forecast" else model_output
        return stock(last, *args, **kwargs)

    scheduler.step = step


def forecast_error(name):
    """Difference between a schedule that holds outputs and a scheduler that does.

    Every other step evaluates nothing; the rows counted at the network must say so. In units of
    what holding changes.
    """
    pipe, batch = guided(FAMILIES[name].build()), FAMILIES[name].max_batch
    plain = latents(pipe, name, guidance="cfg")
    # Videos made in pieces are several runs, each of as many steps as its trace counts up to.
    total = 1 + max(step.index for step in pipe.guidance_trace.steps)
    choices = tuple("forecast" if i % 2 else "both" for i in range(total))
    pieces = len(pipe.guidance_trace.steps) // total
    with Rows(pipe, name) as rows:
        ours = latents(pipe, name, guidance=Schedule(choices))
    nfe = branches_of(name) * choices.count("both") * pieces
    assert pipe.guidance_trace.nfe == [nfe] * batch and sum(rows.calls) == batch * nfe
    stock = FAMILIES[name].build()
    held_outputs(stock, name, choices)
    values = (ours, latents(stock, name), plain)
    ours, expected, plain = (torch.as_tensor(np.asarray(v)).double() for v in values)
    return ((ours - expected).norm() / (plain - expected).norm()).item()


def resting_rows_ok(name):
    """Whether samples that rest, each at its own pace, reach no network and count as they cost."""
    pipe, branches = guided(FAMILIES[name].build()), branches_of(name)
    parting = parting_policy(pipe, name)
    latents(pipe, name, guidance=parting)
    steps = len(pipe.guidance_trace.steps)
    found = guided_steps(pipe.guidance_trace)
    with Rows(pipe, name) as rows:
        latents(pipe, name, guidance=replace(parting, then="forecast"))
    expected = [branches * (k + (steps - k) // 2) for k in found]
    return pipe.guidance_trace.nfe == expected and sum(rows.calls) == sum(expected)


def mates_error(name, then="cond"):
    """How far samples that stop at different steps are from what each gives alone.

    In units of what is allowed: ten times by how much a stock sample changes between batch 1 and
    batch 3 (matrix products of other shapes round otherwise, and some pad texts to the longest).
    """
    pipe = guided(FAMILIES[name].build())
    policy = replace(parting_policy(pipe, name), then=then)
    together = latents(pipe, name, guidance=policy)
    guided_together, stock = guided_steps(pipe.guidance_trace), latents(pipe, name)
    negative, worst = FAMILIES[name].scale_name == "true_cfg_scale", 0.0
    for row in range(3):
        pick = slice(row, row + 1)
        results = (
            pipe(**of_one(FAMILIES[name].call(3, negative), pick))[0],
            stock[pick],
            pipe(**of_one(FAMILIES[name].call(3, negative), pick), guidance=policy)[0],
            together[pick],
        )
        plain, mates, alone, other = (torch.as_tensor(np.asarray(v)).double() for v in results)
        noise = (plain - mates).abs().max() / plain.abs().max()
        if noise < 1e-4 and guided_steps(pipe.guidance_trace) != guided_together[pick]:
            return float("inf")
        error = (alone - other).abs().max() / alone.abs().max()
        worst = max(worst, (error / (10 * noise + 1e-5)).item())
    return worst


def of_one(value, pick):
    """What of the arguments of a call of three samples belongs to one."""
    if isinstance(value, dict):
        return {name: of_one(item, pick) for name, item in value.items()}
    if isinstance(value, (list, torch.Tensor)) and len(value) == 3:
        return value[pick]
    return [of_one(item, pick) for item in value] if isinstance(value, list) else value


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
        self.names = names.replace("|", " ").split()
        calls = names.split("|") if how == "batch" else self.names
        self.counts = [len(call.split()) for call in calls]  # branches of each call of a step
        self.sign = -1 if family.negated else 1
        self.arguments = call()  # for the family's mix, which may keep in them what it must
        self.index, self.averages, self.begun = family.first_step, [], False
        self.turn, self.seen, self.known, self.noisy = 0, [], [], None
        replace = self.batched if len(calls) == 1 else self.in_turn

        def hook(module, args, kwargs, output):
            return replace(args, kwargs, output) if family.steps(kwargs) else output

        for denoiser in family.denoisers:
            getattr(self.pipe, denoiser).register_forward_hook(hook, with_kwargs=True)

    def run(self, begin=lambda: None):
        """What the led pipeline returns; `begin` is called whenever it starts anew."""
        while True:
            self.turn = 0
            begin()
            try:
                return run(self.pipe, self.call())
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
            if self.family.space == "native":
                return prediction
            if self.family.x0 is not None:
                return self.family.x0(self.scheduler, self.index, kwargs, prediction, x)
            return own_x0(self.scheduler, self.index, prediction, x)

        c, u = (denoised(self.sign * pred).numpy() for pred in (branches["cond"], away))
        w = w if isinstance(w, (int, float)) else np.asarray(w)
        averages = self.averages
        rows = [paper_apg(c[i], u[i], w, average, eta, r) for i, average in enumerate(averages)]
        prediction = self.sign * own_prediction(denoised, torch.from_numpy(np.stack(rows)))
        if self.family.norm_matched:
            axis = self.family.norm_axis
            norms = [v.norm(dim=axis, keepdim=True) for v in (branches["cond"], prediction)]
            ratio = norms[0] / norms[1]
            capped = self.family.norm_matched == "capped"
            prediction = prediction * (ratio.clamp(max=1) if capped else ratio)
        guided[part] = prediction
        return guided.to(outputs[0].dtype)

    def step(self, noisy, outputs, kwargs):
        """All that is guided in one step; `outputs` holds the networks' by branch."""
        begun = getattr(self.scheduler, "step_index", None) is not None
        # Some pipelines go through the timesteps once for every piece of a video. (Where every
        # frame has a noise level of its own there are more of them; x0 is then the family's.)
        through = self.index == len(self.scheduler.timesteps) and self.family.x0 is None
        if through or (self.begun and not begun):
            self.index, self.averages = self.family.first_step, []
        self.begun = begun
        guided = self.guide(noisy, outputs, kwargs)
        self.index += 1
        return guided

    def tensors(self, args, kwargs, output, count):
        """The noisy input of a call, and what it made of it, by branch."""
        first = args[0] if args else next(iter(kwargs.values()))
        noisy = kwargs[self.family.latents] if self.family.latents else first
        found = output if isinstance(output, torch.Tensor) else output[0]
        noisy, found = (stacked(v) if isinstance(v, (list, tuple)) else v for v in (noisy, found))
        return noisy.chunk(count)[0], list(found.chunk(count))

    def batched(self, args, kwargs, output):
        count = self.counts[0]
        guided = self.step(*self.tensors(args, kwargs, output, count), kwargs)
        return replaced(output, torch.cat([guided] * count))

    def in_turn(self, args, kwargs, output):
        step, turn = divmod(self.turn, len(self.counts))
        self.turn += 1
        if step == len(self.known):
            noisy, outputs = self.tensors(args, kwargs, output, self.counts[turn])
            self.noisy = self.noisy if turn else noisy
            self.seen += outputs
            if turn + 1 < len(self.counts):
                return output
            outputs, self.seen = self.seen, []
            self.known.append(self.step(self.noisy, outputs, kwargs))
            raise StepKnown
        value = self.known[step]
        if isinstance(output, tuple) and isinstance(output[0], torch.Tensor):
            # A branch may lack the tokens in front of those that are guided.
            value = value[:, -output[0].shape[1] :]
        return replaced(output, torch.cat([value] * self.counts[turn]))


def stacked(rows):
    """Samples that come as a list; a sample may come with pictures in front of it."""
    return torch.stack([row[-1] if isinstance(row, list) else row for row in rows])


def replaced(output, value):
    """What a network returned, in the same wrapping, with another first value."""
    if isinstance(output, torch.Tensor):
        return value
    if isinstance(output[0], (list, tuple)):
        value = list(value)
    if isinstance(output, tuple):
        return (value, *output[1:])
    return type(output)(**(dict(output) | {next(iter(output)): value}))


def run(pipe, call):
    """A call of the pipeline; a dotted argument is an attribute of a component (a guider's)."""
    for name in [name for name in call if "." in name]:
        component, attribute = name.split(".")
        setattr(getattr(pipe, component), attribute, call[name])
    return pipe(**{name: value for name, value in call.items() if "." not in name})


def paper_call(name, batch=3, **extra):
    """A family's call at scale 6."""
    family = FAMILIES[name]
    batch = min(batch, family.max_batch)
    negative = family.scale_name == "true_cfg_scale"
    return family.call(batch, negative) | {family.scale_name: 6.0} | extra


def led(name, *settings):
    """What the stock pipeline led by the oracle returns."""
    return PaperGuidance(FAMILIES[name], lambda: paper_call(name), *settings).run()


def oracle_error(name):
    """Relative difference between the stock pipeline and one led by the oracle's plain guidance.

    Whether what a family says of its pipeline is right: it says nothing of Pilotage.
    """
    results = run(FAMILIES[name].build(), paper_call(name)), led(name)
    expected, found = (torch.as_tensor(np.asarray(result[0])).double() for result in results)
    return ((found - expected).norm() / expected.norm()).item()


def step_error(name):
    """How far what the scheduler is given is from what the family says is guided, and of which x.

    Plain guidance comes out the same whatever the sign of the prediction, its part or its step:
    this looks at them. As one minus a cosine; infinite for another timestep.
    """
    family = FAMILIES[name]
    oracle, wanted, given = PaperGuidance(family, lambda: paper_call(name)), [], []
    guide, scheduler = oracle.guide, oracle.scheduler

    def noted(x, outputs, kwargs):
        guided = guide(x, outputs, kwargs)
        part = family.part(guided, x)
        t = float("nan") if family.x0 else float(scheduler.timesteps[oracle.index])
        wanted.append((oracle.sign * guided[part], x[part], part, t))
        return guided

    class Watched(type(scheduler)):
        def step(self, model_output, timestep, sample, *args, **kwargs):
            if self is scheduler:  # and no copy of the oracle's
                given.append((model_output, sample, torch.as_tensor(timestep).flatten()[0]))
            return super().step(model_output, timestep, sample, *args, **kwargs)

    Watched.__name__ = type(scheduler).__name__
    oracle.guide, scheduler.__class__ = noted, Watched
    oracle.run(given.clear)
    errors = []
    for (*values, t), (*expected, part, time) in zip(given, wanted, strict=True):
        for value, other in zip(values, expected, strict=True):
            value = value[: len(other)]  # DiT steps doubled latents
            value = value if value.numel() == other.numel() else value[part]
            a, b = (v.double().flatten() for v in (value, other))
            errors.append(1 - (a @ b / (a.norm() * b.norm())).item())
        errors.append(0.0 if family.x0 or float(t) == time else float("inf"))
    return max(errors)


def apg_error(name):
    """Relative difference between the guided pipeline and the stock one led by the paper."""
    family = FAMILIES[name]
    eta, r, beta = 0.2, 2.0, -0.6
    rule = APG(eta, r, beta, threshold_unit="l2", space=family.space)
    ours = run(guided(family.build()), paper_call(name) | {"guidance": rule})[0]
    values = (ours, led(name, eta, r, beta)[0], run(family.build(), paper_call(name))[0])
    ours, expected, plain = (torch.as_tensor(np.asarray(v)).double() for v in values)
    assert (plain - expected).norm() / expected.norm() > 1e-3, "APG must change something"
    return ((ours - expected).norm() / expected.norm()).item()


def one_branch_ok(name):
    """Whether a family of one branch skips steps as a scheduler that holds outputs does.

    And whether what needs two branches says so.
    """
    family, batch = FAMILIES[name], FAMILIES[name].max_batch
    pipe = guided(family.build())
    plain = latents(pipe, name, guidance="cfg")
    total = len(pipe.guidance_trace.steps)
    choices = tuple("forecast" if i % 2 else "both" for i in range(total))
    with Rows(pipe, name) as rows:
        ours = latents(pipe, name, guidance=Schedule(choices))
    evaluated = choices.count("both")
    counted = sum(rows.calls) == batch * evaluated
    if not counted or pipe.guidance_trace.nfe != [evaluated] * batch:
        return False
    stock = family.build()
    held_outputs(stock, name, choices)
    held = latents(stock, name)
    for guidance in (APG(space="native"), AdaptiveGuidance(space="native")):
        try:
            latents(pipe, name, guidance=guidance)
        except (LayoutError, ValueError) as error:
            if "one branch" not in str(error) and "nothing to act on" not in str(error):
                return False
        else:
            return False
    return equal(ours, held) and not equal(ours, plain)
