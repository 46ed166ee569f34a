"""When a kernel is taken without being asked for: on CUDA, here passed in as what tensors say."""

import pytest
import torch

from pilotage.guidance.ops import solver
from pilotage.guidance.ops.guide_step import _prefers_kernel


class OnCuda(torch.Tensor):
    """A tensor that says that it lies on CUDA."""

    @property
    def is_cuda(self):
        return True


def tensor(dtype=torch.float32, cuda=True, grad=False):
    made = torch.ones(2, 3, dtype=dtype)
    return (made.as_subclass(OnCuda) if cuda else made).requires_grad_(grad)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    ("other", "taken"),
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"dtype": torch.bfloat16}, True),
        ({"dtype": torch.float64}, False),
        ({"cuda": False}, False),
        ({"grad": True}, False),
    ],
)
def test_by_tensors(place, other, taken, monkeypatch):
    pair = [tensor(), tensor()]
    pair[place] = tensor(**other)
    for triton in (True, False):
        monkeypatch.setattr(solver, "_has_triton", lambda has=triton: has)
        assert solver.fused_by_default(*pair) == (taken and triton)
        assert _prefers_kernel(*pair, 5.0, False) == (taken and triton)
        with torch.no_grad():  # where no gradient is needed, what would have one does not matter
            expected = triton and (taken or "grad" in other)
            assert solver.fused_by_default(*pair) == expected


@pytest.mark.parametrize(
    ("w", "update", "taken"),
    [
        (5.0, False, True),
        (torch.tensor(5.0), False, True),
        (5.0, True, False),
        (torch.tensor(5.0), True, False),
        (torch.tensor([5.0]), False, False),
        (torch.tensor([[5.0], [6.0]]), False, False),
        (torch.tensor(5.0, requires_grad=True), False, False),
    ],
)
def test_by_the_scale_and_what_is_wanted(w, update, taken, monkeypatch):
    monkeypatch.setattr(solver, "_has_triton", lambda: True)
    assert _prefers_kernel(tensor(), tensor(), w, update) == taken
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not _prefers_kernel(tensor(), tensor(), w, update)
