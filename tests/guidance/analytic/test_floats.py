"""Sums that masks share: the tree gives the masks, and the result is the reference's."""

import pytest
import torch

from pilotage.guidance.analytic import LocalDenoiser, decode, floats
from pilotage.guidance.analytic.floats import shared

from ...oracles import analytic as oracles

needs_kernel = pytest.mark.skipif(bool(floats.missing()), reason=floats.missing())


def masks(n=70, seed=0):
    """Rows that resemble their neighbours; one empty, one full, some equal."""
    g = torch.Generator().manual_seed(seed)
    reach = torch.randint(0, n, (n, 1), generator=g)
    near = (torch.arange(n) - torch.arange(n)[:, None]).abs() <= reach
    found = near ^ (torch.rand(n, n, generator=g) < 0.05)
    found[5], found[6] = False, True
    found[10:13] = found[9]
    return found


@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_tree_gives_every_mask_and_costs_no_more_than_the_masks(subtract, seed):
    mask = masks(seed=seed)
    n, plan = len(mask), floats.plan(mask, subtract)
    assert sorted(plan.order.tolist()) == list(range(n))
    known = {-1: torch.zeros(n, dtype=torch.int64), -2: torch.ones(n, dtype=torch.int64)}
    starts, cost = plan.starts.tolist(), 0
    for k, (node, parent) in enumerate(
        zip(plan.order.tolist(), plan.parents.tolist(), strict=True)
    ):
        row = known[parent].clone()  # a KeyError if the parent came later
        plus = plan.coordinates[starts[2 * k] : starts[2 * k + 1]].long()
        minus = plan.coordinates[starts[2 * k + 1] : starts[2 * k + 2]].long()
        row[plus] += 1
        row[minus] -= 1
        assert torch.equal(row, mask[node].long())
        assert subtract or len(minus) == 0
        cost += len(plus) + len(minus)
        known[node] = row
    sizes = mask.sum(1)
    direct = torch.minimum(sizes, n - sizes) if subtract else sizes
    assert starts[-1] == cost < int(direct.sum())


@pytest.mark.parametrize("count", [5, 64 * 32, 65 * 32, 130 * 32 + 5])
def test_candidates_lie_side_by_side(count):
    g = torch.Generator().manual_seed(3)
    images = torch.randint(1, 256, (count, 1, 2, 3), generator=g, dtype=torch.uint8)
    found = floats.pack(images)
    assert found.shape == (-(-count // 32), 6, 32) and found.dtype == torch.uint8
    one, coordinate = torch.arange(count)[:, None], torch.arange(6)
    assert torch.equal(found[one // 32, coordinate, one % 32], images.flatten(1))
    assert int((found > 0).sum()) == images.numel()  # the padding is zeros


@needs_kernel
@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.3, 2.0, 20.0])
@pytest.mark.parametrize("candidates", [(0, 301), (7, 250), (64, 65)])
def test_the_kernel_equals_the_oracle(sigma, candidates):
    g = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (301, 1, 7, 10), generator=g, dtype=torch.uint8)
    pool, mask = images[slice(*candidates)], masks()
    clean = decode(images[100:119])
    y = clean + sigma * torch.randn(clean.shape, generator=g)
    plan = floats.plan(mask, subtract=sigma >= floats.SUBTRACT)
    packed = floats.pack(images)
    exact, _, _ = oracles.coordinatewise(y, decode(pool), sigma, mask.double())
    found = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            found.append(floats.masked_posterior(y, sigma, packed, plan, candidates))
        finally:
            torch.set_num_threads(before)
        torch.testing.assert_close(found[-1].double(), exact, rtol=0, atol=1e-3)
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)
    alone = floats.masked_posterior(y[3:4], sigma, packed, plan, candidates)
    torch.testing.assert_close(alone, found[0][3:4], rtol=0, atol=1e-5)


