"""Fitting to runs: recorded predictions, regression, estimates fitted on the way."""
