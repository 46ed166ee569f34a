"""The nodes: inputs and outputs only; what they do is `pilotage.pipelines.comfyui`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from pilotage.guidance import PRESETS, load_guidance
from pilotage.pipelines.comfyui import (
    guided,
    make,
    methods,
    trace_of,
    trace_picture,
    widgets,
    with_policy,
    with_rule,
)

Inputs = dict[str, dict[str, Any]]
MODEL = ("MODEL", {"tooltip": "The model, e.g. of Load Checkpoint. Nodes before act before."})
BY_MODEL = "of the model"
FOLDER = "pilotage"  # in ComfyUI's folder of models


class Node:
    """What all nodes have in common: a patched model comes out."""

    CATEGORY = "Pilotage"
    FUNCTION = "run"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("MODEL",)
    DESCRIPTION: ClassVar[str]

    def __init_subclass__(cls) -> None:
        cls.DESCRIPTION = (inspect.getdoc(cls) or "").split("\n\n")[0]


class Preset(Node):
    """A rule and a policy by their names, with the settings known for a family of models."""

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        """ComfyUI's name for what a node takes."""
        family = {"default": BY_MODEL, "tooltip": "Whose settings; other names: class defaults."}
        return {
            "required": {
                "model": MODEL,
                "rule": (list(methods("rule")), {"default": "apg"}),
                "policy": (list(methods("policy")), {"default": "ag"}),
                "family": ([BY_MODEL, *PRESETS], family),
            }
        }

    def run(self, model: Any, rule: str, policy: str, family: str) -> tuple[Any]:
        """The patched model."""
        return (guided(model, f"{rule}+{policy}", None if family == BY_MODEL else family),)


class LoadSettings(Node):
    """A rule and a policy from a file that Pilotage wrote (save_guidance, fit, search)."""

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        """ComfyUI's name for what a node takes."""
        checked = {
            "default": False,
            "tooltip": "Fitted settings hold for one checkpoint, sampler, number of steps and "
            "negative prompt: switch this on when you have seen to it that these are the same.",
        }
        files = sorted(path.name for path in _folder().glob("*.json"))
        return {
            "required": {"model": MODEL, "file": (files,), "checked": ("BOOLEAN", checked)},
        }

    def run(self, model: Any, file: str, checked: bool) -> tuple[Any]:
        """The patched model."""
        settings = load_guidance(_folder() / Path(file).name)
        return (guided(model, settings, checked=checked),)


class ShowTrace(Node):
    """What the last run of a model evaluated, as a picture and in words."""

    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("IMAGE", "STRING")
    RETURN_NAMES = ("picture", "text")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        """ComfyUI's name for what a node takes."""
        samples = {"tooltip": "Of the sampler that ran the model: the trace is of its last run."}
        return {"required": {"model": MODEL, "samples": ("LATENT", samples)}}

    def run(self, model: Any, samples: Any) -> tuple[Tensor, str]:
        """Picture and text."""
        trace = trace_of(model)
        counts = ", ".join(map(str, trace.nfe))
        return trace_picture(trace), f"network evaluations of every sample: {counts}"


def _folder() -> Path:
    """Where files of settings lie: ``models/pilotage`` of ComfyUI."""
    return Path(importlib.import_module("folder_paths").models_dir, FOLDER)


def _settings_node(maker: Callable[..., Any], put: Callable[[Any, Any], Any]) -> type[Node]:
    """A node with an input for every setting of a rule or policy.

    Args:
        maker: Makes the rule or policy.
        put: Gives a model that and returns the patched one.
    """

    def inputs(cls: type) -> Inputs:
        return {"required": {"model": MODEL, **widgets(maker)}}

    def run(self: Any, model: Any, **values: Any) -> tuple[Any]:
        return (put(model, make(maker, values)),)

    members = {"INPUT_TYPES": classmethod(inputs), "run": run, "__doc__": inspect.getdoc(maker)}
    return type(f"Pilotage{getattr(maker, '__name__', '')}", (Node,), members)


NODES: dict[str, type[Node]] = {
    "Pilotage Preset": Preset,
    "Load Pilotage Settings": LoadSettings,
    "Pilotage Trace": ShowTrace,
}
for _kind, _word, _put in (("rule", "Guidance", with_rule), ("policy", "Policy", with_policy)):
    for _name, _maker in methods(_kind).items():
        NODES[f"Pilotage {_word} ({_name})"] = _settings_node(_maker, _put)

NODE_CLASS_MAPPINGS = {name.replace(" ", ""): node for name, node in NODES.items()}
NODE_DISPLAY_NAME_MAPPINGS = {name.replace(" ", ""): name for name in NODES}
