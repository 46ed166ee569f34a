"""A search basis from the vocabulary: where words near the class word differ from it.

The expected cosine between an estimate from n directions and the gradient is about
sqrt(n / (d + n + 1)): fewer dimensions are worth more than more directions, as long as the useful
part of the space is kept. Words related to the class word span such a part.
"""

from __future__ import annotations

import torch
from torch import Tensor


def neighbour_basis(table: Tensor, centre: Tensor, size: int, neighbours: int = 0) -> Tensor:
    """Leading directions in which the nearest words differ from the centre.

    Args:
        table: Embeddings of the vocabulary, with shape (V, d).
        centre: Embedding of the class word, with shape (d,).
        size: Dimensions of the basis, at most d.
        neighbours: Words looked at, nearest by cosine first; 0 means 4 * size (at most V).

    Returns:
        Orthonormal rows, with shape (size, d), float32, on the CPU; each row's sign is fixed by its
        largest element.

    Raises:
        ValueError: shapes that do not fit, or fewer independent neighbours than `size`.
    """
    if table.ndim != 2 or centre.shape != table.shape[1:]:
        raise ValueError(f"table {tuple(table.shape)} and centre {tuple(centre.shape)} do not fit")
    if not 1 <= size <= table.shape[1]:
        raise ValueError(f"a basis in {table.shape[1]} dimensions cannot have {size}")
    table, centre = table.detach().double().cpu(), centre.detach().double().cpu()
    cosine = torch.nn.functional.cosine_similarity(table, centre[None], dim=1)
    chosen = cosine.argsort(descending=True, stable=True)[: neighbours or 4 * size]
    offsets = table[chosen] - centre
    offsets = offsets[offsets.norm(dim=1) > 1e-6 * centre.norm()]
    rank = int(torch.linalg.matrix_rank(offsets, rtol=1e-5)) if len(offsets) else 0
    if rank < size:
        raise ValueError(f"the neighbours span {rank} dimensions, fewer than the {size} asked for")
    rows = torch.linalg.svd(offsets, full_matrices=False)[2][:size]
    signs = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
    return (rows * signs).float()
