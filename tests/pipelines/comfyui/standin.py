"""What Pilotage relies on of ComfyUI, small and on its own: how a model is patched and sampled.

Written for these tests from how ComfyUI behaves. Where a checkout of ComfyUI is given, the same
tests run against the real one (`backends.py`), which shows whether this still behaves like it.
"""

import copy
import math
import uuid

import torch
from torch import nn

CHANNELS, WIDTH = 4, 6


class CONDRegular:
    """A condition that is repeated to the size of the batch."""

    def __init__(self, cond):
        self.cond = cond

    def for_batch(self, batch):
        return self.cond.repeat(math.ceil(batch / len(self.cond)), 1, 1)[:batch]


class CONDCrossAttn(CONDRegular):
    pass


class Network(nn.Module):
    """A network of random weights, told of noise level and prompt.

    What it is given is mostly noise, and part of its answer, as if it had been trained.
    """

    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.into = nn.Conv2d(CHANNELS, 8, 3, padding=1)
            self.prompt, self.out = nn.Linear(WIDTH, 8), nn.Conv2d(8, CHANNELS, 3, padding=1)
        self.requires_grad_(False)

    def forward(self, x, timestep, context, transformer_options=None):
        told = (self.prompt(context).mean(1) + 0.1 * timestep[:, None].log1p())[..., None, None]
        hidden = self.into(x)
        if not (transformer_options or {}).get("patches_replace"):  # what perturbed attention does
            hidden = hidden * (1 + told) + told
        return x + 0.5 * self.out(hidden.tanh())


class Epsilon:
    """Variance exploding noise, whose network predicts it."""

    sigma_data = 1.0
    sigmas = torch.linspace(math.log(0.03), math.log(14.6), 1000).exp()

    def calculate_input(self, sigma, x):
        return x / (_wide(sigma, x) ** 2 + self.sigma_data**2) ** 0.5

    def calculate_denoised(self, sigma, output, x):
        return x - output * _wide(sigma, x)

    def noise_scaling(self, sigma, noise, latent):
        return noise * (1 + sigma**2) ** 0.5 + latent


class V(Epsilon):
    def calculate_denoised(self, sigma, output, x):
        sigma = _wide(sigma, x)
        return x / (sigma**2 + 1) - output * sigma / (sigma**2 + 1) ** 0.5


class Flow(Epsilon):
    sigmas = torch.linspace(0.001, 1, 1000)

    def calculate_input(self, sigma, x):
        return x

    def noise_scaling(self, sigma, noise, latent):
        return sigma * noise + (1 - sigma) * latent


class Skewed(Epsilon):
    """Makes denoised images in a way that is nowhere used."""

    def calculate_denoised(self, sigma, output, x):
        return 0.9 * x - output * _wide(sigma, x) ** 2


SAMPLINGS = {"epsilon": Epsilon, "v": V, "flow": Flow, "skewed": Skewed}


def _wide(sigma, x):
    return sigma.view(-1, *[1] * (x.ndim - 1))


class Model:
    def __init__(self, seed, kind):
        self.diffusion_model, self.model_sampling = Network(seed), SAMPLINGS[kind]()
        self.model_config = None

    def apply_model(self, x, sigma, c_crossattn, transformer_options):
        given = self.model_sampling.calculate_input(sigma, x)
        output = self.diffusion_model(given, sigma, c_crossattn, transformer_options)
        return self.model_sampling.calculate_denoised(sigma, output, x)


class ModelPatcher:
    def __init__(self, model):
        self.model, self.model_options = model, {"transformer_options": {}}
        self.wrappers, self.attachments = {}, {}

    def clone(self):
        other = ModelPatcher(self.model)
        other.model_options = copy.deepcopy(self.model_options)
        other.wrappers = {
            kind: {key: list(of) for key, of in keys.items()}
            for kind, keys in self.wrappers.items()
        }
        other.attachments = dict(self.attachments)
        return other

    def get_model_object(self, name):
        return getattr(self.model, name)

    def set_attachments(self, key, value):
        self.attachments[key] = value

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind, key):
        self.wrappers.get(kind, {}).pop(key, None)

    def set_model_sampler_cfg_function(self, function):
        self.model_options["sampler_cfg_function"] = function

    def set_model_sampler_post_cfg_function(self, function):
        known = self.model_options.get("sampler_post_cfg_function", [])
        self.model_options["sampler_post_cfg_function"] = [*known, function]

    def set_model_sampler_pre_cfg_function(self, function):
        known = self.model_options.get("sampler_pre_cfg_function", [])
        self.model_options["sampler_pre_cfg_function"] = [*known, function]

    def set_model_sampler_calc_cond_batch_function(self, function):
        self.model_options["sampler_calc_cond_batch_function"] = function


