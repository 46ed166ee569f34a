"""Metrics of sets of pictures: features, then statistics, then a value."""
