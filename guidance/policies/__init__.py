"""Policies: which branches are evaluated at a step, and what fills in for those left out."""

from . import adaptive, interval, schedule  # noqa: F401
