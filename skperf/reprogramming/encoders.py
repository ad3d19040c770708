"""Frozen encoders of every kind, opened behind one small handle.

An encoder is asked for few things only: embeddings (or logits) of images, embeddings of
token ids, the module that looks tokens up, and how it wants its images. The functions
``_open_*`` find these in the libraries' own objects; nothing here copies or changes one.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from skperf.backbone.modes import forward_hooks, untouched
from skperf.backbone.parameters import fingerprint
from skperf.reprogramming.batch_norm import AffineBatchNorm
from skperf.reprogramming.tokens import TransformersTokens, tokens_for

Hook = Callable[..., Tensor | None]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


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
    outputs : {"embeddings", "logits", "features"}
        What `image` returns; only embeddings may be held against texts.
    text : callable, optional
        ``text(model, ids) -> (k, d)``: embeddings of token ids.
    tokenize : callable, optional
        ``tokenize(texts) -> LongTensor (k, length)``.
    token_embedding : nn.Module, optional
        The part of `model` whose output the text program is added to.
    image_size : tuple of two ints, optional
        Height and width that the model takes; None where it does not say.
    channels : int, optional
        Channels that the model takes; None where it does not say.
    mean, std : tuple of float, optional
        What images in [0, 1] are normalised with; None for not at all.
    logit_scale : float, default=1.0
        Factor between cosines and logits.
    logit_bias : float, default=0.0
        Added to the logits.
    """

    model: Any
    image: Callable[[Any, Tensor], Tensor]
    outputs: str
    text: Callable[[Any, Tensor], Tensor] | None = None
    tokenize: Callable[[list[str]], Tensor] | None = None
    token_embedding: nn.Module | None = None
    image_size: tuple[int, int] | None = None
    channels: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    logit_scale: float = 1.0
    logit_bias: float = 0.0
    _cache: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def differentiable(self) -> bool:
        """Whether gradients reach the encoder's input."""
        return isinstance(self.model, nn.Module)

    @property
    def device(self) -> torch.device:
        """Where the model's tensors live."""
        tensors = [*self.model.parameters(), *self.model.buffers()] if self.differentiable else []
        return tensors[0].device if tensors else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the model's tensors."""
        tensors = [*self.model.parameters(), *self.model.buffers()] if self.differentiable else []
        return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)

    @property
    def token_width(self) -> int:
        """Length of a token's embedding, before the text tower."""
        assert self.token_embedding is not None
        weight = self.token_embedding.weight
        assert isinstance(weight, Tensor)
        return weight.shape[1]

    @property
    def token_scale(self) -> float:
        """Root mean square of the tokens' embeddings."""
        assert self.token_embedding is not None
        weight = self.token_embedding.weight
        assert isinstance(weight, Tensor)
        return float(weight.detach().float().square().mean().sqrt())

    def open(self) -> AbstractContextManager[Any]:
        """Enter to use the model; it is left as it was found."""
        return untouched(self.model) if self.differentiable else nullcontext()

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
        if images.ndim == 4:
            # channels last in memory, said in a way that torch.func.vmap understands
            images = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        if self.mean is not None and self.std is not None:
            shape = (1, -1, 1, 1)
            mean, std = (images.new_tensor(v).view(shape) for v in (self.mean, self.std))
            images = (images - mean) / std
        with AffineBatchNorm():
            outputs = self.image(self.model if model is None else model, images.to(self.dtype))
        if outputs.ndim != 2 or len(outputs) != len(images):
            raise ValueError(
                f"the encoder turned {len(images)} images into an array of shape "
                f"{tuple(outputs.shape)}; expected one row of logits or features for each."
            )
        return outputs.to(images.dtype)

    def encode_text(self, ids: Tensor, hook: Hook | None = None, model: Any = None) -> Tensor:
        """Encode tokenized texts.

        Parameters
        ----------
        ids : LongTensor of shape (k, length)
            Token ids.
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
        model = self.model if model is None else model
        with forward_hooks({} if hook is None else {self._tokens_of(model): hook}):
            return self.text(model, ids)

    def fingerprint(self) -> str:
        """Digest that tells two encoders apart.

        Returns
        -------
        str
            Of the parameters and buffers; of the qualified name for a callable.
        """
        if "digest" not in self._cache:
            name = getattr(self.model, "__qualname__", type(self.model).__qualname__)
            self._cache["digest"] = (
                fingerprint(self.model)
                if self.differentiable
                else hashlib.sha256(f"{self.model.__module__}.{name}".encode()).hexdigest()
            )
        return self._cache["digest"]

    def _tokens_of(self, model: Any) -> nn.Module:
        names = {part: name for name, part in self.model.named_modules()}
        tokens: nn.Module = model.get_submodule(names[self.token_embedding])
        return tokens

    def __sklearn_clone__(self) -> "FrozenEncoder":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenEncoder":
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}


def open_encoder(encoder: Any, *, processor: Any = None, tokenizer: Any = None) -> FrozenEncoder:
    """Find out how an encoder is to be used.

    Parameters
    ----------
    encoder : object
        A transformers CLIP or SigLIP model, an object with the methods of open_clip, any
        :class:`torch.nn.Module` from images to logits or features, a callable from arrays
        (n, channels, height, width) to scores (n, s), or a :class:`FrozenEncoder`.
    processor : object, optional
        A transformers processor: holds the image statistics and, maybe, the tokenizer.
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
    tokenizer = getattr(processor, "tokenizer", None) if tokenizer is None else tokenizer
    for is_one, opener in _OPENERS:
        if is_one(encoder):
            return opener(encoder, processor, tokenizer)
    raise TypeError(
        f"encoder is a {type(encoder).__name__}; tried, in this order: a transformers model "
        "with get_image_features and get_text_features, an open_clip model with encode_image "
        "and encode_text, a torch.nn.Module from images to logits or features, a callable "
        "from image arrays to scores."
    )


