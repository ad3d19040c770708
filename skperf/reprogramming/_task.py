"""What `Reprogrammer` finds out before any training: encoder, images, names, heads."""

from copy import deepcopy
from dataclasses import dataclass, replace
from numbers import Integral, Real

import numpy as np
import torch
from torch import nn

from skperf.backbone._sklearn import Interval, Options, StrOptions
from skperf.reprogramming.encoders import FrozenEncoder, open_encoder
from skperf.reprogramming.programs import (
    BOUNDS,
    ImageProgram,
    InputProgram,
    TextProgram,
    filled_prompts,
    text_program,
)
from skperf.reprogramming.rejection import SCORES
from skperf.reprogramming.rows import RowEncoder, RowProgram

ALPHA_GRID = tuple(round(0.1 * step, 1) for step in range(11))
TEXT_PROGRAMS = ("auto", "none", "bias", "position", "table", "table+position")
MAPPINGS = ("rlm", "flm", "ilm", "blm", "blm+", "linear")

_POSITIVE = [Interval(Real, 0, None, closed="neither")]
_NOT_NEGATIVE = [Interval(Real, 0, None, closed="left")]
_COUNT = [Interval(Integral, 1, None, closed="left")]

CONSTRAINTS = {
    "encoder": "no_validation",
    "processor": "no_validation",
    "tokenizer": "no_validation",
    "class_names": ["array-like", dict, None],
    "prompts": [str, list, tuple],
    "image_shape": ["array-like", None],
    "channels": [StrOptions({"first", "last"})],
    "input_range": ["array-like"],
    "normalize": [StrOptions({"auto"}), "array-like", None],
    "canvas": [StrOptions({"auto"}), "array-like", *_COUNT],
    "layout": [StrOptions({"overlay", "pad"})],
    "border": [Integral],
    "bound": [StrOptions(set(BOUNDS))],
    "clip": [StrOptions({"inward", "plain"})],
    "init": [StrOptions({"zeros", "normal"})],
    "text": [StrOptions(set(TEXT_PROGRAMS))],
    "head": [StrOptions({"auto", "prompts", "mapping", "linear"})],
    "mapping": [StrOptions(set(MAPPINGS)), "array-like"],
    "mapping_m": _COUNT,
    "mapping_smoothing": _NOT_NEGATIVE,
    "objective": [StrOptions({"cross_entropy", "contrastive"})],
    "focal_gamma": _NOT_NEGATIVE,
    "focal_alpha": _POSITIVE,
    "alpha": [StrOptions({"auto"}), Real, "array-like"],
    "training_alpha": [Interval(Real, 0, 1, closed="left")],
    "none_margin": [Interval(Real, None, None, closed="neither"), None],
    "renormalize": ["boolean"],
    "logit_scale": [StrOptions({"encoder", "calibrated"}), *_POSITIVE],
    "ood_score": [StrOptions({*SCORES, "disagreement"})],
    "ood_temperature": _POSITIVE,
    "ood_retention": [Interval(Real, 0, 1, closed="right")],
    "lr": [StrOptions({"auto"}), *_POSITIVE],
    "text_lr": [StrOptions({"auto"}), *_POSITIVE],
    "head_lr": [StrOptions({"auto"}), *_POSITIVE],
    "weight_decay": _NOT_NEGATIVE,
    "text_decay": _NOT_NEGATIVE,
    "warmup": _NOT_NEGATIVE,
    "schedule": [StrOptions({"cosine", "constant"})],
    "max_epochs": [Interval(Integral, 0, None, closed="left")],
    "batch_size": _COUNT,
    "validation_fraction": [Interval(Real, 0, 1, closed="left")],
    "early_stopping": ["boolean"],
    "n_iter_no_change": _COUNT,
    "gradient": [Options(str, {"exact", "rge", "spsa"})],
    "n_directions": _COUNT,
    "smoothing": _POSITIVE,
    "query_budget": [*_COUNT, None],
    "device": [str, torch.device, None],
    "random_state": ["random_state"],
    "verbose": ["verbose"],
    "net_params": [dict, None],
}

#: What the authors' released code does (github.com/IBM/reprogrammer, commit f107472), as
#: parameters of `Reprogrammer`. The border is meant for a canvas of 224 pixels and the
#: warm-up, in steps, for long training.
RELEASED_SETTINGS = {
    "layout": "overlay",
    "border": 16,
    "bound": "tanh",
    "clip": "plain",
    "init": "normal",
    "text": "table+position",
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
    "early_stopping": False,
}


@dataclass(frozen=True)
class Task:
    """Everything that is settled before training."""

    encoder: FrozenEncoder
    program: InputProgram
    head: str
    n_classes: int
    n_outputs: int
    names: list[str]
    alphas: tuple[float, ...]
    image_shape: tuple[int, ...] | None
    ids: torch.Tensor | None
    text: TextProgram | None


