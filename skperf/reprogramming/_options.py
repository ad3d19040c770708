"""What a `Reprogrammer` may be told: parameters, the two records of options, and their limits."""
# ruff: noqa: RUF009 (`_option` makes fields of dataclasses)

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import wraps
from numbers import Integral, Real
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from sklearn.base import BaseEstimator

from skperf.backbone._sklearn import Interval, Options, StrOptions
from skperf.reprogramming.heads import HEADS
from skperf.reprogramming.pictures import PictureForm
from skperf.reprogramming.pixels import PIL_CODES
from skperf.reprogramming.programs import BOUNDS, TEXT_PROGRAMS
from skperf.reprogramming.rejection import FEATURE_SCORES, SCORES

ALPHA_GRID = tuple(round(0.1 * step, 1) for step in range(11))
MAPPINGS = ("rlm", "flm", "ilm", "blm", "blm+", "linear")

_POSITIVE = [Interval(Real, 0, None, closed="neither")]
_NOT_NEGATIVE = [Interval(Real, 0, None, closed="left")]
_COUNT = [Interval(Integral, 1, None, closed="left")]


def _option(default: Any, *allowed: Any) -> Any:
    """Declare a field of a record with what it may be."""
    return field(default=default, metadata={"allowed": list(allowed)})


@dataclass(eq=False, repr=False, kw_only=True)
class Pixels(BaseEstimator):
    """How pictures are read, brought to the encoder's size and programmed.

    Parameters
    ----------
    rows : {"pictures", "table", "series", "spectrogram", "tokens"}, default="pictures"
        What a row of X is. Columns of a table (n, n_features) are standardised for an encoder
        of signals, and drawn as a picture for one of pictures; series (n, length) or
        (n, channels, length) likewise; "spectrogram" draws series by their frequencies; tokens
        (n, length) are ids, or texts for the `tokenizer`, for an encoder of texts.
    image_shape : tuple, optional
        (height, width) or (channels, height, width) of flat rows, with `channels` "last" also
        (height, width, channels); (channels, length) of series.
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

    _parameter_constraints: ClassVar[dict[str, list[Any]]]

    rows: Any = _option(
        "pictures", StrOptions({"pictures", "table", "series", "spectrogram", "tokens"})
    )
    image_shape: Any = _option(None, "array-like", None)
    channels: Any = _option("first", StrOptions({"first", "last"}))
    input_range: Any = _option((0.0, 1.0), "array-like")
    normalize: Any = _option("auto", StrOptions({"auto"}), "array-like", None)
    canvas: Any = _option("auto", StrOptions({"auto"}), "array-like", *_COUNT)
    resize: Any = _option("auto", StrOptions({"auto", "cover", "squash", "contain", "none"}))
    interpolation: Any = _option("auto", StrOptions({"auto", *PIL_CODES}))
    shrink: Any = _option(None, *_COUNT, None)
    bound: Any = _option("tanh", StrOptions(set(BOUNDS)))
    clip: Any = _option("inward", StrOptions({"inward", "plain"}))
    augment: Any = _option(None, callable, None)


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
        Passed on to the skorch net; its ``callbacks`` come after ours, "disable" drops all.
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]]

    lr: Any = _option("auto", StrOptions({"auto"}), *_POSITIVE)
    text_lr: Any = _option("auto", StrOptions({"auto"}), *_POSITIVE)
    head_lr: Any = _option("auto", StrOptions({"auto"}), *_POSITIVE)
    weight_decay: Any = _option(0.0, *_NOT_NEGATIVE)
    text_decay: Any = _option(0.0, *_NOT_NEGATIVE)
    schedule: Any = _option("cosine", StrOptions({"cosine", "constant"}))
    warmup: Any = _option(0.05, *_NOT_NEGATIVE)
    validation_fraction: Any = _option(0.1, Interval(Real, 0, 1, closed="left"))
    early_stopping: Any = _option(False, "boolean")
    n_iter_no_change: Any = _option(5, *_COUNT)
    class_weight: Any = _option(None, StrOptions({"balanced"}), dict, None)
    focal_gamma: Any = _option(0.0, *_NOT_NEGATIVE)
    focal_alpha: Any = _option(1.0, *_POSITIVE)
    training_alpha: Any = _option(0.5, Interval(Real, 0, 1, closed="left"))
    none_margin: Any = _option(2.0, Interval(Real, None, None, closed="neither"), None)
    mapping_m: Any = _option(1, *_COUNT)
    mapping_smoothing: Any = _option(1.0, *_NOT_NEGATIVE)
    renormalize: Any = _option(False, "boolean")
    logit_scale: Any = _option("encoder", StrOptions({"encoder", "calibrated"}), *_POSITIVE)
    n_directions: Any = _option(8, *_COUNT)
    smoothing: Any = _option(0.01, *_POSITIVE)
    query_budget: Any = _option(None, *_COUNT, None)
    net_params: Any = _option(None, dict, None)


#: The records of options, by the parameter that holds them.
RECORDS: dict[str, type[BaseEstimator]] = {"pixels": Pixels, "training": Training}
for kind in RECORDS.values():
    kind._parameter_constraints = {f.name: f.metadata["allowed"] for f in fields(kind)}
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


def form_of(pixels: Any, any_rows: bool = False) -> PictureForm:
    """Read how pictures are given."""
    low, high = (float(bound) for bound in pixels.input_range)
    shape = None if pixels.image_shape is None else tuple(pixels.image_shape)
    any_rows = any_rows or pixels.rows != "pictures"
    return PictureForm(pixels.channels, low, high, shape, any_rows)


class Settings(SimpleNamespace):
    """All parameters as they were when `fit` began, by name."""

    def but(self, **changed: Any) -> "Settings":
        """Copy with others."""
        return Settings(**(vars(self) | changed))

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
