"""Anticipate the label mix that answers a deployed classifier."""

from skperf.performative._adapter import PerformativeAdapter
from skperf.performative._display import TrajectoryDisplay
from skperf.performative._inputs import PerformativeWarning

__all__ = ["PerformativeAdapter", "PerformativeWarning", "TrajectoryDisplay"]