def settle(estimator, images, classes):
    """Hold parameters, encoder, images and labels against one another.

    Shapes: images (n, channels, height, width) or (n, n_features), classes (n_classes,).
    """
    encoder = _opened(estimator, images)
    names = class_texts(estimator.class_names, classes)
    head = _head(estimator, encoder)
    text, ids = _texts(estimator, encoder, names)
    program = _program(estimator, encoder, images)
    n_outputs = _width(encoder, program, images[:1])
    _check_mapping(estimator, head, n_outputs, len(classes))
    if estimator.ood_score == "disagreement" and ids is None:
        raise ValueError(
            "ood_score='disagreement' compares with the zero-shot representation, which needs an "
            "encoder with a text tower and a tokenizer."
        )
    return Task(
        encoder,
        program,
        head,
        len(classes),
        n_outputs,
        names,
        _alphas(estimator.alpha, ids is not None),
        None if estimator.encoder is None else tuple(images.shape[1:]),
        ids,
        text,
    )


def as_images(X, *, image_shape, channels, input_range, any_rows):
    """Bring validated rows into the form in which the estimator works.

    Shapes: X (n, ...) -> (n, channels, height, width) or (n, n_features).
    """
    if any_rows:
        return _tensor(X, np.float64).flatten(1)
    if X.ndim == 2:
        X = X.reshape(len(X), *_row_shape(X.shape[1], image_shape))
    elif X.ndim == 4:
        X = X if channels == "first" else np.moveaxis(X, -1, 1)
    else:
        raise ValueError(
            f"X has {X.ndim} dimensions; expected images (n, channels, height, width) or flat "
            "rows (n, n_features) with image_shape."
        )
    if X.shape[1] not in (1, 3):
        raise ValueError(
            f"X has {X.shape[1]} channels, expected 1 or 3 (shape {X.shape}); for images "
            "(n, height, width, channels) set channels='last'."
        )
    if X.dtype == np.uint8:
        return _tensor(X, np.uint8).float() / 255
    low, high = (float(bound) for bound in input_range)
    smallest, largest = float(X.min()), float(X.max())
    slack = 1e-4 * (high - low)
    if smallest < low - slack or largest > high + slack:
        raise ValueError(
            f"X holds values from {smallest:.4g} to {largest:.4g}; expected floats in "
            f"[{low:g}, {high:g}] or uint8. Already normalised? Give the images as they were: "
            "the encoder's normalisation is done inside (or set input_range)."
        )
    images = _tensor(X, np.float32)
    return images if (low, high) == (0, 1) else ((images - low) / (high - low)).clamp(0, 1)


def class_texts(class_names, classes):
    """Name every class: classes (n_classes,)."""
    labels = classes.tolist()
    if class_names is None:
        return [str(label).replace("_", " ") for label in labels]
    if isinstance(class_names, dict):
        missing = [label for label in labels if label not in class_names]
        if missing:
            raise ValueError(f"class_names has no name for the labels {missing[:10]}.")
        return [str(class_names[label]) for label in labels]
    if len(class_names) != len(labels):
        raise ValueError(
            f"class_names has {len(class_names)} names but y has the {len(labels)} classes "
            f"{labels[:20]}. Where a fold lacks a class, split by class or give class_names as "
            "a dict by label."
        )
    names = [str(name) for name in class_names]
    if set(names) == set(map(str, labels)) and names != [str(label) for label in labels]:
        raise ValueError(f"class_names are the labels in another order than {labels[:20]}.")
    return names


def _tensor(X, dtype):
    # torch takes no array that it may not write to
    return torch.as_tensor(np.require(X, dtype, ["C", "W"]))


def _row_shape(n_features, image_shape):
    if image_shape is None:
        raise ValueError(
            f"X holds flat rows of {n_features} values; say image_shape, such as (1, 28, 28)."
        )
    shape = tuple(int(side) for side in image_shape)
    shape = (1, *shape) if len(shape) == 2 else shape
    if len(shape) != 3 or np.prod(shape) != n_features:
        raise ValueError(
            f"image_shape={tuple(image_shape)} does not make {n_features} values, the length "
            "of the rows of X."
        )
    return shape


def _opened(estimator, images):
    if estimator.encoder is None:
        return _row_encoder(images)
    model = estimator.encoder
    if estimator.device is not None and isinstance(model, nn.Module):
        device = torch.device(estimator.device)
        if any(tensor.device != device for tensor in model.state_dict().values()):
            model = deepcopy(model).to(device)
    encoder = open_encoder(model, processor=estimator.processor, tokenizer=estimator.tokenizer)
    if estimator.gradient == "exact" and not encoder.differentiable:
        raise ValueError(
            "the encoder is a plain callable, which has no gradient; use gradient='spsa' or 'rge'."
        )
    if estimator.normalize is None:
        return replace(encoder, mean=None, std=None)
    if not isinstance(estimator.normalize, str):
        mean, std = estimator.normalize
        return replace(encoder, mean=tuple(np.ravel(mean)), std=tuple(np.ravel(std)))
    return encoder


