"""Attribute, predict and edit a network by its parts."""

from skperf.components._attributor import ComponentAttributor
from skperf.components._display import ComponentDisplay, EditPathDisplay
from skperf.components._editor import ComponentEditor
from skperf.components.units import Component

__all__ = [
    "Component",
    "ComponentAttributor",
    "ComponentDisplay",
    "ComponentEditor",
    "EditPathDisplay",
]
