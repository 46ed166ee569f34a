"""What docs/how-to/coming-from.md says of other programs' settings, as far as it can be computed.

Their formulas are written anew, in float64, from what their code does.
"""

import math
import re

import numpy as np
import pytest
import torch

from pilotage.guidance import APG, Interval, NoiseLevel, Step, apg, resolve
from pilotage.guidance.rules.cfg_zero_star import cfg_zero_star
from pilotage.guidance.rules.rescale import cfg_rescale
from pilotage.guidance.rules.tcfg import tcfg

from .counts import ROOT

PAGE = (ROOT / "docs/how-to/coming-from.md").read_text()
W = 6.0


def tensors(count, *shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, *shape, generator=generator, dtype=torch.float64)


def test_what_stands_in_the_tables_is_guidance():
    """Every name with settings in the middle column, and the names alone."""
    cells = [line.split("|")[2] for line in PAGE.splitlines() if re.match(r"\| [^-|]", line)]
    found = [text for cell in cells for text in re.findall(r"`([a-z][a-z*-]*(?:\(.*?\))?)`", cell)]
    for text in found:
        resolve(text)
    assert len(found) > 20


class ComfyAPG:
    """ComfyUI's APG node, of denoised images; norms over the last three axes."""

    def __init__(self, eta, threshold, momentum):
        self.eta, self.threshold, self.momentum, self.average = eta, threshold, momentum, 0.0

    def __call__(self, cond, uncond, w):
        c, u = cond.numpy(), uncond.numpy()
        axes = (-1, -2, -3)
        update = c - u + self.momentum * self.average
        self.average = update
        if self.threshold > 0:
            size = np.sqrt((update**2).sum(axes, keepdims=True))
            update = update * np.minimum(1, self.threshold / size)
        along = c / np.sqrt((c**2).sum(axes, keepdims=True))
        parallel = (update * along).sum(axes, keepdims=True) * along
        update = update - parallel + self.eta * parallel
        # Handed on in the place of c, so that u + w (c' - u) adds the update w times to c.
        moved = u + update + (c - u) / w
        return torch.from_numpy(u + w * (moved - u))


@pytest.mark.parametrize("settings", [(1.0, 5.0, 0.0), (0.3, 2.0, -0.5), (1.0, 0.0, 0.0)])
def test_comfyuis_apg_is_ours_at_one_more(settings):
    theirs, buffer, names = ComfyAPG(*settings), None, ("eta", "norm_threshold", "momentum")
    ours = dict(zip(names, settings, strict=True)) | {"threshold_unit": "l2"}
    for cond, uncond in tensors(8, 2, 4, 8, 8).view(4, 2, 2, 4, 8, 8):
        found, buffer = apg(cond, uncond, W + 1, buffer, **ours)
        expected = theirs(cond, uncond, W)
        torch.testing.assert_close(found, expected)
        if settings == (1.0, 0.0, 0.0):
            torch.testing.assert_close(expected, uncond + (W + 1) * (cond - uncond))


def test_comfyuis_apg_of_videos_is_by_channel():
    cond, uncond = tensors(2, 2, 4, 3, 8, 8)
    expected = ComfyAPG(0.3, 2.0, 0.0)(cond, uncond, W)
    settings = {"eta": 0.3, "norm_threshold": 2.0, "threshold_unit": "l2"}
    by_channel, _ = apg(cond.flatten(0, 1), uncond.flatten(0, 1), W + 1, **settings)
    torch.testing.assert_close(by_channel.view_as(cond), expected)
    whole, _ = apg(cond, uncond, W + 1, **settings)
    assert not torch.allclose(whole, expected)


def test_comfyuis_rescale_is_ours_on_v():
    v_cond, v_uncond, x = tensors(3, 2, 4, 8, 8)
    sigma = 1.7

    def denoised(v):
        return x / (sigma**2 + 1) - v * sigma / math.sqrt(sigma**2 + 1)

    def v_of(image):
        return (x / (sigma**2 + 1) - image) * math.sqrt(sigma**2 + 1) / sigma

    cond, uncond = v_of(denoised(v_cond)), v_of(denoised(v_uncond))
    mixed = uncond + W * (cond - uncond)
    ratio = cond.std((1, 2, 3), keepdim=True) / mixed.std((1, 2, 3), keepdim=True)
    expected = denoised(0.7 * mixed * ratio + 0.3 * mixed)
    torch.testing.assert_close(denoised(cfg_rescale(v_cond, v_uncond, W, phi=0.7)), expected)


