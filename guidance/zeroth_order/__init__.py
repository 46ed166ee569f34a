"""Zeroth-order search of a token: gradients from losses alone, on tensors."""

from .adam import AdamStep
from .averaging import IterateAverage
from .estimators import Estimator, forward_difference
from .perturbations import generator, perturbations
from .search import FromWords, GradientSearch, Search
from .subspace import SubspaceGradient, low_variance_components
from .timesteps import PartialUniformTimesteps
from .words import WordSearch, candidate_words

__all__ = [
    "AdamStep",
    "Estimator",
    "FromWords",
    "GradientSearch",
    "IterateAverage",
    "PartialUniformTimesteps",
    "Search",
    "SubspaceGradient",
    "WordSearch",
    "candidate_words",
    "forward_difference",
    "generator",
    "low_variance_components",
    "perturbations",
]
