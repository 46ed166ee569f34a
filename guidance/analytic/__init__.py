"""Denoisers computed from a data set instead of trained, and the statistics behind them."""

from .accumulate import Accumulator
from .statistics import DatasetStatistics

__all__ = ["Accumulator", "DatasetStatistics"]
