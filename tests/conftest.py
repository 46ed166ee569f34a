"""Settings of the whole suite."""

import torch

# The networks here are tiny: a second thread costs more than it gives.
torch.set_num_threads(1)
