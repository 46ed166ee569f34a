"""Zeroth-order search of a token: gradients from losses alone, on tensors."""

from .estimates import forward_difference, generator, perturbations
from .search import Descent, GradientSearch
from .subspace import low_variance_components
from .words import WordSearch, candidate_words

__all__ = [
    "Descent",
    "GradientSearch",
    "WordSearch",
    "candidate_words",
    "forward_difference",
    "generator",
    "low_variance_components",
    "perturbations",
]
