"""What the processes that share a call send each other, over torch.distributed.

Predictions stay on their device: NCCL carries them between GPUs, gloo between processors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import constants

from ..processes import processes

# How long a process waits for the others, unless they were connected with a time of their own.
PATIENCE = timedelta(seconds=60)


class ProcessesError(OSError):
    """The processes that share a call disagree, or one of them was lost."""


class Exchange:
    """A group of processes that make the same call.

    Args:
        group: Of torch.distributed.

    Attributes:
        rank: Number of this process, from 0.
        size: How many there are.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def gather_rows(self, own: Tensor, sizes: Sequence[int]) -> Tensor:
        """The rows that all processes have evaluated, in the order of the processes.

        Args:
            own: Those of this process, with shape (n, \\*): `sizes` says how many count.
            sizes: How many rows every process adds, at most n.

        Returns:
            A tensor with shape (sum(sizes), \\*).
        """
        most = max(sizes)
        own = own[:most].contiguous()
        if len(own) < most:
            own = torch.cat([own, own.new_zeros(most - len(own), *own.shape[1:])])
        every = own.new_empty(self.size, *own.shape)
        self._ask(dist.all_gather, [bits(part) for part in every], bits(own))
        if min(sizes) == most:
            return every.flatten(0, 1)
        return torch.cat([part[:n] for part, n in zip(every, sizes, strict=True)])

    def overwrite(self, tensor: Tensor, source: int) -> None:
        """Overwrite a tensor, of any shape, by that of the process `source`."""
        sent = tensor.contiguous()
        self._ask(dist.broadcast, bits(sent), source)
        if sent is not tensor and self.rank != source:
            tensor.copy_(sent)

    def fingerprints(self, tensor: Tensor) -> Tensor:
        """A sum over the bits of every process's tensor: int64, with shape (size,)."""
        own = bits(tensor.clone(memory_format=torch.contiguous_format))
        whole = own.view(torch.int32) if own.numel() % 4 == 0 else own
        return self.gather_rows(whole.sum(dtype=torch.int64)[None], [1] * self.size)

    def agree(self, facts: Mapping[str, str]) -> None:
        """Compare what should be the same in all processes.

        Args:
            facts: Names and digests.

        Raises:
            ProcessesError: something differs, in every process the same error.
        """
        every = self.tell(dict(facts))
        first = every[0]
        for rank, other in enumerate(every):
            names = [n for n in {**first, **other} if first.get(n) != other.get(n)]
            if names:
                raise ProcessesError(
                    f"process {rank} differs from process 0 in: {', '.join(names)}. Processes that "
                    "share the branches of a call have to make the same call with the same model "
                    "and versions, and generators of the same seed"
                )

    def tell(self, value: Any) -> list[Any]:
        """A small value of every process, in their order."""
        every: list[Any] = [None] * self.size
        self._ask(dist.all_gather_object, every, value)
        return every

    def _ask(self, collective: Callable[..., Any], *args: Any) -> None:
        try:
            collective(*args, group=self.group)
        except RuntimeError as error:
            raise ProcessesError(
                f"process {self.rank} of {self.size} has lost another one, which ended, or did not "
                f"come to the same step in time; what it printed tells why ({error})"
            ) from error


def connected() -> Exchange:
    """The processes that ``accelerate launch`` or ``torchrun`` has started.

    A process waits 60 s for the others; another time is that of the group, if the processes were
    connected with one (``InitProcessGroupKwargs(timeout=...)`` of Accelerate).

    Raises:
        ValueError: this is the only process.
    """
    state = processes()
    if state.num_processes == 1:
        raise ValueError(
            "parallel='branches' shares a call among processes, and this is the only one: start it "
            "with 'accelerate launch --num_processes 2' or 'torchrun --nproc_per_node 2', or leave "
            "parallel= out"
        )
    return Exchange(_group(dist.group.WORLD))


@functools.cache
def _group(world: Any) -> Any:
    """A group of all processes with a patience of its own."""
    device = processes().device.type
    given = world._get_backend(torch.device(device)).options._timeout
    usual = (constants.default_pg_timeout, constants.default_pg_nccl_timeout)
    return dist.new_group(timeout=PATIENCE if given in usual else given)


def bits(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor, as bytes: every backend carries those."""
    # Of a single element the stride may be anything.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
