"""Guidance settings compared: pictures, every metric, one page."""
