"""Token files: what diffusers, A1111 and ComfyUI make of them."""

import pytest
import safetensors.torch
import torch

from pilotage.pipelines.personalization.files import add_token, save_token
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
        (both | {"clip_g": vectors(2)[:, :5]}, NAME, r"'clip_g': 5.* do not fit .*have \[16, 16\]"),
        ({"clip_l": rows}, NAME, r"'clip_l': 16} do not fit"),
        ({"a": rows, "b": rows.clone()}, NAME, r"do not fit"),
        (both, None, "pass token="),
        (both, "cat</w>", "already in tokenizer vocabulary"),
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
