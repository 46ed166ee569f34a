"""Policies: which branches are evaluated at a step, and what fills in for those left out."""

from . import adaptive, interval, scales, schedule  # noqa: F401
