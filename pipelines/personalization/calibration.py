"""Calls of a pipeline's networks as personalization makes them, for int8 ranges."""

from __future__ import annotations

import torch

from ...guidance.zeroth_order import generator
from .inputs import TEMPLATES, Images, TokenData, extended, load_images, prompt_ids
from .personalizer import Personalizer
from .recipes import recipe

WORD = "<calibration>"
WORDS, PICTURES_AT_ONCE = 4, 4


@torch.no_grad()
def calibrate(personalizer: Personalizer, images: Images, rows: int = 64, seed: int = 0) -> None:
    """Evaluate losses of known words on pictures, at timesteps spread over all noise levels.

    Within `pilotage.pipelines.runtimes.recorded` the graphs' inputs are kept meanwhile: enough to
    fix the ranges of `quantize_onnx` by.

    Args:
        personalizer: Of the pipeline, which has one text encoder.
        images: A folder, or pictures and paths: such as will be learned from.
        rows: Pairs of picture and timestep.
        seed: Of all draws.

    Raises:
        ValueError: there are no pictures, or they cannot be read.
        FileNotFoundError: the folder of images does not exist.
    """
    networks = personalizer.networks
    (table,), (tokenizer,) = networks.tables, personalizer.tokenizers.values()
    pixels = load_images(images, personalizer.picture_size)
    ids = prompt_ids(extended(tokenizer, WORD, 1), TEMPLATES, WORD, 1)
    data = TokenData(networks, (pixels, (ids,), False), recipe("ours"), seed)
    every, draw = data.held_out(rows), generator(seed, "calibration")
    for start in range(0, rows, PICTURES_AT_ONCE):
        places = torch.randint(networks.vocabularies[0], (WORDS,), generator=draw)
        words = table.weight[places.to(table.weight.device)].float()
        networks(words[:, None], every.rows(slice(start, start + PICTURES_AT_ONCE)))
