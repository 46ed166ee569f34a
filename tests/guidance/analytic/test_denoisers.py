"""Every denoiser against dense float64 oracles, and the identities between them."""

import pytest
import torch

from pilotage.guidance.analytic import (
    ELSDenoiser,
    LocalDenoiser,
    LSDenoiser,
    OptimalDenoiser,
    PSPCDenoiser,
    SoftLocalDenoiser,
    WienerDenoiser,
    decode,
    denoisers,
    posterior,
    translates,
)

from ...oracles import analytic as oracles

SHAPE = (2, 5, 6)  # two channels, not square; latents, since pixels have one or three
ATOL = 1e-10  # float64 on sums of some hundred terms


def data(count=90, shape=SHAPE, seed=0):
    """Images with correlated coordinates, float64."""
    n = shape[0] * shape[1] * shape[2]
    g = torch.Generator().manual_seed(99)  # one distribution, whatever the seed
    smooth = torch.randn(n, n, generator=g, dtype=torch.float64) / n**0.5
    g.manual_seed(seed)
    mix = 0.3 * torch.eye(n).double() + 0.2 * smooth
    return (torch.randn(count, n, generator=g, dtype=torch.float64) @ mix).view(-1, *shape)


def noisy(x, sigma, count=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    return x[:count] + sigma * torch.randn(x[:count].shape, generator=g, dtype=x.dtype)


X = data()
LATENTS = {"value_range": None}
DENOISERS = {
    "optimal": lambda x, **o: OptimalDenoiser(x, **o),
    "local": lambda x, **o: LocalDenoiser(x, tau=0.1, **o),
    "sparse": lambda x, **o: LocalDenoiser(x, tau=0.3, **o),
    "minibatch": lambda x, **o: LocalDenoiser(x, tau=0.1, minibatch=25, **o),
    "soft": lambda x, **o: SoftLocalDenoiser(x, **o),
    "ls": lambda x, **o: LSDenoiser(x, k=3, **o),
    "els": lambda x, **o: ELSDenoiser(x, k=3, **o),
    "pspc": lambda x, **o: PSPCDenoiser(x, size=3, **o),
    "wiener": lambda x, **o: WienerDenoiser(x, **o),
}
WEIGHING = [name for name in DENOISERS if name != "wiener"]


@pytest.fixture
def in_blocks(monkeypatch):
    """Sets how many candidates are handled at once."""

    def set_size(size):
        for module in (denoisers, posterior, translates):
            monkeypatch.setattr(module, "block_size", lambda y: size)

    return set_size


@pytest.mark.parametrize("sigma", [0.05, 0.4, 3.0])
@pytest.mark.parametrize("size", [7, 128])
def test_masked_denoisers_equal_the_dense_oracle(sigma, size, in_blocks):
    in_blocks(size)
    y = noisy(X, sigma)
    w = oracles.wiener_matrix(X, sigma)
    soft = (w / w.diagonal()[:, None]).abs()
    soft = soft / soft.amax(1, keepdim=True)
    n = X[0].numel()
    weights = {
        "optimal": torch.ones(n, n),
        "local": oracles.local_mask(w, 0.1),
        "sparse": oracles.local_mask(w, 0.3),
        "soft": soft,
        "ls": oracles.window_weights(SHAPE, 3),
    }
    for name, rows in weights.items():
        # The package keeps soft weights in float32; the oracle must have the same numbers.
        rows = rows.float() if name == "soft" else rows
        denoiser = DENOISERS[name](X, **LATENTS)
        found, info = denoiser(y, sigma, return_info=True)
        mean, n_eff, top = oracles.coordinatewise(y, X, sigma, rows)
        atol = 1e-5 if name == "soft" else ATOL
        torch.testing.assert_close(found, mean, rtol=0, atol=atol, msg=name)
        torch.testing.assert_close(info.n_eff, n_eff, rtol=atol * 100, atol=0, msg=name)
        assert torch.equal(info.top, top), name
        assert torch.equal(denoiser(y, sigma), found)


@pytest.mark.parametrize("sigma", [0.4, 3.0])
@pytest.mark.parametrize("count", [90, 25])
def test_masks_of_the_paper_and_of_its_code(sigma, count):
    """Coordinates of unlike variance: the two differ, and the largest entry is not 1."""
    n, tau = 60, 0.1
    x = data(count) * torch.linspace(0.2, 3, n).double().view(SHAPE)
    y = noisy(x, sigma)
    masks = {}
    for mask, correction in (("rows", 0), ("columns", 1)):
        cov = torch.cov(x.flatten(1).T, correction=correction)
        w = torch.linalg.solve(cov + sigma**2 * torch.eye(n).double(), cov, left=False)
        r = torch.empty(n, n).double()
        for m in range(n):
            for j in range(n):
                over = w[m, m] if mask == "rows" else w[j, j]
                r[m, j] = abs(w[m, j] / (over if abs(over) >= 1e-6 else 1))
        masks[mask] = r >= tau * r.max()
        assert r.max() > 1.2
        denoiser = LocalDenoiser(x, tau=tau, mask=mask, **LATENTS)
        assert torch.equal(denoiser.weights(sigma), masks[mask])
        mean, _, _ = oracles.coordinatewise(y, x, sigma, masks[mask].double())
        torch.testing.assert_close(denoiser(y, sigma), mean, rtol=0, atol=ATOL)
    assert (masks["rows"] != masks["columns"]).float().mean() > 0.05


def test_the_masks_in_use_are_neither_empty_nor_full():
    for sigma in (0.05, 0.4, 3.0):
        w = oracles.wiener_matrix(X, sigma)
        shares = [float(oracles.local_mask(w, tau).mean()) for tau in (0.1, 0.3)]
        assert 1 / len(w) <= shares[1] <= 0.1 and shares[1] <= shares[0] < 1
    assert shares[0] > 0.15  # the dense product; the other goes the sparse way


def test_els_equals_enumeration(in_blocks):
    in_blocks(3)
    x = data(4, (1, 5, 4))
    for k in (1, 3, 5):
        y = noisy(x, 0.3, 2)
        found, info = ELSDenoiser(x, k=k, **LATENTS)(y, 0.3, return_info=True)
        mean, n_eff, top = oracles.els(y, x, 0.3, k)
        torch.testing.assert_close(found, mean, rtol=0, atol=ATOL)
        torch.testing.assert_close(info.n_eff, n_eff, rtol=1e-8, atol=0)
        assert torch.equal(info.top, top)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_pspc_equals_the_mean_of_all_crops(size, in_blocks):
    in_blocks(11)
    y = noisy(X, 0.4)
    found, info = PSPCDenoiser(X, size=size, **LATENTS)(y, 0.4, return_info=True)
    torch.testing.assert_close(found, oracles.pspc(y, X, 0.4, size), rtol=0, atol=ATOL)
    one = torch.eye(len(X)).double()  # weights themselves: the same posterior, of indicators
    corner = (..., slice(0, size), slice(0, size))
    weights = oracles.weighted(y[corner], X[corner], 0.4, torch.ones(1, X[corner][0].numel()))
    weights = weights[:, 0] @ one  # pixel (0, 0) lies in one crop only
    torch.testing.assert_close(info.n_eff[:, 0, 0, 0], 1 / weights.square().sum(1))
    assert torch.equal(info.top[:, 1, 0, 0], weights.argmax(1))


def test_minibatch_normalization_is_the_mean_over_blocks_of_their_own_softmax():
    sigma = 0.5
    y = noisy(X, sigma)
    found, info = DENOISERS["minibatch"](X, **LATENTS)(y, sigma, return_info=True)
    mask = oracles.local_mask(oracles.wiener_matrix(X, sigma), 0.1)
    blocks = X.split(25)  # the last has 15
    weights = [oracles.weighted(y, block, sigma, mask) / len(blocks) for block in blocks]
    weights = torch.cat(weights, -1)
    mean = torch.einsum("bmi,im->bm", weights, X.flatten(1)).view_as(y)
    torch.testing.assert_close(found, mean, rtol=0, atol=ATOL)
    n_eff = (1 / weights.square().sum(-1)).view_as(y)
    torch.testing.assert_close(info.n_eff, n_eff, rtol=1e-8, atol=0)
    assert torch.equal(info.top, weights.argmax(-1).view_as(y))
    exact = DENOISERS["local"](X, **LATENTS)(y, sigma)
    assert (found - exact).abs().max() > 1e-2


def test_windows_as_large_as_the_image_and_no_threshold_are_the_optimal_denoiser():
    sigma = 0.5
    y = noisy(X, sigma)
    optimal = OptimalDenoiser(X, **LATENTS)(y, sigma)
    same = {
        "ls": LSDenoiser(X, k=2 * max(SHAPE[1:]) - 1, **LATENTS),
        "els": ELSDenoiser(X, k=2 * max(SHAPE[1:]) - 1, **LATENTS),
        "local": LocalDenoiser(X, tau=0.0, **LATENTS),
    }
    for name, denoiser in same.items():
        torch.testing.assert_close(denoiser(y, sigma), optimal, rtol=0, atol=ATOL, msg=name)
    square = data(30, (1, 5, 5))
    y = noisy(square, sigma)
    whole = PSPCDenoiser(square, size=5, **LATENTS)(y, sigma)
    optimal = OptimalDenoiser(square, **LATENTS)(y, sigma)
    torch.testing.assert_close(whole, optimal, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", DENOISERS)
def test_infinite_noise_gives_the_mean_and_no_noise_an_image(name):
    denoiser = DENOISERS[name](X, **LATENTS)
    mean = X.mean(0)
    if name == "els":  # the mean over all places with the same border: here of the inner ones
        mean = mean.clone()
        mean[:, 1:-1, 1:-1] = mean[:, 1:-1, 1:-1].mean((1, 2), keepdim=True)
        for border in (0, -1):
            mean[:, border, 1:-1] = mean[:, border, 1:-1].mean(1, keepdim=True)
            mean[:, 1:-1, border] = mean[:, 1:-1, border].mean(1, keepdim=True)
    found = denoiser(X[:2], float("inf"))
    if name == "minibatch":
        mean = torch.stack([block.mean(0) for block in X.split(25)]).mean(0)
    torch.testing.assert_close(found, mean.expand_as(found), rtol=0, atol=ATOL)
    if name != "minibatch":
        # One coordinate alone can be nearer than sigma to that of another image.
        torch.testing.assert_close(denoiser(X[:2], 1e-4), X[:2], rtol=0, atol=3e-4)


def test_optimal_tends_to_wiener_for_gaussian_data():
    shape, sigma, errors = (1, 1, 3), 0.7, []
    exact = WienerDenoiser(data(40_000, shape), **LATENTS)
    y = noisy(data(64, shape, seed=5), sigma, 64)
    for count in (100, 1_000, 10_000):
        found = OptimalDenoiser(data(count, shape, seed=9), **LATENTS)(y, sigma)
        errors.append(float((found - exact(y, sigma)).square().mean().sqrt()))
    # Monte Carlo over images: the error falls as 1 / sqrt(N).
    assert errors[1] < errors[0] / 2 and errors[2] < errors[1] / 2


@pytest.mark.parametrize("name", WEIGHING)
def test_blocks_order_and_storage_change_only_rounding(name, in_blocks):
    g = torch.Generator().manual_seed(3)
    stored = torch.randint(0, 256, (70, 1, 5, 6), generator=g, dtype=torch.uint8)
    x, sigma = decode(stored, torch.float64), 0.6
    y = noisy(x, sigma)
    make = DENOISERS[name]
    expected = make(x)(y, sigma)
    order, found = torch.randperm(70, generator=g), [make(stored)(y, sigma)]
    for size in (70, 1) if name != "minibatch" else ():
        in_blocks(size)
        found += [make(stored)(y, sigma), make(stored[order])(y, sigma)]
    for one in found:
        torch.testing.assert_close(one, expected, rtol=0, atol=ATOL)
    for low in (0.02, sigma, 50.0):  # float32 must not cancel at any noise level
        y = noisy(x, low)
        found, wanted = make(stored)(y.float(), low), make(x)(y, low)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-3)


@pytest.mark.parametrize("sigma", [0.02, 0.04, 0.07, 0.1, 0.3, 1.0])
def test_blocks_of_different_brightness_are_compared_alike(sigma, in_blocks):
    """Around the noise level from which distances are a product."""
    in_blocks(10)
    g = torch.Generator().manual_seed(5)
    dim = torch.randint(120, 136, (40, 3, 8, 8), generator=g, dtype=torch.uint8)
    bright = torch.randint(200, 256, (40, 3, 8, 8), generator=g, dtype=torch.uint8)
    images = torch.cat([dim, bright])
    x = decode(images, torch.float64)
    y = noisy(x[38:], sigma, 6)
    ones = torch.ones(1, 192)
    exact = oracles.weighted(y, x, sigma, ones)[:, 0] @ x.flatten(1)
    found = OptimalDenoiser(images)(y.float(), sigma)
    torch.testing.assert_close(found.flatten(1).double(), exact, rtol=0, atol=1e-3)
    small = torch.cat([dim[:2, :1, :4, :5], bright[:2, :1, :4, :5]])
    x = decode(small, torch.float64)
    y = noisy(x[1:], sigma / 5, 2)
    exact, _, _ = oracles.els(y, x, sigma / 5, 3)
    in_blocks(1)
    found = ELSDenoiser(small, k=3)(y.float(), sigma / 5)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-3)


