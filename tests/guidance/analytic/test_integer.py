"""Integer products against the dense float64 oracle, at the query that was rounded."""

import ctypes
import math
import platform
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pilotage.guidance.analytic import LocalDenoiser, decode, integer
from pilotage.guidance.analytic.floats import shared
from pilotage.guidance.analytic.integer import build, products

from ...oracles.analytic import coordinatewise

# Like the tests on CUDA: what needs the instructions can only run where there are any.
needs_processor = pytest.mark.skipif(integer.missing() != "", reason=integer.missing())
EPS = torch.finfo(torch.float32).eps


def at(pointer, shape, kind):
    """The array that a pointer given to the kernel points to."""
    return np.ctypeslib.as_array((kind * math.prod(shape)).from_address(pointer)).reshape(shape)


def in_numpy(
    packed, first, last, mask, digits, factors, out, outputs, stride, queries, planes, worker, _
):
    """What ``kernel.c`` computes, in float64, on machines that cannot run it."""
    if worker:
        return 0
    tiles, groups, chunks = -(-last // 16), -(-outputs // 16), stride // 64
    u = at(packed, (tiles, chunks, 16, 16, 4), ctypes.c_uint8).transpose(0, 3, 1, 2, 4)
    u = u.reshape(tiles * 16, stride)[first:last].astype(float)
    m = at(mask, (groups * 16, stride), ctypes.c_uint8)[:outputs].astype(float)
    d = at(digits, (queries, planes, stride), ctypes.c_int8).astype(float)
    f = at(factors, (queries, planes + 1), ctypes.c_double)
    products_ = np.einsum("qp,qpj,ij->qij", f[:, :planes], d, u)
    logits = (products_ + f[:, planes, None, None] * u**2) @ m.T  # (queries, candidates, outputs)
    weights = 2.0 ** (logits - logits.max(1, keepdims=True))
    mean = np.einsum("qim,im->qm", weights, u[:, :outputs]) / weights.sum(1)
    at(out, (queries, outputs), ctypes.c_float)[:] = mean
    return 0


@pytest.fixture(params=["kernel", "numpy"])
def library(request, monkeypatch):
    """The compiled kernel where it runs, and everywhere the same formula in numpy."""
    if request.param == "numpy":
        monkeypatch.setattr(products, "load", lambda: (SimpleNamespace(posterior=in_numpy), ""))
        monkeypatch.setattr(products, "missing", lambda: "")
    elif integer.missing():
        pytest.skip(integer.missing())


def seeded(number):
    return torch.Generator().manual_seed(number)


def problem(count, shape, share, sigma, seed=0, queries=3):
    """Stored images, noisy images of some of them, and a mask that includes the diagonal."""
    g = seeded(seed)
    images = torch.randint(0, 256, (count, *shape), generator=g, dtype=torch.uint8)
    y = decode(images[:queries]) + sigma * torch.randn(queries, *shape, generator=g)
    n = y[0].numel()
    mask = (torch.rand(n, n, generator=g) < share) | torch.eye(n, dtype=torch.bool)
    return images, y, mask


def rounded(y, sigma):
    """The noisy images that the digits stand for, float64."""
    digits, unit = products.digits_of(y.flatten(1), sigma)
    places = 256.0 ** torch.arange(digits.shape[1], dtype=torch.float64)
    units = (digits.double() * places[:, None]).sum(1) * unit[:, None]
    return (units / 127.5 - 1).view_as(y), digits.shape[1]


@pytest.mark.parametrize(("sigma", "planes"), [(0.003, 3), (0.1, 3), (2.0, 2), (60.0, 2)])
def test_digits_move_the_query_by_less_than_promised(sigma, planes):
    _, y, _ = problem(3, (1, 9, 9), 0.5, sigma)
    near, used = rounded(y, sigma)
    assert used == planes
    assert (near - y).abs().max() <= products.ROUNDING * sigma


@pytest.mark.parametrize("value", [1e9, float("inf"), float("nan")])
def test_values_that_three_digits_do_not_hold_are_left_to_floats(value):
    y = torch.zeros(2, 5)
    y[1, 3] = value
    assert products.digits_of(y, 1.0) is None


def test_packing_puts_every_byte_where_the_kernel_looks_for_it():
    images, _, _ = problem(37, (3, 5, 7), 0.5, 1.0)
    packed, flat = integer.pack(images), images.flatten(1)
    assert packed.shape == (3, 2, 16, 16, 4)
    for candidate, j in ((0, 0), (15, 63), (16, 64), (36, 104), (20, 77)):
        place = (candidate // 16, j // 64, j % 64 // 4, candidate % 16, j % 4)
        assert packed[place] == flat[candidate, j]
    assert packed.long().sum() == flat.long().sum()  # padded with zeros


@pytest.mark.parametrize("share", [0.0, 0.05, 0.8, 1.0])
@pytest.mark.parametrize("sigma", [0.02, 0.5, 3.0, 40.0])
def test_kernel_is_the_posterior_mean_at_the_rounded_query(share, sigma, library):
    images, y, mask = problem(203, (3, 5, 7), share, sigma)
    near, _ = rounded(y, sigma)
    exact, _, _ = coordinatewise(near, decode(images, torch.float64), sigma, mask)
    found = integer.masked_posterior(y, sigma, integer.pack(images), mask, (0, len(images)))
    assert found.dtype == torch.float32
    # Weights and their sums are float32: a few roundings of numbers up to 2.
    assert (found - exact).abs().max() <= 16 * EPS


@pytest.mark.parametrize("candidates", [(0, 1), (5, 6), (16, 32), (7, 150), (33, 203), (200, 203)])
def test_only_the_candidates_asked_for_count(candidates, library):
    images, y, mask = problem(203, (1, 10, 10), 0.3, 0.7)
    near, _ = rounded(y, 0.7)
    some = decode(images[slice(*candidates)], torch.float64)
    exact, _, _ = coordinatewise(near, some, 0.7, mask)
    found = integer.masked_posterior(y, 0.7, integer.pack(images), mask, candidates)
    assert (found - exact).abs().max() <= 16 * EPS


@needs_processor
def test_blocks_threads_and_other_queries_change_nothing():
    """Images of several blocks of candidates, more queries than one walk takes."""
    images, y, mask = problem(1500, (3, 16, 16), 0.2, 1.0, queries=products.QUERIES + 2)
    packed, threads, found = integer.pack(images), torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(integer.masked_posterior(y, 1.0, packed, mask, (0, 1500)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
    alone = integer.masked_posterior(y[-1:], 1.0, packed, mask, (0, 1500))
    assert torch.equal(alone, found[0][-1:])


@needs_processor
def test_logits_that_rise_and_fall_by_hundreds_are_rescaled():
    """Candidates sorted from far to near and back: every few blocks the reference moves."""
    images, y, mask = problem(640, (1, 8, 8), 1.0, 0.3, queries=1)
    far = (decode(images) - y).flatten(1).norm(dim=1)
    for order in (far.argsort(), far.argsort(descending=True)):
        stored = images[order]
        near, _ = rounded(y, 0.3)
        exact, _, _ = coordinatewise(near, decode(stored, torch.float64), 0.3, mask)
        found = integer.masked_posterior(y, 0.3, integer.pack(stored), mask, (0, 640))
        assert (found - exact).abs().max() <= 16 * EPS


@needs_processor
def test_logits_of_billions_are_told_apart():
    """At a tiny noise level the nearest candidate wins, whatever the magnitude of logits."""
    images, y, _ = problem(300, (1, 40, 40), 1.0, 0.002, queries=2)
    mask = torch.ones(1600, 1600, dtype=torch.bool)
    found = integer.masked_posterior(y, 0.002, integer.pack(images), mask, (0, 300))
    assert (found - decode(images[:2])).abs().max() <= 16 * EPS


@needs_processor
def test_logits_beyond_the_digits_of_float32_keep_a_winner():
    """Bright images at the smallest noise level: float32 is off by hundreds, a weight is 2^-60."""
    g = seeded(4)
    images = torch.randint(200, 256, (40, 1, 60, 60), generator=g, dtype=torch.uint8)
    y = decode(images[:5]) + 0.0013 * torch.randn(5, 1, 60, 60, generator=g)
    mask = torch.ones(3600, 3600, dtype=torch.bool)
    found = integer.masked_posterior(y, 0.0013, integer.pack(images), mask, (0, 40))
    assert (found - decode(images[:5])).abs().max() <= 16 * EPS


def test_the_local_denoiser_uses_it_and_falls_back_where_it_cannot(library):
    images, y, _ = problem(400, (1, 8, 8), 1.0, 0.4)
    labels = torch.arange(400) % 3
    denoiser = LocalDenoiser(images, labels, tau=0.1)
    plain = LocalDenoiser(images, labels, tau=0.1, accelerator="none")
    mask = denoiser.weights(0.4)
    near, _ = rounded(y, 0.4)
    for label in (-1, 0, 2):
        pool = images if label == -1 else images[labels == label]
        exact, _, _ = coordinatewise(near, decode(pool, torch.float64), 0.4, mask)
        found = denoiser(y, 0.4, torch.full((3,), label))
        assert (found - exact).abs().max() <= 16 * EPS
        assert not torch.equal(found, plain(y, 0.4, torch.full((3,), label)))
    assert torch.equal(denoiser(1e9 + y, 0.4), plain(1e9 + y, 0.4))
    assert torch.equal(denoiser(y, float("inf")), plain(y, float("inf")))
    exact, _, _ = coordinatewise(y, decode(images, torch.float64), 0.4, mask)
    assert (denoiser(y.double(), 0.4) - exact).abs().max() <= 1e-12  # nothing is rounded


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instructions are x86's")
def test_a_damaged_library_is_made_again(monkeypatch, tmp_path):
    """Compiling needs no processor of the kind, only a compiler that knows the instructions."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", ("-O0", *build.FLAGS[1:]))  # sooner done
    try:
        path = build.compile_library()
    except build.Unavailable as error:
        pytest.skip(str(error))
    whole, made = path.read_bytes(), path.stat().st_mtime_ns
    assert build.compile_library() == path and path.stat().st_mtime_ns == made
    path.write_bytes(whole[: len(whole) // 2])
    assert build.compile_library().read_bytes() == whole
    assert [file.suffix for file in tmp_path.rglob("*") if file.is_file()] == [".so"]


@pytest.fixture
def able(monkeypatch):
    """A machine that could run the kernel, as far as can be told before it is compiled."""
    monkeypatch.setattr(build, "processor_flags", lambda: build.NEEDED)
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    for load in (build.load, shared.load):
        load.cache_clear()
    yield
    for load in (build.load, shared.load):
        load.cache_clear()


def test_without_a_home_there_are_no_integer_products(monkeypatch, able):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(build.Path, "home", nowhere)
    assert "XDG_CACHE_HOME" in integer.missing()


@pytest.mark.parametrize("permitted", [1, 0])
def test_what_is_loaded_is_told_the_kernels_arguments(monkeypatch, able, permitted):
    """As ``kernel.c`` declares them, on a machine that compiles and loads it."""
    library = SimpleNamespace(permit_tiles=lambda: permitted, posterior=SimpleNamespace())
    monkeypatch.setattr(build, "compile_library", lambda: "integer.so")
    monkeypatch.setattr(build.ctypes, "CDLL", {"integer.so": library}.__getitem__)
    found, reason = build.load()
    if not permitted:
        assert found is None and "does not let processes use AMX tiles" in reason
        return
    assert found is library and reason == ""
    declared = build.SOURCE.read_text().partition("\nint posterior(")[2].partition(")")[0]
    kinds = {"long": ctypes.c_long, "int": ctypes.c_int}
    expected = [
        ctypes.c_void_p if "*" in argument else kinds[argument.split()[0]]
        for argument in declared.split(",")
    ]
    assert library.posterior.argtypes == expected and len(expected) == 13


def test_without_a_compiler_floats_are_used_and_no_file_is_made(monkeypatch, able, tmp_path):
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    images, y, _ = problem(50, (1, 6, 6), 1.0, 0.5)
    found = [LocalDenoiser(images, tau=0.1, accelerator=a)(y, 0.5) for a in ("auto", "none")]
    assert torch.equal(*found)
    assert "false cannot compile" in integer.missing()
    assert "false cannot compile" in shared.missing() or "AVX2" in shared.missing()
    assert list(tmp_path.rglob("*")) == []


def test_sizes_that_do_not_fit_are_refused():
    images, y, mask = problem(40, (1, 8, 8), 1.0, 0.4)
    packed = integer.pack(images)
    with pytest.raises(ValueError, match="mask of 63"):
        integer.masked_posterior(y, 0.4, packed, mask[:63, :63], (0, 40))
    for candidates in ((0, 0), (-1, 3), (5, 49)):
        with pytest.raises(ValueError, match="candidates"):
            integer.masked_posterior(y, 0.4, packed, mask, candidates)
