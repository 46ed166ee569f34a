"""Metrics and commands."""