def test_one_picture_is_enough_for_patches():
    one = data(1, (1, 5, 4))
    y = noisy(one, 0.3, 1)
    for make in (LSDenoiser, PSPCDenoiser):
        torch.testing.assert_close(make(one, **LATENTS)(y, 0.3), one, rtol=0, atol=1e-12)
    exact, _, _ = oracles.els(y, one, 0.3, 3)
    torch.testing.assert_close(ELSDenoiser(one, k=3, **LATENTS)(y, 0.3), exact, rtol=0, atol=ATOL)
    with pytest.raises(ValueError, match="at most 16384"):
        ELSDenoiser(torch.zeros(1, 1, 129, 128), **LATENTS)


def test_a_pool_is_the_denoiser_of_its_class():
    labels = torch.arange(len(X)) % 3
    y, sigma = noisy(X, 0.4, 4), torch.tensor([0.3, 0.4, 0.4, 2.0])
    asked = torch.tensor([2, 0, -1, 2])
    denoiser = OptimalDenoiser(X, labels, **LATENTS)
    found, info = denoiser(y, sigma, asked, return_info=True)
    for row, (label, level) in enumerate(zip(asked.tolist(), sigma.tolist(), strict=True)):
        pool = (labels == label).nonzero()[:, 0] if label >= 0 else torch.arange(len(X))
        mean, _, top = oracles.coordinatewise(
            y[row : row + 1], X[pool], level, torch.ones(X[0].numel(), X[0].numel())
        )
        torch.testing.assert_close(found[row : row + 1], mean, rtol=0, atol=ATOL)
        assert torch.equal(info.top[row : row + 1], pool[top])
    with pytest.raises(ValueError, match=r"no images of class 3; classes: \[0, 1, 2\]"):
        denoiser(y, 1.0, torch.tensor([3, 0, 0, 0]))