def _row_encoder(rows):
    model = RowEncoder(rows).eval()
    return replace(open_encoder(model), outputs="features")


def _head(estimator, encoder):
    trained = isinstance(estimator.mapping, str) and estimator.mapping == "linear"
    if estimator.head == "auto":
        heads = {
            "embeddings": "linear" if estimator.text == "auto" else "prompts",
            "logits": "linear" if trained else "mapping",
        }
        return heads.get(encoder.outputs, "linear")
    if estimator.head == "prompts" and encoder.text is None:
        raise ValueError("head='prompts' needs an encoder with a text tower; this one has none.")
    if estimator.head == "mapping" and encoder.outputs != "logits":
        raise ValueError(
            f"head='mapping' needs an encoder that returns logits of source labels; this one "
            f"returns {encoder.outputs}. Use head='linear'."
        )
    return "linear" if estimator.head == "mapping" and trained else estimator.head


def _texts(estimator, encoder, names):
    kind = estimator.text
    if kind not in ("auto", "none") and encoder.text is None:
        raise ValueError(f"text={kind!r} needs an encoder with a text tower; this one has none.")
    if encoder.text is None or (encoder.tokenize is None and estimator.head == "linear"):
        return None, None
    if encoder.tokenize is None:
        raise ValueError("the prompts must be tokenized: give tokenizer= (or processor=).")
    prompts = [estimator.prompts] if isinstance(estimator.prompts, str) else estimator.prompts
    ids = encoder.tokenize(filled_prompts(prompts, names)).to(encoder.device)
    if kind == "auto":
        kind = "none" if estimator.head == "linear" else "table"
    return text_program(kind, encoder, ids), ids


def _program(estimator, encoder, images):
    if estimator.encoder is None:
        return RowProgram(images.shape[1])
    n_channels = images.shape[1] if encoder.channels is None else encoder.channels
    if images.shape[1] not in (1, n_channels):
        raise ValueError(f"X has {images.shape[1]} channels; the encoder takes {n_channels}.")
    if isinstance(estimator.canvas, str):
        canvas = encoder.image_size or tuple(images.shape[-2:])
    else:
        canvas = tuple(int(side) for side in np.broadcast_to(estimator.canvas, 2))
    return ImageProgram(
        n_channels,
        canvas,
        int(estimator.border),
        layout=estimator.layout,
        bound=estimator.bound,
        clip=estimator.clip,
    )


def _width(encoder, program, image):
    placed = program.place(image.to(encoder.device))
    try:
        with encoder.open(), torch.inference_mode():
            return encoder.encode_image(placed).shape[1]
    except RuntimeError as error:
        raise ValueError(
            f"the encoder does not take images of shape {tuple(placed.shape[1:])}; set canvas "
            f"to the size it takes. It says: {error}"
        ) from error


def _check_mapping(estimator, head, n_source, n_classes):
    mapping = estimator.mapping
    if head != "mapping":
        return
    if not isinstance(mapping, str):
        if np.shape(mapping) != (n_source, n_classes):
            raise ValueError(
                f"mapping has shape {np.shape(mapping)}, expected ({n_source}, {n_classes}): "
                "source labels by classes."
            )
        if not np.isfinite(np.asarray(mapping, dtype=float)).all():
            raise ValueError("mapping holds values that are not finite.")
    elif mapping in ("rlm", "flm", "ilm") and estimator.mapping_m * n_classes > n_source:
        raise ValueError(
            f"mapping={mapping!r} with mapping_m={estimator.mapping_m} needs "
            f"{estimator.mapping_m * n_classes} source labels for {n_classes} classes; the "
            f"encoder has {n_source}. Use mapping='blm' or head='linear'."
        )


def _alphas(alpha, has_zero_shot):
    if isinstance(alpha, str):
        return ALPHA_GRID if has_zero_shot else (0.0,)
    alphas = tuple(float(value) for value in np.ravel(alpha))
    if not alphas or min(alphas) < 0 or max(alphas) > 1:
        raise ValueError(
            f"alpha must lie in [0, 1] (0 = reprogrammed, 1 = zero-shot); got {alpha}."
        )
    if max(alphas) > 0 and not has_zero_shot:
        raise ValueError(
            f"alpha={alpha} mixes with the zero-shot representation, which needs an encoder "
            "with a text tower and a tokenizer; this one has no zero-shot head. Use alpha=0."
        )
    return alphas
