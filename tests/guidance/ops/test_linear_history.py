"""The weighted sum over stored predictions against float64; the kernel in the interpreter."""

import pytest
import torch

from pilotage.guidance.ops import linear_history

both = pytest.mark.parametrize("impl", ["reference", "fused"])


def draw(shape, dtype, per_sample, seed=0):
    generator = torch.Generator().manual_seed(seed)
    history = torch.randn(shape, generator=generator).to(dtype)
    return history, torch.randn(shape[: 1 + per_sample], generator=generator)


@both
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 4, 7, 5), (3, 2, 2, 3, 2, 5), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_is_the_sum(shape, dtype, per_sample, impl):
    history, weights = draw(shape, dtype, per_sample)
    wide = weights.double().view(*weights.shape, *(1,) * (history.ndim - weights.ndim))
    exact = (wide * history.double()).sum(0)
    for out in (dtype, torch.float32):
        total = linear_history(history, weights, dtype=out, impl=impl)
        assert total.dtype == out and total.shape == shape[1:]
        eps = torch.finfo(out).eps
        # One rounding per slot in float32 and one of the result.
        bound = shape[0] * 2**-23 * (wide.abs() * history.double().abs()).sum(0) + eps * exact.abs()
        assert ((total.double() - exact).abs() <= bound).all()
    assert linear_history(history, weights, impl=impl).dtype == dtype


@both
def test_slots_may_lie_anywhere(impl):
    """A ring buffer's slots in another order, channels_last, weights as a column of a table."""
    history, weights = draw((4, 2, 3, 5, 4), torch.float32, True)
    expected = linear_history(history, weights, impl=impl)
    last = history.permute(1, 0, 3, 4, 2).contiguous().permute(1, 0, 4, 2, 3)
    table = torch.stack([weights, -weights], -1)[..., 0]
    assert torch.equal(linear_history(last, table, impl=impl), expected)
    gaps = torch.stack([history, history + 1], -1)[..., 0]
    assert torch.equal(linear_history(gaps, weights, impl=impl), expected)
    torch.testing.assert_close(
        linear_history(history.flip(0), weights.flip(0), impl=impl), expected
    )


def test_weights_lie_where_the_history_is():
    with pytest.raises(ValueError, match="weights are on cpu, history on meta"):
        linear_history(torch.zeros(4, 2, 5, device="meta"), torch.zeros(4))


@pytest.mark.parametrize(
    ("weights", "impl", "message"),
    [((3,), None, "weights"), ((4, 3), None, "weights"), ((4,), "cuda", "'fused'")],
)
def test_bad_arguments(weights, impl, message):
    with pytest.raises(ValueError, match=message):
        linear_history(torch.zeros(4, 2, 5), torch.zeros(weights), impl=impl)
