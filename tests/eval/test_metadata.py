"""Prompts in the metadata of pictures, written by others than the code that reads them."""

import json
import struct
import zlib

import pytest
from PIL import Image, PngImagePlugin

from pilotage.eval.metadata import prompt_of, save_picture

A1111 = (
    "a cat, (sitting:1.2) on a mat,\nat dawn\n"
    "Negative prompt: blurry, text\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, "
    'Size: 512x512, Model hash: 45dee52b, Lora hashes: "one: 1, two: 2", Version: v1.9.4'
)
MADE = {
    "prompt": "a fox, 雪の中\nin “snow”: é",
    "negative_prompt": "blurry, dark",
    "guidance": "APG(eta=0.0, momentum=-0.5)",
    "guidance_scale": 7.5,
    "steps": 20,
    "scheduler": "DPMSolverMultistepScheduler",
    "seed": 3,
    "nfe": 40,
}


def chunk(kind, content):
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def text_chunk(name, text):
    """A PNG's text: Latin-1 as tEXt, anything else as iTXt, compressed."""
    try:
        return chunk(b"tEXt", name.encode() + b"\0" + text.encode("latin-1"))
    except UnicodeEncodeError:
        body = zlib.compress(text.encode())
        return chunk(b"iTXt", name.encode() + b"\0\1\0en\0\0" + body)


def write_png(path, after=False, **texts):
    """A PNG of one pixel with texts before or after the pixels, byte by byte."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0\1\2\3"))
    words = b"".join(text_chunk(*item) for item in texts.items())
    body = pixels + words if after else words + pixels
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b""))
    return path


def texts_of(path):
    """The texts of a PNG, read byte by byte."""
    content, found, at = path.read_bytes(), {}, 8
    while at < len(content):
        (size,) = struct.unpack(">I", content[at : at + 4])
        kind, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + size]
        if kind == b"tEXt":
            name, text = body.split(b"\0", 1)
            found[name.decode()] = text.decode("latin-1")
        if kind == b"iTXt":
            name, rest = body.split(b"\0", 1)
            packed, (_, _, text) = rest[0], rest[2:].split(b"\0", 2)
            found[name.decode()] = (zlib.decompress(text) if packed else text).decode()
        at += 12 + size
    return found


def settings_of(line):
    """Settings of A1111's last line, letter by letter."""
    found, name, value, quoted = {}, "", None, False
    for letter in f"{line},":
        if letter == '"' and not (value or "").endswith("\\"):
            quoted = not quoted
        if letter == "," and not quoted:
            found[name.strip()] = value.strip()
            name, value = "", None
        elif letter == ":" and value is None:
            value = ""
        elif value is None:
            name += letter
        else:
            value += letter
    return {k: json.loads(v) if v.startswith('"') else v for k, v in found.items()}


def test_what_is_written_is_read_by_us_and_as_a1111s(tmp_path):
    path = tmp_path / "x.png"
    save_picture(path, Image.new("RGB", (8, 4)), MADE)
    assert prompt_of(path) == MADE["prompt"]
    texts = texts_of(path)
    assert json.loads(texts["pilotage"]) == MADE
    *prompt, negative, line = texts["parameters"].split("\n")
    assert "\n".join(prompt) == MADE["prompt"]
    assert negative == "Negative prompt: blurry, dark"
    settings = settings_of(line)
    assert list(settings)[:4] == ["Steps", "Sampler", "CFG scale", "Seed"]
    wanted = {"Steps": "20", "CFG scale": "7.5", "Seed": "3", "Size": "8x4"}
    wanted |= {"Guidance": MADE["guidance"], "Network evaluations": "40"}
    assert settings.items() >= wanted.items()
    # Our own text gone, as when another program has kept A1111's only.
    assert (
        prompt_of(write_png(tmp_path / "y.png", parameters=texts["parameters"])) == (MADE["prompt"])
    )


