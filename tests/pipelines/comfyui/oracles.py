"""What rules make of ComfyUI's denoised images, in float64."""

import torch

from tests.oracles.apg import PaperMomentum, paper_apg


def apg(pairs, w, eta=0.0, r=0.5, beta=-0.5):
    """Algorithm 1 along a run, sample by sample."""
    memories = [PaperMomentum(beta) for _ in pairs[0][0]]
    return [
        torch.stack(
            [
                torch.from_numpy(paper_apg(c.numpy(), u.numpy(), w, memory, eta, r))
                for c, u, memory in zip(cond, uncond, memories, strict=True)
            ]
        )
        for cond, uncond in pairs
    ]


def output(denoised, x, sigma, kind):
    """The network's output behind a denoised image."""
    s = sigma.double().view(-1, *[1] * (x.ndim - 1))
    if kind == "v":
        return (x / (s**2 + 1) - denoised) * (s**2 + 1).sqrt() / s
    return (x - denoised) / s


def rescale(step, kind, phi=0.7):
    """CFG rescale (2305.08891) of network outputs, as a denoised image."""
    x, sigma = step["input"].double(), step["sigma"]
    cond, uncond = (
        output(step[name].double(), x, sigma, kind) for name in ("cond_denoised", "uncond_denoised")
    )
    guided = uncond + step["w"] * (cond - uncond)
    axes = tuple(range(1, x.ndim))
    same = guided * cond.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    mixed = phi * same + (1 - phi) * guided
    s = sigma.double().view(-1, *[1] * (x.ndim - 1))
    if kind == "v":
        return x / (s**2 + 1) - mixed * s / (s**2 + 1).sqrt()
    return x - mixed * s
