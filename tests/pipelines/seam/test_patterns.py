"""What is measured of a step, on tensors alone, against the definitions in float64."""

import math

import pytest
import torch

from pilotage.pipelines.seam import patterns
from pilotage.pipelines.seam.patterns import (
    ENOUGH,
    effective,
    inside,
    normed,
    sample_of,
    scale_of,
    scale_of_normed,
    view,
    weights_of,
)

EPS = torch.finfo(torch.float32).eps


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=[True, False], ids=["read at once", "stays on the device"])
def host(request, monkeypatch):
    monkeypatch.setattr(patterns, "on_host", lambda device: request.param)
    return request.param


# The scale


@pytest.mark.parametrize("w", [-2.0, 0.0, 0.25, 1.0, 7.5, 40.0])
@pytest.mark.parametrize("shape", [(1, 4, 6, 6), (3, 4, 8, 8), (2, 90)])
def test_the_scale_and_nothing_left_over(w, shape, host):
    c, u = draw(*shape), draw(*shape, seed=1)
    found, left = scale_of(c, u, u + w * (c - u))
    assert isinstance(found, float) == host
    assert float(found) == pytest.approx(w, rel=1e-5, abs=1e-6)
    assert 0 <= float(left) < 4


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
def test_what_is_left_over_in_units_of_rounding(size, host):
    """The norm of M - u - w (c - u), against what rounding does to parts as large as c."""
    c, u, other = (draw(2, 4, 6, 6, seed=seed) for seed in range(3))
    away = c - u
    other -= (other * away).sum() / away.square().sum() * away  # that no scale explains
    w = 5.0
    found, left = scale_of(c, u, u + w * away + size * other)
    assert float(found) == pytest.approx(w, rel=1e-5)
    unit = EPS * (w + 1) * 2 * c.double().norm()
    assert float(left) == pytest.approx(size * float(other.double().norm() / unit), rel=0.02)


def test_equal_branches_have_the_scale_one(host):
    c = draw(2, 4, 6, 6)
    found, left = scale_of(c, c.clone(), c)
    assert float(found) == 1.0 and float(left) < 4
    found, left = scale_of(c, c.clone(), c + 1)
    assert float(found) == 1.0 and float(left) > 1e4


def test_a_guess_is_taken_only_if_it_explains_every_bit():
    c, u = draw(2, 4, 6, 6), draw(2, 4, 6, 6, seed=1)
    mixed = u + 5.0 * (c - u)
    assert scale_of(c, u, mixed, guess=5.0) == (5.0, 0.0)
    for guess in (4.0, None):
        assert scale_of(c, u, mixed, guess=guess)[0] == pytest.approx(5.0, rel=1e-5)
    mixed[1, 2, 3, 4] += 1e-3
    assert scale_of(c, u, mixed, guess=5.0)[1] > 4


def test_a_scale_for_every_frame(host):
    c, u = draw(2, 5, 4, 6, 6), draw(2, 5, 4, 6, 6, seed=1)
    w = torch.linspace(1.0, 3.0, 5).view(1, 5, 1, 1, 1)
    mixed = u + w * (c - u)
    found, left = scale_of(c, u, mixed, frames=1)
    assert found.shape == (1, 5, 1, 1, 1)
    torch.testing.assert_close(found, w, rtol=1e-5, atol=1e-6)
    assert left < 4
    mixed[0, 2, 1, 3, 3] += 1
    assert scale_of(c, u, mixed, frames=1)[1] > 100
    u[:, 3] = c[:, 3]
    found, _ = scale_of(c, u, u + w * (c - u), frames=1)
    assert found[0, 3].item() == 1


@pytest.mark.parametrize("factor", [1.0, 0.6])
def test_the_scale_of_tokens_that_were_rescaled(factor):
    c, u = draw(2, 7, 5).double(), draw(2, 7, 5, seed=1).double()
    own = factor * (0.5 + draw(2, 7, 1, seed=2).double().abs())  # of every token
    for w in (1.5, 4.0):
        assert float(scale_of_normed(c, u, own * (u + w * (c - u)))) == pytest.approx(w, rel=1e-9)


def test_norms_of_tokens():
    cond = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
    guided = torch.tensor([[[0.0, 10.0], [0.3, 0.4]]])
    assert normed(guided, cond, "") is guided
    match, limit = normed(guided, cond, "match"), normed(guided, cond, "limit")
    torch.testing.assert_close(match, torch.tensor([[[0.0, 5.0], [0.6, 0.8]]]))
    torch.testing.assert_close(limit, torch.tensor([[[0.0, 5.0], [0.3, 0.4]]]))


# Many branches