class Executor:
    """A function within wrappers."""

    def __init__(self, function, class_obj, wrappers):
        self.function, self.class_obj, self.wrappers = function, class_obj, wrappers

    def execute(self, *args, **kwargs):
        if not self.wrappers:
            return self.function(*args, **kwargs)
        rest = Executor(self.function, self.class_obj, self.wrappers[1:])
        return self.wrappers[0](rest, *args, **kwargs)

    __call__ = execute


def wrapped(function, class_obj, kind, options):
    wrappers = options["transformer_options"].get("wrappers", {}).get(kind, {}).values()
    return Executor(function, class_obj, [w for of in wrappers for w in of])


def calc_cond_batch(model, conds, x, timestep, model_options):
    """Denoised images of every branch in one pass; of those that are None, zeros."""
    entries = [(i, entry) for i, cond in enumerate(conds) for entry in cond or ()]
    out = [torch.zeros_like(x) for _ in conds]
    if not entries:
        return out
    contexts = [entry["model_conds"]["c_crossattn"].for_batch(len(x)) for _, entry in entries]
    count = len(entries)
    network = dict(model_options.get("transformer_options", {}))
    images = model.apply_model(
        torch.cat([x] * count), torch.cat([timestep] * count), torch.cat(contexts), network
    )
    for (i, _), image in zip(entries, images.chunk(count), strict=True):
        out[i] = out[i] + image
    return out


def cfg_function(model, cond, uncond, scale, x, timestep, options, conds):
    args = {"cond_denoised": cond, "uncond_denoised": uncond, "cond_scale": scale, "input": x}
    args |= {"sigma": timestep, "model": model, "model_options": options}
    if "sampler_cfg_function" in options:
        of = {"cond": x - cond, "uncond": x - uncond, "timestep": timestep}
        denoised = x - options["sampler_cfg_function"](args | of)
    else:
        denoised = uncond + (cond - uncond) * scale
    for function in options.get("sampler_post_cfg_function", []):
        denoised = function(args | {"denoised": denoised, "cond": conds[0], "uncond": conds[1]})
    return denoised


def sampling_function(model, x, timestep, uncond, cond, scale, model_options, seed=None):
    leaves_out = math.isclose(scale, 1) and not model_options.get("disable_cfg1_optimization")
    conds = [cond, None if leaves_out else uncond]
    given = {"conds": conds, "input": x, "sigma": timestep, "model": model}
    given |= {"model_options": model_options}
    if "sampler_calc_cond_batch_function" in model_options:
        out = model_options["sampler_calc_cond_batch_function"](given)
    else:
        out = calc_cond_batch(model, conds, x, timestep, model_options)
    for function in model_options.get("sampler_pre_cfg_function", []):
        out = function(given | {"conds_out": out, "cond_scale": scale})
    return cfg_function(model, *out, scale, x, timestep, model_options, conds)


class CFGGuider:
    def __init__(self, patcher, positive, negative, cfg):
        self.model_patcher, self.cfg = patcher, cfg
        self.conds = {"positive": positive, "negative": negative}

    def __call__(self, x, timestep, model_options=None, seed=None):
        run = wrapped(self.predict_noise, self, "predict_noise", self.model_options)
        return run.execute(x, timestep, model_options or {}, seed)

    def predict_noise(self, x, timestep, model_options, seed=None):
        both = self.conds["negative"], self.conds["positive"]
        return sampling_function(
            self.inner_model, x, timestep, *both, self.cfg, model_options, seed
        )

    def sample(self, noise, latent, sampler, sigmas, callback=None, seed=0):
        self.inner_model = self.model_patcher.model
        self.model_options = _copied(self.model_patcher.model_options)
        self.model_options["transformer_options"]["wrappers"] = self.model_patcher.wrappers
        options = _copied(self.model_options)
        options["transformer_options"]["sample_sigmas"] = sigmas
        extra = {"model_options": options, "seed": seed}
        run = wrapped(sampler.sample, sampler, "sampler_sample", options)
        return run.execute(self, sigmas, extra, callback, noise, latent, None, True)


class OwnGuider(CFGGuider):
    """Evaluates its branches without `sampling_function`."""

    def predict_noise(self, x, timestep, model_options, seed=None):
        conds = [self.conds["positive"], self.conds["negative"]]
        out = calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
        args = (self.cfg, x, timestep, model_options, conds)
        return cfg_function(self.inner_model, *out, *args)


def _copied(options):
    return {k: _copied(v) if isinstance(v, dict) else copy.copy(v) for k, v in options.items()}


def condition(context):
    """A prompt as samplers are given it."""
    return [{"model_conds": {"c_crossattn": CONDCrossAttn(context)}, "uuid": uuid.uuid4()}]


def schedule(model_sampling, steps):
    """Noise levels evenly spaced among those the model was trained with, and 0."""
    places = torch.linspace(len(model_sampling.sigmas) - 1, 0, steps).round().long()
    return torch.cat([model_sampling.sigmas[places], torch.zeros(1)])
