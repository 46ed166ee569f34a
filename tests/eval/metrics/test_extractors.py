"""The offline image features: real weights, features that mean something."""

import types

import pytest
import torch
from PIL import Image, ImageDraw

from pilotage.eval.metrics.extractors import load_extractor
from pilotage.eval.metrics.hub import describe
from pilotage.eval.metrics.images import to_tensor


def drawing(shape, size, colour):
    image = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(image)
    box = (32 - size, 32 - size, 32 + size, 32 + size)
    (draw.ellipse if shape == "disc" else draw.rectangle)(box, fill=colour)
    if shape == "grid":
        for x in range(32 - size, 32 + size, 4):
            draw.line((x, 32 - size, x, 32 + size), fill="white")
            draw.line((32 - size, x, 32 + size, x), fill="white")
    return image


@pytest.mark.parametrize("name", ["efficientnet-lite0-native", "efficientnet-lite0"])
def test_same_shape_is_nearest_across_sizes_and_batches(name):
    extractor = load_extractor(name)
    assert extractor.name == name
    shapes = ("disc", "square", "grid")
    small = to_tensor([drawing(shape, 18, "red") for shape in shapes])
    large = to_tensor([drawing(shape, 24, "red") for shape in shapes])
    a, b = extractor(small), extractor(large, batch_size=2)
    assert a.shape == (3, 1280)
    a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
    assert (a @ b.T).argmax(1).tolist() == [0, 1, 2]
    one = extractor(large[2:])
    torch.testing.assert_close(one / one.norm(), b[2:], rtol=1e-4, atol=1e-5)


def test_what_a_processor_does_in_words():
    """Every step that it makes, and none that it has settings for and does not make."""
    settings = {"size": {"height": 9}, "resample": 3, "crop_size": {"height": 8}}
    settings |= {"image_mean": (0.5,), "image_std": (0.25,)}
    steps = {"do_resize": True, "do_center_crop": True, "do_normalize": True}
    words = "SimpleNamespace, resize {'height': 9}, center_crop {'height': 8}, normalize [0.5], "
    words += "normalize [0.25], resample 3"
    assert describe(types.SimpleNamespace(**settings, **steps)) == words
    for off in ({}, dict.fromkeys(steps, False)):
        assert describe(types.SimpleNamespace(**settings, **off)) == "SimpleNamespace"
