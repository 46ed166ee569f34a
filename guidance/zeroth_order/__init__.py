"""Zeroth-order search of a token: gradients from losses alone, on tensors."""

from .averaging import IterateAverage
from .basis import neighbour_basis
from .cma_es import CMAES
from .estimators import (
    DIFFERENCES,
    Estimator,
    antithetic_difference,
    forward_difference,
    loss_deviation,
)
from .perturbations import DISTRIBUTIONS, generator, perturbations
from .search import EvolutionSearch, FromWords, GradientSearch, Search
from .sphere import Sphere
from .steps import AdamStep, ScalarStep
from .subspace import SubspaceGradient, low_variance_components
from .timesteps import PartialUniformTimesteps
from .words import WordSearch, candidate_words

__all__ = [
    "CMAES",
    "DIFFERENCES",
    "DISTRIBUTIONS",
    "AdamStep",
    "Estimator",
    "EvolutionSearch",
    "FromWords",
    "GradientSearch",
    "IterateAverage",
    "PartialUniformTimesteps",
    "ScalarStep",
    "Search",
    "Sphere",
    "SubspaceGradient",
    "WordSearch",
    "antithetic_difference",
    "candidate_words",
    "forward_difference",
    "generator",
    "loss_deviation",
    "low_variance_components",
    "neighbour_basis",
    "perturbations",
]
