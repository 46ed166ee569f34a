"""How a picture was made, in the metadata of its file: written for PNG, prompts read from others.

A picture carries its settings twice: as JSON, whole, and as the text that AUTOMATIC1111's
stable-diffusion-webui writes (A1111), which many programs read: prompt, "Negative prompt: ...",
and a last line "Steps: 20, Sampler: ..., CFG scale: 7.5, ...".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..guidance.files import atomic
from ..pipelines.seam.support import SCALE_ARGUMENTS

TAG = "pilotage"  # the name of the text in a PNG that holds its settings as JSON
PARAMETERS = "parameters"  # that of A1111's text
NEGATIVE = "Negative prompt:"
# The last line of A1111's text has three settings or more: "Name: value", quoted if need be.
SETTING = re.compile(r'(?:^|,) *(\w[^,:"]*): *("(?:[^"\\]|\\.)*"|[^,]*)')
EXIF, USER_COMMENT = 0x8769, 0x9286  # where A1111 keeps its text in JPEG and WebP

# Inputs of ComfyUI's nodes that hold a text, or lead to the node that does.
TEXTS = ("text", "text_g", "text_l", "clip_g", "clip_l", "t5xxl", "prompt", "value", "string")
LEADS = (
    *TEXTS,
    *("positive", "conditioning", "conditioning_1", "conditioning_2"),
    *("conditioning_to", "conditioning_from"),
    "",  # of nodes that only pass on
)


def save_picture(path: Path, image: Image.Image, made: dict[str, Any]) -> None:
    """Write a PNG, whole or not at all, with how it was made (ready for JSON) in its metadata."""
    info = PngInfo()
    info.add_text(TAG, json.dumps(made))
    if "prompt" in made:
        info.add_text(PARAMETERS, a1111_text(made, image.size))
    with atomic(path) as partial:
        image.save(partial, "PNG", pnginfo=info)


def a1111_text(made: dict[str, Any], size: tuple[int, int]) -> str:
    """Settings as A1111 writes them; the scheduler by its name in diffusers.

    Args:
        made: What `save_picture` takes, with a prompt.
        size: Width and height in pixels.
    """
    scale = next((made[name] for name in made if name.endswith(SCALE_ARGUMENTS)), None)
    settings = {
        "Steps": made.get("steps"),
        "Sampler": made.get("scheduler"),
        "CFG scale": scale,
        "Seed": made.get("seed"),
        "Size": f"{size[0]}x{size[1]}",
        "Model": made.get("model"),
        "Guidance": made.get("guidance"),
        "Network evaluations": made.get("nfe"),
        "Version": "pilotage",
    }
    line = ", ".join(f"{k}: {_quoted(v)}" for k, v in settings.items() if v is not None)
    negative = made.get("negative_prompt")
    return "\n".join([made["prompt"], *([f"{NEGATIVE} {negative}"] if negative else []), line])


def _quoted(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if re.search("[,:\n]", text) else text


def prompt_of(path: Path) -> str:
    """The prompt that a picture of Pilotage, A1111 or ComfyUI carries, as it was written there.

    Raises:
        ValueError: there is none, more than one, or it cannot be read.
    """
    for name, text in _texts(path):
        try:
            prompt = READERS[name](text).strip()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = str(error) if type(error) is ValueError else f"is damaged ({error})"
            raise ValueError(
                f"{path}: its metadata {name!r} {reason}: name a file of prompts (--prompts)"
            ) from error
        if not prompt:
            raise ValueError(
                f"{path} was made with an empty prompt: name a file of prompts (--prompts)"
            )
        return prompt
    raise ValueError(
        f"{path} does not carry its prompt, as pictures of Pilotage, A1111 and ComfyUI do: name a "
        "file of prompts (--prompts)"
    )


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """Name and content of the texts that may hold a prompt, the most telling first."""
    try:
        with Image.open(path) as image:
            if not any(name in image.info for name in READERS):
                image.load()  # PNG: texts may follow the pixels
            comment = image.getexif().get_ifd(EXIF).get(USER_COMMENT)
            found = dict(image.info)
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{path} is damaged or not a picture ({error})") from error
    if isinstance(comment, bytes) and _has_settings(text := _comment(comment)):
        found.setdefault(PARAMETERS, text)
    yield from ((name, found[name]) for name in READERS if isinstance(found.get(name), str))


def _comment(content: bytes) -> str:
    """Text of EXIF's UserComment: its first 8 bytes name the encoding."""
    code, rest = content[:8].rstrip(b"\0 "), content[8:]
    if code != b"UNICODE":
        return rest.decode("utf-8", "replace") if code == b"ASCII" else ""
    # UTF-16 whose byte order is not said: that which gives more of ASCII.
    both = [rest.decode(order, "replace") for order in ("utf-16-be", "utf-16-le")]
    return max(both, key=lambda text: sum(letter.isascii() for letter in text))


