"""A frozen encoder on a new task, with its knowledge of what it does not know kept."""

from skperf.reprogramming._display import (
    AlphaPathDisplay,
    LabelMapDisplay,
    OODScoreDisplay,
    ProgramDisplay,
)
from skperf.reprogramming._options import RELEASED_SETTINGS, Pixels, Training
from skperf.reprogramming._reprogrammer import Reprogrammer
from skperf.reprogramming.encoders import FrozenEncoder, open_encoder

__all__ = [
    "RELEASED_SETTINGS",
    "AlphaPathDisplay",
    "FrozenEncoder",
    "LabelMapDisplay",
    "OODScoreDisplay",
    "Pixels",
    "ProgramDisplay",
    "Reprogrammer",
    "Training",
    "open_encoder",
]
