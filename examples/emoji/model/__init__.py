"""The embedded model of Pilotage as the package `pilotage-emoji`."""

from pathlib import Path

FOLDER = Path(__file__).parent
"""What ``DiffusionPipeline.from_pretrained`` takes."""
