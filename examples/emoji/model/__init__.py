"""The embedded model of Pilotage as the package `pilotage-emoji`: weights and settings, no code."""

from pathlib import Path

FOLDER = Path(__file__).parent
"""What ``DiffusionPipeline.from_pretrained`` takes."""
