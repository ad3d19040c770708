"""Attribute, predict and edit a network by its parts."""

from skperf.components._ablation import Ablation
from skperf.components._attributor import ComponentAttributor
from skperf.components._display import ComponentDisplay, EditPathDisplay
from skperf.components._editor import ComponentEditor
from skperf.components._saving import load_attributions
from skperf.components.units import Component, Place

__all__ = [
    "Ablation",
    "Component",
    "ComponentAttributor",
    "ComponentDisplay",
    "ComponentEditor",
    "EditPathDisplay",
    "Place",
    "load_attributions",
]