@pytest.mark.parametrize("kind", ["noise", "velocity"])
def test_comfyuis_tcfg_is_ours(kind):
    """Either is x - D in units of sigma."""
    p_cond, p_uncond, x = tensors(3, 2, 4, 8, 8)
    sigma = 0.6
    cond, uncond = x - sigma * p_cond, x - sigma * p_uncond
    rows = torch.stack([(x - uncond).flatten(1), (x - cond).flatten(1)], 1)
    first = torch.linalg.svd(rows, full_matrices=False)[2][:, :1]
    kept = ((x - uncond).flatten(1)[:, None] @ first.mT @ first).view_as(x)
    expected = (x - kept) + W * (cond - (x - kept))
    torch.testing.assert_close(x - sigma * tcfg(p_cond, p_uncond, W), expected)


def test_how_comfyuis_zero_star_differs():
    v_cond, v_uncond, x = tensors(3, 2, 4, 8, 8)
    sigma = 0.6
    cond, uncond = x - sigma * v_cond, x - sigma * v_uncond
    a, b = (x - cond).flatten(1), (x - uncond).flatten(1)
    alpha = ((a * b).sum(1) / (b * b).sum(1)).view(-1, 1, 1, 1)
    mixed = uncond + W * (cond - uncond)
    theirs = mixed + uncond * (alpha - 1) + W * uncond * (1 - alpha)
    ours = x - sigma * cfg_zero_star(v_cond, v_uncond, W)
    torch.testing.assert_close(theirs, ours - x * (W - 1) * (alpha - 1))


def guided_steps(policy, total, noise=None):
    state = policy.start(1, total, True)
    level = (lambda i: NoiseLevel(1.0, noise[i], "epsilon")) if noise else (lambda i: None)
    steps = [Step(i, total=total, level=level(i)) for i in range(total)]
    return [i for i, step in enumerate(steps) if state.decide(step)[0].evaluate != ("cond",)]


@pytest.mark.parametrize("total", [1, 7, 20, 50])
@pytest.mark.parametrize("share", [0.01, 0.2, 0.35, 0.5, 0.9])
def test_skipped_early_steps_of_a1111(total, share):
    """It leaves the negative prompt out while the number of the step is at most this share of T."""
    expected = [step for step in range(total) if step / total > share]
    start = math.floor(share * total) + 1
    assert guided_steps(Interval(start_step=start), total) == expected


def test_minimum_sigma_of_a1111():
    noise = [float(s) for s in np.geomspace(14.6, 0.03, 20)]
    expected = [step for step, sigma in enumerate(noise) if not sigma < 2.0]
    assert guided_steps(Interval(noise_low=2.0), 20, noise) == expected
    assert guided_steps(Interval(noise_low=2.0), 1, [2.0]) == []


@pytest.mark.parametrize("total", [4, 20, 30])
@pytest.mark.parametrize("end", [0.1, 0.5, 0.8])
def test_the_end_of_guidance_in_sdnext(total, end):
    """A callback after each step switches guidance off, from the step of this number on."""
    expected, on = [], True
    for step in range(total):
        if on:
            expected.append(step)
        on = on and step < int(total * end)
    assert guided_steps(Interval(stop_step=int(total * end) + 1), total) == expected


def test_the_apg_script_of_sdnext_with_its_defaults_is_cfg_with_momentum():
    rule = resolve("apg(eta=1, momentum=-0.5, norm_threshold=0, threshold_unit=l2, space=native)")
    assert rule.rule == APG(1, 0, -0.5, "l2", "native")
    average, buffer = 0.0, None
    for cond, uncond in tensors(6, 2, 4, 8, 8).view(3, 2, 2, 4, 8, 8):
        average = cond - uncond - 0.5 * average
        found, buffer = apg(cond, uncond, W, buffer, eta=1.0, momentum=-0.5)
        torch.testing.assert_close(found, cond + (W - 1) * average)
