"""How the elements of a sample are numbered, so that any strides can be read in place."""

from __future__ import annotations

from typing import NamedTuple

LIMIT = 2**31 - 1


class Layout(NamedTuple):
    """An order of the elements of a sample, common to several tensors.

    Args:
        order: The dimensions of a sample (0 is the first after the batch), slowest first; those of
            size 1 last.
        sizes: Sizes of the dimensions that are left after merging, slowest first.
        strides: For each tensor its strides along these, in elements.
        wide: Whether an offset within a sample needs 64 bits. Offsets of samples always have them.
    """

    order: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    wide: bool

    @property
    def dense(self) -> bool:
        """Whether element i lies at offset i in every tensor."""
        return all(strides in ((), (1,)) for strides in self.strides)


def common_layout(sizes: tuple[int, ...], *strides: tuple[int, ...]) -> Layout:
    """The order of the first tensor's memory, with neighbouring dimensions merged.

    Args:
        sizes: Sizes of the non-batch dimensions.
        strides: Of each tensor, along the same dimensions, in elements; 0 for expanded ones.
    """
    by_stride = sorted(range(len(sizes)), key=lambda d: (sizes[d] == 1, -strides[0][d], d))
    merged: list[tuple[int, tuple[int, ...]]] = []
    for d in by_stride:
        if sizes[d] == 1:
            continue
        steps = tuple(own[d] for own in strides)
        if merged and merged[-1][1] == tuple(step * sizes[d] for step in steps):
            merged[-1] = (merged[-1][0] * sizes[d], steps)
        else:
            merged.append((sizes[d], steps))
    kept = tuple(size for size, _ in merged)
    columns = tuple(tuple(steps[i] for _, steps in merged) for i in range(len(strides)))
    elements = 1
    for size in kept:
        elements *= size
    # The last block of a loop reaches beyond the last element before it is masked.
    reach = max(
        sum((size - 1) * step for size, step in zip(kept, own, strict=True)) for own in columns
    )
    return Layout(tuple(by_stride), kept, columns, max(reach, elements) > LIMIT - 2**16)


def dense_strides(sizes: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor without gaps whose elements lie in that order."""
    strides, step = [0] * len(sizes), 1
    for d in reversed(order):
        strides[d], step = step, step * sizes[d]
    return tuple(strides)
