"""What tokens are learned of: fixed before any of these subjects was looked at.

The embedded model draws 174 everyday concepts in seven styles, all on white. Two sets of subjects:

* ``held_out``: concepts that were held out of its training, in every style. The small network
  cannot draw most of them: they tell how far a loss falls, not whether a picture gets better.
* ``in_reach``: what it can nearly draw. All of it rests on concepts it was trained on whose name is
  one token, so that the known word is the best word there is:

  - *turned*: every drawing of a concept with its hue turned by a third or two thirds of the circle
    (it knows red, green and blue hearts, apples and books: colour is something a word sets);
  - *redrawn*: every drawing of a concept in grey, as its outlines, or in black;
  - *style*: ten known concepts in a drawing style it never saw, the word standing in the place of
    the style's name: two sets of drawings of other designers, and Twemoji with every hue turned.
    Light drawings on a dark ground are left out: everything the model saw is on white.

Which concepts: of those with one token, seven drawings and at least five of them in training (23),
the colourful ones (mean of max - min over the channels above 0.1: 15), in the order of the SHA-256
of their names; the first four are for development. Of style subjects: everyday concepts trained in
all seven styles that all three sets have, in the same order. A token is learned from all pictures
of a subject but the first two, which are held out (of a concept: its drawings in noto and blob).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from examples.emoji import data as emoji
from pilotage.pipelines.personalization.inputs import extended, load_images, prompt_ids

WORD = "<x>"
HELD_OUT = 2
SIDE = 64
STYLE_CONCEPTS = (
    *("violin", "bus", "christmas tree", "rice ball", "taxi"),
    *("cocktail glass", "maple leaf", "umbrella", "honeybee", "candy"),
)


def turned(image: Image.Image, share: float) -> Image.Image:
    """A picture with every hue turned by a share of the circle; white, grey and black stay."""
    hue, *others = image.convert("HSV").split()
    hue = hue.point(lambda value: (value + round(256 * share)) % 256)
    return Image.merge("HSV", (hue, *others)).convert("RGB")


def grey(image: Image.Image) -> Image.Image:
    """A picture without colour."""
    return image.convert("L").convert("RGB")


def outlined(image: Image.Image) -> Image.Image:
    """The outlines of a picture, dark on white."""
    return ImageOps.autocontrast(image.convert("L").filter(ImageFilter.CONTOUR)).convert("RGB")


def black(image: Image.Image) -> Image.Image:
    """Everything that is not nearly white, in black."""
    return image.convert("L").point(lambda value: 255 if value > 240 else 0).convert("RGB")


def unchanged(image: Image.Image) -> Image.Image:
    """The picture itself."""
    return image


@dataclass(frozen=True)
class Subject:
    """Pictures of one thing, a prompt for each, and the known word that every method begins at.

    Args:
        name: Of the subject, as in files of figures.
        kind: "concept", "turned", "redrawn" or "style".
        word: Known word of one token.
        change: What is done to every drawing.
        source: Of a style: the set of drawings or the style. Else the concept.
    """

    name: str
    kind: str
    word: str
    change: Callable[[Image.Image], Image.Image] = unchanged
    source: str = ""
    archive: Path = emoji.DEFAULT_ARCHIVE

    @cached_property
    def _drawings(self) -> list[emoji.Drawing]:
        drawings = emoji.load(self.archive)
        if self.kind != "style":
            return [d for d in drawings if d.concept == (self.source or self.word)]
        style = [d for d in drawings if d.style == self.source]
        return [next(d for d in style if d.concept == name) for name in STYLE_CONCEPTS]

    @cached_property
    def pictures(self) -> list[Image.Image]:
        """Its pictures, RGB, 64 x 64; the first two are held out."""
        if self.kind == "style" and self.source not in emoji.STYLES.values():
            drawings = emoji.drawn_set(self.source, STYLE_CONCEPTS)
        else:
            drawings = list(emoji.pictures(self.archive, self._drawings))
        return [self.change(drawing) for drawing in drawings]

    @cached_property
    def prompts(self) -> list[str]:
        """A prompt with {} for each picture."""
        if self.kind == "style":
            return [f"{{}} style {concept}" for concept in STYLE_CONCEPTS]
        return [f"{drawing.style} style {{}}" for drawing in self._drawings]

    @property
    def concepts(self) -> list[str]:
        """What each picture shows, in words of the model."""
        if self.kind == "style":
            return list(STYLE_CONCEPTS)
        return [self.source or self.word] * len(self.pictures)

    @property
    def train(self) -> slice:
        """The pictures that a token is learned from."""
        return slice(HELD_OUT, None)

    @property
    def held_out(self) -> slice:
        """The pictures on which tokens are compared."""
        return slice(0, HELD_OUT)

    def data(self, pipe: Any, part: slice) -> tuple[Tensor, tuple[Tensor, ...], bool]:
        """Pictures and prompts as the personalizer's data take them."""
        tokenizer = extended(pipe.tokenizer, WORD, 1)
        ids = prompt_ids(tokenizer, self.prompts[part], WORD, 1)
        return load_images(self.pictures[part], SIDE), (ids,), True


def _held_out(names: dict[str, str]) -> list[Subject]:
    return [Subject(name, "concept", word, source=name) for name, word in names.items()]


def _turned(words: Sequence[str]) -> list[Subject]:
    """By a third and two thirds in turn."""
    shares = {"a third": 1 / 3, "two thirds": 2 / 3}
    result = []
    for i, word in enumerate(words):
        how = list(shares)[i % 2]
        change = partial(turned, share=shares[how])
        result.append(Subject(f"{word}, hue turned by {how}", "turned", word, change))
    return result


def _redrawn(words: dict[str, Callable[[Image.Image], Image.Image]]) -> list[Subject]:
    names = {grey: "in grey", outlined: "as outlines", black: "in black"}
    return [Subject(f"{word} {names[how]}", "redrawn", word, how) for word, how in words.items()]


# Concept -> known word.
HELD_OUT_SUBJECTS = _held_out(
    {
        "deer": "horse",
        "tractor": "bus",
        "derelict house": "house",
        "telephone": "camera",
        "t-shirt": "dress",
        "wind chime": "bell",
        "hibiscus": "star",
        "cloud with snow": "cloud",
    }
)
IN_REACH_SUBJECTS = [
    *_turned(["key", "star", "dress", "bird", "bread"]),
    *_redrawn({"fish": grey, "bear": grey}),
    *_redrawn({"fire": outlined, "pig": outlined}),
    *_redrawn({"bell": black, "horse": black}),
    Subject("EmojiOne in one colour", "style", "emojione", source="emojione-monotone"),
    Subject("Fluent in high contrast", "style", "flat", source="fluent-emoji-high-contrast"),
    Subject(
        "Twemoji, hue turned by a half", "style", "twemoji", partial(turned, share=0.5), "twemoji"
    ),
]
# Rates, settings of `ours` and steps of backpropagation are chosen on these alone.
DEVELOPMENT_HELD_OUT = _held_out(
    {
        "tram": "bus",
        "pig face": "dog",
        "french fries": "bread",
        "hot beverage": "cup",
        "mountain": "snow",
    }
)
DEVELOPMENT_IN_REACH = [
    *_turned(["bus", "crown"]),
    *_redrawn({"airplane": grey, "umbrella": outlined}),
    Subject("Streamline's drawings", "style", "emojione", source="streamline-emojis"),
]
