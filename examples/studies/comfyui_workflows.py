"""The workflows of the ComfyUI node pack, made in ComfyUI's own page: JSON files and pictures.

    python -m examples.studies.comfyui_workflows http://127.0.0.1:8188

The address is that of a running ComfyUI with the node pack of ``examples/comfyui``. Nodes are
placed and connected in its page, which then says how it writes the workflow down.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from pilotage.guidance.files import write_json

FOLDER = Path("examples/comfyui/workflows")
COMMON: list[tuple[str, tuple[int, int], dict[str, Any]]] = [
    ("CheckpointLoaderSimple", (0, 0), {}),
    ("CLIPTextEncode", (0, 2), {"text": "a lighthouse in a storm, oil painting"}),
    ("CLIPTextEncode", (1, 2), {"text": ""}),
    ("EmptyLatentImage", (2, 2), {"width": 1024, "height": 1024}),
]
SAMPLER = {"steps": 20, "sampler_name": "dpmpp_2m", "scheduler": "karras"}
END: list[tuple[str, tuple[int, int], dict[str, Any]]] = [
    ("VAEDecode", (4, 0), {}),
    ("SaveImage", (4, 1), {}),
]
# Name -> nodes with their place in a grid (column, row) and what their inputs hold; and links:
# (from node, output, to node, input).
WORKFLOWS: dict[str, tuple[list[Any], list[tuple[int, str, int, str]]]] = {
    "high-scale": (
        [
            *COMMON,
            ("PilotageGuidance(apg)", (1, 0), {}),
            ("KSampler", (3, 0), SAMPLER | {"cfg": 15.0}),
            *END,
        ],
        [(0, "MODEL", 4, "model"), (4, "MODEL", 5, "model")],
    ),
    "fewer-evaluations": (
        [
            *COMMON,
            ("PilotageGuidance(apg)", (1, 0), {}),
            ("KSampler", (3, 0), SAMPLER | {"cfg": 7.5}),
            *END,
            ("PilotagePolicy(forecast)", (2, 0), {}),
            ("PilotageTrace", (5, 0), {}),
            ("PreviewImage", (5, 1), {}),
        ],
        [
            (0, "MODEL", 4, "model"),
            (4, "MODEL", 8, "model"),
            (8, "MODEL", 5, "model"),
            (8, "MODEL", 9, "model"),
            (5, "LATENT", 9, "samples"),
            (9, "picture", 10, "images"),
        ],
    ),
    "after-other-nodes": (
        [
            *COMMON,
            ("PilotagePreset", (2, 0), {"policy": "always"}),
            ("KSampler", (3, 0), SAMPLER | {"cfg": 7.5}),
            *END,
            ("PerturbedAttentionGuidance", (1, 0), {}),
        ],
        [(0, "MODEL", 8, "model"), (8, "MODEL", 4, "model"), (4, "MODEL", 5, "model")],
    ),
}
LINKS = [  # of every workflow
    (0, "CLIP", 1, "clip"),
    (0, "CLIP", 2, "clip"),
    (1, "CONDITIONING", 5, "positive"),
    (2, "CONDITIONING", 5, "negative"),
    (3, "LATENT", 5, "latent_image"),
    (5, "LATENT", 6, "samples"),
    (0, "VAE", 6, "vae"),
    (6, "IMAGE", 7, "images"),
]
HIDDEN = (
    ".p-dialog-mask, .side-tool-bar-container, .comfyui-body-top, .comfyui-menu, "
    ".workflow-tabs-container, .p-buttongroup, .minimap-main-container, .p-toast, .splitter-overlay"
)
BUILD = """
([nodes, links]) => {
  const app = window.app, graph = app.graph;
  graph.clear();
  const made = nodes.map(([type, place, values]) => {
    const node = LiteGraph.createNode(type);
    if (!node) throw new Error("ComfyUI does not know the node " + type);
    graph.add(node);
    for (const [name, value] of Object.entries(values))
      node.widgets.find(w => w.name === name).value = value;
    node.setSize([Math.max(300, node.computeSize()[0]), node.computeSize()[1]]);
    return node;
  });
  const slot = (list, name) => list.findIndex(s => s.name === name);
  for (const [from, output, to, input] of links)
    made[from].connect(slot(made[from].outputs, output), made[to], slot(made[to].inputs, input));
  const width = 380, heights = {};
  nodes.forEach(([type, [column, row], values], i) => {
    (heights[row] ??= []).push(made[i].size[1]);
  });
  nodes.forEach(([type, [column, row], values], i) => {
    let y = 60;
    for (const r of Object.keys(heights)) if (r < row) y += Math.max(...heights[r]) + 70;
    made[i].pos = [40 + column * width, y];
  });
  graph.setDirtyCanvas(true, true);
  const box = [Math.max(...made.map(n => n.pos[0] + n.size[0])) + 40,
               Math.max(...made.map(n => n.pos[1] + n.size[1])) + 40];
  app.canvas.show_info = false;
  app.canvas.ds.scale = 1; app.canvas.ds.offset = [0, 0];
  return box;
}
"""


def main() -> None:
    """Make all workflows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", help="of a running ComfyUI with the node pack")
    parser.add_argument("--chromium", help="path of the browser, if not playwright's own")
    arguments = parser.parse_args()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=arguments.chromium)
        page = browser.new_page(viewport={"width": 1600, "height": 900})
        page.goto(arguments.address)
        page.wait_for_function("() => window.app && window.app.graph && window.LiteGraph")
        page.wait_for_function("() => LiteGraph.registered_node_types['PilotagePreset']")
        page.add_style_tag(content=HIDDEN + " {display: none !important}")
        for name, (nodes, links) in WORKFLOWS.items():
            width, height = page.evaluate(BUILD, [nodes, [*LINKS, *links]])
            page.set_viewport_size({"width": int(width), "height": int(height)})
            page.wait_for_timeout(1000)  # the page draws when it is told its new size
            canvas = page.locator("#graph-canvas")
            FOLDER.mkdir(exist_ok=True)
            picture = Image.open(io.BytesIO(canvas.screenshot())).convert("RGB")
            picture.quantize(64).save(FOLDER / f"{name}.png", optimize=True)
            text = page.evaluate("() => JSON.stringify(window.app.graph.serialize())")
            write_json(FOLDER / f"{name}.json", json.loads(text))
        browser.close()


if __name__ == "__main__":
    main()
