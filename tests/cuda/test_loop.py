"""The sampling loop on CUDA: no host syncs from us, graphs and compiled denoisers at two shapes."""

import functools

import pytest
import torch

from examples.studies.bench_network import fused_embedded, syncs_in_run
from pilotage.guidance import APG, AdaptiveGuidance, Interval
from pilotage.pipelines import (
    FusedDDIMScheduler,
    FusedDPMSolverMultistepScheduler,
    FusedEulerScheduler,
    FusedFlowMatchEulerScheduler,
    noise_level,
)

SCHEDULERS = (
    FusedDDIMScheduler,
    FusedDPMSolverMultistepScheduler,
    FusedEulerScheduler,
    FusedFlowMatchEulerScheduler,
)
PROMPT = ["noto style fox", "twemoji style red apple"]
WINDOW = APG() | Interval(stop_step=4)  # 2B rows for four steps, then B rows
CALL = {"num_inference_steps": 8, "guidance_scale": 7.5, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe():
    return fused_embedded()


def latents(pipe, guidance=WINDOW):
    generator = torch.Generator("cuda").manual_seed(0)
    return pipe(PROMPT, guidance=guidance, generator=generator, **CALL)[0]


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_a_step_never_waits_for_the_device(cls):
    scheduler = cls()
    scheduler.set_timesteps(6, "cuda")
    x = torch.randn(2, 4, 16, 16, device="cuda", dtype=torch.float16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in scheduler.timesteps:
            scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
            pred = scale(x, t) * 0.5
            noise_level(scheduler, t)
            x = scheduler.step(pred, t, x, return_dict=False)[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(x).all()


@pytest.mark.parametrize("cls", SCHEDULERS[:3])
def test_on_cuda_as_on_the_cpu(cls):
    found = []
    for device in ("cpu", "cuda"):
        scheduler = cls()
        scheduler.set_timesteps(8, device)
        x = torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(0)).to(device)
        for t in scheduler.timesteps:
            x = scheduler.step(0.5 * torch.tanh(x), t, x, return_dict=False)[0]
        found.append(x.cpu())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guidance", ["cfg", "apg", "ag", "apg+ag", WINDOW], ids=str)
def test_one_more_step_costs_no_sync(pipe, guidance):
    call = {"guidance": guidance, "guidance_scale": 7.5}
    for steps in (6, 16):
        syncs_in_run(pipe, steps, **call)  # learns how the pipeline guides
    assert syncs_in_run(pipe, 16, **call) == syncs_in_run(pipe, 6, **call)


def test_partial_batches_cost_no_sync(pipe):
    """Samples that leave the guided set at different steps: rows are gathered on the device."""
    for policy in (AdaptiveGuidance(threshold) for threshold in (0.9, 0.99, 0.999)):
        few, many = (
            syncs_in_run(pipe, steps, guidance=policy, num_images_per_prompt=4) for steps in (6, 16)
        )
        assert few == many


class Graphed:
    """A denoiser's forward, captured once per shape and replayed."""

    def __init__(self, network):
        self.network, self.forward, self.graphs = network, network.forward, {}

    def __enter__(self):
        functools.update_wrapper(self, self.forward)
        self.network.forward = self
        return self

    def __exit__(self, *_):
        del self.network.forward

    def __call__(self, sample, timestep, encoder_hidden_states, **kwargs):
        inputs = (sample, torch.as_tensor(timestep, device="cuda"), encoder_hidden_states)
        if sample.shape not in self.graphs:
            self.graphs[sample.shape] = self.capture(inputs, kwargs)
        graph, static, output = self.graphs[sample.shape]
        for target, value in zip(static, inputs, strict=True):
            target.copy_(value)
        graph.replay()
        return (output.clone(),)

    def capture(self, inputs, kwargs):
        static = [value.clone() for value in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.forward(*static, **kwargs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self.forward(*static, **kwargs)[0]
        return graph, static, output


def test_the_denoiser_replays_from_graphs_of_two_shapes(pipe):
    eager = latents(pipe)
    with Graphed(pipe.unet) as graphed:
        replayed = latents(pipe)
        again = latents(pipe)
    assert sorted(shape[0] for shape in graphed.graphs) == [len(PROMPT), 2 * len(PROMPT)]
    torch.testing.assert_close(replayed, eager, rtol=1e-3, atol=1e-3)
    assert torch.equal(replayed, again)


def test_the_denoiser_compiles_to_two_shapes_with_reduced_overhead():
    pipe = fused_embedded()
    eager = latents(pipe)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe.unet.compile(mode="reduce-overhead", dynamic=False)
    for _ in range(3):  # eager warm-up, recording, replay
        compiled = latents(pipe)
    torch.testing.assert_close(compiled, eager, rtol=1e-2, atol=1e-2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
