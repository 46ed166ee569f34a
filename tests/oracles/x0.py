"""The denoised image according to each scheduler's own code, independent of Pilotage's tables."""

import copy

import torch

OWN_STEP = {  # schedulers whose step() reports pred_original_sample of the unclipped prediction
    "CogVideoXDDIMScheduler",
    "DDIMScheduler",
    "DPMSolverSDEScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LMSDiscreteScheduler",
    "UnCLIPScheduler",
}
CONVERT = {  # schedulers whose convert_model_output() gives the denoised image
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "HeliosScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
}
PRECONDITIONED = {  # schedulers in the manner of Karras et al. (2022), with functions for it
    "CosineDPMSolverMultistepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
}


def own_x0(scheduler, index, pred, x_in):
    """Denoised image of a prediction at call `index` of the loop, in float64.

    `x_in` is what the network saw (scaled by the scheduler).
    """
    s = duplicate(scheduler)
    name, t = type(s).__name__, s.timesteps[index]
    pred, x_in = pred.double(), x_in.double()
    if name == "IPNDMScheduler":
        return first_step_to_the_end(s, t, pred, x_in)
    if name == "HeliosDMDScheduler":
        return s.convert_flow_pred_to_x0(pred, x_in, t.reshape(1), s.sigmas, s.timesteps)
    if name in ("LTXEulerAncestralRFScheduler", "MiniMaxH3Scheduler"):
        # A step to sigma = 0 ends at the denoised image; the steps of the loop do not report it.
        s.sigmas = s.sigmas.clone().double()
        s.sigmas[index + 1] = 0
        return s.step(pred, t, x_in, return_dict=False)[0]
    if name.startswith(("FlowMatch", "FlowMap")):
        sigma = float(s.sigmas[index])
        if s.config.get("invert_sigmas", False):  # Mochi: t is the picture's share, v = x0 - noise
            return x_in + (1 - sigma) * pred
        return x_in - sigma * pred
    if name in PRECONDITIONED:
        sigma = s.sigmas[index].double()
        unit = s.precondition_inputs(torch.ones((), dtype=torch.float64), sigma)
        return s.precondition_outputs(x_in / unit, pred, sigma)
    if name in OWN_STEP:
        # Undo the scaling with the scheduler's own function, which is linear.
        unit = duplicate(s).scale_model_input(torch.ones((), dtype=torch.float64), t)
        s.is_scale_input_called = True
        return s.step(pred, t, x_in / unit).pred_original_sample
    if name in CONVERT:
        if s.step_index is None:
            s._init_step_index(t)
        return s.convert_model_output(pred, sample=x_in)
    if name == "DEISMultistepScheduler":
        if s.step_index is None:
            s._init_step_index(t)
        alpha, sigma = s._sigma_to_alpha_sigma_t(s.sigmas[s.step_index].double())
        return (x_in - sigma * s.convert_model_output(pred, sample=x_in)) / alpha
    if name in (
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
    ):
        sigma = scale_of_input(s, t)
        return k_diffusion_x0(s.config.prediction_type, pred, x_in * (sigma**2 + 1) ** 0.5, sigma)
    if name == "DDPMWuerstchenScheduler":
        bar = s._alpha_cumprod(t, t.device).double()
        return (x_in - (1 - bar) ** 0.5 * pred) / bar**0.5
    bar = float(s.alphas_cumprod[int(t)])
    alpha, sigma = bar**0.5, (1 - bar) ** 0.5
    return {
        "epsilon": lambda: (x_in - sigma * pred) / alpha,
        "v_prediction": lambda: alpha * x_in - sigma * pred,
        "sample": lambda: pred,
    }[s.config.prediction_type]()


def duplicate(scheduler):
    """A copy that may take a step; with noise of its own, as torchsde's tree cannot be copied."""
    twin = copy.copy(scheduler)
    if hasattr(twin, "noise_sampler"):
        twin.noise_sampler = None
    return copy.deepcopy(twin)


def scale_of_ones(scheduler, t):
    """What the scheduler multiplies its network's input by."""
    return float(duplicate(scheduler).scale_model_input(torch.ones(1, dtype=torch.float64), t))


def scale_of_input(scheduler, t):
    """sigma of the current evaluation, read off how the scheduler scales a one."""
    return (1 / scale_of_ones(scheduler, t) ** 2 - 1) ** 0.5


def first_step_to_the_end(scheduler, t, pred, x):
    """Where IPNDM's step of first order ends without noise left, in the limit of alpha to 0."""
    s = duplicate(scheduler)
    s.ets, index = [], int((s.timesteps == t).nonzero()[0])
    s._step_index = index
    s.betas = s.betas.double().clamp(max=1 - 1e-12)
    s.alphas = (1 - s.betas**2) ** 0.5
    s.betas[index + 1], s.alphas[index + 1] = 0, 1
    return s.step(pred, t, x).prev_sample


def k_diffusion_x0(kind, pred, x, sigma):
    """Karras et al.'s parametrization with the unscaled x = x0 + sigma * noise."""
    if kind == "epsilon":
        return x - sigma * pred
    if kind == "v_prediction":
        return x / (sigma**2 + 1) - pred * sigma / (sigma**2 + 1) ** 0.5
    return pred


def own_prediction(denoised, x0):
    """The prediction whose denoised image is `x0`; `denoised` is affine in the prediction."""
    zero = denoised(torch.zeros_like(x0))
    return (x0 - zero) / (denoised(torch.ones_like(x0)) - zero)
