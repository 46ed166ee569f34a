"""Token files: what diffusers, A1111 and ComfyUI make of them."""

import pytest
import safetensors.torch
import torch

from pilotage.pipelines.personalization.files import add_token, load_token, save_token
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
    sd = safetensors.torch.load_file(save_token(tmp_path / "a" / "sd.safetensors", rows, NAME))
    assert list(sd) == [NAME] and a1111(sd) == (count, WIDTH)
    assert torch.equal(comfyui(sd, "clip_l"), rows) and torch.equal(comfyui(sd, "clip_h"), rows)
    path = save_token(tmp_path / "xl.safetensors", (rows, more), NAME)
    xl = safetensors.torch.load_file(path)
    assert set(xl) == {"clip_l", "clip_g"} and a1111(xl) == (count, 3 * WIDTH)
    assert torch.equal(comfyui(xl, "clip_l"), rows) and torch.equal(comfyui(xl, "clip_g"), more)
    token = load_token(path)
    assert token.name == NAME and all(map(torch.equal, token.vectors, (rows, more)))
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
    path = save_token(tmp_path / "learned_embeds.safetensors", parts, NAME)
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


def test_bad_input(tmp_path):
    rows, path = vectors(2), tmp_path / "t.safetensors"
    bad = [
        ((rows, "two words"), "one word"),
        ((rows, "clip_l"), "none of clip_l"),
        (((rows, rows, rows), NAME), "two for SDXL, got 3"),
        (((), NAME), "alike"),
        (((rows, rows[:1]), NAME), "alike"),
        ((rows[None], NAME), r"\(k, d\)"),
        ((rows * float("nan"), NAME), "finite"),
    ]
    for arguments, message in bad:
        with pytest.raises(ValueError, match=message):
            save_token(path, *arguments)
    assert not path.exists()
    safetensors.torch.save_file({"a": rows, "b": rows.clone()}, path)
    with pytest.raises(ValueError, match="expected one key"):
        load_token(path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="whole safetensors"):
        load_token(path)


def test_add_token_refuses_before_it_changes_anything():
    pipe = FAMILIES["sdxl"].build()
    rows = vectors(2)
    before = len(pipe.tokenizer)
    for arguments, message in [
        (((rows, rows[:, :5]), NAME), r"width \[16, 5\].*have \[16, 16\]"),
        ((rows, NAME), r"width \[16\]"),
        (((rows, rows),), "pass token="),
        (((rows, rows), "cat</w>"), "already in the vocabulary"),
        (((rows, rows), "<My-Cat>"), "call it '<my-cat>'"),
    ]:
        with pytest.raises(ValueError, match=message):
            add_token(pipe, *arguments)
    assert len(pipe.tokenizer) == before
    with pytest.raises(ValueError, match="takes no textual inversions"):
        add_token(FAMILIES["dit"].build(), rows, NAME)
