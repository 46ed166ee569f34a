"""The registered ops: what PyTorch checks of an op, whole graphs, no compilation per number."""

import pytest
import torch

from pilotage.guidance import APG, CFG, CFGZeroStar, NoiseLevel
from pilotage.guidance.ops import SolverStep, guide_step, linear_history
from pilotage.guidance.ops.registration import _linear_history, _number, _tensor

W = 7.5
SOLVER = {"k_x": 0.9, "c_x": 1.2, "c_p": -0.4, "k_p": 0.1, "d_x": 1.6, "d_p": -1.3}


def draw(dtype=torch.float32):
    return torch.randn(4, 2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)


def steps(c, u, x, s, scale, alpha):
    """Three steps that together return everything there is."""
    level = NoiseLevel(alpha, 0.8, "v_prediction")
    wanted = {"gamma_space": "native", "want_norms": True, "want_finite": True}
    yield guide_step(c, u, scale, APG(), x_t=x, level=level, state=s.float(), **wanted)
    yield guide_step(c, u, scale, CFGZeroStar(1), want_prediction=False)
    solver = SolverStep(SolverStep.of(**SOLVER).row, True)
    wanted = {"previous": s, "want_denoised": True, "copies": 2}
    yield guide_step(c, u, scale, CFG(), x_t=x, solver=solver, **wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compiled_is_eager_in_one_graph_for_all_numbers(dtype):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda *a: list(steps(*a)), fullgraph=True, backend=backend)
    for scale in (7.0, 3.0, 5.0, 9.0):
        tensors, alpha = draw(dtype), torch.tensor(0.1 * scale)
        for a, b in zip(
            compiled(*tensors, scale, alpha), steps(*tensors, scale, alpha), strict=True
        ):
            for name, value in b._asdict().items():
                other = getattr(a, name)
                assert (value is other is None) or torch.equal(value, other), name
    assert len(graphs) <= 2, "the second number makes it a variable; later ones compile nothing"
    history = torch.compile(linear_history, fullgraph=True, backend="aot_eager")
    weights = torch.tensor([0.5, -1.0, 2.0, 0.1])
    assert torch.equal(history(draw(dtype), weights), linear_history(draw(dtype), weights))


def test_ops_pass_pytorchs_checks():
    torch.library.opcheck(_linear_history, (draw(), torch.ones(4, 2), torch.float16, ""))
    c, u, x, s = draw(torch.float16)
    row = SolverStep.of(**SOLVER).row
    numbers = [_tensor(number) for number in (W, 0.6, -0.8)]
    assert _number(numbers[0]) == W
    apg = [*numbers, "apg", [0.0, 2.0, -0.5], "native", True, True, True, True, False, False, 0, ""]
    torch.library.opcheck(
        torch.ops.pilotage.guide_step.default, (c, u, x, s.float(), None, None, *apg)
    )
    rest = [*numbers, "cfg", [0.0, 0.0, 0.0], "", False, False, False, False, True, True, 2, ""]
    torch.library.opcheck(torch.ops.pilotage.guide_step.default, (c, u, x, None, s, row, *rest))
