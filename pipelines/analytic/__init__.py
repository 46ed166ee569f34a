"""Analytic denoisers as diffusers models, pipelines and a way to begin later (teleportation)."""
