"""What tokens are learned of: fixed before any of these subjects was looked at.

The embedded model draws 174 everyday concepts in seven styles. Two sets of subjects:

* ``held_out``: concepts that were held out of its training, in every style. The small network
  cannot draw most of them: they tell how far a loss falls, not whether a picture gets better.
* ``in_reach``: redrawn and recoloured variants of what it draws, by the designers themselves:
  faces, hearts, cats and moons that are not among the 174. Every method begins at the family's
  word ("face"); the nearest name that the model was trained on ("grinning face") is drawn too.

Of each family the first three in the order of the SHA-256 of their names are evaluated (group 0 of
emojibase for all but moons; names that contain the family's word; at least six drawings, of cats
five). Four others were for development, where exact gradients made pictures more similar on all.

A first list was given up on its development subjects, before anything of it was evaluated, because
exact gradients made pictures *less* similar there, or hardly more so: what the network has never
mixed is not in its reach. It was made of known concepts with their hues turned (bus: similarity
-0.044 after 150 steps of four, crown: -0.106 after 30), in grey (airplane: -0.000 to +0.010), and
of styles instead of concepts ("<x> style bus": Fluent's flat drawings in grey -0.019, Noto's with
hues turned -0.010, EmojiOne's as outlines -0.008, Streamline's, by others, +0.027 to +0.032).

A token is learned from all drawings of a subject but the first two, which are held out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from examples.emoji import data as emoji
from pilotage.pipelines.personalization.inputs import extended, load_images, prompt_ids

WORD = "<x>"
HELD_OUT = 2
SIDE = 64
# Known word -> nearest name that the model was trained on.
FAMILIES = {
    "face": "grinning face",
    "heart": "red heart",
    "cat": "cat face",
    "moon": "crescent moon",
}


@dataclass(frozen=True)
class Subject:
    """Drawings of one concept, in one style each.

    Args:
        concept: Its name.
        word: Known word of one token, at which every method begins.
        archive: Of the drawings.
    """

    concept: str
    word: str
    archive: Path = emoji.DEFAULT_ARCHIVE

    @cached_property
    def _drawings(self) -> list[emoji.Drawing]:
        return [d for d in emoji.load(self.archive) if d.concept == self.concept]

    @cached_property
    def pictures(self) -> list[Image.Image]:
        """Its drawings, RGB, 64 x 64; the first two are held out."""
        return list(emoji.pictures(self.archive, self._drawings))

    @property
    def prompts(self) -> list[str]:
        """A prompt with {} for each picture."""
        return [f"{drawing.style} style {{}}" for drawing in self._drawings]

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


def _subjects(words: Mapping[str, str]) -> list[Subject]:
    return [Subject(concept, word) for concept, word in words.items()]


HELD_OUT_SUBJECTS = _subjects(
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
IN_REACH_SUBJECTS = _subjects(
    {
        "kissing face with smiling eyes": "face",
        "grimacing face": "face",
        "smirking face": "face",
        "growing heart": "heart",
        "broken heart": "heart",
        "heart with ribbon": "heart",
        "cat with wry smile": "cat",
        "kissing cat": "cat",
        "crying cat": "cat",
        "waxing crescent moon": "moon",
        "waning crescent moon": "moon",
        "last quarter moon face": "moon",
    }
)
# Rates, settings of `ours` and of backpropagation are chosen on these alone.
DEVELOPMENT_HELD_OUT = _subjects(
    {
        "tram": "bus",
        "pig face": "dog",
        "french fries": "bread",
        "hot beverage": "cup",
        "mountain": "snow",
    }
)
DEVELOPMENT_IN_REACH = _subjects(
    {
        "winking face": "face",
        "yellow heart": "heart",
        "pouting cat": "cat",
        "full moon face": "moon",
    }
)
