"""What `Reprogrammer` finds out before any training: encoder, images, names, heads."""

import warnings
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from skperf.backbone.randomness import drawing_from
from skperf.reprogramming._options import ALPHA_GRID, Pixels, Settings
from skperf.reprogramming.encoders import FrozenEncoder, examined, of_tokens, open_encoder
from skperf.reprogramming.heads import HEADS
from skperf.reprogramming.masks import MaskProgram
from skperf.reprogramming.pictures import Pictures
from skperf.reprogramming.pixels import PixelPipeline
from skperf.reprogramming.programs import (
    ImageProgram,
    InputProgram,
    Prompts,
    TextProgram,
    class_prompts,
    text_program,
)
from skperf.reprogramming.rejection import FEATURE_SCORES
from skperf.reprogramming.rows import (
    RowEncoder,
    RowPicture,
    RowProgram,
    SignalProgram,
    Spectrogram,
    TokenProgram,
)

#: Prompts up to which each is kept apart, as an attribute of its class.
MOST_ATTRIBUTES = 5000


@dataclass(frozen=True)
class Task:
    """Everything that is settled before training."""

    encoder: FrozenEncoder  # around the user's own model
    own: FrozenEncoder  # the same around a private view
    program: InputProgram
    head: str
    n_classes: int
    n_outputs: int
    names: list[list[str]]
    alphas: tuple[float, ...]
    image_shape: tuple[int, ...] | None
    prompts: Prompts | None
    text: TextProgram | None
    zero_shot: Tensor | None  # (n_classes, n_outputs)
    texts: list[list[str]] | None
    keeps_outputs: bool  # whether the plain outputs of all rows are computed
    n_queries: int = 1

    def closed(self) -> "Task":
        """Drop the private view, which belongs to one call."""
        return replace(self, own=self.encoder)

    def reopened(self) -> "Task":
        """Open a private view anew."""
        return replace(self, own=self.encoder._private())

    def with_names(self, settings: Settings, classes: np.ndarray) -> "Task":
        """Take other classes, with the same text program: classes (n_classes,)."""
        names = class_texts(settings.class_names, classes)
        _, prompts, texts = _texts(settings.but(text="none"), self.encoder, names, classes)
        with torch.no_grad():
            zero_shot = prompts.embeddings(self.own).detach()
        _warn_of_twins(zero_shot, names)
        known = {"names": names, "prompts": prompts, "texts": texts, "zero_shot": zero_shot}
        return replace(self, n_classes=len(names), **known)


def settle(settings: Settings, pictures: Pictures, classes: np.ndarray) -> Task:
    """Hold parameters, encoder, images and labels against one another: classes (n_classes,)."""
    encoder = _opened(settings, pictures)
    names = class_texts(settings.class_names, classes)
    first = pictures.tensors([0])[0]
    program = _program(settings, encoder, pictures, first)
    encoder, own = _tried(encoder, program, first)
    n_outputs = own.width
    head = _head(settings, encoder)
    text, prompts, texts = _texts(settings, encoder, names, classes)
    zero_shot = None
    if prompts is not None:
        with torch.no_grad():
            zero_shot = prompts.embeddings(own).detach()
        if zero_shot.shape[1] != n_outputs:
            raise ValueError(
                f"the encoder {type(settings.encoder).__name__} embeds images in {n_outputs} "
                f"dimensions and texts in {zero_shot.shape[1]}: they cannot be compared."
            )
        _warn_of_twins(zero_shot, names)
    _check_mapping(settings, head, n_outputs, len(classes))
    if settings.ood_score == "disagreement" and prompts is None:
        raise ValueError(
            "ood_score='disagreement' compares with the zero-shot representation, which needs an "
            "encoder with a text tower and a tokenizer."
        )
    if settings.ood_score in FEATURE_SCORES and settings.gradient != "exact":
        raise ValueError(
            f"ood_score={settings.ood_score!r} needs the outputs for every training row, more "
            "queries than an encoder that can only be called is asked; use 'max_logit'."
        )
    return Task(
        encoder,
        own,
        program,
        head,
        len(classes),
        n_outputs,
        names,
        _alphas(settings.alpha, prompts is not None),
        None if settings.encoder is None else tuple(first.shape[1:]),
        prompts,
        text,
        zero_shot,
        texts,
        settings.gradient == "exact" or zero_shot is not None,
    )


