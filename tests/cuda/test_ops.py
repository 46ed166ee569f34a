"""The fused guidance step on CUDA: launches counted, captured in a graph, against float64.

Small shapes, layouts and edge cases are in tests/guidance/ops, which use CUDA where it is there.
"""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from pilotage.guidance import (
    APG,
    CFG,
    TCFG,
    CFGRescale,
    CFGZeroStar,
    MagnitudeAware,
    NoiseLevel,
    Predictions,
    Step,
)
from pilotage.guidance.ops import guide_step

W = 7.5
IMAGE, VIDEO = (2, 4, 128, 128), (1, 16, 21, 90, 160)
RULES = [CFG(), CFGRescale(), APG(), CFGZeroStar(1), TCFG(), MagnitudeAware()]
LEVEL = NoiseLevel(0.6, 0.8, "epsilon")


def draw(shape, dtype=torch.float16):
    generator = torch.Generator("cuda").manual_seed(0)
    a, b, x_t, buffer = torch.randn(4, *shape, generator=generator, device="cuda")
    return a.to(dtype), (a + 0.3 * b).to(dtype), x_t.to(dtype), buffer


def guided(rule, cond, uncond, x_t, buffer, impl="fused"):
    """A step that returns all there is."""
    step = Step(3, 9, LEVEL, None, x_t)
    predictions = Predictions({"cond": cond, "uncond": uncond}, step)
    state = buffer if isinstance(rule, APG) else None
    return guide_step(rule, predictions, step, W, state, gamma_space="x0", impl=impl)


def tensors(result):
    return [value for value in result if value is not None]


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
    """For one sample; several have their flags reduced by one more."""
    one = [tensor[:1] for tensor in draw(shape)]
    assert launches(lambda: guided(rule, *one)) == count
    two = [torch.cat([tensor, tensor]) for tensor in one]
    assert launches(lambda: guided(rule, *two)) == count + 1


@pytest.mark.parametrize("shape", [IMAGE, VIDEO])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_equals_the_rule_in_float64(rule, dtype, shape):
    given = draw(shape, dtype)
    fused = guided(rule, *given)
    low = guided(rule, *given, impl="reference")
    exact = guided(rule, *(tensor.double() for tensor in given), impl="reference")
    for name in ("prediction", "state", "gamma"):
        result, truth = getattr(fused, name), getattr(exact, name)
        if result is None:
            assert truth is None
            continue
        eps = torch.finfo(result.dtype).eps * (32 if name == "gamma" else 1)
        bound = 2 * ((getattr(low, name).double() - truth).abs().max() + eps * truth.abs().max())
        assert (result.double() - truth).abs().max() <= bound, name
    again = guided(rule, *given)
    for a, b in zip(tensors(fused), tensors(again), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [IMAGE, VIDEO])
def test_graph_replay_and_no_host_sync(shape):
    given = draw(shape)
    expected = guided(APG(), *given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        guided(APG(), *given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = guided(APG(), *given)
    for tensor in tensors(captured):
        tensor.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(tensors(captured), tensors(expected), strict=True):
        assert torch.equal(a, b)