@needs_kernel
def test_the_denoiser_takes_it_for_classes_and_is_the_reference():
    g = torch.Generator().manual_seed(2)
    centres = torch.randint(0, 256, (20, 1, 6, 7), generator=g)
    noise = torch.randint(-40, 41, (400, 1, 6, 7), generator=g)
    images = (centres.repeat(20, 1, 1, 1) + noise).clamp(0, 255).to(torch.uint8)
    labels = torch.arange(400) % 3
    made = [
        LocalDenoiser(images, labels, tau=0.1, accelerator=name) for name in ("float32", "none")
    ]
    for sigma in (0.05, 0.5, 5.0):
        y = decode(images[:4]) + sigma * torch.randn(4, 1, 6, 7, generator=g)
        for asked in (None, torch.tensor([0, 2, -1, 1])):
            fast, exact = made[0](y, sigma, asked), made[1](y.double(), sigma, asked)
            torch.testing.assert_close(fast.double(), exact, rtol=0, atol=1e-3)
    assert made[0]._packed and not made[1]._packed
    y[0, 0, 0, 0] = torch.nan  # left to the reference, which says so in the result
    assert made[0](y, 0.5)[0].isnan().any() and made[0](y, 0.5)[1:].isfinite().all()


@needs_kernel
def test_low_noise_is_not_lost_beside_large_squares():
    """Candidates that differ by all of black and white where an output is not compared.

    Subtracted from sums of all squares, what is left would be their rounding: errors of up to 1e-4.
    """
    g, sigma = torch.Generator().manual_seed(0), 0.03
    images = torch.randint(0, 2, (200, 1, 16, 16), generator=g) * 255
    images[:, :, 6:] = torch.randint(100, 157, (200, 1, 1, 1), generator=g)  # each of one grey
    images = images.to(torch.uint8)
    y = decode(images[:16]) + sigma * torch.randn(16, 1, 16, 16, generator=g)
    fast = LocalDenoiser(images, tau=0.3, accelerator="float32")
    mask = fast.weights(sigma)
    assert mask[:96].sum(1).eq(1).all() and mask[96:].sum(1).eq(160).all()
    exact, _, _ = oracles.coordinatewise(y, decode(images), sigma, mask.double())
    assert (exact - decode(images[:16])).abs().max() > 1e-3, "of more than one candidate"
    torch.testing.assert_close(fast(y, sigma).double(), exact, rtol=0, atol=2e-6)


@needs_kernel
def test_what_does_not_fit_is_refused(monkeypatch):
    images, mask = torch.zeros(40, 1, 7, 10, dtype=torch.uint8), masks()
    packed, plan = floats.pack(images), floats.plan(mask, True)
    with pytest.raises(ValueError, match="query of 35, plan of 70"):
        floats.masked_posterior(torch.zeros(1, 1, 5, 7), 1.0, packed, plan, (0, 40))
    for candidates in ((5, 5), (-1, 3), (0, 65)):
        with pytest.raises(ValueError, match="candidates"):
            floats.masked_posterior(torch.zeros(1, 1, 7, 10), 1.0, packed, plan, candidates)
    monkeypatch.setattr(shared, "load", lambda: (None, "no compiler"))
    with pytest.raises(shared.Unavailable, match="no compiler"):
        floats.masked_posterior(torch.zeros(1, 1, 7, 10), 1.0, packed, plan, (0, 40))
    assert not floats.available(torch.zeros(1, 1, 7, 10), images, mask)


def test_processors_without_the_instructions_go_the_plain_way(monkeypatch):
    monkeypatch.setattr(shared, "processor_flags", lambda: {"sse2"})
    assert "AVX2" in shared.load.__wrapped__()[1]
    monkeypatch.setattr(floats, "missing", lambda: "no compiler")
    images = torch.randint(0, 256, (9, 1, 3, 3), dtype=torch.uint8)
    with pytest.raises(ValueError, match="'float32' cannot run here: no compiler"):
        LocalDenoiser(images, accelerator="float32")