@pytest.mark.parametrize(
    ("make", "shape", "message"),
    [
        (LocalDenoiser, (3, 105, 105), "n = 33075 .* 1.02 GiB.*104 x 104 pixels"),
        (SoftLocalDenoiser, (3, 74, 74), "n = 16428 .* 1.01 GiB.*73 x 73 pixels"),
        (LocalDenoiser, (1, 3000, 4000), "n = 12000000 .* 134,110.45 GiB"),
    ],
)
def test_images_whose_mask_would_not_fit_are_refused_before_the_rest_is_read(make, shape, message):
    def read():
        yield torch.zeros(shape, dtype=torch.uint8)
        raise AssertionError("read on")

    options = {"tau": 0.02} if make is LocalDenoiser else {}
    with pytest.raises(ValueError, match=message):
        make(read(), **options)
    with pytest.raises(ValueError, match=message):
        make(torch.zeros(1, *shape, dtype=torch.uint8).expand(2, -1, -1, -1), **options)
    make.accept((3, 73, 73))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimalDenoiser(X[:1], **LATENTS), "at least two images, got 1"),
        (lambda: OptimalDenoiser(X[:1].expand(5, -1, -1, -1), **LATENTS), "are the same"),
        (lambda: OptimalDenoiser(X / 9), "expected 1 or 3 channels, got 2: an alpha channel"),
        (lambda: OptimalDenoiser(X, torch.zeros(3), **LATENTS), "labels"),
        (lambda: LSDenoiser(X, k=4, **LATENTS), "odd whole number"),
        (lambda: LSDenoiser(X, k="imagenet", **LATENTS), "unknown schedule 'imagenet'"),
        (lambda: LocalDenoiser(X, tau="imagenet", **LATENTS), "no published tau"),
        (lambda: LocalDenoiser(X, tau=2, **LATENTS), "tau must lie"),
        (lambda: LocalDenoiser(X, mask="both", **LATENTS), "'rows' or 'columns', got 'both'"),
        (lambda: OptimalDenoiser(X, **LATENTS)(X[:1], 0.0), "sigma must be > 0"),
        (lambda: OptimalDenoiser(X, **LATENTS)(X[:1, :1], 1.0), "denoiser of images"),
        (lambda: LocalDenoiser(X, tau=0.1, accelerator="amx", **LATENTS), "'auto', 'float32' or"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
