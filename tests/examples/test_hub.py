"""The folder for the hub: a block that modular pipelines load by ``trust_remote_code``."""

import ast
import importlib
import json
import re
import sys

import diffusers as df
import pytest
import torch
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.utils import dynamic_modules_utils

from pilotage.guidance import APG
from pilotage.pipelines.guiders import Guider

from ..modular.checks import use
from ..modular.workflows import MODULAR, SCALE, quiet
from ..pipelines.checks import run
from ..structure import ROOT

FOLDER = ROOT / "examples" / "hub"


@pytest.fixture
def block(tmp_path, monkeypatch):
    """As from the hub, with the copy that diffusers makes of the code in a folder of its own."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return ModularPipelineBlocks.from_pretrained(str(FOLDER), trust_remote_code=True)


def with_block(pipe, block):
    """A pipeline of the same components with the block in front."""
    blocks = pipe.blocks
    blocks.sub_blocks.insert("guidance", block, 0)
    quiet(blocks)
    longer = blocks.init_pipeline()
    longer.register_components(**pipe.components)
    longer.__class__ = type(pipe)
    return longer


@pytest.mark.parametrize("name", ["StableDiffusionXL text2image", "Wan22"])  # one guider, and two
def test_it_is_our_guider(block, name):
    family = MODULAR[name]

    def made_by(pipe, **extra):  # calls hold generators, which a run uses up
        return run(pipe, family.call(2, True) | extra)[0]

    pipe, longer = family.build(), with_block(family.build(), block)
    stock = made_by(pipe)
    assert torch.equal(made_by(longer), stock)  # nothing is named: diffusers' own guider
    for guidance in ("apg+ag", "cfg"):
        use(pipe, Guider(guidance, SCALE).bind(pipe))
        expected = made_by(pipe)
        assert torch.equal(made_by(longer, guidance=guidance), expected)
        assert torch.equal(expected, stock) == (guidance == "cfg")
        assert longer.guider.passes == pipe.guider.passes
        assert longer.guider.guidance == pipe.guider.guidance


def test_scale_and_switch_of_the_guider_before_are_kept(block):
    pipe = with_block(MODULAR["ZImage text2image"].build(), block)
    own = df.ClassifierFreeGuidance(4.0, use_original_formulation=True)
    own.disable()
    pipe.update_components(guider=own)
    run(pipe, plain_call() | {"guidance": "apg(eta=0.5)"})
    assert pipe.guider.guidance_scale == 5.0 and pipe.guider.guidance.rule == APG(eta=0.5)
    assert pipe.guider.passes == len(pipe.guider.guidance_trace.steps)
    pipe.update_components(guider=pipe.guider.new(guidance_scale=15, enabled=True))
    run(pipe, plain_call())
    assert pipe.guider.guidance_scale == 15 and pipe.guider.guidance.rule == APG(eta=0.5)
    assert pipe.guider.passes == 2 * len(pipe.guider.guidance_trace.steps)


def plain_call():
    call = MODULAR["ZImage text2image"].call(1, True)
    return {name: value for name, value in call.items() if "." not in name}


def test_mistakes_are_refused(block):
    pipe = with_block(MODULAR["ZImage text2image"].build(), block)
    with pytest.raises(ValueError, match="apgg"):
        run(pipe, plain_call() | {"guidance": "apgg"})
    pipe = block.init_pipeline()
    with pytest.raises(ValueError, match="ModularPipeline has no guider"):
        pipe(guidance="apg")


def test_the_folder_is_as_diffusers_writes_it(block, tmp_path):
    block.save_pretrained(tmp_path)
    written, kept = (
        json.loads((folder / "modular_config.json").read_text()) for folder in (tmp_path, FOLDER)
    )
    for config in (written, kept):
        config.pop("_diffusers_version")
    assert written == kept
    assert {path.name for path in FOLDER.iterdir() if path.name != "__pycache__"} == {
        "README.md",
        "block.py",
        "modular_config.json",
    }


def test_card():
    text = (FOLDER / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: diffusers\nlicense: apache-2.0\n")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)
