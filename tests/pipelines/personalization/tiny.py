"""Tiny pipelines, pictures and short runs for the tests of the personalizer."""

import torch
from PIL import Image

from pilotage.pipelines.personalization import Personalizer

from ...families import FAMILIES

WORD = "<my-cat>"
PROMPTS = ("a {} on a green hill", "three {} at dawn")
SMALL = {"num_inference_steps": 2, "height": 16, "width": 16}
# A short run of the default search, on the tiny pipelines.
SHORT = {
    "templates": PROMPTS,
    "steps": 6,
    "pool": 8,
    "words": 0,
    "held_out_rows": 4,
    "evaluate_every": 3,
    "preview_every": 0,
    "progress": False,
}


def build(family="sd"):
    return FAMILIES[family].build()


def pictures(count=3, side=16):
    draw = torch.Generator().manual_seed(0)
    arrays = torch.randint(256, (count, side, side, 3), generator=draw, dtype=torch.uint8)
    return [Image.fromarray(a.numpy()) for a in arrays]


def word(pipe):
    """A word that is one token in every tokenizer of the tiny pipelines."""
    tokenizer = pipe.tokenizer
    words = sorted(w.removesuffix("</w>") for w in tokenizer.get_vocab() if w.endswith("</w>"))
    return next(w for w in words if w.isalpha() and tokenizer.tokenize(w) == [w + "</w>"])


def fit(pipe, loss=None, **changes):
    """A short run on three pictures from a known word."""
    options = SHORT | {"images": pictures(), "initializer": word(pipe)} | changes
    return Personalizer(pipe, loss=loss).fit(placeholder=WORD, **options)
