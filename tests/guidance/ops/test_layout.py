"""The numbering of elements against PyTorch's own strides, and where offsets need 64 bits."""

import itertools

import pytest
import torch

from pilotage.guidance.ops.layout import LIMIT, common_layout, dense_strides


def offsets(layout, which):
    """Offsets of a tensor's elements in the layout's order, as the kernel computes them."""
    found = []
    for index in itertools.product(*(range(size) for size in layout.sizes)):
        found.append(sum(i * step for i, step in zip(index, layout.strides[which], strict=True)))
    return found


@pytest.mark.parametrize("order", itertools.permutations(range(4)))
def test_every_tensor_is_walked_in_one_order(order):
    shape = (3, 1, 4, 2)
    plain = torch.arange(24).view(shape)
    turned = torch.empty([shape[d] for d in order]).permute([order.index(d) for d in range(4)])
    expanded = torch.arange(3).view(3, 1, 1, 1).expand(shape)
    tensors = (turned, plain, expanded)
    layout = common_layout(shape, *(tensor.stride() for tensor in tensors))
    strides = dense_strides(shape, layout.order)
    walk = torch.empty(24, dtype=torch.long).as_strided(shape, strides)
    walk.copy_(plain)
    flat = walk.as_strided((24,), (1,)).tolist()
    assert offsets(layout, 0) == list(range(24))  # in the order of the first tensor's memory
    assert offsets(layout, 1) == flat
    assert offsets(layout, 2) == [expanded.reshape(-1)[i].item() for i in flat]


def test_common_layouts_are_dense():
    batch = torch.zeros(4, 8, 6, 6)
    last = batch.contiguous(memory_format=torch.channels_last)
    for tensor in (batch, last, batch[:2], batch[:, :4]):
        layout = common_layout(tuple(tensor.shape[1:]), *(tensor.stride()[1:],) * 2)
        assert layout.dense and not layout.wide
    assert not common_layout((8, 6, 6), last.stride()[1:], batch.stride()[1:]).dense
    assert common_layout((1, 1), (7, 3)).dense


@pytest.mark.parametrize(("frames", "wide"), [(2**11, False), (2**15, True)])
def test_offsets_beyond_32_bits(frames, wide):
    """Tensors of the meta device have strides and no memory."""
    video = torch.empty(1, 16, frames, 64, 64, device="meta")
    assert common_layout(tuple(video.shape[1:]), video.stride()[1:]).wide == wide
    gaps = torch.empty(1, 16, 2 * frames, 64, 64, device="meta")[:, :, ::2]
    layout = common_layout(tuple(gaps.shape[1:]), gaps.stride()[1:])
    largest = sum((n - 1) * s for n, s in zip(gaps.shape[1:], gaps.stride()[1:], strict=True))
    assert layout.wide == (largest > LIMIT)