def test_settings_without_a_prompt_are_no_text_of_a1111s(tmp_path):
    save_picture(tmp_path / "x.png", Image.new("RGB", (2, 2)), {"method": "local", "seed": 0})
    assert texts_of(tmp_path / "x.png").keys() == {"pilotage"}
    with pytest.raises(ValueError, match=r"x.png: its metadata 'pilotage' names no prompt"):
        prompt_of(tmp_path / "x.png")


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        (A1111, "a cat, (sitting:1.2) on a mat,\nat dawn"),
        (A1111.replace("cat", "猫"), "a 猫, (sitting:1.2) on a mat,\nat dawn"),
        ("a red dot\nSteps: 1, Sampler: DDIM, CFG scale: 7, Seed: 1", "a red dot"),
        ("style: flat, subject: cat", "style: flat, subject: cat"),
        ("only words\nNegative prompt: none\nof these", "only words"),
    ],
)
def test_a1111(tmp_path, text, prompt, after):
    assert prompt_of(write_png(tmp_path / "x.png", after, parameters=text)) == prompt


@pytest.mark.parametrize("order", ["utf-16-be", "utf-16-le"])
@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_a1111_in_exif(tmp_path, suffix, order):
    exif = Image.Exif()
    text = A1111.replace("cat", "猫")
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode(order)
    Image.new("RGB", (8, 8)).save(tmp_path / f"x.{suffix}", exif=exif)
    assert prompt_of(tmp_path / f"x.{suffix}") == "a 猫, (sitting:1.2) on a mat,\nat dawn"


@pytest.mark.parametrize("comment", [b"ASCII\0\0\0Holiday 2019", b"\0" * 20, b"UNICODE\0a"])
def test_a_cameras_comment_is_no_prompt(tmp_path, comment):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = comment
    Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg", exif=exif)
    with pytest.raises(ValueError, match=r"x.jpg does not carry its prompt.*--prompts"):
        prompt_of(tmp_path / "x.jpg")


def graph(**other):
    """ComfyUI's own example of text to image, as it keeps it for its server."""
    nodes = {
        "3": ("KSampler", {"positive": ["6", 0], "negative": ["7", 0], "cfg": 8}),
        "4": ("CheckpointLoaderSimple", {"ckpt_name": "model.safetensors"}),
        "6": ("CLIPTextEncode", {"text": "a bottle, ガラス", "clip": ["4", 1]}),
        "7": ("CLIPTextEncode", {"text": "watermark", "clip": ["4", 1]}),
        "9": ("SaveImage", {"filename_prefix": "x", "images": ["8", 0]}),
    }
    nodes |= other
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


CONTROL = {
    "3": ("KSampler", {"positive": ["5", 0], "negative": ["5", 1]}),
    "5": ("ControlNetApplyAdvanced", {"positive": ["6", 0], "negative": ["7", 0], "strength": 1}),
}
SWAPPED = CONTROL | {"3": ("KSampler", {"positive": ["5", 1], "negative": ["5", 0]})}
FLUX = {
    "3": ("SamplerCustomAdvanced", {"guider": ["5", 0], "sampler": ["2", 0]}),
    "5": ("BasicGuider", {"conditioning": ["8", 0]}),
    "8": ("FluxGuidance", {"conditioning": ["6", 0], "guidance": 3.5}),
}
LINKED = {
    "6": ("CLIPTextEncode", {"text": ["5", 0], "clip": ["4", 1]}),
    "5": ("PrimitiveString", {"value": "a bottle, ガラス"}),
}
XL = {"6": ("CLIPTextEncodeSDXL", {"text_g": "a bottle, ガラス", "text_l": "a bottle, ガラス"})}
TWICE = {"8": ("KSamplerAdvanced", {"positive": ["6", 0], "negative": ["7", 0]})}
LOADER = {
    "3": ("KSampler (Efficient)", {"positive": ["6", 1], "negative": ["6", 2]}),
    "6": ("Efficient Loader", {"positive": "a bottle, ガラス", "negative": "watermark"}),
}


