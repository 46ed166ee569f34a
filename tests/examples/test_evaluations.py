"""The stored figures of fewer evaluations, and how they are compared."""

import json
from pathlib import Path

import pytest
import torch

from examples.studies import evaluations
from pilotage.guidance import CFG, forecast

STORED = json.loads(Path("eval/results/evaluations.json").read_text())
ROWS = [row for row in STORED["rows"] if "budget" in row]
WHOLE = [row for row in STORED["rows"] if "budget" not in row]


def cost_of(row):
    return tuple(row[k] for k in ("network", "guidance_scale", "steps_of_full_run", "budget"))


def test_the_stored_figures_are_of_this_code():
    costs = [cost_of(row) for row in ROWS]
    known = {(*key, nfe) for key, listed in evaluations.COSTS.items() for nfe in listed}
    assert len(ROWS) >= 30 and set(costs) == known and len(WHOLE) == len(evaluations.COSTS)
    assert STORED["n"] == evaluations.HELD_OUT >= 94
    for row, cost in zip(ROWS, costs, strict=True):
        full, nfe = cost[2:]
        if row["method"] in evaluations.OURS:
            assert row["nfe"] <= nfe, "a baseline gets the next step more, ours never does"
            others = {r["method"] for r, c in zip(ROWS, costs, strict=True) if c == cost}
            assert row["against"].keys() == others - set(evaluations.OURS)
        if row["method"] == "forecast":
            settings = [
                str(CFG() | forecast(k / full, period))
                for k in range(1, full)
                for period in range(1, full)
            ]
            assert row["guidance"] in settings


def test_what_the_page_claims():
    """Ours against the same timesteps without Pilotage, and against its own full run."""

    def row(method, *cost):
        (found,) = (r for r in ROWS if r["method"] == method and cost_of(r)[1:] == cost)
        return found

    placed = row("placed", 7.5, 20, 24)
    assert placed["ssim_own"] >= 0.99
    assert placed["against"]["cfg, same timesteps"]["ssim_200"][1] > 0
    assert row("placed", 7.5, 50, 25)["psnr_own"] >= 32
    fine = [row("placed, to 200 steps", 7.5, 20, nfe) for nfe in (24, 18, 12, 10)]
    fine += [r for r in ROWS if r["network"] == "distilled" and r["method"].endswith("200 steps")]
    assert len(fine) == 7
    for ours in (fine[0], *fine[4:]):
        assert ours["against_full_run"]["ssim_200"][1] > 0
    for ours in fine:
        for other, metrics in ours["against"].items():
            assert metrics["ssim_200"][1] > 0, (ours["budget"], other)


def test_differences_are_paired(monkeypatch):
    """Means and differences by hand; the interval is that of the prompts' differences."""
    monkeypatch.setattr(evaluations, "HELD_OUT", 60)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(60, generator=generator).double()

    def row(method, shift):
        noise = 0.1 * torch.randn(60, generator=generator).double()
        names = (f"{m}_{r}" for m in evaluations.METRICS for r in ("own", "200"))
        return {
            "method": method,
            "values": dict.fromkeys(names, (prompts + shift + noise).tolist()),
        }

    rows = [row("placed", 0.2), row("rival", 0.0), row("other", 0.2)]
    values = [torch.tensor(r["values"]["ssim_own"]) for r in rows]
    evaluations.compared(rows, rows[1]["values"])
    assert rows[0]["ssim_own"] == pytest.approx(values[0].mean().item(), abs=1e-5)
    assert "against" not in rows[1]
    value, low, high = rows[0]["against"]["rival"]["ssim_200"]
    assert rows[0]["against_full_run"]["ssim_200"][0] == value
    differences = values[0] - values[1]
    assert value == pytest.approx(differences.mean().item(), abs=1e-5)
    error = differences.std().item() / 60**0.5
    assert 1.9 * error < value - low < 2.9 * error and high - value == pytest.approx(
        value - low, abs=2e-5
    )
    low, high = rows[0]["against"]["other"]["ssim_200"][1:]
    assert low < 0 < high
