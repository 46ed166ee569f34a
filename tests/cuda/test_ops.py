"""The fused guidance step on CUDA: launches counted, captured in a graph, against float64."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from pilotage.guidance import APG, CFG, TCFG, CFGRescale, CFGZeroStar, MagnitudeAware, NoiseLevel
from pilotage.guidance.ops import SolverStep, guide_step, linear_history

W = 7.5
IMAGE, VIDEO = (2, 4, 128, 128), (1, 16, 21, 90, 160)
RULES = [CFG(), CFGRescale(), APG(), CFGZeroStar(1), TCFG(), MagnitudeAware()]
LEVEL = NoiseLevel(0.6, 0.8, "epsilon")


def draw(shape, dtype=torch.float16):
    generator = torch.Generator("cuda").manual_seed(0)
    a, b, x_t, buffer = torch.randn(4, *shape, generator=generator, device="cuda")
    return a.to(dtype), (a + 0.3 * b).to(dtype), x_t.to(dtype), buffer


def everything(shape, rule=None, dtype=torch.float16, impl="fused"):
    """Arguments of a step that returns all there is."""
    cond, uncond, x_t, buffer = draw(shape, dtype)
    numbers = {"k_x": 0.9, "c_x": 1.2, "c_p": -0.4, "k_p": 0.1, "d_x": 1.6, "d_p": -1.3}
    solver = SolverStep(SolverStep.of("cuda", **numbers).row, True)
    rule = rule or APG()
    wanted = {"gamma_space": "x0", "want_norms": True, "want_finite": True, "want_denoised": True}
    given = {"x_t": x_t, "level": LEVEL, "solver": solver, "previous": buffer, "copies": 2}
    if isinstance(rule, APG):
        given["state"] = buffer
    return (cond, uncond, W, rule), wanted | given | {"impl": impl}


def launches(function):
    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        function()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiled.events())


@pytest.mark.parametrize(("shape", "count"), [(IMAGE, 1), (VIDEO, 2)])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_launches(rule, shape, count):
    args, kwargs = everything(shape, rule)
    assert launches(lambda: guide_step(*args, **kwargs)) == count


def test_weighted_history_is_one_launch():
    history, weights = torch.randn(5, *IMAGE, device="cuda").half(), torch.randn(5, device="cuda")
    assert launches(lambda: linear_history(history, weights)) == 1
    exact = (weights.double().view(5, 1, 1, 1, 1) * history.double()).sum(0)
    torch.testing.assert_close(
        linear_history(history, weights).double(), exact, rtol=1e-3, atol=5e-3
    )


@pytest.mark.parametrize("shape", [IMAGE, VIDEO, (3, 4, 7, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_equals_the_reference_in_float64(rule, dtype, shape):
    args, kwargs = everything(shape, rule, dtype)
    fused = guide_step(*args, **kwargs)
    low = guide_step(*args, **kwargs | {"impl": "reference"})
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    solver = SolverStep(kwargs["solver"].row.double(), True)
    cond, uncond = args[0].double(), args[1].double()
    exact = guide_step(cond, uncond, W, rule, **wide | {"impl": "reference", "solver": solver})
    for name, result in fused._asdict().items():
        if result is None:
            assert getattr(exact, name) is None
            continue
        truth, eps = getattr(exact, name).double(), torch.finfo(torch.float32).eps
        if result.is_floating_point():
            eps = torch.finfo(result.dtype).eps
        scalar = 32 * eps if result.ndim == 1 else eps
        bound = 2 * ((getattr(low, name).double() - truth).abs().max() + scalar * truth.abs().max())
        assert (result.double() - truth).abs().max() <= bound, name
    again = guide_step(*args, **kwargs)
    assert all(a is b or torch.equal(a, b) for a, b in zip(fused, again, strict=True))


@pytest.mark.parametrize("shape", [IMAGE, VIDEO])
def test_graph_replay_and_no_host_sync(shape):
    args, kwargs = everything(shape)
    expected = guide_step(*args, **kwargs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        guide_step(*args, **kwargs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = guide_step(*args, **kwargs)
    for tensor in captured:
        if tensor is not None:
            tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(a is b or torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
