"""Extractors and alignment: tiny CLIP and DINOv2 models from folders, the sentence encoder."""

import sys
import types
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer, Dinov2Model

from pilotage.eval.metrics.alignment import CLIPAlignment, RidgeAlignment
from pilotage.eval.metrics.extractors import load_extractor
from pilotage.eval.metrics.ridge import SentenceEncoder

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def seen(images, mean, std):
    """Pictures of the model's size: rounded to 8 bits and normalised."""
    mean, std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
    return ((images * 255).round() / 255 - mean) / std


def clip_embeddings(folder, images):
    model = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        pooled = model.vision_model(seen(images, CLIP_MEAN, CLIP_STD)).pooler_output
        return model.visual_projection(pooled)


def test_clip_features(clip):
    extractor = load_extractor(f"clip:{clip}")
    images = rand(3, 3, 16, 16)
    features = extractor(images)
    assert features.shape == (3, 12)
    torch.testing.assert_close(features, clip_embeddings(clip, images), rtol=1e-4, atol=1e-5)
    assert extractor.name == f"clip:{clip}"
    assert "resize" in extractor.preprocessing and "crop" in extractor.preprocessing
    assert extractor(rand(2, 3, 40, 24)).shape == (2, 12)
    assert not any(parameter.requires_grad for parameter in extractor.parameters())


def test_dino_features(dino):
    """Of pictures of 224 pixels: DINOv2's class token, with Meta's position embeddings."""
    extractor = load_extractor(f"dinov2:{dino}")
    images = rand(2, 3, 224, 224)
    model = Dinov2Model.from_pretrained(dino).eval()
    grid = model.embeddings.position_embeddings[:, 1:].view(1, 2, 2, 10).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(
        grid, scale_factor=(28 + 0.1) / 2, mode="bicubic", antialias=False
    )
    positions = grid.permute(0, 2, 3, 1).reshape(1, 28 * 28, 10)
    with torch.no_grad():
        patches = model.embeddings.patch_embeddings(seen(images, IMAGENET_MEAN, IMAGENET_STD))
        tokens = torch.cat([model.embeddings.cls_token.expand(2, 1, 10), patches], 1)
        tokens += torch.cat([model.embeddings.position_embeddings[:, :1], positions], 1)
        states = model.layernorm(model.encoder(tokens).last_hidden_state)
    torch.testing.assert_close(extractor(images), states[:, 0], rtol=1e-4, atol=1e-5)


def test_dino_squashes_pictures_as_pil_does(dino):
    """As dgm-eval: the whole picture, whatever its shape, from 8 bits to 8 bits."""
    extractor = load_extractor(f"dinov2:{dino}")
    images = rand(1, 3, 90, 300)
    pixels = (images[0] * 255).round().byte().permute(1, 2, 0).numpy()
    small = Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC)
    squashed = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None] / 255
    assert torch.equal(extractor(images), extractor(squashed))
    assert extractor.preprocessing == "PIL bicubic to 224x224, ImageNet mean and deviation"


def test_clip_score(clip):
    scorer = CLIPAlignment(clip)
    images, prompts = rand(4, 3, 16, 16), ["a fox", "key", "a very long prompt indeed", "key"]
    with pytest.warns(UserWarning, match="reads 8 tokens, this prompt has 23 .*'a very long"):
        scorer.texts(prompts)
    model = CLIPModel.from_pretrained(clip).eval()
    tokens = CLIPTokenizer.from_pretrained(clip)(
        prompts, padding=True, truncation=True, max_length=8, return_tensors="pt"
    )
    with torch.no_grad():
        text = model.text_projection(model.text_model(**tokens).pooler_output)
    expected = 100 * torch.cosine_similarity(clip_embeddings(clip, images), text).clamp(min=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # each prompt is named once
        torch.testing.assert_close(scorer.score(images, prompts), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="4 pictures, but 3 prompts"):
        scorer.score(images, prompts[:3])


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_model_that_is_not_there(monkeypatch, kind):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="no folder here.*name its folder"):
        load_extractor(f"{kind}:nobody/nothing")


def test_folder_with_another_model(tmp_path, clip):
    with pytest.raises(ValueError, match="does not hold a CLIPModel"):
        load_extractor(f"clip:{tmp_path}")
    with pytest.raises(ValueError, match="does not hold a Dinov2Model: .* weights are missing"):
        load_extractor(f"dinov2:{clip}")


def test_inception_without_its_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps torch-fidelity"):
        load_extractor("inception")


FIDELITY = """
import torch
URL_INCEPTION_V3 = "http://localhost:1/weights.pth"
class FeatureExtractorInceptionV3(torch.nn.Module):
    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__()
        self.line = torch.nn.Linear(3, 2048)
        self.load_state_dict(torch.load(feature_extractor_weights_path))
    def forward(self, x):
        assert x.dtype == torch.uint8
        return (self.line(x.float().mean((2, 3))),)
"""


@pytest.fixture
def fidelity(tmp_path, monkeypatch):
    """A package of torch-fidelity's shape, whose own start-up fails without torchvision."""
    package = tmp_path / "site" / "torch_fidelity"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import torchvision_that_is_not_here")
    (package / "feature_extractor_inceptionv3.py").write_text(FIDELITY)
    monkeypatch.syspath_prepend(str(package.parent))
    yield tmp_path
    assert not [name for name in sys.modules if name.startswith("torch_fidelity")]


