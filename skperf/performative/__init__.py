"""Anticipate the label mix that answers a deployed classifier."""

from skperf.performative._adapter import PerformativeAdapter
from skperf.performative._display import TrajectoryDisplay
from skperf.performative._inputs import PerformativeWarning
from skperf.performative.report import DriftReport

__all__ = ["DriftReport", "PerformativeAdapter", "PerformativeWarning", "TrajectoryDisplay"]
