r"""What people would prefer, as networks learned it from their choices: scores of single pictures.

All are CLIP models, named KIND:MODEL with a folder or hub name in the form of transformers'
``CLIPModel``, with safetensors (never pickles), tokenizer and image processor:

``pickscore``
    :math:`\exp(s) \cos(\text{picture}, \text{prompt})` with the model's ``logit_scale`` s:
    PickScore (Kirstain et al. 2023, arXiv:2305.01569). Weights: ``yuvalkirstain/PickScore_v1``.
    About 20 to 23; one more is preferred e (2.7) times as often.
``hpsv2``
    the cosine alone: HPS v2 (Wu et al. 2023, arXiv:2306.09341). Published weights
    (``xswu/HPSv2``) are an open_clip pickle: convert them to a ``CLIPModel`` folder first. About
    .2 to .3. Pictures that are no squares are padded with black, as there.
``aesthetic``
    LAION's aesthetic predictor V2 (github.com/christophschuhmann/improved-aesthetic-predictor):
    five linear layers on the unit embedding of ``openai/clip-vit-large-patch14``. The folder holds
    that model and the layers in ``aesthetic.safetensors``, made by `AESTHETIC`. About 4 to 7;
    prompts play no part.
``clip-iqa``
    probability of "Good photo." against "Bad photo." (CLIP-IQA; Wang et al. 2023,
    arXiv:2207.12396): :math:`softmax(\exp(s) \cos)`. The paper's figures are of ResNet-50 without
    position embeddings; of other CLIP models values compare with their own only. Prompts play no
    part.

They were learned from pictures of 2021 to 2023. They agree with people on average, reward strong
colours and fine detail, and can be led astray: look at the pictures as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .alignment import Alignment, CLIPWithText
from .hub import CLIPFeatures

HEAD = "aesthetic.safetensors"
AESTHETIC = (
    'python -c "import torch; from safetensors.torch import save_file; '
    "save_file(torch.load('sac+logos+ava1-l14-linearMSE.pth', 'cpu', weights_only=True), "
    f"'{HEAD}')\""
)
LAYERS = (0, 2, 4, 6, 7)  # of the published file; between them was dropout
GOOD_AND_BAD = ("Good photo.", "Bad photo.")


class PickScore(CLIPWithText):
    """PickScore; see the module."""

    def __init__(self, model: str) -> None:
        super().__init__(model, use_safetensors=True)
        self.name = f"pickscore:{model}"

    @torch.inference_mode()
    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Of each picture and its prompt, shape (N,)."""
        return self.network.logit_scale.exp() * self.cosines(images, prompts)


class HPSv2(CLIPWithText):
    """HPS v2; see the module."""

    def __init__(self, model: str) -> None:
        super().__init__(model, use_safetensors=True)
        self.name = f"hpsv2:{model}"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Of each picture and its prompt, shape (N,)."""
        height, width = images.shape[2:]
        longer = max(height, width)
        left, top = (longer - width) // 2, (longer - height) // 2
        square = left, longer - width - left, top, longer - height - top
        return self.cosines(nn.functional.pad(images, square), prompts)


class Aesthetic(CLIPFeatures):
    """LAION's aesthetic predictor; see the module.

    Raises:
        FileNotFoundError: the folder has no layers; says how to make them.
        ValueError: they are no safetensors, or of another model.
    """

    def __init__(self, model: str) -> None:
        file = Path(model) / HEAD
        if not file.is_file():
            raise FileNotFoundError(
                f"no {file}: put it beside the files of openai/clip-vit-large-patch14; to make it: "
                f"{AESTHETIC}"
            )
        super().__init__(model, use_safetensors=True)
        self.name = f"aesthetic:{model}"
        try:
            weights = load_file(file)
            parts = [(weights[f"layers.{n}.weight"], weights[f"layers.{n}.bias"]) for n in LAYERS]
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{file} does not hold the layers ({error}); {AESTHETIC}") from error
        sizes = [self.network.config.projection_dim, *(len(bias) for _, bias in parts)]
        shapes = [tuple(weight.shape) for weight, _ in parts]
        if shapes != list(zip(sizes[1:], sizes, strict=False)) or sizes[-1] != 1:
            raise ValueError(f"{file} does not fit {model}, whose embeddings have {sizes[0]} parts")
        self.layers = nn.Sequential(*(nn.Linear(i, o) for o, i in shapes))
        for layer, (weight, bias) in zip(self.layers, parts, strict=True):
            layer.load_state_dict({"weight": weight, "bias": bias})
        self.requires_grad_(False)

    @torch.inference_mode()
    def score(self, images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        """Of each picture, shape (N,); the prompts play no part."""
        return self.layers(nn.functional.normalize(self(images), dim=1))[:, 0]


class CLIPIQA(CLIPWithText):
    """CLIP-IQA; see the module."""

    def __init__(self, model: str) -> None:
        super().__init__(model, use_safetensors=True)
        self.name = f"clip-iqa:{model}"

    @torch.inference_mode()
    def score(self, images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        """Of each picture, shape (N,), in [0, 1]; the prompts play no part."""
        pictures, texts = (
            nn.functional.normalize(x, dim=1) for x in (self(images), self.texts(GOOD_AND_BAD))
        )
        return (self.network.logit_scale.exp() * pictures @ texts.T).softmax(1)[:, 0]


KINDS: dict[str, type[PickScore | HPSv2 | Aesthetic | CLIPIQA]] = {
    "pickscore": PickScore,
    "hpsv2": HPSv2,
    "aesthetic": Aesthetic,
    "clip-iqa": CLIPIQA,
}
NEED_PROMPTS = ("pickscore", "hpsv2")


def check_preference(name: str) -> str:
    """The kind in KIND:MODEL.

    Raises:
        ValueError: there is no such kind, or no model.
    """
    kind, _, model = name.partition(":")
    if kind not in KINDS or not model:
        known = ", ".join(f"{known}:MODEL" for known in KINDS)
        raise ValueError(f"unknown score {name!r}; there are: {known}")
    return kind


def kinds_of(names: Sequence[str]) -> dict[str, str]:
    """Kind -> KIND:MODEL.

    Raises:
        ValueError: see `check_preference`, or two of one kind.
    """
    kinds = {check_preference(name): name for name in names}
    if len(kinds) < len(names):
        raise ValueError(f"name every kind of score once, got {', '.join(names)}")
    return kinds


def load_preference(name: str, device: str | torch.device = "cpu") -> Alignment:
    """A score by name, on a device.

    Args:
        name: KIND:MODEL.
        device: Where it computes.

    Raises:
        ValueError: see `check_preference`, or a folder that holds something else.
        FileNotFoundError: the weights are not there.
    """
    kind = check_preference(name)
    return KINDS[kind](name.partition(":")[2]).to(device)
