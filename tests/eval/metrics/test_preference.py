"""Scores of single pictures by CLIP models with random weights, computed a second time here."""

import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPModel, CLIPTokenizer

from pilotage.eval.metrics.extractors import load_extractor
from pilotage.eval.metrics.preference import GOOD_AND_BAD, HEAD, load_preference


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def embeddings(folder, images, texts):
    """Unit embeddings of pictures and texts, and the scale that the model was trained with."""
    model = CLIPModel.from_pretrained(folder).eval()
    tokens = CLIPTokenizer.from_pretrained(folder)(
        texts, padding=True, truncation=True, max_length=8, return_tensors="pt"
    )
    with torch.no_grad():
        text = model.text_projection(model.text_model(**tokens).pooler_output)
    pictures = load_extractor(f"clip:{folder}")(images)
    unit = torch.nn.functional.normalize
    return unit(pictures, dim=1), unit(text, dim=1), model.logit_scale.detach().exp()


PROMPTS = ["a fox", "key", "car"]


def test_pickscore(clip):
    images = rand(3, 3, 16, 16)
    pictures, texts, scale = embeddings(clip, images, PROMPTS)
    scorer = load_preference(f"pickscore:{clip}")
    expected = scale * (pictures * texts).sum(1)
    torch.testing.assert_close(scorer.score(images, PROMPTS), expected, rtol=1e-4, atol=1e-4)
    assert scorer.name == f"pickscore:{clip}"
    with pytest.raises(ValueError, match="3 pictures, but 2 prompts"):
        scorer.score(images, PROMPTS[:2])


def test_hpsv2_pads_what_is_no_square(clip):
    scorer = load_preference(f"hpsv2:{clip}")
    images = rand(3, 3, 16, 16)
    pictures, texts, _ = embeddings(clip, images, PROMPTS)
    expected = (pictures * texts).sum(1)
    torch.testing.assert_close(scorer.score(images, PROMPTS), expected, rtol=1e-4, atol=1e-5)
    wide = torch.zeros(3, 3, 16, 16)
    wide[:, :, 5:11] = images[:, :, 5:11]
    torch.testing.assert_close(
        scorer.score(images[:, :, 5:11], PROMPTS), scorer.score(wide, PROMPTS)
    )


def test_clip_iqa(clip):
    images = rand(3, 3, 16, 16)
    pictures, texts, scale = embeddings(clip, images, list(GOOD_AND_BAD))
    good, bad = (scale * pictures @ texts.T).unbind(1)
    with pytest.warns(UserWarning, match="is scored by its beginning"):  # 8 tokens are few
        found = load_preference(f"clip-iqa:{clip}").score(images)
    torch.testing.assert_close(found, (good - bad).sigmoid(), rtol=1e-4, atol=1e-5)


def layers(width=12, seed=0):
    """Random layers with the names and shapes of the published ones."""
    sizes = {0: (1024, width), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    found = {}
    for number, shape in sizes.items():
        found[f"layers.{number}.weight"] = rand(*shape, seed=seed + number) - 0.5
        found[f"layers.{number}.bias"] = rand(shape[0], seed=seed + number + 50) - 0.5
    return found


def test_aesthetic(clip, tmp_path):
    folder = tmp_path / "aesthetic"
    shutil.copytree(clip, folder)
    name = f"aesthetic:{folder}"
    with pytest.raises(FileNotFoundError, match="sac\\+logos\\+ava1-l14-linearMSE.pth"):
        load_preference(name)
    weights = layers()
    save_file(weights, folder / HEAD)
    images = rand(3, 3, 16, 16)
    x = embeddings(clip, images, PROMPTS)[0]
    for number in (0, 2, 4, 6, 7):
        x = x @ weights[f"layers.{number}.weight"].T + weights[f"layers.{number}.bias"]
    torch.testing.assert_close(load_preference(name).score(images), x[:, 0], rtol=1e-3, atol=1e-3)
    save_file(layers(width=768), folder / HEAD)
    with pytest.raises(ValueError, match="does not fit .*, whose embeddings have 12 parts"):
        load_preference(name)
    torch.save(weights, folder / HEAD)
    with pytest.raises(ValueError, match="does not hold the layers"):
        load_preference(name)


def test_pickled_weights_are_refused(clip, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(clip, folder)
    (folder / "model.safetensors").unlink()
    torch.save(CLIPModel.from_pretrained(clip).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="does not hold a CLIPModel .*safetensors"):
        load_preference(f"pickscore:{folder}")


@pytest.mark.parametrize("name", ["pickscore", "hpsv2:", "imagereward:x", ""])
def test_unknown_scores(name):
    with pytest.raises(ValueError, match="there are: pickscore:MODEL, hpsv2:MODEL, aesthetic:MOD"):
        load_preference(name)