def class_texts(class_names, classes):
    """Name every class, by one or several synonyms: classes (n_classes,)."""
    labels = classes.tolist()
    if class_names is None:
        return [[str(label).replace("_", " ")] for label in labels]
    if isinstance(class_names, dict):
        missing = [label for label in labels if label not in class_names]
        if missing:
            raise ValueError(f"class_names has no name for the labels {missing[:10]}.")
        return [_synonyms(class_names[label]) for label in labels]
    if len(class_names) != len(labels):
        raise ValueError(
            f"class_names has {len(class_names)} names but y has the {len(labels)} classes "
            f"{labels[:20]}. Where a fold lacks a class, split by class or give class_names as "
            "a dict by label."
        )
    names = [_synonyms(name) for name in class_names]
    flat = [known[0] for known in names]
    if set(flat) == set(map(str, labels)) and flat != [str(label) for label in labels]:
        raise ValueError(f"class_names are the labels in another order than {labels[:20]}.")
    return names


def _synonyms(name):
    if isinstance(name, list | tuple | set | np.ndarray):
        if not len(name):
            raise ValueError("class_names holds an empty list of names.")
        return [str(one) for one in (sorted(name, key=str) if isinstance(name, set) else name)]
    return [str(name)]


def _warn_of_twins(zero_shot: Tensor, names: list[list[str]]) -> None:
    cosines = zero_shot @ zero_shot.T
    twins = (cosines > 1 - 1e-6).triu(1).nonzero().tolist()
    if twins:
        named = [(names[a][0], names[b][0]) for a, b in twins[:3]]
        warnings.warn(
            f"the encoder cannot tell the names of some classes apart: {named}. Their prompts "
            "have the same embedding; are they in a language that the tokenizer knows?",
            UserWarning,
            stacklevel=2,
        )


def _opened(settings: Settings, pictures: Pictures) -> FrozenEncoder:
    if settings.encoder is None:
        rows = torch.cat(pictures.tensors(np.arange(len(pictures)))).flatten(1)
        return replace(open_encoder(RowEncoder(rows).eval()), outputs="features")
    model = on_device(settings)
    encoder = open_encoder(model, processor=settings.processor, tokenizer=settings.tokenizer)
    if settings.gradient == "exact" and not encoder.differentiable and encoder.text is None:
        raise ValueError(
            "the encoder is a plain callable, which has no gradient; use gradient='spsa' or 'rge'."
        )
    encoder = replace(encoder, pipeline=prepared(settings.pixels, encoder.pipeline))
    return of_tokens(encoder) if settings.pixels.rows == "tokens" else encoder


def on_device(settings: Settings):
    """Copy the encoder to where it is to work, if it lives elsewhere."""
    model = settings.encoder
    if settings.device is not None and isinstance(model, nn.Module):
        device = torch.device(settings.device)
        if any(tensor.device != device for tensor in model.state_dict().values()):
            return deepcopy(model).to(device)
    return model


def prepared(pixels, pipeline: PixelPipeline) -> PixelPipeline:
    """Change the encoder's own preparation of images by what the user says of it."""
    changes: dict[str, Any] = {}
    if pixels.normalize is None:
        changes |= {"mean": None, "std": None}
    elif not isinstance(pixels.normalize, str):
        mean, std = (tuple(map(float, np.ravel(values))) for values in pixels.normalize)
        changes |= {"mean": mean, "std": std}
    if pixels.resize != "auto":
        changes |= {"resize": pixels.resize, "scaled": None}
    if pixels.interpolation != "auto":
        changes["interpolation"] = pixels.interpolation
    if pixels.shrink is not None:
        changes["shrink"] = int(pixels.shrink)
    return replace(pipeline, **changes)


def _tried(encoder: FrozenEncoder, program: InputProgram, first: Tensor):
    model = encoder.model
    own = encoder._private()
    placed = program.place(first).to(own.device)
    try:
        with drawing_from(torch.Generator().manual_seed(0)) as drawing:
            encoder = examined(own, placed)
    except (RuntimeError, ValueError) as error:
        if "turned" in str(error):
            raise
        raise ValueError(
            f"the encoder does not take images of shape {tuple(placed.shape[1:])}; set canvas "
            f"to the size it takes. It says: {error}"
        ) from error
    encoder = replace(encoder, draws=drawing.drawn)
    return replace(encoder, model=model, mine=False), encoder


