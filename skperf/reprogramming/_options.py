"""What a `Reprogrammer` may be told: parameters, the two records of options, and their limits."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from sklearn.base import BaseEstimator

from skperf.backbone._sklearn import Interval, Options, StrOptions
from skperf.reprogramming.heads import HEADS
from skperf.reprogramming.pixels import PIL_CODES
from skperf.reprogramming.programs import BOUNDS, TEXT_PROGRAMS
from skperf.reprogramming.rejection import FEATURE_SCORES, SCORES

ALPHA_GRID = tuple(round(0.1 * step, 1) for step in range(11))
MAPPINGS = ("rlm", "flm", "ilm", "blm", "blm+", "linear")

_POSITIVE = [Interval(Real, 0, None, closed="neither")]
_NOT_NEGATIVE = [Interval(Real, 0, None, closed="left")]
_COUNT = [Interval(Integral, 1, None, closed="left")]


@dataclass(eq=False, repr=False, kw_only=True)
class Pixels(BaseEstimator):
    """How pictures are read, brought to the encoder's size and programmed.

    Parameters
    ----------
    image_shape : tuple, optional
        (height, width) or (channels, height, width) of flat rows.
    channels : {"first", "last"}, default="first"
        Where arrays have their channels; one channel is repeated where three are needed.
    input_range : pair of float, default=(0, 1)
        Darkest and brightest value of float images.
    normalize : "auto", None or (mean, std), default="auto"
        Of the encoder's input; "auto" takes what encoder or processor say.
    canvas : "auto", int or (height, width), default="auto"
        Size that the encoder sees; "auto" takes the encoder's own, else that of the images.
    resize : {"auto", "cover", "squash", "contain", "none"}, default="auto"
        Scale to cover the canvas and crop, ignore the proportions, or fit inside and fill;
        "auto" does what the encoder's own processor does.
    interpolation : {"auto", "nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"}, \
default="auto"
        One of PIL's filters; "auto" is that of the encoder's own processor.
    shrink : int, optional
        Side to which pictures are scaled first, as the released code does.
    bound : {"tanh", "clamp", "none"}, default="tanh"
        Keeps the border's values in (-1, 1).
    clip : {"inward", "plain"}, default="inward"
        Gradient of the clipping to [0, 1]: "inward" lets no pixel get stuck outside.
    augment : callable, optional
        ``augment(images, generator)`` changes a training batch of images in [0, 1] on the
        canvas, (n, channels, height, width), before the program is added.
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "image_shape": ["array-like", None],
        "channels": [StrOptions({"first", "last"})],
        "input_range": ["array-like"],
        "normalize": [StrOptions({"auto"}), "array-like", None],
        "canvas": [StrOptions({"auto"}), "array-like", *_COUNT],
        "resize": [StrOptions({"auto", "cover", "squash", "contain", "none"})],
        "interpolation": [StrOptions({"auto", *PIL_CODES})],
        "shrink": [*_COUNT, None],
        "bound": [StrOptions(set(BOUNDS))],
        "clip": [StrOptions({"inward", "plain"})],
        "augment": [callable, None],
    }

    image_shape: Any = None
    channels: Any = "first"
    input_range: Any = (0.0, 1.0)
    normalize: Any = "auto"
    canvas: Any = "auto"
    resize: Any = "auto"
    interpolation: Any = "auto"
    shrink: Any = None
    bound: Any = "tanh"
    clip: Any = "inward"
    augment: Any = None


