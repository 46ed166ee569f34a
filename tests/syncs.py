"""Finding what would make the host wait for a device, on a machine that has none."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READS = {  # each returns to the host something computed on the device
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
}


class HostReads(TorchDispatchMode):
    """Lists the operations whose result the host must wait for, or refuses them."""

    def __init__(self, refuse=True):
        super().__init__()
        self.refuse, self.found = refuse, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READS:
            self.found.append(func.__name__)
            assert not self.refuse, f"{func} would make the host wait for the device"
        return func(*args, **(kwargs or {}))
