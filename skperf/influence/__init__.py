"""Which training rows made a prediction, how long that stays true, and what to do about it."""

from skperf.influence._display import FadingDisplay, InfluenceDisplay
from skperf.influence._methods import (
    CG,
    EKFAC,
    GGN,
    GIF,
    KFAC,
    TRAK,
    Arnoldi,
    DataInf,
    Exact,
    GradientDot,
    LiSSA,
    Nearest,
    Replay,
    Source,
    TracIn,
)
from skperf.influence._scorer import InfluenceScorer
from skperf.influence.checkpoints import read_checkpoints
from skperf.influence.diffusion import PerDraw, noised
from skperf.influence.retraining import Recipe

__all__ = [
    "CG",
    "EKFAC",
    "GGN",
    "GIF",
    "KFAC",
    "TRAK",
    "Arnoldi",
    "DataInf",
    "Exact",
    "FadingDisplay",
    "GradientDot",
    "InfluenceDisplay",
    "InfluenceScorer",
    "LiSSA",
    "Nearest",
    "PerDraw",
    "Recipe",
    "Replay",
    "Source",
    "TracIn",
    "noised",
    "read_checkpoints",
]
