"""Token files: what diffusers, A1111 and ComfyUI make of them."""

import pytest
import safetensors.torch
import torch

from pilotage.pipelines.personalization.files import (
    add_token,
    load_token,
    loading_lines,
    remove_token,
    save_token,
)
from pilotage.pipelines.quantization.quantize import quantize

from ...families import FAMILIES

WIDTH = 16
NAME = "<my-cat>"
PROMPT = "a red {} on a green hill"


def vectors(count, seed=0):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def a1111(tensors):
    """A1111's rules for a token file: (number of vectors, total width), the name is the file's."""
    if "string_to_param" in tensors:
        raise AssertionError("read as its own format")
    if "clip_g" in tensors and "clip_l" in tensors:
        return len(tensors["clip_g"]), tensors["clip_g"].shape[-1] + tensors["clip_l"].shape[-1]
    assert len(tensors) == 1, "several keys are several embeddings"
    (rows,) = tensors.values()
    rows = rows[None] if rows.ndim == 1 else rows
    return rows.shape


def comfyui(tensors, key):
    """ComfyUI's rules: the encoder's own key if it is there, else the first tensor."""
    assert "string_to_param" not in tensors
    return tensors[key] if key in tensors else next(iter(tensors.values()))


@pytest.mark.parametrize("count", [1, 3])
def test_other_readers(tmp_path, count):
    rows, more = vectors(count), torch.randn(count, 2 * WIDTH)
    path = tmp_path / "a" / "sd.safetensors"
    save_token(path, [rows], NAME)
    sd = safetensors.torch.load_file(path)
    assert list(sd) == [NAME] and a1111(sd) == (count, WIDTH)
    assert torch.equal(comfyui(sd, "clip_l"), rows) and torch.equal(comfyui(sd, "clip_h"), rows)
    path = tmp_path / "xl.safetensors"
    save_token(path, [rows, more], NAME)
    xl = safetensors.torch.load_file(path)
    assert set(xl) == {"clip_l", "clip_g"} and a1111(xl) == (count, 3 * WIDTH)
    assert torch.equal(comfyui(xl, "clip_l"), rows) and torch.equal(comfyui(xl, "clip_g"), more)
    assert sorted(f.name for f in tmp_path.rglob("*.*")) == ["sd.safetensors", "xl.safetensors"]


def inject(pipe, parts):
    """Puts vectors into the embedding tables by hand, under tokens of their own."""
    names = [NAME, *(f"{NAME}_{i}" for i in range(1, len(parts[0])))]
    for suffix, rows in zip(("", "_2"), parts, strict=False):
        encoder = getattr(pipe, f"text_encoder{suffix}")
        tokenizer = getattr(pipe, f"tokenizer{suffix}")
        ids = range(len(tokenizer), len(tokenizer) + len(rows))
        tokenizer.add_tokens(names)
        assert tokenizer.convert_tokens_to_ids(names) == list(ids)
        with torch.no_grad():
            table = encoder.get_input_embeddings().weight
            table[ids[0] : ids[-1] + 1] = rows


def picture(pipe, word):
    generator = torch.Generator().manual_seed(1)
    options = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "np"}
    return torch.tensor(pipe(PROMPT.format(word), generator=generator, **options).images)


def stock_load(pipe, path):
    """The calls that diffusers' documentation gives."""
    tensors = safetensors.torch.load_file(path)
    if len(tensors) == 1:
        pipe.load_textual_inversion(path)
        return
    for key, suffix in (("clip_l", ""), ("clip_g", "_2")):
        pipe.load_textual_inversion(
            tensors[key],
            token=NAME,
            text_encoder=getattr(pipe, f"text_encoder{suffix}"),
            tokenizer=getattr(pipe, f"tokenizer{suffix}"),
        )


@pytest.mark.parametrize(
    ("family", "int8", "count"),
    [("sd", False, 1), ("sd", True, 3), ("sdxl", False, 3), ("sdxl", True, 1)],
)
def test_the_same_picture_through_the_file(tmp_path, family, int8, count):
    parts = [vectors(count, seed) for seed in range(1 if family == "sd" else 2)]
    path = tmp_path / "learned_embeds.safetensors"
    save_token(path, parts, NAME)
    pictures = []
    for load in ("by hand", "stock", "add_token", "nothing"):
        pipe = FAMILIES[family].build()
        if int8:
            quantize(pipe)
        if load == "by hand":
            inject(pipe, parts)
        if load == "stock":
            stock_load(pipe, str(path))
        if load == "add_token":
            assert add_token(pipe, path)[0] == NAME
        pictures.append(picture(pipe, NAME))
    hand, stock, ours, without = pictures
    assert torch.equal(stock, hand) and torch.equal(ours, hand)
    assert not torch.equal(without, hand)


def test_bad_names(tmp_path):
    for name, message in (("two words", "one word"), ("clip_l", "none of clip_l")):
        with pytest.raises(ValueError, match=message):
            save_token(tmp_path / "t.safetensors", [vectors(2)], name)
    assert not any(tmp_path.iterdir())


