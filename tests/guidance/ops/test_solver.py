"""The solver step: its formula, the kernel against float64, views of the table."""

import pytest
import torch

from pilotage.guidance.ops import solver_kernel
from pilotage.guidance.ops.solver import COLUMNS, SolverStep, network_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUMBERS = {
    **{"d_s": 1.1, "d_x": 1.3, "d_p": -0.6, "d_q": 0.01},
    **{"c_x": 0.7, "c_p": 0.3, "k_d": 0.2, "k_p": -0.15},
}


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def step_of(numbers, device="cpu"):
    row = torch.tensor([numbers.get(name, 0.0) for name in COLUMNS], device=device)
    return SolverStep(row, numbers["k_p"] != 0)


def inputs(dtype, shape=(2, 3, 5, 7)):
    return [draw(*shape, dtype=dtype, seed=seed) for seed in range(3)]


def exact(x, pred, previous, numbers=NUMBERS):
    """x_next and D in float64."""
    x, pred, previous = (t.double() for t in (x, pred, previous))
    denoised = numbers["d_s"] * (numbers["d_x"] * x + (numbers["d_p"] + numbers["d_q"]) * pred)
    plain = numbers["c_x"] * x + numbers["c_p"] * pred
    return plain + numbers["k_d"] * denoised + numbers["k_p"] * previous, denoised


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_reference_is_the_formula(dtype):
    x, pred, previous = inputs(dtype)
    step = step_of(NUMBERS)
    x_next, denoised = network_step(x, pred, previous, step)
    expected, expected_x0 = exact(x, pred, previous)
    assert x_next.dtype == denoised.dtype == (dtype if dtype.itemsize > 4 else torch.float32)
    torch.testing.assert_close(denoised.double(), expected_x0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x_next.double(), expected, rtol=1e-6, atol=1e-6)


def test_coefficients_are_views_of_the_row():
    row = torch.arange(len(COLUMNS), dtype=torch.float32)
    step = SolverStep(row)
    for index, name in enumerate(COLUMNS):
        view = getattr(step, name)
        assert view.ndim == 0 and float(view) == index
        assert view.untyped_storage().data_ptr() == row.untyped_storage().data_ptr()


def test_misuse_is_refused():
    x = draw(1, 4)
    step = step_of(NUMBERS)
    with pytest.raises(ValueError, match="step before, got None"):
        network_step(x, x, None, step)
    with pytest.raises(ValueError, match="'reference' or 'fused', got 'fast'"):
        network_step(x, x, x, step, impl="fast")
    with pytest.raises(AttributeError, match="k_q"):
        _ = step.k_q


def test_a_small_difference_times_a_large_factor():
    """sigma is no float32: what its rounding leaves out counts 10^4 times."""
    sigma, factor = 1 - 3e-8, 1e4
    rounded = torch.tensor(-sigma, dtype=torch.float64).float().item()
    numbers = {"d_s": factor, "d_x": 1.0, "d_p": rounded, "d_q": -sigma - rounded, "k_d": 1.0}
    step = step_of(numbers | {"k_p": 0.0})
    x = draw(2, 3, 5, 7)
    for found in network_step(x, x, None, step):
        torch.testing.assert_close(found.double(), x.double() * 3e-8 * factor, rtol=1e-6, atol=0)


def test_gradients_pass_through_the_reference():
    x, pred, previous = inputs(torch.float64)
    pred.requires_grad_()
    x_next, _ = network_step(x, pred, previous, step_of(NUMBERS))
    (slope,) = torch.autograd.grad(x_next.sum(), pred)
    by_denoised = NUMBERS["k_d"] * NUMBERS["d_s"] * (NUMBERS["d_p"] + NUMBERS["d_q"])
    expected = torch.full_like(pred, NUMBERS["c_p"] + by_denoised)
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k_p", [NUMBERS["k_p"], 0.0])
def test_kernel(dtype, k_p, monkeypatch):
    """In Triton's interpreter where there is no CUDA device; see tests/conftest.py."""
    monkeypatch.setattr(
        solver_kernel.torch,
        "empty_like",
        lambda like, dtype: torch.full_like(like, float("nan"), dtype=dtype),
    )
    numbers = NUMBERS | {"k_p": k_p}
    step = step_of(numbers, DEVICE)
    x, pred, previous = (t.to(DEVICE) for t in inputs(dtype, (2, 3, 23, 17)))
    last = torch.channels_last
    for given in (
        (x[:1, :1, :1, :1], pred[:1, :1, :1, :1], previous[:1, :1, :1, :1]),
        (x, pred, previous),
        (x.mT.contiguous().mT, pred, previous),
        [t.contiguous(memory_format=last) for t in (x, pred, previous)],
        (torch.cat([x, x])[: len(x)], torch.cat([pred, pred], 1)[:, :3], previous.float()),
    ):
        for want in (True, False):
            x_next, denoised = network_step(
                *given, step, want_denoised=want, dtype=dtype, impl="fused"
            )
            H, H_x0 = exact(*given, numbers)
            # The plain result in the dtype of the tensors.
            a, b, c = (t.to(dtype) for t in given)
            D = numbers["d_s"] * (numbers["d_x"] * a + (numbers["d_p"] + numbers["d_q"]) * b)
            L = numbers["c_x"] * a + numbers["c_p"] * b + numbers["k_d"] * D + k_p * c
            bound = 2 * ((L.double() - H).abs().max() + torch.finfo(dtype).eps * H.abs().max())
            assert x_next.dtype == dtype and (x_next - H).abs().max() <= bound
            assert (denoised is None) != want
            if want:
                assert (denoised - H_x0).abs().max() <= 1e-6 * H_x0.abs().max() + 1e-6