def _head(settings: Settings, encoder: FrozenEncoder) -> str:
    trained = isinstance(settings.mapping, str) and settings.mapping == "linear"
    if settings.head == "auto":
        heads = {
            "embeddings": "linear" if settings.text == "auto" else "prompts",
            "logits": "linear" if trained else "mapping",
        }
        return heads.get(encoder.outputs, "linear")
    if settings.head in HEADS:
        needs_text = settings.head in ("adapter", "attributes")
        if needs_text and encoder.text is None:
            raise ValueError(
                f"head={settings.head!r} needs an encoder with a text tower; this one has none."
            )
        return "linear"
    if settings.head == "prompts" and encoder.text is None:
        raise ValueError("head='prompts' needs an encoder with a text tower; this one has none.")
    if settings.head == "mapping" and encoder.outputs != "logits":
        raise ValueError(
            f"head='mapping' needs an encoder that returns logits of source labels; this one "
            f"returns {encoder.outputs}. Use head='linear'."
        )
    return "linear" if settings.head == "mapping" and trained else settings.head


def _texts(settings: Settings, encoder: FrozenEncoder, names, classes):
    kind = settings.text
    if kind not in ("auto", "none") and encoder.text is None:
        raise ValueError(f"text={kind!r} needs an encoder with a text tower; this one has none.")
    if encoder.text is None or (encoder.tokenize is None and settings.head == "linear"):
        return None, None, None
    if encoder.tokenize is None:
        raise ValueError("the prompts must be tokenized: give tokenizer= (or processor=).")
    texts = class_prompts(settings.prompts, names, classes.tolist())
    tokens = encoder.tokenize([text for own in texts for text in own]).to(encoder.device)
    groups = np.repeat(np.arange(len(texts)), [len(own) for own in texts])
    prompts = Prompts(tokens, torch.as_tensor(groups, device=encoder.device), len(texts))
    if kind == "auto":
        kind = "table" if settings.head in ("auto", "prompts") else "none"
    return text_program(kind, encoder, tokens), prompts, texts


def _program(
    settings: Settings, encoder: FrozenEncoder, pictures: Pictures, first: Tensor
) -> InputProgram:
    if settings.encoder is None:
        return RowProgram((first.flatten(1).shape[1],))
    if settings.pixels.rows == "tokens":
        return _token_program(encoder, pictures, first)
    pipeline, front = encoder.pipeline, None
    if settings.pixels.rows != "pictures":
        if settings.layout == "mask":
            raise ValueError(
                f"layout='mask' is for pictures; rows={settings.pixels.rows!r} takes a border."
            )
        some = torch.cat(pictures.tensors(np.arange(len(pictures))))
        if encoder.axes == 1 and settings.pixels.rows != "spectrogram":
            return _signal_program(settings, encoder, some)
        front = _row_front(settings.pixels, encoder, some)
        first, pipeline = front(first), replace(pipeline, resize="squash", scaled=None)
    n_channels = first.shape[1] if encoder.channels is None else encoder.channels
    if first.shape[1] not in (1, n_channels):
        raise ValueError(f"X has {first.shape[1]} channels; the encoder takes {n_channels}.")
    if not isinstance(settings.pixels.canvas, str) and pipeline.resize == "patches":
        pipeline = replace(pipeline, resize="squash")
    canvas = _canvas(settings.pixels, pipeline, pictures, first)
    options = {"bound": settings.pixels.bound, "clip": settings.pixels.clip, "pipeline": pipeline}
    if settings.layout == "mask":
        return MaskProgram(n_channels, canvas, **options)
    border = int(settings.border)
    return ImageProgram(n_channels, canvas, border, layout=settings.layout, front=front, **options)


def _token_program(encoder: FrozenEncoder, pictures: Pictures, first: Tensor) -> TokenProgram:
    largest, known = int(pictures.source.max()), len(encoder._token_weight())
    if largest >= known:
        raise ValueError(
            f"X holds the token id {largest}, but the encoder knows {known} tokens: were the "
            "texts tokenized for another one?"
        )
    return TokenProgram((first.shape[1],), encoder.token_width)


