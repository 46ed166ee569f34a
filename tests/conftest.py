"""Settings of the whole suite."""

import os

import torch

# Without a GPU, Triton's kernels run in its interpreter; Triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The networks here are tiny: a second thread costs more than it gives.
torch.set_num_threads(1)

# tests/cuda is for machines with a CUDA device; it is no part of the suite elsewhere.
collect_ignore = [] if torch.cuda.is_available() else ["cuda"]
