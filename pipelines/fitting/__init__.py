"""Fitting for one pipeline: the runs, what is fitted on them, and where it holds."""
