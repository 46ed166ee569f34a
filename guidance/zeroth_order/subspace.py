r"""Subspace Gradient (SG): directions in which the token hardly moved are taken out of ĝ.

The last tau tokens are standardised (per element, zero mean and unit deviation); of their principal
components, ordered by variance, the leading ones hold the share :math:`1 - \nu` of the variance.
The remaining ones, W, are noise: :math:`\hat g \leftarrow \hat g - W^T W \hat g` for the next tau
steps, during which the next tau tokens are recorded.

The paper does not say what becomes of directions that tau tokens cannot span (tau < d): here they
stay in ĝ, so that the search is never confined to where it has been. Components without variance
(rounding, one of them always from centring) are no directions of the history and stay as well.

References:
    Seo et al., https://arxiv.org/abs/2503.14868 (tau = 128, nu = 1e-3).
"""

from __future__ import annotations

import torch
from torch import Tensor


def low_variance_components(history: Tensor, nu: float) -> Tensor:
    """Principal components that hold the last share `nu` of the variance.

    Args:
        history: Tokens, with shape (tau, d).
        nu: Share of the standardised history's variance that counts as noise, in [0, 1).

    Returns:
        Orthonormal rows, with shape (r, d), float64; r may be 0.
    """
    centred = history.double() - history.double().mean(0)
    deviation = centred.square().mean(0).sqrt()
    standardised = centred / deviation.where(deviation > 0, 1)
    _, values, components = torch.linalg.svd(standardised, full_matrices=False)
    variance = values.square()
    if not variance.sum() > 0:
        return components[:0]
    floor = values[0] * max(history.shape) * torch.finfo(torch.float64).eps
    held = variance.cumsum(0) / variance.sum()
    # A component leads if those before it do not yet hold the share.
    leading = torch.cat([held.new_zeros(1), held[:-1]]) < 1 - nu
    return components[~leading & (values > floor)]
