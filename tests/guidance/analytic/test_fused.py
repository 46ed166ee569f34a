"""The Triton kernel, interpreted on the CPU, against the float64 reference."""

import os
import subprocess
import sys

SCRIPT = """
import torch
from pilotage.guidance.analytic import Rows, Source, decode, posterior
from pilotage.guidance.analytic.fused import masked_posterior

g = torch.Generator().manual_seed(0)
images = torch.randint(0, 256, (70, 3, 5, 5), generator=g, dtype=torch.uint8)
x = decode(images)
for share, sigma in ((0.1, 0.3), (0.9, 1.0), (0.9, 30.0)):
    y = x[:2] + sigma * torch.randn(2, 3, 5, 5, generator=g)
    mask = torch.rand(75, 75, generator=g) < share
    poisoned = torch.empty_like  # a place that is never written must show
    torch.empty_like = lambda t, **k: torch.full_like(t, torch.nan)
    found = masked_posterior(y, sigma, images, mask)
    torch.empty_like = poisoned
    exact, _ = posterior(y.double(), sigma, Source(images), Rows(mask))
    plain, _ = posterior(y, sigma, Source(images), Rows(mask, torch.float16))
    allowed = 2 * ((plain - exact).abs().max() + torch.finfo(torch.float16).eps * exact.abs().max())
    error = (found - exact).abs().max()
    assert error <= allowed, (share, sigma, error, allowed)
print("done")
"""


def test_kernel_stays_within_twice_the_error_of_the_plain_float16_result():
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == "done", result.stderr
