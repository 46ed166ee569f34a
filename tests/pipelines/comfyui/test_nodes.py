"""The node pack: what its nodes take and give, and its workflows."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch

from examples.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from pilotage.guidance import APG, AdaptiveGuidance, Coefficients, Guidance, Interval, linear_ag
from pilotage.guidance.saved import save_guidance
from pilotage.pipelines.comfyui import guidance_of

PACK = Path(__file__).parents[3] / "examples" / "comfyui"
WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
# Of ComfyUI's nodes in the workflows: what comes out.
FOREIGN = {
    "CheckpointLoaderSimple": ["MODEL", "CLIP", "VAE"],
    "CLIPTextEncode": ["CONDITIONING"],
    "EmptyLatentImage": ["LATENT"],
    "KSampler": ["LATENT"],
    "VAEDecode": ["IMAGE"],
    "SaveImage": [],
    "PreviewImage": [],
    "PerturbedAttentionGuidance": ["MODEL"],
}


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """ComfyUI's folder of models."""
    module = types.ModuleType("folder_paths")
    module.models_dir = str(tmp_path)
    monkeypatch.setitem(sys.modules, "folder_paths", module)
    (tmp_path / "pilotage").mkdir()
    return tmp_path / "pilotage"


def run(name, *args, **inputs):
    node = NODE_CLASS_MAPPINGS[name]
    return getattr(node(), node.FUNCTION)(*args, **inputs)


def defaults(name):
    found = NODE_CLASS_MAPPINGS[name].INPUT_TYPES()["required"]
    return {k: v[1]["default"] for k, v in found.items() if len(v) > 1 and "default" in v[1]}


def test_every_node_says_what_comfyui_asks_for(folder):
    assert NODE_CLASS_MAPPINGS.keys() == NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in NODE_CLASS_MAPPINGS.values():
        json.dumps(node.INPUT_TYPES(), allow_nan=False)
        assert node.CATEGORY == "Pilotage" and node.DESCRIPTION.endswith(".")
        assert callable(getattr(node(), node.FUNCTION))


def test_rule_and_policy_nodes_add_up(comfy):
    model = comfy.model()
    (ruled,) = run("PilotageGuidance(apg)", model, **defaults("PilotageGuidance(apg)"))
    values = defaults("PilotagePolicy(ag)") | {"threshold": 0.99}
    (both,) = run("PilotagePolicy(ag)", ruled, **values)
    assert guidance_of(both) == Guidance(APG(), AdaptiveGuidance(0.99))
    assert guidance_of(ruled) == Guidance(APG()) and guidance_of(model).is_plain
    with comfy.counting(model) as rows:
        samples = comfy.sample(both, batch=2)
    picture, text = run("PilotageTrace", both, {"samples": samples})
    assert picture.ndim == 4 and picture.shape[-1] == 3 and picture.dtype == torch.float32
    assert 0 <= picture.min() < picture.max() <= 1
    counts = [int(n) for n in text.removeprefix("network evaluations of every sample: ").split(",")]
    assert sum(counts) == sum(rows)


def test_trace_of_what_has_not_sampled(standin):
    with pytest.raises(ValueError, match="is not patched by Pilotage"):
        run("PilotageTrace", standin.model(), {})
    (model,) = run("PilotagePreset", standin.model(), "apg", "ag", "sdxl")
    with pytest.raises(ValueError, match="has not sampled yet"):
        run("PilotageTrace", model, {})


def test_presets_go_by_the_model(comfy):
    model = comfy.model()
    (of_model,) = run("PilotagePreset", model, "apg", "ag", "of the model")
    assert guidance_of(of_model) == Guidance(APG(), AdaptiveGuidance())  # of no known family
    (named,) = run("PilotagePreset", model, "apg", "interval", "sdxl")
    assert guidance_of(named).policy == Interval(noise_low=0.28, noise_high=5.42)
    model.model.model_config = type("SDXL", (), {})()
    (found,) = run("PilotagePreset", model, "apg", "interval", "of the model")
    assert guidance_of(found) == guidance_of(named)
    with pytest.raises(ValueError, match="no known window"):
        run("PilotagePreset", comfy.model(), "apg", "interval", "of the model")


def test_settings_come_from_files(standin, folder):
    save_guidance(folder / "mine.json", Guidance(APG(momentum=-0.75), AdaptiveGuidance(0.98)))
    assert NODE_CLASS_MAPPINGS["LoadPilotageSettings"].INPUT_TYPES()["required"]["file"][0] == [
        "mine.json"
    ]
    (model,) = run("LoadPilotageSettings", standin.model(), "mine.json", False)
    assert guidance_of(model) == Guidance(APG(momentum=-0.75), AdaptiveGuidance(0.98))


def test_fitted_settings_are_for_one_model(comfy, folder):
    """The user has to say that it is the one: nobody here can see it."""
    identity = {"scheduler": "DPMSolverMultistepScheduler", "num_inference_steps": 4}
    fitted = Coefficients(
        cond=((1,), (-1, 1), (0, -1, 1), (0, 0, -1, 1)),
        uncond=((), (1,), (0, 1), (0, 0, 1)),
        identity=identity,
    )
    save_guidance(folder / "fitted.json", Guidance(APG(), linear_ag(fitted, first=1.0)))
    model = comfy.model()
    with pytest.raises(ValueError, match="scheduler DPMSolver.*num_inference_steps 4.*checked"):
        run("LoadPilotageSettings", model, "fitted.json", False)
    (loaded,) = run("LoadPilotageSettings", model, "fitted.json", True)
    with comfy.counting(model) as rows:
        comfy.sample(loaded, steps=4)
    assert rows == [2, 1, 2, 1]
    with pytest.raises(ValueError, match="4 steps cannot guide a run of 5"):
        comfy.sample(loaded, steps=5)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_fit_the_nodes(path, folder):
    """Every input of ours is there with a value or a link, and links join what goes together."""
    assert path.with_suffix(".png").is_file()
    graph = json.loads(path.read_text())
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert any(node["type"] in NODE_CLASS_MAPPINGS for node in nodes.values())
    for node in nodes.values():
        outputs = [output["type"] for output in node["outputs"]]
        if node["type"] in FOREIGN:
            assert outputs == FOREIGN[node["type"]]
            continue
        definition = NODE_CLASS_MAPPINGS[node["type"]]
        inputs = definition.INPUT_TYPES()["required"]
        assert outputs == list(definition.RETURN_TYPES)
        assert [entry["name"] for entry in node["inputs"]] == list(inputs)
        held = [
            k
            for k, v in inputs.items()
            if isinstance(v[0], list) or v[0] not in ("MODEL", "LATENT")
        ]
        assert len(node.get("widgets_values", [])) == len(held)
        for name, value in zip(held, node.get("widgets_values", []), strict=True):
            kind = inputs[name][0]
            assert (
                value in kind if isinstance(kind, list) else value == defaults(node["type"])[name]
            )
    for _, source, output, target, place, kind in graph["links"]:
        assert nodes[source]["outputs"][output]["type"] == kind
        assert nodes[target]["inputs"][place]["type"] == kind