def combined(weights, *predictions):
    return sum(w * p for w, p in zip(weights, predictions, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [(6.0, -3.0, -2.0), (3.5, 0.5, -1.0, -2.0), (2.0, -1.0, 0.0)])
def test_the_effective_unconditional_prediction(weights, dtype):
    """u~ = c - (M - c) / (w - 1): guidance at w away from it is what the pipeline does."""
    preds = [draw(3, 4, 8, 8, seed=seed, dtype=dtype) for seed in range(len(weights))]
    mixed = combined(weights, *preds)
    away, w, left = effective(preds[0], preds[1:], mixed)
    assert float(w) == pytest.approx(weights[0], rel=1e-5) and float(left) < 16
    others = combined([-v / (weights[0] - 1) for v in weights[1:]], *preds[1:])
    torch.testing.assert_close(away, others, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(away + w * (preds[0] - away), mixed, rtol=1e-3, atol=1e-4)
    other = draw(3, 4, 8, 8, seed=9, dtype=dtype)
    assert float(effective(preds[0], preds[1:], mixed + 1e-2 * other)[2]) > 100


def test_branches_that_are_equal():
    """To each other: they share a weight. To the conditional one: they have none."""
    c, u = draw(3, 4, 8, 8), draw(3, 4, 8, 8, seed=1)
    _, w, left = effective(c, [u, u.clone()], c + 4.0 * (c - u))
    assert float(w) == pytest.approx(5.0, rel=1e-5) and float(left) < 16
    away, w, left = effective(c, [c.clone(), u], c + 4.0 * (c - u))
    assert float(w) == pytest.approx(5.0, rel=1e-5) and float(left) < 16
    torch.testing.assert_close(away, u, rtol=1e-4, atol=1e-4)
    away, w, left = effective(c, [c.clone(), c.clone()], c)
    assert float(w) == 1 and away.isfinite().all() and float(left) < 4


def test_what_is_added_at_the_scale_one():
    """Where weights cancel, nothing can be guided away from: all that is added is left over."""
    preds = [draw(3, 4, 8, 8, seed=seed) for seed in range(3)]
    mixed = combined((1.0, 2.0, -2.0), *preds)
    away, w, left = effective(preds[0], preds[1:], mixed)
    assert float(w) == pytest.approx(1.0, abs=1e-4)
    unit = EPS * (1 + 2 * 4) * 2 * preds[0].double().norm()
    assert float(left) == pytest.approx(float((mixed - preds[0]).double().norm() / unit), rel=1e-3)
    torch.testing.assert_close(away, preds[0] - (mixed - preds[0]))


@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (1, 4, 64, 64), (2, 20_000)])
def test_weights_of_a_sum(shape):
    preds = [draw(*shape, seed=seed) for seed in range(3)]
    weights = (2.5, -1.0, 0.25)
    found = weights_of(preds, combined(weights, *preds))
    torch.testing.assert_close(found, torch.tensor(weights), rtol=1e-5, atol=1e-5)


# Parts


@pytest.mark.parametrize(
    "shape", [(1, 4, 8, 8), (2, 4, 128, 128), (1, 16, 5, 64, 64), (2, 4096, 16), (2, 40_000)]
)
def test_a_sample_of_elements_is_spread_over_all(shape):
    tensor = torch.arange(math.prod(shape)).view(shape)
    found = sample_of(tensor)
    each, whole = found.numel() // shape[0], tensor.numel() // shape[0]
    assert len(found) == shape[0]
    assert min(whole, ENOUGH) <= each <= 2 * ENOUGH if whole >= 2 * ENOUGH else each == whole
    assert found.flatten()[0] == 0 and found.max() > 0.9 * tensor.max()
    if tensor.ndim > 2:
        assert found.shape[-1] == shape[-1], "whole rows"
        assert (found[..., 1:] - found[..., :-1] == 1).all()


def test_parts_of_what_a_network_returns():
    """The leading block, the one behind, tokens as pictures and pictures as tokens."""
    like = torch.zeros(2, 4, 3, 5)
    wide = draw(2, 8, 3, 5)
    assert torch.equal(view(wide, like), wide[:, :4])
    assert torch.equal(view(wide, like, "behind"), wide[:, 4:])
    assert torch.equal(view(wide.unsqueeze(2), like), wide[:, :4])
    assert view(wide[:, :3], like) is None and view(wide[0], like) is None
    assert view(draw(2, 8, 2, 3, 5), like) is None
    tokens = draw(2, 15, 4)
    assert torch.equal(view(like, tokens, "tokens"), torch.zeros(2, 15, 4))
    assert torch.equal(view(tokens, like, "pixels"), tokens.mT.reshape(2, 4, 3, 5))
    both = draw(2, 15, 8)
    assert torch.equal(view(both, like, "pixels behind"), both.mT.reshape(2, 8, 3, 5)[:, 4:])
    assert view(draw(2, 16, 4), like, "pixels") is None
    video = torch.zeros(2, 4, 6, 3, 5)
    found = view(draw(2, 90, 4), video, "pixels")
    assert torch.equal(found, draw(2, 90, 4).mT.reshape(2, 4, 6, 3, 5))
    assert view(draw(2, 90, 4), like, "tokens") is None


def test_places_that_are_guided():
    tensor = draw(2, 4, 6, 3)
    assert inside(tensor, None) is tensor
    assert torch.equal(inside(tensor, (2, (1, 4))), tensor[:, :, [1, 4]])
    assert torch.equal(inside(tensor, (1, (0, 3))), tensor[:, [0, 3]])
