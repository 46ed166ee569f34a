"""Personalization by forward passes: a new word for a pipeline's prompts, learned from pictures.

    token = Personalizer(pipe).fit("pictures/", placeholder="<my-cat>", initializer="cat")

The networks are called, never differentiated, so they may be quantized, compiled or run elsewhere.
What is learned are the word's input embeddings.
"""

from .calibration import calibrate
from .files import add_token, load_token, remove_token, save_token
from .loss import DiffusionTokenLoss, TokenBatch, TokenLoss
from .output import LearnedToken
from .personalizer import Personalizer
from .recipes import PRESETS, Recipe, recipe

__all__ = [
    "PRESETS",
    "DiffusionTokenLoss",
    "LearnedToken",
    "Personalizer",
    "Recipe",
    "TokenBatch",
    "TokenLoss",
    "add_token",
    "calibrate",
    "load_token",
    "recipe",
    "remove_token",
    "save_token",
]
