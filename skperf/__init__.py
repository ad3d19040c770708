"""Scikit-learn estimators for people who already have a trained torch network."""

from skperf.backbone._edited import EditedClassifier
from skperf.backbone._modules import from_module
from skperf.backbone._nets import Net, default_net
from skperf.backbone._training import TrainingRun
from skperf.backbone.architectures import MLP
from skperf.backbone.sparse import Sparse
from skperf.components import (
    Ablation,
    Component,
    ComponentAttributor,
    ComponentDisplay,
    ComponentEditor,
    EditPathDisplay,
    Place,
    load_attributions,
)
from skperf.influence import FadingDisplay, InfluenceDisplay, InfluenceScorer, Recipe
from skperf.performative import PerformativeAdapter, PerformativeWarning, TrajectoryDisplay
from skperf.reprogramming import (
    RELEASED_SETTINGS,
    AlphaPathDisplay,
    FrozenEncoder,
    LabelMapDisplay,
    OODScoreDisplay,
    Pixels,
    ProgramDisplay,
    Reprogrammer,
    Training,
    open_encoder,
)

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "RELEASED_SETTINGS",
    "Ablation",
    "AlphaPathDisplay",
    "Component",
    "ComponentAttributor",
    "ComponentDisplay",
    "ComponentEditor",
    "EditPathDisplay",
    "EditedClassifier",
    "FadingDisplay",
    "FrozenEncoder",
    "InfluenceDisplay",
    "InfluenceScorer",
    "LabelMapDisplay",
    "Net",
    "OODScoreDisplay",
    "PerformativeAdapter",
    "PerformativeWarning",
    "Pixels",
    "Place",
    "ProgramDisplay",
    "Recipe",
    "Reprogrammer",
    "Sparse",
    "Training",
    "TrainingRun",
    "TrajectoryDisplay",
    "default_net",
    "from_module",
    "load_attributions",
    "open_encoder",
]