@pytest.mark.parametrize("other", [{}, CONTROL, FLUX, LINKED, XL, TWICE, LOADER])
def test_comfyui(tmp_path, other):
    text = json.dumps(graph(**other)).replace('"cfg": 8', '"cfg": NaN')
    assert prompt_of(write_png(tmp_path / "x.png", prompt=text)) == "a bottle, ガラス"


def test_comfyui_follows_the_output_of_a_node_that_gives_both(tmp_path):
    path = write_png(tmp_path / "x.png", prompt=json.dumps(graph(**SWAPPED)))
    assert prompt_of(path) == "watermark"


def test_comfyuis_workflow(tmp_path):
    nodes = [
        {
            "id": 3,
            "type": "KSampler",
            "inputs": [{"name": "positive", "link": 4}, {"name": "negative", "link": 6}],
            "widgets_values": [156680208700286, "randomize", 20, 8, "euler", "normal", 1],
        },
        {"id": 5, "type": "Reroute", "inputs": [{"name": "", "link": 5}], "widgets_values": None},
        {
            "id": 6,
            "type": "CLIPTextEncode",
            "inputs": [{"name": "clip", "link": 3}, {"name": "text", "link": None}],
            "widgets_values": ["a bottle"],
        },
        {"id": 7, "type": "CLIPTextEncode", "widgets_values": ["watermark"]},
        {"id": 8, "type": "Note", "widgets_values": ["do not read"]},
    ]
    links = [[3, 4, 1, 6, 0, "CLIP"], [4, 5, 0, 3, 1, "*"], [5, 6, 0, 5, 0, "*"]]
    links.append([6, 7, 0, 3, 2, "CONDITIONING"])
    text = json.dumps({"nodes": nodes, "links": links, "version": 0.4})
    assert prompt_of(write_png(tmp_path / "x.png", workflow=text)) == "a bottle"


LOOP = {"6": ("CLIPTextEncode", {"text": ["5", 0]}), "5": ("Text", {"text": ["6", 0]})}
TWO = {"8": ("KSampler", {"positive": ["7", 0]})}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({}, "does not carry its prompt"),
        ({"Comment": "a cat"}, "does not carry its prompt"),
        ({"pilotage": "{"}, "'pilotage' is damaged"),
        ({"pilotage": "[]"}, "'pilotage' names no prompt"),
        ({"pilotage": '{"prompt": 3}'}, "'pilotage' is damaged"),
        ({"parameters": '{"sui_image_params": {}}'}, "'parameters' is not in the form of A1111"),
        ({"parameters": "\nNegative prompt: x"}, "made with an empty prompt"),
        ({"prompt": "just words"}, "'prompt' is damaged"),
        ({"prompt": "[" * 100_000}, "'prompt' is damaged"),
        ({"prompt": "[1]"}, "'prompt' is damaged"),
        ({"prompt": json.dumps(graph(**LOOP))}, "'prompt' has no text that leads to a sampler"),
        ({"prompt": json.dumps(graph(**TWO))}, "several prompts, 'a bottle, ガラス', 'watermark'"),
        ({"prompt": '{"3": {"class_type": "KSampler", "inputs": {"positive": ["9", 0]}}}'}, "dam"),
        ({"workflow": '{"nodes": []}'}, "'workflow' is damaged"),
    ],
)
def test_without_a_prompt_that_can_be_read(tmp_path, texts, message):
    with pytest.raises(ValueError, match=f"x.png.*{message}.*--prompts"):
        prompt_of(write_png(tmp_path / "x.png", **texts))


def test_damaged_files(tmp_path, monkeypatch):
    path = write_png(tmp_path / "x.png", parameters=A1111)
    whole = path.read_bytes()
    path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="x.png is damaged or not a picture"):
        prompt_of(path)
    path.write_bytes(whole.replace(b"a cat", b"a cut"))  # its checksum is wrong now
    with pytest.raises(ValueError, match="x.png is damaged or not a picture"):
        prompt_of(path)
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 10)
    path = write_png(path, parameters=A1111.replace("cat", "猫"))
    with pytest.raises(ValueError, match="x.png"):
        prompt_of(path)