def test_inception_weights(fidelity):
    line = torch.nn.Linear(3, 2048)
    path = fidelity / "weights.pth"
    torch.save({f"line.{k}": v for k, v in line.state_dict().items()}, path)
    images = rand(2, 3, 8, 8)
    pixels = (images * 255).round().mean((2, 3))
    extractor = load_extractor(f"inception:{path}")
    torch.testing.assert_close(extractor(images), line(pixels).detach())
    torch.save({"other": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="does not hold the Inception weights"):
        load_extractor(f"inception:{path}")
    torch.save({"line.weight": types.SimpleNamespace()}, path)  # more than tensors
    with pytest.raises(ValueError, match="does not hold the Inception weights"):
        load_extractor(f"inception:{path}")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="weights.pth is damaged or does not hold"):
        load_extractor(f"inception:{path}")
    with pytest.raises(FileNotFoundError, match="no Inception weights at"):
        load_extractor("inception:missing.pth")


def test_inception_offline(fidelity, monkeypatch):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(fidelity / "hub"))
    with pytest.raises(FileNotFoundError, match=r"cannot be downloaded.*as inception:FILE"):
        load_extractor("inception")


@pytest.fixture(scope="module")
def encoder():
    return SentenceEncoder()


def test_sentence_vectors_mean_something(encoder):
    texts = ["a red fox", "a small wild animal with a bushy tail", "a screwdriver", "hand tool"]
    vectors = encoder(texts)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4))
    similarity = vectors @ vectors.T - 2 * torch.eye(4)
    assert similarity.argmax(1).tolist() == [1, 0, 3, 2]
    # Padding beside longer texts does not matter.
    torch.testing.assert_close(encoder(texts[:1]), vectors[:1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder(texts, batch_size=1), vectors, rtol=1e-4, atol=1e-5)


class Named(types.SimpleNamespace):
    name, preprocessing = "made up", "none"


WORDS = ["fox", "key", "apple", "car", "moon", "tree", "shoe", "violin", "bread", "ship"]


def test_ridge_finds_captions_of_linear_features(encoder, tmp_path):
    """Features that are a noisy linear function of the captions' vectors."""
    texts = [f"a {a} and a {b}" for a in WORDS for b in WORDS]
    generator = torch.Generator().manual_seed(0)
    features = encoder(texts) @ torch.randn(384, 200, generator=generator)
    features = 5 + 3 * (features + 0.1 * torch.randn(100, 200, generator=generator))
    fitted = RidgeAlignment.fit(
        features[:80], texts[:80], ridge=0.01, extractor=Named(), encoder=encoder
    )
    table = fitted.similarity(features[80:], texts[80:])
    found = (table.argmax(1) == torch.arange(20)).double().mean()  # by chance: 0.05
    assert found > 0.5
    scores = fitted.score(features[80:], texts[80:])
    torch.testing.assert_close(scores, table.diagonal())
    assert scores.mean() > fitted.score(features[80:], texts[80:][::-1]).mean() + 0.2
    path = tmp_path / "new" / "map.safetensors"
    fitted.save(path)
    read = RidgeAlignment.load(path, encoder=encoder)
    assert read.tags == fitted.tags and read.tags["n"] == 80
    assert torch.equal(read.score(features[80:], texts[80:]), scores)
    assert [p.name for p in path.parent.iterdir()] == ["map.safetensors"]
    with pytest.raises(ValueError, match="the map's extractor is 'made up'"):
        read.score(rand(2, 3, 8, 8), texts[:2])
    with pytest.raises(ValueError, match="199 dimensions, the map is for 200"):
        read.score(features[:2, :199], texts[:2])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or not a ridge map"):
        RidgeAlignment.load(path)


def test_ridge_is_the_closed_form(encoder):
    """Against least squares of the augmented system."""
    texts, x = WORDS[:6], rand(6, 4)
    fitted = RidgeAlignment.fit(x, texts, ridge=0.5, extractor=Named(), encoder=encoder)
    y = encoder(texts).double()
    z = ((x - x.mean(0)) / x.std(0)).double()
    rows = torch.cat([z, (0.5 * 6) ** 0.5 * torch.eye(4).double()])
    targets = torch.cat([y - y.mean(0), torch.zeros(4, 384).double()])
    expected = torch.linalg.lstsq(rows, targets).solution
    torch.testing.assert_close(fitted.matrix.double(), expected, rtol=1e-4, atol=1e-6)


def test_bad_fits(encoder):
    options = {"extractor": Named(), "encoder": encoder}
    with pytest.raises(ValueError, match="3 pictures, but 2 captions"):
        RidgeAlignment.fit(rand(3, 4), ["a", "b"], **options)
    with pytest.raises(ValueError, match="ridge must be positive"):
        RidgeAlignment.fit(rand(2, 4), ["a", "b"], ridge=0, **options)
    with pytest.raises(ValueError, match="NaN"):
        RidgeAlignment.fit(rand(2, 4).log().sqrt(), ["a", "b"], **options)