def test_add_token_refuses_before_it_changes_anything(tmp_path):
    pipe, path = FAMILIES["sdxl"].build(), tmp_path / "t.safetensors"
    rows = vectors(2)
    both = {"clip_l": rows, "clip_g": rows.clone()}
    before = len(pipe.tokenizer)
    for tensors, name, message in [
        (both | {"clip_g": vectors(2)[:, :5]}, NAME, r"\[16, 5\] do not fit .*have \[16, 16\]"),
        (both | {"clip_g": vectors(3)}, NAME, "2 and 3 vectors"),
        ({"clip_l": rows}, NAME, "no token file: it holds clip_l"),
        ({"a": rows, "b": rows.clone()}, NAME, "no token file: it holds a, b"),
        ({NAME: rows}, NAME, r"\[16\] do not fit"),
        (both | {"clip_l": rows / 0}, NAME, "not finite"),
        (both, None, "pass token="),
        (both, "cat</w>", "already in the tokenizer's vocabulary"),
        (both, "<My-Cat>", "call it '<my-cat>'"),
    ]:
        safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, path)
        with pytest.raises(ValueError, match=message):
            add_token(pipe, path, name)
    assert len(pipe.tokenizer) == before
    with pytest.raises(ValueError, match="do not fit DiTPipeline"):
        add_token(FAMILIES["dit"].build(), path, NAME)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="whole safetensors"):
        add_token(pipe, path)


@pytest.mark.parametrize(("family", "count"), [("sd", 1), ("sd", 3), ("sdxl", 3)])
@pytest.mark.parametrize("offload", [False, True])
def test_a_token_comes_and_goes(tmp_path, family, count, offload):
    """Added, removed and added again, beside another one that stays: the pictures are the same."""
    path, other = tmp_path / "t.safetensors", tmp_path / "other.safetensors"
    sides = range(1 if family == "sd" else 2)
    save_token(path, [vectors(count, seed) for seed in sides], NAME)
    save_token(other, [vectors(2, 5 + seed) for seed in sides], "<dog>")
    pipe = FAMILIES[family].build()
    if offload:
        pipe.enable_model_cpu_offload(device="cpu")
    without = picture(pipe, "<dog>")  # pieces of an unknown word
    names = [NAME, *(f"{NAME}_{i}" for i in range(1, count))]
    assert add_token(pipe, path) == names
    assert add_token(pipe, other) == ["<dog>", "<dog>_1"]
    both = {word: picture(pipe, word) for word in (NAME, "<dog>")}
    assert not torch.equal(both["<dog>"], without)
    assert remove_token(pipe, NAME) == names
    assert torch.equal(picture(pipe, "<dog>"), both["<dog>"])
    assert not torch.equal(picture(pipe, NAME), both[NAME])
    with pytest.raises(ValueError, match="no token '<my-cat>' to remove; .*: <dog>, <dog>_1"):
        remove_token(pipe, NAME)
    with pytest.raises(ValueError, match="no token '<.endoftext.>' to remove"):
        remove_token(pipe, "<|endoftext|>")
    assert add_token(pipe, path) == names
    for word, drawn in both.items():
        assert torch.equal(picture(pipe, word), drawn), word
    remove_token(pipe, "<dog>")
    assert remove_token(pipe, NAME) == names
    assert torch.equal(picture(pipe, "<dog>"), without)
    hooked = [n for n, x in pipe.components.items() if hasattr(x, "_hf_hook")]
    assert bool(hooked) == offload


def test_an_offloaded_pipeline_still_runs_where_it_ran(tmp_path):
    """diffusers' own loading would offload to the CPU, where the text encoder lies in between."""
    pipe = FAMILIES["sd"].build()
    pipe.enable_model_cpu_offload(device="cuda")  # nothing is moved there yet
    before = pipe._execution_device
    save_token(tmp_path / "t.safetensors", [vectors(2)], NAME)
    add_token(pipe, tmp_path / "t.safetensors")
    assert pipe._execution_device == before != torch.device("cpu")
    remove_token(pipe, NAME)
    assert pipe._execution_device == before


@pytest.mark.parametrize("way", ["group", "sequential"])
def test_other_offloading_is_refused(tmp_path, way):
    pipe = FAMILIES["sd"].build()
    save_token(tmp_path / "t.safetensors", [vectors(1)], NAME)
    if way == "group":
        pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    else:
        pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match=r"before enable_group_offload\(\)"):
        add_token(pipe, tmp_path / "t.safetensors")
    assert NAME not in pipe.tokenizer.get_vocab()


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_lines_that_load_a_token_in_stock_diffusers(tmp_path, family):
    sides = range(1 if family == "sd" else 2)
    path = tmp_path / "it's a token.safetensors"
    save_token(path, [vectors(2, seed) for seed in sides], NAME)
    stock, ours = FAMILIES[family].build(), FAMILIES[family].build()
    lines = loading_lines(path, NAME, len(sides))
    assert len(lines) == len(sides)
    for line in lines:
        exec(line, {"pipe": stock, "safetensors": safetensors})
    add_token(ours, path)
    assert torch.equal(picture(stock, NAME), picture(ours, NAME))


def test_load_token_gives_what_was_saved(tmp_path):
    path = tmp_path / "t.safetensors"
    for parts in ([vectors(3)], [vectors(2), vectors(2, 1)]):
        save_token(path, parts, NAME)
        name, loaded = load_token(path)
        assert name == NAME and len(loaded) == len(parts)
        assert all(torch.equal(a, b) for a, b in zip(loaded, parts, strict=True))
    # Of another trainer: one vector without an axis, no name beside the key.
    safetensors.torch.save_file({"<x>": vectors(1)[0]}, path)
    assert load_token(path)[0] == "<x>" and load_token(path)[1][0].shape == (1, WIDTH)
    with pytest.raises(FileNotFoundError, match="no token file .*gone"):
        load_token(tmp_path / "gone")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_token(tmp_path)