def _has(*names: str) -> Callable[[Any], bool]:
    return lambda encoder: all(callable(getattr(encoder, name, None)) for name in names)


def _open_transformers(model: Any, processor: Any, tokenizer: Any) -> FrozenEncoder:
    text, vision = model.config.text_config, model.config.vision_config
    # SigLIP pools the last position, so its texts are padded to the full length; CLIP pools
    # at the end-of-text token, and shorter is cheaper.
    siglip = "siglip" in model.config.model_type
    mean, std = _statistics(getattr(processor, "image_processor", processor))
    if mean is None or std is None:
        mean, std = ((0.5,) * 3, (0.5,) * 3) if siglip else (CLIP_MEAN, CLIP_STD)
    length = text.max_position_embeddings
    return FrozenEncoder(
        model,
        image=_transformers_image,
        outputs="embeddings",
        text=_transformers_text,
        tokenize=tokenizer and TransformersTokens(tokenizer, length, fill=siglip),
        token_embedding=model.text_model.get_input_embeddings(),
        image_size=_pair(vision.image_size),
        channels=vision.num_channels,
        mean=mean,
        std=std,
        logit_scale=_exponential(model.logit_scale),
        logit_bias=_number(getattr(model, "logit_bias", None)),
    )


def _transformers_image(model: Any, pixels: Tensor) -> Tensor:
    size = _pair(model.config.vision_config.image_size)
    more = {} if tuple(pixels.shape[-2:]) == size else {"interpolate_pos_encoding": True}
    return projected(model.get_image_features(pixel_values=pixels, **more))


def _transformers_text(model: Any, ids: Tensor) -> Tensor:
    return projected(model.get_text_features(input_ids=ids))


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
    return output


def _open_two_towers(model: Any, processor: Any, tokenizer: Any) -> FrozenEncoder:
    visual = getattr(model, "visual", None)
    text = getattr(model, "text", model)
    mean, std = _statistics(processor)
    if mean is None or std is None:
        mean, std = _statistics(model)
    if mean is None or std is None:
        mean, std = _statistics(visual)
    if mean is None or std is None:
        mean, std = CLIP_MEAN, CLIP_STD
    length = getattr(model, "context_length", getattr(text, "context_length", None))
    return FrozenEncoder(
        model,
        image=_two_towers_image,
        outputs="embeddings",
        text=_two_towers_text,
        tokenize=tokenizer and tokens_for(tokenizer, length),
        token_embedding=_token_embedding(text),
        image_size=_pair(getattr(model, "image_size", getattr(visual, "image_size", None))),
        channels=_channels(visual if isinstance(visual, nn.Module) else model),
        mean=mean,
        std=std,
        logit_scale=_exponential(getattr(model, "logit_scale", None)),
        logit_bias=_number(getattr(model, "logit_bias", None)),
    )


def _two_towers_image(model: Any, pixels: Tensor) -> Tensor:
    embeddings: Tensor = model.encode_image(pixels)
    return embeddings


def _two_towers_text(model: Any, ids: Tensor) -> Tensor:
    embeddings: Tensor = model.encode_text(ids)
    return embeddings


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
    mean, std = _statistics(processor)
    layers = [part for part in model.modules() if not list(part.children())]
    owners = [part for part in layers if list(part.parameters(recurse=False))]
    return FrozenEncoder(
        model,
        image=_module_outputs,
        outputs="logits" if owners and isinstance(owners[-1], nn.Linear) else "features",
        image_size=_pair(getattr(model, "image_size", None)),
        channels=_channels(model),
        mean=mean,
        std=std,
    )


def _module_outputs(model: nn.Module, pixels: Tensor) -> Tensor:
    outputs = model(pixels)
    for name in ("logits", "image_embeds", "pooler_output"):
        outputs = getattr(outputs, name, outputs)
    if isinstance(outputs, tuple):
        outputs = outputs[0]
    flat: Tensor = outputs.flatten(1)
    return flat


def _open_callable(model: Any, processor: Any, tokenizer: Any) -> FrozenEncoder:
    return FrozenEncoder(model, image=_callable_outputs, outputs="logits")


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


def _statistics(source: Any) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    for names in (("image_mean", "image_std"), ("mean", "std")):
        values = [getattr(source, name, None) for name in names]
        if all(isinstance(value, Sequence | np.ndarray | Tensor) for value in values):
            mean, std = (tuple(float(v) for v in value) for value in values)  # type: ignore[union-attr]
            return mean, std
    return None, None


def _pair(size: Any) -> tuple[int, int] | None:
    if size is None or isinstance(size, int):
        return None if size is None else (size, size)
    height, width = size
    return int(height), int(width)


def _channels(module: nn.Module) -> int | None:
    convolutions = (part for part in module.modules() if isinstance(part, nn.Conv2d))
    first = next(convolutions, None)
    return None if first is None else first.in_channels


def _exponential(parameter: Tensor | None) -> float:
    return 1.0 if parameter is None else float(parameter.detach().exp().mean())


def _number(parameter: Tensor | None) -> float:
    return 0.0 if parameter is None else float(parameter.detach().mean())
