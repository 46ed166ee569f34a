"""What only the real ComfyUI has: its own patches, its nodes, its ways of calling a sampler."""

import pytest
import torch

from pilotage.guidance import APG, AdaptiveGuidance
from pilotage.pipelines.comfyui import SamplingError, guided, trace_of

from .oracles import apg

PAPER = APG(eta=0.0, norm_threshold=0.5, momentum=-0.5, threshold_unit="l2")
pytestmark = pytest.mark.comfyui


def patches(real, model, name):
    """A model with one of ComfyUI's own patches."""
    if name == "PAG":
        return real.node("comfy_extras.nodes_pag", "PerturbedAttentionGuidance")(model, 2.0)
    if name == "RescaleCFG":
        return real.node("comfy_extras.nodes_model_advanced", "RescaleCFG")(model, 0.7)
    if name == "SLG":
        node = real.node("comfy_extras.nodes_slg", "SkipLayerGuidanceDiT")
        settings = {"scale": 2.0, "start_percent": 0.0, "end_percent": 1.0}
    else:
        node = real.node("comfy_extras.nodes_slg", "SkipLayerGuidanceDiTSimple")
        settings = {"start_percent": 0.0, "end_percent": 1.0}
    return node(model, double_layers="0", single_layers="", **settings)


NAMES = ["PAG", "RescaleCFG", "SLG", "SLG of the unconditional branch"]


def model_for(real, name):
    return real.model(kind="sd3" if "SLG" in name else "epsilon")


@pytest.mark.parametrize("name", NAMES)
def test_patches_before(real, recorder, close, name):
    """Algorithm 1 of the conditional prediction and the update that the patch was part of."""
    first, model = type(recorder)(), model_for(real, name)
    patched = patches(real, model, name)
    real.sample(recorder(guided(first(patched), PAPER)), steps=6, cfg=6.0, batch=2)
    pairs = [
        (s["cond_denoised"].double(), (6 * s["cond_denoised"] - s["denoised"]).double() / 5)
        for s in first.steps
    ]
    close(recorder.results(), apg(pairs, 6.0))
    plain = type(recorder)()
    real.sample(plain(guided(model, PAPER)), steps=6, cfg=6.0, batch=2)
    pairs = zip(plain.results(), recorder.results(), strict=True)
    assert not any(torch.allclose(a, b, rtol=1e-3) for a, b in pairs)  # the patch does something


@pytest.mark.parametrize("name", NAMES)
def test_patches_after(real, recorder, close, name):
    """Those that add to the result add to what the rule made; the others are part of the update."""
    first, model = type(recorder)(), model_for(real, name)
    real.sample(
        recorder(patches(real, first(guided(model, PAPER)), name)), steps=6, cfg=6.0, batch=2
    )
    if name == "RescaleCFG":  # it stands before all the same: ComfyUI has one place for it
        before = patches(real, model, name)
        expected = type(recorder)()
        real.sample(expected(guided(before, PAPER)), steps=6, cfg=6.0, batch=2)
        results = zip(expected.results(), recorder.results(), strict=True)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in results)
        return
    close(first.results(), apg(first.pairs(), 6.0))
    both = list(zip(first.results(), recorder.results(), strict=True))
    adds = name in ("PAG", "SLG")
    assert all(torch.equal(made, result) != adds for made, result in both)


@pytest.mark.parametrize("name", NAMES)
def test_policies_beside_patches(real, name):
    """Rows that Pilotage leaves out are left out; those that the patch evaluates stay."""
    model = model_for(real, name)
    alone, patched = AdaptiveGuidance(-2.0), patches(real, model, name)
    with real.counting(model) as rows:
        real.sample(patched, steps=6, batch=2)
    own = sum(rows) - 24
    run = guided(patched, alone)
    with real.counting(model) as rows:
        result = real.sample(run, steps=6, batch=2)
    assert result.isfinite().all() and trace_of(run).nfe == [7, 7]
    assert sum(rows) == 14 + own


def test_nodes_of_ksampler(real, monkeypatch):
    """Through KSampler, KSamplerAdvanced in two parts, and with part of the noise."""
    nodes, model = real.module("nodes"), guided(real.model(), "apg+forecast")
    monkeypatch.setattr(nodes.comfy.utils, "PROGRESS_BAR_ENABLED", False)
    _, positive, negative = real.inputs(model)
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    rest = ("euler", "normal", positive, negative, latent)
    (result,) = nodes.KSampler().sample(model, 1, 10, 6.0, *rest)
    assert result["samples"].isfinite().all() and trace_of(model).nfe == [12]
    (part,) = nodes.KSampler().sample(model, 1, 10, 6.0, *rest, denoise=0.5)
    assert part["samples"].isfinite().all() and len(trace_of(model).steps) == 10
    advanced = nodes.KSamplerAdvanced()
    (first,) = advanced.sample(model, "enable", 1, 10, 6.0, *rest, 0, 4, "enable")
    assert len(trace_of(model).steps) == 4
    rest = (*rest[:-1], first)
    (second,) = advanced.sample(model, "disable", 1, 10, 6.0, *rest, 4, 10, "disable")
    assert len(trace_of(model).steps) == 6 and second["samples"].isfinite().all()


def test_masks(real):
    """Inpainting: what the mask leaves alone is as it was."""
    latent, mask = torch.randn(1, 4, 8, 8), torch.zeros(1, 8, 8)
    mask[..., 4:] = 1
    model = guided(real.model(), "apg+ag")
    result = real.sample(model, steps=6, latent=latent, noise_mask=mask)
    torch.testing.assert_close(result[..., :4], latent[..., :4], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(result[..., 4:], latent[..., 4:])


def test_guiders(real):
    """BasicGuider has one branch, which a forecast skips; DualCFGGuider is refused."""
    custom, model = real.module("comfy_extras.nodes_custom_sampler"), real.model()
    noise, positive, negative = real.inputs(model)
    sigmas = real.module("comfy.samplers").calculate_sigmas(
        model.get_model_object("model_sampling"), "normal", 10
    )
    sampler = real.module("comfy.samplers").sampler_object("euler")

    def sample(guider):
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True)

    run = guided(model, "forecast")
    basic = custom.Guider_Basic(run)
    basic.set_conds(positive)
    with real.counting(model) as rows:
        assert sample(basic).isfinite().all()
    assert rows == [1] * 6 and trace_of(run).nfe == [6]
    dual = custom.Guider_DualCFG(guided(model, "apg"))
    dual.set_conds(positive, negative, negative)
    dual.set_cfg(4.0, 2.0)
    with pytest.raises(SamplingError, match="Guider_DualCFG evaluates the branches"):
        sample(dual)


def test_every_sampler(real):
    """The stock result bit for bit where nothing is changed: rehearsals leave no trace."""
    model = real.model()
    for sampler in real.samplers:
        stock = real.sample(model, sampler, steps=4)
        run = guided(model, AdaptiveGuidance(2.0))
        assert torch.equal(real.sample(run, sampler, steps=4), stock), sampler
