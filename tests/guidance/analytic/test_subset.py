"""Selected images: what is left out is bounded, whatever the data, and results do not move."""

import numpy as np
import pytest
import torch

from pilotage.guidance.analytic import LSDenoiser, OptimalDenoiser, decode, subset
from pilotage.guidance.analytic.subset import TOLERANCE, Index

from ...oracles import analytic as oracles

SIGMAS = (0.003, 0.03, 0.1, 0.3, 1.0, 4.0, 60.0)


def clustered(count=3000, shape=(1, 10, 10), seed=0):
    """Pictures around some hundred centres, uint8."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randint(0, 256, (150, *shape), generator=g)
    which = torch.randint(0, 150, (count,), generator=g)
    noise = torch.randint(-30, 31, (count, *shape), generator=g)
    return (centres[which] + noise).clamp(0, 255).to(torch.uint8)


def flat(count=2000):
    """Pictures of three directions, a third of them twice: the others carry nothing."""
    g = torch.Generator().manual_seed(1)
    mix = torch.rand(count, 3, generator=g) @ torch.rand(3, 64, generator=g)
    images = (mix / mix.max() * 255).to(torch.uint8).view(-1, 1, 8, 8)
    images[: count // 3] = images[-(count // 3) :]
    return images


def latents(count=1500):
    g = torch.Generator().manual_seed(2)
    return 5 + 3 * torch.randn(count, 4, 6, 5, generator=g).cumsum(2)


DATA = {"clustered": clustered(), "flat": flat(), "latents": latents()}


def queries(images, sigma):
    """Noisy images of the set, a noisy picture that is not in it, and pure noise."""
    g = torch.Generator().manual_seed(3)
    clean = decode(images[[5, 700, 1400]])
    other = clean.roll(3, -1)[:1]
    y = torch.cat([clean, other, torch.zeros_like(other)])
    return y + sigma * torch.randn(y.shape, generator=g)


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("sigma", SIGMAS)
def test_what_is_left_out_holds_less_than_the_tolerance(name, sigma):
    images = DATA[name]
    y = queries(images, sigma)
    chosen = Index.of(images).near(y.flatten(1), sigma)
    ones = torch.ones(1, y[0].numel())
    weights = oracles.weighted(y, decode(images), sigma, ones)[:, 0]
    for kept, mass in zip(chosen, weights, strict=True):
        if kept is not None:
            assert bool((kept[1:] > kept[:-1]).all()) and len(kept) <= len(images) / 2
            assert 1 - float(mass[kept].sum()) <= TOLERANCE
    denoiser = OptimalDenoiser(images, value_range=None)
    found, info = denoiser(y, sigma, return_info=True)
    mean = (weights @ decode(images, torch.float64).flatten(1)).view_as(y)
    top = weights.argmax(1)
    span = float(decode(images).max() - decode(images).min())
    # What is left out, and rounding of float32 logits as in the whole set.
    torch.testing.assert_close(found.double(), mean, rtol=0, atol=1e-3 * span)
    assert torch.equal(denoiser(y, sigma), found)
    for row, kept in enumerate(chosen):
        assert (info.used[row] == (len(images) if kept is None else len(kept))).all()
        if float(weights[row].topk(2).values[0]) > 0.6:
            assert (info.top[row] == top[row]).all() or name == "flat"


def test_next_to_no_noise_gives_the_nearest():
    images = DATA["clustered"]
    y = decode(images[[5, 700]]) + 1e-3
    for sigma in (1e-6, 1e-30):
        torch.testing.assert_close(OptimalDenoiser(images)(y, sigma), decode(images[[5, 700]]))


@pytest.mark.parametrize("name", DATA)
def test_few_are_left_at_low_noise_and_all_at_high(name):
    images = DATA[name]
    index = Index.of(images)
    low, high = (index.near(queries(images, s).flatten(1)[:3], s) for s in (0.03, 60.0))
    assert all(kept is not None and len(kept) < 0.05 * len(images) for kept in low)
    assert high == [None] * 3


def test_a_bound_never_exceeds_the_distance():
    images = DATA["clustered"]
    index = Index.of(images)
    y = queries(images, 0.3).flatten(1)
    exact = torch.cdist(y.double(), decode(images, torch.float64).flatten(1)).square()
    levels = [len(index.coarse) - 1, *(part.shape[1] - 1 for part in index.finer)]
    assert levels == [24, 96, 100]
    parts = [index.coarse.T, *index.finer]
    last = torch.zeros(())
    for query, part in zip(
        subset.features(y - index.mean, index.basis, levels), parts, strict=True
    ):
        bound = torch.cdist(query.double(), part.double()).square()
        assert (bound <= exact + 1e-3).all() and (bound >= last - 1e-3).all()  # finer is closer
        last = bound
    assert (exact - last).abs().max() < 1e-2  # 100 directions are all of them


def test_of_large_images_fewer_directions_are_kept(monkeypatch):
    images = DATA["clustered"]
    monkeypatch.setattr(subset, "SAMPLE", (1024, 100 * 60))
    monkeypatch.setattr(subset, "BASIS", 100 * 40)
    index = Index.of(images)
    assert index.basis.shape == (100, 40) and [part.shape[1] for part in index.finer] == [41]
    y = queries(images, 0.1)
    wanted = OptimalDenoiser(images)(y.double(), 0.1).float()
    torch.testing.assert_close(OptimalDenoiser(images)(y, 0.1), wanted, rtol=0, atol=1e-4)


def test_a_class_selects_among_its_own_and_float64_compares_all():
    images = DATA["clustered"]
    labels = torch.arange(len(images)) % 2
    y, sigma = queries(images, 0.1), 0.1
    denoiser = OptimalDenoiser(images, labels)
    asked = torch.tensor([1, 0, 0, 1, -1])
    _, info = denoiser(y, sigma, asked, return_info=True)
    assert (info.used[:3] < 200).all() and info.top[:3, 0, 0, 0].tolist() == [5, 700, 1400]
    assert (info.top[3] % 2 == 1).all()
    _, info = denoiser(y.double(), sigma, asked, return_info=True)
    assert info.used[:, 0, 0, 0].tolist() == [1500, 1500, 1500, 1500, 3000]
    _, info = LSDenoiser(images[:50], k=3)(y, sigma, return_info=True)
    assert (info.used == 50).all()


def test_images_mapped_from_a_file(tmp_path):
    images = DATA["clustered"]
    np.save(tmp_path / "x.npy", images.numpy())
    mapped = OptimalDenoiser(tmp_path / "x.npy", torch.arange(len(images)) // 1500)
    file = (tmp_path / "x.npy").read_bytes()
    y = queries(images, 0.1)
    assert torch.equal(mapped(y, 0.1), OptimalDenoiser(images)(y, 0.1))
    assert mapped.order is None and (tmp_path / "x.npy").read_bytes() == file
    (tmp_path / "x.npy").write_bytes(b"hello")
    with pytest.raises(ValueError, match="is no array of images"):
        OptimalDenoiser(tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="is no array of images"):
        OptimalDenoiser(tmp_path / "x.npy")