def _row_front(pixels: Pixels, encoder: FrozenEncoder, some: Tensor) -> Spectrogram | RowPicture:
    """Make pictures of rows: some (n, ...)."""
    if encoder.axes is None and encoder.text is None and isinstance(pixels.canvas, str):
        raise ValueError(
            f"rows={pixels.rows!r}: the encoder says neither that it takes signals nor that "
            "it takes pictures; set canvas to the (height, width) of its pictures."
        )
    if pixels.rows == "spectrogram":
        return Spectrogram.of(some)
    flat = some.flatten(1)
    return RowPicture(flat.amin(0), flat.amax(0))


def _canvas(
    pixels: Pixels, pipeline: PixelPipeline, pictures: Pictures, first: Tensor
) -> tuple[int, int]:
    """Height and width of what the encoder sees."""
    if not isinstance(pixels.canvas, str):
        height, width = np.broadcast_to(pixels.canvas, 2)
        return int(height), int(width)
    ragged = pipeline.size is None and pipeline.resize != "patches"
    if ragged and not isinstance(pictures.source, np.ndarray):
        shapes = {tuple(t.shape[-2:]) for t in pictures.tensors(range(min(64, len(pictures))))}
        if len(shapes) > 1:
            raise ValueError(
                f"X holds pictures of different sizes ({sorted(shapes)[:3]}), and the encoder "
                "does not say what size it takes; set canvas."
            )
    return pipeline.canvas((int(first.shape[-2]), int(first.shape[-1])))


def _signal_program(settings: Settings, encoder: FrozenEncoder, some: Tensor) -> SignalProgram:
    pixels = settings.pixels
    n_channels = 1 if some.ndim == 2 else some.shape[1]
    if n_channels not in (1, encoder.channels):
        raise ValueError(f"X has {n_channels} channels; the encoder takes {encoder.channels}.")
    centre, scale = some.new_zeros(()), some.new_ones(())
    if pixels.normalize == "auto":
        # each column of a table is a quantity of its own, the places of a series are one
        across = (0,) if pixels.rows == "table" else tuple(range(some.ndim))
        centre, scale = some.mean(across), some.std(across, correction=0)
        scale = torch.where(scale > 1e-10 * some.abs().amax(), scale, 1.0)
    elif pixels.normalize is not None:
        centre, scale = (some.new_tensor(np.ravel(v)) for v in pixels.normalize)
    length = some.shape[-1] if isinstance(pixels.canvas, str) else int(np.ravel(pixels.canvas)[0])
    own = {"layout": settings.layout, "bound": pixels.bound}
    channels = encoder.channels or n_channels
    return SignalProgram(channels, (length,), int(settings.border), centre, scale, **own)


def _check_mapping(settings: Settings, head: str, n_source: int, n_classes: int) -> None:
    mapping, per_class = settings.mapping, settings.training.mapping_m
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
    elif mapping in ("rlm", "flm", "ilm") and per_class * n_classes > n_source:
        raise ValueError(
            f"mapping={mapping!r} with mapping_m={per_class} needs "
            f"{per_class * n_classes} source labels for {n_classes} classes; the "
            f"encoder has {n_source}. Use mapping='blm' or head='linear'."
        )


def _alphas(alpha, has_zero_shot: bool) -> tuple[float, ...]:
    if isinstance(alpha, str):
        return ALPHA_GRID if has_zero_shot else (0.0,)
    alphas = checked_alphas(alpha)
    if max(alphas) > 0 and not has_zero_shot:
        raise ValueError(
            f"alpha={alpha} mixes with the zero-shot representation, which needs an encoder "
            "with a text tower and a tokenizer; this one has no zero-shot head. Use alpha=0."
        )
    return alphas


def checked_alphas(alpha) -> tuple[float, ...]:
    """Read one mix or several, each in [0, 1]."""
    try:
        alphas = tuple(float(value) for value in np.ravel(alpha))
    except (TypeError, ValueError):
        alphas = ()
    if not alphas or not all(0 <= value <= 1 for value in alphas):
        raise ValueError(
            f"alpha must lie in [0, 1] (0 = reprogrammed, 1 = zero-shot); got {alpha}."
        )
    return alphas
