"""Scikit-learn estimators for people who already have a trained torch network."""

from skperf.backbone._edited import EditedClassifier
from skperf.backbone._modules import from_module
from skperf.backbone._nets import Net, default_net
from skperf.backbone.architectures import MLP
from skperf.performative._adapter import PerformativeAdapter
from skperf.performative._display import TrajectoryDisplay
from skperf.performative._inputs import PerformativeWarning

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "EditedClassifier",
    "Net",
    "PerformativeAdapter",
    "PerformativeWarning",
    "TrajectoryDisplay",
    "default_net",
    "from_module",
]
