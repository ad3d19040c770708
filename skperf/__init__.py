"""Scikit-learn estimators for people who already have a trained torch network."""

from skperf.backbone._edited import EditedClassifier
from skperf.backbone._modules import from_module
from skperf.backbone._nets import Net, default_net
from skperf.backbone.architectures import MLP
from skperf.influence import FadingDisplay, InfluenceDisplay, InfluenceScorer
from skperf.performative import PerformativeAdapter, PerformativeWarning, TrajectoryDisplay
from skperf.reprogramming import Reprogrammer

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "EditedClassifier",
    "FadingDisplay",
    "InfluenceDisplay",
    "InfluenceScorer",
    "Net",
    "PerformativeAdapter",
    "PerformativeWarning",
    "Reprogrammer",
    "TrajectoryDisplay",
    "default_net",
    "from_module",
]
