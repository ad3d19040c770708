"""Frozen encoders of every kind, opened behind one small handle.

An encoder is asked for few things only: embeddings (or logits) of images, embeddings of
token ids, the module that looks tokens up, and how it wants its images. The functions
``_open_*`` find these in the libraries' own objects; nothing here changes one: whoever runs
an encoder runs a private view of it.
"""

import hashlib
import inspect
import operator
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from skperf.backbone.batch_norm import OtherBatchNorm
from skperf.backbone.modes import forward_hooks
from skperf.backbone.parameters import checksum, fingerprint
from skperf.backbone.randomness import drawing_from
from skperf.backbone.views import view
from skperf.reprogramming.batch_norm import affine_batch_norm
from skperf.reprogramming.pixels import (
    PLAIN,
    PixelPipeline,
    pair,
    read_configuration,
    read_processor,
)
from skperf.reprogramming.tokens import Tokens, tokens_for

Hook = Callable[..., Tensor | None]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# families whose processor is that of CLIP or SigLIP
_LIKE_CLIP = ("clip", "metaclip_2", "altclip", "siglip", "siglip2")
_CLIP = PixelPipeline(mean=CLIP_MEAN, std=CLIP_STD)


@dataclass(frozen=True, eq=False)
class FrozenEncoder:
    """A frozen encoder, shared by everyone who holds this handle.

    Cloning or deep-copying the handle gives the handle itself. Pickling carries the
    model.

    Parameters
    ----------
    model : nn.Module or callable
        The user's own object.
    image : callable
        ``image(model, pixels) -> (n, d)``: embeddings, features or logits of normalised
        images.
    outputs : {"embeddings", "logits", "features", "unknown"}
        What `image` returns; only embeddings may be held against texts. What a plain module
        returns is found out by running one image.
    text : callable, optional
        ``text(model, tokens) -> (k, d)``: embeddings of token ids and their mask.
    tokenize : callable, optional
        ``tokenize(texts) -> Tokens``, ids and mask of shape (k, length).
    token_embedding : str, optional
        Name of the part of `model` whose output the text program is added to.
    pipeline : PixelPipeline
        Size, resizing, interpolation and normalisation of its images.
    channels : int, optional
        Channels that the model takes; None where it does not say.
    axes : int, optional
        1 for an encoder of signals, 2 for one of pictures; None where it does not say.
    logit_scale : float, default=1.0
        Factor between cosines and logits.
    logit_bias : float, default=0.0
        Added to the logits.
    probabilities : bool, default=False
        Whether it returns probabilities, which are read by their logarithm.
    width : int, default=0
        Length of a row of outputs; 0 as long as no image was run.
    draws : bool, default=False
        Whether a forward draws random numbers: the same at every call, then.
    mine : bool, default=False
        Whether `model` is a private view; where it is not, every call opens one.
    """

    model: Any
    image: Callable[[Any, Tensor], Any]
    outputs: str
    text: Callable[[Any, Tokens], Tensor] | None = None
    tokenize: Callable[[list[str]], Tokens] | None = None
    token_embedding: str | None = None
    pipeline: PixelPipeline = PLAIN
    channels: int | None = None
    axes: int | None = None
    logit_scale: float = 1.0
    logit_bias: float = 0.0
    probabilities: bool = False
    width: int = 0
    draws: bool = False
    mine: bool = False

    @property
    def mean(self) -> tuple[float, ...] | None:
        """Means that images in [0, 1] are normalised with."""
        return self.pipeline.mean

    @property
    def std(self) -> tuple[float, ...] | None:
        """Deviations that images in [0, 1] are normalised with."""
        return self.pipeline.std

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width that the model takes; None where it does not say."""
        return self.pipeline.size

    @property
    def differentiable(self) -> bool:
        """Whether gradients reach the encoder's input."""
        return isinstance(self.model, nn.Module)

    @property
    def device(self) -> torch.device:
        """Where the model's tensors live."""
        return next((tensor.device for tensor in self._tensors()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Floating type it computes in: single precision where its weights are of half."""
        types = [tensor.dtype for tensor in self._tensors() if tensor.is_floating_point()]
        return torch.float64 if types and types[0] == torch.float64 else torch.float32

    @property
    def token_width(self) -> int:
        """Length of a token's embedding, before the text tower."""
        return self._token_weight().shape[1]

    @property
    def token_scale(self) -> float:
        """Root mean square of the tokens' embeddings."""
        return float(self._token_weight().detach().float().square().mean().sqrt())

    def _private(self) -> "FrozenEncoder":
        """Open the encoder for use: the same around a view of the model."""
        private = self.differentiable and not self.mine
        return replace(self, model=view(self.model), mine=True) if private else self

    def encode_image(self, images: Tensor, model: Any = None) -> Tensor:
        """Encode images.

        Parameters
        ----------
        images : Tensor of shape (n, channels, height, width)
            In [0, 1], of the size that the model takes.
        model : object, optional
            A copy of the model to use in its place.

        Returns
        -------
        Tensor of shape (n, d)
            Embeddings, features or logits.

        Raises
        ------
        ValueError
            If the model returns something else than one row for each image.
        """
        own = drawing_from(torch.Generator().manual_seed(0)) if self.draws else nullcontext()
        with OtherBatchNorm(affine_batch_norm), own:
            returned = self.image(self._used(model), self._pixels(images))
        outputs = _read(returned)[0]
        self._check(outputs, len(images))
        outputs = outputs.to(images.dtype)
        return outputs.clamp_min(1e-12).log() if self.probabilities else outputs

    def encode_text(
        self, tokens: Tokens | Tensor, hook: Hook | None = None, model: Any = None
    ) -> Tensor:
        """Encode tokenized texts.

        Parameters
        ----------
        tokens : Tokens or LongTensor of shape (k, length)
            Token ids, and their mask if there is one.
        hook : callable, optional
            Forward hook for the token embedding; registered for this call only.
        model : object, optional
            A copy of the model to use in its place.

        Returns
        -------
        Tensor of shape (k, d)
            Embeddings.
        """
        assert self.text is not None
        model = self._used(model)
        tokens = Tokens(tokens) if isinstance(tokens, Tensor) else tokens
        if hook is None:
            return self.text(model, tokens)
        with forward_hooks({model.get_submodule(self.token_embedding): hook}):
            return self.text(model, tokens)

    def _fingerprint(self) -> str:
        """Digest that tells two encoders apart."""
        if self.differentiable:
            return fingerprint(self.model)
        name = getattr(self.model, "__qualname__", type(self.model).__qualname__)
        return hashlib.sha256(f"{self.model.__module__}.{name}".encode()).hexdigest()

    def _checksum(self) -> str:
        """Digest that is cheap enough for every call; empty for a callable."""
        return checksum(self.model) if self.differentiable else ""

    def _used(self, model: Any) -> Any:
        return self._private().model if model is None else model

    def _check(self, outputs: Tensor, n: int) -> None:
        if outputs.ndim != 2 or len(outputs) != n:
            raise ValueError(
                f"the encoder turned {n} images into an array of shape {tuple(outputs.shape)}; "
                "expected one row of logits or features for each."
            )

    def _pixels(self, images: Tensor) -> Tensor:
        if images.ndim == 4:
            # channels last in memory, said in a way that torch.func.vmap understands
            images = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
            images = self.pipeline.normalise(images)
        return images.to(self.dtype)

    def _tensors(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.model.buffers()] if self.differentiable else []

    def _token_weight(self) -> Tensor:
        assert self.token_embedding is not None
        weight = self.model.get_submodule(self.token_embedding).weight
        assert isinstance(weight, Tensor)
        return weight

    def __sklearn_clone__(self) -> "FrozenEncoder":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenEncoder":
        return self


def examined(encoder: FrozenEncoder, images: Tensor) -> FrozenEncoder:
    """Find out what a model returns by running images (n, channels, height, width) in [0, 1]."""
    own = encoder._private()
    last: list[tuple[nn.Module, Any]] = []
    leaves = []
    if encoder.differentiable:
        leaves = [part for part in own.model.modules() if not list(part.children())]

    def remember(module: nn.Module, args: Any, output: Any) -> None:
        last[:] = [(module, output)]

    with torch.no_grad(), forward_hooks(dict.fromkeys(leaves, remember)):
        returned = own.image(own.model, encoder._pixels(images))
    outputs, kind = _read(returned)
    # not in inference mode, in which a dropout that is switched off counts as a draw
    encoder._check(outputs, len(images))
    if kind == "unknown":
        # a layer that is called last and whose output comes back as it is
        ends = bool(last) and isinstance(last[0][0], nn.Linear) and _same(last[0][1], outputs)
        kind = "logits" if ends or not encoder.differentiable else "features"
        if getattr(encoder.model, "num_classes", None) == 0:
            kind = "features"
    shares = outputs.float()
    likely = shares.shape[1] > 1 and bool((shares >= 0).all())
    likely = likely and bool(((shares.sum(1) - 1).abs() < 1e-3).all())
    kind = encoder.outputs if encoder.outputs != "unknown" else "logits" if likely else kind
    likely = likely and kind == "logits"
    return replace(encoder, outputs=kind, probabilities=likely, width=outputs.shape[1])


def open_encoder(encoder: Any, *, processor: Any = None, tokenizer: Any = None) -> FrozenEncoder:
    """Find out how an encoder is to be used.

    Parameters
    ----------
    encoder : object
        A transformers text-image model (CLIP, SigLIP and their kin), an object with the
        methods of open_clip, any :class:`torch.nn.Module` from images to logits or features, a
        callable from arrays (n, channels, height, width) to scores (n, s), or a
        :class:`FrozenEncoder`.
    processor : object, optional
        How images are prepared: a transformers processor, which may hold the tokenizer too; a
        composition of torchvision's steps; a dict such as open_clip's ``preprocess_cfg`` or
        timm's ``pretrained_cfg``. By default what the model says of itself.
    tokenizer : callable, optional
        A transformers or open_clip tokenizer, or any function of a list of texts that
        returns token ids.

    Returns
    -------
    FrozenEncoder
        A handle to the same object.

    Raises
    ------
    TypeError
        If the object is none of these.
    """
    if isinstance(encoder, FrozenEncoder):
        return encoder
    if isinstance(encoder, nn.DataParallel | nn.parallel.DistributedDataParallel):
        encoder = encoder.module
    tokenizer = getattr(processor, "tokenizer", None) if tokenizer is None else tokenizer
    return opener_of(encoder)(encoder, processor, tokenizer)


def opener_of(encoder: Any) -> Callable[[Any, Any, Any], FrozenEncoder]:
    """Tell what kind of encoder an object is by the function that opens it."""
    if isinstance(encoder, type) and issubclass(encoder, nn.Module):
        raise TypeError(f"encoder is the class {encoder.__name__}; give an instance of it.")
    for is_one, opener in _OPENERS:
        if is_one(encoder):
            return opener
    raise TypeError(
        f"encoder is a {type(encoder).__name__}; tried, in this order: a transformers model "
        "with get_image_features and get_text_features, an open_clip model with encode_image "
        "and encode_text, a torch.nn.Module from images to logits or features, a callable "
        "from image arrays to scores."
    )


def _has(*names: str) -> Callable[[Any], bool]:
    return lambda encoder: all(callable(getattr(encoder, name, None)) for name in names)


def _open_transformers(model: Any, processor: Any, tokenizer: Any) -> FrozenEncoder:
    config = model.config
    text = getattr(config, "text_config", None)
    vision = getattr(config, "vision_config", None) or getattr(config, "image_config", None)
    tower = getattr(model, "text_model", None)
    scale = getattr(model, "logit_scale", None)
    scale = 1.0 if scale is None else _exponential(scale)
    if hasattr(model, "temperature"):  # of ALIGN
        scale = 1 / float(model.temperature.detach())
    accepted = inspect.signature(model.get_image_features).parameters
    if text is None or vision is None or tower is None or "pixel_values" not in accepted:
        raise TypeError(
            f"the text-image model {type(model).__name__} is not known: it has no "
            "text_config, vision_config and text_model like CLIP. Wrap it in an object with "
            "encode_image(pixels) and encode_text(ids)."
        )
    # SigLIP pools the last position, so its texts are padded to the full length; others pool at
    # a token of the text's own, and shorter is cheaper.
    siglip = "siglip" in config.model_type
    half = ((0.5,) * 3,) * 2
    guess = PixelPipeline(mean=half[0], std=half[1], resize="squash") if siglip else _CLIP
    guess = replace(guess, size=pair(getattr(vision, "image_size", None)))
    if processor is None and config.model_type not in _LIKE_CLIP:
        warnings.warn(
            f"{type(model).__name__} does not say how it wants its pictures: they are resized, "
            "cropped and normalised as CLIP's. Give its own processor=.",
            UserWarning,
            stacklevel=2,
        )
    if hasattr(vision, "num_patches") and guess.size is None:
        patches = {"patch": vision.patch_size, "max_patches": vision.num_patches}
        guess = replace(guess, resize="patches", interpolation="bilinear", **patches)
    return FrozenEncoder(
        model,
        image=_transformers_patches if guess.resize == "patches" else _transformers_image,
        outputs="embeddings",
        text=_transformers_text,
        tokenize=tokenizer and tokens_for(tokenizer, _text_length(text, tower), siglip, siglip),
        token_embedding=_name_in(model, tower.get_input_embeddings()),
        pipeline=guess if processor is None else read_processor(processor, guess),
        channels=getattr(vision, "num_channels", 3),
        logit_scale=scale,
        logit_bias=_number(getattr(model, "logit_bias", None)),
    )


def _text_length(config: Any, tower: nn.Module) -> int:
    positions = [
        part for name, part in tower.named_modules() if name.endswith("position_embeddings")
    ]
    # RoBERTa counts its positions from the padding id on
    offsets = [p.padding_idx + 1 for p in positions if getattr(p, "padding_idx", None) is not None]
    return int(config.max_position_embeddings) - max(offsets, default=0)


def _transformers_image(model: Any, pixels: Tensor) -> Tensor:
    config = getattr(model.config, "vision_config", None) or model.config.image_config
    size = pair(config.image_size)
    other = tuple(pixels.shape[-2:]) != size
    accepts = "interpolate_pos_encoding" in inspect.signature(model.get_image_features).parameters
    more = {"interpolate_pos_encoding": True} if other and accepts else {}
    return projected(model.get_image_features(pixel_values=pixels, **more))


def _transformers_patches(model: Any, pixels: Tensor) -> Tensor:
    side = model.config.vision_config.patch_size
    n, channels, height, width = pixels.shape
    grid = height // side, width // side
    patches = pixels.view(n, channels, grid[0], side, grid[1], side).permute(0, 2, 4, 3, 5, 1)
    patches = patches.reshape(n, grid[0] * grid[1], side * side * channels)
    mask = torch.ones(patches.shape[:2], dtype=torch.int32, device=pixels.device)
    shapes = torch.tensor([grid] * n, device=pixels.device)
    return projected(
        model.get_image_features(
            pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes
        )
    )


def _transformers_text(model: Any, tokens: Tokens) -> Tensor:
    more = {} if tokens.mask is None else {"attention_mask": tokens.mask}
    return projected(model.get_text_features(input_ids=tokens.ids, **more))


def projected(output: Any) -> Tensor:
    """Embeddings in what a transformers model returns: -> (n, d)."""
    # Up to version 4 `get_image_features` returned the embeddings; from version 5 on a record
    # whose `pooler_output` is *already* projected, or a tuple with it in second place.
    if isinstance(output, tuple) and len(output) > 1:
        output = output[1]
    if not isinstance(output, Tensor):
        output = getattr(output, "pooler_output", None)
    if not isinstance(output, Tensor):
        raise TypeError("the encoder returned neither embeddings nor a record that holds them.")
    # FLAVA projects all tokens; its contrast is between the first ones
    return output[:, 0] if output.ndim == 3 else output


def _open_two_towers(model: Any, processor: Any, tokenizer: Any) -> FrozenEncoder:
    visual = getattr(model, "visual", None)
    text = getattr(model, "text", model)
    text = text if isinstance(text, nn.Module) or not callable(text) else model
    pipeline = _CLIP
    for source in (visual, model, getattr(visual, "preprocess_cfg", None)):
        if source is not None:
            size = getattr(source, "image_size", getattr(source, "input_resolution", None))
            pipeline = read_configuration(
                source, replace(pipeline, size=pair(size) or pipeline.size)
            )
    if hasattr(visual, "input_resolution"):  # openai/clip, whose transform is torchvision's
        pipeline = replace(pipeline, rounded_crop=True)
    if processor is not None:
        pipeline = read_processor(processor, pipeline)
    length = getattr(model, "context_length", getattr(text, "context_length", None))
    return FrozenEncoder(
        model,
        image=_two_towers_image,
        outputs="embeddings",
        text=_two_towers_text,
        tokenize=tokenizer and tokens_for(tokenizer, length),
        token_embedding=_name_in(model, _token_embedding(text)),
        pipeline=pipeline,
        channels=_channels(visual if isinstance(visual, nn.Module) else model),
        logit_scale=_exponential(getattr(model, "logit_scale", None)),
        logit_bias=_number(getattr(model, "logit_bias", None)),
    )


def _two_towers_image(model: Any, pixels: Tensor) -> Any:
    return model.encode_image(pixels)


def _two_towers_text(model: Any, tokens: Tokens) -> Tensor:
    embeddings: Tensor = model.encode_text(tokens.ids)
    return embeddings


def _name_in(model: Any, part: nn.Module) -> str | None:
    if not isinstance(model, nn.Module):
        return None
    return next((name for name, known in model.named_modules() if known is part), None)


def _token_embedding(text: Any) -> nn.Module:
    module = getattr(text, "token_embedding", None)
    if module is None and _has("get_input_embeddings")(getattr(text, "transformer", None)):
        module = text.transformer.get_input_embeddings()
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"found no token embedding in {type(text).__name__}; tried token_embedding and "
            "transformer.get_input_embeddings()."
        )
    return module


def _open_module(model: nn.Module, processor: Any, tokenizer: Any) -> FrozenEncoder:
    config = getattr(model, "config", None)
    size = getattr(model, "image_size", getattr(config, "image_size", None))
    pipeline = PixelPipeline(size=pair(size))
    for name in ("default_cfg", "pretrained_cfg", "preprocess_cfg"):
        if getattr(model, name, None) is not None:
            pipeline = read_configuration(getattr(model, name), pipeline)
    if processor is not None:
        pipeline = read_processor(processor, pipeline)
    convolution = _first_convolution(model)
    return FrozenEncoder(
        model,
        image=operator.call,
        outputs="unknown",
        pipeline=pipeline,
        channels=_channels(model),
        axes=None if convolution is None else convolution.weight.ndim - 2,
    )


def _read(returned: Any) -> tuple[Tensor, str]:
    """Find the outputs in what a model returns, and what a record calls them: -> (n, d)."""
    names = {"logits": "logits", "image_embeds": "features", "pooler_output": "features"}
    for name, kind in names.items():
        value = returned.get(name) if isinstance(returned, dict) else getattr(returned, name, None)
        if isinstance(value, Tensor):
            return value.flatten(1), kind
    value = getattr(returned, "last_hidden_state", None)
    if isinstance(value, Tensor):  # a tower without a pooler: its first token
        return (value[:, 0] if value.ndim == 3 else value.flatten(1)), "features"
    if isinstance(returned, tuple | list) and len(returned):
        returned = returned[0]
    if not isinstance(returned, Tensor):
        raise TypeError(
            f"the encoder returned a {type(returned).__name__}; expected a tensor, or a record "
            "with logits, image_embeds, pooler_output or last_hidden_state."
        )
    return (returned.flatten(1) if returned.ndim > 1 else returned), "unknown"


def _same(output: Any, returned: Tensor) -> bool:
    return (
        isinstance(output, Tensor)
        and output.numel() == returned.numel()
        and output.data_ptr() == returned.data_ptr()
    )


def _open_callable(model: Any, processor: Any, tokenizer: Any) -> FrozenEncoder:
    pipeline = PixelPipeline()
    if processor is not None:
        pipeline = read_processor(processor, pipeline)
    return FrozenEncoder(model, image=_callable_outputs, outputs="unknown", pipeline=pipeline)


def _callable_outputs(model: Any, pixels: Tensor) -> Tensor:
    outputs = model(pixels.detach().cpu().numpy())
    return torch.as_tensor(np.asarray(outputs), dtype=pixels.dtype, device=pixels.device)


# The order matters: every model below the first two is a module, every module callable.
_OPENERS: tuple[tuple[Callable[[Any], bool], Callable[[Any, Any, Any], FrozenEncoder]], ...] = (
    (_has("get_image_features", "get_text_features"), _open_transformers),
    (_has("encode_image", "encode_text"), _open_two_towers),
    (lambda encoder: isinstance(encoder, nn.Module), _open_module),
    (callable, _open_callable),
)


def _first_convolution(module: nn.Module) -> nn.Conv1d | nn.Conv2d | None:
    kinds = (nn.Conv1d, nn.Conv2d)
    return next((part for part in module.modules() if isinstance(part, kinds)), None)


def _channels(module: nn.Module) -> int | None:
    first = _first_convolution(module)
    return None if first is None else first.in_channels


def of_tokens(encoder: FrozenEncoder) -> FrozenEncoder:
    """Take an encoder of texts, or the text tower of one, for rows of token ids."""
    model, name = encoder.model, encoder.token_embedding
    if name is None and isinstance(model, nn.Module):
        table = next((part for part in model.modules() if isinstance(part, nn.Embedding)), None)
        name = None if table is None else _name_in(model, table)
    if name is None:
        raise TypeError(
            f"rows='tokens' needs an encoder of texts; found no token embedding in "
            f"{type(model).__name__}."
        )
    image = partial(_shifted_tokens, name=name, text=encoder.text)
    kind = "unknown" if encoder.text is None else "features"
    own: dict[str, Any] = {"token_embedding": name, "pipeline": PLAIN, "channels": None}
    return replace(encoder, image=image, outputs=kind, text=None, **own)


def _shifted_tokens(model: Any, shifts: Tensor, *, name: str, text: Any) -> Any:
    """Run texts whose embeddings are shifted: shifts (n, length, width + 1), ids last."""
    ids = shifts[..., -1].round().long()

    def shifted(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + shifts[..., :-1].to(output)

    config = getattr(model, "config", None)
    pad = getattr(getattr(config, "text_config", config), "pad_token_id", None)
    mask = None if pad is None else (ids != pad).long()
    with forward_hooks({model.get_submodule(name): shifted}):
        if text is not None:
            return text(model, Tokens(ids, mask))
        return model(ids) if mask is None else model(input_ids=ids, attention_mask=mask)


def _exponential(parameter: Tensor | None) -> float:
    return 1.0 if parameter is None else float(parameter.detach().float().exp().mean())


def _number(parameter: Tensor | None) -> float:
    return 0.0 if parameter is None else float(parameter.detach().float().mean())
