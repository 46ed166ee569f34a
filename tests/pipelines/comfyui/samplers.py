"""Samplers of the stand-in: what ComfyUI's do with the model, in a few lines each."""

import torch


class Inner:
    """What a sampler calls for denoised images."""

    def __init__(self, guider):
        self.inner_model = guider

    def __call__(self, x, sigma, model_options=None, seed=None, denoise_mask=None):
        return self.inner_model(x, sigma, model_options=model_options, seed=seed)


class KSAMPLER:
    def __init__(self, function):
        self.function = function

    def sample(
        self, guider, sigmas, extra_args, callback, noise, latent=None, mask=None, disable=False
    ):
        extra_args["denoise_mask"] = mask
        x = guider.inner_model.model_sampling.noise_scaling(sigmas[0], noise, latent)
        count = len(sigmas) - 1
        told = callback and (lambda i, denoised, x: callback(i, denoised, x, count))
        return self.function(Inner(guider), x, sigmas, extra_args, told)


def _evaluate(model, x, sigma, extra):
    return model(x, sigma * x.new_ones(len(x)), **extra)


def euler(model, x, sigmas, extra, callback):
    for i in range(len(sigmas) - 1):
        denoised = _evaluate(model, x, sigmas[i], extra)
        if callback:
            callback(i, denoised, x)
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


def heun(model, x, sigmas, extra, callback):
    """Two evaluations a step, but for the last one."""
    for i in range(len(sigmas) - 1):
        denoised = _evaluate(model, x, sigmas[i], extra)
        if callback:
            callback(i, denoised, x)
        slope, width = (x - denoised) / sigmas[i], sigmas[i + 1] - sigmas[i]
        if sigmas[i + 1] > 0:
            after = x + slope * width
            other = _evaluate(model, after, sigmas[i + 1], extra)
            slope = (slope + (after - other) / sigmas[i + 1]) / 2
        x = x + slope * width
    return x


def euler_ancestral(model, x, sigmas, extra, callback):
    generator = torch.Generator().manual_seed(extra["seed"])
    for i in range(len(sigmas) - 1):
        denoised = _evaluate(model, x, sigmas[i], extra)
        if callback:
            callback(i, denoised, x)
        down, up = _ancestral(sigmas[i], sigmas[i + 1])
        x = x + (x - denoised) / sigmas[i] * (down - sigmas[i])
        x = x + torch.randn(x.shape, generator=generator) * up
    return x


def dpm_2_ancestral(model, x, sigmas, extra, callback):
    """Its second evaluations lie below the noise level that the next step begins with."""
    generator = torch.Generator().manual_seed(extra["seed"])
    for i in range(len(sigmas) - 1):
        denoised = _evaluate(model, x, sigmas[i], extra)
        if callback:
            callback(i, denoised, x)
        down, up = _ancestral(sigmas[i], sigmas[i + 1])
        slope = (x - denoised) / sigmas[i]
        if down > 0:
            middle = (sigmas[i] * down) ** 0.5
            halfway = x + slope * (middle - sigmas[i])
            slope = (halfway - _evaluate(model, halfway, middle, extra)) / middle
        x = x + slope * (down - sigmas[i]) + torch.randn(x.shape, generator=generator) * up
    return x


def dpmpp_2m(model, x, sigmas, extra, callback):
    before = None
    for i in range(len(sigmas) - 1):
        denoised = now = _evaluate(model, x, sigmas[i], extra)
        if callback:
            callback(i, denoised, x)
        if before is not None and sigmas[i + 1] > 0:
            h, last = (sigmas[i] / sigmas[i + 1]).log(), (sigmas[i - 1] / sigmas[i]).log()
            now = denoised + (denoised - before) * h / last / 2
        ratio = sigmas[i + 1] / sigmas[i]
        x, before = ratio * x + (1 - ratio) * now, denoised
    return x


def euler_cfg_pp(model, x, sigmas, extra, callback):
    """CFG++, which reads the unconditional prediction of every evaluation."""
    found = []

    def listen(args):
        found[:] = [args["uncond_denoised"]]
        return args["denoised"]

    options = dict(extra["model_options"], disable_cfg1_optimization=True)
    known = options.get("sampler_post_cfg_function", [])
    options["sampler_post_cfg_function"] = [*known, listen]
    extra["model_options"] = options
    for i in range(len(sigmas) - 1):
        denoised = _evaluate(model, x, sigmas[i], extra)
        if callback:
            callback(i, denoised, x)
        x = denoised + (x - found[0]) / sigmas[i] * sigmas[i + 1]
    return x


def dpm_adaptive(model, x, sigmas, extra, callback):
    """Halves its steps until two of them agree with one, so that nobody knows its evaluations."""
    sigma, step, i = sigmas[0], 0.5, 0
    while sigma > sigmas[-2]:
        after = torch.maximum(sigma * step, sigmas[-2])
        denoised = _evaluate(model, x, sigma, extra)
        moved = denoised + (x - denoised) * after / sigma
        other = _evaluate(model, moved, after, extra)
        if (other - denoised).norm() > 0.5 * x.norm() and step < 0.9:
            step = step**0.5
            continue
        if callback:
            callback(i, denoised, x)
        x, sigma, i = moved, after, i + 1
    return x


def _ancestral(sigma, after):
    up = (after**2 * (sigma**2 - after**2) / sigma**2) ** 0.5
    return (after**2 - up**2) ** 0.5, up


SAMPLERS = {
    f.__name__: f
    for f in (
        euler,
        heun,
        euler_ancestral,
        dpm_2_ancestral,
        dpmpp_2m,
        euler_cfg_pp,
        dpm_adaptive,
    )
}