def _of_ours(text: str) -> str:
    made = json.loads(text)
    if "prompt" not in made:
        raise ValueError("names no prompt")
    return made["prompt"]


def _has_settings(text: str) -> bool:
    return len(SETTING.findall(text.strip().rpartition("\n")[2])) > 2


def _of_a1111(text: str) -> str:
    """Everything before the negative prompt and the line of settings."""
    if text.lstrip().startswith("{"):
        raise ValueError("is not in the form of A1111")
    lines = [line.strip() for line in text.strip().split("\n")]
    if _has_settings(text):
        lines.pop()
    negative = (i for i, line in enumerate(lines) if line.startswith(NEGATIVE))
    return "\n".join(lines[: next(negative, len(lines))])


def _of_graph(text: str) -> str:
    """The text that reaches the positive input of the samplers of a ComfyUI graph."""
    return _positive(json.loads(text))


def _of_workflow(text: str) -> str:
    """The same of the graph as ComfyUI's editor keeps it."""
    content = json.loads(text)
    origins = {link[0]: [str(link[1]), link[2]] for link in content["links"]}
    graph = {}
    for node in content["nodes"]:
        kind, values = node["type"], node.get("widgets_values")
        inputs: dict[str, Any] = {}
        if re.search("text|string", kind, re.I) and isinstance(values, list):
            texts = [value for value in values if isinstance(value, str)]
            inputs = dict(zip(TEXTS, texts, strict=False))
        for entry in node.get("inputs") or []:
            if entry.get("link") is not None:
                inputs[entry["name"]] = origins[entry["link"]]
        graph[str(node["id"])] = {"class_type": kind, "inputs": inputs}
    return _positive(graph)


def _positive(graph: dict[str, Any]) -> str:
    """The one prompt of a graph: node -> class_type and inputs, each a value or [node, output]."""
    found: dict[str, None] = {}
    for node in graph.values():
        kind, inputs = node["class_type"].lower(), node["inputs"]
        if "sampler" in kind or "guider" in kind:
            for name in ("positive", "conditioning"):
                found |= dict.fromkeys(_behind(graph, inputs.get(name), frozenset()))
    if not found:
        raise ValueError("has no text that leads to a sampler")
    if len(found) > 1:
        raise ValueError(f"has several prompts, {', '.join(map(repr, found))}")
    return next(iter(found))


def _behind(graph: dict[str, Any], value: Any, seen: frozenset[str]) -> Iterator[str]:
    """The texts that an input leads to: itself, if it is one."""
    if isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, list) and str(value[0]) not in seen:
        name, output = str(value[0]), value[1]
        inputs = graph[name]["inputs"]
        both = [inputs.get("positive"), inputs.get("negative")]
        # Nodes such as those of ControlNet take and give both.
        passes = all(isinstance(end, list) for end in both)
        ends = [both[output]] if passes and output < 2 else [inputs.get(lead) for lead in LEADS]
        for end in ends:
            yield from _behind(graph, end, seen | {name})


READERS = {
    TAG: _of_ours,
    PARAMETERS: _of_a1111,
    "prompt": _of_graph,
    "workflow": _of_workflow,
}
