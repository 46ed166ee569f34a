"""DreamSim against its definition, with random weights under the published names."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pilotage.eval.metrics.distances import load_distances
from pilotage.eval.metrics.dreamsim import DreamSim

WIDTH, INNER, DEPTH, OUT, PATCH = 128, 80, 2, 48, 32
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def weights():
    """Random weights with the names of the published networks, of smaller shapes."""
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + (224 // PATCH) ** 2, WIDTH),
        "patch_embed.proj": (WIDTH, 3, PATCH, PATCH),
        "norm": (WIDTH,),
        "pos_drop": (WIDTH,),
        "proj": (WIDTH, OUT),
    }
    for i in range(DEPTH):
        layers = {"norm1": (WIDTH,), "norm2": (WIDTH,), "attn.qkv": (3 * WIDTH, WIDTH)}
        layers |= {"attn.proj": (WIDTH, WIDTH)}
        layers |= {"mlp.fc1": (INNER, WIDTH), "mlp.fc2": (WIDTH, INNER)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in layers.items()}
    found, plain = {}, ("cls_token", "pos_embed", "proj")
    generator = torch.Generator().manual_seed(0)
    for network in ("dino", "clip", "open_clip"):
        for name, shape in shapes.items():
            if network == "dino" and name in ("pos_drop", "proj"):
                continue
            value = torch.randn(shape, generator=generator) * 2 / math.prod(shape[1:]) ** 0.5
            if name in plain:
                found[f"{network}.{name}"] = value
            else:
                found[f"{network}.{name}.weight"] = value
                bias = torch.randn(shape[0], generator=generator)
                found[f"{network}.{name}.bias"] = bias
    return found


@pytest.fixture(scope="module")
def file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("dreamsim") / "dreamsim.safetensors"
    save_file(weights, path)
    return path


def normalised(w, name, x, eps):
    x = x - x.mean(1, keepdim=True)
    return (
        x / (x.square().mean(1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]
        + w[f"{name}.bias"]
    )


def embedded(weights, network, picture):
    """A network's part of the embedding of a picture (3, H, W), in float64, head by head."""
    w = {
        k.removeprefix(f"{network}."): v.double()
        for k, v in weights.items()
        if k.startswith(f"{network}.")
    }
    eps = 1e-6 if network == "dino" else 1e-5

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def gelu(x):
        quick = network == "clip"
        return x * (1 / (1 + (-1.702 * x).exp()) if quick else (1 + (x / 2**0.5).erf()) / 2)

    pixels = np.round(picture.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    small = Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC)
    mean, deviation = IMAGENET if network == "dino" else OPENAI
    z = torch.from_numpy((np.asarray(small) / 255 - mean) / deviation)
    tokens = [w["cls_token"].flatten()]
    kernel = w["patch_embed.proj.weight"]
    for row in range(0, 224, PATCH):
        for column in range(0, 224, PATCH):
            patch = z[row : row + PATCH, column : column + PATCH].permute(2, 0, 1)
            tokens.append((kernel * patch).sum((1, 2, 3)) + w["patch_embed.proj.bias"])
    x = torch.stack(tokens) + w["pos_embed"][0]
    if network != "dino":
        x = normalised(w, "pos_drop", x, eps)
    for i in range(DEPTH):
        parts = linear(f"blocks.{i}.attn.qkv", normalised(w, f"blocks.{i}.norm1", x, eps))
        heads = []
        for start in range(0, WIDTH, 64):
            q, k, v = (parts[:, n * WIDTH + start : n * WIDTH + start + 64] for n in range(3))
            heads.append((q @ k.T / 8).softmax(1) @ v)
        x = x + linear(f"blocks.{i}.attn.proj", torch.cat(heads, 1))
        y = gelu(linear(f"blocks.{i}.mlp.fc1", normalised(w, f"blocks.{i}.norm2", x, eps)))
        x = x + linear(f"blocks.{i}.mlp.fc2", y)
    return x[0] if network == "dino" else normalised(w, "norm", x[:1], eps)[0] @ w["proj"]


def test_dreamsim_is_its_definition(file, weights):
    metric = DreamSim(file)
    x, y = rand(2, 3, 40, 57), rand(2, 3, 40, 57, seed=1)
    networks = ("dino", "clip", "open_clip")
    expected = []
    for pair in zip(x, y, strict=True):
        both = [torch.cat([embedded(weights, n, picture) for n in networks]) for picture in pair]
        expected.append(1 - float(torch.corrcoef(torch.stack(both))[0, 1]))  # cosine, centred
    assert metric(x, y).tolist() == pytest.approx(expected, rel=1e-3)
    assert min(expected) > 0.01
    torch.testing.assert_close(metric(x, x), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(metric(x, y), metric(y, x))


def test_dreamsim_says_what_it_needs(file, weights, tmp_path):
    with pytest.raises(FileNotFoundError, match="no DreamSim weights at .*merge_and_unload"):
        DreamSim(tmp_path / "none.safetensors")
    other = tmp_path / "other.safetensors"
    torch.save(weights, other)
    with pytest.raises(ValueError, match="does not hold the weights of DreamSim as safetensors"):
        DreamSim(other)
    save_file({k: v for k, v in weights.items() if k != "clip.proj"}, other)
    with pytest.raises(ValueError, match="does not hold .*clip.proj"):
        DreamSim(other)
    save_file(weights | {"dino.pos_embed": torch.zeros(1, 10, WIDTH)}, other)
    with pytest.raises(ValueError, match=r"does not hold .*\n.*size mismatch for pos_embed"):
        DreamSim(other)
    with pytest.raises(ValueError, match="shapes"):
        DreamSim(file)(rand(1, 3, 8, 8), rand(1, 3, 8, 9))


def test_distances_by_file(file):
    found = load_distances("cpu", lpips=None, dreamsim=file)
    assert list(found) == ["dreamsim"] and isinstance(found["dreamsim"], DreamSim)