@dataclass(eq=False, repr=False, kw_only=True)
class Training(BaseEstimator):
    """How the programs of a `Reprogrammer` are trained and judged.

    Parameters
    ----------
    lr : "auto" or float, default="auto"
        Learning rate of the border; "auto" is 0.03 where there are prompts, else 0.1.
    text_lr : "auto" or float, default="auto"
        Learning rate of the text delta; "auto" goes by the scale of the token embeddings.
    head_lr : "auto" or float, default="auto"
        Learning rate of the linear head; "auto" goes by the scale of what it is added to.
    weight_decay : float, default=0.0
        Coupled decay of the border.
    text_decay : float, default=0.0
        Decoupled decay of the text delta towards the pre-trained embeddings.
    schedule : {"cosine", "constant"}, default="cosine"
        Of the learning rates.
    warmup : float, default=0.05
        Share of the steps; from 1 on, their number.
    validation_fraction : float, default=0.1
        Share of the rows held out for alpha, thresholds, heads and early stopping. Where that
        would be fewer than 20, alpha and thresholds are cross-fitted: every row is judged by
        programs trained on four fifths of the others, and the programs train on all rows.
    early_stopping : bool, default=False
        Stop when the loss held out has not improved, and go back to its best.
    n_iter_no_change : int, default=5
        Epochs of patience.
    class_weight : "balanced", dict or None, default=None
        Weights of the classes, as in scikit-learn.
    focal_gamma : float, default=0.0
        Exponent of the focal form of the objective.
    focal_alpha : float, default=1.0
        Its factor.
    training_alpha : float, default=0.5
        The mix whose loss is averaged with that of the reprogrammed representation in
        training; 0 trains the latter alone, as the released code does.
    none_margin : float or None, default=2.0
        Training adds one logit to those of the classes, "none of these": the same for all
        images, so far above the mean of the zero-shot classifier's largest logits. The right
        class has to beat it, which gives the similarities themselves a meaning ("max_logit"
        and "energy" then reject better). Without effect where `training_alpha` is 0, in
        contrast within the batch, and for encoders without a text tower.
    mapping_m : int, default=1
        Source labels of a class in the one-to-one mappings.
    mapping_smoothing : float, default=1.0
        Of the Bayesian mappings.
    renormalize : bool, default=False
        Whether mixed embeddings are scaled back to unit length.
    logit_scale : "encoder", "calibrated" or float, default="encoder"
        Between cosines and logits; "calibrated" fits it to the rows held out.
    n_directions : int, default=8
        Number of differences of an estimated gradient.
    smoothing : float, default=0.01
        Length of these differences.
    query_budget : int, optional
        Images that `fit` may send to the encoder.
    net_params : dict, optional
        Passed on to the skorch net; its ``callbacks`` come after ours.
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "lr": [StrOptions({"auto"}), *_POSITIVE],
        "text_lr": [StrOptions({"auto"}), *_POSITIVE],
        "head_lr": [StrOptions({"auto"}), *_POSITIVE],
        "weight_decay": _NOT_NEGATIVE,
        "text_decay": _NOT_NEGATIVE,
        "schedule": [StrOptions({"cosine", "constant"})],
        "warmup": _NOT_NEGATIVE,
        "validation_fraction": [Interval(Real, 0, 1, closed="left")],
        "early_stopping": ["boolean"],
        "n_iter_no_change": _COUNT,
        "class_weight": [StrOptions({"balanced"}), dict, None],
        "focal_gamma": _NOT_NEGATIVE,
        "focal_alpha": _POSITIVE,
        "training_alpha": [Interval(Real, 0, 1, closed="left")],
        "none_margin": [Interval(Real, None, None, closed="neither"), None],
        "mapping_m": _COUNT,
        "mapping_smoothing": _NOT_NEGATIVE,
        "renormalize": ["boolean"],
        "logit_scale": [StrOptions({"encoder", "calibrated"}), *_POSITIVE],
        "n_directions": _COUNT,
        "smoothing": _POSITIVE,
        "query_budget": [*_COUNT, None],
        "net_params": [dict, None],
    }

    lr: Any = "auto"
    text_lr: Any = "auto"
    head_lr: Any = "auto"
    weight_decay: Any = 0.0
    text_decay: Any = 0.0
    schedule: Any = "cosine"
    warmup: Any = 0.05
    validation_fraction: Any = 0.1
    early_stopping: Any = False
    n_iter_no_change: Any = 5
    class_weight: Any = None
    focal_gamma: Any = 0.0
    focal_alpha: Any = 1.0
    training_alpha: Any = 0.5
    none_margin: Any = 2.0
    mapping_m: Any = 1
    mapping_smoothing: Any = 1.0
    renormalize: Any = False
    logit_scale: Any = "encoder"
    n_directions: Any = 8
    smoothing: Any = 0.01
    query_budget: Any = None
    net_params: Any = None


#: The records of options, by the parameter that holds them.
RECORDS: dict[str, type[BaseEstimator]] = {"pixels": Pixels, "training": Training}
#: The record that each option stands in.
RECORD_OF = {name: record for record, kind in RECORDS.items() for name in kind().get_params()}

CONSTRAINTS = {
    "encoder": "no_validation",
    "processor": "no_validation",
    "tokenizer": "no_validation",
    "class_names": ["array-like", dict, None],
    "prompts": [str, list, tuple, dict, callable],
    "layout": [StrOptions({"overlay", "pad", "mask"})],
    "border": [Integral],
    "init": [StrOptions({"zeros", "normal"})],
    "text": [StrOptions({"auto", *TEXT_PROGRAMS})],
    "head": [StrOptions({"auto", "prompts", "mapping", "linear", *HEADS})],
    "mapping": [StrOptions(set(MAPPINGS)), "array-like"],
    "objective": [StrOptions({"cross_entropy", "contrastive"})],
    "alpha": [StrOptions({"auto"}), Real, "array-like"],
    "ood_score": [StrOptions({"auto", "disagreement", *SCORES, *FEATURE_SCORES})],
    "ood_temperature": _POSITIVE,
    "ood_retention": [Interval(Real, 0, 1, closed="right")],
    "max_epochs": [Interval(Integral, 0, None, closed="left")],
    "batch_size": _COUNT,
    "gradient": [Options(str, {"exact", "rge", "spsa"})],
    "device": [str, torch.device, None],
    "random_state": ["random_state"],
    "verbose": ["verbose"],
    "pixels": [Pixels, None],
    "training": [Training, None],
}

#: What the authors' released code does (github.com/IBM/reprogrammer, commit f107472), as
#: parameters of `Reprogrammer`. Border, canvas and first size are meant for an encoder of 224
#: pixels and the warm-up, in steps, for long training.
RELEASED_SETTINGS = {
    "layout": "overlay",
    "border": 16,
    "shrink": 128,
    "bound": "tanh",
    "clip": "plain",
    "init": "normal",
    "text": "all+position",
    "head": "prompts",
    "objective": "contrastive",
    "focal_gamma": 4.0,
    "focal_alpha": 0.8,
    "alpha": 0.4,
    "training_alpha": 0.0,
    "none_margin": None,
    "logit_scale": "encoder",
    "ood_score": "mcm",
    "ood_temperature": 0.01,
    "lr": 5e-3,
    "text_lr": 5e-4,
    "weight_decay": 0.1,
    "text_decay": 0.1,
    "schedule": "cosine",
    "warmup": 500,
    "max_epochs": 25,
    "batch_size": 128,
    "validation_fraction": 0.0,
    "early_stopping": False,
}


@dataclass(frozen=True)
class Settings:
    """All parameters as they were when `fit` began."""

    encoder: Any
    processor: Any
    tokenizer: Any
    class_names: Any
    prompts: Any
    layout: str
    border: int
    init: str
    text: str
    head: str
    mapping: Any
    objective: str
    alpha: Any
    ood_score: str
    ood_temperature: float
    ood_retention: float
    max_epochs: int
    batch_size: int
    gradient: str
    device: Any
    random_state: Any
    verbose: int
    pixels: Any
    training: Any

    @property
    def trains_none(self) -> bool:
        """Whether "none of these" may take part in training."""
        training = self.training
        return bool(
            training.none_margin is not None
            and training.training_alpha > 0
            and self.objective != "contrastive"
            and self.max_epochs
        )

    @property
    def compares_heads(self) -> bool:
        """Whether heads on cached outputs compete with what is trained."""
        default = isinstance(self.mapping, str) and self.mapping == "blm"
        return bool(
            self.head == "auto"
            and self.text == "auto"
            and isinstance(self.alpha, str)
            and default
            and self.max_epochs
            and self.encoder is not None
            and self.gradient == "exact"
            and self.objective == "cross_entropy"
        )


def takes_options(init: Callable[..., None]) -> Callable[..., None]:
    """Decorate a constructor so that it takes fields of the records by their bare names."""

    @wraps(init)
    def initialised(self: Any, *args: Any, **params: Any) -> None:
        options = {name: params.pop(name) for name in [*params] if name in RECORD_OF}
        init(self, *args, **params)
        if options:
            for record in RECORDS:  # what was given stays as it is
                setattr(self, record, copy.copy(getattr(self, record)))
            self.set_params(**options)

    return initialised
